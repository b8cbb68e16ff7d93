"""The doctor on recipes: run folders, files that are missing, memory, what a recipe needs; problems come last."""

from pathlib import Path

import pytest
import torch
from doctor_rows import told

from zipar_train.doctor import attention, recipes, sources
from zipar_train.doctor.checks import CheckContext, guarded, note, ok, problem
from zipar_train.doctor.examine import needs
from zipar_train.doctor.report import DoctorReport
from zipar_train.recipe.load import load_recipe
from zipar_train.training.fit import fit


def test_a_recipe_that_cannot_be_read_is_a_problem_among_others(fresh_cli, tmp_path):
    done = fresh_cli(
        "doctor", "--checks", "recipes", "--recipe", "digits", "--set", "zipar.windws=1", "--json", "doctor.json"
    )
    rows = told(tmp_path / "doctor.json")
    assert done.returncode == 1 and "zipar.windws = 1: unknown key" in rows["read"]["seen"]
    assert rows["shipped"]["status"] == "ok" and "zipar.windws" in done.stdout


def test_a_run_folder_is_new_or_holds_a_run_or_anothers(tiny):
    short = [*tiny, "trainer.max_epochs=1", "trainer.limit_train_batches=3"]
    recipe = load_recipe("digits-base", short)
    assert next(recipes.run_folder(CheckContext(recipe=recipe))).status == "ok"
    fit(recipe)
    (row,) = recipes.run_folder(CheckContext(recipe=recipe))
    assert row.status == "note" and "at step 3" in row.seen and "--resume" in row.remedy
    (row,) = recipes.run_folder(CheckContext(recipe=load_recipe("digits-base", [*short, "seed=5"])))
    assert row.status == "problem" and "made by another recipe: seed: 0 -> 5" in row.seen
    checkpoint = Path(recipe.run_dir, "checkpoints", "last.ckpt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    asked = CheckContext(recipe=load_recipe("digits", [*short, f"model.weights={recipe.run_dir}"]))
    (row,) = sources.weights(asked)
    assert row.status == "problem" and "last.ckpt is cut short" in row.seen
    (row,) = guarded(recipes.CHECKS[0], asked)
    assert row.status == "problem" and "last.ckpt" in row.seen


def test_files_that_are_missing_or_still_on_the_hub(tiny, monkeypatch, tmp_path):
    def rows(check, name, *overrides):
        return {row.name: row for row in check(CheckContext(recipe=load_recipe(name, overrides)))}

    lost = rows(sources.shards, "digits", f"data.train={tmp_path}/none.json", f"data.val={tmp_path}/no.json")
    assert list(lost) == ["data.train, data.val"] and "zipar-train tokenize" in lost["data.train, data.val"].remedy
    other = rows(sources.shards, "digits", *[o for o in tiny if o.startswith("data.")], "model.num_classes=9")
    assert other["data.train"].status == "problem" and "number of classes 10" in other["data.train"].seen

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub = rows(sources.weights, "lumina-mgpt-7b-768")
    assert hub["model.weights"].status == hub["model.token_prompt.encoder"].status == "note"
    assert "hf download Alpha-VLLM/Lumina-mGPT-7B-768" in hub["model.weights"].remedy
    assert hub["model.tokenizer_weights"].status == "problem"
    hub = rows(sources.weights, "glm-image")
    assert "hf download zai-org/GLM-Image --include 'processor/*'" in hub["model.token_prompt.encoder"].remedy
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, name: f"{tmp_path}/{name}")
    (tmp_path / "processor").mkdir()
    (tmp_path / "processor" / "config.json").write_text("{}")
    hub = rows(sources.weights, "glm-image")
    assert hub["model.token_prompt.encoder"].seen.startswith(f"{tmp_path}/processor, ")
    monkeypatch.undo()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert rows(sources.weights, "lumina-mgpt-7b-768")["model.weights"].status == "problem"
    assert rows(sources.scoring, "llamagen-l")["evaluate.reference"].status == "note"
    assert rows(sources.weights, "digits")["model.weights"].seen.endswith("is not there")  # no repository `runs/...`


@pytest.mark.slow
def test_what_does_not_fit_says_what_would(tmp_path):
    asked = CheckContext(
        recipe=load_recipe("digits", [f"run_dir={tmp_path}", "trainer.accelerator=gpu", "data.micro_batch_size=9999"])
    )
    (row,) = recipes.trainer(asked)
    if not torch.cuda.is_available():
        assert row.status == "problem" and "gpu" in row.seen and "accelerator=auto" in row.remedy
    rows = {row.name: row for row in recipes.memory(asked)}
    assert (
        rows["memory, training"].status == "problem"
        and "--set data.micro_batch_size=" in rows["memory, training"].remedy
    )
    assert rows["checkpoint"].status == "ok"


def test_what_a_recipe_needs_of_the_trials():
    trials = [
        row.model_copy(update={"section": "attention"})
        for row in (
            ok(attention.SDPA["bfloat16"], "fine"),
            ok(attention.FORWARD, "fine"),
            note(attention.BACKWARD, "none here", "sdpa"),
            note(attention.COMPILE, "no compiler", "g++"),
        )
    ]

    def statuses(name):
        found = needs(CheckContext(recipe=load_recipe(name)), rows=trials)
        return {row.name: row.status for row in found}

    assert statuses("llamagen-l") == {"tune.attention = sdpa": "ok", "tune.compile = true": "problem"}
    assert statuses("emu3-gen")["tune.attention = flex_attention"] == "problem"
    assert statuses("digits") == {}  # sdpa in float32 was not among them, and it does not compile


def test_problems_are_told_last_and_stand_out():
    rows = [problem("b", "broken\n  in two ways", "mend b"), ok("a", "fine"), note("c", "so so", "leave it")]
    lines = DoctorReport(revision="none", date="2026-01-01", seconds=1, recipe=None, rows=rows).lines(80)
    assert lines[2:] == [
        "Fine",
        "  a  fine",
        "",
        "Notes",
        "  c  so so",
        "     -> leave it",
        "",
        "PROBLEMS",
        "  b  broken",
        "       in two ways",
        "     -> mend b",
        "",
        "1 fine, 1 note, 1 problem, in 1 s.",
    ]
