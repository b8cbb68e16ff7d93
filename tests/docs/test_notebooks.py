"""The notebooks in docs/ run, on small settings; what they keep as output has no traces of a machine."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

DOCS = Path(__file__).parents[2] / "docs"
SMALL = {  # what the cell tagged `parameters` is followed by
    "quickstart": "OVERRIDES += {tiny!r} + ['evaluate.images=12', 'evaluate.batch_size=12']",
    "own_model": "EPOCHS, HIDDEN, LAYERS = 1, 16, 1",
}


@pytest.mark.slow(seconds=60)
@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_runs(name, shards, made_tiny, tmp_path, monkeypatch):
    from zipar_train.recipe.load import load_recipe
    from zipar_train.training.fit import fit

    (tmp_path / "docs").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits").symlink_to(shards)
    if name == "quickstart":
        short = [*made_tiny, "trainer.max_epochs=1", "log.wandb=disabled"]
        fit(load_recipe("digits-base", [*short, "run_dir=runs/digits-base"]))
        fit(load_recipe("digits", [*short, "run_dir=runs/digits", "model.weights=runs/digits-base"]))
    book = nbformat.read(DOCS / f"{name}.ipynb", 4)
    (at,) = [k for k, cell in enumerate(book.cells) if "parameters" in cell.metadata.get("tags", [])]
    book.cells[at].source += "\n" + SMALL[name].format(tiny=made_tiny)
    NotebookClient(book, timeout=280, resources={"metadata": {"path": str(tmp_path / "docs")}}).execute()
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    texts = [output.get("text", "") + str(output.get("data", {}).get("text/plain", "")) for output in outputs]
    if name == "quickstart":
        assert any(re.match(r"\(True,\s+\[28, ", text) for text in texts)  # lookahead generates the same codes
        assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
        assert (tmp_path / "grow.gif").read_bytes().startswith(b"GIF")
        assert any(len(re.findall(r"window \d: ", text)) == 4 for text in texts)
    else:
        assert any("largest difference of 64 x 17 logits" in text for text in texts)


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.ipynb")), ids=lambda path: path.name)
def test_kept_outputs_are_of_any_machine(path):
    """With outputs, as GitHub shows them; without warnings, errors and paths; numbered as a whole run numbers them."""
    book = nbformat.read(path, 4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any(cell.outputs for cell in code)
    assert not re.search(r'/(?:tmp|home|root|work|usr)/|"stderr"|Traceback', path.read_text())
    assert path.stat().st_size < 1_000_000
