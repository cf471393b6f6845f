"""The machine that the figures were taken on, in words."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np
import torch

from cryolike_data.cryosparc.rows import processors


def describe() -> dict[str, str]:
    """What a reader has to know to compare figures."""
    return {
        "CPU": f"{_cpu_model()}, {processors()} cores, L3 {_cache()}",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "Python, NumPy": f"{platform.python_version()}, {np.__version__}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU at hand",
    }


def load() -> str:
    """How busy the machine is: the load average over a minute, our own work included."""
    return f"{os.getloadavg()[0]:.1f}"


def others_seconds() -> float:
    """CPU seconds since the system started that went neither to us nor to our children, nor were idle; 0 where nobody says."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    # Not idle and waiting, nor interrupts, which our own reading makes.
    user, nice, system, _, _, _, _, stolen = (int(ticks) for ticks in stat.read_text().split("\n", 1)[0].split()[1:9])
    tick = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + stolen) / tick - sum(_cpu_seconds(process) for process in _family())


def _family() -> list[int]:
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    return [os.getpid(), *(int(child) for child in (children.read_text().split() if children.exists() else ()))]


def _cpu_seconds(process: int) -> float:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    # utime, stime, and those of children that have ended
    return sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _cache() -> str:
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return size.read_text().strip() if size.exists() else "unknown"


def anonymous_bytes() -> int:
    """Anonymous memory of this process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))
