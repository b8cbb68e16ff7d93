"""What fits into the time of `scripts/gpu/evidence`: an estimate before there is a GPU, and steps by a measured rate.

    python scripts/gpu/tin/budget.py    # prints what sizes of models fit, from operations and bytes

The estimate assumes an H100 at 790 TFLOP/s bf16 in large products and 3.0 TB/s, of which a training step of a small
model uses a quarter. `steps` needs no estimate: it takes the images a second that a short training run has measured.
"""

from dataclasses import dataclass
from math import ceil

PEAK, SHARE, BANDWIDTH = 790e12, 0.25, 3.0e12  # FLOP/s in large products, share of it in training, bytes/s
SECONDS = 235.0  # of base training
START = 30.0  # seconds from the start of a process to its first training step, if not measured
BITS = 25.0  # seconds to count the bits of a model
DISTANCES = 85.0  # seconds to draw and score 15 rows
TUNING = (
    1.6  # seconds of a distillation step by those of a next-token step: a teacher's pass (4/3), 271 slots, its loss
)
EPOCHS = 12  # most of base training: more would fit the 100,000 training images and not the others
SLACK = 15.0  # seconds


@dataclass(frozen=True)
class Rate:
    """What a short training run has measured."""

    images: float  # a second
    start: float  # seconds from its start to the first step, its compilations included


def reserve(rate: Rate, *, epoch: int) -> float:
    """Seconds that must be left when base training ends: two epochs, bits that nothing runs beside, all distances.

    Args:
        epoch: training images.
    """
    return (1 + TUNING) * epoch / rate.images + 2 * rate.start + BITS + DISTANCES + SLACK


def steps(rate: Rate, *, left: float, epoch: int, batch: int) -> int:
    """Steps of base training: EPOCHS of them at most, one at least.

    Args:
        left: seconds until everything must be over.
        epoch: training images.
        batch: images a step.
    """
    seconds = left - reserve(rate, epoch=epoch) - rate.start
    return max(1, min(EPOCHS * ceil(epoch / batch), int(seconds * rate.images / batch)))


def table() -> list[str]:
    """Model sizes: operations of a step, what it takes, epochs that fit, bytes."""
    import torch

    from zipar_train.models.family import build
    from zipar_train.plan.table import Plan
    from zipar_train.recipe.load import load_recipe
    from zipar_train.training.callbacks.throughput import flops

    recipe = str(__file__).replace("budget.py", "tin-base.yaml")
    head = [
        "depth x width",
        "M parameters",
        "GFLOP an image",
        "ms a step of 256",
        f"epochs in {SECONDS:.0f} s",
        "weights and optimizer, MB",
        "ms of reading a pass, 500 images",
    ]
    rows = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head))]
    for depth, width, feed_forward in ((6, 512, 1536), (8, 512, 1536), (10, 640, 1792), (12, 640, 1792)):
        model = load_recipe(
            recipe,
            [
                f"model.num_layers={depth}",
                f"model.hidden_size={width}",
                f"model.num_heads={width // 64}",
                f"model.ffn_size={feed_forward}",
            ],
        ).model
        family = build(model, device="meta", empty=True, dtype=torch.float32)
        parameters = sum(parameter.numel() for parameter in family.model.parameters())
        work = flops(family, Plan.zipar(family.grid, window=16, prompt=1))
        rate = PEAK * SHARE / work
        keys = 500 * 257 * 2 * width * depth * 2  # bytes at the end of an image, bfloat16
        read = (parameters * 2 + keys / 2) / BANDWIDTH
        rows.append(
            f"| {depth} x {width} | {parameters / 1e6:.1f} | {work / 1e9:.0f} | {256 / rate * 1e3:.0f} | "
            f"{SECONDS * rate / 1e5:.1f} | {16 * parameters / 1e6:.0f} | {read * 1e3:.2f} |"
        )
    return rows


if __name__ == "__main__":
    print("\n".join(table()))
