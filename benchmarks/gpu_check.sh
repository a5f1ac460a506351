#!/usr/bin/env bash
# The checks that need a GPU, in one offline call under ten minutes. docs/gpu.md says how to read the results.
set -uo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
out="${OUT:-$root/benchmarks/results}"
build="$root/build/gpu_check" # kept, so that a second call only compiles what changed

declare -A about=(
  [build]="compile the extension with CMake, offline, and import it"
  [tests]="pytest -m gpu: every operator on the GPU, CUDA graphs, no waits, launches of the loss"
  [sanitizer]="compute-sanitizer memcheck and racecheck over every operator, small"
  [operators]="operator benchmarks against PyTorch eager, torch.compile, cuSOLVER, torchvision"
  [step]="loss and training step: time, launches, share of the loss, bandwidth, peak memory"
  [schedule]="the paper's 20,000 iterations, extrapolated from a few hundred"
)
declare -A limit=([build]=170 [tests]=100 [sanitizer]=90 [operators]=120 [step]=45 [schedule]=60) # seconds
all=(build tests sanitizer operators step schedule)

usage() {
  cat <<TEXT
usage: benchmarks/gpu_check.sh [--dry-run] [--full] [--limit SECONDS] [STAGE ...]

Builds d2net and runs what needs a GPU, offline. Without STAGE: all of them. Results go to \${OUT:-benchmarks/results}:
gpu_check.json, gpu_check.md and gpu_check.log (with stages named: gpu_check-STAGE...). Exit status 0: all passed.

Stages, with their time limits:
TEXT
  for stage in "${all[@]}"; do printf '  %-10s %4s s  %s\n' "$stage" "${limit[$stage]}" "${about[$stage]}"; done
  cat <<TEXT

Options:
  --dry-run          without a GPU: builds for the CPU (and one GPU architecture where nvcc is found), runs the kernels
                     on the CPU (pytest -k simt) and the benchmarks on the CPU with --quick
  --full             train all 20,000 iterations in the stage schedule
  --limit SECONDS    time limit of each stage (a dry run has three times those above)
  --help             this text

Environment: OUT (folder of the results), PYTHON (interpreter, with torch, pybind11, cmake, ninja and pytest),
CUDA_HOME, CMAKE_CUDA_ARCHITECTURES, D2NET_COMMIT (named in the results where there is no git).
TEXT
}

die() {
  echo "gpu_check: $*" >&2
  exit 2
}

dry= full= limited= stages=()
while (($#)); do
  case "$1" in
    --dry-run) dry=1 ;;
    --full) full=1 ;;
    --limit)
      [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || die "--limit needs a number of seconds"
      for stage in "${all[@]}"; do limit[$stage]="$2"; done
      limited=1
      shift
      ;;
    --help | -h)
      usage
      exit 0
      ;;
    *)
      [[ -n "${limit[$1]:-}" ]] || die "unknown stage or option '$1'; stages: ${all[*]} (--help)"
      stages+=("$1")
      ;;
  esac
  shift
done
name=gpu_check
for stage in ${stages[@]+"${stages[@]}"}; do name+="-$stage"; done
((${#stages[@]})) || stages=("${all[@]}")

missing=()
for module in torch numpy yaml typer rich safetensors pybind11 pytest; do
  "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$module') is None)" || missing+=("$module")
done
command -v cmake >/dev/null || missing+=(cmake)
((${#missing[@]})) && die "missing for $python: ${missing[*]}; install them or set PYTHON to an interpreter that has them"
gpu=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))') || die "$python cannot import torch"
[[ -n "$dry" || "$gpu" == 1 ]] || die "torch sees no GPU here; --dry-run does what can be done without one"
device=cuda quick=()
if [[ -n "$dry" ]]; then
  device=cpu quick=(--quick)
  export OMP_NUM_THREADS=1 # sizes this small only lose by more, and a busy machine loses much
  [[ -n "$limited" ]] || for stage in "${all[@]}"; do limit[$stage]=$((3 * limit[$stage])); done # a CPU may be slow
fi

mkdir -p "$out" "$build" || die "$out: cannot be made"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
mkdir "$work/results"
checks="$work/checks.tsv" # stage, check, status, seconds, reason
: >"$checks"
log="$out/$name.log"
: >"$log" || die "$out: cannot be written"

deadline=0
record() { printf '%s\t%s\t%s\t%s\t%s\n' "$stage" "$1" "$2" "$3" "${4:-}" >>"$checks"; }
skip() {
  echo "skipped: $1: $2" | tee -a "$log"
  record "$1" skipped 0 "$2"
}

# check NAME COMMAND...: run it within what is left of the stage's time, and record how it ended.
check() {
  local what="$1" begin=$SECONDS left=$((deadline - SECONDS)) status
  shift
  if ((left <= 0)); then
    skip "$what" "no time left in this stage"
    return 1
  fi
  printf '\n-- %s\n' "$what" | tee -a "$log"
  timeout --kill-after=10 "$left" "$@" >"$work/output" 2>&1
  status=$?
  cat "$work/output" >>"$log"
  tail -n 30 "$work/output"
  case $status in
    0) record "$what" passed $((SECONDS - begin)) ;;
    124 | 137) record "$what" "timed out" $((SECONDS - begin)) "after $left s; see the log" ;;
    *) record "$what" failed $((SECONDS - begin)) "exit status $status; see the log" ;;
  esac
  return $status
}

# The package with the extension built here, apart from the source tree, which may hold an extension of its own.
export PYTHONPATH="$build/site"
export PYTHONUNBUFFERED=1 # what was printed before a time limit is kept
tests() { # from elsewhere: python -m puts the current folder first, and in the repository that is the source tree
  "$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -q "$@"
}
export -f tests
export python root

stage_build() {
  local generator=() archs=()
  if command -v ninja >/dev/null; then generator=(-G Ninja); fi
  # One architecture is enough to see that the kernels compile.
  if [[ -n "$dry" && -z "${CMAKE_CUDA_ARCHITECTURES:-}" ]]; then archs=(-DCMAKE_CUDA_ARCHITECTURES=90); fi
  rm -rf "$build/site/d2net"
  mkdir -p "$build/site"
  cp -r "$root/d2net" "$build/site/d2net" && rm -f "$build"/site/d2net/_C*
  check configure cmake -S "$root" -B "$build/cmake" ${generator[@]+"${generator[@]}"} ${archs[@]+"${archs[@]}"} \
    "-DPython_EXECUTABLE=$("$python" -c 'import sys; print(sys.executable)')" "-DD2NET_OUTPUT_DIR=$build/lib" &&
    check compile cmake --build "$build/cmake" --parallel || return
  cp "$build"/lib/_C* "$build/site/d2net/"
  (cd "$work" && check "d2net info" "$python" -m d2net info)
  if [[ -z "$dry" ]]; then # a GPU, but no nvcc
    check "kernels are built" "$python" -c 'from d2net.ops._native import build_info; assert build_info()["cuda"], "no CUDA kernels: put nvcc on PATH or set CUDACXX"'
  fi
}

stage_tests() {
  cd "$work" || return
  if [[ -n "$dry" ]]; then
    check "pytest tests/ops -k simt" bash -c 'tests -k "simt and not definition" "$root/tests/ops"'
  else
    check "pytest -m gpu" bash -c 'tests -m gpu "$root/tests"'
  fi
}

stage_sanitizer() {
  local tool tools sanitizer
  tools=(memcheck racecheck)
  sanitizer="$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" 2>/dev/null)"
  cd "$work" || return
  for tool in "${tools[@]}"; do
    if [[ -n "$dry" ]]; then
      skip "$tool" "dry run: ThreadSanitizer and AddressSanitizer run the kernels in pytest -m slow tests/native"
    elif [[ -z "$sanitizer" ]]; then
      skip "$tool" "compute-sanitizer is neither on PATH nor in CUDA_HOME"
    else
      # Without the caching allocator every tensor is an allocation of its own, whose end the tool knows.
      half=$(((limit[sanitizer] + 1) / 2))
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 check "$tool" timeout "$half" "$sanitizer" --tool "$tool" --error-exitcode 1 \
        --target-processes all --print-limit 20 bash -c 'tests -m gpu "$root/tests/test_every_operator.py"'
    fi
  done
}

stage_operators() {
  local file
  for file in "$root"/benchmarks/bench_*.py; do
    case "$(basename "$file" .py)" in
      bench_training_step | bench_evaluation) continue ;; # a stage of its own; runs on the CPU only
    esac
    check "$(basename "$file" .py)" "$python" "$file" --device "$device" --rounds 5 ${quick[@]+"${quick[@]}"} \
      --out "$work/results"
  done
}

stage_step() {
  check "training step" "$python" "$root/benchmarks/bench_training_step.py" --device "$device" \
    ${quick[@]+"${quick[@]}"} --out "$work/results"
}

stage_schedule() {
  check "paper schedule" "$python" "$root/benchmarks/paper_schedule.py" --device "$device" \
    ${quick[@]+"${quick[@]}"} ${full:+--full} --out "$work/results"
}

for stage in "${stages[@]}"; do
  printf '\n== %s (at most %s s): %s\n' "$stage" "${limit[$stage]}" "${about[$stage]}" | tee -a "$log"
  if [[ "$stage" != build && ! -d "$build/site/d2net" ]]; then
    record "$stage" failed 0 "nothing is built; run the stage build first"
    continue
  fi
  deadline=$((SECONDS + limit[$stage]))
  before="$PWD"
  "stage_$stage"
  cd "$before" || exit 2
done

printf '\n' | tee -a "$log"
"$python" "$root/benchmarks/gpu_check_report.py" --device "$device" --checks "$checks" --results "$work/results" \
  --out "$out/$name" ${dry:+--dry-run} | tee -a "$log"
exit "${PIPESTATUS[0]}"
