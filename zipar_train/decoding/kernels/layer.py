"""A decoder layer of a Llama, Qwen2 or Chameleon in five Triton kernels, for passes of 1 to 32 rows.

    norm + q, k, v + rotary + cache write  ->  attention  ->  output + residual
    norm + gate, up + SiLU                 ->  down + residual

With so few rows a layer takes as long as reading its weights, if nothing else takes time. So each kernel reads a weight
once, and norms, rotations and residuals are computed where their operands are.

A pass feeds up to K slots of each row of the cache. Which slots these are is read on the device: row r of the cache
belongs to image r % B, whose slots begin at `start[r % B]`, and of its K slots `count[start]` are fed. All kernels of
any two passes with the same K are thus the same work, and one CUDA graph serves them all. Row m = r K + k of a matrix
is slot k of cache row r.

Kernels are launched with programmatic dependent launch (PDL) where the GPU supports it: a kernel starts while the one
before it runs, reads its first weights and what an earlier pass has written, and then waits for the end of the one
before. All of them wait, so each sees what any earlier one wrote. A kernel lets the next one start when its own wait is
over, so none starts before the pass before has ended.

Under TRITON_INTERPRET=1 the kernels run on a CPU, for tests. The interpreter multiplies the bit patterns of bfloat16
(triton 3.6), so `INTERPRETED` converts operands to float32.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from zipar_train.decoding.kernels.products import depths, inputs, normed_products, prefetch, product, weights

LOWEST = tl.constexpr(-1e30)  # below any score; finite, so that differences are


@triton.jit
def fed(m, start, count, B, K, end):
    """Return the cache row of each matrix row, its slot, and whether the pass feeds it."""
    row = m // K
    first = tl.load(start + row % B).to(tl.int32)
    slot = first + m % K
    return row, slot, (m % K < tl.load(count + first)) & (slot < end)


@triton.jit
def qkv(
    x, gain, w, scale, bias, norm_w, norm_b, cos, sin, start, count, q, keys, values, B, K, M, end, S, eps,
    D: tl.constexpr, H: tl.constexpr, HK: tl.constexpr, HEAD: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, WARPS: tl.constexpr,
    LINES: tl.constexpr, PDL: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """RMS norm, queries, keys and values, rotary embedding; keys and values go to the cache, at the slots fed.

    A block computes BH pairs of components of one head, i and i + HEAD / 2, which the rotary embedding mixes. With
    Chameleon's norms of queries and keys, a layer norm per head, a block computes a whole head: BH = HEAD / 2.

    Args:
        x: Hidden states (M, D), M = rows of the cache times K.
        gain: Weight of the norm, (D,).
        w, scale: Weight ((H + 2 HK) HEAD, D), and its scales if it is int8, else None.
        bias: Bias of a Qwen2, ((H + 2 HK) HEAD,); else None.
        norm_w, norm_b: Weight and bias of Chameleon's norms, (H + HK, HEAD); else None.
        cos, sin: Rotary embeddings of each slot, float32 (slots, HEAD / 2).
        q: Queries, (M, H HEAD); written.
        keys, values: Cache, (rows, HK, S, HEAD); written.
        end: Number of slots of the plan.
    """
    HALVES: tl.constexpr = HEAD // 2
    block = tl.program_id(1)
    head = block // (HALVES // BH)
    j = block % (HALVES // BH) * BH + tl.arange(0, BH)
    n, m = head * HEAD + j, tl.program_id(0) * BM + tl.arange(0, BM)
    dtype: tl.constexpr = x.dtype.element_ty
    row, slot, is_fed = fed(m, start, count, B, K, end)  # written by an earlier pass
    is_fed = (is_fed & (m < M))[:, None]
    angle = slot[:, None] * HALVES + j[None, :]
    c, s = tl.load(cos + angle, mask=is_fed, other=0.0), tl.load(sin + angle, mask=is_fed, other=0.0)
    a1, a2 = normed_products(x, gain, w, scale, n, n + HALVES, m, M, eps, D, BK, WARPS, LINES, PDL, INTERPRETED)
    if bias is not None:
        a1, a2 = a1 + tl.load(bias + n)[None, :], a2 + tl.load(bias + n + HALVES)[None, :]
    if head < H + HK:
        if norm_w is not None:
            mean = (tl.sum(a1, 1) + tl.sum(a2, 1))[:, None] / HEAD
            a1, a2 = a1 - mean, a2 - mean
            inverse = tl.rsqrt((tl.sum(a1 * a1, 1) + tl.sum(a2 * a2, 1))[:, None] / HEAD + 1e-5)
            a1 = a1 * inverse * tl.load(norm_w + n)[None, :] + tl.load(norm_b + n)[None, :]
            a2 = a2 * inverse * tl.load(norm_w + n + HALVES)[None, :] + tl.load(norm_b + n + HALVES)[None, :]
        a1, a2 = a1 * c - a2 * s, a2 * c + a1 * s
    if head < H:
        to = q + m[:, None] * (H * HEAD) + n[None, :]
    elif head < H + HK:
        to = keys + ((row.to(tl.int64) * HK + head - H) * S + slot)[:, None] * HEAD + j[None, :]
    else:
        to = values + ((row.to(tl.int64) * HK + head - H - HK) * S + slot)[:, None] * HEAD + j[None, :]
    tl.store(to, a1.to(dtype), mask=is_fed)
    tl.store(to + HALVES, a2.to(dtype), mask=is_fed)


@triton.jit
def attend(
    q, keys, values, visible, padding, start, count, out, partial, arrived, B, K, end, S, V, P, factor,
    H: tl.constexpr, HK: tl.constexpr, HEAD: tl.constexpr, SPLITS: tl.constexpr,
    BQ: tl.constexpr, BS: tl.constexpr, PDL: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Attention of the slots fed to the slots so far, under the plan's mask; grid (rows HK, SPLITS).

    A block attends to its share of the keys. The last block of a row and head to arrive adds the shares up, in a fixed
    order, so that the result does not depend on scheduling. The H / HK queries of a key are rows of one product.

    Args:
        q: Queries, (M, H HEAD).
        keys, values: Cache, (rows, HK, S, HEAD).
        visible: The plan's mask, bool (slots, V), V >= slots.
        padding: Which of the P prompt tokens are padding, bool (rows, P); None: none are.
        out: (M, H HEAD); written.
        partial: Shares, float32 (rows HK SPLITS BQ (HEAD + 2)).
        arrived: Blocks that arrived, int32 (rows HK); zero before and after.
        factor: Of the scores, HEAD^-0.5.
    """
    GROUP: tl.constexpr = H // HK
    pair, split = tl.program_id(0), tl.program_id(1)
    row, head = pair // HK, pair % HK
    i, d = tl.arange(0, BQ), tl.arange(0, HEAD)  # a query: a slot and one of the heads of the group
    first = tl.load(start + row % B).to(tl.int32)  # written by an earlier pass, as are most keys
    last = tl.minimum(first + tl.minimum(K, tl.load(count + first).to(tl.int32)), end)
    base = pair.to(tl.int64) * S
    share = tl.cdiv(tl.cdiv(last, BS), SPLITS) * BS
    if PDL:
        for s0 in range(split * share, tl.minimum((split + 1) * share, last), BS):
            s = base + tl.minimum(s0 + tl.arange(0, BS), last - 1)
            prefetch(keys, s, 0, HEAD, HEAD // 32)
            prefetch(values, s, 0, HEAD, HEAD // 32)
        gdc_wait()
        gdc_launch_dependents()
    slot = first + i // GROUP
    is_fed = (i // GROUP < K) & (slot < last)
    place = ((row * K + i // GROUP) * H + head * GROUP + i % GROUP) * HEAD
    query = tl.load(q + place[:, None] + d[None, :], mask=is_fed[:, None], other=0.0)
    acc = tl.zeros((BQ, HEAD), tl.float32)
    most = tl.full((BQ,), LOWEST, tl.float32)
    total = tl.zeros((BQ,), tl.float32)
    for s0 in range(split * share, tl.minimum((split + 1) * share, last), BS):
        s = s0 + tl.arange(0, BS)
        exists = s < last
        key = tl.load(keys + (base + s)[None, :] * HEAD + d[:, None], mask=exists[None, :], other=0.0)
        seen = tl.load(visible + slot[:, None] * V + s[None, :], mask=is_fed[:, None] & exists[None, :], other=0) != 0
        if padding is not None:
            seen &= (tl.load(padding + row * P + s, mask=s < P, other=0) == 0)[None, :]
        score = product(query, key, tl.zeros((BQ, BS), tl.float32), INTERPRETED) * factor
        score = tl.where(seen, score, LOWEST)
        now = tl.maximum(most, tl.max(score, 1))
        weight = tl.where(seen, tl.exp(score - now[:, None]), 0.0)
        fade = tl.exp(most - now)
        value = tl.load(values + (base + s)[:, None] * HEAD + d[None, :], mask=exists[:, None], other=0.0)
        acc = product(weight.to(value.dtype), value, acc * fade[:, None], INTERPRETED)
        total = total * fade + tl.sum(weight, 1)
        most = now
    if SPLITS > 1:
        mine = partial + ((pair * SPLITS + split) * BQ + i) * (HEAD + 2)
        tl.store(mine[:, None] + d[None, :], acc)
        tl.store(mine + HEAD, most)
        tl.store(mine + HEAD + 1, total)
        tl.debug_barrier()  # all threads of the block have stored
        if tl.atomic_add(arrived + pair, 1, sem="acq_rel") < SPLITS - 1:
            return
        tl.store(arrived + pair, 0)
        acc = tl.zeros((BQ, HEAD), tl.float32)
        most = tl.full((BQ,), LOWEST, tl.float32)
        total = tl.zeros((BQ,), tl.float32)
        for other in range(SPLITS):
            theirs = partial + ((pair * SPLITS + other) * BQ + i) * (HEAD + 2)
            highest = tl.load(theirs + HEAD, cache_modifier=".cg")
            now = tl.maximum(most, highest)
            fade, weight = tl.exp(most - now), tl.exp(highest - now)
            acc = acc * fade[:, None] + tl.load(theirs[:, None] + d[None, :], cache_modifier=".cg") * weight[:, None]
            total = total * fade + tl.load(theirs + HEAD + 1, cache_modifier=".cg") * weight
            most = now
    acc /= tl.maximum(total, 1e-30)[:, None]  # zero only in rows that are not fed
    tl.store(out + place[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=is_fed[:, None])


@triton.jit
def add_product(
    x, w, scale, hidden, M,
    N: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WARPS: tl.constexpr,
    LINES: tl.constexpr, PDL: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Add x w^T to the hidden states: the output of attention, and down of the feed-forward.

    Args:
        x: (M, D).
        w, scale: Weight (N, D), and its scales if it is int8, else None.
        hidden: (M, N); read and written.
    """
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    k = depths(0, BK, WARPS)
    dtype: tl.constexpr = x.dtype.element_ty
    tile = weights(w, n, k, D, BK, dtype)
    factor = 1.0 if scale is None else tl.load(scale + n)[None, :]
    to, exists = hidden + m[:, None] * N + n[None, :], (m < M)[:, None]
    if PDL:
        if D > BK:
            prefetch(w, n, BK, D, LINES)
        gdc_wait()
        gdc_launch_dependents()
    rows, before = inputs(x, m, k, M, D), tl.load(to, mask=exists, other=0.0)
    acc = product(rows, tile, tl.zeros((WARPS, BM, BN), tl.float32), INTERPRETED)
    for k0 in range(BK, D, BK):
        k = depths(k0, BK, WARPS)
        acc = product(inputs(x, m, k, M, D), weights(w, n, k, D, BK, dtype), acc, INTERPRETED)
    tl.store(to, (before.to(tl.float32) + tl.sum(acc, 0) * factor).to(dtype), mask=exists)


@triton.jit
def gate_up(
    x, gain, w, scale, out, M, eps,
    F: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WARPS: tl.constexpr,
    LINES: tl.constexpr, PDL: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """RMS norm, gate and up, silu(gate) up.

    Args:
        x: Hidden states (M, D).
        gain: Weight of the norm, (D,).
        w, scale: Weight (2 F, D), gate first, and its scales if it is int8, else None.
        out: (M, F); written.
    """
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    gate, up = normed_products(x, gain, w, scale, n, n + F, m, M, eps, D, BK, WARPS, LINES, PDL, INTERPRETED)
    value = (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty)
    tl.store(out + m[:, None] * F + n[None, :], value, mask=(m < M)[:, None])
