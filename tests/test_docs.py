"""What the documentation shows is run."""

import re
from pathlib import Path

import torch

from zipar_train.decoding.adaptive import AdaptiveDecoder

DOCS = Path(__file__).parent.parent / "docs"


def test_a_model_of_ones_own_draws_what_it_was_taught_with():
    """The page's lines as they stand; then the theorem for their family."""
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "models.md").read_text(), re.DOTALL)
    names: dict = {"__name__": "mine"}
    exec(compile(code, "docs/models.md", "exec"), names)
    assert names["codes"].shape == (2, 4, 5)
    assert names["logits"].shape == (2, 20, 16)
    family, plan = names["family"], names["plan"]
    family.model.double()
    seen = torch.zeros(2, 20, 16, dtype=torch.float64)

    def observe(targets, logits):
        real = targets < 20
        seen[:, targets[real]] = logits[:, real]

    draw = names["Draw"]()
    labels = torch.tensor([1, 0])
    codes = names["Decoder"](family, plan)(labels, torch.rand(2, 20), draw, observe=observe).flatten(1)
    with torch.no_grad():
        forced = names["teacher_forced"](family, plan, codes, labels, names["dense"](plan))
    assert (forced - seen).abs().max() < 1e-10
    adaptive = AdaptiveDecoder(family, window=1)
    assert adaptive([0, 1, 0], torch.rand(3, adaptive.numbers), draw).shape == (3, 4, 5)
    assert 20 >= max(adaptive.passes(3)) > adaptive.plan.passes
