"""What several verbs ask for on the command line, and how it is read."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

RecipeOption = Annotated[str, typer.Option("--recipe", help="A shipped recipe's name, or the path of a .yaml file.")]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key, for example optim.lr=1e-4. Repeatable.")
]
CheckpointOption = Annotated[
    str, typer.Option("--checkpoint", help="A run folder, a .ckpt file or an exported folder.")
]
EitherCheckpointOption = Annotated[
    str | None, typer.Option("--checkpoint", help="A run folder, a .ckpt file or an exported folder.")
]
OrRecipeOption = Annotated[
    str | None, typer.Option("--recipe", help="Or a recipe, for the weights that it starts from.")
]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the same for programs.")]


def one_of(checkpoint: str | None, recipe: str | None, overrides: list[str]) -> str:
    """The one of the two that is given.

    Raises:
        ValueError: if both are, or none.
    """
    if (checkpoint is None) == (recipe is None):
        raise ValueError("give either --checkpoint or --recipe")
    if checkpoint and overrides:
        raise ValueError(f"--set {overrides[0]}: a checkpoint brings its own recipe; --set goes with --recipe")
    return str(checkpoint or recipe)


def integers(option: str, text: str) -> list[int]:
    """The numbers of a comma-separated list.

    Raises:
        ValueError: if one is no whole number.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"{option} {text!r}: write whole numbers with commas between them, for example 8,4,2,1"
        ) from None


def numbers(option: str, text: str) -> list[float]:
    """The numbers of a comma-separated list.

    Raises:
        ValueError: if one is no number.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r}: write numbers with commas between them, for example 1.5,1.75") from None


def check_folder(path: Path | None) -> None:
    """Before long work: the folder that its result goes to is there.

    Raises:
        ValueError: if it is not.
    """
    if path is not None and not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: the folder {path.parent} is not there. Make it, or choose another place")


def write_json(path: Path, content: Any) -> None:
    from zipar_train.files import write_whole

    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())
