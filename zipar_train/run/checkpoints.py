"""The checkpoints of a run folder: which there are, which are whole, and what they hold beside weights.

`checkpoints/last.ckpt` is the newest, `step-00000300.ckpt` are older ones, `best.ckpt` that of the best validation. A
kill between two renames can leave the newest under its number alone.
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
    """The newest checkpoint of a run folder, if it has one."""
    return next(iter(newest_first(run)), None)


def newest_first(run: str | Path) -> list[Path]:
    """Checkpoints to continue from; by their numbers, as clocks jump.

    `last.ckpt` is among them whatever it is: a link to a disk that is not mounted is no empty folder.
    """
    last = folder(run) / "last.ckpt"
    return [*([last] if os.path.lexists(last) else []), *older(run)]


def older(run: str | Path) -> list[Path]:
    """The numbered ones, newest first: of exactly the names that runs write; a pipe among them is a damaged one."""
    try:
        found = {int(match[1]): path for path in folder(run).iterdir() if (match := NUMBERED.fullmatch(path.name))}
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [found[step] for step in sorted(found, reverse=True)]


def numbered(run: str | Path, step: int) -> Path:
    return folder(run) / f"step-{step:08d}.ckpt"


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, every byte read against its checksum; None: nothing.

    torch.load looks at neither when it maps a file. It says where a zip ends early, not which bits have turned.
    """
    try:
        with zipfile.ZipFile(regular(path)) as file:
            bad = file.testzip()
    except FileNotFoundError:
        return f"it is a link to {os.readlink(path)}, which is not there" if path.is_symlink() else "it is gone"
    except Exception as error:  # zipfile meets damage in many ways: its own errors, zlib's, lzma's, OSError, EOFError
        return str(error) or type(error).__name__
    return None if bad is None else f"{bad} is not what was written"


# ---------------------------------------------------------------------------------------------------------------------
# What a checkpoint holds beside weights


REMEDY = "It is of another version, or was changed: give a checkpoint as `zipar-train fit` wrote it"
Count = Annotated[int, Field(ge=0)]
Fingerprint = Annotated[str, Field(pattern="^[0-9a-f]{16,64}$")]


class Part(BaseModel):
    """A part of a checkpoint: what is read is there, in its type; what is not read may be anything."""

    model_config = ConfigDict(strict=True, extra="ignore", arbitrary_types_allowed=True)


class Kept(Part):
    """What is read from any checkpoint of a run: by exports, evaluations, model cards."""

    data: dict[str, str] = {}
    shards: dict[str, str] = {}  # checksums of the manifests that it was trained on, by recipe key
    global_step: Count = 0
    base: Fingerprint | None = None  # of the weights that adapters or distillation started from

    @classmethod
    def check(cls, content: dict[str, Any], *, where: Path) -> None:
        """Check what a checkpoint holds.

        Raises:
            ValueError: naming the file, the entry, and what is wrong with it.
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
