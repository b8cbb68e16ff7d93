"""Which of the processes that share a piece of work this one is, and its device."""

import os
from typing import Any

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment


def process() -> tuple[int, int, torch.device]:
    """This process's number, their count, and its device: torchrun's or SLURM's, otherwise alone.

    A GPU is made the current one, so that streams, captured graphs and libraries use it without being told.
    """
    environment: Any = None
    if TorchElasticEnvironment.detect():
        environment = TorchElasticEnvironment()
    elif SLURMEnvironment.detect() and "SLURM_STEP_ID" in os.environ:  # srun has started the tasks
        environment = SLURMEnvironment()
    rank, world = (environment.global_rank(), environment.world_size()) if environment else (0, 1)
    local = environment.local_rank() if environment else 0
    gpus = torch.cuda.device_count()  # one, where SLURM shows each task its own
    if not gpus:
        return rank, world, torch.device("cpu")
    device = torch.device("cuda", local % gpus)
    torch.cuda.set_device(device)
    return rank, world, device
