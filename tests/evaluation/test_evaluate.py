"""Evaluation: scores against their definitions, bits against the chain rule, the report against its own numbers."""

import json
import shutil
from math import log

import numpy as np
import pytest
import torch
from commands import sets
from families import llamagen
from scipy.linalg import sqrtm
from transformers import DynamicCache

from zipar_train import Plan
from zipar_train.data.loader import Batch, ShardLoader
from zipar_train.decoding.decoder import Decoder
from zipar_train.evaluation.evaluate import _closed
from zipar_train.evaluation.likelihood import bits_by_drawing, bits_per_code
from zipar_train.evaluation.report.protocol import departures, warnings
from zipar_train.evaluation.scores.classifier import pixels_of, register, trained
from zipar_train.evaluation.scores.features import Pictures
from zipar_train.evaluation.scores.reference import open_reference
from zipar_train.evaluation.scores.scores import fidelity, subset_size
from zipar_train.models.tokenizers.base import Palette
from zipar_train.plan.masks import dense, unwritten_slots_mask
from zipar_train.recipe.schema import Draw


@pytest.fixture
def network(shards, classifier):
    """The digits' classifier."""
    loader = ShardLoader(shards / "train.json", batch_size=32, shuffle=10000)
    return trained(classifier / "classifier.safetensors", loader, Palette.grey(17))


def pictures(shards, split):
    loader = ShardLoader(shards / f"{split}.json", batch_size=100)
    return torch.cat([pixels for pixels, _ in pixels_of(loader, Palette.grey(17), (8, 8))])


@pytest.mark.slow
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
    pairs = {
        "fid": "frechet_inception_distance",
        "kid": "kernel_inception_distance_mean",
        "isc": "inception_score_mean",
        "precision": "precision",
        "recall": "recall",
    }
    for mine, name in pairs.items():
        assert ours[mine].mean == pytest.approx(theirs[name], rel=1e-6, abs=1e-6), name


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
    assert bits_by_drawing(Decoder(family, plan), One()) == pytest.approx(chain / 72 / log(2), rel=1e-12)


def test_bits_of_the_released_decoder_are_those_of_a_cache_of_zeros():
    """Unwritten slots as zero keys and values in one teacher-forced pass, and the stock layers' own attention."""
    family = llamagen(5, 5)
    plan = Plan.zipar(family.grid, window=2, stand_in="released")
    codes, labels = torch.randint(7, (3, 25)), torch.tensor([0, 1, 2])
    mask = torch.cat([dense(plan), unwritten_slots_mask(plan)], dim=-1)

    class Zeros(DynamicCache):
        def update(self, keys, values, *args, **kwargs):
            return tuple(torch.cat([t, t.new_zeros(*t.shape[:2], 25, t.shape[-1])], dim=2) for t in (keys, values))

    tokens = codes[:, torch.tensor(plan.source[1:])]
    embeddings = torch.cat([family.prompt(labels), family.embed(tokens)], dim=1)
    with torch.no_grad():
        hidden = family.hidden(embeddings, torch.tensor(plan.position), mask, Zeros())
        logits = family.head(hidden)[:, torch.tensor(plan.target) >= 0]
    wanted = codes[:, torch.tensor(plan.target[plan.target >= 0])]
    truth = -logits.log_softmax(-1).gather(-1, wanted[..., None]).mean().item() / log(2)

    class One:
        def __iter__(self):
            yield Batch(codes, labels)

    assert bits_by_drawing(Decoder(family, plan, released=True), One()) == pytest.approx(truth, rel=1e-12)
    assert bits_by_drawing(Decoder(family, plan), One()) != pytest.approx(truth, rel=1e-4)


def test_compared_checkpoints_have_their_gap_closed(shards, tmp_path, tiny, kept_classifier):
    """Against hand arithmetic on the report's own bits, and in the report's words."""
    from zipar_train.evaluation.evaluate import evaluate
    from zipar_train.evaluation.report.text import findings, markdown
    from zipar_train.recipe.load import load_recipe
    from zipar_train.training.fit import fit

    paths = []
    for name, lr in (("slow", "1e-3"), ("fast", "3e-2")):
        recipe = load_recipe(
            "digits-base", [*tiny, f"run_dir={tmp_path}/{name}", "trainer.max_epochs=2", f"optim.lr={lr}"]
        )
        fit(recipe)
        paths.append(tmp_path / name)
    kept_classifier(tmp_path)
    report, samples, _ = evaluate(recipe, paths[1], compare=[paths[0]], windows=[1], out=tmp_path, progress=False)
    slow8, slow1, fast8, fast1 = (report.row(n, w).bits for n in ("slow", "fast") for w in (8, 1))
    assert fast8 < slow8
    assert report.baseline == "slow"
    assert report.row("slow", 1).gap_closed is None
    assert [r.passes for r in report.rows] == [64, 22, 64, 22]
    assert f"{fast8 / slow8 - 1:+.1%}" in findings(report)[0]
    took, speed = report.row("fast", 1).milliseconds, report.row("fast", 1).images_per_second
    assert speed is None  # one batch
    row = f"| fast | 1 | 22 | 66% | {took:.0f} | {fast1:.3f} | {fast1 / fast8 - 1:+.1%} |"
    assert row in markdown(report)
    assert "| FD |" in markdown(report) and "| FID" not in markdown(report)
    again, _, _ = evaluate(recipe, paths[1], compare=[paths[0]], windows=[1], out=tmp_path, progress=False)
    volatile = {"milliseconds": ...}
    assert [r.model_dump(exclude=volatile) for r in again.rows] == [r.model_dump(exclude=volatile) for r in report.rows]
    assert samples["fast", 1].shape == (10, 3, 8, 8)


def test_palettes_round_trip():
    codes = torch.randint(17, (3, 8, 8))
    palette = Palette.grey(17)
    assert torch.equal(palette.encode(palette.decode(codes)), codes)
    assert palette.decode(torch.tensor([[[0, 16]]]))[0, :, 0].tolist() == [[0, 255]] * 3


def test_the_gap_is_the_baselines_and_closed_against_its_next_token_bits():
    told = {
        ("base", 8): 2.0,
        ("base", 4): 2.005,
        ("base", 1): 3.0,
        ("tuned", 8): 2.1,
        ("tuned", 4): 2.1,
        ("tuned", 1): 2.2,
    }
    bits = {(*key, "planned"): value for key, value in told.items()} | {("base", 1, "released"): 3.1}
    assert _closed(bits, "base", ("tuned", 1, "planned"), 8) == pytest.approx(0.8)
    assert _closed(bits, "base", ("tuned", 4, "planned"), 8) is None  # a quarter of a percent: no gap
    assert _closed(bits, "base", ("base", 1, "planned"), 8) is None
    assert _closed(bits, "base", ("base", 1, "released"), 8) is None
    assert _closed(bits, None, ("tuned", 1, "planned"), 8) is None


PAPER = (
    "published_results={source: 'a paper, table 1', protocol: {images: 50000, conditions: random classes, guidance: "
    "1.5, features: inception}, rows: [{window: 8, passes: 64, seconds: 2.5, fid: 3.16}]}"
)


def test_the_protocol_is_guarded(tiny, tmp_path, run, kept_classifier):
    """What departs from a published protocol is said; the released baseline has rows of its own."""
    from zipar_train.recipe.load import load_recipe
    from zipar_train.training.fit import fit

    fit(load_recipe("digits-base", [*tiny, "trainer.max_epochs=1"]))
    kept_classifier(tmp_path / "out")
    more = [*tiny, PAPER, "evaluate.batch_size=5"]
    options = ["--windows", "2", "--released", "--adaptive", "--out", "out", "--npz", "--png", "--json", "r.json"]
    status, out, err = run(
        "evaluate", "--recipe", "digits-base", *sets(more), "--checkpoint", tmp_path / "run", *options
    )
    assert status == 0, err
    report = json.loads((tmp_path / "r.json").read_text())
    assert [(row["window"], row["manner"]) for row in report["rows"]] == [
        (8, "planned"),
        (2, "planned"),
        (2, "released"),
        (2, "adaptive"),
    ]
    assert all(row["images_per_second"] > 0 for row in report["rows"])
    assert report["rows"][2]["bits"] is None and report["rows"][3]["bits"] is None
    assert 22 <= report["rows"][3]["passes"] <= 64 and report["rows"][3]["width"] is None
    assert report["departures"][0] == "images: 20 (published: 50000)"
    assert report["departures"][1] == "conditions: classes in turn (published: random classes)"
    assert report["departures"][2].startswith("features: classifier-")
    assert len(report["departures"]) == 3  # guidance is the published one
    assert report["protocol"]["validation"] is True
    page = (tmp_path / "out" / "report.html").read_text()
    for text in (out, (tmp_path / "out" / "report.md").read_text(), page):
        assert "run, as released" in text and "run, adaptive" in text
        assert "published†" not in text and ">3.16" not in text and "| 3.16" not in text  # a FID is no FD
        assert "not comparable with Inception" in text.replace("&#39;", "'")
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert (
        len(list((tmp_path / "out" / "drawn").glob("*.npz")))
        == len(list((tmp_path / "out" / "drawn").glob("*-8px")))
        == 4
    )


def test_a_departure_is_each_difference_and_nothing_else():
    from zipar_train.evaluation.report.protocol import Protocol
    from zipar_train.recipe.schema import Paper

    ours = {
        "images": 50000,
        "seeds": [0],
        "conditions": "random classes",
        "size": 256,
        "drawn": 384,
        "reference": "VIRTUAL_imagenet256_labeled.npz, ADM's statistics",
        "reference_checksum": "0",
        "reference_images": None,
        "validation": False,
        "guidance": 2.0,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "dtype": "bfloat16",
        "features": "inception",
        "features_weights": "0",
    }
    from zipar_train.recipe.load import load_recipe

    paper = load_recipe("llamagen-l").published_results
    assert isinstance(paper, Paper)
    protocol = Protocol(**ours)
    assert departures(protocol, paper) == [] and warnings(protocol) == []
    changes = {
        "images": 5000,
        "conditions": "classes in turn",
        "size": 384,
        "reference": "val.npz",
        "guidance": 1.5,
        "temperature": 0.9,
        "top_k": 10,
        "top_p": 0.9,
        "dtype": "float32",
        "features": "x",
    }
    for key, value in changes.items():
        changed = Protocol(**{**ours, key: value})
        (only,) = departures(changed, paper)
        assert str(value) in only
    assert "biased upwards" in warnings(Protocol(**{**ours, "images": 5000}))[0]
    assert "validation set" in warnings(Protocol(**{**ours, "validation": True}))[0]


def test_guidance_is_searched(tiny, tmp_path, run, kept_classifier):
    from zipar_train.recipe.load import load_recipe
    from zipar_train.training.fit import fit

    fit(load_recipe("digits-base", [*tiny, "trainer.max_epochs=4", "optim.lr=1e-2"]))
    kept_classifier(tmp_path / "run" / "evaluation")
    arguments = ["evaluate", "--recipe", "digits-base", *sets(tiny), "--checkpoint", tmp_path / "run", "--windows", "2"]
    status, out, err = run(*arguments, "--search-guidance", "1,1.5,30", "--search-images", "40", "--json", "s.json")
    assert status == 0, err
    found = json.loads((tmp_path / "s.json").read_text())
    assert [(t["guidance"], t["window"]) for t in found["tried"]] == [(g, w) for g in (1, 1.5, 30) for w in (8, 2)]
    means = {g: np.mean([t["score"]["mean"] for t in found["tried"] if t["guidance"] == g]) for g in (1, 1.5, 30)}
    assert found["best"] == min(means, key=means.get) != 30
    assert f"Best over these windows: --set draw.guidance={found['best']:g}" in out
    for scales, message in {
        "-1": "-1 is no guidance scale",
        "x": "write numbers with commas",
        "": "write numb",
    }.items():
        status, out, err = run(*arguments, "--search-guidance", scales)
        assert status == 2 and message in err
    status, out, err = run(*arguments, "--search-guidance", "1", "--npz")
    assert status == 2 and "leave --compare" in err


def test_bits_are_of_as_many_images_as_is_said():
    family = llamagen(8, 8)

    class Bare:
        drawing = family

    plan = Plan.raster(family.grid)
    codes = torch.randint(family.codes, (9, 64))
    parts = [Batch(codes[k : k + 3], torch.tensor([0, 1, 2])) for k in (0, 3, 6)]
    assert bits_per_code(Bare(), plan, parts, images=4) == pytest.approx(
        bits_per_code(Bare(), plan, [Batch(codes[:4], torch.tensor([0, 1, 2, 0]))]), rel=1e-12
    )
    assert bits_per_code(Bare(), plan, parts, images=100) == bits_per_code(Bare(), plan, parts)


def test_a_reference_of_another_grid_is_refused(shards, network):
    from zipar_train.plan.grid import Grid

    extractor = register(network)
    with pytest.raises(ValueError, match=r"val\.json.*8x8.*4x4"):
        open_reference(
            str(shards / "val.json"), extractor, tokenizer=Palette.grey(17), size=(8, 8), grid=Grid(4, 4), codes=17
        )
    with pytest.raises(ValueError, match=r"val\.json"):
        open_reference(
            str(shards / "val.json"), extractor, tokenizer=Palette.grey(4), size=(8, 8), grid=Grid(8, 8), codes=4
        )
