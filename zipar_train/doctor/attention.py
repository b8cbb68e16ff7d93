"""Checks of attention under a plan's mask, forward and backward, against its definition in float64.

Each feature is actually run: torch.compile with an empty cache, each of torch's kernels, and FlexAttention.
"""

import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from zipar_train.doctor.checks import Check, CheckContext, CheckResult, note, ok, problem, words
from zipar_train.doctor.devices import device
from zipar_train.plan.grid import Grid
from zipar_train.plan.table import Plan

PLAN = Plan.zipar(Grid(24, 24), window=8)  # LlamaGen's grid: 598 slots, several blocks of a BlockMask
HEADS, HEAD = 2, 64
LOOSEST = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}  # relative to the largest value; float32 allows TF32
SDPA = {"float32": "sdpa, float32", "bfloat16": "sdpa, bfloat16"}
KERNELS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
BOTH = "forward and backward"
FORWARD, BACKWARD, COMPILE = "FlexAttention", "FlexAttention, backward", "torch.compile"


def deviation(attend: Callable[..., Any], place: Any, dtype: Any, *, backward: bool = True) -> float:
    """Return the largest relative difference of the output and the three gradients from attention in float64.

    Differences are relative to a tensor's largest absolute value.

    Args:
        attend: Called as `attend(q, k, v)` with tensors (1, heads, S, head width).
        place: Device to compute on.
        dtype: Type of the inputs.
        backward: Also compare the gradients.
    """
    import torch

    random = torch.Generator().manual_seed(0)
    shape = (4, 1, HEADS, len(PLAN), HEAD)
    *given, weight = torch.randn(shape, generator=random).to(dtype).unbind()

    def definition(q: Any, k: Any, v: Any) -> Any:
        hidden = ~torch.tensor(PLAN.visible())
        return (q @ k.mT / HEAD**0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ v

    def results(attend: Callable[..., Any], **to: Any) -> list[Any]:
        values = [value.detach().to(**to).requires_grad_(backward) for value in given]
        out = attend(*values)
        gradients = torch.autograd.grad((out * weight.to(**to)).sum(), values) if backward else ()
        return [tensor.detach().to("cpu", torch.float64) for tensor in (out, *gradients)]

    exact, found = results(definition, dtype=torch.float64), results(attend, device=place, dtype=dtype)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(exact, found, strict=True))


def judged(name: str, dtype: Any, found: float, remedy: str, *, done: str = BOTH) -> CheckResult:
    kind = str(dtype).removeprefix("torch.")
    if not found <= LOOSEST[kind]:  # NaN fails too
        return problem(name, f"{done}: {found:.0e} away from float64", remedy)
    return ok(name, f"{done}, within {found:.0e} of float64")


def sdpa(asked: CheckContext, kind: str) -> Iterator[CheckResult]:
    """Check `scaled_dot_product_attention` as training calls it, with the kernel chosen by torch."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from zipar_train.plan.masks import dense

    place, dtype = device(asked), getattr(torch, kind)
    mask = dense(PLAN, device=place)

    def attend(q: Any, k: Any, v: Any) -> Any:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    yield judged(SDPA[kind], dtype, deviation(attend, place, dtype), "Install another torch: no training is right")


def kernels(asked: CheckContext) -> Iterator[CheckResult]:
    """Check each sdpa kernel separately on a GPU, in the dtype that recipes train in."""
    place = device(asked)
    if place.type == "cpu":
        return
    rows = {name: kernel(name, place, half(place)) for name in KERNELS}
    yield from rows.values()
    if not any(rows[name].seen.startswith(BOTH) for name in KERNELS if name != "MATH"):
        slow = "under a dense mask torch has none but the plain one here, which is slow and takes much memory"
        yield note("sdpa's kernels", slow, "--set tune.attention=flex_attention, or another torch")


def kernel(name: str, place: Any, dtype: Any) -> CheckResult:
    """Check one sdpa kernel; a kernel without support for dense masks is fine, because torch uses another one."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from zipar_train.plan.masks import dense

    mask, backend = dense(PLAN, device=place), getattr(SDPBackend, name)

    def attend(q: Any, k: Any, v: Any) -> Any:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    title = f"sdpa, {name.lower().removesuffix('_attention')}"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = deviation(attend, place, dtype)
        except RuntimeError as error:  # not available for this mask, dtype or device: warnings say why
            why = [words(warning.message) for warning in said if isinstance(warning.message, UserWarning)]
            return ok(title, f"not for a dense mask here; {why[0] if why else words(error)}"[:160])
    return judged(title, dtype, found, "--set tune.attention=flex_attention, or another torch")


def half(place: Any) -> Any:
    """Return the dtype that recipes train in: bfloat16 (float16 on GPUs without it); float32 on a CPU."""
    import torch

    if place.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def compiles(asked: CheckContext) -> Iterator[CheckResult]:
    """Check torch.compile on a small function and its gradient, with an empty cache.

    A filled cache would hide a missing compiler. The slowest parts of torch's setup are disabled: detecting the CPU's
    instruction set and precompiling headers.
    """
    import torch

    assert "torch._inductor.config" not in sys.modules, "which reads these:"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(dir=asked.scratch)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # more threads would be processes that import torch
    os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = os.environ["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "0"

    def function(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() * x).relu().sum()

    place = device(asked)
    value = torch.linspace(-3, 3, 1000, device=place).requires_grad_()
    (wanted,) = torch.autograd.grad(function(value), value)
    try:
        (found,) = torch.autograd.grad(torch.compile(function)(value), value)
    except Exception as error:
        yield unless_needed(asked, COMPILE, words(error), REMEDY)
        return
    assert torch.allclose(found, wanted, atol=1e-5), "the compiled function's gradient is another"
    yield ok(COMPILE, "a function and its gradient, compiled just now, are right")


def flex(asked: CheckContext, *, backward: bool) -> Iterator[CheckResult]:
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    from zipar_train.plan.masks import block

    name = BACKWARD if backward else FORWARD
    place = device(asked)
    dtype = half(place)
    fused = torch.compile(flex_attention) if place.type == "cuda" else flex_attention  # as training uses it
    attend = partial(fused, block_mask=block(PLAN, device=place))
    try:
        found = deviation(attend, place, dtype, backward=backward)
    except Exception as error:
        remedy = "Use --set tune.attention=sdpa here, which computes the same"
        if place.type == "cpu":
            yield note(name, words(error), f"{remedy}; flex_attention is for GPUs")
        else:
            yield unless_needed(asked, name, words(error), remedy)
        return
    done = BOTH if backward else "forward"
    yield judged(name, dtype, found, "Use --set tune.attention=sdpa here", done=done)


def unless_needed(asked: CheckContext, name: str, seen: str, remedy: str) -> CheckResult:
    """Return a problem row, or a note if a recipe is given, because the recipe's own rows say if it needs this."""
    return (note if asked.recipe else problem)(name, seen, remedy)


REMEDY = "Install a C++ compiler (apt install g++, conda install gxx), or --set tune.compile=false"
CHECKS = (
    Check(SDPA["float32"], partial(sdpa, kind="float32"), "Install another torch"),
    Check(SDPA["bfloat16"], partial(sdpa, kind="bfloat16"), "--set trainer.precision=32-true"),
    Check("sdpa's kernels", kernels, "Report this line; --set tune.attention=flex_attention goes without sdpa"),
    Check(COMPILE, compiles, REMEDY),
    Check(FORWARD, partial(flex, backward=False), "Use --set tune.attention=sdpa here"),
    Check(BACKWARD, partial(flex, backward=True), "Use --set tune.attention=sdpa here"),
)
