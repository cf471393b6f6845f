"""Whatever the table, the files and their order: the images read are the images written."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import numbered_images, write_stack, write_table

from cryolike_data import IndexedDataset, JobDirectoryDataset
from cryolike_data.particles import resolve_rows

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="/\0>", exclude_categories=["C", "Z"]), min_size=1, max_size=12).filter(
    lambda word: word not in (".", "..", "~") and len(word.encode()) < 60
)
# Signed and unsigned 16-bit stacks together need int32, and so on: the images are compared as float64, which holds them all.
DTYPES = st.sampled_from(["i1", "i2", "u2", "f2", "f4"])


@dataclass
class Stack:
    """What one stack of a random project looks like."""

    path: str
    count: int
    dtype: str
    order: str
    extended: int
    map_word: bytes
    stamped: bool


@st.composite
def stacks(draw: st.DrawFn) -> list[Stack]:
    paths = draw(st.lists(st.lists(WORDS, min_size=1, max_size=3), min_size=1, max_size=4, unique_by=lambda parts: parts[-1].casefold()))
    found = []
    for number, parts in enumerate(paths):
        path = "/".join([f"J{number}", *(f"d{part}" for part in parts[:-1]), parts[-1] + draw(st.sampled_from([".mrc", ".mrcs"]))])
        found.append(
            Stack(
                path,
                draw(st.integers(1, 5)),
                draw(DTYPES),
                draw(st.sampled_from("<>")),
                draw(st.integers(0, 300)),
                draw(st.sampled_from([b"MAP ", bytes(4)])),
                draw(st.booleans()),
            )
        )
    return found


@given(project=stacks(), data=st.data(), box=st.integers(1, 9), prefixed=st.booleans())
@settings(deadline=None, max_examples=40)
def test_an_indexed_data_set_reads_what_was_written(project: list[Stack], data: st.DataObject, box: int, prefixed: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        written: dict[tuple[int, int], np.ndarray] = {}
        for number, stack in enumerate(project):
            images = numbered_images(stack.count, box, dtype=stack.dtype, start=number)
            stamp = None if stack.stamped else bytes(4)
            layout: dict[str, Any] = {"order": stack.order, "extended": stack.extended, "map_word": stack.map_word}
            write_stack(folder / stack.path, images, stamp=stamp, **layout)
            written |= {(number, z): image.astype("f8") for z, image in enumerate(images)}
        # Rows in any order; images left out or named by several rows, as symmetry expansion does.
        rows = data.draw(st.lists(st.sampled_from(sorted(written)), min_size=1, max_size=12))
        paths = [(">" if prefixed and i % 2 else "") + project[number].path for i, (number, _) in enumerate(rows)]
        idx = np.array([z for _, z in rows], data.draw(st.sampled_from(["<u4", ">u4", "<i8"])))
        cs = write_table(folder / "t.cs", blob__path=paths, blob__idx=idx, blob__psize_A=np.full(len(rows), 1.3, "f4"))
        ds = IndexedDataset(cs)
        index = data.draw(st.lists(st.integers(-len(rows), len(rows) - 1), max_size=10))
        found = ds.read(index)
        assert tuple(found.shape) == (len(index), box, box)
        for image, i in zip(found.double().numpy(), index, strict=True):
            np.testing.assert_array_equal(image, written[rows[i]])


@given(counts=st.lists(st.integers(1, 4), min_size=1, max_size=13), digits=st.integers(1, 7), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_a_job_directory_reads_what_was_written_in_sequence(counts: list[int], digits: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        job = Path(name) / "J12"
        images = [numbered_images(count, 3, start=seed + i) for i, count in enumerate(counts)]
        numbers = list(range(len(counts)))
        for number in np.random.default_rng(seed).permutation(numbers):
            write_stack(job / f"downsample/batch_{number:0{digits}d}_downsample.mrc", images[number])
        together = np.concatenate(images)
        write_table(job / "J12_passthrough_particles.cs", ctf__df1_A=np.arange(len(together), dtype="f4"))
        ds = JobDirectoryDataset(name, 12, pixel_size=2)
        index = np.random.default_rng([seed, 1]).integers(-len(together), len(together), 9)
        np.testing.assert_array_equal(ds.read(index).numpy(), together[index])
        np.testing.assert_array_equal(ds.batch(index).ctf.defocus_u.numpy(), np.arange(len(together))[index])


@given(n=st.integers(0, 20), data=st.data())
@settings(deadline=None, max_examples=40)
def test_rows_are_chosen_as_numpy_chooses_them(n: int, data: st.DataObject) -> None:
    inside = st.lists(st.integers(-n, n - 1), max_size=8) if n else st.just([])
    selection = data.draw(
        st.one_of(
            inside,
            inside.map(lambda rows: np.array(rows, np.int16)),
            inside.map(lambda rows: torch.tensor(rows, dtype=torch.int64)),
            st.lists(st.booleans(), min_size=n, max_size=n).map(lambda mask: np.array(mask, bool)),
            st.slices(n),
        )
    )
    key = selection.numpy() if isinstance(selection, torch.Tensor) else selection
    key = np.array(key, np.int64) if isinstance(key, list) else key
    rows = resolve_rows(selection, n)
    assert rows.dtype == np.int64
    np.testing.assert_array_equal(rows, np.arange(n)[key])
