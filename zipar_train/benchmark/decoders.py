"""The decoders that the benchmark of generation compares, each with the layout of the weights that it needs."""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from zipar_train.benchmark.baselines import eager_loop
from zipar_train.benchmark.results import AHEAD, COMPILED, EAGER, OURS, PLAIN, ROUNDED, STOCK
from zipar_train.benchmark.roofline import Work
from zipar_train.benchmark.stock import Stock
from zipar_train.benchmark.turns import Way, whole_graphs
from zipar_train.decoding.decode_method import decode_method
from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.fused_llama import compile_body, fuse_for_inference
from zipar_train.decoding.int8 import saved_bytes
from zipar_train.decoding.place import inference_on
from zipar_train.decoding.sampling import code_seeds
from zipar_train.models.family import Family, conditions
from zipar_train.plan.table import Plan
from zipar_train.recipe.schema import Recipe, SamplingParams

Case = tuple[str, int]  # a decoder's name, and a window


class Ways(NamedTuple):
    """Ways to generate the same batch."""

    run: dict[Case, Way]
    passes: dict[Case, list[int]]  # forward passes of each image; with lookahead, known after the first run
    notes: list[str]  # remarks on the rows


class Decoders:
    """Decoders of a model on one grid, with a copy of its weights for each that needs its own layout.

    Attributes:
        ours: The model, fused for inference.
        plain: A copy as transformers made it; None without baselines.
        compiled: A copy that is fused and compiled; None if not asked for.
        rounded: A copy that is fused with int8 weights; None if not asked for.
        work: Sizes of the model.
        weights: Bytes of the model's weights: [False] in the dtype, [True] with int8 layers.
    """

    def __init__(self, family: Family, recipe: Recipe, *, baselines: bool, compiled: bool, int8: bool = False):
        self.recipe, self.ours = recipe, family
        self.grid, self.device = family.grid, family.model.device
        family.model.eval()
        self.work = Work.of(family)
        floats = sum(p.nbytes for p in family.model.parameters())
        self.weights = {False: floats, True: floats}
        self.plain = copy.deepcopy(family) if baselines else None
        self.compiled = copy.deepcopy(family) if compiled else None
        self.rounded = copy.deepcopy(family) if int8 else None
        fuse_for_inference(family.model)
        self.method = decode_method(family)
        if self.compiled:
            fuse_for_inference(self.compiled.model)
            compile_body(self.compiled.model)
        if self.rounded:
            fuse_for_inference(self.rounded.model, int8=True)
            self.weights[True] -= saved_bytes(self.rounded.model, size=family.model.dtype.itemsize)

    def ways(self, plans: Mapping[int, Plan], batch: int, *, baselines: bool) -> Ways:
        """Return the ways to generate a batch, with each decoder at each window.

        Args:
            plans: Plans by window.
            batch: Number of images.
            baselines: Also return the other decoders.
        """
        ahead, plain = self.recipe.sampling, self.plain
        sampling = ahead.model_copy(update={"lookahead": 0})
        condition = conditions(self.recipe.model, batch)
        numbers = code_seeds(list(range(batch)), self.grid.num_codes, seed=self.recipe.seed)
        ways: dict[Case, Way] = {}
        passes: dict[Case, list[int]] = {}
        notes = [f"{OURS}: {self.method.name} passes, since {self.method.reason}"] if self.device.type == "cuda" else []

        def decoding(
            family: Family, plan: Plan, *, sampling: SamplingParams = sampling, make: Any = Decoder, **how: Any
        ) -> Way:
            made: list[Decoder] = []

            def run() -> Tensor:
                if not made:
                    made.append(make(family, plan, **how))
                with whole_graphs():
                    codes = made[0](condition, numbers, sampling)
                if sampling.lookahead and (AHEAD, plan.window) not in passes:
                    passes[AHEAD, plan.window] = made[0].passes(batch)
                return codes

            def settled() -> bool:
                return not made[0].capture or made[0].captured.complete

            return Way(run, settled, made.clear)

        def eager(window: int) -> None:
            assert plain is not None
            with inference_on(self.device):
                eager_loop(plain, condition, numbers, sampling, window=window)  # codes of another rule, not compared

        for window, plan in plans.items():
            ways[OURS, window] = decoding(self.ours, plan, make=self.method.decoder)
            if self.compiled:
                ways[COMPILED, window] = decoding(self.compiled, plan)
            if self.rounded:
                ways[ROUNDED, window] = decoding(self.rounded, plan, make=self.method.decoder)
            if baselines and plain:
                ways[PLAIN, window] = decoding(plain, plan, capture=False)
                ways[EAGER, window] = Way(lambda window=window: eager(window))  # type: ignore[misc]
            passes |= {key: [plan.passes] * batch for key in ways if key[1] == window}
            if ahead.lookahead:
                ways[AHEAD, window] = decoding(self.ours, plan, sampling=ahead, make=self.method.decoder)
            if baselines and plain and window == self.grid.row_length:
                if not hasattr(plain.model, "generate"):
                    notes.append(f"{STOCK} is left out: it needs the larger model that this one is a part of")
                    continue
                stock = Stock(plain)

                def generate(stock: Stock = stock) -> None:
                    with inference_on(self.device):
                        stock(condition, sampling)  # other random numbers, not compared

                ways[STOCK, window], passes[STOCK, window] = Way(generate), [stock.passes] * batch
                notes += stock.notes(guided=sampling.guidance != 1)
        return Ways(ways, passes, notes)
