"""Loading of models for inference: with fused layers, and on request with int8 weights."""

import torch

from zipar_train.decoding.fused_llama import fuse_for_inference, fuse_in_int8, pack_head
from zipar_train.models.family import Family
from zipar_train.models.filling import find_frequencies
from zipar_train.models.restore import LoadedWeights, load_family
from zipar_train.recipe.model import Model


def load_fused(
    model: Model, saved: LoadedWeights, *, dtype: torch.dtype, device: torch.device | str, int8: bool = False
) -> Family:
    """Build a family with saved weights, fused for inference if its layers allow.

    Int8 weights are rounded on the CPU, from the numbers in the file, and then moved. A GPU therefore never holds a
    float copy of a rounded weight. The CPU's memory holds a float copy of one product's weight at a time, since the
    file is mapped. Exceptions, which are copied whole: files that cannot be mapped, weights with merged adapters, and
    the queries, keys and values of LlamaGen's published files.

    Args:
        dtype: Type of the weights and of the computation.
        int8: Round the weights of the layers to int8.

    Raises:
        ValueError: As in `load_family` and `fuse_in_int8`.
    """
    if not int8:
        family = load_family(model, saved, dtype=dtype, device=device)
        fuse_for_inference(family.model)
        return family
    family = load_family(model, saved, dtype=None)
    fuse_in_int8(family.model)
    family.model.to(dtype=dtype, device=device)  # type: ignore[call-arg]
    find_frequencies(family.model, device=device)
    pack_head(family.model)
    return family
