"""Generation along a plan: each forward pass feeds the next slots of the plan.

The slots of a plan are in decode order. A pass feeds some of them, writes their keys to the cache, and attends to no
slot beyond its last. Counters on the device keep the progress, and tables on the device say what to feed and to
predict. Passes of the same shape are therefore identical work, which a GPU captures once and replays.

Without lookahead, a pass feeds the slots of one step, which depend on no other code of that step. The host reads
nothing back until the images are complete.

With lookahead, a pass feeds the next M slots of each image. Inputs that are not generated yet are drafts. The noise of
every code is fixed in advance, so a code is a function of what its slot attends to. Up to the first slot whose draft
differs from the code that this pass generates for it, all slots have seen final codes only, and what they generate is
final. The next pass continues from there. The image is the one that is generated without lookahead, in fewer passes:
a Jacobi iteration with fixed noise (Wiggers and Hoogeboom, "Predictive Sampling with Forecasting Autoregressive
Models", ICML 2020). What later slots have generated are the drafts of the next pass.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from zipar_train.decoding.cuda_graphs import CudaGraphs
from zipar_train.decoding.place import inference_on, keys_aligned
from zipar_train.decoding.sampling import check_seeds, guide, probabilities, sample_from
from zipar_train.decoding.state import DecodeState, prompts
from zipar_train.models.conditions import ConditionInput
from zipar_train.models.family import Family
from zipar_train.plan.masks import dense, mask_padding, unwritten_slots_mask
from zipar_train.plan.table import Plan
from zipar_train.recipe.schema import SamplingParams

Observer = Callable[[Tensor, Tensor], None]
CHECK = 4  # passes with lookahead between two looks of the host at the progress, if passes are captured
BUCKET = 128  # captured passes attend to a multiple of this many slots, so that a few graphs serve an image


class Shape(NamedTuple):
    """Shape of a forward pass: numbers of slots and keys."""

    slots: int  # fed
    keys: int  # attended to, masked or not
    prompt: bool  # True in the first pass, which feeds the prompt


class Decoder:
    """Decoder that generates the images of a family along a plan.

    Args:
        family: The generator, on its device and in its dtype; it is put into eval mode.
        plan: A plan on the family's grid.
        released: Reproduce the released ZipAR decoder, as a baseline: a query also attends to earlier positions that
            are not written yet, with a zero key (weight exp(0)) and a zero value, because that decoder's mask is causal
            over a cache in raster order. With `stand_in="released"` the codes are the same. Without effect on grids
            with row ends, whose released decoder has a cache without gaps.
        capture: Replay passes as CUDA graphs. None: only on a GPU.

    Raises:
        ValueError: If the plan does not fit the family.
    """

    def __init__(self, family: Family, plan: Plan, *, released: bool = False, capture: bool | None = None):
        if plan.grid != family.grid or plan.prompt != family.prompt_length:
            raise ValueError(
                f"{plan} does not fit a model of {family.grid} codes with {family.prompt_length} prompt tokens"
            )
        self.family, self.plan, device = family, plan, family.model.device
        family.model.eval()
        self.capture = device.type == "cuda" if capture is None else capture
        codes = plan.grid.num_codes

        def table(vector: Any) -> Tensor:
            return torch.as_tensor(np.array(vector), device=device)

        # columns of the token buffer: every code, the row-end token, and one for slots that predict no code
        self.source = table(np.where(plan.source < 0, codes, plan.source))
        self.target = table([*np.where(plan.target < 0, codes + 1, plan.target), codes + 1])  # one beyond the last slot
        self.position = table(plan.position)
        # for drafts: of each slot, the slot that predicts the code above its target; in row 0, the slot itself
        above, predicting = np.arange(len(plan) + 1), plan.predicting()
        for row in plan.grid.rows:
            if row.number:
                codes_of_row = slice(row.first, row.first + row.width)
                above[predicting[codes_of_row]] = predicting[row.first - row.width : row.first]
        self.above = table(above)
        visible = dense(plan, device=device)[0, 0]
        self.released = released and not plan.grid.row_end
        if self.released:
            visible = torch.cat([visible, unwritten_slots_mask(plan, device=device)[0, 0]], dim=1)
        self.bucket = BUCKET if self.capture else keys_aligned(device)
        self.visible = pad(visible, (0, -visible.shape[1] % self.bucket))
        self.shapes = []
        for step in range(plan.passes):
            first, last = np.searchsorted(plan.step, (step, step + 1))
            keys = self.visible.shape[1] if self.released else self.keys(int(last))
            self.shapes.append(Shape(int(last - first), keys, prompt=step == 0))
        self.release()

    @property
    def numbers(self) -> int:
        """Number of seeds per image."""
        return self.plan.grid.num_codes

    def passes(self, images: int) -> list[int]:
        """Return the number of forward passes of each image in the last batch."""
        assert self.state is not None
        return self.state.passes[:images].tolist()

    def release(self) -> None:
        """Free the state and the CUDA graphs of the last batch."""
        self.state: DecodeState | None = None
        self.captured = CudaGraphs(self.family.model.device)

    @torch.inference_mode()
    def __call__(
        self, condition: ConditionInput, seeds: Tensor, sampling: SamplingParams, *, observe: Observer | None = None
    ) -> Tensor:
        """Generate B images.

        Args:
            condition: Conditions of B images.
            seeds: int64 (B, N), see `sampling.code_seeds`.
            sampling: How codes are sampled.
            observe: Called in every pass with targets (B, K) and logits (B, K, V), (2 B, K, V) under guidance. A target
                is the code that was generated from the logits and is final, or N + 1 if there is none. Both are valid
                until it returns. For `PassRecord` and tests.

        Returns:
            Codes, int64 (B, N), in raster order.

        Raises:
            ValueError: If the family does not support the condition, the seeds are not int64 (B, N), or lookahead is
                asked of the released decoder.
            BatchTooLarge: If the batch does not fit into memory; names the largest that does.
        """
        with inference_on(self.family.model.device):
            return self._generate(condition, seeds, sampling, observe)

    def _generate(
        self, condition: ConditionInput, seeds: Tensor, sampling: SamplingParams, observe: Observer | None
    ) -> Tensor:
        family, grid, guided = self.family, self.plan.grid, sampling.guidance != 1
        if sampling.lookahead and self.released:
            raise ValueError("the released decoder has no lookahead: set lookahead to 0")
        prompt, padding = prompts(family, family.check(condition), guided=guided)
        check_seeds(seeds, images := len(prompt) // (1 + guided), grid.num_codes)
        if self.state is None or not self.state.fits(images, prompt, sampling.lookahead):
            self.release()  # free the old state before allocating the new one
            self.state = DecodeState(
                family, self.plan, images, prompt, padding, slots=self.visible.shape[1], lookahead=sampling.lookahead
            )
        state = self.state
        state.begin(prompt, padding, seeds)
        for shape in self._ahead(state, sampling.lookahead) if sampling.lookahead else self.shapes:
            seen = self.run_pass(shape, sampling, keep=observe is not None)
            if observe:
                observe(*seen)
        if not sampling.lookahead:
            state.passes.fill_(self.plan.passes)
        return state.tokens[:, : grid.num_codes].clone()

    def run_pass(self, shape: Shape, sampling: SamplingParams, *, keep: bool = False) -> tuple[Tensor, ...]:
        """Run a pass at the state's slots, as a CUDA graph if passes are captured; `keep` as in `_pass`."""
        assert self.state is not None
        work = partial(self._pass, self.state, shape, sampling, keep=keep)
        return self.captured((shape, sampling, keep), work) if self.capture else work()

    def keys(self, last: int) -> int:
        """Return the number of keys of a pass whose slots end before `last`."""
        return last + -last % self.bucket

    def _ahead(self, state: DecodeState, lookahead: int) -> Iterator[Shape]:
        """Yield the shapes of passes that feed the next `lookahead` slots, until all images are complete.

        At least the widest pass of the plan is fed, so that an image takes no more passes than without lookahead.
        """
        slots, fed = len(self.plan), self.plan.slots_ahead(lookahead)
        last = self.plan.prompt - 1 + fed
        yield Shape(last, self.keys(last), prompt=True)
        for step in count():
            if step % (CHECK if self.capture else 1) == 0:
                if int(state.slot.min()) == slots:
                    return
                last = int(state.slot.max())
            last = min(last + fed, slots)  # at most, if no draft was wrong
            yield Shape(fed, self.keys(last), prompt=False)

    def _pass(self, state: DecodeState, shape: Shape, sampling: SamplingParams, *, keep: bool) -> tuple[Tensor, ...]:
        """Run the pass at the state's slots; with `keep`, return what `observe` takes."""
        family, images, end = self.family, len(state.tokens), len(self.plan)
        copies = len(state.prompt) // images  # 2 under guidance
        start = state.slot if sampling.lookahead else state.slot[:1]  # (B,), or (1,) if all images are in step
        ahead = start[:, None] + torch.arange(shape.slots, device=start.device)
        slots = ahead.clamp(max=end - 1).repeat(copies if len(start) > 1 else 1, 1)  # (1 or R, K)
        skipped = self.plan.prompt if shape.prompt else 0  # slots that feed the prompt
        source = self.source[slots[: len(start), skipped:]].expand(images, -1)
        fed = state.tokens.gather(1, source)
        embeddings = family.embed(fed).repeat(copies, 1, 1)
        if shape.prompt:
            embeddings = torch.cat([state.prompt, embeddings], dim=1)
        visible = self.visible[slots, : shape.keys][:, None]
        if state.padding is not None:
            visible = mask_padding(visible, state.padding, slots=slots)
        bias = torch.zeros_like(visible, dtype=embeddings.dtype).masked_fill(~visible, -torch.inf)  # for all layers
        state.cache.begin_pass(slots, shape.keys)
        hidden = family.hidden(embeddings, self.position[slots], bias, state.cache)
        ahead = ahead[:, max(skipped - 1, 0) :]  # of the prompt, only the last token predicts a code
        logits = family.head(hidden[:, -ahead.shape[1] :])
        target = self.target[ahead.clamp(max=end)].expand(images, -1)
        guided = guide(logits, sampling.guidance) if sampling.guidance != 1 else logits
        how = sampling.model_dump(include={"temperature", "top_k", "top_p"})
        p = probabilities(guided.flatten(0, 1), **how).view(images, -1, logits.shape[-1])
        state.tokens.scatter_(1, target, sample_from(p, state.seeds.gather(1, target)))
        if not sampling.lookahead:
            state.slot += shape.slots
            return (target, logits) if keep else ()

        # drafts of the codes beyond this pass: from its distribution of the code above, with their own noise
        beyond = (ahead + ahead.shape[1]).clamp(max=end)
        above = (self.above[beyond] - ahead[:, :1]).clamp(0, ahead.shape[1] - 1)
        p = p.gather(1, above[..., None].expand_as(p))
        state.tokens.scatter_(1, self.target[beyond], sample_from(p, state.seeds.gather(1, self.target[beyond])))
        # slots are final up to the first one whose input was a wrong draft
        right = (state.tokens.gather(1, source) == fed).long()
        state.passes += state.slot < end
        state.slot.add_(skipped + right.cumprod(1).sum(1)).clamp_(max=end)
        return (target.masked_fill(ahead >= state.slot[:, None], self.plan.grid.num_codes + 1), logits) if keep else ()
