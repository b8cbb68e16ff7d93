"""A small model of each family, and a batch for it; a small shape for the digits' recipes."""

import torch
from torch import nn

from zipar_train.data.batch import Batch
from zipar_train.models.family import build
from zipar_train.models.t5_features import Captions
from zipar_train.models.token_prompts import Prompts
from zipar_train.recipe.model import Model, Text, Words

# Overrides of the digits' recipes.
TINY = ["model.num_layers=1", "model.num_heads=2", "model.hidden_size=16", "model.ffn_size=32"]


def family(kind, depth, *, head=8, grid=(4, 4)):
    """A small model with two heads of width `head`."""
    torch.manual_seed(0)
    shape = {"num_layers": depth, "num_heads": 2, "hidden_size": 2 * head, "ffn_size": 3 * head, "codebook_size": 7}
    shape["grid"] = list(grid)
    words, text = Words(encoder="none", tokens=4, vocabulary=700), Text(encoder=None, tokens=4, features=6)
    found = build(
        {
            "llamagen": Model(family="llamagen", num_classes=3, **shape),
            "llamagen-t2i": Model(family="llamagen-t2i", t5_features=text, **shape),
            "lumina": Model(family="lumina", token_prompt=words, **shape),
            "emu3": Model(family="emu3", token_prompt=words, num_kv_heads=1, **shape),
            "simplear": Model(family="simplear", token_prompt=words, num_kv_heads=1, **shape),
            "janus": Model(family="janus", token_prompt=words, **shape),
            "glm-image": Model(family="glm-image", token_prompt=words, num_kv_heads=1, preview=[2, 3], **shape),
        }[kind]
    )
    for name, parameter in found.model.named_parameters():  # a Qwen2's biases, which begin at zero
        if name.endswith("_proj.bias"):
            nn.init.normal_(parameter)
    return found


def a_batch(kind, family):
    codes = torch.randint(7, (2, family.grid.num_codes))
    padding = torch.tensor([[True, True, False, False], [False] * 4])
    if kind == "llamagen":
        return Batch(codes, torch.tensor([0, 2]))
    if kind == "llamagen-t2i":
        return Batch(codes, Captions(torch.randn(2, 4, 6), padding))
    return Batch(codes, Prompts(torch.randint(10, 600, (2, 4)), padding))
