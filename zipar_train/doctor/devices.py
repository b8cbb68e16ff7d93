"""Checks of the CPU, the GPUs, and communication between processes."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

from zipar_train.doctor.checks import GIB, Check, CheckContext, CheckResult, note, ok, problem, size, words
from zipar_train.run.provenance import processor_name

OURS = 2 * GIB  # largest GPU memory that the libraries of these checks use


def device(asked: CheckContext) -> Any:
    """Return the device that training would use: the first GPU, or the CPU."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() and not asked.cpu else torch.device("cpu")


def available() -> int:
    """Return the available memory in bytes, within the container's limit if there is one."""
    free = psutil.virtual_memory().available
    try:
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        return min(free, max(limit - used, 0))
    except (OSError, ValueError):  # no limit, or "max"
        return free


def processor(asked: CheckContext) -> Iterator[CheckResult]:
    import torch

    total = psutil.virtual_memory().total
    yield ok("CPU", f"{processor_name()}, {torch.get_num_threads()} threads")
    yield ok("memory", f"{size(total)}, {size(available())} free")
    shared = Path("/dev/shm")
    if shared.is_dir():  # loader processes pass batches through it; 64 MiB in a container by default
        free = shutil.disk_usage(shared).free
        if free < GIB / 4:
            remedy = "docker run --shm-size=8g, or --set data.workers=0"
            yield note("shared memory", f"{size(free)}: loader processes may die of it", remedy)
        else:
            yield ok("shared memory", f"{size(free)} free")


def bf16_speed() -> float:
    """Return the speed of bfloat16 matrix products on this CPU, relative to float32."""
    import torch

    best: dict[torch.dtype, float] = {}
    for _ in range(20):  # interleaved, and the best of each, because the CPU may be busy
        for dtype in (torch.float32, torch.bfloat16):
            a = torch.ones(512, 512, dtype=dtype)
            start = time.perf_counter()
            a @ a
            best[dtype] = min(best.get(dtype, 1e9), time.perf_counter() - start)
    return best[torch.float32] / best[torch.bfloat16]


def bf16(asked: CheckContext) -> Iterator[CheckResult]:
    """Check bfloat16 on the CPU; a GPU's own row says if it supports it."""
    if device(asked).type == "cpu":
        ratio = bf16_speed()
        if ratio >= 1:
            yield ok("bfloat16", f"matrices multiply {ratio:.1f} times as fast as in float32")
        else:
            yield note(
                "bfloat16",
                f"matrices multiply {ratio:.2f} times as fast as in float32",
                "Train on this CPU with --set trainer.precision=32-true",
            )


def gpus(asked: CheckContext) -> Iterator[CheckResult]:
    import torch

    seen = smi()
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            yield note("GPU", "hidden by CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES")
        elif seen and not built:
            remedy = "Install torch for your CUDA version: pytorch.org/get-started/locally has the line"
            yield problem("GPU", f"{seen[0]}, but torch {torch.__version__} is built without CUDA", remedy)
        elif seen:
            remedy = "Update the driver, or install torch for an older CUDA: `nvidia-smi` names the highest"
            yield problem("GPU", f"{seen[0]}, but torch, built for CUDA {built}, cannot use it", remedy)
        else:
            yield note("GPU", "none", "Digits need none; all other recipes want one with CUDA")
        return
    for number in range(torch.cuda.device_count()):
        name = f"GPU {number}"
        try:
            yield gpu(number, name, seen[0] if seen else "")
        except Exception as error:
            yield problem(
                name,
                words(error),
                "`nvidia-smi` shows whether it is in order; a torch built for its "
                "architecture may be missing: pytorch.org/get-started/locally",
            )


def gpu(number: int, name: str, seen: str) -> CheckResult:
    import torch

    place = torch.device("cuda", number)
    torch.ones(64, 64, device=place).matmul(torch.ones(64, 64, device=place)).sum().item()  # test that it computes
    properties = torch.cuda.get_device_properties(place)
    free, total = torch.cuda.mem_get_info(place)
    with torch.cuda.device(place):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    driver = f", {seen.rpartition(', ')[2]}" if seen else ""
    what = (
        f"{properties.name}, {size(total)}, {size(free)} free, compute capability "
        f"{properties.major}.{properties.minor}, {'bfloat16' if bf16 else 'no bfloat16'}, "
        f"CUDA {torch.version.cuda or torch.version.hip}{driver}"
    )
    if not bf16:
        return note(name, what, "--set trainer.precision=16-mixed, or 32-true")
    if total - free > max(OURS, total / 10):
        return note(name, what, "Others use it: `nvidia-smi` names them. CUDA_VISIBLE_DEVICES chooses another")
    return ok(name, what)


def smi() -> list[str]:
    """Return the name of each GPU and `driver 1.2.3`, as reported by nvidia-smi, independently of torch."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = [line.rpartition(", ") for line in done.stdout.splitlines() if ", " in line]
    return [f"{name}, driver {driver}" for name, _, driver in lines] if done.returncode == 0 else []


def group(asked: CheckContext, backend: str) -> CheckResult:
    """Check that a process group of this process alone can all-reduce a tensor."""
    import torch
    import torch.distributed as dist

    place = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    with tempfile.TemporaryDirectory(dir=asked.scratch) as folder:
        store = dist.FileStore(str(Path(folder, "store")), 1)
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timedelta(seconds=asked.patience))
        try:
            tensor = torch.full((3,), 2.0, device=place)
            dist.all_reduce(tensor)
            assert tensor.tolist() == [2, 2, 2], f"{backend} adds up wrongly: {tensor.tolist()}"
        finally:
            dist.destroy_process_group()
    return ok(backend, "a group of one process adds up")


def gloo(asked: CheckContext) -> Iterator[CheckResult]:
    yield group(asked, "gloo")


def nccl(asked: CheckContext) -> Iterator[CheckResult]:
    if device(asked).type == "cuda":
        yield group(asked, "nccl")


CHECKS = (
    Check("CPU", processor, "Report this line"),
    Check("bfloat16", bf16, "--set trainer.precision=32-true"),
    Check(
        "GPU", gpus, "`nvidia-smi` shows whether the driver works; set CUDA_VISIBLE_DEVICES= to continue without GPUs"
    ),
    Check("gloo", gloo, "Several processes on CPUs need it. Let the host's name resolve, or set GLOO_SOCKET_IFNAME=lo"),
    Check("nccl", nccl, "Several GPUs need it. NCCL_DEBUG=INFO reports why; trainer.devices=1 does not need it"),
)
