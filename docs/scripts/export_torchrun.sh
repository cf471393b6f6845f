#!/usr/bin/env bash
# Export with the processes of torchrun, on one machine or several: each writes the part of its rank, then the result is sealed.
#
#   bash export_torchrun.sh TABLE.cs OUT.zarr [options of cryolike-data export ...]
#
# PROCESSES sets how many there are on each machine (default: 4). On several machines start it on each, with PET_NNODES, PET_NODE_RANK
# and PET_MASTER_ADDR set, from where torchrun takes its options: at its end it waits for the other machines (five minutes; if one takes
# longer, run `cryolike-data export ... --finish` once all are done), and number 0 seals.
set -euo pipefail
# --no-python: what follows is any program, started once per rank with RANK and WORLD_SIZE set.
torchrun --nproc-per-node "${PROCESSES:-4}" --no-python \
    bash -c 'exec cryolike-data export "$@" --unit-range "$RANK/$WORLD_SIZE"' export "$@"
if [[ ${PET_NODE_RANK:-0} == 0 ]]; then
    cryolike-data export "$@" --finish
fi
