"""Scores in the features of the digits' classifier, against their definitions and torch-fidelity; error bars."""

import shutil

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scored_pictures import assert_equal_scores

from zipar_train.data.loader import ShardLoader
from zipar_train.evaluation.scores.classifier import pixels_of, register, trained
from zipar_train.evaluation.scores.features import Pictures
from zipar_train.evaluation.scores.reference import open_reference
from zipar_train.evaluation.scores.scores import fidelity, subset_size
from zipar_train.models.tokenizers.base import Palette


@pytest.fixture
def network(shards, classifier):
    """The digits' classifier."""
    loader = ShardLoader(shards / "train.json", batch_size=32, shuffle=10000)
    return trained(classifier / "classifier.safetensors", loader, Palette.grey(17))


def pictures(shards, split):
    loader = ShardLoader(shards / f"{split}.json", batch_size=100)
    return torch.cat([pixels for pixels, _ in pixels_of(loader, Palette.grey(17), (8, 8))])


@pytest.mark.slow(seconds=25)
def test_the_classifier_learns_and_is_kept(shards, classifier, network, tmp_path):
    path = shutil.copytree(classifier, tmp_path / "kept") / "classifier.safetensors"
    loader = ShardLoader(shards / "val.json", batch_size=100)
    assert network.accuracy(pixels_of(loader, Palette.grey(17), (8, 8))) > 0.95
    again = trained(path, ShardLoader(shards / "train.json", batch_size=32, shuffle=10000), Palette.grey(17), epochs=20)
    assert register(again) == register(network)
    path.write_bytes(b"damaged")
    mended = trained(path, ShardLoader(shards / "train.json", batch_size=32, shuffle=10000), Palette.grey(17))
    assert register(mended) == register(network)
    other = trained(path, ShardLoader(shards / "val.json", batch_size=32), Palette.grey(17), epochs=1)
    assert register(other) != register(network)


def features_of(pixels, extractor):
    return extractor(Pictures(lambda: iter(pixels.split(50)), len(pixels)))


@pytest.mark.slow
def test_frechet_distance_is_its_definition_in_float64(shards, network):
    extractor = register(network)
    real, other = pictures(shards, "val"), pictures(shards, "train")[:300]
    reference = open_reference(str(shards / "val.json"), extractor, tokenizer=Palette.grey(17), size=(8, 8))
    scores = fidelity(features_of(other, extractor), reference, extractor)
    with torch.inference_mode():
        a, b = (network(x)[0].double().numpy() for x in (other, real))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert scores["fid"].mean == pytest.approx(expected, rel=1e-6)
    same = fidelity(features_of(real, extractor), reference, extractor)
    assert abs(same["fid"].mean) < 1e-3
    assert same["precision"].mean == same["recall"].mean == 1
    noise = torch.randint(0, 255, real.shape, dtype=torch.uint8)
    assert fidelity(features_of(noise, extractor), reference, extractor)["fid"].mean > 20 * scores["fid"].mean


def test_scores_of_the_small_network_are_torch_fidelitys(shards, network):
    """All but KID's, whose subsets are half as large here, through calculate_metrics as anyone would call it."""
    from torch_fidelity import calculate_metrics

    class Whole(torch.utils.data.Dataset):
        def __init__(self, pixels):
            self.pixels = pixels

        def __len__(self):
            return len(self.pixels)

        def __getitem__(self, index):
            return self.pixels[index]

    extractor = register(network)
    real, drawn = pictures(shards, "val"), pictures(shards, "train")[:300]
    theirs = calculate_metrics(
        input1=Whole(drawn),
        input2=Whole(real),
        feature_extractor=extractor.name,
        cuda=False,
        fid=True,
        kid=True,
        isc=True,
        prc=True,
        kid_subset_size=150,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
    )
    reference = open_reference(str(shards / "val.json"), extractor, tokenizer=Palette.grey(17), size=(8, 8))
    ours = fidelity(features_of(drawn, extractor), reference, extractor)
    assert subset_size(300, len(real)) == 150
    assert_equal_scores(ours, theirs)


def test_the_error_bar_of_one_seed_is_that_of_many_drawings(shards, network):
    """The jackknife of one set of pictures against the spread over disjoint sets of the same size."""
    extractor = register(network)
    reference = open_reference(str(shards / "val.json"), extractor, tokenizer=Palette.grey(17), size=(8, 8))
    loader = ShardLoader(shards / "train.json", batch_size=100)
    labels = torch.cat([labels for _, labels in pixels_of(loader, Palette.grey(17), (8, 8))])
    mixed = torch.randperm(1400, generator=torch.Generator().manual_seed(0))
    groups = [part[labels[part].argsort()] for part in mixed.split(200)]
    pixels = pictures(shards, "train")
    # classes in turn, so that every tenth picture is of one class, as far as there are as many of each
    groups = [torch.stack([part[i::20] for i in range(20)]).flatten() for part in groups]
    found = [fidelity(features_of(pixels[part], extractor), reference, extractor) for part in groups]
    for score in ("fid", "precision", "isc"):
        spread = np.std([one[score].mean for one in found], ddof=1)
        said = np.mean([one[score].std for one in found])
        assert 0.4 < said / spread < 2.5, (score, said, spread)


def test_a_reference_of_another_grid_is_refused(shards, network):
    from zipar_train.plan.grid import Grid

    extractor = register(network)
    with pytest.raises(ValueError, match=r"val\.json.*8x8.*4x4"):
        open_reference(
            str(shards / "val.json"), extractor, tokenizer=Palette.grey(17), size=(8, 8), grids=[Grid(4, 4)], codes=17
        )
    with pytest.raises(ValueError, match=r"val\.json"):
        open_reference(
            str(shards / "val.json"), extractor, tokenizer=Palette.grey(4), size=(8, 8), grids=[Grid(8, 8)], codes=4
        )
