"""Passes with and without lookahead, and what decides them: docs/lookahead.md's tables, from any checkpoint.

    .venv/bin/python scripts/evidence/lookahead.py runs/digits --windows 8,4,2,1 --images 1000    # passes
    .venv/bin/python scripts/evidence/lookahead.py runs/digits --drafts    # variants of the rule

Every image is generated with and without lookahead, and compared code for code. Labels are the classes in turn.
"""

import argparse
from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from zipar_train.decoding.decoder import Decoder, Shape
from zipar_train.decoding.generator import Generator, load
from zipar_train.decoding.sampling import code_seeds, guide, probabilities, sample_from
from zipar_train.decoding.state import DecodeState
from zipar_train.io.tables import aligned
from zipar_train.recipe.schema import SamplingParams


class Drafting(Decoder):
    """Decoder whose drafts of codes that no pass has predicted yet are chosen by `rule`.

    Rules that copy: `first` the codebook's first entry, `above` the code above, `before` the code before. Rules that
    sample with the code's own noise from a distribution of the last pass: `noise above` that of the code above (as
    shipped), `noise last` that of the pass's last slot, `noise mean` the mean of all. `likely last`: its argmax.
    `whole steps`: as shipped, but slots are accepted only with all slots of their step.
    """

    rule = "noise above"

    def run_pass(self, shape: Shape, sampling: SamplingParams, *, keep: bool) -> tuple[Tensor, ...]:
        state, head = self.state, self.family.head
        if self.rule in ("noise above", "whole steps") or state is None or not sampling.lookahead:
            found = super().run_pass(shape, sampling, keep=keep)
            if self.rule == "whole steps" and state is not None:
                first = np.searchsorted(self.plan.step, [*self.plan.step, self.plan.passes])  # slot of the step
                state.slot.copy_(torch.from_numpy(first)[state.slot])
            return found
        logits: list[Tensor] = []

        def kept(hidden: Tensor) -> Tensor:
            logits.append(head(hidden))
            return logits[-1]

        start = state.slot.clone()
        self.family.head = kept  # type: ignore[method-assign]
        try:
            found = super().run_pass(shape, sampling, keep=keep)
        finally:
            self.family.head = head  # type: ignore[method-assign]
        self._draft(state, start + shape.slots, logits[0], sampling)
        return found

    def _draft(self, state: DecodeState, fed: Tensor, logits: Tensor, sampling: SamplingParams) -> None:
        """Replace the drafts of codes whose slots, from `fed` (B,) on, have not been fed yet."""
        grid, unseen = self.plan.grid, torch.tensor(self.plan.predicting()) >= fed[:, None]
        guided = guide(logits, sampling.guidance) if sampling.guidance != 1 else logits
        how = sampling.model_dump(include={"temperature", "top_k", "top_p"})
        p = probabilities(guided.flatten(0, 1), **how).view(len(unseen), -1, logits.shape[-1])
        codes, seeds = state.tokens[:, : grid.num_codes], state.seeds[:, : grid.num_codes]
        if self.rule in ("above", "before"):
            back = grid.width if self.rule == "above" else 1
            for code in range(back, grid.num_codes):  # in order: a copy may be copied
                codes[:, code] = torch.where(unseen[:, code], codes[:, code - back], codes[:, code])
            return
        drafts = {
            "first": lambda: torch.zeros_like(codes),
            "noise last": lambda: sample_from(p[:, -1:].expand(-1, grid.num_codes, -1), seeds),
            "noise mean": lambda: sample_from(p.mean(1, keepdim=True).expand(-1, grid.num_codes, -1), seeds),
            "likely last": lambda: p[:, -1].argmax(-1, keepdim=True).expand_as(codes),
        }[self.rule]()
        codes.copy_(torch.where(unseen, drafts, codes))


RULES = ("first", "before", "above", "likely last", "noise last", "noise mean", "noise above", "whole steps")


def generated(
    generator: Generator, window: int, sampling: SamplingParams, *, images: int, batch: int, rule: str = "noise above"
) -> tuple[Tensor, Tensor]:
    """Return the codes (images, N) and the passes (images,) of the first images of seed 0."""
    decoder = Drafting(generator.inference_family, generator.plan(window))
    decoder.rule, codes, passes = rule, [], list[int]()
    for start in range(0, images, batch):
        numbers = list(range(start, min(start + batch, images)))
        labels = [k % (generator.recipe.model.num_classes or 1) for k in numbers]
        codes.append(decoder(labels, code_seeds(numbers, decoder.numbers, seed=0), sampling))
        passes += decoder.passes(len(numbers))
    return torch.cat(codes), torch.tensor(passes, dtype=torch.float64)


def passes_table(generator: Generator, asked: argparse.Namespace) -> list[list[str]]:
    head = ["window", "guidance", "top-k", "passes", *(f"lookahead {n}" for n in asked.lookahead), "equal images"]
    rows = [head]
    for guidance, top_k, window in product(asked.guidance, asked.top_k, asked.windows):
        sampling = SamplingParams(guidance=guidance, top_k=top_k)
        plain, count = generated(generator, window, sampling, images=asked.images, batch=asked.batch)
        cells, equal = [f"{window}", f"{guidance:g}", f"{top_k}", f"{count.mean():g}"], []
        for lookahead in asked.lookahead:
            ahead = sampling.model_copy(update={"lookahead": lookahead})
            codes, count = generated(generator, window, ahead, images=asked.images, batch=asked.batch)
            equal.append(int((codes == plain).flatten(1).all(1).sum()))
            cells.append(f"{count.mean():.1f} ± {count.std():.1f}")
        rows.append([*cells, f"{min(equal):,} of {asked.images:,}"])
        print(rows[-1], flush=True)
    return rows


def drafts_table(generator: Generator, asked: argparse.Namespace) -> list[list[str]]:
    rows = [["window", "lookahead", *RULES]]
    for window, lookahead in product(asked.windows, asked.lookahead):
        cells = [f"{window}", f"{lookahead}"]
        for rule in RULES:
            sampling = SamplingParams(guidance=asked.guidance[0], top_k=asked.top_k[0], lookahead=lookahead)
            _, count = generated(generator, window, sampling, images=asked.images, batch=asked.batch, rule=rule)
            cells.append(f"{count.mean():.1f}")
        rows.append(cells)
        print(rows[-1], flush=True)
    return rows


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="run folder, checkpoint or export of a class-conditional model")
    parser.add_argument("--drafts", action="store_true", help="compare drafts, with the first guidance and top-k")
    parser.add_argument("--windows", type=integers, help="otherwise next-token alone")
    parser.add_argument("--lookahead", type=integers, default=[16, 32, 64])
    parser.add_argument("--guidance", type=numbers, default=[1.0])
    parser.add_argument("--top-k", type=integers, default=[0])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    asked = parser.parse_args(arguments)
    generator = load(asked.checkpoint)
    asked.windows = asked.windows or [generator.recipe.model.raster.row_length]
    rows = (drafts_table if asked.drafts else passes_table)(generator, asked)
    print("\n".join(["", *aligned(rows, ">"), ""]))
    print("\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]))


if __name__ == "__main__":
    main()
