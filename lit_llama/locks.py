"""Locks that keep two processes out of one folder. The system takes a lock from a process that ends or is killed."""

import importlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_FILE = ".lock"
POLL_SECONDS = 0.5  # between two looks whether another process is done


@contextmanager
def own_folder(path: Path) -> Iterator[None]:
    """Keep other processes out of a folder, created if need be; the system ends this when the process ends.

    Raises:
        ValueError: another process has the folder, or it is a file.
    """
    if path.is_file():
        raise ValueError(f"{path} is a file, expected a folder")
    path.mkdir(parents=True, exist_ok=True)
    with open(path / LOCK_FILE, "ab") as file:
        if _try_lock(file.fileno()) is False:
            raise ValueError(f"another run is writing to {path}: wait until it ends, or choose another folder")
        yield


def check_not_owned(path: Path) -> None:
    """Make sure that no other process has a folder by `own_folder`.

    Raises:
        ValueError: one has.
    """
    if (path / LOCK_FILE).is_file():
        with own_folder(path):
            pass


@contextmanager
def locked_folder(folder: Path) -> Iterator[bool | None]:
    """Lock a folder itself, which leaves no file behind; gives what `_try_lock` says."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        yield None
        return
    try:
        yield _try_lock(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def turn(file: Path, before_waiting: Callable[[], object]) -> Iterator[None]:
    """Lock a file, created if need be, as soon as no other process has it locked.

    Args:
        file: the file of the lock, in a folder that exists.
        before_waiting: called once if another process has it.
    """
    with open(file, "ab") as opened:
        if _try_lock(opened.fileno()) is False:
            before_waiting()
            while _try_lock(opened.fileno()) is False:
                time.sleep(POLL_SECONDS)
        yield


def _try_lock(descriptor: int) -> bool | None:
    """Lock an open file until it is closed: False if another process has locked it, None if there are no locks here."""
    try:
        try:
            fcntl = importlib.import_module("fcntl")
        except ImportError:  # Windows
            msvcrt = importlib.import_module("msvcrt")
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except (OSError, ImportError):  # a network file system without locks, or another platform
        return None
    return True
