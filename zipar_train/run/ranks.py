"""Which of the processes that share a piece of work this one is, and its device."""

import torch
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from zipar_train.run.launcher import tasks_of_slurm


def launched() -> ClusterEnvironment | None:
    """What has started this process: torchrun, srun, or a person in an allocation of SLURM; None: Lightning may look.

    Raises:
        ValueError: if srun was told what Lightning cannot use.
    """
    if TorchElasticEnvironment.detect():  # first: it is used within SLURM too
        return TorchElasticEnvironment()
    if not SLURMEnvironment.detect():
        return None
    if not tasks_of_slurm():
        return LightningEnvironment()
    try:
        return SLURMEnvironment(auto_requeue=False)  # a run's checkpoint is `Checkpoint`'s alone
    except RuntimeError as error:
        raise ValueError(f"SLURM's variables: {error}") from error


def process() -> tuple[int, int, torch.device]:
    """This process's number, their count, and its device: torchrun's or SLURM's, otherwise alone.

    A GPU is made the current one, so that streams, captured graphs and libraries use it without being told.
    """
    found = launched()
    if isinstance(found, (TorchElasticEnvironment, SLURMEnvironment)):
        rank, world, local = found.global_rank(), found.world_size(), found.local_rank()
    else:
        rank, world, local = 0, 1, 0
    gpus = torch.cuda.device_count()  # one, where SLURM shows each task its own
    if not gpus:
        return rank, world, torch.device("cpu")
    device = torch.device("cuda", local % gpus)
    torch.cuda.set_device(device)
    return rank, world, device
