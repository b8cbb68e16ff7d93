"""The results of `check` as Markdown tables: every row names the card, the versions, the revision and the command."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from check_sizes import FULL
from check_steps import checks

NOT_YET = "not yet measured"
PLANNED = {  # step: what its rows are about
    "decode-l": "llamagen-l, one image",
    "decode-l-many": "llamagen-l, many images at once",
    "decode-l-compiled": "llamagen-l, torch.compile",
    "decode-xl": "llamagen-xl, one image",
    "baselines": "llamagen-l, other decoders",
    "rows": "llamagen-l, single passes",
    "generate": "llamagen-l, codes and pixels",
    "probe": "products and attention of a pass and of a training step",
    "train": "llamagen-l, without a teacher",
    "fit": "`fit`, 20 steps with a teacher",
    "fit-uncompiled": "`fit` without torch.compile",
    "continuity": "losses after a kill, against those before",
    "advise": "`advise`",
    "tests": "tests that need a GPU",
}
CALLS = {  # where the command itself is too long to read
    "probe": "scripts/gpu/check probe",
    "generate": "scripts/gpu/check data fit generate",
    "fit": "scripts/gpu/check data fit",
    "fit-uncompiled": "scripts/gpu/check data fit-uncompiled",
    "continuity": "scripts/gpu/check data fit resume continuity",
    "advise": "scripts/gpu/check data fit advise",
    "tests": "scripts/test -m gpu",
}
COMMANDS = {step.name: step.shown for group in checks(Path("$WORK"), FULL) for step in group}
Run = dict[str, Any]


def sections(runs: list[Run]) -> dict[str, list[str]]:
    """Lines of each section of the docs by its name.

    Args:
        runs: contents of results.json files; none: every row is `not yet measured`.
    """
    return {
        "decode": _table(
            [
                "model",
                "method",
                "window",
                "images at once",
                "ms a pass (spread)",
                "floor, ms",
                "times the floor",
                "ms an image",
                "same codes",
            ],
            _rows(runs, ["decode-l", "decode-l-many", "decode-l-compiled", "decode-xl", "baselines"], decoding),
        ),
        "rows": _table(
            [
                "model",
                "method",
                "rows",
                "slots",
                "images at once",
                "ms a pass (spread)",
                "floor, ms",
                "times the floor",
                "int8 floor, ms",
                "times fewest rows",
            ],
            _rows(runs, ["rows"], by_rows),
        ),
        "generate": _table(
            [
                "images",
                "window",
                "at once",
                "codes: ms an image",
                "times the floor",
                "pixels add",
                "same codes twice",
                "in smaller batches",
            ],
            _rows(runs, ["generate"], generating),
        ),
        "kernels": _table(
            ["kernel", "shape", "us", "times the floor", "first call, ms", "gradients"], _rows(runs, ["probe"], kernels)
        ),
        "train": _table(
            [
                "model",
                "step",
                "window",
                "slots",
                "images",
                "ms a step (spread)",
                "share of the peak",
                "times the floor",
                "of causal",
                "MiB",
            ],
            _rows(runs, ["train"], training),
        ),
        "fit": _table(
            ["what", "figure", "share of the peak", "times the floor"],
            _rows(runs, ["fit", *["fit-uncompiled"][: len(runs)], "continuity", "advise"], fitting),
        ),
        "tests": _table(["what", "passed", "failed", "skipped"], _rows(runs, ["tests"], tested)),
        "steps": _steps(runs),
    }


def measured_on(run: Run) -> str:
    """Card, versions and revision."""
    machine = run["machine"]
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("torch", "transformers", "lightning", "triton") if machine.get(name)
    )
    return f"{machine['device']}; Python {machine['python']}, {versions}; revision {run['revision']}"


def _table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """A Markdown table. A row may be short of cells before its last two, the place and the command."""
    full = [*head, "measured on", "command"]
    lines = ["| " + " | ".join(full) + " |", "|" + "---|" * len(full)]
    for row in rows:
        cells = [*row[:-2], *[""] * (len(full) - len(row)), *row[-2:]]
        assert len(cells) == len(full), row
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _rows(runs: list[Run], names: list[str], tell: Any) -> Iterator[list[str]]:
    """The rows of steps in every run; one that says why, for a step without a result."""
    for name in names:
        if not runs:
            yield [PLANNED[name], NOT_YET, NOT_YET, f"`{CALLS.get(name, COMMANDS[name])}`"]
        for run in runs:
            step = {step["name"]: step for step in run["steps"]}.get(name)
            command = f"`{CALLS.get(name) or (step or {}).get('command') or COMMANDS[name]}`"
            rows = list(tell(name, run["results"][name])) if name in run["results"] else []
            if not rows and not (step and step["status"] == "not needed"):
                rows = [[PLANNED[name], f"not measured, {ended(step) if step else 'not asked for'}"]]
            for row in rows:
                yield [*row, measured_on(run), command]


def ended(step: Run) -> str:
    """How a step ended, and why."""
    return f"{step['status']}: {step['reason']}" if step["reason"] else step["status"]


def refusal(failed: Run) -> str:
    """The first line of an error, as a cell of a table."""
    return f"not measured: {failed['error'].splitlines()[0][:200]}".replace("|", "/")


def decoding(name: str, report: Run) -> Iterator[list[str]]:
    for row in report["rows"]:
        code_match = row.get("code_match")
        yield [
            report["recipe"]["name"],
            row["method"],
            str(row["window"]),
            str(row["batch"]),
            f"{row['pass_ms']:.3g} ({row['spread']:.0%})",
            f"{row['floor_ms']:.3g}",
            f"{row['times_floor']:.2f}",
            f"{row['image_ms']:.4g}",
            "" if code_match is None else f"{code_match:.2%}",
        ]
    for failed in report.get("failures", []):
        yield [report["recipe"]["name"], failed["method"], str(failed["window"]), str(failed["batch"]), refusal(failed)]


def by_rows(name: str, report: Run) -> Iterator[list[str]]:
    for row in report["rows"]:
        yield [
            report["recipe"]["name"],
            row["method"],
            str(row["rows"]),
            str(row["slots"]),
            str(row["batch"]),
            f"{row['pass_ms']:.3g} ({row['spread']:.0%})",
            f"{row['floor_ms']:.3g}",
            f"{row['times_floor']:.2f}",
            f"{row['int8_floor_ms']:.3g}",
            f"{row['against_fewest']:.2f}",
        ]
    for failed in report.get("failures", []):
        yield [report["recipe"]["name"], failed["method"], "", "", str(failed["batch"]), refusal(failed)]


def generating(name: str, told: Run) -> Iterator[list[str]]:
    """Nothing of a step that was ended before its last figure."""
    if "times_floor" in told:
        yield [
            str(told["images"]),
            str(told["window"]),
            str(told["batch"]),
            f"{told['image_ms']:.4g}",
            f"{told['times_floor']:.2f}",
            f"{told['pixels_add']:.0%}",
            f"{told['same_codes_twice']:.2%}",
            f"{told['same_codes_in_smaller_batches']:.2%}",
        ]


def kernels(name: str, told: Run) -> Iterator[list[str]]:
    for row in [*told["kernels"], *told["training"]]:
        if row["us"] is None:
            yield [row["kernel"], row["shape"], refusal(row)]
            continue
        ratio, first, finite = row.get("times_floor"), row.get("first_call_ms"), row.get("finite")
        yield [
            row["kernel"],
            row["shape"],
            f"{row['us']:.4g}",
            "" if ratio is None else f"{ratio:.2f}",
            "" if first is None else f"{first:.3g}",
            "" if finite is None else "finite" if finite else "**not finite**",
        ]


def training(name: str, report: Run) -> Iterator[list[str]]:
    for row in report["rows"]:
        causal, memory = row.get("against_causal"), row.get("memory")
        yield [
            report["recipe"]["name"],
            row["attention"] if row["attention"] == "causal" else f"plan, {row['attention']}",
            str(row["window"]),
            str(row["slots"]),
            str(row["batch"]),
            f"{row['step_ms']:.4g} ({row['spread']:.0%})",
            f"{row['utilisation']:.1%}",
            f"{1 / row['utilisation']:.2f}",
            "" if causal is None else f"{causal:.2f}",
            "" if memory is None else f"{memory / 2**20:,.0f}",
        ]
    for failed in report.get("failures", []):
        yield [
            report["recipe"]["name"],
            failed["method"],
            str(failed["window"]),
            "",
            str(failed["batch"]),
            refusal(failed),
        ]


def fitting(name: str, told: Run) -> Iterator[list[str]]:
    if name == "continuity":
        twice = told["steps_made_twice"]
        yield [
            f"killed, resumed: steps {twice[0]} to {twice[-1]} made twice",
            f"losses differ by at most {told['largest_difference']:.2g} of themselves",
        ]
    elif name == "advise":
        yield ["`advise`", f"{told['images']} images, {len(told['windows'])} windows, all done"]
    else:
        mfu, speed = told["mfu"], told["images_per_second"]
        yield [
            PLANNED[name].replace("20", str(told["steps"])),
            f"{speed:.4g} images a second, {told['memory_gib']:.3g} GiB, {told['data_wait']:.1%} of the time no batch",
            *([f"{mfu:.1%}", f"{1 / mfu:.2f}"] if mfu else []),
        ]


def tested(name: str, told: Run) -> Iterator[list[str]]:
    failed = [*told["failed"], *told["error"]]
    names = f"{len(failed)}" + (f": {', '.join(failed)}" if failed else "")
    yield ["tests that need a GPU", str(len(told["passed"])), names, str(len(told["skipped"]))]


def _steps(runs: list[Run]) -> list[str]:
    rows = [
        [
            step["name"],
            step["about"],
            f"{step['seconds']:.0f} of {step['limit']:.0f}",
            ended(step),
            measured_on(run),
            f"`scripts/gpu/check {step['name']}`",
        ]
        for run in runs
        for step in run["steps"]
    ]
    rows = rows or [["all", "every step of `check`", NOT_YET, NOT_YET, NOT_YET, "`scripts/gpu/check`"]]
    return _table(["step", "what", "seconds", "outcome"], rows)
