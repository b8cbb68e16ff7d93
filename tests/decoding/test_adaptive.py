"""Adaptive windows: the theorem along the plan that came about, and the rejection rule against exact probabilities."""

import pytest
import torch
from families import StockLlama, llamagen, llamagen_t2i
from hypothesis import given, settings
from hypothesis import strategies as st
from noise import pick, uniform
from plans import grids, windows

from zipar_train import Grid, Plan
from zipar_train.decoding.adaptive.decoder import AdaptiveDecoder
from zipar_train.decoding.decoder import Decoder
from zipar_train.decoding.sampling import accept_or_resample, code_seeds
from zipar_train.plan.masks import dense, mask_padding
from zipar_train.plan.table import ROW_END
from zipar_train.recipe.schema import SamplingParams


def drawn_and_seen(decoder, sampling, labels, images=None):
    """Codes (B, N), and of each image the logits (1 or 2, S, V) of every slot of its plan but the prompt's first."""
    images, seen = images or len(labels), {}

    def observe(places, logits):
        for image in range(images):
            for column, place in enumerate(places[image].tolist()):
                family = decoder.family
                if place < family.prompt_length + 2 * family.grid.num_codes + family.grid.height:
                    seen[image, place] = logits[image::images, column].clone()

    numbers = code_seeds(list(range(images)), decoder.numbers, seed=0)
    codes = decoder(labels, numbers, sampling, observe=observe).flatten(1)
    told = [
        torch.stack([seen[image, place] for place in range(plan.prompt - 1, len(plan))], dim=1)
        for image, plan in enumerate(decoder.plans(images))
    ]
    return codes, told


def forced(family, plan, codes, condition):
    """Logits (1, S, V) of every slot in one pass over an image."""
    source = torch.tensor(plan.source[plan.prompt :])
    tokens = torch.where(source >= 0, codes[source.clamp(min=0)], ROW_END)[None]
    embeddings = torch.cat([family.prompt(condition), family.embed(tokens)], dim=1)
    mask = dense(plan)
    if (padding := family.padding(condition)) is not None:
        mask = mask_padding(mask, padding)
    return family.head(family.hidden(embeddings, torch.tensor(plan.position), mask))[:, plan.prompt - 1 :]


def check(family, sampling, **rule):
    decoder, labels = AdaptiveDecoder(family, **rule), torch.tensor([0, 2, 1])
    codes, seen = drawn_and_seen(decoder, sampling, labels)
    for image, plan in enumerate(decoder.plans(3)):
        one = labels[image : image + 1]
        sides = [one] if sampling.guidance == 1 else [one, family.drop(one, torch.ones(1, dtype=torch.bool))]
        with torch.no_grad():
            truth = torch.cat([forced(family, plan, codes[image], side) for side in sides])
        assert (truth - seen[image]).abs().max() <= 1e-10
    return decoder.plans(3)


@pytest.mark.slow
@given(
    grid=grids(5, 6),
    data=st.data(),
    prompt=st.integers(1, 3),
    stand_in=st.sampled_from(["nearest", "completed", "released"]),
    first_row=st.sampled_from(["complete", "overlapping"]),
    guidance=st.sampled_from([1.0, 2.5]),
)
@settings(max_examples=80)
def test_theorem(grid, data, prompt, stand_in, first_row, guidance):
    family = StockLlama(grid, prompt=prompt)
    rule = {**data.draw(windows(grid)), "stand_in": stand_in, "first_row": first_row}
    plans = check(family, SamplingParams(guidance=guidance), **rule)
    for plan in plans:
        assert sorted(plan.target[plan.target >= 0]) == list(range(grid.num_codes))
        assert plan.passes <= Plan.raster(grid).passes


@pytest.mark.parametrize("window", [1, 3])
def test_theorem_of_llamagen_and_of_padded_captions(window):
    check(llamagen(5, 6), SamplingParams(guidance=2.0), window=window)
    family = llamagen_t2i(4, 5)
    captions = family.check([torch.randn(n, 6) for n in (3, 1, 2)])
    decoder = AdaptiveDecoder(family, window=window)
    codes, seen = drawn_and_seen(decoder, SamplingParams(), captions, images=3)
    for image, plan in enumerate(decoder.plans(3)):
        one = type(captions)(*(part[image : image + 1] for part in captions))
        with torch.no_grad():
            assert (forced(family, plan, codes[image], one) - seen[image]).abs().max() <= 1e-10


def test_the_widest_window_is_next_token_and_the_same_codes():
    family, sampling, labels = llamagen(5, 6), SamplingParams(guidance=2.0), [0, 1, 2]
    numbers = code_seeds([0, 1, 2], 90, seed=3)
    plain = Decoder(family, Plan.raster(family.grid))(labels, numbers[:, :30], sampling)
    assert torch.equal(code_seeds([0, 1, 2], 30, seed=3), numbers[:, :30])
    assert torch.equal(AdaptiveDecoder(family, window=6)(labels, numbers, sampling), plain)


def simulated(family, label, numbers, window):
    """One image by the rule as its docstring has it, with no cache: every pass over everything anew."""
    grid, codes, prompt = family.grid, {}, torch.tensor([label])
    opens, tries, before, step = [0], [0] * grid.height, None, 0

    def law(target, opens, tries, step):
        """Of a code, from all that has been drawn, as a plan's pass would see it."""
        later = [max(step, opens[-1]) + k * grid.width + 1 for k in range(grid.height - len(opens))]
        starts = [*opens, *later]
        plan = Plan.opened(grid, starts, window=window, tries=tries)
        known = torch.tensor([codes.get(n, 0) for n in range(grid.num_codes)])
        with torch.no_grad():
            logits = forced(family, plan, known, prompt)[0]
        slots = [n for n in range(len(plan)) if plan.step[n] == step and plan.target[n] == target]
        return logits[slots[0]].softmax(-1)

    while len(codes) < grid.num_codes or len(opens) < grid.height:
        new = {}
        for row, opened in enumerate(opens):
            column = step - opened
            if column < grid.width:
                target = grid.rows[row].first + column
                if column or row == 0:
                    new[target] = pick(law(target, opens, tries, step), numbers[target])
        row = len(opens)
        if row < grid.height and step - opens[-1] >= (grid.width if row == 1 else window):
            target = grid.rows[row].first
            p = law(target, [*opens, step], tries, step)
            tried, whole = tries[row], step - opens[-1] == grid.width
            if not tried:
                code, settled = pick(p, numbers[target]), whole
            else:
                first = grid.num_codes + 2 * (target + tried - 1)
                kept = uniform(numbers[first], 1)[0] * before[codes[target]] < p[codes[target]]
                code = codes[target] if kept else pick((p - before).clamp(min=0), numbers[first + 1])
                settled = kept or whole
            new[target], before = code, p
            if settled:
                opens.append(step)
            else:
                tries[row] += 1
        codes |= new
        step += 1
    return [codes[n] for n in range(grid.num_codes)], step


def test_a_simulation_without_cache_draws_the_same_codes():
    family, passes = llamagen(4, 5), set()
    numbers = code_seeds(list(range(12)), 60, seed=1)
    for window in (1, 2):
        decoder = AdaptiveDecoder(family, window=window)
        drawn = decoder([k % 3 for k in range(12)], numbers, SamplingParams()).flatten(1)
        for image in range(12):
            codes, taken = simulated(family, image % 3, numbers[image].tolist(), window)
            assert drawn[image].tolist() == codes
            assert decoder.passes(12)[image] == taken == decoder.plans(12)[image].passes
            passes.add((window, taken))
    assert len(passes) > 2  # images go their own way, under one window too


def test_a_code_that_is_reconsidered_is_one_of_the_new_law():
    """Whatever it was drawn from; accepted as often as the two laws overlap."""
    before, now = torch.tensor([0.5, 0.3, 0.2, 0.0]), torch.tensor([0.1, 0.3, 0.25, 0.35])
    rng, many = torch.Generator().manual_seed(0), 200_000
    code = before.multinomial(many, replacement=True, generator=rng)
    numbers = code_seeds([0, 1], many, seed=0)
    accepted, after = accept_or_resample(code, before.expand(many, -1), now.expand(many, -1), *numbers)
    assert (after.bincount(minlength=4) / many - now).abs().max() < 0.005
    assert abs(accepted.float().mean() - torch.minimum(before, now).sum()) < 0.005
    assert accept_or_resample(code, now.expand(many, -1), now.expand(many, -1), *numbers)[0].all()


def test_a_window_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="window 7 does not fit a row of 6 tokens"):
        AdaptiveDecoder(llamagen(5, 6), window=7)


def test_looks_leave_no_slot_without_a_place(monkeypatch):
    """Nothing is ever accepted: as many tries as there can be."""
    from zipar_train.decoding.adaptive import decoder as adaptive

    def never(code, before, now, accept, anew):
        return torch.zeros_like(code, dtype=torch.bool), code

    monkeypatch.setattr(adaptive, "accept_or_resample", never)
    for grid in (Grid(4, 5), Grid(4, 5, row_end=True)):
        for window in (1, 2, 4):
            plans = check(StockLlama(grid, prompt=2), SamplingParams(), window=window)
            assert {plan.passes for plan in plans} == {20}
