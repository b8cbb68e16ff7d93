"""The command line in real processes, forked from one that has imported it: cheap to start, to watch and to kill.

A new interpreter spends about seven seconds of processor time on imports, a fork a tenth of a second.
"""

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("torch", "lightning", "wandb", "matplotlib.pyplot", "zipar_train.cli.app", "zipar_train.training.fit"),
        *("zipar_train.decoding.generator", "zipar_train.evaluation.evaluate", "zipar_train.evaluation.report.text"),
    ]
)


class Running:
    """`zipar-train ARGS` at work, in the current folder and environment.

    Args:
        log: file for what it prints.
        errors: file for what it prints to stderr; without it, `log`.
        env: variables beside those of this process.
        session: whether it leads a process group of its own, as one started by a shell does.
        before: called in the process first.
    """

    all: list["Running"] = []

    def __init__(
        self,
        *args,
        log: Path,
        errors: Path | None = None,
        env: dict[str, str] | None = None,
        session: bool = False,
        before: Callable[[], None] | None = None,
    ):
        self.log, self.errors = log, errors or log
        # The fork server has the folder and the environment of the first test that used it.
        here = (os.getcwd(), {**os.environ, **(env or {})})
        files = (str(log), str(self.errors))
        self.process = CONTEXT.Process(target=_work, args=([str(arg) for arg in args], files, *here, session, before))
        self.process.start()
        self.pid = self.process.pid
        self.all.append(self)

    def kill(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def kill_group(self, signum: int) -> None:
        os.killpg(self.pid, signum)

    def ended(self, timeout: float = 120) -> int:
        """Its exit status; -n for signal n."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running: {self.said()}"
        return self.process.exitcode

    def said(self) -> str:
        return "".join(path.read_text() for path in {self.log: 0, self.errors: 0} if path.exists())

    def until(self, condition, timeout: float = 120) -> None:
        """Wait for something that the process brings about."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.is_alive(), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.002)


def end_all() -> None:
    """Leave nothing running, whatever a test has come to."""
    for running in Running.all:
        running.process.kill()
        running.process.join()
    Running.all.clear()


def completed(*args, folder: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `zipar-train ARGS` to its end; what it prints is kept in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    out, err = (folder / f"{len(Running.all)}.{name}" for name in ("out", "err"))
    running = Running(*args, log=out, errors=err, env=env)
    return subprocess.CompletedProcess(args, running.ended(240), out.read_text(), err.read_text())


def as_torchrun(rank: int, world: int, *, port: int) -> dict[str, str]:
    """The variables by which torchrun tells a process on this machine its place."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "GROUP_RANK": "0",
        "LOCAL_WORLD_SIZE": str(world),
        "TORCHELASTIC_RUN_ID": "test",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }


def together(world: int, *args, log: Path, env: dict[str, str] | None = None) -> list[Running]:
    """As torchrun starts them, on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        Running(*args, log=log.with_suffix(f".{rank}"), env=as_torchrun(rank, world, port=port) | (env or {}))
        for rank in range(world)
    ]


def _work(
    args: list[str],
    files: tuple[str, str],
    folder: str,
    env: dict[str, str],
    session: bool,
    before: Callable[[], None] | None,
) -> None:
    if session:
        os.setsid()
    if before:
        before()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    multiprocessing.set_start_method("fork", force=True)  # of loader processes, as anywhere on Linux
    for n, file in enumerate(files, start=1):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, n)
        os.close(opened)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
    import torch
    from lightning.pytorch.utilities import rank_zero_only

    from zipar_train.cli import main

    rank_zero_only.rank = int(env.get("RANK") or 0)  # as it would have found when imported

    torch.set_num_threads(1)
    sys.argv = ["zipar-train", *args]
    main()
