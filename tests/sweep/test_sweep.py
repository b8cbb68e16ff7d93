"""Sweeps, run: an interrupted one goes on and runs nothing twice; W&B's own agents run the same files."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from commands import command, sets
from wandb_server import WandbServer

from zipar_train.io.files import make_folder, write_atomic
from zipar_train.models.restore import read
from zipar_train.recipe.load import load_recipe, recipe_folder
from zipar_train.run.metrics_csv import validations
from zipar_train.run.signals import Stopped
from zipar_train.sweep.results import Trial, draw, passes
from zipar_train.sweep.runner import run


def write(folder: Path, text: str) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(text)
    return path


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


TRIALS = int(os.environ.get("ZIPAR_SWEEP_TRIALS", "3"))  # 12 take minutes
LONG = TRIALS > 3
STOPS = [signal.SIGKILL, *[signal.SIGKILL, signal.SIGINT] * LONG, signal.SIGTERM]


def starts(place: Path) -> int:
    """How often a trial's training has begun, by the line that it says then."""
    return (place / "log.txt").read_text().count("digits-base: llamagen")


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_and_runs_nothing_twice(tiny, tmp_path):
    """Its process group killed, then itself asked to end, in mid-training each time; then left alone to its end."""
    rates = [10 ** (-1 - k / 4) for k in range(TRIALS)]
    path = write(
        tmp_path,
        f"""
method: grid
metric: {{name: val/bits_w8, goal: minimize}}
parameters:
  optim.lr: {{values: {rates}}}
  data.val_windows: {{value: [8, 2]}}
""",
    )
    settings = sets(
        [
            *tiny,
            "trainer.max_epochs=1",
            "trainer.check_val_every_n_epoch=1",
            "trainer.log_every_n_steps=1",
            "data.micro_batch_size=16",
            "checkpoint_every=5",
            "log.wandb=offline",
        ]
    )
    out = tmp_path / "out"
    verb = ["sweep", "--recipe", "digits-base", "--file", path, "--out", out, "--jobs", 1 + LONG, *settings]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    folders, stopped, kept = [out / f"{k:03d}" for k in range(TRIALS)], [0] * TRIALS, {}

    def done() -> list[Path]:
        return [place for place in folders if (place / "result.json").is_file()]

    def underway() -> list[Path]:
        return [place for place in folders if (place / "checkpoints" / "last.ckpt").is_file() and place not in done()]

    for k, signum in enumerate(STOPS):
        process = subprocess.Popen(command(*verb), start_new_session=True, **pipes)
        deadline, before = time.monotonic() + 240, len(done())
        while len(done()) < before + k % 2 or not set(underway()) - set(kept):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.01)
        for place in set(folders) - set(done()):
            stopped[folders.index(place)] += place.is_dir()
        kept |= {place: read(place).extra["global_step"] for place in underway()}
        if signum == signal.SIGTERM:
            process.send_signal(signum)
        else:
            os.killpg(process.pid, signum)  # as a terminal's Ctrl-C does
        _, err = process.communicate(timeout=60)
        if signum != signal.SIGKILL:
            assert process.returncode == 128 + signum and "run the same command again to go on" in err
        deadline = time.monotonic() + 10
        while left := [p for p in psutil.process_iter(["cmdline"]) if str(out) in " ".join(p.info["cmdline"] or [])]:
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
    finished = {place: (place / "result.json").stat().st_mtime_ns for place in done()}
    assert len(finished) < TRIALS and kept

    last = subprocess.run(command(*verb, "--json", tmp_path / "sweep.json"), **pipes)
    assert last.returncode == 0, last.stderr
    found = json.loads((tmp_path / "sweep.json").read_text())
    bits = [trial["metrics"]["val/bits_w8"] for trial in found["trials"]]
    assert len(bits) == TRIALS == len({trial["number"] for trial in found["trials"]}) and bits == sorted(bits)
    assert all(t["passes"] == {"8": 64, "2": 28} for t in found["trials"]) and not found["failed"]
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    for place, stops in zip(folders, stopped, strict=True):
        assert 1 <= starts(place) <= 1 + stops, place  # a stop may have come before the line
        if place in finished:
            assert (place / "result.json").stat().st_mtime_ns == finished[place]
        trial = next(trial for trial in found["trials"] if folders[trial["number"]] == place)
        logged = validations(place)
        assert list(logged) == [89] and logged[89] == trial["metrics"]
        assert trial["values"]["optim.lr"] == rates[trial["number"]]
    for place, step in kept.items():
        assert f"Resuming from {place}" in (place / "log.txt").read_text()
        *_, log = sorted((place / "logs").iterdir(), key=lambda folder: int(folder.name.split("_")[1]))
        if step < 90:  # otherwise nothing was left to do but to write its result
            with (log / "metrics.csv").open(newline="") as rows:
                assert step <= int(next(csv.DictReader(rows))["step"])  # went on from there, not from its beginning

    server = WandbServer()
    try:
        sync = [Path(sys.executable).parent / "wandb", "sync", *out.glob("*/wandb/offline-run-*")]
        synced = subprocess.run(sync, env=os.environ | server.environment(), **pipes)
        assert synced.returncode == 0, synced.stderr
    finally:
        server.kill()
    assert {run["groupName"] for run in server.runs.values()} == {"out"}, (synced.stderr, synced.stdout)
    names = {run["displayName"] for run in server.runs.values() if run["exit_code"] == 0}
    assert names == {f"digits-base-{k:03d}" for k in range(TRIALS)} and len(server.runs) == TRIALS


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
    draw(outcome, tmp_path / "plot.png")
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
    with pytest.raises(ValueError, match="metric.name = val/bits_w4: not all trials tell it; all tell val/bits_w8"):
        run("digits-base", path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_failed_trials_are_named_and_the_others_kept(tiny, tmp_path, run):
    path = write(tmp_path, "method: grid\nparameters: {data.train: {values: [missing.json]}}")
    status, out, _ = run("sweep", "--recipe", "digits-base", "--file", path, "--out", "out", *sets(tiny))
    assert status == 1
    assert "trial 000 ended with status 2" in out and "missing.json" in out and "0 trials" in out


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
