"""From a kernel variant to its cubin: shipped in the package, cached on disk, or made by NVRTC.

A library in place of the CUDA driver (``FA_SM120_DRIVER``) is given PTX instead, never shipped.

``flash_attn_sm120._C`` calls :func:`compile` when a process needs a variant for the first time.
A variant is a kernel (``kernels/<kernel>.cu``), a canonical name for messages and file names, and
the ``-D`` options that set its compile-time constants.

NVRTC is reached through cuda-bindings, which finds it inside PyTorch's CUDA wheels, conda or a
toolkit. It is imported at the first compilation: importing this module costs nothing.
"""

from __future__ import annotations

import importlib
import os
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from flash_attn_sm120 import cache, files, nvrtc
from flash_attn_sm120.mods import headers
from flash_attn_sm120.nvrtc import Version

PREBUILT = Path(__file__).resolve().parent / "prebuilt"

OPTIONS = ("--std=c++17", "-default-device", "--ptxas-options=-v")
PTX_OPTIONS = ("-lineinfo",)


class Build(NamedTuple):
    """One compiled variant and what ptxas says of it."""

    cubin: bytes
    registers: int  # per thread
    spill_bytes: int  # per thread, stores plus loads, of the kernel and the functions it calls
    shared_bytes: int  # per block, static only
    log: str
    seconds: float  # in NVRTC


def compile(
    kernel: str,
    name: str,
    options: tuple[str, ...],
    compute_capability: int,
    driver_version: int,
    ptx: bool = False,
) -> bytes:
    """The cubin of a variant, or its PTX, from the fastest place that has it.

    Args:
        kernel: file name without ``.cu``, and name of the ``__global__`` function.
        name: canonical name of the variant.
        options: ``-D`` options.
        compute_capability: of the device, say 120.
        driver_version: as cuDriverGetVersion has it, say 13000; 0 to compile for another machine.
        ptx: PTX that names the lines of its CUDA source, in place of a cubin.

    Raises:
        RuntimeError: NVRTC is missing, too old for the device or too new for the driver, or the
            kernel does not compile.
    """
    if ptx:
        options = (*options, *PTX_OPTIONS)
    job = _Job(
        kernel, name, options, architecture(compute_capability, ptx=ptx), sources(kernel, options)
    )
    shipped = None if ptx else _find_prebuilt(job)
    if shipped and (driver_version == 0 or _cuda_major(shipped) <= driver_version // 1000):
        return files.read(shipped)
    try:
        version = _version_for(compute_capability, driver_version)
    except RuntimeError:
        if not shipped:
            raise
        return files.read(shipped)  # of a newer CUDA than the driver's: no promise, but a chance
    job = job._replace(arch=architecture(compute_capability, version, ptx))
    compiler = f"nvrtc {nvrtc.dotted(version)}"
    return cache.get_or_build(job.key(compiler), lambda: _run_nvrtc(job).code)


def _version_for(compute_capability: int, driver_version: int) -> Version:
    """The version of NVRTC, which serves a device and its driver.

    Raises:
        RuntimeError: it does not, or is missing; the message says what to install.
    """
    try:
        version = nvrtc_version()
    except nvrtc.Missing as missing:
        raise nvrtc.Missing(missing.reason, compute_capability, driver_version) from missing
    reason = nvrtc.why_not(version, compute_capability, driver_version)
    if reason:
        raise RuntimeError(reason)
    return version


def build(kernel: str, name: str, options: tuple[str, ...], arch: str) -> Build:
    """Compiles a variant for ``arch``, say ``"sm_120f"``, past every cache.

    Raises:
        RuntimeError: NVRTC is missing, the kernel does not compile, or the log says nothing of its
            registers.
    """
    made = _run_nvrtc(_Job(kernel, name, options, arch, sources(kernel, options)))
    return Build(made.code, *_resources(made.log, kernel), made.log, made.seconds)


def prebuild(
    directory: str | os.PathLike[str],
    variants: Iterable[tuple[str, str, tuple[str, ...]]],
    arch: str,
) -> list[Path]:
    """Compiles ``(kernel, name, options)`` variants for ``arch`` into files for wheels to ship.

    :func:`compile` finds them in ``prebuilt/`` beside this module, as long as the kernel sources
    are the same, with any NVRTC or none. Drivers need the CUDA major version of the NVRTC in use
    here, or a newer one: the oldest NVRTC that knows ``arch`` serves most people.

    Returns:
        The files, one for each variant.

    Raises:
        RuntimeError: as :func:`build`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    major = load_nvrtc()[1][0]

    def write(variant: tuple[str, str, tuple[str, ...]]) -> Path:
        kernel, name, options = variant
        if any(re.fullmatch("-DTENSOR_REPEAT=(?!1$).*", option) for option in options):
            raise RuntimeError(f"{name} is for measuring: unset FA_SM120_TENSOR_REPEAT")
        job = _Job(kernel, name, options, arch, sources(kernel, options))
        path = directory / job.prebuilt_name(str(major))
        path.write_bytes(_run_nvrtc(job).code)
        return path

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(write, dict.fromkeys(variants)))


def architecture(compute_capability: int, version: Version = (12, 9), ptx: bool = False) -> str:
    """What NVRTC of a version calls a compute capability: 120 -> ``"sm_120f"``.

    As the target of PTX it is ``"compute_120f"``.

    Raises:
        RuntimeError: that NVRTC is older than the device.
    """
    prefix = "compute" if ptx else "sm"
    if version < nvrtc.first_for(compute_capability):
        raise RuntimeError(nvrtc.why_not(version, compute_capability, 0))
    if compute_capability == 90:
        return f"{prefix}_90a"
    if compute_capability not in (120, 121):
        return f"{prefix}_{compute_capability}"
    # The family: one cubin for 12.0 and 12.1.
    return f"{prefix}_120f" if version >= (12, 9) else f"{prefix}_120a"


# ---- sources and keys ----------------------------------------------------------------------------


def kernel_directory() -> Path:
    """Where the kernel sources are: inside the package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for directory in (package / "kernels", package.parent / "kernels"):
        if (directory / "params.h").is_file():  # site-packages may have another project's kernels/
            return directory
    raise RuntimeError(f"the kernel sources are missing from {package}: reinstall flash_attn_sm120")


def sources(kernel: str, options: tuple[str, ...] = ()) -> dict[str, bytes]:
    """File name -> text, of ``<kernel>.cu`` and of every header: programs include no programs.

    Mods among the options take the place of the empty hooks.
    """
    directory = kernel_directory()
    shared = [path for path in directory.iterdir() if path.suffix in (".h", ".cuh")]
    texts = {path.name: path.read_bytes() for path in (directory / f"{kernel}.cu", *shared)}
    return texts | headers.of(options)


class _Job(NamedTuple):
    """All that decides what a cubin or PTX is, apart from the compiler."""

    kernel: str
    name: str
    options: tuple[str, ...]
    arch: str
    files: dict[str, bytes]

    def key(self, compiler: str) -> str:
        options = (*OPTIONS, *self.options)
        return cache.make_key(self.files, self.kernel, options, self.arch, compiler)

    def prebuilt_name(self, major: str) -> str:
        """Has the CUDA major version, which older drivers may refuse, beside the key, not in it."""
        return f"{self.name}.{self.arch}.cuda{major}.{self.key('prebuilt')[:16]}.cubin"


def _find_prebuilt(job: _Job) -> Path | None:
    """The shipped file of a variant, of the oldest CUDA if there are several."""
    return min(PREBUILT.glob(job.prebuilt_name("*")), key=_cuda_major, default=None)


def _cuda_major(prebuilt: Path) -> int:
    return int(prebuilt.name.split(".cuda")[1].split(".")[0])


# ---- NVRTC ---------------------------------------------------------------------------------------


def nvrtc_version() -> Version:
    """The version of NVRTC: of its wheel where there is one, which need not be loaded for that.

    Raises:
        RuntimeError: as :func:`load_nvrtc`.
    """
    wheel = nvrtc.installed()
    return wheel.version if wheel else load_nvrtc()[1]


def load_nvrtc() -> tuple[ModuleType, Version]:
    """cuda-bindings' nvrtc module, and the version of the library behind it.

    Raises:
        RuntimeError: either is missing; the message says what to install.
    """
    try:
        wheel = nvrtc.installed()
        if wheel:
            nvrtc.load(wheel.library)
        api = importlib.import_module("cuda.bindings.nvrtc")
        version = _call(api.nvrtcVersion)
    except (ImportError, OSError, RuntimeError) as error:
        raise nvrtc.Missing(str(error)) from error
    return api, version


class _Made(NamedTuple):
    code: bytes  # a cubin, or PTX and its NUL
    log: str
    seconds: float


def _run_nvrtc(job: _Job) -> _Made:
    api, version = load_nvrtc()
    flags = [f"--gpu-architecture={job.arch}", *OPTIONS, *job.options]
    if version >= (12, 9):
        # NVRTC's own cache, in the driver: it would call cuInit, and a hit has no log of ptxas.
        flags.append("--no-cache")
    main = f"{job.kernel}.cu"
    headers = {file: text for file, text in job.files.items() if file != main}
    program = _call(
        api.nvrtcCreateProgram,
        job.files[main],
        main.encode(),
        len(headers),
        list(headers.values()),
        [file.encode() for file in headers],
    )
    try:
        start = time.perf_counter()
        (status,) = api.nvrtcCompileProgram(program, len(flags), [f.encode() for f in flags])
        seconds = time.perf_counter() - start
        log = _read(api.nvrtcGetProgramLogSize, api.nvrtcGetProgramLog, program)
        text = log.decode(errors="replace").strip("\0 \n")
        if status != 0:
            raise RuntimeError(
                f"NVRTC {nvrtc.dotted(version)} cannot compile the kernel {job.name} for "
                f"{job.arch} ({status.name}):\n{text}"
            )
        if job.arch.startswith("compute_"):
            code = _read(api.nvrtcGetPTXSize, api.nvrtcGetPTX, program)
        else:
            code = _read(api.nvrtcGetCUBINSize, api.nvrtcGetCUBIN, program)
        return _Made(code, text, seconds)
    finally:
        api.nvrtcDestroyProgram(program)


def _resources(log: str, kernel: str) -> tuple[int, int, int]:
    """(registers, spill bytes, static shared bytes) of a kernel in the log of ``ptxas -v``."""
    for block in log.split("Compiling entry function ")[1:]:
        registers = re.search(r"Used (\d+) registers", block)
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", block)
        if block.startswith(f"'{kernel}'") and registers and spills:
            shared = re.search(r"(\d+) bytes smem", block)
            return int(registers[1]), sum(map(int, spills)), int(shared[1]) if shared else 0
    raise RuntimeError(f"NVRTC's log does not say what the kernel {kernel} uses:\n{log}")


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    """What an NVRTC function returns besides its status, which must be success."""
    status, *values = function(*arguments)
    if status != 0:
        raise RuntimeError(f"{function.__name__} failed: {status.name}")
    return values[0] if len(values) == 1 else tuple(values)


def _read(size: Callable[..., Any], fill: Callable[..., Any], program: Any) -> bytes:
    buffer = bytearray(_call(size, program))
    _call(fill, program, buffer)
    return bytes(buffer)
