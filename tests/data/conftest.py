"""Shared pieces of the tests of data."""

import pytest


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of the library datasets for each test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
