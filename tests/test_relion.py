"""Star files for RELION: optics groups, angles, origins, and the text itself."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import starfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.transform import Rotation

from cryolike_data import IndexedDataset
from cryolike_data.ctf import Ctf, electron_wavelength_A
from cryolike_data.demo import DemoProject
from cryolike_data.errors import ExportError, MissingDependencyError, TableError
from cryolike_data.particles import Particles
from cryolike_data.relion import Columns, euler_angles_deg, optics_block, particle_block, star_optics, write_star

N = 6
NAMES = [f"{k + 1:06d}@images/stack_0.mrcs" for k in range(N)]


def particles(n: int = N, *, pose: Any = None, shift_A: Any = None, half_set: Any = None, **optics: Any) -> Particles:
    """Particles with some optics; ``optics`` replace fields of the usual ``Ctf``, None leaves one out."""
    rng = np.random.default_rng(5)
    usual = {
        "voltage_kv": np.full(n, 300, np.float32),
        "spherical_aberration_mm": np.full(n, 2.7, np.float32),
        "amplitude_contrast": np.full(n, 0.07, np.float32),
        "defocus_u": rng.uniform(10000, 20000, n).astype(np.float32),
        "defocus_v": rng.uniform(10000, 20000, n).astype(np.float32),
        "astigmatism_angle_rad": rng.uniform(-2, 5, n).astype(np.float32),
        "phase_shift_rad": rng.uniform(0, 2, n).astype(np.float32),
        "exposure_group": np.zeros(n, np.int64),
    }
    return Particles(
        row=np.arange(n),
        uid=np.arange(n, dtype=np.uint64),
        file=np.zeros(n, np.int32),
        slice=np.arange(n),
        box=np.full(n, 8, np.int32),
        pixel_size=np.full(n, 1.5),
        paths=("old.mrc",),
        ctf=Ctf(**(usual | optics)),
        pose=pose,
        shift_A=shift_A,
        half_set=half_set,
    )


def tables(chosen: Particles, names: list[str] = NAMES) -> dict[str, dict[str, np.ndarray]]:
    return star_tables(chosen, names, box=64, pixel_size=2.62)


def star_tables(chosen: Particles, names: list[str], *, box: int, pixel_size: float) -> dict[str, dict[str, np.ndarray]]:
    groups = star_optics([chosen])
    optics = optics_block(groups, box=box, pixel_size=pixel_size)
    return {"optics": optics, "particles": particle_block(chosen, groups, image_names=names)}


def written(blocks: Mapping[str, Columns | Iterable[Columns]]) -> bytes:
    stream = io.BytesIO()
    write_star(blocks, stream)
    return stream.getvalue()


def full() -> Particles:
    rng = np.random.default_rng(8)
    return particles(
        pose=rng.normal(size=(N, 3)).astype(np.float32),
        shift_A=rng.normal(scale=5, size=(N, 2)).astype(np.float32),
        half_set=np.arange(N) % 2,
        scale=rng.uniform(0.5, 2, N).astype(np.float32),
        bfactor_A2=rng.uniform(0, 100, N).astype(np.float32),
        tilt_A=rng.normal(scale=3000, size=(1, 2)).repeat(N, 0).astype(np.float32),
        anisomag=rng.normal(scale=1e-3, size=(1, 4)).repeat(N, 0).astype(np.float32),
    )


def rotations(angles: np.ndarray) -> np.ndarray:
    return Rotation.from_euler("ZYZ", angles, degrees=True).as_matrix()


# Euler angles


@given(arrays(np.float32, (3, 3), elements=st.floats(-7, 7, width=32)))
def test_euler_angles_mean_the_same_rotation(pose: np.ndarray) -> None:
    angles = euler_angles_deg(pose)
    np.testing.assert_allclose(rotations(angles), Rotation.from_rotvec(pose.astype(float)).as_matrix(), atol=1e-13)
    assert ((angles[:, 1] >= 0) & (angles[:, 1] <= 180)).all()
    assert (np.abs(angles) <= 180).all()


def test_euler_angles_are_those_of_scipy() -> None:
    pose = np.random.default_rng(2).normal(size=(1000, 3))
    expected = Rotation.from_rotvec(pose).as_euler("ZYZ", degrees=True)
    np.testing.assert_allclose(euler_angles_deg(pose), expected, atol=1e-9)


@pytest.mark.parametrize(
    ("pose", "angles"),
    [
        ((0, 0, 0), (0, 0, 0)),
        ((0, 0, 0.5), (0, 0, np.rad2deg(0.5))),
        ((0, 0, -3), (0, 0, -np.rad2deg(3))),
        ((0, 0, np.pi / 2 + 2 * np.pi), (0, 0, 90)),
        ((0, np.pi, 0), (0, 180, 0)),
        ((np.pi, 0, 0), (0, 180, 180)),
        ((0, np.pi / 2, 0), (0, 90, 0)),
    ],
)
def test_no_rotation_and_flat_tilts_are_exact(pose: tuple[float, ...], angles: tuple[float, ...]) -> None:
    np.testing.assert_allclose(euler_angles_deg(np.array([pose])), [angles], rtol=0, atol=1e-13)


def test_small_tilts_keep_their_digits() -> None:
    tilt = np.array([1e-3, 1e-6, 1e-9, 180 - 1e-6])
    pose = Rotation.from_euler("ZYZ", np.stack([np.full(4, 30.0), tilt, np.full(4, 50.0)], axis=1), degrees=True).as_rotvec()
    np.testing.assert_allclose(euler_angles_deg(pose)[:3, 1], tilt[:3], rtol=1e-6)
    np.testing.assert_allclose(rotations(euler_angles_deg(pose)), Rotation.from_rotvec(pose).as_matrix(), atol=1e-15)


def test_no_poses_give_no_angles() -> None:
    assert euler_angles_deg(np.empty((0, 3), np.float32)).shape == (0, 3)


# The particles block


def test_columns_have_relions_units() -> None:
    chosen = full()
    block = tables(chosen)["particles"]
    assert list(block["rlnImageName"]) == NAMES
    np.testing.assert_array_equal(block["rlnDefocusU"], chosen.ctf.defocus_u)
    np.testing.assert_array_equal(block["rlnDefocusV"], chosen.ctf.defocus_v)
    np.testing.assert_allclose(block["rlnDefocusAngle"] * np.pi / 180, chosen.ctf.astigmatism_angle_rad, rtol=1e-12)
    np.testing.assert_allclose(block["rlnPhaseShift"] * np.pi / 180, chosen.ctf.phase_shift_rad, rtol=1e-12)
    np.testing.assert_array_equal(block["rlnCtfBfactor"], chosen.ctf.bfactor_A2)
    np.testing.assert_array_equal(block["rlnCtfScalefactor"], chosen.ctf.scale)
    np.testing.assert_array_equal(block["rlnOriginXAngst"], chosen.shift_A[:, 0])
    np.testing.assert_array_equal(block["rlnOriginYAngst"], chosen.shift_A[:, 1])
    np.testing.assert_array_equal(block["rlnRandomSubset"], [1, 2, 1, 2, 1, 2])
    angles = np.stack([block[f"rlnAngle{name}"] for name in ("Rot", "Tilt", "Psi")], axis=1)
    np.testing.assert_allclose(rotations(angles), Rotation.from_rotvec(chosen.pose.astype(float)).as_matrix(), atol=1e-13)


def test_what_is_not_known_has_no_column() -> None:
    block = tables(particles(phase_shift_rad=None))["particles"]
    assert list(block) == ["rlnImageName", "rlnOpticsGroup", "rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle"]


@pytest.mark.parametrize("missing", ["voltage_kv", "spherical_aberration_mm", "amplitude_contrast", "defocus_u", "defocus_v"])
def test_missing_optics_are_named_with_the_remedy(missing: str) -> None:
    with pytest.raises(TableError, match=rf"star file needs.*no {missing}.*passthrough="):
        tables(particles(**{missing: None}))


def test_particles_without_optics_are_refused() -> None:
    with pytest.raises(TableError, match=r"star file needs.*passthrough="):
        tables(replace(particles(), ctf=None))


# Optics groups


def test_one_group_of_like_particles() -> None:
    optics = tables(particles())["optics"]
    expected = {
        "rlnOpticsGroupName": "opticsGroup0",
        "rlnOpticsGroup": 1,
        "rlnVoltage": 300,
        "rlnSphericalAberration": np.float32(2.7),
        "rlnAmplitudeContrast": np.float32(0.07),
        "rlnImagePixelSize": 2.62,
        "rlnImageSize": 64,
        "rlnImageDimensionality": 2,
    }
    assert {name: column.tolist() for name, column in optics.items()} == {name: [value] for name, value in expected.items()}


def test_groups_are_numbered_without_gaps_in_the_order_of_exposure_groups() -> None:
    blocks = tables(particles(exposure_group=np.array([25, 16, 23, 16, 25, 25])))
    assert blocks["particles"]["rlnOpticsGroup"].tolist() == [3, 1, 2, 1, 3, 3]
    assert blocks["optics"]["rlnOpticsGroup"].tolist() == [1, 2, 3]
    assert blocks["optics"]["rlnOpticsGroupName"].tolist() == ["opticsGroup16", "opticsGroup23", "opticsGroup25"]


def test_without_exposure_groups_all_are_group_one() -> None:
    blocks = tables(particles(exposure_group=None))
    assert blocks["optics"]["rlnOpticsGroupName"].tolist() == ["opticsGroup1"]
    assert (blocks["particles"]["rlnOpticsGroup"] == 1).all()


@pytest.mark.parametrize(
    ("field", "one", "other"),
    [
        ("voltage_kv", 200, 300),
        ("spherical_aberration_mm", 0.01, 2.7),
        ("amplitude_contrast", 0.07, 0.1),
        ("tilt_A", (5, 0), (5, 1)),
        ("anisomag", (0, 0, 0, 0), (0, 0, 1e-3, 0)),
    ],
)
def test_an_exposure_group_that_differs_within_itself_splits(field: str, one: Any, other: Any) -> None:
    values = np.array([one, other, one, one, other, one], np.float32)
    blocks = tables(particles(exposure_group=np.array([7, 7, 7, 7, 7, 9]), **{field: values}))
    assert blocks["particles"]["rlnOpticsGroup"].tolist() == [1, 2, 1, 1, 2, 3]
    assert blocks["optics"]["rlnOpticsGroupName"].tolist() == ["opticsGroup7_1", "opticsGroup7_2", "opticsGroup9"]


def test_groups_are_the_different_rows_of_the_optics() -> None:
    rng = np.random.default_rng(4)
    n = 500
    optics = {
        "exposure_group": rng.integers(0, 4, n),
        "voltage_kv": rng.choice([200, 300], n).astype(np.float32),
        "spherical_aberration_mm": rng.choice([1.4, 2.7], n).astype(np.float32),
        "amplitude_contrast": rng.choice([0.07, 0.1], n).astype(np.float32),
    }
    blocks = tables(particles(n, **optics), [f"{k}@a.mrcs" for k in range(n)])
    rows = list(zip(*(column.tolist() for column in optics.values()), strict=True))
    number = {row: k + 1 for k, row in enumerate(sorted(set(rows)))}
    assert blocks["particles"]["rlnOpticsGroup"].tolist() == [number[row] for row in rows]
    assert len(set(blocks["optics"]["rlnOpticsGroupName"])) == len(number)
    assert blocks["optics"]["rlnAmplitudeContrast"].tolist() == [row[3] for row in sorted(set(rows))]


def test_particles_in_pieces_make_the_same_file() -> None:
    n = 30
    tilt_A, anisomag = np.zeros((n, 2), np.float32), np.zeros((n, 4), np.float32)
    tilt_A[25:], anisomag[11] = (4e3, -2e3), (0, 1e-3, 0, 0)  # in one piece each
    exposure = np.arange(n)[::-1] // 4
    contrast = np.where(np.arange(n) % 2, np.float32(0.1), np.float32(np.nan))
    chosen = particles(n, exposure_group=exposure, tilt_A=tilt_A, anisomag=anisomag, amplitude_contrast=contrast)
    names = [f"{k + 1:06d}@a.mrcs" for k in range(n)]
    groups = star_optics(chosen.stretches(10))
    pieces = [particle_block(chosen[k : k + 10], groups, image_names=names[k : k + 10]) for k in range(0, n, 10)]
    whole = tables(chosen, names)
    assert len(whole["optics"]["rlnOpticsGroup"]) > 15
    assert written({"optics": optics_block(groups, box=64, pixel_size=2.62), "particles": pieces}) == written(whole)


def test_a_zero_with_a_minus_sign_makes_no_other_group() -> None:
    chosen = particles(tilt_A=np.repeat(np.float32([[0.0, 2e3], [-0.0, 2e3]]), N // 2, axis=0))
    assert star_optics(chosen.stretches(N // 2)).columns["rlnOpticsGroup"].tolist() == [1]


def test_beam_tilt_is_an_angle_in_mrad() -> None:
    tilt_mrad = np.array([0.3, -1.2])
    tilt_A = np.tile(tilt_mrad * 1e-3 * 2.7e7, (N, 1)).astype(np.float32)
    optics = tables(particles(tilt_A=tilt_A))["optics"]
    np.testing.assert_allclose([optics["rlnBeamTiltX"], optics["rlnBeamTiltY"]], tilt_mrad[:, None], rtol=1e-6)


def test_no_beam_tilt_and_no_magnification_have_no_column() -> None:
    optics = tables(particles(tilt_A=np.zeros((N, 2), np.float32), anisomag=np.zeros((N, 4), np.float32)))["optics"]
    assert not [name for name in optics if "BeamTilt" in name or "MagMat" in name]


def test_no_beam_tilt_goes_without_spherical_aberration() -> None:
    cs_mm = np.array([0, 0, 0, 2.7, 2.7, 2.7], np.float32)
    tilt_A = np.where(cs_mm[:, None] > 0, [[100, 50]], 0).astype(np.float32)
    optics = tables(particles(spherical_aberration_mm=cs_mm, tilt_A=tilt_A))["optics"]
    np.testing.assert_allclose(optics["rlnBeamTiltX"], [0, 100 / 2.7e7 * 1e3], rtol=1e-6)


@pytest.mark.parametrize("cs_mm", [2.7, 0.01, 0.001])
def test_relion_applies_the_phase_of_the_table(cs_mm: float) -> None:
    """At small Cs the tilt is no small angle, and RELION's phase is proportional to it all the same."""
    tilt_A = np.tile(np.array([9000.0, -4000.0], np.float32), (N, 1))
    blocks = tables(particles(tilt_A=tilt_A, spherical_aberration_mm=np.full(N, cs_mm, np.float32), voltage_kv=np.full(N, 300, np.float32)))
    tilt_mrad = [blocks["optics"][f"rlnBeamTilt{axis}"][0] for axis in "XY"]
    k, wavelength = np.array([0.1, 0.2]), float(electron_wavelength_A(torch.tensor(300.0, dtype=torch.float64)))
    # TiltHelper::insertTilt and selfApplyBeamTilt of RELION: Cs in mm, tilts in mrad.
    theirs = 2 * np.pi * cs_mm * 1e7 * wavelength**2 * (k @ k) * (k @ tilt_mrad) * 1e-3
    np.testing.assert_allclose(theirs, 2 * np.pi * wavelength**2 * (k @ k) * (k @ tilt_A[0]), rtol=1e-6)


def test_a_beam_tilt_without_spherical_aberration_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    cs_mm = np.array([0, 0, 0, 2.7, 2.7, 2.7], np.float32)
    optics = tables(particles(spherical_aberration_mm=cs_mm, tilt_A=np.tile(np.float32([100, 50]), (N, 1))))["optics"]
    np.testing.assert_allclose(optics["rlnBeamTiltX"], [0, 100 / 2.7e7 * 1e3], rtol=1e-6)
    assert "tilt_A of particles without spherical aberration: left out" in caplog.text
    optics = tables(particles(spherical_aberration_mm=0 * cs_mm, tilt_A=np.ones((N, 2), np.float32)))["optics"]
    assert "rlnBeamTiltX" not in optics


@pytest.mark.parametrize(("half_set", "written_"), [([0] * N, False), ([1] * N, False), ([0, 0, 0, 1, 1, 1], True), (None, False)])
def test_half_sets_are_written_where_there_are_two(half_set: list[int] | None, written_: bool) -> None:
    chosen = particles(half_set=None if half_set is None else np.array(half_set))
    groups = star_optics(chosen.stretches(2))
    pieces = [particle_block(chosen[k : k + 2], groups, image_names=NAMES[k : k + 2]) for k in range(0, N, 2)]
    assert {"rlnRandomSubset" in piece for piece in pieces} == {written_}


def test_magnification_is_the_whole_matrix() -> None:
    optics = tables(particles(anisomag=np.tile(np.array([1e-3, 2e-3, 3e-3, 4e-3], np.float32), (N, 1))))["optics"]
    found = [optics[f"rlnMagMat{place}"][0] for place in ("00", "01", "10", "11")]
    np.testing.assert_allclose(found, [1.001, 0.002, 0.003, 1.004], rtol=1e-7)


def test_higher_orders_are_left_out_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tables(particles(trefoil_A=np.zeros((N, 2)), tetrafoil_A=np.zeros((N, 4))))
        assert not caplog.records
        tables(particles(trefoil_A=np.ones((N, 2)), tetrafoil_A=np.ones((N, 4))))
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith("trefoil_A, tetrafoil_A: ")


# The text


def test_starfile_reads_the_same_values(tmp_path: Path) -> None:
    blocks = tables(full())
    write_star(blocks, tmp_path / "particles.star")
    read = starfile.read(tmp_path / "particles.star", always_dict=True)
    assert list(read) == ["optics", "particles"]
    for block, columns in blocks.items():
        assert list(read[block].columns) == list(columns)
        for name, column in columns.items():
            if column.dtype == np.float32:
                np.testing.assert_array_equal(read[block][name].to_numpy(np.float32), column, err_msg=name)
            elif column.dtype.kind == "f":
                np.testing.assert_allclose(read[block][name], column, rtol=1e-11, err_msg=name)
            else:
                assert read[block][name].tolist() == column.tolist(), name


@given(arrays(np.float32, N, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_every_float32_survives(values: np.ndarray) -> None:
    text = written({"particles": {"rlnDefocusU": values}}).decode()
    found = [np.float32(line) for line in text.splitlines()[4:] if line]
    np.testing.assert_array_equal(found, values)


def test_numbers_are_short() -> None:
    assert b"\t300\t2.7\t0.07\t2.62\t64\t2\n" in written(tables(particles()))


def test_the_same_particles_give_the_same_bytes(tmp_path: Path) -> None:
    text = written(tables(full()))
    assert text.startswith(b"data_optics\n\nloop_\n_rlnOpticsGroupName #1\n")
    assert b"Created by" not in text
    write_star(tables(full()), str(tmp_path / "particles.star"))
    assert (tmp_path / "particles.star").read_bytes() == text


def test_many_rows_are_the_text_that_starfile_writes_at_once() -> None:
    n = (1 << 15) + 5
    blocks = tables(full()[np.resize(np.arange(N), n)], [f"{k + 1:06d}@a.mrcs" for k in range(n)])
    exact = {
        block: pandas.DataFrame({k: c.astype(str).astype(float) if c.dtype == np.float32 else c for k, c in columns.items()})
        for block, columns in blocks.items()
    }
    whole = starfile.to_string(exact, float_format="%.12g")
    assert written(blocks).decode() == whole[whole.index("data_") :]


@pytest.mark.parametrize("path", ["Ångström/粒子.mrcs", "with space/a b.mrcs", "no\u00a0break/stack.mrcs"])
def test_unusual_paths_read_back(path: str, tmp_path: Path) -> None:
    names = [f"{k + 1:06d}@{path}" for k in range(N)]
    write_star(tables(particles(), names), tmp_path / "particles.star")
    assert starfile.read(tmp_path / "particles.star")["particles"]["rlnImageName"].tolist() == names


@pytest.mark.parametrize("path", ["new\nline", "tab\t", "x\u2028y", 'quo"te', "it's", "a#b", "latin\udce5", "two  spaces"])
def test_paths_that_break_a_star_file_are_refused(path: str) -> None:
    with pytest.raises(ExportError, match="1 image names cannot stand in a star file"):
        tables(particles(), [*NAMES[:-1], f"000001@{path}"])


def test_the_extra_is_named_where_starfile_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there = tmp_path / "particles.star"
    there.write_text("mine")
    monkeypatch.setitem(sys.modules, "starfile", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "cryolike-data\[star\]"'):
        write_star(tables(particles()), there)
    assert there.read_text() == "mine"


def test_no_rows_make_an_empty_file() -> None:
    blocks = tables(full()[np.empty(0, np.int64)], [])
    assert {len(column) for block in blocks.values() for column in block.values()} == {0}
    assert written(blocks).startswith(b"data_optics\n")


# Whole data sets


def test_particles_of_a_table(demo: DemoProject) -> None:
    chosen = IndexedDataset(demo.indexed).particles
    names = [f"{k + 1:06d}@a.mrcs" for k in range(len(chosen))]
    block = tables(chosen, names)["particles"]
    assert block["rlnDefocusU"].tolist() == chosen.ctf.defocus_u.tolist()
    assert {"rlnAngleRot", "rlnOriginXAngst"} <= block.keys()


@pytest.mark.shared
def test_the_real_pair_agrees(shared: Path) -> None:
    folder = shared / "real/empiar_10076"
    dataset = IndexedDataset(folder / "empiar_10076_7.cs", folder=folder)
    real = starfile.read(folder / "empiar_10076_7.star")
    chosen = dataset.particles
    names = [f"{k + 1}@{Path(chosen.paths[file]).name}" for file, k in zip(chosen.file, chosen.slice, strict=True)]
    pixel_size = float(real["rlnDetectorPixelSize"][0] / real["rlnMagnification"][0] * 1e4)
    blocks = star_tables(chosen, names, box=320, pixel_size=pixel_size)
    assert blocks["particles"]["rlnImageName"].tolist() == real["rlnImageName"].tolist()
    for name in ("rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle"):
        np.testing.assert_allclose(blocks["particles"][name], real[name], rtol=2e-7, err_msg=name)
    group = blocks["particles"]["rlnOpticsGroup"] - 1
    for name in ("rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast"):
        np.testing.assert_allclose(blocks["optics"][name][group], real[name], rtol=2e-7, err_msg=name)
    np.testing.assert_allclose(chosen.pixel_size, pixel_size, rtol=1e-4)
