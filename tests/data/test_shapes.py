"""Images that are not square: height and width stay apart, from the grid to files, sheets and scores."""

from pathlib import Path

import numpy as np
import pytest
import torch
from commands import TINY, picture, sets
from PIL import Image

from zipar_train.decoding.generator import Generator, Images
from zipar_train.evaluation.candidates import scored
from zipar_train.evaluation.report.plots import plot_samples
from zipar_train.evaluation.sample_set import SampleSet
from zipar_train.evaluation.scores.adm_npz import read_reference, write_images
from zipar_train.evaluation.scores.reference import open_reference
from zipar_train.models.family import build
from zipar_train.models.restore import LoadedWeights
from zipar_train.models.tokenizers.base import Palette
from zipar_train.models.tokenizers.vq16 import load_vq16
from zipar_train.recipe.load import RecipeError, load_recipe
from zipar_train.training.callbacks.samples import _enlarged

WIDE = [*TINY, "model.grid=[6,8]"]


def drawn(tmp_path, *more: str) -> SampleSet:
    """Three images of 6 x 8 codes."""
    torch.manual_seed(0)
    recipe = load_recipe("digits-base", [*WIDE, *more])
    generator = Generator(
        recipe, LoadedWeights(tmp_path, recipe, build(recipe.model).model.state_dict(), {}), device="cpu"
    )
    found = SampleSet(
        root=tmp_path,
        generator=generator,
        weights="x",
        conditions=[0, 1, 2],
        origin="x",
        window=8,
        seed=0,
        batch_size=2,
        sampling=recipe.sampling,
        size=scored(recipe),
    )
    found.make(progress=False)
    return found


def test_files_of_images_have_height_and_width(tmp_path):
    wide = drawn(tmp_path)
    file = wide.write_npz()
    pixels = torch.cat(list(wide.pixels())).permute(0, 2, 3, 1).numpy()
    assert pixels.shape == (3, 6, 8, 3)
    assert np.array_equal(np.load(file)["arr_0"], pixels)
    assert file.name.endswith("-6x8px.npz")
    assert read_reference(file).size == (6, 8)
    folder = wide.write_png()
    assert Image.open(folder / "000002.png").size == (8, 6)
    assert np.array_equal(np.asarray(Image.open(folder / "000002.png")), pixels[2])


def test_images_are_resized_in_their_proportion(tmp_path, vq):
    resized = drawn(tmp_path, "evaluate.resize_to=12")
    assert torch.cat(list(resized.pixels())).shape == (3, 3, 12, 16)
    assert scored(load_recipe("digits-base", ["evaluate.resize_to=12"])) == (12, 12)
    assert scored(load_recipe("digits-base", WIDE)) is None
    with pytest.raises(RecipeError, match="evaluate.resize_to = 13: no whole pixels for 6 x 8 codes"):
        load_recipe("digits-base", [*WIDE, "evaluate.resize_to=13"])
    codes = torch.randint(24, (1, 2, 3))
    assert load_vq16(str(vq), codes=24).decode(codes, size=(20, 30)).shape == (1, 3, 20, 30)


class Plain:
    """Pixels as features."""

    name, weights, inception = "plain", "0", False

    def layer(self, score):
        return "x"

    def __call__(self, pictures, *, spatial=False, batch_size=64):
        from zipar_train.evaluation.scores.features import Features

        assert len(pictures)
        return Features({"x": torch.stack([pictures[i] for i in range(len(pictures))]).flatten(1).float()})


def test_references_are_cropped_to_height_and_width(tmp_path):
    for k in range(12):
        picture(k, size=(50, 40)).save(tmp_path / f"{k:02d}.png")
    found = open_reference(str(tmp_path), Plain(), tokenizer=Palette.grey(2), size=(20, 40))
    assert found.features.layers["x"].shape == (12, 3 * 20 * 40)
    with pytest.raises(ValueError, match="has 40 x 50 pixels, the generated images 41 x 20"):
        open_reference(str(tmp_path), Plain(), tokenizer=Palette.grey(2), size=(41, 20))
    images = torch.randint(256, (12, 3, 6, 8), dtype=torch.uint8)
    write_images(tmp_path / "x.npz", images.split(5), count=12, size=(6, 8))
    file = open_reference(str(tmp_path / "x.npz"), Plain(), tokenizer=Palette.grey(2), size=(6, 8))
    assert torch.equal(file.features.layers["x"], images.flatten(1).float())
    with pytest.raises(ValueError, match="its images have 6 x 8 pixels, the generated ones 8 x 6"):
        open_reference(str(tmp_path / "x.npz"), Plain(), tokenizer=Palette.grey(2), size=(8, 6))


@pytest.mark.parametrize(("height", "width"), [(4, 12), (12, 4), (8, 8)])
def test_sheets_and_plots_of_any_shape(tmp_path, height, width):
    pixels = torch.randint(256, (3, 3, height, width), dtype=torch.uint8)
    sheet = Images(torch.zeros(3, 1, 1), torch.ones(3), pixels).sheet()
    scale, gap = 96 // max(height, width), max(2, 96 // max(height, width) // 2)
    assert sheet.size == (3 * (scale * width + gap) + gap, scale * height + 2 * gap)
    assert max(_enlarged(Image.new("RGB", (width, height))).size) == 96
    plot_samples({("run", 8): pixels, ("run", 1): pixels}, tmp_path / "samples.png")
    assert Image.open(tmp_path / "samples.png").size[0] > 0


@pytest.mark.slow
def test_a_recipe_of_a_wide_grid_is_evaluated_against_pictures(tmp_path, run):
    """From pictures to a report: the reference a folder, the images written for ADM too."""
    for k in range(30):
        (tmp_path / "p" / f"class{k % 3}").mkdir(parents=True, exist_ok=True)
        picture(k, size=(8, 6)).save(tmp_path / "p" / f"class{k % 3}" / f"{k}.png")
    settings = sets(
        [
            *WIDE,
            "model.num_classes=3",
            f"data.train={tmp_path}/s/train.json",
            f"run_dir={tmp_path}/run",
            f"data.val={tmp_path}/s/train.json",
            "trainer.max_epochs=1",
            "data.micro_batch_size=8",
            "optim.global_batch_size=8",
            "trainer.limit_train_batches=1",
            "evaluate.windows=[8]",
            "zipar.windows={8: 1}",
            "trainer.check_val_every_n_epoch=1",
            f"evaluate.reference={tmp_path}/p",
        ]
    )
    common = ["--recipe", "digits-base", *settings]
    for command in (
        ["tokenize", *common, "--images", tmp_path / "p", "--out", tmp_path / "s"],
        ["fit", *common],
        ["evaluate", *common, "--checkpoint", tmp_path / "run", "--npz", "--png"],
    ):
        status, out, err = run(*command)
        assert status == 0, err
    assert "6 x 8 px" in Path(tmp_path / "run/evaluation/report.md").read_text()
    (npz,) = (tmp_path / "run/evaluation/samples").glob("*.npz")
    assert np.load(npz)["arr_0"].shape == (20, 6, 8, 3)
