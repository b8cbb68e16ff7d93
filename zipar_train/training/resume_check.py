"""Check that a checkpoint's weights and optimizer state fit the training module that continues from it."""

from torch import Tensor, nn

from zipar_train.models.filling import unaccounted
from zipar_train.models.restore import LoadedWeights
from zipar_train.run.checkpoints import REMEDY
from zipar_train.training.frozen import frozen_tensors
from zipar_train.training.module import ZipARModule

ADAMW_STATE = {"step", "exp_avg", "exp_avg_sq"}  # AdamW's tensors for each parameter


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
        for name in ADAMW_STATE:
            shape = [] if name == "step" else list(parameters[key].shape)
            value = averages.get(name)
            if not isinstance(value, Tensor) or not value.is_floating_point() or list(value.shape) != shape:
                given = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{where}.{name} is {given}, not a tensor of shape {shape}. {REMEDY}")
