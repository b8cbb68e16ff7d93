"""Sweeps, run: mistakes show before, failed trials are named, a sweep grows; W&B's own agents run the same files."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml
from commands import sets
from sweep_files import write
from wandb_server import WandbServer

from zipar_train.io.files import make_folder, write_atomic
from zipar_train.recipe.load import load_recipe, recipe_folder
from zipar_train.run.signals import Stopped
from zipar_train.sweep.results import Trial, passes, plot
from zipar_train.sweep.runner import run


def test_mistakes_in_trials_show_before_anything_is_run(tmp_path):
    path = write(tmp_path, "method: grid\nparameters: {optim.lr: {values: [0.1, -1]}}")
    with pytest.raises(ValueError, match="optim.lr = -1"):
        run("digits-base", path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


NAMES = [
    "my sweep #2",
    "2024-01-01",
    "007",
    "no",
    "a: b",
    "[x]",
    "@x",
    "{a}",
    "'",
    '"q"',
    "back\\slash",
    "null",
    "1e-4",
    "&a",
    "*a",
    "!t",
    "%x",
    "- x",
    "| x",
    "> x",
    "?",
    ":",
    " lead",
    "trail ",
    "caf\u00e9 \U0001f3a8",
    "~",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_any_name_is_the_sweeps(tmp_path, monkeypatch, name):
    """Whatever YAML makes of it: each trial's run, group and command line are those of the folder."""
    path, commands = write(tmp_path, "method: grid\nparameters: {optim.lr: {values: [0.1]}}"), []

    def one(place, command, number, values, recipe, gpu, running):
        commands.append((place, load_recipe(command[2], command[4:-1:2]), recipe))
        return Trial(number=number, values=values, seconds=1, metrics={"val/bits_w8": 1.0}, passes={})

    monkeypatch.setattr("zipar_train.sweep.runner._one", one)
    run("digits-base", path, out=tmp_path / name, progress=False)
    [(place, told, checked)] = commands
    assert place == tmp_path / name / "000"
    assert told == checked
    assert Path(told.run_dir) == place and told.log.group == name


def test_passes_are_those_of_a_trials_own_rule():
    alone, overlapping = (
        passes(load_recipe("digits", [f"zipar.first_row={rule}"]), ["val/bits_w2", "val/bits_w8", "train/loss"])
        for rule in ("complete", "overlapping")
    )
    assert alone == {2: 28, 8: 64} and overlapping == {2: 22, 8: 64}


def test_a_sweep_grows_and_a_diverged_trial_is_last(tmp_path, monkeypatch, capsys):
    """With `fit` replaced by what it leaves behind."""
    shown = []

    def one(place, command, number, values, recipe, gpu, running):
        make_folder(place)
        metrics = {} if number == 1 else {"val/bits_w8": 3.0 - number, "val/bits_w2": 4.0}
        trial = Trial(number=number, values=values, seconds=60, metrics=metrics, passes=passes(recipe, metrics))
        write_atomic(place / "result.json", trial.model_dump_json().encode())
        shown.append((number, gpu))
        return trial

    monkeypatch.setattr("zipar_train.sweep.runner._one", one)
    path = write(
        tmp_path,
        "method: random\nparameters: {optim.lr: {min: 0.0, max: 1.0}, seed: {value: 3},"
        "zipar.windows: {value: '{8: 1, 2: 1}'}}",
    )
    arguments = {"out": tmp_path / "out", "gpus": ["0", "1"], "progress": False}
    run("digits-base", path, count=2, **arguments)
    outcome, folder = run("digits-base", path, count=4, **arguments)
    assert sorted(number for number, _ in shown) == [0, 1, 2, 3] and {gpu for _, gpu in shown} == {"0", "1"}
    assert outcome.metric == "val/bits_w2" and [trial.number for trial in outcome.trials][-1] == 1
    table = outcome.lines()
    assert table[0].split() == ["trial", "lr", "w2", "w8", "minutes"] and table[4].split()[2:4] == ["-", "-"]
    assert table[5] == "in all: seed 3, zipar.windows {8: 1, 2: 1}"
    plot(outcome, tmp_path / "plot.png")
    assert len(run("digits-base", path, count=2, **arguments)[0].trials) == 4
    with pytest.raises(ValueError, match="holds a sweep of other trials"):
        run("digits-base", path, count=2, seed=1, **arguments)
    with pytest.raises(ValueError, match=r"holds a sweep of another recipe .optim.lr: 0.003 -> 0.5"):
        run("digits-base", path, count=2, overrides=["optim.lr=0.5"], **arguments)
    run("digits-base", path, count=2, overrides=["log.tags=[again]"], **arguments)  # which no number depends on
    (folder / "sweep.json").write_text("{")
    with pytest.raises(ValueError, match="sweep.json is damaged"):
        run("digits-base", path, count=2, **arguments)


def test_a_signal_is_heard_between_trials_and_a_full_disk_is_a_failed_trial(tmp_path, monkeypatch):
    """With `fit` replaced: no exception out of a handler, which could come while a lock is held."""
    begun, handlers = [], [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]

    def one(place, command, number, values, recipe, gpu, running):
        begun.append(number)
        if number == 0:
            raise OSError("cannot write result.json: No space left on device")
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 10
        while not running.stopped and time.monotonic() < deadline:
            time.sleep(0.01)
        status = running.to_its_end([sys.executable, "-c", ""])
        raise ValueError(f"trial {number:03d} ended with status {status}")

    monkeypatch.setattr("zipar_train.sweep.runner._one", one)
    path = write(tmp_path, "method: grid\nparameters: {seed: {values: [1, 2, 3, 4]}}")
    with pytest.raises(Stopped) as stopped:
        run("digits-base", path, out=tmp_path / "out", progress=False)
    assert stopped.value.signum == signal.SIGTERM and begun == [0, 1]
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == handlers
    begun.clear()
    monkeypatch.setattr("zipar_train.sweep.runner._one", lambda *_: one(*_) if not begun else begun.append(1))
    path = write(tmp_path, "method: grid\nparameters: {seed: {values: [1]}}")
    outcome, _ = run("digits-base", path, out=tmp_path / "other", progress=False)
    assert outcome.failed == ["cannot write result.json: No space left on device"]


def test_a_metric_that_trials_do_not_tell_is_refused_before_anything_is_run(tmp_path):
    path = write(
        tmp_path,
        "method: grid\nmetric: {name: val/bits_w4}\nparameters: {zipar.windows: {values: ['{4: 1}', '{2: 1}']}}",
    )
    with pytest.raises(ValueError, match="metric.name = val/bits_w4: not all trials report it; all report val/bits_w8"):
        run("digits-base", path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_failed_trials_are_named_and_the_others_kept(tiny, tmp_path, run):
    path = write(tmp_path, "method: grid\nparameters: {data.train: {values: [missing.json]}}")
    status, out, _ = run("sweep", "--recipe", "digits-base", "--file", path, "--out", "out", *sets(tiny))
    assert status == 1
    assert "trial 000 ended with status 2" in out and "missing.json" in out and "0 trials" in out


@pytest.mark.slow
def test_wandbs_own_agent_runs_the_shipped_files(tiny, tmp_path, monkeypatch):
    """Its command line, as it makes and runs it, into a folder for the run; a server is told the numbers."""
    from wandb.wandb_agent import Agent

    raw = yaml.safe_load((recipe_folder() / "sweeps" / "windows.yaml").read_text())
    server = WandbServer()
    for name, text in server.environment().items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(recipe_folder().parent))
    agent = Agent(None, None, sweep_id="s1")
    short = [
        "trainer.max_epochs=1",
        "trainer.limit_train_batches=2",
        "model.weights=null",
        "tune.distill=0",
        f"run_dir={tmp_path}/base",
        "log.wandb=offline",
    ]
    agent._sweep_command = [*raw["command"], *tiny, *short]  # what a person sets once for all runs
    given = {"zipar.windows": {"value": "{2: 1}"}, "data.val_windows": {"value": [8, 4, 2, 1]}}
    try:
        agent._command_run({"run_id": "r2", "args": given, "program": raw["program"]})
        status = agent._run_processes["r2"].wait()
    finally:
        server.kill()
    assert status == 0
    recipe = load_recipe(tmp_path / "base-s1" / "r2" / "recipe.yaml")
    assert recipe.zipar.windows == {2: 1} and recipe.data.val_windows == [8, 4, 2, 1] and recipe.name == "digits"
    assert list(server.runs) == ["r2"] and server.runs["r2"]["sweep"] == "s1" and server.runs["r2"]["exit_code"] == 0
    assert set(server.history("r2", "val/bits_w4")) == {1}
