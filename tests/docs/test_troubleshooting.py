"""Messages that docs/troubleshooting.md quotes are those of the program."""

import re
from pathlib import Path

import zipar_train

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
PACKAGE = Path(zipar_train.__file__).parent


def quoted():
    cells = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return [words for cell in cells for words in re.findall(r'"([^"]+)"', cell)]


def test_every_quoted_message_is_in_the_source():
    """In the text of strings, so that adjacent literals are one."""
    import ast

    texts = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values))
    assert len(quoted()) > 20
    missing = [words for words in quoted() if not any(words in text for text in texts)]
    assert not missing
