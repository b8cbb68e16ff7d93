"""The choice between the Triton kernels and PyTorch's operators, in Triton's interpreter."""

import os

import pytest
import torch
from families import llamagen

from zipar_train.decoding import decode_method as chosen
from zipar_train.decoding.fused_llama import fuse_for_inference

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is for machines without a GPU"
)


@pytest.fixture
def family(monkeypatch):
    from zipar_train.decoding.kernels import selection

    monkeypatch.setattr(selection, "ROUNDS", 1)
    monkeypatch.setattr(selection, "PASSES", 1)
    made = llamagen(4, 5, head=32, dtype=torch.float32)
    fuse_for_inference(made.model, least=10**9)
    return made


def test_correct_kernels_differ_by_rounding(family):
    from zipar_train.decoding.kernels.selection import compare, rounding

    found = compare(family)
    assert 0 < found.difference <= found.bound == rounding(family) < 1e-5
    assert found.plain_ms > 0 and found.fused_ms > 0
    assert not found.fused  # an interpreter is not faster
    assert found._replace(fused_ms=found.plain_ms / 2).fused
    assert not found._replace(fused_ms=found.plain_ms / 2, difference=found.bound * 1.01).fused


@pytest.mark.parametrize("broken", ["rotation", "mask", "not a number"])
def test_wrong_kernels_are_found(family, monkeypatch, broken):
    from zipar_train.decoding.kernels import selection

    class Wrong(selection.FusedDecoder):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if broken == "rotation":
                self.sin = -self.sin
            elif broken == "not a number":
                self.cos = self.cos * float("nan")

        def run_pass(self, shape, sampling, *, keep=False):
            if broken == "mask":
                self.visible[:, 1] = shape.prompt  # after the prompt's pass, the first code is not seen
            return super().run_pass(shape, sampling, keep=keep)

    monkeypatch.setattr(selection, "FusedDecoder", Wrong)
    found = selection.compare(family)
    assert not found.difference <= 100 * found.bound and not found._replace(fused_ms=0).fused


def test_a_choice_says_why(family, monkeypatch):
    from zipar_train.decoding.kernels import selection

    monkeypatch.delenv("ZIPAR_DECODE", raising=False)
    assert chosen.decode_method(family) == ("plain", "the Triton kernels need a CUDA GPU")
    assert chosen.decode_method(family, compile=True).name == "compiled"
    good = selection.Comparison(difference=0.001, bound=0.1, plain_ms=2.0, fused_ms=0.7)
    monkeypatch.setattr(selection, "compare", lambda family: good)
    assert chosen.faster_method(family) == (
        "fused",
        "Triton kernels: 0.70 ms per pass, PyTorch's operators 2.00 ms; "
        "logits differ by 0.1 %, at most 10 % is rounding",
    )
    monkeypatch.setattr(selection, "compare", lambda family: good._replace(plain_ms=0.5))
    assert chosen.faster_method(family).name == "plain"

    def fail(family):
        raise torch.cuda.OutOfMemoryError("out of memory\nmore")

    monkeypatch.setattr(selection, "compare", fail)
    assert chosen.faster_method(family) == ("plain", "the Triton kernels cannot be used: out of memory")
