"""Figures, and how they are taken: floor and ours in turn, several times, so that a machine that drifts moves both."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from .machine import others_seconds

#: Cores that others may have used in a round that counts, and rounds that are taken at most for one that counts.
QUIET, MOST_ROUNDS = 0.06, 2
#: Rounds of floor and ours in turn.
ROUNDS = 5

Bound = tuple[Literal["at least", "at most"], float]


@dataclass(frozen=True)
class Settings:
    """Where the data lie, and how long to measure."""

    data: Path
    quick: bool = False

    @property
    def seconds(self) -> float:
        """About how long one repetition takes where that can be chosen."""
        return 0.1 if self.quick else 0.3

    def count(self, images: int) -> int:
        """Images of a data set: a quarter where it has to be quick."""
        return images // 4 if self.quick else images


@dataclass(frozen=True)
class Figure:
    """One line: what was reached, beside the floor of the same run.

    Attributes
    ----------
    name, case : what was measured, on what
    floor, ours : the two medians, with their unit
    ratio : median over the repetitions of the ratio within each; None where nothing could be measured
    bound : what the ratio must be; None for information
    note : anything that the reader has to know
    """

    name: str
    case: str
    floor: str = "-"
    ours: str = "-"
    ratio: float | None = None
    bound: Bound | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """Ok or MISSED, or that this is no test."""
        if self.ratio is None:
            return "not measured"
        if self.bound is None:
            return "for information"
        word, limit = self.bound
        return "ok" if (self.ratio >= limit if word == "at least" else self.ratio <= limit) else "MISSED"

    @property
    def wanted(self) -> str:
        """The bound in words."""
        return "-" if self.bound is None else f"{self.bound[0]} {self.bound[1]:.2f}"

    def __str__(self) -> str:
        if self.ratio is None:
            return f"{self.name:<10} {self.case:<46} {self.note}"
        line = f"{self.name:<10} {self.case:<46} floor {self.floor:>12}   ours {self.ours:>12}   ratio {self.ratio:5.2f}"
        return f"{line}  ({self.wanted})  {self.verdict}" + (f"  [{self.note}]" if self.note else "")


@dataclass(frozen=True)
class Rounds:
    """(rounds, actions) of what the actions returned, and how many of the rounds others disturbed."""

    values: np.ndarray
    disturbed: int

    @property
    def middle(self) -> np.ndarray:
        """The median of each action."""
        return np.asarray(np.median(self.values, axis=0))

    @property
    def note(self) -> str:
        """How far the others were in the way, in words."""
        return f"{self.disturbed} of {len(self.values)} rounds disturbed" if self.disturbed else ""

    def ratio(self, ours: int, floor: int) -> float:
        """The median of the ratio within each round."""
        return float(np.median(self.values[:, ours] / self.values[:, floor]))


def in_turn(actions: Sequence[Callable[[], float]], wanted: int = ROUNDS) -> Rounds:
    """Call all actions one after the other, again and again, every other time backwards: none always comes first.

    A round in which other processes had much of the machine is taken again, up to twice as many in all. Which rounds count is
    decided by what the others did and never by the result; the ones with least of it are kept where too few were quiet.
    """
    for action in actions:
        action()  # nothing is new to the rounds that count
    rounds: list[tuple[float, list[float]]] = []
    while len(rounds) < wanted * MOST_ROUNDS and sum(others <= QUIET for others, _ in rounds) < wanted:
        before = others_seconds()
        start = time.perf_counter()
        results = [0.0] * len(actions)
        for place in range(len(actions)) if len(rounds) % 2 == 0 else reversed(range(len(actions))):
            results[place] = actions[place]()
        others = (others_seconds() - before) / (time.perf_counter() - start)
        # The clocks of the system tick in hundredths of a second: below that nothing can be told apart.
        rounds.append((max(others, QUIET), results))
    rounds.sort(key=lambda taken: taken[0])  # a stable sort, so that the first quiet ones come first
    kept = rounds[:wanted]
    return Rounds(np.array([results for _, results in kept]), sum(others > QUIET for others, _ in kept))


def rate_figure(
    name: str, case: str, rates: Rounds, unit: str, *, ours: int = 1, floor: int = 0, bound: Bound | None = None, scale: float = 1
) -> Figure:
    """A figure of rates (more is better); the ratio is ours / floor. ``scale`` makes the unit of the rates."""
    middle = rates.middle * scale
    floor_text, our_text = (f"{_digits(middle[k])} {unit}" for k in (floor, ours))
    return Figure(name, case, floor_text, our_text, rates.ratio(ours, floor), bound, rates.note)


def per_second(work: Callable[[], float], device: torch.device | None = None) -> float:
    """Rate at which work goes that returns how much it did; on a GPU, until it is done there."""
    _wait_for(device)
    start = time.perf_counter()
    done = work()
    _wait_for(device)
    return done / (time.perf_counter() - start)


def gigabytes_per_second(work: Callable[[], int]) -> float:
    """The same of work that returns how many bytes it moved."""
    return per_second(work) / 1e9


def seconds_of(work: Callable[[], object]) -> float:
    """Wall time of some work. What it returns is let go of after the clock has stopped."""
    start = time.perf_counter()
    result = work()
    taken = time.perf_counter() - start
    del result
    return taken


def _wait_for(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
