"""Captions that do not fit the model's prompt are told, with their sample, before work starts; or left out."""

import io
import re
import tarfile

import numpy as np
import pytest
from commands import picture, sets
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from zipar_train.data.loader import ShardLoader
from zipar_train.data.manifest import Layout
from zipar_train.data.sample import Sample
from zipar_train.data.shards import read_manifest, write_shards
from zipar_train.data.tokenize import tokenize
from zipar_train.data.validate import check_captions, check_shards
from zipar_train.evaluation.candidates import check_captions as check_wanted
from zipar_train.models.family import fits
from zipar_train.recipe.load import load_recipe
from zipar_train.training.trainer import build_datamodule

WORDS = ["<pad>", "<bos>", "<unk>", "<begin_of_image>", "<|User|>", "<|Assistant|>", ":", "a", "blue", "red", "car"]
LONG = "a blue car " * 10


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Janus-Pro's tokenizer of text, of a few words."""
    folder = tmp_path_factory.mktemp("words")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=["<begin_of_image>", "<|User|>", "<|Assistant|>", ":"],
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(encoder, tmp_path):
    """Overrides of Janus-Pro's recipe: tiny, prompts of 12 tokens, codes that are colours."""
    train, val = (f"data.{split}={tmp_path}/{split}.json" for split in ("train", "val"))
    small = ["model.size=null", "model.num_layers=1", "model.num_heads=2", "model.hidden_size=16", "model.ffn_size=24"]
    return [
        *small,
        "model.codebook_size=24",
        "model.grid=[3,3]",
        "model.tokenizer=palette",
        "model.tokenizer_weights=null",
        f"model.token_prompt={{encoder: {encoder}, tokens: 12, vocabulary: 20}}",
        "model.weights=null",
        "tune.lora=null",
        "zipar.windows={3: 1, 1: 1}",
        "evaluate.windows=[3,1]",
        "data.workers=0",
        train,
        val,
        "tune.distill=0",
        f"run_dir={tmp_path}/run",
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
        "tune.compile=false",
        "data.micro_batch_size=4",
        "optim.global_batch_size=4",
        "checkpoint_every=null",
        "trainer.val_check_interval=1.0",
        "log.wandb=disabled",
        "trainer.max_epochs=1",
        "tune.activation_checkpointing=false",
        "evaluate.clip=null",
        "evaluate.captions=null",
    ]


def captioned(tmp_path, *, long=(5,), name="train", count=12):
    samples = [Sample(f"s{k}", np.full((1, 3, 3), k), LONG if k in long else "a blue car") for k in range(count)]
    layout = Layout(source="test", grid=(3, 3), codes=24)
    write_shards(samples, tmp_path / f"{name}.json", layout=layout, per_shard=5)
    return tmp_path / f"{name}.json"


TOLD = "sample s5: caption 'a blue car .*takes 3. tokens with what surrounds it, the prompt has 12"


def test_fit_tells_of_a_long_caption_before_it_starts(settings, tmp_path, run):
    captioned(tmp_path, long=(5, 7))
    captioned(tmp_path, long=(), name="val")
    status, out, err = run("fit", "--recipe", "janus-pro-1b", *sets(settings))
    assert status == 2
    assert re.search(rf"train-000001\.tar, {TOLD}", err) and "2 samples of 12 are damaged or do not fit" in err
    assert "data.on_bad_sample=skip" in err and "A step is" not in out
    assert not (tmp_path / "run").exists()


def test_fit_leaves_long_captions_out(settings, tmp_path, run):
    captioned(tmp_path, long=(5,))
    captioned(tmp_path, long=(0, 3), name="val")
    status, _, err = run("fit", "--recipe", "janus-pro-1b", *sets([*settings, "data.on_bad_sample=skip"]))
    assert status == 0, err
    assert len(re.findall(r"skipped: .*takes 3. tokens", err)) >= 3
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


def test_shards_check_tells_of_every_long_caption(settings, tmp_path, run):
    path = captioned(tmp_path, long=(5, 11))
    status, out, err = run("shards", "check", "--recipe", "janus-pro-1b", *sets(settings), path)
    assert status == 1
    assert re.search(TOLD, err) and "sample s11" in err
    assert "10 of 12 readable" in out and "verdict    2 problems" in out
    assert not check_shards(path).problems  # without a recipe nobody knows how long a prompt is


def test_tokenize_lists_long_captions_and_marks_the_set(settings, tmp_path, run):
    with tarfile.open(tmp_path / "pairs.tar", "w") as tar:
        for k in range(6):
            buffer = io.BytesIO()
            picture(k, size=(3, 3)).save(buffer, "png")
            for kind, data in (("png", buffer.getvalue()), ("txt", (LONG if k == 2 else "a car").encode())):
                member = tarfile.TarInfo(f"{k}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    recipe = load_recipe("janus-pro-1b", settings)
    done = tokenize(recipe, images=str(tmp_path / "pairs.tar"), out=tmp_path, progress=False)
    (reason,) = done.skipped.values()
    assert reason.startswith("label error: caption 'a blue car ") and "the prompt has 12" in reason
    assert done.manifest.samples == 5
    assert done.manifest.prompt == fits(recipe.model).fingerprint
    for shard in done.manifest.shards:
        (tmp_path / shard.name).write_bytes(b"")
    check_captions(recipe.model, {str(tmp_path / "train.json"): done.manifest})  # so it is not read once more
    other = load_recipe("janus-pro-1b", [*settings, "model.token_prompt.tokens=11"])
    with pytest.raises(ValueError, match="is damaged"):
        check_captions(other.model, {str(tmp_path / "train.json"): done.manifest})


def test_captions_to_draw_are_checked_before_anything_is_drawn(settings):
    recipe = load_recipe("janus-pro-1b", settings)
    check_wanted(recipe, ["a car", "a blue car"])
    with pytest.raises(ValueError, match="evaluate.captions = .*val.json: caption 'a blue car .* the prompt has 12"):
        check_wanted(recipe, ["a car", LONG])


def test_loaders_know_only_what_can_be_skipped(settings, tmp_path):
    captioned(tmp_path, long=())
    captioned(tmp_path, long=(), name="val")
    assert build_datamodule(load_recipe("janus-pro-1b", settings)).misfit is None
    skipping = build_datamodule(load_recipe("janus-pro-1b", [*settings, "data.on_bad_sample=skip"]))
    assert skipping.val_dataloader().misfit and skipping.val_dataloader().skip == "skip"


@pytest.mark.parametrize("workers", [0, 2])
def test_features_of_another_width_are_a_fault_of_their_sample(tmp_path, workers):
    text = {"tokens": 4, "features": 6}
    recipe = load_recipe(
        "llamagen-xl-t2i",
        [
            f"model.t5_features={text}",
            "model.codebook_size=24",
            "model.grid=[3,3]",
            "zipar.windows={3: 1}",
            "evaluate.windows=[3]",
        ],
    )
    samples = [
        Sample(f"s{k}", np.full((1, 3, 3), k), "a car", np.zeros((2, 5 if k == 3 else 6), np.float16)) for k in range(8)
    ]
    layout = Layout(source="test", grid=(3, 3), codes=24, features=True)
    write_shards(samples, tmp_path / "train.json", layout=layout)
    misfit = fits(recipe.model).misfit
    with pytest.raises(ValueError, match="sample s3: caption features are 5 wide, the model's 6"):
        list(ShardLoader(tmp_path / "train.json", batch_size=4, misfit=misfit))
    loader = ShardLoader(tmp_path / "train.json", batch_size=4, misfit=misfit, damaged="skip", workers=workers)
    assert len(list(loader)) == 2
    assert list(loader.damaged.values()) == [1]
    with pytest.raises(ValueError, match="sample x: no features, which its manifest promises"):
        write_shards([Sample("x", np.zeros((1, 3, 3), int), "a car")], tmp_path / "no.json", layout=layout)


def test_older_manifests_keep_their_checksum(tmp_path):
    """Resumes compare it: a field that an older manifest lacks says nothing."""
    path = captioned(tmp_path)
    held = read_manifest(path)
    assert "class_names" not in path.read_text() and "prompt" not in path.read_text()
    assert held.checksum == "46fd5d24450faa1834726c4f607922e7dfe2e71f9483ef981825999da6afaca9"
    assert held.model_copy(update={"prompt": "x"}).checksum != held.checksum
