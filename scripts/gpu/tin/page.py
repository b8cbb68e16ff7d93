"""Results of `scripts/gpu/evidence` into docs/evidence.md, between its marks `gpu:evidence`.

    python scripts/gpu/tin/page.py FOLDER    # that holds results.json and samples.png

What a shorter run has not measured is shown as a dash.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from zipar_train.io.files import make_folder, write_atomic

DOCS = Path(__file__).parents[3] / "docs"
MARKED = re.compile(r"(<!-- gpu:evidence -->\n).*?(<!-- /gpu:evidence -->)", re.DOTALL)
MODELS = {"base": "untuned", "tuned": "one epoch, mixed windows", "control": "control: one more epoch, next-token"}
RUNS = {"tin-base": "base", "tin": "tuned", "tin-control": "control"}
HEAD = [
    "model",
    "window",
    "passes",
    "bits a code",
    "above own next-token",
    "gap closed",
    "FD",
    "precision",
    "recall",
    "images/s",
]
WIDTH = 1400  # pixels of the picture
MIN_GAP = 0.005  # share of next-token's bits that a gap must have to be spoken of, as `zipar-train evaluate` has it


def lines(found: dict[str, Any]) -> list[str]:
    """The table, a row a model and window, where it was measured, and how each model was trained."""
    models, distances = judged(found), found.get("results", {}).get("distances", {})
    drawn = {(RUNS[row["run"]], row["window"]): row for row in distances.get("rows", [])}
    if not models and not drawn:
        return ["Not yet measured."]
    windows = sorted({int(w) for model in models.values() for w in model["bits"]} | {w for _, w in drawn}, reverse=True)
    rows = []
    machines: dict[str, dict[str, None]] = {}  # what was measured with: the models, in the order of the rows
    for model, name in MODELS.items():
        bits = {int(w): value for w, value in models.get(model, {}).get("bits", {}).items()}
        untuned = {int(w): value for w, value in models.get("base", {}).get("bits", {}).items()}
        for window in windows:
            row = drawn.get((model, window))
            if window not in bits and row is None:
                continue
            made = models[model]["environment"] if window in bits else distances["environment"]
            rows.append(
                [
                    name,
                    str(window),
                    cell(row and row["passes"], "d"),
                    cell(bits.get(window), ".4f"),
                    above(bits, window),
                    closed(bits, untuned, window) if model != "base" else "-",
                    score(row, "fid", ".1f"),
                    score(row, "precision", ".3f"),
                    score(row, "recall", ".3f"),
                    cell(row and row["images_per_second"], ".0f"),
                ]
            )
            machines.setdefault(measured(made, found), {})[name] = None
    if real := distances.get("real"):
        name = f"{real['images']:,} training images"
        rows.append(
            [
                name,
                *["-"] * 5,
                score(real, "fid", ".1f"),
                score(real, "precision", ".3f"),
                score(real, "recall", ".3f"),
                "-",
            ]
        )
        machines.setdefault(measured(distances["environment"], found), {})[name] = None
    text = ["| " + " | ".join(row) + " |" for row in [HEAD, ["---"] * len(HEAD), *rows]]
    several = len(machines) > 1
    told = [made + f" ({'; '.join(names)})" * several for made, names in machines.items()]
    return [*text, "", f"Measured on {' and '.join(told)}.", "", *trained(found), *skipped(found)]


def judged(found: dict[str, Any]) -> dict[str, Any]:
    """What is known of each model but its distances."""
    names = {f"bits-{model}": model for model in MODELS}
    return {names[step]: result for step, result in found.get("results", {}).items() if step in names}


def cell(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def score(row: dict[str, Any] | None, name: str, form: str) -> str:
    found = (row or {}).get(name)
    return "-" if found is None else cell(found["mean"], form) + (f" ± {found['std']:{form}}" if found["std"] else "")


def above(bits: dict[int, float], window: int) -> str:
    """Share of bits that a window costs a model above its own next-token bits."""
    if window not in bits or window == max(bits):
        return "-"
    return f"{bits[window] / bits[max(bits)] - 1:+.2%}"


def closed(bits: dict[int, float], untuned: dict[int, float], window: int) -> str:
    """Share of the bits that a window costs the untuned model which this model does not lose."""
    if not untuned or window not in bits or window not in untuned or window == max(untuned):
        return "-"
    whole = untuned[max(untuned)]
    gap = untuned[window] - whole
    return f"{1 - (bits[window] - whole) / gap:.0%}" if gap > MIN_GAP * whole else "-"


def measured(made: dict[str, str], found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {made[name]}" for name in ("torch", "lightning", "transformers"))
    return f"{made['device']}; {versions}; revision {made['revision']}, {made['date']}; `{found['command']}`"


def trained(found: dict[str, Any]) -> list[str]:
    """How each model was trained, and its command."""
    said, models = [], judged(found)
    commands = {step["name"]: step["command"] for step in found["steps"]}
    for model, name in MODELS.items():
        if (told := models.get(model)) is None:
            continue
        row = told.get("training") or {}
        words = [
            f"{told['parameters'] / 1e6:.1f} M parameters",
            f"{told['steps']:,} steps, {told['epochs']:.1f} epochs",
        ]
        if "train/images_per_second" in row:
            words.append(f"{row['train/images_per_second']:,.0f} images/s at the end")
        if "train/mfu" in row:
            words.append(f"{row['train/mfu']:.0%} of the card's peak")
        if "train/memory_gib" in row:
            words.append(f"{row['train/memory_gib']:.1f} GiB")
        said.append(f"* {name}: {'; '.join(words)}; bits of {told['images']:,} images; `{commands[model]}`")
    return [*said, ""] if said else []


def skipped(found: dict[str, Any]) -> list[str]:
    """Steps that were not done."""
    over = ("passed", "not needed")
    left = [f"{step['name']} ({step['status']})" for step in found.get("steps", []) if step["status"] not in over]
    return [f"Not measured: {', '.join(left)}.", ""] if left else []


def write(folder: Path) -> None:
    """Put the table, and the picture if there is one, into the documentation.

    Raises:
        ValueError: if the folder holds no results, or those of a dry run.
    """
    try:
        found = json.loads((folder / "results.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} holds no results.json of scripts/gpu/evidence ({error})") from error
    if found.get("tiny"):
        raise ValueError(f"{folder} holds a dry run (TINY=1), which measures nothing")
    text = lines(found)
    if (folder / "samples.png").is_file():
        make_folder(DOCS / "evidence")
        with Image.open(folder / "samples.png") as picture:
            picture.thumbnail((WIDTH, 10 * WIDTH))
            picture.convert("RGB").save(DOCS / "evidence" / "natural.jpg", quality=88)
        text += ["![the same draws at every window](evidence/natural.jpg)", ""]
    page = DOCS / "evidence.md"
    body = "\n".join(text).rstrip()
    changed, times = MARKED.subn(lambda match: f"{match[1]}{body}\n{match[2]}", page.read_text())
    assert times == 1, f"{page} has {times} places for gpu:evidence"
    write_atomic(page, changed.encode())
    print(body)


if __name__ == "__main__":
    try:
        write(Path(sys.argv[1] if len(sys.argv) > 1 else ".gpu/evidence"))
    except ValueError as error:
        sys.exit(f"page: {error}")
