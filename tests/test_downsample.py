"""Downsampling against closed forms and a slow full-plane reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cryolike_data.errors import ArgumentError
from cryolike_data.transforms import Downsample, crop_fourier, pool
from cryolike_data.transforms.downsample import crop_by_products

SIZES = [(16, 8), (16, 12), (16, 15), (16, 7), (16, 2), (16, 1), (15, 8), (15, 14), (15, 7), (15, 5), (15, 2), (15, 1), (3, 2), (2, 1)]


def noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(5))


def slow_crop(images, box):
    """Centred complex transform, centred crop, real part of the inverse, mean preserved."""
    source, axes = images.shape[-1], (-2, -1)
    first = source // 2 - box // 2
    spectrum = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(images, axes=axes)), axes=axes)
    kept = spectrum[..., first : first + box, first : first + box]
    return np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(kept, axes=axes)), axes=axes).real * (box / source) ** 2


def waves(box, amplitudes):
    """A sum of plane waves on a box x box grid whose origin is the pixel box // 2; the field of view has length 1."""
    at = (np.arange(box) - box // 2) / box
    angle = [(2 * np.pi * (ky * at[:, None] + kx * at) + phase, a) for (ky, kx, phase, a) in amplitudes]
    return sum(a * np.cos(x) for x, a in angle)


def hartley(image):
    spectrum = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(image)))
    return spectrum.real - spectrum.imag


@pytest.mark.parametrize(("source", "box"), SIZES)
def test_fourier_crop_equals_the_full_plane_reference(source, box):
    images = noise(3, source, source)
    np.testing.assert_allclose(crop_fourier(images, box).numpy(), slow_crop(images.numpy(), box), atol=1e-14)


@pytest.mark.parametrize("crop", [crop_fourier, crop_by_products])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_fourier_crop_equals_the_reference_for_any_size(crop, data):
    source = data.draw(st.integers(1, 24))
    box = data.draw(st.integers(1, source))
    images = noise(2, source, source)
    np.testing.assert_allclose(crop(images, box).numpy(), slow_crop(images.numpy(), box), atol=1e-13)


def test_products_with_matrices_keep_single_precision():
    images = noise(8, 128, 128)
    found = crop_by_products(images.float(), 64)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), slow_crop(images.numpy(), 64), atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_with_matrices_keep_single_precision_in_a_program_that_computes_in_less(dtype):
    images = noise(4, 128, 128).float() * 1e5
    expected = crop_by_products(images, 64)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(crop_by_products(images, 64), expected)
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(("source", "box"), SIZES)
def test_a_constant_stays_the_same_constant(source, box):
    torch.testing.assert_close(crop_fourier(torch.full((source, source), 2.5), box), torch.full((box, box), 2.5), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("source", "box"), [(32, 16), (32, 15), (33, 16), (33, 15), (33, 32)])
def test_a_band_limited_image_is_resampled_exactly(source, box):
    amplitudes = [(0, 0, 0, 3), (1, 2, 0.3, 1), (-5, 4, 1.1, 0.7), (7, -7, 2, 0.5), (0, 6, 0.4, 1), (3, 0, 5, 2)]
    fine, coarse = waves(source, amplitudes), waves(box, amplitudes)
    ours = crop_fourier(torch.from_numpy(fine).float(), box)
    np.testing.assert_allclose(ours.numpy(), coarse, atol=5e-6)


@pytest.mark.parametrize(("source", "box"), [(32, 16), (32, 15), (33, 16), (33, 15), (48, 20)])
def test_the_centre_pixel_stays_the_centre_pixel(source, box):
    image = torch.zeros(source, source)
    image[source // 2, source // 2] = 1
    assert int(crop_fourier(image, box).argmax()) == (box // 2) * box + box // 2


@pytest.mark.parametrize(("source", "box"), [(32, 16), (32, 24)])
def test_it_is_the_hartley_crop_without_its_missing_scale_below_nyquist(source, box):
    image = noise(source, source)
    first = source // 2 - box // 2
    kept = hartley(image.numpy())[first : first + box, first : first + box].copy()
    kept[0] = kept[:, 0] = 0
    theirs = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(kept)))
    ours = np.fft.fft2(crop_fourier(image, box).numpy() * (source / box) ** 2)
    ours[box // 2] = ours[:, box // 2] = 0
    np.testing.assert_allclose(np.fft.ifft2(ours).real, (theirs.real - theirs.imag) / box**2, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["fourier", "mean", "max"])
def test_the_dtype_is_kept(dtype, method):
    images = noise(2, 3, 8, 8).to(dtype)
    smaller = Downsample(factor=2, method=method)(images)
    assert (smaller.dtype, tuple(smaller.shape)) == (dtype, (2, 3, 4, 4))


def test_half_precision_is_computed_in_single():
    images = noise(4, 16, 16).half()
    assert torch.equal(crop_fourier(images, 8), crop_fourier(images.float(), 8).half())


@pytest.mark.parametrize("box", [31, 32])
def test_white_noise_shrinks_by_the_ratio_of_the_boxes(box):
    images = noise(64, 64, 64)
    # Averaging +Nyquist and -Nyquist halves the variance of that row and column of an even box.
    kept = box**2 - (0 if box % 2 else box - 0.5)
    assert crop_fourier(images, box).std().item() == pytest.approx(kept**0.5 / 64, rel=0.004)


def test_the_nyquist_wave_of_an_even_box_is_the_mean_of_both_signs():
    # The coefficients of cos(2 pi 4 u + phase) are exp(+-i phase) / 2; their mean is cos(phase) / 2.
    image = torch.from_numpy(waves(32, [(0, 4, 0.6, 1)]))
    expected = np.tile((-1.0) ** (np.arange(8) - 4) * np.cos(0.6) / 2, (8, 1))
    np.testing.assert_allclose(crop_fourier(image, 8).numpy(), expected, atol=1e-13)


def test_large_batches_give_what_single_images_give():
    images = noise(40, 256, 256, dtype=torch.float32)  # more than one group on a CPU
    for row in (0, 17, 39):
        torch.testing.assert_close(crop_fourier(images, 32)[row], crop_fourier(images[row], 32), rtol=0, atol=1e-6)


def test_leading_axes_and_strides_do_not_matter():
    images = noise(2, 3, 10, 10)
    turned = crop_fourier(images.transpose(-1, -2), 5)
    torch.testing.assert_close(turned, crop_fourier(images, 5).transpose(-1, -2))
    assert turned.shape == (2, 3, 5, 5)


def test_an_empty_batch_stays_empty():
    assert crop_fourier(torch.zeros(0, 8, 8), 4).shape == (0, 4, 4)
    assert pool(torch.zeros(0, 8, 8), 2, "mean").shape == (0, 4, 4)


def test_the_images_are_left_as_they_were():
    images = noise(2, 9, 9)
    before = images.clone()
    crop_fourier(images, 4)
    pool(images, 3, "max")
    assert torch.equal(images, before)


def test_gradients_pass_through_the_crop():
    images = noise(1, 6, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: crop_fourier(x, 4), (images,))


@pytest.mark.parametrize(("method", "function"), [("mean", np.mean), ("max", np.max)])
def test_pooling_reduces_blocks_of_pixels(method, function):
    images = noise(2, 2, 12, 12)
    blocks = images.numpy().reshape(2, 2, 4, 3, 4, 3)
    np.testing.assert_allclose(pool(images, 3, method).numpy(), function(blocks, axis=(-3, -1)), rtol=1e-14, atol=1e-16)


def test_pooling_half_precision_does_not_overflow():
    assert pool(torch.full((2, 2), 60000.0, dtype=torch.float16), 2, "mean").item() == 60000


@pytest.mark.parametrize(
    "rule", [Downsample(factor=1), Downsample(box=8), Downsample(box=8, method="mean"), Downsample(factor=1, method="max")]
)
def test_the_same_box_is_the_same_images(rule):
    images = noise(2, 8, 8)
    assert rule(images) is images


@pytest.mark.parametrize(
    ("rule", "source", "box"),
    [
        (Downsample(factor=2), 64, 32),
        (Downsample(factor=3, method="mean"), 63, 21),
        (Downsample(box=17), 64, 17),
        (Downsample(box=16, method="max"), 64, 16),
    ],
)
def test_the_field_of_view_is_kept(rule, source, box):
    assert rule.output_box(source) == box
    assert rule.output_pixel_size(1.3, source) * box == pytest.approx(1.3 * source, rel=1e-12)
    assert rule(torch.zeros(source, source)).shape == (box, box)


def test_a_factor_may_be_a_whole_float():
    assert Downsample(factor=2.0) == Downsample(factor=2)


def test_repr_shows_how_it_was_made():
    assert repr(Downsample(box=64)) == "Downsample(box=64, method='fourier')"
    assert repr(Downsample(factor=2, method="mean")) == "Downsample(factor=2, method='mean')"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "exactly one of"),
        ({"factor": 2, "box": 8}, "exactly one of"),
        ({"factor": 1.5}, "factor=1.5 must be a positive integer; for other ratios pass box="),
        ({"factor": 0}, "positive integer"),
        ({"factor": -2}, "positive integer"),
        ({"factor": True}, "positive integer"),
        ({"factor": "2"}, "positive integer"),
        ({"box": 64.0}, "positive integer"),
        ({"box": 0}, "positive integer"),
        ({"box": False}, "positive integer"),
        ({"box": 8, "method": "median"}, "'fourier', 'mean', 'max'"),
    ],
)
def test_arguments_that_never_work_are_refused(arguments, told):
    with pytest.raises(ArgumentError, match=told):
        Downsample(**arguments)


@pytest.mark.parametrize(
    ("rule", "source", "told"),
    [
        (Downsample(factor=4), 66, "factors that do: 1, 2, 3, 6, 11, 22, 33, 66, or box=16"),
        (Downsample(factor=4, method="mean"), 66, r"factors that do: 1, 2, 3, 6, 11, 22, 33, 66\."),
        (Downsample(box=12, method="max"), 64, "boxes that work: 1, 2, 4, 8, 16, 32, 64"),
        (Downsample(box=65), 64, "box=65 is larger than the images"),
    ],
)
def test_a_source_box_that_does_not_fit_is_told_what_would(rule, source, told):
    with pytest.raises(ArgumentError, match=told):
        rule.output_box(source)
    with pytest.raises(ArgumentError, match=told):
        rule(torch.zeros(source, source))


@pytest.mark.parametrize(
    ("images", "told"),
    [(torch.zeros(3, 8, 9), "square"), (torch.zeros(8), "square"), (torch.zeros(8, 8, dtype=torch.int16), "floating")],
)
def test_images_that_cannot_be_downsampled_are_refused(images, told):
    for call in (lambda: crop_fourier(images, 4), lambda: pool(images, 2, "mean"), lambda: Downsample(box=4)(images)):
        with pytest.raises(ArgumentError, match=told):
            call()


@pytest.mark.parametrize("box", [0, -1, 9, 4.0, True])
def test_crop_to_an_impossible_box_is_refused(box):
    with pytest.raises(ArgumentError, match="box="):
        crop_fourier(torch.zeros(8, 8), box)


@pytest.mark.parametrize(("factor", "method"), [(3, "mean"), (0, "mean"), (2, "fourier")])
def test_impossible_pooling_is_refused(factor, method):
    with pytest.raises(ArgumentError, match=r"factor|method"):
        pool(torch.zeros(8, 8), factor, method)


def test_arrays_are_refused_by_name():
    with pytest.raises(ArgumentError, match=r"a torch tensor, such as batch\.images, and not a ndarray"):
        Downsample(box=4)(np.zeros((1, 8, 8), np.float32))


@pytest.mark.parametrize("box", [8, 7])
def test_images_that_are_one_repeated_are_cropped_as_their_copies_are(box):
    image = torch.randn(1, 16, generator=torch.Generator().manual_seed(4))
    for images in (image.expand(16, 16), image[None].expand(5, 16, 16), image.T.expand(5, 16, 16)):
        assert torch.equal(crop_fourier(images, box), crop_fourier(images.clone(memory_format=torch.contiguous_format), box))
