"""Checks of the folders that are written to: free space, and writing, reading and removing a file."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from zipar_train.doctor.checks import GIB, Check, CheckContext, CheckResult, note, ok, problem, size
from zipar_train.io.expansion import expand
from zipar_train.io.files import write_atomic
from zipar_train.io.remote import is_url

LITTLE = 5 * GIB


def folder(name: str, path: Path, remedy: str, *, read_only: bool = False) -> CheckResult:
    """Check a folder; if it does not exist yet, check the nearest existing folder above it.

    Args:
        name: Name of the row.
        path: The folder.
        remedy: Remedy if it cannot be used.
        read_only: Read access is enough for training.
    """
    path = path.expanduser().absolute()
    place = existing_parent(path)
    if not place.is_dir():
        return problem(name, f"{path}: {'it' if place == path else place} is not a folder", remedy)
    free = shutil.disk_usage(place).free
    what = f"{path}{'' if place == path else ', to be made'}: {size(free)} free"
    try:
        trial(place)
    except OSError as error:
        if read_only and place == path and os.access(place, os.R_OK | os.X_OK):
            return note(name, f"{what}, but {error}", f"Enough to train from it; to tokenize into it, {lower(remedy)}")
        return problem(name, f"{what}, but {error}", remedy)
    return note(name, what, f"Make room, or {lower(remedy)}") if free < LITTLE else ok(name, what)


def existing_parent(path: Path) -> Path:
    """Return the path itself, or the nearest existing path above it."""
    return next(each for each in (path, *path.absolute().parents) if each.exists() or each.is_symlink())


def trial(place: Path) -> None:
    """Write a file atomically, as checkpoints are written, read it and remove it.

    Raises:
        OSError: If it cannot be written, or its content differs when read.
    """
    file, data = place / f".zipar-doctor-{secrets.token_hex(4)}", secrets.token_bytes(2**16)
    try:
        write_atomic(file, data)
        if file.read_bytes() != data:
            raise OSError(f"{file} is not what was written into it")
    finally:
        file.unlink(missing_ok=True)


def lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def runs(asked: CheckContext) -> Iterator[CheckResult]:
    path = asked.recipe.run_dir if asked.recipe else expand("${ZIPAR_RUNS:-runs}")
    yield folder("runs", Path(path), "Choose another with ZIPAR_RUNS=FOLDER, or --set run_dir=FOLDER")


def data(asked: CheckContext) -> Iterator[CheckResult]:
    path = expand("${ZIPAR_DATA:-data}")
    if asked.recipe:
        path = asked.recipe.data.train
        if is_url(path):
            yield ok("data", f"{path}: read over the network")
            return
        path = os.path.dirname(path) or "."
    remedy = "Choose another with ZIPAR_DATA=FOLDER, or --set data.train=FILE --set data.val=FILE"
    yield folder("data", Path(path), remedy, read_only=True)


def temporary(asked: CheckContext) -> Iterator[CheckResult]:
    yield folder("temporary files", Path(tempfile.gettempdir()), "Choose another with TMPDIR=FOLDER")


def cache(asked: CheckContext, *, name: str, variable: str, under: str, what: str) -> Iterator[CheckResult]:
    """Check a cache folder; since its content can be fetched again, problems are only notes."""
    base = os.environ.get(variable) or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(base) if os.environ.get(variable) else Path(base) / under
    row = folder(name, path, f"{what} Choose another with {variable}=FOLDER")
    yield row.model_copy(update={"status": "note"}) if row.status == "problem" else row


CHECKS = (
    Check("runs", runs, "Choose another with ZIPAR_RUNS=FOLDER, or --set run_dir=FOLDER"),
    Check("data", data, "Choose another with ZIPAR_DATA=FOLDER"),
    Check("temporary files", temporary, "Choose another with TMPDIR=FOLDER"),
    Check(
        "W&B's files",
        partial(
            cache,
            name="W&B's files",
            variable="WANDB_CACHE_DIR",
            under="wandb",
            what="Runs keep theirs beside their checkpoints, so only uploads need it.",
        ),
        "Choose another with WANDB_CACHE_DIR=FOLDER",
    ),
    Check(
        "hub's files",
        partial(
            cache, name="hub's files", variable="HF_HOME", under="huggingface", what="Weights from the hub go there."
        ),
        "Choose another with HF_HOME=FOLDER",
    ),
)
