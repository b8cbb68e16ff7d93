"""Training where a notebook or an agent calls it: in a thread, in an event loop, with a prompt."""

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from forked import CONTEXT

SHORT = ["trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.limit_val_batches=0"]


def in_a_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def in_an_event_loop(work: Callable[[], None]) -> None:
    async def main():
        work()

    asyncio.run(main())


def trained(place: Callable, overrides: list[str], devices: int) -> list[Path]:
    """Train, resume with another epoch, and resume where nothing is left to do; returns what `fit` returns."""
    from zipar_train.recipe.load import load_recipe
    from zipar_train.training.fit import fit

    results = []

    def work():
        changed = [*overrides, *SHORT, f"trainer.devices={devices}"]
        results.append(fit(load_recipe("digits-base", [*changed, "data.workers=1"])))
        recipe = load_recipe("digits-base", [*changed, "trainer.max_epochs=2"])
        results.append(fit(recipe, resume=True, allow=["trainer.max_epochs"]))
        results.append(fit(recipe, resume=True, allow=["trainer.max_epochs"]))

    place(work)
    return results


def trained_in_a_new_process(place: Callable, overrides: list[str], devices: int) -> list[Path]:
    """Do the same in a process without other threads: Lightning forks it for several devices."""
    receiver, sender = CONTEXT.Pipe(duplex=False)
    arguments = (sender, os.getcwd(), dict(os.environ), place, overrides, devices)
    process = CONTEXT.Process(target=_send, args=arguments)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join(60)
        process.kill()


def _send(sender, folder: str, environment: dict[str, str], *arguments) -> None:
    from lightning.pytorch.trainer.connectors import accelerator_connector

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    accelerator_connector._IS_INTERACTIVE = True
    sys.ps1 = ">>> "
    sender.send(trained(*arguments))
