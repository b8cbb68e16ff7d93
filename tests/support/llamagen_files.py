"""LlamaGen's published layout at a small size: recipes, and random weights."""

import original

from zipar_train.recipe.load import load_recipe

SIZE = [
    "model.size=null",
    "model.num_layers=2",
    "model.num_heads=2",
    "model.hidden_size=24",
    "model.ffn_size=48",
    "model.codebook_size=11",
    "zipar.windows={3: 1}",
    "evaluate.windows=[3]",
    "model.tokenizer=null",
]


def c2i(*more, grid=4):
    return load_recipe("llamagen-b", [*SIZE, f"model.grid=[{grid},{grid}]", "model.num_classes=5", *more])


def t2i(*more):
    text = "model.t5_features={encoder: null, tokens: 5, features: 6}"
    return load_recipe("llamagen-xl-t2i", [*SIZE, "model.grid=[4,4]", text, *more])


def c2i_state(**kwargs):
    return original.random_gpt(depth=2, width=24, codes=11, grid=4, classes=5, **kwargs)


def t2i_state(**kwargs):
    return original.random_gpt(depth=2, width=24, codes=11, grid=4, features=6, prompt=5, **kwargs)
