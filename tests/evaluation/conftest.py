"""Shared pieces of the tests of scores."""

from pathlib import Path

import pytest


@pytest.fixture
def few_groups(monkeypatch):
    """Error bars of 2048 features take half a minute with all ten groups; they have a test of their own."""
    from zipar_train.evaluation.scores import scores

    monkeypatch.setattr(scores, "GROUPS", 2)


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> list[Path]:
    """Two folders of pictures, the second smoother."""
    import numpy as np
    from PIL import Image
    from scored_pictures import COUNT

    found = []
    for number in range(2):
        folder = tmp_path_factory.mktemp(f"pictures{number}")
        rng = np.random.default_rng(number)
        for i in range(COUNT):
            small = Image.fromarray(rng.integers(0, 256, (9 - 3 * number, 9 - 3 * number, 3)).astype(np.uint8))
            small.resize((40, 40), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
        found.append(folder)
    return found


@pytest.fixture(scope="session")
def extractor(inception_weights):
    from scored_pictures import CPU

    from zipar_train.evaluation.scores.features import inception

    return inception(str(inception_weights), device=CPU)
