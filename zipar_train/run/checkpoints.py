"""The checkpoints of a run folder: their names, damage checks, and their content besides weights.

`checkpoints/last.ckpt` is the newest, `step-00000300.ckpt` are older ones, `best.ckpt` has the best validation result.
A kill between two renames can leave the newest checkpoint under its step number only.
"""

import os
import re
import zipfile
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from zipar_train.io.errors import safe_repr, truncate
from zipar_train.io.files import regular

NUMBERED = re.compile(r"step-(\d{8}|[1-9]\d{8,})\.ckpt")


def folder(run: str | Path) -> Path:
    return Path(run) / "checkpoints"


def last_checkpoint(run: str | Path) -> Path | None:
    """Return the newest checkpoint of a run folder; None if there is none."""
    return next(iter(newest_first(run)), None)


def newest_first(run: str | Path) -> list[Path]:
    """List the checkpoints to resume from, newest first by step number, because file times are not reliable.

    `last.ckpt` is always included, even if it is a broken link to a disk that is not mounted.
    """
    last = folder(run) / "last.ckpt"
    return [*([last] if os.path.lexists(last) else []), *older(run)]


def older(run: str | Path) -> list[Path]:
    """List the numbered checkpoints, newest first, by exactly the file names that runs write."""
    try:
        found = {int(match[1]): path for path in folder(run).iterdir() if (match := NUMBERED.fullmatch(path.name))}
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [found[step] for step in sorted(found, reverse=True)]


def numbered(run: str | Path, step: int) -> Path:
    return folder(run) / f"step-{step:08d}.ckpt"


def damage(path: Path) -> str | None:
    """Return what is wrong with a checkpoint after comparing every byte with its checksum; None if it is intact.

    torch.load compares no checksums when it maps a file: it detects a truncated zip, but not flipped bits.
    """
    try:
        with zipfile.ZipFile(regular(path)) as file:
            bad = file.testzip()
    except FileNotFoundError:
        return f"it is a link to {os.readlink(path)}, which is not there" if path.is_symlink() else "it is gone"
    except Exception as error:  # damage raises errors of zipfile, zlib and lzma, OSError or EOFError
        return str(error) or type(error).__name__
    return None if bad is None else f"{bad} is not what was written"


# ---------------------------------------------------------------------------------------------------------------------
# Content of a checkpoint besides weights


REMEDY = "It is of another version, or was changed: give a checkpoint as `zipar-train fit` wrote it"
NonNegativeInt = Annotated[int, Field(ge=0)]
Fingerprint = Annotated[str, Field(pattern="^[0-9a-f]{16,64}$")]


class CheckpointPart(BaseModel):
    """A part of a checkpoint: the declared entries are checked strictly, all others are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", arbitrary_types_allowed=True)


class CheckpointEntries(CheckpointPart):
    """The entries of a checkpoint that exports, evaluations and model cards read."""

    data: dict[str, str] = {}
    shards: dict[str, str] = {}  # checksums of the training manifests, by recipe key
    global_step: NonNegativeInt = 0
    base: Fingerprint | None = None  # fingerprint of the weights that adapters or distillation started from

    @classmethod
    def check(cls, content: dict[str, Any], *, where: Path) -> None:
        """Check the entries of a checkpoint.

        Raises:
            ValueError: If an entry is missing or invalid; names the file, the entry and the problem.
        """
        try:
            cls.model_validate(content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            entry = ".".join(truncate(part, length=60) for part in first["loc"])
            if first["type"] == "missing":
                raise ValueError(f"{where} lacks its entry {entry}. {REMEDY}") from None
            what = f"{first['msg'][0].lower()}{first['msg'][1:]}"
            raise ValueError(f"{where}: its entry {entry} = {safe_repr(first['input'])}: {what}. {REMEDY}") from None
