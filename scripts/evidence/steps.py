"""What docs/evidence.md rests on: every step prints its commands, and what is done is not repeated.

    scripts/evidence/run data --images mnist-pngs    # shards; a folder with train/ and test/, in each a folder a digit
    scripts/evidence/run mixes rates chosen lora amounts drawn rules stand-ins    # by validation images, seed 0
    scripts/evidence/run headline    # to report: test images, three seeds
    scripts/evidence/run by-row      # chosen by validation images, reported on test images, seed 0
    scripts/evidence/run                             # everything but the data

Shards and runs lie where ZIPAR_DATA and ZIPAR_RUNS say, in data/ and runs/ if nowhere. Tables go to runs/evidence and,
between their marks, into docs/evidence.md.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from tables import CONTROL, PICTURES, TUNED, UNTUNED, WINDOWS, Found, closed, picture, pm, table, write
from tqdm import trange

from zipar_train import Plan, load
from zipar_train.evaluation.metrics import bits_by_drawing, bits_per_code
from zipar_train.loader import ShardLoader
from zipar_train.shards import Layout, Sample, read_manifest, write_manifest, write_shards

HERE = Path(__file__).parent
RUNS, DATA = (Path(os.environ.get(f"ZIPAR_{name}", name.lower())) for name in ("RUNS", "DATA"))
OUT, MNIST, SEEDS, NARROW = RUNS / "evidence", DATA / "mnist", [0, 1, 2], [4, 2, 1]
DRAWN = 1000  # the seed of drawings to train on, which none of SEEDS is
NARROWEST = 2  # of the windows that the recipe trains
TRAINED, CHOOSING = 40, 4  # shards of 500 images, from the beginning and from the end of MNIST's own training set
STAND_IN = "zipar.stand_in=nearest"  # as the paper words it
PLAIN = [  # what sweeps start from: before anything was chosen
    *("optim.lr=1e-3", "data.batch_size=32", "tune.distill=0"),
    *("zipar.windows={14: 1, 7: 1, 4: 1, 2: 1, 1: 1}", STAND_IN),
]
RULES = {  # decoder choices: what stands in, who sees it, whether row 1 waits
    "nearest": [STAND_IN],
    "latest": ["zipar.stand_in=latest"],
    "above": ["zipar.stand_in=above"],
    "completed": ["zipar.stand_in=completed"],
    "released": ["zipar.stand_in=released"],
    "nearest, seen by itself": [STAND_IN, "zipar.seen=by_itself"],
    "above, seen by itself": ["zipar.stand_in=above", "zipar.seen=by_itself"],
    "nearest, rows overlap from the first": [STAND_IN, "zipar.first_row=overlapping"],
}


def zipar(*arguments: Any) -> None:
    """One verb of the command line, shown as a person would type it."""
    words = [str(argument) for argument in arguments]
    print(
        "\n$ zipar-train " + " ".join(f"'{word}'" if re.search(r"[ {}]", word) else word for word in words), flush=True
    )
    try:
        status = subprocess.run([sys.executable, "-m", "zipar_train", *words]).returncode
    except KeyboardInterrupt:  # the verb has heard it too, and says how to go on
        status = 130
    if status:
        sys.exit(status)


def sets(*overrides: str) -> Iterable[str]:
    return [word for override in overrides for word in ("--set", override)]


@cache
def trained(recipe: str, run: Path, *overrides: str) -> Path:
    """A run folder, trained as far as it is not."""
    zipar("fit", "--recipe", recipe, "--resume", *sets(*overrides, f"run={run}"))
    return run


def base(seed: int) -> Path:
    return trained("mnist-base", RUNS / f"mnist-base-{seed}", f"seed={seed}")


def tuned(seed: int) -> Path:
    return trained("mnist", RUNS / f"mnist-{seed}", f"seed={seed}", f"model.weights={base(seed)}")


def control(seed: int) -> Path:
    return trained("mnist", RUNS / f"mnist-control-{seed}", f"seed={seed}", f"model.weights={base(seed)}",
                   "zipar.windows={14: 1}", "tune.distill=0")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What the tables are made from


def data(images: str) -> None:
    """MNIST as shards: of its training set 20,000 images to train on and 2,000 to choose by; its test set to report."""
    whole = MNIST / "whole"
    for split in ("train", "test"):
        zipar("tokenize", "--recipe", "mnist-base", "--images", images, "--split", split, "--per-shard", 500,
              "--batch-size", 256, "--out", whole)  # fmt: skip
    found = {split: read_manifest(whole / f"{split}.json") for split in ("train", "test")}
    shards = found["train"].shards
    for name, manifest, part in (
        ("train", found["train"], shards[:TRAINED]),
        ("val", found["train"], shards[-CHOOSING:]),
        ("test", found["test"], found["test"].shards),
    ):
        for shard in part:
            shutil.copyfile(whole / shard.name, MNIST / shard.name)
        count = sum(shard.samples for shard in part)
        layout = manifest.model_dump(include=set(Layout.model_fields)) | {"images": count}
        write_manifest(MNIST / f"{name}.json", Layout(**layout), part)
        print(f"{MNIST / name}.json: {count:,} images")


def sweep(name: str) -> dict[str, Any]:
    file = OUT / f"{name}.json"
    zipar("sweep", "--recipe", "mnist", "--grid", HERE / f"{name}.yaml", *sets(f"model.weights={base(0)}", *PLAIN),
          "--out", OUT / name, "--json", file)  # fmt: skip
    return json.loads(file.read_text())


@cache
def bits_of(checkpoint: Path, *overrides: str) -> dict[int, float]:
    """Validation bits at every window, under a rule."""
    file = OUT / "bits.json"
    zipar("advise", "--recipe", "mnist", "--checkpoint", checkpoint, "--windows", ",".join(map(str, WINDOWS)),
          *sets(*overrides), "--json", file)  # fmt: skip
    return {row["window"]: row["bits"] for row in json.loads(file.read_text())["windows"]}


def evaluated(name: str, checkpoint: Path, *arguments: Any) -> list[dict[str, Any]]:
    """Rows of an evaluation, whose drawings are kept."""
    file = OUT / f"{name}.json"
    zipar("evaluate", "--recipe", "mnist", "--checkpoint", checkpoint, *arguments, "--json", file)
    return json.loads(file.read_text())["rows"]


# ---------------------------------------------------------------------------------------------------------------------
# What is chosen by: seed 0, validation images


def against_base(trials: Iterable[tuple[list[str], dict[int, float]]], head: list[str], *overrides: str) -> list[str]:
    """Validation bits of trials, with what they close and what next-token loses.

    Args:
        overrides: of the recipe, for the untuned model's bits.
    """
    untuned = bits_of(base(0), *overrides)
    names = [f"{window}" for window in WINDOWS]
    rows = [["**untuned**", *[""] * (len(head) - 1), *(f"{untuned[w]:.4f}" for w in WINDOWS), *[""] * 5]]
    for words, bits in trials:
        kept = f"{bits[WINDOWS[0]] / untuned[WINDOWS[0]] - 1:+.2%}"
        rows.append(
            [*words, *(f"{bits[w]:.4f}" for w in WINDOWS), kept, *(closed(bits, untuned, w) for w in WINDOWS[1:])]
        )
    return table(
        [*head, *(f"bits at {name}" for name in names), "next-token", *(f"closed at {n}" for n in names[1:])], rows
    )


def of_sweep(name: str, head: list[str], words: Callable[[dict[str, Any]], list[str]]) -> None:
    trials = sorted(sweep(name)["trials"], key=lambda trial: trial["number"])
    bits = [{w: trial["metrics"][f"val/bits_w{w}"] for w in WINDOWS} for trial in trials]
    write(name, OUT, against_base([(words(t["values"]), b) for t, b in zip(trials, bits, strict=True)], head, STAND_IN))


def mixes() -> None:
    of_sweep("mixes", ["windows trained: weight"], lambda values: [str(values["zipar.windows"])])


def rates() -> None:
    of_sweep("rates", ["learning rate", "distillation"],
             lambda values: [f"{values['optim.lr']:g}", f"{values['tune.distill']:g}"])  # fmt: skip


def chosen() -> None:
    of_sweep("chosen", ["images a step", "distillation"],
             lambda values: [str(values["data.batch_size"]), f"{values['tune.distill']:g}"])  # fmt: skip


def lora() -> None:
    of_sweep("lora", ["rank", "learning rate"], lambda v: [str(v["tune.lora.rank"]), f"{v['optim.lr']:g}"])


def amounts() -> None:
    of_sweep("amounts", ["images"], lambda values: [f"{32 * values['trainer.limit_train_batches']:,}"])


def stand_ins() -> None:
    """Tuned and scored under one rule, beside the untuned base under the same."""
    rows = []
    for trial in sorted(sweep("stand-ins")["trials"], key=lambda trial: trial["number"]):
        rule = yaml.safe_load(trial["values"]["zipar"])
        windows, more = rule.pop("windows"), [f"zipar.{key}={value}" for key, value in rule.items()]
        before, after = bits_of(base(0), *more), {w: trial["metrics"][f"val/bits_w{w}"] for w in windows}
        words = ", ".join(str(value) for value in rule.values())
        rows.append([words, *(f"{before[w]:.4f}" for w in NARROW), *(f"{after[w]:.4f}" for w in WINDOWS)])
    head = [f"{what} at {w}" for what, windows in (("untuned", NARROW), ("tuned", WINDOWS)) for w in windows]
    write("stand-ins", OUT, table(["rule", *head], rows))


def drawings() -> Path:
    """As many images as the recipe trains on, drawn next-token by the untuned model, as shards."""
    manifest, like = OUT / "drawings" / "train.json", read_manifest(MNIST / "train.json")
    if not manifest.is_file():
        generator, size = load(base(0)), 500

        def samples() -> Iterable[Sample]:
            for first in trange(0, like.samples, size, unit_scale=size, unit="images"):
                labels = [number % 10 for number in range(first, first + size)]
                codes = generator.draw(labels, seed=DRAWN, first=first, batch_size=size, pixels=False).codes
                for at, (label, grid) in enumerate(zip(labels, codes.numpy(), strict=True)):
                    yield Sample(f"{first + at:06d}", grid[None], label, None)

        layout = Layout(**like.model_dump(include=set(Layout.model_fields)) | {"images": like.samples})
        write_shards(samples(), manifest, layout=layout, per_shard=size)
    return manifest


def drawn() -> None:
    """Tuned on drawings of the untuned model instead of pictures."""
    trials = [(["pictures", "0.8"], bits_of(tuned(0)))]
    for share in ("0.8", "1.0"):
        more = [f"model.weights={base(0)}", f"data.train={drawings()}", f"tune.distill={share}"]
        trials.append((["its own drawings", share], bits_of(trained("mnist", OUT / f"drawn-{share}", *more))))
    write("drawn", OUT, against_base(trials, ["trained on", "distillation"]))


def rules() -> None:
    """The untuned base under every decoder choice: bits, and what is drawn."""
    rows = []
    generator, loader = load(base(0)), ShardLoader(MNIST / "val.json", batch_size=500)
    for name, overrides in RULES.items():
        more = ["--released"] if name == "released" else []
        found = evaluated("rules", base(0), "--windows", "4,2,1", *more, *sets(*overrides, "evaluate.images=2000"),
                          "--out", OUT / "rules")  # fmt: skip
        for manner in ("planned", "released") if more else ("planned",):
            own = {row["window"]: row for row in found if row["manner"] == manner}
            bits = {w: own[w]["bits"] for w in NARROW}
            if manner == "released":
                bits = {w: bits_by_drawing(generator.decoder(w, manner="released"), loader) for w in NARROW}
            words = name if manner == "planned" else "released, and unwritten slots attended: the released decoder"
            told = [[f"{bits[w]:.4f}", f"{own[w]['fid']['mean']:.2f}", f"{own[w]['agreement']['mean']:.1%}"]
                    for w in NARROW]  # fmt: skip
            rows.append([words, *(cell for column in zip(*told, strict=True) for cell in column),
                         f"{own[1]['passes']:.0f}"])  # fmt: skip
    head = [f"{what} at {w}" for what in ("bits", "FD", "agreement") for w in NARROW]
    write("rules", OUT, table(["what stands in", *head, "passes at 1"], rows))


def by_row() -> None:
    """A window for each row instead of one for all: raised one row after another, where a pass buys most bits."""
    generator = load(tuned(0))
    height, width = generator.drawing.grid.height, generator.drawing.grid.width

    def bits(windows: list[int], part: str, images: int) -> float:
        plan = Plan.zipar(generator.drawing.grid, window=windows, prompt=generator.drawing.prompt_length)
        return bits_per_code(generator, plan, ShardLoader(MNIST / f"{part}.json", batch_size=200), images=images)

    windows, rows = [NARROWEST] * (height - 1), []
    for spent in range(1, 3 * (height - 2) + 1):
        wider = [[w + (at == row) for at, w in enumerate(windows)] for row in range(1, height - 1)]
        windows = min((each for each in wider if max(each) <= width), key=lambda each: bits(each, "val", 200))
        if spent % (height - 2) == 0:
            same = NARROWEST + spent // (height - 2)
            told = [f"{bits(each, 'test', 5000):.4f}" for each in ([same] * (height - 1), windows)]
            rows.append([str(same), told[0], ", ".join(map(str, windows[1:])), told[1]])
    write(
        "by-row",
        OUT,
        table(["window of all rows", "bits", "windows of rows 1, 2, ... for as many passes", "bits"], rows),
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is reported: test images, three seeds


def headline() -> None:
    """Base, control and tuned models of three seeds: every window, planned and adaptive."""
    found: Found = {}
    for seed in SEEDS:
        names = {base(seed).name: UNTUNED, control(seed).name: CONTROL, tuned(seed).name: TUNED}
        test = [*sets(f"data.val={MNIST / 'test.json'}", f"evaluate.seeds=[{seed}]"), "--out", OUT / f"test-{seed}"]
        rows = evaluated(f"control-{seed}", control(seed), "--compare", base(seed), "--windows", "14,4,2", *test)
        rows = [row for row in rows if row["checkpoint"] == control(seed).name]
        rows += evaluated(f"test-{seed}", tuned(seed), "--compare", base(seed), "--released", "--adaptive", *test)
        for row in rows:
            found.setdefault((names[row["checkpoint"]], row["manner"], row["window"]), []).append(row)

    def cells(name: str, manner: str, window: int) -> list[str]:
        rows = found[name, manner, window]
        passes = mean(row["passes"] for row in rows)
        bits = [] if manner == "adaptive" else [pm([row["bits"] for row in rows], 4)]
        gap = [] if manner == "adaptive" else [pm([100 * row["gap_closed"] for row in rows if row["gap_closed"]], 1)]
        scores = [pm([row[score]["mean"] for row in rows], 3) for score in ("fid", "precision", "recall")]
        return [name, str(window), f"{passes:.1f}" if manner == "adaptive" else f"{passes:.0f}", *bits, *gap, *scores,
                pm([100 * row["agreement"]["mean"] for row in rows], 1)]  # fmt: skip

    head = ["model", "window", "passes", "bits a code", "gap closed, %", "FD", "precision", "recall", "agreement, %"]
    models = [UNTUNED, CONTROL, TUNED]
    told = [(name, window) for name in models for window in WINDOWS if (name, "planned", window) in found]
    write("headline", OUT, table(head, [cells(name, "planned", window) for name, window in told]))
    write("released", OUT, table(head, [cells(models[0], "released", window) for window in WINDOWS[1:]]))
    adaptive = [cells(name, "adaptive", window) for name in (models[0], models[2]) for window in WINDOWS[1:]]
    write("adaptive", OUT, table(["model", "smallest window", *head[2:3], *head[5:]], adaptive))
    picture(found)
    shutil.copyfile(OUT / f"test-{SEEDS[0]}" / "samples.png", PICTURES / "samples.png")


STEPS = {"headline": headline, "mixes": mixes, "rates": rates, "chosen": chosen, "lora": lora, "amounts": amounts,
         "drawn": drawn, "rules": rules, "stand-ins": stand_ins, "by-row": by_row}  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"data, {', '.join(STEPS)}; otherwise all but data")
    parser.add_argument("--images", help="MNIST's pictures, for data")
    asked = parser.parse_args()
    if unknown := [step for step in asked.steps if step not in ("data", *STEPS)]:
        parser.error(f"no step {unknown[0]}: use data, {', '.join(STEPS)}")
    if "data" in asked.steps:
        if not asked.images:
            parser.error("data needs --images: a folder with train/ and test/, in each a folder a digit")
        data(asked.images)
    elif not (MNIST / "train.json").is_file():
        parser.error(f"no shards at {MNIST}: make them with `scripts/evidence/run data --images FOLDER`")
    for step in [step for step in asked.steps if step != "data"] if asked.steps else STEPS:
        STEPS[step]()
