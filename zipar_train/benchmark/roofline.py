"""Roofline floor of a forward pass: its memory traffic and FLOPs at rates measured on this device."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch.utils.benchmark import Timer

from zipar_train.decoding.int8 import to_int8
from zipar_train.decoding.place import wait
from zipar_train.models.family import Family
from zipar_train.plan.table import Plan


@dataclass(frozen=True)
class Rates:
    """Measured peak rates of a device.

    Attributes:
        copy: Bytes per second of a large copy, reads and writes counted.
        matmul: FLOP/s of a large matrix product in the dtype.
        int8: Operations per second of a large product of an `Int8Linear`: of integers on a CPU. None: `matmul`, since
            elsewhere its product is in the dtype.
    """

    copy: float
    matmul: float
    int8: float | None = None


def seconds(work: Callable[[], Any], device: torch.device, *, repeat: int = 7) -> list[float]:
    """Return the seconds of each of `repeat` calls, with device synchronization; two calls warm up before each."""

    def clock() -> float:
        wait(device)  # Timer's own clock waits for the current device, which may be another one
        return perf_counter()

    timer = Timer("work()", globals={"work": work}, timer=clock, num_threads=torch.get_num_threads())
    return [timer.timeit(1).mean for _ in range(repeat)]


@torch.inference_mode()
def measure(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure the device's rates: the best of several repetitions, since they define a floor."""
    cuda = device.type == "cuda"
    source = torch.ones(2**30 if cuda else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = 10 if cuda else 1

    def copy() -> None:
        for _ in range(copies):
            target.copy_(source)

    def multiply(size: int) -> Callable[[], Any]:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        result = torch.empty_like(left)
        return lambda: torch.mm(left, right, out=result)

    def multiply_int8(size: int) -> Callable[[], Any]:
        left, right = (to_int8(torch.randn(size, size))[0] for _ in range(2))
        return lambda: torch._int_mm(left, right.t())

    rates = Rates(copy=2 * len(source) * copies / min(seconds(copy, device)), matmul=_rate(multiply, device))
    return rates if device.type != "cpu" else replace(rates, int8=_rate(multiply_int8, device))


def _rate(product: Callable[[int], Callable[[], Any]], device: torch.device) -> float:
    """Return the operations per second of a square product: of 8192 rows on a GPU, of at most 2048 elsewhere.

    A CPU without instructions for the dtype needs a minute for 2048 rows of bfloat16, so rows double only as long as
    the next product takes less than a second.

    Args:
        product: Returns a function that multiplies two matrices of so many rows and columns.
    """
    size, largest = (8192, 8192) if device.type == "cuda" else (512, 2048)
    while size < largest and 8 * min(seconds(product(size), device, repeat=1)) < 1:
        size *= 2
    return 2 * size**3 / min(seconds(product(size), device))


@dataclass(frozen=True)
class Work:
    """Sizes of a model that determine the FLOPs and bytes of its passes.

    Attributes:
        body: Parameters of the layers and the last norm.
        head: Parameters of the output head's rows for image codes.
        attention: FLOPs of one query on one key, over all layers.
        key: Elements of one slot's keys and values, over all layers.
    """

    body: int
    head: int
    attention: int
    key: int

    @classmethod
    def of(cls, family: Family) -> "Work":
        """Return the sizes of a family, which must not be fused for inference."""
        config = family.model.config.get_text_config()
        body, heads = family.model.base_model, config.num_attention_heads
        table = body.get_input_embeddings().weight.numel()  # type: ignore[operator, union-attr]
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            body=sum(p.numel() for p in body.parameters()) - table,
            head=family.codebook_size * config.hidden_size,
            attention=4 * config.num_hidden_layers * heads * width,
            key=2 * config.num_hidden_layers * (config.num_key_value_heads or heads) * width,
        )

    def forward(self, plan: Plan) -> int:
        """Return the FLOPs of one row over a plan: 2 per parameter and slot, and attention to visible slots."""
        predicted = int((plan.target >= 0).sum())
        return 2 * (self.body * len(plan) + self.head * predicted) + self.attention * int(plan.visible().sum())

    def floor(self, plan: Plan, rates: Rates, *, rows: int, size: int, int8: bool = False) -> float:
        """Return the least seconds for all passes of a batch: for each pass, its bytes or its FLOPs, the slower one.

        Args:
            plan: The plan.
            rates: Measured rates of the device.
            rows: R = B, or 2 B under guidance.
            size: Bytes per element.
            int8: The weights of the layers have one byte, and their products the rate of those.
        """
        passes = plan.passes
        fed = np.bincount(plan.step, minlength=passes)
        predicted = np.bincount(plan.step[plan.target >= 0], minlength=passes)
        seen = np.bincount(plan.step, weights=plan.visible().sum(1), minlength=passes)
        keys = np.cumsum(fed)  # all keys so far, including this pass's
        moved, done = (
            self._moving(rates, keys, rows=rows, size=size, int8=int8),
            self._multiplying(rates, fed, predicted, seen, rows=rows, int8=int8),
        )
        return float(np.maximum(moved, done).sum())

    def middle_floor(self, plan: Plan, rates: Rates, *, slots: int, rows: int, size: int, int8: bool = False) -> float:
        """Return the least seconds of a pass in the middle of an image: its bytes or its FLOPs.

        Args:
            plan: The plan.
            rates: Measured rates of the device.
            slots: Slots that the pass feeds of each image, all with the head.
            rows: R = B, or 2 B under guidance.
            size: Bytes per element.
            int8: As in `floor`.
        """
        keys = middle(plan, slots)
        seen = int(plan.visible()[keys - slots : keys].sum())
        return max(
            self._moving(rates, keys, rows=rows, size=size, int8=int8),
            self._multiplying(rates, slots, slots, seen, rows=rows, int8=int8),
        )

    def _moving(self, rates: Rates, keys: Any, *, rows: int, size: int, int8: bool) -> Any:
        """Return the least seconds in which passes read their weights and this many keys of each row."""
        weights = self.body * (1 if int8 else size) + self.head * size
        return (weights + rows * self.key * keys * size) / rates.copy

    def _multiplying(self, rates: Rates, fed: Any, predicted: Any, seen: Any, *, rows: int, int8: bool) -> Any:
        """Return the least seconds of the operations of passes.

        Args:
            fed: Slots fed of each row.
            predicted: Those with the head.
            seen: Visible pairs of a query and a key.
        """
        products = 2 * self.body * fed / ((int8 and rates.int8) or rates.matmul)
        return rows * (products + (2 * self.head * predicted + self.attention * seen) / rates.matmul)


def middle(plan: Plan, slots: int) -> int:
    """Return the number of keys of a pass in the middle of an image, which feeds the last `slots` of them.

    It is half of the plan's slots, or the prompt and the fed slots if these are more.
    """
    return max(len(plan) // 2, plan.prompt + slots)
