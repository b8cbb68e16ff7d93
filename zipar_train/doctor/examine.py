"""Runner of all checks, with each section in its own process, so that a hang or crash does not affect the others."""

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

from zipar_train.doctor.checks import Check, CheckContext, CheckResult, guarded, hidden, note, ok, problem
from zipar_train.doctor.report import DoctorReport
from zipar_train.recipe.schema import Recipe
from zipar_train.run.provenance import revision, today

SECTIONS = {  # in display order: the modules of their checks, imported only in the section's process
    "packages": ("packages.CHECKS",),
    "devices": ("devices.CHECKS",),
    "attention": ("attention.CHECKS", "decoding.CHECKS"),
    "disk": ("disk.CHECKS",),
    "wandb": ("tracking.CHECKS",),
    "recipes": ("recipes.SHIPPED",),
    "recipe": ("recipes.CHECKS", "sources.CHECKS", "recipes.MEMORY"),
}
PROGRAM = "from zipar_train.doctor.examine import section; section()"


def examine(
    recipe: Recipe | None = None, *, only: Sequence[str] = (), patience: float | None = None, broken: str = ""
) -> DoctorReport:
    """Run the checks and return their report.

    Args:
        recipe: A recipe to check as well.
        only: Sections to run. Empty: all.
        patience: Time limit of each section in seconds; sections run in parallel. None: 30, or 90 with a GPU.
        broken: Error message of a recipe that cannot be read.

    Raises:
        ValueError: If a section is unknown.
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
        with suppress(OSError):  # without a temporary folder: the checks report it
            folder = tempfile.TemporaryDirectory(prefix="zipar-doctor-", ignore_cleanup_errors=True)
            scratch = stack.enter_context(folder)
        asked = CheckContext(recipe=recipe, scratch=scratch, patience=patience)
        processes = {name: begin(name) for name in wanted}
        pool = stack.enter_context(ThreadPoolExecutor(len(wanted) or 1))
        for process in processes.values():
            stack.callback(kill, process)  # runs before the pool waits for them
        results = [pool.submit(listen, name, process, asked) for name, process in processes.items()]
        rows = [row for future in results for row in future.result()]
    if recipe:
        rows += owned("recipe", guarded(Check("needs", partial(needs, rows=rows), "Report this line"), asked))
    elif broken:
        rows += owned("recipe", [problem("read", broken, "Fix it; `zipar-train recipes` names complete ones")])
    return DoctorReport(
        revision=revision(),
        date=today(),
        seconds=round(time.monotonic() - start, 1),
        recipe=recipe.name if recipe else None,
        rows=rows,
    )


def owned(section: str, rows: Iterable[CheckResult]) -> list[CheckResult]:
    return [row.model_copy(update={"section": section}) for row in rows]


def needs(asked: CheckContext, *, rows: Sequence[CheckResult]) -> Iterator[CheckResult]:
    """Check what the recipe needs of attention and torch.compile, from the rows of their checks."""
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
    """Start a section's process with the same module search path, in a process group of its own."""
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
    """Run a section in its process: read the input, and print its checks, their starts and their rows as JSON lines."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # redirects output of libraries to stderr
    asked = CheckContext.model_validate_json(sys.stdin.read())
    signal.alarm(int(asked.patience) + 5)  # ends this process if the parent is gone
    homes = [home.split(".") for home in SECTIONS[sys.argv[1]]]
    checks = [check for file, table in homes for check in getattr(import_module(f"zipar_train.doctor.{file}"), table)]
    print(json.dumps({"checks": [[check.name, check.remedy] for check in checks]}), file=out)
    for check in checks:
        print(json.dumps({"begun": check.name}), file=out)
        for row in guarded(check, asked):
            print(row.model_dump_json(), file=out)
    print(json.dumps({"begun": ""}), file=out, flush=True)
    os.killpg(0, signal.SIGKILL)  # including child processes, which would keep the pipes open


def listen(name: str, process: subprocess.Popen[str], asked: CheckContext) -> list[CheckResult]:
    """Return a section's rows; if its process hangs or dies, the rows so far and a problem for the current check."""
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
    rows: list[CheckResult] = []
    checks: dict[str, str] = {}
    begun = name
    for line in out.splitlines():
        with suppress(ValueError):  # a truncated line
            match json.loads(line):
                case {"checks": pairs}:
                    checks = dict(pairs)
                case {"begun": check}:
                    begun = check
                case row:
                    rows.append(CheckResult.model_validate(row))
    if begun:
        remedy = checks.get(begun, "Make a new environment and pip install zipar-train")
        rows.append(problem(begun, end, f"{remedy}. More time: --timeout 120" if "no answer" in end else remedy))
        left = list(checks)[[*checks, begun].index(begun) + 1 :]
        rows += [note(check, f"not tried, as {begun} did not end", f"Fix {begun} first") for check in left]
    return owned(name, rows)
