#!/usr/bin/env bash
# Export with the processes of torchrun, on one machine or several: each writes the part of its rank, then the result is sealed.
#
#   bash export_torchrun.sh TABLE.cs OUT.zarr [options of cryolike-data export ...]
#
# PROCESSES sets how many there are on each machine (default: 4).
set -euo pipefail
# --no-python: what follows is any program, started once per rank with RANK and WORLD_SIZE set.
torchrun --nproc-per-node "${PROCESSES:-4}" --no-python \
    bash -c 'exec cryolike-data export "$@" --unit-range "$RANK/$WORLD_SIZE"' export "$@"
cryolike-data export "$@" --finish
