#!/usr/bin/env bash
# On a machine with a GPU and torch with CUDA, without a network: compile the CUDA kernels, check and measure.
#
#   ops/measure_gpu.sh [--out DIR] [--library FILE] [--jobs N] STAGE[=SECONDS]...
#
#   build     compile for the GPU here (nvcc), or with --library take what ops/build_cuda.py made elsewhere
#   check     report of all backends, then the tests of backend cuda
#   scan      ops/benchmark_gpu.py of backend cuda, beside mamba_ssm where it is there
#   mixer     the same for the whole block
#   models    tools/benchmark.py: Vim beside DeiT (ops/README.md says what it needs beyond torch)
#   train     UperNet on generated shapes with bfloat16 and float16
#   sanitize  compute-sanitizer: memcheck, racecheck, initcheck
#   sweep     backend cuda, cut in other ways than it chooses
#   triton    tests and benchmark of backend triton
#   all       all of them in this order
#
# Each stage ends after its seconds, prints its verdict, and writes what it knows into DIR as it goes: its
# log, its figures, a line of verdicts.txt. The exit status is 1 if one failed. In the environment: PYTHON, the
# interpreter; OUT_DIR, for --out; BATCH and SIZES of models; ITERATIONS of train; MAMBA_SSM, the source
# distribution of mamba_ssm, which is compiled beside the tests (ops/build_mamba_ssm.py).
# shellcheck disable=SC2329 # stages are called by name
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3} out=${OUT_DIR:-work_dirs/gpu} library='' jobs=$(nproc)
((jobs <= 6)) || jobs=6 # each has a context on the GPU
export PYTHONPATH=$PWD:$PWD/ops:$PWD/build/mamba_ssm${PYTHONPATH:+:$PYTHONPATH}
# A backend that is wrong has to show here, in figures and in tests, instead of being refused. That
# the refusal works has tests of its own, which switch it on.
export MMVIM_OPS_SELF_CHECK=0
export PYTHONUNBUFFERED=1 # what is killed has said all it knew
stages=(build check scan mixer models train sanitize sweep triton)
declare -A seconds=([build]=90 [check]=150 [scan]=90 [mixer]=60 [models]=400 [train]=90 [sanitize]=180
  [sweep]=60 [triton]=240)

refuse() { printf '%s\n' "$1" >&2 && exit 2; }

wanted=()
while (($#)); do
  case $1 in
    --out | --library | --jobs)
      (($# > 1)) || refuse "$1 needs a value"
      case $1 in --out) out=$2 ;; --library) library=$2 ;; --jobs) jobs=$2 ;; esac
      shift
      ;;
    all) wanted+=("${stages[@]}") ;;
    *)
      stage=${1%%=*}
      [[ -n $stage && -n ${seconds[$stage]-} ]] || refuse "unknown stage '$stage'; stages: ${stages[*]} all"
      if [[ $1 = *=* ]]; then
        [[ ${1#*=} =~ ^[1-9][0-9]*$ ]] || refuse "seconds must be a number, got '$1'"
        seconds[$stage]=${1#*=}
      fi
      wanted+=("$stage")
      ;;
  esac
  shift
done
((${#wanted[@]})) || refuse "no stage given; stages: ${stages[*]} all"
[[ -z $library || -f $library ]] || refuse "--library: there is no file $library"
mkdir -p "$out"

# ---------------- what stages are made of
failed=()
run() { # NAME COMMAND...: within what is left of the stage's time, with most=SECONDS in front within so many of
  # them; a failure leaves the next one its turn
  local name=$1 left=$((deadline - SECONDS)) status=0
  shift
  ((left > 0)) || { failed+=("$name not started") && return 1; }
  ((left < ${most:-$left})) || left=${most:-$left}
  echo "\$ $*"
  # An interrupt: pytest then still says what has failed, and benchmarks give their tables.
  timeout --signal=INT --kill-after=15 "$left" "$@" || status=$?
  case $status in
    0) return 0 ;;
    124 | 137) failed+=("$name stopped after $left s") ;;
    *) failed+=("$name ended with $status") ;;
  esac
  return 1
}
tests() { # MARK
  local -a pytest=("$python" -m pytest -v -rf --tb=short -p no:cacheprovider) parallel=()
  if "$python" -c 'import xdist' 2>/dev/null; then parallel=(-n "$jobs"); fi
  run tests "${pytest[@]}" "${parallel[@]}" -m "$1" tests/ops/gpu
  # Several processes have left these out: they need most of the GPU's memory.
  ((!${#parallel[@]})) || run large "${pytest[@]}" -m "$1" tests/ops/gpu/test_gpu_large.py
}
scans() { # NAME BACKEND MORE...
  run "$1" "$python" ops/benchmark_gpu.py --json "$out/$1.json" --backends "$2" "${@:3}"
}
theirs() { # wait for mamba_ssm's scan, which may still be compiled
  if [[ -n ${compiling-} ]]; then
    while kill -0 "$compiling" 2>/dev/null && ((SECONDS < deadline - 45)); do sleep 1; done
    tail -n 1 "$out/mamba_ssm.log"
  fi
}
model() { # NAME MORE...
  run "$1" "$python" tools/benchmark.py --device cuda --out "$out/models/$1" --max-seconds 3 --repeat 15 \
    --warm-up 3 "${@:2}"
}

# ---------------- the stages
stage_build() {
  if [[ -n $library ]]; then
    run copy cp "$library" ops/mmvim_ops/_cuda.so
  else
    run compile "$python" ops/build_cuda.py --verbose
  fi
  run load "$python" -c 'from mmvim_ops.backends import BACKENDS
reason = BACKENDS["cuda"].missing()
raise SystemExit(reason and f"backend cuda: {reason}")'
}
stage_check() {
  most=60 run report "$python" -m mmvim_ops || unset 'failed[-1]' # other backends have their own stages
  tests 'not triton'
}
stage_scan() { theirs && scans scan cuda; }
stage_mixer() { theirs && scans mixer cuda --mixer; }
stage_models() {
  local tiny=(vim-tiny deit-tiny-fused deit-tiny-explicit) small=(vim-small deit-small-fused)
  # shellcheck disable=SC2206 # a list of numbers
  local sizes=(${SIZES:-224 512 1024 1248 2048}) batch=${BATCH:-8}
  # Every command imports for seconds before it measures: as much as possible is in one.
  model bf16 --models "${tiny[@]}" --sizes "${sizes[@]}" --batch-size "$batch" --dtype bf16 --mode forward train \
    --run eager graph
  model fp32-graph --models "${tiny[@]}" --sizes "${sizes[@]}" --batch-size "$batch" --run graph
  model small-graph --models "${small[@]}" --sizes 224 1248 --batch-size "$batch" --dtype bf16 --run graph
  model small-train --models "${small[@]}" --sizes 224 1024 --batch-size "$batch" --dtype bf16 --mode train
  model huge --models vim-tiny --huge --dtype bf16
}
stage_train() {
  local root=$out/shapes iterations=${ITERATIONS:-300} dtype
  run shapes "$python" tools/dataset_tools/make_shapes.py "$root" || return
  for dtype in bfloat16 float16; do
    run "$dtype" "$python" tools/train.py configs/vim/vim-demo_upernet_shapes-128x128.py --amp "$dtype" \
      --work-dir "$out/train-$dtype" --cfg-options "train_dataloader.dataset.data_root=$root" \
      "val_dataloader.dataset.data_root=$root" "train_cfg.max_iters=$iterations" \
      "train_cfg.val_interval=$iterations" default_hooks.checkpoint.save_last=False \
      default_hooks.visualization.draw=False
  done
}
stage_sanitize() {
  local tool only=() help tools=3
  help=$(compute-sanitizer --help 2>&1) || { failed+=('there is no compute-sanitizer') && return; }
  # Of ours alone: torch's own kernels take time and are not what is asked for.
  for tool in --kernel-regex --kernel-name; do
    [[ $help != *"$tool"* ]] || only=("$tool" kns=mmvim)
  done
  for tool in memcheck racecheck initcheck; do
    most=$(((deadline - SECONDS) / tools-- + 1)) \
      run "$tool" compute-sanitizer --tool "$tool" "${only[@]}" --error-exitcode 1 --log-file "$out/sanitize-$tool.txt" \
      "$python" tests/ops/gpu/sanitizer_cases.py
    tail -n 5 "$out/sanitize-$tool.txt"
  done
}
stage_sweep() { run sweep "$python" ops/benchmark_gpu.py --sweep --dtypes bfloat16 --json "$out/sweep.json"; }
stage_triton() {
  tests triton
  scans triton triton --dtypes bfloat16
}

# ---------------- one after the other
compiling=
if [[ -n ${MAMBA_SSM:-} ]]; then # takes minutes: beside the other stages, with half of the cores
  MAX_JOBS=$((($(nproc) + 1) / 2)) "$python" ops/build_mamba_ssm.py "$MAMBA_SSM" build/mamba_ssm \
    >"$out/mamba_ssm.log" 2>&1 &
  compiling=$!
fi
bad=0
for stage in "${wanted[@]}"; do
  start=$SECONDS deadline=$((SECONDS + seconds[$stage])) failed=() verdict=ok
  "stage_$stage" >"$out/$stage.log" 2>&1
  lines=4
  if ((${#failed[@]})); then
    bad=1 lines=25 verdict="failed: $(printf '%s, ' "${failed[@]}")" && verdict=${verdict%, }
  fi
  tail -n "$lines" "$out/$stage.log"
  echo "== $stage: $verdict, $((SECONDS - start)) s" | tee -a "$out/verdicts.txt"
done
exit "$bad"
