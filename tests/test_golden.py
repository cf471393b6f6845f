"""The same conversions as CryoLike made of the golden project: same particles, same numbers, but in the order of the table."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import load_cryolike_stack

from cryolike_data import (
    ImageDescriptor,
    convert_particle_stacks_from_cryosparc_job_directory,
    convert_particle_stacks_from_indexed_cryosparc_file,
)
from cryolike_data.descriptor import read_npz_without_pickles

pytestmark = pytest.mark.shared

ONE_A_ROW = ("defocusU", "defocusV", "defocusAngle", "phaseShift")
WHOLE_TABLE = ("files", "idxs")
OURS_ONLY = {"uid", "row"}


@dataclass(frozen=True)
class Case:
    """One call of shared/golden/README.md; ``job`` is None for an indexed file."""

    name: str
    job: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


INDEXED = [
    Case("A_indexed"),
    Case("B_indexed_bs12", options={"batch_size": 12}),
    Case("C_indexed_bs12_max2", options={"batch_size": 12, "n_stacks_max": 2}),
    Case("D_indexed_mean2_desc32", options={"downsample_factor": 2, "downsample_type": "mean"}),
    Case("E_indexed_max2_desc32", options={"downsample_factor": 2, "downsample_type": "max"}),
    Case("G_indexed_double"),
]
JOBS = [
    Case("H_job4", 4, {"pixel_size": 1.3}),
    Case("I_job4_bs5", 4, {"pixel_size": 1.3, "batch_size": 5}),
    Case("J_job4_mean2_desc32", 4, {"pixel_size": np.array([1.3, 1.3]), "downsample_factor": 2, "downsample_type": "mean"}),
    pytest.param(
        Case("L_job5_gap", 5, {"pixel_size": 2.6}),
        marks=pytest.mark.filterwarnings("ignore:J5_passthrough_particles.cs has 16 rows and:UserWarning"),
    ),
]
CASES = pytest.mark.parametrize("case", [*INDEXED, *JOBS], ids=lambda case: case.name)


def convert(golden: Path, case: Case, output: Path, descriptor: Any = None) -> Path:
    options = {"folder_output": output, "flag_plots": False, **case.options}
    descriptor = golden / case.name / "params_input.npz" if descriptor is None else descriptor
    if case.job is None:
        table, folder = golden / "input/J3/J3_particles.cs", golden / "input/J1/imported"
        convert_particle_stacks_from_indexed_cryosparc_file(descriptor, table, folder, **options)
    else:
        convert_particle_stacks_from_cryosparc_job_directory(descriptor, golden / "input", case.job, **options)
    return output


def stacks_of_cryolike(folder: Path) -> list[tuple[np.ndarray, np.ndarray, dict[str, Any]]]:
    """Every stack that CryoLike wrote; its npz files hold pickled None, so they are read by other means."""
    stacks = []
    for metadata in sorted((folder / "fft").glob("*stack*.npz")):
        tensors = (folder / "phys" / f"particles_phys_{metadata.stem[-12:]}.pt", metadata.with_suffix(".pt"))
        phys, fourier = (torch.load(path, weights_only=True).numpy() for path in tensors)
        stacks.append((phys, fourier, read_npz_without_pickles(metadata)))
    return stacks


def our_stacks(folder: Path) -> list[tuple[np.ndarray, np.ndarray, dict[str, Any]]]:
    return [load_cryolike_stack(folder, number) for number in range(len(list((folder / "fft").glob("*stack*.npz"))))]


def joined(stacks: list[tuple[np.ndarray, np.ndarray, dict[str, Any]]]) -> dict[str, np.ndarray]:
    """Images, transforms and per-particle metadata of all stacks, one after the other."""
    columns = {key: np.concatenate([stack[2][key] for stack in stacks]) for key in ONE_A_ROW}
    return {"phys": np.concatenate([s[0] for s in stacks]), "fourier": np.concatenate([s[1] for s in stacks]), **columns}


def in_step(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of both that are the same particle, told by its defocus, which no two share."""
    common, rows, their_rows = np.intersect1d(ours["defocusU"], theirs["defocusU"], return_indices=True)
    assert len(np.unique(ours["defocusU"])) == len(ours["defocusU"])
    assert len(common) > 0
    return rows, their_rows


def table_of(golden: Path, case: Case) -> np.ndarray:
    name = "J3/J3_particles.cs" if case.job is None else f"J{case.job}/J{case.job}_passthrough_particles.cs"
    return np.load(golden / "input" / name, allow_pickle=False)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@CASES
def test_images_transforms_and_optics_are_cryolikes(shared, tmp_path, case):
    golden = shared / "golden"
    ours = joined(our_stacks(convert(golden, case, tmp_path)))
    theirs = joined(stacks_of_cryolike(golden / case.name))
    rows, their_rows = in_step(ours, theirs)
    if case.options.get("n_stacks_max") is None:
        assert len(rows) == len(ours["phys"]) == len(theirs["phys"])
    assert relative(ours["phys"][rows], theirs["phys"][their_rows]) < 1e-6
    assert relative(ours["fourier"][rows], theirs["fourier"][their_rows]) < 1e-5
    assert ours["fourier"].dtype == theirs["fourier"].dtype
    for key in ONE_A_ROW:
        np.testing.assert_array_equal(ours[key][rows], theirs[key][their_rows])


@CASES
def test_rows_are_in_the_order_of_the_table(shared, tmp_path, case):
    golden = shared / "golden"
    stacks = our_stacks(convert(golden, case, tmp_path))
    table = table_of(golden, case)
    found = np.concatenate([stack[2]["defocusU"] for stack in stacks])
    np.testing.assert_array_equal(found, table["ctf/df1_A"][: len(found)])
    np.testing.assert_array_equal(np.concatenate([stack[2]["uid"] for stack in stacks]), table["uid"][: len(found)])
    np.testing.assert_array_equal(np.concatenate([stack[2]["row"] for stack in stacks]), np.arange(len(found)))


@CASES
def test_metadata_has_cryolikes_keys_values_and_dtypes(shared, tmp_path, case):
    golden = shared / "golden"
    stacks, their_stacks = our_stacks(convert(golden, case, tmp_path)), stacks_of_cryolike(golden / case.name)
    assert len(stacks) == len(their_stacks)
    for (_, _, ours), (_, _, theirs) in zip(stacks, their_stacks, strict=True):
        assert set(ours) >= set(theirs) | OURS_ONLY
        for key in theirs.keys() - set(WHOLE_TABLE):
            if theirs[key] is None or theirs[key].size == 0:
                assert ours[key].size == 0, key
            else:
                assert (ours[key].dtype, ours[key].shape) == (theirs[key].dtype, theirs[key].shape), key
                if key not in ONE_A_ROW:
                    np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


@pytest.mark.parametrize("case", INDEXED, ids=lambda case: case.name)
def test_files_and_idxs_are_those_of_the_rows_of_each_stack(shared, tmp_path, case):
    golden = shared / "golden"
    whole_table = stacks_of_cryolike(golden / case.name)[0][2]
    for _, _, ours in our_stacks(convert(golden, case, tmp_path)):
        for key in WHOLE_TABLE:
            np.testing.assert_array_equal(ours[key], whole_table[key][ours["row"]])
            assert ours[key].dtype.kind == whole_table[key].dtype.kind


@pytest.mark.parametrize("case", [JOBS[0], JOBS[2]], ids=lambda case: case.name)
def test_a_job_names_no_files(shared, tmp_path, case):
    _, _, ours = load_cryolike_stack(convert(shared / "golden", case, tmp_path))
    assert [ours[key].size for key in WHOLE_TABLE] == [0, 0]


F = Case("F_indexed_mean2_desc64", options={"downsample_factor": 2, "downsample_type": "mean"})
K = Case("K_job4_max2_desc64", 4, {"downsample_factor": 2, "downsample_type": "max", "pixel_size": 1.3})


# CryoLike's defect 4: in F and K its npz tells the grid of the images before downsampling, and the polar grid lies beyond Nyquist.
@pytest.mark.parametrize("case", [F, K], ids=lambda case: case.name)
def test_the_descriptor_of_the_full_grid_gives_that_of_the_reduced_one(shared, tmp_path, case):
    golden = shared / "golden"
    reduced = ImageDescriptor.load(golden / "D_indexed_mean2_desc32/params_input.npz")
    of_full = load_cryolike_stack(convert(golden, case, tmp_path / "full"))
    of_reduced = load_cryolike_stack(convert(golden, case, tmp_path / "reduced", reduced))
    np.testing.assert_array_equal(of_full[0], of_reduced[0])
    assert relative(of_full[1], of_reduced[1]) < 1e-5


@pytest.mark.parametrize("case", [F, K], ids=lambda case: case.name)
def test_the_grid_in_the_npz_is_that_of_the_reduced_images(shared, tmp_path, case):
    phys, fourier, metadata = load_cryolike_stack(convert(shared / "golden", case, tmp_path))
    assert phys.shape[1:] == (32, 32)
    assert metadata["n_pixels"].tolist() == [32, 32]
    assert metadata["pixel_size"].tolist() == pytest.approx([2.6, 2.6])
    assert metadata["radius_max"] <= 8
    assert fourier.shape[1:] == (33, 48)


def test_f_is_what_cryolike_makes_with_the_reduced_descriptor(shared, tmp_path):
    golden = shared / "golden"
    ours, theirs = joined(our_stacks(convert(golden, F, tmp_path))), joined(stacks_of_cryolike(golden / "D_indexed_mean2_desc32"))
    rows, their_rows = in_step(ours, theirs)
    assert relative(ours["phys"][rows], theirs["phys"][their_rows]) < 1e-6
    assert relative(ours["fourier"][rows], theirs["fourier"][their_rows]) < 1e-5
