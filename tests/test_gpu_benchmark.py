"""`make gpu` tried out on a CPU: what one part does to the others, and to the page of results."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import gpu
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "performance.md"
FACTS = {"gpu": "NVIDIA X", "cpu": "Y", "torch": "2.14.1", "commit": "abc"}


@pytest.fixture
def run_parts(tmp_path, monkeypatch) -> Callable[..., tuple[int, list[dict]]]:
    """Runs parts that are made up; returns the exit code and the lines of the results."""

    def run(parts: dict[str, Callable], *options: str) -> tuple[int, list[dict]]:
        monkeypatch.setattr(gpu, "PARTS", {name: (part, 1) for name, part in parts.items()})
        path = tmp_path / "results" / "gpu.jsonl"
        code = gpu.main(["--device", "cpu", "--results", str(path), *options])
        return code, gpu.read_lines(path)

    return run


def test_a_part_that_fails_or_runs_out_of_time_takes_nothing_from_the_others(
    run_parts, tmp_path, monkeypatch
):
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    asleep = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(99)"

    def too_slow(args, seconds, write):
        write({"row": 1})
        log = tmp_path / "slow.log"
        gpu.check(gpu.run(["-c", asleep], 0.1, log), log)

    def broken(args, seconds, write):
        log = tmp_path / "broken.log"
        gpu.check(gpu.run(["-c", "raise SystemExit('no such thing')"], 20, log), log)

    def good(args, seconds, write):
        write({"row": seconds <= 60})

    begun = time.monotonic()
    code, rows = run_parts({"slow": too_slow, "broken": broken, "good": good})
    assert code == 1
    assert time.monotonic() - begun < 20
    ends = {row["part"]: row["problem"] for row in rows if "end" in row}
    assert ends.pop("broken") == "exit code 1: no such thing"
    assert ends == {"slow": "its time was up", "good": None}
    assert {row["part"]: row["row"] for row in rows if "row" in row} == {"slow": 1, "good": True}


def test_parts_are_chosen_and_share_the_time(run_parts):
    seconds = []
    parts = {name: lambda args, given, write: seconds.append(given) for name in "abc"}
    code, rows = run_parts(parts, "--parts", "c", "a", "--minutes", "0.5")
    assert code == 0
    assert [row["part"] for row in rows if "begin" in row] == ["c", "a"]
    assert 0 < seconds[1] <= seconds[0] <= 30


def filled(folder: Path, rows: list[dict] | None) -> str:
    page, results = folder / "page.md", folder / "gpu.jsonl"
    shutil.copy(PAGE, page)
    paths = [str(page)]
    if rows is not None:
        results.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        paths.append(str(results))
    for _ in range(2):  # filled once more it stays the same
        assert gpu.main(["--fill", *paths]) == 0
    return page.read_text(encoding="utf-8")


def test_without_results_the_page_says_so_in_a_sentence(tmp_path):
    text = filled(tmp_path, None)
    assert f"{gpu.BEGIN}\n\n{gpu.NOT_RUN}\n\n{gpu.END}" in text
    with pytest.raises(SystemExit, match=r"no file .*typo\.jsonl"):
        gpu.main(["--fill", str(tmp_path / "page.md"), str(tmp_path / "typo.jsonl")])
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == text


def test_the_page_shows_the_newest_results_and_what_is_missing(tmp_path):
    speed = {"network": "UNet", "compiled": "graphs", "training, images/s": 6543.21}
    ratio = "train: ours is x faster per FLOP"
    rows = [
        {"part": "speed", "begin": FACTS},
        {"part": "speed", **speed, "training, images/s": 1.0},
        {"part": "speed", "begin": FACTS},
        {"part": "speed", **speed},
        {"part": "speed", "network": "DiM", "compiled": "eager", "skipped": "no kernel"},
        {"part": "speed", "end": 9.0, "problem": "its time was up"},
        {"part": "tests", "begin": FACTS},
        {"part": "tests", "passed": 4, "skipped": 1, "failed": ["tests/a.py::b"]},
        {"part": "tests", "end": 9.0, "problem": None},
        {"part": "peers", "begin": FACTS},
        {"part": "peers", "network": "diffusers DiT", "width": 64, ratio: [1.0, 1.1, 1.2]},
    ]
    before, begin, rest = filled(tmp_path, rows).partition(gpu.BEGIN)
    content, end, after = rest.partition(gpu.END)
    shipped = PAGE.read_text(encoding="utf-8")
    assert shipped.startswith(before + begin)
    assert shipped.endswith(end + after)
    assert "| UNet | graphs | - | 6543 |" in content
    assert "| 1 |" not in content  # of the older run
    assert "Left out: DiM, eager (no kernel)." in content
    assert "**speed** (NVIDIA X, torch 2.14.1, commit abc); ended early: its time was up" in content
    assert "4 passed, 1 skipped, 1 failed: `tests/a.py::b`" in content
    assert "1.10 (1.00 to 1.20)" in content
    assert "ended early: it was cut off" in content  # peers: its last line is missing
    assert content.strip().endswith("Not run on a GPU yet: cifar10.")


def test_benchmarks_that_take_a_gpu_use_tf32_as_training_does():
    """By `set_up`, or because what they time is train.py."""
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if ("parse_args" in text and '"cuda"' in text) or "add_options(parser" in text:
            assert "set_up(" in text or '"train.py"' in text, path.name


@pytest.mark.slow
@pytest.mark.ci
def test_a_dry_run_measures_every_part_and_fills_the_page(tmp_path):
    results, page = tmp_path / "gpu.jsonl", tmp_path / "page.md"
    options = ["--device", "cpu", "--tiny", "--minutes", "8", "--data", "dataset=synthetic"]
    assert gpu.main([*options, "--results", str(results)]) == 0
    rows = gpu.read_lines(results)
    assert [row["problem"] for row in rows if "end" in row] == [None] * 4
    for part in gpu.PARTS:
        assert any(row["part"] == part and not row.keys() & {"begin", "end"} for row in rows)
    assert (tmp_path / "gpu_cifar10" / "pictures" / "samples.png").is_file()
    shutil.copy(PAGE, page)
    assert gpu.main(["--fill", str(page), str(results)]) == 0
    text = page.read_text(encoding="utf-8")
    assert all(f"**{part}** (a CPU" in text for part in gpu.PARTS)
    assert "| sanity, 8 images |" in text
