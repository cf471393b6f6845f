"""Units on the workers of a ``dask.distributed`` cluster: the cluster passes unit numbers around, and the workers write files."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import closing, nullcontext, suppress
from typing import TYPE_CHECKING

from ..errors import ArgumentError, ExportError, MissingDependencyError
from .plan import ExportPlan
from .state import UnitRecord

if TYPE_CHECKING:
    from distributed import Client

#: How often a unit is given out again after an error, such as a file system that was away for a moment.
_RETRIES = 2


def require_executor(executor: object) -> None:
    """Raise an error unless this is something that can run units.

    Raises
    ------
    ArgumentError
        if it is neither a client nor text, which is taken for the address of a scheduler
    MissingDependencyError
        if ``distributed`` is not installed
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise MissingDependencyError('Running on a cluster needs dask: pip install "cryolike-data[distributed]".') from error
    if not isinstance(executor, str | Client):
        raise ArgumentError(f"executor is a dask.distributed.Client or the address of a scheduler, not a {type(executor).__name__}")


def run_on_cluster(plan: ExportPlan, units: list[int], executor: Client | str) -> Iterator[UnitRecord]:
    """Records of the units as they are finished, in any order. The units of a worker that dies are run by the others.

    Parameters
    ----------
    plan : what to write; inputs and target are on a file system that the workers share
    units : the numbers of the units
    executor : a client, or the address of a scheduler

    Raises
    ------
    ExportError
        if there is no scheduler at the address, or the cluster gives up units
    """
    from distributed import as_completed

    from .on_worker import PlanOnWorkers, run_unit_of

    name = f"{plan.format.kind}-{uuid.uuid4().hex}"
    with closing(_client_of(executor)) if isinstance(executor, str) else nullcontext(executor) as client:
        # Not as data that units depend on: they would be lost with a worker, and keep units away from workers that have none.
        client.register_plugin(PlanOnWorkers(name, plan))
        futures = [client.submit(run_unit_of, name, unit, pure=False, retries=_RETRIES, key=f"unit-{unit}-{name}") for unit in units]
        try:
            for future in as_completed(futures, loop=client.loop):
                yield future.result()
        except CancelledError as error:
            raise ExportError(f"The cluster gave up units of {plan.target}: {error}. Run the same export again to continue.") from error
        finally:
            client.cancel(futures)
            with suppress(OSError):  # a worker that dies at this moment has none
                client.unregister_worker_plugin(name)


def _client_of(address: str) -> Client:
    from distributed import Client
    from distributed.comm import get_address_host

    try:
        get_address_host(address)  # of what is no address a client cannot be made, but is there for a minute, and waited for
        return Client(address, set_as_default=False)  # nothing else in the program is to wait for it, above all if nobody answers
    except (ValueError, OSError) as error:
        raise ExportError(f"There is no scheduler of dask at {address!r}, which is to be such as tcp://host:8786: {error}") from error
