"""Checks of the files that a recipe names: present, still on the hub, or missing."""

from collections.abc import Callable, Iterator
from pathlib import Path
from zipfile import is_zipfile

from zipar_train.data.shards import read_manifest
from zipar_train.doctor.checks import Check, CheckContext, CheckResult, note, ok, problem, size
from zipar_train.io.files import open_regular, regular
from zipar_train.io.remote import is_url

Severe = Callable[[str, str, str], CheckResult]


def shards(asked: CheckContext) -> Iterator[CheckResult]:
    """Check that the recipe's manifests exist, fit the model and have their shards beside them."""
    recipe = asked.recipe
    assert recipe is not None
    data, model = recipe.data, recipe.model
    named = {"data.train": data.train, "data.val": data.val}
    lost = [name for name, path in named.items() if not is_url(path) and not Path(path).exists()]
    make = f"zipar-train tokenize --recipe {recipe.name} --images IMAGES --out {Path(data.train).parent}"
    if lost:
        remedy = f"{make}, or {' '.join(f'--set {name}=FILE' for name in lost)}"
        yield problem(", ".join(lost), f"{' and '.join(named[name] for name in lost)}: not there", remedy)
    for name, path in named.items():
        if name in lost:
            continue
        try:
            found = read_manifest(
                path, grids=model.rasters, codes=model.codebook_size, classes=model.num_classes, captions=model.captions
            )
        except ValueError as error:
            yield problem(name, str(error), f"{make}, or --set {name}=FILE")
        else:
            yield ok(name, f"{path}: {found.samples:,} images in {len(found.shards)} shards")


def weights(asked: CheckContext) -> Iterator[CheckResult]:
    """Check the initial weights, the image tokenizer's weights, and the text encoders."""
    assert asked.recipe is not None
    model = asked.recipe.model
    yield source("model.weights", model.weights, problem)
    if model.tokenizer not in (None, "palette"):
        yield source("model.tokenizer_weights", model.tokenizer_weights, problem)
    if model.token_prompt:
        yield source("model.token_prompt.encoder", model.token_prompt.encoder, problem, ids=True)
    if model.t5_features and model.t5_features.encoder:
        yield source("model.t5_features.encoder", model.t5_features.encoder, note, ids=True)  # shards may hold features


def scoring(asked: CheckContext) -> Iterator[CheckResult]:
    """Check the files that only `evaluate` needs; missing ones are notes."""
    assert asked.recipe is not None
    settings = asked.recipe.evaluate
    if settings.reference:
        yield source("evaluate.reference", settings.reference, note)
    else:
        yield ok("evaluate.reference", "null: data.val")
    if settings.features_weights:
        yield source("evaluate.features_weights", settings.features_weights, note)
    if settings.captions:
        yield source("evaluate.captions", settings.captions, note, ids=True)
    if settings.clip:
        yield source("evaluate.clip", settings.clip, note, ids=True)


def source(name: str, given: str | None, severe: Severe, *, ids: bool = False) -> CheckResult:
    """Check a path, `owner/repo:file`, `owner/repo:folder/` or `owner/repo:`.

    Args:
        name: Name of the row.
        given: The path or hub id; None: random weights.
        severe: Makes the row if it is missing and cannot be fetched.
        ids: Accept `owner/repo` alone as a hub id.
    """
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if given is None:
        return ok(name, "null: random")
    path, give = Path(given), f"Make it or put it there, or --set {name}=PATH"
    if is_url(given):
        return ok(name, f"{given}: over the network")
    if path.exists():
        return whole(name, path, severe, give)
    hub = on_hub(given, ids=ids)
    if hub is None:
        return severe(name, f"{given} is not there", give)
    repo, file = hub
    download = f"hf download {repo} " + (f"--include '{file}*'" if file.endswith("/") else file)
    if here := cached(repo, file):
        return whole(name, here, severe, download.strip())
    fetch = f"{download.strip()} fetches it beforehand; or --set {name}=PATH"
    if HF_HUB_OFFLINE:
        return severe(name, f"{given} is not here, and HF_HUB_OFFLINE keeps it so", fetch)
    return note(name, f"{given} is not here yet: it is fetched from the hub at first use", fetch)


def on_hub(given: str, *, ids: bool) -> tuple[str, str] | None:
    """Return repository and file (empty: the whole repository) of a hub id, or None if it can only be a path."""
    from zipar_train.models.files import HUB

    tables = (".csv", ".tsv", ".txt", ".json")
    found = HUB.fullmatch(given) or (HUB.fullmatch(f"{given}:") if ids and not given.endswith(tables) else None)
    return (found["repo"], found["file"]) if found else None


def cached(repo: str, file: str) -> Path | None:
    """Return the cached copy of a file, of a folder (with a slash), or of the repository (empty); None if absent."""
    from huggingface_hub import try_to_load_from_cache

    folder = not file or file.endswith("/")
    listings = ("config.json", "tokenizer_config.json", "tokenizer.json", "model_index.json")
    for name in [file + listing for listing in listings] if folder else [file]:
        found = try_to_load_from_cache(repo, name)
        if isinstance(found, str):
            return Path(found).parent if folder else Path(found)
    return None


def whole(name: str, path: Path, severe: Severe, remedy: str) -> CheckResult:
    """Check that a file, or the files of a folder, are not truncated, without reading them completely."""
    from zipar_train.models.restore import last_checkpoint

    files = [path]
    if path.is_dir():
        checkpoint = last_checkpoint(path)
        files = [checkpoint] if checkpoint else [each for each in path.iterdir() if each.is_file()]
        if not any(path.iterdir()):
            return severe(name, f"{path} is empty", remedy)
    for file in files:
        try:
            if short(file):
                return severe(name, f"{file} is cut short or damaged", remedy)
        except OSError as error:
            return severe(name, f"{file} cannot be read ({error.strerror or error})", remedy)
    return ok(name, f"{path}, {size(sum(file.stat().st_size for file in files))}")


def short(file: Path) -> bool:
    """Return True if a safetensors file or an archive (PyTorch's, numpy's) is truncated.

    Raises:
        OSError: If it cannot be read, or is not a regular file.
    """
    from safetensors import SafetensorError, safe_open

    if regular(file).suffix == ".safetensors":
        try:
            with safe_open(file, "pt"):
                return False
        except SafetensorError:
            return True
    with open_regular(file) as opened:
        start = opened.read(4)
    return not start or (start == b"PK\x03\x04" and not is_zipfile(file))


CHECKS = (
    Check("shards", shards, "zipar-train shards check FILE reads them all"),
    Check("weights", weights, "Put them there, or --set model.weights=PATH"),
    Check("evaluate", scoring, "Only `zipar-train evaluate` needs it"),
)
