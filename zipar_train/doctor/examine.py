"""All checks, each section of them in a process of its own: one that hangs or dies takes nothing else with it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from importlib import import_module

from zipar_train.doctor.checks import Check, CheckContext, Row, guarded, hidden, note, ok, problem
from zipar_train.doctor.report import Report
from zipar_train.recipe.schema import Recipe
from zipar_train.run.provenance import revision, today

SECTIONS = {  # in the order they are shown: where their checks are, imported in their process alone
    "packages": ("packages.CHECKS",),
    "devices": ("devices.CHECKS",),
    "attention": ("attention.CHECKS",),
    "disk": ("disk.CHECKS",),
    "wandb": ("tracking.CHECKS",),
    "recipes": ("recipes.SHIPPED",),
    "recipe": ("recipes.CHECKS", "sources.CHECKS", "recipes.MEMORY"),
}
PROGRAM = "from zipar_train.doctor.examine import section; section()"


def examine(
    recipe: Recipe | None = None, *, only: Sequence[str] = (), patience: float | None = None, broken: str = ""
) -> Report:
    """Run the checks.

    Args:
        recipe: to be checked beside the machine.
        only: sections; none: all.
        patience: seconds that a section may take, of which all run at once; None: 30, or 90 where there is a GPU.
        broken: what is wrong with a recipe that cannot be read.

    Raises:
        ValueError: for a section that does not exist.
    """
    if unknown := [name for name in only if name not in SECTIONS]:
        raise ValueError(f"--checks {unknown[0]!r} is unknown: use {', '.join(SECTIONS)}")
    if "recipe" in only and not (recipe or broken):
        raise ValueError("--checks recipe: it goes with --recipe")
    start = time.monotonic()
    patience = patience or (90 if shutil.which("nvidia-smi") else 30)
    wanted = [name for name in SECTIONS if name in (only or SECTIONS) and (name != "recipe" or recipe)]
    with ExitStack() as stack:
        scratch = None
        with suppress(OSError):  # no folder for temporary files: the checks tell
            folder = tempfile.TemporaryDirectory(prefix="zipar-doctor-", ignore_cleanup_errors=True)
            scratch = stack.enter_context(folder)
        asked = CheckContext(recipe=recipe, scratch=scratch, patience=patience)
        processes = {name: begin(name) for name in wanted}
        pool = stack.enter_context(ThreadPoolExecutor(len(wanted) or 1))
        for process in processes.values():
            stack.callback(kill, process)  # before the pool waits for them
        told = [pool.submit(listen, name, process, asked) for name, process in processes.items()]
        rows = [row for future in told for row in future.result()]
    if recipe:
        rows += owned("recipe", guarded(Check("needs", partial(needs, rows=rows), "Report this line"), asked))
    elif broken:
        rows += owned("recipe", [problem("read", broken, "Mend it; `zipar-train recipes` names complete ones")])
    return Report(revision=revision(), date=today(), seconds=round(time.monotonic() - start, 1),
                  recipe=recipe.name if recipe else None, rows=rows)  # fmt: skip


def owned(section: str, rows: Iterable[Row]) -> list[Row]:
    return [row.model_copy(update={"section": section}) for row in rows]


def needs(asked: CheckContext, *, rows: Sequence[Row]) -> Iterator[Row]:
    """What the recipe asks of attention and of torch.compile, by the rows of their trials."""
    from zipar_train.doctor.attention import BACKWARD, COMPILE, FORWARD, SDPA

    assert asked.recipe is not None
    tune, found = asked.recipe.tune, {row.name: row for row in rows if row.section == "attention"}
    half = str(asked.recipe.trainer.get("precision", "")).startswith("bf16")
    kinds = (FORWARD, BACKWARD) if tune.attention == "flex_attention" else (SDPA["bfloat16" if half else "float32"],)
    asks = {f"tune.attention = {tune.attention}": kinds, "tune.compile = true": (COMPILE,) if tune.compile else ()}
    for name, trials in asks.items():
        tried = [found[trial] for trial in trials if trial in found]
        if failed := [row for row in tried if row.status != "ok"]:
            yield problem(name, f"{failed[0].name} does not work here", failed[0].remedy)
        elif tried:
            yield ok(name, "works here")


def begin(name: str) -> subprocess.Popen[str]:
    """Start a section's process: its modules found where ours are, in a group of its own with all that it starts."""
    path = {"PYTHONPATH": os.pathsep.join(part or os.getcwd() for part in sys.path), "PYTHONSAFEPATH": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, name],
        env=os.environ | path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def section() -> None:
    """A section's process: reads what is asked, tells its checks, and says when it begins each and what it found."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print
    asked = CheckContext.model_validate_json(sys.stdin.read())
    signal.alarm(int(asked.patience) + 5)  # the end, should the one who asks be gone
    homes = [home.split(".") for home in SECTIONS[sys.argv[1]]]
    checks = [check for file, table in homes for check in getattr(import_module(f"zipar_train.doctor.{file}"), table)]
    print(json.dumps({"checks": [[check.name, check.remedy] for check in checks]}), file=out)
    for check in checks:
        print(json.dumps({"begun": check.name}), file=out)
        for row in guarded(check, asked):
            print(row.model_dump_json(), file=out)
    print(json.dumps({"begun": ""}), file=out, flush=True)
    os.killpg(0, signal.SIGKILL)  # with whatever it has started, which would keep its pipes open


def listen(name: str, process: subprocess.Popen[str], asked: CheckContext) -> list[Row]:
    """A section's rows; of a process that hangs or dies, those it had, and what it fell over."""
    try:
        out, err = process.communicate(asked.model_dump_json(), timeout=asked.patience)
        end = f"its process ended with status {process.returncode}"
        if process.returncode < 0:
            end = f"its process died of {signal.Signals(-process.returncode).name}"
        end += "".join(f": {line}" for line in err.strip().splitlines()[-1:])
    except subprocess.TimeoutExpired:
        kill(process)
        out, err = process.communicate()
        end = f"no answer in {asked.patience:g} s"
    if os.environ.get("ZIPAR_TRACEBACK"):
        print(hidden(err), end="", file=sys.stderr)
    rows: list[Row] = []
    checks: dict[str, str] = {}
    begun = name
    for line in out.splitlines():
        with suppress(ValueError):  # a line cut short
            match json.loads(line):
                case {"checks": pairs}:
                    checks = dict(pairs)
                case {"begun": check}:
                    begun = check
                case row:
                    rows.append(Row.model_validate(row))
    if begun:
        remedy = checks.get(begun, "Make a new environment and pip install zipar-train")
        rows.append(problem(begun, end, f"{remedy}. More time: --timeout 120" if "no answer" in end else remedy))
        left = list(checks)[[*checks, begun].index(begun) + 1 :]
        rows += [note(check, f"not tried, as {begun} did not end", f"Mend {begun} first") for check in left]
    return owned(name, rows)
