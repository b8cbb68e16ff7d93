"""The plans and masks of a training run, by grid and window."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from zipar_train.models.family import Family
from zipar_train.plan.grid import Sides
from zipar_train.plan.masks import Mask, block, dense
from zipar_train.plan.table import Plan

Attention = Literal["sdpa", "flex_attention"]


class GridPlans:
    """The plans of several windows on the family's grid, and on further grids.

    On a further grid, a window is at most a row. The widest window of the family's grid means next-token on every grid.

    Args:
        family: The generator, on its own grid.
        windows: The windows.
        rule: Arguments of `Plan.zipar` other than the window.
        other_grids: Rows and columns of the further grids.
        attention: Form of the masks: dense for "sdpa", a BlockMask for "flex_attention".

    Raises:
        ValueError: If a window does not fit the family's grid.
    """

    def __init__(
        self,
        family: Family,
        *,
        windows: Iterable[int],
        rule: Mapping[str, Any],
        other_grids: Sequence[Sequence[int]] = (),
        attention: Attention = "sdpa",
    ):
        self.own = family.grid.sides
        self.families = {self.own: family} | {
            (rows, columns): family.on((rows, columns)) for rows, columns in other_grids
        }
        self.attention = attention
        self.plans = {
            (sides, window): Plan.zipar(
                each.grid, window=self._window(window, each), prompt=family.prompt_length, **rule
            )
            for sides, each in self.families.items()
            for window in windows
        }
        self.masks: dict[tuple[Plan, torch.device], Mask] = {}

    def _window(self, window: int, family: Family) -> int:
        """Return the window on a family's grid that stands for a window on the own grid."""
        own, row = self.family(), family.grid.row_length
        if family is own:
            return window
        return row if window == own.grid.row_length else min(window, row)

    def family(self, sides: Sides | None = None) -> Family:
        """Return the family on the grid with these rows and columns; None: its own grid."""
        return self.families[sides or self.own]

    def plan(self, window: int, sides: Sides | None = None) -> Plan:
        """Return the plan of a window on the grid with these rows and columns; None: the family's own grid."""
        return self.plans[sides or self.own, window]

    def mask(self, plan: Plan, device: torch.device) -> Mask:
        """Return the mask of a plan on a device; it is cached."""
        if (plan, device) not in self.masks:
            make = block if self.attention == "flex_attention" else dense
            self.masks[plan, device] = make(plan, device=device)
        return self.masks[plan, device]
