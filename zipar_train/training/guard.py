"""Step guard: the policy for steps that would harm the weights, with non-finite gradients or loss spikes."""

from collections import deque
from collections.abc import Sequence
from math import inf, isfinite
from statistics import median
from typing import Any, Literal

Policy = Literal["stop", "skip"]
RECENT = 100  # losses in the spike baseline
LEAST = 20  # losses before a spike can be detected
STOP_REMEDY = (
    "The weights have not taken it, and the last checkpoint is older. Lower optim.lr, fix the data, or let such steps "
    "be left out: health.on_nonfinite, health.on_spike = skip"
)


class Guard:
    """Check of each training step before the optimizer takes it.

    Args:
        gradients: Policy for a gradient or loss that is not finite: "stop" the run, or "skip" the step.
        spike: A loss above this multiple of the median of the last 100 losses is a spike. None: no check.
        on_spike: Policy for a spike.
        most: Number of consecutive skipped steps after which the run stops anyway.
    """

    def __init__(
        self, *, gradients: Policy = "stop", spike: float | None = None, on_spike: Policy = "stop", most: int = 100
    ):
        self.gradients, self.spike, self.on_spike, self.most = gradients, spike, on_spike, most
        self.losses: deque[float] = deque(maxlen=RECENT)
        self.skipped = self.in_a_row = 0

    def verdict(self, loss: float, norm: float) -> tuple[Policy, str] | None:
        """Return the policy for a step and the reason, or None if the step is fine.

        Args:
            loss: Loss of the step over all devices, nats.
            norm: Norm of its gradient.
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
    """Return the keys of a batch's samples as text, at most `most` of them."""
    rest = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + rest if keys else "unknown to their loader"
