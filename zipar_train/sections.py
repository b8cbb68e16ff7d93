"""What a recipe may say: its sections, their units and ranges, and the rules across them. Imports no torch."""

import ast
import difflib
import importlib.util
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from zipar_train.grid import Grid

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Window = Annotated[int, Field(ge=1)]


CONDITIONS = {  # family: what it is prompted by, and its sizes
    "llamagen": ("classes", ("B", "L", "XL", "XXL", "3B")),
    "llamagen-t2i": ("text", ("B", "L", "XL", "XXL", "3B")),
    "janus": ("words", ("1B", "7B")),
    "lumina": ("words", ("7B",)),
    "emu3": ("words", ("8B",)),
}
ROW_ENDS = ("emu3", "lumina")  # families whose rows end with a token
EMU3_CONTEXT = 9216  # tokens that Emu3 was trained on: Emu3TextConfig


class RecipeError(ValueError):
    """One or more mistakes in a recipe, a line each."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class Text(Section):
    """Captions as prompts: features of a T5 encoder, left-padded."""

    encoder: str | None = None  # a transformers T5, hub id or folder; null: the shards hold features
    tokens: Positive  # the prompt's length
    features: Positive  # width of a token's feature


class Words(Section):
    """Captions as prompts: token ids of a text model, left-padded."""

    encoder: str  # the published checkpoint's tokenizer of text, hub id or folder
    tokens: Positive  # the prompt's length, with what the model's format puts around a caption
    positive: str = ""  # put after every caption
    negative: str = ""  # what guidance leads away from; empty: no caption
    vocabulary: Positive | None = None  # of the text model; null: the published


class Model(Section):
    """The generator: a family at a size, its grid of codes, and where its weights come from."""

    family: Literal["llamagen", "llamagen-t2i", "janus", "lumina", "emu3"]
    size: Literal["B", "L", "XL", "XXL", "3B", "1B", "7B", "8B"] | None = None  # or depth, heads and width
    depth: Positive | None = None  # layers
    heads: Positive | None = None
    width: Positive | None = None
    key_heads: Positive | None = None  # heads of keys and values, where queries share them; null: heads
    feed_forward: Positive | None = None  # hidden width of the feed-forward; null: the family's rule
    grid: Annotated[list[Positive], Field(min_length=2, max_length=2)]  # rows, columns of codes
    codes: Annotated[int, Field(ge=2, le=65536)]  # codebook size (shards store uint16)
    classes: Positive | None = None  # of a class-conditional family
    text: Text | None = None  # of a text-conditional one whose prompts are features
    words: Words | None = None  # of one whose prompts are token ids
    tokenizer: Literal["palette", "vq16", "chameleon", "emu3"] | None = None  # codes <-> pixels; null: codes only
    tokenizer_weights: str | None = None  # a published file or folder, or owner/repo:file on the hub; null: random
    weights: str | None = None  # run folder, checkpoint, export, published file or owner/repo:file; null: random
    weights_entry: str | None = None  # an entry of a published .pt, `ema` say; null: the weights LlamaGen samples from

    @model_validator(mode="after")
    def _complete(self) -> "Model":
        shape = (self.depth, self.heads, self.width)
        if self.size is None and None in shape:
            raise ValueError("give either size, or depth, heads and width")
        if self.size is not None and shape != (None, None, None):
            raise ValueError("size already fixes depth, heads and width: drop one or the other")
        if self.width and self.heads and (self.width % self.heads or self.width // self.heads % 4):
            raise ValueError(f"width {self.width} over {self.heads} heads: a head's width must be a multiple of 4")
        wanted, sizes = CONDITIONS[self.family]
        given = [name for name in ("classes", "text", "words") if getattr(self, name) is not None]
        if given != [wanted]:
            raise ValueError(f"family {self.family} needs {wanted}, and has {' and '.join(given) or 'none'}")
        if self.size is not None and self.size not in sizes:
            raise ValueError(f"family {self.family} has no size {self.size}: use {', '.join(sizes)}")
        if problem := self._beyond():
            raise ValueError(f"grid {self.grid}: {problem}")
        return self

    def _beyond(self) -> str:
        """Why the family's format cannot hold the grid, with a remedy; empty if it can."""
        rows, columns = self.grid
        if self.family == "lumina" and (rows % 2 or columns % 2):
            return "Lumina-mGPT's prompt counts sides in steps of 2 codes, 32 pixels: use even numbers"
        if self.family == "janus" and self.size and self.grid != [24, 24]:
            return "Janus-Pro's prompt names no size, and it draws 24 x 24 codes alone: use [24, 24]"
        tokens = self.prompt + rows * (columns + 1)
        if self.family == "emu3" and self.size and tokens > EMU3_CONTEXT:
            return f"{tokens:,} tokens with row ends and prompt, and Emu3 knows {EMU3_CONTEXT:,}: use a smaller grid"
        return ""

    @property
    def raster(self) -> Grid:
        return Grid(self.grid[0], self.grid[1], self.family in ROW_ENDS)

    @property
    def prompt(self) -> int:
        """Tokens before the first code."""
        captions = self.text or self.words
        return captions.tokens if captions else 1

    @property
    def captions(self) -> bool:
        """Whether it is prompted by captions, not by classes."""
        return self.classes is None


class LoRA(Section):
    """Low-rank adapters instead of all weights (PEFT)."""

    rank: Positive
    alpha: Positive  # an update is scaled by alpha / rank
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Annotated[list[str], Field(min_length=1)]  # names of linear layers


class Tune(Section):
    """What is trained, by which loss, and at what cost in memory and time."""

    lora: LoRA | None = None  # null: all weights
    distill: Share = 0.0  # share of the loss that follows the untouched next-token model; 0: none
    attention: Literal["sdpa", "flex_attention"] = "sdpa"  # flex_attention on a GPU
    recompute: bool = False  # activations in the backward pass: a third more time, far less memory
    compile: bool = False  # torch.compile the model's body


class ZipAR(Section):
    """The windows trained for, and what stands in for codes not yet drawn."""

    windows: Annotated[dict[Window, Annotated[float, Field(gt=0)]], Field(min_length=1)]  # window: weight in the mix
    stand_in: Literal["nearest", "released"] = "nearest"


class Data(Section):
    train: str  # a manifest of shards, .json: a path or a URL
    val: str
    batch_size: Positive  # images per device and step
    workers: Annotated[int, Field(ge=0)] = 0  # loader processes per device
    shuffle: Positive = 10000  # samples in the shuffle buffer
    label_dropout: Share = 0.1  # share of labels or captions replaced by none, for guidance
    val_windows: Annotated[list[Window], Field(min_length=1)] | None = None  # of held-out bits; null: those trained


class Optim(Section):
    lr: Annotated[float, Field(gt=0)]  # peak learning rate
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    weight_decay: Annotated[float, Field(ge=0)] = 0.05  # on matrices alone
    warmup: Share = 0.02  # share of all steps
    schedule: Literal["cosine", "constant"] = "cosine"
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None  # decay of the averaged weights


class Draw(Section):
    """How codes are sampled, everywhere images are drawn."""

    guidance: Annotated[float, Field(ge=0)] = 1.0  # classifier-free; 1: none
    temperature: Annotated[float, Field(ge=0)] = 1.0  # 0: the most probable code
    top_k: Annotated[int, Field(ge=0)] = 0  # 0: no cut
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # 1: no cut


class Evaluate(Section):
    """What is drawn to be scored, and what it is compared with."""

    windows: Annotated[list[Window], Field(min_length=1)]
    images: Annotated[int, Field(ge=10)]  # drawn per window, checkpoint and seed
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**63)]], Field(min_length=1)] = [0]
    batch_size: Annotated[int, Field(ge=1, le=2**16)] = 64  # images drawn at once
    classes: Literal["random", "balanced"] = "random"  # of the images: at random, or in turn
    captions: str | None = None  # a .csv, .tsv or .txt file, or a `datasets` id; null: those of data.val
    size: Annotated[int, Field(ge=8, le=2048)] | None = None  # pixels each way, resized by bicubic; null: as drawn
    dtype: Literal["float32", "bfloat16"] | None = None  # null: bfloat16 on a GPU, float32 on a CPU
    features: Literal["inception", "classifier"] = "inception"  # classifier: a small one, of data.train
    features_weights: str | None = None  # a path of Inception's weights; null: torch-fidelity downloads them
    reference: str | None = None  # a folder of pictures, a manifest of shards, ADM's .npz; null: data.val
    clip: str | None = None  # a CLIP, hub id or folder: a score for captions; null: none

    @model_validator(mode="after")
    def _once(self) -> "Evaluate":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds}: the same images twice would be taken for a spread. Give each once")
        return self


class PaperProtocol(Section):
    """How published scores were measured; null: not said."""

    images: Positive | None = None
    conditions: str | None = None
    size: Positive | None = None
    reference: str | None = None
    features: str | None = None
    clip: str | None = None
    guidance: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    dtype: str | None = None


class PaperRow(Section):
    window: Window
    passes: Positive
    seconds: Annotated[float, Field(gt=0)] | None = None  # an image, batch 1
    fid: float | None = None
    clip: float | None = None


class Paper(Section):
    """Published scores, to stand beside ours."""

    source: str
    protocol: PaperProtocol = PaperProtocol()
    rows: Annotated[list[PaperRow], Field(min_length=1)]


class Log(Section):
    wandb: Literal["online", "offline", "disabled"] = "offline"
    project: str = "zipar-train"
    name: str | None = None  # of W&B's run; null: the recipe's name and what is done
    group: str | None = None  # of W&B's runs; null: the recipe's name
    tags: list[str] = []
    images: Positive | None = None  # drawn for W&B at every validation, at the smallest trained window and next-token
    artifacts: bool = False  # upload the last checkpoint at the end of fit, and where a signal stops it


class Recipe(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    about: str  # one line for `zipar-train recipes`
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    run: str  # the folder this run writes
    checkpoint_every: Positive | None = None  # optimizer steps between checkpoints; null: epoch ends only
    model: Model
    zipar: ZipAR
    data: Data
    tune: Tune = Tune()
    optim: Optim
    trainer: dict[str, Any] = {}  # any argument of lightning.Trainer
    draw: Draw = Draw()
    evaluate: Evaluate
    paper: Paper | None = None
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
        if self.tune.distill and self.model.weights is None:
            mistakes.append(
                "tune.distill needs model.weights: random weights teach nothing. Set one or drop the other."
            )
        if self.evaluate.clip and not self.model.captions:
            mistakes.append("evaluate.clip scores captions, and this model is prompted by classes: set it to null.")
        if self.evaluate.captions and not self.model.captions:
            mistakes.append("evaluate.captions: this model is prompted by classes: set it to null.")
        if self.tune.lora and self.model.weights is None:
            mistakes.append(
                "tune.lora needs model.weights: adapters of random weights mend nothing. Set one or drop the other."
            )
        if self.log.images and self.model.tokenizer is None:
            mistakes.append("log.images: codes have no pixels without model.tokenizer. Set it, or log.images to null.")
        if self.trainer.get("strategy") == "fsdp":
            mistakes += self._not_shared()
        for key, value in self.trainer.items():
            if key in _OURS:
                mistakes.append(f"trainer.{key} = {value!r}: zipar-train sets this itself. {_OURS[key]}")
            elif key not in trainer_arguments():
                mistakes.append(
                    f"trainer.{key} = {value!r}: not an argument of lightning.Trainer."
                    + nearest("trainer.", key, trainer_arguments())
                )
        if mistakes:
            raise ValueError("\n".join(mistakes))
        return self

    def _not_shared(self) -> list[str]:
        """Why the weights cannot be shared among devices."""
        devices, nodes = self.trainer.get("devices"), self.trainer.get("num_nodes", 1)
        mistakes = []
        if self.optim.ema is not None:
            mistakes.append("optim.ema: averages are not kept under trainer.strategy = fsdp: set it to null.")
        if self.log.images:
            mistakes.append("log.images: no device has the weights under trainer.strategy = fsdp: set it to null.")
        if not isinstance(devices, int | list) or devices in (0, -1, []) or isinstance(devices, bool):
            mistakes.append(f"trainer.devices = {devices!r}: trainer.strategy = fsdp needs their number on a node.")
        if not isinstance(nodes, int) or nodes < 1:
            mistakes.append(f"trainer.num_nodes = {nodes!r}: trainer.strategy = fsdp needs their number, 1 or more.")
        return mistakes


_OURS = {
    "callbacks": "In Python, add yours to the trainer that zipar_train.training.trainer.build_trainer returns.",
    "logger": "See log.wandb; a CSV log is always written.",
    "default_root_dir": "See run.",
    "enable_checkpointing": "See checkpoint_every.",
}


@cache
def trainer_arguments() -> tuple[str, ...]:
    """Names of lightning.Trainer's arguments, read from its source so that torch stays unimported."""
    spec = importlib.util.find_spec("lightning")
    if spec is None or spec.origin is None:
        raise RecipeError("lightning is not installed: pip install 'lightning>=2.6.4'")
    source = Path(spec.origin).parent / "pytorch" / "trainer" / "trainer.py"
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == "Trainer":
            init = next(n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
            return tuple(argument.arg for argument in init.args.kwonlyargs)
    raise RecipeError(f"no Trainer class in {source}: this lightning is not supported")


def nearest(prefix: str, name: str, names: Iterable[str]) -> str:
    """The end of an error: which of the known names was meant."""
    close = difflib.get_close_matches(name, list(names), 1, 0.5)
    return f" Did you mean {prefix}{close[0]}?" if close else f" Known: {', '.join(names)}."
