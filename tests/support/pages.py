"""The documentation's pages: their fenced blocks and their inline code, with page and line."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "data/README.md",
    *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md")),
]
FENCE = re.compile(r" *(`{3,}) *(\S*) *(.*)")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        page: path from the root of the checkout.
        line: line of the opening fence, from 1.
        language: first word after the fence, or nothing.
        words: the rest of that line.
        text: the lines between the fences.
    """

    page: str
    line: int
    language: str
    words: str
    text: str

    @property
    def name(self) -> tuple[str, str]:
        """The page and the block's first line without its comment: what tables of blocks refer to."""
        return self.page, re.split(r"\s+#", self.text.split("\n", 1)[0])[0].strip()

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Span:
    """Inline code: page, line on which it begins, text on one line."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def blocks_of(text: str, page: str) -> list[Block]:
    """The fenced blocks of a page.

    Raises:
        ValueError: if a fence is not closed.
    """
    found, opened = [], None
    for number, line in enumerate(text.split("\n"), start=1):
        fence = FENCE.fullmatch(line)
        if opened is None:
            if fence:
                opened = (number, fence, [])
        elif fence and len(fence[1]) >= len(opened[1][1]) and not fence[2]:
            start, (_, language, words), lines = opened[0], opened[1].groups(), opened[2]
            found.append(Block(page, start, language, words, "\n".join(lines) + "\n"))
            opened = None
        else:
            opened[2].append(line)
    if opened:
        raise ValueError(f"{page}:{opened[0]}: the block is not closed")
    return found


def prose_of(text: str, page: str) -> str:
    """A page with empty lines in place of its fenced blocks, so that line numbers stay."""
    lines = text.split("\n")
    for block in blocks_of(text, page):
        end = block.line + block.text.count("\n") + 1
        lines[block.line - 1 : end] = [""] * (end - block.line + 1)
    return "\n".join(lines)


def spans_of(text: str, page: str) -> list[Span]:
    """The inline code of a page."""
    prose = prose_of(text, page)
    return [
        Span(page, prose.count("\n", 0, found.start()) + 1, " ".join(found[2].split()))
        for found in re.finditer(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", prose, re.DOTALL)
    ]


def read(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(*languages: str) -> list[Block]:
    """All blocks of the documentation in these languages; without any, all blocks."""
    return [b for page in PAGES for b in blocks_of(read(page), page) if not languages or b.language in languages]


def spans() -> list[Span]:
    """All inline code of the documentation."""
    return [span for page in PAGES for span in spans_of(read(page), page)]
