"""Janus checkpoints in their authors' layout, MultiModalityCausalLM: conversion to transformers' layout and back.

Names and shapes: deepseek-ai/Janus, janus/models/modeling_vlm.py, projector.py, siglip_vit.py and vq_model.py. Their
namesakes: huggingface/transformers, src/transformers/models/janus/convert_janus_weights_to_hf.py.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import JanusConfig

from zipar_train.io.files import regular
from zipar_train.models.names import renamed, reversed_pairs
from zipar_train.models.tokenizers import vq16

VQ, TRANSFORMERS_VQ = "gen_vision_model.", "model.vqmodel."
TOWER, TRANSFORMERS_TOWER = "vision_model.vision_tower.", "model.vision_model."
NOT_FOR_IMAGES = ("vision_model.", "aligner.", VQ, "language_model.lm_head.")
UNUSED = (f"{TOWER}attn_pool.", f"{VQ}quantize.codebook_used")  # tensors that the authors' forward passes never read
BLOCK, LAYER = f"{TOWER}blocks.{{}}.", f"{TRANSFORMERS_TOWER}encoder.layers.{{}}."
NAMES = (  # the authors' names, transformers' names
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("gen_embed.", "model.generation_embeddings."),
    ("gen_aligner.layers.0.", "model.generation_aligner.fc1."),
    ("gen_aligner.layers.2.", "model.generation_aligner.hidden_layers.0."),
    ("gen_head.output_mlp_projector.", "model.generation_head.proj_out."),
    ("gen_head.vision_head.", "model.generation_head.vision_head."),
    ("aligner.layers.0.", "model.aligner.fc1."),
    ("aligner.layers.2.", "model.aligner.hidden_layers.0."),
    *((VQ + theirs, TRANSFORMERS_VQ + ours) for theirs, ours in vq16.NAMES),
    (VQ, TRANSFORMERS_VQ),
    (f"{TOWER}patch_embed.proj.", f"{TRANSFORMERS_TOWER}embeddings.patch_embedding."),
    (f"{TOWER}pos_embed", f"{TRANSFORMERS_TOWER}embeddings.position_embedding.weight"),
    (f"{TOWER}norm.", f"{TRANSFORMERS_TOWER}post_layernorm."),
    (f"{BLOCK}norm1.", f"{LAYER}layer_norm1."),
    (f"{BLOCK}norm2.", f"{LAYER}layer_norm2."),
    (f"{BLOCK}attn.proj.", f"{LAYER}self_attn.projection_layer."),
    (f"{BLOCK}attn.", f"{LAYER}self_attn."),
    (BLOCK, LAYER),
)
BACK = reversed_pairs(NAMES)
POSITIONS = f"{TRANSFORMERS_TOWER}embeddings.position_embedding.weight"  # (N, D); the authors' is (1, N, D)
HEADS = 16  # attention heads of every vision tower that siglip_vit.py knows
TOWER_SHAPE = {  # siglip_large_patch16_384 in siglip_vit.py, the tower of all published Janus and Janus-Pro
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": HEADS,
    "image_size": 384,
    "patch_size": 16,
    "mlp_ratio": 4,
    "depth": 2,
}
VQ_SHAPE = {  # VQ_16 in vq_model.py, which modeling_vlm.py builds without arguments
    "embed_dim": 8,
    "num_embeddings": 16384,
    "latent_channels": 256,
    "base_channels": 128,
    "channel_multiplier": (1, 1, 2, 2, 4),
    "num_res_blocks": 2,
}
TEXT = (  # keys of language_config that are also transformers'
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("max_position_embeddings", "rms_norm_eps", "vocab_size"),
)


def is_original(state: dict[str, Tensor]) -> bool:
    """Return True if tensors have the authors' names."""
    return any(name.startswith(("language_model.model.", "gen_embed.", "gen_head.")) for name in state)


def for_images(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that generate images, by transformers' names."""
    return {renamed(name, NAMES): tensor for name, tensor in state.items() if not name.startswith(NOT_FOR_IMAGES)}


def to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert all tensors to transformers' names and shapes, without those that nothing reads."""
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = renamed(name, NAMES)
        if name.startswith(UNUSED):
            continue
        if new.startswith(TRANSFORMERS_TOWER) and ".self_attn.qkv." in new and tensor.ndim:
            parts = zip("qkv", tensor.tensor_split(3), strict=True)
            converted |= {new.replace(".qkv.", f".{x}_proj."): part for x, part in parts}
        else:
            converted[new] = tensor.flatten(0, 1) if new == POSITIONS and tensor.ndim == 3 else tensor
    return converted


def from_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert tensors from transformers' names and shapes, the inverse of `to_transformers`.

    The tensors that nothing reads (`UNUSED`) are in no checkpoint of transformers, and so not in the result.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        attention = name.startswith(TRANSFORMERS_TOWER) and re.search(r"\.([qkv])_proj\.", name)
        if not attention:
            converted[renamed(name, BACK)] = tensor[None] if name == POSITIONS else tensor
        elif attention[1] == "q":
            parts = [state[name.replace(".q_proj.", f".{x}_proj.")] for x in "qkv"]
            converted[renamed(name.replace(".q_proj.", ".qkv."), BACK)] = torch.cat(parts)
    return converted


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's config.json.

    Raises:
        ValueError: If it is missing or damaged; names it.
    """
    path = folder / "config.json"
    try:
        content = json.loads(regular(path).read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it is not an object")
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}). Download it again") from error
    return content


def transformers_config(language: dict[str, Any], state: dict[str, Tensor], *, image_token: int) -> JanusConfig:
    """Return transformers' configuration of a checkpoint.

    Args:
        language: `language_config` of the checkpoint's config.json.
        state: All tensors by transformers' names; they give the sizes of the other parts.
        image_token: Id of the token that stands for an image in a prompt.

    Raises:
        KeyError: If a tensor is missing.
    """
    width, _, patch, _ = state[f"{TRANSFORMERS_TOWER}embeddings.patch_embedding.weight"].shape
    side = math.isqrt(len(state[POSITIONS]))  # patches
    depth = sum(name.startswith(TRANSFORMERS_TOWER) and name.endswith(".layer_norm1.weight") for name in state)
    vision = {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": HEADS,
        "image_size": side * patch,
        "patch_size": patch,
        "num_image_tokens": side**2,
        "mlp_ratio": len(state[f"{LAYER.format(0)}mlp.fc1.weight"]) / width,
        "projection_dim": len(state["model.aligner.fc1.weight"]),
    }
    tokenizer = {name.removeprefix(TRANSFORMERS_VQ): t for name, t in state.items() if name.startswith(TRANSFORMERS_VQ)}
    vq: Any = vq16.inferred_config(tokenizer)
    vq.projection_dim = len(state["model.generation_aligner.fc1.weight"])
    vq.image_token_embed_dim = state["model.generation_head.proj_out.weight"].shape[1]
    given = {key: value for key, value in language.items() if key not in ("torch_dtype", "dtype")}
    return JanusConfig(
        text_config={"tie_word_embeddings": False, **given, "model_type": "llama"},
        vision_config=vision,
        vq_config=vq.to_dict(),
        image_token_id=image_token,
        tie_word_embeddings=False,  # the authors' head for words is separate
    )


def original_config(config: JanusConfig, dtype: torch.dtype) -> dict[str, Any]:
    """Return the authors' config.json of a checkpoint, from transformers' configuration.

    Raises:
        ValueError: If the authors' code cannot build the vision tower or the image tokenizer; names the difference.
    """
    parts: tuple[Any, ...] = (config.vision_config, config.vq_config, config.text_config)
    vision, vq, text = parts
    kind = str(dtype).removeprefix("torch.")
    for part, name, shape in ((vision, "vision_config", TOWER_SHAPE), (vq, "vq_config", VQ_SHAPE)):
        for key, value in shape.items():
            found = getattr(part, key)
            if (tuple(found) if isinstance(found, list) else found) != value:
                raise ValueError(
                    f"{name}.{key} is {found}, and the code of deepseek-ai/Janus builds {value} only. "
                    "Export to transformers' layout: --to hf"
                )
    width = vq.projection_dim
    aligner = {"depth": 2, "n_embed": width, "projector_type": "mlp_gelu"}
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "torch_dtype": kind,
        "vision_config": {
            "cls": "CLIPVisionTower",
            "model_type": "vision",
            "params": {
                "image_size": vision.image_size,
                "model_name": "siglip_large_patch16_384",
                "select_feature": "same",
                "select_layer": -1,
            },
        },
        "aligner_config": {
            "cls": "MlpProjector",
            "model_type": "aligner",
            "params": {**aligner, "input_dim": vision.hidden_size},
        },
        "gen_vision_config": {
            "cls": "VQ-16",
            "model_type": "gen_vision",
            "params": {"image_token_size": vq.num_embeddings, "n_embed": vq.embed_dim},
        },
        "gen_aligner_config": {
            "cls": "MlpProjector",
            "model_type": "gen_aligner",
            "params": {**aligner, "input_dim": vq.embed_dim},
        },
        "gen_head_config": {
            "cls": "vision_head",
            "model_type": "gen_head",
            "params": {
                "image_token_embed": width,
                "image_token_size": vq.num_embeddings,
                "n_embed": vq.image_token_embed_dim,
            },
        },
        "language_config": {
            "model_type": "llama",
            "torch_dtype": kind,
            "rope_theta": text.rope_parameters["rope_theta"],
            **{key: getattr(text, key) for key in TEXT},
        },
    }
