"""GLM-Image against transformers' own generation, from a checkpoint in the published layout."""

import json
import shutil
from pathlib import Path

import graphs
import pytest
import torch
from glm_image_files import CAPTIONS, CODES, GRID, PREVIEW, VOCABULARY, section, write_checkpoint
from safetensors.torch import save_file
from theorem import check_captioned_theorem
from transformers import GlmImageConfig, GlmImageForConditionalGeneration, GlmImageProcessor

from zipar_train import Plan
from zipar_train.decoding.adaptive.decoder import AdaptiveDecoder
from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.fused_llama import fuse_for_inference
from zipar_train.decoding.sampling import code_seeds
from zipar_train.models.family import build, teacher_forced
from zipar_train.models.restore import load_family, read
from zipar_train.models.token_prompts import Prompts
from zipar_train.plan.masks import block, dense
from zipar_train.recipe.load import load_recipe
from zipar_train.recipe.model import glm_preview
from zipar_train.recipe.schema import SamplingParams

STAGE = "vision_language_encoder"
TOTAL = GRID[0] * GRID[1] + PREVIEW[0] * PREVIEW[1]
SEEDS = code_seeds([0, 1, 2], TOTAL, seed=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("glm-image"))


def generated(theirs, ids, attended, size, **more):
    """Codes (B, N) by transformers, greedy, without the special ids."""
    images = len(ids)
    grids = torch.tensor([[1, *GRID], [1, *PREVIEW]] * images)
    drawn = theirs.generate(
        input_ids=ids,
        attention_mask=attended,
        image_grid_thw=grids,
        images_per_sample=torch.tensor([2] * images),
        max_new_tokens=size,
        do_sample=False,
        suppress_tokens=list(range(CODES, CODES + 128)),
        **more,
    )
    return drawn[:, ids.shape[1] :]


def test_next_token_generates_what_transformers_generates(checkpoint):
    """Greedy, padded prompts of several lengths in one batch; every code of both grids."""
    theirs = GlmImageForConditionalGeneration.from_pretrained(checkpoint / STAGE).eval()
    family = load_family(section(checkpoint), read(checkpoint / STAGE))
    prompts = family.check(CAPTIONS)
    assert len(set(prompts.padding.sum(1).tolist())) == 3 and prompts.padding.any(1).all()
    expected = generated(theirs, prompts.ids, (~prompts.padding).long(), TOTAL)
    plan = Plan.raster(family.grid, prompt=family.prompt_length)
    ours = Decoder(family, plan)(CAPTIONS, SEEDS, SamplingParams(guidance=1.0, temperature=0.0))
    assert torch.equal(ours, expected)
    assert len(torch.unique(ours)) > 6 and len(torch.unique(ours, dim=0)) == 3


def positions_of(theirs, ids, grid=GRID, preview=PREVIEW):
    """Positions of a prompt (1, P) and of all codes after it, (3, 1, P + N): transformers' own."""
    grids = torch.tensor([[1, *grid], [1, *preview]])
    before, _ = theirs.model.get_rope_index(ids, image_grid_thw=grids, images_per_sample=torch.tensor([2]))
    after = theirs.model._cached_decode_position_ids.permute(1, 0, 2)[:, :, :-1]  # without the image's end
    return torch.cat([before, after], dim=2)


@pytest.mark.parametrize(("grid", "preview"), [([3, 4], [2, 3]), ([4, 2], [4, 3]), ([1, 5], [3, 1])])
def test_logits_are_those_of_transformers(checkpoint, grid, preview):
    """Of given codes after padded prompts, at transformers' positions without the padding; with both kinds of masks."""
    theirs = GlmImageForConditionalGeneration.from_pretrained(checkpoint / STAGE).eval()
    family = load_family(section(checkpoint, grid=grid, preview=preview), read(checkpoint / STAGE))
    plan, prompts = Plan.raster(family.grid, prompt=family.prompt_length), family.check(CAPTIONS)
    codes = torch.randint(CODES, (3, family.grid.num_codes))
    with torch.no_grad():
        ours = teacher_forced(family, plan, codes, prompts, dense(plan))
        for row in range(3):
            ids = prompts.ids[row][~prompts.padding[row]][None]
            place = positions_of(theirs, ids, grid, preview)
            whole = torch.cat([ids, codes[row : row + 1]], dim=1)
            found = theirs(input_ids=whole, position_ids=place).logits[0, ids.shape[1] - 1 : -1, :CODES]
            assert (ours[row] - found).abs().max() < 1e-4 * found.abs().max()
    if grid == GRID:
        with torch.no_grad():
            blocked = teacher_forced(family, plan, codes, prompts, block(plan, device="cpu"))
        assert (blocked - ours).abs().max() < 1e-4 * ours.abs().max()


def test_guidance_is_that_of_a_loop_without_cache_or_padding(checkpoint):
    """Each prompt alone, one whole pass per code, away from the empty caption with the same sizes."""
    theirs = GlmImageForConditionalGeneration.from_pretrained(checkpoint / STAGE).eval()
    family = load_family(section(checkpoint), read(checkpoint / STAGE))
    prompts = family.check(CAPTIONS)
    null = family.drop(prompts, torch.tensor([True, False, True]))
    assert torch.equal(null.ids[1], prompts.ids[1]) and not torch.equal(null.ids[0], prompts.ids[0])
    null = family.drop(prompts, torch.ones(3, dtype=torch.bool))
    text = family.prompter.tokenizer.decode(null.ids[0][~null.padding[0]])
    assert text.replace(" ", "") == "<first><sop>34<eop><sop>23<eop><|dit_token_24|>"
    expected = []
    for row in range(3):
        both = [each.ids[row][~each.padding[row]][None] for each in (prompts, null)]
        places = [positions_of(theirs, ids) for ids in both]
        codes = torch.zeros(1, 0, dtype=torch.long)
        while codes.shape[1] < TOTAL:
            logits = []
            for ids, place in zip(both, places, strict=True):
                ids = torch.cat([ids, codes], dim=1)
                with torch.no_grad():
                    found = theirs(input_ids=ids, position_ids=place[:, :, : ids.shape[1]])
                logits.append(found.logits[:, -1, :CODES])
            codes = torch.cat([codes, (logits[1] + 3 * (logits[0] - logits[1])).argmax(-1)[None]], dim=1)
        expected.append(codes[0])
    plan = Plan.raster(family.grid, prompt=family.prompt_length)
    ours = Decoder(family, plan)(CAPTIONS, SEEDS, SamplingParams(guidance=3.0, temperature=0.0))
    assert torch.equal(ours, torch.stack(expected))


@pytest.mark.parametrize("window", [4, 3, 2, 1])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("streamlined", [False, True])
def test_theorem(checkpoint, window, guidance, streamlined):
    """Both grids, prompts and negative prompts padded differently; the drawing body alike."""
    family = load_family(section(checkpoint), read(checkpoint / STAGE), dtype=torch.float64)
    check_captioned_theorem(family, CAPTIONS, window=window, guidance=guidance, streamlined=streamlined)


def test_fused_layers_are_the_same(checkpoint):
    """Up to the rounding of transformers' norms in float32; those in int8 are near. The Triton kernels refuse them."""
    families = [load_family(section(checkpoint), read(checkpoint / STAGE), dtype=torch.float64) for _ in range(3)]
    assert fuse_for_inference(families[1].model) and fuse_for_inference(families[2].model, int8=True)
    plan = Plan.zipar(families[0].grid, window=2, prompt=families[0].prompt_length)
    codes, prompts = torch.randint(CODES, (3, TOTAL)), families[0].check(CAPTIONS)
    with torch.no_grad():
        plain, fused, rounded = (teacher_forced(each, plan, codes, prompts, dense(plan)) for each in families)
    assert (fused - plain).abs().max() < 1e-5 * plain.abs().max()
    assert 1e-6 < (rounded - plain).norm() / plain.norm() < 0.2
    check_support = pytest.importorskip("zipar_train.decoding.kernels.fused_decoder").check_support
    with pytest.raises(ValueError, match="the Triton kernels do not support this model's layers or sizes"):
        check_support(families[1])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_lookahead_changes_no_code(checkpoint, guidance):
    family = load_family(section(checkpoint), read(checkpoint / STAGE))
    plan = Plan.zipar(family.grid, window=2, prompt=family.prompt_length)
    decoder = Decoder(family, plan)
    plain = decoder(CAPTIONS, SEEDS, SamplingParams(guidance=guidance, temperature=0.3))
    ahead = decoder(CAPTIONS, SEEDS, SamplingParams(guidance=guidance, temperature=0.3, lookahead=8))
    assert torch.equal(ahead, plain) and max(decoder.passes(3)) <= plan.passes and min(decoder.passes(3)) < plan.passes


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_adaptive_windows(checkpoint, guidance):
    """The widest is next-token decoding; the narrowest saves passes, and obeys the theorem along each image's plan."""
    family = load_family(section(checkpoint), read(checkpoint / STAGE), dtype=torch.float64)
    numbers, sampling = code_seeds([0, 1, 2], 3 * TOTAL, seed=0), SamplingParams(guidance=guidance, top_k=4)
    plan = Plan.raster(family.grid, prompt=family.prompt_length)
    raster = Decoder(family, plan)(CAPTIONS, numbers[:, :TOTAL], sampling)
    assert torch.equal(AdaptiveDecoder(family, window=4)(CAPTIONS, numbers, sampling), raster)
    narrow, seen = AdaptiveDecoder(family, window=1), {}

    def observe(places, logits):
        for image in range(3):
            seen.update({(image, place): logits[image::3, k] for k, place in enumerate(places[image].tolist())})

    codes, prompts = narrow(CAPTIONS, numbers, sampling, observe=observe), family.check(CAPTIONS)
    null = family.drop(prompts, torch.ones(3, dtype=torch.bool))
    fewest = Plan.zipar(family.grid, window=1, prompt=family.prompt_length).passes
    for image, plan in enumerate(narrow.plans(3)):
        assert fewest <= plan.passes <= TOTAL
        for side, each in enumerate([prompts] if guidance == 1 else [prompts, null]):
            one = Prompts(*(part[image : image + 1] for part in each))
            with torch.no_grad():
                forced = teacher_forced(family, plan, codes[image : image + 1], one, dense(plan))[0]
            ours = torch.stack([seen[image, slot][side] for slot in plan.predicting().tolist()])
            assert (forced - ours).abs().max() <= 1e-10 * forced.abs().max()


def test_captured_passes_are_the_same(checkpoint, monkeypatch):
    """CUDA graphs that work on the CPU; the table of positions is on the device before a pass is captured."""
    graphs.install(monkeypatch)
    family = load_family(section(checkpoint), read(checkpoint / STAGE))
    plan = Plan.zipar(family.grid, window=2, prompt=family.prompt_length)
    plain, captured = (Decoder(family, plan, capture=each)(CAPTIONS, SEEDS, SamplingParams()) for each in (False, True))
    assert torch.equal(captured, plain)


@pytest.mark.parametrize("legacy", [False, True])
def test_prompts_are_those_of_the_processor(checkpoint, tmp_path, legacy):
    """Of diffusers' pipeline, which calls it with a chat: at a size whose preview is the authors'."""
    shutil.copytree(checkpoint / "processor", tmp_path / "processor")
    if legacy:  # the processor's template has a file of its own, and the tokenizer another one
        template = (tmp_path / "processor" / "chat_template.jinja").read_text()
        (tmp_path / "processor" / "chat_template.jinja").unlink()
        (tmp_path / "processor" / "chat_template.json").write_text(json.dumps({"chat_template": f"small {template}"}))
        config = json.loads((tmp_path / "processor" / "tokenizer_config.json").read_text())
        config["chat_template"] = "wrong"
        (tmp_path / "processor" / "tokenizer_config.json").write_text(json.dumps(config))
    processor = GlmImageProcessor.from_pretrained(tmp_path / "processor")
    family = build(section(tmp_path, grid=[4, 2], preview=glm_preview(4, 2)))
    assert glm_preview(4, 2) == [22, 11] and glm_preview(32, 32) == [16, 16] and glm_preview(28, 40) == [13, 19]
    chats = [[{"role": "user", "content": [{"type": "text", "text": caption}]}] for caption in CAPTIONS]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "target_h": 128, "target_w": 64}
    theirs = processor.apply_chat_template(chats, padding=True, **options)
    ours = family.check(CAPTIONS)
    width = theirs["input_ids"].shape[1]
    assert torch.equal(ours.ids[:, -width:], theirs["input_ids"])
    assert torch.equal(ours.padding[:, -width:], theirs["attention_mask"] == 0)
    assert ours.padding[:, :-width].all()
    assert theirs["image_grid_thw"][:2].tolist() == [[1, 4, 2], [1, 22, 11]]
    for height, width in ((1152, 768), (1024, 1024), (512, 2048), (896, 1280)):
        rows, columns, *preview = processor._get_target_shape(height, width)
        assert glm_preview(rows, columns) == preview


def test_names_and_counts_are_the_published():
    """Built on no device, against transformers' model at its default, published sizes."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [8, 12, 12]}
    with torch.device("meta"):
        theirs = GlmImageForConditionalGeneration(GlmImageConfig(text_config={"rope_parameters": rope}))
    ours = build(load_recipe("glm-image").model, device="meta", empty=True)
    renamed, mine = ours.renamed(theirs.state_dict()), ours.model.state_dict()
    assert {n: t.shape for n, t in renamed.items()} == {n: t.shape for n, t in mine.items()}
    text = theirs.config.text_config
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        assert getattr(ours.model.config, key) == getattr(text, key)
    for key in ("rms_norm_eps", "vocab_size", "attention_bias", "hidden_act", "vision_vocab_size", "rope_parameters"):
        assert getattr(ours.model.config, key) == getattr(text, key)
    assert sum(t.numel() for t in mine.values()) == 8_914_264_064  # and 128 more rows of the head


@pytest.mark.parametrize(("window", "passes"), [(32, 1280), (4, 272), (2, 184)])
def test_passes_of_the_recipe(window, passes):
    grid = load_recipe("glm-image").model.raster
    assert Plan.zipar(grid, window=window).passes == passes


def test_an_export_is_for_plain_transformers(checkpoint, tmp_path):
    """Special rows of the head, vision tower and VQ-VAE come from the published checkpoint, unchanged."""
    family = load_family(section(checkpoint), read(checkpoint / STAGE))
    with torch.no_grad():
        family.model.lm_head.weight.add_(1)
        family.model.model.norm.weight.add_(1)
    family.published(str(checkpoint / STAGE)).save_pretrained(tmp_path)
    states = [GlmImageForConditionalGeneration.from_pretrained(f).state_dict() for f in (checkpoint / STAGE, tmp_path)]
    before, after = states
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"lm_head.weight", "model.language_model.norm.weight"}
    difference = after["lm_head.weight"] - before["lm_head.weight"]
    assert difference[CODES:].abs().max() == 0 and difference[:CODES].min() > 0.9


def test_foreign_checkpoints_are_refused(checkpoint, tmp_path):
    """A language model with the same body predicts words; a tokenizer with other ids is of another model."""
    theirs = GlmImageForConditionalGeneration.from_pretrained(checkpoint / STAGE)
    theirs.lm_head = torch.nn.Linear(32, VOCABULARY, bias=False)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"lm_head.weight is \[200, 32\], not \[24, 32\]"):
        load_family(section(checkpoint), read(tmp_path))
    with pytest.raises(ValueError, match=r"lm_head.weight is \[152, 32\], not \[20, 32\]"):
        load_family(section(checkpoint, codebook_size=20), read(checkpoint / STAGE))
    with pytest.raises(ValueError, match=r"'<\|dit_token_26\|>' has the id 30, the model counts on 26"):
        build(section(checkpoint, codebook_size=26)).check(CAPTIONS)
    with pytest.raises(ValueError, match="takes 14 tokens with what surrounds it, the prompt has 13"):
        build(section(checkpoint, tokens=13)).check(["a small red house"])


def test_sizes_that_the_model_does_not_generate_are_refused():
    """Any rows and columns have a preview, up to sides 256 times as long as the other; there is one preview of each."""
    with pytest.raises(ValueError, match=r"preview of \[16, 16\] codes before it, not \[8, 8\]: set preview to null"):
        load_recipe("glm-image", ["model.preview=[8,8]"])
    with pytest.raises(ValueError, match="preview of it has no codes: use sides of which none is more than 256 times"):
        load_recipe("glm-image", ["model.grid=[257,1]"])
    windows = ["zipar.windows={1: 1}", "evaluate.windows=[1]"]
    grid = load_recipe("glm-image", ["model.grid=[256,1]", *windows]).model.raster
    assert (grid.preview.height, grid.preview.width) == (256, 1)


def test_other_grids_have_positions_and_prompts_of_their_own(checkpoint):
    """One model: what a family of the other grid alone computes, bit for bit, in either order."""
    both = load_family(section(checkpoint, preview=None, other_grids=[[4, 2]], tokens=24), read(checkpoint / STAGE))
    for sides in ([4, 2], GRID, [4, 2]):
        alone = load_family(section(checkpoint, preview=None, grid=sides, tokens=24), read(checkpoint / STAGE))
        family = both.on(sides)
        plan = Plan.zipar(family.grid, window=2, prompt=24)
        codes, prompts = torch.randint(CODES, (3, family.grid.num_codes)), family.check(CAPTIONS)
        assert torch.equal(prompts.ids, alone.check(CAPTIONS).ids)
        with torch.no_grad():
            ours, expected = (teacher_forced(each, plan, codes, prompts, dense(plan)) for each in (family, alone))
        assert torch.equal(ours, expected)
