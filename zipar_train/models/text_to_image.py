"""The base class of generators that are prompted by captions as token ids: prompts and transformers checkpoints."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from zipar_train.models.conditions import Condition, ConditionInput
from zipar_train.models.files import find
from zipar_train.models.llama_family import LlamaFamily
from zipar_train.models.pretrained import pretrained
from zipar_train.models.token_prompts import Prompter, Prompts
from zipar_train.recipe.model import Model

Own = TypeVar("Own", bound="TextToImage")


class TextToImage(LlamaFamily, ABC):
    """A `Family` whose model is a Llama that is part of a larger transformers model.

    Attributes:
        hf_class: Class of the larger model.
        hub: Hugging Face hub id where it is published, with a colon and, if it is in one, the folder.
        prompter: Converts captions to prompts.
    """

    hf_class: type[PreTrainedModel]
    hub: str
    prompter: Prompter

    @abstractmethod
    def build_prompter(self, model: Model) -> Prompter:
        """Return the prompter of a recipe's section `model`, whose grid may be part of the prompt."""

    def on(self: Own, sides: Sequence[int]) -> Own:
        other = super().on(sides)
        other.prompter = other.build_prompter(other.section)
        return other

    @abstractmethod
    def map_tensor(self, name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
        """Map a published tensor to its name in `model` and a view of the rows for codes; None if it is not used."""

    @abstractmethod
    def is_hf_checkpoint(self, state: dict[str, Tensor]) -> bool:
        """Return True if tensors have the names and shapes of the larger model."""

    def renamed(self, state: dict[str, Tensor]) -> dict[str, Tensor] | None:
        if not self.is_hf_checkpoint(state):
            return None
        return dict(found for name, tensor in state.items() if (found := self.map_tensor(name, tensor)))

    def base_folder(self, source: str | None) -> Path:
        """Return the folder of the checkpoint that provides the parts that are not used for images.

        Raises:
            ValueError: If `source` is not the folder of a checkpoint.
        """
        folder = find(source or "")
        if source is None or not (folder / "config.json").is_file():
            raise ValueError(
                f"model.weights = {source}: {self.hf_class.__name__} has parts that are not used for images, taken "
                f"from the published checkpoint. Set model.weights to its folder, or to {self.hub}"
            )
        return folder

    def published(self, source: str | None) -> PreTrainedModel:
        ours = self.model.state_dict()
        whole = self.load_hf_model(self.base_folder(source))
        for name, tensor in whole.state_dict().items():
            if found := self.map_tensor(name, tensor):
                found[1].copy_(ours[found[0]])
        return whole

    def load_hf_model(self, folder: Path) -> PreTrainedModel:
        """Load the larger model from a folder, in the dtype of `model`."""
        what = f"no {self.hf_class.__name__}"
        return pretrained(self.hf_class, folder, key="model.weights", what=what, dtype=self.model.dtype)

    def check(self, condition: ConditionInput) -> Prompts:
        return self.prompter.check(condition, self.model.device)

    def prompt(self, condition: Condition) -> Tensor:
        assert isinstance(condition, Prompts)
        return self.model.get_input_embeddings()(condition.ids)

    def padding(self, condition: Condition) -> Tensor | None:
        assert isinstance(condition, Prompts)
        return condition.padding
