"""Schema of the checkpoint entries that a resumed run reads, Lightning's and the project's, checked before loading."""

from typing import Annotated, Any, Literal

from pydantic import Field
from torch import Tensor, nn

from zipar_train.models.filling import unaccounted
from zipar_train.models.restore import LoadedWeights
from zipar_train.run.checkpoints import REMEDY, Count, Fingerprint, Kept, Part
from zipar_train.training.frozen import frozen_tensors
from zipar_train.training.module import ZipARModule

Plain = dict[str, Any]
AVERAGES = {"step", "exp_avg", "exp_avg_sq"}  # AdamW's state of each parameter


class Ready(Part):
    ready: Count
    completed: Count


class Started(Ready):
    started: Count


class Processed(Started):
    processed: Count


class Readied(Part):
    total: Ready
    current: Ready


class Zeroed(Part):
    total: Started
    current: Started


class Progress(Part):
    total: Processed
    current: Processed


class Batches(Progress):
    is_last_batch: bool


class Validation(Part):
    state_dict: Plain
    batch_progress: Batches


class Steps(Part):
    step: Readied
    zero_grad: Zeroed


class Optimizing(Part):
    optimizer: Steps


class Stepped(Part):
    batches_that_stepped: Count = Field(alias="_batches_that_stepped")


class Fit(Part):
    """State of Lightning's fit loop: epochs, the steps within them, and validation."""

    state_dict: Plain
    epoch_progress: Progress
    epoch_state: Stepped = Field(alias="epoch_loop.state_dict")
    batches: Batches = Field(alias="epoch_loop.batch_progress")
    schedule: Readied = Field(alias="epoch_loop.scheduler_progress")
    automatic_state: Plain = Field(alias="epoch_loop.automatic_optimization.state_dict")
    automatic: Optimizing = Field(alias="epoch_loop.automatic_optimization.optim_progress")
    manual_state: Plain = Field(alias="epoch_loop.manual_optimization.state_dict")
    manual: Readied = Field(alias="epoch_loop.manual_optimization.optim_step_progress")
    validation_state: Plain = Field(alias="epoch_loop.val_loop.state_dict")
    validation: Batches = Field(alias="epoch_loop.val_loop.batch_progress")


class Prediction(Part):
    state_dict: Plain
    batch_progress: Progress


class Loops(Part):
    fit_loop: Fit
    validate_loop: Validation
    test_loop: Validation
    predict_loop: Prediction


class Group(Part):
    """Optimizer parameter group; betas, weight decay, learning rate and kernel are set from the recipe instead."""

    lr: float
    params: list[int | str]
    eps: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    amsgrad: Literal[False]
    maximize: Literal[False]
    capturable: Literal[False]
    differentiable: Literal[False]
    foreach: bool | None


class Averages(Part):
    """AdamW state: averages of the gradients and of their squares for each parameter."""

    state: dict[int | str, Plain]
    param_groups: Annotated[list[Group], Field(min_length=1)]


class Schedule(Part):
    base_lrs: list[float]
    last_epoch: Count
    step_count: Count = Field(alias="_step_count")
    lr_lambdas: list[Plain | None]


class Guarded(Part):
    losses: list[float]
    skipped: Count
    in_a_row: Count


class Position(Part):
    epoch: Count
    steps: Count


class Averaging(Part):
    latest_update_step: Count


class Callbacks(Part):
    average: Averaging | None = Field(None, alias="Average")


class Averaged(Part):
    n_averaged: Tensor


class Resumable(Kept):
    """Checkpoint entries that a resumed run reads, Lightning's and the project's."""

    epoch: Count
    global_step: Count
    lightning: str = Field(alias="pytorch-lightning_version", pattern=r"^\d+\.\d+")
    loops: Loops
    callbacks: Callbacks
    optimizer_states: Annotated[list[Averages], Field(min_length=1, max_length=1)]
    lr_schedulers: Annotated[list[Schedule], Field(min_length=1, max_length=1)]
    position: Position = Field(alias="ShardDataModule")
    base: Fingerprint | None
    guard: Guarded | None
    least: float | None
    batches_a_step: Annotated[int, Field(ge=1)]
    current_model_state: Plain | None = None  # only with averaged weights
    averaging_state: Averaged | None = None


def check_fits(saved: LoadedWeights, module: ZipARModule) -> None:
    """Check that the weights and optimizer state of a checkpoint fit the module that continues from it.

    Raises:
        ValueError: If they do not fit; names the file, the entry and the tensor.
    """
    frozen, wanted = frozen_tensors(module), {}
    for name, tensor in module.state_dict().items():
        if name not in frozen:
            wanted[name.removeprefix("model.")] = tensor
    parts = {"state_dict": saved.state}
    current, averaging = saved.extra.get("current_model_state"), saved.extra.get("averaging_state")
    if saved.recipe and saved.recipe.optim.ema_decay is not None and (current is None or averaging is None):
        lacking = "current_model_state" if current is None else "averaging_state"
        raise ValueError(f"{saved.path} lacks its entry {lacking}, and its weights are averages. {REMEDY}")
    if averaging is not None and averaging["n_averaged"].ndim:
        raise ValueError(f"{saved.path}: its entry averaging_state.n_averaged is not a single number. {REMEDY}")
    if current is not None:
        parts["current_model_state"] = {str(name).removeprefix("model."): tensor for name, tensor in current.items()}
    for entry, state in parts.items():
        if strange := [name for name, tensor in state.items() if not isinstance(tensor, Tensor)]:
            raise ValueError(f"{saved.path}: its entry {entry}.{strange[0]} is not a tensor. {REMEDY}")
        if problems := unaccounted(state, wanted):
            raise ValueError(f"{saved.path}: its entry {entry} is not of this model. {problems}. {REMEDY}")
    groups = [group["params"] for group in module.optimizer().param_groups]
    states = saved.extra["optimizer_states"][0]
    found = [len(group["params"]) for group in states["param_groups"]]
    if found != [len(group) for group in groups]:
        raise ValueError(
            f"{saved.path}: its entry optimizer_states is of groups of {found} parameters, the model's are of "
            f"{[len(group) for group in groups]}. {REMEDY}"
        )
    parameters: dict[int | str, nn.Parameter] = {}
    for theirs, ours in zip(states["param_groups"], groups, strict=True):  # FSDP uses other keys
        parameters |= dict(zip(theirs["params"], ours, strict=True))
    for key, averages in states["state"].items():
        where = f"{saved.path}: its entry optimizer_states.0.state.{key}"
        if key not in parameters:
            raise ValueError(f"{where} is of no parameter. {REMEDY}")
        for name in AVERAGES:
            shape = [] if name == "step" else list(parameters[key].shape)
            value = averages.get(name)
            if not isinstance(value, Tensor) or not value.is_floating_point() or list(value.shape) != shape:
                given = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{where}.{name} is {given}, not a tensor of shape {shape}. {REMEDY}")
