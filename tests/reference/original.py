"""LlamaGen as its authors wrote it, in plain functions over tensors by their published names.

Written from gpt.py and vq_model.py (FoundationVision/LlamaGen) and from nothing of ours: rotations are complex numbers,
attention is a softmax in the open, the cache is a list of keys by raster slot.
"""

import math

import torch
from torch.nn.functional import conv2d, gelu, group_norm, interpolate, normalize, pad, silu


def random_gpt(*, depth, width, codes, grid, classes=None, features=None, prompt=1, seed=0, dtype=torch.float64):
    """A checkpoint's tensors, large enough that every context matters."""
    g = torch.Generator().manual_seed(seed)

    def matrix(*shape, scale=0.4):
        return torch.randn(*shape, generator=g, dtype=torch.float64).mul(scale).to(dtype)

    hidden = 2 * width
    state = {"tok_embeddings.weight": matrix(codes, width, scale=1), "output.weight": matrix(codes, width, scale=1)}
    if classes:
        state["cls_embedding.embedding_table.weight"] = matrix(classes + 1, width, scale=1)
    else:
        state["cls_embedding.cap_proj.fc1.weight"] = matrix(width, features)
        state["cls_embedding.cap_proj.fc2.weight"] = matrix(width, width)
        state["cls_embedding.uncond_embedding"] = matrix(prompt, features, scale=1)
    for i in range(depth):
        layer = f"layers.{i}."
        state[layer + "attention.wqkv.weight"] = matrix(3 * width, width)
        state[layer + "attention.wo.weight"] = matrix(width, width)
        state[layer + "feed_forward.w1.weight"] = matrix(hidden, width)
        state[layer + "feed_forward.w3.weight"] = matrix(hidden, width)
        state[layer + "feed_forward.w2.weight"] = matrix(width, hidden)
        state[layer + "attention_norm.weight"] = 1 + matrix(width)
        state[layer + "ffn_norm.weight"] = 1 + matrix(width)
    return state | {"norm.weight": 1 + matrix(width)}


def prompt_embeddings(state, condition):
    """(B, P, D) of classes (B,), or of caption features (B, P, F)."""
    if condition.ndim == 1:
        return state["cls_embedding.embedding_table.weight"][condition][:, None]
    hidden = gelu(condition @ state["cls_embedding.cap_proj.fc1.weight"].T, approximate="tanh")
    return hidden @ state["cls_embedding.cap_proj.fc2.weight"].T


def forward(state, x, slots, cache, visible, *, heads, columns):
    """One forward over embeddings x (B, Q, D) at raster slots (the prompt at negative ones): logits (B, Q, V).

    cache: {layer: {slot: (key, value)}}, written before it is read. visible(query's slot, key's slot) -> bool (B,).
    """
    depth = sum(name.endswith("wo.weight") for name in state)
    for i in range(depth):
        layer, here = f"layers.{i}.", cache.setdefault(i, {})
        h = rms(x, state[layer + "attention_norm.weight"])
        q, k, v = (h @ state[layer + "attention.wqkv.weight"].T).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (heads, -1)) for t in (q, k, v))  # (B, Q, heads, head)
        for n, slot in enumerate(slots):
            here[slot] = (turn(k[:, n], slot, columns), v[:, n])
        rows = []
        for n, slot in enumerate(slots):
            seen = [(key, value, visible(slot, other)) for other, (key, value) in here.items()]
            keys, values = (torch.stack([s[j] for s in seen], dim=2) for j in (0, 1))  # (B, heads, K, head)
            scores = (turn(q[:, n], slot, columns)[:, :, None] * keys).sum(-1) / math.sqrt(keys.shape[-1])
            shown = torch.stack([s[2] for s in seen], dim=-1)[:, None]  # (B, 1, K)
            weights = scores.masked_fill(~shown, -torch.inf).softmax(-1)
            rows.append((weights[..., None] * values).sum(2).flatten(1))
        x = x + torch.stack(rows, dim=1) @ state[layer + "attention.wo.weight"].T
        h = rms(x, state[layer + "ffn_norm.weight"])
        gate = silu(h @ state[layer + "feed_forward.w1.weight"].T)
        x = x + (gate * (h @ state[layer + "feed_forward.w3.weight"].T)) @ state[layer + "feed_forward.w2.weight"].T
    return rms(x, state["norm.weight"]) @ state["output.weight"].T


def next_token_logits(state, codes, condition, *, heads, columns, padding=None):
    """Logits (B, N, V) of every code of images (B, N), next-token."""
    prompt = prompt_embeddings(state, condition)
    length = prompt.shape[1]
    x = torch.cat([prompt, state["tok_embeddings.weight"][codes[:, :-1]]], dim=1)
    slots = [n - length for n in range(x.shape[1])]
    hidden = torch.zeros(len(codes), length, dtype=torch.bool) if padding is None else padding

    def visible(query, key):
        if key > query:
            return torch.zeros(len(codes), dtype=torch.bool)
        padded = hidden[:, key + length] if key < 0 else torch.zeros(len(codes), dtype=torch.bool)
        return ~padded if query != key else torch.ones(len(codes), dtype=torch.bool)

    logits = forward(state, x, slots, {}, visible, heads=heads, columns=columns)
    return logits[:, length - 1 :]


def released_zipar(state, classes, forwards, *, size, heads, scale=1.0, zeros=True):
    """Codes (B, N) that the released ZipAR decoder draws greedily, along forwards that `released.simulate` lists.

    zeros: slots never written hold zero keys and values, and are attended to, as in the released code.
    """
    images = len(classes)
    guided = scale != 1
    null = torch.full_like(classes, len(state["cls_embedding.embedding_table.weight"]) - 1)
    both = torch.cat([classes, null]) if guided else classes
    depth = sum(name.endswith("wo.weight") for name in state)
    width = state["norm.weight"].shape[0]
    empty = torch.zeros(len(both), heads, width // heads, dtype=state["norm.weight"].dtype)
    cache = {i: {slot: (empty, empty) for slot in range(size * size)} if zeros else {} for i in range(depth)}
    drawn = torch.full((images, size * size), -1)
    every = torch.ones(len(both), dtype=torch.bool)
    for queries in forwards:
        rows = []
        for query in queries:
            kind, number = query.feeds
            if kind == "prompt":
                rows.append(prompt_embeddings(state, both)[:, 0])
            else:
                fed = state["tok_embeddings.weight"][drawn[:, number]]
                rows.append(torch.cat([fed, fed]) if guided else fed)
        slots = [query.slot for query in queries]
        logits = forward(
            state, torch.stack(rows, 1), slots, cache, lambda q, k: every & (k <= q), heads=heads, columns=size
        )
        if guided:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + (conditional - unconditional) * scale
        for n, query in enumerate(queries):
            if query.draws is not None:
                drawn[:, query.draws] = logits[:, n].argmax(-1)
    return drawn


def rms(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def turn(x, slot, columns):
    """Neighbouring numbers of each head as a complex number, turned by row or column; nothing is left of a prompt's."""
    if slot < 0:
        return torch.zeros_like(x)
    half = x.shape[-1] // 2
    speeds = 10000.0 ** -(torch.arange(0, half, 2, dtype=torch.float64) / half)
    row, column = divmod(slot, columns)
    angles = torch.cat([row * speeds, column * speeds])
    numbers = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(numbers * torch.polar(torch.ones_like(angles), angles)).flatten(-2).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer


class Weights(dict):
    """Tensors by name; `made` draws those that are missing."""

    def __init__(self, *args, seed=None):
        super().__init__(*args)
        self.generator = torch.Generator().manual_seed(seed) if seed is not None else None

    def __call__(self, name, *shape):
        if name not in self and self.generator is not None:
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            spread = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1
            self[name] = mean + spread * torch.randn(shape, generator=self.generator)
        return self[name]


def random_vq(*, base=32, mult=(1, 1, 1, 1, 2), latent=32, embed=4, codes=24, blocks=1, seed=0):
    state = Weights(seed=seed)
    shape = {"base": base, "mult": mult, "latent": latent, "embed": embed, "codes": codes, "blocks": blocks}
    found = vq_encode(state, torch.zeros(1, 3, 2 ** len(mult), 2 ** len(mult)), **shape)
    vq_decode(state, found, **shape)
    state["quantize.codebook_used"] = torch.zeros(65536)
    return dict(state), shape


def vq_encode(state, images, *, base, mult, latent, embed, codes, blocks):
    state = state if isinstance(state, Weights) else Weights(state)
    x, width, last = conv(state, "encoder.conv_in", images, 3, base), base, len(mult) - 1
    for level, factor in enumerate(mult):
        name = f"encoder.conv_blocks.{level}."
        for block in range(blocks):
            x, width = resnet(state, f"{name}res.{block}.", x, width, base * factor), base * factor
            if level == last:
                x = attention(state, f"{name}attn.{block}.", x, width)
        if level != last:
            x = conv(state, f"{name}downsample.conv", pad(x, (0, 1, 0, 1)), width, width, stride=2, padding=0)
    x = middle(state, "encoder.mid.", x, width)
    x = conv(state, "encoder.conv_out", silu(norm(state, "encoder.norm_out", x, width)), width, latent)
    x = normalize(conv(state, "quant_conv", x, latent, embed, kernel=1, padding=0), dim=1)
    table = normalize(state("quantize.embedding.weight", codes, embed), dim=-1)
    return torch.einsum("bchw,nc->bnhw", x, table).argmax(1)


def vq_decode(state, found, *, base, mult, latent, embed, codes, blocks):
    state = state if isinstance(state, Weights) else Weights(state)
    x = normalize(state("quantize.embedding.weight", codes, embed), dim=-1)[found].permute(0, 3, 1, 2).contiguous()
    x = conv(state, "post_quant_conv", x, embed, latent, kernel=1, padding=0)
    width = base * mult[-1]
    x = middle(state, "decoder.mid.", conv(state, "decoder.conv_in", x, latent, width), width)
    for level, factor in enumerate(reversed(mult)):
        name = f"decoder.conv_blocks.{level}."
        for block in range(blocks + 1):
            x, width = resnet(state, f"{name}res.{block}.", x, width, base * factor), base * factor
            if level == 0:
                x = attention(state, f"{name}attn.{block}.", x, width)
        if level != len(mult) - 1:
            x = conv(state, f"{name}upsample.conv", interpolate(x, scale_factor=2.0), width, width)
    return conv(state, "decoder.conv_out", silu(norm(state, "decoder.norm_out", x, width)), width, 3)


def conv(state, name, x, into, out, *, kernel=3, stride=1, padding=1):
    weight, bias = state(f"{name}.weight", out, into, kernel, kernel), state(f"{name}.bias", out)
    return conv2d(x, weight, bias, stride=stride, padding=padding)


def norm(state, name, x, width):
    return group_norm(x, 32, state(f"{name}.weight", width), state(f"{name}.bias", width), eps=1e-6)


def resnet(state, name, x, into, out):
    h = conv(state, f"{name}conv1", silu(norm(state, f"{name}norm1", x, into)), into, out)
    h = conv(state, f"{name}conv2", silu(norm(state, f"{name}norm2", h, out)), out, out)
    return h + (conv(state, f"{name}nin_shortcut", x, into, out, kernel=1, padding=0) if into != out else x)


def attention(state, name, x, width):
    h = norm(state, f"{name}norm", x, width)
    q, k, v = (conv(state, f"{name}{part}", h, width, width, kernel=1, padding=0).flatten(2) for part in "qkv")
    weights = (torch.einsum("bci,bcj->bij", q, k) / math.sqrt(width)).softmax(-1)
    mixed = torch.einsum("bij,bcj->bci", weights, v).view_as(x)
    return x + conv(state, f"{name}proj_out", mixed, width, width, kernel=1, padding=0)


def middle(state, name, x, width):
    x = resnet(state, f"{name}0.", x, width, width)
    return resnet(state, f"{name}2.", attention(state, f"{name}1.", x, width), width, width)
