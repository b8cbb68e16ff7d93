"""The schema of recipes: sections, units, ranges, and rules across sections. Does not import torch."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from zipar_train.plan.stand_in import FirstRow, StandIn
from zipar_train.recipe.fields import (
    Batch,
    Name,
    Positive,
    Section,
    Share,
    Source,
    Weight,
    Window,
    Windows,
    scaled,
)
from zipar_train.recipe.model import Model
from zipar_train.recipe.published import Paper
from zipar_train.recipe.trainer import TrainerArguments, disagreements

STEP = 2**28  # maximum codes per optimizer step, all in memory at once
LOGITS = 2**35  # maximum logits per forward pass on one device, e.g. 2,048 images, 24 x 24 codes, codebook size 16,384


class RecipeError(ValueError):
    """An error that lists one or more mistakes in a recipe, one per line."""


class LoRA(Section):
    """Low-rank adapters (PEFT), trained instead of all weights."""

    rank: Annotated[int, Field(ge=1, le=4096)]  # rank of the adapters
    alpha: Annotated[int, Field(ge=1, le=10**6)]  # updates are scaled by alpha / rank
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # dropout probability of the adapters' inputs
    targets: Annotated[list[Name], Field(min_length=1, max_length=128)]  # names of linear layers


class Tune(Section):
    """The trained weights, the loss, and options that trade memory against time."""

    lora: LoRA | None = None  # low-rank adapters; null: all weights are trained
    distill: Share = 0.0  # loss weight of distillation from the base; 0: none
    attention: Literal["sdpa", "flex_attention"] = "sdpa"  # attention kernel; flex_attention: GPU only
    activation_checkpointing: bool = False  # recompute activations in the backward pass: slower, far less memory
    compile: bool = False  # torch.compile of the model's layers


class ZipAR(Section):
    """The training windows, and the rule for stand-ins."""

    windows: Annotated[dict[Window, Weight], Field(min_length=1, max_length=128)]  # window in tokens: weight in the mix
    stand_in: StandIn = "completed"  # code that replaces one not generated yet, see `stand_in_of`
    first_row: FirstRow = "complete"  # whether row 1 waits for all of row 0
    preview_window: Window | None = None  # window of glm-image's preview, except at next-token; null: the image's

    @property
    def rule(self) -> dict[str, Any]:
        """Return the arguments of `Plan.zipar` other than the window."""
        return self.model_dump(exclude={"windows"}, exclude_none=True)


class Data(Section):
    train: Source  # manifest (.json) of the training shards, path or URL
    val: Source  # manifest (.json) of the validation shards, path or URL
    micro_batch_size: Batch  # images per forward pass on one device; maximum if optim.global_batch_size is set
    workers: Annotated[int, Field(ge=0, le=256)] = 0  # loader processes per device
    shuffle: Annotated[int, Field(ge=1, le=10**7)] = 10000  # samples in the shuffle buffer
    label_dropout: Share = 0.1  # share of labels or captions dropped, for classifier-free guidance
    on_bad_sample: Literal["stop", "skip"] = "stop"  # action for unreadable shards and samples
    val_windows: Windows | None = None  # windows of validation; null: those of zipar.windows and next-token


class Optim(Section):
    lr: Annotated[float, Field(gt=0, le=10)]  # peak learning rate
    global_batch_size: Annotated[int, Field(ge=1, le=2**20)] | None = (
        None  # images per optimizer step on all devices; null: data.micro_batch_size per device and accumulated batch
    )
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.05  # only on linear layers and embeddings
    warmup: Share = 0.02  # warmup of the learning rate, share of all steps
    schedule: Literal["cosine", "constant"] = "cosine"  # learning rate after the warmup; cosine: to 0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None  # decay of the averaged weights (EMA); null: none


class Health(Section):
    """The actions for training steps that would harm a run; skipped steps are counted and reported."""

    on_nonfinite: Literal["stop", "skip"] = "stop"  # action for a loss or gradient that is not finite
    loss_spike_factor: Annotated[float, Field(gt=1, le=1e6)] | None = (
        None  # a loss above this multiple of the last 100 losses' median is a spike; null: no check
    )
    on_spike: Literal["stop", "skip"] = "stop"  # action for a loss spike
    stall_warning_s: Annotated[float, Field(gt=0, le=86400)] | None = 60.0  # seconds without a batch before a warning


def _temperature(value: float) -> float:
    if 0 < value < 1e-3:
        raise ValueError("give 0 for the most probable code, or at least 0.001: less leaves no finite numbers")
    return value


class SamplingParams(Section):
    """The sampling parameters, used wherever images are generated."""

    guidance: Annotated[float, Field(ge=0, le=1000)] = 1.0  # scale of classifier-free guidance; 1: none
    temperature: Annotated[float, Field(ge=0, le=1000), AfterValidator(_temperature)] = 1.0  # 0: the most probable code
    top_k: Annotated[int, Field(ge=0, le=65536)] = 0  # sample from the k most probable codes; 0: from all
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # probability of the codes to sample from; 1: all
    lookahead: Annotated[int, Field(ge=0, le=65536)] = 0  # slots fed per pass: same images, fewer passes; 0: none


class Evaluate(Section):
    """The images to generate and score, and the reference that they are compared with."""

    windows: Windows  # windows to evaluate; next-token is always included
    images: Annotated[int, Field(ge=10, le=10**6)]  # images per window, checkpoint and seed
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=1, max_length=1000)] = [0]
    batch_size: Batch = 64  # images generated together
    classes: Literal["random", "balanced"] = "random"  # classes of the images; balanced: in turn
    captions: Source | None = None  # .csv, .tsv or .txt file, manifest of shards, or `datasets` id; null: data.val
    resize_to: Annotated[int, Field(ge=8, le=2048)] | None = (
        None  # pixels of the shorter side after bicubic resizing; null: unchanged
    )
    dtype: Literal["float32", "bfloat16"] | None = None  # generation dtype; null: bfloat16 on a GPU, else float32
    features: Literal["inception", "classifier"] = "inception"  # classifier: small, trained on data.train
    features_weights: Source | None = None  # path of Inception's weights; null: torch-fidelity downloads them
    reference: Source | None = None  # folder of images, manifest of shards, or ADM's .npz; null: data.val if it exists
    clip: Source | None = None  # model of the CLIP score, hub id or folder; null: no CLIP score

    @model_validator(mode="after")
    def _once(self) -> "Evaluate":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds}: the same images twice would be taken for a spread. Give each once")
        return self


class Log(Section):
    wandb: Literal["online", "offline", "disabled"] = "offline"  # offline: `wandb sync` uploads later
    project: Name = "zipar-train"  # W&B project
    name: Name | None = None  # W&B run name; null: the recipe's name and the command
    group: Name | None = None  # W&B group; null: the recipe's name
    tags: Annotated[list[Name], Field(max_length=100)] = []  # W&B tags
    images: Annotated[int, Field(ge=1, le=1024)] | None = None  # images per validation, at two windows; null: none
    artifacts: bool = False  # upload the last checkpoint to W&B when fit ends or a signal stops it


class Recipe(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]  # name of the recipe
    description: Annotated[str, Field(max_length=2000)]  # one line, shown by `zipar-train recipes`
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # of new weights, data order, windows and dropout
    run_dir: Source  # folder of checkpoints, logs and evaluations
    checkpoint_every: Positive | None = None  # optimizer steps between checkpoints; null: only at the end of each epoch
    checkpoint_keep: Annotated[int, Field(ge=1, le=1000)] = 1  # number of newest checkpoints to keep
    checkpoint_monitor: str | None = None  # metric, e.g. val/bits_w8; its lowest value is kept as best.ckpt; null: none
    model: Model
    zipar: ZipAR
    data: Data
    tune: Tune = Tune()
    optim: Optim
    health: Health = Health()
    trainer: TrainerArguments = {}  # any argument of lightning.Trainer
    sampling: SamplingParams = SamplingParams()
    evaluate: Evaluate
    published_results: Paper | None = None  # shown next to measured scores; null: none
    log: Log = Log()

    @model_validator(mode="after")
    def _agree(self) -> "Recipe":
        widest = self.model.raster.row_length
        mistakes = [
            f"{key} = {window}: wider than a row of {widest} codes. Use 1 .. {widest}."
            for key, windows in (
                ("zipar.windows", self.zipar.windows),
                ("data.val_windows", self.data.val_windows or []),
                ("evaluate.windows", self.evaluate.windows),
            )
            for window in windows
            if window > widest
        ]
        if size := self.zipar.preview_window:
            row = preview.row_length if (preview := self.model.raster.preview) else 0
            if not row:
                mistakes.append("zipar.preview_window: only glm-image's grids have a preview: set it to null.")
            elif size > row:
                mistakes.append(
                    f"zipar.preview_window = {size}: wider than a row of {row} codes of the preview. Use 1 .. {row}."
                )
        codes = max(grid.num_codes for grid in self.model.rasters)
        if (logits := self.data.micro_batch_size * codes * self.model.codebook_size) > LOGITS:
            mistakes.append(
                f"data.micro_batch_size = {self.data.micro_batch_size}: {logits:.0e} logits a step, more than "
                f"{LOGITS:.0e}. Make it smaller, and trainer.accumulate_grad_batches larger."
            )
        step = self.optim.global_batch_size or self.data.micro_batch_size * self.trainer.get(
            "accumulate_grad_batches", 1
        )
        if step * codes > STEP:
            mistakes.append(
                f"a step of {step:,} images has {step * codes:.0e} codes, more than {STEP:.0e}: "
                "make optim.global_batch_size smaller, or data.micro_batch_size or trainer.accumulate_grad_batches."
            )
        if self.checkpoint_monitor not in (None, *(bits := [f"val/bits_w{window}" for window in self.val_windows])):
            mistakes.append(f"checkpoint_monitor = {self.checkpoint_monitor!r}: use one of {', '.join(bits)}, or null.")
        if self.optim.global_batch_size and "accumulate_grad_batches" in self.trainer:
            mistakes.append(
                "trainer.accumulate_grad_batches: optim.global_batch_size already sets the step size. Drop one of them."
            )
        if self.tune.distill and self.model.weights is None:
            mistakes.append(
                "tune.distill needs model.weights: random weights teach nothing. Set one or drop the other."
            )
        if self.evaluate.resize_to and scaled(self.model.grid, self.evaluate.resize_to) is None:
            mistakes.append(
                f"evaluate.resize_to = {self.evaluate.resize_to}: no whole pixels for {self.model.raster} codes."
            )
        if self.evaluate.clip and not self.model.captions:
            mistakes.append("evaluate.clip scores captions, and this model is prompted by classes: set it to null.")
        if self.evaluate.captions and not self.model.captions:
            mistakes.append("evaluate.captions: this model is prompted by classes: set it to null.")
        if self.tune.lora and self.model.weights is None:
            mistakes.append(
                "tune.lora needs model.weights: adapters of random weights are of no use. Set one or drop the other."
            )
        if self.log.images and self.model.tokenizer is None:
            mistakes.append("log.images: codes have no pixels without model.tokenizer. Set it, or log.images to null.")
        if self.trainer.get("strategy") == "fsdp" and self.optim.ema_decay is not None:
            mistakes.append("optim.ema_decay: averages are not kept under trainer.strategy = fsdp: set it to null.")
        if self.trainer.get("strategy") == "fsdp" and self.log.images:
            mistakes.append("log.images: no device has the weights under trainer.strategy = fsdp: set it to null.")
        mistakes += disagreements(self.trainer)
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    @property
    def val_windows(self) -> list[int]:
        """Return the windows of validation: data.val_windows, or else the training windows and next-token."""
        return self.data.val_windows or sorted({*self.zipar.windows, self.model.raster.row_length}, reverse=True)
