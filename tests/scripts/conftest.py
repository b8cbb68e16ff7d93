"""Shared pieces of the tests of scripts."""

import importlib

import pytest
from gpu_scripts import SCRIPTS


@pytest.fixture
def gpu(monkeypatch):
    """A module of scripts/gpu by its name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module
