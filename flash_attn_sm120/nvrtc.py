"""Which NVRTC serves a device and its driver, what to install for that, and where its wheel is.

NVRTC must be new enough for the device, and of no newer major version than the driver, which could
not load its cubins. Advice is computed from both, so that following it ends the matter.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from flash_attn_sm120.files import one_line

Version = tuple[int, int]  # (major, minor)

# The first NVRTC that knows a compute capability; OLDEST knows the others from 8.0 on.
FIRST = {
    88: (13, 0),
    100: (12, 8),
    101: (12, 8),
    103: (12, 9),
    110: (13, 0),
    120: (12, 8),
    121: (12, 9),
}
OLDEST = (12, 0)  # what the oldest driver loads that csrc/driver.c takes
NEWEST_MAJOR = 13  # of the wheels that there are

_LIBRARY = re.compile(r"libnvrtc\.so\.\d+|nvrtc64_\d+_0\.dll")


def first_for(compute_capability: int) -> Version:
    """The first NVRTC that knows a compute capability, say 120."""
    return FIRST.get(compute_capability, OLDEST)


def why_not(version: Version, compute_capability: int, driver_version: int) -> str:
    """Why an NVRTC does not serve a device, and what to install instead; "" if it serves.

    Args:
        version: of NVRTC.
        compute_capability: say 120.
        driver_version: as cuDriverGetVersion has it, say 13000; 0 for another machine's.
    """
    first, driver = first_for(compute_capability), _of_driver(driver_version)
    if version < first:
        capability = f"{compute_capability // 10}.{compute_capability % 10}"
        reason = (
            f"compute capability {capability} needs NVRTC {dotted(first)} or newer, "
            f"found {dotted(version)}"
        )
    elif driver and version[0] > driver[0]:
        reason = (
            f"NVRTC {dotted(version)} makes kernels that a driver for CUDA {dotted(driver)} "
            "cannot load"
        )
    else:
        return ""
    return f"{reason}: {advice(compute_capability, driver_version)}"


def advice(compute_capability: int = 0, driver_version: int = 0) -> str:
    """What to install for a device and its driver; the arguments are those of :func:`why_not`."""
    first, driver = first_for(compute_capability), _of_driver(driver_version)
    if not driver:
        return "pip install --upgrade cuda-bindings nvidia-cuda-nvrtc"
    major = min(driver[0], NEWEST_MAJOR)
    if major < first[0]:
        return f"update the driver to one for CUDA {dotted(first)} or newer"
    oldest = max(first, (major, 0))
    return (
        f"pip install 'cuda-bindings>={major},<{major + 1}' "
        f"'{_wheel(major)}>={dotted(oldest)},<{major + 1}'"
    )


def dotted(version: Version) -> str:
    return ".".join(map(str, version))


def _of_driver(driver_version: int) -> Version | None:
    return (driver_version // 1000, driver_version % 1000 // 10) if driver_version else None


def _wheel(major: int) -> str:
    return "nvidia-cuda-nvrtc-cu12" if major == 12 else "nvidia-cuda-nvrtc"


# ---- the wheel -----------------------------------------------------------------------------------


class Missing(RuntimeError):
    """There is no NVRTC that can be used, with what to install."""

    def __init__(self, reason: str, compute_capability: int = 0, driver_version: int = 0) -> None:
        self.reason = one_line(reason, 60)
        what = advice(compute_capability, driver_version)
        super().__init__(f"NVRTC was not found ({self.reason}): {what}")


class Wheel(NamedTuple):
    """An NVRTC that pip installed."""

    version: Version
    library: Path


def installed() -> Wheel | None:
    """The wheel of NVRTC for the cuda-bindings there are; None where one of the two is missing.

    conda and toolkits install no such distribution: there cuda-bindings finds the library.
    """
    try:
        bindings = _parse(metadata.version("cuda-bindings"))
        distribution = metadata.distribution(_wheel(bindings[0]))
        version = _parse(distribution.version)
    except (metadata.PackageNotFoundError, ValueError):
        return None
    for file in distribution.files or ():
        library = Path(str(distribution.locate_file(file)))
        if _LIBRARY.fullmatch(file.name) and library.is_file():
            return Wheel(version, library)
    return None


@functools.cache
def load(library: Path) -> None:
    """Loads an NVRTC, wherever it is, and keeps it: cuda-bindings takes what is loaded already.

    By itself it looks into site-packages, but not into other directories on ``sys.path``.

    Raises:
        OSError: it cannot be loaded.
    """
    if hasattr(os, "add_dll_directory"):  # Windows
        os.add_dll_directory(str(library.parent))
    for builtins in library.parent.glob("libnvrtc-builtins.so.*"):  # NVRTC opens it by name alone
        ctypes.CDLL(str(builtins))
    ctypes.CDLL(str(library))


def _parse(text: str | None) -> Version:
    """ "13.0.88" -> (13, 0), "13" and "13.0rc1", too.

    Raises:
        ValueError: it is no version.
    """
    numbers = re.match(r"(\d+)(?:\.(\d+))?", text or "")
    if not numbers:
        raise ValueError(f"a version starts with a number, got {text!r}")
    return int(numbers[1]), int(numbers[2] or 0)
