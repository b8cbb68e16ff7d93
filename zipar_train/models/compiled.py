"""Compilation of a model's layers with torch.compile, one layer at a time."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit

RECOMPILE_LIMIT = 64  # PyTorch's is 8; a layer needs one version per dtype, mode and number of mask dimensions


class LimitTold(logging.Handler):
    """A log handler that prints one clear message when PyTorch stops compiling and continues uncompiled."""

    said = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self.said and "recompile_limit" in record.getMessage():
            self.said = True
            print(
                f"torch.compile has made {torch._dynamo.config.recompile_limit} versions of a layer, the most that are "
                "allowed: calls of other shapes run uncompiled and slowly from now on. Use fewer batch sizes and "
                "windows at once, or leave torch.compile out (tune.compile = false)",
                file=sys.stderr,
                flush=True,
            )


def compile_layers(body: nn.Module, *, dynamic: bool | None = None) -> None:
    """Compile each layer of a decoder body in place; the names of weights do not change.

    All layers of a model share their code and their compiled graphs, so compilation costs as much as for one layer:
    38 s instead of 164 s for LlamaGen-L's forward and backward pass with a static and a dynamic length, on two CPU
    cores. Norms, embeddings and the head are not compiled. Under FSDP, compile before `fully_shard`.

    After `RECOMPILE_LIMIT` versions, PyTorch runs a layer uncompiled; a message is printed on stderr.

    Args:
        body: A module with its decoder layers in `body.layers`.
        dynamic: As in `torch.compile`.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    log = logging.getLogger("torch._dynamo.convert_frame")
    if not any(isinstance(handler, LimitTold) for handler in log.handlers):
        log.addHandler(LimitTold())
    for layer in body.layers:  # type: ignore[union-attr]
        layer.compile(dynamic=dynamic)


@contextmanager
def never_silently_eager() -> Iterator[None]:
    """Raise an error where torch.compile would stop compiling.

    At its limit of versions of a function, PyTorch prints a warning and continues uncompiled, many times slower.

    Raises:
        RuntimeError: At the limit; names the remedy.
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
