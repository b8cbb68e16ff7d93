"""Model card of an export: description, loading code, training data, evaluation, recipe."""

from importlib import import_module

from zipar_train.models.family import FAMILIES
from zipar_train.models.restore import LoadedWeights
from zipar_train.recipe.load import dump
from zipar_train.recipe.model import Model
from zipar_train.recipe.schema import Recipe


def evaluation(saved: LoadedWeights) -> list[str]:
    """Return the Markdown lines of the evaluation of exactly these weights, or an empty list if there is none.

    Args:
        saved: The weights, read with their checksum; the report is looked for in their run folder.
    """
    file = saved.path.parent.parent / "evaluation" / "report.json"
    if saved.path.suffix != ".ckpt" or not file.is_file() or saved.sha256 is None:
        return []
    from zipar_train.evaluation.report.schema import EvaluationReport
    from zipar_train.evaluation.report.text import markdown_table, notes

    try:
        report = EvaluationReport.model_validate_json(file.read_bytes())
    except ValueError:
        return []  # written by another version, or damaged
    made_of = f"sha256 {saved.sha256[:8]}"
    if not any(made_of in origin for origin in report.checkpoints.values()):
        return []
    return [*markdown_table(report), "", *(f"- {line}" for line in notes(report))]


LOADING = {
    "hf": """```python
from zipar_train import load
images = load("this folder").generate({labels}, window=4, seed=0)
```

The bare model, with transformers alone:

```python
{bare}
```""",
    "original": """The folder is in the layout of [deepseek-ai/Janus](https://github.com/deepseek-ai/Janus): give it as
`model_path` to the authors' scripts, or as `model.weights` to zipar-train.

```python
from zipar_train import load
images = load("this folder").generate(["a blue car"], window=4, seed=0)
```""",
    "llamagen": """The file is in LlamaGen's own layout: give it as `--gpt-ckpt`, without `--from-fsdp`, to the original
LlamaGen and ZipAR scripts, or as `model.weights` to zipar-train.""",
    "adapter": """These are low-rank adapters alone, for the weights that `model.weights` in the recipe names.

```python
from zipar_train import load
images = load("this folder").generate({labels}, window=4, seed=0)
```""",
}


def bare_model(model: Model) -> str:
    """Return the Python lines that load an export in transformers' layout with transformers alone."""
    module, name = FAMILIES[model.family]
    hf_class = getattr(getattr(import_module(module), name), "hf_class", None)
    if hf_class is None:  # LlamaGen, whose export brings its own code
        name, more = "AutoModelForCausalLM", ", trust_remote_code=True"
    else:
        name, more = hf_class.__name__, ""
    return f'from transformers import {name}\nmodel = {name}.from_pretrained("this folder"{more})'


def model_card(recipe: Recipe, saved: LoadedWeights, table: list[str], to: str) -> str:
    """Return the model card as Markdown, with YAML front matter.

    Args:
        recipe: The recipe of the weights.
        saved: The weights.
        table: Lines of the evaluation, see `evaluation`.
        to: Format of the export.
    """
    windows = ", ".join(f"{window} (weight {weight:g})" for window, weight in recipe.zipar.windows.items())
    grids = " or ".join(f"{rows} x {columns}" for rows, columns in (recipe.model.grid, *recipe.model.other_grids))
    labels = '["a blue car"]' if recipe.model.captions else "[3, 5]"
    what = (
        f"An autoregressive image generator ({recipe.model.family}, {grids} codes from a codebook of "
        f"{recipe.model.codebook_size})"
    )
    if saved.recipe is None:
        story = f"{what}: the published weights {saved.path.name}, as they are."
        data = ["Not trained by zipar-train."]
    else:
        how = f"low-rank adapters of rank {recipe.tune.lora.rank}" if recipe.tune.lora else "all weights"
        story = (
            f"{what}, trained by zipar-train ({how}) under a mix of ZipAR windows: {windows}. A window of "
            f"{recipe.model.raster.row_length} is next-token decoding; smaller ones generate rows in parallel."
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
            recipe.description,
            "",
            story,
            "",
            LOADING[to].format(labels=labels, bare=bare_model(recipe.model)),
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
