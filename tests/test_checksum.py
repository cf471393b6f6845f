"""CRC32C: the values of the standard, whichever library computes them, in one piece or in several."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cryolike_data.checksum as checksum
from cryolike_data.checksum import crc32c

# RFC 3720, B.4.
KNOWN = {bytes(32): 0x8A9136AA, b"\xff" * 32: 0x62A8AB43, bytes(range(32)): 0x46DD794E, bytes(range(31, -1, -1)): 0x113FDB5C}


@pytest.fixture(params=["as installed", "through google_crc32c"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "as installed":
        monkeypatch.setattr(checksum, "_extend", lambda: None)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("data", KNOWN, ids=["zeros", "ones", "up", "down"])
def test_values_are_those_of_the_standard(data: bytes) -> None:
    assert crc32c(data) == KNOWN[data]
    assert crc32c(np.frombuffer(data, np.uint8)) == KNOWN[data]
    assert crc32c(np.frombuffer(data, "<f4")) == KNOWN[data]


@pytest.mark.parametrize("error", [OSError("cannot be loaded"), AttributeError("no such function")], ids=repr)
def test_a_library_whose_function_cannot_be_had_by_itself_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    monkeypatch.setattr(checksum, "_extend", checksum._extend.__wrapped__)
    for data, known in KNOWN.items():
        assert crc32c(np.frombuffer(data, np.uint8)) == known


@given(data=st.binary(max_size=300), cut=st.integers(0, 300))
def test_pieces_add_up(data: bytes, cut: int) -> None:
    array = np.frombuffer(data, np.uint8)
    assert crc32c(array[cut:], crc32c(array[:cut])) == crc32c(data)


@pytest.mark.usefixtures("library")
def test_nothing_leaves_the_checksum_as_it_is() -> None:
    assert crc32c(np.empty(0, np.uint8), 1234) == crc32c(b"", 1234) == 1234
