#!/usr/bin/env bash
# The checks that need a GPU, in one offline call under eight minutes. docs/gpu.md says how to read the results.
# shellcheck disable=SC2317,SC2329 # the stages are called by name, interrupted by trap
set -uo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-python3}"
[[ "$python" == */* ]] && python="$(cd "$(dirname "$python")" && pwd)/$(basename "$python")" # the stages run elsewhere
out="${OUT:-$root/benchmarks/results}"
build="$root/build/gpu_check" # kept, so that a second call only compiles what changed

declare -A about=(
  [build]="compile the extension with CMake, offline, and import it"
  [tests]="pytest -m gpu: every operator on the GPU, CUDA graphs, no waits, launches of the loss"
  [step]="training step and loss beside their floor and plain PyTorch: time, launches, peak memory"
  [schedule]="the paper's 20,000 iterations, extrapolated from a few hundred, and the rate beside the bare step's"
  [operators]="operator benchmarks against PyTorch, cuSOLVER, torchvision, two headline sizes each"
  [sizes]="operator benchmarks in all sizes, against torch.compile too"
  [sanitizer]="compute-sanitizer over every operator, small: memcheck, racecheck, initcheck, synccheck"
)
# Seconds. Beside them what an H100 machine of 16 cores took where it was timed, on 2026-11-26; of an operator benchmark
# all but its start, 6 s, is its share of the time.
declare -A limit=(
  [build]=120     # 44
  [tests]=120     # 68
  [sanitizer]=180 # not timed
  [step]=120      # 19 before it had THUMOS14's lengths and peers; what is left then is said
  [operators]=160
  [schedule]=150  # 39 with one set of lengths
  [sizes]=420
)
total=470 # of all stages
start=6   # of a benchmark: imports, the device, its rates
grace=20  # for a benchmark to end what it is in the middle of
default=(build tests sanitizer step operators) # what tells most comes first
named=(schedule sizes)                         # run only where they are named, or in a dry run
all=("${default[@]}" "${named[@]}")

usage() {
  cat <<TEXT
usage: benchmarks/gpu_check.sh [--dry-run] [--full] [--limit SECONDS] [--total SECONDS] [STAGE ...]

Builds d2net and runs what needs a GPU, offline. Without STAGE: ${default[*]}.
Results go to \${OUT:-benchmarks/results}: gpu_check.json, gpu_check.md and gpu_check.log (with stages named:
gpu_check-STAGE...), and are complete after every check, whatever ends this script. Exit status 0: all passed.

Stages, with their time limits (${named[*]}: only where they are named):
TEXT
  for stage in "${all[@]}"; do printf '  %-10s %4s s  %s\n' "$stage" "${limit[$stage]}" "${about[$stage]}"; done
  cat <<TEXT

Options:
  --dry-run          without a GPU: builds for the CPU (and one GPU architecture where nvcc is found), runs the kernels
                     on the CPU (pytest -k simt) and the benchmarks on the CPU with --quick; without STAGE all stages
  --full             the stage schedule trains all 20,000 iterations of every graph, for which it needs a --limit and a
                     --total of half an hour
  --limit SECONDS    time limit of each stage
  --total SECONDS    time limit of all stages together, $total by default (a dry run has three times as long for each)
  --help             this text

Environment: OUT (folder of the results), PYTHON (interpreter, with torch, pybind11, cmake, ninja and pytest),
CUDA_HOME, CMAKE_CUDA_ARCHITECTURES, D2NET_COMMIT (named in the results where there is no git).
TEXT
}

die() {
  echo "gpu_check: $*" >&2
  exit 2
}

dry='' full='' limited='' stages=()
while (($#)); do
  case "$1" in
    --dry-run) dry=1 ;;
    --full) full=1 ;;
    --limit | --total)
      [[ "${2:-}" =~ ^[1-9][0-9]*$ ]] || die "$1 needs a number of seconds"
      if [[ "$1" == --total ]]; then total="$2"; else for stage in "${all[@]}"; do limit[$stage]="$2"; done; fi
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
((${#stages[@]})) || if [[ -n "$dry" ]]; then stages=("${all[@]}"); else stages=("${default[@]}"); fi
[[ -z "$full" || " ${stages[*]} " == *" schedule "* ]] || die "--full is of the stage schedule, which is not among: ${stages[*]}"

device=cuda quick=()
if [[ -n "$dry" ]]; then
  device=cpu quick=(--quick)
  export OMP_NUM_THREADS=1 # sizes this small only lose by more, and a busy machine loses much
  if [[ -z "$limited" ]]; then # a CPU may be slow
    for stage in "${all[@]}"; do limit[$stage]=$((3 * limit[$stage])); done
    total=$((3 * total)) grace=$((3 * grace))
  fi
fi

missing=$("$python" -c 'from importlib.util import find_spec; import sys
print(*(name for name in sys.argv[1:] if find_spec(name) is None))' \
  torch numpy yaml typer rich safetensors matplotlib pybind11 pytest) || die "$python does not run; set PYTHON"
command -v cmake >/dev/null || missing+=" cmake"
[[ -z "$missing" ]] || die "missing for $python: $missing; install it or set PYTHON to an interpreter that has it"

mkdir -p "$out" "$build" || die "$out: cannot be made"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
mkdir "$work/results"
checks="$work/checks.tsv" # stage, check, status, seconds, reason
tests="$work/tests.tsv"   # written by gpu_check_tests.py
: | tee "$checks" >"$tests"
out="$(cd "$out" && pwd)"
log="$out/$name.log"
: >"$log" || die "$out: cannot be written"

PYTHONPATH="$root/benchmarks" "$python" -c 'import json, sys, torch
from harness import environment
if sys.argv[1] == "cuda" and not torch.cuda.is_available():
    sys.exit("torch sees no GPU here; --dry-run does what can be done without one")
json.dump(environment(torch.device(sys.argv[1])), sys.stdout)' "$device" >"$work/environment.json" || exit 2

stage='' current='' child='' begin=0 deadline=0
report() {
  "$python" "$root/benchmarks/gpu_check_report.py" "$work" "$out/$name" ${dry:+--dry-run}
}
record() { # CHECK STATUS SECONDS [REASON]; the report is there after each, whatever comes next
  printf '%s\t%s\t%s\t%s\t%s\n' "$stage" "$1" "$2" "$3" "${4:-}" >>"$checks"
  report >/dev/null
}
skip() {
  echo "$2: $1: $3" | tee -a "$log"
  record "$1" "$2" 0 "$3"
}
interrupted() {
  trap - INT TERM HUP
  [[ -n "$child" ]] && kill "$child"
  record "${current:-$stage}" interrupted $((SECONDS - begin)) "by a signal; see the log"
  [[ -n "$child" ]] && wait "$child" # it may hold the GPU; killed after 10 s at most
  exit 1
}
trap interrupted INT TERM HUP

left() { echo $((deadline - SECONDS)); } # seconds of the stage

# check NAME SECONDS COMMAND...: run it so long at most, and within what is left of the stage; record how it ended.
check() {
  local seconds="$2" first status
  current="$1" begin=$SECONDS
  shift 2
  (($(left) < seconds)) && seconds=$(left)
  if ((seconds <= 0)); then
    skip "$current" "not run" "no time was left"
    return 1
  fi
  printf '\n-- %s\n' "$current" | tee -a "$log"
  first=$(wc -l <"$log")
  # SIGINT, so that Python says where it was. In the background, so that a signal to this script is heard meanwhile.
  timeout --signal=INT --kill-after=10 "$seconds" "$@" >>"$log" 2>&1 &
  child=$!
  wait "$child"
  status=$?
  child=''
  tail -n "+$((first + 1))" "$log" | tail -n 30
  case $status in
    0) record "$current" passed $((SECONDS - begin)) ;;
    124 | 137) # 137: killed, also for want of memory
      if ((SECONDS - begin < seconds)); then
        record "$current" failed $((SECONDS - begin)) "killed (out of memory?)"
      else
        record "$current" "timed out" $((SECONDS - begin)) "after $seconds s; see the log"
      fi
      ;;
    *) record "$current" failed $((SECONDS - begin)) "exit status $status; see the log" ;;
  esac
  current=''
  return "$status"
}

# The package with the extension built here, apart from the source tree, which may hold an extension of its own.
export PYTHONPATH="$build/site"
export PYTHONUNBUFFERED=1 # what was printed before a time limit is kept
# From elsewhere: python -m puts the current folder first, and in the repository that is the source tree.
pytest=("$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -v --tb=short --continue-on-collection-errors)

stage_build() {
  local options=(-DCMAKE_CUDA_FLAGS=-lineinfo) # for compute-sanitizer to name lines
  if command -v ninja >/dev/null; then options+=(-G Ninja); fi
  if [[ -z "${CMAKE_CUDA_ARCHITECTURES:-}" ]]; then # in a dry run, one is enough to see that the kernels compile
    options+=("-DCMAKE_CUDA_ARCHITECTURES=$("$python" -c 'import json, sys
print(json.load(sys.stdin).get("architecture", 90))' <"$work/environment.json")")
  fi
  rm -rf "$build/site/d2net"
  mkdir -p "$build/site"
  cp -r "$root/d2net" "$build/site/d2net" && rm -f "$build"/site/d2net/_C*
  check configure "$(left)" cmake -S "$root" -B "$build/cmake" "${options[@]}" \
    "-DPython_EXECUTABLE=$("$python" -c 'import sys; print(sys.executable)')" "-DD2NET_OUTPUT_DIR=$build/lib" &&
    check compile "$(left)" cmake --build "$build/cmake" --parallel || return
  cp "$build"/lib/_C* "$build/site/d2net/"
  cd "$work" || return
  check "d2net info" "$(left)" "$python" -m d2net info
  if [[ -z "$dry" ]]; then # a GPU, but no nvcc
    check "kernels are built" "$(left)" "$python" -c 'from d2net.ops import build_info; assert build_info()["cuda"], "no CUDA kernels: put nvcc on PATH or set CUDACXX"'
  fi
}

stage_tests() {
  local what label again test status
  if [[ -n "$dry" ]]; then
    # Some, since pytest without options runs them all.
    what=(-k "simt and not definition" "$root"/tests/ops/test_{adam,iou,snippet_pdmi}.py) label="pytest -k simt"
  else # all that have gpu tests, short ones first; a kernel that hangs ends the process, with pytest 9
    what=(-m gpu -o faulthandler_timeout=30 -o faulthandler_exit_on_timeout=true
      "$root"/tests/{test_every_operator.py,test_cuda_graph.py,test_gpu.py,test_model.py,ops}) label="pytest -m gpu"
  fi
  cd "$work" || return
  for again in "" ", continued"{," 2"," 3"," 4"}; do
    GPU_CHECK_TESTS="$tests" PYTHONPATH="$PYTHONPATH:$root/benchmarks" \
      check "$label$again" "$(left)" "${pytest[@]}" -p gpu_check_tests "${what[@]}"
    status=$?
    test=$(tail -n 1 "$tests" | cut -f 1)
    [[ -n "$test" ]] && (($(left) > 0)) || return # the last row is of no test: all have run
    # It ended the process or took the CUDA context with it: once more, with every launch waiting for its kernel.
    ((status == 1)) || CUDA_LAUNCH_BLOCKING=1 check "$test, alone" 30 "${pytest[@]}" -m "" "$root/$test"
  done
}

stage_step() {
  check "training step" "$(left)" "$python" "$root/benchmarks/bench_training_step.py" --device "$device" \
    --seconds $(($(left) - grace)) ${quick[@]+"${quick[@]}"} --out "$work/results"
}

stage_schedule() {
  local options=()
  [[ -n "$full" ]] && options=(--full)
  [[ -n "$full" && -z "$dry" ]] && options+=(--execution graph) # a CPU has none
  check "paper schedule" "$(left)" "$python" "$root/benchmarks/paper_schedule.py" --device "$device" \
    --seconds $(($(left) - grace)) ${quick[@]+"${quick[@]}"} ${options[@]+"${options[@]}"} --out "$work/results"
}

benchmarks() { # OPTION...: of every operator (with only: of that one), each with an equal share of what is left
  local file files=() share i
  for file in "$root"/benchmarks/bench_${only:-*}.py; do
    case "$(basename "$file" .py)" in
      bench_training_step | bench_evaluation | bench_i3d | bench_scale) ;; # a stage of its own; CPU only; no operators
      *) files+=("$file") ;;
    esac
  done
  for i in "${!files[@]}"; do
    share=$((($(left) - grace) / (${#files[@]} - i)))
    check "$(basename "${files[i]}" .py)" $((share > start ? share + grace : 0)) "$python" "${files[i]}" \
      --device "$device" --rounds 5 --seconds $((share - start)) ${quick[@]+"${quick[@]}"} "$@" --no-plot \
      --out "$work/results"
  done
}

stage_operators() {
  local only=${dry:+iou} # the stage sizes of a dry run has these cases, too
  benchmarks --first 2 --no-compile
}

stage_sizes() { benchmarks; } # in the place of results of the stage operators, whose cases come first here

stage_sanitizer() {
  local tool options sanitizer tools=4
  sanitizer="$(command -v compute-sanitizer || ls "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer" 2>/dev/null)"
  cd "$work" || return
  for tool in memcheck racecheck initcheck synccheck; do
    if [[ -n "$dry" ]]; then
      skip "$tool" skipped "dry run: ThreadSanitizer and AddressSanitizer run the kernels in pytest -m slow tests/native"
    elif [[ -z "$sanitizer" ]]; then
      skip "$tool" skipped "compute-sanitizer is neither on PATH nor in CUDA_HOME"
    else
      options=(--tool "$tool" --error-exitcode 1 --target-processes all --print-limit 20)
      # Calls that libraries make to see whether they fail; ours become errors in Python anyway.
      [[ $tool == memcheck ]] && options+=(--report-api-errors no)
      # Without the caching allocator every tensor is an allocation of its own, whose end the tool knows.
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 check "$tool" $(($(left) / (tools > 1 ? 2 : 1))) "$sanitizer" "${options[@]}" \
        "${pytest[@]}" -m gpu "$root/tests/test_every_operator.py"
    fi
    ((tools--))
  done
}

for stage in "${stages[@]}"; do
  printf '\n== %s (at most %s s): %s\n' "$stage" "${limit[$stage]}" "${about[$stage]}" | tee -a "$log"
  if [[ "$stage" != build && ! -d "$build/site/d2net" ]]; then
    record "$stage" failed 0 "nothing is built; run the stage build first"
    continue
  fi
  deadline=$((SECONDS + limit[$stage] < total ? SECONDS + limit[$stage] : total))
  before="$PWD"
  "stage_$stage"
  cd "$before" || exit 2
done

printf '\n' | tee -a "$log"
report | tee -a "$log"
exit "${PIPESTATUS[0]}"
