"""Measurements of a generator that need no sample set: exact bits per code, milliseconds per image."""

from collections.abc import Callable, Mapping
from math import log
from statistics import median
from time import perf_counter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from zipar_train.data.loader import ShardLoader
from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.sampling import code_seeds
from zipar_train.models.family import Family, target_hidden_states
from zipar_train.plan.masks import dense
from zipar_train.plan.table import Plan
from zipar_train.recipe.schema import SamplingParams
from zipar_train.training.loss import losses

Key = TypeVar("Key")
ROUNDS = 9  # at most, that `milliseconds` counts


@torch.inference_mode()
def bits_per_code(family: Family, plan: Plan, loader: ShardLoader, *, images: int | None = None) -> float:
    """Return the mean -log2 p(code) of given images under the plan's mask: exact, without sampling or guidance.

    Args:
        family: The generator.
        plan: The plan that defines the mask.
        loader: Loader of the images.
        images: Use at most this many images, the loader's first. None: all.
    """
    mask, device = dense(plan, device=family.model.device), family.model.device
    total, codes, counted = 0.0, 0, 0
    for batch in loader:
        left = len(batch.codes) if images is None else images - counted
        codes_given = batch.codes[:left].to(device)
        hidden = target_hidden_states(family, plan, codes_given, family.check(batch.condition[:left]), mask)
        nll = losses(family.head, hidden, codes_given, size=family.codebook_size)[0]
        total += nll.double().item() * codes_given.numel()
        codes, counted = codes + codes_given.numel(), counted + len(codes_given)
        if counted == images:
            break
    return total / codes / log(2)


def bits_by_decoding(decoder: Decoder, loader: ShardLoader, *, images: int | None = None) -> float:
    """Return the bits per code of a decoder without an equivalent mask, at about the cost of generating the images.

    The decoder generates images, and after every pass the given codes replace the generated ones.

    Args:
        decoder: The decoder.
        loader: Loader of the images.
        images: Use at most this many images, the loader's first. None: all.

    Raises:
        BatchTooLarge: If a batch of the loader does not fit into memory.
    """
    device, total, codes, counted = decoder.family.model.device, 0.0, 0, 0
    for batch in loader:
        given = batch.codes[: len(batch.codes) if images is None else images - counted].to(device)
        condition = decoder.family.check(batch.condition[: len(given)])

        def replace(target: Tensor, logits: Tensor, given: Tensor = given) -> None:
            nonlocal total
            assert decoder.state is not None
            wanted = pad(given, (0, 2)).gather(1, target)
            found = logits.double().log_softmax(-1).gather(-1, wanted[..., None])[..., 0]
            total -= found[target < given.shape[1]].sum().item()
            decoder.state.tokens.scatter_(1, target, wanted)

        decoder(condition, code_seeds([0] * len(given), decoder.numbers, seed=0), SamplingParams(), observe=replace)
        codes, counted = codes + given.numel(), counted + len(given)
        if counted == images:
            break
    return total / codes / log(2)


def milliseconds(
    ways: Mapping[Key, Callable[[int], Any]], *, rounds: int = ROUNDS, seconds: float = 60
) -> dict[Key, float]:
    """Return the median time in milliseconds of each function that generates images.

    All functions run once per round, so slowdowns of the machine affect all equally. The first round is not counted.

    Args:
        ways: The functions, by key. Each takes the number of the round, 0 .. `rounds`, so that it can generate other
            images in every round. Round 0 is not counted.
        rounds: Number of counted rounds.
        seconds: Stop early after this time, with at least three counted rounds.
    """
    times: dict[Key, list[float]] = {key: [] for key in ways}
    start = perf_counter()
    for turn in range(rounds + 1):
        if turn > 3 and perf_counter() - start > seconds:
            break
        for key, taken in times.items():
            began = perf_counter()
            ways[key](turn)
            taken.append((perf_counter() - began) * 1000)
    return {key: median(taken[1:]) for key, taken in times.items()}
