"""How a signal ends a command: by an exception at any moment, or by a note that a loop reads where stopping is safe.

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

GRACE = 3.0  # seconds in which a repeated SIGTERM is the same request
AGAIN = 0.2  # seconds after which a lost exception is raised again
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
HANGUP = getattr(signal, "SIGHUP", None)  # None: on Windows


class Stopped(BaseException):
    """A signal has ended the work. Not an `Exception`: code that expects errors must not catch it.

    Args:
        signum: number of the signal.
        words: what is left of the work, for the message.
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
        """Raise `Stopped` if a signal has come."""
        if self.signum is not None:
            raise Stopped(self.signum)

    def listen(self) -> None:
        """Install the handlers; again, where a library has installed its own."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python installs handlers in the main thread only
        for signum in _asking():
            handler = signal.getsignal(signum)
            if handler in (None, signal.SIG_IGN) or signum == self.signum or handler == self._hear:
                continue
            self.before.setdefault(signum, handler)
            signal.signal(signum, self._hear)

    def quiet(self) -> None:
        """The exception has arrived: do not raise it again."""
        if self.timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.timed = False

    def leave(self) -> None:
        """The process is at its end: from here on a signal ends it, without a traceback out of exit handlers."""
        self.before = dict.fromkeys(self.before, signal.SIG_DFL)

    def restore(self) -> None:
        """Put back the handlers that were there before."""
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
            signal.signal(signum, signal.SIG_DFL)  # a second one needs no interpreter, which may be busy
        if self.raising:
            if hasattr(signal, "setitimer"):
                signal.signal(signal.SIGALRM, self._again)
                signal.setitimer(signal.ITIMER_REAL, AGAIN, AGAIN)
                self.timed = True
            raise Stopped(signum)

    def _again(self, signum: int, frame: Any) -> None:
        """Raise once more if the exception was lost: destructors, callbacks and `except:` of libraries swallow it."""
        if self.signum is None or not self.raising or not self.timed:
            return
        error = sys.exc_info()[1]
        while error is not None:
            if isinstance(error, Stopped):
                return  # on its way: a `finally` or an `except` is cleaning up
            error = error.__context__
        raise Stopped(self.signum)


_heard: Heard | None = None  # of this process; None: outside `raised` and `noted`


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
    """In this block, a signal raises `Stopped` at any moment."""
    hook = sys.unraisablehook

    def quiet(lost: Any) -> None:
        if not issubclass(lost.exc_type, Stopped):  # which is raised again
            hook(lost)

    sys.unraisablehook = quiet
    try:
        with _hearing(raising=True) as heard:
            yield heard
    finally:
        sys.unraisablehook = hook


@contextmanager
def noted() -> Iterator[Heard]:
    """In this block, a signal is noted; the block looks at it with `Heard.check` where stopping is safe."""
    with _hearing(raising=False) as heard:
        yield heard


@contextmanager
def held() -> Iterator[None]:
    """Deliver signals after this block. Processes that it starts hold them until `deafen`."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _asking())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def deafen() -> None:
    """Leave signals to the parent process, and end with it; SIGTERM is heard the second time.

    For loader processes: a terminal, SLURM and launchers send signals to all processes at once.
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
    """Under SLURM, hand the job back to its queue when its time is over.

    Returns:
        The result in words; "" where it does not apply.
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
    """The signals that ask a process to stop."""
    names = NAMES if "SLURM_JOB_ID" in os.environ else NAMES[:3]
    return [getattr(signal, name) for name in names if hasattr(signal, name)]
