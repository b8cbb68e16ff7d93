"""The command line: thin commands over functions that do the work; heavy imports are inside the commands."""

import os
import sys
from traceback import clear_frames
from typing import Annotated, NoReturn

import typer

from zipar_train import __version__
from zipar_train.cli.bench import bench
from zipar_train.cli.demo import demo
from zipar_train.cli.doctor import doctor
from zipar_train.cli.evaluate import advise, evaluate
from zipar_train.cli.export import export
from zipar_train.cli.fit import fit
from zipar_train.cli.generate import generate
from zipar_train.cli.plan import plan
from zipar_train.cli.quickstart import quickstart
from zipar_train.cli.recipes import recipes_app
from zipar_train.cli.shards import shards_app
from zipar_train.cli.sweep import sweep
from zipar_train.cli.tokenize import tokenize
from zipar_train.io.console import lasting
from zipar_train.io.remote import conceal
from zipar_train.recipe.renamed import check_arguments
from zipar_train.run.launcher import check_variables, rank
from zipar_train.run.signals import Heard, Stopped, raised, requeue

app = typer.Typer(
    name="zipar-train",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (quickstart, plan, tokenize, fit, generate, demo, evaluate, advise, export, bench, sweep, doctor):
    app.command()(command)
app.add_typer(recipes_app, name="recipes")
app.add_typer(shards_app, name="shards")


def show_version(asked: bool) -> None:
    """Print the version and end, for the eager option --version."""
    if asked:
        print(f"zipar-train {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune autoregressive image generators under ZipAR masks, and decode their rows in parallel."""


PRINTING = ("recipes", "plan", "advise", "bench", "doctor", "shards")  # commands whose result is their output


def main() -> None:
    """Run the command line and exit with a status that tells how the command ended.

    A user error prints one message and exits with status 2 (ZIPAR_TRACEBACK=1 shows the traceback). Signal n exits
    with status 128 + n.
    """
    sys.argv[1:] = map(conceal, sys.argv[1:])  # W&B's metadata and process launchers repeat the arguments
    with lasting() as out, raised() as heard:
        try:
            check_variables()
            check_arguments(sys.argv[1:])
            app(standalone_mode=True)
        except Stopped as stop:
            _end(stop, heard)
        except Exception as error:
            if heard.signum is not None:  # libraries wrap exceptions from signal handlers
                _end(Stopped(heard.signum, str(error)), heard)
            if os.environ.get("ZIPAR_TRACEBACK") or not isinstance(error, (ValueError, OSError)):
                raise
            clear_frames(error.__traceback__)
            print(f"zipar-train: {error}", file=sys.stderr)
            sys.exit(2)
        except SystemExit as end:
            if not end.code and sys.argv[1:2] and sys.argv[1] in PRINTING and out.disk_full():
                sys.exit(1)
            raise


def _end(stop: Stopped, heard: Heard) -> NoReturn:
    heard.quiet()
    clear_frames(stop.__traceback__)  # frees iterators, which ends their loader processes
    if rank() == 0:
        print(f"\nzipar-train: {stop}; {requeue(stop) or stop.advice}", file=sys.stderr)
    sys.exit(128 + stop.signum)
