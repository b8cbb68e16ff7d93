"""`scripts/docs` builds the site, and refuses links that lead nowhere."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path):
    """This checkout by links, with pages of its own to change, and without a .venv but for mkdocs."""
    for part in (
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "mkdocs.yml",
        "data",
        "recipes",
        "zipar_train",
    ):
        (tmp_path / part).symlink_to(ROOT / part)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    program = tmp_path / ".venv" / "bin" / "mkdocs"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mkdocs "$@"\n')
    program.chmod(0o755)
    return tmp_path


def build(checkout):
    return subprocess.run([checkout / "scripts" / "docs"], capture_output=True, text=True)


@pytest.mark.slow(seconds=15)
def test_every_page_is_built_and_reached(checkout):
    done = build(checkout)
    assert done.returncode == 0, done.stderr
    site = checkout / "site"
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages == {path.stem for path in (site / "docs").glob("*.html")}
    beside = {str(path.relative_to(site)) for path in site.rglob("*.html") if path.parent.name != "docs"}
    assert beside == {"404.html", "index.html", "CHANGELOG.html", "CONTRIBUTING.html", "data/index.html"}
    home = (site / "index.html").read_text()
    assert all(f'href="docs/{page}.html"' in home for page in pages), "a page is missing in mkdocs.yml's nav"
    assert (site / "docs" / "digits" / "grow.gif").is_file() and (site / "docs" / "quickstart.ipynb").is_file()
    assert not re.findall(r'(?:src|<link[^>]* href)="https?://', home), "the site loads nothing from the network"


@pytest.mark.slow
@pytest.mark.parametrize("link", ["gone.md", "plan.md#gone", "../gone.yaml"])
def test_a_broken_link_is_an_error(checkout, link):
    page = checkout / "docs" / "faq.md"
    page.write_text(page.read_text() + f"\n[a link]({link})\n")
    done = build(checkout)
    assert done.returncode != 0 and link in done.stderr
