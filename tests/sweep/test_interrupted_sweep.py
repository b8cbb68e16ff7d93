"""An interrupted sweep goes on and runs nothing twice. ZIPAR_SWEEP_TRIALS=12 gives it twelve trials."""

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
from commands import command, sets
from sweep_files import write
from wandb_server import WandbServer

from zipar_train.models.restore import read
from zipar_train.run.metrics_csv import validations

TRIALS = int(os.environ.get("ZIPAR_SWEEP_TRIALS", "3"))  # 12 take minutes
LONG = TRIALS > 3
STOPS = [signal.SIGKILL, *[signal.SIGKILL, signal.SIGINT] * LONG, signal.SIGTERM]


def starts(place: Path) -> int:
    """How often a trial's training has begun, by the line that it says then."""
    return (place / "log.txt").read_text().count("digits-base: llamagen")


@pytest.mark.slow(seconds=25)
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
