"""Files at run time: what other users could have changed is not used, what is no file never waits."""

import grp
import os
import pwd
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from flash_attn_sm120 import cache, files, tuned_tiles
from flash_attn_sm120.tune.journal import Journal
from helpers.children import run_python

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has no such users")

KEY, OTHER_KEY = "ab" * 32, "cd" * 32
STRANGER = 4242


@pytest.fixture
def where(tmp_path, monkeypatch):
    """A cache directory of this user with one kernel, in a process that has not warned yet."""
    directory = tmp_path / "cache"
    monkeypatch.setenv("FA_SM120_CACHE_DIR", str(directory))
    monkeypatch.setattr(cache, "_warned", False)
    cache.get_or_build(KEY, lambda: b"cubin")
    return directory


@pytest.fixture
def stranger_owns(monkeypatch):
    """stranger_owns(path): the path belongs to another user from now on."""
    paths, lstat, fstat = set(), os.lstat, os.fstat

    def changed(status):
        if (status.st_dev, status.st_ino) not in paths:
            return status
        fields = list(status)
        fields[stat.ST_UID] = STRANGER
        return os.stat_result(fields)

    monkeypatch.setattr(os, "lstat", lambda path: changed(lstat(path)))
    monkeypatch.setattr(os, "fstat", lambda fd: changed(fstat(fd)))
    monkeypatch.setattr(os, "stat", lambda *args, stat=os.stat, **kw: changed(stat(*args, **kw)))

    def own(path):
        status = lstat(path)
        paths.add((status.st_dev, status.st_ino))

    return own


def unexpected():
    raise AssertionError("a hit must not build")


# ---- directories ---------------------------------------------------------------------------------


def test_a_directory_of_this_user_is_trusted(where):
    assert files.why_not_trusted(where) == ""
    assert files.why_not_trusted(where / "not" / "there") == ""
    assert files.why_not_trusted(where / ".." / "cache") == ""


def test_a_sticky_directory_may_stand_on_the_way_but_not_at_the_end(where):
    where.parent.chmod(0o1777)
    assert files.why_not_trusted(where) == ""
    assert "other users may write to" in files.why_not_trusted(where.parent)


@pytest.mark.parametrize("mode", [0o775, 0o757, 0o777, 0o1775, 0o1777])
def test_a_directory_that_others_may_write_is_not_trusted(where, mode):
    where.chmod(mode)
    assert files.why_not_trusted(where) == f"other users may write to {where}"


@pytest.mark.parametrize("mode", [0o775, 0o777])
def test_others_must_not_be_able_to_replace_a_directory_on_the_way(where, mode):
    where.parent.chmod(mode)
    assert files.why_not_trusted(where) == f"other users may write to {where.parent}"


@pytest.mark.parametrize("up", [0, 1])
def test_a_directory_of_another_user_is_not_trusted(where, stranger_owns, up):
    directory = (where, *where.parents)[up]
    stranger_owns(directory)
    assert files.why_not_trusted(where) == f"{directory} belongs to user {STRANGER}"


def link_to_the_directory(where):
    link = where.parent / "link"
    link.symlink_to(where)
    return link, link


def link_on_the_way(where):
    link = where.parent / "link"
    link.symlink_to("..")
    return link, link / where.parent.name / where.name


def link_behind_a_link(where):
    link, _ = link_to_the_directory(where)
    first = where.parent / "first"
    first.symlink_to("link")
    return link, first


@pytest.mark.parametrize("make", [link_to_the_directory, link_on_the_way, link_behind_a_link])
def test_a_symlink_counts_by_its_owner(where, stranger_owns, make):
    link, path = make(where)
    assert files.why_not_trusted(path) == ""
    assert path.samefile(where)
    stranger_owns(link)
    assert files.why_not_trusted(path) == f"{link} belongs to user {STRANGER}"


def test_where_a_symlink_leads_is_looked_at(where):
    shared = where.parent / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    where.parent.joinpath("link").symlink_to("shared/below")
    assert "other users may write" in files.why_not_trusted(where.parent / "link")


def test_symlinks_in_a_circle_end(where):
    (where / "one").symlink_to("two")
    (where / "two").symlink_to("one")
    assert "too many symbolic links" in files.why_not_trusted(where / "one" / "cache")


@pytest.mark.parametrize(
    "group, members, is_private", [("me", [], True), ("me", ["me"], True), ("me", ["you"], False)]
)
def test_a_group_of_the_owner_alone_is_no_other_user(
    where, monkeypatch, group, members, is_private
):
    """As on systems where each user has a group, and the umask is 002."""
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: SimpleNamespace(pw_name="me"))
    monkeypatch.setattr(grp, "getgrgid", lambda gid: SimpleNamespace(gr_name=group, gr_mem=members))
    os.chown(where, -1, 7 if os.geteuid() == 0 else os.getgid())
    where.chmod(0o775)
    if os.stat(where).st_gid == 0:
        pytest.skip("needs a group other than root's")
    assert (files.why_not_trusted(where) == "") == is_private


def test_the_group_of_root_is_never_private(where, monkeypatch):
    """Containers run arbitrary users in it."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    where.chmod(0o775)
    assert files.why_not_trusted(where)


def test_root_that_a_container_hides_is_root_but_in_shared_directories(
    where, stranger_owns, monkeypatch
):
    stranger_owns(where.parent.parent)
    monkeypatch.setattr(files, "_hidden_root", lambda: STRANGER)
    assert files.why_not_trusted(where) == ""
    where.parent.chmod(0o1777)
    stranger_owns(where)
    assert "belongs to user" in files.why_not_trusted(where)


def test_the_walk_from_root_is_that_of_this_process():
    assert files._hidden_root() in (None, 65534)
    assert files.why_not_trusted(Path("/")) == ""


# ---- files in the cache --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_file_that_others_may_write_is_a_miss(where, mode):
    (where / f"{KEY}.cubin").chmod(mode)
    assert cache.get_or_build(KEY, lambda: b"rebuilt") == b"rebuilt"
    assert cache.get_or_build(KEY, unexpected) == b"rebuilt"


def test_a_file_of_another_user_is_a_miss(where, stranger_owns):
    stranger_owns(where / f"{KEY}.cubin")
    assert cache.get_or_build(KEY, lambda: b"rebuilt") == b"rebuilt"


def test_a_symlink_in_place_of_a_file_is_a_miss_and_is_replaced(where, tmp_path):
    planted = tmp_path / "planted"
    (where / f"{KEY}.cubin").rename(planted)
    (where / f"{KEY}.cubin").symlink_to(planted)
    assert cache.get_or_build(KEY, lambda: b"rebuilt") == b"rebuilt"
    assert not (where / f"{KEY}.cubin").is_symlink()


def test_a_directory_that_is_swapped_while_a_kernel_is_built_is_not_written_to(where):
    """The files are those of the directory that was looked at, not of what its path names later."""

    def build():
        where.rename(where.with_name("moved"))
        where.mkdir(mode=0o777)
        return b"built"

    assert cache.get_or_build(OTHER_KEY, build) == b"built"
    assert list(where.iterdir()) == []
    assert (where.with_name("moved") / f"{OTHER_KEY}.cubin").is_file()


# ---- directories that users share ----------------------------------------------------------------


def test_users_that_share_a_directory_have_subdirectories(where):
    where.chmod(0o1777)
    with pytest.warns(RuntimeWarning) as caught:
        assert cache.get_or_build(KEY, lambda: b"mine") == b"mine", "not what lies there"
        assert cache.get_or_build(KEY, unexpected) == b"mine"
    assert len(caught) == 1
    message = str(caught[0].message)
    private = where / f"flash_attn_sm120-{os.geteuid()}"
    assert "other users may write" in message and private.name in message and len(message) <= 200
    assert cache.directory() == private
    assert private.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in private.iterdir()] == [f"{KEY}.cubin"]


@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_a_directory_of_another_user_gets_a_subdirectory_if_it_may(where, stranger_owns, mode):
    where.chmod(mode)
    stranger_owns(where)
    with pytest.warns(RuntimeWarning, match=f"belongs to user {STRANGER}"):
        assert cache.get_or_build(KEY, lambda: b"mine") == b"mine"
    assert cache.get_or_build(KEY, unexpected) == b"mine"


def of_another_user(private, stranger_owns):
    private.mkdir(mode=0o700)
    stranger_owns(private)


def written_by_others(private, _):
    private.mkdir()
    private.chmod(0o777)


def a_symlink(private, _):
    private.with_name("elsewhere").mkdir(mode=0o700)
    private.symlink_to("elsewhere")


def a_file(private, _):
    private.touch()


@pytest.mark.parametrize("plant", [of_another_user, written_by_others, a_symlink, a_file])
def test_a_subdirectory_that_another_user_made_is_not_used(where, stranger_owns, plant):
    where.chmod(0o1777)
    plant(where / f"flash_attn_sm120-{os.geteuid()}", stranger_owns)
    with pytest.warns(RuntimeWarning, match="not cached"):
        assert cache.get_or_build(KEY, lambda: b"first") == b"first"
    assert cache.get_or_build(KEY, lambda: b"second") == b"second"


def test_only_a_directory_that_was_named_gets_a_subdirectory(where, monkeypatch):
    monkeypatch.delenv("FA_SM120_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(where))
    where.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="other users may write"):
        assert cache.get_or_build(KEY, lambda: b"built") == b"built"
    assert [path.name for path in where.iterdir()] == [f"{KEY}.cubin"], "nothing was made"


# ---- what root warmed ----------------------------------------------------------------------------

GET = f"""
import os, sys, types
package = sys.modules["flash_attn_sm120"] = types.ModuleType("flash_attn_sm120")
package.__path__ = [{str(Path(cache.__file__).parent)!r}]
from flash_attn_sm120 import cache
uid, umask = map(int, sys.argv[1:])
os.umask(umask)
os.setgroups([]), os.setgid(uid), os.setuid(uid)
print(cache.get_or_build({KEY!r}, lambda: b"built by %d" % uid))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("first, umask", [(0, 0o022), (0, 0o002), (0, 0), (STRANGER, 0o022)])
def test_what_root_put_into_an_image_serves_its_users(first, umask):
    """And what another user put there does not."""

    def run(uid):
        environment = {"FA_SM120_CACHE_DIR": f"{base}/opt/cache"}
        command = [sys.executable, "-c", GET, str(uid), str(umask)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")

    with tempfile.TemporaryDirectory() as base:  # pytest's own are for this user alone
        os.chmod(base, 0o755)
        (Path(base) / "opt").mkdir()
        os.chown(Path(base) / "opt", first, first)
        assert run(first).stdout == f"b'built by {first}'\n"
        other = run(65534)
    if first == 0:
        assert (other.stdout, other.stderr) == ("b'built by 0'\n", "")
    else:
        assert other.stdout == "b'built by 65534'\n" and f"user {first}" in other.stderr


# ---- special files -------------------------------------------------------------------------------


def fifo(path):
    os.mkfifo(path)
    return path, "a named pipe"


def unix_socket(path):
    with socket.socket(socket.AF_UNIX) as listening:
        directory = os.open(path.parent, os.O_RDONLY)
        listening.bind(f"/proc/self/fd/{directory}/{path.name}")  # paths of sockets are short
        os.close(directory)
    return path, "a socket"


def directory(path):
    path.mkdir()
    return path, "a directory"


def endless(path):
    return Path("/dev/zero"), "a character device"


def link_to_endless(path):
    path.symlink_to("/dev/zero")
    return path, "a character device"


SPECIAL = [fifo, unix_socket, directory, endless, link_to_endless]


@pytest.mark.parametrize("make", SPECIAL)
def test_a_special_file_is_refused_by_its_kind(tmp_path, make):
    path, kind = make(tmp_path / "special")
    with pytest.raises(OSError, match=f"{kind}, not a regular file: '{path}'"):
        files.read(path)


def test_a_file_that_is_too_large_is_refused(tmp_path):
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="1099511627776 bytes, more than"):
        files.read(tmp_path / "sparse")


@pytest.mark.parametrize("suffix", ["cubin", "lock"])
@pytest.mark.parametrize("make", [fifo, unix_socket, link_to_endless])
def test_a_special_file_in_the_cache_never_waits(where, make, suffix):
    make(where / f"{OTHER_KEY}.{suffix}")
    assert cache.get_or_build(OTHER_KEY, lambda: b"built") == b"built"
    assert cache.get_or_build(OTHER_KEY, unexpected) == b"built"


@pytest.mark.parametrize("make", SPECIAL)
def test_a_table_that_is_no_file_is_named_and_not_waited_for(tmp_path, monkeypatch, make):
    path, kind = make(tmp_path / "tiles.json")
    monkeypatch.setenv("FA_SM120_TILES", str(path))
    with pytest.warns(RuntimeWarning, match=kind) as caught:
        tuned_tiles.load()
    assert len(str(caught[0].message)) <= 200
    assert not tuned_tiles.in_use()


@pytest.mark.parametrize("make", SPECIAL)
def test_measurements_that_are_no_file_are_named_and_not_waited_for(tmp_path, make):
    path, kind = make(tmp_path / "journal.jsonl")
    machine = SimpleNamespace(identity=dict, facts=dict)
    with pytest.raises(RuntimeError, match=f"{path} cannot be read: {kind}"):
        Journal(path, machine)
    journal = Journal(tmp_path / "none.jsonl", machine)
    journal.path = path
    with pytest.raises(RuntimeError, match=f"cannot be written to {path}: {kind}"):
        journal.add(None, {})


@pytest.mark.parametrize("make", [fifo, link_to_endless, directory])
def test_a_driver_that_is_no_file_is_not_waited_for(tmp_path, make):
    path, _ = make(tmp_path / "driver")
    code = """
from flash_attn_sm120 import warmup
try:
    warmup()
except RuntimeError as error:
    print(error)
"""
    done = run_python(code, tmp_path, timeout=60, FA_SM120_DRIVER=str(path))
    (line,) = done.stdout.splitlines()
    assert line.startswith("no CUDA driver: ") and "it is not a regular file" in line


# ---- what never fails a call ---------------------------------------------------------------------


def test_messages_are_one_line_that_keeps_both_ends():
    text = files.one_line(f"what\n  came: {'x' * 1000}; what to do")
    assert len(text) <= 200 and text.startswith("what came: x") and text.endswith("x; what to do")
    assert files.one_line("short\n") == "short"


ATTEND = """
import torch
from flash_attn_sm120 import cache, flash_attn_func
q = torch.zeros(1, 1, 1, 8)
flash_attn_func(q, q, q)
print(cache.get_or_build("ab" * 32, lambda: b"built"))
"""


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"FA_SM120_CACHE_DIR": "/proc/nowhere"}, "not cached: /proc/nowhere: "),
        ({"FA_SM120_CACHE_DIR": "/dev/null"}, "not cached: /dev/null: "),
        ({"FA_SM120_TILES": "/dev/null"}, "a character device, not a regular file, in /dev/null"),
        ({"FA_SM120_TILES": "/dev/shm"}, "a directory, not a regular file, in /dev/shm"),
    ],
)
def test_where_warnings_are_errors_calls_go_on(tmp_path, environment, message):
    code = f"import warnings\nwarnings.simplefilter('error')\n{ATTEND}"
    environment = {"FA_SM120_CACHE_DIR": str(tmp_path / "cache"), **environment}
    done = run_python(code, tmp_path, **environment)
    assert (done.returncode, done.stdout) == (0, "b'built'\n"), done.stderr
    (line,) = done.stderr.splitlines()
    assert message in line


@pytest.mark.parametrize("variable", ["FA_SM120_CACHE_DIR", "FA_SM120_TILES", "XDG_CACHE_HOME"])
def test_a_working_directory_that_is_gone_fails_nothing(tmp_path, variable):
    code = f"""
import os, tempfile
os.chdir(tempfile.mkdtemp())
os.rmdir(os.getcwd())
{ATTEND}"""
    done = run_python(code, tmp_path, **{"FA_SM120_CACHE_DIR": str(tmp_path), variable: "relative"})
    assert (done.returncode, done.stdout) == (0, "b'built'\n"), done.stderr
