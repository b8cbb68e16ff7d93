"""What is no Janus in its authors' layout, or not the recipe's, is refused with a reason and a remedy."""

import shutil

import pytest
import torch
from janus_files import CAPTIONS, recipe_of, section, write_checkpoint

from zipar_train.export.weights import export
from zipar_train.models.family import build
from zipar_train.models.restore import load_family, read
from zipar_train.models.tokenizers.vq16 import load_vq16
from zipar_train.recipe.load import load_recipe
from zipar_train.recipe.model import Model, Words


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("janus")
    return folder, write_checkpoint(folder)


def changed(checkpoint, tmp_path, change) -> Model:
    """The section for a copy of the checkpoint whose tensors `change` has changed."""
    folder, state = checkpoint
    copy = shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*.bin*"))
    state = dict(state)
    change(state)
    torch.save(state, copy / "pytorch_model.bin")
    return section(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("gen_embed.weight"), "1 missing: generation_embeddings.weight"),
        (
            lambda s: s.pop("language_model.model.layers.1.mlp.up_proj.weight"),
            "1 missing: model.layers.1.mlp.up_proj.weight",
        ),
        (lambda s: s.update({"gen_aligner.layers.4.weight": torch.ones(1)}), "1 surplus: gen_aligner.layers.4.weight"),
        (
            lambda s: (
                [s.pop(name) for name in list(s) if name.startswith("gen_")]
                + [s.update({"vision_gen_enc_model.weight": torch.ones(1)})]
            ),  # JanusFlow
            "9 missing: .*1 surplus: vision_gen_enc_model.weight",
        ),
        (
            lambda s: [s.pop(name) for name in list(s) if not name.startswith("language_model.")],  # a plain Llama
            "9 missing: generation_aligner",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(checkpoint, tmp_path, change, message):
    model = changed(checkpoint, tmp_path, change)
    with pytest.raises(ValueError, match=message) as error:
        load_family(model, read(model.weights))
    assert "does not fit the model of this recipe" in str(error.value) and "copy" in str(error.value)


def test_other_models_are_refused(checkpoint, vq, tmp_path):
    folder, _ = checkpoint
    (empty := tmp_path / "empty").mkdir()
    shutil.copy(folder / "config.json", empty)
    with pytest.raises(ValueError, match=r"of another shape: generation_aligner.*Give a checkpoint of this recipe"):
        load_family(section(folder, hidden_size=32), read(folder))
    words = Words(encoder=str(folder), tokens=60, vocabulary=700)
    lumina = section(folder, family="lumina", grid=[4, 4], token_prompt=words)
    with pytest.raises(ValueError, match="does not fit the model of this recipe"):
        load_family(lumina, read(folder))
    with pytest.raises(ValueError, match="does not fit the model of this recipe"):
        load_family(section(folder), read(vq))
    with pytest.raises(ValueError, match=r"holds no \.safetensors and no pytorch_model\*\.bin"):
        read(empty)
    bare = changed(checkpoint, tmp_path, lambda s: s.pop("gen_vision_model.decoder.conv_out.bias"))
    with pytest.raises(ValueError, match="holds no VQ-16 of Janus-Pro. 1 missing: decoder.conv_out.bias"):
        load_vq16(bare.tokenizer_weights, codes=24)
    with pytest.raises(ValueError, match="is no whole checkpoint of Janus. 1 missing: model.vqmodel.decoder"):
        export(recipe_of(tmp_path / "copy"), tmp_path / "out", to="hf")
    with pytest.raises(ValueError, match="--to original is for the family janus, not llamagen"):
        export(load_recipe("llamagen-b", [f"model.weights={vq}"]), tmp_path / "out", to="original")


def test_a_tokenizer_of_text_of_another_model_is_refused(checkpoint, tmp_path):
    folder, _ = checkpoint
    files = ("tokenizer.json", "tokenizer_config.json")
    for file in files:
        text = (folder / file).read_text()
        (tmp_path / file).write_text(text.replace("<begin_of_image>", "<image>"))
    words = Words(encoder=str(tmp_path), tokens=60, vocabulary=272)
    family = build(section(folder, token_prompt=words), empty=True, device="meta")
    with pytest.raises(ValueError, match="its tokenizer knows no '<begin_of_image>': it is of another model"):
        family.prompter.check(CAPTIONS, torch.device("cpu"))
