"""Cost of int8 weights: bits per code on held-out codes, and the share of equal codes, as rows of a Markdown table.

Three ways are compared with the decoder in float32, each at every window:

* int8: as `load(..., int8=True)` computes on this device; on a CPU the inputs of products are rounded too;
* exact inputs: int8 weights, inputs in float32;
* exact inputs, head: the output head is int8 too.

Codes are compared twice. "generated": whole images from the same seeds, in which a different code changes those after
it. "one code": each code from the same earlier ones, those of held-out images, and the same seed.

    python scripts/evidence/int8.py runs/mnist-0 --windows 14,2 --images 500
"""

import argparse
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from zipar_train.data.loader import ShardLoader
from zipar_train.decoding.generator import Generator, load
from zipar_train.decoding.int8 import Int8Linear
from zipar_train.decoding.sampling import code_seeds, sample
from zipar_train.evaluation.likelihood import bits_per_code
from zipar_train.models.family import teacher_forced
from zipar_train.plan.masks import dense


class Found(NamedTuple):
    """Results of one way at one window."""

    bits: float
    generated: Tensor  # codes (N, ...)
    single: Tensor  # codes (N, ...), each from held-out ones


@contextmanager
def exact_inputs(active: bool):
    """Let int8 layers multiply inputs in float32."""
    before = Int8Linear.forward
    if active:
        Int8Linear.forward = Int8Linear.with_exact_input
    try:
        yield
    finally:
        Int8Linear.forward = before


def with_int8_head(generator: Generator, floats: Generator) -> Generator:
    """Round the output head of a generator, whose weight is read again."""
    generator.inference_family.model.lm_head = Int8Linear(floats.load_family().model.lm_head.weight)
    return generator


def measured(generator: Generator, window: int, *, val: str, images: int, batch: int) -> Found:
    family, plan, sampling = generator.inference_family, generator.plan(window), generator.recipe.sampling
    loader = ShardLoader(val, batch_size=batch)
    bits = bits_per_code(family, plan, loader, images=images)
    mask, single, labels = dense(plan, device=family.model.device), [], []
    filters = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    for given in loader:
        codes = given.codes[: images - sum(map(len, single))].to(family.model.device)
        condition = family.check(given.condition[: len(codes)])
        seeds = code_seeds([len(labels) + k for k in range(len(codes))], plan.grid.num_codes, seed=0)
        with torch.inference_mode():
            logits = teacher_forced(family, plan, codes, condition, mask)
            drawn = sample(logits.flatten(0, 1).cpu(), seeds.flatten(), **filters)
        single.append(drawn.view(codes.shape))
        labels += given.condition[: len(codes)].tolist()
        if len(labels) == images:
            break
    generated = generator.generate(labels, window=window, batch_size=batch, pixels=False).codes
    return Found(bits, generated, torch.cat(single))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--val", help="held-out shards; otherwise the recipe's data.val")
    parser.add_argument("--windows", required=True)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--batch", type=int, default=50)
    options = parser.parse_args(arguments)
    floats = load(options.checkpoint)
    ways: dict[str, tuple[Callable[[], Generator], bool]] = {
        "float32": (lambda: floats, False),
        "int8": (lambda: load(options.checkpoint, int8=True), False),
        "exact inputs": (lambda: load(options.checkpoint, int8=True), True),
        "exact inputs, head": (lambda: with_int8_head(load(options.checkpoint, int8=True), floats), True),
    }
    how = {"val": options.val or floats.recipe.data.val, "images": options.images, "batch": options.batch}
    print("| window | way | bits/code | change | equal: one code | equal: generated |")
    print("|---|---|---|---|---|---|", flush=True)
    for window in map(int, options.windows.split(",")):
        for name, (make, exact) in ways.items():
            with exact_inputs(exact):
                found = measured(make(), window, **how)
            if name == "float32":
                base = found
            one, whole = (
                (getattr(found, kind) == getattr(base, kind)).double().mean().item() for kind in ("single", "generated")
            )
            change = found.bits / base.bits - 1
            print(f"| {window} | {name} | {found.bits:.4f} | {change:+.3%} | {one:.2%} | {whole:.2%} |", flush=True)


if __name__ == "__main__":
    main()
