"""The command `quickstart`: the whole story on handwritten digits."""

import re
import time
from pathlib import Path
from typing import Annotated

import typer

from zipar_train.io.expansion import expand

Step = tuple[str, list[str]]  # what is done, the arguments of its command
LABELS = "0,1,2,3,4,5,6,7,8,9"


def quickstart(
    context: typer.Context,
    fast: Annotated[
        bool,
        typer.Option("--fast", help="A fraction of the training and scoring, in a folder of its own."),
    ] = False,
) -> None:
    """Train, tune and score a small model of handwritten digits; finished steps are not repeated.

    Needs scikit-learn, whose digits it takes: pip install "zipar-train[digits]".
    """
    runs, data = expand("${ZIPAR_RUNS:-runs}") + "/fast" * fast, expand("${ZIPAR_DATA:-data}")
    steps, began = steps_of(runs, data, fast=fast), time.monotonic()
    about = "a minute or two" if fast else "about five minutes on two cores, the first pictures after three"
    print(f"The story of ZipAR on handwritten digits, in {len(steps)} commands: {about}. Results go to {runs}/.")
    assert context.parent is not None
    commands = context.parent.command
    for number, (words, arguments) in enumerate(steps, 1):
        shown = " ".join(f"'{word}'" if re.search(r"[ {}]", word) else word for word in arguments)
        print(f"\n[{number}/{len(steps)}] {words}\n$ zipar-train {shown}", flush=True)
        start = time.monotonic()
        commands.main(arguments, prog_name="zipar-train", standalone_mode=False)
        print(f"({time.monotonic() - start:.0f} s)", flush=True)
    print(f"\nDone in {(time.monotonic() - began) / 60:.1f} minutes. Open three things:")
    for path, words in (
        (f"{runs}/digits/grow.gif", "three digits as their codes appear: next-token, window 2, and with lookahead"),
        (f"{runs}/digits/evaluation/report.html", "scores and samples of the three models at every window"),
        (f"{runs}/digits/digits.png", "ten digits of the tuned model at window 2, in 28 passes instead of 64"),
    ):
        print(f"  {Path(path).absolute()}\n      {words}")
    print(f"Then watch it generate, in a browser: zipar-train demo --checkpoint {runs}/digits")


def steps_of(runs: str, data: str, *, fast: bool) -> list[Step]:
    """Return the steps of the story; without the shards, if they are there."""
    shards, tuned, base, control = f"{data}/digits", f"{runs}/digits", f"{runs}/digits-base", f"{runs}/digits-control"
    few, fewer, from_base = [], [], []
    if fast:
        few = sets("trainer.max_epochs=2", f"run_dir={base}")
        fewer, from_base = sets("evaluate.images=50", "evaluate.seeds=[0]"), sets(f"model.weights={base}")
    tokenize = ["tokenize", "--recipe", "digits", "--images", "digits", "--out", shards]
    tune = ["fit", "--recipe", "digits", "--resume", *from_base]
    compared = ["--compare", base, "--compare", control, "--windows", "8,2" if fast else "8,4,2,1"]
    generate = ["generate", "--checkpoint", tuned, "--window", "2", "--labels"]
    steps = [
        (
            "A small LlamaGen is trained next-token: the base model.",
            ["fit", "--recipe", "digits-base", "--resume", *few],
        ),
        ("It is tuned for one epoch under ZipAR masks.", [*tune, *(sets(f"run_dir={tuned}") if fast else [])]),
        ("The tuned model generates ten digits.", [*generate, LABELS, "--out", f"{tuned}/digits.png"]),
        ("Three digits grow, pass by pass.", [*generate, "3,5,8", "--animate", f"{tuned}/grow.gif"]),
        (
            "For comparison: one more epoch, next-token.",
            [*tune, *sets("zipar.windows={8: 1}", "tune.distill=0", f"run_dir={control}")],
        ),
        (
            "All three generate at every window, and are scored.",
            ["evaluate", "--recipe", "digits", "--checkpoint", tuned, *compared, *fewer],
        ),
    ]
    missing = not Path(shards, "train.json").is_file()
    return [("scikit-learn's digits become shards of codes.", tokenize), *steps] if missing else steps


def sets(*overrides: str) -> list[str]:
    return [word for override in overrides for word in ("--set", override)]
