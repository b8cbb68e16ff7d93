"""Pictures to shards: every picture once whatever happens, bad ones told."""

import io
import json
import os
import signal
import tarfile
import time
from pathlib import Path

import pytest
import torch
from commands import picture, sets
from forked import Running
from PIL import Image

from zipar_train.data.crops import views
from zipar_train.data.loader import ShardLoader
from zipar_train.data.shards import read_manifest, read_shard
from zipar_train.data.tokenize import tokenize
from zipar_train.models.family import build
from zipar_train.models.tokenizers.vq16 import load_vq16
from zipar_train.recipe.load import load_recipe


def overrides(vq, *more):
    return [
        "model.codebook_size=24",
        "model.num_classes=3",
        "model.grid=[2,2]",
        f"model.tokenizer_weights={vq}",
        "data.workers=0",
        "zipar.windows={2: 1}",
        "evaluate.windows=[2]",
        *more,
    ]


@pytest.fixture
def folder(tmp_path) -> Path:
    """30 pictures in three folders."""
    root = tmp_path / "pictures"
    for i in range(30):
        (root / f"class{i % 3}").mkdir(parents=True, exist_ok=True)
        picture(i).save(root / f"class{i % 3}" / f"picture {i}.png")
    return root


def contents(manifest):
    held = read_manifest(manifest)
    return {s.key: (s.codes.tolist(), s.condition) for shard in held.shards for s in read_shard(manifest, shard, held)}


# ---------------------------------------------------------------------------------------------------------------------
# Sources


def test_an_image_folder(folder, tmp_path, vq):
    recipe = load_recipe("llamagen-b", overrides(vq))
    done = tokenize(recipe, images=str(folder), out=tmp_path / "out", kind="flip", per_shard=8, progress=False)
    manifest = done.manifest
    assert [shard.samples for shard in manifest.shards] == [8, 8, 8, 6]
    assert (manifest.views, manifest.skipped, manifest.tokenizer) == ("flip", 0, load_vq16(str(vq), codes=24).sha256)
    held = contents(tmp_path / "out" / "train.json")
    assert len(held) == 30
    labels = [label for _, label in held.values()]
    assert labels != sorted(labels)  # a folder goes class by class, and no shuffle buffer mixes that again
    tokenizer = load_vq16(str(vq), codes=24)
    for i in (0, 7, 29):
        codes, label = held[f"class{i % 3}_picture {i}"]
        assert label == i % 3
        assert codes == tokenizer.encode(views(picture(i), 32, 32, "flip")).tolist()
    assert not list((tmp_path / "out").glob(".*"))
    again = tokenize(recipe, images=str(folder), out=tmp_path / "out", kind="flip", per_shard=8, progress=False)
    assert (again.manifest, again.images) == (manifest, 0)


def test_tars_and_data_sets_hold_the_same(folder, tmp_path, vq):
    import datasets

    recipe = load_recipe("llamagen-b", overrides(vq))
    for part in range(2):
        with tarfile.open(tmp_path / f"set-{part}.tar", "w") as tar:
            for i in range(part * 15, part * 15 + 15):
                buffer = io.BytesIO()
                picture(i).save(buffer, "png")
                label = {"cls": str(i % 3).encode()} if part else {"json": json.dumps({"label": i % 3}).encode()}
                for kind, data in {"png": buffer.getvalue(), **label}.items():
                    member = tarfile.TarInfo(f"folder/{i:04d}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    rows = {"image": [picture(i) for i in range(30)], "label": [i % 3 for i in range(30)]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    sets = []
    for n, images in enumerate([folder, f"{tmp_path}/set-{{0..1}}.tar", f"{tmp_path}/set-*.tar", tmp_path / "saved"]):
        tokenize(recipe, images=str(images), out=tmp_path / f"out{n}", progress=False)
        held = contents(tmp_path / f"out{n}" / "train.json")
        sets.append(sorted(held.values()))
    assert sets[0] == sets[1] == sets[2] == sets[3]
    assert len(sets[0]) == 30


@pytest.mark.parametrize(
    ("images", "more", "message"),
    [
        ("nothing", [], "neither a folder with a folder of pictures for each class, nor tar files, nor a data set"),
        ("empty", [], "not a folder with a folder of pictures for each class"),
        (
            "pictures",
            ["model.num_classes=4"],
            "has 3 classes, the recipe's model 4. Give all classes, or set model.num_classes",
        ),
        ("pictures", ["model.tokenizer=null"], "has no model.tokenizer: set it to vq16 or palette"),
        ("cut.tar", [], "cut.tar is not a readable, uncompressed tar file"),
        ("gone-{0..3}.tar", [], "no file .*gone-0.tar"),
    ],
)
def test_a_source_that_is_none_is_refused(folder, tmp_path, vq, images, more, message):
    (tmp_path / "empty" / "class").mkdir(parents=True)
    (tmp_path / "cut.tar").write_bytes(b"no tar at all" * 100)
    recipe = load_recipe("llamagen-b", overrides(vq, *more))
    with pytest.raises(ValueError, match=message):
        tokenize(recipe, images=str(tmp_path / images), out=tmp_path / "out", progress=False)


def test_odd_pictures_are_read_and_broken_ones_listed(folder, tmp_path, vq):
    picture(1).convert("CMYK").save(folder / "class0" / "cmyk.jpg")
    picture(1).convert("L").save(folder / "class0" / "grey.jpg")
    picture(1).convert("RGBA").save(folder / "class0" / "alpha.png")
    Image.new("RGB", (1, 1)).save(folder / "class0" / "pixel.png")
    picture(1, size=(400, 300)).save(folder / "class1" / "truncated.jpg", quality=95)
    os.truncate(folder / "class1" / "truncated.jpg", 3000)
    (folder / "class2" / "text.jpg").write_text("an error page")
    (folder / "class2" / "empty.jpg").touch()
    recipe = load_recipe("llamagen-b", overrides(vq))
    done = tokenize(recipe, images=str(folder), out=tmp_path / "out", per_shard=10, progress=False)
    assert done.skipped.keys() == {"class1_truncated", "class2_text", "class2_empty"}
    assert "truncated" in done.skipped["class1_truncated"]
    assert (done.manifest.samples, done.manifest.skipped) == (34, 3)
    listed = (tmp_path / "out" / "train.skipped.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == ["class1_truncated", "class2_empty", "class2_text"]
    for path in (folder / "class1").glob("*.png"):
        path.unlink()
    for name in ("class0", "class2"):
        for path in (folder / name).iterdir():
            path.write_text("broken")
    with pytest.raises(ValueError, match="none of the .* pictures can be used"):
        tokenize(recipe, images=str(folder), out=tmp_path / "other", progress=False)


# ---------------------------------------------------------------------------------------------------------------------
# Interrupted, shared


@pytest.mark.slow
def test_killed_and_resumed_it_makes_the_same_shards(folder, tmp_path, vq):
    for i in range(30, 150):
        picture(i).save(folder / f"class{i % 3}" / f"picture {i}.png")
    arguments = [
        "--recipe",
        "llamagen-b",
        *sets(overrides(vq)),
        "--images",
        str(folder),
        "--per-shard",
        "10",
        "--batch-size",
        "2",
        "--out",
    ]
    out = tmp_path / "out"
    killed = 0
    while not (out / "train.json").is_file():
        running = Running("tokenize", *arguments, out, log=tmp_path / "log")
        before = len(list(out.glob(".train/*.json")))
        while running.process.is_alive() and (killed > 1 or len(list(out.glob(".train/*.json"))) < before + 3):
            time.sleep(0.01)
        if running.process.is_alive():
            running.kill(signal.SIGKILL)
            killed += 1
        assert running.ended() in (0, -9), running.said()
    assert killed == 2
    tokenize(
        load_recipe("llamagen-b", overrides(vq)),
        images=str(folder),
        out=tmp_path / "whole",
        per_shard=10,
        batch_size=2,
        progress=False,
    )
    a, b = read_manifest(out / "train.json"), read_manifest(tmp_path / "whole" / "train.json")
    assert a == b  # checksums and all
    assert len(contents(out / "train.json")) == 150
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())


def test_processes_share_the_parts(folder, tmp_path, vq, monkeypatch):
    recipe = load_recipe("llamagen-b", overrides(vq))
    alone = tokenize(recipe, images=str(folder), out=tmp_path / "alone", per_shard=4, progress=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "3")
    done = []
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        done.append(tokenize(recipe, images=str(folder), out=tmp_path / "shared", per_shard=4, progress=False))
    assert [one.manifest for one in done] == [None, None, alone.manifest]
    assert sorted(one.images for one in done) == [8, 10, 12]
    assert contents(tmp_path / "shared" / "train.json") == contents(tmp_path / "alone" / "train.json")


def test_other_settings_do_not_mix_with_what_is_there(folder, tmp_path, vq):
    recipe = load_recipe("llamagen-b", overrides(vq))
    tokenize(recipe, images=str(folder), out=tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="belongs to a set made otherwise .views: 'one', now 'flip'"):
        tokenize(recipe, images=str(folder), out=tmp_path / "out", kind="flip", progress=False)


def test_loader_processes_crop_and_the_time_waited_is_told(folder, tmp_path, vq):
    recipe = load_recipe("llamagen-b", overrides(vq, "data.workers=2"))
    done = tokenize(recipe, images=str(folder), out=tmp_path / "out", progress=False)
    assert done.manifest.samples == done.images == 30
    assert 0 < done.waited < done.seconds


# ---------------------------------------------------------------------------------------------------------------------
# Captions


def text_overrides(vq, t5):
    return [
        "model.size=null",
        "model.num_layers=1",
        "model.num_heads=2",
        "model.hidden_size=16",
        "model.codebook_size=24",
        "model.grid=[2,2]",
        f"model.t5_features={{encoder: {t5}, tokens: 4, features: 6}}",
        f"model.tokenizer_weights={vq}",
        "data.workers=0",
        "zipar.windows={2: 1}",
        "evaluate.windows=[2]",
    ]


def test_captions_with_and_without_their_features(tmp_path, vq, t5):
    captions = ["A  blue CAR", "a small red house a car", "house"]
    with tarfile.open(tmp_path / "pairs.tar", "w") as tar:
        for i, caption in enumerate([*captions, " "]):
            buffer = io.BytesIO()
            picture(i).save(buffer, "png")
            for kind, data in (("png", buffer.getvalue()), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{i:04d}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    recipe = load_recipe("llamagen-xl-t2i", text_overrides(vq, t5))
    batches = []
    for features in (False, True):
        out = tmp_path / f"out{features}"
        tokenize(recipe, images=f"{tmp_path}/pairs.tar", out=out, features=features, progress=False)
        batches.append(next(iter(ShardLoader(out / "train.json", batch_size=3))))
        assert "'' is not a caption" in (out / "train.skipped.txt").read_text()
    order = [captions.index(caption) for caption in batches[0].condition]
    assert sorted(order) == [0, 1, 2]
    lengths = [4, 4, 2]  # truncated to 4; the end is a token too
    assert [len(one) for one in batches[1].condition] == [lengths[i] for i in order]
    assert torch.equal(batches[0].codes, batches[1].codes)
    family = build(recipe.model)
    a, b = (family.check(batch.condition) for batch in batches)
    assert torch.equal(a.padding, b.padding)
    assert a.padding.tolist() == [[[False] * 4, [False] * 4, [True, True, False, False]][i] for i in order]
    assert (a.features - b.features).abs().max() < 2e-3 * a.features.abs().max()  # float16 on disk
    assert a.features[0].abs().sum() > 0
    assert not a.features[a.padding].any()
    with pytest.raises(ValueError, match="captions must be a list of texts"):
        family.check("one text")


def test_a_recipe_of_captions_refuses_classes(folder, tmp_path, vq, t5):
    recipe = load_recipe("llamagen-xl-t2i", text_overrides(vq, t5))
    with pytest.raises(ValueError, match="pictures has classes, and this recipe's model is prompted by captions"):
        tokenize(recipe, images=str(folder), out=tmp_path / "out", progress=False)
    recipe = load_recipe("llamagen-xl-t2i", [*text_overrides(vq, t5), "model.t5_features.encoder=nowhere/t5"])
    family = build(recipe.model)
    with pytest.raises(ValueError, match="model.t5_features.encoder = nowhere/t5: no T5 encoder can be loaded"):
        family.check(["a car"])
