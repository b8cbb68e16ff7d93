"""The teacher of distillation: the family with the weights that training started from."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from zipar_train.models import lora
from zipar_train.models.family import Family


class Teacher:
    """Frozen family beside the module; it is not saved, trained, or copied with the module by weight averaging."""

    def __init__(self, family: Family):
        family.model.requires_grad_(False)
        self.family = family

    def __deepcopy__(self, memo: Any) -> "Teacher":
        return self


@contextmanager
def original_weights(family: Family, teacher: Teacher | None) -> Iterator[Family]:
    """Yield the family with the weights that training started from: the teacher, or the family without adapters."""
    if teacher is not None:
        yield teacher.family
    else:
        with lora.without(family.model):
            yield family
