"""What settings are chosen by: seed 0, validation images."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml
from models import MNIST, OUT, RUNS, base, bits_of, evaluated, sets, trained, zipar
from tables import WINDOWS, closed, table, write
from tqdm import trange

from zipar_train import load
from zipar_train.data.loader import ShardLoader
from zipar_train.data.manifest import Layout
from zipar_train.data.sample import Sample
from zipar_train.data.shards import read_manifest, write_shards
from zipar_train.evaluation.likelihood import bits_by_decoding
from zipar_train.recipe.load import load_recipe

HERE, NARROW = Path(__file__).parent, [4, 2, 1]
DRAWN = 5000  # images to train on, and the seed they are drawn by, which none of SEEDS is
STAND_IN = "zipar.stand_in=nearest"  # as the paper words it
PLAIN = [  # what sweeps start from: before anything was chosen
    *("optim.lr=1e-3", "data.micro_batch_size=32", "tune.distill=0"),
    *("zipar.windows={14: 1, 7: 1, 4: 1, 2: 1, 1: 1}", STAND_IN),
]
RULES = {  # decoder choices: what stands in, whether row 1 waits
    "nearest": [STAND_IN],
    "completed": ["zipar.stand_in=completed"],
    "released": ["zipar.stand_in=released"],
    "nearest, rows overlap from the first": [STAND_IN, "zipar.first_row=overlapping"],
}


def sweep(name: str) -> dict[str, Any]:
    file = OUT / f"{name}.json"
    zipar(
        "sweep",
        "--recipe",
        "mnist",
        "--file",
        HERE / f"{name}.yaml",
        *sets(f"model.weights={base(0)}", *PLAIN),
        "--out",
        OUT / name,
        "--json",
        file,
    )
    return json.loads(file.read_text())


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
    of_sweep(
        "rates",
        ["learning rate", "distillation"],
        lambda values: [f"{values['optim.lr']:g}", f"{values['tune.distill']:g}"],
    )


def chosen() -> None:
    of_sweep(
        "chosen",
        ["images a step", "distillation"],
        lambda values: [str(values["data.micro_batch_size"]), f"{values['tune.distill']:g}"],
    )


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
    """Images drawn next-token by the untuned model, as shards."""
    manifest = OUT / "drawings" / "train.json"
    if not manifest.is_file():
        generator, size, like = load(base(0)), 500, read_manifest(MNIST / "train.json")

        def samples() -> Iterable[Sample]:
            for first in trange(0, DRAWN, size, unit_scale=size, unit="images"):
                labels = [number % 10 for number in range(first, first + size)]
                codes = generator.generate(labels, seed=DRAWN, first=first, batch_size=size, pixels=False).codes
                for at, (label, grid) in enumerate(zip(labels, codes.numpy(), strict=True)):
                    yield Sample(f"{first + at:06d}", grid[None], label, None)

        told = {"images": DRAWN, "source": f"drawn by {base(0).name}, next-token"}
        layout = Layout(**like.model_dump(include=set(Layout.model_fields)) | told)
        write_shards(samples(), manifest, layout=layout, per_shard=size)
    return manifest


def drawn() -> None:
    """Tuned on drawings of the untuned model, and on as many pictures."""
    some = f"trainer.limit_train_batches={DRAWN // load_recipe('mnist').data.micro_batch_size}"
    trials = []
    for name, share, more in (
        ("pictures", "0.8", [some]),
        ("its own drawings", "0.8", [some, f"data.train={drawings()}"]),
        ("its own drawings", "1.0", [some, f"data.train={drawings()}"]),
    ):
        run = RUNS / f"mnist-{'-'.join([*name.split(), share])}"
        trained("mnist", run, f"model.weights={base(0)}", f"tune.distill={share}", *more)
        trials.append(([name, share], bits_of(run)))
    write("drawn", OUT, against_base(trials, ["trained on", "distillation"]))


def rules() -> None:
    """The untuned base under every decoder choice: bits, and what is drawn."""
    rows = []
    generator, loader = load(base(0)), ShardLoader(MNIST / "val.json", batch_size=500)
    for name, overrides in RULES.items():
        more = ["--released"] if name == "released" else []
        found = evaluated(
            "rules",
            base(0),
            "--windows",
            "4,2,1",
            *more,
            *sets(*overrides, "evaluate.images=2000"),
            "--out",
            OUT / "rules",
        )
        for mode in ("planned", "released") if more else ("planned",):
            own = {row["window"]: row for row in found if row["mode"] == mode}
            bits = {w: own[w]["bits"] for w in NARROW}
            if mode == "released":
                bits = {w: bits_by_decoding(generator.decoder(w, mode="released"), loader) for w in NARROW}
            words = name if mode == "planned" else "released, and unwritten slots attended: the released decoder"
            told = [
                [f"{bits[w]:.4f}", f"{own[w]['fid']['mean']:.2f}", f"{own[w]['class_accuracy']['mean']:.1%}"]
                for w in NARROW
            ]
            rows.append(
                [words, *(cell for column in zip(*told, strict=True) for cell in column), f"{own[1]['passes']:.0f}"]
            )
    head = [f"{what} at {w}" for what in ("bits", "FD", "class accuracy") for w in NARROW]
    write("rules", OUT, table(["what stands in", *head, "passes at 1"], rows))
