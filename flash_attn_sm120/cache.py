"""Content-addressed cache of cubins on disk, shared by all processes of a user.

PTX, for a driver that stands in for CUDA's, is kept in the same way.

The directory is ``$FA_SM120_CACHE_DIR``, else ``$XDG_CACHE_HOME/flash_attn_sm120``, else
``~/.cache/flash_attn_sm120``. It holds::

    <key>.cubin    MAGIC, SHA-256 of key and cubin, cubin; whatever does not verify is a miss
    <key>.lock     locked by the process that builds the cubin, gone when it is done
    <key>.*.tmp    a file being written; left behind only by a killed process

What was used longest ago is removed beyond MAX_BYTES. To clear the cache, delete the directory:
that is safe at any time.

A cache that cannot be used never fails a call: the kernel is compiled, and one RuntimeWarning per
process says why. Cubins are code, so a directory that others may write to counts as unusable.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SCHEMA = 1  # part of every key: raise it when the meaning of an ingredient changes
MAGIC = b"FASM120\n"
MAX_BYTES = 1 << 30  # several thousand variants
LOCK_SECONDS = 60.0  # longer than any variant compiles; after that, two compile the same
POLL_SECONDS = 0.05

_DIGEST_BYTES = hashlib.sha256().digest_size
_OURS = re.compile(r"[0-9a-f]{64}\.(cubin|lock|\w+\.tmp)")
_warned = False


def make_key(
    sources: Mapping[str, bytes],
    kernel: str,
    options: tuple[str, ...],
    arch: str,
    compiler: str,
) -> str:
    """The key of one compilation: 64 hexadecimal digits that differ when any ingredient does.

    Args:
        sources: file name -> text, of all files that the program may include.
        kernel: which of them is the program.
        options: compiler options, in order.
        arch: target, say ``"sm_120f"``.
        compiler: name and version, say ``"nvrtc 13.0"``.
    """
    # repr() of nested tuples of str and bytes can be read back, so no two ingredients run together.
    ingredients = (SCHEMA, sorted(sources.items()), kernel, tuple(options), arch, compiler)
    return hashlib.sha256(repr(ingredients).encode()).hexdigest()


def directory() -> Path:
    """Where the cache is. Relative only if the process has no home directory."""
    if chosen := os.environ.get("FA_SM120_CACHE_DIR"):
        return Path(os.path.abspath(os.path.expanduser(chosen)))
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification: ignore relative paths
        base = os.path.expanduser("~/.cache")
    return Path(base, "flash_attn_sm120")


def get_or_build(key: str, build: Callable[[], bytes]) -> bytes:
    """The bytes cached under ``key``, else those of ``build()``, which are cached then.

    Processes and threads that miss the same key at the same time wait for the first one's bytes.

    Raises:
        Whatever ``build`` raises; nothing of the cache's own.
    """
    where = directory()
    try:
        _prepare(where)
    except OSError as error:
        _warn(where, error)
        return build()
    path = where / f"{key}.cubin"
    payload = _read(path)
    if payload is not None:
        return payload
    with _locked(where / f"{key}.lock"):
        payload = _read(path)  # whoever held the lock before may have written it
        if payload is None:
            payload = build()
            try:
                _write(path, payload)
            except OSError as error:
                _warn(where, error)
    return payload


# ---- one file ------------------------------------------------------------------------------------


def _seal(path: Path, payload: bytes) -> bytes:
    """What stands before the payload; with the key, so that a copy under another name is no hit."""
    return MAGIC + hashlib.sha256(path.stem.encode() + payload).digest()


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    header = len(MAGIC) + _DIGEST_BYTES
    if content[:header] != _seal(path, content[header:]):
        return None
    with contextlib.suppress(OSError):
        # For _trim(), and by hand, because most file systems record reads once a day at best.
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    return content[header:]


def _write(path: Path, payload: bytes) -> None:
    """Replaces ``path`` as a whole or not at all."""
    fd, temporary = tempfile.mkstemp(".tmp", f"{path.stem}.", path.parent)
    try:
        with open(fd, "wb") as file:
            file.write(_seal(path, payload) + payload)
            file.flush()
            os.fsync(fd)  # a crash after the rename must not leave a file of zeros
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    with contextlib.suppress(OSError):  # other processes remove files too
        _trim(path.parent)


def _trim(where: Path) -> None:
    """Removes the cache's files, but no others, beyond the MAX_BYTES used last."""
    files = [
        (entry.stat().st_atime_ns, entry.stat().st_size, entry.path)
        for entry in os.scandir(where)
        if _OURS.fullmatch(entry.name)
    ]
    total = 0
    for _, size, path in sorted(files, reverse=True):
        total += size
        if total > MAX_BYTES:
            os.unlink(path)


# ---- the directory -------------------------------------------------------------------------------


def _prepare(where: Path) -> None:
    """Creates the directory, and raises OSError if it is not one to trust."""
    if not where.is_absolute():
        raise FileNotFoundError("there is no home directory")
    where.mkdir(mode=0o700, parents=True, exist_ok=True)
    reason = _distrust(where.stat())
    if reason:
        raise PermissionError(reason)


def _warn(where: Path, error: OSError) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"compiled kernels are not cached in {where}: {error}; every process compiles its own "
            "(FA_SM120_CACHE_DIR names another directory)",
            RuntimeWarning,
            stacklevel=3,
        )


# ---- what differs between platforms --------------------------------------------------------------


def _distrust(status: os.stat_result) -> str:
    """Why not to load code from a directory, or "". Windows guards a user's folders by itself."""
    if not hasattr(os, "geteuid"):
        return ""
    if status.st_uid not in (0, os.geteuid()):  # root could replace this very file
        return f"it belongs to user {status.st_uid}"
    if status.st_mode & stat.S_IWOTH:
        return "every user may write to it"
    return ""


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock ``path`` if it can be had: without it, two may compile the same, no more."""
    fd = None
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    held = fd is not None and _acquire(fd)
    try:
        yield
    finally:
        if fd is not None:
            if held:
                # Whoever waits on the removed file, or locks a new one, looks into the cache again.
                with contextlib.suppress(OSError):
                    os.unlink(path)
                # Closing would not do: a child forked meanwhile may have the file open, too.
                fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)


def _acquire(fd: int) -> bool:
    """Locks an open file within LOCK_SECONDS; False if that fails. The kernel frees it at death."""
    if fcntl is None:
        return False
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(POLL_SECONDS)
        except OSError:  # a file system without locks
            return False
