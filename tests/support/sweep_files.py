"""Files of sweeps: the shipped ones, grids of all kinds, and what W&B's agents make of their trials."""

import json
from pathlib import Path

from zipar_train.recipe.load import recipe_folder

SHIPPED = sorted((recipe_folder() / "sweeps").glob("*.yaml"))
GRIDS = {
    "nested": """
method: grid
parameters:
  zipar.stand_in: {value: nearest}
  optim:
    parameters:
      warmup: {values: [0.5, 0.1]}
      betas: {value: [0.9, 0.95]}
      lr: {values: [0.1, 1.0e-05, 2e-4]}
  data: {parameters: {label_dropout: {values: [0.0, 0.5]}}}
""",
    "ranges": """
method: grid
run_cap: 7
parameters:
  seed: {min: 3, max: 6}
  data.label_dropout: {distribution: q_uniform, min: 0.0, max: 0.6, q: 0.2}
  data.micro_batch_size: {distribution: q_uniform, min: 4, max: 16, q: 4}
  data.workers: {distribution: int_uniform, min: 0, max: 1}
""",
    "kinds": """
method: grid
parameters:
  tune.activation_checkpointing: {values: [true, false]}
  optim.ema_decay: {values: [null, 0.999]}
  optim.schedule: {values: [cosine, constant]}
  zipar.windows: {values: ["{8: 1}", {8: 2, 1: 1}, "{4: 1, 2: 0.5}"]}
  optim.warmup: {values: [0]}
""",
    "lora": """
method: grid
parameters:
  tune.lora: {values: [null, {rank: 2, alpha: 4, targets: [q_proj, v_proj]}]}
  tune.distill: {values: [0.5]}
""",
    "twice": "method: grid\nparameters: {optim.weight_decay: {values: [1, 0.5, 1.0, 0.5, 0]}}",
    "constants": "method: grid\nparameters: {seed: {value: 3}, optim.lr: {distribution: constant, value: 0.1}}",
    "one": "method: grid\nparameters: {optim.lr: {values: [0.1]}}",
}


def write(folder: Path, text: str) -> Path:
    """A sweep's file in a folder."""
    path = folder / "sweep.yaml"
    path.write_text(text)
    return path


def agents(config: dict) -> list[str]:
    """What an agent puts in the place of ${args_no_hyphens}, once the server has sent the config as JSON."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    return create_sweep_command_args({"args": json.loads(json.dumps(config))})["args_no_hyphens"]
