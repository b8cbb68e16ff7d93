"""Evaluation: scores against their definitions, bits against the chain rule, the report against its own numbers."""

from math import log

import numpy as np
import pytest
import torch
from families import llamagen
from scipy.linalg import sqrtm

from zipar_train import Plan
from zipar_train.decoding.decoder import Decoder
from zipar_train.evaluation.classifier import pixels_of, register, trained
from zipar_train.evaluation.evaluate import _closed
from zipar_train.evaluation.metrics import bits_per_code, fidelity
from zipar_train.loader import Batch, ShardLoader
from zipar_train.models.vq import Palette
from zipar_train.sections import Draw


@pytest.fixture(scope="module")
def classifier(shards, tmp_path_factory):
    path = tmp_path_factory.mktemp("features") / "classifier.safetensors"
    return path, trained(path, ShardLoader(shards / "train.json", batch_size=32, shuffle=10000), Palette.grey(17))


def pictures(shards, split):
    loader = ShardLoader(shards / f"{split}.json", batch_size=100)
    return torch.cat([pixels for pixels, _ in pixels_of(loader, Palette.grey(17), (8, 8))])


def test_the_classifier_learns_and_is_kept(shards, classifier):
    path, network = classifier
    loader = ShardLoader(shards / "val.json", batch_size=100)
    assert network.accuracy(pixels_of(loader, Palette.grey(17), (8, 8))) > 0.95
    again = trained(path, ShardLoader(shards / "train.json", batch_size=32, shuffle=10000), Palette.grey(17), epochs=20)
    assert register(again) == register(network)
    path.write_bytes(b"damaged")
    mended = trained(path, ShardLoader(shards / "train.json", batch_size=32, shuffle=10000), Palette.grey(17))
    assert register(mended) == register(network)
    other = trained(path, ShardLoader(shards / "val.json", batch_size=32), Palette.grey(17), epochs=1)
    assert register(other) != register(network)


def test_frechet_distance_is_its_definition_in_float64(shards, classifier):
    _, network = classifier
    real, other = pictures(shards, "val"), pictures(shards, "train")[:300]
    scores = fidelity(other, real, features=register(network))
    with torch.inference_mode():
        a, b = (network(x)[0].double().numpy() for x in (other, real))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm(cov_a @ cov_b).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert scores["fid"] == pytest.approx(expected, rel=1e-4)
    same = fidelity(real, real, features=register(network))
    assert abs(same["fid"]) < 1e-3
    assert same["precision"] == same["recall"] == 1
    noise = torch.randint(0, 255, real.shape, dtype=torch.uint8)
    assert fidelity(noise, real, features=register(network))["fid"] > 20 * scores["fid"]


@pytest.mark.parametrize("window", [6, 3, 1])
def test_bits_are_the_chain_rule_of_the_decoder(window):
    """-log2 of the product of the probabilities with which the decoder itself would have drawn the image."""
    family = llamagen(6, 6)
    plan = Plan.zipar(family.grid, window=window)
    probabilities = []

    def observe(targets, logits):
        for column, target in enumerate(targets.tolist()):
            if target < 36:
                probabilities.append(logits[:, column].log_softmax(-1))
                order.append(target)

    order: list[int] = []
    labels = torch.tensor([2, 0])
    codes = Decoder(family, plan)(labels, torch.rand(2, 36), Draw(), observe=observe).flatten(1)
    chain = -sum(p.gather(1, codes[:, [n]]).sum().item() for p, n in zip(probabilities, order, strict=True))

    class One:
        def __iter__(self):
            yield Batch(codes, labels)

    class Bare:
        pass

    generator = Bare()
    generator.drawing = family
    assert bits_per_code(generator, plan, One()) == pytest.approx(chain / 72 / log(2), rel=1e-12)


def test_compared_checkpoints_have_their_gap_closed(shards, tmp_path, tiny):
    """Against hand arithmetic on the report's own bits, and in the report's words."""
    from zipar_train.evaluation.evaluate import evaluate
    from zipar_train.evaluation.report import findings, markdown
    from zipar_train.recipe import load_recipe
    from zipar_train.training.trainer import fit

    paths = []
    for name, lr in (("slow", "1e-3"), ("fast", "3e-2")):
        recipe = load_recipe("digits-base", [*tiny, f"run={tmp_path}/{name}", "trainer.max_epochs=2", f"optim.lr={lr}"])
        fit(recipe)
        paths.append(tmp_path / name)
    report, samples = evaluate(recipe, paths[1], compare=[paths[0]], windows=[1], out=tmp_path, progress=False)
    slow8, slow1, fast8, fast1 = (report.row(n, w).bits for n in ("slow", "fast") for w in (8, 1))
    assert fast8 < slow8
    assert report.baseline == "slow"
    assert report.row("slow", 1).gap_closed is None
    assert [r.passes for r in report.rows] == [64, 22, 64, 22]
    assert f"{fast8 / slow8 - 1:+.1%}" in findings(report)[0]
    row = f"| fast | 1 | 22 | 66% | {report.row('fast', 1).milliseconds:.0f} | {fast1:.3f} | {fast1 / fast8 - 1:+.1%} |"
    assert row in markdown(report)
    assert samples["fast", 1].shape == (10, 3, 8, 8)


def test_palettes_round_trip():
    codes = torch.randint(17, (3, 8, 8))
    palette = Palette.grey(17)
    assert torch.equal(palette.encode(palette.decode(codes)), codes)
    assert palette.decode(torch.tensor([[[0, 16]]]))[0, :, 0].tolist() == [[0, 255]] * 3


def test_the_gap_is_the_baselines_and_closed_against_its_next_token_bits():
    bits = {
        ("base", 8): 2.0,
        ("base", 4): 2.005,
        ("base", 1): 3.0,
        ("tuned", 8): 2.1,
        ("tuned", 4): 2.1,
        ("tuned", 1): 2.2,
    }
    assert _closed(bits, "base", "tuned", 1, 8) == pytest.approx(0.8)
    assert _closed(bits, "base", "tuned", 4, 8) is None  # a quarter of a percent: no gap
    assert _closed(bits, "base", "base", 1, 8) is None
    assert _closed(bits, None, "tuned", 1, 8) is None
