from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from support import disk_of, run_python

from cryolike_data.demo import DemoProject, clean_images, project_model, write_project
from cryolike_data.errors import ArgumentError, ExportError, ExportExistsError, MissingStackError, RowIndexError

N, BOX, PIXEL_SIZE, SNR = 60, 32, 2.5, 0.5
SMALL = {"n_particles": N, "box": BOX, "pixel_size": PIXEL_SIZE, "snr": SNR, "seed": 3}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> DemoProject:
    return write_project(tmp_path_factory.mktemp("demo") / "project", **SMALL)


@pytest.fixture(scope="module")
def truth(project: DemoProject) -> dict[str, np.ndarray]:
    with np.load(project.truth, allow_pickle=False) as file:
        return dict(file)


def load(path: Path) -> np.ndarray:
    return np.load(path, allow_pickle=False)


def read_stack(path: Path) -> np.ndarray:
    with mrcfile.open(path) as mrc:
        data = mrc.data.astype(np.float32)
    return data[None] if data.ndim == 2 else data  # mrcfile drops the first axis of a stack of one


def images_of(project: DemoProject, table: np.ndarray) -> np.ndarray:
    stacks = {path: read_stack(project.folder / path.decode()) for path in set(table["blob/path"].tolist())}
    return np.stack([stacks[path][idx] for path, idx in zip(table["blob/path"].tolist(), table["blob/idx"], strict=True)])


def correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson correlation of every image of a with every image of b."""
    a, b = ((x - x.mean(axis=(1, 2), keepdims=True)).reshape(len(x), -1).astype(np.float64) for x in (a, b))
    return (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T


def rows_by_uid(table: np.ndarray, uid: np.ndarray) -> np.ndarray:
    order = {value: row for row, value in enumerate(table["uid"].tolist())}
    return np.array([order[value] for value in uid.tolist()])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_equal_arguments_give_equal_bytes_at_any_time(project: DemoProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 3 * 86400)
    assert contents(write_project(tmp_path / "elsewhere", **SMALL).folder) == contents(project.folder)


def test_labels_of_the_stacks_hold_no_time(project: DemoProject) -> None:
    for path in project.folder.rglob("*.mrc"):
        with mrcfile.open(path, header_only=True) as mrc:
            assert mrc.get_labels() == ["cryolike_data demo project"]


def test_another_seed_gives_other_particles_and_images(project: DemoProject, tmp_path: Path) -> None:
    other = write_project(tmp_path / "other", **{**SMALL, "seed": 4})
    first, second = load(project.indexed), load(other.indexed)
    assert not set(first["uid"].tolist()) & set(second["uid"].tolist())
    assert np.abs(np.diag(correlations(images_of(project, first), images_of(other, second)))).mean() < 0.5


def test_tables_have_cryosparcs_columns(project: DemoProject) -> None:
    table = load(project.indexed)
    assert table.shape == (N,)
    expected = {
        "uid": "<u8",
        "blob/idx": "<u4",
        "blob/shape": ("<u4", (2,)),
        "blob/psize_A": "<f4",
        "blob/sign": "<f4",
        "blob/import_sig": "<u8",
        "ctf/exp_group_id": "<u4",
        "ctf/df1_A": "<f4",
        "ctf/shift_A": ("<f4", (2,)),
        "ctf/anisomag": ("<f4", (4,)),
        "alignments3D/split": "<u4",
        "alignments3D/shift": ("<f4", (2,)),
        "alignments3D/pose": ("<f4", (3,)),
    }
    assert {name: table.dtype[name] for name in expected} == {name: np.dtype(kind) for name, kind in expected.items()}
    assert table.dtype["blob/path"].kind == table.dtype["ctf/type"].kind == "S"
    assert {name.partition("/")[0] for name in load(project.folder / "J4/J4_passthrough_particles.cs").dtype.names} == {
        "uid",
        "ctf",
        "alignments3D",
    }
    assert {name.partition("/")[0] for name in load(project.folder / "J4/restacked_particles.cs").dtype.names} == {"uid", "blob"}


def test_table_is_as_awkward_as_real_ones(project: DemoProject) -> None:
    table = load(project.indexed)
    assert len(set(table["uid"].tolist())) == N
    assert 0.2 < np.mean(table["uid"] >= 2**63) < 0.8
    assert np.all(table["ctf/df1_A"] >= table["ctf/df2_A"])
    assert np.all(table["blob/sign"] == -1)
    assert set(table["ctf/exp_group_id"].tolist()) == {0, 3}
    for column in ("ctf/accel_kv", "ctf/cs_mm", "ctf/amp_contrast"):
        groups = [set(table[column][table["ctf/exp_group_id"] == group].tolist()) for group in (0, 3)]
        assert len(groups[0]) == len(groups[1]) == 1
        assert groups[0] != groups[1]
    assert np.count_nonzero(table["blob/path"][1:] != table["blob/path"][:-1]) > N / 3


def test_stacks_differ_in_size_and_have_images_without_a_row(project: DemoProject) -> None:
    table = load(project.indexed)
    stacks = {path.relative_to(project.folder).as_posix(): path for path in (project.folder / "J1/extract").iterdir()}
    assert set(stacks) == {path.decode() for path in table["blob/path"].tolist()}
    sizes = {}
    for name, path in stacks.items():
        with mrcfile.open(path, header_only=True) as mrc:
            header = mrc.header
            assert (header.ispg, header.mode, header.nx, header.ny) == (0, 2, BOX, BOX)
            assert mrc.voxel_size.x == pytest.approx(PIXEL_SIZE)
            sizes[name] = int(header.nz)
            assert path.stat().st_size == 1024 + 4 * sizes[name] * BOX**2
    assert len(set(sizes.values())) == len(sizes) == 5
    assert min(sizes.values()) == 1
    places = list(zip(table["blob/path"].tolist(), table["blob/idx"].tolist(), strict=True))
    assert len(set(places)) == N < sum(sizes.values())
    assert all(idx < sizes[path.decode()] for path, idx in places)


def test_stored_minus_clean_is_white_noise_of_the_stated_level(project: DemoProject, truth: dict[str, np.ndarray]) -> None:
    stored = images_of(project, load(project.indexed))
    clean = clean_images(project, range(N)).numpy()
    noise = stored - clean
    assert noise.std() == pytest.approx(float(truth["noise_std"]), rel=0.02)
    assert abs(np.corrcoef(noise.ravel(), clean.ravel())[0, 1]) < 0.02
    assert abs(np.mean(noise[:, 1:] * noise[:, :-1])) < 0.02
    assert clean.var(axis=(1, 2)).mean() / noise.var() == pytest.approx(SNR, rel=0.05)


def test_each_image_resembles_its_own_clean_image_most(project: DemoProject) -> None:
    stored = images_of(project, load(project.indexed))
    assert np.array_equal(correlations(stored, clean_images(project, range(N)).numpy()).argmax(axis=1), np.arange(N))


def test_particles_are_dark(project: DemoProject, truth: dict[str, np.ndarray]) -> None:
    clean = clean_images(project, range(N))
    bright = project_model(truth, truth["rotvec"], truth["shift_A"], BOX, PIXEL_SIZE)
    assert np.diag(correlations(clean.numpy(), bright.numpy())).max() < 0


def test_restacked_images_are_those_of_the_extract_job(project: DemoProject) -> None:
    table, restacked = load(project.indexed), load(project.folder / "J4/restacked_particles.cs")
    passthrough = load(project.folder / "J4/J4_passthrough_particles.cs")
    assert np.array_equal(restacked["uid"], passthrough["uid"])
    assert len(restacked) == N // 2
    original = table[rows_by_uid(table, restacked["uid"])]
    assert np.array_equal(images_of(project, restacked), images_of(project, original))
    for name in passthrough.dtype.names:
        assert np.array_equal(passthrough[name], original[name]), name


def test_row_k_of_the_restack_job_is_image_k(project: DemoProject) -> None:
    restacked = load(project.folder / "J4/restacked_particles.cs")
    paths = sorted((project.folder / "J4/restack").iterdir())
    assert [path.name for path in paths] == [f"batch_{k}_restacked.mrc" for k in range(3)]
    in_order = np.concatenate([read_stack(path) for path in paths])
    assert np.array_equal(in_order, images_of(project, restacked))


@pytest.mark.parametrize("box", [32, 33])
def test_downsampled_images_have_the_low_frequencies_of_the_originals(box: int, tmp_path: Path) -> None:
    project = write_project(tmp_path / "project", **{**SMALL, "box": box})
    table, passthrough = load(project.indexed), load(project.folder / "J5/J5_passthrough_particles.cs")
    assert {name.partition("/")[0] for name in passthrough.dtype.names} == {"uid", "ctf", "alignments3D"}
    assert {path.name for path in (project.folder / "J5").iterdir()} == {"J5_passthrough_particles.cs", "downsample"}
    paths = sorted((project.folder / "J5/downsample").iterdir())
    assert paths[0].name == "batch_000000_downsample.mrc"
    half = box // 2
    with mrcfile.open(paths[0], header_only=True) as mrc:
        assert mrc.voxel_size.x == pytest.approx(PIXEL_SIZE * box / half)
    small = np.concatenate([read_stack(path) for path in paths])
    large = images_of(project, table[rows_by_uid(table, passthrough["uid"])])
    assert small.shape == (N, half, half)

    k = np.arange(-(half // 2) + 1, half // 2)  # below the Nyquist frequency of the small box

    def low(images: np.ndarray) -> np.ndarray:
        size = images.shape[-1]
        waves = np.exp(-2j * np.pi * np.outer(k, np.arange(size) - size // 2) / size)
        return np.einsum("ky,byx,lx->bkl", waves, images, waves) / size**2

    np.testing.assert_allclose(low(small), low(large), atol=1e-5)


def test_each_exposure_group_has_its_own_ctf(project: DemoProject, truth: dict[str, np.ndarray], tmp_path: Path) -> None:
    swapped = dict(truth)
    for name in ("voltage_kv", "spherical_aberration_mm", "amplitude_contrast"):
        swapped[name] = truth[name].min() + truth[name].max() - truth[name]
    np.savez(tmp_path / "truth.npz", **swapped)
    right, wrong = clean_images(project, range(N)), clean_images(tmp_path, range(N))
    assert torch.all((right - wrong).std(dim=(1, 2)) > 0.1 * right.std(dim=(1, 2)))


def test_clean_images_follow_the_textbook_ctf(project: DemoProject, truth: dict[str, np.ndarray]) -> None:
    f = np.fft.fftfreq(BOX, PIXEL_SIZE)
    ky, kx = np.meshgrid(f, f, indexing="ij")
    k, angle = np.hypot(kx, ky), np.arctan2(ky, kx)
    for row in (0, 1, 2):
        p = {name: float(truth[name][row]) for name in truth if truth[name].shape == (N,)}
        volts = p["voltage_kv"] * 1000
        wavelength = 12.2643247 / np.sqrt(volts * (1 + 0.978466e-6 * volts))
        mean, difference = (p["defocus_u"] + p["defocus_v"]) / 2, (p["defocus_u"] - p["defocus_v"]) / 2
        defocus = mean + difference * np.cos(2 * (angle - p["astigmatism_angle_rad"]))
        chi = np.pi * wavelength * defocus * k**2 - np.pi / 2 * p["spherical_aberration_mm"] * 1e7 * wavelength**3 * k**4
        ctf = np.sin(chi + p["phase_shift_rad"] + np.arcsin(p["amplitude_contrast"]))
        image = project_model(truth, truth["rotvec"][[row]], truth["shift_A"][[row]], BOX, PIXEL_SIZE)[0].numpy()
        expected = -np.fft.ifft2(np.fft.fft2(image) * ctf).real
        np.testing.assert_allclose(clean_images(project, [row])[0], expected, atol=2e-3 * np.abs(expected).max())


def test_truth_and_table_agree(project: DemoProject, truth: dict[str, np.ndarray]) -> None:
    table = load(project.indexed)
    assert np.array_equal(truth["uid"], table["uid"])
    assert np.array_equal(truth["rotvec"], table["alignments3D/pose"])
    assert np.array_equal(truth["exposure_group"], table["ctf/exp_group_id"])
    np.testing.assert_allclose(truth["shift_A"], table["alignments3D/shift"] * PIXEL_SIZE, rtol=1e-6)
    assert (int(truth["box"]), float(truth["pixel_size"]), int(truth["seed"])) == (BOX, PIXEL_SIZE, 3)


@pytest.mark.parametrize("rotvec", [(0, 0, 0), (0, 0, np.pi / 2), (0.3, -1.2, 2.5), (3.0, 2.0, -1.3)])
def test_a_blob_lands_where_the_inverse_rotation_and_minus_the_shift_take_it(rotvec: tuple[float, float, float]) -> None:
    centre, shift, box, pixel_size = np.array([9.0, -4.0, 6.0]), np.array([3.0, -5.0]), 33, 1.5
    model = {"centres_A": centre[None], "amplitudes": [1.0], "sigma_A": 2.0}
    image = project_model(model, [rotvec], [shift], box, pixel_size)[0].double().numpy()
    coordinate = (np.arange(box) - box // 2) * pixel_size
    found = np.array([image.sum(axis=0) @ coordinate, image.sum(axis=1) @ coordinate]) / image.sum()
    expected = Rotation.from_rotvec(rotvec).inv().apply(centre)[:2] - shift
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_rotations_cover_the_sphere_evenly(tmp_path: Path) -> None:
    project = write_project(tmp_path / "project", n_particles=2000, box=16)
    matrices = Rotation.from_rotvec(load(project.indexed)["alignments3D/pose"]).as_matrix()
    np.testing.assert_allclose(matrices.mean(axis=0), 0, atol=0.06)
    np.testing.assert_allclose((matrices**2).mean(axis=0), 1 / 3, atol=0.04)


@pytest.mark.parametrize("box", [32, 35])
def test_volume_summed_along_z_is_the_projection_at_identity(box: int, tmp_path: Path) -> None:
    project = write_project(tmp_path / "project", n_particles=20, box=box)
    with mrcfile.open(project.volume) as mrc:
        summed, voxel = mrc.data.sum(axis=0, dtype=np.float64), float(mrc.voxel_size.z)
        assert mrc.data.shape == (box, box, box)
        assert mrc.is_volume()
    with np.load(project.truth, allow_pickle=False) as truth:
        image = project_model(truth, np.zeros((1, 3)), np.zeros((1, 2)), box, voxel)[0]
    np.testing.assert_allclose(summed * voxel, image, atol=1e-4 * float(image.max()))


def test_particle_fills_about_half_of_the_box(project: DemoProject, truth: dict[str, np.ndarray]) -> None:
    reach = np.linalg.norm(truth["centres_A"], axis=1).max() + float(truth["sigma_A"])
    assert 0.18 < reach / (BOX * PIXEL_SIZE) < 0.36


def test_float16_stacks_hold_the_rounded_float32_images(project: DemoProject, tmp_path: Path) -> None:
    half = write_project(tmp_path / "project", **SMALL, dtype="float16")
    table = load(half.indexed)
    with mrcfile.open(half.folder / table["blob/path"][0].decode(), header_only=True) as mrc:
        assert mrc.header.mode == 12
    np.testing.assert_allclose(images_of(half, table), images_of(project, table), atol=5e-3)


@pytest.mark.parametrize(("n_particles", "box", "n_stacks"), [(20, 16, 5), (20, 17, 10), (4, 16, 2), (45, 21, 20)])
def test_small_projects_are_whole(n_particles: int, box: int, n_stacks: int, tmp_path: Path) -> None:
    project = write_project(tmp_path / "project", n_particles=n_particles, box=box, n_stacks=n_stacks)
    table = load(project.indexed)
    assert images_of(project, table).shape == (n_particles, box, box)
    assert len(set(table["blob/path"].tolist())) == n_stacks
    assert set(table["ctf/exp_group_id"].tolist()) == {0, 3}


def test_clean_images_come_in_the_order_asked_for(project: DemoProject) -> None:
    everything = clean_images(project, range(N))
    assert everything.dtype == torch.float32
    for source in (project, project.folder, str(project.folder), project.truth):
        torch.testing.assert_close(clean_images(source, np.array([7, 2, 7])), everything[[7, 2, 7]])
    assert clean_images(project, []).shape == (0, BOX, BOX)
    with pytest.raises(RowIndexError, match="there are 60 rows"):
        clean_images(project, [N])


def test_clean_images_are_chosen_by_a_mask_and_not_by_fractions(project: DemoProject) -> None:
    mask = np.arange(N) % 7 == 3
    torch.testing.assert_close(clean_images(project, mask), clean_images(project, np.flatnonzero(mask)))
    with pytest.raises(RowIndexError, match="float64"):
        clean_images(project, [1.9])


def test_paths_of_the_project_exist(project: DemoProject) -> None:
    for field in dataclasses.fields(project):
        value = getattr(project, field.name)
        assert value.exists() if isinstance(value, Path) else (project.folder / f"J{value}").is_dir()
    assert project.indexed == project.folder / "J3" / "J3_particles.cs"
    assert project.job_number == 4
    assert [path.name for path in project.folder.parent.iterdir()] == ["project"]


def test_only_a_demo_project_is_replaced_and_only_on_request(tmp_path: Path) -> None:
    tiny = {"n_particles": 20, "box": 16}
    (tmp_path / "project").mkdir()
    project = write_project(tmp_path / "project", **tiny)
    before = contents(project.folder)
    with pytest.raises(ExportExistsError, match="overwrite=True"):
        write_project(project.folder, **tiny, seed=1)
    assert contents(project.folder) == before
    write_project(project.folder, **tiny, seed=1, overwrite=True)
    assert contents(project.folder) != before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(ExportExistsError, match="not a demo project"):
        write_project(tmp_path / "thesis", **tiny, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["project", "thesis"]


def test_an_empty_folder_is_filled_and_a_project_is_replaced_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = {"n_particles": 20, "box": 16}
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o2770)
    before = os.stat(".")
    write_project(".", **tiny)
    assert contents(Path()) == contents(write_project(tmp_path.with_name(f"{tmp_path.name}-new"), **tiny).folder)
    Path("notes.txt").write_text("mine")
    write_project(".", **tiny, seed=1, overwrite=True)
    assert Path("notes.txt").read_text() == "mine"
    assert (os.stat(".").st_ino, os.stat(".").st_mode) == (before.st_ino, before.st_mode)
    assert sorted(os.listdir()) == ["J1", "J3", "J4", "J5", "notes.txt", "truth.npz", "volume.mrc"]


def test_a_link_that_leads_nowhere_is_replaced_with_the_project(tmp_path: Path) -> None:
    tiny = {"n_particles": 20, "box": 16}
    project = write_project(tmp_path / "project", **tiny)
    before = contents(project.folder)
    (project.folder / "J5").rename(tmp_path / "on another disk")
    (project.folder / "J5").symlink_to(tmp_path / "not mounted")
    write_project(project.folder, **tiny, overwrite=True)
    assert contents(project.folder) == before


def test_a_project_may_lie_directly_on_a_disk_of_its_own(tmp_path: Path) -> None:
    with disk_of(tmp_path / "disk", "4m") as disk:
        for overwrite in (False, True):
            assert write_project(disk, n_particles=20, box=16, overwrite=overwrite).truth.is_file()


@pytest.mark.parametrize(("content", "error"), [(None, MissingStackError), (b"PK", ArgumentError)])
def test_a_truth_that_cannot_be_read_is_an_error_of_ours(tmp_path: Path, content: bytes | None, error: type[Exception]) -> None:
    if content is not None:
        (tmp_path / "truth.npz").write_bytes(content)
    with pytest.raises(error, match=r"truth\.npz"):
        clean_images(tmp_path, [0])


KILLED = """
    import os
    os.environ["OMP_NUM_THREADS"] = "1"
    import shutil, signal, sys
    from pathlib import Path
    import torch
    from cryolike_data.demo import write_project
    from support import contents

    torch.set_num_threads(1)
    root, tiny = Path(sys.argv[1]), {"n_particles": 20, "box": 16}
    whole, replace = contents(write_project(root / "whole", **tiny).folder), os.replace
    write_project(root / "other", **tiny, seed=1)

    def kill_after(replaced, folder, **options):
        child = os.fork()
        if child == 0:
            left = iter(range(replaced))
            os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL) if next(left, None) is None else replace(*paths)
            write_project(folder, **tiny, **options)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL

    for replaced in (0, 1, 5):
        folder = root / f"filled{replaced}"
        folder.mkdir()
        kill_after(replaced, folder)
        assert not (folder / "truth.npz").exists()
        write_project(folder, **tiny)
        assert contents(folder) == whole
    for replaced in (0, 1, 6, 11):
        folder = root / f"replaced{replaced}"
        shutil.copytree(root / "other", folder)
        kill_after(replaced, folder, overwrite=True)
        assert (folder / "truth.npz").exists() == (replaced == 0)
        write_project(folder, **tiny, overwrite=True)
        assert contents(folder) == whole
"""


def test_a_run_that_was_killed_is_no_hindrance_to_the_next(tmp_path: Path) -> None:
    ran = run_python(KILLED, tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_what_a_run_that_was_killed_has_left_in_its_place_is_gone_after_the_next(tmp_path: Path) -> None:
    (tmp_path / "project/.unfinished-0123abcd/new").mkdir(parents=True)
    write_project(tmp_path / "project", n_particles=20, box=16)
    write_project(tmp_path / "fresh", n_particles=20, box=16)
    assert sorted(os.listdir(tmp_path / "project")) == sorted(os.listdir(tmp_path / "fresh"))


def test_what_a_run_that_was_killed_has_left_beside_its_place_makes_no_folder_of_others_its_own(tmp_path: Path) -> None:
    (tmp_path / ".project.new-abcd1234").mkdir()
    (tmp_path / "J1").mkdir()
    with pytest.raises(ExportExistsError, match="not a demo project"):
        write_project(tmp_path, n_particles=20, box=16)


@pytest.mark.parametrize("room", ["12k", "32k", "100k", "300k", "600k"])  # for neither table, truth, volume, all of J1 nor all of J4
@pytest.mark.parametrize("inside", ["", "project"])
def test_a_full_disk_is_an_export_error_and_nothing_is_left(tmp_path: Path, room: str, inside: str) -> None:
    with disk_of(tmp_path / "disk", room) as disk:
        with pytest.raises(ExportError, match=r"cannot be written: .*No space left on device"):
            write_project(disk / inside, n_particles=60, box=32)
        assert not list(disk.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_particles": 9},
        {"n_stacks": 1},
        {"box": 15},
        {"pixel_size": 0.0},
        {"pixel_size": float("nan")},
        {"pixel_size": 0.5, "box": 32},  # of which half the box has pixels of 1 A, which a header has for a size that is not known
        {"seed": -1},
        {"snr": 0.0},
        {"dtype": "int8"},
    ],
)
def test_arguments_out_of_range_are_named(wrong: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        write_project(tmp_path / "project", **wrong)
    assert not list(tmp_path.iterdir())
