"""Plans of images whose preview is generated first, against the plans of the two grids joined by hand."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import grids, windows

from zipar_train import Grid, Plan
from zipar_train.plan.masks import dense
from zipar_train.plan.table import NEVER, PROMPT


def joined(first: Plan, second: Plan) -> list[list[int]]:
    """The slots of one plan, then those of another, whose prompt is the last code of the first."""
    codes, passes = first.grid.num_codes, first.passes
    slots = np.stack([first.step, first.source, first.position, first.target, first.expires], 1).tolist()
    for step, source, position, target, expires in zip(
        second.step, second.source, second.position, second.target, second.expires, strict=True
    ):
        fed = codes - 1 if source == PROMPT else source + codes
        wanted = target if target < 0 else target + codes
        slots.append([step + passes, fed, position + codes, wanted, expires if expires == NEVER else expires + passes])
    return slots


@given(
    grid=grids(6, 6, kinds=("preview",)),
    stand_in=st.sampled_from(["nearest", "completed", "released"]),
    first_row=st.sampled_from(["complete", "overlapping"]),
    prompt=st.integers(1, 4),
    data=st.data(),
)
@settings(max_examples=200)
def test_a_plan_with_a_preview_is_the_plans_of_both_grids_one_after_the_other(grid, stand_in, first_row, prompt, data):
    rule, sizes = {"stand_in": stand_in, "first_row": first_row}, data.draw(windows(grid))
    plan = Plan.zipar(grid, **sizes, **rule, prompt=prompt)
    preview, image = grid.preview, Grid(grid.height, grid.width)
    inner = min(sizes.get("preview_window", sizes["window"]), preview.width)
    inner = preview.width if sizes["window"] == grid.row_length else inner  # next-token
    first = Plan.zipar(preview, window=inner, **rule, prompt=prompt)
    second = Plan.zipar(image, window=min(sizes["window"], image.width), **rule)
    columns = np.stack([plan.step, plan.source, plan.position, plan.target, plan.expires], 1)
    assert columns.tolist() == joined(first, second)
    assert plan.passes == first.passes + second.passes


def test_passes_of_glm_image_at_1024_pixels():
    grid = Grid(32, 32, preview=Grid(16, 16))
    assert [Plan.zipar(grid, window=window).passes for window in (32, 4, 2)] == [1280, 272, 184]
    assert Plan.raster(grid).passes == 1280
    assert Plan.zipar(grid, window=4, preview_window=16).passes == 256 + 184
    assert Plan.zipar(grid, window=4, preview_window=20).passes == 256 + 184  # at most a row
    assert Plan.zipar(grid, window=32, preview_window=2).passes == 1280  # next-token


def test_the_image_sees_the_whole_preview():
    grid = Grid(3, 4, preview=Grid(2, 2))
    plan, visible = Plan.zipar(grid, window=1), dense(Plan.zipar(grid, window=1))[0, 0]
    real = np.flatnonzero((plan.source >= 0) & (plan.source < 4) & (plan.expires == NEVER))
    for code in range(4, 16):
        assert visible[plan.predicting()[code], real].all()


def test_codes_split_into_images():
    grid, codes = Grid(2, 3, preview=Grid(1, 2)), np.arange(8)
    preview, image = grid.images(codes)
    assert preview.tolist() == [[0, 1]]
    assert image.tolist() == [[2, 3, 4], [5, 6, 7]]
    assert [row.first for row in grid.rows] == [0, 2, 5]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grid(2, 2, row_end=True, preview=Grid(1, 1)), "a preview does not go with row ends"),
        (lambda: Grid(2, 2, preview=Grid(1, 1, row_end=True)), "a preview does not go with row ends"),
        (lambda: Plan.zipar(Grid(2, 4, preview=Grid(1, 2)), window=5), "window 5 does not fit a row of 4"),
        (lambda: Plan.zipar(Grid(2, 4, preview=Grid(1, 2)), window=3, preview_window=0), "must be at least 1"),
        (lambda: Plan.zipar(Grid(2, 4), window=3, preview_window=1), "a grid of 2 x 4 codes has no preview"),
    ],
)
def test_what_does_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_command_prints_both_maps_and_writes_them(run, tmp_path):
    given = ("--recipe", "glm-image", "--window", "4", "--set", "zipar.preview_window=2", "--no-memory")
    status, out, err = run("plan", *given, "--json", tmp_path / "plan.json", "--png", tmp_path / "plan.png")
    assert status == 0, err
    content = json.loads((tmp_path / "plan.json").read_text())
    grid = Grid(32, 32, preview=Grid(16, 16))
    preview, image = grid.images(Plan.zipar(grid, window=4, preview_window=2).generated_at())
    assert content["grid"] == [32, 32] and content["preview"] == [16, 16]
    assert content["map"]["generated_at"] == image.tolist()
    assert content["map"]["preview_generated_at"] == preview.tolist()
    printed = [[int(cell) for cell in line.split()] for line in out.splitlines() if line[:4].strip().isdecimal()]
    assert [row for row in printed if len(row) in (16, 32)] == [*preview.tolist(), *image.tolist()]
