"""Shared pieces of the tests of recipes."""

import pytest


@pytest.fixture
def as_before():
    """Trainers set what holds for all of torch."""
    import torch

    yield
    torch.use_deterministic_algorithms(False)
    torch.autograd.set_detect_anomaly(False)
    torch.backends.cudnn.benchmark = False


@pytest.fixture
def file(tmp_path):
    return tmp_path / "spoilt.yaml"
