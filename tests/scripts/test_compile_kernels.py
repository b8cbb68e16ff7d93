"""scripts/gpu/compile_kernels.py: how many kernels a pass takes, and what they need of a GPU that is not here."""

import json

import pytest
from gpu_scripts import script

MODELS = ("llamagen-l", "llamagen-xl", "lumina-mgpt-7b-768", "emu3-gen")


@pytest.mark.slow(20)
def test_a_pass_is_few_kernels(tmp_path):
    """At full size, with the recipes' guidance and filters: at most 6 per layer and 12 outside of the layers."""
    found = tmp_path / "kernels.json"
    made = script("compile_kernels.py", "--count", "--json", found, TRITON_INTERPRET="0")
    assert made.returncode == 0, made.stderr
    passes = json.loads(found.read_text())["passes"]
    assert {each["model"] for each in passes} == set(MODELS)
    for each in passes:
        assert sum(each["per_layer"].values()) <= 6, each
        assert len(each["outside"]) <= 12, each


@pytest.mark.slow(60)
@pytest.mark.parametrize("model", ["llamagen-l", "emu3-gen"])
def test_kernels_compile_without_a_gpu_and_without_spills(tmp_path, model):
    found = tmp_path / "kernels.json"
    made = script(
        "compile_kernels.py", "--models", model, "--rows", "32", "--json", found,
        TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path / "cache"),
    )  # fmt: skip
    assert made.returncode == 0, made.stdout + made.stderr
    kernels = json.loads(found.read_text())["kernels"]
    assert {row["target"] for row in kernels} == {80, 90}
    assert {row["kernel"] for row in kernels} >= {
        "feed",
        "qkv",
        "attend",
        "add_product",
        "gate_up",
        "choose",
        "advance",
    }
    assert all(row["spills"] == 0 for row in kernels)
