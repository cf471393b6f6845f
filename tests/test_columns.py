"""Columns of a batch: lazy, in step, and moved together."""

from __future__ import annotations

import itertools
import pickle
import sys
import threading
from types import FrameType
from typing import Any

import pytest
import torch

from cryolike_data.columns import Columns, concatenate, concatenate_tensors


def some_columns() -> dict[str, torch.Tensor]:
    return {
        "uid": torch.tensor([-5, 7, 2**62]),
        "ctf/defocus_u": torch.tensor([1.0, 2.0, 3.0]),
        "ctf/tilt_A": torch.arange(6.0).reshape(3, 2),
        "pose": torch.arange(9, dtype=torch.float64).reshape(3, 3),
        "index": torch.arange(3),
    }


def test_columns_are_made_when_one_is_used_and_only_once() -> None:
    made: list[int] = []

    def make() -> dict[str, torch.Tensor]:
        made.append(1)
        return some_columns()

    columns = Columns(make)
    assert not made
    assert columns.tensors["uid"].tolist() == [-5, 7, 2**62]
    assert columns.ctf is not None
    assert len(made) == 1


@pytest.mark.parametrize("line", [0, 1, 2])
def test_columns_may_be_made_by_another_thread_in_between(line: int) -> None:
    columns, passed = Columns(some_columns), itertools.count()

    def let_another_thread_in(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line" and next(passed) == line:
            another = threading.Thread(target=lambda: columns.tensors)
            another.start()
            another.join()
        return let_another_thread_in

    before = sys.gettrace()
    sys.settrace(let_another_thread_in)
    try:
        names = columns.names
    finally:
        sys.settrace(before)
    assert next(passed) > line
    assert names == tuple(some_columns())


def test_moving_keeps_every_value_dtype_and_shape() -> None:
    columns = Columns(some_columns)
    moved = columns.to("cpu")
    assert moved.names == columns.names
    for name, column in some_columns().items():
        assert torch.equal(moved.tensors[name], column)
        assert moved.tensors[name].dtype == column.dtype


def test_moving_takes_one_transfer_for_each_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = Columns(some_columns())
    transfers: list[torch.dtype] = []
    original = torch.Tensor.to

    def counted(self: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        transfers.append(self.dtype)
        return original(self, *args, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch.Tensor, "to", counted)
    columns.to("cpu")
    assert sorted(map(str, transfers)) == ["torch.float32", "torch.float64", "torch.int64"]


def test_columns_that_were_moved_together_are_nothing_to_each_other_for_autograd() -> None:
    moved = Columns(some_columns()).to("cpu").tensors
    gain = torch.nn.Parameter(torch.ones(3))
    loss = (moved["ctf/defocus_u"] * gain).sum()
    moved["ctf/tilt_A"].add_(gain[:, None])
    assert not moved["ctf/defocus_u"].requires_grad
    loss.backward()
    assert torch.equal(gain.grad, some_columns()["ctf/defocus_u"])


def test_a_pickle_holds_the_values_and_not_what_makes_them() -> None:
    columns = Columns(lambda: some_columns())  # a lambda cannot be pickled
    again = pickle.loads(pickle.dumps(columns))
    assert torch.equal(again.tensors["pose"], some_columns()["pose"])


NOT_FOR_NUMPY: dict[str, torch.Tensor] = {
    "elsewhere": torch.ones(3, device="meta"),
    "with a gradient": torch.ones(3, requires_grad=True),
    "bfloat16": torch.ones(3, dtype=torch.bfloat16),
    "conjugate": torch.full((3,), 1j).conj(),
    "negative": torch.full((3,), 1j).conj().imag,
    "sparse": torch.ones(3).to_sparse(),
}


@pytest.mark.parametrize("kind", NOT_FOR_NUMPY)
def test_columns_that_numpy_cannot_show_can_be_pickled(kind: str) -> None:
    column = NOT_FOR_NUMPY[kind]
    again = pickle.loads(pickle.dumps(Columns({"x": column}))).tensors["x"]
    assert (again.dtype, again.device, again.layout) == (column.dtype, column.device, column.layout)
    assert again.requires_grad == column.requires_grad
    assert kind == "elsewhere" or torch.equal(again.to_dense().detach(), column.to_dense().detach())


def test_concatenated_columns_follow_each_other() -> None:
    both = concatenate([Columns(some_columns), Columns(some_columns)])
    assert both.tensors["uid"].tolist() == [-5, 7, 2**62] * 2
    assert both.tensors["ctf/tilt_A"].shape == (6, 2)


def test_columns_without_optics_have_no_ctf() -> None:
    assert Columns({"uid": torch.zeros(1)}).ctf is None


def test_no_rows_move_to_another_device() -> None:
    columns = Columns({"index": torch.arange(3), "pose": torch.zeros(3, 3), "M": torch.zeros(3, 2, 2)})
    empty = columns.map(lambda column: column[:0]).to("meta")
    assert {name: tuple(column.shape) for name, column in empty.tensors.items()} == {"index": (0,), "pose": (0, 3), "M": (0, 2, 2)}


def test_numbers_that_numpy_does_not_know_are_joined() -> None:
    parts = [torch.ones(2, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)]
    joined = concatenate_tensors(parts)
    assert joined.dtype == torch.bfloat16
    assert joined.tolist() == [1, 1, 0]
