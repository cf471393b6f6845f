"""What ``cryolike-data bench`` measures and says. The figures themselves are not tested."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import forget, open_files, write_particles, write_stack, write_table

from cryolike_data import IndexedDataset, ParticleSampler, ZarrDataset, export_zarr
from cryolike_data.cli import main
from cryolike_data.demo import DemoProject, write_project
from cryolike_data.diagnose import Figure, _forget, _is_cached, _sentence, diagnose


def figures(*, copy: float, warm: float, cold: float | None = None, device: float | None = None) -> list[Figure]:
    found = [Figure("copy in memory (floor)", copy), Figure("stream, warm, random order", warm, "copy in memory", warm / copy)]
    if device is not None:
        found.append(Figure("stream to the device, warm", device, "pinned copy to the device", 1.0))
    return found if cold is None else [*found, Figure("stream, cold, random order", cold, "sequential read, cold", 1.0)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"copy": 10e9, "warm": 9e9, "cold": 1e9}, "disk is the bottleneck: data that are in memory come 9.0 times as fast"),
        ({"copy": 10e9, "warm": 9e9, "cold": 1e9, "device": 2e9}, "disk is the bottleneck"),
        ({"copy": 10e9, "warm": 9e9, "cold": 4.4e9}, "disk is the bottleneck"),
        ({"copy": 10e9, "warm": 9e9, "cold": 4.6e9}, "Memory is the bottleneck"),
        ({"copy": 10e9, "warm": 9e9, "cold": 8e9, "device": 7.1e9}, "bus to the device is the bottleneck: float16 stacks would halve"),
        ({"copy": 10e9, "warm": 9e9, "device": 7.3e9}, "Memory is the bottleneck"),
        ({"copy": 10e9, "warm": 4.9e9}, "Small images or batches"),
        ({"copy": 10e9, "warm": 5.1e9}, "Memory is the bottleneck"),
    ],
)
def test_the_sentence_names_what_is_slow(given: dict[str, float], said: str) -> None:
    assert said in _sentence(figures(**given))


def test_shares_are_of_the_floor_they_name(demo: DemoProject) -> None:
    copy, warm = diagnose(IndexedDataset(demo.indexed), batch_size=16, cold=False)[0]
    assert (copy.name, copy.floor, copy.share) == ("copy in memory (floor)", None, None)
    assert (warm.name, warm.floor) == ("stream, warm, random order", "copy in memory")
    assert warm.share == pytest.approx(warm.bytes_per_second / copy.bytes_per_second)


def test_cold_figures_are_of_all_that_lies_on_the_disk(tmp_path: Path) -> None:
    # Files of its own: the system lets go of no page that another data set has mapped.
    dataset = IndexedDataset(write_project(tmp_path / "project", n_particles=60, box=32).indexed)
    files = dataset.particles.paths
    for path in files:
        forget(Path(path))
    assert _forget(files)
    before = _bytes_of_system_calls()
    *_, floor, cold = diagnose(dataset, batch_size=16)[0]
    assert _bytes_of_system_calls() - before >= 2 * sum(map(os.path.getsize, files))
    assert (floor.name, cold.name) == ("sequential read, cold (floor)", "stream, cold, random order")
    assert cold.floor == "sequential read, cold"
    assert cold.share == pytest.approx(cold.bytes_per_second / floor.bytes_per_second)


@pytest.mark.skipif(sys.platform != "linux", reason="nobody says here what is in memory")
def test_looking_whether_files_were_forgotten_brings_none_of_them_back(tmp_path: Path) -> None:
    path = tmp_path / "stack"
    path.write_bytes(bytes(1 << 20))
    forget(path)
    assert _forget([str(path)])
    time.sleep(0.1)  # whatever was begun is done
    assert not _is_cached(str(path))


def _bytes_of_system_calls() -> int:
    """What this process has asked the system to read; maps do not count."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_each_cold_run_begins_with_nothing_in_memory(demo: DemoProject, monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[Any] = []
    reading = IndexedDataset.reading
    monkeypatch.setattr(IndexedDataset, "reading", lambda self, *of: did.append(self) or reading(self, *of))
    monkeypatch.setattr("cryolike_data.diagnose._forget", lambda files: not did.append("forget"))
    monkeypatch.setattr("cryolike_data.diagnose._read_through", lambda files, size: did.append(size))
    diagnose(IndexedDataset(demo.indexed), batch_size=60, max_bytes=1)
    warm, one, other = did[0], did[-3], did[-1]
    size = warm.image_bytes
    # What is in the map of a data set stays in memory, so that each run has one of its own.
    assert did == [warm] * 6 + ["forget"] + ["forget", size] * 2 + ["forget", one, "forget", other]
    assert len({warm, one, other}) == 3


@pytest.mark.parametrize(("says", "cold"), [(OSError, False), (BlockingIOError, True)])
def test_nothing_is_called_cold_where_the_system_cannot_say(
    demo: DemoProject, monkeypatch: pytest.MonkeyPatch, says: type[OSError], cold: bool
) -> None:
    def preadv(*arguments: Any) -> int:
        raise says

    monkeypatch.setattr("cryolike_data.diagnose.is_resident", lambda *_: True)  # as Linux says of what is another user's
    monkeypatch.setattr(os, "preadv", preadv)
    dataset = IndexedDataset(demo.indexed)
    figures = diagnose(dataset, batch_size=16)[0]
    assert any("cold" in figure.name for figure in figures) is cold
    assert open_files(demo.folder) == []


def test_no_file_is_mapped_that_is_to_be_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, _ = write_particles(tmp_path, 20, box=16)
    mapped: list[bool] = []
    monkeypatch.setattr("cryolike_data.diagnose._forget", lambda _: not mapped.append(str(tmp_path) in Path("/proc/self/maps").read_text()))
    diagnose(IndexedDataset(table), batch_size=4)
    assert mapped == [False] * 5


def test_rates_are_such_as_a_machine_has(tmp_path: Path) -> None:
    n, box = 1600, 128
    write_stack(tmp_path / "a.mrc", np.zeros((0, box, box), "f4"), nz=n)
    with (tmp_path / "a.mrc").open("r+b") as file:
        file.truncate(1024 + 4 * n * box**2)
    table = write_table(tmp_path / "a.cs", blob__path=["a.mrc"] * n, blob__idx=np.arange(n, dtype="u4"), blob__psize_A=np.ones(n, "f4"))
    found, sentence = diagnose(IndexedDataset(table), cold=False)
    assert all(1e7 < figure.bytes_per_second < 1e12 for figure in found)
    assert "bottleneck" in sentence
    assert "too few" not in sentence


def test_a_store_at_a_url_has_warm_figures_only(demo: DemoProject) -> None:
    pytest.importorskip("fsspec")
    store = export_zarr(IndexedDataset(demo.indexed), "memory://diagnose/a.zarr")
    figures, _ = diagnose(ZarrDataset(store), max_bytes=1 << 20)
    assert [figure.name for figure in figures if "cold" in figure.name] == []


def test_a_system_that_forgets_no_files_has_warm_figures_only(demo: DemoProject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise")
    figures, _ = diagnose(IndexedDataset(demo.indexed), max_bytes=1 << 20)
    assert [figure.name for figure in figures if "cold" in figure.name] == []


def test_no_more_is_read_than_allowed(demo: DemoProject, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = IndexedDataset(demo.indexed)
    longest: list[int] = []
    reading = IndexedDataset.reading
    monkeypatch.setattr(IndexedDataset, "reading", lambda self, *of: longest.append(len(self)) or reading(self, *of))
    diagnose(dataset, batch_size=4, max_bytes=10 * dataset.image_bytes, cold=False)
    assert set(longest) == {10}


def test_of_many_files_few_are_read_and_none_further_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n, files, box = 200, 20, 64
    table, _ = write_particles(tmp_path, n, box=box, stacks=files)
    dataset = IndexedDataset(table)
    allowed, seen = 15 * dataset.image_bytes, set[str]()
    monkeypatch.setattr("cryolike_data.diagnose._forget", lambda paths: not seen.update(paths))
    before = _bytes_of_system_calls()
    diagnose(dataset, batch_size=16, max_bytes=allowed)
    assert 2 * allowed <= _bytes_of_system_calls() - before < 3 * allowed
    assert len(seen) == 2


def test_a_batch_is_no_larger_than_what_is_read(demo: DemoProject, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr("cryolike_data.diagnose.ParticleSampler", lambda data, size: made.append(size) or ParticleSampler(data, size))
    diagnose(IndexedDataset(demo.indexed), batch_size=10**12, cold=False)
    assert set(made) == {60}


def test_the_command_prints_floors_shares_and_a_sentence(demo: DemoProject, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(demo.indexed), "--batch-size", "16"]) == 0
    said = capsys.readouterr().out
    assert "copy in memory (floor)" in said
    assert "% of copy in memory" in said
    assert said.strip().splitlines()[-1].endswith((".", "helps."))


def test_a_batch_size_of_zero_is_refused(demo: DemoProject, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(demo.indexed), "--batch-size", "0"]) == 1
    assert "--batch-size" in capsys.readouterr().err


def test_few_data_give_no_verdict(demo: DemoProject) -> None:
    figures, sentence = diagnose(IndexedDataset(demo.indexed), batch_size=16, cold=False)
    assert figures
    assert "too few to tell" in sentence
