"""What generators prompted by captions as token ids share: prompts, and checkpoints in transformers' layout."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from zipar_train.models.files import find
from zipar_train.models.llamagen.family import LlamaGen
from zipar_train.models.pretrained import pretrained
from zipar_train.models.token_prompts import Prompter, Prompts


class Captioned(LlamaGen, ABC):
    """A `Family` whose model is a Llama taken out of a larger one of transformers.

    whole: the larger model's class. hub: where it is published.
    """

    whole: type[PreTrainedModel]
    hub: str
    words: Prompter

    @abstractmethod
    def own(self, name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        """A published tensor's name in ours, and a view of the rows that draw; None: it draws nothing."""

    @abstractmethod
    def is_hf_checkpoint(self, state: dict[str, Tensor]) -> bool:
        """Whether tensors have the larger model's names and shapes, not ours."""

    def renamed(self, state: dict[str, Tensor]) -> dict[str, Tensor] | None:
        if not self.is_hf_checkpoint(state):
            return None
        return dict(found for name, tensor in state.items() if (found := self.own(name, tensor)))

    def published(self, source: str | None) -> PreTrainedModel:
        folder = find(source or "")
        if source is None or not (folder / "config.json").is_file():
            raise ValueError(
                f"model.weights = {source}: {self.whole.__name__} has parts that draw nothing, taken from the "
                f"published checkpoint. Set model.weights to its folder, or to {self.hub}"
            )
        ours = self.model.state_dict()
        whole = self.load_whole(folder)
        for name, tensor in whole.state_dict().items():
            if found := self.own(name, tensor):
                found[1].copy_(ours[found[0]])
        return whole

    def load_whole(self, folder: Path) -> PreTrainedModel:
        """The published model of a folder, in our dtype."""
        what = f"no {self.whole.__name__}"
        return pretrained(self.whole, folder, key="model.weights", what=what, dtype=self.model.dtype)

    def check(self, condition: Any) -> Prompts:
        return self.words.check(condition, self.model.device)

    def prompt(self, condition: Prompts) -> Tensor:
        return self.model.get_input_embeddings()(condition.ids)

    def padding(self, condition: Prompts) -> Tensor | None:
        return condition.padding
