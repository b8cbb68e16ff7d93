"""Generation with an adaptive window: a row starts once its first code passes verification.

This is ZipAR's published version (He et al., PMLR 267, 2025). Its code is not released; the formulas are taken from
accounts of it. A row's first code x is sampled as soon as `window` codes of the row above exist. The next pass sees
one more code of that row. With probabilities p before and p' now, it accepts x with probability min(1, p'(x) / p(x)),
as in speculative sampling. Otherwise it resamples x from max(0, p' - p), and the pass after that verifies again. A
row's first code is final at the latest when the row above is complete. Final codes therefore do not follow a single
distribution: after one verification x follows p', but only accepted codes stay.

Each image has its own schedule, and the host reads the result of every pass, so CUDA graphs cannot be used.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from zipar_train.decoding.adaptive.schedule import RowSchedule, SlotInput
from zipar_train.decoding.cache import SlotCache
from zipar_train.decoding.decoder import Observer
from zipar_train.decoding.memory import check_memory
from zipar_train.decoding.place import inference_on, keys_aligned
from zipar_train.decoding.sampling import accept_or_resample, check_seeds, guide, probabilities, sample_from
from zipar_train.decoding.state import prompts
from zipar_train.models.conditions import ConditionInput
from zipar_train.models.family import Family
from zipar_train.plan.masks import mask_padding
from zipar_train.plan.stand_in import FirstRow, StandIn
from zipar_train.plan.table import ROW_END, Plan
from zipar_train.recipe.schema import SamplingParams

SEEDS = 3  # of a code: one for itself, two for its verification if it is the first of a row


class AdaptiveDecoder:
    """Decoder with adaptive windows: the plan of each image is determined while it is generated.

    Args:
        family: The generator, on its device and in its dtype; it is put into eval mode.
        window: The smallest window, in codes.
        stand_in, first_row, preview_window: See `Plan.zipar`.

    Raises:
        ValueError: If the window does not fit the grid.
    """

    def __init__(
        self,
        family: Family,
        *,
        window: int,
        stand_in: StandIn = "completed",
        first_row: FirstRow = "complete",
        preview_window: int | None = None,
    ):
        self.family, self.schedules = family, list[RowSchedule]()
        family.model.eval()
        self.rule: dict[str, Any] = {
            "grid": family.grid,
            "window": window,
            "stand_in": stand_in,
            "first_row": first_row,
            "preview_window": preview_window,
            "prompt": family.prompt_length,
        }
        self.plan = Plan.zipar(**self.rule)  # of the smallest window: the fewest passes

    def passes(self, images: int) -> list[int]:
        """Return the number of forward passes of each image in the last batch."""
        return [rows.passes for rows in self.schedules[:images]]

    @property
    def numbers(self) -> int:
        """Number of seeds per image."""
        return SEEDS * self.family.grid.num_codes

    def plans(self, images: int) -> list[Plan]:
        """Return the plan of each image in the last batch."""
        return [rows.plan() for rows in self.schedules[:images]]

    def release(self) -> None:
        """Do nothing: no memory is kept between batches."""

    @torch.inference_mode()
    def __call__(
        self, condition: ConditionInput, seeds: Tensor, sampling: SamplingParams, *, observe: Observer | None = None
    ) -> Tensor:
        """Generate B images.

        Args:
            condition: Conditions of B images.
            seeds: int64 (B, 3 N), see `sampling.code_seeds`.
            sampling: How codes are sampled.
            observe: Called in every pass with places (B, K) and logits (B, K, V), (2 B, K, V) under guidance. Place p
                is slot p of the image's plan; a place beyond its last slot is padding. For tests.

        Returns:
            Codes, int64 (B, N), in raster order.

        Raises:
            ValueError: If the family does not support the condition, the seeds are not int64 (B, 3 N), or
                lookahead is asked for.
            BatchTooLarge: If the batch does not fit into memory; names the largest that does.
        """
        with inference_on(self.family.model.device):
            return self._generate(condition, seeds, sampling, observe)

    def _generate(
        self, condition: ConditionInput, seeds: Tensor, sampling: SamplingParams, observe: Observer | None
    ) -> Tensor:
        family = self.family
        if sampling.lookahead:
            raise ValueError("adaptive windows have no lookahead: set lookahead to 0")
        attempts = RowSchedule(**self.rule).attempts
        state = _AdaptiveState(family, self.plan, condition, seeds, sampling, attempts=attempts)
        rows = [RowSchedule(**self.rule) for _ in seeds]
        step = 0
        while any(going := [one.last is None or step <= one.last for one in rows]):
            feeds = [one.feeds(step) if on else [] for one, on in zip(rows, going, strict=True)]
            accepted = state.forward(step, feeds, observe)
            for image, feed in enumerate(each[-1] if each else None for each in feeds):
                if feed and feed.task in ("try", "settle"):
                    expires = rows[image].settle(step, feed, feed.task == "settle" or bool(accepted[image]))
                    state.expires[image, state.written[image] - 1] = expires
            step += 1
        self.schedules = rows
        return state.tokens[:, : family.grid.num_codes].clone()


class _AdaptiveState:
    """State of a batch: codes, keys and values, and the slots that each image has written, in its plan's order."""

    def __init__(
        self,
        family: Family,
        plan: Plan,
        condition: ConditionInput,
        seeds: Tensor,
        sampling: SamplingParams,
        *,
        attempts: int,
    ):
        device, grid, self.copies = family.model.device, family.grid, 1 + (sampling.guidance != 1)
        self.prompt, self.padding = prompts(family, family.check(condition), guided=self.copies == 2)
        images = len(self.prompt) // self.copies
        check_seeds(seeds, images, SEEDS * grid.num_codes)
        self.family, self.sampling, self.seeds = family, sampling, seeds.to(device)
        self.most = plan.prompt + grid.num_tokens + attempts
        self.aligned = keys_aligned(device)
        slots = self.most + 1 + -(self.most + 1) % self.aligned
        check_memory(family, plan, images, rows=self.copies * images, slots=slots)
        self.tokens = torch.full((images, grid.num_codes + 2), ROW_END, device=device)  # codes, row end, no code
        self.before: Tensor | None = None  # (B, V), the codes to verify were sampled from it
        self.written = np.zeros(images, dtype=np.int64)
        self.position = np.zeros((images, slots), dtype=np.int64)
        self.expires = np.zeros((images, slots), dtype=np.int64)  # 0: not written
        self.cache = SlotCache(family.model, rows=self.copies * images, slots=slots)

    def forward(self, step: int, feeds: list[list[SlotInput]], observe: Observer | None) -> NDArray[np.bool_]:
        """Run a forward pass and return, for each image, whether its verified code was accepted, bool (B,)."""
        family, codes, device = self.family, self.family.grid.num_codes, self.tokens.device
        images, widest = len(feeds), max(map(len, feeds))
        source, position, target, place = (np.full((images, widest), x) for x in (0, -1, codes + 1, self.most))
        for image, each in enumerate(feeds):
            n, start = len(each), self.written[image]
            if n:
                source[image, :n] = [codes if feed.source < 0 else feed.source for feed in each]
                position[image, :n] = [feed.position for feed in each]
                target[image, :n] = [codes + 1 if feed.target < 0 else feed.target for feed in each]
                place[image, :n] = range(start, start + n)
                self.position[image, start : start + n] = position[image, :n]
                self.expires[image, start : start + n] = [feed.expires for feed in each]
                self.written[image] += n

        seen = int(self.written.max())
        seen += -seen % self.aligned
        visible = (self.expires[:, None, :seen] > step) & (self.position[:, None, :seen] <= position[..., None])
        mask = torch.from_numpy(visible).to(device)[:, None].repeat(self.copies, 1, 1, 1)
        if self.padding is not None:
            mask = mask_padding(mask, self.padding, slots=torch.arange(widest, device=device)[None] + (step > 0) * seen)
        targets, sources, positions, places = (
            torch.from_numpy(each).to(device) for each in (target, source, position, place)
        )
        embeddings = family.embed(self.tokens.gather(1, sources)).repeat(self.copies, 1, 1) if step else self.prompt
        bias = torch.zeros_like(mask, dtype=embeddings.dtype).masked_fill(~mask, -torch.inf)
        self.cache.begin_pass(places.repeat(self.copies, 1), seen)
        hidden = family.hidden(embeddings, positions.repeat(self.copies, 1), bias, self.cache)
        if step == 0:  # only the last prompt token predicts a code
            hidden, targets, places = hidden[:, -1:], targets[:, -1:], places[:, -1:]
        logits = family.head(hidden)
        if observe:
            observe(places, logits)
        logits = guide(logits, self.sampling.guidance) if self.sampling.guidance != 1 else logits
        p = probabilities(
            logits.flatten(0, 1), **self.sampling.model_dump(include={"temperature", "top_k", "top_p"})
        ).view(*logits.shape)
        numbers = self.seeds.gather(1, targets.clamp(max=codes - 1))
        generated = sample_from(p.flatten(0, 1), numbers.flatten()).view(targets.shape)
        accepted = self._look(feeds, p, generated)
        self.tokens.scatter_(1, targets, generated)
        self.tokens[:, codes:] = ROW_END
        return accepted

    def _look(self, feeds: list[list[SlotInput]], p: Tensor, generated: Tensor) -> NDArray[np.bool_]:
        """Verify the first codes of rows: accept those sampled before, or resample them into `generated`."""
        grid, accepted = self.family.grid, np.zeros(len(feeds), dtype=np.bool_)
        looks = [(k, each[-1]) for k, each in enumerate(feeds) if each and each[-1].task in ("try", "settle")]
        if not looks:
            return accepted
        images = [k for k, _ in looks]
        table = [(k, len(feeds[k]) - 1, feed.target, feed.tried) for k, feed in looks]
        image, column, target, tried = torch.tensor(table, device=generated.device).T
        number = grid.num_codes + 2 * (target + (tried - 1).clamp(min=0))
        if self.before is None:
            self.before = p.new_zeros(len(feeds), p.shape[-1])
        before, now = self.before[image], p[image, column]
        kept, code = accept_or_resample(
            self.tokens[image, target].clamp(min=0),
            before,
            now,
            self.seeds[image, number],
            self.seeds[image, number + 1],
        )
        generated[image, column] = torch.where(tried > 0, code, generated[image, column])
        self.before[image] = now
        accepted[images] = ((tried > 0) & kept).cpu().numpy()
        return accepted
