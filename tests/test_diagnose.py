"""What ``cryolike-data bench`` measures and says. The figures themselves are not tested."""

from __future__ import annotations

from pathlib import Path

import pytest

from cryolike_data import IndexedDataset
from cryolike_data.cli import main
from cryolike_data.demo import DemoProject
from cryolike_data.diagnose import Figure, _sentence, diagnose


def figures(*, copy: float, warm: float, cold: float | None = None) -> list[Figure]:
    found = [Figure("copy in memory (floor)", copy), Figure("stream, warm, random order", warm, "copy in memory", warm / copy)]
    return found if cold is None else [*found, Figure("stream, cold, random order", cold, "sequential read, cold", 1.0)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"copy": 10e9, "warm": 9e9, "cold": 1e9}, "disk is the bottleneck: data that are in memory come 9.0 times as fast"),
        ({"copy": 10e9, "warm": 9e9, "cold": 8e9}, "Memory is the bottleneck"),
        ({"copy": 10e9, "warm": 1e9}, "Small images or batches"),
    ],
)
def test_the_sentence_names_what_is_slow(given: dict[str, float], said: str) -> None:
    assert said in _sentence(figures(**given))


def test_shares_are_of_the_floor_they_name(demo: DemoProject) -> None:
    found, _ = diagnose(IndexedDataset(demo.indexed), batch_size=16, cold=False)
    copy, warm = found[:2]
    assert warm.floor == "copy in memory"
    assert warm.share == pytest.approx(warm.bytes_per_second / copy.bytes_per_second)


def test_no_more_is_read_than_allowed(demo: DemoProject, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = IndexedDataset(demo.indexed)
    longest: list[int] = []
    original = IndexedDataset.read_rows
    monkeypatch.setattr(IndexedDataset, "read_rows", lambda self, rows, out=None: longest.append(len(self)) or original(self, rows, out))
    diagnose(dataset, batch_size=4, max_bytes=10 * dataset.image_bytes, cold=False)
    assert set(longest) == {10}


def test_the_command_prints_floors_shares_and_a_sentence(demo: DemoProject, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(demo.indexed), "--batch-size", "16"]) == 0
    said = capsys.readouterr().out
    assert "copy in memory (floor)" in said
    assert "% of copy in memory" in said
    assert said.strip().splitlines()[-1].endswith((".", "helps."))


def test_a_batch_size_of_zero_is_refused(demo: DemoProject, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(demo.indexed), "--batch-size", "0"]) == 1
    assert "--batch-size" in capsys.readouterr().err


def test_few_data_give_no_verdict(demo: DemoProject) -> None:
    figures, sentence = diagnose(IndexedDataset(demo.indexed), batch_size=16, cold=False)
    assert figures
    assert "too few to tell" in sentence
