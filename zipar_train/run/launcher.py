"""Environment variables with which torchrun, SLURM and other launchers number their processes."""

import os
from contextlib import suppress

RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # as Lightning reads them, in its order
OTHERS = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NODEID")


def rank() -> int:
    """Return the rank of this process among those that share its work."""
    for name in RANKS:
        with suppress(KeyError, ValueError):
            return int(os.environ[name])
    return 0


def check_variables() -> None:
    """Remove launcher variables that are empty, and check that the others are numbers.

    Lightning reads them while it is imported, and its error would not name the variable.

    Raises:
        ValueError: If a variable is not a number; names the variable and its value.
    """
    for name in (*RANKS, *OTHERS):
        value = os.environ.get(name)
        if value == "":
            del os.environ[name]
        elif value is not None and not value.isdecimal():
            raise ValueError(
                f"the environment variable {name} is {value!r}, and launchers such as torchrun and SLURM set it to a "
                f"number. Remove it: unset {name}"
            )


def tasks_of_slurm() -> bool:
    """Return True if srun started this process; directly in a batch script or allocation, one process has all tasks."""
    return bool(os.environ.get("SLURM_STEP_ID")) and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")
