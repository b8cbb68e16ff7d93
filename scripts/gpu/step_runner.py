"""Run steps one after another or side by side, each with its own time limit; write what is known after every one.

A step that hangs or fails costs the others nothing but its time: it runs in a process group of its own, which is killed
at its limit, and results.json and logs.txt are replaced as a whole whenever a step ends.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GRACE = 3  # seconds between SIGTERM and SIGKILL
LOG = 400_000  # characters of a step's log that are kept, from its end
OVER = ("passed", "not needed")  # what a step may end as, if all is well


@dataclass(frozen=True)
class Step:
    """One command.

    command: what follows `python`.
    limit: seconds after which it is killed.
    least: seconds that must be left to start it.
    json: the file that it writes its result to.
    needs: files without which it is not started.
    unless: a file that makes it unnecessary.
    before: called before it starts.
    killed_when: the step is killed with SIGKILL as soon as this is true, which is then its success.
    summary: makes a result of the step's log, for a step that writes no file.
    """

    name: str
    about: str
    command: tuple[str, ...]
    limit: float
    least: float = 10
    json: Path | None = None
    needs: tuple[Path, ...] = ()
    unless: Path | None = None
    before: Callable[[], None] | None = None
    killed_when: Callable[[], bool] | None = None
    summary: Callable[[str], dict[str, Any]] | None = None

    @property
    def shown(self) -> str:
        """The command as a person types it, without the place of its result."""
        words = list(self.command)
        if "--json" in words:
            del words[words.index("--json") : words.index("--json") + 2]
        head = ["zipar-train"] if words[:2] == ["-m", "zipar_train"] else ["python", *words[:2]]
        return " ".join([*head, *(f"'{w}'" if set(w) & set(" {}[]") else w for w in words[2:])])


class Forked:
    """A step in a fork of this process, which has imported the package already: no seconds of imports."""

    def __init__(self, command: tuple[str, ...], log: Path, env: dict[str, str]):
        sys.stdout.flush()
        self.pid, self.returncode = os.fork(), None
        if self.pid == 0:
            status = 1
            try:
                os.setsid()
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                status = work(command, log, env)
            finally:
                os._exit(status)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def work(command: tuple[str, ...], log: Path, env: dict[str, str]) -> int:
    """`python COMMAND` in this process; its exit status."""
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.environ.update(env)
    status: Any = 0
    try:
        if command[0] == "-m":
            sys.argv = list(command[1:])
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = list(command), str(Path(command[0]).resolve().parent)
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        status = end.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status if isinstance(status, int) else int(status is not None)


def spawned(command: tuple[str, ...], log: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    """A step in a Python of its own."""
    with log.open("ab") as stream:
        return subprocess.Popen(
            [sys.executable, *command],
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | env,
        )


class Runner:
    """What has been run, and the files that say so.

    Args:
        work: a folder for logs and what steps leave to each other.
        out: the folder of results.json and logs.txt.
        deadline: `time.monotonic()` at which the last step must have ended.
        told: what results.json says beside the steps: machine, revision.
        start: starts a command; `spawned` or `Forked`.
    """

    def __init__(self, work: Path, out: Path, *, deadline: float, told: dict[str, Any], start: Callable = spawned):
        self.work, self.out, self.deadline, self.told, self.start = work, out, deadline, told, start
        self.logs = work / "logs"
        for folder in (self.logs, out):
            folder.mkdir(parents=True, exist_ok=True)
        self.done: list[dict[str, Any]] = []
        self.results: dict[str, Any] = {}
        self.began = time.monotonic()

    def together(self, steps: list[Step], env: dict[str, str] | None = None) -> None:
        """Run steps side by side, wait for all, and write down each one when it ends."""
        running: dict[str, tuple[Step, Any, float, float]] = {}
        ended: dict[str, str] = {}
        try:
            for step in steps:
                if reason := self.reason_to_skip(step):
                    self.record(step, *reason, 0.0)
                    continue
                if step.before:
                    step.before()
                now = time.monotonic()
                process = self.start(step.command, self.logs / f"{step.name}.txt", env or {})
                running[step.name] = step, process, now, min(now + step.limit, self.deadline)
            while running:
                for name, (step, process, began, limit) in list(running.items()):
                    status = process.poll()
                    if status is None and step.killed_when and step.killed_when():
                        ended[name] = "killed as planned"
                        kill(process.pid, signal.SIGKILL)
                    elif status is None and time.monotonic() > limit:
                        ended[name] = f"after {time.monotonic() - began:.0f} s"
                        end(process)
                    elif status is not None:
                        del running[name]
                        kill(process.pid, signal.SIGKILL)  # what it may have left behind
                        self.record(step, *outcome(status, ended.get(name)), time.monotonic() - began)
                time.sleep(0.02)
        finally:  # an exception or a signal: nothing goes on behind our back, and nothing is lost
            for step, process, began, _ in running.values():
                end(process)
                self.record(step, "stopped", "check was stopped", time.monotonic() - began)

    def reason_to_skip(self, step: Step) -> tuple[str, str] | None:
        left = self.deadline - time.monotonic()
        if step.unless and step.unless.exists():
            return "not needed", f"{step.unless.name} is there"
        if missing := [path for path in step.needs if not path.exists()]:
            return "skipped", f"{missing[0].name} was not made by an earlier step"
        if left < step.least:
            return "skipped", f"{max(left, 0):.0f} s were left, it needs {step.least:.0f}"
        return None

    def record(self, step: Step, status: str, reason: str, seconds: float) -> None:
        command = step.shown.replace(str(self.work), "$WORK")
        self.done.append(
            {
                "name": step.name,
                "about": step.about,
                "command": command,
                "status": status,
                "reason": reason,
                "seconds": round(seconds, 1),
                "limit": step.limit,
            }
        )
        if step.json:
            with suppress(OSError, ValueError):  # not written, or not whole
                self.results[step.name] = json.loads(step.json.read_text())
        if step.summary and seconds and (told := step.summary(self.log(step.name))):
            self.results[step.name] = told
        print(f"{step.name:20} {status:11} {seconds:6.1f} s  {reason}", flush=True)
        if status in ("failed", "timed out"):
            print("    " + "\n    ".join(self.log(step.name)[-1500:].splitlines()[-12:]), flush=True)
        self.write()

    def log(self, name: str) -> str:
        path = self.logs / f"{name}.txt"
        return path.read_text(errors="replace")[-LOG:] if path.is_file() else ""

    def write(self) -> None:
        """results.json and logs.txt as they are now."""
        told = self.told | {"seconds": round(time.monotonic() - self.began, 1)}
        replace(self.out / "results.json", json.dumps({**told, "steps": self.done, "results": self.results}, indent=1))
        logs = [f"==== {step['name']}: {step['command']}\n{self.log(step['name'])}" for step in self.done]
        replace(self.out / "logs.txt", "\n".join(logs))

    def table(self) -> str:
        """The steps, a line each."""
        lines = [
            f"{s['name']:20} {s['status']:11} {s['seconds']:6.1f} s of {s['limit']:4.0f}  {s['reason']}"
            for s in self.done
        ]
        return "\n".join(["", *lines])

    @property
    def passed(self) -> bool:
        return all(step["status"] in OVER for step in self.done)


def outcome(status: int, ended: str | None) -> tuple[str, str]:
    """How a step ended, and why, from its exit status and from what was done to it."""
    if ended == "killed as planned":
        return "passed", ended
    if ended:
        return "timed out", ended
    return ("passed", "") if status == 0 else ("failed", f"exit status {status}")


def end(process: Any) -> None:
    """End a step's process group, gently first."""
    kill(process.pid, signal.SIGTERM)
    until = time.monotonic() + GRACE
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.05)
    kill(process.pid, signal.SIGKILL)
    while process.poll() is None:
        time.sleep(0.02)


def kill(group: int, signum: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signum)


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    aside = path.with_suffix(".part")
    aside.write_text(text)
    os.replace(aside, path)
