"""Report of all checks, as text and as data."""

import textwrap

from pydantic import BaseModel

from zipar_train import __version__
from zipar_train.doctor.checks import CheckResult

TITLES = {"ok": "Fine", "note": "Notes", "problem": "PROBLEMS"}


class DoctorReport(BaseModel):
    """Rows of all checks, with version, revision and date."""

    version: str = __version__
    revision: str
    date: str
    seconds: float
    recipe: str | None
    rows: list[CheckResult]

    def of(self, status: str) -> list[CheckResult]:
        return [row for row in self.rows if row.status == status]

    def lines(self, width: int = 100) -> list[str]:
        """Return readable lines: passed checks as a table, then notes, then problems, each with its remedy."""
        shown = {status: self.of(status) for status in TITLES} | {"ok": _joined(self.of("ok"))}
        side, name = (
            max((len(getattr(row, part)) for rows in shown.values() for row in rows), default=0) + 2
            for part in ("section", "name")
        )
        lines = [f"zipar-train {self.version}, revision {self.revision}"]
        for status, rows in shown.items():
            lines += ["", TITLES[status]] if rows else []
            before = ""
            for row in rows:
                text = [*row.seen.splitlines(), *([f"-> {row.remedy}"] if row.remedy else [])]
                texts = [part for line in text for part in _wrapped(line, max(width - side - name, 40))]
                head = f"{row.section if row.section != before else '':{side}}{row.name:{name}}"
                lines += [f"{head if i == 0 else '':{side + name}}{part}" for i, part in enumerate(texts)]
                before = row.section
        counts = [
            f"{len(self.of(status)) or 'no'} {words}{'s' * (len(self.of(status)) != 1 and words != 'fine')}"
            for status, words in (("ok", "fine"), ("note", "note"), ("problem", "problem"))
        ]
        return [*lines, "", f"{', '.join(counts)}, in {self.seconds:.0f} s."]


def _joined(rows: list[CheckResult]) -> list[CheckResult]:
    """Return the rows with all passed package checks joined into one."""
    fine = [row for row in rows if row.section == "packages" and row.status == "ok"]
    if not fine:
        return rows
    seen = ", ".join(f"{row.name} {row.seen}" for row in fine)
    one = CheckResult(section="packages", name="in their ranges", status="ok", seen=seen)
    return [one, *(row for row in rows if row not in fine)]


def _wrapped(line: str, width: int) -> list[str]:
    return textwrap.wrap(
        line,
        width,
        break_long_words=False,
        break_on_hyphens=False,
        subsequent_indent="   " if line.startswith("->") else "",
    )
