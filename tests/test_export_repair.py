"""Finished exports that lost or damaged a file, writers of an older export that come too late, and several that finish at once."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import zarr
from support import EXPORTS, contents, write_particles, write_stack

from cryolike_data import IndexedDataset, ParticleDataset, ZarrDataset
from cryolike_data.errors import ExportError
from cryolike_data.export import ExportPlan, ExportReport, finish, plan_export, run, run_unit

REST = {
    "zarr": ["uid/c/0", "uid/zarr.json", "images/zarr.json", "ctf/zarr.json", "ctf/defocus_u/c/0", "source/file/c/0"],
    "cryolike": ["fft/image_descriptor.npz"],
    "mrc": ["particles.cs", "particles.star"],
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ParticleDataset:
    folder = tmp_path_factory.mktemp("project")
    write_particles(folder, 23, box=16)
    return IndexedDataset(folder / "J1/particles.cs")


@pytest.mark.parametrize("damage", ["lost", "cut short", "changed"])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in REST.items() for name in names])
def test_a_file_that_belongs_to_no_unit_is_written_again(
    dataset: ParticleDataset, tmp_path: Path, kind: str, name: str, damage: str
) -> None:
    plan = plan_export(dataset, tmp_path / "out", format=kind, **EXPORTS[kind])
    run(plan)
    before = contents(tmp_path / "out")
    path = tmp_path / "out" / name
    content = path.read_bytes()
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "cut short" else content[:-1] + bytes([content[-1] ^ 1]))
    report = run(plan)
    assert (report.written, report.sealed) == (0, True)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("damage", ["lost", "cut short"])
@pytest.mark.parametrize("kind", EXPORTS)
def test_finishing_names_the_units_that_a_finished_export_lost(dataset: ParticleDataset, tmp_path: Path, kind: str, damage: str) -> None:
    plan = plan_export(dataset, tmp_path / "out", format=kind, **EXPORTS[kind])
    run(plan)
    whole = contents(tmp_path / "out")
    for unit in (1, 4):
        path = tmp_path / "out" / plan.files(unit)[-1]
        content = path.read_bytes()
        path.unlink()
        if damage == "cut short":
            path.write_bytes(content[:-1])
    before = contents(tmp_path / "out")
    with pytest.raises(ExportError, match=r"out is not whole any more: 2 of 5 units are not there \(1, 4\)\. Run the same export again"):
        finish(plan)
    assert contents(tmp_path / "out") == before
    assert run(plan).written == 2
    assert finish(plan).kept == 5
    assert contents(tmp_path / "out") == whole


#: Of the seal of a store.
DAMAGES: dict[str, Callable[[str], str]] = {
    "empty": lambda seal: "",
    "cut short": lambda seal: seal[:-1],
    "a list": lambda seal: "[]",
    "another group": lambda seal: '{"zarr_format": 3, "node_type": "group"}\n',
    "no group": lambda seal: seal.replace('"group"', '"graph"'),
    "another box": lambda seal: seal.replace('"box": 16', '"box": 61'),
}


@pytest.mark.parametrize("stopped", [False, True], ids=["", "before it tidied up"])
@pytest.mark.parametrize("damage", [*DAMAGES, "lost"])
@pytest.mark.parametrize("call", [run, finish])
def test_the_seal_of_a_store_is_written_again(
    dataset: ParticleDataset, tmp_path: Path, call: Callable[[ExportPlan], ExportReport], damage: str, stopped: bool
) -> None:
    plan = plan_export(dataset, tmp_path / "a.zarr", **EXPORTS["zarr"])
    run(plan)
    before, path = contents(tmp_path / "a.zarr"), tmp_path / "a.zarr/zarr.json"
    seal = path.read_text()
    path.unlink()
    if damage != "lost":
        path.write_text(DAMAGES[damage](seal))
    if stopped:
        run(plan_export(dataset, tmp_path / "b.zarr", **EXPORTS["zarr"]), units=plan.units)
        shutil.move(tmp_path / "b.zarr/.export", tmp_path / "a.zarr")
    report = call(plan)
    assert (report.written, report.kept, report.sealed) == (0, 5, True)
    assert contents(tmp_path / "a.zarr") == before
    assert len(ZarrDataset(tmp_path / "a.zarr")) == 23


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_what_others_add_to_the_seal_of_a_store_stays(dataset: ParticleDataset, tmp_path: Path) -> None:
    plan = plan_export(dataset, tmp_path / "a.zarr", **EXPORTS["zarr"])
    run(plan)
    zarr.open_group(tmp_path / "a.zarr").attrs["title"] = "mine"
    zarr.consolidate_metadata(tmp_path / "a.zarr")
    before = contents(tmp_path / "a.zarr")
    assert run(plan).sealed
    assert contents(tmp_path / "a.zarr") == before


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_file_to_which_something_was_added_is_written_again(dataset: ParticleDataset, tmp_path: Path, kind: str) -> None:
    plan = plan_export(dataset, tmp_path / "out", format=kind, **EXPORTS[kind])
    run(plan)
    before = contents(tmp_path / "out")
    for name in (plan.files(1)[0], REST[kind][0]):
        with (tmp_path / "out" / name).open("ab") as file:
            file.write(b"more")
    assert run(plan).written == 1
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_writer_of_an_older_export_does_not_touch_the_one_that_replaced_it(dataset: ParticleDataset, tmp_path: Path, kind: str) -> None:
    older = plan_export(dataset, tmp_path / "out", format=kind, **EXPORTS[kind])
    newer = plan_export(dataset.select(slice(None, None, -1)), tmp_path / "out", format=kind, **EXPORTS[kind])
    replaced = []

    def replace(images: int, size: int) -> None:
        if not replaced:
            replaced.append(run(newer, overwrite=True))

    with pytest.raises(ExportError, match="another export"):
        run_unit(older, 0, advance=replace)
    run(plan_export(newer.dataset, tmp_path / "fresh", format=kind, **EXPORTS[kind]))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("kind", EXPORTS)
def test_a_finished_export_is_not_mended_with_images_that_changed_since(tmp_path: Path, kind: str) -> None:
    table, images = write_particles(tmp_path / "project", 23, box=16, stacks=1)
    plan = plan_export(IndexedDataset(table), tmp_path / "out", format=kind, **EXPORTS[kind])
    run(plan)
    (tmp_path / "out" / plan.files(2)[0]).unlink()
    before = contents(tmp_path / "out")
    write_stack(tmp_path / "project/J1/extract/stack_0.mrc", images[::-1])
    for mend in (run, lambda plan: run_unit(plan, 2)):
        with pytest.raises(ExportError, match=r"is finished, but .* is damaged and does not become what it was: .*overwrite=True"):
            mend(plan)
        assert contents(tmp_path / "out") == before


# --- finishing


@pytest.fixture
def all_units(dataset: ParticleDataset, tmp_path: Path, request: pytest.FixtureRequest) -> ExportPlan:
    """A plan of this kind all units of which are there."""
    plan = plan_export(dataset, tmp_path / "out", format=request.param, **EXPORTS[request.param])
    run(plan, units=plan.units)
    return plan


def meanwhile(monkeypatch: pytest.MonkeyPatch, plan: ExportPlan, call: Callable[[], object]) -> None:
    """Have something done once, after the next files that belong to no unit are written."""
    write_rest, done = type(plan.format).write_rest, []

    def write(self: Any, dataset: ParticleDataset, place: Any) -> Any:
        files = write_rest(self, dataset, place)
        if not done:
            done.append(1)
            call()
        return files

    monkeypatch.setattr(type(plan.format), "write_rest", write)


@pytest.mark.parametrize("call", [run, finish])
@pytest.mark.parametrize("all_units", EXPORTS, indirect=True)
def test_an_export_that_is_being_finished_is_not_replaced(
    all_units: ExportPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[ExportPlan], object]
) -> None:
    plan, kind = all_units, all_units.format.kind
    other = plan_export(plan.dataset.select(slice(None, None, -1)), plan.target, format=kind, **EXPORTS[kind])

    def replace() -> None:
        with pytest.raises(ExportError, match="Another run is at work on this target"):
            run(other, overwrite=True)

    meanwhile(monkeypatch, plan, replace)
    call(plan)
    monkeypatch.undo()
    run(plan_export(plan.dataset, tmp_path / "fresh", format=kind, **EXPORTS[kind]))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("all_units", EXPORTS, indirect=True)
def test_who_finishes_too_late_does_not_touch_the_export_that_replaced_it(
    all_units: ExportPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As of a process on a machine that was silent for so long that it was taken for dead.
    plan, kind = all_units, all_units.format.kind
    newer = plan_export(plan.dataset.select(slice(None, None, -1)), plan.target, format=kind, **EXPORTS[kind])

    def replace() -> None:
        for name in (tmp_path / "out/.export/runs").iterdir():
            name.unlink()
        run(newer, overwrite=True)

    meanwhile(monkeypatch, plan, replace)
    with pytest.raises(ExportError, match="was given to another export"):
        finish(plan)
    monkeypatch.undo()
    run(plan_export(newer.dataset, tmp_path / "fresh", format=kind, **EXPORTS[kind]))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("all_units", EXPORTS, indirect=True)
def test_of_several_that_finish_at_once_one_does_the_work_and_all_succeed(
    all_units: ExportPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, kind = all_units, all_units.format.kind
    monkeypatch.setattr("cryolike_data.export.seal._WAIT_SECONDS", (0.001, 0.01))
    write_rest, written, others = type(plan.format).write_rest, [], 3
    waiting, sleep = threading.Semaphore(0), time.sleep

    def write(self: Any, dataset: ParticleDataset, place: Any) -> Any:
        written.append(1)
        for _ in range(others):
            waiting.acquire()
        return write_rest(self, dataset, place)

    def wait(seconds: float) -> None:
        waiting.release()
        sleep(seconds)

    monkeypatch.setattr(type(plan.format), "write_rest", write)
    monkeypatch.setattr(time, "sleep", wait)
    with ThreadPoolExecutor(1 + others) as threads:
        reports = [threads.submit(finish, plan) for _ in range(1 + others)]
        assert [report.result().sealed for report in reports] == [True] * (1 + others)
    monkeypatch.undo()
    assert len(written) == 1
    run(plan_export(plan.dataset, tmp_path / "fresh", format=kind, **EXPORTS[kind]))
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert not (tmp_path / "out/.export").exists()
