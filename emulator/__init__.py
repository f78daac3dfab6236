"""An emulated GPU of compute capability 12.0, and what tests ask of it.

The C files beside this one are a CUDA driver that interprets PTX, see emulator.h. The package runs
on it where FA_SM120_DRIVER names :func:`library`, with an :class:`EmulatedTensor` for every tensor;
:class:`Emulator` runs PTX without the package, and tells what any launch did.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .dlpack import DELETER, DLTensor, Legacy, pointer_in

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "emulator"

# Contracted, a product and a sum would be rounded once where PTX says twice.
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=off")
FLAGS += ("-Wall", "-Wextra", "-Werror", "-fPIC", "-fno-semantic-interposition", "-pthread")


# ---- the library ---------------------------------------------------------------------------------


def unavailable() -> str:
    """Why there can be no emulator on this machine; empty where there can."""
    if not sys.platform.startswith("linux"):
        return f"the emulator is for Linux, this is {sys.platform}"
    return "" if shutil.which("cc") else "the emulator needs a C compiler, cc"


@functools.cache
def library() -> Path:
    """The shared library, built where these sources, flags, compiler and CPU have none yet.

    Raises:
        RuntimeError: no compiler, or it fails; the message has its output.
    """
    if reason := unavailable():
        raise RuntimeError(reason)
    sources = sorted(HERE.glob("*.c"))
    flags = [*FLAGS, *os.environ.get("FA_SM120_CFLAGS", "").split()]
    # The macros tell the compiler's version, and what "native" is here.
    key = hashlib.sha256(_cc(*flags, "-dM", "-E", "-x", "c", os.devnull).encode())
    for text in (repr(flags), *(path.read_text() for path in (*sources, *HERE.glob("*.h")))):
        key.update(text.encode())
    built = BUILD / key.hexdigest()[:16] / "libemulator.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as scratch:
            os.replace(_build(sources, flags, Path(scratch)), built)  # others may build it, too
    return built


def _build(sources: Iterable[Path], flags: list[str], directory: Path) -> Path:
    def compiled(source: Path) -> str:
        target = str(directory / f"{source.stem}.o")
        _cc(*flags, "-c", "-o", target, str(source))
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    target = directory / "libemulator.so"
    _cc(*flags, "-shared", "-Wl,-z,defs", "-o", str(target), *objects, "-lm")
    return target


def _cc(*arguments: str) -> str:
    done = subprocess.run(["cc", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"cc {' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout


# ---- its ABI: emulator.h, driver.c and csrc/driver.h ---------------------------------------------

KINDS = tuple(
    name.lower()
    for name in re.findall(r"^ +KIND_(\w+),", (HERE / "emulator.h").read_text(), flags=re.M)
)
MAX_DIMS = 5  # as in emulator.h

CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8


class Region(ctypes.Structure):
    """Memory that launches may touch: rows of a strided tensor."""

    _fields_ = [
        ("base", ctypes.c_uint64),
        ("ndim", ctypes.c_int),
        ("shape", ctypes.c_int64 * MAX_DIMS),
        ("stride", ctypes.c_int64 * MAX_DIMS),
        ("itemsize", ctypes.c_int64),
        ("writable", ctypes.c_bool),
    ]

    @classmethod
    def of_array(cls, array: np.ndarray, writable: bool) -> Region:
        if any(stride % array.itemsize for stride in array.strides):
            raise ValueError(f"strides of whole elements are needed, got {array.strides} bytes")
        strides = [stride // array.itemsize for stride in array.strides]
        return cls._of(array.ctypes.data, array.shape, strides, array.itemsize, writable)

    @classmethod
    def of_dltensor(cls, tensor: DLTensor, writable: bool) -> Region:
        base = (tensor.data or 0) + tensor.byte_offset
        shape, strides = tensor.shape[: tensor.ndim], tensor.strides[: tensor.ndim]
        return cls._of(base, shape, strides, tensor.bits * tensor.lanes // 8, writable)

    @classmethod
    def _of(cls, base, shape, strides, itemsize, writable) -> Region:
        ndim = len(shape)
        if ndim > MAX_DIMS:
            raise ValueError(f"at most {MAX_DIMS} dimensions are supported, got {ndim}")
        sizes = ctypes.c_int64 * MAX_DIMS
        return cls(base, ndim, sizes(*shape), sizes(*strides), itemsize, writable)


class _ProfileRow(ctypes.Structure):
    _fields_ = [
        ("text", ctypes.c_char_p),
        ("file", ctypes.c_char_p),
        ("line", ctypes.c_int),
        ("source_line", ctypes.c_int),
        ("kind", ctypes.c_int),
        ("executed", ctypes.c_uint64),
        ("wavefronts", ctypes.c_uint64),
        ("wavefronts_ideal", ctypes.c_uint64),
        ("global_bytes", ctypes.c_uint64),
    ]


class _LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    ]


_CTYPES = {
    **{f"{kind}8": ctypes.c_uint8 for kind in "bsu"},
    **{f"{kind}16": ctypes.c_uint16 for kind in "bsu"},
    **{f"{kind}32": ctypes.c_uint32 for kind in "bsu"},
    **{f"{kind}64": ctypes.c_uint64 for kind in "bsu"},
    "f32": ctypes.c_float,
    "f64": ctypes.c_double,
}


# ---- running PTX ---------------------------------------------------------------------------------


def ptx_module(parameters: Iterable[str], body: str, variables: str = "") -> str:
    """A module of one entry, ``test``: its ``.param`` declarations, its body up to the last ret."""
    return f"""
.version 9.0
.target sm_120f
.address_size 64
{variables}
.visible .entry test({", ".join(parameters)})
{{
{body}
    ret;
}}
"""


class EmulatorError(RuntimeError):
    """PTX that cannot be read, or a launch that did what it must not; the message is the report."""


class Row(NamedTuple):
    """What a launch did at one instruction."""

    text: str  # the PTX
    line: int  # of it, from 1
    file: str  # of the CUDA C; "" where it is unknown
    source_line: int
    kind: str  # one of KINDS
    executed: int  # by warps
    wavefronts: int  # passes through shared memory
    wavefronts_ideal: int  # the same without bank conflicts
    global_bytes: int


@dataclass
class Counters:
    """Sums over the instructions of a launch, by kind."""

    instructions: Counter[str] = field(default_factory=Counter)
    wavefronts: Counter[str] = field(default_factory=Counter)
    wavefronts_ideal: Counter[str] = field(default_factory=Counter)
    global_bytes: int = 0


class Settings(NamedTuple):
    """How launches run: each is bound to be right, whatever they are."""

    seed: int = 0  # of the order in which warps take turns
    late_copies: bool = False  # asynchronous copies land when they are waited for, not at once
    threads: int = 0  # of the host; 0: one per core


class Emulator:
    """The library, loaded. State (settings, profile) is the process's, as of any CUDA driver."""

    def __init__(self, path: Path):
        self.driver = ctypes.CDLL(str(path))
        self.driver.emulator_allow.restype = ctypes.c_int64
        self.driver.emulator_report.restype = ctypes.c_char_p
        self._settings = Settings()
        self._library = ctypes.c_void_p()  # of the last run(): the profile has its text
        self._call("cuInit", 0)

    # ---- settings

    def configure(self, seed: int = 0, late_copies: bool = False, threads: int = 0) -> None:
        """Sets how all launches run from now on."""
        self._settings = Settings(seed, late_copies, threads)
        self.driver.emulator_configure(ctypes.c_uint64(seed), int(late_copies), threads)

    @contextmanager
    def settings(self, **changes: int) -> Iterator[None]:
        """Changes some of :class:`Settings` for a while."""
        before = self._settings
        self.configure(**before._replace(**changes)._asdict())
        try:
            yield
        finally:
            self.configure(**before._asdict())

    # ---- memory

    def allow(self, region: Region) -> int:
        """Lets launches touch a region until :meth:`forbid` of the number returned."""
        number = self.driver.emulator_allow(ctypes.byref(region))
        if number < 0:
            raise EmulatorError(self._report("emulator_allow", number))
        return number

    def forbid(self, number: int) -> None:
        self.driver.emulator_forbid(ctypes.c_int64(number))

    @contextmanager
    def allowed(self, array: np.ndarray, writable: bool | None = None) -> Iterator[None]:
        """Lets launches touch the elements of ``array``, and write them where it is writable."""
        writable = array.flags.writeable if writable is None else writable
        number = self.allow(Region.of_array(array, writable))
        try:
            yield
        finally:
            self.forbid(number)

    # ---- launches

    def run(
        self,
        ptx: str,
        *arguments: Any,
        grid: int | tuple[int, ...] = 1,
        block: int | tuple[int, ...] = 32,
        shared: int = 0,
    ) -> None:
        """Launches the only entry of a PTX module, and waits for it.

        Args:
            ptx: the text.
            arguments: one for each ``.param``: a numpy array for a pointer, which the launch may
                then read, and write unless the array is read-only; a number for a number; bytes for
                a struct. Pointers inside of structs need :meth:`allowed`.
            grid: blocks.
            block: threads of each.
            shared: bytes of dynamic shared memory of each.

        Raises:
            EmulatorError: what was wrong with the PTX, or with what it did.
        """
        context, kernel = ctypes.c_void_p(), ctypes.c_void_p()
        name, parameters = _signature(ptx)
        with ExitStack() as stack:
            values = self._values(parameters, arguments, stack)
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
            self._call("cuCtxPushCurrent_v2", context)
            stack.callback(self._call, "cuCtxPopCurrent_v2", ctypes.byref(context))
            self._load(ptx)
            self._call("cuLibraryGetKernel", ctypes.byref(kernel), self._library, name.encode())
            attribute = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._call("cuKernelSetAttribute", attribute, shared, kernel, 0)
            config = _LaunchConfig(_dim3(grid), _dim3(block), shared)
            pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
            self._call("cuLaunchKernelEx", ctypes.byref(config), kernel, pointers, None)

    def _load(self, ptx: str) -> None:
        if self._library:
            self._call("cuLibraryUnload", self._library)
            self._library.value = None
        code = ptx.encode()
        self._call("cuLibraryLoadData", ctypes.byref(self._library), code, *_NO_OPTIONS)

    def _values(
        self, parameters: list[_Parameter], arguments: tuple[Any, ...], stack: ExitStack
    ) -> list[Any]:
        """The arguments as ctypes objects, their arrays allowed until ``stack`` ends."""
        if len(parameters) != len(arguments):
            raise TypeError(f"{len(parameters)} arguments are expected, got {len(arguments)}")
        values: list[Any] = []
        for parameter, argument in zip(parameters, arguments, strict=True):
            if isinstance(argument, bytes):
                values.append(ctypes.create_string_buffer(argument, len(argument)))
            elif isinstance(argument, np.ndarray):
                stack.enter_context(self.allowed(argument))
                values.append(ctypes.c_uint64(argument.ctypes.data))
            else:
                values.append(_CTYPES[parameter.kind](argument))
            if ctypes.sizeof(values[-1]) != parameter.size:
                raise TypeError(f"{parameter} cannot take {type(argument).__name__}")
        return values

    def _call(self, entry: str, *arguments: Any) -> None:
        result = getattr(self.driver, entry)(*arguments)
        if result != 0:
            raise EmulatorError(self._report(entry, result))

    def _report(self, entry: str, result: int) -> str:
        return self.driver.emulator_report().decode() or f"{entry} failed with error {result}"

    # ---- what the last launch did

    def profile(self) -> list[Row]:
        """Every instruction of the program that was launched last, in order."""
        count = self.driver.emulator_profile(None, 0)
        rows = (_ProfileRow * count)()
        self.driver.emulator_profile(rows, count)
        return [
            Row(
                (row.text or b"").decode(),
                row.line,
                (row.file or b"").decode(),
                row.source_line,
                KINDS[row.kind],
                row.executed,
                row.wavefronts,
                row.wavefronts_ideal,
                row.global_bytes,
            )
            for row in rows
        ]

    def counters(self) -> Counters:
        """Sums of :meth:`profile`."""
        sums = Counters()
        for row in self.profile():
            sums.instructions[row.kind] += row.executed
            sums.wavefronts[row.kind] += row.wavefronts
            sums.wavefronts_ideal[row.kind] += row.wavefronts_ideal
            sums.global_bytes += row.global_bytes
        return sums


_NO_OPTIONS = (None, None, 0, None, None, 0)


def _dim3(sizes: int | tuple[int, ...]) -> Any:
    sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    return (ctypes.c_uint * 3)(*sizes, *[1] * (3 - len(sizes)))


class _Parameter(NamedTuple):
    kind: str  # "u64", or "b8" for a struct
    size: int  # bytes


def _signature(ptx: str) -> tuple[str, list[_Parameter]]:
    """Name and parameters of the entry."""
    entries = re.findall(r"\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?", ptx)
    if len(entries) != 1:
        raise EmulatorError(f"PTX of one entry is needed, got {len(entries)}")
    (name, texts), parameters = entries[0], []
    for text in filter(str.strip, texts.split(",")):
        found = re.search(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w)(\d+)[^\[]*(?:\[(\d+)\])?", text)
        if not found:
            raise EmulatorError(f"the parameter cannot be read: {text.strip()}")
        kind, bits, count = found.groups(default="1")
        parameters.append(_Parameter(kind + bits, int(bits) // 8 * int(count)))
    return name, parameters


@functools.cache
def emulator() -> Emulator:
    """The emulator of this process: also the package's driver, where that is :func:`library`."""
    return Emulator(library())


# ---- tensors -------------------------------------------------------------------------------------


def _view(name: str) -> Any:
    """A method that returns the same memory, with the same rights."""
    method = getattr(torch.Tensor, name)

    def view(self: EmulatedTensor, *args: Any) -> EmulatedTensor:
        tensor = method(self, *args)
        tensor.writable = self.writable
        return tensor

    return view


class EmulatedTensor(torch.Tensor):
    """A CPU tensor that tells DLPack's consumers that it is on CUDA device 0, the emulated one.

    Launches may touch exactly its elements, from its export until the consumer gives the capsule
    back; and write them only if the tensor comes from :meth:`new_empty`, as the package's outputs
    do.
    """

    __dlpack_c_exchange_api__ = None  # torch's own tells the truth; consumers ask for capsules then
    writable = False

    def new_empty(self, *args: Any, **kwargs: Any) -> EmulatedTensor:
        """Filled with NaN: an element that a kernel forgets shows."""
        tensor = super().new_empty(*args, **kwargs)
        tensor.writable = True
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    detach = _view("detach")
    unsqueeze = _view("unsqueeze")
    transpose = _view("transpose")
    narrow = _view("narrow")
    __getitem__ = _view("__getitem__")

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)  # kDLCUDA

    def __dlpack__(self, *, stream: int | None = None, max_version: Any = None) -> Any:
        """torch's capsule, an unversioned one, with the device changed."""
        capsule = super().__dlpack__()
        managed = Legacy.from_address(pointer_in(capsule, b"dltensor"))
        managed.tensor.device_type = 2
        region = None  # no launch takes more dimensions than a region has
        if self.dim() <= MAX_DIMS:
            region = emulator().allow(Region.of_dltensor(managed.tensor, self.writable))
        _exported[ctypes.addressof(managed)] = region, managed.deleter
        managed.deleter = ctypes.cast(_give_back, ctypes.c_void_p)
        return capsule


_exported: dict[
    int, tuple[int | None, int]
] = {}  # managed tensor -> its region, and torch's deleter


@DELETER
def _give_back(managed: int) -> None:
    region, deleter = _exported.pop(managed)
    if region is not None:
        emulator().forbid(region)
    DELETER(deleter)(managed)
