"""Export on the workers of a dask cluster: python export_dask.py TABLE.cs OUT.zarr [ADDRESS OF THE SCHEDULER]."""

import sys

from distributed import Client, LocalCluster

import cryolike_data as cd


def main(table: str, store: str, address: str | None = None) -> None:
    """Write a Zarr store; the workers need the same files under the same names."""
    particles = cd.IndexedDataset(table)
    if address is not None:
        cd.export_zarr(particles, store, executor=address)
        return
    # On one machine: one thread a worker, because a worker that waits for the disk leaves its core to the others.
    with LocalCluster(n_workers=3, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        cd.export_zarr(particles, store, executor=client)


if __name__ == "__main__":
    main(*sys.argv[1:])
