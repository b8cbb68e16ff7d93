"""The methods that the benchmark of passes by their rows compares: an entry of `METHODS` each."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from zipar_train.benchmark.baselines import EagerLoop
from zipar_train.benchmark.results import EAGER
from zipar_train.benchmark.roofline import middle
from zipar_train.benchmark.turns import whole_graphs
from zipar_train.decoding.decoder import Decoder, Shape
from zipar_train.decoding.fused_llama import compile_body, fuse_for_inference
from zipar_train.decoding.place import inference_on
from zipar_train.decoding.sampling import code_seeds
from zipar_train.decoding.state import DecodeState, prompts
from zipar_train.models.conditions import Condition
from zipar_train.models.family import Family, conditions
from zipar_train.plan.table import Plan
from zipar_train.recipe.schema import Recipe, SamplingParams

PASSES = {"cpu": 10, "cuda": 50}  # per round: the first of a shape runs eagerly, the second is captured


def passes_of(device: torch.device) -> int:
    """Return the number of passes of a round: enough that what is done once a round takes less than 1 % of it."""
    return PASSES.get(device.type, PASSES["cpu"])


class Asked(NamedTuple):
    """Options of a benchmark, which decide the methods.

    Attributes:
        recipe: The recipe.
        device: Device of the passes.
        baselines: True unless baselines are left out.
        compiled: True if torch.compile is asked for.
        int8: True if int8 weights are asked for.
    """

    recipe: Recipe
    device: torch.device
    baselines: bool = True
    compiled: bool = False
    int8: bool = False


@dataclass(frozen=True)
class Setting:
    """The images whose passes are timed, on the next-token plan.

    Attributes:
        recipe: The recipe.
        plan: The plan.
        images: B.
        guided: Feed each slot twice, under guidance.
        most: Largest number of slots of a pass.
    """

    recipe: Recipe
    plan: Plan
    images: int
    guided: bool
    most: int

    @property
    def sampling(self) -> SamplingParams:
        """How codes are sampled: by the recipe, without lookahead."""
        guidance = self.recipe.sampling.guidance if self.guided else 1.0
        return self.recipe.sampling.model_copy(update={"lookahead": 0, "guidance": guidance})

    @property
    def seeds(self) -> Tensor:
        """Seeds of the codes, (B, N)."""
        return code_seeds(list(range(self.images)), self.plan.grid.num_codes, seed=self.recipe.seed)

    def condition(self, family: Family) -> Condition:
        """Return checked conditions of the images."""
        return family.check(conditions(self.recipe.model, self.images))

    def first(self, slots: int) -> int:
        """Return the first slot of the pass of this many slots."""
        return middle(self.plan, slots) - slots

    def before(self) -> list[range]:
        """Return the slots of passes that fill the cache: the prompt's, then `most` at a time to beyond the middle."""
        prompt, end = self.plan.prompt, middle(self.plan, self.most)
        chunks = [range(first, min(first + self.most, len(self.plan))) for first in range(prompt, end, self.most)]
        return [range(prompt), *chunks]


class DecoderPasses:
    """Passes of the package's `Decoder`; called with a number of slots, it runs one.

    Args:
        family: The generator.
        setting: The images.
        lookahead: Passes with lookahead, which also sample drafts of later codes.
        make: Returns the decoder.
    """

    def __init__(
        self,
        family: Family,
        setting: Setting,
        *,
        lookahead: bool = False,
        make: Callable[[Family, Plan], Decoder] = Decoder,
    ):
        self.setting, plan, guided = setting, setting.plan, setting.guided
        ahead = setting.most if lookahead else 0
        self.sampling = setting.sampling.model_copy(update={"lookahead": ahead})
        self.decoder = decoder = make(family, plan)
        prompt, padding = prompts(family, setting.condition(family), guided=guided)
        slots = decoder.visible.shape[1]
        decoder.state = DecodeState(family, plan, setting.images, prompt, padding, slots=slots, lookahead=setting.most)
        decoder.state.begin(prompt, padding, setting.seeds)
        for chunk in setting.before():
            self._pass(chunk.start, len(chunk))

    def __call__(self, slots: int) -> None:
        self._pass(self.setting.first(slots), slots)

    def _pass(self, first: int, slots: int) -> None:
        """Run the pass that feeds this many slots of each image from slot `first` on."""
        assert self.decoder.state is not None
        self.decoder.state.slot.fill_(first)
        self.decoder.run_pass(Shape(slots, self.decoder.keys(first + slots), prompt=not first), self.sampling)


class EagerPasses:
    """Passes of the released loop; called with a number of slots, it runs one.

    Args:
        family: The generator, with transformers' own layers.
        setting: The images.
    """

    def __init__(self, family: Family, setting: Setting):
        self.setting, plan = setting, setting.plan
        self.loop = EagerLoop(family, plan, setting.condition(family), setting.seeds, setting.sampling)
        code = torch.zeros(setting.images, 1, dtype=torch.long, device=family.model.device)
        self.loop.generated = dict.fromkeys(range(plan.grid.num_codes), code)
        for chunk in setting.before():
            self.loop.run_pass(chunk)

    def __call__(self, slots: int) -> None:
        first = self.setting.first(slots)
        self.loop.memory.forget(first)
        self.loop.run_pass(range(first, first + slots))


class Method(NamedTuple):
    """A way to make passes.

    Attributes:
        passes: Returns the passes of a setting, a function of a number of slots; its call fills the cache.
        prepare: Changes the method's own model in place before its first pass. The weights are frozen.
        when: Returns True if the method is measured.
        int8: True if the weights of the layers are int8.
    """

    passes: Callable[[Family, Setting], Callable[[int], None]]
    prepare: Callable[[PreTrainedModel], Any]
    when: Callable[[Asked], bool] = lambda asked: True
    int8: bool = False


def _fused_decoder(family: Family, plan: Plan) -> Decoder:
    from zipar_train.decoding.kernels.fused_decoder import FusedDecoder  # needs Triton

    return FusedDecoder(family, plan)


def _compile(model: PreTrainedModel) -> None:
    fuse_for_inference(model)
    compile_body(model)


METHODS = {
    "plain": Method(DecoderPasses, fuse_for_inference),
    "compiled": Method(DecoderPasses, _compile, lambda asked: asked.compiled),
    "lookahead": Method(
        partial(DecoderPasses, lookahead=True), fuse_for_inference, lambda asked: asked.recipe.sampling.lookahead > 0
    ),
    "fused": Method(  # with lookahead: otherwise the kernels feed the slots of the plan's step, and of no other pass
        partial(DecoderPasses, lookahead=True, make=_fused_decoder),
        fuse_for_inference,
        lambda asked: asked.device.type == "cuda",
    ),
    "int8": Method(DecoderPasses, partial(fuse_for_inference, int8=True), lambda asked: asked.int8, int8=True),
    "fused, int8": Method(
        partial(DecoderPasses, lookahead=True, make=_fused_decoder),
        partial(fuse_for_inference, int8=True),
        lambda asked: asked.int8 and asked.device.type == "cuda",
        int8=True,
    ),
    EAGER: Method(EagerPasses, lambda model: None, lambda asked: asked.baselines),
}


class MethodRun:
    """Runs of one method, whose model and caches are made in its first run.

    Args:
        method: The method.
        build: Builds a model of its own, with the same weights each time.
        settings: The images with and without guidance, by `guided`.
    """

    def __init__(self, method: Method, build: Callable[[], Family], settings: dict[bool, Setting]):
        self.method, self.build, self.settings = method, build, settings
        self.release()

    def release(self) -> None:
        """Free the model and the caches."""
        self.family: Family | None = None
        self.passes: dict[bool, Callable[[int], None]] = {}

    def __call__(self, slots: int, *, guided: bool) -> None:
        """Run the passes of a round."""
        if self.family is None:
            family = self.build()
            family.model.eval()
            self.method.prepare(family.model)
            self.family = family
        with torch.inference_mode(), inference_on(self.family.model.device), whole_graphs():
            if guided not in self.passes:
                self.passes[guided] = self.method.passes(self.family, self.settings[guided])
            run_pass = self.passes[guided]
            for _ in range(passes_of(self.family.model.device)):
                run_pass(slots)
