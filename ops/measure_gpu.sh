#!/usr/bin/env bash
# On a machine with a GPU, torch with CUDA and nvcc, and no network: compile the CUDA kernels, check every
# backend, run the tests that need a GPU, measure. Usage: ops/measure_gpu.sh [arguments of
# ops/benchmark_gpu.py]; PYTHON names the interpreter, MAMBA_SSM the source distribution of mamba_ssm
# (ops/build_mamba_ssm.py) to measure beside.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD/ops:$PWD/build/mamba_ssm${PYTHONPATH:+:$PYTHONPATH}

"$python" ops/build_cuda.py --verbose
if [[ -n ${MAMBA_SSM:-} ]]; then
  "$python" ops/build_mamba_ssm.py "$MAMBA_SSM" build/mamba_ssm || echo 'measured without it'
fi
"$python" -m mmvim_ops || echo 'a backend is not in order, see above' # measure the others all the same
if "$python" -c 'import pytest' 2>/dev/null; then
  "$python" -m pytest -q -p no:cacheprovider tests/ops/backends/test_cuda.py tests/ops/backends/test_triton.py \
    -k 'gpu or graph' || echo 'tests failed, see above'
fi
"$python" ops/benchmark_gpu.py "$@"
"$python" ops/benchmark_gpu.py --sweep --dims 768 "$@"
