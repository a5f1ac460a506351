"""Writes files atomically and locks the folders that they are in; errors say what a user can do."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import tempfile
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from d2net.errors import InputError
from d2net.words import quoted

LOCK_NAME = ".d2net.lock"
TEMPORARY = ".d2net-"  # prefix of the names of files that are being written
_WRITTEN = re.compile(re.escape(TEMPORARY) + "[0-9a-f]{16}")  # the whole name of such a file
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # from a file system without locks


def one_component(name: str, where: str) -> str:
    """``name`` itself, if it can be the name of a file on any system, and a line in a list of names.

    Every name from data, a recipe or the command line is checked here before it becomes part of a path.

    Args:
        name: The name.
        where: What holds the name, for the message.

    Raises:
        InputError: it is empty, ".", "..", longer than 240 bytes, or holds a separator, a control character, a
            byte-order mark (readers drop one at the beginning of a list) or a lone surrogate.
    """
    bad = not name.strip() or name in (".", "..") or any(c in "/\\\ufeff" or _unprintable(c) for c in name)
    if bad or len(name.encode()) > 240:
        raise InputError(f"{where}: {quoted(name)} cannot be the name of a file; rename it")
    return name


def _unprintable(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def write_whole(path: Path, content: str | bytes | bytearray | memoryview) -> None:
    """Writes a file atomically: to a temporary file in the same folder, synced, then renamed. Makes the folder.

    The file has the permissions of a new one. A symbolic link at ``path`` is replaced by the file, not followed. Before
    that, half-written files that killed runs left in the folder are removed.

    Raises:
        InputError: it cannot be written; an earlier file is as it was.
    """
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")  # for lone surrogates, which JSON writes like this too
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not an ordinary file; give the path of a file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        handle, temporary = _create(path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # before the rename; a full disk may show only here
                os.replace(temporary, path)  # while the file is open and locked, so that no other run sweeps it
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); make space, or give another path; what was there "
            "is intact"
        ) from error


def _create(folder: Path) -> tuple[int, Path]:
    """A new file with an unpredictable name and the permissions of new files; locked while it is open."""
    while True:
        path = folder / f"{TEMPORARY}{secrets.token_hex(8)}"
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # a file system without locks, where nothing is swept
            return handle, path
        if os.fstat(handle).st_nlink:
            return handle, path
        os.close(handle)  # another run swept it before it was locked


def sweep(folder: Path) -> None:
    """Remove the half-written files that killed runs left in ``folder``. Files of live runs are locked, and stay.

    On a network file system other machines see these locks too, unless it is mounted without locks.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _WRITTEN.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with suppress(OSError):  # another user's file, gone by now, or locked
                    _remove_unlocked(Path(entry.path))


def _remove_unlocked(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    finally:
        os.close(handle)


def sync(path: Path) -> None:
    """fsync a file, or a folder's entries, where the platform can. A rename survives a power cut only after that.

    Raises:
        OSError: the disk fails.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # a folder that may be written to but not read
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def inside(folder: Path, *names: str) -> Path:
    """The path of a folder of d2net's within ``folder``; neither need exist yet.

    Raises:
        InputError: a name that :func:`one_component` refuses, or a symbolic link in the path: it is not followed.
    """
    path = folder
    for name in names:
        path = path / one_component(name, str(folder))
        if path.is_symlink():
            raise InputError(f"{path}: a symbolic link, which is not followed; remove it or choose another --out")
    return path


def check_writable(folder: Path) -> None:
    """Raises InputError where the folder of ``--out`` cannot be written: better now than after hours of work.

    Makes the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"d2net")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from error


def identity(path: Path) -> tuple[int, int] | None:
    """Identifies the file at ``path``, None where there is none: every :func:`write_whole` makes a new one."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


@contextmanager
def locked(folder: Path, lock: Path | None = None) -> Iterator[None]:
    """Within the block no other d2net writes to ``folder``. Removes what killed runs left there.

    The lock is the kernel's, on the file ``.d2net.lock`` in the folder: it ends with the process, however that ends.
    The file holds the process's number and is removed at the end; one that a killed run left is taken by the next. One
    thread can enter many times (a demo and the training in it).

    Args:
        folder: Made where it is missing.
        lock: The file to lock instead, for a folder that will appear by a move.

    Raises:
        InputError: another process or thread writes there (raised without waiting); nothing can be written there.
    """
    from filelock import FileLock, Timeout

    path = (lock or folder / LOCK_NAME).absolute()
    # One object per path counts how often its thread has entered. No soft locks: they would outlive a killed process.
    held = FileLock(path, blocking=False, is_singleton=True, fallback_to_soft=False)
    if path.is_file() and path.stat().st_nlink > 1:
        raise InputError(f"{path}: is a link to another file, which is not written to; remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
    except Timeout:
        raise InputError(
            f"{folder}: is being written by another d2net{_holder(path)}; wait for it or choose another --out"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise InputError(f"{folder}: cannot be written ({error.strerror}); choose another --out") from error
        warnings.warn(f"{folder}: its file system has no locks; see that no other d2net writes there", stacklevel=3)
    outermost = held.lock_counter == 1
    try:
        if outermost:
            _sign(path)
            sweep(path.parent)
        yield
    finally:
        if outermost:
            with suppress(OSError):
                path.unlink()  # while it is locked: a process that has opened it by now sees that it is gone
        if held.is_locked:
            held.release()


def check_unlocked(folder: Path, option: str) -> None:
    """Require that no other d2net holds the lock of ``folder``, without taking it.

    Enough for a file that is written atomically. ``option`` is the option that gave the folder, for the message.

    Raises:
        InputError: another d2net holds the lock.
    """
    path = folder / LOCK_NAME
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # there is none
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"{folder}: is being written by another d2net{_holder(path)}; wait for it or choose another {option}"
        ) from None
    except OSError:  # a file system without locks
        return
    finally:
        os.close(handle)


def _sign(path: Path) -> None:
    with suppress(OSError):  # the number is only used in a message
        handle = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW)
        with os.fdopen(handle, "w") as file:
            file.write(f"{os.getpid()}\n")


def _holder(path: Path) -> str:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as file:
            return f" (pid {int(file.read(20))})"
    except (OSError, ValueError):
        return ""
