"""The versions and the machine behind a figure, so that another run can say what differs."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from acmize.__about__ import __version__

PACKAGES = ("torch", "torchvision", "timm", "transformers", "datasets", "numpy", "pillow", "torchaudio")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # in malloc.h


def environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Versions of what takes part, and what it ran on; JSON values.

    Args:
        device: of the model.
    """
    kind = torch.device(device).type
    return {
        "acmize": __version__,
        "python": platform.python_version(),
        **{name: found for name in PACKAGES if (found := _version(name)) is not None},
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if kind == "cuda" else kind,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def differences(published: dict[str, Any], here: dict[str, Any]) -> list[dict[str, Any]]:
    """What has another value here, or none: {"name", "published", "here"}."""
    names = [name for name in {**published, **here} if published.get(name) != here.get(name)]
    return [{"name": name, "published": published.get(name), "here": here.get(name)} for name in names]


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if found is not None:
            return 1024 * int(found[1])
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest


def release_memory() -> None:
    """Give freed memory back to the system: glibc keeps pieces of it that the next large tensors do not fit into."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def keep_memory(kept: bool = True) -> None:
    """Have glibc keep freed memory for the next tensors; or, not `kept`, give back what large tensors leave at once.

    glibc decides by the sizes it has seen freed, so one and the same call finds its memory warm in one process and pays
    for new pages in another. What is set here stays, as what `MALLOC_MMAP_THRESHOLD_` and `MALLOC_TRIM_THRESHOLD_` set.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 1 << 25 if kept else 1 << 16)  # the largest that it takes
        mallopt(_M_TRIM_THRESHOLD, 1 << 30 if kept else 1 << 16)


def fresh_peak_bytes() -> int:
    """Bytes resident, after the record of their peak has been set back to it where the system can."""
    release_memory()  # what glibc keeps would hide what comes next
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
