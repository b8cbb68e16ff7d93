"""The commands `recipes`, `recipes show` and `recipes copy`: the shipped recipes."""

from pathlib import Path
from typing import Annotated

import typer

from zipar_train.cli.options import complete_recipe, user_path

recipes_app = typer.Typer()
Name = Annotated[str, typer.Argument(metavar="NAME", help="A shipped recipe.", autocompletion=complete_recipe)]


@recipes_app.callback(invoke_without_command=True)
def recipes(context: typer.Context) -> None:
    """List the shipped recipes, one per line; or show or copy one."""
    if context.invoked_subcommand:
        return
    from zipar_train.recipe.load import load_recipe, shipped

    for name in shipped():
        print(f"{name:20} {load_recipe(name).description}")
    print("\nOne in full: zipar-train recipes show NAME. A copy to change: zipar-train recipes copy NAME.")


@recipes_app.command()
def show(name: Name) -> None:
    """Print a recipe, with a comment for every key."""
    print(_file(name).read_text(), end="")


@recipes_app.command()
def copy(
    name: Name,
    out: Annotated[
        Path | None, typer.Argument(parser=user_path, metavar="[PATH]", help="The copy; NAME.yaml if not given.")
    ] = None,
) -> None:
    """Write a copy of a recipe, to change and to give to --recipe."""
    from zipar_train.io.files import write_atomic

    path = out or Path(f"{name}.yaml")
    path = path / f"{name}.yaml" if path.is_dir() else path
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path}: the name of a recipe's file ends in .yaml")
    if path.exists():
        raise ValueError(f"{path} already exists: remove it, or choose another name")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: the folder {path.parent} is not there. Make it, or choose another place")
    write_atomic(path, _file(name).read_bytes())
    print(f"{path}: change it, then zipar-train fit --recipe {path}")


def _file(name: str) -> Path:
    """Return the file of a shipped recipe.

    Raises:
        ValueError: If there is none of this name.
    """
    from zipar_train.recipe.load import find, shipped

    if name not in shipped() and (Path(name).suffix or Path(name).name != name):
        raise ValueError(f"{name} is no shipped recipe: use one of {', '.join(shipped())}")
    return find(name)
