"""Sweeps: the trials a file asks for; a killed one goes on and runs nothing twice; agents' runs keep apart."""

import csv
import itertools
import json
import os
import signal
import subprocess
import time
from math import log
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import command, sets

from zipar_train.recipe import load_recipe, recipe_folder
from zipar_train.sweep import _override, run, validated
from zipar_train.trials import read_sweep, trials_of


def write(folder: Path, text: str) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(text)
    return path


def test_a_grid_is_every_combination_once(tmp_path):
    path = write(
        tmp_path,
        """
method: grid
parameters:
  optim:
    parameters:
      lr: {values: [0.1, 0.2]}
      warmup: {value: 0.5}
  seed: {min: 3, max: 5}
  data.label_dropout: {distribution: q_uniform, min: 0.0, max: 0.6, q: 0.2}
""",
    )
    found = trials_of(read_sweep(path))
    product = itertools.product([0.1, 0.2], [3, 4, 5], np.arange(0, 0.6, 0.2).tolist())
    expected = [{"optim.lr": lr, "optim.warmup": 0.5, "seed": seed, "data.label_dropout": q} for lr, seed, q in product]
    assert sorted(map(str, found)) == sorted(map(str, expected)) and len(found) == 18
    assert trials_of(read_sweep(path), count=5) == found[:5]


def test_random_trials_are_of_their_distributions_and_repeatable(tmp_path):
    path = write(
        tmp_path,
        """
method: random
parameters:
  a: {distribution: log_uniform_values, min: 0.001, max: 0.1}
  b: {min: 2, max: 4}
  c: {values: [x, y], probabilities: [0.9, 0.1]}
  d: {mu: 5.0, sigma: 2.0}
  e: {min: 0.0, max: 1.0}
""",
    )
    sweep = read_sweep(path)
    with pytest.raises(ValueError, match="a random sweep has no end: give --count"):
        trials_of(sweep)
    found = trials_of(sweep, count=2000, seed=1)
    assert found == trials_of(sweep, count=2000, seed=1) != trials_of(sweep, count=2000, seed=2)
    a, b, d, e = (np.array([trial[key] for trial in found]) for key in "abde")
    assert abs(np.log(a).mean() - log(0.01)) < 0.1 and a.min() >= 0.001 and a.max() <= 0.1
    assert set(b) == {2, 3, 4} and {type(trial["b"]) for trial in found} == {int}
    assert 0.87 < np.mean([trial["c"] == "x" for trial in found]) < 0.93
    assert abs(d.mean() - 5) < 0.2 and abs(d.std() - 2) < 0.2
    assert abs(e.mean() - 0.5) < 0.03


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not readable YAML"),
        ("method: grid", "a sweep file has `parameters`"),
        ("method: bayes\nparameters: {a: {value: 1}}", "method = 'bayes': use grid or random here"),
        ("parameters: {a: 3}", "parameters.a = 3: write `value: 3`"),
        ("parameters: {a: {values: []}}", r"values = \[\]: a list of at least one"),
        ("parameters: {a: {min: 0.5, max: 1.0}}", "a grid needs values, not uniform"),
        ("method: random\nparameters: {a: {min: 1e-4, max: 1.0}}", "min = '1e-4' is no number .write 1.0e-4"),
        ("method: random\nparameters: {a: {min: 2, max: 1}}", "min 2 is not below max 1"),
        ("parameters: {a: {distribution: beta}}", "distribution 'beta' is unknown here"),
        ("parameters: {a: {}}", "distribution None is unknown here"),
        ("run_cap: 0\nparameters: {a: {value: 1}}", "run_cap = 0: a whole number from 1"),
        ("metric: {goal: most}\nparameters: {a: {value: 1}}", "metric = .*goal: minimize or maximize"),
    ],
)
def test_files_with_mistakes_say_which(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_sweep(write(tmp_path, text))


@pytest.mark.parametrize("path", sorted((recipe_folder() / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_sweeps_fit_the_digits_and_are_for_wandb_too(path):
    for values in trials_of(read_sweep(path)):
        load_recipe("digits", map(_override, values.items()))
    raw = yaml.safe_load(path.read_text())
    assert raw["command"][-1] == "${args_no_hyphens}" and raw["metric"]["name"].startswith("val/bits_w")


def test_mistakes_in_trials_show_before_anything_is_run(tmp_path):
    path = write(tmp_path, "parameters: {optim.lr: {values: [0.1, -1]}}")
    with pytest.raises(ValueError, match="optim.lr = -1"):
        run("digits-base", path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_killed_sweep_goes_on_and_runs_nothing_twice(tiny, tmp_path):
    path = write(
        tmp_path,
        """
method: grid
metric: {name: val/bits_w8, goal: minimize}
parameters:
  optim.lr: {values: [0.0001, 0.01, 0.001]}
  data.val_windows: {value: [8, 2]}
""".replace(", -0.0", ", 0.001"),
    )
    settings = sets([*tiny, "trainer.max_epochs=1", "trainer.limit_train_batches=12",
                     "trainer.check_val_every_n_epoch=1", "trainer.log_every_n_steps=1"])  # fmt: skip
    verb = ["sweep", "--recipe", "digits-base", "--grid", path, "--out", tmp_path / "out", *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    killed = subprocess.Popen(command(*verb), env=environment, cwd=tmp_path, start_new_session=True, **pipes)
    deadline = time.monotonic() + 120
    while not (tmp_path / "out" / "000" / "result.json").is_file() and time.monotonic() < deadline:
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    first = (tmp_path / "out" / "000" / "result.json").stat().st_mtime_ns
    done = subprocess.run(command(*verb, "--json", tmp_path / "sweep.json"), env=environment, cwd=tmp_path, **pipes)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "000" / "result.json").stat().st_mtime_ns == first
    found = json.loads((tmp_path / "sweep.json").read_text())
    bits = [trial["metrics"]["val/bits_w8"] for trial in found["trials"]]
    assert len(bits) == 3 and bits == sorted(bits) and found["trials"][0]["values"]["optim.lr"] == 0.01
    for trial in found["trials"]:
        place = tmp_path / "out" / f"{trial['number']:03d}"
        assert trial["metrics"] == validated(place) and set(trial["metrics"]) == {"val/bits_w8", "val/bits_w2"}
        steps = [row["step"] for file in (place / "logs").glob("*/metrics.csv") for row in csv.DictReader(file.open())]
        assert max(map(int, steps)) == 11
    assert found["passes"] == {"8": 64, "2": 28}
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    other = subprocess.run(command(*verb, "--set", "seed=7"), env=environment, cwd=tmp_path, **pipes)
    assert other.returncode == 2 and "holds a sweep of other recipe" in other.stderr


def test_failed_trials_are_named_and_the_others_kept(tiny, tmp_path, run):
    path = write(tmp_path, "parameters: {data.train: {values: [missing.json]}}")
    status, out, _ = run("sweep", "--recipe", "digits-base", "--grid", path, "--out", "out", *sets(tiny))
    assert status == 1
    assert "trial 000 ended with status 2" in out and "missing.json" in out and "0 trials" in out


def test_an_agents_runs_have_their_own_folders(tiny, tmp_path, run, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "r2")
    short = ["trainer.max_epochs=1", "trainer.limit_train_batches=2", f"run={tmp_path}/base"]
    status, _, err = run("fit", "--recipe", "digits-base", *sets([*tiny, *short]), "optim.lr=0.5")
    assert status == 0, err
    recipe = load_recipe(tmp_path / "base-s1" / "r2" / "recipe.yaml")
    assert recipe.optim.lr == 0.5
