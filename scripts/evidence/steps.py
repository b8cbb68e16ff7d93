"""What docs/evidence.md rests on: every step prints its commands, and what is done is not repeated.

    scripts/evidence/run data --images mnist-pngs    # shards; a folder with train/ and test/, in each a folder a digit
    scripts/evidence/run limits tuning drawn rules stand-ins    # validation images, seed 0
    scripts/evidence/run headline windows shortest frontier     # fresh images, three seeds
    scripts/evidence/run natural frontier --inputs FOLDER       # what natural_images.py describes
    scripts/evidence/run                                        # everything but data and natural

Shards and runs lie where ZIPAR_DATA and ZIPAR_RUNS say, in data/ and runs/ if nowhere. Tables go to runs/evidence and,
between their marks, into docs/evidence.md.
"""

import argparse
import shutil
from pathlib import Path

from choosing import drawn, rules, stand_ins
from frontier import frontier
from limits import limits
from models import MNIST, zipar
from natural_images import natural
from reporting import headline, shortest, windows
from tuning import tuning

from zipar_train.data.manifest import Layout
from zipar_train.data.shards import read_manifest, write_manifest

TRAINED, FRESH, CHOOSING = 40, 20, 4  # shards of 500 images: the first of MNIST's training set, and the last ones
STEPS = {
    "headline": headline,
    "windows": windows,
    "shortest": shortest,
    "frontier": frontier,
    "limits": limits,
    "tuning": tuning,
    "drawn": drawn,
    "rules": rules,
    "stand-ins": stand_ins,
}


def data(images: str) -> None:
    """Write MNIST as shards: of its training set 20,000 images to train on, 10,000 to report, 2,000 to choose by.

    Its test images were used for the tables of earlier versions of the page, so they are not fresh.
    """
    whole = MNIST / "whole"
    for split in ("train", "test"):
        zipar(
            "tokenize",
            "--recipe",
            "mnist-base",
            "--images",
            images,
            "--split",
            split,
            "--per-shard",
            500,
            "--batch-size",
            256,
            "--out",
            whole,
        )
    found = {split: read_manifest(whole / f"{split}.json") for split in ("train", "test")}
    shards = found["train"].shards
    for name, manifest, part in (
        ("train", found["train"], shards[:TRAINED]),
        ("fresh", found["train"], shards[-CHOOSING - FRESH : -CHOOSING]),
        ("val", found["train"], shards[-CHOOSING:]),
        ("test", found["test"], found["test"].shards),
    ):
        for shard in part:
            shutil.copyfile(whole / shard.name, MNIST / shard.name)
        count = sum(shard.samples for shard in part)
        layout = manifest.model_dump(include=set(Layout.model_fields)) | {"images": count}
        write_manifest(MNIST / f"{name}.json", Layout(**layout), part)
        print(f"{MNIST / name}.json: {count:,} images")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "steps", nargs="*", metavar="STEP", help=f"data, natural, {', '.join(STEPS)}; otherwise all but the first two"
    )
    parser.add_argument("--images", help="MNIST's pictures, for data")
    parser.add_argument("--inputs", type=Path, metavar="FOLDER", help="natural images and networks, for natural")
    asked = parser.parse_args()
    if unknown := [step for step in asked.steps if step not in ("data", "natural", *STEPS)]:
        parser.error(f"no step {unknown[0]}: use data, natural, {', '.join(STEPS)}")
    if "data" in asked.steps:
        if not asked.images:
            parser.error("data needs --images: a folder with train/ and test/, in each a folder a digit")
        data(asked.images)
    elif asked.steps != ["natural"] and not (MNIST / "train.json").is_file():
        parser.error(f"no shards at {MNIST}: make them with `scripts/evidence/run data --images FOLDER`")
    if "natural" in asked.steps:
        if not asked.inputs:
            parser.error("natural needs --inputs: a folder with the files that natural_images.py describes")
        natural(asked.inputs)
    for step in [step for step in asked.steps if step in STEPS] if asked.steps else STEPS:
        STEPS[step](*([asked.inputs] if step == "frontier" else []))
