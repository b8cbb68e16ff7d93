"""Numbers about a generator: exact bits a code, milliseconds an image, and torch-fidelity's scores."""

from collections.abc import Mapping, Sequence
from math import log
from statistics import median
from time import perf_counter

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from zipar_train.decoding.generator import Generator
from zipar_train.loader import ShardLoader
from zipar_train.masks import dense
from zipar_train.models.family import teacher_forced
from zipar_train.plan import Plan


@torch.inference_mode()
def bits_per_code(generator: Generator, plan: Plan, loader: ShardLoader) -> float:
    """Mean -log2 p(code) of given images under the plan's mask: exact, no sampling, no guidance."""
    family = generator.drawing
    mask, device = dense(plan, device=family.model.device), family.model.device
    total = codes = 0.0
    for batch in loader:
        drawn = batch.codes.to(device)
        logits = teacher_forced(family, plan, drawn, family.check(batch.condition), mask)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total += cross_entropy(logits.flatten(0, 1), drawn.flatten(), reduction="sum").double().item()
        codes += drawn.numel()
    return total / codes / log(2)


def milliseconds(
    generators: Mapping[str, Generator], windows: Sequence[int], *, rounds: int = 9
) -> dict[tuple[str, int], float]:
    """Median time of drawing one image alone (label 0), by generator and window.

    The median is over rounds in which every generator and window has its turn, so that a machine that slows down or
    speeds up does so for all alike; the first round is not counted.
    """
    times: dict[tuple[str, int], list[float]] = {(name, window): [] for name in generators for window in windows}
    for _ in range(rounds + 1):
        for (name, window), taken in times.items():
            start = perf_counter()
            generators[name].draw([0], window=window)
            taken.append((perf_counter() - start) * 1000)
    return {key: median(taken[1:]) for key, taken in times.items()}


class _Pictures(Dataset):
    def __init__(self, pixels: Tensor):
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        return self.pixels[index]


def fidelity(drawn: Tensor, reference: Tensor, *, features: str) -> dict[str, float]:
    """FID, KID, precision and recall by torch-fidelity.

    Args:
        drawn, reference: uint8 (B, 3, px, px).
        features: a feature extractor's name that torch-fidelity knows.
    """
    from torch_fidelity import calculate_metrics

    scores = calculate_metrics(
        input1=_Pictures(drawn),
        input2=_Pictures(reference),
        feature_extractor=features,
        cuda=False,
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=min(1000, len(drawn), len(reference)),
        batch_size=256,
        save_cpu_ram=True,
        cache=False,
        verbose=False,
    )
    return {
        "fid": float(scores["frechet_inception_distance"]),
        "kid": float(scores["kernel_inception_distance_mean"]),
        "precision": float(scores["precision"]),
        "recall": float(scores["recall"]),
    }
