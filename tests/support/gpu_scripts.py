"""The scripts of scripts/gpu as a person runs them, and the sections that they write into the docs."""

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parents[2]
SCRIPTS, DOCS = HERE / "scripts" / "gpu", HERE / "docs"
SECTIONS = ("decode", "rows", "generate", "kernels", "train", "tests", "steps", "fit")


def script(name: str, *arguments, root: Path = HERE, **env: str) -> subprocess.CompletedProcess[str]:
    """A script of scripts/gpu, run as a person does, outside of this pytest's settings."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "ZIPAR", "COV"))}
    verb = [sys.executable, root / "scripts" / "gpu" / name, *map(str, arguments)]
    return subprocess.run(verb, env={**clean, "PYTHON": sys.executable, **env}, capture_output=True, text=True)


def rows(docs: Path, name: str) -> list[list[str]]:
    """The cells of a section's rows, the head left out."""
    text = (docs / "performance.md").read_text() + (docs / "training.md").read_text()
    (section,) = re.findall(rf"<!-- gpu:{name} -->\n(.*?)<!-- /gpu:{name} -->", text, re.DOTALL)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()]
    assert len({len(line) for line in lines}) == 1 and lines[0][-2:] == ["measured on", "command"]
    return lines[2:]
