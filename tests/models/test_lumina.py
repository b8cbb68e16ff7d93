"""Lumina-mGPT against transformers' own Chameleon, from a checkpoint in the published layout."""

from pathlib import Path

import pytest
import torch
from commands import every_verb
from lumina_files import CAPTIONS, CODES, END, HEIGHT, ROW_END, SIZE, VOCABULARY, WIDTH, banless, published, section
from safetensors.torch import load_file, save_file
from theorem import check_captioned_theorem
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

from zipar_train import Plan, ZipARModule, load
from zipar_train.decoding.decoder import Decoder
from zipar_train.models.family import build
from zipar_train.models.restore import load_family, read
from zipar_train.recipe.load import load_recipe
from zipar_train.recipe.schema import SamplingParams


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return published(tmp_path_factory.mktemp("lumina"))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_next_token_draws_what_transformers_draws(checkpoint, guidance):
    """Greedy, one prompt at a time, row ends forced, guidance away from the image's start alone; every code."""
    theirs = banless(checkpoint)
    family = load_family(section(checkpoint), read(checkpoint))
    assert family.grid.row_end and family.row_end == ROW_END
    prompts = family.check(CAPTIONS)
    names = {i: name for name, i in VOCABULARY.items()}
    expected = []
    for row in range(3):
        ids = prompts.ids[row][~prompts.padding[row]][None]
        said = [names[i] for i in ids[0].tolist()]
        assert " ".join(said) == (
            f"<s> Generate an image of 96x64 according to the following prompt: {CAPTIONS[row]} <reserved08706> "
            "<racm3:break> <reserved08802> <reserved08803>"
        )
        away = {} if guidance == 1 else {"negative_prompt_ids": ids[:, -3:], "guidance_scale": guidance}

        def allowed(batch, sent, start=ids.shape[1]):
            return [ROW_END] if (len(sent) - start) % (WIDTH + 1) == WIDTH else list(range(4, END))

        drawn = theirs.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=HEIGHT * (WIDTH + 1),
            do_sample=False,
            prefix_allowed_tokens_fn=allowed,
            **away,
        )
        expected.append(drawn[0, ids.shape[1] :].view(HEIGHT, WIDTH + 1)[:, :-1] - 4)
    plan = Plan.raster(family.grid, prompt=family.prompt_length)
    sampling = SamplingParams(guidance=guidance, temperature=0.0)
    (ours,) = family.grid.images(
        Decoder(family, plan)(CAPTIONS, torch.zeros(3, HEIGHT * WIDTH, dtype=torch.long), sampling)
    )
    assert torch.equal(ours, torch.stack(expected))
    assert len(torch.unique(ours)) > 3


@pytest.mark.parametrize("window", [7, 4, 2])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("streamlined", [False, True])
def test_theorem(checkpoint, window, guidance, streamlined):
    """Row ends, norms of queries and keys, prompts of two lengths; the drawing body alike."""
    family = load_family(section(checkpoint), read(checkpoint), dtype=torch.float64)
    check_captioned_theorem(family, CAPTIONS, window=window, guidance=guidance, streamlined=streamlined)


@pytest.mark.parametrize(
    ("name", "raster", "passes"), [("512", 1024, 32 + 31 * 15), ("768", 2304, 753), ("1024", 4096, 64 + 63 * 15)]
)
def test_names_and_counts_are_the_published(name, raster, passes):
    """Built on no device, against transformers' model at its default, published sizes."""
    with torch.device("meta"):
        theirs = ChameleonForConditionalGeneration(ChameleonConfig(vocabulary_map={"<image>": 8711}))
    assert sum(p.numel() for p in theirs.parameters()) == 7_043_090_432  # 7.04 B
    ours = build(load_recipe(f"lumina-mgpt-7b-{name}").model, device="meta", empty=True)
    renamed, mine = ours.renamed(theirs.state_dict()), ours.model.state_dict()
    assert {n: t.shape for n, t in renamed.items()} == {n: t.shape for n, t in mine.items()}
    assert ours.row_end == 8803
    rows = ours.grid.height
    plans = {w: Plan.zipar(ours.grid, window=w, prompt=ours.prompt_length) for w in (16, ours.grid.row_length)}
    assert plans[16].passes == passes  # at 768, the paper's 67 % fewer than 2,352
    assert plans[ours.grid.row_length].passes == raster == rows * (ours.grid.row_length - 1)  # row ends cost no pass


def test_a_tokenizer_of_another_vocabulary_is_refused(checkpoint):
    family = build(section(checkpoint).model_copy(update={"codebook_size": CODES + 1}))
    with pytest.raises(ValueError, match=rf"'<eoss>' has the id {END}, the model counts on {END + 1}"):
        family.check(CAPTIONS)


@pytest.mark.slow
def test_from_pictures_to_a_checkpoint_for_transformers(checkpoint, clip, tmp_path, run):
    words = f"{{encoder: {checkpoint}, tokens: 24, vocabulary: {SIZE}}}"
    model = [
        "model.size=null",
        "model.num_layers=2",
        "model.num_heads=4",
        "model.hidden_size=16",
        "model.ffn_size=24",
        f"model.codebook_size={CODES}",
        f"model.grid=[{HEIGHT},{WIDTH}]",
        f"model.token_prompt={words}",
    ]
    every_verb(run, tmp_path, "lumina-mgpt-7b-768", model, checkpoint=checkpoint, clip=clip, windows=[7, 3, 2])
    before = banless(checkpoint).state_dict()
    after = ChameleonForConditionalGeneration.from_pretrained(tmp_path / "hf").state_dict()
    names = [name for name in after if "vqmodel" not in name]
    assert names == [name for name in before if "vqmodel" not in name]
    changed = [name for name in names if not torch.equal(after[name], before[name])]
    assert changed and all("proj" in name for name in changed)
    assert not any("vqmodel" in n for f in (tmp_path / "hf").glob("*.safetensors") for n in load_file(f))
    again, tuned = load(tmp_path / "hf"), load(tmp_path / "run")
    assert torch.equal(again.generate(CAPTIONS, window=3).codes, tuned.generate(CAPTIONS, window=3).codes)


def test_everything_trained_is_exported_and_norms_do_not_decay(checkpoint, tmp_path):
    family = load_family(section(checkpoint), read(checkpoint))
    decays, others = ZipARModule(family, windows={7: 1}).optimizer().param_groups
    assert decays["weight_decay"] > others["weight_decay"] == 0
    norms = {p for name, p in family.model.named_parameters() if "norm" in name}
    assert norms == set(others["params"]) and norms.isdisjoint(decays["params"])
    with torch.no_grad():
        for parameter in family.model.parameters():
            parameter.fill_(7)
    whole = family.published(str(checkpoint))
    assert whole.model.rotary_emb.inv_freq[0] == 1  # it works as it is, too
    whole.save_pretrained(tmp_path)
    state = ChameleonForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    before = banless(checkpoint).state_dict()
    for name, tensor in state.items():
        if name == "lm_head.weight":
            assert (tensor[4:END] == 7).all() and torch.equal(tensor[END:], before[name][END:])
        elif "vqmodel" not in name:
            assert (tensor == 7).all(), name


def test_a_folder_of_another_model_is_named(checkpoint, tmp_path):
    family = load_family(section(checkpoint), read(checkpoint))
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    save_file({"model.norm.weight": torch.zeros(16)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is not a checkpoint of ChameleonForConditionalGeneration. .* missing"):
        family.published(str(tmp_path))
