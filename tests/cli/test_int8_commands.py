"""`generate` and `evaluate` with int8 weights, from the command line."""

import json

import pytest
import torch
from commands import TINY, sets

from zipar_train import load
from zipar_train.decoding.generator import Generator
from zipar_train.decoding.int8 import int8_layers
from zipar_train.evaluation.likelihood import bits_per_code
from zipar_train.models.family import build
from zipar_train.recipe.load import load_recipe


@pytest.fixture
def weights(tmp_path):
    """A file of random weights, large enough that rounding changes codes."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    state = build(load_recipe("digits-base", TINY).model).model.state_dict()
    path = tmp_path / "run" / "checkpoints" / "weights.safetensors"
    path.parent.mkdir(parents=True)
    save_file({name: 20 * tensor for name, tensor in state.items()}, path)
    return path


def test_generate(run, weights, tmp_path):
    overrides = [*TINY, f"model.weights={weights}"]
    for name, option in (("a.png", ["--int8"]), ("b.png", [])):
        status, _, err = run(
            *("generate", "--recipe", "digits-base", *sets(overrides), *option, "--labels", "3,5", "--out", name)
        )
        assert status == 0, err
        load("digits-base", overrides=overrides, int8=bool(option)).generate([3, 5]).save(tmp_path / f"python-{name}")
        assert (tmp_path / name).read_bytes() == (tmp_path / f"python-{name}").read_bytes()
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


@pytest.mark.slow
def test_evaluate_keeps_int8_apart(run, tiny, weights, tmp_path, kept_classifier, monkeypatch):
    """Its own folder, or its own sample sets in a shared one; its own bits; and the report says so."""
    calls, real = [], Generator.generate

    def generate(self, *given, **how):
        calls.append(bool(int8_layers(self.inference_family.model)))
        return real(self, *given, **how)

    monkeypatch.setattr(Generator, "generate", generate)
    settings = [*tiny, "evaluate.images=10"]
    command = ("evaluate", "--recipe", "digits-base", *sets(settings), "--windows", "2", "--checkpoint", weights)
    shared = tmp_path / "shared"
    kept_classifier(shared)
    kept_classifier(tmp_path / "run" / "evaluation-int8")
    reports = {}
    for name, options in (("float", ()), ("int8", ("--int8",)), ("again", ())):
        calls.clear()
        status, out, err = run(*command, *options, "--out", shared, "--json", tmp_path / f"{name}.json")
        assert status == 0, err
        assert {*calls} == {name == "int8"}
        assert ("rounded to int8" in out) is (name == "int8")
        reports[name] = json.loads((tmp_path / f"{name}.json").read_text())
    dtypes = {name: report["protocol"]["dtype"] for name, report in reports.items()}
    assert dtypes == {"float": "float32", "int8": "int8 weights, float32", "again": "float32"}
    assert sum("int8" in folder.name for folder in (shared / "samples").iterdir()) == 2
    assert len([*(shared / "samples").iterdir()]) == 4
    bits = {name: [row["bits"] for row in report["rows"]] for name, report in reports.items()}
    assert bits["float"] == bits["again"] != bits["int8"]
    from zipar_train.data.loader import ShardLoader

    recipe = load_recipe("digits-base", settings)
    generator = load("digits-base", overrides=[*settings, f"model.weights={weights}"], device="cpu", int8=True)
    loader = ShardLoader(recipe.data.val, batch_size=recipe.evaluate.batch_size)
    wanted = [bits_per_code(generator.inference_family, generator.plan(w), loader, images=1000) for w in (8, 2)]
    assert bits["int8"] == pytest.approx(wanted)
    status, _, err = run(*command, "--int8")
    assert status == 0, err
    assert (tmp_path / "run" / "evaluation-int8" / "report.json").is_file()
