"""torch.compile for a model's layers, one at a time."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit

RECOMPILE_LIMIT = 64  # PyTorch's is 8; a layer needs one version for each dtype, mode and rank of its mask


def compile_layers(body: nn.Module, *, dynamic: bool | None = None) -> None:
    """Compile each layer of a decoder body in place; names of weights stay as they are.

    All layers of a model share their code and their compiled graphs, so the cost is that of one layer: 38 s instead of
    164 s for LlamaGen-L's forward and backward pass with a static and a dynamic length, on two CPU cores. Norms,
    embeddings and the head stay uncompiled.

    Args:
        body: with its decoder layers in `body.layers`.
        dynamic: as in `torch.compile`.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    for layer in body.layers:  # type: ignore[union-attr]
        layer.compile(dynamic=dynamic)


@contextmanager
def never_silently_eager() -> Iterator[None]:
    """Fail where torch.compile would stop compiling.

    At its limit of versions of a function, PyTorch prints a warning and goes on uncompiled, many times slower.

    Raises:
        RuntimeError: at the limit; names the remedy.
    """
    limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    try:
        with torch._dynamo.config.patch(recompile_limit=limit, fail_on_recompile_limit_hit=True):
            yield
    except FailOnRecompileLimitHit as error:
        raise RuntimeError(
            f"a compiled layer has {limit} versions, PyTorch's limit, and this shape needs one more. Use fewer batch "
            "sizes and models in one process, call torch.compiler.reset(), raise torch._dynamo.config.recompile_limit, "
            "or do not compile"
        ) from error
