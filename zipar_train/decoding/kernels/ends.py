"""Triton kernels around the layers of a pass: they feed slots, sample codes, and advance.

They do what `Decoder._pass` does with PyTorch's operators, and are tested to generate the same codes. Tables of the
plan have a column or row of each slot; see `Decoder`.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from zipar_train.decoding.kernels.layer import fed
from zipar_train.decoding.sampling import FIRST, INCREMENT, SECOND

LOWEST_INT, HIGHEST_INT = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)
STEP, MULTIPLY, AGAIN = tl.constexpr(INCREMENT), tl.constexpr(FIRST), tl.constexpr(SECOND)


@triton.jit
def feed(
    tokens, source, table, start, count, hidden, given, B, K, T, end, row_end,
    D: tl.constexpr, BD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Embed the tokens of the slots fed; a block for each matrix row.

    Args:
        tokens: int64 (B, T), T columns.
        source: Column that each slot feeds, int64 (slots).
        table: Embeddings of the codes, (V, D), and of the row-end token, whose value is negative, in row `row_end`.
        hidden: (M, D); written.
        given: Tokens fed, int64 (B, K); written.
    """
    m, d = tl.program_id(0), tl.arange(0, BD)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row, slot, is_fed = fed(m, start, count, B, K, end)
    if is_fed:
        token = tl.load(tokens + (row % B) * T + tl.load(source + slot))
        if row < B:
            tl.store(given + m, token)
        token = tl.where(token < 0, row_end, token)
        tl.store(hidden + m * D + d, tl.load(table + token * D + d, mask=d < D), mask=d < D)


@triton.jit
def guided(logits, row, rows, v, V, guidance, temperature, GUIDED: tl.constexpr):
    """Return the logits of entries v, in float32, after guidance and temperature; those beyond V are -infinity.

    Row `row` has the conditional logits, row `row` + `rows` the unconditional ones.
    """
    z = tl.load(logits + row * V + v, mask=v < V, other=-float("inf")).to(tl.float32)
    if GUIDED:
        other = tl.load(logits + (row + rows) * V + v, mask=v < V, other=0.0).to(tl.float32)
        z = other + (z - other) * guidance
    return z / temperature


@triton.jit
def ordered(z):
    """Return int32 numbers in the order of float32 numbers."""
    i = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)  # -0 equals 0
    return tl.where(i < 0, i ^ 0x7FFFFFFF, i)


@triton.jit
def unordered(i):
    """Return the float32 numbers of which `ordered` made int32 numbers."""
    return tl.where(i < 0, i ^ 0x7FFFFFFF, i).to(tl.float32, bitcast=True)


@triton.jit
def mean(low, high, up: tl.constexpr):
    """Return the mean of int32 numbers, rounded down or, with up = 1, up."""
    return ((low.to(tl.int64) + high.to(tl.int64) + up) >> 1).to(tl.int32)


@triton.jit
def kth_largest(numbers, k, BV: tl.constexpr, BC: tl.constexpr):
    """Return the k-th largest of BV int32 numbers in memory, by bisection."""
    low, high = tl.full((), LOWEST_INT, tl.int32), tl.full((), HIGHEST_INT, tl.int32)
    for _ in range(32):
        middle = mean(low, high, 1)
        count = tl.zeros((BC,), tl.int32)
        for v0 in range(0, BV, BC):
            count += (tl.load(numbers + v0 + tl.arange(0, BC)) >= middle).to(tl.int32)
        enough = tl.sum(count, 0) >= k
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
    return low


@triton.jit
def mass(numbers, least, most, top, BV: tl.constexpr, BC: tl.constexpr):
    """Return the sum of exp(z - top) of logits z whose `ordered` numbers are from `least` to `most`."""
    total = tl.zeros((BC,), tl.float32)
    for v0 in range(0, BV, BC):
        part = tl.load(numbers + v0 + tl.arange(0, BC))
        total += tl.where((part >= least) & (part <= most), tl.exp(unordered(part) - top), 0.0)
    return tl.sum(total, 0)


@triton.jit
def least_of_top_p(numbers, least, top, top_p, BV: tl.constexpr, BC: tl.constexpr):
    """Return the least number whose mass, with that of smaller ones from `least`, is above 1 - top_p; by bisection."""
    low, high = least, tl.full((), HIGHEST_INT, tl.int32)
    discarded = (1.0 - top_p) * mass(numbers, least, high, top, BV, BC)
    for _ in range(32):
        middle = mean(low, high, 0)
        enough = mass(numbers, least, middle, top, BV, BC) > discarded
        low, high = tl.where(enough, low, middle + 1), tl.where(enough, middle, high)
    return low


@triton.jit
def exponential(seed, v):
    """Return the noise of entries v, float64; see `sampling.uniform`."""
    x = seed + (v.to(tl.int64) + 1) * STEP
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * MULTIPLY
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * AGAIN
    x = x ^ ((x >> 31) & ((1 << 33) - 1))
    return -tl.log((x >> 12).to(tl.float64) * 2.0**-52 + (0.5 + 2.0**-53))


@triton.jit
def choose(
    logits, scratch, seeds, tokens, target, above, start, count, B, K, T, end, none,
    guidance, temperature, top_k, top_p,
    V: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr, GUIDED: tl.constexpr, GREEDY: tl.constexpr,
    FILTERED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Guidance, top-k, top-p, and sampling with fixed noise; grid (B K), or (B K, 2) with lookahead.

    Blocks (m, 0) sample the codes that the slots fed predict. Blocks (m, 1) sample drafts of the codes beyond them:
    from this pass's distribution of the code above, with the draft's own noise.

    Args:
        logits: (M, V).
        scratch: int32 (B K, BV), or (B K, 2, BV) with lookahead.
        seeds: int64 (B, T).
        tokens: int64 (B, T); written.
        target: Column that each slot predicts, int64 (slots + 1); `none` if it predicts none.
        above: Of each slot, the slot that predicts the code above, int64 (slots + 1).
        top_k, top_p: As in `sampling.probabilities`, if FILTERED; top_k is at most V. Equal logits are all kept or all
            discarded.
    """
    m, ahead = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    image, slot, is_fed = fed(m, start, count, B, K, end)
    row = m
    if ahead == 1:
        beyond = tl.minimum(slot + K, end)
        first = slot - m % K
        row = image * K + tl.minimum(tl.maximum(tl.load(above + beyond) - first, 0), K - 1).to(tl.int32)
        slot = beyond
    column = tl.load(target + tl.minimum(slot, end))
    if is_fed and column != none:
        own = scratch + (m * tl.num_programs(1) + ahead).to(tl.int64) * BV
        highest = tl.full((), LOWEST_INT, tl.int32)
        for v0 in range(0, BV, BC):  # in parts, to need fewer registers
            v = v0 + tl.arange(0, BC)
            part = ordered(guided(logits, row, B * K, v, V, guidance, temperature, GUIDED))
            highest = tl.maximum(highest, tl.max(part, 0))
            tl.store(own + v, part)
        tl.debug_barrier()  # all threads of the block have stored
        top = unordered(highest)
        least = tl.full((), LOWEST_INT, tl.int32)
        if FILTERED:
            least = kth_largest(own, top_k, BV, BC)
            if top_p < 1.0:
                least = least_of_top_p(own, least, top, top_p, BV, BC)
        seed = tl.load(seeds + image * T + column)
        best = tl.full((), -float("inf"), tl.float64)
        code = tl.full((), 0, tl.int32)
        for v0 in range(0, BV, BC):
            v = v0 + tl.arange(0, BC)
            part = tl.load(own + v)
            if GREEDY:
                score = part.to(tl.float64)
            else:
                weight = tl.where((part >= least) & (v < V), tl.exp(unordered(part) - top), 0.0)
                score = weight.to(tl.float64) / exponential(seed, v)
            most, place = tl.max(score, 0), tl.argmax(score, 0, tie_break_left=True)
            code = tl.where(most > best, v0 + place, code)
            best = tl.maximum(most, best)
        tl.store(tokens + image * T + column, code.to(tl.int64))


@triton.jit
def advance(
    tokens, source, given, start, count, passes, B, K, T, end,
    BK: tl.constexpr, LOOKAHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Move the start of each image beyond its final slots; a block for each image.

    Without lookahead, these are all slots fed. With it, they are the slots up to the first one whose input was a wrong
    draft; the pass is counted, unless the image was complete.

    Args:
        given: Tokens fed, int64 (B, K).
        start: Next slot of each image, int64 (B,); written.
        passes: Passes of each image, int64 (B,); written with lookahead.
    """
    image = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    first = tl.load(start + image).to(tl.int32)
    if LOOKAHEAD:
        k = tl.arange(0, BK)
        exists = (k < K) & (first + k < end)
        column = tl.load(source + first + k, mask=exists, other=0)
        wrong = tl.load(tokens + image * T + column, mask=exists, other=0) != tl.load(
            given + image * K + k, mask=exists, other=0
        )
        final = tl.min(tl.where(exists & wrong, k, K), 0)
        if first < end:
            tl.store(passes + image, tl.load(passes + image) + 1)
    else:
        final = tl.load(count + first)
    tl.store(start + image, tl.minimum(first + final, end))
