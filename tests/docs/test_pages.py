"""What the documentation shows is run."""

import re
from pathlib import Path

import torch

import zipar_train
from zipar_train.decoding.adaptive.decoder import AdaptiveDecoder
from zipar_train.decoding.sampling import code_seeds

DOCS = Path(__file__).parents[2] / "docs"


def test_a_model_of_ones_own_draws_what_it_was_taught_with():
    """The page's lines as they stand; then the theorem for their family."""
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "models.md").read_text(), re.DOTALL)
    names: dict = {"__name__": "mine"}
    exec(compile(code, "docs/models.md", "exec"), names)
    assert names["codes"].shape == (2, 20)
    assert names["logits"].shape == (2, 20, 16)
    family, plan = names["family"], names["plan"]
    family.model.double()
    seen = torch.zeros(2, 20, 16, dtype=torch.float64)

    def observe(targets, logits):
        real = targets[0] < 20
        seen[:, targets[0, real]] = logits[:, real]

    sampling = names["SamplingParams"]()
    labels = torch.tensor([1, 0])
    codes = names["Decoder"](family, plan)(labels, code_seeds([0, 1], 20, seed=0), sampling, observe=observe).flatten(1)
    with torch.no_grad():
        forced = names["teacher_forced"](family, plan, codes, labels, names["dense"](plan))
    assert (forced - seen).abs().max() < 1e-10
    adaptive = AdaptiveDecoder(family, window=1)
    assert adaptive([0, 1, 0], code_seeds([0, 1, 2], adaptive.numbers, seed=0), sampling).shape == (3, 20)
    assert 20 >= max(adaptive.passes(3)) > adaptive.plan.passes


def test_the_api_page_lists_what_can_be_imported():
    text = (DOCS / "api.md").read_text()
    listed = {
        re.split(r"[^A-Za-z_]", word)[0]
        for line in text.split("\n")
        if line.startswith("| `")
        for word in re.findall(r"`([^`]+)`", line.split("|")[1])
    }
    assert listed == set(zipar_train.__all__)
    assert all(getattr(zipar_train, name) is not None for name in listed)
    assert set(zipar_train.__all__) <= set(dir(zipar_train))


def test_docs_import_from_the_top_alone():
    for page in [*DOCS.rglob("*.md"), DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"]:
        assert not re.findall(r"(?:from|import) zipar_train\.\S+", page.read_text()), page


def test_links_to_files_lead_somewhere():
    for page in [*DOCS.rglob("*.md"), DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
            assert "://" in link or (page.parent / link).exists(), f"{page}: {link}"


def test_the_tree_is_told_where_people_look():
    packages = {path.parent.name for path in (DOCS.parent / "zipar_train").glob("*/__init__.py")}
    for page in ("README.md", "CONTRIBUTING.md"):
        assert packages <= set(re.findall(r"^ {4}([a-z]+)/ ", (DOCS.parent / page).read_text(), re.MULTILINE)), page
