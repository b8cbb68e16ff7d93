"""W&B: a run folder has one run through all its resumes; servers that fail hold nothing up, and nothing is lost."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from commands import sets
from forked import Running
from tracked_runs import at_step, short, stop
from wandb_server import KEY, WandbServer

from zipar_train.models.restore import read
from zipar_train.recipe.load import load_recipe
from zipar_train.run.metrics_csv import validations
from zipar_train.run.signals import Stopped
from zipar_train.training.fit import fit
from zipar_train.training.trainer import build_trainer
from zipar_train.training.wandb_tracking import tracked

wandb = pytest.importorskip("wandb")
pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def server():
    server = WandbServer()
    yield server
    server.kill()


def sync(server: WandbServer, *arguments) -> str:
    """What `wandb sync` says."""
    environment = {**os.environ, **server.environment()}
    verb = [Path(sys.executable).parent / "wandb", "sync", *arguments]
    done = subprocess.run(verb, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stderr


def rows(run: Path, name: str) -> dict[int, float]:
    """step: the number, in the CSV logs of a run folder."""
    found = {}
    for file in sorted((run / "logs").glob("version_*/metrics.csv")):
        with file.open(newline="") as lines:
            found |= {int(row["step"]): float(row[name]) for row in csv.DictReader(lines) if row.get(name)}
    return found


def holds(folder: Path, text: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.mark.slow
def test_offline_runs_of_a_folder_are_one_run_which_sync_uploads(tiny, tmp_path, monkeypatch, server, capsys):
    """Stopped and resumed: two offline runs on disk, in the end one run on a server, with all that belongs to it."""
    settings = short(tiny, tmp_path, "run", "log.tags=[fast, mine]", "log.images=3", "log.artifacts=true")
    recipe = load_recipe("digits-base", settings)
    with monkeypatch.context() as patch:
        at_step(patch, 10, stop)
        with pytest.raises(Stopped):
            fit(recipe)
    stopped = read(recipe.run_dir).extra["global_step"]
    killed = tmp_path / "run" / "wandb" / "offline-run-20200101_000000-killed" / "run-killed.wandb"
    killed.parent.mkdir()
    killed.write_bytes(b":W&B" + bytes(3))  # in its first seconds: sync would upload none of them
    os.utime(killed, (time.time() - 10,) * 2)
    fit(recipe, resume=True)
    folders = sorted((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and stopped == 11
    assert f"`wandb sync {recipe.run_dir}/wandb/offline-run-*` uploads it" in capsys.readouterr().out
    sync(server, *folders)

    (name,) = server.runs
    assert json.loads((tmp_path / "run" / "wandb.json").read_text()) == {"id": name}
    run, config = server.runs[name], server.config(name)
    assert (run["displayName"], run["groupName"], run["jobType"]) == ("digits-base-fit", "digits-base", "fit")
    assert run["project"] == "zipar-train" and run["tags"] == ["fast", "mine"] and run["exit_code"] == 0
    assert {key: config[key] for key in recipe.model_dump()} == json.loads(recipe.model_dump_json())
    assert config["environment"]["torch"] == torch.__version__.split("+")[0] and config["environment"]["revision"]
    assert server.history(name, "train/loss") == pytest.approx(rows(tmp_path / "run", "train/loss"))
    assert set(server.history(name, "train/loss")) == set(range(16))
    assert server.history(name, "val/bits_w2") == pytest.approx(rows(tmp_path / "run", "val/bits_w2"))

    tables = {
        Path(file).stem.split(".")[0]: json.loads(data)
        for (_, file), data in server.files.items()
        if file.endswith(".table.json") and "media" not in file
    }
    bits = validations(tmp_path / "run")
    assert set(bits) == {7, 15}
    expected = [[step, w, passes, bits[step][f"val/bits_w{w}"]] for step in (7, 15) for w, passes in ((8, 64), (2, 28))]
    assert tables["windows"] == {"columns": ["step", "window", "passes", "bits"], "data": expected} | tables["windows"]
    assert tables["passes"]["data"] == [[8, 64], [2, 28]]
    (against,) = (table for stem, table in tables.items() if "against" in stem)
    assert against["data"] == [row[1:] for row in expected[2:]]
    assert len([file for _, file in server.files if "media/images" in file]) == 2 * 2 * 3
    checkpoints = [data for (artifact, file), data in server.files.items() if file == "last.ckpt"]
    assert sorted(server.artifacts.values()).count(f"digits-base-{name}") == len(checkpoints) == 2
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").read_bytes() in checkpoints
    assert sorted(server.committed) == sorted(server.artifacts)


def hanging() -> socket.socket:
    """Takes connections, and says nothing."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=100)
    return listener


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["refused", "hanging", "no key"])
def test_a_server_out_of_reach_at_the_start_makes_the_run_offline(tiny, tmp_path, monkeypatch, fault, server, capsys):
    listener = hanging()
    port = listener.getsockname()[1]
    if fault == "refused":
        listener.close()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    if fault != "no key":
        monkeypatch.setenv("WANDB_API_KEY", KEY)
    begun = time.monotonic()
    fit(load_recipe("digits-base", short(tiny, tmp_path, "run", "log.wandb=online")))
    assert time.monotonic() - begun < 25
    listener.close()
    said = [line for line in capsys.readouterr().out.split("\n") if "W&B" in line]
    assert len(said) == 2 and "W&B is out of reach (" in said[0] and "the run continues offline" in said[0]
    assert {"refused": "refused", "hanging": "deadline", "no key": "No API key configured"}[fault] in said[0]
    assert not holds(tmp_path / "run", KEY)
    sync(server, *(tmp_path / "run" / "wandb").glob("offline-run-*"))
    (name,) = server.runs
    assert server.history(name, "train/loss") == pytest.approx(rows(tmp_path / "run", "train/loss"))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["killed", "hanging"])
def test_a_server_lost_in_the_middle_holds_nothing_up_and_loses_nothing(
    tiny, tmp_path, monkeypatch, fault, server, capsys
):
    for name, value in (server.environment() | {"WANDB_FINISH_TIMEOUT": "4"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(wandb.Api, "_HTTP_TIMEOUT", 0.5)  # as WANDB_HTTP_TIMEOUT would, had it been there at the import
    at_step(monkeypatch, 9, lambda _: server.kill() if fault == "killed" else server.hanging.set())
    begun = time.monotonic()
    fit(load_recipe("digits-base", short(tiny, tmp_path, "run", "log.wandb=online")))
    assert time.monotonic() - begun < 25
    said = [line for line in capsys.readouterr().out.split("\n") if "W&B" in line]
    (folder,) = (tmp_path / "run" / "wandb").glob("run-*")
    assert said == [f"W&B has not uploaded everything in 4 s: `wandb sync --include-online {folder}` does."]
    assert len(rows(tmp_path / "run", "train/loss")) == 16
    assert not holds(tmp_path / "run", KEY)
    other = WandbServer()
    sync(other, *said[0].split("`")[1].split()[2:])
    (name,) = other.runs
    assert other.history(name, "train/loss") == pytest.approx(rows(tmp_path / "run", "train/loss"))
    assert [json.loads(data)["columns"] for (_, file), data in other.files.items() if "table/windows" in file]
    other.kill()


@pytest.mark.slow
def test_online_runs_are_resumed_on_the_server(tiny, tmp_path, monkeypatch, server):
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    recipe = load_recipe("digits-base", short(tiny, tmp_path, "run", "log.wandb=online", "log.name=mine"))
    with monkeypatch.context() as patch:
        at_step(patch, 10, stop)
        with pytest.raises(Stopped):
            fit(recipe)
        (name,) = server.runs
        assert server.runs[name]["exit_code"] == 128 + signal.SIGTERM and server.runs[name]["starts"] == 1
    fit(recipe, resume=True)
    assert list(server.runs) == [name] and server.runs[name]["displayName"] == "mine"
    assert server.runs[name]["exit_code"] == 0 and server.runs[name]["starts"] == 2
    assert set(server.history(name, "train/loss")) == set(range(16))
    assert not holds(tmp_path / "run", KEY)


@pytest.mark.slow
def test_a_stop_ends_a_run_whose_server_hangs(tiny, tmp_path, server):
    """The real process: SIGTERM, then a bounded wait, then its status."""
    overrides = short(tiny, tmp_path, "run", "log.wandb=online", "trainer.max_epochs=500", "checkpoint_every=2")
    environment = server.environment() | {"WANDB_FINISH_TIMEOUT": "3"}
    running = Running("fit", "--recipe", "digits-base", *sets(overrides), log=tmp_path / "log", env=environment)
    running.until((tmp_path / "run" / "checkpoints" / "last.ckpt").is_file)
    server.hanging.set()
    running.kill(signal.SIGTERM)
    begun = time.monotonic()
    assert running.ended(60) == 143 and time.monotonic() - begun < 20, running.said()
    assert "stopped by SIGTERM" in running.said() and "Traceback" not in running.said()
    assert "`wandb sync --include-online" in running.said()


@pytest.mark.slow
def test_training_outlives_wandbs_own_process(tiny, tmp_path, monkeypatch, capsys):
    def end(_):
        for child in psutil.Process().children():
            if child.name().startswith("wandb-core"):
                child.kill()
                child.wait()

    at_step(monkeypatch, 9, end)
    fit(load_recipe("digits-base", short(tiny, tmp_path, "run", "log.images=2", "log.artifacts=true")))
    said = [line for line in capsys.readouterr().out.split("\n") if "W&B" in line]
    assert len(said) == 2 and said[1].startswith("W&B has failed (") and "logs alone is written" in said[1]
    assert len(rows(tmp_path / "run", "train/loss")) == 16


def test_other_processes_start_nothing_and_neither_does_a_disabled_one(tiny, tmp_path, monkeypatch):
    recipe = load_recipe("digits-base", short(tiny, tmp_path, "run"))
    trainer = build_trainer(recipe)
    monkeypatch.setattr(type(trainer), "is_global_zero", False)
    with tracked(trainer, recipe):
        assert len(trainer.loggers) == 1
    monkeypatch.undo()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    trainer = build_trainer(recipe)
    with tracked(trainer, recipe):
        assert len(trainer.loggers) == 1
    assert not (tmp_path / "run").exists()


def test_an_empty_mode_is_none(tiny, tmp_path, monkeypatch, capsys):
    """`WANDB_MODE= zipar-train fit`, which wandb itself refuses."""
    monkeypatch.setenv("WANDB_MODE", "")
    (tmp_path / "run").mkdir()
    recipe = load_recipe("digits-base", short(tiny, tmp_path, "run"))
    with tracked(build_trainer(recipe), recipe):
        pass
    assert "W&B offline" in capsys.readouterr().out
