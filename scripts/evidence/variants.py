"""Variants of the one epoch that docs/evidence.md compares. The product has the best of them; they differ from it here.

    python scripts/evidence/variants.py '{"order": "narrow last"}' fit --recipe mnist --set run_dir=runs/narrow-last

The first argument is JSON with arguments of `Variant`; the rest is a `zipar-train` command.
"""

import json
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from zipar_train.__main__ import main
from zipar_train.models.family import target_hidden_states
from zipar_train.plan.masks import dense
from zipar_train.plan.table import NEVER, Plan
from zipar_train.training import trainer
from zipar_train.training.module import ZipARModule

ORDERS = ("mixed", "narrow first", "narrow last")


def missing_context(plan: Plan) -> Tensor:
    """Return the number of earlier codes that each code is generated without, int64 (N,)."""
    mask, codes = dense(plan)[0, 0].numpy(), plan.grid.num_codes
    fed = (plan.source >= 0) & (plan.expires == NEVER)  # without stand-ins
    predicting = np.argsort(plan.target)[-codes:]  # the slot that predicts each code
    seen = np.zeros((codes, codes), dtype=bool)
    seen[:, plan.source[fed]] = mask[np.ix_(predicting, fed)]
    return torch.from_numpy(np.arange(codes) - np.tril(seen, -1).sum(1))


class Variant(ZipARModule):
    """The training module with one thing changed.

    Args:
        order: "narrow first": the shares of the narrower half of the mix fall linearly during the epoch from twice the
            usual to none, and those of the other half rise; "narrow last": the reverse.
        context: Each code's loss has the weight 1 + context * (codes missing / most that any code misses under the
            narrowest window), divided by the mean weight of its step.
        shares: The teacher's share of the loss by window, in place of `distill`.
        own: The teacher of narrower windows is the model itself under the widest window in the same step, not the
            original model.
        layer_decay: The learning rate of each layer is that of the layer above times this number; the embedding's is
            that of the lowest layer.
        **more: Arguments of `ZipARModule`.
    """

    def __init__(
        self,
        *args: Any,
        order: str = "mixed",
        context: float = 0.0,
        shares: Mapping[str, float] | None = None,
        own: bool = False,
        layer_decay: float = 1.0,
        **more: Any,
    ):
        super().__init__(*args, **more)
        assert order in ORDERS, f"order {order!r}: use {', '.join(ORDERS)}"
        self.order, self.own, self.layer_decay = order, own, layer_decay
        self.shares = {int(window): share for window, share in (shares or {}).items()}
        missing = {window: missing_context(self.plans.plan(window)).float() for window in self.windows}
        most = max(one.max() for one in missing.values()).clamp(min=1)
        weights = {window: 1 + context * one / most for window, one in missing.items()}
        self.weights = {window: one / one.mean() for window, one in weights.items()} if context else {}

    def sample_window(self, epoch: int, step: int) -> int:
        window = self.sampled(epoch, (step + 0.5) / self.trainer.num_training_batches, step)
        self.distill = self.shares.get(window, self.distill)
        return window

    def sampled(self, epoch: int, done: float, step: int) -> int:
        """Return the window of a step; `done` is the part of the epoch before it."""
        kept = self.windows
        narrower = sorted(kept)[: len(kept) // 2]
        factor = {"mixed": 1.0, "narrow first": 2 * (1 - done), "narrow last": 2 * done}[self.order]
        self.windows = {w: share * (factor if w in narrower else 2 - factor) for w, share in kept.items()}
        try:
            return super().sample_window(epoch, step)
        finally:
            self.windows = kept

    def losses(self, batch: Any, condition: Any, window: int, *, with_teacher: bool = False) -> Any:
        widest = self.family.grid.row_length
        own = self.own and with_teacher and window != widest
        if not self.training or (window not in self.weights and not own):
            return super().losses(batch, condition, window, with_teacher=with_teacher)

        def log_probabilities(family: Any, width: int) -> Tensor:
            plan = self.plans.plan(width)
            mask = self.plans.mask(plan, self.device)
            return family.head(target_hidden_states(family, plan, batch.codes, condition, mask)).float().log_softmax(-1)

        found = log_probabilities(self.family, window)
        weights = self.weights.get(window, torch.ones(batch.codes.shape[1])).to(found.device)
        nll = (nll_loss(found.transpose(1, 2), batch.codes, reduction="none") * weights).mean()
        if not with_teacher:
            return nll, None
        with torch.no_grad():
            family = self.family if own else self.teacher.family  # type: ignore[union-attr]
            wanted = log_probabilities(family, widest)
        return nll, ((wanted.exp() * (wanted - found)).sum(-1) * weights).mean()

    def optimizer(self) -> torch.optim.AdamW:
        optimizer = super().optimizer()
        if self.layer_decay == 1:
            return optimizer
        layers, groups = self.model.model.layers, []
        depth = {p: number for number, layer in enumerate(layers) for p in layer.parameters()}
        low = set(self.model.get_input_embeddings().parameters())
        for group in optimizer.param_groups:
            rest = {key: value for key, value in group.items() if key != "params"}
            for parameter in group["params"]:
                at = depth.get(parameter, 0 if parameter in low else len(layers))
                groups.append({**rest, "params": [parameter], "lr": self.lr * self.layer_decay ** (len(layers) - at)})
        return torch.optim.AdamW(groups, betas=self.betas)


if __name__ == "__main__":
    options = json.loads(sys.argv.pop(1))
    trainer.ZipARModule = partial(Variant, **options)  # type: ignore[misc, assignment]
    main()
