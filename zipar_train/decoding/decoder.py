"""Generation along a plan: one forward pass per step, each with the slots of that step.

The slots of a plan are in decode order. A pass feeds the next slots, writes their keys to the cache, and attends to no
slot beyond its last. Counters on the device keep the progress, and precomputed tables on the device say what to feed
and to predict. Passes of the same shape are therefore identical work, which a GPU captures once and replays. The host
reads nothing back until the images are complete.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from zipar_train.decoding.cuda_graphs import CudaGraphs
from zipar_train.decoding.place import inference_on, keys_aligned
from zipar_train.decoding.sampling import guide, sample
from zipar_train.decoding.state import DecodeState, prompts
from zipar_train.models.conditions import ConditionInput
from zipar_train.models.family import Family
from zipar_train.plan.masks import dense, mask_padding, unwritten_slots_mask
from zipar_train.plan.table import ROW_END, Plan
from zipar_train.recipe.schema import SamplingParams

Observer = Callable[[Tensor, Tensor], None]
BUCKET = 128  # captured passes attend to a multiple of this many slots, so that a few graphs serve an image


class Shape(NamedTuple):
    """Shape of a forward pass: numbers of slots, codes and keys."""

    slots: int  # fed
    codes: int  # predicted
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

        # columns of the token buffer: every code, then the row-end token
        self.source = table(np.where(plan.source == ROW_END, codes, plan.source))
        self.position = table(plan.position)
        predicting = np.flatnonzero(plan.target >= 0)  # slots whose logits predict a code
        self.predicting, self.target = table(predicting), table(plan.target[predicting])
        visible = dense(plan, device=device)[0, 0]
        released = released and not plan.grid.row_end
        if released:
            visible = torch.cat([visible, unwritten_slots_mask(plan, device=device)[0, 0]], dim=1)
        bucket = BUCKET if self.capture else keys_aligned(device)
        self.visible = pad(visible, (0, -visible.shape[1] % bucket))
        self.shapes = []
        for step in range(plan.passes):
            first, last = np.searchsorted(plan.step, (step, step + 1))
            keys = self.visible.shape[1] if released else last + -last % bucket
            predicted = np.count_nonzero(plan.target[first:last] >= 0)
            self.shapes.append(Shape(int(last - first), int(predicted), int(keys), prompt=step == 0))
        self.release()

    @property
    def numbers(self) -> int:
        """Number of uniform numbers per image."""
        return self.plan.grid.num_codes

    def passes(self, images: int) -> list[int]:
        """Return the number of forward passes of each image in the last batch."""
        return [self.plan.passes] * images

    def release(self) -> None:
        """Free the state and the CUDA graphs of the last batch."""
        self.state: DecodeState | None = None
        self.captured = CudaGraphs(self.family.model.device)

    @torch.inference_mode()
    def __call__(
        self, condition: ConditionInput, uniforms: Tensor, sampling: SamplingParams, *, observe: Observer | None = None
    ) -> Tensor:
        """Generate B images.

        Args:
            condition: Conditions of B images.
            uniforms: (B, N), see `sampling.uniforms`.
            sampling: How codes are sampled.
            observe: Called in every pass with the targets (K,) and logits (B, K, V), (2 B, K, V) under guidance. Both
                are valid until it returns. For tests.

        Returns:
            Codes, int64 (B, H, W).

        Raises:
            ValueError: If the family does not support the condition.
            BatchTooLarge: If the batch does not fit into memory; names the largest that does.
        """
        with inference_on(self.family.model.device):
            return self._generate(condition, uniforms, sampling, observe)

    def _generate(
        self, condition: ConditionInput, uniforms: Tensor, sampling: SamplingParams, observe: Observer | None
    ) -> Tensor:
        family, grid, images = self.family, self.plan.grid, len(uniforms)
        assert uniforms.shape == (images, grid.num_codes), uniforms.shape
        prompt, padding = prompts(family, family.check(condition), guided=sampling.guidance != 1)
        if self.state is None or not self.state.fits(images, prompt):
            self.release()  # free the old state before allocating the new one
            self.state = DecodeState(family, self.plan, images, prompt, padding, slots=self.visible.shape[1])
        state = self.state
        state.begin(prompt, padding, uniforms)
        for shape in self.shapes:
            work = partial(self._pass, state, shape, sampling, keep=observe is not None)
            seen = self.captured((shape, sampling, observe is not None), work) if self.capture else work()
            if observe:
                observe(*seen)
        return state.tokens[:, : grid.num_codes].view(images, grid.height, grid.width).clone()

    def _pass(self, state: DecodeState, shape: Shape, sampling: SamplingParams, *, keep: bool) -> tuple[Tensor, ...]:
        """Run the pass at the state's counters; with `keep`, return the codes' places (K,) and logits (R, K, V)."""
        family, device = self.family, state.slot.device
        slots = state.slot + torch.arange(shape.slots, device=device)
        predicting = state.code + torch.arange(shape.codes, device=device)
        fed = self.source[slots[self.plan.prompt if shape.prompt else 0 :]]
        embeddings = family.embed(state.tokens[:, fed]).repeat(len(state.prompt) // len(state.tokens), 1, 1)
        if shape.prompt:
            embeddings = torch.cat([state.prompt, embeddings], dim=1)
        visible = self.visible[slots, : shape.keys][None, None]
        if state.padding is not None:
            visible = mask_padding(visible, state.padding, slots=slots)
        bias = torch.zeros_like(visible, dtype=embeddings.dtype).masked_fill(
            ~visible, -torch.inf
        )  # once for all layers
        state.cache.begin_pass(slots, shape.keys)
        wanted, target = self.predicting[predicting] - state.slot, self.target[predicting]
        logits = family.head(family.hidden(embeddings, self.position[slots], bias, state.cache)[:, wanted])
        generated = sample(
            (guide(logits, sampling.guidance) if sampling.guidance != 1 else logits).flatten(0, 1),
            state.uniforms[:, target].flatten(),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
        )
        state.tokens.index_copy_(1, target, generated.view(len(state.tokens), -1))
        state.slot += shape.slots
        state.code += shape.codes
        return (target, logits) if keep else ()
