"""Content-addressed cache of cubins on disk, shared by all processes of a user.

PTX, for a driver that stands in for CUDA's, is kept in the same way.

The directory is ``$FA_SM120_CACHE_DIR``, else ``$XDG_CACHE_HOME/flash_attn_sm120``, else
``~/.cache/flash_attn_sm120``. It holds::

    <key>.cubin    MAGIC, SHA-256 of key and cubin, cubin; whatever does not verify is a miss
    <key>.lock     locked by the process that builds the cubin, gone when it is done
    <key>.*.tmp    a file being written; left behind only by a killed process

What was used longest ago is removed beyond MAX_BYTES. To clear the cache, delete the directory:
that is safe at any time.

Cubins are code: directory and files must be such that other users cannot change them (files.py).
In a directory of ``FA_SM120_CACHE_DIR`` that users share, each has a subdirectory. What root put
into a directory that others cannot write, say into an image, serves every user.

A cache that cannot be used never fails a call: the kernel is compiled, and one RuntimeWarning per
process says why.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from flash_attn_sm120 import files

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
    """Where the cache is. Relative only if the process has no home or no working directory."""
    where = _chosen()
    with contextlib.suppress(OSError):
        if _why_shared(where):
            return where / files.private_name()
    return where


def get_or_build(key: str, build: Callable[[], bytes]) -> bytes:
    """The bytes cached under ``key``, else those of ``build()``, which are cached then.

    Processes and threads that miss the same key at the same time wait for the first one's bytes.

    Raises:
        Whatever ``build`` raises; nothing of the cache's own.
    """
    try:
        opened = _open()
    except OSError as error:
        _warn(directory(), error)
        return build()
    with opened as where:
        payload = _read(key, where)
        if payload is not None:
            return payload
        with _locked(f"{key}.lock", where):
            payload = _read(key, where)  # the process that held the lock may have written it
            if payload is None:
                payload = build()
                try:
                    files.write(_file(key), _seal(key, payload) + payload, where)
                except OSError as error:
                    _warn(where.path, error)
                else:
                    with contextlib.suppress(OSError):  # other processes remove files too
                        _trim(where)
    return payload


# ---- one file ------------------------------------------------------------------------------------


def _file(key: str) -> str:
    return f"{key}.cubin"


def _seal(key: str, payload: bytes) -> bytes:
    """What stands before the payload; with the key, so that a copy under another name is no hit."""
    return MAGIC + hashlib.sha256(key.encode() + payload).digest()


def _read(key: str, where: files.Directory) -> bytes | None:
    try:
        content = files.read_trusted(_file(key), where)
    except OSError:
        return None
    header = len(MAGIC) + _DIGEST_BYTES
    if content[:header] != _seal(key, content[header:]):
        return None
    with contextlib.suppress(OSError):
        # For _trim(), and by hand, because most file systems record reads once a day at best.
        path = where.name(_file(key))
        built = os.stat(path, dir_fd=where.fd).st_mtime_ns
        os.utime(path, ns=(time.time_ns(), built), dir_fd=where.fd)
    return content[header:]


def _trim(where: files.Directory) -> None:
    """Removes the cache's files, but no others, beyond the MAX_BYTES used last."""
    found = []
    with os.scandir(where.path if where.fd is None else where.fd) as entries:
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            if _OURS.fullmatch(entry.name) and stat.S_ISREG(status.st_mode):
                found.append((status.st_atime_ns, status.st_size, entry.name))
    total = 0
    for _, size, name in sorted(found, reverse=True):
        total += size
        if total > MAX_BYTES:
            os.unlink(where.name(name), dir_fd=where.fd)


# ---- the directory -------------------------------------------------------------------------------


def _chosen() -> Path:
    """The directory that the environment names, whether it can be used or not."""
    if chosen := os.environ.get("FA_SM120_CACHE_DIR"):
        path = os.path.expanduser(chosen)
        with contextlib.suppress(FileNotFoundError):  # the working directory was removed
            path = os.path.abspath(path)
        return Path(path)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the XDG specification: ignore relative paths
        base = os.path.expanduser("~/.cache")
    return Path(base, "flash_attn_sm120")


def _why_shared(where: Path) -> str:
    """Why others can change a directory named on purpose; "" if they cannot, or none is named.

    Raises:
        OSError: a directory on the way cannot be looked at.
    """
    if not os.environ.get("FA_SM120_CACHE_DIR") or not where.is_absolute():
        return ""
    return files.why_not_trusted(where)


def _open() -> files.Directory:
    """Creates the directory if it is missing, and opens it if it is one to trust.

    Raises:
        OSError: it cannot be used.
    """
    where = _chosen()
    if not where.is_absolute():
        missing = "working" if os.environ.get("FA_SM120_CACHE_DIR") else "home"
        raise FileNotFoundError(f"{where}: there is no {missing} directory")
    shared = _why_shared(where)
    if not shared:
        return files.open_trusted(where)
    try:
        opened = files.open_private(where)
    except OSError as error:
        raise PermissionError(
            f"{shared}, and {error.strerror or error} for a subdirectory"
        ) from error
    _warn_once(
        f"{shared}: compiled kernels are kept in its subdirectory {opened.path.name}, which is "
        "this user's alone"
    )
    return opened


def _warn(where: Path, error: OSError) -> None:
    reason = f"{where}: {error.strerror}" if error.strerror else str(error)
    _warn_once(
        f"compiled kernels are not cached: {reason}; FA_SM120_CACHE_DIR names another directory"
    )


def _warn_once(message: str) -> None:
    global _warned
    if not _warned:
        _warned = True
        files.warn(message, stacklevel=4)


# ---- locks ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(name: str, where: files.Directory) -> Iterator[None]:
    """Holds a lock if it can be had: without it, two may compile the same, no more."""
    fd = None
    with contextlib.suppress(OSError):
        fd = files.open_lock(name, where)
    held = fd is not None and _acquire(fd)
    try:
        yield
    finally:
        if fd is not None:
            if held:
                # Processes that wait on the removed file, or lock a new one, read the cache again.
                with contextlib.suppress(OSError):
                    os.unlink(where.name(name), dir_fd=where.fd)
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
