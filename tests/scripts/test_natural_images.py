"""`scripts/evidence/run natural` on a few random images and a model of nothing."""

import json
from dataclasses import replace
from pathlib import Path

import natural
import numpy as np
import pytest
import torch
from PIL import Image

from zipar_train.data.loader import ShardLoader
from zipar_train.data.shards import read_manifest
from zipar_train.models.tokenizers.base import Palette

ROOT = Path(__file__).parents[2]
FEW = [[200, 30, 30], [30, 200, 30], [30, 30, 200], [250, 250, 250]]


@pytest.fixture
def images(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "evidence"))
    import natural_images

    return natural_images


def write_pictures(folder, *, classes=3, each=2, colours=FEW):
    """Pictures of blocks of some colours, larger than the grid and not square."""
    rng = np.random.default_rng(0)
    for number in range(classes):
        (folder / f"n{number}").mkdir(parents=True)
        for picture in range(each):
            blocks = np.array(colours, np.uint8)[rng.integers(len(colours), size=(24, 24))]
            square = blocks.repeat(3, 0).repeat(3, 1)
            Image.fromarray(np.pad(square, ((0, 0), (9, 9), (0, 0)))).save(folder / f"n{number}" / f"{picture}.png")


def test_pictures_become_codes_of_the_nearest_colours(images, tmp_path, monkeypatch):
    """Few colours are found exactly: decoded, the codes are the averaged middle of the picture."""
    monkeypatch.setattr(images, "COLOURS", 4)
    write_pictures(tmp_path / "train")
    palette = images.colour_shards(tmp_path / "train", tmp_path / "shards" / "train.json", None)
    assert sorted(palette.colours.tolist()) == sorted(FEW)
    assert palette.colours.sum(1).tolist() == sorted(palette.colours.sum(1).tolist())  # from dark to light
    assert np.load(tmp_path / "shards" / "colours.npy").tolist() == palette.colours.tolist()
    (batch,) = ShardLoader(tmp_path / "shards" / "train.json", batch_size=6)
    assert sorted(batch.condition.tolist()) == [0, 0, 1, 1, 2, 2]
    wanted = {images.small(path).astype(np.uint8).tobytes() for path in images.pictures(tmp_path / "train")}
    pixels = palette.decode(batch.codes.view(-1, 24, 24)).permute(0, 2, 3, 1)
    assert {one.numpy().tobytes() for one in pixels} == wanted

    other = Palette(torch.tensor(FEW[::-1], dtype=torch.uint8))  # given: not searched again
    assert images.colour_shards(tmp_path / "train", tmp_path / "other" / "val.json", other) is other
    assert not (tmp_path / "other" / "colours.npy").exists()


def test_distances_are_to_the_first_shard(images, tmp_path):
    write_pictures(tmp_path / "train")
    manifest = tmp_path / "train.json"
    images.colour_shards(tmp_path / "train", manifest, Palette(torch.tensor(FEW, dtype=torch.uint8)))
    few = read_manifest(images.first_shard(manifest))
    assert few.samples == read_manifest(manifest).shards[0].samples and len(few.shards) == 1


@pytest.mark.slow(seconds=150)
@pytest.mark.timeout(900)
def test_a_dataset_is_trained_measured_and_told(images, tmp_path, monkeypatch):
    """The real commands, from pictures to the table; a second call measures nothing."""
    import measured
    import models
    import tables

    inputs = tmp_path / "inputs"
    inputs.mkdir()
    natural.write_inputs(inputs)
    for split in ("train", "val"):
        many = np.random.default_rng(1).integers(256, size=(256, 3))
        write_pictures(inputs / "imagenette2" / split, classes=10, each=4, colours=many)
    tiny = ("model.num_layers=1", "model.hidden_size=16", "model.ffn_size=32", "data.micro_batch_size=4")
    tiny += ("evaluate.images=12", "evaluate.windows=[24, 2, 1]", "trainer.max_steps=2")
    data = tuple(f"data.{split}={tmp_path}/data/{split}.json" for split in ("train", "val"))
    more = {name: (*getattr(images.IMAGENETTE, name), *tiny, *data) for name in ("base_overrides", "overrides")}
    dataset = replace(images.IMAGENETTE, windows=(24, 2, 1), reported=tmp_path / "data" / "val.json", **more)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(models, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(models, "PICTURES", tmp_path / "none")
    monkeypatch.setattr(measured, "FILE", tmp_path / "measured.json")
    monkeypatch.setattr(measured, "code_revision", lambda: "abc1234")
    monkeypatch.setattr(tables, "DOCS", tmp_path / "docs")
    for name, value in (
        ("IMAGENETTE", dataset),
        ("OUT", tmp_path / "out"),
        ("PICTURES", tmp_path),
        ("PALETTE", tmp_path / "data" / "colours.npy"),
        ("DATA", tmp_path),
    ):
        monkeypatch.setattr(images, name, value)
    palette = images.colour_shards(inputs / "imagenette2" / "train", tmp_path / "data" / "train.json", None)
    images.colour_shards(inputs / "imagenette2" / "val", dataset.reported, palette)
    monkeypatch.setattr(images, "inputs", lambda folder: None)
    found = images.results(dataset, inputs)
    assert json.loads((tmp_path / "measured.json").read_text())["natural images: imagenette"]["value"] == found
    assert {*found["bits"]} == {tables.UNTUNED, tables.TUNED, tables.CONTROL}
    for told in found["bits"].values():
        assert {*told["bits"]} == {"24", "2", "1"} and all(7 < bits < 9 for bits in told["bits"].values())
    rows = found["distances"]["rows"]
    assert [(row["mode"], row["window"]) for row in rows] == 3 * [
        *(("planned", window) for window in (24, 2, 1)),
        *(("adaptive", window) for window in (2, 1)),
    ]
    assert [row["passes"] for row in rows[:3]] == [576, 24 + 24 + 22 * 2, 24 + 24 + 22]
    assert (tmp_path / "imagenette.jpg").read_bytes().startswith(b"\xff\xd8")
    assert images.distances(dataset, None)[tables.TUNED, "planned", 24] == rows[5]["fid"]["mean"]
    assert images.results(dataset, None) == found

    monkeypatch.setattr(images, "TINY_IMAGENET", dataset)
    images.natural(inputs)
    lines = (tmp_path / "out" / "natural.md").read_text().splitlines()
    assert len([line for line in lines if line.startswith("| Imagenette, 24 x 24 colours | untuned | ")]) == 6
