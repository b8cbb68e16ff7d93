"""Shared pieces: a tiny recipe, its shards, and the command line as a person runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zipar_train.recipe import load_recipe
from zipar_train.sections import Recipe
from zipar_train.tokenize import tokenize

TINY = ["model.depth=1", "model.heads=2", "model.width=16", "model.feed_forward=32", "log.wandb=disabled",
        "evaluate.images=20", "evaluate.seeds=[0]", "trainer.accelerator=cpu"]  # fmt: skip


@pytest.fixture(autouse=True)
def _two_threads():
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """The digits' shards."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    tokenize(load_recipe("digits"), images="digits", out=folder, progress=False)
    return folder


@pytest.fixture
def tiny(shards, tmp_path):
    """Overrides that make any digits recipe tiny and put its run under tmp_path / "run"."""
    return [*TINY, f"data.train={shards}/train.json", f"data.val={shards}/val.json", f"run={tmp_path}/run"]


@pytest.fixture
def tiny_recipe(tiny) -> Recipe:
    return load_recipe("digits-base", tiny)


def sets(overrides: list[str]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


def command(*args: str) -> list[str]:
    return [sys.executable, "-c", "from zipar_train.cli import main; main()", *map(str, args)]


@pytest.fixture
def cli(tmp_path):
    """Run `zipar-train ARGS` in an empty folder; returns the finished process."""

    def run(*args, env: dict[str, str] | None = None, **kwargs) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "WANDB_MODE": "offline", **(env or {})}
        return subprocess.run(
            command(*args), capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240, **kwargs
        )

    return run
