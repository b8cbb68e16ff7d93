"""GLM-Image through the command line, from captioned pictures to an export for plain transformers."""

import json
import shutil
import sys
from fnmatch import fnmatch
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import every_verb, sets
from glm_image_files import CODES, GRID, OVERRIDES, PREVIEW, VOCABULARY, StandIn, section, write_checkpoint
from safetensors.torch import load_file
from transformers import GlmImageForConditionalGeneration

from zipar_train import load
from zipar_train.data.loader import ShardLoader
from zipar_train.data.manifest import Layout
from zipar_train.data.sample import Sample, check_sample
from zipar_train.models.restore import load_family, read
from zipar_train.recipe.model import Words

STAGE = "vision_language_encoder"
CAPTIONS = ["a blue car", "a small red house", "car"]


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A whole checkpoint, whose diffusion stage is a stand-in."""
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(GlmImagePipeline=StandIn))
    folder = write_checkpoint(tmp_path / "checkpoint")
    (folder / "transformer").mkdir()
    return folder


def generated_by_transformers(folder, family, captions):
    """Codes of the large grid by an export in plain transformers, greedy, without the special ids."""
    model = GlmImageForConditionalGeneration.from_pretrained(folder).eval()
    prompts = family.check(captions)
    grids = torch.tensor([[1, *GRID], [1, *PREVIEW]] * len(captions))
    total = family.grid.num_codes
    ids = model.generate(
        input_ids=prompts.ids,
        attention_mask=(~prompts.padding).long(),
        image_grid_thw=grids,
        images_per_sample=torch.tensor([2] * len(captions)),
        max_new_tokens=total,
        do_sample=False,
        suppress_tokens=list(range(CODES, CODES + 128)),
    )
    return family.grid.images(ids[:, -total:])


@pytest.mark.slow
def test_from_pictures_to_a_checkpoint_for_transformers(checkpoint, clip, tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    stage = checkpoint / STAGE
    words = f"{{encoder: {checkpoint}/processor, tokens: 20, vocabulary: {VOCABULARY}}}"
    model = [*OVERRIDES, f"model.token_prompt={words}"]
    every_verb(run, tmp_path, "glm-image", model, checkpoint=stage, tokenizer=checkpoint, clip=clip, windows=[4, 2, 1])
    batch = next(iter(ShardLoader(str(tmp_path / "shards" / "train.json"), batch_size=4)))
    assert batch.codes.shape == (4, GRID[0] * GRID[1] + PREVIEW[0] * PREVIEW[1])
    before, after = (GlmImageForConditionalGeneration.from_pretrained(f) for f in (stage, tmp_path / "hf"))
    changed = [n for n, t in after.state_dict().items() if not torch.equal(t, before.state_dict()[n])]
    assert changed and all(".language_model.layers." in name for name in changed)
    again, tuned = load(tmp_path / "hf"), load(tmp_path / "run")
    assert torch.equal(again.generate(CAPTIONS, window=2).codes, tuned.generate(CAPTIONS, window=2).codes)

    greedy = ["--caption", CAPTIONS[0], "--caption", CAPTIONS[1], "--temperature", "0"]
    status, out, err = run("generate", "--checkpoint", "hf", *greedy, "--codes", "codes.safetensors")
    assert status == 0 and out.startswith("codes.safetensors: 2 images in 18 passes"), err
    saved = load_file("codes.safetensors")
    previews, codes = generated_by_transformers(tmp_path / "hf", again.inference_family, CAPTIONS[:2])
    assert torch.equal(saved["codes"], codes) and torch.equal(saved["previews"], previews)
    assert saved["prior_token_ids"].shape == (2, 4 * GRID[0] * GRID[1])

    for options, message in (
        ([], "give --out for a picture, --codes for a file of codes, or --animate for an animation"),
        (["--codes", "codes.pt"], "--codes codes.pt: the file's name must end in .safetensors"),
    ):
        status, _, err = run("generate", "--checkpoint", "hf", *greedy, *options)
        assert status and message in err
    status, _, err = run("generate", "--checkpoint", "hf", "--caption", "car " * 30, "--codes", "codes.safetensors")
    assert status and "the prompt has 20: shorten it" in err

    # the preview of the pictures is missing
    manifest = tmp_path / "shards" / "train.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"preview": None}))
    recipe = sets([*model, f"model.weights={stage}", "model.tokenizer=null", "model.tokenizer_weights=null"])
    windows = ["zipar.windows={4: 1}", "evaluate.windows=[4]"]
    data = sets([*windows, f"data.train={manifest}", "run_dir=other", "trainer.accelerator=cpu", "tune.attention=sdpa"])
    status, _, err = run("fit", "--recipe", "glm-image", *recipe, *data)
    assert status and "grid 3x4, but the recipe's model has 3x4 after 2x3. Use shards made by" in err


def test_the_hub_gives_the_folders_that_are_asked_for(checkpoint, tmp_path, monkeypatch):
    """The autoregressive stage alone, and the tokenizer of text; the whole repository for pixels."""
    local, asked = tmp_path / "local", []

    def download(repo, *, allow_patterns):
        assert repo == "zai-org/GLM-Image"
        asked.append(allow_patterns)
        for path in [path for path in checkpoint.rglob("*") if path.is_file()]:
            name = path.relative_to(checkpoint)
            if any(fnmatch(str(name), pattern) for pattern in allow_patterns):  # as huggingface_hub, * spans folders
                (local / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, local / name)
        return str(local)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    words = Words(encoder="zai-org/GLM-Image:processor/", tokens=20, vocabulary=VOCABULARY)
    model = section(checkpoint, token_prompt=words, tokenizer_weights="zai-org/GLM-Image:")
    family = load_family(model, read("zai-org/GLM-Image:vision_language_encoder/"))
    assert {path.name for path in local.iterdir()} == {"vision_language_encoder"}
    assert torch.equal(
        family.check(CAPTIONS).ids, load_family(section(checkpoint), read(checkpoint / STAGE)).check(CAPTIONS).ids
    )
    assert {path.name for path in local.iterdir()} == {"vision_language_encoder", "processor"}
    assert family.tokenizer.folder == local and len(asked) == 3


def test_samples_without_their_preview_are_refused():
    layout = Layout(source="x", grid=(3, 4), preview=(2, 3), codes=CODES)
    codes, preview = np.zeros((1, 3, 4), np.uint16), np.zeros((1, 2, 3), np.uint16)
    check_sample(Sample("k", codes, "a car", None, preview), layout, layout.grid_of(), where="k")
    with pytest.raises(ValueError, match="k: no codes of the preview. Make the shard again"):
        check_sample(Sample("k", codes, "a car"), layout, layout.grid_of(), where="k")
