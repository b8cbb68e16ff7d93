"""Published weights: the original's numbers, every layout read, every tensor accounted for, nothing executed."""

import argparse
import os
import pickle

import original
import pytest
import torch
from llamagen_files import c2i, c2i_state, t2i, t2i_state
from released import simulate
from safetensors.torch import save_file

from zipar_train.decoding.decoder import Decoder
from zipar_train.export.weights import export
from zipar_train.models.family import build, teacher_forced
from zipar_train.models.restore import LoadedWeights, load_family, read
from zipar_train.models.t5_features import Captions
from zipar_train.plan.masks import dense
from zipar_train.plan.table import Plan
from zipar_train.recipe.load import load_recipe
from zipar_train.recipe.schema import SamplingParams


def family_of(recipe, state, dtype=torch.float64):
    return load_family(recipe.model, LoadedWeights("memory", None, state, {}), dtype=dtype)


def close(ours, theirs, tolerance=2e-6):
    """transformers' Llama norms in float32 whatever the model's type."""
    assert theirs.std() > 0.5  # contexts matter
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("train", [False, True])
def test_next_token_logits_are_the_originals_for_classes(train):
    state = c2i_state()
    family = family_of(c2i(), state)
    family.model.train(train)
    codes, labels = torch.randint(11, (3, 16)), torch.tensor([0, 4, 2])
    dropped = family.drop(labels, torch.tensor([False, False, True]))
    plan = Plan.raster(family.grid)
    with torch.no_grad():
        ours = teacher_forced(family, plan, codes, dropped, dense(plan))
    close(ours, original.next_token_logits(state, codes, torch.tensor([0, 4, 5]), heads=2, columns=4))


@pytest.mark.parametrize("train", [False, True])
def test_next_token_logits_are_the_originals_for_padded_captions(train):
    state = t2i_state()
    family = family_of(t2i(), state)
    family.model.train(train)
    codes = torch.randint(11, (3, 16))
    captions = family.check([torch.randn(n, 6, dtype=torch.float64) for n in (5, 3, 1)])
    assert captions.padding.sum(1).tolist() == [0, 2, 4]
    captions = Captions(captions.features.double(), captions.padding)
    captions = family.drop(captions, torch.tensor([False, False, True]))
    plan = Plan.raster(family.grid, prompt=5)
    with torch.no_grad():
        ours = teacher_forced(family, plan, codes, captions, dense(plan))
    features = captions.features.clone()
    features[2] = state["cls_embedding.uncond_embedding"]
    close(ours, original.next_token_logits(state, codes, features, heads=2, columns=4, padding=captions.padding))


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize(("size", "window"), [(6, 4), (6, 2), (7, 3), (9, 2)])
def test_the_baseline_draws_what_the_released_decoder_draws(size, window, scale):
    """Greedy, unwritten slots attended to, its stand-ins: code for code; and masked, another image."""
    state = original.random_gpt(depth=2, width=24, codes=11, grid=size, classes=5, seed=3)
    family = family_of(c2i(f"model.grid=[{size},{size}]", "zipar.windows={2: 1}", "evaluate.windows=[2]"), state)
    plan = Plan.zipar(family.grid, window=window, stand_in="released")
    labels, sampling = torch.tensor([1, 4]), SamplingParams(temperature=0, guidance=scale)
    forwards, seeds = simulate(size, window), torch.zeros(2, size * size, dtype=torch.long)
    drawn = {
        zeros: original.released_zipar(state, labels, forwards, size=size, heads=2, scale=scale, zeros=zeros)
        for zeros in (True, False)
    }
    for zeros in (True, False):
        codes = Decoder(family, plan, released=zeros)(labels, seeds, sampling).flatten(1)
        assert torch.equal(codes, drawn[zeros])
    assert window > 2 or not torch.equal(drawn[True], drawn[False])  # many unwritten slots


LAYOUTS = {
    "model": lambda state: {"model": state, "optimizer": {}, "steps": 7, "args": argparse.Namespace(lr=1e-4)},
    "module": lambda state: {"module": state},
    "state_dict": lambda state: {"state_dict": state},
    "bare": dict,
    "freqs_cis": lambda state: {"model": {**state, "freqs_cis": torch.zeros(17, 6, 2)}},
    "wrapped": lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_published_layout_is_read_and_written_back_to_the_bit(tmp_path, layout):
    state = c2i_state(dtype=torch.bfloat16)
    torch.save(LAYOUTS[layout](state), tmp_path / "in.pt")
    out = export(c2i(f"model.weights={tmp_path}/in.pt"), tmp_path / "out.pt", to="llamagen")
    back = torch.load(out, weights_only=True)["model"]
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) and back[name].dtype == torch.bfloat16 for name in state)
    assert "the published weights in.pt, as they are" in (tmp_path / "out.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pt", "out.md", "out.pt"]


def test_captions_too_and_safetensors(tmp_path):
    state = t2i_state(dtype=torch.float32)
    save_file(state, tmp_path / "in.safetensors")
    recipe = t2i(f"model.weights={tmp_path}/in.safetensors")
    out = export(recipe, tmp_path / "out.pt", to="llamagen")
    back = torch.load(out, weights_only=True)["model"]
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    folder = export(recipe, tmp_path / "hf")
    again = load_family(recipe.model, read(folder)).model.state_dict()
    assert all(
        torch.equal(again[name], tensor)
        for name, tensor in load_family(recipe.model, read(out)).model.state_dict().items()
    )


def test_another_entry_of_the_file_is_taken_on_request(tmp_path):
    torch.save({"model": c2i_state(), "ema": c2i_state(seed=1)}, tmp_path / "both.pt")
    for entry, seed in ((None, 0), ("ema", 1)):
        saved = read(tmp_path / "both.pt", entry=entry)
        assert torch.equal(saved.state["output.weight"], c2i_state(seed=seed)["output.weight"])
    with pytest.raises(ValueError, match="has no entry 'average' with tensors. It holds: ema, model"):
        read(tmp_path / "both.pt", entry="average")


def test_a_file_on_the_hub_is_fetched_or_the_way_to_get_it_is_told(tmp_path, monkeypatch):
    torch.save({"model": c2i_state()}, tmp_path / "c2i.pt")

    def download(repo, file):
        if (repo, file) != ("owner/repo", "c2i.pt"):
            raise OSError("no such file on the hub")
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert read("owner/repo:c2i.pt").path == tmp_path / "c2i.pt"
    with pytest.raises(
        ValueError, match="cannot be fetched from the hub .no such file on the hub.. Download x.pt from"
    ):
        read("owner/repo:x.pt")


def test_half_precision_stays_half(tmp_path):
    torch.save({"model": c2i_state(dtype=torch.float16)}, tmp_path / "half.pt")
    recipe = c2i()
    for dtype, expected in ((None, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)):
        family = load_family(recipe.model, read(tmp_path / "half.pt"), dtype=dtype)
        assert {parameter.dtype for parameter in family.model.parameters()} == {expected}


class Code:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("truncated.pt", "truncated.pt is not a readable file of weights"),
        ("text.pt", "text.pt is not a readable file of weights"),
        ("code.pt", "code.pt holds more than tensors and plain data .*system.*, which is refused"),
        ("legacy.pt", "legacy.pt holds more than tensors and plain data .*system.*, which is refused"),
        ("list.pt", "list.pt holds a list, not a dictionary of tensors"),
        ("numbers.pt", "a is not a tensor"),
        ("missing.pt", "1 missing: norm.weight"),
        ("surplus.pt", "1 surplus: layers.0.bias"),
        ("shape.pt", r"1 of another shape: output.weight is \[12, 24\], not \[11, 24\]"),
        ("deeper.pt", "surplus: layers.2.attention.* looks like no published size of LlamaGen .3 layers of width 24"),
        ("captions.pt", "The file looks like .*text-conditional, 11 codes"),
        ("cut.safetensors", "cut.safetensors is damaged"),
        ("none.pt", "no weights at"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path, name, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = c2i_state()
    torch.save({"model": state}, "truncated.pt")
    os.truncate("truncated.pt", 5000)
    (tmp_path / "text.pt").write_text("an error page")
    torch.save({"model": state, "x": Code()}, "code.pt")
    with open("legacy.pt", "wb") as file:
        pickle.dump({"model": Code()}, file, protocol=2)
    torch.save([1, 2], "list.pt")
    torch.save({"a": 1}, "numbers.pt")
    torch.save({n: t for n, t in state.items() if n != "norm.weight"}, "missing.pt")
    torch.save({**state, "layers.0.bias": torch.zeros(2)}, "surplus.pt")
    torch.save({**state, "output.weight": torch.zeros(12, 24)}, "shape.pt")
    torch.save(original.random_gpt(depth=3, width=24, codes=11, grid=4, classes=5), "deeper.pt")
    torch.save(t2i_state(), "captions.pt")
    save_file(state, "cut.safetensors")
    os.truncate("cut.safetensors", 900)
    with pytest.raises(ValueError, match=message):
        load_family(c2i().model, read(name))
    assert not (tmp_path / "executed").exists()


def test_the_error_names_the_published_size(tmp_path):
    with torch.device("meta"):
        xl = build(load_recipe("llamagen-xl").model, device="meta")
    from zipar_train.models.llamagen.state_dict import to_published

    state = to_published(xl.model.state_dict(), heads=20, codes=16384)
    with pytest.raises(
        ValueError, match="looks like LlamaGen-XL .36 layers of width 1280., class-conditional with 1000"
    ):
        load_family(load_recipe("llamagen-l").model, LoadedWeights("c2i.pt", None, state, {}), device="meta")


@pytest.mark.parametrize(
    ("recipe", "parameters", "tensors"),
    [
        ("llamagen-b", 110_888_448, 88),
        ("llamagen-l", 342_910_976, 172),
        ("llamagen-xl", 774_699_520, 256),
        ("llamagen-xxl", 1_410_972_672, 340),
        ("llamagen-3b", 3_096_659_200, 172),
        ("llamagen-xl-t2i", 777_678_080, 258),
    ],
)
def test_recipes_have_the_published_models(recipe, parameters, tensors):
    from zipar_train.models.llamagen.state_dict import to_published

    model = load_recipe(recipe).model
    family = build(model, device="meta", empty=True)
    assert sum(p.numel() for p in family.model.parameters()) == parameters
    heads = family.model.config.num_attention_heads
    published = to_published(family.model.state_dict(), heads=heads, codes=model.codebook_size)
    assert len(published) == tensors  # as many keys as the released state_dicts have
