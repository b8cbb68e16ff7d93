"""Drawing images along a plan: one forward pass after another, each with the slots of its own step.

The slots of a plan lie in decode order: a pass feeds the next few, writes their keys there, and attends to none beyond
its last. How far it has come is counted on the device, and what to feed and to draw is looked up there in tables made
once: passes of one shape are the same work, which a GPU captures once and replays, and the host reads nothing back
until the images are done.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from zipar_train.decoding.cuda_graphs import CudaGraphs
from zipar_train.decoding.place import drawing_on, keys_aligned
from zipar_train.decoding.sampling import guide, sample
from zipar_train.decoding.state import DecodeState, prompts
from zipar_train.models.family import Family
from zipar_train.plan.masks import dense, mask_padding, unwritten_slots_mask
from zipar_train.plan.table import ROW_END, Plan
from zipar_train.recipe.schema import Draw

Observer = Callable[[Tensor, Tensor], None]
BUCKET = 128  # captured passes attend to a multiple of this many slots, so that a few graphs serve an image


class Shape(NamedTuple):
    """What a pass looks like."""

    slots: int  # fed
    codes: int  # drawn
    keys: int  # attended to, seen or not
    prompt: bool  # among what is fed: in the first pass


class Decoder:
    """Draws images from a family along a plan.

    Args:
        family: on its device, in its dtype; put into eval mode.
        plan: on the family's grid.
        released: let every query also attend to the positions before it that no slot has been written to yet, with a
            zero key (weight exp(0)) and a zero value, as the released ZipAR decoder does (its mask is causal over a
            cache in raster order). A baseline to compare with; with `stand_in="released"` it draws the same codes.
            With row ends it changes nothing: that released decoder has a cache without gaps.
        capture: replay passes as CUDA graphs; None: on a GPU.

    Raises:
        ValueError: if plan and family do not fit.
    """

    def __init__(self, family: Family, plan: Plan, *, released: bool = False, capture: bool | None = None):
        if plan.grid != family.grid or plan.prompt != family.prompt_length:
            raise ValueError(
                f"{plan} does not fit a model of {family.grid} codes with {family.prompt_length} prompt tokens"
            )
        self.family, self.plan, device = family, plan, family.model.device
        family.model.eval()
        self.capture = device.type == "cuda" if capture is None else capture
        codes = plan.grid.codes

        def table(vector) -> Tensor:
            return torch.as_tensor(np.array(vector), device=device)

        # columns of the tokens drawn so far: every code, then the row-end token
        self.source = table(np.where(plan.source == ROW_END, codes, plan.source))
        self.position = table(plan.position)
        drawing = np.flatnonzero(plan.target >= 0)  # slots whose logits draw a code
        self.drawing, self.target = table(drawing), table(plan.target[drawing])
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
            drawn = np.count_nonzero(plan.target[first:last] >= 0)
            self.shapes.append(Shape(int(last - first), int(drawn), int(keys), prompt=step == 0))
        self.release()

    @property
    def numbers(self) -> int:
        """Uniform numbers that an image takes."""
        return self.plan.grid.codes

    def passes(self, images: int) -> list[int]:
        """That each of the images drawn last took."""
        return [self.plan.passes] * images

    def release(self) -> None:
        """Give back the memory that the last batch was drawn on."""
        self.canvas: DecodeState | None = None
        self.captured = CudaGraphs(self.family.model.device)

    @torch.inference_mode()
    def __call__(self, condition: Any, uniforms: Tensor, draw: Draw, *, observe: Observer | None = None) -> Tensor:
        """Draw B images.

        Args:
            condition: of B images.
            uniforms: (B, N), see `sampling.uniforms`.
            draw: how codes are sampled.
            observe: called with the targets (K,) and logits (B, K, V) of every pass, (2 B, K, V) under guidance; what
                it is given holds until it returns. For tests: what the decoder saw.

        Returns:
            Codes, int64 (B, H, W).

        Raises:
            ValueError: for a condition the family does not know.
            BatchTooLarge: for more images than memory holds; names how many it does.
        """
        with drawing_on(self.family.model.device):
            return self._drawn(condition, uniforms, draw, observe)

    def _drawn(self, condition: Any, uniforms: Tensor, draw: Draw, observe: Observer | None) -> Tensor:
        family, grid, images = self.family, self.plan.grid, len(uniforms)
        assert uniforms.shape == (images, grid.codes), uniforms.shape
        prompt, padding = prompts(family, family.check(condition), guided=draw.guidance != 1)
        if self.canvas is None or not self.canvas.fits(images, prompt):
            self.release()  # before memory is asked for anew
            self.canvas = DecodeState(family, self.plan, images, prompt, padding, slots=self.visible.shape[1])
        canvas = self.canvas
        canvas.begin(prompt, padding, uniforms)
        for shape in self.shapes:
            work = partial(self._pass, canvas, shape, draw, keep=observe is not None)
            seen = self.captured((shape, draw, observe is not None), work) if self.capture else work()
            if observe:
                observe(*seen)
        return canvas.tokens[:, : grid.codes].view(images, grid.height, grid.width).clone()

    def _pass(self, canvas: DecodeState, shape: Shape, draw: Draw, *, keep: bool) -> tuple[Tensor, ...]:
        """The pass at the canvas's counters; if wanted, which codes it drew, (K,), and the logits it drew them from."""
        family, device = self.family, canvas.slot.device
        slots = canvas.slot + torch.arange(shape.slots, device=device)
        drawing = canvas.code + torch.arange(shape.codes, device=device)
        fed = self.source[slots[self.plan.prompt if shape.prompt else 0 :]]
        embeddings = family.embed(canvas.tokens[:, fed]).repeat(len(canvas.prompt) // len(canvas.tokens), 1, 1)
        if shape.prompt:
            embeddings = torch.cat([canvas.prompt, embeddings], dim=1)
        visible = self.visible[slots, : shape.keys][None, None]
        if canvas.padding is not None:
            visible = mask_padding(visible, canvas.padding, slots=slots)
        bias = torch.zeros_like(visible, dtype=embeddings.dtype).masked_fill(
            ~visible, -torch.inf
        )  # once for all layers
        canvas.cache.begin_pass(slots, shape.keys)
        wanted, target = self.drawing[drawing] - canvas.slot, self.target[drawing]
        logits = family.head(family.hidden(embeddings, self.position[slots], bias, canvas.cache)[:, wanted])
        drawn = sample(
            (guide(logits, draw.guidance) if draw.guidance != 1 else logits).flatten(0, 1),
            canvas.uniforms[:, target].flatten(),
            temperature=draw.temperature,
            top_k=draw.top_k,
            top_p=draw.top_p,
        )
        canvas.tokens.index_copy_(1, target, drawn.view(len(canvas.tokens), -1))
        canvas.slot += shape.slots
        canvas.code += shape.codes
        return (target, logits) if keep else ()
