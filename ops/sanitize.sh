#!/usr/bin/env bash
# Build the cpp backend, and the cuda backend's kernels as tests emulate them on the CPU, with
# AddressSanitizer and UndefinedBehaviorSanitizer, and run their tests.
# Usage: ops/sanitize.sh [pytest arguments]; PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT

flags='-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1'
cp -r ops/mmvim_ops "$here"
rm -f "$here"/mmvim_ops/*.so
(cd ops && MMVIM_OPS_CXXFLAGS=$flags "$python" setup.py -q build_ext --build-temp "$here/build" --build-lib "$here")
test -f "$here/mmvim_ops/_cpp.so"

# Python and torch are not instrumented: the runtimes come first, and what those leak is not asked.
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export LD_PRELOAD ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$here CXXFLAGS=$flags
# Not what starts other programs, needs more memory than there is, or asks glibc's own allocator.
"$python" -m pytest tests/ops -p no:cacheprovider --capture=sys \
  -k '(cpp or cuda) and not (compiles_and or inductor or 64_bits or tuned_for_the_process)' "$@"
