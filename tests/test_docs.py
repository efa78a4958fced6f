"""The documentation says what the code does: commands parse, keys exist, files are there."""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

import edit
import evaluate
import export
import runs
import sample
import train
from datasets import DATASETS
from diffusion import SAMPLERS
from generation.run import CONFIG_CHECKS
from metrics import METRICS
from models import BACKBONES
from utils.cli import parse_args
from utils.config import Config, RawConfig, apply_overrides, load_config, validate

ROOT = Path(__file__).parents[1]
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README_zh.md"
CONFIGS, CONFIGS_ZH = ROOT / "docs" / "configs.md", ROOT / "docs" / "configs_zh.md"
TRANSLATIONS = {ENGLISH: CHINESE, CONFIGS: CONFIGS_ZH}
EXTENDING = ROOT / "docs" / "extending.md"  # tests/test_extending.py does what it says
PAGES = [ENGLISH, CHINESE, *sorted({*(ROOT / "docs").glob("*.md")} - {EXTENDING})]
IN_ENGLISH = [page for page in PAGES if page not in TRANSLATIONS.values()]
SCRIPTS: dict[str, ModuleType] = {
    "train.py": train,
    "sample.py": sample,
    "edit.py": edit,
    "evaluate.py": evaluate,
    "runs.py": runs,
    "export.py": export,
}
PARSERS = {name: [script.make_parser()] for name, script in SCRIPTS.items()}
PARSERS["runs.py"].append(runs.make_parser(runs.REPORT))
CONFIG_FILES = sorted(p.name for p in (ROOT / "configs").iterdir() if p.is_file())
# What the reader writes or training makes, and what may be added after the pages that link it.
EXAMPLE_CONFIGS = ("configs/flowers.py",)
MAY_BE_MISSING = ("docs/images/", "docs/results.md")
FOLDERS = "configs|docs|datasets|models|diffusion|metrics|utils|tests|benchmarks"

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)|<img[^>]*src=\"([^\"]+)\"")
CODE_SPAN = re.compile(r"`([^`\n]+)`")
OVERRIDE = re.compile(r"([a-z_]+)(\.[a-z_]+)?=\S+")
COMMENT = re.compile(r"(?:^|[ \t]+)#.*$", re.MULTILINE)
HEADING = re.compile(r"^#+(?= )", re.MULTILINE)
TABLE = re.compile(r"(?:^\|.*$\n?)+", re.MULTILINE)
LITERAL = re.compile(r"`[^`]+`|\d+(?:[.,]\d+)*")  # what a translation leaves as it is
HAN = re.compile(r"[\u4e00-\u9fff]")


class Block(NamedTuple):
    """A fenced code block."""

    page: str
    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    return [Block(page.name, *match) for match in FENCE.findall(page.read_text(encoding="utf-8"))]


def prose_of(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def tables_in(text: str) -> list[list[list[str]]]:
    """The cells of each row of each table, without the heads."""
    tables = [table.splitlines()[2:] for table in TABLE.findall(text)]
    return [[[cell.strip() for cell in row[1:-1].split("|")] for row in rows] for rows in tables]


def commands() -> list[tuple[str, str, list[str]]]:
    """(page, script, its arguments) of every command line in a shell block."""
    found = []
    for block in (block for page in PAGES for block in blocks_of(page)):
        if block.language not in ("bash", "sh"):
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for number, word in enumerate(words):
                if word in SCRIPTS:
                    found.append((block.page, word, words[number + 1 :]))
    return found


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    """All its option names, and those of its subcommands."""
    found, parsers = set(), [parser]
    while parsers:
        for action in parsers.pop()._actions:
            found |= set(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
COMMANDS = commands()


def test_there_is_something_to_check() -> None:
    assert {script for _, script, _ in COMMANDS} == set(SCRIPTS)
    assert len(BLOCKS) > 20


@pytest.mark.parametrize(("page", "script", "arguments"), COMMANDS)
def test_commands_are_accepted(page: str, script: str, arguments: list[str]) -> None:
    if script == "runs.py":
        runs.parse(arguments)
        return
    args = parse_args(SCRIPTS[script].make_parser(), arguments)  # SystemExit if it is not
    if script == "train.py":
        known = args.config not in EXAMPLE_CONFIGS
        path = ROOT / (args.config if known else "configs/custom_folder.py")
        load_config(path, args.overrides, checks=CONFIG_CHECKS)
        return
    raw = RawConfig({"experiment_name": "documented"}, {})
    problems = apply_overrides(raw, args.overrides)
    validate(raw, checks=CONFIG_CHECKS, problems=problems)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in ("python", "yaml")])
def test_configs_in_the_text_load(block: Block, tmp_path: Path) -> None:
    for name in CONFIG_FILES:
        shutil.copy(ROOT / "configs" / name, tmp_path)
    path = tmp_path / ("documented.py" if block.language == "python" else "documented.yml")
    path.write_text(block.text, encoding="utf-8")
    load_config(path, checks=CONFIG_CHECKS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_in_the_text_exist(page: Path) -> None:
    spans = CODE_SPAN.findall(prose_of(page))
    words = [word for span in spans for word in span.split() if not span.startswith("u + ")]
    keys = [match[1] for word in words if (match := OVERRIDE.fullmatch(word))]
    wrong = set(keys) - set(Config.model_fields) - {"key", "weights_only"}
    assert not wrong, f"{page.name} names config keys that do not exist: {sorted(wrong)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_in_the_text_exist(page: Path) -> None:
    ours = set().union(*(options_of(parser) for parsers in PARSERS.values() for parser in parsers))
    theirs = {"--nproc_per_node", "--standalone", "--max-restarts", "--rdzv_endpoint"}
    theirs |= {"--master_port"}
    used = {
        option
        for span in CODE_SPAN.findall(prose_of(page))
        for option in re.findall(r"(?<!\S)--[a-z][a-z_-]*", span)
    }
    wrong = {o for o in used - theirs if "--" + o[2:].replace("-", "_") not in ours}
    assert not wrong, f"{page.name} names options that do not exist: {sorted(wrong)}"


def reference_table() -> str:
    """The table of all keys in docs/configs.md, from the schema."""
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for name, field in Config.model_fields.items():
        meaning = " ".join(field.description.split())
        rows.append(f"| `{name}` | `{field.default!r}` | {meaning} |")
    return "\n".join(rows)


def test_reference_table_is_current() -> None:
    text = CONFIGS.read_text(encoding="utf-8")
    assert reference_table() in text, "docs/configs.md: paste reference_table() of this file anew"


@pytest.mark.parametrize("script", SCRIPTS)
def test_all_options_are_in_the_reference(script: str) -> None:
    text = CONFIGS.read_text(encoding="utf-8")
    general, _, specific = text.partition("\n`train.py`:\n")
    if script != "train.py":
        specific = specific.partition(f"\n`{script}`:\n")[2]
    specific = specific.partition("\n`")[0]
    ours = set().union(*map(options_of, PARSERS[script]))
    for option in ours - {"-h"}:
        wanted = re.compile(rf"`{option}[ `]")
        assert wanted.search(specific) or wanted.search(general), f"{script} {option}"


def test_readmes_have_the_same_code() -> None:
    english, chinese = ([b[1:] for b in blocks_of(page)] for page in (ENGLISH, CHINESE))
    assert english == chinese


def test_readmes_have_the_same_tables() -> None:
    def first_cells(page: Path) -> list[str]:
        cells = [row[0] for table in tables_in(prose_of(page)) for row in table]
        return [cell if cell.startswith("`") else "" for cell in cells]

    assert first_cells(ENGLISH) == first_cells(CHINESE)


def test_configs_zh_has_the_keys_and_defaults_of_the_schema() -> None:
    schema, page = tables_in(reference_table())[0], tables_in(prose_of(CONFIGS_ZH))[0]
    assert [row[:2] for row in page] == [row[:2] for row in schema]


def test_configs_pages_have_the_same_tables() -> None:
    english, chinese = (tables_in(prose_of(page)) for page in (CONFIGS, CONFIGS_ZH))
    for ours, theirs in zip(english, chinese, strict=True):
        assert [row[0] for row in ours] == [row[0] for row in theirs]
        for row, translated in zip(ours, theirs, strict=True):
            assert HAN.search(translated[-1]), f"docs/configs_zh.md, not in Chinese: {translated}"
            for cell, other in zip(row, translated, strict=True):
                literals = [set(LITERAL.findall(text)) for text in (cell, other)]
                assert literals[0] == literals[1], f"{row[0]}: {cell} is not {other}"


def test_configs_pages_have_the_same_headings_code_and_links() -> None:
    def outline(page: Path) -> tuple[list[str], list[tuple[str, str]], list[str]]:
        prose = prose_of(page)
        code = [(block.language, COMMENT.sub("", block.text)) for block in blocks_of(page)]
        _, *links = [a or b for a, b in LINK.findall(prose)]  # the first is the other language
        return HEADING.findall(prose), code, links

    assert outline(CONFIGS) == outline(CONFIGS_ZH)


@pytest.mark.parametrize("page", TRANSLATIONS, ids=lambda page: page.name)
def test_translations_link_each_other_on_line_three(page: Path) -> None:
    chinese = TRANSLATIONS[page]
    assert f"]({chinese.name})" in page.read_text(encoding="utf-8").splitlines()[2]
    assert f"]({page.name})" in chinese.read_text(encoding="utf-8").splitlines()[2]


def test_chinese_readme_links_chinese_pages() -> None:
    targets = [a or b for a, b in LINK.findall(prose_of(CHINESE))]
    linked = {CHINESE.parent / target.partition("#")[0] for target in targets}
    assert CONFIGS_ZH in linked
    assert CONFIGS not in linked


@pytest.mark.parametrize("readme", [ENGLISH, CHINESE], ids=lambda page: page.name)
def test_readme_lists_everything_there_is(readme: Path) -> None:
    text = prose_of(readme)
    for name in (*CONFIG_FILES, *DATASETS, *BACKBONES, *SAMPLERS, *METRICS):
        assert f"\n| `{name}` |" in text, f"{readme.name} has no row for {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = [a or b for a, b in LINK.findall(text)]
    paths = [page.parent / t.partition("#")[0] for t in targets if "://" not in t]
    named = re.findall(rf"(?<![\w./-])((?:{FOLDERS})/[\w/]+\.(?:py|md|yml|png|gif))\b", text)
    named += re.findall(r"`([a-z_]+\.py)`", text)
    for name in named:
        if name not in EXAMPLE_CONFIGS:
            is_config = name in CONFIG_FILES
            paths.append(ROOT / "configs" / name if is_config else ROOT / name)
    for path in paths:
        relative = path.resolve().relative_to(ROOT).as_posix()
        if not relative.startswith(MAY_BE_MISSING):
            assert path.exists(), f"{page.name}: {relative} does not exist"


@pytest.mark.parametrize("page", IN_ENGLISH, ids=lambda page: page.name)
def test_english_pages_are_ascii(page: Path) -> None:
    page.read_text(encoding="utf-8").encode("ascii")  # UnicodeEncodeError names the place


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_picture_is_remote(page: Path) -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    assert not [picture for picture in pictures if "://" in picture]
