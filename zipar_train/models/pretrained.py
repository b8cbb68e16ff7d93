"""Loading of transformers models and tokenizers, complete or with one clear error."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from zipar_train.io.errors import truncate
from zipar_train.models.filling import check_numbers


def pretrained(kind: Any, source: str | Path, *, key: str, what: str, **options: Any) -> Any:
    """Return `kind.from_pretrained(source)`; for a model, check that every tensor comes from the checkpoint.

    With an incompletely downloaded folder, transformers, safetensors and tokenizers raise errors of many classes, or
    continue with random numbers in place of missing tensors.

    Args:
        kind: A transformers class: of a model, a tokenizer, a configuration or a processor.
        source: Folder or hub id.
        key: The recipe key that names the source, for errors.
        what: The expected kind, negated, for errors: "no T5 encoder".
        **options: Further arguments of `from_pretrained`.

    Raises:
        ValueError: If loading fails; names the key, the source and the reason.
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
    except BaseException as error:  # panics of tokenizers are not of class Exception
        reason = truncate((str(error).strip().splitlines() or [""])[0], length=300)
        message = reason if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {reason}"
        raise ValueError(
            f"{key} = {source}: {what} can be loaded ({message}). Give the hub id or the folder of a published "
            "checkpoint, and download it again if it is cut short"
        ) from error
