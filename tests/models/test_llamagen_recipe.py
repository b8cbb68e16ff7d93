"""`zipar-train fit --recipe llamagen-l`, tiny: from a published file and pictures to a published file."""

import json

import original
import pytest
import torch
from commands import captioned_tar, picture, sets

from zipar_train import load
from zipar_train.evaluation.scores.clip import Clip
from zipar_train.models.family import teacher_forced
from zipar_train.plan.masks import dense


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "c2i_L_384.pt"
    state = original.random_gpt(depth=2, width=24, codes=24, grid=3, classes=3, dtype=torch.float32)
    torch.save({"model": state}, path)
    return path


def small(tmp_path, vq, weights, *more):
    return [
        "model.size=null",
        "model.num_layers=2",
        "model.num_heads=2",
        "model.hidden_size=24",
        "model.ffn_size=48",
        "model.codebook_size=24",
        "model.grid=[3,3]",
        f"model.weights={weights}",
        f"model.tokenizer_weights={vq}",
        "zipar.windows={3: 1, 2: 1, 1: 1}",
        "evaluate.windows=[3,2,1]",
        "evaluate.images=10",
        f"data.train={tmp_path}/shards/train.json",
        f"data.val={tmp_path}/shards/val.json",
        "data.micro_batch_size=8",
        "optim.global_batch_size=8",
        "data.workers=0",
        f"run_dir={tmp_path}/run",
        "trainer.accelerator=cpu",
        "trainer.val_check_interval=1.0",
        "tune.compile=false",
        "log.wandb=disabled",
        *more,
    ]


def succeeded(done):
    status, out, err = done
    assert not status, err
    return out


@pytest.mark.slow(seconds=25)
def test_classes_from_end_to_end(tmp_path, run, vq, weights):
    for split, count in (("train", 36), ("val", 12)):
        for i in range(count):
            folder = tmp_path / "imagenet" / split / f"n{i % 3:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            picture(i).save(folder / f"{i}.JPEG")
    settings = sets(small(tmp_path, vq, weights, "model.num_classes=3"))
    recipe = ["--recipe", "llamagen-l", *settings]
    out = succeeded(run("tokenize", *recipe, "--images", tmp_path / "imagenet", "--out", tmp_path / "shards"))
    assert "train.json: 36 images in 1 shards" in out
    assert "val.json: 12 images in 1 shards" in out
    assert "of the time waiting for images" in out

    short = ["--set", "trainer.limit_train_batches=2"]
    succeeded(run("fit", *recipe, *short))
    assert "already holds a run" in run("fit", *recipe, *short)[2]
    out = succeeded(run("fit", *recipe, *short, "--set", "description=again", "--resume"))
    assert "Resuming from" in out

    succeeded(
        run("generate", "--checkpoint", tmp_path / "run", "--labels", "0,2", "--window", "1", "--out", "drawn.png")
    )
    out = succeeded(run("generate", *recipe, "--labels", "0,2", "--window", "2", "--released", "--out", "before.png"))
    assert "2 images in 8 passes" in out
    own = sets(["evaluate.resize_to=32", "evaluate.features=classifier", "evaluate.reference=null"])
    out = succeeded(run("evaluate", *recipe, *own, "--checkpoint", tmp_path / "run", "--compare", weights))
    assert "c2i_L_384" in out
    status, _, err = run("evaluate", *recipe, "--checkpoint", tmp_path / "run")
    assert status == 2 and "VIRTUAL_imagenet256_labeled.npz: no such file or folder" in err
    succeeded(run("export", "--checkpoint", tmp_path / "run", "--to", "llamagen", "--out", "tuned.pt"))
    card = (tmp_path / "tuned.md").read_text()
    assert f"- trained on: 36 images, {tmp_path}/imagenet, train (views: one)" in card
    assert f"- started from: {weights}" in card

    state = torch.load(tmp_path / "tuned.pt", weights_only=True)["model"]
    started = torch.load(weights, weights_only=True)["model"]
    assert state.keys() == started.keys()
    assert all(state[name].shape == started[name].shape for name in state)
    assert not torch.equal(state["output.weight"], started["output.weight"])
    generator = load(tmp_path / "run")
    assert generator.generate([0, 2], window=2).pixels.shape == (2, 3, 48, 48)
    codes, labels = torch.randint(24, (2, 9)), torch.tensor([2, 1])
    with torch.no_grad():
        ours = teacher_forced(generator.load_family(), generator.plan(), codes, labels, dense(generator.plan()))
    theirs = original.next_token_logits(state, codes, labels, heads=2, columns=3)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("features", [False, True])
def test_captions_from_end_to_end(tmp_path, run, vq, t5, clip, features):
    words = ["a blue car", "a small red house", "a car a house"]
    for split, count in (("train", 24), ("val", 6)):
        captioned_tar(tmp_path / f"{split}.tar", words, count)
    weights = tmp_path / "t2i.pt"
    state = original.random_gpt(depth=2, width=24, codes=24, grid=3, features=6, prompt=4, dtype=torch.float32)
    torch.save({"model": state}, weights)
    text = f"model.t5_features={{encoder: {t5}, tokens: 4, features: 6}}"
    recipe = [
        "--recipe",
        "llamagen-xl-t2i",
        *sets(small(tmp_path, vq, weights, text, "tune.activation_checkpointing=true")),
    ]
    for split in ("train", "val"):
        stored = ["--features"] if features else []
        images = ["--images", tmp_path / f"{split}.tar", "--split", split, "--out", tmp_path / "shards"]
        succeeded(run("tokenize", *recipe, *images, *stored))
    out = succeeded(run("fit", *recipe))
    assert "val/bits_w3" in out
    out = succeeded(
        run(
            "generate",
            "--checkpoint",
            tmp_path / "run",
            "--caption",
            "a blue car",
            "--caption",
            "a house",
            "--window",
            "1",
            "--out",
            "drawn.png",
        )
    )
    assert "2 images in 7 passes" in out
    succeeded(run("export", "--checkpoint", tmp_path / "run", "--to", "hf", "--out", "hf"))
    a, b = load(tmp_path / "run"), load(tmp_path / "hf")
    assert torch.equal(a.generate(["a house"], window=2).codes, b.generate(["a house"], window=2).codes)
    if not features:
        (tmp_path / "coco.csv").write_text("Prompt\na blue car\na red house\na small blue house\n")
        more = sets(
            [f"evaluate.captions={tmp_path}/coco.csv", f"evaluate.clip={clip}", f"data.val={tmp_path}/none.json"]
        )
        out = succeeded(run("evaluate", *recipe, *more, "--checkpoint", tmp_path / "run", "--json", "report.json"))
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["protocol"]["conditions"].startswith("3 captions of coco.csv, ")
        assert [row["window"] for row in report["rows"]] == [3, 2, 1]
        assert all(
            -1 < row["clip"]["mean"] < 1 and row["fid"] is None and row["bits"] is None for row in report["rows"]
        )
        captions = (["a blue car", "a red house", "a small blue house"] * 4)[:10]
        pixels = a.generate(captions, window=1, seed=0, batch_size=10).pixels
        cosines = Clip(str(clip), device=torch.device("cpu"))(pixels, captions)
        assert report["rows"][2]["clip"]["mean"] == pytest.approx(cosines.mean().item(), abs=1e-6)
        assert "published†" in out and "0.287†" in out
