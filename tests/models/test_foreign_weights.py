"""Weights as trainers, compilers and people leave them: read as the same weights, or refused by file and tensor."""

import re
import zipfile

import original
import pytest
import torch
from llamagen_files import c2i, c2i_state, t2i, t2i_state
from safetensors.torch import save_file

from zipar_train import load
from zipar_train.models.family import build
from zipar_train.models.llamagen import state_dict
from zipar_train.models.restore import LoadedWeights, initial_weights, load_family, read
from zipar_train.models.tokenizers.vq16 import load_vq16
from zipar_train.recipe.load import dump

PREFIXES = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "DDP over compiled": lambda name: f"module._orig_mod.{name}",
    "compiled DDP": lambda name: f"_orig_mod.module.{name}",
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name}",
    "Lightning": lambda name: f"model.{name}",
    "Lightning over compiled": lambda name: f"model._orig_mod.{name}",
    "Fabric": lambda name: f"_forward_module.module.{name}",
    "a larger module": lambda name: f"net.generator.gpt.{name}",
    "FSDP of layers": lambda name: re.sub(r"layers\.(\d+)\.", r"layers.\1._fsdp_wrapped_module.", name),
    "checkpointing": lambda name: re.sub(
        r"layers\.(\d+)\.", r"layers.\1._fsdp_wrapped_module._checkpoint_wrapped_module.", f"module.model.{name}"
    ),
    "compiled layers": lambda name: re.sub(r"layers\.(\d+)\.", r"layers.\1._orig_mod.", f"_orig_mod.{name}"),
}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("names", ["LlamaGen's", "ours", "captions"])
def test_wrapped_weights_are_the_same_weights(tmp_path, prefix, names):
    recipe, state = (t2i(), t2i_state()) if names == "captions" else (c2i(), c2i_state())
    expected = load_family(recipe.model, LoadedWeights("memory", None, state, {}), dtype=None).model.state_dict()
    if names == "ours":
        state = expected
    torch.save({"model": {PREFIXES[prefix](name): tensor for name, tensor in state.items()}}, tmp_path / "w.pt")
    assert equal(load_family(recipe.model, read(tmp_path / "w.pt"), dtype=None).model.state_dict(), expected)


def test_wrapped_weights_in_a_folder_of_safetensors_and_in_a_tokenizer(tmp_path):
    recipe = c2i()
    expected = load_family(
        recipe.model, LoadedWeights("memory", None, c2i_state(dtype=torch.float32), {})
    ).model.state_dict()
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "recipe.yaml").write_text(dump(recipe))
    save_file({f"module._orig_mod.{n}": t for n, t in expected.items()}, tmp_path / "export" / "model.safetensors")
    assert equal(load(tmp_path / "export", device="cpu").load_family().model.state_dict(), expected)
    state = original.random_vq()[0]
    torch.save(state, tmp_path / "vq.pt")
    torch.save({"state_dict": {f"_orig_mod.model.{n}": t for n, t in state.items()}}, tmp_path / "wrapped.pt")
    one, other = (load_vq16(str(tmp_path / name), codes=24) for name in ("vq.pt", "wrapped.pt"))
    assert equal(one.model.state_dict(), other.model.state_dict())


def test_a_counter_of_averaged_models_is_no_weight_and_a_name_twice_is_refused(tmp_path):
    recipe, state = c2i(), c2i_state()
    averaged = {"n_averaged": torch.tensor(7), **{f"module.{name}": tensor for name, tensor in state.items()}}
    torch.save({"model": averaged}, tmp_path / "averaged.pt")
    load_family(recipe.model, read(tmp_path / "averaged.pt"))
    torch.save({**state, "module.norm.weight": state["norm.weight"] * 2}, tmp_path / "twice.pt")
    with pytest.raises(ValueError, match=r"twice.pt holds norm.weight twice"):
        read(tmp_path / "twice.pt")


def test_what_is_wrong_is_told_of_the_names_without_prefix(tmp_path):
    state = {f"model.{name}": tensor for name, tensor in c2i_state().items() if name != "norm.weight"}
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w.pt does not fit .* 1 missing: norm.weight. The file looks like"):
        load_family(c2i().model, read(tmp_path / "w.pt"))


# ---------------------------------------------------------------------------------------------------------------------
# Zips


def packed(source, target, *, method, change=lambda name, data: data):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_packed_anew_holds_the_same_weights(tmp_path, method):
    state = c2i_state(dtype=torch.float32)
    torch.save({"model": state}, tmp_path / "w.pt")
    packed(tmp_path / "w.pt", tmp_path / "again.pt", method=method)
    assert equal(read(tmp_path / "again.pt").state, state)


def test_a_zip_of_another_method_that_is_damaged_encrypted_or_ambiguous_is_refused(tmp_path):
    torch.save({"model": c2i_state()}, tmp_path / "w.pt")
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        packed(tmp_path / "w.pt", tmp_path / "odd.pt", method=method)
        with pytest.raises(ValueError, match=r"odd.pt is not a readable file of weights"):
            read(tmp_path / "odd.pt")
    packed(tmp_path / "w.pt", tmp_path / "bits.pt", method=zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "bits.pt") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.compress_size)
    data = bytearray((tmp_path / "bits.pt").read_bytes())
    data[largest.header_offset + largest.compress_size // 2] ^= 1
    (tmp_path / "bits.pt").write_bytes(data)
    with pytest.raises(ValueError, match=r"bits.pt is not a readable file of weights"):
        read(tmp_path / "bits.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as archive:
        pickled = next(entry for entry in archive.infolist() if entry.filename.endswith("data.pkl"))
    data = bytearray((tmp_path / "w.pt").read_bytes())
    where = data.index(b"layers.0.attention.wqkv", pickled.header_offset)
    data[where] ^= 1  # the name of a tensor
    (tmp_path / "name.pt").write_bytes(data)
    with pytest.raises(ValueError, match=r"name.pt is not a readable file of weights .*CRC"):
        read(tmp_path / "name.pt")
    packed(tmp_path / "w.pt", tmp_path / "twice.pt", method=zipfile.ZIP_STORED)
    with zipfile.ZipFile(tmp_path / "twice.pt", "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(pickled.filename, b"other")
    with pytest.raises(ValueError, match=r"twice.pt is not a readable file of weights \(an entry is there twice"):
        read(tmp_path / "twice.pt")
    data = bytearray((tmp_path / "w.pt").read_bytes())
    for start in [match.start() for match in re.finditer(rb"PK\x01\x02", data)]:
        data[start + 8] |= 1
    (tmp_path / "locked.pt").write_bytes(data)
    with pytest.raises(ValueError, match=r"locked.pt is not a readable file of weights \(it is encrypted"):
        read(tmp_path / "locked.pt")


# ---------------------------------------------------------------------------------------------------------------------
# Tensors that are no weights


def changed(state, change, name="norm.weight"):
    return {**state, name: change(state[name])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.round().long(), "1 of another kind: norm.weight is int64, not float32"),
        (lambda t: t > 0, "1 of another kind: norm.weight is bool, not float32"),
        (lambda t: t.to(torch.complex64), "1 of another kind: norm.weight is complex64, not float32"),
        (lambda t: torch.tensor(1.0), r"1 of another shape: norm.weight is \[\], not \[24\]"),
        (lambda t: torch.zeros(0), r"1 of another shape: norm.weight is \[0\], not \[24\]"),
        (lambda t: t.to_sparse(), r"norm.weight is not dense \(torch.sparse_coo\)"),
        (lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8), "norm.weight is quantized"),
        (lambda t: t.to("meta"), "norm.weight has no values"),
        (lambda t: torch.nested.nested_tensor([t, t]), "norm.weight is nested|nested"),
        (lambda t: t.tolist(), "norm.weight is not a tensor but a list"),
        (lambda t: None, "norm.weight is not a tensor but a NoneType"),
        (lambda t: t * float("nan"), "norm.weight holds NaN or infinite numbers"),
        (lambda t: t.masked_fill(torch.arange(24) == 7, float("-inf")), "norm.weight holds NaN or infinite numbers"),
        (lambda t: t.double().fill_(1e300), "norm.weight holds numbers too large for float32"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_that_is_no_weight_is_named_with_its_file(tmp_path, change, message):
    torch.save({"model": changed(c2i_state(dtype=torch.float32), change)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=message) as refused:
        load_family(c2i().model, read(tmp_path / "w.pt"))
    assert "w.pt" in str(refused.value) and len(str(refused.value)) < 2000


@pytest.mark.parametrize("name", ["tok_embeddings.weight", "cls_embedding.embedding_table.weight", "norm.weight"])
def test_a_number_in_place_of_a_matrix_is_named(tmp_path, name):
    torch.save(changed(c2i_state(), lambda t: torch.tensor(1.0), name), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=rf"w.pt does not fit .*{name} is \[\]"):
        load_family(c2i().model, read(tmp_path / "w.pt"))


def test_numbers_that_only_a_smaller_type_cannot_hold(tmp_path):
    torch.save(changed(c2i_state(dtype=torch.float32), lambda t: t * 1e6), tmp_path / "w.pt")
    load_family(c2i().model, read(tmp_path / "w.pt"), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"w.pt: norm.weight holds numbers too large for float16"):
        load_family(c2i().model, read(tmp_path / "w.pt"), dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float64])
def test_floats_of_any_size_and_parameters_are_weights(tmp_path, dtype):
    state = {name: torch.nn.Parameter(tensor.to(dtype)) for name, tensor in c2i_state().items()}
    torch.save(state, tmp_path / "w.pt")
    found = load_family(c2i().model, read(tmp_path / "w.pt")).model.state_dict()
    assert torch.equal(found["model.norm.weight"], state["norm.weight"].float())


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {"encoder.conv_in.weight": torch.zeros(0, 3, 3, 3)},
        lambda state: {"encoder.conv_in.weight": torch.tensor(1.0)},
        lambda state: {"quantize.embedding.weight": torch.zeros(24)},
        lambda state: {"encoder.conv_in.weight": torch.zeros(7, 3, 3, 3)},
        lambda state: {f"encoder.conv_blocks.{10**12}.res.0.conv1.weight": torch.zeros(1)},
        lambda state: {"quant_conv.weight": state["quant_conv.weight"] * float("inf")},
        lambda state: {"quant_conv.weight": state["quant_conv.weight"].to(torch.int8)},
    ],
)
def test_tokenizers_of_odd_shapes_are_named(tmp_path, change):
    state = original.random_vq()[0]
    torch.save({**state, **change(state)}, tmp_path / "vq.pt")
    with pytest.raises(ValueError, match=r"vq.pt") as refused:
        load_vq16(str(tmp_path / "vq.pt"), codes=24)
    assert len(str(refused.value)) < 2000


# ---------------------------------------------------------------------------------------------------------------------
# A run's own weights


def own(tmp_path, recipe, *, seed=0):
    """A checkpoint of a run, its weights random."""
    torch.manual_seed(seed)
    state = {f"model.{name}": tensor for name, tensor in build(recipe.model).model.state_dict().items()}
    path = tmp_path / "own.ckpt"
    torch.save({"recipe": recipe.model_dump(), "state_dict": state, "data": {}, "base": None}, path)
    return path


def test_a_runs_own_weights_start_a_run_at_another_grid(tmp_path):
    path = own(tmp_path, c2i())
    larger = c2i(f"model.weights={path}", grid=6)
    family = load_family(larger.model, initial_weights(larger.model))
    assert equal(family.model.state_dict(), read(path).state)
    assert family.grid.num_codes == 36
    with pytest.raises(ValueError, match=r"its model.grid is \[4, 4\], here it is \[6, 6\]"):
        load_family(larger.model, read(path))  # a checkpoint to draw from is of its own grid


def test_a_runs_own_weights_of_another_class_count_are_refused_with_the_reason(tmp_path):
    more = c2i(f"model.weights={own(tmp_path, c2i())}", "model.num_classes=9")
    with pytest.raises(
        ValueError, match=r"model.num_classes is 5, here it is 9 \(the label embedding has a row for each"
    ):
        load_family(more.model, initial_weights(more.model))


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("data", [1], r"own.ckpt: its entry data = \[1\]"),
        ("data", {"trained on": 7}, r"own.ckpt: its entry data.trained on = 7"),
        ("global_step", "many", r"own.ckpt: its entry global_step = 'many'"),
        ("global_step", -1, r"own.ckpt: its entry global_step = -1"),
        ("global_step", None, r"own.ckpt: its entry global_step = None"),
        ("base", "x" * 10**5, r"own.ckpt: its entry base = 'xxx"),
        ("recipe", [1], r"own.ckpt, its recipe"),
    ],
)
def test_mistyped_entries_of_a_checkpoint_are_named(tmp_path, entry, value, message):
    path = own(tmp_path, c2i())
    torch.save({**torch.load(path, weights_only=True), entry: value}, path)
    with pytest.raises(ValueError, match=message) as refused:
        read(path)
    assert len(str(refused.value)) < 2000


def test_published_shapes_of_nothing_are_put_in_words():
    assert "0 codes" in state_dict.looks_like({state_dict.CODES: torch.tensor(1.0), "norm.weight": torch.tensor(1.0)})
