"""A simulator of the released ZipAR decoder for LlamaGen, written from its rules and not from our Plan.

Rules (ThisisBillhe/ZipAR 2a5695c, autoregressive/models/generate_zipar.py; our notes of them: docs/plan.md):

* Row 0 is drawn alone. Row 1 starts from the real last code of row 0.
* When a row has `window` codes, the row below joins in the next forward. Its first input is a temporary token: a copy
  of the latest code, at that moment, of the row two above; it is written at the raster slot of the last code of the row
  above.
* Every forward feeds the latest code of every open row at that code's raster slot, or the temporary token for a row
  with none yet, and draws one code for each open row.
* A row that is full leaves; the next forward feeds its last code as an extra input, whose logits are dropped, at its
  raster slot, over the temporary token's key.
* A query sees every slot up to its own in raster order that has been written, with whatever it holds by then.

The one deliberate difference: slots never written are not seen (the released code attends to their zeros).
"""

from dataclasses import dataclass, field


@dataclass
class Query:
    slot: int  # raster slot, the prompt at -1
    feeds: tuple[str, int]  # ("code", raster index), ("prompt", 0)
    draws: int | None
    sees: set[tuple[int, tuple[str, int], int]] = field(
        default_factory=set
    )  # (slot, what its key was made of, forward)


def simulate(size: int, window: int) -> list[list[Query]]:
    """The forwards of a size x size image, window 2 .. size - 1: the queries of each."""
    cache: dict[int, tuple[tuple[str, int], int]] = {}
    drawn = [0] * size  # codes each row has
    forwards: list[list[Query]] = []

    def forward(queries: list[Query]) -> None:
        for query in queries:
            cache[query.slot] = (query.feeds, len(forwards))
        for query in queries:
            query.sees = {(slot, what, when) for slot, (what, when) in cache.items() if slot <= query.slot}
        for query in queries:
            if query.draws is not None:
                drawn[query.draws // size] += 1
        forwards.append(queries)

    forward([Query(-1, ("prompt", 0), 0)])
    while drawn[0] < size:
        code = drawn[0] - 1
        forward([Query(code, ("code", code), code + 1)])

    open_rows, temporary, full = [1], {1: ("code", size - 1)}, None
    while open_rows:
        queries = []
        if full is not None:
            last = full * size + size - 1
            queries.append(Query(last, ("code", last), None))
        for row in open_rows:
            first = row * size
            if drawn[row] == 0:
                queries.append(Query(first - 1, temporary[row], first))
            else:
                latest = first + drawn[row] - 1
                queries.append(Query(latest, ("code", latest), latest + 1))
        full = None
        forward(queries)
        for row in list(open_rows):
            if drawn[row] == window and row + 1 < size and row + 1 not in open_rows:
                above = row - 1  # two above the row that opens
                temporary[row + 1] = ("code", above * size + drawn[above] - 1)
                open_rows.append(row + 1)
        for row in list(open_rows):
            if drawn[row] == size:
                open_rows.remove(row)
                full = row
    return forwards
