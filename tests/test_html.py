"""report.html and report.schema.json: escaped, self-contained, and what a browser says."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metrics.report import build_report
from metrics.scoring import entry
from reporting import evaluation
from reporting.evaluation import MAX_BYTES, SCHEMA, render_html
from reporting.pages import MAX_TEXT, Picture

EVIL = '<b>"x"&</b>'
VOID = {"meta", "img", "br"}
PNG, SVG = "data:image/png;base64,", "data:image/svg+xml;base64,"
CHROMIUM_NAMES = (
    "chromium", "chromium-browser", "chromium-headless-shell", "google-chrome", "chrome",
)  # fmt: skip


def entries() -> dict[str, dict]:
    names = ["cat", EVIL, "\u732b", "dog\udcff"]  # the last: a folder name that is not UTF-8
    counts = [[8, 1, 1, 0], [0, 10, 0, 0], [0, 0, 0, 0], [2, 2, 2, 4]]
    return {
        "fid": entry("skipped", None, "get https://example.org/w.pth or name it with --flag PATH"),
        "is": entry("unreliable", 2.5, "few images", std=0.25, num_splits=10, better="higher"),
        "lpips": entry(
            "ok", 0.2, sem=0.01, real_value=0.3, better="near the real value",
            lpips_inter={"value": 0.2, "sem": 0.01, "real_value": 0.3, "real_sem": None},
            lpips_intra={"value": 0.15, "sem": 0.01, "real_value": 0.25, "real_sem": None},
        ),
        "class_acc": entry(
            "ok", 0.733, ci95=[0.56, 0.86], real_ceiling=0.98, better="higher", n=30,
            per_class=dict(zip(names, [0.8, 1.0, None, 0.4], strict=True)),
            per_class_real=dict.fromkeys(names, 0.98), confusion=counts,
        ),
    }  # fmt: skip


def small_report() -> dict:
    made = {
        "checkpoint": "runs/digits/best_model.pth", "step": 902, "sampler": "ddim", "steps": 25,
        "cfg_scale": 2.0, "n": 30, "command": f"python evaluate.py --name '{EVIL}'",
    }  # fmt: skip
    return build_report(entries(), provenance=made, warnings=[f"few images of {EVIL}"])


def full_report() -> dict:
    """With everything that `build_report` does not write."""
    report = small_report()
    report["metrics"] |= {
        "kid": entry("ok", 0.00012, std=0.00005, subset_size=100, better="lower"),
        "prdc": entry(
            "ok", 0.87, precision=0.87, recall=0.61, density=1.12, coverage=0.9, k=5,
            better="higher",
        ),
        "memorization": entry(
            "ok", 0.02, flagged=True, held_out={"share_close": 0.01}, better="lower"
        ),
        f"new {EVIL}": entry("failed", None, "OutOfMemoryError", depth={"of": [1, EVIL]}),
    }  # fmt: skip
    report["sweep"] = [
        {"cfg_scale": scale, "num_inference_steps": steps, "status": "complete",
         "metrics": {"fid": None, "class_acc": scale / 10 + steps / 100}}
        for steps in (10, 25) for scale in (1.0, 2.0, 4.0)
    ]  # fmt: skip
    report["comparison"] = [
        {"metric": "class_acc", "old": 0.7, "new": 0.733, "delta": 0.033, "better": "higher"},
        {"metric": "fd_domain", "old": 2.0, "new": 3.5, "delta": 1.5, "better": "lower"},
        {"metric": "fid", "old": 12.0, "new": None, "delta": None, "better": "lower"},
        {
            "metric": "kid",
            "old": 1.5,
            "new": 1.0,
            "delta": -0.5,
            "better": "lower",
            "note": f"not comparable, {EVIL} differ",
        },
    ]
    report["artifacts"] = {"samples": f"samples_{EVIL}.png"}
    return report


def repeated_sweep() -> dict:
    """What `metrics.report.save_sweep` writes: two guidance scales, two seeds each."""
    values = {(1.0, 0): 0.5, (1.0, 30): 0.7, (2.0, 0): 0.8, (2.0, 30): 1.0}
    rows = [
        {"cfg_scale": scale, "num_inference_steps": 25, "seed": seed, "status": "partial",
         "metrics": {"fid": None, "class_acc": value}, "report": f"report_{seed}.json"}
        for (scale, seed), value in values.items()
    ]  # fmt: skip
    repeats = [
        {"cfg_scale": scale, "num_inference_steps": 25, "seeds": [0, 30],
         "metrics": {"class_acc": {"mean": mean, "std": 0.1414, "min": mean - 0.1}}}
        for scale, mean in ((1.0, 0.6), (2.0, 0.9))
    ]  # fmt: skip
    report = build_report({}, provenance={"n": 30})
    kept = ("schema_version", "status", "warnings", "metrics", "provenance")
    return {key: report[key] for key in kept} | {"sweep": rows, "repeats": repeats}


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def small_pictures() -> dict[str, Picture]:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    return {
        "samples": Picture(noise(40, 60), f"Samples of {EVIL}", "one row for each class"),
        "failures": Picture(grey, "Failures", f"asked for {EVIL}"),
    }


class Page(HTMLParser):
    """Tags with attributes, text, and whether every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open[-1:] != ["style"] else ""

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def pictures(self) -> list[dict[str, str | None]]:
        return [attrs for attrs in self.all("img") if attrs["src"].startswith(PNG)]

    def charts(self) -> dict[str, str]:
        """The SVG of each chart by its description."""
        charts = [attrs for attrs in self.all("img") if attrs["src"].startswith(SVG)]
        return {x["alt"]: base64.b64decode(x["src"].removeprefix(SVG)).decode() for x in charts}


def assert_self_contained(text: str) -> Page:
    """No script, and nothing that a browser would fetch."""
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert text.isascii()
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for _, attrs in page.tags:
        assert not [key for key in attrs if key.startswith("on") or key in ("href", "srcset")]
        assert attrs.get("src", PNG).startswith((PNG, SVG))
    style, markup = text.split("</style>")
    markup = re.sub(r'src="data:[^"]*"', "", re.sub(r">[^<]*<", "><", markup))
    for part in (style, markup):
        assert not re.search(r"url\(|@import|https?:|//", part)
    for svg in page.charts().values():
        assert not re.search(r"<script|<image|<foreignObject|@import", svg)
        assert not re.search(r"(?:href|src)=\"(?!#)|url\((?!#)", svg)
    return page


PAGES = {
    "empty": lambda: render_html({}, {}),
    "nothing worked": lambda: render_html(build_report({}, provenance={}), {}),
    "nulls": lambda: render_html(dict.fromkeys(full_report()), {}),
    "small": lambda: render_html(small_report(), small_pictures()),
    "full": lambda: render_html(full_report(), small_pictures()),
    "sweep only": lambda: render_html({"sweep": full_report()["sweep"]}, {}),
    "repeats": lambda: render_html(repeated_sweep(), {}),
}


@pytest.mark.parametrize("make", PAGES.values(), ids=PAGES)
def test_page_is_well_formed_and_self_contained(make):
    assert_self_contained(make())


def test_strings_from_elsewhere_are_text_and_nothing_else():
    text = render_html(full_report(), small_pictures())
    page = Page(text)
    assert EVIL not in text
    for said in (
        f"few images of {EVIL}", f"new {EVIL}", f"Samples of {EVIL}", f"asked for {EVIL}",
        f"--name '{EVIL}'", f'[1, "{EVIL}"]'.replace('"x"', '\\"x\\"'), "\u732b",
        "https://example.org/w.pth", f"samples_{EVIL}.png",
    ):  # fmt: skip
        assert said in page.text
    titles = [attrs["title"] for attrs in page.all("span") if "title" in attrs]
    assert titles[:2] == ["cat", EVIL]
    assert page.all("img")[0]["alt"] == f"Samples of {EVIL}"


def test_names_in_charts_are_text_of_the_page():
    """Dollars would be mathematics to matplotlib, and an underscore would hide a line."""
    rows = [
        {"cfg_scale": x, "num_inference_steps": name, "metrics": {f"$x^{EVIL}": 0.5}}
        for name in ("_first", f"${EVIL}") for x in (1.0, 2.0)
    ]  # fmt: skip
    page = assert_self_contained(render_html({"sweep": rows}, {}))
    assert list(page.charts()) == [f"$x^{EVIL} against cfg_scale"]
    assert f"${EVIL} steps" in page.text
    assert "_first steps" in page.text


def test_the_end_of_long_texts_is_left_out_but_not_that_of_the_command():
    long = "x" * (MAX_TEXT + 500)
    made = {"command": f"python evaluate.py {long}", "sampler": long}
    page = Page(render_html({"warnings": [long], "provenance": made}, {}))
    assert page.text.count(f"{long[:MAX_TEXT]} ... (500 more characters)") == 3
    assert f"python evaluate.py {long}\n" in page.text


def test_parts_come_in_the_order_of_reading():
    text = render_html(full_report(), small_pictures())
    headings = re.findall(r"<h[12]>(.*?)</h[12]>", text)
    assert headings == [
        "Evaluation of digits/best_model.pth", "Warnings", "Metrics", "Accuracy of each class",
        "Confusion", "Pictures", "Sweep", "Compared with an older report", "Provenance",
        "Run it again",
    ]  # fmt: skip
    assert re.findall(r"<h2>", render_html({}, {})) == []
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    assert facts["cfg_scale"] == "1, 2, 4"
    assert facts["steps"] == "10, 25"
    assert facts["images"] == "30"
    one = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", render_html(small_report(), {})))
    assert (one["cfg_scale"], one["steps"], one["step"]) == ("2", "25", "902")


def rows_of(text: str, name: str) -> dict[str, list[str]]:
    """Cells of a table by the text of the first one, without tags."""
    table = re.search(rf'<table class="{name}">(.*?)</table>', text, re.DOTALL)[1]
    found = {}
    for row in re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL):
        cells = [
            html.unescape(re.sub("<[^>]+>", " ", cell))
            for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL)
        ]
        found[" ".join(cells[0].split())] = [" ".join(cell.split()) for cell in cells[1:]]
    return found


def test_metrics_say_what_they_compare_with_and_why_they_are_missing():
    rows = rows_of(render_html(full_report(), {}), "metrics")
    found = {label.split(" ")[0]: cells for label, cells in rows.items()}
    assert found["FID"][0] == "\u2013"
    assert found["FID"][3].startswith("\u25cb skipped get https://example.org/w.pth or name it")
    assert found["Inception"] == [
        "2.5000",
        "\u00b1 0.2500",
        "higher",
        "\u25b2 unreliable few images",
    ]
    assert found["KID"] == ["0.00012", "\u00b1 5e-05", "lower", "\u2713 ok"]
    assert found["Recall"] == ["0.6100", "", "higher", ""]
    assert found["Class"][:2] == [
        "0.7330", "ceiling (real images): 0.9800 95 % interval 0.5600 to 0.8600",
    ]  # fmt: skip
    assert [cells[1] for label, cells in rows.items() if label.startswith("LPIPS")] == [
        "\u00b1 0.0100 real images: 0.3000", "\u00b1 0.0100 real images: 0.2500",
    ]  # fmt: skip
    assert found["Memorisation"][1] == "real images not seen: 0.0100 flagged"
    assert found["new"][3] == "\u2715 failed OutOfMemoryError"


def test_comparison_tells_better_from_worse():
    text = render_html({"comparison": full_report()["comparison"]}, {})
    rows = rows_of(text, "numbers")
    assert rows["class_acc"] == ["0.7000", "0.7330", "+0.0330 better", ""]
    assert rows["fd_domain"] == ["2.0000", "3.5000", "+1.5000 worse", ""]
    assert rows["fid"] == ["12.0000", "\u2013", "\u2013", ""]
    assert rows["kid"] == ["1.5000", "1.0000", "-0.5000", f"not comparable, {EVIL} differ"]


def of_classes(**accuracy) -> str:
    """The page of a report whose only metric is the class accuracy."""
    return render_html({"metrics": {"class_acc": accuracy}}, {})


def test_confusion_cells_hold_counts_and_the_share_of_their_row():
    names = dict.fromkeys("abc", 0.5)
    text = of_classes(confusion=[[8, 1, 1], [0, 5, 5], [0, 0, 0]], per_class=names)
    rows = rows_of(text, "matrix")
    assert rows == {"": ["a", "b", "c"], "a": ["8", "1", "1"], "b": ["", "5", "5"], "c": [""] * 3}
    shades = re.findall(r'class="([a-z ]+)" style="--shade:([.\d]+)"', text)
    assert shades[0] == ("right full", f"{0.15 + 0.85 * 0.8:.2f}")
    assert shades[1] == ("wrong", "0.23")  # 0.15 + 0.085
    assert shades[2:] == [shades[1], ("right", "0.57"), ("wrong", "0.57")]


def test_bars_show_the_share_beside_that_of_real_images():
    text = of_classes(per_class={"a": 0.5, "b": None, "c": 1}, per_class_real={"a": 0.875})
    assert re.findall(r'style="(width|left):([.\d]+%)"', text) == [
        ("width", "50.0%"), ("left", "87.5%"), ("width", "100.0%"),
    ]  # fmt: skip
    assert re.findall(r'title="(.*?)"', text) == ["a", "c"]
    assert "The worst" not in text


def test_of_many_classes_the_worst_are_shown():
    num, worst = evaluation.MAX_CLASSES + 1, evaluation.WORST
    shares = np.linspace(1, 0, num)
    counts = np.zeros((num, num), dtype=int)
    counts[range(num), range(num)] = np.round(1000 * shares)
    counts[:, 0] += 1000 - counts.sum(1)
    counts[num - 1] = 0  # never asked for
    names = [f"class {k}" for k in range(num)]
    text = of_classes(
        confusion=counts.tolist(), per_class=dict(zip(names, shares.tolist(), strict=True))
    )
    rows = rows_of(text, "matrix upright")
    assert rows.pop("") == list(rows) == names[num - 1 - worst : num - 1]
    assert re.findall(r'title="(.*?)"', text) == names[: -worst - 1 : -1]
    assert text.count(f"The worst {worst} of {num} classes") == 2


def test_large_pages_shrink_their_pictures_and_say_so():
    big = {"a": Picture(noise(900, 900), "Big"), "b": Picture(noise(64, 64), "Small")}
    text = render_html(full_report(), big)
    assert len(text) <= MAX_BYTES
    assert "Shown at 1/2 of its size to keep this page below 2 MB." in text
    sizes = {}
    for attrs in Page(text).pictures():
        data = base64.b64decode(attrs["src"].partition(",")[2])
        sizes[attrs["alt"]] = Image.open(io.BytesIO(data)).size, attrs["width"]
    assert sizes == {"Big": ((450, 450), "900"), "Small": ((64, 64), "320")}


def test_pictures_that_cannot_be_shrunk_enough_are_left_out(monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_BYTES", len(render_html(full_report(), {})) + 3000)
    big = {str(k): Picture(noise(800, 800), f"Picture {k}") for k in range(3)}
    text = render_html(full_report(), big)
    assert Page(text).pictures() == []
    assert text.count("Left out to keep this page below") == 3


def test_no_size_of_pictures_exceeds_the_cap(monkeypatch):
    pictures = {
        "a": Picture(noise(90, 90), "A", "a long caption, that stays, " * 100),
        "b": Picture(noise(60, 60), EVIL),
    }
    monkeypatch.setattr(evaluation, "MAX_BYTES", 0)
    words = len(render_html({}, pictures)) + 20  # the limits that captions name are longer below
    shown = set()
    for cap in range(words, words + 60_000, 700):
        monkeypatch.setattr(evaluation, "MAX_BYTES", cap)
        text = render_html({}, pictures)
        assert len(text) <= cap
        shown.add(tuple(attrs["alt"] for attrs in Page(text).all("img")))
    assert shown >= {(), ("A", EVIL)}


def test_pictures_keep_their_pixels():
    pictures = small_pictures()
    images = Page(render_html({}, pictures)).all("img")
    for picture, attrs in zip(pictures.values(), images, strict=True):
        data = base64.b64decode(attrs["src"].partition(",")[2])
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), picture.image)


# --- sweeps


def test_sweep_draws_a_line_for_each_number_of_steps():
    page = Page(render_html(full_report(), {}))
    assert list(page.charts()) == ["class_acc against cfg_scale"]  # FID has no value
    assert "10 steps" in page.text
    assert "25 steps" in page.text
    (chart, none), legend = evaluation.sweep_charts(full_report()["sweep"])
    assert (chart, none.title) == (None, "class_acc")
    assert list(legend) == ["10 steps", "25 steps"]
    assert len(set(legend.values())) == 2
    steps = [
        {"cfg_scale": 1.0, "num_inference_steps": n, "metrics": {"kid": 1 / n}} for n in (10, 20)
    ]
    page = Page(render_html({"sweep": steps}, {}))
    assert list(page.charts()) == ["kid against num_inference_steps"]
    assert "1 cfg_scale" in page.text


def test_repeats_are_told_and_their_mean_is_drawn(monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluation, "draw_chart", lambda *chart: drawn.append(chart))
    text = render_html(repeated_sweep(), {})
    assert [chart[2] for chart in drawn if chart[0] == "class_acc"] == [
        {"25 steps": [(1.0, pytest.approx(0.6)), (2.0, pytest.approx(0.9))]}
    ]
    assert re.findall(r"<h2>(.*?)</h2>", text)[:2] == ["Sweep", "Repeats with other seeds"]
    repeats = text[text.index("Repeats with other seeds") :]
    rows = rows_of(repeats, "numbers")
    assert rows["2"] == ["25", "[0, 30]", "mean 0.9000 std 0.1414 min 0.8000"]
    assert text.count("report_30.json") == 2


def test_a_sweep_in_any_order_is_drawn_from_left_to_right(monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluation, "draw_chart", lambda *chart: drawn.append(chart))
    rows = [
        {"cfg_scale": scale, "num_inference_steps": 25, "metrics": {"fid": 10 * scale}}
        for scale in (4.0, 1.0, 2.0)
    ]
    evaluation.sweep_charts(rows)
    (chart,) = drawn
    assert chart[2] == {"25 steps": [(1.0, 10.0), (2.0, 20.0), (4.0, 40.0)]}


def test_values_that_cannot_be_drawn_cost_their_chart_and_not_the_page(monkeypatch):
    monkeypatch.setattr("reporting.charts.draw_lines", lambda *_: 1 / 0)
    page = Page(render_html(full_report(), {}))
    assert page.charts() == {}
    assert "not drawn: division by zero" in page.text
    assert "Compared with an older report" in page.text


# --- the schema


def test_real_reports_have_what_the_schema_requires():
    report = json.loads(json.dumps(small_report()))
    known, patterns = SCHEMA["properties"], SCHEMA["patternProperties"]
    assert set(SCHEMA["required"]) <= set(report)
    for key in report:
        assert key in known or any(re.search(pattern, key) for pattern in patterns)
    statuses = SCHEMA["$defs"]["entry"]["properties"]["status"]["enum"]
    for found in report["metrics"].values():
        assert set(SCHEMA["$defs"]["entry"]["required"]) <= set(found)
        assert found["status"] in statuses
    assert set(known["provenance"]["required"]) <= set(report["provenance"])


def test_schema_takes_real_reports_and_refuses_others():
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    named = entry("unreliable", 12.5, "few", name="fid_50k", raw=12.5)
    for report in (
        small_report(), full_report(), repeated_sweep(), build_report({}, provenance={}),
        build_report({"fid": named, "is": entry("ok", math.nan)}, provenance={"step": 1}),
    ):  # fmt: skip
        assert [error.message for error in validator.iter_errors(report)] == []
    wrong = {
        "status": lambda r: r["metrics"]["fid"].update(status="fine"),
        "value": lambda r: r["metrics"]["is"].update(value="2.5"),
        "reason": lambda r: r["metrics"]["fid"].update(reason=None),
        "skipped": lambda r: r["metrics"]["fid"].update(value=1.0),
        "accuracy": lambda r: r.update(class_accuracy=73.3),
        "missing": lambda r: r.pop("IS_std"),
        "unknown": lambda r: r.update(fid_50K=1.0),
        "sweep": lambda r: r["sweep"][0].pop("metrics"),
        "ci95": lambda r: r["metrics"]["class_acc"].update(ci95=[0.1]),
    }
    for name, spoil in wrong.items():
        report = full_report()
        spoil(report)
        assert not validator.is_valid(report), name


# --- a real browser

DRIVER = """<!DOCTYPE html><meta charset="utf-8"><body><script>
const pages = PAGES, found = [];
for (const [width, text] of pages) {
  const frame = document.createElement("iframe");
  frame.style = `width:${width}px;height:800px`;
  frame.onload = () => {
    const page = frame.contentDocument, root = page.documentElement;
    found.push({
      width: root.clientWidth, content: root.scrollWidth,
      images: [...page.images].map(image => image.naturalWidth),
      heading: page.querySelector("h1").textContent,
    });
    if (found.length === pages.length) {
      const result = document.createElement("pre");
      result.id = "result";
      result.textContent = JSON.stringify(found);
      document.body.replaceChildren(result);
    }
  };
  frame.srcdoc = text;
  document.body.append(frame);
}
</script></body>"""


def find_chromium() -> str | None:
    names = filter(None, (os.environ.get("CHROMIUM"), *CHROMIUM_NAMES))
    return next(filter(None, map(shutil.which, names)), None)


def open_in_chromium(chromium: str, folder: Path, pages: list[tuple[int, str]]):
    """What the pages look like in frames of these widths, and what the console says."""
    driver = folder / "driver.html"
    pages_json = json.dumps(pages).replace("</", "<\\/").replace("<!--", "<\\!--")
    driver.write_text(DRIVER.replace("PAGES", pages_json))
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=10000", "--dump-dom",
        driver.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    result = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert result, f"exit code {done.returncode}: {done.stderr[-2000:]}"
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(html.unescape(result[1])), console


@pytest.mark.browser
def test_a_browser_shows_the_page(tmp_path):
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium: apt-get install chromium, or name one in $CHROMIUM")
    names = [f"a rather long name of class {k}" for k in range(60)]
    report = full_report()
    report["metrics"]["class_acc"] |= {
        "per_class": dict.fromkeys(names, 0.5),
        "confusion": np.full((60, 60), 100).tolist(),
    }
    pages = [(320, render_html(report, small_pictures())), (1200, PAGES["full"]())]
    found, console = open_in_chromium(chromium, tmp_path, pages)
    assert console == []
    assert sorted(page["width"] for page in found) == [320, 1200]
    for page in found:
        assert page["images"][:2] == [60, 8]
        assert all(page["images"])
        assert page["content"] == page["width"], "wider than the window"
        assert page["heading"] == "Evaluation of digits/best_model.pth"
    # The same check does see a page that reaches out.
    reaching = pages[1][1].replace("</h1>", '</h1><img src="https://example.invalid/x.png">')
    _, console = open_in_chromium(chromium, tmp_path, [(1200, reaching)])
    assert len(console) == 1
    assert "Content Security Policy" in console[0]
