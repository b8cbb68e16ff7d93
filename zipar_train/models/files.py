"""Weight files: finding them on disk or on the Hugging Face hub, and reading them without executing code in them."""

import argparse
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from zipar_train.io.errors import truncate
from zipar_train.io.files import sha256_of
from zipar_train.run.checkpoints import damage

ENTRIES = ("model", "module", "state_dict")  # keys of weights: LlamaGen's DDP script, DeepSpeed, Lightning
NO_WEIGHTS = ("freqs_cis", "n_averaged")  # LlamaGen's rotary table, the counter of torch's AveragedModel
WRAPPERS = {  # name parts that DDP, torch.compile, FSDP, activation checkpointing, Fabric and Opacus add
    *("module", "_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module"),
    *("_forward_module", "_module"),
}
PICKLED = "pytorch_model*.bin"  # weights as transformers saved them before safetensors
ATTEMPTS = 20  # most attempts to read a file that another process keeps replacing
Checksums = dict[Path, str]  # SHA-256 of the bytes of each file that was read
HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+):(?P<file>[\w./-]*)")


def find(source: str | Path) -> Path:
    """Return an existing path unchanged, or the local copy of `owner/repo:file`, `owner/repo:folder/` or `owner/repo:`.

    Of a folder and of a whole repository, these are the weights as safetensors and the files of tokenizers.

    Raises:
        ValueError: If the download fails; names the remedy.
    """
    path = Path(source)
    hub = HUB.fullmatch(str(source))
    if path.exists() or not hub:
        return path
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        inside = hub["file"]
        if not inside or inside.endswith("/"):
            small = [inside + kind for kind in ("*.json", "*.model", "*.txt", "*.jinja")]
            folder = Path(snapshot_download(hub["repo"], allow_patterns=[f"{inside}*.safetensors", *small])) / inside
            if not inside and not any(folder.rglob("*.safetensors")):  # older checkpoints
                folder = Path(snapshot_download(hub["repo"], allow_patterns=[PICKLED, *small]))
            return folder
        return Path(hf_hub_download(hub["repo"], hub["file"]))
    except Exception as error:  # from the hub, the network or the file system: many classes, one remedy
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{source} is not on disk and cannot be fetched from the hub ({reason}). "
            f"Download {hub['file'] or 'it'} from huggingface.co/{hub['repo']} yourself and give its path"
        ) from error


def read_file(path: Path, *, checksums: Checksums | None = None) -> dict[str, Any]:
    """Read a `.pt`, `.pth`, `.bin`, `.ckpt` or `.safetensors` file; tensors are memory-mapped if the file allows it.

    Only tensors, plain data and the `argparse.Namespace` of LlamaGen's trainer are accepted (`weights_only=True`).

    Args:
        checksums: Receives the SHA-256 of exactly the bytes that were read.

    Raises:
        ValueError: If the file cannot be read; names the file, the problem and the remedy.
    """
    if not path.is_file():
        gone = f"it is a link to {os.readlink(path)}, which is not there" if path.is_symlink() else "no such file"
        raise ValueError(
            f"no weights at {path} ({'it is not a regular file' if path.exists() else gone}). Give a run folder, a "
            "checkpoint, an export or a published file"
        )
    if checksums is None:
        return _content(path)
    for _ in range(ATTEMPTS):
        with path.open("rb") as file:
            content = _content(path)
            with suppress(FileNotFoundError):
                if _state(os.fstat(file.fileno())) == _state(path.stat()):  # the file was not replaced meanwhile
                    checksums[path] = sha256_of(file)
                    return content
    raise ValueError(f"{path} was replaced {ATTEMPTS} times while it was read. Try again when nothing writes it")


def _state(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _content(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:  # parsing untrusted bytes can raise almost any exception
            raise ValueError(f"{path} is damaged ({truncate(error)}). Copy or export it again") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_mappable(path))
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise ValueError(
                f"{path} holds more than tensors and plain data ({refused[1]}), which is refused: reading it could run "
                "code. Save its state_dict alone, or use safetensors"
            ) from error
        raise ValueError(f"{path} is not a readable file of weights. Copy or download it again") from error
    except Exception as error:  # parsing untrusted bytes can raise almost any exception
        reason = truncate(str(error).strip().split("\n")[0], length=300)
        raise ValueError(f"{path} is not a readable file of weights ({reason}). Copy or download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def _mappable(path: Path) -> bool:
    """Return True if the tensors of a file can be memory-mapped: the file is a zip with uncompressed entries.

    torch.load compares no checksums, and maps compressed bytes as if they were numbers. Therefore the small entries of
    a zip are always checked here, and the tensors if they are not mapped.

    Raises:
        ValueError: If an entry is damaged, encrypted or duplicated.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("an entry is there twice")
        if any(entry.flag_bits & 1 for entry in entries):
            raise ValueError("it is encrypted")
        for entry in entries:
            if "/data/" not in entry.filename and not entry.filename.startswith("data/"):
                archive.read(entry)  # against its checksum
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        if bad := damage(path):
            raise ValueError(bad)
        return False
    return True


def read_folder(path: Path, *, prefix: str = "", checksums: Checksums | None = None) -> dict[str, Tensor]:
    """Read the tensors of a transformers checkpoint whose names begin with `prefix`, mapped, not copied.

    The files are the folder's safetensors, or else its `pytorch_model*.bin`.

    Raises:
        ValueError: If the folder contains neither, or if a file or tensor of its index is missing.
    """
    index = path / "model.safetensors.index.json"
    if not (files := sorted(path.glob("*.safetensors"))) and not index.is_file():
        index, files = path / "pytorch_model.bin.index.json", sorted(path.glob(PICKLED))
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
        raise ValueError(f"{path} holds no .safetensors and no {PICKLED}. Download the checkpoint's weights")
    state = {name: tensor for file in files for name, tensor in read_file(file, checksums=checksums).items()}
    if names is not None and (missing := names - state.keys()):
        raise ValueError(f"{path} lacks {sorted(missing)[0]}, which {index.name} lists. Download it again")
    return {name: tensor for name, tensor in unwrapped(state, where=path).items() if name.startswith(prefix)}


def tensors(content: dict[str, Any], *, entry: str | None = None, where: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a file's content by name: from `entry`, the first existing of `ENTRIES`, or the top level.

    Raises:
        ValueError: If there are none, or if a value is not a plain tensor; names it.
    """
    wanted = [entry] if entry else [name for name in ENTRIES if isinstance(content.get(name), dict)]
    state = content.get(wanted[0]) if wanted else content
    if not isinstance(state, dict) or not state:
        held = ", ".join(truncate(name, length=60) for name in sorted(map(str, content))[:8])
        raise ValueError(f"{where} has no entry {entry!r} with tensors. It holds: {held}")
    return unwrapped(state, where=where)


def unwrapped(state: dict[str, Any], *, where: str | Path) -> dict[str, Tensor]:
    """Return tensors by their names without the prefixes of trainers and compilers, in any nesting.

    Raises:
        ValueError: If a value is not a plain tensor, or if two tensors get the same name; names them.
    """
    found: dict[str, Tensor] = {}
    for wrapped, tensor in state.items():
        name = ".".join(part for part in str(wrapped).split(".") if part not in WRAPPERS)
        if name in NO_WEIGHTS:
            continue
        if strange := _strange(tensor):
            raise ValueError(
                f"{where} is not a file of weights: {truncate(wrapped, length=200)} {strange}. Another entry can be "
                "named by model.weights_entry; quantized and sparse weights must be saved as plain tensors"
            )
        if name in found:
            raise ValueError(f"{where} holds {truncate(name, length=200)} twice, with and without a trainer's prefix")
        found[name] = tensor
    return found


def _strange(tensor: Any) -> str:
    """Return why a value is not a plain tensor; empty if it is one."""
    if not isinstance(tensor, Tensor):
        return f"is not a tensor but a {type(tensor).__name__}"
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"is not a tensor but a {type(tensor).__name__}"
    if tensor.is_quantized:
        return "is quantized"
    if tensor.is_nested or tensor.layout != torch.strided:
        return "is nested" if tensor.is_nested else f"is not dense ({tensor.layout})"
    return "has no values (it was saved from the meta device)" if tensor.is_meta else ""


def peeled(state: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors unchanged, then repeatedly without the first part of their names while all share it.

    This finds weights inside any attribute of a larger module: `model.`, `net.`, `generator.gpt.`.
    """
    yield state
    while len(roots := {name.partition(".")[0] for name in state}) == 1 and all("." in name for name in state):
        root = f"{roots.pop()}."
        state = {name.removeprefix(root): tensor for name, tensor in state.items()}
        yield state


def innermost(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without the prefix that all their names share."""
    *_, last = peeled(state)
    return last
