"""The sizes of `check`: what differs between the real run and the dry one."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """What differs between the real run and the dry one."""

    model: tuple[str, ...] = ()  # overrides
    windows: str = "24,16,12,8,4"
    wide_and_paper: str = "24,16"  # next-token, and the window that the paper reports to lose nothing
    window: str = "16"
    rows: str = "2,4,8,16,32,64"  # of a pass: slots, twice under guidance
    train_batch: int = 32
    draw_batch: int = 32
    many: int = 64  # images generated at once
    images: int = 64
    rounds: int = 3
    steps: int = 25  # of `fit`, when it has been resumed
    compiled: str = "true"
    small: tuple[str, ...] = ()  # an option of the scripts
    processes: int = 4  # of pytest
    tolerance: float = 0.02  # share that a repeated step's loss may differ by; kernels add up in any order


FULL = Sizes()
TINY = Sizes(
    model=(
        *("model.size=null", "model.num_layers=2", "model.num_heads=2", "model.hidden_size=32", "model.ffn_size=64"),
        *("model.grid=[6, 6]", "model.codebook_size=64", "zipar.windows={6: 1, 3: 1}", "evaluate.windows=[6, 3]"),
        *("data.workers=0", "trainer.precision=32-true"),
    ),
    windows="6,3",
    wide_and_paper="6,3",
    window="3",
    rows="2,8,64",
    train_batch=4,
    draw_batch=4,
    many=4,
    images=6,
    rounds=1,
    steps=60,
    small=("--small",),
    processes=0,
    tolerance=0.0,
)
