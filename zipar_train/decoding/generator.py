"""User-facing generation: `load(...)`, then `.generate(labels)`, which returns images."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import ValidationError
from torch import Tensor

from zipar_train.decoding.adaptive.decoder import AdaptiveDecoder
from zipar_train.decoding.decode_method import decode_method
from zipar_train.decoding.decoder import Decoder, Observer
from zipar_train.decoding.fused_llama import compile_body
from zipar_train.decoding.images import Images
from zipar_train.decoding.load_fused import load_fused
from zipar_train.decoding.memory import BatchTooLarge, oom_as_value_error
from zipar_train.decoding.pass_record import PassRecord, both, planned_passes
from zipar_train.decoding.pixel_stream import PixelStream, decoded
from zipar_train.decoding.sampling import code_seeds
from zipar_train.models.family import Family
from zipar_train.models.restore import LoadedWeights, initial_weights, load_family, read
from zipar_train.plan.grid import Sides
from zipar_train.plan.table import Plan
from zipar_train.recipe.load import differences, explain, load_recipe, overridden, shipped
from zipar_train.recipe.schema import Recipe, SamplingParams

MOVED = ("model.weights", "model.weights_entry")  # may be overridden beside adapters: where their base weights are now
DecodeMode = Literal["planned", "released", "adaptive"]  # see `Generator.generate`


class Generator:
    """Image generator: a family with weights, and the recipe that sets how images are sampled.

    Args:
        recipe: The recipe that the weights belong to.
        saved: The weights.
        device: None: a GPU if there is one, otherwise the CPU.
        dtype: Type of the weights and of the computation.
        int8: Round the weights of the layers to int8, see `Int8Linear`.
        compile: Apply torch.compile to the layers. Takes up to a minute before the first image; pays off for many
            images on a GPU.
    """

    def __init__(
        self,
        recipe: Recipe,
        saved: LoadedWeights,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        int8: bool = False,
        compile: bool = False,
    ):
        self.recipe, self.saved, self.dtype, self.int8 = recipe, saved, dtype, int8
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.inference_family = load_fused(recipe.model, saved, dtype=dtype, device=self.device, int8=int8)
        self.method = decode_method(self.inference_family, compile=compile)
        if self.device.type == "cuda":
            print(f"passes: {self.method.name}. {self.method.reason}", file=sys.stderr)
        if self.method.name == "compiled":
            compile_body(self.inference_family.model)
        self.decoders: dict[tuple[int | None, DecodeMode, int, Sides], Decoder | AdaptiveDecoder] = {}

    def load_family(self) -> Family:
        """Load the weights again, in transformers' own layers, to train, change or export them.

        The attribute `inference_family` is the family that generates: its layers are fused and its weights frozen.
        """
        return load_family(self.recipe.model, self.saved, dtype=self.dtype, device=self.device)

    def family(self, grid: Sequence[int] | None = None) -> Family:
        """Return the family that generates, on a grid of the recipe.

        Args:
            grid: Rows and columns of codes. None: `model.grid`.

        Raises:
            ValueError: If the recipe does not have the grid.
        """
        known = [self.recipe.model.grid, *self.recipe.model.other_grids]
        if grid is None or list(grid) == known[0]:
            return self.inference_family
        if list(grid) not in known:
            named = ", ".join(f"{rows}x{columns}" for rows, columns in known)
            raise ValueError(f"grid {'x'.join(map(str, grid))}: the recipe has {named}. Add it to model.other_grids")
        return self.inference_family.on(grid)

    def plan(
        self, window: int | None = None, *, mode: DecodeMode = "planned", grid: Sequence[int] | None = None
    ) -> Plan:
        """Return the plan of a window.

        Args:
            window: None: the widest window, which is next-token decoding.
            mode: "released": the plan of the released code. "adaptive": the plan of the smallest window, since the
                plan of an image is known only after it is generated.
            grid: See `family`.
        """
        family, rule = self.family(grid), self.recipe.zipar.rule
        return Plan.zipar(
            family.grid,
            window=family.grid.row_length if window is None else window,
            prompt=family.prompt_length,
            **({"stand_in": "released"} if mode == "released" else rule),
        )

    def decoder(
        self,
        window: int | None = None,
        *,
        mode: DecodeMode = "planned",
        lookahead: int = 0,
        grid: Sequence[int] | None = None,
    ) -> Decoder | AdaptiveDecoder:
        """Return the decoder of a window; it is built once and cached.

        Each number of slots has its own, as a decoder keeps the cache and the CUDA graphs of one number.
        """
        family = self.family(grid)
        key = (window, mode, lookahead, family.grid.sides)
        if key not in self.decoders:
            plan = self.plan(window, mode=mode, grid=grid)
            if mode == "adaptive":
                made: Decoder | AdaptiveDecoder = AdaptiveDecoder(family, window=plan.window, **self.recipe.zipar.rule)
            elif mode == "planned":
                made = self.method.decoder(family, plan)
            else:
                made = Decoder(family, plan, released=True)
            self.decoders[key] = made
        return self.decoders[key]

    def generate(
        self,
        labels: Sequence[int] | Sequence[str],
        *,
        window: int | None = None,
        mode: DecodeMode = "planned",
        seed: int = 0,
        first: int = 0,
        batch_size: int | None = None,
        pixels: bool = True,
        grid: Sequence[int] | None = None,
        trace: bool = False,
        observe: Observer | None = None,
        **sampling: Any,
    ) -> Images:
        """Generate one image for each label or caption.

        Image k of a seed does not depend on the batch size or the other images, and is comparable across windows.

        Args:
            labels: Class numbers, or captions for a text-conditional model.
            window: 1 .. the grid's row length. None: the widest window, which is next-token decoding.
            mode: "planned": along the window's plan. "released": as the released ZipAR code does, flaws included, a
                baseline, see `Decoder`. "adaptive": each row starts once its first code passes verification, with at
                least `window` codes of the row above, see `AdaptiveDecoder`.
            seed: An integer, 0 .. 2**63 - 1.
            first: Index of the first image; the others follow.
            batch_size: Images per batch. None: `evaluate.batch_size` of the recipe.
            pixels: False: return codes without decoding them to pixels.
            grid: Rows and columns of codes, one of the recipe's grids. None: `model.grid`.
            trace: Record the pass that generates each code, for `Images.animate`.
            observe: Called in every pass, see `Decoder`, for programs that show or stop generation.
            sampling: guidance, temperature, top_k, top_p, lookahead; values not given are the recipe's. With
                `lookahead`, the images are the same, in fewer passes, see `decoder`; the other modes have none.

        Raises:
            ValueError: If a window, label, seed, batch size, mode, grid or sampling value is out of range, lookahead is
                asked of another mode than "planned", or the batch does not fit into memory; names the largest that
                does.
        """
        if mode not in get_args(DecodeMode):
            raise ValueError(f"mode {mode!r} is unknown: use {', '.join(map(repr, get_args(DecodeMode)))}")
        if not len(labels):
            raise ValueError("labels are empty: give at least one class number or caption")
        if not 0 <= seed < 2**63 or not 0 <= first < 2**63 - len(labels):
            raise ValueError(f"seed {seed} and first {first} must be 0 or more, and below 2**63")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be at least 1")
        tokenizer = (
            self.inference_family.tokenizer if pixels else None
        )  # loaded before any work: its file may be missing
        settings = self._settings(sampling)
        if mode != "planned":
            if sampling.get("lookahead"):
                raise ValueError(
                    f"lookahead {settings.lookahead} does not go with mode {mode!r}: leave one of them out"
                )
            settings = settings.model_copy(update={"lookahead": 0})
        decoder = self.decoder(window, mode=mode, lookahead=settings.lookahead, grid=grid)
        layout, size = decoder.family.grid, batch_size or self.recipe.evaluate.batch_size
        codes, passes, shown = [], [], PixelStream(tokenizer, self.device) if tokenizer else None
        traces: list[Tensor] = []
        for start in range(0, len(labels), size):
            chunk = labels[start : start + size]
            numbers = code_seeds([first + start + k for k in range(len(chunk))], decoder.numbers, seed=seed)
            record = PassRecord(layout.num_codes) if trace and settings.lookahead else None
            watch = both(record, observe)
            with oom_as_value_error(len(chunk)):
                try:
                    generated = decoder(chunk, numbers, settings, observe=watch)
                except BatchTooLarge:  # free the memory of the other windows' decoders
                    for other in self.decoders.values():
                        other.release()
                    generated = decoder(chunk, numbers, settings, observe=watch)
                if shown:
                    shown.add(layout.images(generated)[-1])
            codes.append(generated)
            passes += decoder.passes(len(chunk))
            if trace:
                traces.append(record.passes() if record else planned_passes(decoder, len(chunk)))
        *previews, image = layout.images(torch.cat(codes).cpu())
        return Images(
            image,
            torch.tensor(passes),
            shown.all() if shown else None,
            previews[-1] if previews else None,
            layout.images(torch.cat(traces))[-1] if trace else None,
            partial(decoded, tokenizer, self.device) if tokenizer else None,
        )

    def _settings(self, changes: dict[str, Any]) -> SamplingParams:
        if unknown := changes.keys() - SamplingParams.model_fields.keys():
            raise ValueError(f"generate takes no {sorted(unknown)[0]!r}: use {', '.join(SamplingParams.model_fields)}")
        try:
            return SamplingParams.model_validate(self.recipe.sampling.model_dump() | changes)
        except ValidationError as error:
            raise ValueError("; ".join(line for problem in error.errors() for line in explain(problem))) from None


def load(
    source: str | Path,
    *,
    overrides: Sequence[str] = (),
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    int8: bool = False,
) -> Generator:
    """Load a generator from a run folder, a checkpoint, an export, or a recipe.

    Args:
        source: A path, or the name or path of a recipe whose weights exist.
        overrides: Recipe keys, for example `["model.weights=c2i_L_384.pt"]`. For a checkpoint with adapters, only
            `model.weights` is allowed: where the base weights are now.
        device: None: a GPU if there is one, otherwise the CPU.
        dtype: Type of the weights and of the computation.
        int8: Round the weights of the layers to int8, see `Int8Linear`.

    Raises:
        ValueError: If there is nothing to load, or it is damaged; names the file and the remedy. Also if the layers of
            the model cannot be rounded.
    """
    path = Path(source)
    if not path.exists() and str(source) not in shipped():
        raise ValueError(
            f"nothing to load at {path}: give a run folder, a .ckpt file, an exported folder, "
            f"or a recipe ({', '.join(shipped())})"
        )
    if path.exists() and path.suffix not in (".yaml", ".yml"):
        saved = read(path)
        if saved.recipe is None:
            raise ValueError(
                f"{path} carries no recipe. Name the recipe it is for: --recipe llamagen-l --set model.weights={path}, "
                f'or in Python load("llamagen-l", overrides=["model.weights={path}"])'
            )
        recipe = overridden(saved.recipe, overrides, where=str(path))
        if overrides and (not saved.adapter or differences(saved.recipe, recipe, ignore=MOVED)):
            raise ValueError(
                f"{path} brings its own recipe and weights: {overrides[0]} goes with the name of a recipe. Beside "
                "adapters, model.weights can be set, to say where the weights are that they were trained on"
            )
        return Generator(recipe, saved, device=device, dtype=dtype, int8=int8)
    recipe = load_recipe(source, overrides)
    if recipe.model.weights is None:
        raise ValueError(
            f"recipe {recipe.name} starts from random weights, which generate noise. "
            f"Train it with `zipar-train fit --recipe {source}`, then load {recipe.run_dir}"
        )
    return Generator(recipe, initial_weights(recipe.model), device=device, dtype=dtype, int8=int8)
