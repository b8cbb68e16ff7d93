"""`scripts/gpu/evidence`: its recipes, its budget, its steps, its page, and a dry run of it all."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from time import monotonic

import natural
import numpy as np
import pytest
import torch
from PIL import Image

from zipar_train.models.family import build
from zipar_train.recipe.load import differences, load_recipe

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts" / "gpu" / "tin"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS.parent))
    monkeypatch.syspath_prepend(str(SCRIPTS))


# ---------------------------------------------------------------------------------------------------------------------
# Recipes and time


def test_the_tuning_recipe_is_the_base_recipe_with_the_default_tuning():
    base, tuned = (load_recipe(SCRIPTS / f"{name}.yaml") for name in ("tin-base", "tin"))
    told = differences(base, tuned, ignore=("name", "description", "run_dir"))
    changed = {".".join(words.partition(":")[0].split(".")[:2]) for words in told}
    trainer = {"trainer.max_epochs", "trainer.limit_val_batches", "trainer.check_val_every_n_epoch"}
    assert changed == {
        *("model.weights", "zipar.windows", "tune.distill", "data.micro_batch_size", "optim.lr"),
        *trainer,
    }
    shipped = load_recipe("llamagen-l")
    assert tuned.tune.distill == shipped.tune.distill and tuned.zipar.rule == shipped.zipar.rule
    assert tuned.zipar.windows == {16: 1, 8: 1, 4: 1, 2: 1} and tuned.trainer["max_epochs"] == 1
    assert base.zipar.windows == {16: 1} and tuned.model.weights == base.run_dir


def test_the_table_of_sizes_has_the_recipe_s():
    import budget

    model = load_recipe(str(SCRIPTS / "tin-base.yaml")).model
    with torch.device("meta"):
        parameters = sum(each.numel() for each in build(model).model.parameters())
    (row,) = (row for row in budget.table() if row.startswith(f"| {model.num_layers} x {model.hidden_size} "))
    assert row.split("|")[2].strip() == (million := f"{parameters / 1e6:.1f}")
    assert f"A class-conditional LlamaGen of {million} M parameters" in (ROOT / "docs" / "evidence.md").read_text()


@pytest.mark.parametrize("images", [800.0, 2000.0, 4000.0, 6000.0, 20000.0])
def test_the_deadline_holds_at_any_rate(images):
    import budget

    rate, left, epoch = budget.Rate(images, 25.0), 500.0, 100_000
    count = budget.steps(rate, left=left, epoch=epoch, batch=256)
    ends = rate.start + count * 256 / images + budget.reserve(rate, epoch=epoch)
    assert count == 1 or ends <= left
    assert count <= budget.EPOCHS * 391
    if count < budget.EPOCHS * 391 and count > 1:
        assert ends + 256 / images > left  # and no time is left unused


def test_steps_that_have_passed_are_not_repeated(tmp_path):
    import story
    from step_runner import Runner

    def made(seconds=100.0):
        runner = Runner(tmp_path, tmp_path / "out", deadline=monotonic() + seconds, told={})
        return story.Story(runner, tmp_path, tmp_path, tiny=True)

    first, limits, count = made(), {"limit": 50.0, "least": 1.0}, tmp_path / "count"
    once = ["-c", f"open({str(count)!r}, 'a').write('.')"]
    quick = first.step("quick", "quick", once, **limits)
    assert first.run(quick)
    assert not first.run(first.step("failing", "failing", ["-c", "raise SystemExit(3)"], **limits), quick)
    assert [step["status"] for step in first.runner.done] == ["passed", "not needed", "failed"]
    again = made()
    assert again.run(quick, again.step("failing", "failing", once, **limits))
    assert [step["status"] for step in again.runner.done] == ["not needed", "passed"] and count.read_text() == ".."
    late = made(0.0)
    assert not late.run(late.step("late", "late", once, **limits)) and count.read_text() == ".."
    assert late.run()


def test_what_cannot_be_compiled_is_trained_without_and_what_cannot_be_trained_ends_the_story(tmp_path, monkeypatch):
    import story
    from step_runner import Runner

    runner = Runner(tmp_path, tmp_path / "out", deadline=monotonic() + 500, told={})
    told = story.Story(runner, tmp_path, tmp_path, tiny=False)
    ran: list[tuple[str, list]] = []

    def run(*steps):
        for step in steps:
            ran.append((step.name, step.command))
        told.runner.done.append({"seconds": 60.0, "status": "failed"})
        if steps and steps[0].name == "timing-uncompiled" and trains:
            folder = tmp_path / "runs" / "timing-uncompiled" / "logs" / "version_0"
            folder.mkdir(parents=True, exist_ok=True)
            rows = "".join(f"{speed}.0,{n}\n" for n, speed in enumerate((100, 3000, 2000, 2400)))
            (folder / "metrics.csv").write_text(f"train/images_per_second,step\n{rows}")
        return bool(steps) and steps[0].name == "shards"

    monkeypatch.setattr(told, "run", run)
    trains = False
    told.tell()
    assert [name for name, _ in ran] == ["shards", "timing", "timing-uncompiled"]
    ran.clear()
    trains, told.more = True, []
    told.tell()
    assert [name for name, _ in ran] == ["shards", "timing", "timing-uncompiled", "base"]  # which left no checkpoint
    assert "tune.compile=false" not in ran[1][1] and "tune.compile=false" in ran[3][1]
    rate = told.timed()
    assert rate.images == 2400  # the median of the last three
    assert rate.start == story.START == 30  # at most; 60 s less 100 steps of 256 images are more


# ---------------------------------------------------------------------------------------------------------------------
# The page

MADE = {
    "device": "NVIDIA H100",
    "torch": "2.11.0",
    "lightning": "2.6.6",
    "transformers": "5.17.0",
    "revision": "abc1234",
    "date": "2026-11-26",
}


def results():
    models = {}
    for model, extra in (("base", 0.2), ("tuned", 0.05), ("control", 0.15)):
        bits = {str(window): 6.0 + extra * (window == 2) for window in (16, 2)}
        models[model] = {
            "environment": MADE,
            "parameters": 27.9e6,
            "steps": 3910,
            "epochs": 10.01,
            "images": 5000,
            "bits": bits,
            "training": {"train/images_per_second": 4321.0, "train/mfu": 0.25},
        }
    score = {
        "fid": {"mean": 120.04, "std": 2.0},
        "precision": {"mean": 0.5, "std": 0.01},
        "recall": {"mean": 0.25, "std": None},
    }
    rows = [
        {"run": run, "window": window, "passes": 256 if window == 16 else 60, "images_per_second": 900.0, **score}
        for run in ("tin-base", "tin", "tin-control")
        for window in (16, 2)
    ]
    distances = {"environment": MADE, "images": 2000, "rows": rows, "real": {"images": 2000, **score}}
    steps = [
        {"name": model, "status": "passed", "command": f"zipar-train fit --recipe {model}.yaml"} for model in models
    ]
    judged = {f"bits-{model}": told for model, told in models.items()}
    return {
        "command": "scripts/gpu/evidence",
        "tiny": False,
        "steps": steps,
        "results": judged | {"distances": distances},
    }


def test_the_page_names_what_its_rows_were_measured_with():
    import page

    lines = page.lines(results())
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + 6 + 1
    made = "NVIDIA H100; torch 2.11.0, lightning 2.6.6, transformers 5.17.0; revision abc1234, 2026-11-26; "
    assert f"Measured on {made}`scripts/gpu/evidence`." in lines
    others = results()
    control = others["results"]["bits-control"] = copy.deepcopy(others["results"]["bits-control"])
    control["environment"]["device"] = "NVIDIA H200"
    (told,) = (line for line in page.lines(others) if line.startswith("Measured on "))
    assert re.match("Measured on NVIDIA H100; .*` [(]untuned; one .* images[)] and NVIDIA H200; .*` [(]control: ", told)
    scores = "120.0 ± 2.0 | 0.500 ± 0.010 | 0.250 | "
    assert table[3].startswith(f"| untuned | 2 | 60 | 6.2000 | +3.33% | - | {scores}900 |")
    assert table[5].startswith(f"| one epoch, mixed windows | 2 | 60 | 6.0500 | +0.83% | 75% | {scores}900 |")
    assert table[7].startswith(
        f"| control: one more epoch, next-token | 2 | 60 | 6.1500 | +2.50% | 25% | {scores}900 |"
    )
    assert table[8].startswith("| 2,000 training images | - | - | - | - | - | 120.0")
    assert any("27.9 M parameters; 3,910 steps, 10.0 epochs; 4,321 images/s" in line for line in lines)
    assert any("`zipar-train fit --recipe tuned.yaml`" in line for line in lines)


def test_a_shorter_run_still_has_a_table():
    import page

    found = copy.deepcopy(results())
    del found["results"]["bits-control"], found["results"]["distances"]
    found["steps"][2]["status"] = "skipped"
    lines = page.lines(found)
    assert lines[2].startswith("| untuned | 16 | - | 6.0000 | - | - | - | - | - | - |")
    assert len([line for line in lines if line.startswith("|")]) == 2 + 4
    assert "Not measured: control (skipped)." in lines
    assert page.lines({}) == ["Not yet measured."]


def test_the_page_has_a_place_for_it_and_takes_no_dry_run(tmp_path, monkeypatch):
    import page

    (tmp_path / "docs").mkdir()
    whole = (ROOT / "docs" / "evidence.md").read_text()
    (tmp_path / "docs" / "evidence.md").write_text(whole)
    monkeypatch.setattr(page, "DOCS", tmp_path / "docs")
    (tmp_path / "results.json").write_text(json.dumps(results()))
    Image.new("RGB", (2800, 700), "red").save(tmp_path / "samples.png")
    for _ in range(2):
        page.write(tmp_path)
    told = (tmp_path / "docs" / "evidence.md").read_text()
    assert told.count("| one epoch, mixed windows | 2 | 60 | 6.0500 |") == 1
    assert told.count("![the same draws at every window](evidence/natural.jpg)") == 1
    assert Image.open(tmp_path / "docs" / "evidence" / "natural.jpg").size == (1400, 350)
    before, after = page.MARKED.split(whole)[0], whole.rpartition("<!-- /gpu:evidence -->")[2]
    assert told.startswith(before) and told.endswith(after)
    (tmp_path / "results.json").write_text(json.dumps(results() | {"tiny": True}))
    with pytest.raises(ValueError, match="holds a dry run"):
        page.write(tmp_path)
    with pytest.raises(ValueError, match="holds no results.json"):
        page.write(tmp_path / "docs")


# ---------------------------------------------------------------------------------------------------------------------
# The whole


def test_missing_inputs_are_named(tmp_path):
    verb = [sys.executable, ROOT / "scripts" / "gpu" / "evidence", "--inputs", tmp_path]
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    done = subprocess.run(verb, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "no tin_64_swasun.npz in it" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow(seconds=25)
@pytest.mark.timeout(1200)
def test_a_dry_run_leaves_a_table_and_is_not_repeated(tmp_path):
    """Every step as on a GPU, of a model of nothing."""
    (tmp_path / "inputs").mkdir()
    natural.write_inputs(tmp_path / "inputs")
    environment = {
        **os.environ,
        "TINY": "1",
        "PYTHON": sys.executable,
        "OUT": str(tmp_path / "out"),
        "WORK": str(tmp_path / "work"),
        "SECONDS_IN_ALL": "1100",
        "OMP_NUM_THREADS": "1",
    }

    def run() -> str:
        words = [ROOT / "scripts" / "gpu" / "evidence", "--inputs", tmp_path / "inputs"]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run()
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    wanted = ["shards", "timing", "base", "bits-base", "tuned", "bits-tuned", "control", "bits-control", "distances"]
    passed = {step["name"] for step in found["steps"] if step["status"] == "passed"}
    assert passed == set(wanted) and len(found["steps"]) == len(wanted)
    for model in ("base", "tuned", "control"):
        told = found["results"][f"bits-{model}"]
        assert list(told["bits"]) == ["16", "2", "1"]
        assert all(8 < bits < 10 for bits in told["bits"].values())  # untrained: log2 512
        run_folder = tmp_path / "work" / "runs" / {"base": "tin-base", "tuned": "tin", "control": "tin-control"}[model]
        saved = torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        assert told["parameters"] == sum(tensor.numel() for tensor in saved.values())
        assert told["steps"] == {"base": 6}.get(model, 5) and told["training"]["train/images_per_second"] > 0
    distances = found["results"]["distances"]
    assert [(row["run"], row["window"], row["passes"]) for row in distances["rows"]] == [
        (run, window, passes)
        for run in ("tin-base", "tin", "tin-control")
        for window, passes in ((16, 256), (2, 60), (1, 46))
    ]
    for row in [*distances["rows"], distances["real"]]:
        assert np.isfinite(row["fid"]["mean"]) and row["fid"]["mean"] > 0
    assert (tmp_path / "out" / "samples.png").read_bytes().startswith(b"\x89PNG")
    import page

    assert len([line for line in page.lines(found) if line.startswith("|")]) == 2 + 9 + 1
    assert run().count(" not needed ") == 2 * len(wanted)  # told when each is over, and in the end
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["results"] == found["results"]
