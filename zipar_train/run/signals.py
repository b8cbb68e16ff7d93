"""Signal handling: a signal raises an exception at any moment, or sets a flag that a loop checks where it can stop.

SIGINT, SIGTERM, SIGHUP and, under SLURM, SIGUSR1 ask a process to stop. A second SIGINT ends the process at once. A
second SIGTERM or SIGUSR1 does so after `GRACE` seconds: launchers send the first one twice. Further SIGHUPs are
ignored. Signals that the process was started to ignore (nohup) stay ignored.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from zipar_train.run.launcher import rank

GRACE = 3.0  # seconds within which a repeated SIGTERM counts as the same request
AGAIN = 0.2  # seconds after which a lost exception is raised again
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
HANGUP = getattr(signal, "SIGHUP", None)  # None on Windows


class Stopped(BaseException):
    """The exception raised when a signal stops the work.

    It is not an `Exception`, so that code that handles errors does not catch it.

    Args:
        signum: Number of the signal.
        words: State of the work, for the message.
    """

    def __init__(self, signum: int, words: str = ""):
        super().__init__(f"stopped by {signal.Signals(signum).name}" + (f"; {words}" if words else ""))
        self.signum = signum
        self.advice = "run the same command again to go on"


class Heard:
    """The signals that this process has received since `raised` or `noted` was entered."""

    def __init__(self) -> None:
        self.signum: int | None = None  # the first one
        self.raising = False
        self.timed = False  # `_again` is called every AGAIN seconds
        self.process = os.getpid()
        self.since = 0.0
        self.before: dict[int, Any] = {}  # the handlers to restore

    def check(self) -> None:
        """Raise `Stopped` if a signal has been received."""
        if self.signum is not None:
            raise Stopped(self.signum)

    def listen(self) -> None:
        """Install the handlers, or reinstall them where a library has replaced them."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python installs handlers in the main thread only
        for signum in _asking():
            handler = signal.getsignal(signum)
            if handler in (None, signal.SIG_IGN) or signum == self.signum or handler == self._hear:
                continue
            self.before.setdefault(signum, handler)
            signal.signal(signum, self._hear)

    def quiet(self) -> None:
        """Stop raising the exception again; call this once it has been caught."""
        if self.timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.timed = False

    def leave(self) -> None:
        """Restore the default handlers on leaving the block, so that signals at exit cause no traceback."""
        self.before = dict.fromkeys(self.before, signal.SIG_DFL)

    def restore(self) -> None:
        """Restore the previous handlers."""
        self.quiet()
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _hear(self, signum: int, frame: Any) -> None:
        first, now = self.signum is None, time.monotonic()
        same = signum == self.signum and (signum == signal.SIGINT or now - self.since > GRACE)
        if os.getpid() != self.process or (same and signum != HANGUP):
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        if not first:
            return
        self.signum, self.since = signum, now
        if signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)  # a second one must work even if the interpreter is busy
        if self.raising:
            if hasattr(signal, "setitimer"):
                signal.signal(signal.SIGALRM, self._again)
                signal.setitimer(signal.ITIMER_REAL, AGAIN, AGAIN)
                self.timed = True
            raise Stopped(signum)

    def _again(self, signum: int, frame: Any) -> None:
        """Raise the exception again if a destructor, a callback or a bare `except:` of a library swallowed it."""
        if self.signum is None or not self.raising or not self.timed:
            return
        error = sys.exc_info()[1]
        while error is not None:
            if isinstance(error, Stopped):
                return  # still propagating: a `finally` or an `except` is cleaning up
            error = error.__context__
        raise Stopped(self.signum)


_heard: Heard | None = None  # None outside `raised` and `noted`


@contextmanager
def _hearing(*, raising: bool) -> Iterator[Heard]:
    global _heard
    if threading.current_thread() is not threading.main_thread():
        yield Heard()  # signals go to the main thread
        return
    outer = _heard
    heard = _heard = outer or Heard()
    before, heard.raising = heard.raising, raising
    heard.listen()
    try:
        yield heard
    finally:
        heard.raising, _heard = before, outer
        if outer is None:
            heard.restore()


@contextmanager
def raised() -> Iterator[Heard]:
    """Run a block in which a signal raises `Stopped` at any moment."""
    hook = sys.unraisablehook

    def quiet(lost: Any) -> None:
        if not issubclass(lost.exc_type, Stopped):  # `Stopped` is raised again
            hook(lost)

    sys.unraisablehook = quiet
    try:
        with _hearing(raising=True) as heard:
            yield heard
    finally:
        sys.unraisablehook = hook


@contextmanager
def noted() -> Iterator[Heard]:
    """Run a block in which a signal is recorded; the block calls `Heard.check` where stopping is safe."""
    with _hearing(raising=False) as heard:
        yield heard


@contextmanager
def held() -> Iterator[None]:
    """Block signals in this block and deliver them after it.

    Processes started in the block do not receive signals until they call `ignore_signals`.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _asking())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_signals(worker: int = 0) -> None:
    """Ignore signals, which the parent process handles, and exit when it exits; a second SIGTERM ends the process.

    This is for loader processes: a terminal, SLURM and launchers send signals to all processes at once.

    Args:
        worker: Ignored; PyTorch passes it to a `worker_init_fn`.
    """
    for signum in _asking():
        signal.signal(signum, signal.SIG_IGN)
    for signum in (signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)):
        signal.signal(signum, lambda signum, frame: signal.signal(signum, signal.SIG_DFL))
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _asking())
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: sent when the parent dies


def requeue(stop: Stopped) -> str:
    """Requeue the SLURM job when its time limit is reached.

    Returns:
        A description of the result; "" if requeueing does not apply.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or stop.signum != getattr(signal, "SIGUSR1", None) or rank() != 0:
        return ""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return f"Job {job} could not be requeued ({error}): submit it again"
    return f"Job {job} is requeued" if done.returncode == 0 else f"Job {job} was not requeued: {done.stderr.strip()}"


def _asking() -> list[int]:
    """Return the signals that ask a process to stop."""
    names = NAMES if "SLURM_JOB_ID" in os.environ else NAMES[:3]
    return [getattr(signal, name) for name in names if hasattr(signal, name)]
