"""Former recipe keys and command-line options: converted in stored recipes, explained in errors elsewhere."""

import copy
from typing import Any

KEYS = {  # keys of version 0.1
    "about": "description",
    "run": "run_dir",
    "draw": "sampling",
    "checkpoint_best": "checkpoint_monitor",
    "paper": "published_results",
    "model.depth": "model.num_layers",
    "model.heads": "model.num_heads",
    "model.width": "model.hidden_size",
    "model.key_heads": "model.num_kv_heads",
    "model.feed_forward": "model.ffn_size",
    "model.codes": "model.codebook_size",
    "model.classes": "model.num_classes",
    "model.text": "model.t5_features",
    "model.words": "model.token_prompt",
    "model.token_prompt.positive": "model.token_prompt.prompt_suffix",
    "model.token_prompt.negative": "model.token_prompt.negative_prompt",
    "data.damaged": "data.on_bad_sample",
    "data.batch_size": "data.micro_batch_size",
    "optim.batch": "optim.global_batch_size",
    "optim.ema": "optim.ema_decay",
    "tune.recompute": "tune.activation_checkpointing",
    "health.gradients": "health.on_nonfinite",
    "health.spike": "health.loss_spike_factor",
    "health.stalled": "health.stall_warning_s",
    "evaluate.size": "evaluate.resize_to",
}
REMOVED = {"zipar.seen": "a stand-in is visible until the real code replaces it"}  # key: the behavior that remains
OPTIONS = {  # by command: options of version 0.1
    "plan": {"--gib": "--device-memory"},
    "bench": {"--alone": "--no-baselines", "--rounds": "--repeats"},
    "sweep": {"--grid": "--file"},
    "doctor": {"--only": "--checks", "--patience": "--timeout"},
    "fit": {"--allow": "--allow-change"},
}
COMMANDS = {"draw": "generate"}


def renamed(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe that an earlier version has stored in a checkpoint, an export or a sweep, by the present keys."""
    made = copy.deepcopy(recipe)
    for former, now in KEYS.items():
        *sections, last = former.split(".")
        place: Any = made
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        if isinstance(place, dict) and last in place:
            place[now.rpartition(".")[2]] = place.pop(last)
    zipar = made.get("zipar")
    if isinstance(zipar, dict):
        if zipar.get("first_row") == "alone":
            zipar["first_row"] = "complete"
        if zipar.get("seen") == "until_replaced":
            del zipar["seen"]
    return made


def check_arguments(arguments: list[str]) -> None:
    """Check that a command line has no former name of a command or an option.

    Raises:
        ValueError: naming the present one.
    """
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    if command in COMMANDS:
        raise ValueError(f"the command {command} is called {COMMANDS[command]} now")
    for argument in arguments:
        former = argument.partition("=")[0]
        if now := OPTIONS.get(command, {}).get(former):
            raise ValueError(f"{command} {former} is called {now} now")
