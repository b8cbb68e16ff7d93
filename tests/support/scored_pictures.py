"""A few pictures in a folder, as the scores take them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from zipar_train.evaluation.scores.features import Pictures

CPU, COUNT = torch.device("cpu"), 12


def pixels(folder: Path) -> torch.Tensor:
    images = [np.array(Image.open(file)) for file in sorted(folder.glob("*.png"))]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def pictures(folder: Path, block: int = 7) -> Pictures:
    return Pictures(lambda: iter(pixels(folder).split(block)), COUNT)


FIDELITY = {  # our score: torch-fidelity's name
    "fid": "frechet_inception_distance",
    "kid": "kernel_inception_distance_mean",
    "isc": "inception_score_mean",
    "precision": "precision",
    "recall": "recall",
}


def assert_equal_scores(ours: dict, theirs: dict) -> None:
    """Compare scores with those that torch-fidelity computed."""
    for score, name in FIDELITY.items():
        assert ours[score].mean == pytest.approx(theirs[name], rel=1e-6, abs=1e-6), name
