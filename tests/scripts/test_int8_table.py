"""`scripts/evidence/int8.py`, which makes a table of docs/performance.md, with a small random model."""

import importlib
from pathlib import Path

import pytest
import torch

from zipar_train.data.loader import ShardLoader
from zipar_train.decoding.generator import Generator
from zipar_train.decoding.int8 import Int8Linear
from zipar_train.evaluation.likelihood import bits_per_code
from zipar_train.models.family import build
from zipar_train.models.restore import LoadedWeights

SCRIPTS = Path(__file__).parents[2] / "scripts" / "evidence"


@pytest.mark.slow
def test_bits_and_equal_codes(tiny_recipe, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("int8")
    torch.manual_seed(0)
    state = {name: 20 * weights for name, weights in build(tiny_recipe.model).model.state_dict().items()}
    weights = LoadedWeights(Path("random"), tiny_recipe, state, {})
    monkeypatch.setattr(script, "load", lambda _, int8=False: Generator(tiny_recipe, weights, device="cpu", int8=int8))
    forward = Int8Linear.forward
    script.main(["run", "--windows", "8,2", "--images", "12", "--batch", "5"])
    assert Int8Linear.forward is forward
    _, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()
    ]
    ways = ["float32", "int8", "exact inputs", "exact inputs, head"]
    assert [row[:2] for row in rows] == [[window, way] for window in ("8", "2") for way in ways]
    for window, way, bits, change, one, whole in rows:
        if way == "float32":
            assert (change, one, whole) == ("+0.000%", "100.00%", "100.00%")
        else:
            assert 0.5 < float(one.strip("%")) / 100 < 1 and change != "+0.000%"
        if way in ("float32", "int8"):
            generator = Generator(tiny_recipe, weights, device="cpu", int8=way == "int8")
            loader = ShardLoader(tiny_recipe.data.val, batch_size=5)
            wanted = bits_per_code(generator.inference_family, generator.plan(int(window)), loader, images=12)
            assert bits == f"{wanted:.4f}"
    assert len({row[2] for row in rows}) > 4
