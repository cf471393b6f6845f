"""One export by many: the workers of a dask cluster, of which one dies, and processes that share the units among themselves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import EXPORTS, contents, ctf_columns, results, write_particles

from cryolike_data import IndexedDataset, ParticleDataset, ZarrDataset, export_cryolike, export_mrc, export_zarr
from cryolike_data.cli import main
from cryolike_data.errors import ArgumentError, ExportError, ExportExistsError, MissingDependencyError
from cryolike_data.export import plan_export, run
from cryolike_data.export.plan import Advance, ExportPlan
from cryolike_data.export.state import UnitRecord

N, BOX = 150, 16
FORMATS = list(EXPORTS)
EXPORTERS: dict[str, Any] = {"zarr": export_zarr, "cryolike": export_cryolike, "mrc": export_mrc}
#: The same as arguments of the command, for the grid that it makes by default.
COMMANDS = {
    "zarr": ["--format", "zarr", "--shard-bytes", str(5 * BOX * BOX * 4)],
    "cryolike": ["--format", "cryolike", "--batch-size", "5"],
    "mrc": ["--format", "mrc", "--batch-size", "5"],
}

each_format = pytest.mark.parametrize("kind", FORMATS)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of particles in 30 units; tests read it only."""
    return write_particles(tmp_path_factory.mktemp("project"), N, box=BOX)[0]


@pytest.fixture(scope="module")
def dataset(table: Path) -> ParticleDataset:
    return IndexedDataset(table)


@pytest.fixture(scope="module")
def undisturbed(dataset: ParticleDataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """The files of an export, by format, that this process wrote alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for kind, export in EXPORTERS.items():
        export(dataset, folder / kind, **EXPORTS[kind])
    return {kind: contents(folder / kind) for kind in EXPORTERS}


def plan_of(kind: str, dataset: ParticleDataset, target: Path) -> ExportPlan:
    return plan_export(dataset, target, format=kind, **EXPORTS[kind])


# --- a cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of three worker processes."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=3, threads_per_worker=1, processes=True, dashboard_address=":0") as started:
        yield started


@pytest.fixture
def client(cluster: Any) -> Iterator[Any]:
    from distributed import Client

    with Client(cluster) as connected:
        connected.wait_for_workers(3)
        yield connected


@dataclass(frozen=True)
class Held:
    """A format whose units from the sixth on wait, when their first images are in a partial file, until a file is gone."""

    format: Any
    hold: Path

    def __getattr__(self, name: str) -> Any:
        if name == "format" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.format, name)

    def write_unit(self, dataset: ParticleDataset, unit: int, rows: range, place: Any, advance: Advance) -> UnitRecord:
        def waiting(images: int, size: int) -> None:
            while unit >= 6 and self.hold.exists():
                time.sleep(0.005)
            advance(images, size)

        return self.format.write_unit(dataset, unit, rows, place, waiting)


@each_format
def test_workers_write_what_one_process_writes(dataset, tmp_path, undisturbed, client, kind):
    report = run(plan_of(kind, dataset, tmp_path / "out"), executor=client)
    assert (report.written, report.kept, report.sealed) == (30, 0, True)
    assert contents(tmp_path / "out") == undisturbed[kind]


@each_format
def test_a_worker_killed_in_the_middle_of_a_unit_changes_no_byte(dataset, tmp_path, undisturbed, client, kind):
    hold, state = tmp_path / "hold", tmp_path / "out/.export"
    hold.touch()
    plan = plan_of(kind, dataset, tmp_path / "out")
    workers, over = [], threading.Event()

    def kill_one() -> None:
        # When each of the three is in the middle of a unit.
        while len(list(state.glob("units/*"))) < 6 or len(list(state.glob("partial/*"))) < 3 * (2 if kind == "cryolike" else 1):
            if over.wait(0.005):
                return
        workers.extend(client.run(os.getpid).values())
        os.kill(workers[1], signal.SIGKILL)
        hold.unlink()

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        report = run(replace(plan, format=Held(plan.format, hold)), executor=client)
    finally:
        over.set()
        killer.join()
    assert len(set(workers)) == 3
    assert not Path(f"/proc/{workers[1]}").exists()
    assert (report.written, report.sealed) == (30, True)
    assert contents(tmp_path / "out") == undisturbed[kind]


def test_what_is_finished_is_not_given_to_workers_again(dataset, tmp_path, undisturbed, client):
    plan = plan_of("zarr", dataset, tmp_path / "out")
    run(plan, units=range(10, 20))
    inodes = {unit: (tmp_path / "out" / plan.files(unit)[0]).stat().st_ino for unit in range(10, 20)}
    report = run(plan, executor=client)
    assert (report.written, report.kept) == (20, 10)
    assert {unit: (tmp_path / "out" / plan.files(unit)[0]).stat().st_ino for unit in inodes} == inodes
    assert contents(tmp_path / "out") == undisturbed["zarr"]


def test_a_client_runs_one_part_after_the_other(dataset, tmp_path, undisturbed, client):
    # What an earlier run gave out is being let go of.
    for attempt in range(4):
        plan = plan_of("zarr", dataset, tmp_path / f"{attempt}")
        for units in (range(0, 3), range(3, 6), None):
            report = run(plan, units=units, executor=client)
        assert (report.written, report.kept) == (24, 6)
        assert contents(tmp_path / f"{attempt}") == undisturbed["zarr"]


def test_a_client_need_not_be_the_one_that_dask_uses(dataset, tmp_path, undisturbed, cluster):
    from distributed import Client

    with Client(cluster, set_as_default=False) as client:
        run(plan_of("zarr", dataset, tmp_path / "out"), executor=client)
    assert contents(tmp_path / "out") == undisturbed["zarr"]


def test_a_cluster_that_grows_with_its_work_begins_without_workers(dataset, tmp_path, undisturbed):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address=":0") as growing, growing.get_client() as client:
        growing.adapt(minimum=0, maximum=2)
        export_zarr(dataset, tmp_path / "a.zarr", executor=client, **EXPORTS["zarr"])
    assert contents(tmp_path / "a.zarr") == undisturbed["zarr"]


def test_work_that_a_cluster_gave_up_is_told(dataset, tmp_path, undisturbed, client, monkeypatch):
    plan, submit = plan_of("zarr", dataset, tmp_path / "out"), client.submit

    def cancelled(*args: Any, **kwargs: Any) -> Any:
        future = submit(*args, **kwargs)
        if args[2] == 7:
            client.cancel([future])
        return future

    with monkeypatch.context() as patch:
        patch.setattr(client, "submit", cancelled)
        with pytest.raises(ExportError, match=r"The cluster gave up units of .*out: .*unit-7-.*\. Run the same export again to continue"):
            run(plan, executor=client)
    assert run(plan, executor=client).sealed
    assert contents(tmp_path / "out") == undisturbed["zarr"]


def test_the_address_of_a_scheduler_is_enough(dataset, tmp_path, undisturbed, cluster):
    export_zarr(dataset, tmp_path / "a.zarr", executor=cluster.scheduler_address, **EXPORTS["zarr"])
    assert contents(tmp_path / "a.zarr") == undisturbed["zarr"]


def test_the_command_takes_the_address_of_a_scheduler(table, tmp_path, undisturbed, cluster):
    command = ["export", str(table), str(tmp_path / "a.zarr"), *COMMANDS["zarr"], "--executor", cluster.scheduler_address]
    assert main(command) == 0
    assert contents(tmp_path / "a.zarr") == undisturbed["zarr"]


def test_a_store_can_be_exported_by_workers(dataset, tmp_path, client):
    export_zarr(dataset, tmp_path / "a.zarr", **EXPORTS["zarr"])
    export_mrc(ZarrDataset(tmp_path / "a.zarr"), tmp_path / "out", executor=client, **EXPORTS["mrc"])
    assert torch.equal(IndexedDataset(tmp_path / "out/particles.cs").read(slice(None)), dataset.read(slice(None)))


def test_an_error_of_a_worker_is_told_here_and_the_rest_goes_on_later(tmp_path, client):
    path, _ = write_particles(tmp_path / "project", N, box=BOX)
    plan = plan_of("zarr", IndexedDataset(path), tmp_path / "out")
    (tmp_path / "out/images/c").mkdir(parents=True)
    (tmp_path / "out/zarr.json").write_text("{}")  # a store, and in the way of a folder
    with pytest.raises(ExportExistsError, match="overwrite=True"):
        run(plan, executor=client)
    run(plan, overwrite=True, executor=client)
    assert len(ZarrDataset(tmp_path / "out")) == N


def test_an_error_in_a_unit_is_raised_and_nothing_is_sealed(dataset, tmp_path, undisturbed, client):
    plan = plan_of("zarr", dataset, tmp_path / "out")
    (tmp_path / "out/images/c").mkdir(parents=True)
    (tmp_path / "out/images/c/7").write_text("a file in the place of a folder")
    (tmp_path / "out/.export").mkdir()
    (tmp_path / "out/.export/plan.json").write_bytes(plan_bytes(plan, tmp_path))
    with pytest.raises(ExportError, match=r"images/c/7"):
        run(plan, executor=client)
    assert "zarr.json" not in contents(tmp_path / "out")
    (tmp_path / "out/images/c/7").unlink()
    assert run(plan, executor=client).sealed
    assert contents(tmp_path / "out") == undisturbed["zarr"]


def plan_bytes(plan: ExportPlan, folder: Path) -> bytes:
    """What a run of the plan notes of it."""
    run(replace(plan, target=str(folder / "other")), units=range(1))
    return (folder / "other/.export/plan.json").read_bytes()


@pytest.mark.parametrize("executor", [5, object(), ["tcp://127.0.0.1:1"], sys], ids=["a number", "an object", "a list", "a module"])
def test_an_executor_that_is_none_is_refused_before_anything_is_written(dataset, tmp_path, executor):
    with pytest.raises(ArgumentError, match=rf"executor is a .*Client or the address of a scheduler, not a {type(executor).__name__}"):
        export_zarr(dataset, tmp_path / "a.zarr", executor=executor)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["scheduler", "nothing://127.0.0.1:1"])
def test_an_address_without_a_scheduler_is_named(dataset, tmp_path, undisturbed, address):
    pytest.importorskip("distributed")
    import dask

    with pytest.raises(ExportError, match=f"There is no scheduler of dask at '{address}', which is to be such as tcp://") as caught:
        export_zarr(dataset, tmp_path / "out", executor=address, **EXPORTS["zarr"])
    assert dask.config.get("scheduler", None) is None  # what else the program does with dask does not wait for it, while this is kept:
    assert caught.value.__cause__ is not None
    export_zarr(dataset, tmp_path / "out", **EXPORTS["zarr"])
    assert contents(tmp_path / "out") == undisturbed["zarr"]


@pytest.mark.parametrize("address", ["scheduler", "", "tcp://host:port", "nothing://127.0.0.1:1"])
def test_what_is_no_address_leaves_no_client_to_wait_for(dataset, tmp_path, address):
    pytest.importorskip("distributed")
    plan = plan_export(dataset, tmp_path / "a.zarr")
    before = set(threading.enumerate())
    with pytest.raises(ExportError, match="There is no scheduler of dask"):
        run(plan, executor=address)
    assert "IO loop" not in {thread.name for thread in set(threading.enumerate()) - before}


def test_without_dask_the_error_names_the_extra_before_anything_is_written(dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingDependencyError, match=re.escape('pip install "cryolike-data[distributed]"')):
        export_zarr(dataset, tmp_path / "a.zarr", executor="tcp://127.0.0.1:1")
    assert list(tmp_path.iterdir()) == []


# --- processes that share the units


def command(table: Path, target: Path, kind: str, *more: str) -> list[str]:
    code = "import sys; from cryolike_data.cli import main; sys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", code, "export", str(table), str(target), *COMMANDS[kind], *more]


@each_format
def test_four_processes_at_once_write_what_one_process_writes(table, tmp_path, kind):
    parts = [command(table, tmp_path / "out", kind, "--unit-range", f"{part}/4") for part in range(4)]
    processes = [subprocess.Popen(part, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for part in parts]
    told = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, told
    assert {"zarr.json", "export.json"} & set(contents(tmp_path / "out")) == set()
    assert main(["export", str(table), str(tmp_path / "out"), *COMMANDS[kind], "--finish"]) == 0
    assert main(["export", str(table), str(tmp_path / "alone"), *COMMANDS[kind]]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


BLOCKED = """
import os, sys
from cryolike_data.cli import main
from cryolike_data.export.zarr import ZarrFormat

write = ZarrFormat.write_unit
def blocked(*args):
    os.write(1, b"blocked\\n")
    sys.stdin.read()
    return write(*args)
ZarrFormat.write_unit = blocked
sys.exit(main(sys.argv[1:]))
"""


def test_parts_that_overlap_are_detected_while_both_are_at_work(table, tmp_path, undisturbed, capsys):
    arguments = ["export", str(table), str(tmp_path / "out"), *COMMANDS["zarr"]]
    blocked = [sys.executable, "-c", BLOCKED, *arguments, "--unit-range", "1/3"]
    with subprocess.Popen(blocked, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "blocked\n"
        capsys.readouterr()
        for more in (["--unit-range", "0/2"], ["--unit-range", "1/2"], [], ["--finish"]):
            assert main([*arguments, *more]) == 1
            assert f"process {process.pid}" in capsys.readouterr().err
        assert results(tmp_path / "out") == []
        assert main([*arguments, "--unit-range", "0/3"]) == 0
        assert main([*arguments, "--unit-range", "2/3"]) == 0
        process.communicate("")
        assert process.returncode == 0
    assert main([*arguments, "--finish"]) == 0
    assert contents(tmp_path / "out") == undisturbed["zarr"]


def test_parts_of_different_exports_do_not_mix(table, tmp_path, capsys):
    arguments = ["export", str(table), str(tmp_path / "out"), *COMMANDS["zarr"]]
    assert main([*arguments, "--unit-range", "0/2"]) == 0
    before = contents(tmp_path / "out")
    write_particles(tmp_path / "other", N, box=BOX, **ctf_columns(N, seed=5))
    assert main(["export", str(tmp_path / "other/J1/particles.cs"), *arguments[2:], "--unit-range", "1/2"]) == 1
    assert "differ" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before
