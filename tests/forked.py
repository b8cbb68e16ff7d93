"""The command line in real processes, forked from one that has imported it: cheap to start, to watch and to kill."""

import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "lightning", "zipar_train.cli", "zipar_train.training.fit"])


class Running:
    """`zipar-train ARGS` at work."""

    all: list["Running"] = []

    def __init__(self, *args, log: Path, env: dict[str, str] | None = None):
        self.log = log
        self.process = CONTEXT.Process(target=_work, args=([str(arg) for arg in args], str(log), env or {}))
        self.process.start()
        self.all.append(self)

    def kill(self, signum: int) -> None:
        os.kill(self.process.pid, signum)

    def ended(self, timeout: float = 120) -> int:
        """Its exit status; -n for signal n."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running: {self.said()}"
        return self.process.exitcode

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

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


def together(world: int, *args, log: Path, env: dict[str, str] | None = None) -> list[Running]:
    """As torchrun starts them, on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "GROUP_RANK": "0",
              "LOCAL_WORLD_SIZE": str(world), "TORCHELASTIC_RUN_ID": "test"}  # fmt: skip
    return [
        Running(
            *args,
            log=log.with_suffix(f".{rank}"),
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} | (env or {}),
        )
        for rank in range(world)
    ]


def _work(args: list[str], log: str, env: dict[str, str]) -> None:
    os.environ.update(env)
    multiprocessing.set_start_method("fork", force=True)  # of loader processes, as anywhere on Linux
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
    import torch
    from lightning.pytorch.utilities import rank_zero_only

    from zipar_train.cli import main

    rank_zero_only.rank = int(env.get("RANK", 0))  # as it would have found when imported

    torch.set_num_threads(1)
    sys.argv = ["zipar-train", *args]
    main()
