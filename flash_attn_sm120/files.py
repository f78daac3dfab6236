"""Files that a process loads at run time: read without waiting, written as a whole, and trusted
only where other users cannot have changed them.

A path is trusted if every directory and symlink on it, from the root down, belongs to this user or
to root, and other users may not write to any of the directories. A sticky directory such as /tmp
may stand on the way, but not at the end: others can add entries to it, and cannot replace ours.
Windows guards a user's folders by itself.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import stat
import sys
import warnings
from pathlib import Path
from types import TracebackType

LIMIT = 64 << 20  # bytes; far larger than any cubin or table
LINE = 200  # characters of a message

_HAS_USERS = hasattr(os, "geteuid")  # not on Windows
_ALWAYS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _ALWAYS
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)

_KINDS = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISLNK, "a symbolic link"),
)


class Directory:
    """An open directory: its files are reached through it, whatever its path leads to meanwhile."""

    def __init__(self, path: Path, flags: int = 0, parent: int | None = None) -> None:
        self.path = path
        self.fd: int | None = None  # on Windows, which opens no directories: paths then
        if _HAS_USERS:
            name = path.name if parent is not None else path
            self.fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | _ALWAYS | flags, dir_fd=parent)

    def __enter__(self) -> Directory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.fd is not None:
            os.close(self.fd)

    def name(self, name: str) -> str:
        """How functions with a parameter ``dir_fd``, which is ``self.fd``, get at a file."""
        return name if self.fd is not None else str(self.path / name)


# ---- reading and writing -------------------------------------------------------------------------


def open_regular(
    path: str | os.PathLike[str], flags: int = os.O_RDONLY, dir_fd: int | None = None
) -> int:
    """A descriptor of a regular file, which ``os.O_CREAT`` may create; other kinds are refused.

    Raises:
        OSError: it cannot be opened, or is no regular file.
    """
    with contextlib.suppress(FileNotFoundError):  # some devices act as soon as they are opened
        follow = not flags & _NOFOLLOW
        _check_regular(path, os.stat(path, dir_fd=dir_fd, follow_symlinks=follow))
    fd = os.open(path, flags | _ALWAYS | _NONBLOCK, 0o644, dir_fd=dir_fd)
    try:
        _check_regular(path, os.fstat(fd))
    except BaseException:
        os.close(fd)
        raise
    return fd


def read(path: str | os.PathLike[str], limit: int = LIMIT) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger than ``limit`` bytes.
    """
    return _read_all(open_regular(path), path, limit)


def read_trusted(name: str, where: Directory, limit: int = LIMIT) -> bytes:
    """The content of a regular file in a trusted directory, which other users cannot write.

    Raises:
        OSError: as :func:`read`; or others may write to the file, or it belongs to another user.
    """
    fd = open_regular(where.name(name), os.O_RDONLY | _NOFOLLOW, where.fd)
    try:
        reason = _why_not_ours(where.path / name, os.fstat(fd))
        if reason:
            raise PermissionError(reason)
    except BaseException:
        os.close(fd)
        raise
    return _read_all(fd, name, limit)


def write(name: str, content: bytes, where: Directory) -> None:
    """Replaces a file as a whole or not at all; others may read it as far as the umask says.

    Raises:
        OSError: it cannot be written; nothing is left behind then.
    """
    temporary = where.name(f"{Path(name).stem}.{os.urandom(8).hex()}.tmp")
    fd = os.open(temporary, _NEW | _NOFOLLOW, 0o644, dir_fd=where.fd)
    try:
        with open(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(fd)  # a crash after the rename must not leave a file of zeros
        os.replace(temporary, where.name(name), src_dir_fd=where.fd, dst_dir_fd=where.fd)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=where.fd)
        raise


def open_lock(name: str, where: Directory) -> int:
    """A descriptor of a file to lock, which is created if it is missing.

    Raises:
        OSError: as :func:`open_regular`.
    """
    return open_regular(where.name(name), os.O_RDWR | os.O_CREAT | _NOFOLLOW, where.fd)


def make_directory(path: Path) -> None:
    """Creates a directory and those above it, never writable by others, whatever the umask.

    Raises:
        OSError: it cannot be created, or is no directory.
    """
    for directory in (*reversed(path.parents), path):
        directory.mkdir(mode=0o755, exist_ok=True)


def _read_all(fd: int, path: str | os.PathLike[str], limit: int) -> bytes:
    with open(fd, "rb") as file:
        size = os.fstat(fd).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"{size} bytes, more than {limit}", os.fspath(path))
        return file.read(size)


def _check_regular(path: str | os.PathLike[str], status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kinds = (kind for is_kind, kind in _KINDS if is_kind(status.st_mode))
        reason = f"{next(kinds, 'a special file')}, not a regular file"
        raise OSError(errno.EINVAL, reason, os.fspath(path))


# ---- trust ---------------------------------------------------------------------------------------


def why_not_trusted(path: Path) -> str:
    """Why other users could change what is found under an absolute path; "" if they cannot.

    What does not exist yet is trusted if only this user and root can create it.

    Raises:
        OSError: a directory on the way cannot be looked at.
    """
    if not _HAS_USERS:
        return ""
    here, names, shared = Path(), list(reversed(path.parts)), False
    for _ in range(1000):  # symlinks may go in circles
        if not names:
            return ""
        name = names.pop()
        if name == "..":
            names.extend(reversed(here.parent.parts))
            continue
        entry, shared = here / name, shared and name != os.sep
        try:
            status = os.lstat(entry)
        except FileNotFoundError:
            return ""
        if not _is_ours(status.st_uid, shared):
            return f"{entry} belongs to user {status.st_uid}"
        if stat.S_ISLNK(status.st_mode):
            names.extend(reversed(Path(os.readlink(entry)).parts))
            continue
        is_directory = stat.S_ISDIR(status.st_mode)  # else opening it fails
        here, shared = entry, is_directory and _others_may_write(entry, status)
        if shared and not (names and status.st_mode & stat.S_ISVTX):
            return f"other users may write to {entry}"
    return f"{path} has too many symbolic links"


def open_trusted(path: Path) -> Directory:
    """A trusted directory, which is created if it is missing.

    Raises:
        OSError: it cannot be used; PermissionError, if it is because of other users.
    """
    reason = why_not_trusted(path)
    if reason:
        raise PermissionError(reason)
    make_directory(path)
    return Directory(path)


def private_name() -> str:
    """The name of a user's own subdirectory in a directory that users share."""
    return f"flash_attn_sm120-{os.geteuid()}"


def open_private(shared: Path) -> Directory:
    """The user's own subdirectory of a directory that users share; only its owner can enter it.

    It is judged by what it is once it is open, since others may replace what the path leads to.

    Raises:
        OSError: it cannot be used.
    """
    path = shared / private_name()
    with Directory(shared) as parent:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path.name, 0o700, dir_fd=parent.fd)
        opened = Directory(path, _NOFOLLOW, parent.fd)
    status = os.stat(opened.fd if opened.fd is not None else path)
    if status.st_uid != os.geteuid() or status.st_mode & 0o022:
        opened.__exit__(None, None, None)
        raise PermissionError(f"{path} is not this user's alone")
    return opened


def _why_not_ours(path: Path, status: os.stat_result) -> str:
    if not _HAS_USERS:
        return ""
    if not _is_ours(status.st_uid, False):
        return f"{path} belongs to user {status.st_uid}"
    return f"other users may write to {path}" if _others_may_write(path, status) else ""


def _is_ours(uid: int, in_shared: bool) -> bool:
    """Whether an owner is this user or root, who must not be guessed where others add entries."""
    return uid in (0, os.geteuid()) or (not in_shared and uid == _hidden_root())


@functools.cache
def _hidden_root() -> int | None:
    """As which user root's files appear in a rootless container, where root does not exist."""
    try:
        ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
        if any(int(first) == 0 for first, _, _ in ranges):
            return None
        return int(Path("/proc/sys/fs/overflowuid").read_text())
    except (OSError, ValueError):
        return None


def _others_may_write(path: Path, status: os.stat_result) -> bool:
    if status.st_mode & stat.S_IWOTH:
        return True
    return bool(status.st_mode & stat.S_IWGRP) and not _is_private_group(path, status)


def _is_private_group(path: Path, status: os.stat_result) -> bool:
    """Whether a group is its owner alone, as where every user has a group and the umask is 002."""
    import grp
    import pwd

    if status.st_gid == 0:  # containers run any user in root's group
        return False
    try:
        user, group = pwd.getpwuid(status.st_uid).pw_name, grp.getgrgid(status.st_gid)
    except KeyError:
        return False
    if group.gr_name != user or not set(group.gr_mem) <= {user}:
        return False
    try:  # with an access list, the bits of the group are those of all whom it names
        os.getxattr(path, "system.posix_acl_access")
    except OSError:
        return True
    except AttributeError:  # not on Linux
        return False
    return False


# ---- messages ------------------------------------------------------------------------------------


def one_line(text: str, limit: int = LINE) -> str:
    """A text as one line of at most ``limit`` characters: its start and its end."""
    line = " ".join(text.split())
    if len(line) <= limit:
        return line
    end = limit // 3
    return f"{line[: limit - end - 5]} ... {line[-end:]}"


def warn(message: str, stacklevel: int = 2) -> None:
    """Warns of a file that is not used; prints where warnings are errors: the call goes on."""
    try:
        warnings.warn(one_line(message), RuntimeWarning, stacklevel=stacklevel + 1)
    except RuntimeWarning as warning:
        print(f"flash_attn_sm120: {warning}", file=sys.stderr)
