"""What images and what stand-ins: seed 0, validation images."""

from collections.abc import Iterable
from pathlib import Path

from models import MNIST, MNIST_14, OUT, bits_of, evaluated, sets
from tables import VALIDATION, WINDOWS, slug, table, write
from tqdm import trange
from tuning import Trial, compare, validation_bits

from zipar_train import load
from zipar_train.data.loader import ShardLoader
from zipar_train.data.manifest import Layout
from zipar_train.data.sample import Sample
from zipar_train.data.shards import read_manifest, write_shards
from zipar_train.evaluation.likelihood import bits_by_decoding
from zipar_train.recipe.load import load_recipe

NARROW = [4, 2, 1]
DRAWN = 5000  # images to train on, and the seed they are generated with, which none of SEEDS is
STAND_IN = "zipar.stand_in=nearest"  # as the paper words it
RULES = {  # decoder choices: what stands in, whether row 1 waits
    "nearest": [STAND_IN],
    "completed": ["zipar.stand_in=completed"],
    "released": ["zipar.stand_in=released"],
    "nearest, rows overlap from the first": [STAND_IN, "zipar.first_row=overlapping"],
}


def drawings() -> Path:
    """Images drawn next-token by the untuned model, as shards."""
    manifest = OUT / "drawings" / "train.json"
    if not manifest.is_file():
        generator, size, like = load(MNIST_14.base(0)), 500, read_manifest(MNIST / "train.json")

        def samples() -> Iterable[Sample]:
            for first in trange(0, DRAWN, size, unit_scale=size, unit="images"):
                labels = [number % 10 for number in range(first, first + size)]
                codes = generator.generate(labels, seed=DRAWN, first=first, batch_size=size, pixels=False).codes
                for at, (label, grid) in enumerate(zip(labels, codes.numpy(), strict=True)):
                    yield Sample(f"{first + at:06d}", grid[None], label, None)

        told = {"images": DRAWN, "source": f"drawn by {MNIST_14.base(0).name}, next-token"}
        layout = Layout(**like.model_dump(include=set(Layout.model_fields)) | told)
        write_shards(samples(), manifest, layout=layout, per_shard=size)
    return manifest


def drawn() -> None:
    """Tuned on images that the untuned model has generated, and on as many real ones."""
    some = f"trainer.limit_train_batches={DRAWN // load_recipe('mnist').data.micro_batch_size}"
    own = f"data.train={drawings()}"
    trials: list[Trial] = [
        (f"{DRAWN:,} real images", {}, [some]),
        (f"{DRAWN:,} images of its own", {}, [some, own]),
        (f"{DRAWN:,} images of its own, teacher alone", {}, [some, own, "tune.distill=1"]),
    ]
    compare("drawn", trials)


def stand_ins() -> None:
    """Tuned and scored under one rule, beside the untuned model under the same."""
    rows = []
    for name, overrides in RULES.items():
        run = MNIST_14.tuned(0, *overrides, f"data.val_windows={WINDOWS}", name=f"rule-{slug(name)}")
        before, after = bits_of(MNIST_14.base(0), *overrides), validation_bits(run)
        rows.append([name, *(f"{before[w]:.4f}" for w in NARROW), *(f"{after[w]:.4f}" for w in WINDOWS)])
    head = [f"{what} at {w}" for what, windows in (("untuned", NARROW), ("tuned", WINDOWS)) for w in windows]
    write("stand-ins", OUT, table(["rule", *head], rows), VALIDATION)


def rules() -> None:
    """The untuned base under every decoder choice: bits, and what is drawn."""
    rows = []
    generator, loader = load(MNIST_14.base(0)), ShardLoader(MNIST / "val.json", batch_size=500)
    for name, overrides in RULES.items():
        more = ["--released"] if name == "released" else []
        found = evaluated(
            "rules",
            MNIST_14.base(0),
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
    write("rules", OUT, table(["what stands in", *head, "passes at 1"], rows), f"{VALIDATION}, 2,000 generated images")
