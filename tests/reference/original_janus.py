"""Janus as its authors wrote it: tensors by their names, and images drawn one prompt at a time.

Written from deepseek-ai/Janus (janus/models/modeling_vlm.py, projector.py, siglip_vit.py, vq_model.py,
generation_inference.py) and from nothing of ours; the body is transformers' plain Llama.
"""

import original
import torch
from torch.nn.functional import conv2d, embedding, gelu, layer_norm, linear
from transformers import LlamaConfig, LlamaForCausalLM


def config(*, width, ffn, layers, heads, vocabulary=102400, tower=1024, codes=16384, positions=16384, side=384):
    """A config.json, by default with the numbers of Janus-Pro's."""
    projector = {"depth": 2, "n_embed": width, "projector_type": "mlp_gelu"}
    aligner, gen_aligner = projector | {"input_dim": tower}, projector | {"input_dim": 8}
    return {
        "model_type": "multi_modality",
        "architectures": ["MultiModalityCausalLM"],
        "torch_dtype": "bfloat16",
        "aligner_config": {"cls": "MlpProjector", "model_type": "aligner", "params": aligner},
        "gen_aligner_config": {
            "cls": "MlpProjector",
            "model_type": "gen_aligner",
            "params": gen_aligner,
        },
        "gen_head_config": {
            "cls": "vision_head",
            "model_type": "gen_head",
            "params": {"image_token_embed": width, "image_token_size": codes, "n_embed": width},
        },
        "gen_vision_config": {
            "cls": "VQ-16",
            "model_type": "gen_vision",
            "params": {"image_token_size": codes, "n_embed": 8},
        },
        "language_config": {
            "hidden_size": width,
            "intermediate_size": ffn,
            "max_position_embeddings": positions,
            "model_type": "llama",
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": heads,
            "torch_dtype": "bfloat16",
            "vocab_size": vocabulary,
        },
        "vision_config": {
            "cls": "CLIPVisionTower",
            "model_type": "vision",
            "params": {
                "image_size": side,
                "model_name": "siglip_large_patch16_384",
                "select_feature": "same",
                "select_layer": -1,
            },
        },
    }


def shapes(config, *, blocks=24, patch=16):
    """Shapes of all tensors but the image tokenizer's, by name.

    blocks, patch: of the vision tower, whose name in the configuration stands for them.
    """
    text = config["language_config"]
    width, ffn = text["hidden_size"], text["intermediate_size"]
    tower, side = config["aligner_config"]["params"]["input_dim"], config["vision_config"]["params"]["image_size"]
    codes, embed = (config["gen_vision_config"]["params"][key] for key in ("image_token_size", "n_embed"))
    found = {
        "language_model.model.embed_tokens.weight": [text["vocab_size"], width],
        "language_model.model.norm.weight": [width],
        "language_model.lm_head.weight": [text["vocab_size"], width],
        "gen_embed.weight": [codes, embed],
        "vision_model.vision_tower.pos_embed": [1, (side // patch) ** 2, tower],
        "vision_model.vision_tower.attn_pool.latent": [1, 1, tower],
        "gen_vision_model.quantize.codebook_used": [65536],
    }

    def layer(name, out, *into):
        found[f"{name}.weight"], found[f"{name}.bias"] = [out, *into], [out]

    for i in range(text["num_hidden_layers"]):
        name = f"language_model.model.layers.{i}."
        found |= {f"{name}self_attn.{x}_proj.weight": [width, width] for x in "qkvo"}
        found |= {f"{name}mlp.{x}_proj.weight": [ffn, width] for x in ("gate", "up")}
        found[f"{name}mlp.down_proj.weight"] = [width, ffn]
        found |= {f"{name}{x}_layernorm.weight": [width] for x in ("input", "post_attention")}
    layer("gen_aligner.layers.0", width, embed)
    layer("gen_aligner.layers.2", width, width)
    layer("gen_head.output_mlp_projector", width, width)
    layer("gen_head.vision_head", codes, width)
    layer("aligner.layers.0", width, tower)
    layer("aligner.layers.2", width, width)
    layer("vision_model.vision_tower.patch_embed.proj", tower, 3, patch, patch)
    layer("vision_model.vision_tower.norm", tower)
    layer("vision_model.vision_tower.attn_pool.q", tower, tower)
    layer("vision_model.vision_tower.attn_pool.kv", 2 * tower, tower)
    for name in ("attn_pool", *(f"blocks.{i}" for i in range(blocks))):
        name = f"vision_model.vision_tower.{name}."
        layer(f"{name}mlp.fc1", 4 * tower, tower)
        layer(f"{name}mlp.fc2", tower, 4 * tower)
        if "attn_pool" in name:
            layer(f"{name}proj", tower, tower)
            layer(f"{name}norm", tower)
            continue
        layer(f"{name}norm1", tower)
        layer(f"{name}norm2", tower)
        layer(f"{name}attn.qkv", 3 * tower, tower)
        layer(f"{name}attn.proj", tower, tower)
    return found


def random_checkpoint(config, *, blocks, patch, vq, seed=0):
    """Tensors by name, large enough that every context matters; vq: the shape of the image tokenizer."""
    g = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(config, blocks=blocks, patch=patch).items():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        state[name] = mean + 0.3 * torch.randn(shape, generator=g)
    return state | {
        f"gen_vision_model.{name}": tensor for name, tensor in original.random_vq(**vq, seed=seed)[0].items()
    }


def draw(state, config, prompt, *, pad, scale, images=1, codes=9):
    """Codes (images, codes) of one prompt, greedily: `generate` in generation_inference.py."""
    body = LlamaForCausalLM(LlamaConfig(**config["language_config"]))
    name = "language_model."
    body.load_state_dict({n.removeprefix(name): t for n, t in state.items() if n.startswith(name)})
    body = body.to(state["gen_embed.weight"].dtype).eval()
    tokens = torch.tensor([prompt] * (2 * images))
    tokens[1::2, 1:-1] = pad
    inputs, past, drawn = body.get_input_embeddings()(tokens), None, []
    with torch.no_grad():
        for _ in range(codes):
            found = body.model(inputs_embeds=inputs, use_cache=True, past_key_values=past)
            past = found.past_key_values
            hidden = gelu(layer(state, "gen_head.output_mlp_projector", found.last_hidden_state[:, -1]))
            logits = layer(state, "gen_head.vision_head", hidden)
            conditional, unconditional = logits[0::2], logits[1::2]
            code = (unconditional + scale * (conditional - unconditional)).argmax(-1)
            drawn.append(code)
            hidden = layer(
                state, "gen_aligner.layers.0", embedding(code.repeat_interleave(2), state["gen_embed.weight"])
            )
            inputs = layer(state, "gen_aligner.layers.2", gelu(hidden))[:, None]
    return torch.stack(drawn, dim=1)


def see(state, images, *, patch, heads=16):
    """What the body reads of images (B, 3, H, W): the aligner's output (B, N, D), after the vision tower's."""
    tower = "vision_model.vision_tower."
    weight, bias = (state[f"{tower}patch_embed.proj.{part}"] for part in ("weight", "bias"))
    x = conv2d(images, weight, bias, stride=patch).flatten(2).transpose(1, 2) + state[f"{tower}pos_embed"]
    for i in range(sum(name.endswith("attn.qkv.weight") for name in state)):
        block = f"{tower}blocks.{i}."
        qkv = layer(state, f"{block}attn.qkv", norm(state, f"{block}norm1", x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv)
        mixed = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + layer(state, f"{block}attn.proj", mixed.transpose(1, 2).flatten(2))
        x = x + layer(state, f"{block}mlp.fc2", gelu(layer(state, f"{block}mlp.fc1", norm(state, f"{block}norm2", x))))
    x = norm(state, f"{tower}norm", x)
    return layer(state, "aligner.layers.2", gelu(layer(state, "aligner.layers.0", x)))


def norm(state, name, x):
    return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)


def layer(state, name, x):
    return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])
