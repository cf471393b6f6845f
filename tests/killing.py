"""A program that exports in processes of its own, kills them at random moments and looks at what they leave: see ``test_export_faults``.

One process imports everything and is forked for each attempt, so that an attempt begins within a millisecond. It runs no threads.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import finufft  # noqa: F401  (here and not in each attempt)
import starfile  # noqa: F401
import torch
import zarr  # noqa: F401
from support import contents

from cryolike_data import ImageDescriptor, IndexedDataset
from cryolike_data.export import plan_export, run

#: Exports to kill by a signal: one that is continued each time, new ones, and such that replace another one.
MODES = {
    "SIGKILL": ["continued"] * 8 + ["new"] * 7 + ["replacing"] * 5,
    "SIGINT": ["continued"] * 2 + ["new"] * 2 + ["replacing"] * 1,
}
BOX, UNIT = 64, 40
SETTINGS: dict[str, dict[str, Any]] = {
    "zarr": {"shard_bytes": UNIT * BOX * BOX * 4},
    "cryolike": {"batch_size": UNIT, "descriptor": ImageDescriptor.from_individual_values(BOX, 1.5, n_inplanes=16)},
    "mrc": {"batch_size": UNIT},
}


def main(kind: str, table: str, folder: str, how: str, seed: str) -> None:
    """Kill an exporter until it was struck often enough at work; print what was found each time, one JSON object a line."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a program that runs in the background of a shell does not have
    root, rng, end, modes = Path(folder), random.Random(int(seed)), signal.Signals[how], list(MODES[how])
    undisturbed, duration = root / "undisturbed", 0.0
    for _ in range(2):  # the first run reads from the disk
        shutil.rmtree(undisturbed, ignore_errors=True)
        started = time.monotonic()
        Attempt(kind, table, undisturbed).ends(0)
        duration = time.monotonic() - started
    whole = contents(undisturbed)
    for number in range(4 * len(modes)):
        if not modes:
            return
        mode = modes[0]
        target = root / (mode if mode == "continued" else f"{mode}{number}")
        former = {}
        if mode == "replacing":
            Attempt(kind, table, target, limit=3 * UNIT).ends(0)
            former = contents(target)
        attempt = Attempt(kind, table, target, overwrite=mode == "replacing")
        # What is continued has less to do each time.
        struck = attempt.killed_after(rng.uniform(0, duration / (3 if mode == "continued" else 1)), end)
        if struck:
            modes.pop(0)
        found = contents(target) if target.exists() else {}
        results = {name: content for name, content in found.items() if not name.startswith(".export/")}
        told = {"mode": mode, "struck": struck, "units": sum("/units/" in name for name in found)}
        told |= {"sealed": bool({"zarr.json", "export.json"} & set(results)), "whole": results in (whole, former)}
        if mode not in modes or mode != "continued":
            Attempt(kind, table, target, overwrite=mode == "replacing").ends(0)
            told["end"] = contents(target) == whole
            shutil.rmtree(target)
        print(json.dumps(told), flush=True)


class Attempt:
    """A process that exports."""

    def __init__(self, kind: str, table: str, target: Path, *, overwrite: bool = False, limit: int | None = None) -> None:
        ready, tell = os.pipe()
        self._process = os.fork()
        if self._process == 0:
            code = 1
            try:
                torch.set_num_threads(2)  # two units at once
                os.write(tell, b"!")
                dataset = IndexedDataset(table).select(slice(0, limit))
                run(plan_export(dataset, target, format=kind, **SETTINGS[kind]), overwrite=overwrite)
                code = 0
            except KeyboardInterrupt:
                code = 130
            finally:
                # Not more than this: nothing of the program that was forked is to end here.
                if code == 1:
                    sys.excepthook(*sys.exc_info())
                os._exit(code)
        os.close(tell)
        os.read(ready, 1)
        os.close(ready)

    def killed_after(self, seconds: float, end: signal.Signals) -> bool:
        """Send a signal after some time; whether it struck before the process was done."""
        time.sleep(seconds)
        os.kill(self._process, end)
        status = os.waitstatus_to_exitcode(os.waitpid(self._process, 0)[1])
        if status not in (0, 130, -signal.SIGKILL):
            raise SystemExit(f"an exporter ended by itself with {status}")
        return status != 0

    def ends(self, code: int) -> None:
        """Wait for the end."""
        status = os.waitstatus_to_exitcode(os.waitpid(self._process, 0)[1])
        if status != code:
            raise SystemExit(f"an exporter ended with {status}")


if __name__ == "__main__":
    main(*sys.argv[1:])
