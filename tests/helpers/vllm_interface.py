"""A stub of vLLM's interface for attention backends, with what our backend meets of it.

For tests where vLLM is not installed. It has the names, the fields and the defaults of vLLM 0.33;
it leaves out vLLM's checks of a configuration, context parallelism and the engine.
"""

import sys
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from types import ModuleType


class AttentionType(str, Enum):
    DECODER = "decoder"
    ENCODER = "encoder"
    ENCODER_ONLY = "encoder_only"
    ENCODER_DECODER = "encoder_decoder"


class AttentionCGSupport(Enum):
    ALWAYS = 3
    NEVER = 0


class AttentionBackend:
    forward_includes_kv_cache_update = True


class AttentionMetadata:
    pass


class AttentionMetadataBuilder:
    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        self.kv_cache_spec = kv_cache_spec
        self.layer_names = layer_names
        self.vllm_config = vllm_config
        self.device = device

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec):
        return cls._cudagraph_support


class AttentionImpl:
    can_return_lse_for_decode = False


@dataclass
class CommonAttentionMetadata:
    query_start_loc: object
    query_start_loc_cpu: object
    seq_lens: object
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: object
    slot_mapping: object
    causal: object = True
    mm_req_doc_ranges: object = None
    rswa_prefix_lens: object = None


class _Member(str):
    def get_class(self):
        module, name = self.rsplit(".", 1)
        return getattr(import_module(module), name)


class AttentionBackendEnum(Enum):
    """Grows by `register`; what it grew by is found by the name."""

    CUSTOM = None

    @classmethod
    def register(cls, name, path):
        if name in cls._member_map_:
            raise ValueError(f"Backend {name} already exists")
        cls._member_map_[name] = _Member(path)


def register_backend(name, path):
    AttentionBackendEnum.register(name, path)
    return lambda cls: cls


_INTERFACE = (AttentionType, AttentionCGSupport, AttentionBackend, AttentionMetadata)
_INTERFACE += (AttentionMetadataBuilder, AttentionImpl, CommonAttentionMetadata)
_MODULES = {
    "vllm": {"__version__": "0.33.0", "__version_tuple__": (0, 33, 0)},
    "vllm.v1": {},
    "vllm.v1.attention": {},
    "vllm.v1.attention.backend": {x.__name__: x for x in _INTERFACE},
    "vllm.v1.attention.backends": {},
    "vllm.v1.attention.backends.registry": {
        x.__name__: x for x in (AttentionBackendEnum, register_backend)
    },
}


@contextmanager
def installed():
    """Puts the modules where `import` finds them; afterwards nothing is left of them."""
    before = set(sys.modules)
    for name, contents in _MODULES.items():
        module = ModuleType(name)
        vars(module).update(contents)
        sys.modules[name] = module
    try:
        yield
    finally:
        AttentionBackendEnum._member_map_.pop("FLASH_ATTN_SM120", None)
        for name in set(sys.modules) - before:
            if name.startswith(("vllm", "flash_attn_sm120.vllm.")):
                del sys.modules[name]
