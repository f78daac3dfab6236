"""DLPack producers in which everything can be wrong, to see what the reader makes of it."""

from __future__ import annotations

import ctypes

import numpy as np

from emulator.dlpack import DELETER, DLTensor, Legacy, Versioned

READ_ONLY = 1  # DLPACK_FLAG_BITMASK_READ_ONLY

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_name_of = ctypes.pythonapi.PyCapsule_GetName
_name_of.restype = ctypes.c_char_p
_name_of.argtypes = [ctypes.py_object]


def fill(tensor: DLTensor, array: np.ndarray, **fields) -> list:
    """Describes an array, with any field overridden; what the struct points to is returned."""
    shape = (ctypes.c_int64 * array.ndim)(*array.shape)
    strides = (ctypes.c_int64 * array.ndim)(*(s // array.itemsize for s in array.strides))
    tensor.data = array.ctypes.data
    tensor.device_type, tensor.device_id = 1, 0
    tensor.ndim = array.ndim
    tensor.code, tensor.bits, tensor.lanes = 2, array.itemsize * 8, 1
    tensor.shape, tensor.strides = shape, strides
    tensor.byte_offset = 0
    kept = [shape, strides]
    for field, value in fields.items():
        if isinstance(value, (list, tuple)):
            value = (ctypes.c_int64 * len(value))(*value)
            kept.append(value)
        setattr(tensor, field, value)
    return kept


class Capsule:
    """A capsule over a numpy array with any field of its DLPack struct overridden.

    ``deleted`` counts how often the consumer gave it back; the memory goes with the first time. The
    object must outlive the capsule's use.
    """

    def __init__(
        self, array: np.ndarray, *, versioned=True, name=None, version=(1, 3), flags=0, **fields
    ):
        self.array = array
        self.deleted = 0
        self._deleter = DELETER(self._delete)
        if versioned:
            self._managed = Versioned(major=version[0], minor=version[1], flags=flags)
        else:
            self._managed = Legacy()
        self._managed.deleter = ctypes.cast(self._deleter, ctypes.c_void_p)
        self._kept = fill(self._managed.tensor, array, **fields)
        self._name = (name or ("dltensor_versioned" if versioned else "dltensor")).encode()
        self.capsule = _new_capsule(ctypes.addressof(self._managed), self._name, None)

    @property
    def is_consumed(self) -> bool:
        return _name_of(self.capsule).startswith(b"used_")

    def _delete(self, _managed):
        self.deleted += 1
        self.array = None


class Producer:
    """An object whose ``__dlpack__`` hands out one capsule, as a framework that torch knows nothing of."""

    def __init__(self, capsule: Capsule, device=(1, 0)):
        self.made = capsule
        self.device = device

    def __dlpack__(self, *, stream=None, max_version=None):
        return self.made.capsule

    def __dlpack_device__(self):
        return self.device


class Answers:
    """A producer that does and says something else at every call.

    ``__dlpack__`` calls the next of ``answers``, or the last, which returns an array or a Capsule.
    """

    def __init__(self, *answers, device=(1, 0)):
        self.answers = list(answers)
        self.device = device
        self.calls = 0
        self.made = []  # every capsule that was handed out

    def __dlpack__(self, *, stream=None, max_version=None):
        answer = self.answers[min(self.calls, len(self.answers) - 1)]
        self.calls += 1
        made = answer()
        if isinstance(made, np.ndarray):
            made = Capsule(made)
        if not isinstance(made, Capsule):
            return made
        self.made.append(made)
        return made.capsule

    def __dlpack_device__(self):
        return self.device


class _ExchangeAPI(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("prev_api", ctypes.c_void_p),
        ("allocator", ctypes.c_void_p),
        ("from_object", ctypes.c_void_p),
        ("to_object", ctypes.c_void_p),
        ("borrow", ctypes.c_void_p),
        ("current_work_stream", ctypes.c_void_p),
    ]


_BORROW = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(DLTensor))


def exchanged(answer, *, major=1, endless=False):
    """An object of a new type with an exchange API, which borrows the array that ``answer()`` gives.

    ``endless``: its chain of older versions comes back to itself.
    """
    kept = []

    @_BORROW
    def borrow(_object, out):
        made = answer()
        array, fields = made if isinstance(made, tuple) else (made, {})
        kept.extend([array, fill(out.contents, array, **fields)])
        return 0

    def never(*_):
        return -1

    unused = _BORROW(never)
    pointers = [ctypes.cast(x, ctypes.c_void_p).value for x in (borrow, unused)]
    api = _ExchangeAPI(major, 3, None, pointers[1], pointers[1], pointers[1], *pointers)
    if endless:
        api.prev_api = ctypes.addressof(api)
    capsule = _new_capsule(ctypes.addressof(api), b"dlpack_exchange_api", None)
    kept.extend([borrow, unused, api])
    kind = type("Exchanged", (), {"__dlpack_c_exchange_api__": capsule, "kept": kept})
    return kind()
