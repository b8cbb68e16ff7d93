"""Folders of transformers that were cut short, mixed up or spoilt: one message that names the key and the folder."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from zipar_train.evaluation.scores.clip import Clip
from zipar_train.models.t5_features import TextEncoder
from zipar_train.models.token_prompts import Prompter
from zipar_train.recipe.model import Text, Words

CPU = torch.device("cpu")


def cut(name, length=200):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def written(name, text):
    return lambda folder: (folder / name).write_text(text)


def with_entries(name, **entries):
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | entries))


def with_tensors(change):
    def apply(folder):
        state = load_file(folder / "model.safetensors")
        save_file(change(state), folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def without_last(state):
    return {name: tensor for name, tensor in state.items() if name != max(state)}


def spoilt(state):
    name = max(state)
    return {**state, name: torch.full_like(state[name], float("nan"))}


ANY = {
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights cut": cut("model.safetensors"),
    "weights empty": cut("model.safetensors", 0),
    "a tensor missing": with_tensors(without_last),
    "a tensor of NaN": with_tensors(spoilt),
    "config of text": written("config.json", "an error page"),
    "config a list": written("config.json", "[]"),
    "config null": written("config.json", "null"),
    "config of no numbers": written("config.json", '{"model_type": "t5", "d_model": "wide"}'),
    "tokenizer empty": written("tokenizer.json", ""),
    "tokenizer odd": written("tokenizer.json", '{"version": "1.0"}'),
    "tokenizer a number": written("tokenizer.json", "7"),
    "tokenizer config a list": written("tokenizer_config.json", "[]"),
    "tokenizer of unknown code": with_entries(
        "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}, tokenizer_class="Unknown"
    ),
}
T5S = ANY | {
    "another width": with_entries("config.json", d_model=16),
    "fewer tokens": with_entries("config.json", vocab_size=4),
    "no padding": with_entries("tokenizer_config.json", pad_token=None),
}
CLIPS = ANY | {
    "no processor": lambda folder: [path.unlink() for path in folder.glob("*processor*")],
    "processor a list": lambda folder: [path.write_text("[]") for path in folder.glob("*processor*")],
    "projection of another size": with_entries("config.json", projection_dim=7),
}
HARMLESS = {"tokenizer of unknown code"}  # transformers may read tokenizer.json all the same


@pytest.mark.parametrize("damage", T5S)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_text_encoder_is_one_message(t5, tmp_path, damage):
    folder = tmp_path / "encoder"
    shutil.copytree(t5, folder)
    T5S[damage](folder)
    encoder = TextEncoder(Text(encoder=str(folder), tokens=4, features=6))
    try:
        encoder(["a blue car"], CPU)
        assert damage in HARMLESS
    except ValueError as error:
        assert str(error).startswith(f"model.t5_features.encoder = {folder}: ") and len(str(error)) < 2000  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize("damage", CLIPS)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_clip_is_one_message(clip, tmp_path, damage):
    folder = tmp_path / "clip"
    shutil.copytree(clip, folder)
    if not (folder / "tokenizer.json").exists() and damage.startswith("tokenizer"):
        (folder / "tokenizer.json").write_text("{}")
    CLIPS[damage](folder)
    try:
        Clip(str(folder), device=CPU)
        assert damage in HARMLESS
    except ValueError as error:
        assert str(error).startswith(f"evaluate.clip = {folder}: ") and len(str(error)) < 2000  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize("damage", [name for name in ANY if name.startswith("tokenizer")])
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_tokenizer_of_text_is_one_message(t5, tmp_path, damage):
    folder = tmp_path / "words"
    shutil.copytree(t5, folder)
    ANY[damage](folder)
    with pytest.raises(ValueError, match="model.token_prompt.encoder = .*words: ") as refused:
        _ = Prompter(Words(encoder=str(folder), tokens=4), ask="{}", keep=("<none>",)).tokenizer
    assert len(str(refused.value)) < 2000


def test_whole_folders_are_loaded(t5, clip):
    features = TextEncoder(Text(encoder=str(t5), tokens=4, features=6))(["a blue car"], CPU)
    assert [list(each.shape) for each in features] == [[4, 6]]
    assert Clip(str(clip), device=CPU).longest == 20


def test_an_encoder_inside_a_whole_t5_is_loaded(t5, tmp_path):
    """flan-t5's published files hold the decoder too."""
    from transformers import T5Config, T5ForConditionalGeneration

    shutil.copytree(t5, tmp_path / "whole")
    T5ForConditionalGeneration(T5Config.from_pretrained(t5)).save_pretrained(tmp_path / "whole")
    TextEncoder(Text(encoder=str(tmp_path / "whole"), tokens=4, features=6)).load(CPU)
