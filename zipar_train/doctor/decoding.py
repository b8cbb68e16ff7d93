"""Check of the Triton kernels of generation, on a GPU: do they run, agree with PyTorch's operators, and save time."""

from collections.abc import Iterator

from zipar_train.doctor.attention import half
from zipar_train.doctor.checks import Check, CheckContext, CheckResult, note, ok
from zipar_train.doctor.devices import device

NAME = "Triton kernels"
LAYERS = ("model.size=null", "model.num_heads=16", "model.hidden_size=1024", "model.ffn_size=2816")  # LlamaGen-L's
REMEDY = "Generation uses PyTorch's operators instead, which are slower"


def triton_kernels(asked: CheckContext) -> Iterator[CheckResult]:
    """Check the kernels on two layers of LlamaGen-L with random weights."""
    place = device(asked)
    if place.type == "cpu":
        return
    from zipar_train.decoding.decode_method import faster_method
    from zipar_train.decoding.fused_llama import fuse_for_inference
    from zipar_train.models.family import build
    from zipar_train.recipe.load import load_recipe

    family = build(load_recipe("llamagen-l", [*LAYERS, "model.num_layers=2"]).model, dtype=half(place), device=place)
    family.model.eval().requires_grad_(False)
    fuse_for_inference(family.model)
    method = faster_method(family)
    yield ok(NAME, method.reason) if method.name == "fused" else note(NAME, method.reason, REMEDY)


CHECKS = (Check(NAME, triton_kernels, REMEDY),)
