"""The `model` section of a recipe: a family at a size, its grid, its prompts, and where its weights come from."""

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Annotated, Literal

from pydantic import Field, model_validator

from zipar_train.plan.grid import Grid
from zipar_train.recipe.fields import Heads, Name, Section, Side, Source, Tokens, Vocabulary

CODES = 2**14  # maximum codes per image: 128 x 128
PARAMETERS = 10**11  # maximum parameters of a model defined by its shape
GLM_FACTOR = 32  # pixels per code; the preview has about 16 x 16 codes (transformers, GlmImageProcessor)
CONDITIONS = {  # family: key of its prompt format, and its published sizes
    "llamagen": ("num_classes", ("B", "L", "XL", "XXL", "3B")),
    "llamagen-t2i": ("t5_features", ("B", "L", "XL", "XXL", "3B")),
    "janus": ("token_prompt", ("1B", "7B")),
    "lumina": ("token_prompt", ("7B",)),
    "emu3": ("token_prompt", ("8B",)),
    "glm-image": ("token_prompt", ("9B",)),
    "simplear": ("token_prompt", ("0.5B", "1.5B")),
}
SEVERAL_GRIDS = ("emu3", "lumina", "simplear", "glm-image")  # families that are trained at several sizes
ROW_ENDS = ("emu3", "lumina")  # families whose rows end with a token
EMU3_CONTEXT = 9216  # context length of Emu3, tokens (Emu3TextConfig)
SIMPLEAR_GRIDS = ([32, 32], [64, 64])  # SimpleAR is trained at 512, then at 1024 pixels (docs/TRAIN.md)
BESIDE = {  # minimum ids other than codes; published vocabulary size
    "emu3": (8, 184622),
    "lumina": (612, 65536),
    "simplear": (7, 215672),
    "glm-image": (128, 168064),
}


def glm_preview(rows: int, columns: int) -> list[int]:
    """Return the rows and columns of GLM-Image's preview: GlmImageProcessor._get_target_shape of transformers."""
    ratio, side = rows / columns, GLM_FACTOR // 2
    return [int(sqrt(ratio) * side), int(sqrt(1 / ratio) * side)]


Shape = tuple[int, int, int, int, int]  # layers, heads, key-value heads, hidden and feed-forward size
Sides = Annotated[list[Side], Field(min_length=2, max_length=2)]


class Text(Section):
    """The prompt format of captions as features of a T5 encoder, left-padded."""

    encoder: Source | None = None  # T5 of transformers, hub id or folder; null: the shards hold features
    tokens: Tokens  # prompt length in tokens
    features: Annotated[int, Field(ge=1, le=2**16)]  # dimension of the features of a token


class Words(Section):
    """The prompt format of captions as token ids of a text model, left-padded."""

    encoder: Source  # text tokenizer of the published checkpoint, hub id or folder
    tokens: Tokens  # prompt length in tokens, including the prompt template
    prompt_prefix: Annotated[str, Field(max_length=4096)] = ""  # put before every caption
    prompt_suffix: Annotated[str, Field(max_length=4096)] = ""  # appended to every caption
    negative_prompt: Annotated[str, Field(max_length=4096)] = ""  # negative prompt of guidance; empty: no caption
    vocabulary: Vocabulary | None = None  # vocabulary size of the text model; null: the published model's


class Model(Section):
    """The generator: a family at a size, its grid of codes, and the source of its weights."""

    family: Literal[
        "llamagen", "llamagen-t2i", "janus", "lumina", "emu3", "simplear", "glm-image"
    ]  # architecture and kind of prompt
    size: Literal["B", "L", "XL", "XXL", "3B", "1B", "7B", "8B", "0.5B", "1.5B", "9B"] | None = (
        None  # published size; null: next five keys
    )
    num_layers: Annotated[int, Field(ge=1, le=128)] | None = None  # transformer layers
    num_heads: Heads | None = None  # attention heads per layer
    hidden_size: Annotated[int, Field(ge=1, le=2**16)] | None = None  # dimension of the hidden states
    num_kv_heads: Heads | None = None  # key-value heads of grouped-query attention; null: num_heads
    ffn_size: Annotated[int, Field(ge=1, le=2**20)] | None = (
        None  # intermediate size of the feed-forward; null: the family's rule
    )
    grid: Sides  # rows and columns of codes
    preview: Sides | None = None  # rows and columns of glm-image's preview; null: those of its processor
    other_grids: Annotated[list[Sides], Field(max_length=64)] = []  # further grids to tokenize, train and generate
    codebook_size: Annotated[int, Field(ge=2, le=65536)]  # number of different codes (shards store uint16)
    num_classes: Vocabulary | None = None  # number of classes, for the family llamagen
    t5_features: Text | None = None  # prompt format of llamagen-t2i
    token_prompt: Words | None = None  # prompt format of janus, lumina, emu3, simplear and glm-image
    tokenizer: Literal["palette", "vq16", "chameleon", "emu3", "cosmos", "glm-image"] | None = (
        None  # image tokenizer; null: codes only
    )
    tokenizer_weights: Source | None = None  # path, or owner/repo:[file] on the hub; null: random
    weights: Source | None = None  # run, checkpoint, export, file or owner/repo:[file]; null: random
    weights_entry: Name | None = None  # entry of a .pt file, e.g. `ema`; null: the one LlamaGen samples from

    @model_validator(mode="after")
    def _complete(self) -> "Model":
        shape, rest = (self.num_layers, self.num_heads, self.hidden_size), (self.num_kv_heads, self.ffn_size)
        if self.size is None and None in shape:
            raise ValueError("give either size, or num_layers, num_heads and hidden_size")
        if self.size is not None and {*shape, *rest} != {None}:
            raise ValueError(
                "size already fixes num_layers, num_heads, hidden_size, num_kv_heads and ffn_size: drop these or it"
            )
        if (
            self.hidden_size
            and self.num_heads
            and (self.hidden_size % self.num_heads or self.hidden_size // self.num_heads % 4)
        ):
            raise ValueError(
                f"hidden_size {self.hidden_size} over {self.num_heads} heads: a head's size must be a multiple of 4"
            )
        if self.num_kv_heads and self.family not in BESIDE:
            raise ValueError(
                f"num_kv_heads {self.num_kv_heads}: family {self.family} has a key for every query. Drop it"
            )
        if self.num_kv_heads and self.num_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads}: {self.num_heads} heads cannot share them evenly")
        if (parameters := self._parameters()) > PARAMETERS:
            raise ValueError(f"{parameters:.1e} parameters by its shape, more than {PARAMETERS:.0e}: make it smaller")
        wanted, sizes = CONDITIONS[self.family]
        given = [name for name in ("num_classes", "t5_features", "token_prompt") if getattr(self, name) is not None]
        if given != [wanted]:
            raise ValueError(f"family {self.family} needs {wanted}, and has {' and '.join(given) or 'none'}")
        if self.size is not None and self.size not in sizes:
            raise ValueError(f"family {self.family} has no size {self.size}: use {', '.join(sizes)}")
        for grid in (self.grid, *self.other_grids):
            if problem := self._beyond(*grid):
                raise ValueError(f"grid {grid}: {problem}")
        if self.other_grids and self.family not in SEVERAL_GRIDS:
            raise ValueError(f"other_grids: family {self.family} does not know the size of an image: leave it empty")
        if twice := [grid for k, grid in enumerate(self.other_grids) if grid in (self.grid, *self.other_grids[:k])]:
            raise ValueError(f"other_grids: {twice[0]} is given twice, or is grid: give each once")
        if self.preview and (self.family != "glm-image" or self.other_grids):
            raise ValueError(
                "preview: only glm-image has one, and with other_grids its processor's rule sets it: set it to null"
            )
        beside, published = BESIDE.get(self.family, (0, 0))
        ids = (self.token_prompt and self.token_prompt.vocabulary) or published
        if beside and ids < self.codebook_size + beside:
            raise ValueError(
                f"codebook_size {self.codebook_size}: token_prompt.vocabulary {ids} cannot hold them and {beside} ids "
                "more"
            )
        return self

    def _beyond(self, rows: int, columns: int) -> str:
        """Return why the family does not support a grid, with a remedy; empty if it does."""
        if rows * columns > CODES:
            return f"{rows * columns:,} codes, more than {CODES:,}: use a smaller grid"
        if self.family == "lumina" and (rows % 2 or columns % 2):
            return "Lumina-mGPT's prompt counts sides in steps of 2 codes, 32 pixels: use even numbers"
        if self.family == "janus" and self.size and [rows, columns] != [24, 24]:
            return "Janus-Pro's prompt names no size, and it generates 24 x 24 codes only: use [24, 24]"
        if self.family == "glm-image" and 0 in (rule := glm_preview(rows, columns)):
            return "GLM-Image's preview of it has no codes: use sides of which none is more than 256 times the other"
        if self.family == "glm-image" and self.size and self.preview not in (None, rule):
            return f"GLM-Image generates a preview of {rule} codes before it, not {self.preview}: set preview to null"
        if self.family == "simplear" and self.size and [rows, columns] not in SIMPLEAR_GRIDS:
            return "SimpleAR's prompt names no size, and it is trained at two sizes only: use [32, 32] or [64, 64]"
        tokens = self.prompt + rows * (columns + 1)
        if self.family == "emu3" and self.size and tokens > EMU3_CONTEXT:
            return f"{tokens:,} tokens with row ends and prompt, and Emu3 knows {EMU3_CONTEXT:,}: use a smaller grid"
        return ""

    def _parameters(self) -> int:
        """Return the approximate parameter count of a model given by its shape; 0 if it is given by its size."""
        if self.num_layers is None or self.hidden_size is None:
            return 0
        words = (self.num_classes or 0) + (self.t5_features.features if self.t5_features else 0)
        words += (self.token_prompt.vocabulary or BESIDE.get(self.family, (0, 102400))[1]) if self.token_prompt else 0
        layer = 4 * self.hidden_size + 3 * (self.ffn_size or 4 * self.hidden_size)
        return self.hidden_size * (self.num_layers * layer + 2 * self.codebook_size + words)

    def shape(self, sizes: Mapping[str, Shape]) -> Shape:
        """Return layers, heads, key-value heads, hidden and feed-forward size, as given or of a published size.

        Args:
            sizes: Shapes by published size.
        """
        if self.size:
            return sizes[self.size]
        assert self.num_layers and self.num_heads and self.hidden_size  # checked above
        keys, feed_forward = self.num_kv_heads or self.num_heads, self.ffn_size or 4 * self.hidden_size
        return self.num_layers, self.num_heads, keys, self.hidden_size, feed_forward

    @property
    def raster(self) -> Grid:
        """Return the grid with its row ends and preview."""
        return self.rasters[0]

    @property
    def rasters(self) -> tuple[Grid, ...]:
        """Return `grid` and `other_grids` with their row ends and previews."""
        return tuple(self._raster(*sides) for sides in (self.grid, *self.other_grids))

    def _raster(self, rows: int, columns: int) -> Grid:
        if self.family != "glm-image":
            return Grid(rows, columns, self.family in ROW_ENDS)
        height, width = self.preview or glm_preview(rows, columns)
        return Grid(rows, columns, preview=Grid(height, width))

    def on(self, sides: Sequence[int]) -> "Model":
        """Return this section with `grid` replaced by other sides, and without `other_grids`."""
        return self.model_copy(update={"grid": list(sides), "other_grids": []})

    @property
    def prompt(self) -> int:
        """Return the prompt length in tokens."""
        captions = self.t5_features or self.token_prompt
        return captions.tokens if captions else 1

    @property
    def captions(self) -> bool:
        """Return True if the model is prompted by captions, not by classes."""
        return self.num_classes is None
