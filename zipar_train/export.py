"""Weights out: a folder for transformers, a `.pt` for the original LlamaGen and ZipAR scripts, adapters alone."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from zipar_train.files import make_folder, write_whole
from zipar_train.models import layout, lora
from zipar_train.models.published import find
from zipar_train.models.weights import Saved, initial_weights, read, restored
from zipar_train.recipe import dump
from zipar_train.sections import Recipe

Target = Literal["hf", "llamagen", "adapter"]


def export(checkpoint: str | Path | Recipe, out: str | Path, *, to: Target = "hf") -> Path:
    """Write weights, as the type they have, with a model card.

    Args:
        checkpoint: a run folder, a checkpoint or an export; or a recipe, for the weights that it starts from.
        out: a new folder; for "llamagen" a new `.pt` file, its card `.md` beside it.
        to: "hf": a folder that `from_pretrained(out, trust_remote_code=True)` loads with transformers alone, and
            `zipar_train.load(out)` with its recipe, low-rank adapters merged. "llamagen": a file that the original
            LlamaGen and ZipAR scripts load, adapters merged. "adapter": a PEFT folder, the adapters alone.

    Raises:
        ValueError: if there is nothing to export, or `out` is not free.
        OSError: if it cannot be written.
    """
    out = Path(out)
    if to == "llamagen" and out.suffix != ".pt":
        raise ValueError(f"--out {out}: --to llamagen writes one file, whose name must end in .pt")
    for file in (out, out.with_suffix(".md")) if to == "llamagen" else ():
        if file.exists():
            raise ValueError(f"{file} already exists: give another --out, or remove it")
    if to != "llamagen" and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already exists and is not an empty folder: give another --out, or remove it")
    recipe, saved = _source(checkpoint)
    if to == "adapter" and not saved.adapter:
        raise ValueError(
            f"{saved.path} holds no adapters: it was trained without tune.lora. Use --to hf or --to llamagen"
        )
    card = model_card(recipe, saved, evaluation(saved), to).encode()
    if to == "llamagen":
        write_whole(out.with_suffix(".md"), card)

        def save(aside: Path) -> None:
            with open(aside, "wb") as file:  # a file of Python's, whose errors tell the reason
                torch.save({"model": published(recipe, saved)}, file)

        try:
            _whole(out, save)
        except BaseException:
            out.with_suffix(".md").unlink(missing_ok=True)
            raise
        return out

    def write(aside: Path) -> None:
        make_folder(aside)
        if to == "adapter":
            assert recipe.tune.lora is not None
            restored(recipe.model, saved, dtype=None)  # else nobody could read the export
            family = restored(recipe.model, initial_weights(recipe.model), dtype=None)
            peft = lora.wrapped(family.model, recipe.tune.lora, saved.state, where=saved.path)
            peft.peft_config["default"].base_model_name_or_path = recipe.model.weights
            peft.save_pretrained(aside, save_embedding_layers=False)
            if made_on := saved.extra.get("base"):  # fingerprint of the weights that they belong to
                (aside / "base").write_text(made_on)
        else:
            family, source = restored(recipe.model, saved, dtype=None), recipe.model.weights
            family.published(source).save_pretrained(aside)
            if recipe.model.words:  # what its tokenizer of text and its processor are
                kinds = (".json", ".model", ".txt", ".jinja")
                for file in find(str(source)).glob("*"):
                    if file.suffix in kinds and "index" not in file.name and not (aside / file.name).exists():
                        shutil.copy(file, aside / file.name)
        (aside / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
        (aside / "README.md").write_bytes(card)
        if out.is_dir():
            out.rmdir()

    _whole(out, write)
    return out


def published(recipe: Recipe, saved: Saved) -> dict[str, torch.Tensor]:
    """Saved weights by LlamaGen's names, in the type they have."""
    model = restored(recipe.model, saved, dtype=None).model
    return layout.to_published(model.state_dict(), heads=model.config.num_attention_heads, codes=recipe.model.codes)


def _source(checkpoint: str | Path | Recipe) -> tuple[Recipe, Saved]:
    if isinstance(checkpoint, Recipe):
        if checkpoint.model.weights is None:
            raise ValueError(
                f"recipe {checkpoint.name} starts from random weights: there is nothing to export. "
                "Set model.weights, or give --checkpoint"
            )
        saved = read(checkpoint.model.weights, entry=checkpoint.model.weights_entry, checksum=True)
        return saved.recipe or checkpoint, saved
    saved = read(checkpoint, checksum=True)
    if saved.recipe is None:
        raise ValueError(
            f"{saved.path} carries no recipe. Name the recipe it is for: "
            f"--recipe llamagen-l --set model.weights={saved.path}"
        )
    return saved.recipe, saved


def _whole(out: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file or a folder beside its place, and rename it there.

    Raises:
        OSError: naming it; nothing is left behind.
    """
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    transformers_logging.disable_progress_bar()
    try:
        make_folder(out.parent)
        write(aside)
        os.replace(aside, out)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's and safetensors' writers on a full disk
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"cannot write {out}: {getattr(reason, 'strerror', None) or reason}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        aside.unlink(missing_ok=True)
        transformers_logging.enable_progress_bar()


def evaluation(saved: Saved) -> list[str]:
    """The evaluation of exactly these weights, if their run folder holds one: a table in Markdown and its evidence.

    Args:
        saved: the weights, read with their checksum.
    """
    file = saved.path.parent.parent / "evaluation" / "report.json"
    if saved.path.suffix != ".ckpt" or not file.is_file() or saved.sha256 is None:
        return []
    from zipar_train.evaluation.report import markdown_table, reading
    from zipar_train.evaluation.results import Report

    try:
        report = Report.model_validate_json(file.read_bytes())
    except ValueError:
        return []  # of another version, or damaged: no evidence
    made_of = f"sha256 {saved.sha256[:8]}"
    if not any(made_of in origin for origin in report.checkpoints.values()):
        return []
    return [*markdown_table(report), "", *(f"- {line}" for line in reading(report))]


LOADING = {
    "hf": """```python
from zipar_train import load
images = load("this folder").draw([3, 5], window=4, seed=0)
```

The bare model, with transformers alone:

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("this folder", trust_remote_code=True)
```""",
    "llamagen": """The file is in LlamaGen's own layout: give it as `--gpt-ckpt`, without `--from-fsdp`, to the original
LlamaGen and ZipAR scripts, or as `model.weights` to zipar-train.""",
    "adapter": """These are low-rank adapters alone, for the weights that `model.weights` in the recipe names.

```python
from zipar_train import load
images = load("this folder").draw([3, 5], window=4, seed=0)
```""",
}


def model_card(recipe: Recipe, saved: Saved, table: list[str], to: Target) -> str:
    """What the model is, how to load it, what it was trained on, how it was evaluated, and its recipe."""
    windows = ", ".join(f"{window} (weight {weight:g})" for window, weight in recipe.zipar.windows.items())
    rows, columns = recipe.model.grid
    what = (
        f"An autoregressive image generator ({recipe.model.family}, {rows} x {columns} codes from a codebook of "
        f"{recipe.model.codes})"
    )
    if saved.recipe is None:
        story = f"{what}: the published weights {saved.path.name}, as they are."
        data = ["Not trained by zipar-train."]
    else:
        how = f"low-rank adapters of rank {recipe.tune.lora.rank}" if recipe.tune.lora else "all weights"
        story = (
            f"{what}, trained by zipar-train ({how}) under a mix of ZipAR windows: {windows}. A window of {columns} is "
            "next-token decoding; smaller ones draw rows in parallel."
        )
        held = saved.extra.get("data", {})
        data = [f"- {name}: {text}" for name, text in held.items()] or [f"- {recipe.data.train}"]
        data.append(f"- started from: {recipe.model.weights or 'random weights'}")
        if "global_step" in saved.extra:
            data.append(f"- {saved.extra['global_step']:,} optimizer steps")
    return "\n".join(
        [
            "---",
            f"library_name: {'peft' if to == 'adapter' else 'transformers' if to == 'hf' else 'zipar-train'}",
            "tags: [zipar, autoregressive-image-generation]",
            "---",
            "",
            f"# {recipe.name}",
            "",
            recipe.about,
            "",
            story,
            "",
            LOADING[to],
            "",
            "## Data",
            "",
            *data,
            "",
            "## Evaluation",
            "",
            *(
                table
                or ["Not evaluated. `zipar-train evaluate` writes a table, and exporting the run again puts it here."]
            ),
            "",
            "## Recipe",
            "",
            "```yaml",
            dump(recipe).rstrip(),
            "```",
            "",
        ]
    )
