"""A tuned checkpoint as a folder that plain transformers loads."""

import os
import shutil
from pathlib import Path

from transformers.utils import logging as transformers_logging

from zipar_train.decoding.generator import Generator
from zipar_train.files import make_folder
from zipar_train.models.weights import read
from zipar_train.recipe import dump
from zipar_train.sections import Recipe


def export(checkpoint: str | Path, out: str | Path) -> Path:
    """Write model, recipe, modeling code and model card into a new folder.

    `AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)` loads it with nothing but transformers;
    `zipar_train.load(out)` loads it with its recipe.

    Args:
        checkpoint: a run folder, a checkpoint, or an export.

    Raises:
        ValueError: if there is nothing to export, or `out` is not free.
        OSError: if it cannot be written.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} already exists and is not an empty folder: give another --out, or remove it")
    saved = read(checkpoint)
    generator = Generator(saved.recipe, saved, device="cpu")
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        make_folder(aside)
        transformers_logging.disable_progress_bar()
        generator.family.model.save_pretrained(aside)
        (aside / "recipe.yaml").write_text(dump(saved.recipe), encoding="utf-8")
        table = evaluation(saved.path)
        (aside / "README.md").write_text(model_card(saved.recipe, table), encoding="utf-8")
        if out.is_dir():
            out.rmdir()
        os.replace(aside, out)
    except OSError as error:
        raise OSError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        transformers_logging.enable_progress_bar()
    return out


def evaluation(weights: Path) -> list[str]:
    """The evaluation of exactly these weights, if their run folder holds one: a table in Markdown and its evidence."""
    file = weights.parent.parent / "evaluation" / "report.json"
    if weights.suffix != ".ckpt" or not file.is_file():
        return []
    from zipar_train.evaluation.evaluate import Report, sha256
    from zipar_train.evaluation.report import reading, table

    try:
        report = Report.model_validate_json(file.read_bytes())
    except ValueError:
        return []  # of another version, or damaged: no evidence
    made_of = f"sha256 {sha256(weights)}"
    if not any(made_of in origin for origin in report.checkpoints.values()):
        return []
    return [*table(report), "", *reading(report)]


def model_card(recipe: Recipe, table: list[str]) -> str:
    """What the model is, how to load it, how it was evaluated, and its recipe."""
    windows = ", ".join(f"{window} (weight {weight:g})" for window, weight in recipe.zipar.windows.items())
    rows, columns = recipe.model.grid
    lines = [
        "---",
        "library_name: transformers",
        "tags: [zipar, autoregressive-image-generation]",
        "---",
        "",
        f"# {recipe.name}",
        "",
        recipe.about,
        "",
        f"An autoregressive image generator ({recipe.model.family}, {rows} x {columns} codes from a codebook of "
        f"{recipe.model.codes}), trained by zipar-train under a mix of ZipAR "
        f"windows: {windows}. A window of {columns} is next-token decoding; smaller ones draw rows in parallel.",
        "",
        "```python",
        "from zipar_train import load",
        'images = load("this folder").draw([3, 5], window=4, seed=0)',
        "```",
        "",
        "The bare model, with transformers alone:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM",
        'model = AutoModelForCausalLM.from_pretrained("this folder", trust_remote_code=True)',
        "```",
        "",
        "## Evaluation",
        "",
        *(table or ["Not evaluated. `zipar-train evaluate` writes a table, and exporting the run again puts it here."]),
        "",
        "## Recipe",
        "",
        "```yaml",
        dump(recipe).rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)
