#!/usr/bin/env bash
# Builds this checkout's environment; `make` calls it (docs/install.md).
#
#   PYTHON=python3          the interpreter that the environment is made from
#   VENV=.venv              where it goes
#   MMVIM_TASKS=dense       seg: segmentation, nothing of mmcv is compiled; dense: and detection and
#                           the tests; cls: classification, whose torchvision needs a CUDA build of
#                           torch (it runs without a GPU, too)
#   MMVIM_TORCH=auto        cpu, cuda, or auto: cuda where nvidia-smi lists a GPU
#   MMVIM_STACK=openmmlab   openmmlab, or onedl: the maintained forks
#
# Every step looks at what is there, so a stopped install goes on where it stopped. Only the stamp
# says that the environment is complete, and it is written last.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3} VENV=${VENV:-.venv}
[[ $VENV = /* ]] || VENV=$PWD/$VENV
CPU_INDEX=https://download.pytorch.org/whl/cpu
STAMP=$VENV/.mmvim-installed LOG=$VENV/install.log CONSTRAINTS=constraints.txt
STEP=0 DOING=start WATCHER=

# ---------------- saying what happens
say() { printf '      %s\n' "$*"; }
step() { DOING=$1 && printf '[%d/5] %s\n' $((++STEP)) "$DOING"; }
exec 3>&2 # an interrupt comes while a step's output goes to the log
fail() { # REASON WHAT_TO_DO
  printf '\nInstall stopped at step %d/5 (%s):\n  %s\n  To do: %s\n' "$STEP" "$DOING" "$1" "$2" >&3
  exit 1
}
lacks() { fail "$1" 'on Debian and Ubuntu: apt install python3-venv python3-dev g++'; }

# Every half minute: how long this takes, and how far the compiler (or the log) has come.
watch_log() { # FIRST_LINE
  local seconds=0 new
  while sleep 1 >/dev/null 2>&1 && kill -0 $$ 2>/dev/null; do
    ((++seconds % 30 == 0)) || continue
    new=$(tail -n "+$1" "$LOG" | tail -c 300000)
    new=$(grep -oE '^ *\[[0-9]+/[0-9]+\]' <<<"$new" | tail -n 1) || new=$(tail -n 1 "$LOG")
    printf '      %d:%02d  %.80s\n' $((seconds / 60)) $((seconds % 60)) "${new#"${new%%[![:space:]]*}"}"
  done
}
stop_watching() { { kill "$WATCHER" && wait "$WATCHER"; } 2>/dev/null || WATCHER=; }

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
    echo "$PWD" && py -VV && cat constraints.txt setup.py pyproject.toml tools/install.sh
    find ops/csrc ops/*.py ops/pyproject.toml -type f -exec cat {} + 2>/dev/null || true
  } | sha256sum
}

# The environment remembers what it was made for. First line of the stamp: the key.
kept() { cat "$VENV/.mmvim-$1" 2>/dev/null || echo "${2-}"; }
is_complete() {
  [[ -f $STAMP && $(<"$STAMP") = "$(state_key 2>/dev/null)" && $TASKS = "$(kept tasks)" ]] &&
    [[ $STACK = "$(kept stack)" && ${MMVIM_TORCH:-auto} =~ ^(auto|$(kept torch))$ ]]
}

# A pip that was killed can leave a package that looks installed. The mark says that this happened
# in this step, which then installs over what is there. --no-compile: Python does it when it imports.
pip_install() { # MARK ARGUMENTS...
  local mark=$VENV/.unfinished-$1 over=()
  [[ ! -f $mark ]] || over=(--ignore-installed)
  touch "$mark"
  run py -m pip install --no-input --no-compile -c "$CONSTRAINTS" ${over[@]+"${over[@]}"} "${@:2}"
  rm "$mark"
}

# ---------------- the steps
settle() { # NAME VALUE ALLOWED: refuse a value that is unknown, or not what the environment is for
  [[ $2 =~ ^($3)$ ]] || fail "MMVIM_${1^^}=$2 is unknown" "use one of ${3//|/, }"
  [[ $(kept "$1" "$2") = "$2" ]] ||
    fail "$VENV was made for MMVIM_${1^^}=$(kept "$1"), not $2" 'make clean-env first, or name another VENV='
}

check_machine() {
  step 'checking this machine'
  local base=$PYTHON version headers newest=13 found=cpu
  if nvidia-smi -L 2>/dev/null | grep -q GPU; then found=cuda; fi
  if [[ $TASKS = cls ]]; then
    [[ $found = cuda ]] || export MMVIM_OPS_CUDA=${MMVIM_OPS_CUDA:-0} # no GPU to compile kernels for
    found=cuda
  fi
  TORCH=${MMVIM_TORCH:-auto}
  TORCH=${TORCH/auto/$(kept torch $found)}
  settle stack "$STACK" 'openmmlab|onedl'
  settle torch "$TORCH" 'cpu|cuda'
  [[ $(kept tasks)$TASKS = segdense ]] || settle tasks "$TASKS" 'seg|dense|cls'
  [[ $TASKS$TORCH != clscpu ]] ||
    fail 'mmpretrain needs torchvision, which has no build for a CPU torch' 'MMVIM_TORCH=cuda: it runs on a CPU'

  if py -c '' 2>/dev/null; then base=$VENV/bin/python; fi
  version=$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
    fail "there is no Python at '$base'" 'install Python 3.11, or name one: PYTHON=/path/to/python3.11'
  [[ $STACK = onedl ]] || newest=12 # mmcv 2.1.0 does not build with a later one
  if ! [[ $version =~ ^3\.(1[0-9])$ ]] || ((BASH_REMATCH[1] > newest)); then
    fail "$base is Python $version; the packages of $STACK need 3.10 to 3.$newest" \
      'name one: PYTHON=/path/to/python3.11, or for Python 3.13 MMVIM_STACK=onedl'
  fi
  "$base" -c 'import ensurepip, venv' 2>/dev/null || lacks "$base has no venv module"
  headers=$("$base" -c 'import sysconfig; print(sysconfig.get_path("include"))')
  [[ $TASKS != dense || -f $headers/Python.h ]] || lacks "$base has no C headers ($headers/Python.h)"
  command -v g++ >/dev/null || lacks 'there is no g++, and the scan is compiled here'
  [[ ! -d $VENV || -f $VENV/pyvenv.cfg || -f $LOG || -z $(ls -A "$VENV") ]] ||
    fail "$VENV is there and is not a Python environment" 'name another folder: VENV='
  say "Python $version, $(nproc) cores, torch for $TORCH, packages of $STACK for $TASKS"
}

# The CUDA torch in PYTHON was chosen for this machine's driver by someone. A line in a .pth file
# shows its folder to the environment, be PYTHON a system's, conda's or an environment's; what the
# environment holds itself goes first.
use_own_cuda_torch() {
  local folder needed=torch
  [[ $TASKS != cls ]] || needed='torch, torchvision'
  folder=$("$PYTHON" -c "
import pathlib, $needed
assert torch.version.cuda and tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 4)
print(pathlib.Path(torch.__file__).parents[1])" 2>/dev/null) || return 1
  CONSTRAINTS=$VENV/constraints.txt # without the pins that would replace it
  grep -vE '^(torch|torchvision|triton)==' constraints.txt >"$CONSTRAINTS"
  # Before pip sees that folder: it would count the setuptools there as installed, which stands in for
  # distutils only from the environment's own folder.
  pip_install tools "${what[@]}"
  echo "$folder" >"$(py -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/own-torch.pth"
  say "using the CUDA torch in $folder"
}

install_torch() {
  step "${VENV#"$PWD/"}, build tools and torch"
  mkdir -p "$VENV"
  py -m pip --version >/dev/null 2>&1 || run "$PYTHON" -m venv "$VENV"
  echo "$TORCH" >"$VENV/.mmvim-torch"
  echo "$TASKS" >"$VENV/.mmvim-tasks"
  echo "$STACK" >"$VENV/.mmvim-stack"
  export PATH="$VENV/bin:$PATH" PIP_USER=0 MMVIM_STACK=$STACK # PATH: torch's builder looks for ninja there
  KEY=$(state_key) # before anything is read: an edit during the install is not covered by it

  # === leaves out X+cpu, which pip prefers to X where it finds both.
  local what=('setuptools>=77' wheel ninja) ask="import urllib.request as u; u.urlopen('$CPU_INDEX/torch/', timeout=4)"
  if [[ $TORCH = cpu ]]; then
    what+=("torch==$(pin torch)" "triton==$(pin triton)")
    [[ $TASKS = dense ]] || unset 'what[-1]' # its interpreter serves the tests of the scan
    if timeout 8 "$VENV/bin/python" -c "$ask" 2>/dev/null; then
      what+=(--extra-index-url "$CPU_INDEX") # its X+cpu goes before PyPI's X, several GB with CUDA
    else
      say "no answer from $CPU_INDEX: taking the torch that pip finds elsewhere (PyPI's: several GB)"
    fi
  elif ! use_own_cuda_torch; then
    say 'the CUDA build: a download of 2.8 GB'
    what+=("torch===$(pin torch)")
    [[ $TASKS != cls ]] || what+=("torchvision==$(pin torchvision)")
  fi
  pip_install torch "${what[@]}"
  py 2>>"$LOG" -c "import torch; assert '$TORCH' == 'cpu' or torch.version.cuda" ||
    fail "the torch that pip found does not work for $TORCH (python -c 'import torch' in $VENV)" \
      'make clean-env, then PYTHON= with a torch that works, or MMVIM_TORCH=cpu or cuda'
}

mmcv_is_ready() {
  py >>"$LOG" 2>&1 - <<PY
import mmcv, torch
from mmcv.ops import get_compiling_cuda_version, nms
assert mmcv.__version__ == '$(pin "$MMCV")'
boxes = torch.tensor([[0., 0., 2., 2.], [0., 0., 2., 2.]])
assert len(nms(boxes, torch.tensor([0.9, 0.8]), 0.5)[1]) == 1
assert not $CUDA_OPS or get_compiling_cuda_version() != 'not available'
PY
}

# One compiler takes up to 1.5 GB. Where torch sees a GPU and there is no nvcc, hiding the GPU makes
# mmcv build its CPU ops instead of stopping.
plan_build() {
  MAX_JOBS=$({
    awk '/^MemAvailable/ {print int($2 / 1.5e6)}' /proc/meminfo
    awk '/^[0-9]/ {print int($1 / 1.5e9)}' /sys/fs/cgroup/memory.max
    nproc
  } 2>/dev/null | sort -n | sed -n 1p)
  export MAX_JOBS=$((MAX_JOBS > 0 ? MAX_JOBS : 1)) MMCV_WITH_OPS=1
  CUDA_OPS=$(py -c 'import torch.utils.cpp_extension as e; print(int(e.torch.cuda.is_available() and bool(e.CUDA_HOME)))')
  ((CUDA_OPS)) || export CUDA_VISIBLE_DEVICES=
  PCH_FOLDER=$(mktemp -d)
  export PCH_FOLDER
}

# In isolation pip builds without torch, which leaves the ops out; OpenMMLab has a wheel of that.
# A wheel without ops must not get into pip's cache, which does not tell it from one with them.
install_mmcv() {
  local with='with its compiled ops'
  [[ $TASKS = dense ]] || with='without its compiled ops'
  step "mmcv $with"
  if [[ $TASKS != dense ]]; then
    [[ $STACK = onedl ]] || MMCV=mmcv-lite
    pip_install mmcv --no-cache-dir "$MMCV"
    return
  fi
  plan_build
  if mmcv_is_ready; then return; fi
  say "compiling, $MAX_JOBS files at once, unless pip has kept a build"
  [[ $TORCH$CUDA_OPS != cuda0 ]] || say 'note: torch sees no GPU, or nvcc is missing: CPU ops only'
  ((!CUDA_OPS)) || say 'with CUDA ops: longer; for the CPU ops only: CUDA_VISIBLE_DEVICES= make install'
  run py -m pip uninstall -y mmcv-lite "$MMCV" # the same files
  export CXX=$PWD/tools/cxx_with_pch.sh
  pip_install mmcv -v --no-build-isolation "$MMCV"
  if ! mmcv_is_ready; then
    say 'the build that pip had kept does not work with this torch: compiling'
    pip_install mmcv -v --no-build-isolation "$MMCV" --no-cache-dir --no-binary "$MMCV" --force-reinstall --no-deps
  fi
  unset CXX
  rm -rf "$PCH_FOLDER"
  mmcv_is_ready || fail "mmcv is built, but its ops do not work: see the end of $LOG" \
    'make clean-env, then again; if that does not help, report it with the log'
}

install_packages() {
  step 'this project (editable), and what it needs'
  local what=('.[test]') modules='mmvim, mmcv.ops, mmdet.models, mmseg.models'
  [[ $TASKS != seg ]] || what=('.[seg]') modules='mmvim, mmseg.models'
  [[ $TASKS != cls ]] || what=('.[cls]' pytest) modules='mmvim, torchvision, mmpretrain.models'
  pip_install project -v --no-build-isolation -e ./ops -e "${what[@]}"
  if ! py -c 'import cv2' 2>/dev/null; then
    say 'opencv-python cannot be loaded (bare machines lack libGL): using opencv-python-headless'
    run py -m pip uninstall -y opencv-python opencv-python-headless
    pip_install opencv --no-deps "opencv-python-headless==$(pin opencv-python)"
  fi
  step 'a check of it all'
  run py -c "import $modules"
}

# ---------------- the order
STACK=${MMVIM_STACK:-$(kept stack openmmlab)} TASKS=${MMVIM_TASKS:-dense} MMCV=mmcv
[[ $STACK = openmmlab ]] || MMCV=onedl-mmcv
[[ $TASKS != seg || $(kept tasks) != dense ]] || TASKS=dense # which has all of it
is_complete && { say "${VENV#"$PWD/"} is complete" && exit; }
exec 9<tools/install.sh # two installs of one checkout take turns
flock -n 9 || { say 'another install is running here: waiting for it' && flock 9; }
is_complete && exit
# A watcher that is stopped right after its start still has these traps: they are not for it.
trap '((BASHPID != $$)) || { stop_watching; rm -rf "${PCH_FOLDER:-}"; }' EXIT
trap '((BASHPID == $$)) || exit; fail "interrupted" "run the same command again: it goes on from here"' INT TERM
check_machine
rm -f "$STAMP"
install_torch
install_mmcv
install_packages
echo "$KEY" >"$STAMP"
backends=$(py -c 'import mmvim_ops; print(*mmvim_ops.available_backends())')
say "${VENV#"$PWD/"} is ready; backends of the selective scan: $backends"
