"""Memory checks: estimate whether a batch fits before it is generated, and measure peak memory."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import torch

from zipar_train.decoding.cache import head_shape
from zipar_train.decoding.int8 import int8_layers
from zipar_train.models.family import Family
from zipar_train.plan.table import Plan

SPARE = 0.95  # share of the free memory that may be used; the rest covers allocator overhead
SAMPLING = 12  # float32 copies of a pass's logits: softmax, noise in float64, sorting for top-k and top-p


class BatchTooLarge(ValueError):
    """Error for a batch that does not fit into memory."""


def decode_bytes(family: Family, plan: Plan, images: int, *, rows: int, slots: int, lookahead: int = 0) -> int:
    """Return the bytes that generation needs beside the weights: keys and values, and the largest pass.

    Args:
        images: B.
        rows: R = B, or 2 B under guidance.
        slots: Number of slots of the cache.
        lookahead: Slots that a pass feeds of each image; 0: those of a step.
    """
    config, size = family.model.config.get_text_config(), family.model.dtype.itemsize
    heads, width = head_shape(config)
    cache = 2 * config.num_hidden_layers * heads * width * slots
    ahead = plan.slots_ahead(lookahead)
    fed = max(int(np.bincount(plan.step).max()), plan.prompt - 1 + ahead)
    predicted = max(int(np.bincount(plan.step[plan.target >= 0]).max()), ahead)
    mask = ahead * slots  # with lookahead, each image has its own
    hidden = fed * (8 * config.hidden_size + 3 * config.intermediate_size)
    logits = predicted * family.codebook_size
    products = max((layer.work_bytes(rows * fed, size) for layer in int8_layers(family.model)), default=0)
    return rows * size * (cache + mask + hidden + logits) + images * logits * 4 * SAMPLING + products


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a device."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def check_memory(family: Family, plan: Plan, images: int, *, rows: int, slots: int, lookahead: int = 0) -> None:
    """Check that a batch fits into memory; arguments as in `decode_bytes`.

    Raises:
        BatchTooLarge: If it does not; names the largest batch that does.
    """
    device, guided = family.model.device, rows // images
    if device.type == "meta":
        return
    room = free_bytes(device) * SPARE
    want = decode_bytes(family, plan, images, rows=rows, slots=slots, lookahead=lookahead)
    if want <= room:
        return
    most = int(room / decode_bytes(family, plan, 1, rows=guided, slots=slots, lookahead=lookahead))
    advice = f"at most {most:,} fit. Lower the batch size" if most else "not even one fits. Use a smaller model"
    raise BatchTooLarge(
        f"{images:,} images at once need {want / 2**30:.1f} GiB, and {device} has {room / 2**30:.1f} GiB left: {advice}"
    )


@contextmanager
def oom_as_value_error(images: int) -> Iterator[None]:
    """Turn an out-of-memory error inside the `with` block into a ValueError that says what to change.

    Args:
        images: Batch size.

    Raises:
        ValueError: If memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_oom(error):
            raise
        advice = f"Lower the batch size to {images // 2}" if images > 1 else "Use a smaller model"
        raise ValueError(
            f"memory ran out while generating {images:,} images at once; is something else using the device? {advice}"
        ) from error


def is_oom(error: BaseException) -> bool:
    """Return True if an error means that memory ran out, on any device."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


class Peak:
    """Peak bytes allocated within a `with` block, above those at its start; None unless on Linux or CUDA."""

    RESET, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> "Peak":
        self.before = self._most(reset=True)
        return self

    def __exit__(self, *error: object) -> None:
        after = self._most(reset=False)
        if self.before is not None and after is not None:
            self.bytes = max(0, after - self.before)

    def _most(self, *, reset: bool) -> int | None:
        """Return the peak bytes since the last reset; with `reset`, reset first and return the current bytes."""
        if self.device.type == "cuda":
            if reset:
                torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.max_memory_allocated(self.device)
        try:
            if reset:
                self.RESET.write_text("5")  # resets the process's high-water mark: man proc, clear_refs
            found = re.search(r"VmHWM:\s+(\d+) kB", self.STATUS.read_text())
        except OSError:
            return None
        return int(found[1]) * 1024 if found else None
