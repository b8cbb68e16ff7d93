"""Schema of the checkpoint entries that a resumed run reads, Lightning's and the project's, checked before loading."""

from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor

from zipar_train.run.checkpoints import CheckpointEntries, CheckpointPart, Fingerprint, NonNegativeInt

StateDict = dict[str, Any]


class Ready(CheckpointPart):
    ready: NonNegativeInt
    completed: NonNegativeInt


class Started(Ready):
    started: NonNegativeInt


class Processed(Started):
    processed: NonNegativeInt


class Readied(CheckpointPart):
    total: Ready
    current: Ready


class Zeroed(CheckpointPart):
    total: Started
    current: Started


class Progress(CheckpointPart):
    total: Processed
    current: Processed


class Batches(Progress):
    is_last_batch: bool


class Validation(CheckpointPart):
    state_dict: StateDict
    batch_progress: Batches


class Steps(CheckpointPart):
    step: Readied
    zero_grad: Zeroed


class Optimizing(CheckpointPart):
    optimizer: Steps


class Stepped(CheckpointPart):
    batches_that_stepped: NonNegativeInt = Field(alias="_batches_that_stepped")


class Fit(CheckpointPart):
    """State of Lightning's fit loop: epochs, the steps within them, and validation."""

    state_dict: StateDict
    epoch_progress: Progress
    epoch_state: Stepped = Field(alias="epoch_loop.state_dict")
    batches: Batches = Field(alias="epoch_loop.batch_progress")
    schedule: Readied = Field(alias="epoch_loop.scheduler_progress")
    automatic_state: StateDict = Field(alias="epoch_loop.automatic_optimization.state_dict")
    automatic: Optimizing = Field(alias="epoch_loop.automatic_optimization.optim_progress")
    manual_state: StateDict = Field(alias="epoch_loop.manual_optimization.state_dict")
    manual: Readied = Field(alias="epoch_loop.manual_optimization.optim_step_progress")
    validation_state: StateDict = Field(alias="epoch_loop.val_loop.state_dict")
    validation: Batches = Field(alias="epoch_loop.val_loop.batch_progress")


class Prediction(CheckpointPart):
    state_dict: StateDict
    batch_progress: Progress


class Loops(CheckpointPart):
    fit_loop: Fit
    validate_loop: Validation
    test_loop: Validation
    predict_loop: Prediction


class Group(CheckpointPart):
    """Optimizer parameter group; betas, weight decay, learning rate and kernel are set from the recipe instead."""

    lr: float
    params: list[int | str]
    eps: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    amsgrad: Literal[False]
    maximize: Literal[False]
    capturable: Literal[False]
    differentiable: Literal[False]
    foreach: bool | None


class OptimizerState(CheckpointPart):
    """AdamW state: averages of the gradients and of their squares for each parameter."""

    state: dict[int | str, StateDict]
    param_groups: Annotated[list[Group], Field(min_length=1)]


class SchedulerState(CheckpointPart):
    base_lrs: list[float]
    last_epoch: NonNegativeInt
    step_count: NonNegativeInt = Field(alias="_step_count")
    lr_lambdas: list[StateDict | None]


class GuardState(CheckpointPart):
    losses: list[float]
    skipped: NonNegativeInt
    in_a_row: NonNegativeInt


class LoaderPosition(CheckpointPart):
    epoch: NonNegativeInt
    steps: NonNegativeInt


class AverageCallback(CheckpointPart):
    latest_update_step: NonNegativeInt


class Callbacks(CheckpointPart):
    average: AverageCallback | None = Field(None, alias="Average")


class AveragingState(CheckpointPart):
    n_averaged: Tensor


class ResumeState(CheckpointEntries):
    """Checkpoint entries that a resumed run reads, Lightning's and the project's."""

    epoch: NonNegativeInt
    global_step: NonNegativeInt
    lightning: str = Field(alias="pytorch-lightning_version", pattern=r"^\d+\.\d+")
    loops: Loops
    callbacks: Callbacks
    optimizer_states: Annotated[list[OptimizerState], Field(min_length=1, max_length=1)]
    lr_schedulers: Annotated[list[SchedulerState], Field(min_length=1, max_length=1)]
    position: LoaderPosition = Field(alias="ShardDataModule")
    base: Fingerprint | None
    guard: GuardState | None
    least: float | None
    batches_a_step: Annotated[int, Field(ge=1)]
    current_model_state: StateDict | None = None  # only with averaged weights
    averaging_state: AveragingState | None = None
