"""Exports: the same logits through zipar-train, through transformers, and through transformers alone."""

import subprocess
import sys

import pytest
import torch
from commands import TINY

from zipar_train import load
from zipar_train.export.weights import export
from zipar_train.models.restore import read
from zipar_train.recipe.load import load_recipe
from zipar_train.training.fit import fit

ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids, logits = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    assert torch.equal(model(ids).logits, logits), (model(ids).logits - logits).abs().max()
assert "zipar_train" not in sys.modules
"""


@pytest.mark.slow
def test_an_export_is_the_checkpoint(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    data = [f"data.train={shards}/train.json", f"data.val={shards}/val.json", f"run_dir={tmp_path}/run"]
    fit(load_recipe("digits-base", [*TINY, *data, "trainer.max_epochs=1"]))
    out = export(tmp_path / "run", tmp_path / "exported")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exported", "run"]
    saved, back = read(tmp_path / "run"), read(out)
    assert saved.recipe == back.recipe
    assert all(torch.equal(saved.state[k], back.state[k]) for k in saved.state)

    model = load(tmp_path / "run", device="cpu").load_family().model
    ids = torch.cat([torch.tensor([[17 + 3]]), torch.randint(17, (1, 30))], dim=1)
    with torch.no_grad():
        torch.save((ids, model(ids).logits), tmp_path / "logits.pt")
    done = subprocess.run(
        [sys.executable, "-c", ALONE, out, tmp_path / "logits.pt"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    card = (out / "README.md").read_text()
    assert "windows: 8 (weight 1)" in card
    assert "name: digits-base" in card


@pytest.mark.slow
def test_an_export_of_an_export_is_the_same(shards, tmp_path):
    data = [f"data.train={shards}/train.json", f"data.val={shards}/val.json", f"run_dir={tmp_path}/run"]
    fit(load_recipe("digits-base", [*TINY, *data, "trainer.max_epochs=1"]))
    first = export(tmp_path / "run" / "checkpoints" / "last.ckpt", tmp_path / "one")
    second = export(first, tmp_path / "two")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
