"""Models and tokenizers of transformers, whole or refused in one message."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from zipar_train.io.errors import truncate
from zipar_train.models.filling import check_numbers


def pretrained(kind: Any, source: str | Path, *, key: str, what: str, **options: Any) -> Any:
    """What `kind.from_pretrained(source)` gives; of a model, with every tensor from the checkpoint.

    A folder that was cut short while it was downloaded makes transformers, safetensors and tokenizers raise errors of
    a dozen classes, or go on with random numbers in place of missing tensors.

    Args:
        kind: a class of transformers: a model's, a tokenizer's, a configuration's or a processor's.
        source: folder or hub id.
        key: the recipe's key that names it, for errors.
        what: what it should be, for errors: "no T5 encoder".

    Raises:
        ValueError: naming the key, the source and the reason.
    """
    is_model = isinstance(kind, type) and issubclass(kind, PreTrainedModel)
    more = {"output_loading_info": True} if is_model else {"trust_remote_code": False}
    try:
        loaded = kind.from_pretrained(source, **more, **options)
        if not is_model:
            return loaded
        model, info = loaded
        for problem, title in (("missing_keys", "it lacks"), ("mismatched_keys", "of another shape is")):
            if names := sorted(map(str, info.get(problem) or ())):
                raise ValueError(f"{title} {names[0]}" + f" and {len(names) - 1} more" * (len(names) > 1))
        state = model.state_dict()
        check_numbers(state, state, where=source)
        return model
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers' panics are no Exception
        reason = truncate((str(error).strip().splitlines() or [""])[0], length=300)
        told = reason if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {reason}"
        raise ValueError(
            f"{key} = {source}: {what} can be loaded ({told}). Give the hub id or the folder of a published "
            "checkpoint, and download it again if it is cut short"
        ) from error
