"""Files of weights that others published: found on disk or on the hub, and read with nothing in them executed."""

import argparse
import json
import pickle
import re
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from zipar_train.wording import cut

ENTRIES = ("model", "module", "state_dict")  # where trainers keep weights: LlamaGen's DDP script, DeepSpeed, Lightning
HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+):(?P<file>[\w./-]*)")


def find(source: str | Path) -> Path:
    """The path itself, or the local copy of `owner/repo:file`, or of all of `owner/repo:`, on the Hugging Face hub.

    Raises:
        ValueError: if the hub does not give it; names the remedy.
    """
    path = Path(source)
    hub = HUB.fullmatch(str(source))
    if path.exists() or not hub:
        return path
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        if not hub["file"]:
            return Path(snapshot_download(hub["repo"], allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt"]))
        return Path(hf_hub_download(hub["repo"], hub["file"]))
    except Exception as error:  # of the hub, of its network, of the file system: a dozen classes, one remedy
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{source} is not on disk and cannot be fetched from the hub ({reason}). "
            f"Download {hub['file'] or 'it'} from huggingface.co/{hub['repo']} yourself and give its path"
        ) from error


def read_file(path: Path) -> dict[str, Any]:
    """The content of a `.pt`, `.pth`, `.bin`, `.ckpt` or `.safetensors` file, its tensors mapped, not copied.

    `weights_only=True`: tensors, plain data and the `argparse.Namespace` that LlamaGen's trainer adds, nothing else.

    Raises:
        ValueError: naming the file, what is wrong and the remedy.
    """
    if not path.is_file():
        raise ValueError(f"no weights at {path}: give a run folder, a checkpoint, an export or a published file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:  # a parser of foreign bytes fails in a dozen ways
            raise ValueError(f"{path} is damaged ({cut(error)}). Copy or export it again") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise ValueError(
                f"{path} holds more than tensors and plain data ({refused[1]}), which is refused: reading it could run "
                "code. Save its state_dict alone, or use safetensors"
            ) from error
        raise ValueError(f"{path} is not a readable file of weights. Copy or download it again") from error
    except Exception as error:  # a parser of foreign bytes fails in a dozen ways
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is not a readable file of weights ({reason}). Copy or download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def read_folder(path: Path, *, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a checkpoint in transformers' layout whose names begin with `prefix`, mapped, not copied.

    Raises:
        ValueError: if the folder holds no safetensors, or its index names a file or a tensor that is not there.
    """
    index = path / "model.safetensors.index.json"
    files = sorted(path.glob("*.safetensors"))
    names: set[str] | None = None
    if index.is_file():
        try:
            listed = json.loads(index.read_bytes())["weight_map"]
            files, names = [path / name for name in sorted(set(listed.values()))], set(listed)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{index} is damaged ({error!r}). Download it again") from None
        if strange := [file for file in files if file.parent != path]:
            raise ValueError(f"{index} names {strange[0]}, outside its folder. Download it again")
    if not files:
        raise ValueError(f"{path} holds no .safetensors. Download the checkpoint's safetensors, not its .bin files")
    state = {name: tensor for file in files for name, tensor in read_file(file).items()}
    if names is not None and (missing := names - state.keys()):
        raise ValueError(f"{path} lacks {sorted(missing)[0]}, which {index.name} lists. Download it again")
    return {name: tensor for name, tensor in state.items() if name.startswith(prefix)}


def tensors(content: dict[str, Any], *, entry: str | None = None, where: str | Path) -> dict[str, Tensor]:
    """The tensors of a file's content by name: those of `entry`, or of the first of `ENTRIES`, or the file's own.

    Raises:
        ValueError: if there are none.
    """
    wanted = [entry] if entry else [name for name in ENTRIES if isinstance(content.get(name), dict)]
    state = content.get(wanted[0]) if wanted else content
    if not isinstance(state, dict) or not state:
        held = ", ".join(sorted(map(str, content))[:8])
        raise ValueError(f"{where} has no entry {entry!r} with tensors. It holds: {held}")
    state = {str(name).removeprefix("module."): tensor for name, tensor in state.items()}
    if strange := [name for name, tensor in state.items() if not isinstance(tensor, Tensor)]:
        raise ValueError(
            f"{where} is no file of weights: {strange[0]} is not a tensor. An entry can be named by model.weights_entry"
        )
    return {name: tensor for name, tensor in state.items() if name != "freqs_cis"}  # a table, not a weight


def allocate(model: nn.Module, *, device: torch.device | str) -> None:
    """Memory for a model of the meta device, for weights that come from a file."""
    model.to_empty(device=device)
    find_frequencies(model, device=device)


def find_frequencies(model: nn.Module, *, device: torch.device | str) -> None:
    """Rotary embeddings' tables anew: they lie in no file, and are float32 whatever the weights are."""
    for part in model.modules():
        if hasattr(part, "inv_freq") and hasattr(part, "config"):
            with torch.device("cpu" if str(device) == "meta" else device):
                part.__init__(part.config)  # type: ignore[misc]


def unaccounted(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    """What is wrong with tensors that should be the wanted ones, in words; empty if nothing is."""
    missing, surplus = wanted.keys() - state.keys(), state.keys() - wanted.keys()
    shapes = [
        f"{name} is {list(state[name].shape)}, not {list(wanted[name].shape)}"
        for name in wanted.keys() & state.keys()
        if wanted[name].shape != state[name].shape
    ]
    return "; ".join(
        f"{len(names)} {title}: {', '.join(sorted(names)[:4])}{', ...' if len(names) > 4 else ''}"
        for title, names in (("missing", missing), ("surplus", surplus), ("of another shape", shapes))
        if names
    )
