"""A door into vLLM: ``--attention-backend FLASH_ATTN_SM120``.

vLLM finds :func:`register` by the entry point ``vllm.general_plugins`` and calls it in each of its
processes. It adds a name to vLLM's list of attention backends, and nothing else: a model is served
by this attention where the name is asked for. vLLM is imported by :func:`register` and not before.
"""

from __future__ import annotations

NAME = "FLASH_ATTN_SM120"
_OLDEST_TRIED, _NEWEST_TRIED = (0, 33), (0, 33)
_BACKEND = f"{__name__}.backend.Backend"


def register() -> None:
    """Adds the name to vLLM's attention backends; a second call changes nothing.

    Raises:
        NotImplementedError: this vLLM takes no backends by a name of their own.
    """
    if not registered():
        from vllm.v1.attention.backends.registry import register_backend

        register_backend(NAME, _BACKEND)


def registered() -> bool:
    """Whether vLLM in this process has the name. Imports vLLM.

    Raises:
        NotImplementedError: as :func:`register`.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if not hasattr(AttentionBackendEnum, "register"):
        raise NotImplementedError("it takes no attention backends by a name of their own")
    return NAME in AttentionBackendEnum.__members__
