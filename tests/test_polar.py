"""The polar transform against direct sums, scipy's quadrature and closed forms."""

import ctypes
import json
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import jv, roots_jacobi

import cryolike_data.transforms.polar as polar_module
from cryolike_data.errors import ArgumentError, MissingDependencyError
from cryolike_data.transforms import Normalize, PolarGrid, PolarTransform, normalize_polar, to_polar, to_polar_exact
from cryolike_data.transforms.finufft_plan import require_cufinufft


def noise(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(3))


def plain_sum(image, grid):
    """The definition, point by point, in numpy."""
    box = len(image)
    j = np.arange(box) - box // 2
    out = np.empty((grid.n_shells, grid.n_inplanes), np.complex128)
    for s, r in enumerate(grid.radii):
        for a, theta in enumerate(grid.angles):
            k0, k1 = 4 * np.pi / box * r * np.cos(theta), 4 * np.pi / box * r * np.sin(theta)
            out[s, a] = (image * np.exp(-1j * (k0 * j[:, None] + k1 * j))).sum()
    return 4 * np.pi / box * out


@pytest.mark.parametrize("grid", [None, 16, PolarGrid])
@pytest.mark.parametrize(
    "use",
    [
        lambda grid: to_polar(noise(1, 8, 8), grid),
        lambda grid: to_polar_exact(noise(1, 8, 8), grid),
        lambda grid: normalize_polar(noise(1, 4, 4).to(torch.complex64), grid),
        lambda grid: PolarTransform(grid, 8),
    ],
    ids=["to_polar", "to_polar_exact", "normalize_polar", "PolarTransform"],
)
def test_what_is_no_grid_is_refused(use, grid):
    with pytest.raises(ArgumentError, match=r"grid is a PolarGrid, such as PolarGrid\.of_box\(64\), not"):
        use(grid)


@pytest.mark.parametrize("count", [1, 2, 17, 129, 400])
def test_shells_are_gauss_jacobi_nodes(count):
    grid = PolarGrid(radius_max=float(count - 1) or 0.5, dist_radii=1.0 if count > 1 else 1e9, n_inplanes=4)
    count = grid.n_shells
    nodes, weights = roots_jacobi(count, 0, 1)
    np.testing.assert_allclose(grid.radii / (grid.radius_max / 2) - 1, nodes, rtol=0, atol=1e-12)
    np.testing.assert_allclose(grid.weights / (2 * np.pi * (grid.radius_max / 2) ** 2 / (2 * np.pi) ** 2), weights, rtol=0, atol=1e-12)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.floats(0.5, 64), st.floats(0.2, 2), st.integers(1, 64))
def test_integration_weights_sum_to_the_area_of_the_disk(radius_max, dist_radii, n_inplanes):
    grid = PolarGrid(radius_max, dist_radii, n_inplanes)
    assert grid.integration_weights.shape == (grid.n_shells, grid.n_inplanes)
    assert grid.integration_weights.sum() == pytest.approx(np.pi * radius_max**2, rel=1e-12)


def test_integration_weights_integrate_a_gaussian():
    grid = PolarGrid(4.0, 0.25, 8)
    integral = (np.exp(-(grid.radii**2))[:, None] * grid.integration_weights).sum()
    assert integral == pytest.approx(np.pi * (1 - np.exp(-16)), rel=1e-12)


def test_the_default_grid_of_a_box_of_64_has_65_shells():
    assert PolarGrid(16.0, 0.25, 48).n_shells == 65


def test_shells_are_no_farther_apart_than_asked_where_the_radius_is_no_multiple():
    assert PolarGrid(1.0, 0.3, 4).n_shells == 5


@pytest.mark.parametrize(("box", "n_inplanes"), [(8, 6), (7, 5)])
def test_the_exact_transform_is_the_definition(box, n_inplanes):
    grid = PolarGrid(box / 4, 0.5, n_inplanes)
    images = noise(2, box, box, dtype=torch.float64)
    expected = [plain_sum(image, grid) for image in images.numpy()]
    np.testing.assert_allclose(to_polar_exact(images, grid).numpy(), expected, atol=1e-12)


def test_the_first_image_axis_is_the_first_coordinate():
    # A point one pixel down the rows has phase exp(-i 4 pi / D r cos(theta)).
    image = torch.zeros(1, 8, 8)
    image[0, 5, 4] = 1
    grid = PolarGrid(2.0, 0.5, 12)
    expected = np.pi / 2 * np.exp(-1j * np.pi / 2 * grid.radii[:, None] * np.cos(grid.angles))
    np.testing.assert_allclose(to_polar(image, grid, eps=1e-12)[0].numpy(), expected, atol=1e-11)


@pytest.mark.parametrize("eps", [1e-6, 1e-12])
@pytest.mark.parametrize("n_inplanes", [24, 25, 2, 1])
@pytest.mark.parametrize("count", [1, 4, 7])
def test_the_fast_transform_reaches_its_accuracy(eps, n_inplanes, count):
    grid = PolarGrid(4.0, 0.25, n_inplanes)
    images = noise(count, 16, 16)
    exact = to_polar_exact(images, grid)
    error = (PolarTransform(grid, 16, eps=eps, n_trans=2)(images) - exact).abs().amax((1, 2)) / exact.abs().amax((1, 2))
    assert float(error.max()) < 10 * eps


def test_one_transform_serves_batches_of_any_count():
    grid = PolarGrid(4.0, 0.5, 8)
    images = noise(9, 15, 15)
    transform = PolarTransform(grid, 15, eps=1e-12, n_trans=2)
    exact = to_polar_exact(images, grid)
    for count in (9, 1, 5, 0, 4):
        torch.testing.assert_close(transform(images[:count]), exact[:count], rtol=0, atol=1e-9)


def test_no_images_have_no_transforms():
    grid = PolarGrid(4.0, 0.5, 8)
    for transform in (to_polar, to_polar_exact):
        assert transform(torch.zeros(0, 16, 16), grid).shape == (0, 9, 8)


def test_a_faint_image_keeps_its_accuracy_beside_a_bright_one():
    grid = PolarGrid(4.0, 0.5, 8)
    images = noise(2, 16, 16, dtype=torch.float64) * torch.tensor([1e8, 1e-8]).reshape(2, 1, 1)
    exact = to_polar_exact(images, grid)
    ours = to_polar(images, grid, eps=1e-12)
    assert float(((ours - exact).abs().amax((1, 2)) / exact.abs().amax((1, 2))).max()) < 1e-11


def test_an_image_of_negative_pixels_has_its_transform():
    images, grid = -noise(2, 12, 12).abs(), PolarGrid(3.0, 0.25, 12)
    torch.testing.assert_close(to_polar(images, grid, eps=1e-12), to_polar_exact(images, grid), rtol=0, atol=1e-9)


@pytest.mark.parametrize("n_inplanes", [12, 11])
def test_an_image_of_zeros_has_a_transform_of_zeros_and_leaves_the_others_alone(n_inplanes):
    images, grid = noise(4, 12, 12), PolarGrid(3.0, 0.25, n_inplanes)
    images[1] = 0
    transforms = to_polar(images, grid, eps=1e-12)
    assert not transforms[1].any()
    torch.testing.assert_close(transforms, to_polar_exact(images, grid), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("dtype", "peak"), [(torch.complex64, 1e-40), (torch.complex128, 1e-310)])
def test_an_image_too_faint_to_be_divided_by_leaves_the_others_alone(dtype, peak):
    images, grid = noise(4, 12, 12, dtype=torch.float64), PolarGrid(3.0, 0.25, 12)
    images[1] *= peak
    images = images.to(dtype.to_real())
    transforms = to_polar(images, grid, dtype=dtype)
    torch.testing.assert_close(transforms.to(torch.complex128), to_polar_exact(images, grid), rtol=0, atol=1e-4)


def test_gradients_pass_through_the_exact_transform_only():
    images, grid = noise(2, 5, 5, dtype=torch.float64).requires_grad_(), PolarGrid(1.0, 0.5, 4)
    assert torch.autograd.gradcheck(lambda pixels: to_polar_exact(pixels, grid), images)
    assert not to_polar(images, grid).requires_grad


def test_a_compiled_step_may_transform_more_images_than_one_call_takes():
    images, grid = noise(20, 12, 12), PolarGrid(3.0, 0.25, 12)
    step = torch.compile(lambda pixels: to_polar(2 * pixels, grid).abs() + 1, backend="aot_eager")
    torch.testing.assert_close(step(images), to_polar(2 * images, grid).abs() + 1)


def test_what_was_transformed_before_does_not_change_a_bit():
    images, grid = noise(8, 12, 12), PolarGrid(3.0, 0.25, 12)
    used, fresh = (PolarTransform(grid, 12, eps=1e-6, n_trans=4, dtype=torch.complex64) for _ in range(2))
    used(images)
    assert torch.equal(used(images[:3]), fresh(images[:3]))


def test_each_grid_accuracy_dtype_and_box_has_its_own_plan():
    grid = PolarGrid(2.0, 0.25, 12)
    images = noise(2, 12, 12, dtype=torch.float64)
    exact = to_polar_exact(images, grid)
    to_polar(images, grid, eps=1e-2)
    torch.testing.assert_close(to_polar(images, grid, eps=1e-12), exact, rtol=0, atol=1e-9)
    for dtype in (torch.complex64, torch.complex128):
        assert to_polar(images, grid, eps=1e-6, dtype=dtype).dtype == dtype
    # With nothing else changed from one to the next.
    smaller = images[:, :10, :10]
    for part, points in ((images, grid), (smaller, grid), (smaller, PolarGrid(1.5, 0.25, 12))):
        torch.testing.assert_close(to_polar(part, points, eps=1e-12), to_polar_exact(part, points), rtol=0, atol=1e-9)


def plans_made(monkeypatch):
    """A list that grows by the thread of each plan that ``to_polar`` makes from now on; what it has kept is for something else."""
    to_polar(noise(1, 2, 2), PolarGrid(0.5, 0.25, 2))
    made, make = [], polar_module.make_plan

    def noted(*arguments):
        made.append(threading.current_thread().name)
        return make(*arguments)

    monkeypatch.setattr(polar_module, "make_plan", noted)
    return made


@pytest.mark.parametrize("name", ["stream_of", "os.getpid", "torch.get_num_threads"])
def test_a_plan_serves_no_other_stream_process_or_number_of_threads(name, monkeypatch):
    current, counts = [0], []
    made = plans_made(monkeypatch)
    monkeypatch.setattr(f"cryolike_data.transforms.polar.{name}", lambda *device: current[0])
    for current[0] in (1, 1, 2):
        to_polar(noise(2, 12, 12), PolarGrid(2.0, 0.25, 12))
        counts.append(len(made))
    assert counts == [1, 1, 2]


def test_a_plan_serves_no_other_thread(monkeypatch):
    images, grid = noise(2, 12, 12), PolarGrid(2.0, 0.25, 14)
    made = plans_made(monkeypatch)
    to_polar(images, grid)
    other = threading.Thread(target=to_polar, args=(images, grid), name="other")
    other.start()
    other.join()
    to_polar(images, grid)
    assert made == [threading.current_thread().name, "other"]


def test_a_nan_stays_in_its_image():
    grid = PolarGrid(4.0, 0.5, 8)
    images = noise(4, 16, 16)
    expected = to_polar(images, grid, eps=1e-12)
    images[1, 2, 2], images[2, 0, 0] = torch.nan, torch.inf
    ours = to_polar(images, grid, eps=1e-12)
    torch.testing.assert_close(ours[[0, 3]], expected[[0, 3]], rtol=0, atol=1e-9)
    assert bool(ours[[1, 2]].isnan().all())


def test_the_transform_of_a_gaussian_is_a_gaussian():
    box, sigma = 32, 1.5
    away = torch.arange(box, dtype=torch.float64) - box // 2
    image = torch.exp(-(away[:, None] ** 2 + away**2) / (2 * sigma**2))[None]
    grid = PolarGrid(5.0, 0.5, 8)
    k = 4 * np.pi / box * grid.radii[:, None]
    expected = 4 * np.pi / box * 2 * np.pi * sigma**2 * np.exp(-(sigma**2) * k**2 / 2)
    np.testing.assert_allclose(to_polar(image, grid, eps=1e-12)[0].numpy(), expected.repeat(8, 1), atol=1e-7)


def test_a_ring_of_angles_sums_to_a_bessel_function():
    # The mean over theta of exp(-i k x cos(theta)) is J0(k x).
    image = torch.zeros(1, 16, 16)
    image[0, 8, 11] = 1
    grid = PolarGrid(4.0, 0.5, 64)
    mean = to_polar(image, grid, eps=1e-12)[0].mean(-1).numpy()
    np.testing.assert_allclose(mean, np.pi / 4 * jv(0, 4 * np.pi / 16 * grid.radii * 3), atol=1e-11)


@pytest.mark.parametrize("short", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_pixels_of_every_shorter_type_are_transformed(short):
    images, grid = noise(3, 8, 8).to(short), PolarGrid(2.0, 0.5, 4)
    torch.testing.assert_close(to_polar(images, grid, eps=1e-12), to_polar_exact(images.double(), grid), rtol=0, atol=1e-10)


def test_a_transform_tells_what_it_does():
    transform = PolarTransform(PolarGrid(2.0, 0.5, 4), 8, n_trans=3, dtype=torch.complex64)
    told = "PolarTransform(PolarGrid(radius_max=2.0, dist_radii=0.5, n_inplanes=4), box=8, eps=1e-06, n_trans=3, complex64, cpu)"
    assert repr(transform) == told


def test_images_and_their_dtype_are_left_alone():
    images = noise(3, 8, 8).half()
    before = images.clone()
    assert to_polar(images, PolarGrid(2.0, 0.5, 4), eps=1e-6).dtype == torch.complex128
    assert torch.equal(images, before)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_normalised_transforms_integrate_to_one(dtype):
    grid = PolarGrid(4.0, 0.5, 6)
    fourier = torch.complex(noise(3, grid.n_shells, 6), noise(3, grid.n_shells, 6)).to(dtype)
    fourier[1] = 0
    normalized = normalize_polar(fourier, grid)
    power = (np.abs(normalized.numpy()) ** 2 * grid.integration_weights).sum((1, 2))
    np.testing.assert_allclose(power, [1, 0, 1], rtol=1e-6)
    assert normalized.dtype == dtype


@pytest.mark.parametrize("scale", [1e-25, 1e25])  # squares are beyond single precision
def test_very_faint_and_very_bright_transforms_are_normalised_like_others(scale):
    grid = PolarGrid(4.0, 0.5, 6)
    fourier = torch.complex(noise(3, grid.n_shells, 6), noise(3, grid.n_shells, 6))
    torch.testing.assert_close(normalize_polar(scale * fourier, grid), normalize_polar(fourier, grid))


def test_a_conjugate_view_is_normalised_as_the_numbers_that_it_shows():
    grid = PolarGrid(4.0, 0.5, 6)
    fourier = torch.complex(noise(3, grid.n_shells, 6), noise(3, grid.n_shells, 6))
    assert fourier.conj().is_conj()
    assert torch.equal(normalize_polar(fourier.conj(), grid), normalize_polar(fourier, grid).conj())


def test_numbers_of_a_grid_are_those_of_python():
    numbers = vars(PolarGrid(np.int64(8), np.float32(0.25), np.int32(32)))
    assert json.loads(json.dumps(numbers)) == {"radius_max": 8.0, "dist_radii": 0.25, "n_inplanes": 32}


@pytest.mark.parametrize(
    "arguments",
    [
        *[(0.0, 0.25, 4), (4.0, 0.0, 4), (float("inf"), 0.25, 4), (float("nan"), 0.25, 4)],
        *[(4.0, 0.25, n_inplanes) for n_inplanes in (0, 2.5, float("inf"), float("nan"))],
    ],
)
def test_impossible_grids_are_refused(arguments):
    with pytest.raises(ArgumentError, match="must be"):
        PolarGrid(*arguments)


@pytest.mark.parametrize("factor", [0, -1, float("inf"), float("nan")])
def test_a_resolution_that_is_none_is_refused_by_the_name_it_was_given_by(factor):
    with pytest.raises(ArgumentError, match=rf"resolution_factor={factor} must be positive"):
        PolarGrid.of_box(16, resolution_factor=factor)


@pytest.mark.parametrize("images", [torch.zeros(8, 8), torch.zeros(2, 9, 9), torch.zeros(2, 8, 9), torch.zeros(1, 2, 8, 8)])
def test_images_of_another_shape_are_refused(images):
    with pytest.raises(ArgumentError, match=r"\(B, 8, 8\)|square"):
        PolarTransform(PolarGrid(2.0, 0.5, 4), 8, eps=1e-6)(images)


@pytest.mark.parametrize("wrong", [{"box": 0}, {"eps": 0}, {"eps": float("nan")}, {"n_trans": 0}])
def test_impossible_plans_are_refused(wrong):
    with pytest.raises(ArgumentError, match="must all be positive"):
        PolarTransform(PolarGrid(2.0, 0.5, 4), **{"box": 8, "eps": 1e-6} | wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex32])
def test_a_dtype_that_transforms_do_not_have_is_refused(dtype):
    with pytest.raises(ArgumentError, match=rf"torch\.complex64 or torch\.complex128, not {dtype}"):
        to_polar(noise(1, 8, 8), PolarGrid(2.0, 0.5, 4), dtype=dtype)


@pytest.mark.parametrize("images", [torch.zeros(8, 8), torch.zeros(1, 2, 8, 8)])
def test_the_exact_transform_refuses_what_the_fast_one_refuses(images):
    with pytest.raises(ArgumentError, match=r"takes \(B, 8, 8\) images"):
        to_polar_exact(images, PolarGrid(2.0, 0.5, 4))


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArgumentError, match=r"device='cuda' needs a GPU"):
        PolarTransform(PolarGrid(2.0, 0.5, 4), 8, device="cuda")


def test_normalising_with_another_grid_is_refused():
    with pytest.raises(ArgumentError, match="5 shells x 4 angles"):
        normalize_polar(torch.zeros(2, 5, 6, dtype=torch.complex64), PolarGrid(2.0, 0.5, 4))


def test_transforms_in_inference_mode_and_outside_of_it_share_a_plan():
    images = torch.randn(3, 18, 18, generator=torch.Generator().manual_seed(3))
    kept = PolarTransform(PolarGrid(3.0, 0.5, 12), 18, eps=1e-6)
    expected = kept(images)
    with torch.inference_mode():
        validated = to_polar(images, PolarGrid(3.5, 0.5, 12), eps=1e-6)  # makes the plan
        made = PolarTransform(PolarGrid(3.0, 0.5, 12), 18, eps=1e-6)
        assert torch.equal(kept(images), expected)
    assert torch.equal(made(images), expected)
    assert torch.equal(to_polar(images, PolarGrid(3.5, 0.5, 12), eps=1e-6), validated)


@pytest.mark.parametrize("installed", [False, True])
def test_the_error_says_whether_cufinufft_is_missing_or_cannot_be_loaded(installed, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "cufinufft", raising=False)
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    if installed:
        (tmp_path / "cufinufft.py").write_text("raise ImportError('Could not find cufinufft library in system path')")
    told = "cannot be loaded: Could not find cufinufft library in system path" if installed else "needs cufinufft: pip"
    with pytest.raises(MissingDependencyError, match=rf"{told}.*cryolike-data\[cuda\]"):
        require_cufinufft()


@pytest.mark.parametrize(("dtype", "eps"), [(torch.complex128, 1e-12), (torch.complex64, 1e-6)])
def test_the_accuracy_is_cryolikes_for_the_dtype_where_none_is_given(dtype, eps):
    images, grid = torch.randn(3, 16, 16, dtype=torch.float64), PolarGrid(4.0, 0.5, 12)
    assert torch.equal(to_polar(images, grid, dtype=dtype), to_polar(images, grid, eps=eps, dtype=dtype))
    assert PolarTransform(grid, 16, dtype=dtype).eps == eps


def test_cufinufft_finds_the_libraries_that_pip_put_somewhere_else(monkeypatch, tmp_path):
    """Where it cannot be loaded, those of CUDA 12 are, each after those that it needs, and it is tried again."""
    (tmp_path / "cufinufft.py").write_text("import ctypes\nif not hasattr(ctypes, 'loaded'): raise ImportError('no CUDA')")
    # In two folders of packages, as where an environment sees those of the system.
    names = ("cufft/lib/libcufft.so.11", "cuda_runtime/lib/libcudart.so.12", "nvjitlink/lib/libnvJitLink.so.12")
    there = [tmp_path / folder / "nvidia" / name for folder, name in zip((".", "system", "system"), names, strict=True)]
    for path in there:
        path.parent.mkdir(parents=True)
        path.touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(tmp_path / "system")])
    for name in ("cufinufft", "nvidia"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    asked = []

    def load(path):
        asked.append(path)
        monkeypatch.setattr(ctypes, "loaded", True, raising=False)

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert require_cufinufft().__name__ == "cufinufft"
    assert asked == [str(path) for path in reversed(there)]
    monkeypatch.delitem(sys.modules, "cufinufft")


def test_a_library_of_cuda_that_cannot_be_loaded_is_a_missing_dependency(monkeypatch, tmp_path):
    (tmp_path / "cufinufft.py").write_text("raise ImportError('no CUDA')")
    library = tmp_path / "nvidia/cufft/lib/libcufft.so.11"
    library.parent.mkdir(parents=True)
    library.write_text("no library")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("cufinufft", "nvidia"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(MissingDependencyError, match=r"cannot be loaded: .*libcufft.*transform on the CPU"):
        require_cufinufft()


def test_without_finufft_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "finufft", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "cryolike-data\[fourier\]"'):
        PolarTransform(PolarGrid(2.0, 0.5, 4), 8, eps=1e-6)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("case", "radius_max", "eps", "tolerance"),
    [("A_indexed", 16.0, 1e-6, 1e-5), ("G_indexed_double", 8.0, 1e-12, 1e-12), ("D_indexed_mean2_desc32", 8.0, 1e-6, 1e-5)],
)
def test_it_is_cryolikes_transform(shared, case, radius_max, eps, tolerance):
    images = torch.load(shared / f"golden/{case}/phys/particles_phys_stack_000000.pt", weights_only=True)
    theirs = torch.load(shared / f"golden/{case}/fft/particles_fourier_stack_000000.pt", weights_only=True)
    grid = PolarGrid(radius_max, 0.25, 48)
    ours = normalize_polar(to_polar(images, grid, eps=eps), grid)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < tolerance


@pytest.mark.shared
def test_images_normalised_by_max_give_cryolikes_transform(likelihood_demo):
    images, theirs = (torch.from_numpy(likelihood_demo[name]) for name in ("phys", "images_fourier"))
    grid = PolarGrid(9.0, 0.25, 64)
    ours = normalize_polar(to_polar(Normalize("max")(images), grid, eps=1e-12), grid)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-11
