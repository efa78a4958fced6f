"""The notebooks: the same code in both languages, outputs as they were made, and it runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.test_docs import CHINESE, ENGLISH, FENCE, HAN, links_in

FOLDER = ROOT / "notebooks"
IN_ENGLISH, IN_CHINESE = FOLDER / "first_steps.ipynb", FOLDER / "first_steps_zh.ipynb"
BOTH = [IN_ENGLISH, IN_CHINESE]
MAX_BYTES = 400_000
FORMULA = re.compile(r"\$\$.*?\$\$", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def cells(path: Path, kind: str = "") -> list[dict[str, Any]]:
    """Its cells, all or of one kind, each with the lines of its source joined."""
    listed = json.loads(path.read_text(encoding="utf-8"))["cells"]
    joined = [{**cell, "source": "".join(cell["source"])} for cell in listed]
    return [cell for cell in joined if kind in cell["cell_type"]]


def pictures_by_cell(code: list[dict[str, Any]]) -> list[int]:
    return [sum("image/png" in out.get("data", {}) for out in cell["outputs"]) for cell in code]


def test_there_are_two() -> None:
    assert sorted(FOLDER.glob("*.ipynb")) == BOTH


@pytest.mark.parametrize("path", BOTH, ids=lambda path: path.stem)
def test_notebooks_are_valid_and_small(path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(path, as_version=4))
    assert path.stat().st_size < MAX_BYTES


def test_outputs_are_those_of_one_run_from_top_to_bottom_without_errors() -> None:
    code = cells(IN_ENGLISH, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert sum(pictures_by_cell(code)) >= 5
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    streams = [output for output in outputs if output["output_type"] == "stream"]
    assert {output["name"] for output in streams} == {"stdout"}
    printed = "".join("".join(output["text"]) for output in streams)
    assert not re.search(r"(?<!\w)/\w+/", printed), "a path of the machine it ran on"


def test_code_and_outputs_are_the_same_in_both_languages() -> None:
    ours, theirs = (cells(path, "code") for path in BOTH)
    assert ours == theirs


def test_texts_have_the_same_outline_and_formulas_in_both_languages() -> None:
    ours, theirs = map(cells, BOTH)
    assert [cell["id"] for cell in ours] == [cell["id"] for cell in theirs]
    for cell, other in zip(*(cells(path, "markdown") for path in BOTH), strict=True):
        text, translated = cell["source"], other["source"]
        assert text.isascii()
        assert HAN.search(translated), translated
        for same in (FORMULA, FENCE):
            assert same.findall(text) == same.findall(translated)


@pytest.mark.parametrize("path", BOTH, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    links = [link for cell in cells(path, "markdown") for link in LINK.findall(cell["source"])]
    assert len(links) >= 4
    assert not [link for link in links if not (FOLDER / link).is_file()]


@pytest.mark.parametrize(("readme", "path"), [(ENGLISH, IN_ENGLISH), (CHINESE, IN_CHINESE)])
def test_readmes_link_the_notebook_of_their_language(readme: Path, path: Path) -> None:
    assert path.relative_to(ROOT).as_posix() in links_in(readme)


@pytest.mark.parametrize("start", [ROOT, FOLDER], ids=["root", "notebooks"])
def test_first_cell_goes_to_the_root(start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(start)
    exec(cells(IN_ENGLISH, "code")[0]["source"], {})
    assert Path.cwd() == ROOT


def test_first_cell_says_where_to_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="outside the project: start this notebook inside"):
        exec(cells(IN_ENGLISH, "code")[0]["source"], {})


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(900)  # a minute of computing, on a machine that may do other things
def test_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its asserts are the test: each formula equals the project's function."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where it trains
    notebook = nbformat.read(IN_ENGLISH, as_version=4)
    resources = {"metadata": {"path": str(FOLDER)}}
    nbclient.NotebookClient(notebook, timeout=800, resources=resources).execute()
    executed = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert pictures_by_cell(executed) == pictures_by_cell(cells(IN_ENGLISH, "code"))
    assert not list(tmp_path.glob("first_steps_*")), "what it trained is still there"
