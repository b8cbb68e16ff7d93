"""`scripts/evidence/lookahead.py`, which makes the tables of docs/lookahead.md, with a small random model."""

import importlib
from pathlib import Path

import pytest
import torch

from zipar_train.decoding.generator import Generator
from zipar_train.models.family import build
from zipar_train.models.restore import LoadedWeights
from zipar_train.recipe.load import load_recipe

SCRIPTS = Path(__file__).parents[2] / "scripts" / "evidence"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("lookahead")
    small = ["model.num_layers=1", "model.num_heads=2", "model.hidden_size=16", "model.ffn_size=32"]
    recipe = load_recipe("digits-base", small)
    torch.manual_seed(0)
    state = {name: 20 * weights for name, weights in build(recipe.model).model.state_dict().items()}
    made = Generator(recipe, LoadedWeights(Path("random"), recipe, state, {}), device="cpu", dtype=torch.float64)
    monkeypatch.setattr(module, "load", lambda checkpoint: made)
    return module


def cells(out: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("| ")]


def test_passes_with_and_without(script, capsys):
    script.main(
        ["run", "--windows", "8,2", "--lookahead", "8,32", "--guidance", "1,2", "--images", "6", "--batch", "4"]
    )
    head, _, *rows = cells(capsys.readouterr().out)
    assert head == ["window", "guidance", "top-k", "passes", "lookahead 8", "lookahead 32", "equal images"]
    assert [row[:4] for row in rows] == [[w, g, "0", {"8": "64", "2": "28"}[w]] for g in "12" for w in ("8", "2")]
    for row in rows:
        assert row[-1] == "6 of 6"
        assert all(1 < float(cell.split(" ± ")[0]) < int(row[3]) for cell in row[4:6])


def test_drafts_change_the_passes_and_never_the_images(script, capsys):
    generator = script.load("run")
    sampling = script.SamplingParams(guidance=1.5)
    plain, _ = script.generated(generator, 2, sampling, images=6, batch=3)
    ahead, counts = sampling.model_copy(update={"lookahead": 8}), {}
    for rule in script.RULES:
        codes, passes = script.generated(generator, 2, ahead, images=6, batch=3, rule=rule)
        assert torch.equal(codes, plain), rule
        counts[rule] = passes.mean().item()
    assert len(set(counts.values())) > 3, counts
    assert counts["whole steps"] >= counts["noise above"]
    script.main(["run", "--drafts", "--windows", "2", "--lookahead", "8", "--guidance", "1.5", "--images", "6"])
    head, _, row = cells(capsys.readouterr().out)
    assert head == ["window", "lookahead", *script.RULES]
    assert row[2:] == [f"{counts[rule]:.1f}" for rule in script.RULES]
