"""The checkpoints of a run folder: which there are, and which are whole.

`checkpoints/last.ckpt` is the newest, `step-00000300.ckpt` are older ones, `best.ckpt` that of the best validation. A
kill between two renames can leave the newest under its number alone.
"""

import zipfile
from pathlib import Path

from zipar_train.files import regular


def folder(run: str | Path) -> Path:
    return Path(run) / "checkpoints"


def last_checkpoint(run: str | Path) -> Path | None:
    """The newest checkpoint of a run folder, if it has one."""
    return next(iter(newest_first(run)), None)


def newest_first(run: str | Path) -> list[Path]:
    """Checkpoints to continue from; by their numbers, as clocks jump."""
    last = folder(run) / "last.ckpt"
    return [*([last] if last.is_file() else []), *older(run)]


def older(run: str | Path) -> list[Path]:
    """The numbered ones, newest first."""
    return sorted(folder(run).glob("step-*.ckpt"), reverse=True)


def numbered(run: str | Path, step: int) -> Path:
    return folder(run) / f"step-{step:08d}.ckpt"


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, every byte read against its checksum; None: nothing.

    torch.load looks at neither when it maps a file. It says where a zip ends early, not which bits have turned.
    """
    try:
        with zipfile.ZipFile(regular(path)) as file:
            bad = file.testzip()
    except (OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile) as error:  # of zipfile, all damage
        return str(error)
    return None if bad is None else f"{bad} is not what was written"
