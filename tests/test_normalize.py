"""Normalisation against statistics computed in numpy float64."""

import warnings

import numpy as np
import pytest
import torch

from cryolike_data.errors import ArgumentError
from cryolike_data.transforms import Normalize

METHODS = ["max", "std", "background"]


def noise(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(8))


def outside(box, radius):
    away = np.arange(box) - box // 2
    return np.hypot(away[:, None], away) > radius * box


def test_max_subtracts_the_mean_and_divides_by_the_largest_magnitude():
    images = noise(4, 9, 9) * 3 + 1
    x = images.double().numpy()
    x = x - x.mean((1, 2), keepdims=True)
    np.testing.assert_allclose(Normalize("max")(images).numpy(), x / np.abs(x).max((1, 2), keepdims=True), atol=3e-7)


def test_std_gives_mean_zero_and_population_deviation_one():
    images = noise(4, 9, 9) * 3 + 1
    x = images.double().numpy()
    expected = (x - x.mean((1, 2), keepdims=True)) / x.std((1, 2), keepdims=True)
    np.testing.assert_allclose(Normalize("std")(images).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(("box", "radius"), [(16, 0.375), (15, 0.375), (16, 0.5), (16, 0.1)])
def test_background_measures_outside_the_radius_only(box, radius):
    images = noise(4, box, box) * 3 + 1
    x = images.double().numpy()
    part = x[:, outside(box, radius)]
    expected = (x - part.mean(1)[:, None, None]) / part.std(1)[:, None, None]
    np.testing.assert_allclose(Normalize("background", background_radius=radius)(images).numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_large_offset_costs_no_accuracy_in_single_precision(method):
    images = noise(3, 32, 32) + 1e4
    exact = Normalize(method)(images.double())
    torch.testing.assert_close(Normalize(method)(images).double(), exact, rtol=0, atol=2e-6)
    assert abs(float(exact.std())) < 1.1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_very_small_and_very_large_values_neither_underflow_nor_overflow(method, scale):
    images = noise(2, 16, 16)
    torch.testing.assert_close(Normalize(method)(images * scale), Normalize(method)(images), rtol=0, atol=2e-6)


@pytest.mark.parametrize("method", ["max", "std"])
def test_constant_images_become_zeros_and_are_counted_once(method):
    images = noise(5, 8, 8)
    images[1] = 0.1
    images[3] = 1e4 / 3
    with pytest.warns(UserWarning, match="2 of 5 images are constant") as caught:
        normalized = Normalize(method)(images)
    assert len(caught) == 1
    assert [bool((image == 0).all()) for image in normalized] == [False, True, False, True, False]
    assert bool(normalized.isfinite().all())


@pytest.mark.parametrize(("leading", "told"), [((), "1 of 1 images"), ((2, 3), "6 of 6 images")], ids=str)
def test_the_warning_counts_images_of_any_leading_shape_and_points_at_the_call(leading, told):
    with pytest.warns(UserWarning, match=told) as caught:
        Normalize("std")(torch.ones(*leading, 8, 8))
    assert caught[0].filename == __file__


def test_every_constant_image_of_a_large_batch_is_counted():
    with pytest.warns(UserWarning, match="600 of 601 images are constant"):
        Normalize("max")(torch.cat([torch.ones(600, 64, 64), noise(1, 64, 64)]))


@pytest.mark.parametrize("offset", [10, 1e4, -1e6])
@pytest.mark.parametrize("method", METHODS)
def test_an_offset_makes_no_difference(method, offset):
    images = noise(3, 16, 16) + offset
    images[:, 6:10, 6:10] += 2
    x = images.double().numpy()
    measured = outside(16, 0.375) if method == "background" else np.ones((16, 16), bool)
    x = x - x[:, measured].mean(1)[:, None, None]
    scale = np.abs(x).max((1, 2)) if method == "max" else x[:, measured].std(1)
    np.testing.assert_allclose(Normalize(method)(images).numpy(), x / scale[:, None, None], atol=1e-5)


def test_a_constant_background_gives_zeros():
    images = torch.zeros(2, 16, 16)
    images[:, 8, 8] = 1
    images[1] += noise(16, 16)
    with pytest.warns(UserWarning, match="1 of 2 images have a constant background"):
        normalized = Normalize("background")(images)
    assert bool((normalized[0] == 0).all())
    assert float(normalized[1].abs().max()) > 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.filterwarnings("ignore:.* constant")
def test_an_image_is_the_same_whatever_lies_beside_it(method, dtype):
    images = noise(7, 24, 24)
    images[1] += 300
    images[2] = 0
    images[3] = 7
    images[4] -= 3  # about as much as the image itself
    images[5] *= 1e-3
    together = Normalize(method)(images.to(dtype))
    for k, image in enumerate(images.to(dtype)):
        assert torch.equal(Normalize(method)(image), together[k])
    assert not together[2:4].any()


def test_images_of_a_large_batch_with_an_offset_stay_in_their_places():
    images = noise(600, 64, 64) + 300  # more than one group on a CPU
    together = Normalize("max")(images)
    for row in (0, 300, 599):
        assert torch.equal(together[row], Normalize("max")(images[row]))


@pytest.mark.parametrize("method", METHODS)
def test_a_nan_stays_in_its_image(method):
    images = noise(3, 8, 8)
    alone = Normalize(method)(images[2])
    images[1, 0, 0] = torch.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        normalized = Normalize(method)(images)
    assert torch.equal(normalized[2], alone)
    assert bool(normalized[1].isnan().any())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_shape_and_dtype_are_kept_and_the_input_is_untouched(method, dtype):
    images = noise(2, 3, 8, 8).to(dtype)
    before = images.clone()
    normalized = Normalize(method)(images)
    assert (normalized.shape, normalized.dtype) == (images.shape, dtype)
    assert torch.equal(images, before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 30])
def test_half_precision_costs_no_more_than_the_rounding_of_the_result(method, dtype, offset):
    images = (noise(3, 24, 24) + offset).to(dtype)
    exact = Normalize(method)(images.double())
    torch.testing.assert_close(Normalize(method)(images), exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_that_is_given_for_the_result_gets_it(method):
    images = noise(4, 12, 12)
    images[1] += 300
    images[2] = 7
    room = torch.full_like(images, torch.nan)
    normalized, constant = Normalize(method).apply(images, out=room)
    assert normalized.data_ptr() == room.data_ptr()
    assert constant == 1
    expected, _ = Normalize(method).apply(images)
    assert torch.equal(room, expected)


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_batch_stays_empty(method):
    assert Normalize(method)(torch.zeros(0, 8, 8)).shape == (0, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"method": "l2"}, "'max', 'std', 'background'"),
        ({"method": "background", "background_radius": 0}, "fraction of the box"),
        ({"method": "background", "background_radius": 0.71}, "fraction of the box"),
        ({"method": "background", "background_radius": 0.5 * 2**0.5}, "fraction of the box"),  # as far away as the corners
        ({"method": "background", "background_radius": float("nan")}, "fraction of the box"),
        ({"method": "std", "background_radius": 0.3}, "Leave it out"),
    ],
)
def test_arguments_that_never_work_are_refused(arguments, told):
    with pytest.raises(ArgumentError, match=told):
        Normalize(**arguments)


def test_a_radius_without_background_is_refused_with_the_largest_that_works():
    with pytest.raises(ArgumentError, match=r"less than 0\.6061"):
        Normalize("background", background_radius=0.65)(noise(2, 7, 7))


def test_integer_images_are_refused():
    with pytest.raises(ArgumentError, match="floating"):
        Normalize("max")(torch.zeros(8, 8, dtype=torch.int8))
