"""What becomes of a step that would harm the weights: a gradient that is not finite, a loss that leaps."""

from collections import deque
from collections.abc import Sequence
from math import inf, isfinite
from statistics import median
from typing import Any, Literal

Policy = Literal["stop", "skip"]
RECENT = 100  # losses that a leap is told against
LEAST = 20  # of them


class Guard:
    """Looks at each step before the optimizer takes it.

    Args:
        gradients: what to do about a gradient or loss that is not finite: stop, or skip the step.
        spike: a loss of so many times the median of the last 100 is a leap; None: none is.
        on_spike: what to do about one.
        most: skipped steps in a row after which the run stops all the same: it learns nothing any more.
    """

    def __init__(
        self, *, gradients: Policy = "stop", spike: float | None = None, on_spike: Policy = "stop", most: int = 100
    ):
        self.gradients, self.spike, self.on_spike, self.most = gradients, spike, on_spike, most
        self.losses: deque[float] = deque(maxlen=RECENT)
        self.skipped = self.in_a_row = 0

    def verdict(self, loss: float, norm: float) -> tuple[Policy, str] | None:
        """What to do about a step, and why; None: it is taken.

        Args:
            loss: of the step, over all devices, nats.
            norm: of its gradient.
        """
        what: tuple[Policy, str] | None = None
        usual = median(self.losses) if len(self.losses) >= LEAST else inf
        if not (isfinite(loss) and isfinite(norm)):
            what = self.gradients, f"loss {loss:.4g}, gradient norm {norm:.4g}: not finite"
        elif self.spike is not None and loss > self.spike * usual:
            what = self.on_spike, f"loss {loss:.4g}, where the median of the last {len(self.losses)} is {usual:.4g}"
        if what is None:
            self.losses.append(loss)
            self.in_a_row = 0
        elif what[0] == "skip":
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            if self.in_a_row > self.most:
                return "stop", f"{what[1]}, after {self.most} skipped steps in a row"
        return what

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses), "skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses = deque(state["losses"], maxlen=RECENT)
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


def format_keys(keys: Sequence[str], *, most: int = 8) -> str:
    """The samples of a batch, in words."""
    rest = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + rest if keys else "unknown to their loader"
