"""Columns that are read when they are first asked for: the same as if they had been read at once, or an error that says why not."""

from __future__ import annotations

import dataclasses
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import ctf_columns, mapped_files, open_files, run_python, uids, write_particles, write_stack, write_table

import cryolike_data.particles
from cryolike_data import IndexedDataset, Particles, stream
from cryolike_data.cryosparc.table import Table
from cryolike_data.errors import TableError
from cryolike_data.export import plan_export

N = 30


@pytest.fixture
def cs(tmp_path: Path) -> Path:
    pose = np.arange(3 * N, dtype="f4").reshape(N, 3)
    return write_particles(tmp_path, N, alignments3D__pose=pose, alignments3D__split=np.arange(N, dtype="u4") % 2)[0]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The tables whose columns are loaded, in order."""
    loaded: list[Path] = []
    load = Table.load
    monkeypatch.setattr(Table, "load", lambda self, wanted, **how: loaded.append(self.path) or load(self, wanted, **how))
    return loaded


def check(particles: Particles, rows: list[int]) -> None:
    assert particles.row.tolist() == rows
    np.testing.assert_array_equal(particles.uid, uids(N)[rows])
    np.testing.assert_array_equal(particles.pose, np.arange(3 * N).reshape(N, 3)[rows])
    np.testing.assert_array_equal(particles.half_set, np.asarray(rows) % 2)
    assert len(particles.ctf.defocus_u) == len(rows)
    assert particles.shift_A is None


def test_opening_and_reading_images_loads_no_optics(cs: Path, loads: list[Path]) -> None:
    ds = IndexedDataset(cs)
    ds.read(range(N))
    list(ds.select([1, 2]))
    assert len(ds[[3, 4]]) == 2
    assert [len(batch) for batch in stream(ds, batch_size=20)] == [20, 10]
    assert loads == []


def test_what_is_asked_for_is_loaded_once(cs: Path, loads: list[Path]) -> None:
    ds = IndexedDataset(cs)
    check(ds.particles, list(range(N)))
    check(ds.particles, list(range(N)))
    assert loads == [cs]


def test_a_batch_gives_its_rows_whenever_it_is_asked(cs: Path) -> None:
    ds = IndexedDataset(cs)
    batch = ds[[5, 2, 5]]
    assert batch.uid.numpy().view("u8").tolist() == uids(N)[[5, 2, 5]].tolist()


SELECT: dict[str, Callable[[Particles], Particles]] = {
    "before": lambda particles: particles[[7, 3, 20]],
    "twice before": lambda particles: particles[3:25][[4, 0, 17]],
    "after one column": lambda particles: (particles.pose, particles[[7, 3, 20]])[1],
    "by optics": lambda particles: particles[lambda p: np.array([7, 3, 20]) * (p.ctf.voltage_kv[0] > 0).astype(int)],
}


@pytest.mark.parametrize("select", SELECT)
def test_selections_are_those_of_the_loaded_columns(cs: Path, select: str, loads: list[Path]) -> None:
    check(SELECT[select](IndexedDataset(cs).particles), [7, 3, 20])
    assert len(loads) == 1


def test_no_particles_have_columns_without_rows(cs: Path) -> None:
    none = IndexedDataset(cs).particles[np.arange(0)]
    assert [len(column) for column in none.columns().values()] == [0] * len(none.columns())


def test_nothing_stays_open_or_mapped(cs: Path, tmp_path: Path) -> None:
    ds = IndexedDataset(cs)
    assert open_files(tmp_path) == mapped_files(tmp_path) == []
    check(ds.particles, list(range(N)))
    assert open_files(tmp_path) == mapped_files(tmp_path) == []


def test_pickles_are_small_until_columns_are_loaded_and_load_for_themselves(tmp_path: Path) -> None:
    cs, _ = write_particles(tmp_path, 3000, box=4, stacks=1)
    ds = IndexedDataset(cs)
    before = pickle.dumps(ds)
    assert len(before) < 25 * 3000
    np.testing.assert_array_equal(pickle.loads(before).particles.uid, uids(3000))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(ds.select([5, 1]))).particles.uid, uids(3000)[[5, 1]])


@pytest.mark.parametrize("taken", [lambda p: p, lambda p: p[3:9], lambda p: (p.uid, p[[5, 1]])[1]], ids=["all", "before", "after"])
def test_columns_that_another_process_reads_again_cannot_be_written_to(cs: Path, taken: Callable[[Particles], Particles]) -> None:
    particles = taken(IndexedDataset(cs).particles)
    for column in (particles.uid, particles.row, particles.pose, particles.half_set, particles.ctf.defocus_u, particles.ctf.voltage_kv):
        with pytest.raises(ValueError, match="read-only"):
            column[:] = 7
    mine = dataclasses.replace(particles, pose=np.full((len(particles), 3), 7.0, np.float32))
    assert (pickle.loads(pickle.dumps(mine)).pose == 7).all()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(mine)).uid, particles.uid)


def replace(path: Path) -> None:
    rows = np.load(path)
    rows["uid"] += 1
    os.utime(path, ns=(0, 0))
    with path.open("wb") as file:
        np.save(file, rows)


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(("change", "said"), [(replace, "has changed"), (shorten, "has changed"), (remove, "cannot be read any more")])
def test_a_table_that_is_not_the_one_that_was_opened_is_an_error(cs: Path, change: Callable[[Path], None], said: str) -> None:
    ds = IndexedDataset(cs)
    change(cs)
    with pytest.raises(TableError, match=said) as caught:
        _ = ds.particles.ctf
    assert str(cs) in str(caught.value)
    assert len(ds.read(range(N))) == N  # the images are still there


def test_loaded_columns_do_not_need_the_table_any_more(cs: Path) -> None:
    particles = IndexedDataset(cs).particles
    check(particles, list(range(N)))
    cs.unlink()
    check(particles[[4, 2]], [4, 2])


def test_the_working_directory_may_change(cs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cs.parent)
    ds = IndexedDataset("particles.cs")
    monkeypatch.chdir(tmp_path)
    check(ds.particles, list(range(N)))


FORKED = """
    import os, sys
    from cryolike_data import IndexedDataset
    from cryolike_data.cryosparc.table import Table
    ds = IndexedDataset(sys.argv[1])
    load, here = Table.load, os.getpid()
    def only_here(self, wanted, **how):
        assert os.getpid() == here, "loaded again in the forked process"
        return load(self, wanted, **how)
    Table.load = only_here
    child = os.fork()
    if child == 0:
        os._exit(0 if len(ds.particles.uid) == 30 else 1)
    sys.exit(os.waitpid(child, 0)[1] != 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_forked_processes_share_the_columns_of_the_one_they_come_from(cs: Path) -> None:
    run = run_python(FORKED, cs)
    assert (run.returncode, run.stderr) == (0, "")


FORKED_MEANWHILE = """
    import os, sys
    from weakref import WeakSet
    from support import another_thread_at
    from cryolike_data import IndexedDataset
    ds, selected = IndexedDataset(sys.argv[1]), []
    with another_thread_at(2, WeakSet.__iter__, lambda: selected.append(ds.particles[[1, 2]])):
        child = os.fork()
    os.remove(sys.argv[1]) if child == 0 else os.waitpid(child, 0)
    assert len(ds.particles.uid) == 30
    assert len(selected) == 1
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_selection_that_another_thread_makes_meanwhile_does_not_keep_columns_from_a_forked_process(cs: Path) -> None:
    run = run_python(FORKED_MEANWHILE, cs)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_goes_on_where_a_table_cannot_be_loaded(cs: Path) -> None:
    script = FORKED.replace("Table.load = only_here", "os.remove(sys.argv[1])").replace("0 if len(ds.particles.uid) == 30 else 1", "0")
    run: Any = run_python(script, cs)
    assert run.returncode == 0
    assert "cannot be read any more" in run.stderr
    assert "Traceback" not in run.stderr


def test_who_looks_at_all_columns_once_leaves_none_behind(cs: Path, loads: list[Path]) -> None:
    particles = IndexedDataset(cs).particles
    seen = particles.apart()
    check(seen, list(range(N)))
    check(seen[3:5], [3, 4])
    assert len(loads) == 1
    check(particles, list(range(N)))
    assert len(loads) == 2
    check(particles.apart(), list(range(N)))
    assert len(loads) == 2  # they were there already


LOOKED_THROUGH = """
    import sys
    from cryolike_data import IndexedDataset
    from support import anonymous_bytes
    particles = IndexedDataset(sys.argv[1]).particles
    before = anonymous_bytes()
    columns = particles.apart().columns()
    held = anonymous_bytes() - before
    del columns
    print(held, anonymous_bytes() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc")
def test_columns_that_were_looked_through_give_their_memory_back(tmp_path: Path) -> None:
    n = 300_000
    write_stack(tmp_path / "a.mrc", np.zeros((n, 2, 2), "f4"))
    columns = {"blob__path": ["a.mrc"] * n, "blob__idx": np.arange(n, dtype="u4"), "blob__psize_A": np.full(n, 1.5, "f4"), **ctf_columns(n)}
    write_table(tmp_path / "a.cs", uid=uids(n), **columns)
    run = run_python(LOOKED_THROUGH, tmp_path / "a.cs")
    assert run.returncode == 0, run.stderr
    held, left = map(int, run.stdout.split())
    assert 2 * 8 * n < held < 40 * n  # rows and uids, and nothing of the optics that all share
    assert left < 24 * n  # of 48 that were read, and what the threads that read them needed


def test_a_plan_to_export_leaves_no_columns_of_a_large_table_behind(
    cs: Path, loads: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cryolike_data.particles, "FEW_ROWS", N - 1)
    dataset = IndexedDataset(cs)
    plan_export(dataset, tmp_path / "store", format="zarr")
    assert len(loads) == 1
    check(dataset.particles, list(range(N)))
    assert len(loads) == 2


def test_columns_that_were_read_do_not_travel_in_a_pickle(tmp_path: Path) -> None:
    n = 3000
    write_stack(tmp_path / "a.mrc", np.zeros((n, 2, 2), "f4"))
    columns = {"blob__path": ["a.mrc"] * n, "blob__idx": np.arange(n, dtype="u4"), "blob__psize_A": np.full(n, 1.5, "f4"), **ctf_columns(n)}
    dataset = IndexedDataset(write_table(tmp_path / "a.cs", uid=uids(n), **columns))
    before = dataset.particles.columns()
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 16 * n  # where each image lies, and nothing else
    after = pickle.loads(pickled).particles.columns()
    assert after.keys() == before.keys()
    for name, column in before.items():
        np.testing.assert_array_equal(after[name], column)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_step_may_be_the_first_to_ask(cs: Path, backend: str) -> None:
    batch = IndexedDataset(cs).batch(range(8))
    step = torch.compile(lambda of: of.images.mean() * of.ctf.defocus_u.mean() + of.pose.sum(), backend=backend)
    found = step(batch)
    torch.testing.assert_close(found, batch.images.mean() * batch.ctf.defocus_u.mean() + batch.pose.sum())
