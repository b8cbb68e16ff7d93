"""Types of the conditions that images are generated from."""

from collections.abc import Sequence

from torch import Tensor

from zipar_train.models.t5_features import Captions
from zipar_train.models.token_prompts import Prompts

Condition = Tensor | Captions | Prompts  # of B images, checked: labels int64 (B,), T5 features, or token ids
ConditionInput = Condition | Sequence[int] | Sequence[str] | Sequence[Tensor]  # or unchecked labels, captions, features
