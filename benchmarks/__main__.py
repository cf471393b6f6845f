"""``python -m benchmarks [name ...]``: run the figures, print a line for each and a table of all."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from . import cold, consumer, downsampling, export, gpu, likelihood, machine, memory, opening, reading
from .measure import Figure, Settings

FIGURES: dict[str, Callable[[Settings], Iterator[Figure]]] = {
    "read": reading.read,
    "stream": reading.streaming,
    "naive": consumer.naive,
    "consumer": consumer.consumer,
    "cold": cold.cold,
    "cold_bytes": cold.cold_bytes,
    "downsample": downsampling.downsample,
    "open": opening.opening,
    "memory": memory.memory,
    "export": export.export,
    "likelihood": likelihood.likelihood,
    "gpu": gpu.gpu,
}
_HERE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run what it asks for. A missed bound is printed, not an error: figures depend on the machine."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"which figures: {', '.join(FIGURES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="a quarter of the data, and shorter: to see that all of it works")
    parser.add_argument("--data", type=Path, default=_HERE / ".data", help="folder for the data, made once and kept (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument(
        "--readme", action="store_true", help="put the table into benchmarks/README.md, in its place for machines with or without a GPU"
    )
    asked = parser.parse_args(arguments)
    if unknown := set(asked.names) - set(FIGURES):
        parser.error(f"no figures are called {', '.join(sorted(unknown))}; there are {', '.join(FIGURES)}")
    settings = Settings(asked.data.resolve(), asked.quick)
    settings.data.mkdir(parents=True, exist_ok=True)
    start, before = time.perf_counter(), machine.load()
    figures = []
    for name in asked.names or FIGURES:
        for figure in FIGURES[name](settings):
            print(figure, flush=True)
            figures.append(figure)
    about = machine.describe() | {"load before, after": f"{before}, {machine.load()}"}
    about["run"] = f"{'quick' if asked.quick else 'full'}, {time.perf_counter() - start:.0f} s, {time.strftime('%Y-%m-%d')}"
    table = markdown(figures, about)
    print(f"\n{table}")
    if asked.json:
        results = [asdict(figure) | {"verdict": figure.verdict} for figure in figures]
        asked.json.write_text(json.dumps({"machine": about, "figures": results}, indent=1) + "\n")
    if asked.readme:
        _fill_in(_HERE / "README.md", "figures on a GPU" if torch.cuda.is_available() else "figures", table)


def markdown(figures: Sequence[Figure], about: dict[str, str]) -> str:
    """The figures as a table, below a line on the machine."""
    lines = ["; ".join(f"{name}: {value}" for name, value in about.items()) + ".", ""]
    lines += ["| figure | case | floor | ours | ratio | wanted | |", "|---|---|---:|---:|---:|---|---|"]
    for figure in figures:
        value = "-" if figure.ratio is None else f"{figure.ratio:.2f}"
        remark = ", ".join(word for word in (figure.verdict, figure.note) if word)
        cells = [figure.name, figure.case, figure.floor, figure.ours, value, figure.wanted, remark]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _fill_in(readme: Path, place: str, table: str) -> None:
    """Put the table in the place that the README keeps for it."""
    begin, end = f"<!-- {place}: begin -->", f"<!-- {place}: end -->"
    head, _, rest = readme.read_text().partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise SystemExit(f"{readme} has lost its place for the table ({begin} ... {end})")
    readme.write_text(f"{head}{begin}\n{table}\n{end}{tail}")


if __name__ == "__main__":
    main()
