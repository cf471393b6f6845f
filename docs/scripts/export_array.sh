#!/usr/bin/env bash
# Export on a SLURM cluster: the tasks of an array write a part each, and one job that follows seals the result.
#
#   bash export_array.sh TABLE.cs OUT.zarr [options of cryolike-data export ...]
#
# Without sbatch the same parts are written by so many processes of this machine. TASKS sets how many there are (default: 4).
set -euo pipefail
tasks=${TASKS:-4}

if command -v sbatch >/dev/null; then
    array=$(sbatch --parsable --array="0-$((tasks - 1))" --cpus-per-task=4 --mem=8G --time=4:00:00 --requeue \
        --wrap "$(printf '%q ' cryolike-data export "$@") --unit-range \$SLURM_ARRAY_TASK_ID/$tasks")
    sbatch --dependency="afterok:$array" --mem=8G --wrap "$(printf '%q ' cryolike-data export "$@") --finish"
else
    # What stops this script has to reach its parts, too: Ctrl-C does not, in the background.
    trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT
    for ((task = 0; task < tasks; task++)); do
        cryolike-data export "$@" --unit-range "$task/$tasks" &
        running+=($!)
    done
    for process in "${running[@]}"; do wait "$process"; done
    cryolike-data export "$@" --finish
fi
