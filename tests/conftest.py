"""Shared pieces: a tiny recipe, its shards, and the command line as a person runs it."""

import isolated  # first of all: what follows reads the environment

# isort: split
# Nothing here imports torch outside functions: the process that hands tests to the workers does without.
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ordered
import pytest
from commands import TINY, command
from forked import completed, end_all
from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir

from zipar_train import cli as module
from zipar_train.recipe.load import load_recipe
from zipar_train.recipe.schema import Recipe

set_hypothesis_home_dir(Path(__file__).parents[1] / ".hypothesis")  # else it is where pytest was started
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("exploring", deadline=None)
settings.load_profile("exploring" if os.environ.get("ZIPAR_FUZZ") else "repeatable")


def pytest_collection_modifyitems(config, items):
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
        items[:] = ordered.for_workers(items, workers)


@pytest.fixture(scope="session", autouse=True)
def _empty_folder(tmp_path_factory):
    """Fixtures that tests share are made in an empty folder."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("empty"))
    yield
    os.chdir(before)


@pytest.fixture(autouse=True)
def _isolated(monkeypatch, tmp_path):
    """A test starts in a folder of its own, with the environment of `isolated` and one thread; it leaves no process."""
    import torch

    monkeypatch.chdir(tmp_path)
    isolated.restore()
    torch.set_num_threads(1)
    yield
    end_all()
    isolated.restore()


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """The digits' shards."""
    from zipar_train.data.tokenize import tokenize

    folder = tmp_path_factory.mktemp("data") / "digits"
    for split in ("train", "val"):
        tokenize(load_recipe("digits"), images="digits", out=folder, split=split, progress=False)
    return folder


@pytest.fixture(scope="session")
def classifier(shards, tmp_path_factory) -> Path:
    """A folder with the digits' classifier, as an evaluation with the recipe's settings trains it and keeps it."""
    from zipar_train.data.loader import ShardLoader
    from zipar_train.evaluation.scores.classifier import trained
    from zipar_train.models.tokenizers.base import Palette

    folder = tmp_path_factory.mktemp("classifier")
    loader = ShardLoader(shards / "train.json", batch_size=32, shuffle=10000)
    trained(folder / "classifier.safetensors", loader, Palette.grey(17))
    return folder


@pytest.fixture
def kept_classifier(classifier):
    """Put the digits' classifier into the folder of an evaluation, so that this one need not train it."""
    return lambda out: shutil.copytree(classifier, out, dirs_exist_ok=True)


@pytest.fixture(scope="session")
def made_tiny(shards) -> list[str]:
    """Overrides that make any digits recipe tiny."""
    return [*TINY, f"data.train={shards}/train.json", f"data.val={shards}/val.json"]


@pytest.fixture
def tiny(made_tiny, tmp_path) -> list[str]:
    """Overrides that make any digits recipe tiny and put its run under tmp_path / "run"."""
    return [*made_tiny, f"run_dir={tmp_path}/run"]


@pytest.fixture
def tiny_recipe(tiny) -> Recipe:
    return load_recipe("digits-base", tiny)


@pytest.fixture(scope="session")
def trained(shards, tmp_path_factory):
    """A tiny run folder, one epoch."""
    from zipar_train.training.fit import fit

    folder = tmp_path_factory.mktemp("trained") / "digits-base"
    data = [f"data.train={shards}/train.json", f"data.val={shards}/val.json"]
    fit(load_recipe("digits-base", [*TINY, *data, f"run_dir={folder}", "trainer.max_epochs=1"]))
    return folder


@pytest.fixture
def run(capsys, monkeypatch):
    """Run `zipar-train ARGS` in this process; returns (status, stdout, stderr)."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["zipar-train", *map(str, args)])
        status = 0
        try:
            module.main()
        except SystemExit as end:
            status = end.code or 0
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def cli(tmp_path_factory):
    """Run `zipar-train ARGS` in a process of its own, forked; returns the finished process."""
    folder = tmp_path_factory.mktemp("said")

    def call(*args, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return completed(*args, folder=folder, env={"WANDB_MODE": "offline", **(env or {})})

    return call


@pytest.fixture
def fresh_cli(tmp_path):
    """Run `zipar-train ARGS` in a new interpreter; returns the finished process."""

    def call(*args, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "WANDB_MODE": "offline", **(env or {})}
        return subprocess.run(
            command(*args), capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240
        )

    return call


@pytest.fixture(scope="session")
def vq(tmp_path_factory) -> Path:
    """A small VQ-16 of 24 codes in the published layout."""
    import original
    import torch

    path = tmp_path_factory.mktemp("vq") / "vq_ds16_c2i.pt"
    torch.save({"model": original.random_vq()[0]}, path)
    return path


@pytest.fixture(scope="session")
def t5(tmp_path_factory) -> Path:
    """A tiny random T5 with a tokenizer of words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("t5")
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "blue", "red", "car", "house", "small"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(vocab_size=9, d_model=6, d_kv=4, d_ff=8, num_layers=2, num_heads=2, pad_token_id=0)
    T5EncoderModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory) -> Path:
    """Inception's architecture at random weights that keep signals at their size."""
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Bare(FeatureExtractorInceptionV3):
        def load_state_dict(self, *args, **kwargs):
            """No weights yet."""

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "none.pth")
    torch.manual_seed(0)
    network = Bare("bare", ["2048"], feature_extractor_weights_path=str(folder / "none.pth"))
    for part in network.modules():
        if isinstance(part, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
    path = folder / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    """A tiny random CLIP with its processor."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(97, 123)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(words), "max_position_embeddings": 20, "bos_token_id": 52, "eos_token_id": 53}
    vision = {**small, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(folder)
    return folder
