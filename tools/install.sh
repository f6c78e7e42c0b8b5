#!/usr/bin/env bash
# Builds this checkout's environment; `make install` calls it (docs/install.md).
#
#   PYTHON=python3      the interpreter that the environment is made from
#   VENV=.venv          where it goes
#   MMVIM_TORCH=auto    cpu, cuda, or auto: cuda where nvidia-smi lists a GPU
#   MMVIM_TASKS=dense   dense: mmsegmentation and mmdet; cls: mmpretrain, which needs torchvision,
#                       hence the CUDA build of torch (it runs without a GPU, too)
#
# Every step looks at what is there, so a stopped install goes on where it stopped. Only the stamp
# says that the environment is complete, and it is written last.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
[[ $VENV = /* ]] || VENV=$PWD/$VENV
MMVIM_TORCH=${MMVIM_TORCH:-auto}
MMVIM_TASKS=${MMVIM_TASKS:-dense}
CPU_INDEX=https://download.pytorch.org/whl/cpu
STAMP=$VENV/.mmvim-installed
LOG=$VENV/install.log
STEP=0 DOING=start WATCHER=

# ---------------- saying what happens
say() { printf '      %s\n' "$*"; }
step() { DOING=$1 && printf '[%d/7] %s\n' $((++STEP)) "$DOING"; }
exec 3>&2 # an interrupt comes while a step's output goes to the log
fail() { # REASON WHAT_TO_DO
  printf '\nInstall stopped at step %d/7 (%s):\n  %s\n  To do: %s\n' "$STEP" "$DOING" "$1" "$2" >&3
  exit 1
}
lacks() { fail "$1" 'on Debian and Ubuntu: apt install python3-venv python3-dev g++'; }

# Every half minute: how long this takes, and how far the compiler (or the log) has come.
watch_log() { # FIRST_LINE
  local seconds=0 new compiled
  while sleep 1 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
    ((++seconds % 30 == 0)) || continue
    new=$(tail -n "+$1" "$LOG" | tail -c 300000)
    compiled=$(grep -oE '^ *\[[0-9]+/[0-9]+\]' <<<"$new" | tail -n 1 | tr -d ' ') || true
    printf '      %d:%02d  %.80s\n' $((seconds / 60)) $((seconds % 60)) "${compiled:+compiled }${compiled:-$(tail -n 1 <<<"$new")}"
  done
}

stop_watching() { { kill "$WATCHER" && wait "$WATCHER"; } 2>/dev/null || WATCHER=; }
trap stop_watching EXIT
trap 'fail "interrupted" "run the same command again: it goes on from here"' INT TERM

run() { # COMMAND...: what it prints goes to the log; if it fails, the lines that tell why are shown
  local first status=0 why
  printf '\n$ %s\n' "$*" >>"$LOG"
  first=$(wc -l <"$LOG")
  watch_log "$((first + 1))" 9<&- & # without the lock, which goes with the work
  WATCHER=$!
  "$@" >>"$LOG" 2>&1 </dev/null || status=$?
  stop_watching
  ((status)) || return 0
  why=$(tail -n "+$first" "$LOG" | grep -E 'rror:|^ *ERROR|Errno|Killed|No space left' | head -n 8) ||
    why=$(tail -n 12 "$LOG")
  cut -c1-240 <<<"$why" | sed 's/^/  | /' >&2
  fail "a command ended with status $status; everything it printed is in $LOG" \
    'mend what the lines above name (network? disk?); the same command then goes on, or make clean-env'
}

# ---------------- looking at what is there
py() { "$VENV/bin/python" "$@"; }
pin() { sed -n "s/^$1==//p" constraints.txt; }

# What an environment depends on: where it is, its Python, and what describes and builds it.
state_key() {
  {
    echo "$PWD" && py -VV && cat constraints.txt setup.py tools/install.sh
    find ops/csrc ops/build*.py -type f -exec cat {} + 2>/dev/null || true # the compiled op, where there is one
  } | sha256sum
}

# First line of the stamp: the key. Second: the torch that it was made for.
is_complete() {
  [[ -f $STAMP && $(sed -n 1p "$STAMP") = "$(state_key 2>/dev/null)" ]] &&
    [[ $MMVIM_TORCH = auto || $MMVIM_TORCH = "$(sed -n 2p "$STAMP")" ]] &&
    [[ $MMVIM_TASKS = "$(cat "$VENV/.tasks" 2>/dev/null || echo dense)" ]]
}

# A pip that was killed can leave a package that looks installed. The mark says that this happened
# in this step, which then installs over what is there.
unfinished() { [[ -f $VENV/.unfinished-$1 ]]; }
pip_install() { # MARK ARGUMENTS...
  local mark=$VENV/.unfinished-$1 over=()
  if unfinished "$1"; then over=(--ignore-installed); fi
  touch "$mark"
  run py -m pip install --no-input -c constraints.txt ${over[@]+"${over[@]}"} "${@:2}"
  rm "$mark"
}

# ---------------- the steps
choose_torch() {
  local kept found=cpu
  kept=$(cat "$VENV/.torch" 2>/dev/null) || true
  if nvidia-smi -L 2>/dev/null | grep -q GPU; then found=cuda; fi
  if [[ $MMVIM_TASKS = cls ]]; then
    [[ $found = cuda ]] || export MMVIM_OPS_CUDA=${MMVIM_OPS_CUDA:-0} # no GPU to compile kernels for
    found=cuda
  fi
  TORCH=${MMVIM_TORCH/auto/${kept:-$found}}
  [[ $TORCH =~ ^(cpu|cuda)$ ]] || fail "MMVIM_TORCH=$MMVIM_TORCH is unknown" 'use auto, cpu or cuda'
  [[ ${kept:-$TORCH} = "$TORCH" ]] ||
    fail "$VENV was made for torch on $kept, not $TORCH" 'make clean-env first, or name another VENV='
  [[ $MMVIM_TASKS$TORCH != clscpu ]] ||
    fail 'mmpretrain needs torchvision, which has no build for a CPU torch' 'MMVIM_TORCH=cuda: it runs on a CPU'
}

choose_tasks() {
  local kept
  kept=$(cat "$VENV/.tasks" 2>/dev/null) || true
  [[ $MMVIM_TASKS =~ ^(dense|cls)$ ]] || fail "MMVIM_TASKS=$MMVIM_TASKS is unknown" 'use dense or cls'
  [[ ${kept:-$MMVIM_TASKS} = "$MMVIM_TASKS" ]] ||
    fail "$VENV was made for MMVIM_TASKS=$kept, not $MMVIM_TASKS" 'name another VENV='
}

check_machine() {
  step 'checking this machine'
  choose_tasks
  choose_torch
  local base=$PYTHON version headers free need=5
  if py -c '' 2>/dev/null; then base=$VENV/bin/python; fi
  version=$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
    fail "there is no Python at '$base'" 'install Python 3.11, or name one: PYTHON=/path/to/python3.11'
  [[ $version =~ ^3\.(10|11|12)$ ]] ||
    fail "$base is Python $version; mmcv $(pin mmcv) needs 3.10, 3.11 or 3.12" 'name one: PYTHON=/path/to/python3.11'
  "$base" -c 'import ensurepip, venv' 2>/dev/null || lacks "$base has no venv module"
  headers=$("$base" -c 'import sysconfig; print(sysconfig.get_path("include"))')
  [[ -f $headers/Python.h ]] || lacks "$base has no C headers ($headers/Python.h)"
  command -v g++ >/dev/null || lacks "there is no g++, and mmcv's ops are compiled here"
  [[ ! -d $VENV || -f $VENV/pyvenv.cfg || -f $LOG || -z $(ls -A "$VENV") ]] ||
    fail "$VENV is there and is not a Python environment" 'name another folder: VENV='
  if [[ $MMVIM_TASKS = cls ]]; then need=9; elif [[ $TORCH = cuda ]]; then need=15; fi
  free=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
  ((free >= need)) || say "warning: $free GB are free here; an environment takes up to $need GB"
  say "Python $version, $(nproc) cores, torch for $TORCH"
}

make_environment() {
  step "${VENV#"$PWD/"} and build tools"
  mkdir -p "$VENV"
  if ! py -c '' 2>/dev/null; then
    run "$PYTHON" -m venv "$VENV"
  elif ! py -m pip --version >/dev/null 2>&1; then
    run py -m ensurepip
  fi
  echo "$TORCH" >"$VENV/.torch"
  echo "$MMVIM_TASKS" >"$VENV/.tasks"
  export PATH="$VENV/bin:$PATH" PIP_USER=0 # PATH: torch's builder looks for ninja there
  pip_install tools setuptools wheel ninja
}

torch_is_ready() {
  ! unfinished torch && py 2>/dev/null - <<PY
import sys, torch
if '$MMVIM_TASKS' == 'cls':
    import torchvision
own = not torch.__file__.startswith(sys.prefix)
assert own or torch.__version__.split('+')[0] == '$(pin torch)'
assert '$TORCH' == 'cpu' or torch.version.cuda
PY
}

# The CUDA torch in PYTHON was chosen for this machine's driver by someone. A line in a .pth file
# shows its folder to the environment, be PYTHON a system's, conda's or an environment's; what the
# environment holds itself goes first. Nothing after this asks pip for torch, so the pin is idle.
use_own_cuda_torch() {
  local folder
  folder=$("$PYTHON" 2>/dev/null - <<PY
import pathlib, torch
if '$MMVIM_TASKS' == 'cls':
    import torchvision
assert torch.version.cuda and tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 4)
print(pathlib.Path(torch.__file__).parents[1])
PY
  ) || return 0
  echo "$folder" >"$(py -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/own-torch.pth"
  say "using the CUDA torch in $folder"
}

install_torch() {
  step 'torch'
  if [[ $TORCH = cuda ]] && ! torch_is_ready; then use_own_cuda_torch; fi
  if ! torch_is_ready; then
    # === leaves out X+cpu, which pip prefers to X where it finds both.
    local what=("torch==$(pin torch)") where=() ask="import urllib.request as u; u.urlopen('$CPU_INDEX/torch/', timeout=4)"
    if [[ $TORCH = cuda ]]; then
      say 'the CUDA build: a download of 2.8 GB'
      what=("torch===$(pin torch)")
      [[ $MMVIM_TASKS != cls ]] || what+=("torchvision==$(pin torchvision)")
    elif timeout 8 "$VENV/bin/python" -c "$ask" 2>/dev/null; then
      where=(--extra-index-url "$CPU_INDEX") # its X+cpu goes before PyPI's X, several GB with CUDA
    else
      say "no answer from $CPU_INDEX: taking the torch that pip finds elsewhere (PyPI's: several GB)"
    fi
    pip_install torch "${what[@]}" ${where[@]+"${where[@]}"}
  fi
  torch_is_ready || fail "the torch that pip found does not work for $TORCH (python -c 'import torch' in $VENV)" \
    'make clean-env, then PYTHON= with a torch that works, or MMVIM_TORCH=cpu or cuda'
  say "torch $(py -c 'import torch; print(torch.__version__)' 2>/dev/null)"
}

install_mmengine() {
  step 'mmengine, OpenCV'
  pip_install mmengine mmengine
  if py -c 'import cv2' 2>/dev/null; then return; fi
  say 'opencv-python cannot be loaded (bare machines lack libGL): using opencv-python-headless'
  run py -m pip uninstall -y opencv-python opencv-python-headless
  pip_install opencv --no-deps "opencv-python-headless==$(pin opencv-python)"
  run py -c 'import cv2'
}

mmcv_is_ready() {
  ! unfinished mmcv && py >>"$LOG" 2>&1 - <<PY
import mmcv, torch
from mmcv.ops import get_compiling_cuda_version, nms
assert mmcv.__version__ == '$(pin mmcv)'
boxes = torch.tensor([[0., 0., 2., 2.], [0., 0., 2., 2.]])
assert len(nms(boxes, torch.tensor([0.9, 0.8]), 0.5)[1]) == 1
assert not $CUDA_OPS or get_compiling_cuda_version() != 'not available'
PY
}

# One compiler takes up to 1.5 GB. Where torch sees a GPU and there is no nvcc, hiding the GPU makes
# mmcv build its CPU ops instead of stopping.
plan_build() {
  local memory=$(($(awk '/MemAvailable/ {print $2}' /proc/meminfo) / 1024)) limit
  limit=$(cat /sys/fs/cgroup/memory.max 2>/dev/null) || limit=max
  if [[ $limit != max ]] && ((limit / 1048576 < memory)); then memory=$((limit / 1048576)); fi
  MAX_JOBS=$((memory / 1500 < $(nproc) ? memory / 1500 : $(nproc)))
  export MAX_JOBS=$((MAX_JOBS > 0 ? MAX_JOBS : 1)) MMCV_WITH_OPS=1
  CUDA_OPS=$(py -c 'import torch.utils.cpp_extension as e; print(int(e.torch.cuda.is_available() and bool(e.CUDA_HOME)))')
  ((CUDA_OPS)) || export CUDA_VISIBLE_DEVICES=
}

# For classification mmcv without its ops is enough, and nothing is to be compiled.
install_mmcv_lite() {
  step "mmcv-lite $(pin mmcv-lite)"
  pip_install mmcv mmcv-lite
}

install_mmcv() {
  step "mmcv $(pin mmcv) with its compiled ops"
  plan_build
  if mmcv_is_ready; then return; fi
  say "compiling, $MAX_JOBS files at once: about 6 minutes on two idle cores, longer under load;"
  say 'a build that pip has kept takes a moment'
  [[ $TORCH$CUDA_OPS != cuda0 ]] || say 'note: torch sees no GPU, or nvcc is missing: CPU ops only'
  ((!CUDA_OPS)) || say 'with CUDA ops: longer; for the CPU ops only: CUDA_VISIBLE_DEVICES= make install'
  # --no-deps: all it needs came with mmengine.
  local build=(-v --no-build-isolation --no-deps "mmcv==$(pin mmcv)")
  pip_install mmcv "${build[@]}"
  if mmcv_is_ready; then return; fi
  say 'the build that pip had kept does not work with this torch: compiling'
  pip_install mmcv --no-cache-dir --no-binary mmcv --force-reinstall "${build[@]}"
  mmcv_is_ready || fail "mmcv is built, but its ops do not work: see the end of $LOG" \
    'make clean-env, then again; if that does not help, report it with the log'
}

# ---------------- the order
is_complete && { say "${VENV#"$PWD/"} is complete" && exit; }
exec 9<tools/install.sh # two installs of one checkout take turns
flock -n 9 || { say 'another install is running here: waiting for it' && flock 9; }
is_complete && exit
check_machine
rm -f "$STAMP"
make_environment
KEY=$(state_key) # before anything is read: an edit during the install is not covered by it
install_torch
install_mmengine
if [[ $MMVIM_TASKS = cls ]]; then
  install_mmcv_lite
  step 'mmpretrain, pytest'
  pip_install tasks mmpretrain pytest
  CHECK='torchvision, mmpretrain.models'
else
  install_mmcv
  step 'mmsegmentation, mmdet, pytest, ruff'
  pip_install tasks mmsegmentation mmdet ftfy regex pytest ruff
  CHECK='mmcv.ops, mmdet.models, mmseg.models'
fi
# A CUDA torch has the Triton that it was made with, hence no pin in constraints.txt. Beside a CPU
# torch, Triton's interpreter serves the tests of the scan.
[[ $TORCH = cuda ]] || pip_install triton triton==3.7.1
step 'this project (editable), and a check of it all'
pip_install project -v --no-build-isolation --no-deps -e .
run py -c "import $CHECK, mmvim"
printf '%s\n' "$KEY" "$TORCH" >"$STAMP"
backends=$(py -c 'import mmvim_ops; print(*mmvim_ops.available_backends())')
say "${VENV#"$PWD/"} is ready; backends of the selective scan: $backends"
