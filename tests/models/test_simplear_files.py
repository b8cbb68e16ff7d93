"""SimpleAR's files: exports for plain transformers, one matrix for embeddings and head, and files that do not fit."""

import json
from itertools import pairwise

import pytest
import torch
from simplear_files import CAPTIONS, FIRST, HEIGHT, SPECIAL, VOCABULARY, WIDTH, checkpoint_in, section, text_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2ForCausalLM

from zipar_train import Plan, dense, teacher_forced
from zipar_train.models.family import build
from zipar_train.models.restore import load_family, read
from zipar_train.models.token_prompts import Prompts
from zipar_train.recipe.load import load_recipe
from zipar_train.recipe.schema import RecipeError

CODES, NUM = VOCABULARY - FIRST, HEIGHT * WIDTH


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("simplear")
    checkpoint_in(folder)
    return folder


@pytest.fixture
def family(checkpoint):
    return load_family(section(checkpoint), read(checkpoint))


def next_token(family):
    """Next-token logits (2, N, V) of fixed codes with prompts that differ, and the codes."""
    codes = torch.randint(CODES, (2, NUM), generator=torch.Generator().manual_seed(0))
    plan = Plan.raster(family.grid, prompt=family.prompt_length)
    return teacher_forced(family, plan, codes, family.check(CAPTIONS[:2]), dense(plan)), codes


def plainly(model, family, codes):
    """The same by a plain Qwen2ForCausalLM, with the padding as its attention mask."""
    prompts = family.check(CAPTIONS[:2])
    ids = torch.cat([prompts.ids, codes + FIRST], dim=1)
    mask = torch.cat([~prompts.padding, torch.ones_like(codes, dtype=torch.bool)], dim=1).long()
    logits = model(ids, attention_mask=mask, position_ids=torch.arange(ids.shape[1]).expand_as(ids)).logits
    return logits[:, -NUM - 1 : -1, FIRST:]


def test_embeddings_and_head_are_one_parameter(checkpoint, family):
    """The gradients are those of the tied matrix of a plain Qwen2ForCausalLM, through the input and the output."""
    theirs = Qwen2ForCausalLM.from_pretrained(checkpoint)
    ours, codes = next_token(family)
    for logits in (ours, plainly(theirs, family, codes)):
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten()).backward()
    wanted = dict(theirs.named_parameters())
    assert wanted.keys() == dict(family.model.named_parameters()).keys()
    for name, parameter in family.model.named_parameters():
        assert (parameter.grad - wanted[name].grad).abs().max() < 1e-5 * max(1, wanted[name].grad.abs().max()), name
    grad = family.model.model.embed_tokens.weight.grad
    used = torch.zeros(VOCABULARY, dtype=torch.bool).index_fill(0, codes.flatten() + FIRST, True)
    assert (grad[FIRST:].abs().sum(1) > 0).all() and not used[FIRST:].all()  # rows that are no input: by the head


def test_an_export_is_for_plain_transformers(checkpoint, family, tmp_path):
    """All weights changed; with the published configuration, and without any."""
    with torch.no_grad():
        for parameter in family.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        logits, codes = next_token(family)
    config = json.loads((checkpoint / "config.json").read_text())
    for name, source in (("beside", str(checkpoint)), ("alone", None)):
        family.published(source).save_pretrained(tmp_path / name)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        assert type(theirs) is Qwen2ForCausalLM and theirs.lm_head.weight is theirs.model.embed_tokens.weight
        with torch.no_grad():
            assert (plainly(theirs, family, codes) - logits).abs().max() < 1e-5 * logits.abs().max()
        again = load_family(section(checkpoint), read(tmp_path / name))
        assert torch.equal(next_token(again)[0], logits)
        saved = json.loads((tmp_path / name / "config.json").read_text())
        assert saved["model_type"] == "qwen2" and saved["rope_parameters"] == config["rope_parameters"]
        assert saved["tie_word_embeddings"] and saved["vocab_size"] == VOCABULARY
        assert saved == config | {"rope_theta": 1000000.0} or source is None  # for the authors' model code


def test_a_head_that_is_written_out_is_read(checkpoint, family, tmp_path):
    """Equal to the embeddings: as some trainers save tied weights, with tie_word_embeddings or without it."""
    theirs = Qwen2ForCausalLM.from_pretrained(checkpoint, tie_word_embeddings=False)
    with torch.no_grad():
        theirs.lm_head.weight.copy_(theirs.model.embed_tokens.weight)
    theirs.save_pretrained(tmp_path)
    again = load_family(section(checkpoint), read(tmp_path))
    assert torch.equal(next_token(again)[0], next_token(family)[0])
    with torch.no_grad():
        again.model.model.embed_tokens.weight.add_(1)
        whole = again.published(str(tmp_path))
        assert torch.equal(whole.lm_head.weight, again.model.model.embed_tokens.weight)
        theirs.lm_head.weight[-1] += 1
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path} is a Qwen2 whose lm_head\.weight differs from its model\.embed"):
        load_family(section(checkpoint), read(tmp_path))


def test_a_sharded_head_is_the_same(family):
    """Under FSDP's hooks, which gather the matrix for the embedding's own calls: logits and gradients."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from zipar_train.training.fsdp import shard

    def step():
        logits, codes = next_token(family)
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten()).backward()
        return logits.detach()

    alone = step()
    wanted = {name: parameter.grad for name, parameter in family.model.named_parameters()}
    family.model.zero_grad()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        shard(family.model, init_device_mesh("cpu", (1,)))
        assert torch.equal(step(), alone)
        for name, parameter in family.model.named_parameters():
            assert torch.allclose(parameter.grad.full_tensor(), wanted[name], rtol=1e-5, atol=1e-6), name
    finally:
        dist.destroy_process_group()


def test_the_negative_prompt_has_no_prefix(checkpoint, family):
    tokenizer, prompts = family.prompter.tokenizer, family.check(CAPTIONS)
    dropped = family.drop(prompts, torch.tensor([True, False, True]))
    assert isinstance(dropped, Prompts) and torch.equal(dropped.ids[1], prompts.ids[1])
    texts = [tokenizer.decode(ids[~padding]) for ids, padding in zip(dropped.ids, dropped.padding, strict=True)]
    away = "<|t2i|>An image of bad blurry<|soi|>"
    assert texts == [away, f"<|t2i|>A highly realistic image of {CAPTIONS[1]}<|soi|>", away]
    for padding in dropped.padding.tolist():  # on the left
        assert padding[0] and not any(before < after for before, after in pairwise(padding))
    empty = section(checkpoint).token_prompt.model_copy(update={"negative_prompt": ""})
    none = build(section(checkpoint, token_prompt=empty)).drop(prompts, torch.ones(3, dtype=torch.bool))
    ids = none.ids[~none.padding].view(3, -1)[0]  # as captions are dropped in the authors' training
    assert tokenizer.decode(ids) == "<|t2i|><|soi|>"


def test_prompts_that_do_not_fit(checkpoint, tmp_path):
    family = build(section(checkpoint, tokens=12))
    assert family.check(["a blue car"]).padding.sum() == 0
    with pytest.raises(ValueError, match="takes 15 tokens with what surrounds it, the prompt has 12"):
        family.check(["a small red house"])
    with pytest.raises(ValueError, match="is empty"):
        family.check([" "])
    assert family.prompter.misfit("a small red house") and not family.prompter.misfit("a blue car")
    text_tokenizer(SPECIAL[:4]).save_pretrained(tmp_path)  # as if three special tokens were missing
    words = section(checkpoint).token_prompt.model_copy(update={"encoder": str(tmp_path)})
    with pytest.raises(ValueError, match=f"its tokenizer has {FIRST - 3} ids, and the model's codes follow {FIRST}"):
        build(section(checkpoint, token_prompt=words)).check(CAPTIONS)
    text_tokenizer([f"<|{k}|>" for k in range(7)]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"knows no '<\|t2i\|>': it is of another model"):
        build(section(checkpoint, token_prompt=words)).check(CAPTIONS)


def test_checkpoints_of_other_models(checkpoint, tmp_path):
    checkpoint_in(tmp_path / "text", vocab_size=FIRST - len(SPECIAL))
    message = rf"text is a Qwen2 of {FIRST - 7} ids, and SimpleAR's text and codes are {VOCABULARY}: it generates no"
    with pytest.raises(ValueError, match=rf"{message}.*Give Daniel0724/SimpleAR-0\.5B-RL: or its folder"):
        load_family(section(checkpoint), read(tmp_path / "text"))
    checkpoint_in(tmp_path / "wide", hidden_size=32)
    with pytest.raises(ValueError, match="wide does not fit the model of this recipe.*of another shape"):
        load_family(section(checkpoint), read(tmp_path / "wide"))
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **shape)).save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match="llama does not fit the model of this recipe.*missing"):
        load_family(section(checkpoint), read(tmp_path / "llama"))


def test_recipes_that_do_not_fit():
    windows = ["zipar.windows={8: 1}", "evaluate.windows=[8]"]
    with pytest.raises(
        RecipeError, match=r"grid \[48, 48\]: SimpleAR's prompt names no size.*use \[32, 32\] or \[64, 64\]"
    ):
        load_recipe("simplear-0.5b-1024", [*windows, "model.grid=[48,48]"])
    load_recipe("simplear-0.5b-1024", [*windows, "model.grid=[32,32]"])
    with pytest.raises(RecipeError, match="family simplear has no size 7B: use 0.5B, 1.5B"):
        load_recipe("simplear-0.5b-1024", ["model.size=7B"])
    with pytest.raises(
        RecipeError, match=r"codebook_size 64000: token_prompt\.vocabulary 64006 cannot hold them and 7"
    ):
        load_recipe("simplear-0.5b-1024", ["model.token_prompt.vocabulary=64006"])
