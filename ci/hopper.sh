#!/usr/bin/env bash
# The whole job on a Hopper machine that has Python, a CUDA PyTorch and nothing else:
#
#     ci/hopper.sh [--budget 10m] [--long 5m] [--out DIR] [--skip STAGE]... [--only STAGE]... [--dry-run]
#
#   install    a virtual environment that uses the machine's PyTorch, with the kernel compiled
#   tests      pytest -n auto
#   sanitizer  memcheck, racecheck, synccheck and initcheck on small cases that cover every path
#   campaign   fuzzing for --budget (such as 90s, 10m or 8h), after the findings of the campaign before
#   long       the same with long cases, for --long
#   benchmark  speed beside fla and the floor
#   accuracy   errors beside fla's
#   report     one HTML page of all this, in DIR
#
# A stage that fails does not keep the others from running; without an installation nothing else can run. Each stage has
# a log in DIR/logs. The closing table says how each ended. Exit status: 0 all passed, 1 one failed, 2 wrong usage, 130
# interrupted (what there is by then is reported).
#
# PYTHON chooses the interpreter that the environment is made of. With `--skip install` PYTHON runs the stages itself,
# and FLASH_KDA_LIBRARY may name the kernel's library. VENV is the environment's folder (default .venv). BENCHMARK_CASES
# chooses what the benchmark measures (default all).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

STAGES=(install tests sanitizer campaign long benchmark accuracy report)
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
BENCHMARK_CASES=${BENCHMARK_CASES:-all}
budget=10m
long_budget=5m
out=runs/hopper-$(date -u +%Y-%m-%dT%H%M%SZ)
dry=
skip=()
only=()

usage() {
    printf 'ci/hopper.sh: expected [--budget TIME] [--long TIME] [--out DIR] [--skip STAGE]... [--only STAGE]... [--dry-run] with stages of %s, got %s\n' \
        "${STAGES[*]}" "$1" >&2
    exit 2
}

is_stage() { [[ " ${STAGES[*]} " == *" $1 "* ]]; }

while (($#)); do
    case $1 in
    -h | --help)
        sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' ci/hopper.sh
        exit 0
        ;;
    --budget | --long | --out | --skip | --only)
        (($# > 1)) || usage "$1 without a value"
        case $1 in
        --budget | --long) [[ $2 =~ ^[0-9]+(\.[0-9]+)?[smh]?$ && $2 =~ [1-9] ]] || usage "$1 $2" ;;
        --skip | --only) is_stage "$2" || usage "$1 $2" ;;
        esac
        case $1 in
        --budget) budget=$2 ;;
        --long) long_budget=$2 ;;
        --out) out=$2 ;;
        --skip) skip+=("$2") ;;
        --only) only+=("$2") ;;
        esac
        shift 2
        ;;
    --dry-run)
        dry=1
        shift
        ;;
    *) usage "$1" ;;
    esac
done

if [[ -n ${FLASH_KDA_LIBRARY:-} ]]; then # tests change their folder
    FLASH_KDA_LIBRARY=$(realpath "$FLASH_KDA_LIBRARY") || exit 2
    export FLASH_KDA_LIBRARY
fi

wanted() {
    [[ " ${skip[*]:-} " != *" $1 "* ]] && { ((${#only[@]} == 0)) || [[ " ${only[*]} " == *" $1 "* ]]; }
}

if [[ " ${skip[*]:-} " == *" install "* ]]; then
    python=$PYTHON
elif wanted install || [[ -x $VENV/bin/python ]]; then
    python=$VENV/bin/python
else
    python=$PYTHON
fi

# One command of a stage. They go to the log and to the screen; the stage fails with the first that fails.
run() {
    printf '+ %s\n' "$*"
    [[ -n $dry ]] || "$@"
}

install() {
    run "$PYTHON" ci/install.py "$VENV" || return
    # The sanitizer comes with a CUDA toolkit; where there is none, a wheel has it. Without either its stage says so.
    if ! command -v compute-sanitizer >/dev/null && [[ ! -x /usr/local/cuda/bin/compute-sanitizer ]]; then
        run "$python" -m pip --disable-pip-version-check install --quiet nvidia-cuda-sanitizer-api || true
    fi
}
# A kernel that hangs cannot be interrupted by a signal; so its worker is ended, and another one goes on.
tests() { run "$python" -m pytest -n auto -q -o timeout_method=thread; }
sanitizer() { run "$python" ci/sanitize.py --logs "$out/logs"; }

# One campaign: profile, budget, run folder. Gone on with if the folder holds one; else the findings of the newest run
# before this one are judged first.
fuzz() {
    if [[ -f $3/campaign.sqlite ]]; then
        run "$python" -m fuzz run --resume "$3" --budget "$2"
        return
    fi
    local previous=() finding
    for finding in runs/hopper-*/"${3##*/}"/findings/*/finding.json; do # in the order of their times
        [[ -e $finding ]] && previous=(--previous "${finding%/findings/*}")
    done
    run "$python" -m fuzz run --profile "$1" --budget "$2" --out "$3" "${previous[@]}"
}
campaign() { fuzz gpu "$budget" "$out/campaign"; }
long() { fuzz long "$long_budget" "$out/long"; }

# What hangs in one of these two ends the stage.
benchmark() { run timeout --foreground -k 30 1h "$python" -m benchmarks --cases "$BENCHMARK_CASES" --out "$out/campaign" --resume; }
accuracy() { run timeout --foreground -k 30 30m "$python" -m benchmarks.accuracy --out "$out/campaign"; }
report() { run "$python" -m fuzz report "$out/campaign"; }

interrupted=
trap 'interrupted=1' INT TERM
declare -A ended seconds
failed=
for stage in "${STAGES[@]}"; do
    seconds[$stage]=0
    if ! wanted "$stage"; then
        ended[$stage]=skipped
    elif [[ -n $interrupted && $stage != report ]]; then
        ended[$stage]="not run: interrupted"
    elif [[ ${ended[install]:-} == failed* ]]; then
        ended[$stage]="not run: no installation"
    elif [[ $stage == report && -z $dry && ${ended[campaign]} == skipped && ! -f $out/campaign/campaign.sqlite ]]; then
        ended[$stage]="not run: no campaign"
    else
        printf '\n== %s\n' "$stage"
        began=$SECONDS
        if [[ -n $dry ]]; then
            "$stage"
            status=$?
        else
            mkdir -p "$out/logs" || exit 2
            "$stage" 2>&1 | tee -i "$out/logs/$stage.log"
            status=${PIPESTATUS[0]}
        fi
        seconds[$stage]=$((SECONDS - began))
        if ((status == 0)); then
            ended[$stage]=passed
        else
            ended[$stage]="failed (exit status $status)"
            failed=1
        fi
    fi
done

printf '\n== summary\n'
for stage in "${STAGES[@]}"; do
    printf '%-10s  %6d s  %s\n' "$stage" "${seconds[$stage]}" "${ended[$stage]}"
done
[[ -n $dry ]] || printf 'logs: %s\nreport: %s\nof the long cases: %s\n' "$out/logs" "$out/campaign/report.html" "$out/long/report.html"
[[ -z $interrupted ]] || exit 130
[[ -z $failed ]] || exit 1
