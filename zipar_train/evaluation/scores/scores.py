"""Scores of generated images from features, by torch-fidelity's own functions, each with its uncertainty.

From a single seed the uncertainty is estimated from the images: for FID by a jackknife over tenths of the images, for
KID from the spread of its subsets, for IS from its ten splits, for shares of images (precision, recall, class
accuracy) by the binomial formula, and for means (CLIP) by the standard error. For sFID it is not estimated.
"""

from math import sqrt
from statistics import fmean, mean, stdev
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from zipar_train.evaluation.scores.adm_npz import Statistics
from zipar_train.evaluation.scores.features import Extractor, Features, Moments
from zipar_train.evaluation.scores.reference import Reference

GROUPS = 10
SUBSETS, SUBSET = 100, 1000  # number and size of KID's subsets, torch-fidelity's defaults
DISTANCES = 2**24  # pairwise distances in memory at once, for precision and recall


class Score(BaseModel):
    """Score with its standard deviation over seeds, or, from one seed, its estimated uncertainty."""

    mean: float
    std: float | None  # None: not estimated


def over_seeds(scores: list[Score]) -> Score:
    """Combine the scores of several seeds into their mean and standard deviation."""
    if len(scores) == 1:
        return scores[0]
    values = [score.mean for score in scores]
    return Score(mean=mean(values), std=stdev(values))


def fidelity(generated: Features, reference: Reference, extractor: Extractor, *, kid: bool = True) -> dict[str, Score]:
    """Compute FID, KID, IS, precision, recall and sFID, as far as the reference allows.

    Args:
        generated: Features of the generated images.
        reference: The reference.
        extractor: The feature network.
        kid: False: skip KID, whose 100 subsets take seconds on a CPU.
    """
    features = {score: generated.layers[extractor.layer(score)] for score in ("fid", "kid", "isc", "prc")}
    inception_score = isc_features_to_metric(features["isc"])
    scores = {
        "fid": _fid(features["fid"], reference.statistics),
        "isc": Score(mean=inception_score[KEY_METRIC_ISC_MEAN], std=inception_score[KEY_METRIC_ISC_STD] / sqrt(GROUPS)),
    }
    if generated.spatial and reference.spatial:
        scores["sfid"] = Score(mean=frechet(generated.spatial.statistics(), reference.spatial), std=None)
    if reference.features is not None:
        if kid:
            real = reference.features.layers[extractor.layer("kid")]
            size = subset_size(len(generated), len(real))
            found = kid_features_to_metric(
                features["kid"], real, kid_subsets=SUBSETS, kid_subset_size=size, verbose=False
            )
            scores["kid"] = Score(
                mean=found[KEY_METRIC_KID_MEAN],
                std=found[KEY_METRIC_KID_STD] * sqrt(size / min(len(generated), len(real))),
            )
        device, real = extractor.device, reference.features.layers[extractor.layer("prc")]
        rows = max(1, DISTANCES // max(len(generated), len(real)))
        balls = prc_features_to_metric(
            features["prc"].to(device), real.to(device), save_cpu_ram=True, prc_batch_size=rows, verbose=False
        )
        scores["precision"] = share(balls[KEY_METRIC_PRECISION], len(generated))
        scores["recall"] = share(balls[KEY_METRIC_RECALL], len(real))
    return scores


def subset_size(generated: int, real: int) -> int:
    """Return the size of KID's subsets: 1000, or half of the images if there are fewer, so that subsets differ."""
    return min(SUBSET, (min(generated, real) + 1) // 2)


def share(value: float, count: int) -> Score:
    """Return the score of a share of `count` images, with its binomial standard error."""
    return Score(mean=value, std=sqrt(value * (1 - value) / count))


def average(values: Tensor) -> Score:
    """Return the mean of one value per image, with its standard error."""
    numbers = values.double().tolist()
    return Score(mean=fmean(numbers), std=stdev(numbers) / sqrt(len(numbers)))


def frechet(a: Statistics, b: Statistics) -> float:
    """Return the Frechet distance of two normal distributions, by torch-fidelity."""
    return fid_statistics_to_metric(a, b, verbose=False)[KEY_METRIC_FID]


def _fid(features: Tensor, reference: Statistics) -> Score:
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))  # images may be ordered by class
    parts = [Moments() for _ in range(GROUPS)]
    for number, part in enumerate(parts):
        part.add(features[order[number::GROUPS]])
    whole = Moments(
        count=sum(part.count for part in parts),
        total=sum(part.total for part in parts),
        products=sum(part.products for part in parts),
    )
    value = frechet(whole.statistics(), reference)
    root = _root(reference["sigma"])
    rest = [
        Moments(whole.count - part.count, whole.total - part.total, whole.products - part.products) for part in parts
    ]
    values = [_distance(moments.statistics(), reference, root) for moments in rest]
    return Score(mean=value, std=sqrt((GROUPS - 1) / GROUPS * sum((v - fmean(values)) ** 2 for v in values)))


def _root(matrix: NDArray[Any]) -> Tensor:
    """Return the symmetric square root of a covariance matrix."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(matrix))
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _distance(a: Statistics, b: Statistics, root: Tensor) -> float:
    """Return `frechet(a, b)`, ten times as fast at 2048 features; `root` is the square root of b's covariance."""
    middle = torch.linalg.eigvalsh(root @ torch.from_numpy(a["sigma"]) @ root).clamp(min=0).sqrt().sum().item()
    return float(((a["mu"] - b["mu"]) ** 2).sum() + np.trace(a["sigma"]) + np.trace(b["sigma"]) - 2 * middle)
