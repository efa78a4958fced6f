"""The documentation says what the code does: commands parse, keys exist, files are there."""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from torch.distributed.run import get_args_parser

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
EXTENDING = ROOT / "docs" / "extending.md"  # tests/test_extending.py does what it says
PAGES = [ENGLISH, CHINESE, *sorted({*(ROOT / "docs").glob("*.md")} - {EXTENDING})]
TRANSLATIONS = {p.with_name(p.name.replace("_zh", "")): p for p in PAGES if p.stem.endswith("_zh")}
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
LISTED_IN = {  # of one table there, each has a row
    "shipped configs": ("configs", CONFIG_FILES),
    "data sets": ("configs", DATASETS),
    "backbones": ("configs", BACKBONES),
    "samplers": ("sampling", SAMPLERS),
    "metrics": ("metrics", METRICS),
}
MAX_README_LINES, MAX_PICTURE_KIB, MAX_PICTURES_KIB = 200, 150, 3000
EXAMPLE_CONFIGS = ("configs/flowers.py",)  # what the reader writes
FOLDERS = "configs|docs|datasets|models|diffusion|metrics|utils|tests|benchmarks|weights"

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)|<img[^>]*src=\"([^\"]+)\"")
CODE_SPAN = re.compile(r"`([^`\n]+)`")
OVERRIDE = re.compile(r"([a-z_]+)(\.[a-z_]+)?=\S+")
BEFORE_COMMENT = re.compile(r".*(?:#|  )")
HEADING = re.compile(r"^(#+) (.*)$", re.MULTILINE)
THEIR_COLUMN = re.compile(r"^\|[^|]*(?=\|)", re.MULTILINE)
TABLE = re.compile(r"(?:^\|.*$\n?)+", re.MULTILINE)
LITERAL = re.compile(r"`[^`]+`|\d+(?:[.,]\d+)*")  # what a translation leaves as it is
HAN = re.compile(r"[\u4e00-\u9fff]")
IN_ENGLISH_MARK = "\uff08\u82f1\u6587\uff09"  # behind a link from a Chinese page to an English one


class Block(NamedTuple):
    """A fenced code block."""

    page: str
    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    return [Block(page.name, *match) for match in FENCE.findall(page.read_text(encoding="utf-8"))]


def prose_of(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def our_words_in(page: Path) -> list[str]:
    """What the page sets as code, but for other projects' words: the first column of migration."""
    prose = prose_of(page)
    ours = THEIR_COLUMN.sub("", prose) if page.name.startswith("migration") else prose
    return CODE_SPAN.findall(ours)


def links_in(page: Path) -> list[str]:
    return [a or b for a, b in LINK.findall(prose_of(page))]


def place_of(page: Path, target: str) -> tuple[str, int]:
    """The file, and the number of the heading in it, that a link leads to: the same numbers in all
    languages. A ValueError names an anchor that does not exist."""
    name, _, anchor = target.partition("#")
    if "://" in name:
        return target, -1
    path = (page.parent / name).resolve() if name else page
    headings = [text for _, text in HEADING.findall(prose_of(path))] if anchor else []
    anchors = [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings]
    number = anchors.index(anchor) if anchor else -1
    return path.relative_to(ROOT).as_posix().replace("_zh.", "."), number


def is_same_but_for_a_comment(line: str, translated: str) -> bool:
    """Whether nothing but a comment, in Chinese, differs: it stands behind # or two spaces."""
    han = HAN.search(translated)
    code = BEFORE_COMMENT.match(translated[: han.start()]) if han else None
    return line == translated or (code is not None and line.startswith(code[0]))


def tables_in(text: str) -> list[list[list[str]]]:
    """The cells of each row of each table, without the heads."""
    tables = [table.splitlines()[2:] for table in TABLE.findall(text)]
    return [[[cell.strip() for cell in row[1:-1].split("|")] for row in rows] for rows in tables]


def commands() -> list[tuple[str, str, list[str]]]:
    """(page, script, its arguments) of every command line in a shell block."""
    found = []
    for block in BLOCKS:
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


# Those of a translation are the same, see test_translations_have_the_same_outline.
BLOCKS = [block for page in IN_ENGLISH for block in blocks_of(page)]
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


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language == "yaml" or "config = dict(" in b.text]
)
def test_configs_in_the_text_load(block: Block, tmp_path: Path) -> None:
    for name in CONFIG_FILES:
        shutil.copy(ROOT / "configs" / name, tmp_path)
    path = tmp_path / ("documented.py" if block.language == "python" else "documented.yml")
    path.write_text(block.text, encoding="utf-8")
    load_config(path, checks=CONFIG_CHECKS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_in_the_text_exist(page: Path) -> None:
    words = [w for span in our_words_in(page) for w in span.split() if not span.startswith("u + ")]
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
        for span in our_words_in(page)
        for option in re.findall(r"(?<!\S)--[a-z][a-z0-9_-]*", span)
    }
    wrong = {o for o in used - theirs if "--" + o[2:].replace("-", "_") not in ours}
    assert not wrong, f"{page.name} names options that do not exist: {sorted(wrong)}"


def reference_table() -> str:
    """The table of all keys in docs/configs.md, from the schema."""
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    body = ast.parse(inspect.getsource(Config)).body[0].body
    texts = {
        key.target.id: text.value.value
        for key, text in pairwise(body)
        if isinstance(key, ast.AnnAssign)
    }
    for name, field in Config.model_fields.items():
        meaning = " ".join(texts[name].split())
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


def test_pages_and_help_tell_of_the_option_that_torchrun_takes_for_its_own() -> None:
    """Before a script sees its command line: `--n` may be the start of torchrun's `--nnodes`."""
    for script, option in sorted(
        {(s, o) for s in SCRIPTS for p in PARSERS[s] for o in options_of(p)}
    ):
        command = ["--standalone", "--nproc_per_node=2", script, option, "8"]
        try:
            passed = get_args_parser().parse_args(command).training_script_args
        except SystemExit:
            assert option == "--n", f"{script} {option} dies under torchrun"
        else:
            assert passed == [option, "8"]
    for page in (CONFIGS, CONFIGS_ZH):
        rows = [line for line in prose_of(page).splitlines() if "`--n` " in line]
        assert len(rows) == 3
        assert all("`torchrun`" in row for row in rows), page
    for script in ("sample.py", "evaluate.py"):
        assert "(not --n under torchrun)" in " ".join(PARSERS[script][0].format_help().split())


def test_configs_zh_has_the_keys_and_defaults_of_the_schema() -> None:
    schema, page = tables_in(reference_table())[0], tables_in(prose_of(CONFIGS_ZH))[0]
    assert [row[:2] for row in page] == [row[:2] for row in schema]
    for row in page:
        assert HAN.search(row[-1]), f"docs/configs_zh.md, not in Chinese: {row}"


@pytest.mark.parametrize("page", TRANSLATIONS, ids=lambda page: page.name)
def test_translations_have_the_same_outline(page: Path) -> None:
    chinese = TRANSLATIONS[page]
    levels = [[level for level, _ in HEADING.findall(prose_of(p))] for p in (page, chinese)]
    assert levels[0] == levels[1]
    places = [sorted(place_of(p, link) for link in links_in(p)) for p in (page, chinese)]
    assert places[0] == places[1]
    for ours, theirs in zip(blocks_of(page), blocks_of(chinese), strict=True):
        assert ours.language == theirs.language
        for pair in zip(ours.text.splitlines(), theirs.text.splitlines(), strict=True):
            assert is_same_but_for_a_comment(*pair), pair


@pytest.mark.parametrize("page", TRANSLATIONS, ids=lambda page: page.name)
def test_translations_have_the_same_tables(page: Path) -> None:
    english, chinese = (tables_in(prose_of(p)) for p in (page, TRANSLATIONS[page]))
    for ours, theirs in zip(english, chinese, strict=True):
        for row, translated in zip(ours, theirs, strict=True):
            for cell, other in zip(row, translated, strict=True):
                literals = [set(LITERAL.findall(text)) for text in (cell, other)]
                assert literals[0] == literals[1], f"{row[0]}: {cell} is not {other}"


@pytest.mark.parametrize("page", TRANSLATIONS, ids=lambda page: page.name)
def test_translations_link_each_other_on_line_three(page: Path) -> None:
    chinese = TRANSLATIONS[page]
    assert f"]({chinese.name})" in page.read_text(encoding="utf-8").splitlines()[2]
    assert f"]({page.name})" in chinese.read_text(encoding="utf-8").splitlines()[2]


@pytest.mark.parametrize("page", TRANSLATIONS.values(), ids=lambda page: page.name)
def test_chinese_pages_link_chinese_pages_and_mark_the_others(page: Path) -> None:
    body = prose_of(page).split("\n", 3)[3]  # line three links the same page in English
    linked = set()
    for match in LINK.finditer(body):
        path = (page.parent / (match[1] or match[2]).partition("#")[0]).resolve()
        assert path not in TRANSLATIONS, f"{match[0]}: this page exists in Chinese, too"
        if path.suffix == ".md" and not path.stem.endswith("_zh"):
            is_marked = body.startswith(IN_ENGLISH_MARK, match.end())
            assert is_marked, f"{match[0]}: write {IN_ENGLISH_MARK} behind it"
        linked.add(path)
    if page == CHINESE:
        assert linked >= {*TRANSLATIONS.values()} - {CHINESE}


@pytest.mark.parametrize("language", ["", "_zh"])
@pytest.mark.parametrize("kind", LISTED_IN)
def test_tables_list_everything_there_is(kind: str, language: str) -> None:
    stem, names = LISTED_IN[kind]
    page = ROOT / "docs" / f"{stem}{language}.md"
    rows = [{row[0].strip("`") for row in table} for table in tables_in(prose_of(page))]
    missing = min((set(names) - listed for listed in rows), key=len)
    assert not missing, f"{page.name}, table of all {kind}: no row for {sorted(missing)}"


@pytest.mark.parametrize("readme", [ENGLISH, CHINESE], ids=lambda page: page.name)
def test_readme_is_short_and_leads_to_all_pages(readme: Path) -> None:
    assert len(readme.read_text(encoding="utf-8").splitlines()) <= MAX_README_LINES
    pages = {page.name.replace("_zh", "") for page in PAGES} | {EXTENDING.name}
    linked = {Path(place_of(readme, link)[0]).name for link in links_in(readme)}
    assert pages - {ENGLISH.name} <= linked, f"{readme.name} leads to them nowhere"


def test_pictures_are_small() -> None:
    sizes = {p.name: p.stat().st_size / 1024 for p in (ROOT / "docs" / "images").iterdir()}
    assert {name: kib for name, kib in sizes.items() if kib > MAX_PICTURE_KIB} == {}
    assert sum(sizes.values()) < MAX_PICTURES_KIB


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in links_in(page) if "://" not in link]
    paths = [page.parent / link.partition("#")[0] for link in links]
    for link in links:
        place_of(page, link)  # ValueError if there is no such heading
    suffixes = "py|md|yml|png|gif|safetensors"
    named = re.findall(rf"(?<![\w./-])((?:{FOLDERS})/[\w/]+\.(?:{suffixes}))\b", text)
    named += re.findall(r"`([a-z_]+\.py)`", text)
    for name in named:
        if name not in EXAMPLE_CONFIGS:
            is_config = name in CONFIG_FILES
            paths.append(ROOT / "configs" / name if is_config else ROOT / name)
    for path in paths:
        relative = path.resolve().relative_to(ROOT).as_posix()
        assert path.exists(), f"{page.name}: {relative} does not exist"


@pytest.mark.parametrize("page", IN_ENGLISH, ids=lambda page: page.name)
def test_english_pages_are_ascii(page: Path) -> None:
    page.read_text(encoding="utf-8").encode("ascii")  # UnicodeEncodeError names the place


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_picture_is_remote(page: Path) -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    assert not [picture for picture in pictures if "://" in picture]
