"""Options shared by several commands, and their parsers."""

import json
import os
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from zipar_train.io.errors import safe_repr
from zipar_train.io.expansion import expand


def expanded(text: str) -> str:
    """Return a path, URL or name with `~` and variables expanded, see `expansion.expand`.

    Raises:
        typer.BadParameter: If it cannot be expanded; names the text and the error.
    """
    try:
        return expand(text)
    except ValueError as error:
        raise typer.BadParameter(f"{safe_repr(text)}: {error}") from None


def user_path(text: str) -> Path:
    """Return an `expanded` path."""
    return Path(expanded(text))


def complete_recipe(incomplete: str) -> list[str]:
    """Return the shipped recipes that complete a word, for the shell."""
    from zipar_train.recipe.load import shipped

    return [name for name in shipped() if name.startswith(incomplete)]


Given = TypeVar("Given", Path, Path | None)


def output_file(param: typer.CallbackParam, path: Given) -> Given:
    """Check that a file can be written, before the work that produces its content.

    Raises:
        ValueError: If it is a folder, or its folder is missing or cannot be written to.
    """
    if path is None:
        return path
    if path.is_dir():
        raise ValueError(f"{param.opts[0]} {path} is a folder: give the name of a file")
    if not path.absolute().parent.is_dir():
        raise ValueError(
            f"{param.opts[0]} {path}: the folder {path.parent} is not there. Make it, or choose another place"
        )
    _writable(param, path)
    return path


def picture_file(param: typer.CallbackParam, path: Given) -> Given:
    """Check an `output_file` for a picture that Pillow writes.

    Raises:
        ValueError: If Pillow cannot write the extension; names it.
    """
    from PIL import Image

    formats = Image.registered_extensions()
    if path is not None and formats.get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{param.opts[0]} {path}: no picture format ends in {path.suffix!r}. Use .png")
    return output_file(param, path)


def animation_file(param: typer.CallbackParam, path: Given) -> Given:
    """Check an `output_file` for an animation.

    Raises:
        ValueError: If its ending is no animation's, or needs ffmpeg, which is missing.
    """
    if path is not None:
        from zipar_train.decoding.animation import check_format

        check_format(path)
    return output_file(param, path)


def codes_file(param: typer.CallbackParam, path: Given) -> Given:
    """Check an `output_file` for codes.

    Raises:
        ValueError: If its name does not end in .safetensors.
    """
    if path is not None and path.suffix != ".safetensors":
        raise ValueError(f"{param.opts[0]} {path}: the file's name must end in .safetensors")
    return output_file(param, path)


def chart_file(param: typer.CallbackParam, path: Given) -> Given:
    """Check an `output_file` for a figure.

    Raises:
        ValueError: If the extension is not a figure format; names it.
    """
    from zipar_train.io.files import FIGURES

    if path is not None and path.suffix not in FIGURES:
        raise ValueError(f"{param.opts[0]} {path}: no figure format ends in {path.suffix!r}. Use .png, .pdf or .svg")
    return output_file(param, path)


def output_folder(param: typer.CallbackParam, path: Given) -> Given:
    """Check that a folder can be written to, or created.

    Raises:
        ValueError: If it or a parent is a file, or cannot be written to.
    """
    if path is None:
        return path
    if path.exists() and not path.is_dir():
        raise ValueError(f"{param.opts[0]} {path} is a file, not a folder")
    _writable(param, path / "file")
    return path


def output_place(param: typer.CallbackParam, path: Given) -> Given:
    """Check that a file or folder can be created, with its parents if necessary.

    Raises:
        ValueError: If a parent is a file, or cannot be written to.
    """
    if path is not None:
        _writable(param, path)
    return path


def _writable(param: typer.CallbackParam, path: Path) -> None:
    """Check that the nearest existing parent of a path is a folder that can be written to."""
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        raise ValueError(f"{param.opts[0]} {path}: {above} is not a folder. Choose another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{param.opts[0]} {path}: the folder {above} cannot be written. Choose another place")


RecipeOption = Annotated[
    str,
    typer.Option(
        "--recipe",
        parser=expanded,
        autocompletion=complete_recipe,
        metavar="RECIPE",
        help="A shipped recipe's name, or the path of a .yaml file.",
    ),
]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key, for example optim.lr=1e-4. Repeatable.")
]
CheckpointOption = Annotated[
    str,
    typer.Option(
        "--checkpoint", parser=expanded, metavar="PATH", help="A run folder, a .ckpt file or an exported folder."
    ),
]
EitherCheckpointOption = Annotated[
    str | None,
    typer.Option(
        "--checkpoint", parser=expanded, metavar="PATH", help="A run folder, a .ckpt file or an exported folder."
    ),
]
OrRecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        parser=expanded,
        autocompletion=complete_recipe,
        metavar="RECIPE",
        help="Or a recipe, for the weights that it starts from.",
    ),
]
Int8Option = Annotated[
    bool, typer.Option("--int8", help="Round the weights of the layers to int8; it changes some of the codes.")
]
JsonOption = Annotated[
    Path | None,
    typer.Option("--json", parser=user_path, callback=output_file, metavar="FILE", help="Write the same for programs."),
]


def one_of(checkpoint: str | None, recipe: str | None, overrides: list[str]) -> str:
    """Return the checkpoint or the recipe, whichever is given.

    Raises:
        ValueError: If both or neither are given, or overrides do not go with a checkpoint.
    """
    if (checkpoint is None) == (recipe is None):
        raise ValueError("give either --checkpoint or --recipe")
    moved = ("model.weights=", "model.weights_entry=")  # location of the base weights of adapters
    if checkpoint and (refused := [override for override in overrides if not override.startswith(moved)]):
        raise ValueError(
            f"--set {refused[0]}: a checkpoint brings its own recipe, in which model.weights alone can be set; "
            "--set goes with --recipe"
        )
    return str(checkpoint or recipe)


def integers(option: str, text: str) -> list[int]:
    """Parse a comma-separated list of integers.

    Raises:
        ValueError: If an entry is not an integer; names the option.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"{option} {text!r}: write whole numbers with commas between them, for example 8,4,2,1"
        ) from None


def sides(option: str, text: str | None) -> list[int] | None:
    """Parse rows and columns of a grid, such as 48x64; None remains None.

    Raises:
        ValueError: If this is not a pair of integers; names the option.
    """
    if text is None:
        return None
    found = text.lower().split("x")
    if len(found) != 2 or not all(part.strip().isdecimal() for part in found):
        raise ValueError(f"{option} {text!r}: write rows and columns of codes, for example 48x64")
    return [int(part) for part in found]


def numbers(option: str, text: str) -> list[float]:
    """Parse a comma-separated list of numbers.

    Raises:
        ValueError: If an entry is not a number; names the option.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} {text!r}: write numbers with commas between them, for example 1.5,1.75") from None


def write_json(path: Path, content: Any) -> None:
    from zipar_train.io.files import write_atomic

    write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())
