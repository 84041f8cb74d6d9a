#!/usr/bin/env bash
# The recipes worth a GPU, one after the other; their tables last.
#
#   bench/gpu.sh [RUNS]                CIFAR10=FOLDER (all 50,000 images, from tools/cifar10_full.py) ACMIZE_ASSETS=FOLDER
#   SMOKE=1 DEVICE=cpu bench/gpu.sh         the same on the digits model, in minutes, without data
#
# Each recipe keeps what it has measured, so that a run that was stopped goes on where it was. A recipe that fails is
# named at the end and does not stop the others.
set -u -o pipefail
cd "$(dirname "$0")/.."
runs=${1:-runs/gpu}
python=${PYTHON:-python}
mkdir -p "$runs"
failed=()

recipe() { # NAME ARGUMENT...
    local name=$1 log=$runs/$1.log
    shift
    [ -z "${SMOKE:-}" ] || set -- --smoke
    set -- --device "${DEVICE:-cuda}" "$@"
    echo "== $name $*"
    if ! "$python" "recipes/$name.py" --output "$runs/$name" "$@" 2>&1 | tee "$log" | tail -n 3; then
        failed+=("$name (see $log)")
    fi
}

full=()
[ -z "${CIFAR10:-}" ] || full=(--full --data "$CIFAR10")
recipe cifar10_deit_tiny --dense-epochs 20 --epochs 30 ${full[@]+"${full[@]}"}
recipe aux_losses --epochs 10
recipe paper_preset_deit_tiny
recipe sensitivity
recipe frontier_deit_tiny

echo
for table in "$runs"/*/table.md; do
    [ -e "$table" ] || continue
    printf '\n## %s\n\n' "$(basename "$(dirname "$table")")"
    cat "$table"
done
if [ "${#failed[@]}" -gt 0 ]; then
    printf '\nfailed: %s\n' "${failed[@]}" >&2
    exit 1
fi
