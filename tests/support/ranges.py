"""What every number of a recipe may be, said a second time by hand, and every number that a recipe has."""

import types
from math import inf, isfinite, nextafter
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel


class Range(NamedTuple):
    """Both ends belong to it, unless one is open."""

    low: float
    high: float
    whole: bool = True
    open: str = ""  # low, high

    def inside(self) -> list[float]:
        """The numbers at its ends."""
        if self.whole:
            return [self.low, self.high]
        low = nextafter(self.low, inf) if "low" in self.open else float(self.low)
        return [low, nextafter(self.high, -inf) if "high" in self.open else float(self.high)]

    def outside(self) -> list[Any]:
        """The numbers just beyond its ends, and what is not a number."""
        odd: list[Any] = [inf, -inf, float("nan"), True, "1", [1], {}, 10**40, -(10**40), 1e300, -1e300]
        if self.whole:
            return [*odd, self.low - 1, self.high + 1, self.low + 0.5, float(self.low)]
        low = float(self.low) if "low" in self.open else nextafter(self.low, -inf)
        return [*odd, low, float(self.high) if "high" in self.open else nextafter(self.high, inf)]

    def __contains__(self, value: Any) -> bool:
        if type(value) is not (int if self.whole else float) or not isfinite(value):
            return False
        low = self.low < value if "low" in self.open else self.low <= value
        return low and (value < self.high if "high" in self.open else value <= self.high)


def real(low: float, high: float, open: str = "") -> Range:
    return Range(low, high, whole=False, open=open)


SHARE, WINDOW = real(0, 1), Range(1, 1025)
RANGES = {  # path: range; * is an entry of a list or a mapping, # a mapping's key
    "seed": Range(0, 2**32 - 1),
    "checkpoint_every": Range(1, 10**9),
    "checkpoint_keep": Range(1, 1000),
    "model.num_layers": Range(1, 128),
    "model.num_heads": Range(1, 1024),
    "model.hidden_size": Range(1, 65536),
    "model.num_kv_heads": Range(1, 1024),
    "model.ffn_size": Range(1, 1048576),
    "model.grid.*": Range(1, 1024),
    "model.preview.*": Range(1, 1024),
    "model.other_grids.*.*": Range(1, 1024),
    "model.codebook_size": Range(2, 65536),
    "model.num_classes": Range(1, 1048576),
    "model.t5_features.tokens": Range(1, 4096),
    "model.t5_features.features": Range(1, 65536),
    "model.token_prompt.tokens": Range(1, 4096),
    "model.token_prompt.vocabulary": Range(1, 1048576),
    "zipar.windows.#": WINDOW,
    "zipar.preview_window": WINDOW,
    "zipar.windows.*": real(0.0001, 10000),
    "data.micro_batch_size": Range(1, 65536),
    "data.workers": Range(0, 256),
    "data.shuffle": Range(1, 10**7),
    "data.label_dropout": SHARE,
    "data.val_windows.*": WINDOW,
    "tune.lora.rank": Range(1, 4096),
    "tune.lora.alpha": Range(1, 10**6),
    "tune.lora.dropout": real(0, 1, open="high"),
    "tune.distill": SHARE,
    "optim.lr": real(0, 10, open="low"),
    "optim.global_batch_size": Range(1, 1048576),
    "optim.betas.*": real(0, 1, open="high"),
    "optim.weight_decay": real(0, 10),
    "optim.warmup": SHARE,
    "optim.ema_decay": real(0, 1, open="low high"),
    "health.loss_spike_factor": real(1, 10**6, open="low"),
    "health.stall_warning_s": real(0, 86400, open="low"),
    "sampling.guidance": real(0, 1000),
    "sampling.temperature": real(0, 1000),  # and nothing between 0 and 0.001
    "sampling.top_k": Range(0, 65536),
    "sampling.top_p": real(0, 1, open="low"),
    "sampling.lookahead": Range(0, 65536),
    "evaluate.windows.*": WINDOW,
    "evaluate.images": Range(10, 10**6),
    "evaluate.seeds.*": Range(0, 2**63 - 1),
    "evaluate.batch_size": Range(1, 65536),
    "evaluate.resize_to": Range(8, 2048),
    "log.images": Range(1, 1024),
    "published_results.protocol.images": Range(1, 10**9),
    "published_results.protocol.size": Range(1, 65536),
    "published_results.protocol.guidance": real(0, 1000),
    "published_results.protocol.temperature": real(0, 1000),
    "published_results.protocol.top_k": Range(0, 65536),
    "published_results.protocol.top_p": real(0, 1, open="low"),
    "published_results.rows.*.window": WINDOW,
    "published_results.rows.*.passes": Range(1, 10**9),
    "published_results.rows.*.seconds": real(0, 10**6, open="low"),
    "published_results.rows.*.fid": real(0, 10000),
    "published_results.rows.*.clip": real(0, 100),
}

BATCHES = ([None, 0, 1, 10**9, 0.0, 0.5, 1.0], [-1, 2.5, 1.0001, -0.1, 10**9 + 1, "1", True, [1]])
SOME = ([None, 1, 10**9, 0.5, 1.0], [0, 0.0, *BATCHES[1]])
SWITCH, YES = ([None, True, False], [1, "true", 0.0, []]), ([True, False], [None, 1, "true", 0.0, []])
LIMIT = ([None, -1, 1, 10**9], [0, -2, -7, 10**9 + 1, 1.0, "abc", True, []])
TRAINER = {  # argument of lightning.Trainer: values it may have, and values it may not
    "accelerator": (["auto", "cpu", "gpu", "cuda", "mps", "tpu"], ["hpu", "", None, 1, True, ["cpu"]]),
    "strategy": (["auto", "ddp"], ["dp", "ddp_notebook", "deepspeed", "", None, 1, ["ddp"], {}]),
    "devices": (
        ["auto", -1, 1, 128, "1", "-1", "0,1", "3,", [0], [0, 7]],
        [0, -5, 129, 1.0, "", "0", "x", "1,,2", [], [0, 0], [-1], [0.5], [True], None, True, {}],
    ),
    "num_nodes": ([1, 10000], [0, -1, 10001, None, 1.0, "1", True]),
    "precision": (
        [None, 16, 32, 64, "16", "bf16", "32-true", "16-mixed", "bf16-mixed", "64-true"],
        [17, 0, -16, True, "8", "bf16-", "", [16]],
    ),
    "fast_dev_run": ([True, False, 0, 7], [-1, 10**7, 1.5, "yes", None]),
    "max_epochs": LIMIT,
    "max_steps": LIMIT,
    "min_epochs": ([None, 0, 3], [-1, 1.5, "1", True, 10**10]),
    "min_steps": ([None, 0, 3], [-1, 1.5, "1", True, 10**10]),
    "max_time": ([None, "00:12:00:00", {"hours": 3}], ["", "12", "1:2:3", "00:99:00:00", 3600, 1.5, {}, {"years": 1}]),
    "limit_train_batches": SOME,
    "limit_val_batches": BATCHES,
    "limit_test_batches": BATCHES,
    "limit_predict_batches": BATCHES,
    "overfit_batches": BATCHES,
    "val_check_interval": (["00:00:10:00", *SOME[0]], SOME[1]),
    "check_val_every_n_epoch": ([None, 1, 10**9], [0, -1, 0.5, "1", True]),
    "num_sanity_val_steps": ([None, -1, 0, 2], [-2, 0.5, "2", True]),
    "log_every_n_steps": ([None, 1, 10**9], [0, -1, 0.5, "1", True]),
    "enable_progress_bar": SWITCH,
    "enable_model_summary": SWITCH,
    "accumulate_grad_batches": ([1, 4096], [0, -1, 4097, 1.5, None, {}, True]),
    "gradient_clip_val": ([None, 0.0, 1, 1e6], [-0.1, float("nan"), inf, 1.1e6, "1", True, []]),
    "gradient_clip_algorithm": ([None, "norm", "value"], ["", "max", 1, []]),
    "deterministic": ([None, True, False, "warn"], [1, "yes", 0.0]),
    "benchmark": SWITCH,
    "inference_mode": YES,
    "use_distributed_sampler": YES,
    "profiler": ([None, "simple", "advanced", "pytorch"], ["", "xla", True, 1]),
    "detect_anomaly": YES,
    "barebones": YES,
    "sync_batchnorm": YES,
    "reload_dataloaders_every_n_epochs": ([0, 1], [-1, 0.5, None, "1", True]),
    "enable_autolog_hparams": YES,
    "model_registry": ([None, "x"], [1, True, []]),
    "callbacks": ([], ["x", [], None]),
    "plugins": ([], ["x", [], None]),
    "logger": ([], ["x", True, None]),
    "default_root_dir": ([], ["x", None]),
    "enable_checkpointing": ([], [True, None]),
}


def numbers_of(annotation: Any, path: str = "") -> list[str]:
    """Paths of all numbers that a section, or any other annotation, has; `trainer` aside."""
    if annotation in (int, float):
        return [path]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        found = []
        for name, field in annotation.model_fields.items():
            if name != "trainer":
                found += numbers_of(field.annotation, f"{path}.{name}".lstrip("."))
        return found
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return numbers_of(parts[0], path)
    if origin in (Union, types.UnionType):
        return [found for part in parts for found in numbers_of(part, path)]
    if origin is list:
        return numbers_of(parts[0], f"{path}.*")
    if origin is dict:
        return [*numbers_of(parts[0], f"{path}.#"), *numbers_of(parts[1], f"{path}.*")]
    assert origin is Literal or annotation in (str, bool, type(None)), f"{path}: {annotation} may hold numbers"
    return []


def beyond(value: Any, path: str = "") -> list[str]:
    """The numbers of a recipe's plain data that are outside their ranges, in words."""
    if isinstance(value, dict):
        keys = [f"{path}.{key}: no key" for key in value if type(key) is int and key not in RANGES[f"{path}.#"]]
        inside = [
            problem
            for key, part in value.items()
            if path or key != "trainer"
            for problem in beyond(part, f"{path}.{key if isinstance(key, str) else '*'}".lstrip("."))
        ]
        return keys + inside
    if isinstance(value, list):
        return [problem for part in value for problem in beyond(part, f"{path}.*")]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return []
    return [] if value in RANGES[path] else [f"{path}: {value!r}"]
