"""Numbers about a generator that take no set of drawn images: exact bits a code, milliseconds an image."""

from collections.abc import Callable, Mapping
from math import log
from statistics import median
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor

from zipar_train.data.loader import ShardLoader
from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.generator import Generator
from zipar_train.models.family import target_hidden_states
from zipar_train.plan.masks import dense
from zipar_train.plan.table import Plan
from zipar_train.recipe.schema import Draw
from zipar_train.training.loss import losses

Key = TypeVar("Key")


@torch.inference_mode()
def bits_per_code(generator: Generator, plan: Plan, loader: ShardLoader, *, images: int | None = None) -> float:
    """Mean -log2 p(code) of given images under the plan's mask: exact, no sampling, no guidance.

    Args:
        images: the loader's first, at most; None: all.
    """
    family = generator.drawing
    mask, device = dense(plan, device=family.model.device), family.model.device
    total, codes, counted = 0.0, 0, 0
    for batch in loader:
        left = len(batch.codes) if images is None else images - counted
        drawn = batch.codes[:left].to(device)
        hidden = target_hidden_states(family, plan, drawn, family.check(batch.condition[:left]), mask)
        total += losses(family.head, hidden, drawn, size=family.codes)[0].double().item() * drawn.numel()
        codes, counted = codes + drawn.numel(), counted + len(drawn)
        if counted == images:
            break
    return total / codes / log(2)


def bits_by_drawing(decoder: Decoder, loader: ShardLoader, *, images: int | None = None) -> float:
    """`bits_per_code` of a decoder that no mask describes: about what drawing as many images costs.

    It draws, and after every pass given codes take the place of what it has drawn.

    Args:
        images: the loader's first, at most; None: all.

    Raises:
        BatchTooLarge: for more images in a batch of the loader than memory holds.
    """
    device, total, codes, counted = decoder.family.model.device, 0.0, 0, 0
    for batch in loader:
        given = batch.codes[: len(batch.codes) if images is None else images - counted].to(device)
        condition = decoder.family.check(batch.condition[: len(given)])

        def replace(target: Tensor, logits: Tensor, given: Tensor = given) -> None:
            nonlocal total
            assert decoder.canvas is not None
            wanted = given[:, target]
            total -= logits.double().log_softmax(-1).gather(-1, wanted[..., None]).sum().item()
            decoder.canvas.tokens.index_copy_(1, target, wanted)

        decoder(condition, torch.zeros(len(given), decoder.numbers), Draw(), observe=replace)
        codes, counted = codes + given.numel(), counted + len(given)
        if counted == images:
            break
    return total / codes / log(2)


def milliseconds(ways: Mapping[Key, Callable[[], Any]], *, rounds: int = 9, seconds: float = 60) -> dict[Key, float]:
    """Median time of each way of drawing an image.

    Over rounds in which every way has its turn, so that a machine that slows down or speeds up does so for all alike;
    the first round is not counted. Rounds stop early, though not before the third, when they have taken `seconds`.
    """
    times: dict[Key, list[float]] = {key: [] for key in ways}
    start = perf_counter()
    for turn in range(rounds + 1):
        if turn > 3 and perf_counter() - start > seconds:
            break
        for key, taken in times.items():
            began = perf_counter()
            ways[key]()
            taken.append((perf_counter() - began) * 1000)
    return {key: median(taken[1:]) for key, taken in times.items()}
