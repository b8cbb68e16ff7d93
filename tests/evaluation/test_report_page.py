"""The page report.html: its cells, the passes of its animations, and how it behaves in a browser."""

import html as escapes
import json
import re
import shutil
import subprocess
from itertools import product

import pytest
import torch

from zipar_train import Grid, Plan
from zipar_train.evaluation.report.html import _parts
from zipar_train.evaluation.report.protocol import Protocol
from zipar_train.evaluation.report.schema import SCORES, EvaluationReport, EvaluationRow
from zipar_train.evaluation.report.text import write_report
from zipar_train.evaluation.scores.scores import Score
from zipar_train.recipe.load import load_recipe

BROWSER = shutil.which("chromium")
LARGE = {"fid": 123.4, "sfid": 123.4, "kid": 0.1234, "isc": 123.4}  # as large as scores get
LARGE |= {"precision": 0.99, "recall": 0.99, "class_accuracy": 0.999, "clip": 0.3123}
WAYS = [("planned", 0), ("planned", 32), ("released", 0), ("adaptive", 0)]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report with every column, of two checkpoints decoded in all ways at two windows."""
    recipe = load_recipe("digits", ["model.grid=[6, 8]"])
    rows = [
        EvaluationRow(
            **{"checkpoint": name, "mode": mode, "lookahead": ahead, "window": window, "passes": 1234.5},
            **{"passes_std": 10.5 if ahead else 0, "reduction": 0.6, "width": 3, "bits": 1.5, "window_costs": 0.01},
            **{"gap_closed": 0.9, "milliseconds": 12345.0, "images_per_second": 123.0},
            **{score: Score(mean=mean, std=mean / 10) for score, mean in LARGE.items()},
        )
        for name, window, (mode, ahead) in product(["llamagen-l-tuned", "llamagen-l-base"], (8, 2), WAYS)
    ]
    protocol = Protocol(
        **{"images": 9, "seeds": [0], "conditions": "classes in turn", "size": 8, "generated_size": 8},
        **{"reference": "val.json", "reference_checksum": "ab", "reference_images": 9, "validation": True},
        **{"guidance": 1, "temperature": 1, "top_k": 0, "top_p": 1, "dtype": "float32"},
        **{"features": "classifier", "features_weights": "cd"},
    )
    report = EvaluationReport(
        **{"rows": rows, "baseline": "llamagen-l-base", "protocol": protocol, "warnings": [], "differences": []},
        **{"features_accuracy": 0.9, "held_out": "9 images", "checkpoints": {}, "environment": {}},
        recipe=recipe.model_dump(mode="json"),
    )
    samples = {
        (row.name, row.window): torch.randint(255, (7, 3, 6, 8), dtype=torch.uint8) for row in rows if not row.lookahead
    }
    folder = tmp_path_factory.mktemp("report")
    write_report(report, samples, folder)
    return folder / "report.html"


def test_a_spread_is_below_its_value(page):
    assert _parts("1.50 ± 0.20") == ("1.50", " ± ", "0.20")
    assert _parts("99.1 ± 0.5 %") == ("99.1 %", " ± ", "0.5")
    assert _parts("digits") == ("digits", "", "") and _parts("12 %") == ("12 %", "", "")
    assert LARGE.keys() == set(SCORES)
    assert "<td>99.9 %<small>± 10.0</small></td>" in page.read_text()


def test_rows_show_the_images_and_passes_of_their_window(page):
    """Rows with lookahead show the images of those without, which are the same; adaptive windows have no passes."""
    text = page.read_text()
    passes = json.loads(re.search(r"const passes = (\{.*?\}), view", text)[1])
    alts = {
        found[0]: found[1]
        for found in re.findall(r'<img id="(strip-\d+)" data-images="7" alt="7 images of (.*?)"', text)
    }
    rows = re.findall(r'<tr class="[^"]*" data-strip="(strip-\d+)" tabindex="0"><td>(.*?)</td><td>(\d)</td>', text)
    assert len(rows) == 16 and len(alts) == 12
    for strip, name, window in rows:
        assert alts[strip] == f"{name.removesuffix(', lookahead 32')}, window {window}"
        if "adaptive" in name:
            assert strip not in passes
        else:
            plan = Plan.zipar(Grid(6, 8), window=int(window))
            assert passes[strip] == plan.generated_at().reshape(6, 8).tolist()


@pytest.mark.slow(seconds=15)
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
class TestInABrowser:
    def seen(self, page, script, *, width=1300):
        """What a script returns on the loaded page."""
        own = page.with_name(f"{width}.html")
        own.write_text(
            page.read_text().replace(
                "</body>", f"<script>document.title = JSON.stringify((() => {{{script}}})())</script></body>"
            )
        )
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom"]
        options += [f"--user-data-dir={page.parent}/browser", f"--window-size={width},900"]
        done = subprocess.run([BROWSER, *options, own.as_uri()], capture_output=True, text=True, timeout=120)
        return json.loads(escapes.unescape(re.search("<title>(.*?)</title>", done.stdout)[1]))

    @pytest.mark.parametrize("width", [1300, 1500])
    def test_no_column_is_cut_off(self, page, width):
        script = 'const wide = document.querySelector(".wide"); return [wide.scrollWidth, wide.clientWidth]'
        needed, there = self.seen(page, script, width=width)
        assert needed <= there

    def test_a_row_shows_its_images_larger_as_they_grow(self, page):
        """The first frame has shaded codes, the last one none; the dialog closes."""
        script = """
            const row = document.querySelectorAll("tr[data-strip]")[4];
            row.click();
            const shown = [view.open, document.getElementById("what").textContent, counter.textContent];
            const pixel = () => [...canvas.getContext("2d").getImageData(5, 5, 1, 1).data];
            const first = pixel();
            document.getElementById("close").click();
            return [...shown, first, view.open];
        """
        opened, words, counter, first, after = self.seen(page, script)
        assert opened and not after
        assert words == "7 images of llamagen-l-tuned, window 2"
        assert counter == f"pass 0 of {Plan.zipar(Grid(6, 8), window=2).passes}"
        assert first == [0xE1, 0xDD, 0xD4, 255]
