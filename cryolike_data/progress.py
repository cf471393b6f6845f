"""Progress of long work over images: a bar on a terminal, a line in the log every so often elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

from .dataset import human_bytes

log = logging.getLogger(__name__)

#: Seconds between two lines in the log.
_EVERY = 30.0


class Progress:
    """Images and bytes that are done, and how long the rest will take.

    Parameters
    ----------
    name : of the work
    total : images
    show : show a bar; by default if the error stream is a terminal, and else lines in the log
    """

    def __init__(self, name: str, total: int, *, show: bool | None) -> None:
        self._name, self._total = name, total
        hidden = None if show is None else not show
        # Where the error stream was closed, as for a daemon, tqdm finds that out only when it writes.
        self._bar = tqdm(total=total, unit="image", desc=name, disable=sys.stderr is None or hidden)
        self._log = self._bar.disable and show is None
        self._done = self._skipped = self._bytes = 0
        self._began = self._told = time.monotonic()
        self._lock = threading.Lock()  # several threads may be at work

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()

    def skip(self, images: int) -> None:
        """Count images that are there already."""
        self._skipped += images
        self._bar.update(images)

    def start(self) -> None:
        """Begin to measure: from now on images are worked on."""
        self._began = self._told = time.monotonic()
        if self._skipped:
            log.info("%s: %d of %d images are there already.", self._name, self._skipped, self._total)
            self._bar.initial = self._skipped  # the rate is that of the images that are worked on
            self._bar.start_t = time.time()

    def advance(self, images: int, size: int = 0) -> None:
        """Count images that are done, and the bytes of them that were written."""
        with self._lock:
            self._advance(images, size)

    def _advance(self, images: int, size: int) -> None:
        self._done, self._bytes = self._done + images, self._bytes + size
        now = time.monotonic()
        seconds = max(now - self._began, 1e-9)
        written = f", {human_bytes(self._bytes / seconds)}/s" if self._bytes else ""
        self._bar.set_postfix_str(written.removeprefix(", "), refresh=False)
        self._bar.update(images)
        if self._log and now - self._told >= _EVERY:
            self._told = now
            there, rate = self._skipped + self._done, self._done / seconds
            log.info(
                "%s: %d of %d images (%.0f %%), %.0f images/s%s, %.0f s left",
                *(self._name, there, self._total, 100 * there / self._total, rate, written, (self._total - there) / max(rate, 1e-9)),
            )
