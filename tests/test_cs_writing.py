"""Tables of particles whose images were written anew, as CryoSPARC writes them."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cryosparc.dataset import Dataset
from support import numbered_images, uids, write_particles, write_stack

from cryolike_data import IndexedDataset
from cryolike_data.cryosparc.write import save_table, table_of
from cryolike_data.ctf import Ctf
from cryolike_data.particles import Particles

N = 7
PATHS = ["images/stack_0.mrc", "images/stack_01.mrc"]
FILE = np.array([0, 1, 1, 0, 1, 0, 0])
IMAGE = np.array([0, 0, 1, 1, 2, 2, 3])
BOX, PIXEL_SIZE = 4, 2.7


def all_columns(n: int = N) -> dict[str, np.ndarray]:
    """Everything that is known of particles besides where they lie and the common optics."""
    rng = np.random.default_rng(3)
    return {
        "blob__sign": np.full(n, -1, np.float32),
        "ctf__exp_group_id": np.array([23, 4, 4, 23, 4, 5, 23], np.uint32),
        **{f"ctf__{name}": rng.normal(size=n).astype("f4") for name in ("scale", "bfactor")},
        **{f"ctf__{name}": rng.normal(size=(n, 2)).astype("f4") for name in ("shift_A", "tilt_A", "trefoil_A")},
        **{f"ctf__{name}": rng.normal(size=(n, 4)).astype("f4") for name in ("tetra_A", "anisomag")},
        "alignments3D__split": (np.arange(n) % 2).astype(np.uint32),
        "alignments3D__shift": rng.normal(scale=3, size=(n, 2)).astype("f4"),
        "alignments3D__pose": rng.normal(scale=1.5, size=(n, 3)).astype("f4"),
        "alignments3D__psize_A": np.full(n, 1.1, np.float32),
    }


@pytest.fixture
def particles(tmp_path: Path) -> Particles:
    table, _ = write_particles(tmp_path / "source", N, **all_columns())
    return IndexedDataset(table).particles


def written(particles: Particles, paths: list[str] = PATHS) -> np.ndarray:
    return table_of(particles, paths=paths, file=FILE, image=IMAGE, box=BOX, pixel_size=PIXEL_SIZE)


def saved(table: np.ndarray) -> bytes:
    stream = io.BytesIO()
    save_table([table[:1], table[1:]], len(table), stream)
    return stream.getvalue()


def bare() -> Particles:
    """Particles of which only the places of their images are known."""
    return Particles(
        row=np.arange(N),
        uid=np.zeros(N, np.uint64),
        file=np.zeros(N, np.int32),
        slice=np.arange(N),
        box=np.full(N, 8, np.int32),
        pixel_size=np.full(N, 1.5),
        paths=("old.mrc",),
    )


def test_fields_have_cryosparcs_types(particles: Particles) -> None:
    table = np.load(io.BytesIO(saved(written(particles))), allow_pickle=False)
    assert table.dtype.descr == [
        ("uid", "<u8"),
        ("blob/path", f"|S{len(PATHS[1])}"),
        ("blob/idx", "<u4"),
        ("blob/shape", "<u4", (2,)),
        ("blob/psize_A", "<f4"),
        ("blob/sign", "<f4"),
        ("blob/import_sig", "<u8"),
        ("ctf/type", "|S8"),
        ("ctf/exp_group_id", "<u4"),
        ("ctf/accel_kv", "<f4"),
        ("ctf/cs_mm", "<f4"),
        ("ctf/amp_contrast", "<f4"),
        ("ctf/df1_A", "<f4"),
        ("ctf/df2_A", "<f4"),
        ("ctf/df_angle_rad", "<f4"),
        ("ctf/phase_shift_rad", "<f4"),
        ("ctf/scale", "<f4"),
        ("ctf/shift_A", "<f4", (2,)),
        ("ctf/tilt_A", "<f4", (2,)),
        ("ctf/trefoil_A", "<f4", (2,)),
        ("ctf/tetra_A", "<f4", (4,)),
        ("ctf/anisomag", "<f4", (4,)),
        ("ctf/bfactor", "<f4"),
        ("alignments3D/split", "<u4"),
        ("alignments3D/shift", "<f4", (2,)),
        ("alignments3D/pose", "<f4", (3,)),
        ("alignments3D/psize_A", "<f4"),
    ]


def test_images_are_named_by_their_new_places(particles: Particles) -> None:
    table = written(particles)
    assert [path.decode() for path in table["blob/path"]] == [PATHS[number] for number in FILE]
    np.testing.assert_array_equal(table["blob/idx"], IMAGE)
    assert (table["blob/shape"] == BOX).all()
    assert (table["blob/psize_A"] == np.float32(PIXEL_SIZE)).all()
    assert (table["blob/sign"] == -1).all()
    assert (table["blob/import_sig"] == 0).all()
    assert (table["ctf/type"] == b"imported").all()


def test_what_the_source_says_is_kept(particles: Particles, tmp_path: Path) -> None:
    source, table = np.load(tmp_path / "source/J1/particles.cs"), written(particles)
    kept = [name for name in source.dtype.names if name.split("/")[0] in ("uid", "ctf")] + ["alignments3D/pose", "alignments3D/split"]
    assert len(kept) == 18
    for name in kept:
        np.testing.assert_array_equal(table[name], source[name], err_msg=name)
    assert (table["uid"] > 2**63).any()


def test_shifts_are_in_new_pixels(particles: Particles, tmp_path: Path) -> None:
    source, table = np.load(tmp_path / "source/J1/particles.cs"), written(particles)
    assert (table["alignments3D/psize_A"] == np.float32(PIXEL_SIZE)).all()
    np.testing.assert_allclose(table["alignments3D/shift"], source["alignments3D/shift"].astype(float) * 1.1 / PIXEL_SIZE, rtol=3e-7)


def test_it_reads_back_as_the_same_particles(particles: Particles, tmp_path: Path) -> None:
    for number, path in enumerate(PATHS):
        write_stack(tmp_path / "new" / path, numbered_images(np.count_nonzero(number == FILE), BOX, start=number))
    target = tmp_path / "new/particles.cs"
    target.write_bytes(saved(written(particles)))
    read = IndexedDataset(target).particles
    columns, before = read.columns(), particles.columns()
    assert columns.keys() == before.keys()
    for name in columns.keys() - {"file", "slice", "box", "pixel_size", "shift_A"}:
        np.testing.assert_array_equal(columns[name], before[name], err_msg=name)
    np.testing.assert_allclose(read.shift_A, particles.shift_A, rtol=3e-7)
    assert read.blob_paths == tuple(PATHS)
    assert (read.box == BOX).all()


def test_cryosparc_tools_reads_equal_columns(particles: Particles, tmp_path: Path) -> None:
    table = written(particles)
    (tmp_path / "new.cs").write_bytes(saved(table))
    loaded = Dataset.load(tmp_path / "new.cs")
    assert sorted(loaded.fields()) == sorted(table.dtype.names)
    for name in table.dtype.names:
        expected = np.char.decode(table[name]) if table[name].dtype.kind == "S" else table[name]
        np.testing.assert_array_equal(np.asarray(loaded[name]), expected, err_msg=name)


def test_the_particles_are_not_changed(particles: Particles) -> None:
    before = {name: column.copy() for name, column in particles.columns().items()}
    written(particles)
    for name, column in particles.columns().items():
        np.testing.assert_array_equal(column, before[name], err_msg=name)


def test_paths_keep_their_bytes(particles: Particles) -> None:
    paths = ["Ångström/a.mrc", b"latin1_\xe5.mrc".decode("utf-8", "surrogateescape")]
    table = np.load(io.BytesIO(saved(written(particles, paths))))
    assert table["blob/path"][0] == "Ångström/a.mrc".encode()
    assert table["blob/path"][1] == b"latin1_\xe5.mrc"


def test_unknown_columns_are_left_out_and_no_uids_invented() -> None:
    table = written(bare())
    assert table.dtype.names == ("uid", "blob/path", "blob/idx", "blob/shape", "blob/psize_A", "blob/import_sig")
    assert (table["uid"] == 0).all()


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("pose", np.ones((N, 3), np.float32)),
        ("half_set", np.arange(N) % 2),
    ],
)
def test_alignments_hold_what_is_known(column: str, value: np.ndarray) -> None:
    table = written(replace(bare(), **{column: value}))
    name = {"pose": "alignments3D/pose", "half_set": "alignments3D/split"}[column]
    assert [field for field in table.dtype.names if field.startswith("alignments3D")] == [name, "alignments3D/psize_A"]
    np.testing.assert_array_equal(table[name], value)


def test_optics_hold_what_is_known() -> None:
    table = written(replace(bare(), ctf=Ctf(exposure_group=np.arange(N), voltage_kv=np.full(N, 200.0))))
    assert [field for field in table.dtype.names if field.startswith("ctf")] == ["ctf/type", "ctf/exp_group_id", "ctf/accel_kv"]
    np.testing.assert_array_equal(table["ctf/exp_group_id"], np.arange(N))
    assert (table["ctf/accel_kv"] == 200).all()


def test_no_rows_make_an_empty_table() -> None:
    nothing = np.empty(0, np.int64)
    table = table_of(bare()[nothing], paths=[], file=nothing, image=nothing, box=BOX, pixel_size=PIXEL_SIZE)
    assert np.load(io.BytesIO(saved(table))).shape == (0,)


def test_a_selection_writes_its_own_rows(particles: Particles) -> None:
    rows = [5, 1]
    table = table_of(particles[rows], paths=PATHS, file=FILE[:2], image=IMAGE[:2], box=BOX, pixel_size=PIXEL_SIZE)
    np.testing.assert_array_equal(table["uid"], uids(N)[rows])
    np.testing.assert_array_equal(table["alignments3D/pose"], all_columns()["alignments3D__pose"][rows])
