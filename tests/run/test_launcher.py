"""Launchers' variables in any combination, and `fit` where there is no command line: in threads and in notebooks."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event, Lock, Thread

import pytest
import torch
from commands import sets
from notebooks import SHORT, in_a_thread, in_an_event_loop, trained_in_a_new_process

from zipar_train.models.restore import read
from zipar_train.recipe.load import load_recipe
from zipar_train.run.launcher import OTHERS, RANKS, check_variables, rank
from zipar_train.training.fit import fit

JOB = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "tune", "SLURM_NODELIST": "localhost", "SLURM_JOB_NODELIST": "localhost"}
TASK = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_ID": "0"}
TORCHRUN = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "GROUP_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "TORCHELASTIC_RUN_ID": "none",
}
STARTED = {
    "an allocation alone": {**JOB, "SLURM_NTASKS": "4"},
    "a batch script without srun": {**JOB, **TASK, "SLURM_NTASKS": "4", "SLURM_STEP_ID": ""},
    "a number of tasks alone": {"SLURM_NTASKS": "2"},
    "a shell of srun": {**JOB, **TASK, "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "bash"},
    "srun": {**JOB, **TASK, "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"},
    "torchrun": TORCHRUN,
    "torchrun by srun": {**JOB, **TASK, "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", **TORCHRUN},
    "ranks without a launcher": {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
    "a number of processes alone": {"WORLD_SIZE": "2"},
    "nothing in them": dict.fromkeys((*RANKS, *OTHERS), ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STARTED)
def test_a_lone_process_trains_whatever_the_variables_say(cli, tiny, tmp_path, name, free_port):
    env = STARTED[name] | ({"MASTER_PORT": free_port} if "MASTER_ADDR" in STARTED[name] else {})
    done = cli("fit", "--recipe", "digits-base", *sets([*tiny, *SHORT]), env=env)
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "run").extra["global_step"] == 2
    drawing = ("generate", "--checkpoint", tmp_path / "run", "--labels", "3", "--out", tmp_path / "x.png")
    assert cli(*drawing, env=env).returncode == 0


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def test_tasks_that_lightning_cannot_use_are_a_message(cli, tiny):
    done = cli("fit", "--recipe", "digits-base", *sets(tiny), env={**JOB, **TASK, "SLURM_NTASKS": "2"})
    assert done.returncode == 2 and "SLURM's variables: You set `--ntasks=2`" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", [*RANKS, *OTHERS])
def test_variables_that_are_no_numbers_are_named(run, monkeypatch, name):
    for value in ("abc", "-1", "1.0", " "):
        monkeypatch.setenv(name, value)
        status, _, err = run("recipes")
        assert status == 2 and f"the environment variable {name} is {value!r}" in err and f"unset {name}" in err
    monkeypatch.setenv(name, "0")
    check_variables()
    assert rank() == 0


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("place", [in_a_thread, in_an_event_loop])
def test_fit_works_where_a_notebook_or_an_agent_calls_it(tiny, tmp_path, place, devices):
    """With two devices Lightning forks in a notebook, and the calling process does not train itself."""
    results = trained_in_a_new_process(place, tiny, devices)
    assert results == 3 * [tmp_path / "run" / "checkpoints" / "last.ckpt"]
    assert read(results[0]).extra["global_step"] == 4


@pytest.mark.slow
def test_fits_in_two_threads_train_what_one_alone_trains(tiny, tmp_path, monkeypatch):
    module, busy, both = sys.modules["zipar_train.training.fit"], Lock(), Barrier(2)
    inner = module._fit

    def watched(*args, **how):
        assert busy.acquire(blocking=False), "two runs overlap"
        try:
            return inner(*args, **how)
        finally:
            busy.release()

    monkeypatch.setattr(module, "_fit", watched)

    def work(name):
        both.wait(60)
        return train(name)

    def train(name):
        return read(fit(load_recipe("digits-base", [*tiny, *SHORT, f"run_dir={tmp_path}/{name}"]))).state

    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(work, "ab"))  # raises what a thread raises
    alone = train("c")
    assert all(torch.equal(weight, state[name]) for state in results for name, weight in alone.items())


def test_a_process_forked_from_a_training_one_can_train():
    """Its copy of the lock is held by a thread that was not copied."""
    module, held, over = sys.modules["zipar_train.training.fit"], Event(), Event()

    def train():
        with module.alone():
            held.set()
            over.wait(60)

    thread = Thread(target=train)
    thread.start()
    held.wait(60)
    if not (child := os.fork()):
        os._exit(0 if module.TRAINING.acquire(blocking=False) else 1)
    status = os.waitpid(child, 0)[1]
    assert not module.TRAINING.acquire(blocking=False)
    over.set()
    thread.join()
    assert status == 0
