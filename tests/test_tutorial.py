"""CryoLike's tutorial "Converting particles from CryoSPARC file formats": its examples, run as they stand there."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import centred, ctf_columns, load_cryolike_stack, numbered_images, uids, write_stack, write_table

from cryolike_data import (
    ImageDescriptor,
    convert_particle_stacks_from_cryosparc_job_directory,
    convert_particle_stacks_from_indexed_cryosparc,
    convert_particle_stacks_from_indexed_cryosparc_file,
)

BOX, PIXEL_SIZE = 16, 1.3
PLACES = [
    ("somedir/file1.mrc", 3),
    ("somedir/file1.mrc", 1),
    ("somedir/file2.mrc", 10),
    ("otherdir/file3.mrc", 10),
    ("somedir/file1.mrc", 2),
]


@pytest.fixture
def indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The tutorial's ``MyFile.cs`` in the working directory; the five images that its rows intend."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    stacks = {name: numbered_images(10, BOX, start=start) for start, name in enumerate(dict(PLACES))}
    for name, images in stacks.items():
        write_stack(Path(name), images)
    paths, numbers = zip(*PLACES, strict=True)
    write_table(
        Path("MyFile.cs"),
        uid=uids(5),
        blob__path=paths,
        blob__idx=np.array(numbers, "u4"),
        blob__psize_A=np.full(5, PIXEL_SIZE, "f4"),
        **ctf_columns(5),
    )
    ImageDescriptor.from_individual_values(BOX, PIXEL_SIZE, n_inplanes=8).save("my_params_file.npz")
    return np.stack([stacks[name][number - 1] for name, number in PLACES])


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """The tutorial's ``./cryosparc/J4``; the twelve images of ``restack/``. What must not be read is no image stack at all."""
    monkeypatch.chdir(tmp_path)
    restacked, downsampled = numbered_images(12, BOX, start=1), numbered_images(12, BOX // 2, start=2)
    folder = Path("cryosparc/J4")
    for k in range(3):
        part = slice(4 * k, 4 * k + 4)
        write_stack(folder / f"restack/batch_{k:06d}_restacked.mrc", restacked[part], pixel_size=PIXEL_SIZE)
        write_stack(folder / f"downsample/batch_{k:06d}_downsample.mrc", downsampled[part], pixel_size=2 * PIXEL_SIZE)
    (folder / "downsample/batch_000004_downsample.mrc").write_bytes(b"never read")
    write_table(folder / "J4_passthrough_particles.cs", uid=uids(12), **ctf_columns(12))
    ImageDescriptor.from_individual_values(BOX, PIXEL_SIZE, n_inplanes=8).save("my_params.npz")
    return restacked


def stacks_in(folder: str) -> list[str]:
    return sorted(path.name for part in ("phys", "fft") for path in Path(folder, part).glob("particles_*"))


def names_of(n_stacks: int) -> list[str]:
    kinds = (("fourier", ".npz"), ("fourier", ".pt"), ("phys", ".pt"))
    return sorted(f"particles_{kind}_stack_{k:06d}{suffix}" for k in range(n_stacks) for kind, suffix in kinds)


def pictures_in(folder: str) -> list[str]:
    return sorted(path.name for path in Path(folder, "plots").iterdir())


def assert_images(folder: str, number: int, images: np.ndarray) -> None:
    phys, fourier, metadata = load_cryolike_stack(Path(folder), number)
    np.testing.assert_allclose(phys, centred(images), atol=1e-6)
    assert len(fourier) == len(phys) == metadata["n_images"]


def test_the_un_suffixed_name_is_the_same_function():
    assert convert_particle_stacks_from_indexed_cryosparc is convert_particle_stacks_from_indexed_cryosparc_file


#: Of CryoLike's own functions (commit d209d6b), from ``folder_output`` on but for ``pixel_size``.
DEFAULTS: dict[str, Any] = {
    "batch_size": 1024,
    "n_stacks_max": -1,
    "downsample_factor": 1,
    "downsample_type": "mean",
    "skip_exist": False,
    "flag_plots": True,
}


@pytest.mark.parametrize(
    ("function", "own"),
    [
        (convert_particle_stacks_from_indexed_cryosparc_file, {"folder_cryosparc": "", "folder_output": "", "pixel_size": None}),
        (
            convert_particle_stacks_from_cryosparc_job_directory,
            {"folder_cryosparc": "", "job_number": 0, "folder_output": "", "pixel_size": -1.0},
        ),
    ],
    ids=["indexed", "job"],
)
def test_arguments_of_cryolike_have_its_defaults(function, own):
    of_cryolike = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    assert {p.name: p.default for p in of_cryolike if p.default is not p.empty} == DEFAULTS | own


def test_indexed_all_five_images_in_one_output_with_its_pictures(indexed):
    convert_particle_stacks_from_indexed_cryosparc(
        params_input="my_params_file.npz", file_cs="MyFile.cs", folder_output="OUTDIR", index_base=1
    )
    assert stacks_in("OUTDIR") == names_of(1)
    assert_images("OUTDIR", 0, indexed)
    assert pictures_in("OUTDIR") == [
        "particles_fourier_stack_000000.png",
        "particles_phys_stack_000000.png",
        "power_spectrum_stack_000000.png",
    ]


def test_indexed_optics_go_with_their_images(indexed):
    convert_particle_stacks_from_indexed_cryosparc(
        params_input="my_params_file.npz", file_cs="MyFile.cs", folder_output="OUTDIR", index_base=1, flag_plots=False
    )
    metadata = load_cryolike_stack(Path("OUTDIR"))[2]
    table = np.load("MyFile.cs", allow_pickle=False)
    for key, column in (("defocusU", "ctf/df1_A"), ("defocusV", "ctf/df2_A"), ("defocusAngle", "ctf/df_angle_rad"), ("uid", "uid")):
        np.testing.assert_array_equal(metadata[key], table[column])
    assert metadata["files"].tolist() == [name.encode() for name, _ in PLACES]
    assert metadata["idxs"].tolist() == [number - 1 for _, number in PLACES]


def test_indexed_counting_from_one_unasked_is_refused_with_the_remedy(indexed):
    with pytest.raises(ValueError, match="index_base=1"):
        convert_particle_stacks_from_indexed_cryosparc(params_input="my_params_file.npz", file_cs="MyFile.cs", folder_output="OUTDIR")
    assert not Path("OUTDIR").exists()


def test_indexed_stacks_moved_to_another_folder_give_the_same_result(indexed):
    moved = Path("~/my_research/my_mrc_files/").expanduser()
    moved.mkdir(parents=True)
    for name in dict(PLACES):
        shutil.move(name, moved)
    shutil.rmtree("somedir")
    shutil.rmtree("otherdir")
    convert_particle_stacks_from_indexed_cryosparc(
        params_input="my_params_file.npz",
        file_cs="MyFile.cs",
        folder_cryosparc="~/my_research/my_mrc_files/",
        folder_output="OUTDIR",
        index_base=1,
        flag_plots=False,
    )
    assert stacks_in("OUTDIR") == names_of(1)
    assert_images("OUTDIR", 0, indexed)


def test_indexed_only_the_particles_that_are_selected(indexed):
    convert_particle_stacks_from_indexed_cryosparc(
        "my_params_file.npz", "MyFile.cs", folder_output="OUTDIR", index_base=1, select=[4, 2], flag_plots=False
    )
    assert_images("OUTDIR", 0, indexed[[4, 2]])


def test_indexed_batches_of_three_land_in_the_current_directory(indexed):
    convert_particle_stacks_from_indexed_cryosparc(
        params_input="my_params_file.npz", file_cs="MyFile.cs", batch_size=3, index_base=1, flag_plots=False
    )
    assert stacks_in(".") == names_of(2)
    assert_images(".", 0, indexed[:3])
    assert_images(".", 1, indexed[3:])


def test_job_all_twelve_restacked_images_in_one_stack(job):
    convert_particle_stacks_from_cryosparc_job_directory(
        params_input="my_params.npz", folder_cryosparc="cryosparc", job_number=4, folder_output="OUTDIR", flag_plots=False
    )
    assert stacks_in("OUTDIR") == names_of(1)
    assert_images("OUTDIR", 0, job)


def test_job_in_the_working_directory(job, monkeypatch):
    monkeypatch.chdir("cryosparc")
    convert_particle_stacks_from_cryosparc_job_directory("../my_params.npz", job_number=4, folder_output="OUTDIR", flag_plots=False)
    assert_images("OUTDIR", 0, job)


def test_job_only_the_particles_that_are_selected(job):
    convert_particle_stacks_from_cryosparc_job_directory(
        "my_params.npz", "cryosparc", 4, folder_output="OUTDIR", select=[7, 2], flag_plots=False
    )
    assert_images("OUTDIR", 0, job[[7, 2]])


@pytest.mark.parametrize("pixel_size", [PIXEL_SIZE, (PIXEL_SIZE, PIXEL_SIZE)], ids=["number", "pair"])
def test_job_without_pixel_sizes_takes_the_one_that_is_given(job, pixel_size):
    for k in range(3):
        write_stack(Path(f"cryosparc/J4/restack/batch_{k:06d}_restacked.mrc"), job[4 * k : 4 * k + 4])
    convert_particle_stacks_from_cryosparc_job_directory(
        "my_params.npz", "cryosparc", 4, folder_output="OUTDIR", pixel_size=pixel_size, flag_plots=False
    )
    assert_images("OUTDIR", 0, job)


@pytest.mark.parametrize("pixel_size", [-1, -2.5, None])
def test_job_with_pixel_sizes_needs_none_to_be_given(job, pixel_size):
    convert_particle_stacks_from_cryosparc_job_directory(
        "my_params.npz", "cryosparc", 4, folder_output="OUTDIR", pixel_size=pixel_size, flag_plots=False
    )
    assert_images("OUTDIR", 0, job)


def test_job_whose_record_has_another_order_is_converted_by_uid(job):
    write_table(
        Path("cryosparc/J4/restacked_particles.cs"),
        uid=uids(12)[::-1],  # image k is that of the k-th row from the end
        blob__path=[f"J4/restack/batch_{k // 4:06d}_restacked.mrc" for k in range(12)],
        blob__idx=np.arange(12, dtype="u4") % 4,
    )
    convert_particle_stacks_from_cryosparc_job_directory(
        "my_params.npz", "cryosparc", 4, folder_output="OUTDIR", pairing="uid", flag_plots=False
    )
    assert_images("OUTDIR", 0, job[::-1])
    np.testing.assert_array_equal(load_cryolike_stack(Path("OUTDIR"))[2]["uid"], uids(12))


def test_job_rows_beyond_the_images_are_told_and_left_out(job):
    write_table(Path("cryosparc/J4/J4_passthrough_particles.cs"), uid=uids(14), **ctf_columns(14))
    with pytest.warns(UserWarning, match="14 rows.*12 images"):
        convert_particle_stacks_from_cryosparc_job_directory(
            params_input="my_params.npz", folder_cryosparc="cryosparc", job_number=4, folder_output="OUTDIR", flag_plots=False
        )
    np.testing.assert_array_equal(load_cryolike_stack(Path("OUTDIR"))[2]["uid"], uids(14)[:12])


def test_job_without_restack_takes_downsample_up_to_the_gap(job):
    shutil.rmtree("cryosparc/J4/restack")
    ImageDescriptor.from_individual_values(BOX // 2, 2 * PIXEL_SIZE, n_inplanes=8).save("my_params.npz", overwrite=True)
    with pytest.warns(UserWarning, match="stops before batch_000004_downsample.mrc"):
        convert_particle_stacks_from_cryosparc_job_directory(
            params_input="my_params.npz", folder_cryosparc="cryosparc", job_number=4, folder_output="OUTDIR", flag_plots=False
        )
    assert stacks_in("OUTDIR") == names_of(1)
    assert_images("OUTDIR", 0, numbered_images(12, BOX // 2, start=2))


def test_job_stops_after_two_stacks_of_four(job):
    convert_particle_stacks_from_cryosparc_job_directory(
        params_input="my_params.npz",
        folder_cryosparc="cryosparc",
        job_number=4,
        folder_output="OUTDIR",
        batch_size=4,
        n_stacks_max=2,
        flag_plots=False,
    )
    assert stacks_in("OUTDIR") == names_of(2)
    assert_images("OUTDIR", 0, job[:4])
    assert_images("OUTDIR", 1, job[4:8])


def test_job_downsampled_by_the_mean_of_two_by_two_pixels(job):
    convert_particle_stacks_from_cryosparc_job_directory(
        params_input="my_params.npz",
        folder_cryosparc="cryosparc",
        job_number=4,
        folder_output="OUTDIR",
        downsample_factor=2,
        downsample_type="mean",
        flag_plots=False,
    )
    assert_images("OUTDIR", 0, job.reshape(12, BOX // 2, 2, BOX // 2, 2).mean(axis=(2, 4)))


def test_job_pictures_are_drawn_by_default_for_every_stack(job):
    convert_particle_stacks_from_cryosparc_job_directory(
        params_input="my_params.npz", folder_cryosparc="cryosparc", job_number=4, folder_output="OUTDIR", batch_size=6
    )
    kinds = ("particles_fourier", "particles_phys", "power_spectrum")
    assert pictures_in("OUTDIR") == sorted(f"{kind}_stack_{k:06d}.png" for kind in kinds for k in range(2))
