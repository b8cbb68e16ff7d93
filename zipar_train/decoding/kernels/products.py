"""Matrix products of few rows with a weight, for the kernels of a layer.

A block computes a few columns. Its warps divide the inner dimension and add their sums up at the end, because with so
few rows a warp spends its time waiting for the one before. The first part of the weight, often all of it, is read
before the block waits for the kernel before it; the rest is on its way to the L2 cache by then.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def product(a, b, acc, INTERPRETED: tl.constexpr):
    """Return acc + a b, in float32; of matrices, or of a batch of them."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def prefetch(table, row, first: tl.constexpr, D: tl.constexpr, LINES: tl.constexpr):
    """Ask for elements `first` .. D of rows (D,) of a table to be read into the L2 cache, without waiting for them.

    Args:
        LINES: A power of two, at least the number of cache lines of 128 bytes.
    """
    element = tl.minimum(first + tl.arange(0, LINES) * (1024 // table.dtype.element_ty.primitive_bitwidth), D - 1)
    at = (table + row[:, None].to(tl.int64) * D + element[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def depths(k0, BK: tl.constexpr, WARPS: tl.constexpr):
    """Return places k0 .. k0 + BK of a product's inner dimension, (WARPS, BK / WARPS): each warp adds up its own."""
    return k0 + tl.arange(0, WARPS)[:, None] * (BK // WARPS) + tl.arange(0, BK // WARPS)[None, :]


@triton.jit
def weights(w, n, k, D: tl.constexpr, BK: tl.constexpr, dtype: tl.constexpr):
    """Return tiles (s, k, n) of a weight (N, D); one in int8 as numbers of `dtype`, to be scaled afterwards."""
    at = w + n[None, None, :].to(tl.int64) * D + k[:, :, None]
    if D % BK:
        tile = tl.load(at, mask=k[:, :, None] < D, other=0, eviction_policy="evict_first")
    else:
        tile = tl.load(at, eviction_policy="evict_first")
    if w.dtype.element_ty == tl.int8:
        tile = tile.to(tl.float32)  # the interpreter takes integers for the bit patterns of bfloat16 (triton 3.8)
    return tile.to(dtype)


@triton.jit
def inputs(x, m, k, M, D: tl.constexpr):
    """Return tiles (s, m, k) of x (M, D)."""
    return tl.load(
        x + m[None, :, None] * D + k[:, None, :], mask=(m < M)[None, :, None] & (k < D)[:, None, :], other=0.0
    )


@triton.jit
def gains(gain, k, D: tl.constexpr):
    """Return the norm's gain (s, k), float32."""
    return tl.load(gain + k, mask=k < D, other=0.0).to(tl.float32)


@triton.jit
def gained(x, factor, m, k, M, D: tl.constexpr):
    """Return tiles (s, m, k) of x times the norm's gain, and the sums of the squares of x."""
    tile = inputs(x, m, k, M, D).to(tl.float32)
    return (tile * factor[:, None, :]).to(x.dtype.element_ty), tl.sum(tl.sum(tile * tile, 2), 0)


@triton.jit
def normed_products(
    x, gain, w, scale, first, second, m, M, eps,
    D: tl.constexpr, BK: tl.constexpr, WARPS: tl.constexpr, LINES: tl.constexpr,
    PDL: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Return the products of the RMS norm of x with the rows `first` and `second` of a weight, float32 (m, first).

    The norm divides the finished products: its root is known when all of x has been read, once.
    """
    k = depths(0, BK, WARPS)
    dtype: tl.constexpr = x.dtype.element_ty
    w1, w2 = weights(w, first, k, D, BK, dtype), weights(w, second, k, D, BK, dtype)
    factor = gains(gain, k, D)
    s1, s2 = (1.0, 1.0) if scale is None else (tl.load(scale + first)[None, :], tl.load(scale + second)[None, :])
    if PDL:
        if D > BK:
            prefetch(w, first, BK, D, LINES)
            prefetch(w, second, BK, D, LINES)
        gdc_wait()
        gdc_launch_dependents()
    xg, squares = gained(x, factor, m, k, M, D)
    nothing = tl.zeros((WARPS, m.shape[0], first.shape[0]), tl.float32)
    a1, a2 = product(xg, w1, nothing, INTERPRETED), product(xg, w2, nothing, INTERPRETED)
    for k0 in range(BK, D, BK):
        k = depths(k0, BK, WARPS)
        w1, w2 = weights(w, first, k, D, BK, dtype), weights(w, second, k, D, BK, dtype)
        xg, more = gained(x, gains(gain, k, D), m, k, M, D)
        squares += more
        a1, a2 = product(xg, w1, a1, INTERPRETED), product(xg, w2, a2, INTERPRETED)
    root = tl.rsqrt(squares / D + eps)[:, None]
    return tl.sum(a1, 0) * root * s1, tl.sum(a2, 0) * root * s2
