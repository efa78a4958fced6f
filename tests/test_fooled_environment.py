"""Config values, terminals, variables and paths that fooled somebody: one clear line, or the value
that was meant, never a traceback."""

from __future__ import annotations

import ast
import errno
import io
import json
import os
import re
import resource
import shlex
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import edit
import evaluate
import export
import runs
import sample
import train
from datasets import check
from editing.command import Job
from tests.conftest import ROOT
from training import tracking
from training.build import log_end
from training.job import prepare
from training.signals import StopSignal
from utils.cli import normalized
from utils.config import load_config, parse_value
from utils.config_schema import Config
from utils.distributed import Runtime, choose_device, place_in_job
from utils.errors import (
    EXIT_FAILURE,
    EXIT_USAGE,
    ConfigError,
    UserError,
    exit_code_of,
    printable,
    say,
    shell_line,
)
from utils.files import write_text
from utils.logs import log_to_file, setup_logging

SLOW = (pytest.mark.slow, pytest.mark.ci)
LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PLAIN = "plain decimal number, or put it in quotes"
NUMBER = "a number is needed, as a plain decimal"


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


def config_of(content: str | bytes, name: str = "run.yml", *overrides: str) -> Config:
    """What a file of this content means."""
    content = content.encode() if isinstance(content, str) else content
    Path(name).write_bytes(content)
    return load_config(name, overrides)


# --- values

REFUSED = [  # key, what YAML has after it, a part of the error
    ("seed", "0123", PLAIN),
    ("seed", "010", PLAIN),
    ("seed", "1:30", PLAIN),
    ("learning_rate", "1:30.5", PLAIN),
    ("seed", "0x10", PLAIN),
    ("seed", "0b1", PLAIN),
    ("seed", "1_0", PLAIN),
    ("learning_rate", ".inf", PLAIN),
    ("learning_rate", ".NaN", PLAIN),
    ("experiment_name", "001", PLAIN),
    ("experiment_name", "2024-01-01", PLAIN),
    ("experiment_name", "=", PLAIN),
    ("classes", "[0, 010]", PLAIN),
    ("seed", "!!int '010'", PLAIN),
    ("seed", "0o17", NUMBER),
    ("seed", "'0123'", NUMBER),
    ("learning_rate", "'1_0.5'", NUMBER),
    ("learning_rate", "\uff11\uff12", NUMBER),
    ("image_size", "016, 16", NUMBER),
    ("seed", "yes", "not true or false"),
    ("experiment_name", "5", "put it in quotes"),
    ("experiment_name", "on", "put it in quotes"),
    ("save_dir", "~", "put it in quotes"),
    ("cfg_scale", "None", "write null"),
    ("grad_clip", "none", "write null"),
    ("sample_dir", "nUll", "write null"),
    ("seed", "!!timestamp '5'", "not valid YAML"),
    ("use_ema", "!!bool maybe", "not valid YAML"),
    ("seed", "!!python/name:os.system", "could not determine a constructor"),
]
MEANT = [
    ("learning_rate", "1e-4", 1e-4),
    ("learning_rate", ".5", 0.5),
    ("epochs", "1e3", 1000),
    ("epochs", "10_000", 10_000),
    ("epochs", "'1_000'", 1000),
    ("seed", "'12345678901234567891'", 12345678901234567891),
    ("image_size", "16,16", (16, 16)),
    ("image_size", "(16, 8)", (16, 8)),
    ("image_size", "[16, 8]", (16, 8)),
    ("eval_metrics", "fid,is", ("fid", "is")),
    ("use_ema", "off", False),
    ("cfg_scale", "NULL", None),
    ("threshold", "none", "none"),
    ("experiment_name", "'001'", "001"),
    ("experiment_name", "1e3", "1e3"),
    ("model_params", "\n  a: (1, 2)\n  b: 1e-1\n  c: x2", {"a": (1, 2), "b": 0.1, "c": "x2"}),
]


@pytest.mark.parametrize(("key", "text", "message"), REFUSED)
def test_yaml_that_means_something_else_than_it_looks_is_refused(key, text, message):
    with pytest.raises(ConfigError) as caught:
        config_of(f"{key}: {text}\n")
    assert message in str(caught.value)
    assert str(caught.value).startswith("run.yml")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("key", "text", "value"), MEANT)
def test_yaml_is_read_as_the_command_line_is(key, text, value):
    assert getattr(config_of(f"{key}: {text}\n"), key) == value


ODD_OVERRIDES = ["seed=0123", "batch_size=1_00", "seed=0x10", "seed=0b1", "seed=1:30", "seed=0o7"]
ODD_OVERRIDES += ["classes=0,010", "image_size=(16,016)", "learning_rate=1_0.5", "seed='0123'"]


@pytest.mark.parametrize("override", ODD_OVERRIDES)
def test_odd_numbers_on_the_command_line_are_refused(override):
    with pytest.raises(ConfigError, match=NUMBER):
        config_of("{}", "run.yml", override)


def test_plain_numbers_on_the_command_line_stay_what_they_were():
    for text in ("1e-05", "0.05", "-0.5", "10", "1E+04", "0", "1.0e05"):
        assert parse_value(text, "learning_rate") == float(text)
    assert config_of("{}", "run.yml", "epochs=10_000").epochs == 10_000
    assert parse_value("a0123", "experiment_name") == "a0123"
    assert config_of("config = dict(seed=0x10, batch_size=1_000)", "run.py").seed == 16


# --- files


def laughs(width: int, depth: int) -> str:
    """Mappings of aliases of mappings of aliases, `width` to the power of `depth` in the end."""
    lines = ["k0: &k0 [x]"]
    lines += [f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * width)}]" for i in range(1, depth)]
    return "\n".join(lines)


def merges(width: int, depth: int) -> str:
    lines = ["k0: &k0 {a: 1}"]
    lines += [f"k{i}: &k{i} {{<<: [{', '.join([f'*k{i - 1}'] * width)}]}}" for i in range(1, depth)]
    return "\n".join(lines)


GBK = "config = dict(project_name='\u6269\u6563')".encode("gbk")
HOSTILE = {
    "laughs.yml": (laughs(9, 10), "more than 10,000 values"),
    "merges.yml": (merges(5, 14), "more than 10,000 values"),
    "itself.yml": ("model_params: &m\n  x: [*m, *m]\n", "more than 10,000 values"),
    "many.yml": ("\n".join(f"k{i}: 1" for i in range(30_000)), "more than 10,000 values"),
    "deep.yml": ("a: " + "[" * 100_000, "not valid YAML"),
    "big.yml": ("#" * 2**21, "at most 1,048,576 bytes"),
    "big.py": ("#" * 2**21, "at most 1,048,576 bytes"),
    "deep.py": ("config = " + "-" * 100_000 + "1", "cannot be read as Python"),
    "utf16.py": ("config = {}".encode("utf-16"), "utf16.py:1: not UTF-8 text; save it anew"),
    "utf16.yml": ("seed: 1".encode("utf-16"), "utf16.yml:1: not UTF-8 text; save it anew"),
    "utf32.yml": ("seed: 1".encode("utf-32-le"), "not valid YAML"),
    "gbk.py": (b"\n" + GBK, "gbk.py:2: not UTF-8 text; save it anew"),
    "cookie.py": (b"# -*- coding: gbk -*-\n" + GBK, "cookie.py:2: not UTF-8 text"),
    "exit.py": ("raise SystemExit(0)", "running it failed: SystemExit: 0"),
    "lines.py": ("raise ValueError('a\\nb')", "running it failed: ValueError: a b"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_config_files_cost_a_line(name):
    content, message = HOSTILE[name]
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        config_of(content, name)
    assert time.monotonic() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 2**10
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_no_file_is_no_config():
    os.mkfifo("pipe.yml")
    Path("folder.yml").mkdir()
    Path("zero.yml").symlink_to("/dev/zero")
    Path("loop.yml").symlink_to("loop.yml")
    for name in ("pipe.yml", "folder.yml", "zero.yml"):
        with pytest.raises(ConfigError, match=f"{name}: not a regular file"):
            load_config(name)
    for name in ("loop.yml", "x" * 300 + ".yml", "a" * 5000):
        with pytest.raises(ConfigError, match="no such config file"):
            load_config(name)


@pytest.mark.parametrize("name", ["run.py", "run.yml"])
def test_a_byte_order_mark_is_no_fault(name):
    text = "config = dict(seed=3)" if name == "run.py" else "seed: 3"
    assert config_of(text.encode("utf-8-sig"), name).seed == 3


# --- paths

SHORT = ("resume_path", "init_from", "data_root", "label_file", "save_dir", "sample_dir")
SHORT += ("condition_root",)


def test_every_path_of_the_config_knows_the_home_directory(tmp_path):
    named = {name for name in Config.model_fields if re.search("(_dir|_path|_root|_file)$", name)}
    assert named == {*SHORT} - {"init_from"}
    for name in SHORT:
        assert getattr(Config(**{name: "~/a"}), name) == str(tmp_path / "home" / "a")
        assert getattr(Config(**{name: "~root"}), name).startswith("/")
        for plain in ("./~a", "a/~/b", "a~", "\u6269 $HOME", "/x//y/"):
            assert getattr(Config(**{name: plain}), name) == plain
        for bad in ("~nobody-here/x", "", "a\0b"):
            with pytest.raises(ConfigError, match=f"^run.yml:1: {name}="):
                config_of(json.dumps({name: bad}).replace("\\u0000", "\\0")).save_dir  # noqa: B018
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "base.yml").write_text("seed: 5")
    assert config_of("_base_: ~/base.yml").seed == 5


def test_every_option_of_every_script_knows_the_home_directory(tmp_path, capsys):
    home = str(tmp_path / "home")
    given = ["--output-dir", "~/a", "--output=~/b", "~", "x~", "./~", "save_dir=~/c", "--no-ema"]
    meant = ["--output_dir", f"{home}/a", f"--output={home}/b", home, "x~", "./~", "save_dir=~/c"]
    assert normalized(given) == [*meant, "--no_ema"]
    calls = {
        train.main: ["--config"],
        check.main: ["--config"],
        sample.main: ["--output_dir", "x", "--checkpoint"],
        evaluate.main: ["--checkpoint"],
        export.main: ["--format", "safetensors", "--output", "a.safetensors", "--checkpoint"],
        edit.main: ["grid", "--checkpoint"],
        runs.main: ["report"],
    }
    for main, arguments in calls.items():
        for path, message in (("~/none", f"{home}/none"), ("~nobody-here", "no such user")):
            assert exit_code_of(lambda m=main, a=[*arguments, path]: m(a)) in (1, 2)
            text = capsys.readouterr().err
            assert message in text
            assert len(text.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == []


# --- the launcher's environment

ENVIRONMENTS = [
    (dict(WORLD_SIZE="2"), "WORLD_SIZE=2 in the environment, but no RANK and no MASTER_PORT"),
    (dict(WORLD_SIZE="2", RANK="0"), "no MASTER_PORT"),
    (dict(WORLD_SIZE="x"), "WORLD_SIZE='x'"),
    (dict(WORLD_SIZE="0"), "WORLD_SIZE='0'"),
    (dict(WORLD_SIZE="-1"), "WORLD_SIZE='-1'"),
    (dict(WORLD_SIZE=""), "WORLD_SIZE=''"),
    (dict(WORLD_SIZE="9" * 99), "WORLD_SIZE='9"),
    (dict(WORLD_SIZE="\u0662"), "WORLD_SIZE='"),
    (dict(RANK="1"), "RANK='1' in the environment: must be 0"),
    (dict(LOCAL_RANK="3"), "LOCAL_RANK='3'"),
    (dict(WORLD_SIZE="2", RANK="4", MASTER_PORT="1"), "RANK='4'"),
    (dict(WORLD_SIZE="2", RANK="", MASTER_PORT="1"), "RANK=''"),
    (dict(WORLD_SIZE="2", RANK="0", LOCAL_RANK="2", MASTER_PORT="1"), "LOCAL_RANK='2'"),
    (dict(WORLD_SIZE="2", RANK="0", LOCAL_WORLD_SIZE="3", MASTER_PORT="1"), "LOCAL_WORLD_SIZE='3'"),
    (dict(WORLD_SIZE="2", RANK="0", MASTER_PORT="99999"), "MASTER_PORT='99999'"),
    (dict(WORLD_SIZE="2", RANK="0", MASTER_PORT="http"), "MASTER_PORT='http'"),
    (dict(WORLD_SIZE="2", RANK="1", MASTER_PORT="1", MASTER_ADDR="a.invalid"), "'a.invalid'"),
    (dict(WORLD_SIZE="2", RANK="1", MASTER_PORT="1", MASTER_ADDR=""), "MASTER_ADDR=''"),
]


@pytest.mark.parametrize(("environment", "message"), ENVIRONMENTS)
def test_a_launcher_that_says_nonsense_is_told_so(tiny, tmp_path, capsys, environment, message):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        code = exit_code_of(lambda: train.main(["--config", str(tiny), "--device", "cpu"]))
    text = capsys.readouterr().err
    assert code in (1, 2)
    assert message in text
    assert "unset WORLD_SIZE" in text
    assert len(text.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [tiny]


def test_scripts_of_one_process_do_not_care(monkeypatch, tiny):
    for name in LAUNCHER:
        monkeypatch.setenv(name, "x")
    assert choose_device("cpu").type == "cpu"
    assert check.main(["--config", str(tiny)]) == 0
    assert runs.main(["."]) == 0


def test_a_port_that_is_taken_is_told_before_anything_else(monkeypatch):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        for name, value in dict(WORLD_SIZE=2, RANK=0, MASTER_PORT=port).items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(UserError, match=f"MASTER_PORT={port}: .*in use"):
            place_in_job()
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # torchrun listens there
        assert place_in_job() == (0, 0, 2)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=SLOW)])
def test_whoever_waits_says_for_whom(tiny, rank):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    code = f"""
import sys, train, utils.distributed as d
from utils.errors import exit_code_of
d.QUIET_SECONDS = 0.2
sys.exit(exit_code_of(lambda: train.main(["--config", {str(tiny)!r}, "--device", "cpu",
                                          "timeout_minutes=0.03"])))
"""
    done = python("-c", code, WORLD_SIZE="2", RANK=str(rank), MASTER_PORT=str(port))
    waiting, error = done.stderr.strip().splitlines()
    assert waiting == f"waiting for 2 processes at 127.0.0.1:{port}; this is rank {rank}"
    assert f"the 2 processes at 127.0.0.1:{port} have not met" in error
    assert done.returncode == 1


# --- streams


def python(*arguments: object, redirect: str = "", **environment: str):
    """Run Python in the working directory, with the project on its path, through a shell."""
    command = shlex.join([sys.executable, *map(str, arguments)])
    known = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(
        ["bash", "-c", f"{command} {redirect}"],
        env={**known, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run, with Chinese in its name and terminal escapes in its status."""
    folder = tmp_path_factory.mktemp("runs") / "\u6269\u6563 run"
    folder.mkdir()
    status = {"state": "\x1b[2J\u6269\x9b1m", "step": 3, "best": {"value": 1.0, "metric": "a\nb"}}
    (folder / "status.json").write_text(json.dumps(status), encoding="utf-8")
    return folder


REDIRECTS = {  # what becomes of the console -> the exit code
    ">&-": 0,
    "2>&-": 0,
    ">&- 2>&- <&-": 0,
    "| true": 0,
    "2>&1 | head -1": 0,
    ">/dev/full": 1,
    "2>/dev/full": 0,
}


@pytest.mark.parametrize("redirect", REDIRECTS)
def test_a_listing_ends_in_quiet_without_its_console(run, redirect):
    done = python(ROOT / "runs.py", run, redirect=f"{redirect}; exit ${{PIPESTATUS[0]}}")
    assert done.returncode == REDIRECTS[redirect]
    told = "error: standard output has lost some text: No space left on device\n"
    assert done.stderr == (told if done.returncode else "")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gbk", "ascii:strict"])
def test_consoles_of_any_encoding_get_the_text(run, encoding):
    command = (ROOT / "runs.py", "--json", run)
    code = "import sys; print(sys.stdin.buffer.read().isascii())"
    shown = python(ROOT / "runs.py", run, PYTHONIOENCODING=encoding, redirect="| iconv -f gbk")
    assert shown.stderr == ""
    assert "run" in shown.stdout
    end = f"| {sys.executable} -c {shlex.quote(code)}"
    assert python(*command, PYTHONIOENCODING=encoding, redirect=end).stdout == "True\n"


@pytest.mark.parametrize(
    "redirect",
    [
        ">&- 2>&-",
        pytest.param("2>&1 | true", marks=SLOW),
        pytest.param(">/dev/full 2>/dev/full", marks=SLOW),
    ],
)
def test_a_training_goes_on_without_its_console(tiny, tmp_path, redirect):
    options = ("--config", tiny, "--device", "cpu", "max_steps=2", "save_dir=out")
    end = f"{redirect}; exit ${{PIPESTATUS[0]}}"
    done = python(ROOT / "train.py", *options, redirect=end)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "next:   python sample.py" in (tmp_path / "out/tiny/log.txt").read_text("utf-8")


def test_a_terminal_that_closes_ends_no_training():
    before = signal.getsignal(signal.SIGHUP)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.name is None
    assert signal.getsignal(signal.SIGHUP) == before


def test_help_into_a_closed_pipe():
    for script in ("evaluate", "runs"):  # the others are made in the same way
        done = python(ROOT / f"{script}.py", "--help", redirect="| true; exit ${PIPESTATUS[0]}")
        assert (done.returncode, done.stderr) == (0, "")


def test_streams_in_this_process(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", None)
    assert exit_code_of(lambda: say("\u6269 \xe9 \x1b[1m\ttab\nline") or 0) == 0
    assert stream.buffer.getvalue() == b"\\u6269 \\xe9 \\u001b[1m\ttab\nline\n"
    assert sys.stderr is not None

    def interrupted():
        raise KeyboardInterrupt

    assert exit_code_of(interrupted) == 130


ENVIRONMENT = ["OMP_NUM_THREADS=x", "CUDA_VISIBLE_DEVICES=x", "TMPDIR=/nowhere", "COLUMNS=0"]
ENVIRONMENT += ["LC_ALL=C", "TERM=dumb", "HOME=", "COLUMNS=-3", "SLURM_PROCID=7"]


def test_odd_environments(tiny):
    options = ("--config", tiny, "--device", "cpu", "--dry_run", "project_name=\u6269")
    given = dict(text.split("=") for text in ENVIRONMENT)
    done = python(ROOT / "train.py", *options, PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", **given)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


# --- what terminals and shells obey

OBEYED = {
    "\x1b]0;title\x07": r"\u001b]0;title\u0007",
    "a\rb\x7f\x9b1m": r"a\u000db\u007f\u009b1m",
    "\u202eevil\u2066": r"\u202eevil\u2066",
    "\udcff\0": r"\udcff\u0000",
    "tab\tline\nnext": "tab\tline\nnext",
    "\u6269\u6563 \xe9 \U0001f469\u200d\U0001f4bb": "\u6269\u6563 \xe9 \U0001f469\u200d\U0001f4bb",
}


@pytest.mark.parametrize("text", OBEYED)
def test_a_terminal_obeys_nothing(text, capsys, tmp_path):
    assert printable(text) == OBEYED[text]
    setup_logging(is_main=True).warning("%s", text)
    log_to_file(tmp_path / "log.txt")

    def fail():
        raise UserError(text)

    assert exit_code_of(fail) == 1
    printed = capsys.readouterr()
    assert printed.out == OBEYED[text] + "\n"
    assert printed.err == f"error: {OBEYED[text]}\n"
    assert (tmp_path / "log.txt").read_text("utf-8").endswith(OBEYED[text] + "\n")


def test_foreign_status_files_and_arguments_are_shown_escaped(run, capsys):
    assert exit_code_of(lambda: runs.main([str(run)])) == 0
    table = capsys.readouterr().out
    assert not {"\x1b", "\x9b"} & set(table)
    assert len(table.splitlines()) == 2
    with pytest.raises(SystemExit):
        runs.main(["--\x1b[2J"])
    assert "\x1b" not in capsys.readouterr().err


def test_only_one_function_prints():
    for path in (
        *ROOT.glob("*.py"),
        *(p for r in ("utils", "datasets") for p in ROOT.glob(f"{r}/*")),
    ):
        if path.suffix == ".py" and path.name != "errors.py":
            names = {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}
            assert "print" not in names, path


def test_texts_with_broken_bytes_can_be_written(tmp_path):
    write_text(tmp_path / "a.json", json.dumps({"a": "\udcff\u6269"}, ensure_ascii=False))
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"a": "\udcff\u6269"}


@pytest.mark.parametrize("name", ["a b", "$(touch x)", "it's", "-x", "a\nb", "\u6269", "`id`", "*"])
def test_commands_to_copy_name_the_folder_and_nothing_else(name, caplog, tmp_path):
    caplog.set_level("INFO", "diffusion")
    log_end(Config(save_dir=name, experiment_name="$(touch y)"))
    folder = f"{name}/$(touch y)"
    commands = [r.getMessage().removeprefix("next:").strip() for r in caplog.records[1:]]
    assert len(commands) == 3
    for command in commands:
        told = subprocess.run(["bash", "-c", f"printf '%s|' {command}"], capture_output=True)
        last = told.stdout.decode().split("|")[-2]
        assert last == (f"./{folder}" if name == "-x" else folder)
    args = edit.make_parser().parse_args(["grid", f"--checkpoint={name}"])
    words = shlex.split(Job(args, None, None).command("sample.py", "--steps", 3))
    assert words[-3].removeprefix("./") == name
    args.config = "own.py"  # parts of other packages may lie beside it
    words = shlex.split(Job(args, None, None).command("sample.py", "--steps", 3))
    assert words[-4:] == ["--config", "own.py", "--steps", "3"]
    assert list(tmp_path.iterdir()) == []


def test_shell_lines_of_plain_words_are_as_they_were():
    line = shell_line("python", "sample.py", "--checkpoint", Path("checkpoints/digits_unet"))
    assert line == "python sample.py --checkpoint checkpoints/digits_unet"


@pytest.mark.parametrize("by", ["config", "environment"])
def test_a_local_dashboard_that_is_not_there_is_told_first(tiny, monkeypatch, capsys, by, tmp_path):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    arguments = ["--config", str(tiny), "use_swanlab=true", "--device", "cpu"]
    if by == "config":
        arguments.append("swanlab_mode=local")
        monkeypatch.delenv("SWANLAB_MODE", raising=False)
    else:
        monkeypatch.setenv("SWANLAB_MODE", "local")
    assert exit_code_of(lambda: train.main(arguments)) == 2
    text = capsys.readouterr().err
    assert "pip install 'swanlab[dashboard]'" in text
    assert len(text.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [tiny]


# --- supply


def test_the_workflow_takes_known_actions_and_may_only_read():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    used = [s["uses"] for job in workflow["jobs"].values() for s in job["steps"] if "uses" in s]
    assert used
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action) for action in used)


def test_the_oldest_pillow_has_no_known_hole():
    floors = re.findall(r"^pillow>=([\d.]+)", (ROOT / "requirements.txt").read_text("utf-8"), re.M)
    assert [tuple(map(int, floor.split("."))) >= (10, 3) for floor in floors] == [True]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "error: a/b: No space left"),
        (OSError(errno.ENAMETOOLONG, "File name too long", b"n\n"), r"error: 'n\n': File name too"),
        (PermissionError(errno.EACCES, "Permission denied"), "error: Permission denied"),
        (OSError("broken data\nstream"), "error: broken data stream"),
        (MemoryError(), "error: not enough memory"),
    ],
)
def test_what_the_system_refuses_is_one_line(error, line, capsys):
    def main() -> int:
        raise error

    assert exit_code_of(main) == EXIT_FAILURE
    text = capsys.readouterr().err
    assert text.startswith(line)
    assert text.count("\n") == 1


@pytest.mark.parametrize("key", ["data_root", "save_dir", "resume_path", "init_from"])
def test_a_name_too_long_for_the_disk_is_one_line(key, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yml").write_text("dataset: custom\nimage_size: 8\ndata_root: d\n")
    (tmp_path / "d").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "d/1.png")
    words = ["--config", "c.yml", "--device", "cpu", "use_subdirs=false", f"{key}={'x' * 300}"]
    code = exit_code_of(lambda: train.main(words))
    text = capsys.readouterr().err
    assert code in (EXIT_FAILURE, EXIT_USAGE)
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    assert not (tmp_path / "checkpoints").exists()


def test_a_file_that_is_no_regular_one_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        write_text(tmp_path / "pipe", "text")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_page_replaces_no_file_of_a_run(tmp_path, capsys):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/metrics.jsonl").write_text("")
    for name in ("best_model.pth", "metrics.jsonl", ".", "page"):
        words = ["report", str(tmp_path / "r"), "--output", str(tmp_path / "r" / name)]
        assert exit_code_of(lambda words=words: runs.main(words)) == EXIT_USAGE
    assert (tmp_path / "r/metrics.jsonl").read_text() == ""


@pytest.mark.parametrize(
    "value", ["min_snr_gamma=true", "timeout_minutes=false", "min_snr_gamma=1e40"]
)
def test_bounded_numbers_are_numbers(value, tmp_path):
    (tmp_path / "c.yml").write_text("dataset: digits\n")
    with pytest.raises(ConfigError, match=value.partition("=")[0]):
        load_config(tmp_path / "c.yml", [value])


def test_processes_of_one_run_read_one_config(tmp_path):
    class SecondRank(Runtime):
        """Its rank 0 has read another seed."""

        def broadcast_object(self, value):
            return value | {"seed": 1} if isinstance(value, dict) else value

    class OfAnotherDisk(Runtime):
        """Its rank 0 has read other images."""

        def broadcast_object(self, value):
            return "other" if isinstance(value, str) else value

    config = Config(save_dir=str(tmp_path), experiment_name="r", dataset="digits")
    with pytest.raises(UserError, match="different configs"):
        prepare(config, SecondRank(torch.device("cpu")))
    with pytest.raises(UserError, match="different images; data_root"):
        prepare(config, OfAnotherDisk(torch.device("cpu")))
