"""Rotation vectors and matrices against scipy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from cryolike_data.errors import ArgumentError
from cryolike_data.rotations import rotation_matrices, rotation_vectors

directions = st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda v: np.linalg.norm(v) > 0.1).map(lambda v: np.array(v) / np.linalg.norm(v))
# Also angles at which formulas break down: next to nothing, and on both sides of half a turn.
small = st.floats(-16, -2).map(lambda power: 10**power)
angles = st.one_of(st.floats(0, 3 * np.pi), small, small.map(lambda a: np.pi - a), small.map(lambda a: np.pi + a))
rotvecs = st.builds(lambda direction, angle: direction * angle, directions, angles)


def tensor(vectors: object) -> torch.Tensor:
    return torch.tensor(np.array(vectors, np.float64))


def scipy_matrix(vector: np.ndarray) -> np.ndarray:
    return Rotation.from_rotvec(vector).as_matrix()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(rotvecs)
@example(np.zeros(3))
@example(np.array([0, np.pi, 0]))
def test_matrices_are_those_of_scipy(vector: np.ndarray) -> None:
    matrices = rotation_matrices(tensor([vector]))
    assert matrices.dtype == torch.float64
    np.testing.assert_allclose(matrices[0], scipy_matrix(vector), rtol=0, atol=1e-14)


def test_a_vector_turns_right_handed_about_its_direction() -> None:
    turned = rotation_matrices(tensor([[0, 0, np.pi / 2]]))[0] @ tensor([1, 0, 0])
    np.testing.assert_allclose(turned, [0, 1, 0], atol=1e-15)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(directions, st.one_of(st.floats(0, 3.1), small, small.map(lambda a: np.pi - a)))
def test_vectors_shorter_than_half_a_turn_come_back(direction: np.ndarray, angle: float) -> None:
    vector = direction * angle
    back = rotation_vectors(rotation_matrices(tensor([vector])))[0].numpy()
    if np.pi - angle < 1e-14:  # as good as half a turn, which -v is too
        back *= np.sign(back @ vector)
    # The numbers of a matrix hold the vector to their rounding, and a small angle in relation to itself.
    np.testing.assert_allclose(back, vector, rtol=0, atol=1e-14 * max(angle, 1e-2))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(rotvecs)
@example(np.zeros(3))
@example(np.array([np.pi, 0, 0]))
@example(np.array([0, np.pi, 0]))
@example(np.array([0, 0, -np.pi]))
@example(np.array([1, -1, 0]) * np.pi / np.sqrt(2))
def test_vectors_of_any_matrix_are_short_and_give_it_back(vector: np.ndarray) -> None:
    matrix = scipy_matrix(vector)
    back = rotation_vectors(tensor([matrix]))
    assert back.dtype == torch.float64
    assert float(torch.linalg.vector_norm(back)) <= np.pi + 1e-15
    np.testing.assert_allclose(scipy_matrix(back[0].numpy()), matrix, rtol=0, atol=1e-14)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(rotvecs, rotvecs)
def test_product_of_matrices_is_the_composed_rotation(first: np.ndarray, second: np.ndarray) -> None:
    one, other = rotation_matrices(tensor([first, second]))
    composed = (Rotation.from_rotvec(first) * Rotation.from_rotvec(second)).as_matrix()
    np.testing.assert_allclose(one @ other, composed, rtol=0, atol=1e-14)
    np.testing.assert_allclose(rotation_matrices(rotation_vectors((one @ other)[None]))[0], composed, rtol=0, atol=1e-14)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(rotvecs)
def test_the_opposite_vector_is_the_inverse_rotation(vector: np.ndarray) -> None:
    there, back = rotation_matrices(tensor([vector, -vector]))
    np.testing.assert_allclose(there @ back, np.eye(3), rtol=0, atol=1e-14)


def test_gradients_pass_through_no_turn_at_all() -> None:
    vectors = torch.tensor([[0.0, 0, 0], [0.1, 0.2, 0.3]], dtype=torch.float64, requires_grad=True)
    rotation_vectors(rotation_matrices(vectors)).sum().backward()
    torch.testing.assert_close(vectors.grad, torch.ones_like(vectors))


def test_rows_are_turned_each_by_itself() -> None:
    vectors = np.random.default_rng(0).normal(size=(500, 3)) * 2
    matrices = rotation_matrices(tensor(vectors))
    np.testing.assert_allclose(matrices, Rotation.from_rotvec(vectors).as_matrix(), rtol=0, atol=1e-14)
    np.testing.assert_allclose(rotation_vectors(matrices), Rotation.from_matrix(matrices.numpy()).as_rotvec(), rtol=0, atol=1e-13)


def test_no_rows_give_no_rows() -> None:
    assert rotation_matrices(torch.empty(0, 3)).shape == (0, 3, 3)
    assert rotation_vectors(torch.empty(0, 3, 3)).shape == (0, 3)


def test_matrices_in_single_precision_are_taken() -> None:
    vectors = tensor(np.random.default_rng(0).uniform(-1.5, 1.5, (500, 3)))
    back = rotation_vectors(rotation_matrices(vectors).float())
    assert back.dtype == torch.float64
    np.testing.assert_allclose(back, vectors, atol=1e-6)


@pytest.mark.parametrize("shape", [(3,), (4, 2), (2, 4, 3)])
def test_vectors_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match=r"\(S, 3\)"):
        rotation_matrices(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(3, 3), (4, 3), (2, 3, 4)])
def test_matrices_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match=r"\(S, 3, 3\)"):
        rotation_vectors(torch.zeros(shape))


@pytest.mark.parametrize("wrong", [np.diag([1.0, 1, -1]), 1.01 * np.eye(3), np.full((3, 3), np.nan)], ids=["mirror", "scaled", "nan"])
def test_a_matrix_that_is_no_rotation_is_named(wrong: np.ndarray) -> None:
    with pytest.raises(ArgumentError, match="Matrix 1 is not a rotation"):
        rotation_vectors(tensor([np.eye(3), wrong]))
