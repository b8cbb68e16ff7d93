"""The plan against the paper's counts, against a simulator of the released decoder, and against its own promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import STAND_INS, plans
from released import simulate

from zipar_train import Grid, Plan
from zipar_train.plan.table import NEVER, PROMPT, ROW_END


def test_passes_of_the_papers_tables():
    assert [Plan.zipar(Grid(24, 24), window=w).passes for w in (24, 16, 12, 8, 4, 2, 1)] == [
        576,
        400,
        312,
        224,
        136,
        92,
        70,
    ]
    assert [Plan.zipar(Grid(32, 32), window=w).passes for w in (32, 16, 12, 8, 4)] == [1024, 544, 424, 304, 184]
    assert Plan.zipar(Grid(48, 48, row_end=True), window=16).passes == 753
    assert Plan.zipar(Grid(90, 90, row_end=True), window=8).passes == 713


def test_widest_pass_of_the_released_code():
    assert [Plan.zipar(Grid(24, 24), window=w).width for w in (16, 12, 8, 4, 2)] == [2, 3, 4, 7, 13]
    assert Plan.zipar(Grid(24, 24), window=8, prompt=120).width == 4


def test_slots_do_not_depend_on_the_window():
    assert {len(Plan.zipar(Grid(24, 24), window=w)) for w in range(1, 24)} == {598}
    assert len(Plan.raster(Grid(24, 24))) == 576


def test_raster_is_the_widest_window_and_plain_causal():
    for grid in (Grid(5, 7), Grid(5, 7, row_end=True), Grid(1, 1)):
        plan = Plan.raster(grid, prompt=3)
        assert plan.passes == grid.num_codes
        assert (plan.expires == NEVER).all()
        assert (np.diff(plan.position) == 1).all()
        assert (plan.visible() == np.tri(len(plan), dtype=bool)).all()


@pytest.mark.parametrize(("size", "window"), [(24, 16), (24, 8), (24, 5), (16, 2), (9, 4), (7, 6), (6, 3), (5, 2)])
def test_released_plan_is_the_released_decoder(size, window):
    """Pass for pass: what is fed where, what is drawn from it, and every key that every query sees."""
    plan, forwards = Plan.zipar(Grid(size, size), window=window, stand_in="released"), simulate(size, window)
    assert plan.passes == len(forwards)
    visible = plan.visible()

    def feeds(slot):
        return ("prompt", 0) if plan.source[slot] == PROMPT else ("code", int(plan.source[slot]))

    for step, queries in enumerate(forwards):
        slots = np.flatnonzero(plan.step == step)
        assert len(slots) == len(queries)
        by_position = {int(plan.position[slot]): slot for slot in slots}
        for query in queries:
            slot = by_position[query.slot]
            assert feeds(slot) == query.feeds
            assert plan.target[slot] == (-1 if query.draws is None else query.draws)
            ours = {(int(plan.position[k]), feeds(k), int(plan.step[k])) for k in np.flatnonzero(visible[slot])}
            assert ours == query.sees


@given(plans())
@settings(max_examples=150)
def test_every_code_is_drawn_once_and_before_it_is_fed(plan):
    codes = plan.grid.num_codes
    assert sorted(plan.target[plan.target >= 0]) == list(range(codes))
    drawn = plan.generated_at().reshape(-1)
    fed = plan.source >= 0
    assert (drawn[plan.source[fed]] < plan.step[fed]).all()
    assert plan.step[plan.target == drawn.argmax()].max() == plan.passes - 1
    order = list(zip(plan.step.tolist(), plan.position.tolist(), strict=True))
    assert order == sorted(set(order))


@given(plans(row_ends=(False,), first_rows=("complete",)))
@settings(max_examples=100)
def test_a_row_opens_when_window_codes_of_the_row_above_exist(plan):
    (drawn,) = plan.grid.images(plan.generated_at())
    height, width = drawn.shape
    assert plan.passes == (2 * width + (height - 2) * plan.window if height > 1 else width)
    for row in range(2, height):
        assert drawn[row, 0] == drawn[row - 1, plan.window - 1] + 1
    assert (np.diff(drawn, axis=1) == 1).all()


@given(plans(row_ends=(True,)))
@settings(max_examples=100)
def test_row_ends_open_rows_and_are_fed_once(plan):
    grid, ends = plan.grid, plan.source == ROW_END
    assert plan.passes == grid.width + (grid.height - 1) * (plan.window - 1)
    assert ends.sum() == grid.height - 1
    assert (plan.expires == NEVER).all()
    assert (plan.target[ends] % grid.width == 0).all()


@given(plans(row_ends=(False,), stand_ins=("nearest",)))
@settings(max_examples=100)
def test_nothing_drawn_is_nearer_than_the_nearest_stand_in(plan):
    drawn, width = plan.generated_at(), plan.grid.width
    for slot in np.flatnonzero(plan.expires != NEVER):
        row = plan.position[slot] // width

        def distance(code, row=row):
            return (code // width - row) ** 2 + (code % width - (width - 1)) ** 2

        there = [int(code) for code in np.flatnonzero(drawn.reshape(-1) < plan.step[slot])]
        best = min(map(distance, there))
        assert plan.source[slot] == max(code for code in there if distance(code) == best)  # ties: the lower row
        real = np.flatnonzero((plan.position == plan.position[slot]) & (plan.expires == NEVER))
        assert plan.expires[slot] == plan.step[real[0]]
        assert plan.target[real[0]] == -1


@given(plans(row_ends=(False,)), st.sampled_from(STAND_INS))
@settings(max_examples=150)
def test_every_other_stand_in_is_the_one_it_is_said_to_be(plan, rule):
    """From the table of when codes are drawn, for each stand-in anew."""
    height, width = plan.grid.height, plan.grid.width
    (drawn,) = plan.grid.images(plan.generated_at())
    opens = drawn[:, 0].tolist()
    again = Plan.opened(plan.grid, opens, window=1, stand_in=rule)
    for slot in np.flatnonzero(again.expires != NEVER):
        row, there = again.position[slot] // width, drawn < again.step[slot]
        latest = [int(there[r].sum()) - 1 for r in range(height)]
        whole = [r for r in range(row + 1) if latest[r] == width - 1]
        expected = {
            "completed": (whole[-1] if whole else 0, width - 1 if whole else latest[0]),
            "released": (row - 1, latest[row - 1]) if row else (0, latest[0]),
        }
        if rule in expected:
            assert divmod(int(again.source[slot]), width) == expected[rule]


@given(plans(row_ends=(False,), first_rows=("overlapping",)))
@settings(max_examples=100)
def test_rows_that_overlap_from_the_first_on(plan):
    height, width = plan.grid.height, plan.grid.width
    assert plan.passes == width + (height - 1) * plan.window
    if height > 1 and plan.window < width:
        assert (plan.expires != NEVER).sum() == height - 1


@given(plans())
@settings(max_examples=100)
def test_each_position_shows_one_key_at_a_time(plan):
    visible = plan.visible()
    for query in range(len(plan)):
        seen = plan.position[visible[query]]
        assert len(seen) == len(set(seen.tolist()))
        assert visible[query, query]


def test_stand_ins_of_the_released_code_by_hand():
    """24 columns, window 8: the row that opens as row 3 copies x[1, 15]; row 2 copies x[0, 23]."""
    plan = Plan.zipar(Grid(24, 24), window=8, stand_in="released")
    sources = [divmod(int(code), 24) for code in plan.source[plan.expires != NEVER]]
    assert sources[:3] == [(0, 23), (1, 15), (2, 15)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plan.zipar(Grid(24, 24), window=25), "window 25 does not fit a row of 24 tokens: use 1 .. 24"),
        (lambda: Plan.zipar(Grid(24, 24), window=0), "window 0"),
        (lambda: Plan.zipar(Grid(4, 4, row_end=True), window=6), "use 1 .. 5"),
        (lambda: Plan.zipar(Grid(4, 4), window=2, stand_in="last"), "use 'completed', 'nearest', 'released'"),
        (lambda: Plan.zipar(Grid(4, 4), window=2, first_row="last"), "use 'complete', 'overlapping'"),
        (lambda: Plan.zipar(Grid(4, 4), window=2, prompt=0), "prompt 0"),
        (lambda: Grid(0, 4), "not 0 x 4"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is checked below
        make()
    assert message in str(error.value)


def test_a_plan_cannot_be_changed():
    with pytest.raises(ValueError, match="read-only"):
        Plan.raster(Grid(2, 2)).step[0] = 7
