"""The disk cache: keys, damage, crashes, crowds of processes, directories that cannot be used."""

import errno
import os
import pwd
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_attn_sm120 import cache, files

fcntl = pytest.importorskip("fcntl")

KEY = "ab" * 32
OTHER = "cd" * 32

# cache.py needs the standard library alone, so processes of these tests load it without torch.
LOAD = f"""
import os, sys, time, types
package = sys.modules["flash_attn_sm120"] = types.ModuleType("flash_attn_sm120")
package.__path__ = [{str(Path(cache.__file__).parent)!r}]
from flash_attn_sm120 import cache, files
KEY = {KEY!r}
"""


@pytest.fixture
def where(tmp_path, monkeypatch):
    """The cache's directory, which does not exist yet, in a process that has not warned yet."""
    directory = tmp_path / "cache"
    monkeypatch.setenv("FA_SM120_CACHE_DIR", str(directory))
    monkeypatch.setattr(cache, "_warned", False)
    return directory


def unexpected():
    raise AssertionError("a hit must not build")


def start(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", LOAD + code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process):
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err.decode()
    return out


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing happened within a minute"
        time.sleep(0.01)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def raising(code):
    def function(*_, **__):
        raise OSError(code, os.strerror(code))

    return function


# ---- hits and misses -----------------------------------------------------------------------------


def test_a_miss_builds_and_a_hit_does_not(where):
    assert cache.get_or_build(KEY, lambda: b"cubin") == b"cubin"
    assert cache.get_or_build(KEY, unexpected) == b"cubin"
    assert cache.get_or_build(OTHER, lambda: b"another") == b"another"
    assert cache.get_or_build(KEY, unexpected) == b"cubin"
    assert names(where) == [f"{KEY}.cubin", f"{OTHER}.cubin"]


def test_a_hit_keeps_the_time_of_the_build(where):
    cache.get_or_build(KEY, lambda: b"cubin")
    built = (where / f"{KEY}.cubin").stat()
    cache.get_or_build(KEY, unexpected)
    used = (where / f"{KEY}.cubin").stat()
    assert used.st_mtime_ns == built.st_mtime_ns and used.st_atime_ns > built.st_atime_ns


@pytest.mark.parametrize(
    "umask, directory, file", [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600), (0, 0o755, 0o644)]
)
def test_others_may_read_as_the_umask_says_and_never_write(where, umask, directory, file):
    before = os.umask(umask)
    try:
        cache.get_or_build(KEY, lambda: b"cubin")
    finally:
        os.umask(before)
    assert where.stat().st_mode & 0o777 == directory
    assert (where / f"{KEY}.cubin").stat().st_mode & 0o777 == file


def test_an_error_of_build_is_passed_on_and_leaves_nothing(where):
    def fails():
        raise OSError("the compiler's own error")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(OSError, match="the compiler's own error"):
            cache.get_or_build(KEY, fails)
    assert names(where) == []
    assert cache.get_or_build(KEY, lambda: b"cubin") == b"cubin"


def sealed(key, payload):
    return cache._seal(key, payload) + payload


def flip(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


GOOD = sealed(KEY, b"cubin of the past")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(GOOD[:4], id="cut in the magic"),
        pytest.param(GOOD[:20], id="cut in the digest"),
        pytest.param(GOOD[:40], id="cut before the payload"),
        pytest.param(GOOD[:-1], id="cut in the payload"),
        pytest.param(GOOD + b"\0", id="longer"),
        pytest.param(flip(GOOD, 0), id="flipped magic"),
        pytest.param(flip(GOOD, 20), id="flipped digest"),
        pytest.param(flip(GOOD, len(GOOD) - 1), id="flipped payload"),
        pytest.param(b"\x7fELF" + bytes(100), id="foreign"),
        pytest.param(sealed(OTHER, b"cubin of another key"), id="of another key"),
    ],
)
def test_damage_is_a_miss_and_is_repaired(where, content):
    where.mkdir()
    path = where / f"{KEY}.cubin"
    path.write_bytes(GOOD)
    assert cache.get_or_build(KEY, unexpected) == b"cubin of the past"
    path.write_bytes(content)
    assert cache.get_or_build(KEY, lambda: b"new cubin") == b"new cubin"
    assert cache.get_or_build(KEY, unexpected) == b"new cubin"


# ---- keys ----------------------------------------------------------------------------------------

# Few letters, some of which could pass for separators: near misses and shifted borders are common.
SHORT = st.text("a,'\0", max_size=2)
BYTES = st.sampled_from([b"", b"a", b"aa", b",", b"'", b"\0"])
INGREDIENTS = st.tuples(
    st.dictionaries(SHORT, BYTES, max_size=2),
    SHORT,
    st.lists(SHORT, max_size=2).map(tuple),
    SHORT,
    SHORT,
)


@given(INGREDIENTS, INGREDIENTS)
def test_keys_are_equal_when_all_ingredients_are(one, two):
    assert (cache.make_key(*one) == cache.make_key(*two)) == (one == two)


@given(INGREDIENTS, st.integers(0, 4), INGREDIENTS)
def test_every_ingredient_changes_the_key(one, i, two):
    changed = (*one[:i], two[i], *one[i + 1 :])
    assert (cache.make_key(*one) == cache.make_key(*changed)) == (one[i] == two[i])


@pytest.mark.parametrize(
    "one, two",
    [
        (({"ab": b""}, "", (), "", ""), ({"a": b"b"}, "", (), "", "")),
        (({"a": b"1", "b": b"2"}, "", (), "", ""), ({"a": b"2", "b": b"1"}, "", (), "", "")),
        (({}, "k", ("-DA=1", "-DB=2"), "", ""), ({}, "k", ("-DA=1-DB=2",), "", "")),
        (({}, "k", ("-DA=1", "-DB=2"), "", ""), ({}, "k", ("-DA=1', '-DB=2",), "", "")),
        (({}, "k", ("-DA=1", "-DB=2"), "", ""), ({}, "k", ("-DB=2", "-DA=1"), "", "")),
        (({}, "ks", (), "m", ""), ({}, "k", (), "sm", "")),
        (({}, "k", ("sm_80",), "", ""), ({}, "k", (), "sm_80", "")),
    ],
)
def test_ingredients_do_not_run_together(one, two):
    assert cache.make_key(*one) != cache.make_key(*two)


def test_the_order_of_files_does_not_matter():
    forth, back = {"a.h": b"1", "b.h": b"2"}, {"b.h": b"2", "a.h": b"1"}
    assert cache.make_key(forth, "k", (), "", "") == cache.make_key(back, "k", (), "", "")


def test_the_schema_is_part_of_the_key(monkeypatch):
    before = cache.make_key({}, "k", (), "", "")
    monkeypatch.setattr(cache, "SCHEMA", cache.SCHEMA + 1)
    assert cache.make_key({}, "k", (), "", "") != before


@given(st.sets(INGREDIENTS.map(lambda x: cache.make_key(*x)), max_size=4))
def test_keys_are_file_names_that_never_collide(keys):
    """Also where file names ignore case: every key has a file of its own with its own bytes."""
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setenv("FA_SM120_CACHE_DIR", directory)
        for key in keys:
            assert re.fullmatch("[0-9a-f]{64}", key)
            assert cache.get_or_build(key, key.encode) == key.encode()
        assert len(names(Path(directory))) == len(keys)
        assert all(cache.get_or_build(key, unexpected) == key.encode() for key in keys)


# ---- where it is ---------------------------------------------------------------------------------


def test_environment_variables_in_order(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("FA_SM120_CACHE_DIR", "/mine")
    assert cache.directory() == Path("/mine")
    monkeypatch.setenv("FA_SM120_CACHE_DIR", "~/mine")
    assert cache.directory() == Path("/home/me/mine")
    monkeypatch.setenv("FA_SM120_CACHE_DIR", "here")
    assert cache.directory() == Path.cwd() / "here"
    monkeypatch.setenv("FA_SM120_CACHE_DIR", "")
    assert cache.directory() == Path("/xdg/flash_attn_sm120")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/invalid")
    assert cache.directory() == Path("/home/me/.cache/flash_attn_sm120")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("FA_SM120_CACHE_DIR")
    assert cache.directory() == Path("/home/me/.cache/flash_attn_sm120")


# ---- directories that cannot be used -------------------------------------------------------------


def a_file(where, _):
    where.write_text("not a directory")
    return "File exists"


def below_a_file(where, monkeypatch):
    where.write_text("not a directory")
    monkeypatch.setenv("FA_SM120_CACHE_DIR", str(where / "below"))
    return "Not a directory"


def where_nothing_can_be_made(where, monkeypatch):
    monkeypatch.setenv("FA_SM120_CACHE_DIR", "/proc/flash_attn_sm120")
    return "/proc/flash_attn_sm120"


def nowhere(where, monkeypatch):
    def unknown(_):
        raise KeyError("no such user")

    for variable in ("FA_SM120_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(where.parent)
    return "there is no home directory"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs Linux")
@pytest.mark.parametrize(
    "spoil",
    [a_file, below_a_file, where_nothing_can_be_made, nowhere],
)
def test_an_unusable_directory_warns_once_and_builds(where, monkeypatch, spoil):
    reason = spoil(where, monkeypatch)
    with pytest.warns(RuntimeWarning, match=re.escape(reason)) as caught:
        assert cache.get_or_build(KEY, lambda: b"first") == b"first"
        assert cache.get_or_build(KEY, lambda: b"second") == b"second"
    assert len(caught) == 1
    assert str(cache.directory()) in str(caught[0].message)
    assert names(where.parent) in ([], ["cache"])  # and nothing was written elsewhere


@pytest.mark.parametrize(
    "module, function, code",
    [
        (files, "write", errno.EROFS),
        (files, "write", errno.EACCES),
        (os, "fsync", errno.ENOSPC),
        (os, "fsync", errno.EIO),
        (os, "replace", errno.EDQUOT),
    ],
)
def test_a_failed_write_warns_once_and_leaves_nothing(where, monkeypatch, module, function, code):
    with monkeypatch.context() as patch:
        patch.setattr(module, function, raising(code))
        with pytest.warns(RuntimeWarning, match=re.escape(os.strerror(code))) as caught:
            assert cache.get_or_build(KEY, lambda: b"first") == b"first"
            assert cache.get_or_build(KEY, lambda: b"second") == b"second"
        assert len(caught) == 1 and str(where) in str(caught[0].message)
        assert names(where) == []
    assert cache.get_or_build(KEY, lambda: b"third") == b"third"
    assert cache.get_or_build(KEY, unexpected) == b"third"


def test_a_file_that_the_system_cuts_short_leaves_nothing(where):
    """A true failure of write(2), half way: files of this process may have 4096 bytes."""
    code = """
import resource, warnings
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert cache.get_or_build(KEY, lambda: bytes(10000)) == bytes(10000)
assert [w.category for w in caught] == [RuntimeWarning], caught
"""
    finish(start(code))
    assert names(where) == []


def test_a_keyboard_interrupt_leaves_nothing(where, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.get_or_build(KEY, lambda: b"cubin")
    assert names(where) == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_file_that_cannot_be_read_is_a_miss(where, monkeypatch, code):
    cache.get_or_build(KEY, lambda: b"cubin")
    with monkeypatch.context() as patch:
        patch.setattr(files, "read_trusted", raising(code))
        assert cache.get_or_build(KEY, lambda: b"new cubin") == b"new cubin"
    assert cache.get_or_build(KEY, unexpected) == b"new cubin"


def test_a_directory_in_place_of_a_file_warns_and_builds(where):
    (where / f"{KEY}.cubin").mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match=re.escape(str(where))):
        assert cache.get_or_build(KEY, lambda: b"cubin") == b"cubin"
    assert names(where) == [f"{KEY}.cubin"]


def test_a_read_only_cache_still_hits(where, monkeypatch):
    cache.get_or_build(KEY, lambda: b"cubin")
    open_file = os.open

    def open_to_read(path, flags, *arguments, **keywords):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return open_file(path, flags, *arguments, **keywords)

    monkeypatch.setattr(os, "open", open_to_read)
    monkeypatch.setattr(os, "utime", raising(errno.EROFS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.get_or_build(KEY, unexpected) == b"cubin"
    with pytest.warns(RuntimeWarning, match="Read-only file system"):
        assert cache.get_or_build(OTHER, lambda: b"another") == b"another"


# ---- crowds --------------------------------------------------------------------------------------


def test_sixteen_cold_processes_build_once(where, tmp_path):
    """All start together, and the one that builds gives bytes that no other would have made."""
    code = """
_, ready, go, builds = sys.argv
def build():
    with open(builds, "ab", buffering=0) as file:
        file.write(b"x")
    time.sleep(0.5)
    return os.urandom(100_000)
open(os.path.join(ready, str(os.getpid())), "w").close()
while not os.path.exists(go):
    time.sleep(0.01)
sys.stdout.buffer.write(cache.get_or_build(KEY, build))
"""
    ready, go, builds = tmp_path / "ready", tmp_path / "go", tmp_path / "builds"
    ready.mkdir()
    processes = [start(code, ready, go, builds) for _ in range(16)]
    wait_for(lambda: len(names(ready)) == 16)
    go.touch()
    results = {finish(process) for process in processes}
    assert builds.read_bytes() == b"x"
    assert len(results) == 1
    assert results == {cache.get_or_build(KEY, unexpected)}
    assert names(where) == [f"{KEY}.cubin"]


def test_eight_cold_threads_build_once(where):
    together, results, builds = threading.Barrier(8), [], []

    def build():
        builds.append(threading.get_ident())
        time.sleep(0.2)
        return os.urandom(100)

    def work():
        together.wait()
        results.append(cache.get_or_build(KEY, build))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1 and len(results) == 8 and len(set(results)) == 1


def test_different_keys_do_not_wait_for_each_other(where, monkeypatch):
    monkeypatch.setattr(cache, "LOCK_SECONDS", 0)

    def build():
        return b"outer and " + cache.get_or_build(OTHER, lambda: b"inner")

    assert cache.get_or_build(KEY, build) == b"outer and inner"
    assert names(where) == [f"{KEY}.cubin", f"{OTHER}.cubin"]


# ---- locks ---------------------------------------------------------------------------------------


def never_wait(monkeypatch):
    def sleep(_):
        raise AssertionError("the lock is still held")

    monkeypatch.setattr(cache, "time", SimpleNamespace(**{**vars(time), "sleep": sleep}))


def is_locked(path):
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_process_killed_in_build_frees_its_lock(where, tmp_path, monkeypatch):
    code = """
def build():
    open(sys.argv[1], "w").close()
    time.sleep(600)
cache.get_or_build(KEY, build)
"""
    building = tmp_path / "building"
    process = start(code, building)
    wait_for(building.exists)
    assert is_locked(where / f"{KEY}.lock")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    never_wait(monkeypatch)
    assert cache.get_or_build(KEY, lambda: b"cubin") == b"cubin"
    assert names(where) == [f"{KEY}.cubin"]


def test_a_process_killed_in_a_write_leaves_no_half_file(where, tmp_path, monkeypatch):
    code = """
def hang(fd):
    open(sys.argv[1], "w").close()
    time.sleep(600)
os.fsync = hang
cache.get_or_build(KEY, lambda: b"of a dead process")
"""
    writing = tmp_path / "writing"
    process = start(code, writing)
    wait_for(writing.exists)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [name for name in names(where) if name.endswith(".tmp")]
    assert not (where / f"{KEY}.cubin").exists()
    never_wait(monkeypatch)
    monkeypatch.setattr(cache, "MAX_BYTES", 80)  # what it left is the oldest, and goes first
    assert cache.get_or_build(KEY, lambda: b"cubin") == b"cubin"
    assert names(where) == [f"{KEY}.cubin"]


def test_a_forked_child_does_not_keep_the_lock(where):
    """It shares the open file that is locked, and may live long: a worker of a data loader."""
    code = """
import fcntl
def build():
    global waiting, child
    waiting = open(cache.directory() / f"{KEY}.lock")
    child = os.fork()
    if child == 0:
        time.sleep(600)
    return b"cubin"
assert cache.get_or_build(KEY, build) == b"cubin"
try:
    fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)
finally:
    os.kill(child, 9)
"""
    finish(start(code))


def test_a_lock_held_for_too_long_is_ignored_and_kept(where, monkeypatch):
    monkeypatch.setattr(cache, "LOCK_SECONDS", 0.2)
    where.mkdir(mode=0o700)
    with open(where / f"{KEY}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert cache.get_or_build(KEY, lambda: b"cubin") == b"cubin"
        assert is_locked(where / f"{KEY}.lock")
    assert cache.get_or_build(KEY, unexpected) == b"cubin"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_systems_without_locks_do_without(where, monkeypatch, code):
    never_wait(monkeypatch)
    monkeypatch.setattr(fcntl, "flock", raising(code))
    assert cache.get_or_build(KEY, lambda: b"cubin") == b"cubin"
    assert cache.get_or_build(KEY, unexpected) == b"cubin"


def test_platforms_without_fcntl_do_without(where, monkeypatch):
    monkeypatch.setattr(cache, "fcntl", None)
    monkeypatch.setattr(files, "_HAS_USERS", False)
    assert cache.get_or_build(KEY, lambda: b"cubin") == b"cubin"
    assert cache.get_or_build(KEY, unexpected) == b"cubin"


# ---- size ----------------------------------------------------------------------------------------


def test_what_was_used_longest_ago_goes_first(where, monkeypatch):
    keys = [f"{i:064x}" for i in range(4)]
    for i, key in enumerate(keys[:3]):
        cache.get_or_build(key, lambda: bytes(1000))
        os.utime(where / f"{key}.cubin", (i, i))
    assert cache.get_or_build(keys[0], unexpected) == bytes(1000)  # the oldest is used again
    monkeypatch.setattr(cache, "MAX_BYTES", 3500)
    cache.get_or_build(keys[3], lambda: bytes(1000))
    assert names(where) == [f"{key}.cubin" for key in (keys[0], keys[2], keys[3])]


def test_other_files_in_the_directory_are_left_alone(where, monkeypatch):
    where.mkdir(mode=0o700)
    others = ["notes.txt", "model.cubin", f"{KEY}.cubin.bak", "x.tmp"]
    for name in others:
        (where / name).write_bytes(bytes(5000))
        os.utime(where / name, (0, 0))
    monkeypatch.setattr(cache, "MAX_BYTES", 500)
    cache.get_or_build(OTHER, lambda: b"cubin")
    assert names(where) == sorted([*others, f"{OTHER}.cubin"])
