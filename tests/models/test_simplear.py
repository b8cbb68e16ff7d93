"""SimpleAR against a loop over plain transformers like the authors', from a checkpoint in the published layout."""

import pytest
import torch
from commands import every_verb
from simplear_files import CAPTIONS, FIRST, HEIGHT, TEXT, VOCABULARY, WIDTH, checkpoint_in, section
from theorem import check_captioned_theorem, drawn_and_seen
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from zipar_train import Plan, dense, load, teacher_forced
from zipar_train.decoding.adaptive.decoder import AdaptiveDecoder
from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.fused_llama import fuse_for_inference
from zipar_train.decoding.sampling import code_seeds
from zipar_train.models.family import build
from zipar_train.models.restore import load_family, read
from zipar_train.recipe.load import load_recipe
from zipar_train.recipe.schema import SamplingParams

CODES = VOCABULARY - FIRST


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simplear")
    checkpoint_in(folder)
    return folder


@pytest.fixture
def family(checkpoint):
    return load_family(section(checkpoint), read(checkpoint))


@torch.no_grad()
def authors_loop(model, ids, other, scale):
    """Codes (N,) of one image, as simpar_qwen2.py generates them greedily: CFGLogits over all ids, two caches."""
    kept = None
    away = None
    drawn = []
    for _ in range(HEIGHT * WIDTH):
        kept = model(ids if kept is None else drawn[-1], past_key_values=kept and kept.past_key_values, use_cache=True)
        scores = kept.logits[:, -1].log_softmax(-1)
        if scale != 1:
            given = other if away is None else drawn[-1]
            away = model(given, past_key_values=away and away.past_key_values, use_cache=True)
            without = away.logits[:, -1].log_softmax(-1)
            scores = scale * (scores - without) + without
        drawn.append(scores.argmax(-1, keepdim=True))
    return torch.cat(drawn, dim=1)[0] - FIRST


@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_next_token_draws_what_the_authors_loop_draws(checkpoint, family, guidance):
    """Greedy, one prompt at a time without padding, away from the negative prompt; every code, over all ids."""
    theirs = Qwen2ForCausalLM.from_pretrained(checkpoint).eval()
    assert not family.grid.row_end
    tokenizer = family.prompter.tokenizer
    away = tokenizer("<|t2i|>An image of bad blurry<|soi|>", return_tensors="pt").input_ids
    expected = []
    for caption in CAPTIONS:
        ids = tokenizer(f"<|t2i|>A highly realistic image of {caption}<|soi|>", return_tensors="pt").input_ids
        assert tokenizer.decode(ids[0]) == f"<|t2i|>A highly realistic image of {caption}<|soi|>"
        expected.append(authors_loop(theirs, ids, away, guidance))
    plan = Plan.raster(family.grid, prompt=family.prompt_length)
    sampling = SamplingParams(guidance=guidance, temperature=0.0)
    ours = Decoder(family, plan)(CAPTIONS, torch.zeros(3, HEIGHT * WIDTH, dtype=torch.long), sampling)
    assert torch.equal(ours.flatten(1), torch.stack(expected))
    assert len(torch.unique(ours)) > 5 and len({tuple(image.tolist()) for image in ours.flatten(1)}) == 3


@pytest.mark.parametrize("window", [5, 3, 1])
@pytest.mark.parametrize("guidance", [1.0, 6.0])
@pytest.mark.parametrize("streamlined", [False, True])
def test_theorem(checkpoint, window, guidance, streamlined):
    """Biases, grouped queries, prompts and the negative prompt padded differently; the drawing body alike."""
    family = load_family(section(checkpoint), read(checkpoint), dtype=torch.float64)
    null = family.drop(family.check(CAPTIONS), torch.ones(3, dtype=torch.bool))
    assert not torch.equal(null.padding, family.check(CAPTIONS).padding)
    check_captioned_theorem(family, CAPTIONS, window=window, guidance=guidance, streamlined=streamlined)


def test_a_fused_body_has_the_biases(family):
    """Against transformers' layers."""
    plan, condition = Plan.zipar(family.grid, window=2, prompt=family.prompt_length), family.check(CAPTIONS)
    codes = torch.randint(CODES, (3, HEIGHT * WIDTH))
    with torch.no_grad():
        stock = teacher_forced(family, plan, codes, condition, dense(plan))
        assert fuse_for_inference(family.model)
        fused = teacher_forced(family, plan, codes, condition, dense(plan))
        for layer in family.model.model.layers:
            layer.bias.zero_()
        without = teacher_forced(family, plan, codes, condition, dense(plan))
    most = 1e-4 * stock.abs().max()
    assert (fused - stock).abs().max() < most < (without - stock).abs().max()


@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_lookahead_draws_the_same_in_fewer_passes(family, guidance):
    plan = Plan.zipar(family.grid, window=2, prompt=family.prompt_length)
    seeds, decoder = code_seeds([0, 1, 2], HEIGHT * WIDTH, seed=0), Decoder(family, plan)
    codes = decoder(CAPTIONS, seeds, SamplingParams(guidance=guidance, top_k=1))
    before = decoder.passes(3)
    assert torch.equal(decoder(CAPTIONS, seeds, SamplingParams(guidance=guidance, top_k=1, lookahead=8)), codes)
    assert max(decoder.passes(3)) < min(before)


@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_adaptive_windows_at_the_whole_row_are_next_token(family, guidance):
    """And smaller ones generate, in fewer passes."""
    sampling = SamplingParams(guidance=guidance, temperature=0.0)
    raster = Decoder(family, Plan.raster(family.grid, prompt=family.prompt_length))
    drawn = {}
    for window in (WIDTH, 1):
        decoder = AdaptiveDecoder(family, window=window)
        drawn[window] = decoder(CAPTIONS, code_seeds([0, 1, 2], decoder.numbers, seed=0), sampling)
        passes = [plan.passes for plan in decoder.plans(3)]
        assert (min(passes) == HEIGHT * WIDTH) if window == WIDTH else (max(passes) < HEIGHT * WIDTH)
    assert torch.equal(drawn[WIDTH], raster(CAPTIONS, torch.zeros(3, HEIGHT * WIDTH, dtype=torch.long), sampling))


@pytest.mark.parametrize(
    ("recipe", "parameters", "config"),
    [
        ("simplear-0.5b-1024", 551_140_224, (24, 14, 896, 4864)),
        ("simplear-1.5b-1024", 1_641_612_800, (28, 12, 1536, 8960)),
    ],
)
def test_names_and_counts_are_the_published(recipe, parameters, config):
    """Built on no device, against transformers' model at the sizes of Qwen2.5 with 215,672 ids, tied as in config.json.

    Qwen2.5-0.5B has 494,032,768 parameters and 151,936 ids, Qwen2.5-1.5B 1,543,714,304: the counts follow.
    """
    depth, heads, width, feed_forward = config
    before = {896: 494_032_768, 1536: 1_543_714_304}[width]
    assert parameters == before + (215_672 - 151_936) * width
    with torch.device("meta"):
        theirs = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=215672, num_hidden_layers=depth, num_attention_heads=heads, num_key_value_heads=2,
                hidden_size=width, intermediate_size=feed_forward, tie_word_embeddings=True,
            )
        )  # fmt: skip
    assert sum(p.numel() for p in theirs.parameters()) == parameters
    ours = build(load_recipe(recipe).model, device="meta", empty=True)
    shapes = {name: p.shape for name, p in theirs.named_parameters()}  # the head's name is not among them: it is tied
    assert {name: p.shape for name, p in ours.model.named_parameters()} == shapes
    assert {name: t.shape for name, t in ours.model.state_dict().items()} == shapes
    assert (ours.first, ours.codebook_size, ours.prompter.size) == (151672, 64000, 151672)
    assert ours.head(torch.empty(2, width, device="meta")).shape == (2, 64000)


def test_passes_at_1024_pixels():
    grid, prompt = (model := load_recipe("simplear-0.5b-1024").model).raster, model.prompt
    passes = {window: Plan.zipar(grid, window=window, prompt=prompt).passes for window in (64, 16, 8, 4)}
    assert passes == {64: 4096, 16: 1120, 8: 624, 4: 376}


def test_the_published_weights_are_those_seen_by_plain_transformers(checkpoint, family):
    """Teacher-forced next-token logits, with a prompt without padding."""
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    prompts, codes = family.check(["a small red house"] * 2), torch.randint(CODES, (2, HEIGHT * WIDTH))
    start = int(prompts.padding.sum(1)[0])
    with torch.no_grad():
        logits = theirs(torch.cat([prompts.ids[:, start:], codes + FIRST], dim=1)).logits
        plan = Plan.raster(family.grid, prompt=family.prompt_length)
        ours = teacher_forced(family, plan, codes, prompts, dense(plan))
    assert (ours - logits[:, -HEIGHT * WIDTH - 1 : -1, FIRST:]).abs().max() < 1e-4 * logits.abs().max()
    assert TEXT["vocab_size"] == VOCABULARY == logits.shape[-1]
    codes, _ = drawn_and_seen(family, plan, SamplingParams(), prompts, images=2)
    assert codes.max() < CODES


@pytest.mark.slow
def test_from_pictures_to_a_checkpoint_for_transformers(checkpoint, clip, tmp_path, run):
    words = f"{{encoder: {checkpoint}, tokens: 20, vocabulary: {VOCABULARY}, "
    words += "prompt_prefix: 'A highly realistic image of ', negative_prompt: An image of bad}"
    model = [
        "model.size=null",
        "model.num_layers=2",
        "model.num_heads=4",
        "model.num_kv_heads=2",
        "model.hidden_size=16",
        "model.ffn_size=24",
        f"model.codebook_size={CODES}",
        f"model.grid=[{HEIGHT},{WIDTH}]",
        f"model.token_prompt={words}",
    ]
    every_verb(run, tmp_path, "simplear-0.5b-1024", model, checkpoint=checkpoint, clip=clip, windows=[5, 3, 2])
    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (checkpoint, tmp_path / "hf"))
    assert type(after) is Qwen2ForCausalLM and after.lm_head.weight is after.model.embed_tokens.weight
    changed = [n for n, t in after.state_dict().items() if not torch.equal(t, before.state_dict()[n])]
    assert changed and all(".layers." in name for name in changed)
    again, tuned = load(tmp_path / "hf"), load(tmp_path / "run")
    assert torch.equal(again.generate(CAPTIONS, window=3).codes, tuned.generate(CAPTIONS, window=3).codes)
