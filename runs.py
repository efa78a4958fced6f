"""List training runs, or make one page that shows what they have done.

python runs.py
python runs.py report checkpoints/digits_unet checkpoints/digits_dit --output report.html
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from reporting.run_files import (
    RunFacts,
    epoch_text,
    facts_of,
    find_runs,
    is_run,
    names_of,
    size_text,
    step_text,
    time_text,
)
from utils.cli import Parser, with_underscores
from utils.config import Config
from utils.errors import EXIT_OK, ConfigError, UserError, exit_code_of
from utils.files import write_text

REPORT = "report"


def make_parser(command: str = "") -> argparse.ArgumentParser:
    """Of `python runs.py`, or of `python runs.py report`."""
    parser = Parser(
        prog=f"runs.py {command}".strip(),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    if command == REPORT:
        add("runs", nargs="+", metavar="RUN", help="the folder of a run")
        add("--output", help="the page; default: report.html in the folder of the first run")
        return parser
    add("folders", nargs="*", metavar="FOLDER", help="runs, or folders that hold runs")
    add("--save_dir", help="as in a config: the folder that holds the runs; default: checkpoints")
    add("--json", action="store_true", help="print JSON")
    parser.epilog = "python runs.py report --help"
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    command = REPORT if argv[:1] == [REPORT] else ""
    args = make_parser(command).parse_intermixed_args(with_underscores(argv[len(command) > 0 :]))
    args.command = command
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.command == REPORT:
        write_report([Path(run) for run in args.runs], args.output)
        return EXIT_OK
    folders = [*args.folders, *([args.save_dir] if args.save_dir else [])]
    folders = folders or [Config.model_fields["save_dir"].default]
    runs = find_runs(folders)
    found = [facts_of(*pair) for pair in zip(runs, names_of(runs), strict=True)]
    if args.json:
        print(json.dumps([facts._asdict() for facts in found], indent=2))
    else:
        print(format_table(found) if found else f"no runs in {', '.join(map(str, folders))}")
    return EXIT_OK


def write_report(folders: Sequence[Path], output: str | None) -> None:
    """Write the page and say where.

    Raises:
        ConfigError: a folder that is not that of a run.
        UserError: the page cannot be written.
    """
    from reporting.run_report import render_report  # Pillow and numpy, which the list does without

    for folder in folders:
        if not is_run(folder):
            raise ConfigError(f"{folder}: not the folder of a run; `python runs.py` lists them")
    path = Path(output) if output is not None else folders[0] / "report.html"
    if not path.parent.is_dir():
        raise ConfigError(f"--output {path}: {path.parent} is not a folder")
    text = render_report(list(dict.fromkeys(folders)))
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    print(f"{path}: {len(text) / 1e6:.1f} MB, open it in a browser")


def format_table(runs: Sequence[RunFacts]) -> str:
    """Aligned columns: names to the left, numbers to the right."""
    head = ("name", "status", "epoch", "step", "best", "last loss", "size", "last change")
    rows = [head]
    for run in runs:
        best = "" if run.best is None else f"{run.best:.4g} {run.best_metric}"
        loss = "" if run.loss is None else f"{run.loss:.4f}"
        known = (run.name, run.status, epoch_text(run), step_text(run), best, loss)
        rows.append((*known, size_text(run.size), time_text(run.changed)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column in ("name", "status") else cell.rjust(width)
            for cell, width, column in zip(row, widths, head, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
