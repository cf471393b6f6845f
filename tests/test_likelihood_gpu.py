"""Polar transforms and the likelihood on a GPU: the same numbers as on a CPU."""

import importlib.util

import numpy as np
import pytest
import torch

from cryolike_data import IndexedDataset, PolarCollate, PolarGrid, stream
from cryolike_data.demo import write_project
from cryolike_data.errors import MissingDependencyError
from cryolike_data.likelihood import Templates, displacement_grid, integrated_log_likelihood, stream_likelihood
from cryolike_data.transforms import to_polar

pytestmark = pytest.mark.gpu

GRID = PolarGrid(8.0, 0.25, 64)
DISPLACEMENTS_A = displacement_grid(5, 2.5)
HAS_CUFINUFFT = importlib.util.find_spec("cufinufft") is not None
needs_cufinufft = pytest.mark.skipif(not HAS_CUFINUFFT, reason="cufinufft is not installed")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return write_project(tmp_path_factory.mktemp("gpu") / "project", n_particles=40, box=32, pixel_size=4.0)


@pytest.fixture(scope="module")
def particles(project):
    return IndexedDataset(project.indexed)


@pytest.fixture(scope="module")
def templates(project):
    return Templates.from_volume(project.volume, GRID, step_deg=30)


@needs_cufinufft
@pytest.mark.parametrize(("dtype", "error"), [(torch.complex64, 3e-5), (torch.complex128, 1e-10)])
@pytest.mark.parametrize("count", [1, 7, 200])
def test_polar_transforms_on_a_gpu_are_those_of_a_cpu(count, dtype, error):
    images = torch.randn(count, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = to_polar(images, GRID, eps=1e-12)
    ours = to_polar(images.cuda(), GRID, eps=1e-12 if dtype == torch.complex128 else 1e-6, dtype=dtype)
    assert ours.is_cuda
    assert ours.dtype == dtype
    assert float((ours.cpu() - expected).abs().max() / expected.abs().max()) < error


@needs_cufinufft
def test_a_stream_to_a_gpu_gives_the_batches_of_a_cpu(particles):
    def batches(device):
        return list(stream(particles, batch_size=16, polar=GRID, normalize="max", unit_power=True, device=device))

    for ours, expected in zip(batches("cuda"), batches("cpu"), strict=True):
        assert ours.fourier.is_cuda
        assert ours.polar_ctf.is_cuda
        scale = float(expected.fourier.abs().max())
        np.testing.assert_allclose(ours.fourier.cpu().numpy(), expected.fourier.numpy(), rtol=0, atol=1e-4 * scale)
        np.testing.assert_allclose(ours.polar_ctf.cpu().numpy(), expected.polar_ctf.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 5e-3), (torch.float64, 1e-8)])
@pytest.mark.parametrize("memory_bytes", [1, 1 << 20, None])
def test_the_likelihood_on_a_gpu_is_that_of_a_cpu(particles, templates, dtype, error, memory_bytes):
    batch = PolarCollate(GRID, normalize="max", unit_power=True, dtype=dtype)(particles.batch(range(20)))
    chosen = templates.to(dtype=dtype.to_complex())
    expected = integrated_log_likelihood(batch, chosen, DISPLACEMENTS_A, by_template=True)
    ours = integrated_log_likelihood(batch.to("cuda"), chosen.to("cuda"), DISPLACEMENTS_A, by_template=True, memory_bytes=memory_bytes)
    np.testing.assert_allclose(ours.log_likelihood.numpy(), expected.log_likelihood.numpy(), rtol=0, atol=error)
    np.testing.assert_allclose(ours.by_template.numpy(), expected.by_template.numpy(), rtol=0, atol=error)
    if dtype == torch.float64:  # poses that are equally likely but for rounding are told apart
        assert torch.equal(ours.template, expected.template)
        assert torch.equal(ours.pose, expected.pose)


@needs_cufinufft
def test_streamed_likelihoods_on_a_gpu_are_those_of_a_cpu(particles, templates, tmp_path):
    expected = stream_likelihood(particles, templates, DISPLACEMENTS_A, batch_size=16, dtype=torch.float64)
    ours = stream_likelihood(
        particles, templates, DISPLACEMENTS_A, batch_size=16, dtype=torch.float64, device="cuda", output=tmp_path / "out"
    )
    np.testing.assert_allclose(ours["log_likelihood"], expected["log_likelihood"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(ours["template"], expected["template"])


@pytest.mark.skipif(HAS_CUFINUFFT, reason="cufinufft is installed")
def test_without_cufinufft_the_error_names_the_extra():
    with pytest.raises(MissingDependencyError, match=r"cryolike-data\[cuda\]"):
        to_polar(torch.zeros(1, 32, 32, device="cuda"), GRID, eps=1e-6)
