"""The suite itself: tests see neither the folder nor the settings of who runs them, and leave nothing there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import TINY

from zipar_train.recipe.load import load_recipe
from zipar_train.training.fit import fit

TESTS = Path(__file__).parent
SUPPORT = TESTS / "support"
HOSTILE = {
    "ZIPAR_DATA": "/nonexistent",
    "ZIPAR_RUNS": "/nonexistent",
    "ZIPAR_TRACEBACK": "1",
    "HOME": "/nonexistent",
    "WANDB_MODE": "online",
    "WANDB_API_KEY": "of-someone",
    "WANDB_DIR": "/nonexistent",
    "WANDB_SWEEP_ID": "s9",
    "WANDB_RUN_ID": "r9",
    "HF_HUB_OFFLINE": "0",
    "HF_HOME": "/nonexistent",
    "TRANSFORMERS_CACHE": "/nonexistent",
    "TORCH_HOME": "/nonexistent",
    "XDG_CACHE_HOME": "/nonexistent",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "10.255.255.1",
    "MASTER_PORT": "1",
    "TORCHELASTIC_RUN_ID": "none",
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "7",
    "MKL_NUM_THREADS": "7",
    "OMP_PROC_BIND": "true",
    "COLUMNS": "20",
    "FORCE_COLOR": "1",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "http_proxy": "http://127.0.0.1:9",
    "GIT_DIR": "/nonexistent",
    "MPLBACKEND": "tkagg",
    "PYTHONWARNINGS": "error::DeprecationWarning",
    "CUBLAS_WORKSPACE_CONFIG": ":0:0",
}
CHOSEN = [
    "cli/test_cli.py::test_plan_prints_the_papers_counts_and_draws",
    "doctor/test_doctor_recipes.py::test_files_that_are_missing_or_still_on_the_hub",
    "doctor/test_doctor_recipes.py::test_a_run_folder_is_new_or_holds_a_run_or_anothers",
    "doctor/test_doctor_wandb.py::test_modes_are_those_of_fit",
    "recipe/test_fuzz.py::test_what_is_accepted_and_small_can_be_made",
    "recipe/test_recipe.py::test_overrides_environment_and_paths",
    "training/test_tracking.py::test_other_processes_start_nothing_and_neither_does_a_disabled_one",
    "training/test_tracking.py::test_an_empty_mode_is_none",
]


def hostile() -> dict[str, str]:
    """The variables of HOSTILE over those of this process, without what pytest has said to its worker."""
    return {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_")} | HOSTILE


def test_variables_of_a_person_are_gone_before_anything_is_imported(tmp_path):
    code = "import sys, json, os, isolated; print(json.dumps([dict(os.environ), 'torch' in sys.modules]))"
    relative = {"PYTHONPATH": os.path.relpath(SUPPORT, tmp_path)}
    verb = [sys.executable, "-c", code]
    done = subprocess.run(verb, cwd=tmp_path, env=hostile() | relative, text=True, stdout=subprocess.PIPE)
    found, imported = json.loads(done.stdout)
    left = {name for name in HOSTILE if name in found}
    assert left == {"HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"} and not imported
    assert (found["HF_HUB_OFFLINE"], found["OMP_NUM_THREADS"], found["PYTHONPATH"]) == ("1", "1", str(SUPPORT))
    assert Path(found["HOME"]).name.startswith("zipar-tests-home-") and not Path(found["HOME"]).exists()


def test_a_test_starts_clean_whatever_the_one_before_has_left(tmp_path):
    assert Path.cwd() == tmp_path and not os.listdir()
    assert "ZIPAR_DATA" not in os.environ and "RANK" not in os.environ and os.environ["HF_HUB_OFFLINE"] == "1"
    os.environ["WANDB_MODE"] = "online"  # which the fixture removes


@pytest.mark.slow(seconds=25)
def test_the_suite_passes_in_a_used_clone_with_hostile_settings(shards, tmp_path):
    """In a folder with the shards and the run that scripts/quickstart leaves, and with files that mislead."""
    clone = tmp_path / "clone"
    shutil.copytree(shards, clone / "data" / "digits")
    few = ["trainer.max_epochs=1", "trainer.limit_train_batches=3", f"run_dir={clone}/runs/digits-base"]
    data = [f"data.{split}={shards}/{split}.json" for split in ("train", "val")]
    fit(load_recipe("digits-base", [*TINY, *data, *few]))
    shutil.copytree(clone / "runs" / "digits-base", clone / "runs" / "digits")
    (clone / "wandb").mkdir()
    (clone / "wandb" / "settings").write_text("[default]\nmode = online\nentity = somebody\n")
    (clone / "digits").write_text("no recipe")
    before = sorted(clone.rglob("*"))
    verb = [sys.executable, "-m", "pytest", "-n1", "-p", "no:cacheprovider", *(f"{TESTS}/{name}" for name in CHOSEN)]
    done = subprocess.run(verb, cwd=clone, env=hostile(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout and " passed" in done.stdout
    assert sorted(clone.rglob("*")) == before
