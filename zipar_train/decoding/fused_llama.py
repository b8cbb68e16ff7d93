"""Inference layers for transformers' Llama, Qwen2, Chameleon and GLM-Image: the same results, a third of the operators.

Queries, keys and values are one matrix product; gate and up of the feed-forward are another. Norms are single
operators. The weights must be frozen, with adapters merged.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm, scaled_dot_product_attention, silu
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.chameleon.modeling_chameleon import ChameleonModel
from transformers.models.glm_image.modeling_glm_image import GlmImageTextModel
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

from zipar_train.decoding.int8 import Int8Linear
from zipar_train.decoding.onednn import MIN_PACKED_ELEMENTS, packed
from zipar_train.models.compiled import compile_layers

BODIES = (LlamaModel, Qwen2Model, ChameleonModel, GlmImageTextModel)  # that `fuse_for_inference` replaces


class FusedLayer(nn.Module):
    """Fused replacement of a decoder layer of a body in `BODIES`, (R, K, D) to (R, K, D).

    Args:
        layer: The layer.
        heads: Number of heads of queries.
        product: Makes the linear layer of a weight (N, D).
    """

    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor

    def __init__(self, layer: Any, *, heads: int, product: Callable[[Tensor], nn.Module]):
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.head, self.scale = attention.head_dim, attention.scaling
        self.heads, self.groups = heads, attention.num_key_value_groups
        for name in ("weight", "bias"):  # Chameleon's norms of queries and keys, per head
            both = [getattr(attention, f"{part}_norm", None) for part in "qk"]
            joined = torch.cat([getattr(part, name).detach() for part in both]) if both[0] is not None else None
            self.register_buffer(f"norm_{name}", joined, persistent=False)
        self.before, self.between = layer.input_layernorm, layer.post_attention_layernorm
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.qkv = product(torch.cat([projection.weight for projection in projections]))
        biases = [projection.bias.detach() for projection in projections if projection.bias is not None]
        self.register_buffer("bias", torch.cat(biases) if biases else None, persistent=False)  # Qwen2's, GLM-Image's
        self.out = product(attention.o_proj.weight)
        gate_up = [mlp.gate_up_proj] if hasattr(mlp, "gate_up_proj") else [mlp.gate_proj, mlp.up_proj]
        self.gate_up = product(torch.cat([projection.weight for projection in gate_up]))
        self.down = product(mlp.down_proj.weight)
        self.after_attention = getattr(layer, "post_self_attn_layernorm", None)  # GLM-Image's norms before residuals
        self.after_mlp = getattr(layer, "post_mlp_layernorm", None)

    @property
    def norms(self) -> tuple[Tensor, Tensor] | None:
        """Return weight and bias of Chameleon's norms of queries and keys; None: a layer without them."""
        return None if self.norm_weight is None else (self.norm_weight, self.norm_bias)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, kept: CacheLayerMixin | None) -> Tensor:
        """Apply the layer.

        Args:
            hidden: Hidden states, (R, K, D).
            cos, sin: Rotary embeddings, (1 or R, K, 1, rotated width); the first half of `sin` is negated. Only this
                first part of a head is rotated.
            mask: Additive mask, (1 or R, 1, G K, keys). Row g K + k belongs to slot k and query g of a key's G queries.
            kept: Cached keys and values of this layer. None: attend only to the keys of this pass.
        """
        rows, slots, _ = hidden.shape
        keys = self.heads // self.groups
        heads = self.qkv(norm(hidden, self.before))
        if self.bias is not None:
            heads = heads + self.bias
        heads = heads.view(rows, slots, -1, self.head)
        turning, value = heads.split([self.heads + keys, keys], dim=2)
        if self.norms is not None:
            weight, bias = self.norms
            turning = layer_norm(turning, (self.head,)) * weight + bias
        width = cos.shape[-1]
        rotated = turning[..., :width]
        turned = torch.addcmul(rotated * cos, rotated.roll(width // 2, -1), sin)
        if width < self.head:
            turned = torch.cat([turned, turning[..., width:]], dim=-1)
        query, key = turned.transpose(1, 2).split([self.heads, keys], dim=1)
        value = value.transpose(1, 2)
        if kept is not None:
            key, value = kept.update(key, value)
        if self.groups > 1:  # queries of one key are stacked along the slot dimension
            query = query.reshape(rows, keys, self.groups * slots, self.head)
        attended = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale)
        if self.groups > 1:
            attended = attended.reshape(rows, self.heads, slots, self.head)
        attended = self.out(attended.transpose(1, 2).reshape(rows, slots, -1))
        hidden = hidden + (attended if self.after_attention is None else norm(attended, self.after_attention))
        gate, up = self.gate_up(norm(hidden, self.between)).chunk(2, dim=-1)
        inner = self.down(silu(gate) * up)
        return hidden + (inner if self.after_mlp is None else norm(inner, self.after_mlp))


class FusedLlama(nn.Module):
    """Replacement of a body in `BODIES`.

    It is called with embeddings, positions and an additive mask.

    Grouped queries are folded into the slots, so attention has as many query heads as key heads. Kernels that accept a
    mask (memory-efficient attention) reject `enable_gqa` or copy the keys for each head, and the fallback computes
    whole score matrices (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
    """

    def __init__(self, llama: Any, *, product: Callable[[Tensor], nn.Module]):
        super().__init__()
        self.groups = llama.config.num_attention_heads // (
            llama.config.num_key_value_heads or llama.config.num_attention_heads
        )
        self.embed_tokens, self.rotary_emb, self.norm = llama.embed_tokens, llama.rotary_emb, llama.norm
        self.layers = nn.ModuleList()
        for index, layer in enumerate(llama.layers):
            self.layers.append(FusedLayer(layer, heads=llama.config.num_attention_heads, product=product))
            llama.layers[index] = nn.Identity()  # only one layer's weights exist twice at a time

    def forward(
        self,
        *,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        cache: Cache | None = None,
        use_cache: bool = False,
    ) -> BaseModelOutputWithPast:
        cos, sin = (t[:, :, None] for t in self.rotary_emb(inputs_embeds, position_ids=position_ids))
        half = sin.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)  # the sign of transformers' rotate_half
        mask = attention_mask.repeat(1, 1, self.groups, 1) if self.groups > 1 else attention_mask
        hidden = inputs_embeds
        # layers get their own cache and do not know their index, so compiled layers share code
        for layer, kept in zip(
            self.layers, cache.layers if cache is not None else [None] * len(self.layers), strict=True
        ):
            hidden = layer(hidden, cos, sin, mask, kept)
        return BaseModelOutputWithPast(last_hidden_state=norm(hidden, self.norm))


def norm(x: Tensor, module: nn.Module) -> Tensor:
    return rms_norm(x, (x.shape[-1],), module.weight, module.variance_epsilon)  # type: ignore[arg-type]


def fuse_for_inference(model: PreTrainedModel, *, least: int = MIN_PACKED_ELEMENTS, int8: bool = False) -> bool:
    """Replace a body in `BODIES` by a `FusedLlama`, and pack the model's output head, in place.

    Outputs are the same up to rounding. The model can no longer be trained or saved.

    Args:
        model: A model with frozen weights.
        least: Smallest weight to pack, in elements; see `packed`.
        int8: Round the weights of the layers to int8 instead, see `fuse_in_int8`.

    Returns:
        True if the body was one of `BODIES`, in its usual form; other models are left unchanged.

    Raises:
        ValueError: If the model is another one, with `int8`.
    """
    if int8:
        fuse_in_int8(model)
    elif not _fuse_body(model, partial(packed, least=least)):
        return False
    pack_head(model, least=least)
    return True


def fuse_in_int8(model: PreTrainedModel) -> None:
    """Replace the body of a model by a `FusedLlama` of `Int8Linear` layers, in place.

    The output head and the embeddings keep their dtype: docs/performance.md.

    Raises:
        ValueError: If the body is not one of `BODIES`, in its usual form.
    """
    if not _fuse_body(model, Int8Linear):
        raise ValueError(
            "int8 weights need the layers of a stock Llama, Qwen2, Chameleon or GLM-Image, and this model has others: "
            "leave out --int8, in Python int8=True"
        )


def pack_head(model: PreTrainedModel, *, least: int = MIN_PACKED_ELEMENTS) -> None:
    """Pack the output head of a model in place, if it is one product."""
    head = model.get_output_embeddings()
    if isinstance(head, nn.Linear) and head.bias is None:
        model.lm_head = packed(head.weight, least=least)


def _fuse_body(model: PreTrainedModel, product: Callable[[Tensor], nn.Module]) -> bool:
    llama: Any = model.base_model
    if type(llama) not in BODIES or llama.config.hidden_act != "silu":
        return False
    if getattr(llama.config, "swin_norm", False):  # the 34 B Chameleon's layers
        return False
    if getattr(llama, "has_sliding_layers", False):  # a Qwen2's layers that see a part of the keys
        return False
    biased = ("q_proj", "k_proj", "v_proj") if type(llama) in (Qwen2Model, GlmImageTextModel) else ()
    for layer in llama.layers:
        linears = {name: part for name, part in layer.named_modules() if name.endswith("_proj")}
        if not all(type(linear) is nn.Linear for linear in linears.values()):
            return False
        if any((part.bias is not None) != name.endswith(biased) for name, part in linears.items()):
            return False
    setattr(model, model.base_model_prefix, FusedLlama(llama, product=product))
    return True


def compile_body(model: PreTrainedModel) -> None:
    """Apply torch.compile to the body of a model after `fuse_for_inference`, in place.

    A fused body is compiled layer by layer. Over all windows, batch sizes and guidance a layer needs as many versions
    as the whole body would (6 to 8), each at a fraction of the compile time. A body that `fuse_for_inference` left
    unchanged is compiled whole, because its layers know their index and would each need their own versions.
    """
    body: Any = model.base_model
    if isinstance(body, FusedLlama):
        compile_layers(body, dynamic=True)
    else:
        body.compile(dynamic=True)
