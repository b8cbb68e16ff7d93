"""Janus in its authors' layout: their codes and prompts, and round trips through ours and transformers' layout."""

import json
import shutil

import janus_files
import original
import original_janus
import pytest
import torch
from commands import every_verb
from janus_files import CAPTIONS, CONFIG, PAD, VQ, original_prompt, recipe_of, section, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers import JanusConfig, JanusForConditionalGeneration, PreTrainedTokenizerFast

from zipar_train import Plan, load
from zipar_train.decoding.decoder import Decoder
from zipar_train.export.weights import export
from zipar_train.models import janus_original
from zipar_train.models.family import build
from zipar_train.models.files import read_folder
from zipar_train.models.restore import load_family, read
from zipar_train.models.tokenizers.vq16 import load_vq16
from zipar_train.recipe.model import Model, Words
from zipar_train.recipe.schema import SamplingParams

PUBLISHED = {  # deepseek-ai/Janus-Pro-1B and -7B, config.json; parameters of MultiModalityCausalLM built from them
    "1B": ({"width": 2048, "ffn": 5632, "layers": 24, "heads": 16}, 2_089_232_011),
    "7B": ({"width": 4096, "ffn": 11008, "layers": 30, "heads": 32}, 7_420_368_523),
}


@pytest.fixture(scope="module", params=["sharded", "bin", "safetensors"])
def each_layout(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return folder, write_checkpoint(folder, layout=request.param)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("janus")
    return folder, write_checkpoint(folder)


def greedy(family, captions, guidance):
    plan = Plan.raster(family.grid, prompt=family.prompt_length)
    sampling = SamplingParams(guidance=guidance, temperature=0.0)
    return Decoder(family, plan)(captions, torch.zeros(len(captions), 9, dtype=torch.long), sampling).flatten(1)


@pytest.mark.parametrize("guidance", [2.0, 5.0])
def test_next_token_draws_what_the_authors_draw(each_layout, guidance):
    """Greedy; ours one batch of left-padded prompts, theirs one prompt at a time without padding."""
    folder, state = each_layout
    family = load_family(section(folder), read(folder))
    ours = greedy(family, CAPTIONS, guidance)
    pad = family.prompter.tokenizer.convert_tokens_to_ids(PAD)
    prompts = [original_prompt(folder, caption) for caption in CAPTIONS]
    assert len({len(prompt) for prompt in prompts}) > 1
    theirs = [original_janus.draw(state, CONFIG, prompt, pad=pad, scale=guidance) for prompt in prompts]
    assert torch.equal(ours, torch.cat(theirs))
    assert len(ours.unique()) > 3


def test_prompts_are_the_authors(checkpoint):
    folder, _ = checkpoint
    family = build(section(folder), empty=True, device="meta")
    texts = [*CAPTIONS, "  A cat,  two dogs;\nthree cars é 日本 ", "<|User|> a <begin_of_image> b"]
    ids, padding = family.prompter.check(texts, torch.device("cpu"))
    for row, text in enumerate(texts):
        assert ids[row][~padding[row]].tolist() == original_prompt(folder, text)
    tokenizer = family.prompter.tokenizer
    assert type(tokenizer) is PreTrainedTokenizerFast  # LlamaTokenizer, which is named, loses spaces in 5.17
    assert tokenizer.pad_token == PAD and tokenizer.decode(tokenizer("a blue car").input_ids[1:]) == "a blue car"
    dropped = family.prompter.pad_caption(family.prompter.check(CAPTIONS, torch.device("cpu")), torch.ones(3).bool())
    for row, text in enumerate(CAPTIONS):
        prompt = original_prompt(folder, text)
        frame = [prompt[0], *[tokenizer.pad_token_id] * (len(prompt) - 2), prompt[-1]]  # tokens[i, 1:-1] = pad_id
        assert dropped.ids[row][~dropped.padding[row]].tolist() == frame


def test_the_image_tokenizer_is_the_authors(each_layout):
    folder, state = each_layout
    vq = {
        name.removeprefix("gen_vision_model."): t for name, t in state.items() if name.startswith("gen_vision_model.")
    }
    ours = load_vq16(str(folder), codes=24)
    pixels = torch.randint(256, (3, 3, 24, 24), dtype=torch.uint8)
    codes = original.vq_encode(vq, pixels / 127.5 - 1, **VQ)
    assert torch.equal(ours.encode(pixels), codes) and len(codes.unique()) > 3
    theirs = original.vq_decode(vq, codes, **VQ)
    assert (ours.images(codes) - theirs).abs().max() < 1e-5 * theirs.abs().max()
    with pytest.raises(ValueError, match="has a codebook of 24 codes, the recipe's model one of 25"):
        load_vq16(str(folder), codes=25)


def test_names_and_shapes_are_the_published():
    """Every name has a namesake of the same shape in transformers' model of that size, and ours is a part of both."""
    for size, (text, parameters) in PUBLISHED.items():
        config = original_janus.config(**text)
        vq = {"base": 128, "mult": (1, 1, 2, 2, 4), "latent": 256, "embed": 8, "codes": 16384, "blocks": 2}
        tokenizer = {f"gen_vision_model.{name}": list(t.shape) for name, t in original.random_vq(**vq)[0].items()}
        shapes = original_janus.shapes(config) | tokenizer
        with torch.device("meta"):
            theirs = {name: torch.empty(shape) for name, shape in shapes.items()}
        counted = [tensor for name, tensor in theirs.items() if "codebook_used" not in name]
        assert sum(tensor.numel() for tensor in counted) == parameters
        converted = janus_original.to_transformers(theirs)
        built = janus_original.transformers_config(config["language_config"], converted, image_token=7)
        published = JanusConfig(  # by transformers' conversion script, convert_janus_weights_to_hf.py
            text_config=config["language_config"] | {"model_type": "llama", "torch_dtype": None},
            vision_config={"image_size": 384, "projection_dim": text["width"], "depth": 2},
            vq_config={"projection_dim": text["width"], "image_token_embed_dim": text["width"]},
        )
        for part in ("text_config", "vision_config", "vq_config"):
            ours, wanted = (getattr(each, part).to_dict() for each in (built, published))
            assert {**ours, "dtype": 0, "tie_word_embeddings": 0} == {**wanted, "dtype": 0, "tie_word_embeddings": 0}
        with torch.device("meta"):
            whole = JanusForConditionalGeneration(published).state_dict()
        assert {n: t.shape for n, t in converted.items()} == {n: t.shape for n, t in whole.items()}
        back = janus_original.from_transformers(whole)
        assert {n: list(t.shape) for n, t in back.items()} == {
            n: shape for n, shape in shapes.items() if "attn_pool" not in n and "codebook_used" not in n
        }
        made = janus_original.original_config(built, torch.bfloat16)
        assert {**made["language_config"], **config["language_config"]} == made["language_config"]
        assert {key: value for key, value in made.items() if key != "language_config"} == {
            key: value for key, value in config.items() if key != "language_config"
        }
        words = Words(encoder="nowhere", tokens=64)
        model = Model(family="janus", size=size, grid=[24, 24], codebook_size=16384, token_prompt=words)
        family = build(model, device="meta", empty=True)
        mine = {n: t.shape for n, t in family.model.state_dict().items()}
        assert {n: t.shape for n, t in family.renamed(theirs).items()} == mine


def test_to_the_authors_layout_and_back(each_layout, tmp_path):
    """Every tensor equal, those that are not used for images too, in files of the source's kind."""
    folder, state = each_layout
    out = export(recipe_of(folder), tmp_path / "out", to="original")
    back = read_folder(out)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    assert json.loads((out / "config.json").read_text()) == CONFIG
    weights = {path.name for path in out.iterdir()} & {"pytorch_model.bin", "model.safetensors"}
    assert weights == ({"model.safetensors"} if (folder / "model.safetensors").exists() else {"pytorch_model.bin"})
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    first, again = load_family(section(folder), read(folder)), load(out, device="cpu").load_family()
    assert torch.equal(greedy(again, CAPTIONS, 5.0), greedy(first, CAPTIONS, 5.0))


def test_the_authors_layout_holds_the_trained_weights(checkpoint):
    folder, state = checkpoint
    family = load_family(section(folder), read(folder))
    with torch.no_grad():
        for parameter in family.model.parameters():
            parameter.add_(1)
    back, config = family.original(str(folder))
    for name, tensor in state.items():
        image = not name.startswith(("vision_model.", "aligner.", "gen_vision_model.", "language_model.lm_head."))
        assert torch.equal(back[name], tensor + image), name
    assert config == CONFIG


def test_to_transformers_layout(checkpoint, tmp_path):
    """Plain transformers draws the authors' codes from the export, and sees pictures and reads words as it did."""
    folder, state = checkpoint
    out = export(recipe_of(folder), tmp_path / "out", to="hf")
    theirs = JanusForConditionalGeneration.from_pretrained(out).eval()
    family = load_family(section(folder), read(folder))
    prompts = family.check(CAPTIONS)
    assert theirs.config.image_token_id == family.prompter.tokenizer.convert_tokens_to_ids("<image_placeholder>")
    drawn = theirs.generate(
        prompts.ids, attention_mask=(~prompts.padding).long(), generation_mode="image", do_sample=False, max_length=80
    )
    assert torch.equal(drawn, greedy(family, CAPTIONS, 5.0))
    assert not theirs.config.tie_word_embeddings
    assert torch.equal(theirs.lm_head.weight, state["language_model.lm_head.weight"])
    assert not (out / "processor_config.json").exists() and (out / "tokenizer.json").exists()
    with torch.no_grad():
        images = torch.randn(2, 3, 24, 24)
        seen = theirs.model.aligner(theirs.model.vision_model(images).last_hidden_state)
        expected = original_janus.see(state, images, patch=8)
        again = family.published(str(folder)).model.vision_model(images).last_hidden_state  # before it is saved
        assert torch.equal(again, theirs.model.vision_model(images).last_hidden_state)
    assert expected.std() > 0.5 and (seen - expected).abs().max() < 1e-4
    other = load_family(section(out, token_prompt=section(folder).token_prompt), read(out))
    assert all(torch.equal(t, other.model.state_dict()[n]) for n, t in family.model.state_dict().items())
    assert load_vq16(str(out), codes=24).sha256 == load_vq16(str(folder), codes=24).sha256


@pytest.fixture
def in_transformers(checkpoint, tmp_path):
    """The checkpoint in transformers' layout, without the recipe, whose weights are the authors'."""
    folder = export(recipe_of(checkpoint[0]), tmp_path / "hf", to="hf")
    (folder / "recipe.yaml").unlink()
    return folder


@pytest.fixture
def any_size(monkeypatch):
    """Allow sizes of the vision tower and the image tokenizer that the authors' code does not build."""
    monkeypatch.setattr(janus_original, "TOWER_SHAPE", {})
    monkeypatch.setattr(janus_original, "VQ_SHAPE", {})


def test_parts_that_the_authors_code_cannot_build_are_named(in_transformers, tmp_path):
    with pytest.raises(ValueError, match=r"vision_config.hidden_size is 32, and the code of deepseek-ai/Janus builds"):
        export(recipe_of(in_transformers), tmp_path / "out", to="original")
    assert not (tmp_path / "out").exists()


def test_from_transformers_to_the_authors_layout(checkpoint, in_transformers, tmp_path, any_size):
    (_, state), hf = checkpoint, in_transformers
    out = export(recipe_of(hf), tmp_path / "out", to="original")
    back = load_file(out / "model.safetensors")
    assert {*state} - {*back} == {name for name in state if "attn_pool" in name or "codebook_used" in name}
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.items())
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "multi_modality" and config["torch_dtype"] == "float32"
    family = load_family(section(out), read(out))
    assert torch.equal(greedy(family, CAPTIONS, 5.0), greedy(load_family(section(hf), read(hf)), CAPTIONS, 5.0))


def test_tied_heads_are_written_apart(in_transformers, tmp_path, any_size):
    """Transformers ties the head of words to their embedding by default; the authors' code does not."""
    hf = in_transformers
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = load_file(hf / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, hf / "model.safetensors", metadata={"format": "pt"})
    back = load_file(export(recipe_of(hf), tmp_path / "out", to="original") / "model.safetensors")
    words = back["language_model.model.embed_tokens.weight"]
    assert torch.equal(back["language_model.lm_head.weight"], words)


@pytest.mark.parametrize("layout", ["sharded", "safetensors"])
def test_the_hub_gives_one_kind_of_file(tmp_path, monkeypatch, layout):
    """Its .bin are downloaded only if there are no safetensors."""
    hub, local = tmp_path / "hub", tmp_path / "local"
    write_checkpoint(hub, layout=layout)
    if layout == "safetensors":
        (hub / "pytorch_model.bin").write_bytes(b"large")

    def download(repo, *, allow_patterns):
        assert repo == "deepseek-ai/Janus-Pro-7B"
        local.mkdir(exist_ok=True)
        for path in [path for pattern in allow_patterns for path in hub.glob(pattern)]:
            shutil.copy(path, local)
        return str(local)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    family = load_family(section(hub), read("deepseek-ai/Janus-Pro-7B:"))
    assert torch.equal(greedy(family, CAPTIONS, 2.0), greedy(load_family(section(hub), read(hub)), CAPTIONS, 2.0))
    assert any(local.glob("*.bin")) == (layout == "sharded")


@pytest.mark.slow
def test_from_pictures_to_both_layouts(checkpoint, clip, tmp_path, run):
    folder, state = checkpoint
    settings = janus_files.overrides(folder)
    every_verb(run, tmp_path, "janus-pro-1b", settings, checkpoint=folder, clip=clip, windows=[3, 2, 1])
    status, _, err = run("export", "--checkpoint", tmp_path / "run", "--to", "original", "--out", tmp_path / "own")
    assert status == 0, err
    back = read_folder(tmp_path / "own")
    changed = {name for name, tensor in state.items() if not torch.equal(tensor, back[name])}
    assert changed and all(name.startswith("language_model.model.layers.") for name in changed)
    whole = JanusForConditionalGeneration.from_pretrained(tmp_path / "hf").state_dict()
    converted = janus_original.to_transformers(back)
    assert whole.keys() == converted.keys() and all(torch.equal(t, converted[n]) for n, t in whole.items())
    drawn = [load(tmp_path / name).generate(CAPTIONS, window=2).codes for name in ("run", "own", "hf")]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])
