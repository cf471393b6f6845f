"""Exports that are killed at any moment, or whose disk is full: what they leave is never taken for whole, and the same call ends them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from killing import MODES, SETTINGS, UNIT
from support import EXPORTS, contents, disk_of, no_file_larger_than, run_python, write_particles

from cryolike_data import IndexedDataset
from cryolike_data.errors import ExportError
from cryolike_data.export import plan_export, run, run_unit
from cryolike_data.export.pixels import Pixels

N, BOX = 1000, 64
FORMATS = list(SETTINGS)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 16 MB of images in 25 units; tests read it only."""
    path, _ = write_particles(tmp_path_factory.mktemp("project"), N, box=BOX, stacks=3)
    return path


@pytest.fixture(scope="module")
def undisturbed(table: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of an export, by format, of one call that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for kind, settings in SETTINGS.items():
        run(plan_export(IndexedDataset(table), folder / kind, format=kind, **settings))
    return {kind: folder / kind for kind in SETTINGS}


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
@pytest.mark.parametrize("kind", FORMATS)
def test_an_export_killed_at_any_moment_is_never_taken_for_whole_and_ends_as_an_undisturbed_one(table, tmp_path, kind, how):
    ran = run_python("import sys, killing; killing.main(*sys.argv[1:])", kind, table, tmp_path, how, FORMATS.index(kind), timeout=120)
    assert ran.returncode == 0, ran.stderr
    told = [json.loads(line) for line in ran.stdout.splitlines()]
    struck = [kill for kill in told if kill["struck"]]
    assert [kill["mode"] for kill in struck] == MODES[how]
    assert [kill for kill in told if kill["sealed"] and not kill["whole"]] == []
    ends = [kill["end"] for kill in told if "end" in kill]
    assert len(ends) > MODES[how].count("new") + MODES[how].count("replacing")
    assert set(ends) == {True}
    assert {kill["units"] for kill in struck} - {0, -(-N // UNIT)} != set()  # some were struck in the middle


# --- a full disk


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("room", ["nothing", "no unit", "all units but not for the rest"])
def test_a_file_that_cannot_grow_is_named_and_the_same_call_ends_as_an_undisturbed_one(tmp_path, kind, room):
    # Units so small that the tables, or what tells of all units, are larger.
    dataset = IndexedDataset(write_particles(tmp_path / "project", 300, box=16)[0])
    whole, plan = (plan_export(dataset, tmp_path / name, format=kind, **EXPORTS[kind]) for name in ("whole", "out"))
    run(whole)
    sizes = {path.relative_to(whole.target).as_posix(): path.stat().st_size for path in Path(whole.target).rglob("*") if path.is_file()}
    largest = max(sizes[name] for unit in plan.units for name in plan.files(unit))
    limit = {"nothing": 10, "no unit": largest - 1, "all units but not for the rest": largest}[room]
    told = r"cannot be written: File too large\. What is finished stays;"
    with no_file_larger_than(limit), pytest.raises(ExportError, match=told) as caught:
        run(plan)
    named = str(caught.value).removeprefix(f"{tmp_path}/out/").partition(" cannot")[0]
    too_large = {name for name, size in sizes.items() if size > limit}
    assert named in too_large | ({".export/plan.json"} if room == "nothing" else set())
    found = contents(tmp_path / "out")
    assert [name for name in found if "partial/" in name or "/runs/" in name] == []
    assert not {"zarr.json", "export.json", *too_large} & set(found)
    report = run(plan)
    assert report.sealed
    assert report.kept == (60 if room == "all units but not for the rest" else 0) or room == "no unit"
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_system_that_writes_a_part_of_what_it_is_given_is_given_the_rest(table, undisturbed, tmp_path, kind, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, memoryview(data)[:100_000]))
    run(plan_export(IndexedDataset(table), tmp_path / "out", format=kind, **SETTINGS[kind]))
    assert contents(tmp_path / "out") == contents(undisturbed[kind])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 6 MB."""
    with disk_of(tmp_path / "disk", "6m") as disk:
        yield disk


@pytest.mark.parametrize("kind", FORMATS)
def test_a_disk_that_fills_up_is_told_and_the_same_call_goes_on_when_there_is_room(table, small_disk, undisturbed, kind, monkeypatch):
    plan = plan_export(IndexedDataset(table), small_disk / "out", format=kind, **SETTINGS[kind])
    with pytest.raises(ExportError, match=r"out needs [12].* MB and the disk has 6\.29 MB free"):
        run(plan)
    assert list(small_disk.iterdir()) == []
    # Somebody else needs the room that there was at first.
    usage = shutil.disk_usage(small_disk)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=10**9))
        with pytest.raises(ExportError, match=rf"{small_disk}/out/.* cannot be written: No space left on device"):
            run(plan)
    found = contents(small_disk / "out")
    assert [name for name in found if "partial/" in name or "/runs/" in name] == []
    assert not {"zarr.json", "export.json"} & set(found)
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    report = run(plan)
    assert report.kept > 0
    assert report.sealed
    assert contents(small_disk / "out") == contents(undisturbed[kind])


@pytest.mark.parametrize("kind", ["zarr", "mrc"])
def test_a_unit_for_which_there_is_no_room_is_told_before_its_images_are_read(table, small_disk, kind, monkeypatch):
    dataset = IndexedDataset(table)
    whole = {"zarr": {"shard_bytes": 1 << 30}, "mrc": {"batch_size": N}}[kind]  # one unit of 16 MB
    plan, pieces, read = plan_export(dataset, small_disk / "out", format=kind, **whole), Pixels.pieces, []
    usage = shutil.disk_usage(small_disk)

    def looking(self: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        for piece in pieces(self, *args, **kwargs):
            read.append(len(piece))
            yield piece

    monkeypatch.setattr(Pixels, "pieces", looking)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=10**9))
    with pytest.raises(ExportError, match="cannot be written: No space left on device"):
        run_unit(plan, 0)
    assert read == []
