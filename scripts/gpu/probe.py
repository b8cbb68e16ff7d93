"""What the kernels of a drawing pass and of a training step take on this device, beside the bytes that they must read.

    python scripts/gpu/probe.py --json FILE [--small]

Microseconds a call: the median of 20 replays of a CUDA graph that holds many calls, so that no launch is timed; on a
CPU of plain loops. Weights and keys are so many that none is found in the L2 cache. Every group is written when it is
done.
"""

import argparse
import json
from collections.abc import Callable
from math import ceil
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

from zipar_train.benchmark.roofline import measure
from zipar_train.decoding.place import wait

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--json", type=Path, required=True)
parser.add_argument("--small", action="store_true", help="small sizes, for a dry run")
asked = parser.parse_args()

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16
ITEM = 2  # bytes of a number
WIDTHS = {"tiny": (64, 128)} if asked.small else {"L": (1024, 2816), "XL": (1280, 3584)}  # width, feed-forward
ROWS = (2, 4) if asked.small else (2, 4, 8, 16, 32)
HEADS, HEAD = (2, 32) if asked.small else (16, 64)
SLOTS, IMAGES = (40, 2) if asked.small else (640, 32)  # of a cache; of a training batch
TRAINED = (36, 40) if asked.small else (576, 598)  # slots that are trained at once: next-token's and a window's
REPEAT = 3 if asked.small else 20
BACKENDS = (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH, SDPBackend.FLASH_ATTENTION)
LARGEST_CACHE = 4 * (torch.cuda.get_device_properties(0).L2_cache_size if CUDA else 0)

rates = measure(DEVICE, DTYPE)
told: dict[str, Any] = {
    "device": torch.cuda.get_device_name() if CUDA else "CPU",
    "cudnn": torch.backends.cudnn.version(),
    "copy_bandwidth": rates.copy,
    "matmul_rate": rates.matmul,
    "kernels": [],
    "training": [],
}


def tell() -> None:
    asked.json.write_text(json.dumps(told, indent=1))


def timed(work: Callable[[], Any], calls: int) -> float:
    """Microseconds of each of the `calls` calls that `work` makes."""
    if CUDA:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        work = graph.replay
    work()
    taken = []
    for _ in range(REPEAT):
        wait(DEVICE)
        start = perf_counter()
        work()
        wait(DEVICE)
        taken.append(perf_counter() - start)
    return median(taken) * 1e6 / calls


def copies(size: int, least: int) -> int:
    """How many tensors of `size` bytes no cache holds."""
    return max(2 if asked.small else least, ceil(LARGEST_CACHE / size))


def kernel(name: str, shape: str, work: Callable[[], Any], calls: int, *, bytes: int | None, **more: Any) -> None:
    taken = timed(work, calls)
    floor = None if bytes is None else bytes / rates.copy * 1e6
    told["kernels"].append(
        {
            "kernel": name,
            "shape": shape,
            "us": taken,
            "floor_us": floor,
            "times_floor": taken / floor if floor else None,
            **more,
        }
    )


def refused(name: str, shape: str, error: Exception) -> dict[str, Any]:
    return {"kernel": name, "shape": shape, "us": None, "error": str(error).splitlines()[0][:200]}


def small_kernel() -> None:
    x, calls = torch.ones(4, 1024, device=DEVICE, dtype=DTYPE), 50 if asked.small else 500
    kernel("multiply by a number", "4 x 1024", lambda: [x.mul_(1.0) for _ in range(calls)], calls, bytes=None)


def products() -> None:
    """The products of a layer, for few rows."""
    for size, (width, forward) in WIDTHS.items():
        for name, out, into in (
            ("q, k, v", 3 * width, width),
            ("attention output", width, width),
            ("gate, up", 2 * forward, width),
            ("down", width, forward),
        ):
            count = copies(out * into * ITEM, 24)
            weights = [torch.randn(out, into, device=DEVICE, dtype=DTYPE) for _ in range(count)]
            for rows in ROWS:
                x = torch.randn(rows, into, device=DEVICE, dtype=DTYPE)
                moved = (out * into + rows * (out + into)) * ITEM
                kernel(
                    f"{size}: {name}",
                    f"{rows} rows",
                    lambda x=x, w=weights: [linear(x, each) for each in w],
                    count,
                    bytes=moved,
                    rows=rows,
                )


def attention() -> None:
    """One pass's attention: few queries, many keys, a mask, each backend; what its first call takes."""
    shapes = [(2, 1, 20)] if asked.small else [(2, 1, 256), (2, 2, 384), (2, 4, 640), (128, 2, 384)]
    for rows, queries, keys in shapes:
        moved = 2 * rows * HEADS * keys * HEAD * ITEM
        count = copies(moved, 8)
        caches = [torch.randn(2, rows, HEADS, SLOTS, HEAD, device=DEVICE, dtype=DTYPE) for _ in range(count)]
        q = torch.randn(rows, queries, HEADS, HEAD, device=DEVICE, dtype=DTYPE).transpose(1, 2)
        bias = torch.zeros(1, 1, queries, keys, device=DEVICE, dtype=DTYPE)

        def attend(cache, q=q, bias=bias, keys=keys):
            return scaled_dot_product_attention(q, cache[0][:, :, :keys], cache[1][:, :, :keys], attn_mask=bias)

        for backend in BACKENDS:
            name, shape = f"attention, {backend.name}", f"{rows} rows, {queries} queries, {keys} keys"
            try:
                with sdpa_kernel(backend):
                    wait(DEVICE)
                    start = perf_counter()
                    attend(caches[0])
                    wait(DEVICE)
                    first = perf_counter() - start
                    kernel(
                        name,
                        shape,
                        lambda a=attend, c=caches: [a(each) for each in c],
                        count,
                        bytes=moved,
                        first_call_ms=first * 1000,
                    )
            except RuntimeError as error:
                told["kernels"].append(refused(name, shape, error))


def training() -> None:
    """Attention of a training step, forward and backward of a layer; with scores so low that a bad kernel gives NaN."""
    for slots in TRAINED:
        for low in (False, True):
            q, k, v = (torch.randn(IMAGES, HEADS, slots, HEAD, device=DEVICE, dtype=DTYPE) for _ in range(3))
            if low:  # every score is about -128 under the scale of 1/8
                q, k = torch.full_like(q, -4.0) + 0.01 * q, torch.full_like(k, 4.0) + 0.01 * k
            q, k, v = (tensor.requires_grad_() for tensor in (q, k, v))
            mask = torch.ones(slots, slots, dtype=torch.bool, device=DEVICE).tril()[None, None]
            for backend in BACKENDS:
                name = f"attention, forward and backward, {backend.name}{', low scores' if low else ''}"
                shape = f"{IMAGES} images, {slots} slots"
                taken = []
                try:
                    with sdpa_kernel(backend):
                        for _ in range(min(REPEAT, 6)):
                            q.grad = k.grad = v.grad = None
                            wait(DEVICE)
                            start = perf_counter()
                            scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()
                            wait(DEVICE)
                            taken.append(perf_counter() - start)
                except RuntimeError as error:
                    told["training"].append(refused(name, shape, error))
                    continue
                operations = 4 * IMAGES * HEADS * HEAD * slots**2 / 2 * 3.5  # below the diagonal; backward 2.5 times
                floor = operations / rates.matmul
                told["training"].append(
                    {
                        "kernel": name,
                        "shape": shape,
                        "us": median(taken[1:]) * 1e6,
                        "floor_us": floor * 1e6,
                        "times_floor": median(taken[1:]) / floor,
                        "first_call_ms": taken[0] * 1000,
                        "finite": all(bool(t.grad.isfinite().all()) for t in (q, k, v)),
                    }
                )


with torch.inference_mode():
    for group in (small_kernel, products, attention):
        group()
        tell()
training()
tell()
print(json.dumps(told, indent=1))
