"""The rank and the device of this process among those that share its work."""

from typing import Any

import torch
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.fabric.utilities.rank_zero import rank_zero_only

from zipar_train.run.launcher import tasks_of_slurm


def launched() -> ClusterEnvironment | None:
    """Return the environment that started this process: torchrun, srun, or a user in a SLURM allocation.

    Returns:
        None if Lightning may detect the environment itself.

    Raises:
        ValueError: If Lightning does not support the options of srun.
    """
    if TorchElasticEnvironment.detect():  # first, because torchrun is also used within SLURM
        return TorchElasticEnvironment()
    if not SLURMEnvironment.detect():
        return None
    if not tasks_of_slurm():
        return LightningEnvironment()
    try:
        return SLURMEnvironment(auto_requeue=False)  # only `Checkpoint` writes a run's checkpoints
    except RuntimeError as error:
        raise ValueError(f"SLURM's variables: {error}") from error


def process() -> tuple[int, int, torch.device]:
    """Return rank, world size and device of this process, from torchrun or SLURM; otherwise rank 0 of 1.

    A GPU is made the current device, so that streams, CUDA graphs and libraries use it by default.
    """
    found = launched()
    if isinstance(found, (TorchElasticEnvironment, SLURMEnvironment)):
        rank, world, local = found.global_rank(), found.world_size(), found.local_rank()
    else:
        rank, world, local = 0, 1, 0
    gpus = torch.cuda.device_count()  # 1 if SLURM gives each task its own GPU
    if not gpus:
        return rank, world, torch.device("cpu")
    device = torch.device("cuda", local % gpus)
    torch.cuda.set_device(device)
    return rank, world, device


@rank_zero_only
def rank_zero_print(line: str, *, file: Any = None) -> None:
    """Print a line on rank 0 only, to `file` or standard output."""
    print(line, file=file, flush=True)
