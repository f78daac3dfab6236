"""DLPack capsules in which every field can be wrong, to see what the reader makes of it."""

from __future__ import annotations

import ctypes

import numpy as np

from emulator.dlpack import DELETER, Legacy, Versioned

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Capsule:
    """A capsule over a numpy array with any field of its DLPack struct overridden.

    ``deleted`` counts how often the consumer gave it back. The object must outlive the capsule's use.
    """

    def __init__(self, array: np.ndarray, *, versioned=True, name=None, version=(1, 3), **fields):
        self.array = array
        self.deleted = 0
        self._deleter = DELETER(self._count)
        self._shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        self._strides = (ctypes.c_int64 * array.ndim)(*(s // array.itemsize for s in array.strides))
        if versioned:
            self._managed = Versioned(major=version[0], minor=version[1])
        else:
            self._managed = Legacy()
        self._managed.deleter = ctypes.cast(self._deleter, ctypes.c_void_p)
        tensor = self._managed.tensor
        tensor.data = array.ctypes.data
        tensor.device_type, tensor.device_id = 1, 0
        tensor.ndim = array.ndim
        tensor.code, tensor.bits, tensor.lanes = 2, array.itemsize * 8, 1
        tensor.shape, tensor.strides = self._shape, self._strides
        for field, value in fields.items():
            if isinstance(value, (list, tuple)):
                value = (ctypes.c_int64 * len(value))(*value)
            setattr(tensor, field, value)
        self._name = (name or ("dltensor_versioned" if versioned else "dltensor")).encode()
        self.capsule = _new_capsule(ctypes.addressof(self._managed), self._name, None)

    def _count(self, _managed):
        self.deleted += 1


class Producer:
    """An object whose ``__dlpack__`` hands out one capsule, as a framework that torch knows nothing of."""

    def __init__(self, capsule: Capsule, device=(1, 0)):
        self.made = capsule
        self.device = device

    def __dlpack__(self, *, stream=None, max_version=None):
        return self.made.capsule

    def __dlpack_device__(self):
        return self.device
