"""Shared pieces of the tests of the benchmark."""

import pytest


@pytest.fixture
def known_rates(monkeypatch):
    """Measuring the machine takes seconds, and is not what these tests are about."""
    from zipar_train.benchmark import decode, rows, train
    from zipar_train.benchmark.roofline import Rates

    for module in (decode, rows, train):
        monkeypatch.setattr(module, "measure", lambda *_: Rates(copy=1e10, matmul=1e11))
