"""How long a trained run takes to draw a set of images as codes and as pixels, and whether it draws the same twice.

    python scripts/gpu/generate_timing.py RUN --window 16 --batch 32 --images 64 --json FILE --png FILE

Images are drawn as `evaluate` draws them: in bfloat16 on a GPU, in batches, pixels in a stream of their own.
"""

import argparse
import json
from pathlib import Path
from time import perf_counter

import torch

from zipar_train import load
from zipar_train.benchmark.roofline import Work, measure
from zipar_train.decoding.place import wait

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("run", type=Path)
for option in ("--window", "--batch", "--images"):
    parser.add_argument(option, type=int, required=True)
parser.add_argument("--json", type=Path, required=True)
parser.add_argument("--png", type=Path, required=True)
asked = parser.parse_args()

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
generator = load(asked.run, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
plan, guidance = generator.plan(asked.window), generator.recipe.sampling.guidance
labels = [number % (generator.recipe.model.num_classes or 1) for number in range(asked.images)]
rates = measure(device, generator.dtype)
rows = asked.batch * (2 if guidance != 1 else 1)
batches = asked.images / asked.batch
floor = Work.of(generator.load_family()).floor(plan, rates, rows=rows, size=generator.dtype.itemsize) * batches
told: dict = {
    "window": asked.window,
    "batch": asked.batch,
    "images": asked.images,
    "passes": plan.passes,
    "guidance": guidance,
    "floor_seconds": floor,
    "seconds": {},
}


def tell(**more) -> None:
    told.update(more)
    asked.json.write_text(json.dumps(told, indent=1))


def drawn(what: str, **options):
    wait(device)
    start = perf_counter()
    images = generator.generate(labels, window=asked.window, batch_size=asked.batch, **options)
    wait(device)
    told["seconds"][what] = perf_counter() - start
    tell()
    return images


def same(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a == b).float().mean())


drawn("codes, first", pixels=False)
codes = drawn("codes", pixels=False)
pictures = drawn("pixels, first")
pictures = drawn("pixels")
assert pictures.pixels is not None and pictures.pixels.float().std() > 0, "all pixels are alike"
fewer = generator.generate(labels[:4], window=asked.window, batch_size=2, pixels=False)
tell(
    same_codes_twice=same(codes.codes, pictures.codes),
    same_codes_in_smaller_batches=same(codes.codes[: len(fewer)], fewer.codes),
    times_floor=told["seconds"]["codes"] / floor,
    image_ms=told["seconds"]["codes"] / asked.images * 1000,
    pixels_add=told["seconds"]["pixels"] / told["seconds"]["codes"] - 1,
    # a dry run is on a CPU, which may emulate bfloat16
    grey_levels_off=generator.inference_family.tokenizer.rounding(device, side=16 if device.type == "cuda" else 4),
)
pictures.save(asked.png)
print(json.dumps(told, indent=1))
