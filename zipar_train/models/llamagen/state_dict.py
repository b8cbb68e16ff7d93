"""Lossless conversion of LlamaGen's published names and shapes to those of the transformers model, and back.

The published files (FoundationVision/LlamaGen, autoregressive/models/gpt.py) differ in three ways: q, k and v are one
matrix; the two values of a rotary pair are adjacent, not half a head apart; classes have a separate embedding table.
"""

import re

import torch
from torch import Tensor

NAMES = {  # published name: transformers name
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "layers.{}.attention.wo.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.{}.feed_forward.w1.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.{}.feed_forward.w3.weight": "model.layers.{}.mlp.up_proj.weight",
    "layers.{}.feed_forward.w2.weight": "model.layers.{}.mlp.down_proj.weight",
    "layers.{}.attention_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "cls_embedding.cap_proj.fc1.weight": "caption.fc1.weight",
    "cls_embedding.cap_proj.fc2.weight": "caption.fc2.weight",
    "cls_embedding.uncond_embedding": "caption.null",
}
QKV = "layers.{}.attention.wqkv.weight"
PROJECTIONS = [f"model.layers.{{}}.self_attn.{x}_proj.weight" for x in "qkv"]
CODES, CLASSES, EMBEDDING = "tok_embeddings.weight", "cls_embedding.embedding_table.weight", "model.embed_tokens.weight"
SIZES = {  # layers, heads, hidden size of the published models, from gpt.py
    "B": (12, 12, 768),
    "L": (24, 16, 1024),
    "XL": (36, 20, 1280),
    "XXL": (48, 24, 1536),
    "3B": (24, 32, 3200),
}


def is_published(state: dict[str, Tensor]) -> bool:
    """Return True if tensors have LlamaGen's published names."""
    return CODES in state or any(name.endswith("attention.wqkv.weight") for name in state)


def from_published(state: dict[str, Tensor], *, heads: int) -> dict[str, Tensor]:
    """Convert a complete published state dict to the transformers layout."""
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        general, layer = _general(name)
        if general == QKV:
            q, k, v = tensor.chunk(3)
            values = (_apart(q, heads), _apart(k, heads), v.clone())
            ours |= {place.format(layer): value for place, value in zip(PROJECTIONS, values, strict=True)}
        elif general in NAMES:
            ours[NAMES[general].format(layer)] = tensor
    ours[EMBEDDING] = torch.cat([state[CODES], state[CLASSES]]) if CLASSES in state else state[CODES]
    return ours


def to_published(state: dict[str, Tensor], *, heads: int, codes: int) -> dict[str, Tensor]:
    """Convert a state dict in the transformers layout to LlamaGen's published layout."""
    back = {ours: theirs for theirs, ours in NAMES.items()}
    theirs: dict[str, Tensor] = {CODES: state[EMBEDDING][:codes].clone()}
    if len(state[EMBEDDING]) > codes:
        theirs[CLASSES] = state[EMBEDDING][codes:].clone()
    for name, tensor in state.items():
        general, layer = _general(name)
        if general == PROJECTIONS[0]:
            q, k, v = (state[place.format(layer)] for place in PROJECTIONS)
            theirs[QKV.format(layer)] = torch.cat([_beside(q, heads), _beside(k, heads), v])
        elif general in back:
            theirs[back[general].format(layer)] = tensor
    return theirs


def looks_like(state: dict[str, Tensor]) -> str:
    """Describe the model that published tensors seem to belong to."""
    depth = len({_general(name)[1] for name in state} - {None})
    width = _rows(state, "norm.weight")
    size = next((name for name, (layers, _, wide) in SIZES.items() if (layers, wide) == (depth, width)), None)
    name = f"LlamaGen-{size}" if size else "no published size of LlamaGen"
    if CLASSES in state:
        kind = f"class-conditional with {_rows(state, CLASSES) - 1} classes"
    else:
        kind = "text-conditional" if "cls_embedding.uncond_embedding" in state else "of unknown condition"
    return f"{name} ({depth} layers of width {width}), {kind}, {_rows(state, CODES)} codes"


def _rows(state: dict[str, Tensor], name: str) -> int:
    """Return the number of rows of a tensor; 0 if it is missing or a scalar."""
    return (*state[name].shape, 0)[0] if name in state else 0


def _general(name: str) -> tuple[str, int | None]:
    """Return a name with `{}` in place of the layer number, and the number or None."""
    match = re.match(r"((?:model\.)?layers\.)(\d+)(\..*)", name)
    return (f"{match[1]}{{}}{match[3]}", int(match[2])) if match else (name, None)


def _apart(rows: Tensor, heads: int) -> Tensor:
    """Reorder rows of q or k from adjacent rotary pairs to pairs half a head apart."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _beside(rows: Tensor, heads: int) -> Tensor:
    """Reorder rows of q or k from rotary pairs half a head apart to adjacent pairs, the inverse of `_apart`."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()
