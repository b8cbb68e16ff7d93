"""Evaluation: the report against its own numbers, gaps, the paper's protocol and differences from it, guidance."""

import json

import numpy as np
import pytest
import torch
from commands import sets

from zipar_train.decoding.generator import Generator
from zipar_train.evaluation.evaluate import _closed
from zipar_train.evaluation.report.protocol import differences, warnings
from zipar_train.models.tokenizers.base import Palette


@pytest.mark.slow
def test_compared_checkpoints_have_their_gap_closed(shards, tmp_path, tiny, kept_classifier, monkeypatch):
    """Against hand arithmetic on the report's own bits, and in the report's words."""
    from zipar_train.evaluation.evaluate import evaluate
    from zipar_train.evaluation.report.text import markdown, summary
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
    assert f"{fast8 / slow8 - 1:+.1%}" in summary(report)[0]
    took, speed = report.row("fast", 1).milliseconds, report.row("fast", 1).images_per_second
    assert speed is None  # one batch
    row = f"| fast | 1 | 22 | 66% | {took:.0f} | {fast1:.3f} | {fast1 / fast8 - 1:+.1%} |"
    assert row in markdown(report)
    assert "| FD |" in markdown(report) and "| FID" not in markdown(report)
    calls, generate = [], Generator.generate

    def kept(self, labels, **how):
        calls.append((labels, how["first"], how["seed"]))
        return generate(self, labels, **how)

    monkeypatch.setattr(Generator, "generate", kept)  # all images are there: these are the timed ones
    again, _, _ = evaluate(recipe, paths[1], compare=[paths[0]], windows=[1], out=tmp_path, progress=False)
    assert len(calls) % 4 == 0 and len(calls) >= 16
    assert calls == [([k], k, 0) for k in range(len(calls) // 4) for _ in range(4)]
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
    bits = {(*key, "planned", 0): value for key, value in told.items()} | {("base", 1, "released", 0): 3.1}
    assert _closed(bits, "base", ("tuned", 1, "planned", 0), 8) == pytest.approx(0.8)
    assert _closed(bits, "base", ("tuned", 4, "planned", 0), 8) is None  # a quarter of a percent: no gap
    assert _closed(bits, "base", ("base", 1, "planned", 0), 8) is None
    assert _closed(bits, "base", ("base", 1, "released", 0), 8) is None
    assert _closed(bits, None, ("tuned", 1, "planned", 0), 8) is None


PAPER = (
    "published_results={source: 'a paper, table 1', protocol: {images: 50000, conditions: random classes, guidance: "
    "1.5, features: inception}, rows: [{window: 8, passes: 64, seconds: 2.5, fid: 3.16}]}"
)


@pytest.mark.slow
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
    assert [(row["window"], row["mode"]) for row in report["rows"]] == [
        (8, "planned"),
        (2, "planned"),
        (2, "released"),
        (2, "adaptive"),
    ]
    assert all(row["images_per_second"] > 0 for row in report["rows"])
    assert report["rows"][2]["bits"] is None and report["rows"][3]["bits"] is None
    assert 22 <= report["rows"][3]["passes"] <= 64 and report["rows"][3]["width"] is None
    assert report["differences"][0] == "images: 20 (published: 50000)"
    assert report["differences"][1] == "conditions: classes in turn (published: random classes)"
    assert report["differences"][2].startswith("features: classifier-")
    assert len(report["differences"]) == 3  # guidance is the published one
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
        len(list((tmp_path / "out" / "samples").glob("*.npz")))
        == len(list((tmp_path / "out" / "samples").glob("*-8px")))
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
        "generated_size": 384,
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
    assert differences(protocol, paper) == [] and warnings(protocol) == []
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
        (only,) = differences(changed, paper)
        assert str(value) in only
    assert "biased upwards" in warnings(Protocol(**{**ours, "images": 5000}))[0]
    assert "validation set" in warnings(Protocol(**{**ours, "validation": True}))[0]


@pytest.mark.slow
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
    assert f"Best over these windows: --set sampling.guidance={found['best']:g}" in out
    for scales, message in {
        "-1": "-1 is not a guidance scale",
        "x": "write numbers with commas",
        "": "write numb",
    }.items():
        status, out, err = run(*arguments, "--search-guidance", scales)
        assert status == 2 and message in err
    status, out, err = run(*arguments, "--search-guidance", "1", "--npz")
    assert status == 2 and "leave --compare" in err
