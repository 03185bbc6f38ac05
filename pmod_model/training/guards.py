"""What a training run holds while it runs: the lock of its folder, and the signals that end it."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import threading
import time
import weakref
from pathlib import Path
from types import FrameType
from typing import Any

from pmod_model.data.errors import InputError

LOCK_FILE = ".train.lock"


class Interrupted(Exception):
    """Training was asked to end by a signal, and ended between two steps.

    Attributes:
        signum: SIGINT or SIGTERM.
        checkpoint: the last complete checkpoint, to resume from; None if there is none.
        exit_code: what a command ends with: 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, signum: int, checkpoint: Path | None) -> None:
        self.signum = signum
        self.checkpoint = checkpoint
        self.exit_code = 128 + signum
        kept = "no checkpoint was made" if checkpoint is None else f"resume from {checkpoint}"
        super().__init__(f"training ended by {signal.Signals(signum).name}; {kept}")


class FolderLock:
    """Refuses a second training in one folder. The kernel drops it when the process ends, anyhow.

    Args:
        folder: made if it is missing; `.train.lock` in it is left behind, unlocked.
        place: named in the error.

    Raises:
        InputError: on entering, if another process holds it; names its pid and start.
    """

    def __init__(self, folder: Path, place: str) -> None:
        self.folder = folder
        self.place = place
        self.handle = -1

    def __enter__(self) -> FolderLock:
        argument = f"folder {str(self.folder)!r}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.handle = os.open(self.folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise InputError(self.place, argument, "a folder to write", error.strerror) from None
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = _owner(os.pread(self.handle, 4096, 0))
            self.release()
            expected = "a folder that no other training uses"
            hint = "wait for it to end, or choose another folder"
            raise InputError(
                self.place, argument, expected, f"one locked by {owner}", hint
            ) from None
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        facts = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
        os.ftruncate(self.handle, 0)
        os.pwrite(self.handle, json.dumps(facts).encode(), 0)
        _held.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Close the file: drops the lock, unless a forked process shares it."""
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1


def _owner(content: bytes) -> str:
    try:
        facts = json.loads(content)
        return f"pid {facts['pid']} on {facts['host']} since {facts['started']}"
    except (ValueError, TypeError, KeyError):
        return "a process that did not say which"


_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _close_in_child() -> None:
    # a loader's worker that outlives a killed training would keep the folder locked
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_close_in_child)


class StopSignals:
    """Turns SIGINT and SIGTERM into a wish, read between steps; the second SIGINT interrupts.

    Does nothing outside the main thread. Workers that are forked meanwhile ignore Ctrl-C, so that
    the step can end.

    Attributes:
        signum: the signal that came, or 0.
    """

    def __init__(self) -> None:
        self.signum = 0
        self.process = os.getpid()
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self.before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return
        if self.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
