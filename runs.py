"""List training runs, make one page of what they have done, or train the steps of one again.

python runs.py
python runs.py report checkpoints/digits_unet checkpoints/digits_dit --output report.html
python runs.py verify checkpoints/digits_unet --steps 100
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from reporting import run_files
from reporting.run_files import RunFacts, by_name, facts_of, find_runs, is_run, texts_of
from utils.cli import Parser, normalized, whole_number
from utils.config import Config
from utils.errors import EXIT_OK, ConfigError, UserError, exit_code_of, say, show, told_as
from utils.files import write_text

REPORT, VERIFY = "report", "verify"


def make_parser(command: str = "") -> argparse.ArgumentParser:
    """The parser of `python runs.py`, or of one of its commands."""
    parser = Parser(prog=f"runs.py {command}".strip(), description=__doc__)
    parser.set_defaults(command=command, save_dir=None)
    add = parser.add_argument
    add("--print_config", action="store_true", help="print the configs of the runs and stop")
    add("--dry_run", action="store_true", help="check everything, write nothing")
    if command == REPORT:
        add("folders", nargs="+", type=Path, metavar="RUN", help="the folder of a run")
        add("--output", help="the page; default: report.html in the folder of the first run")
        return parser
    if command == VERIFY:
        add("folders", nargs=1, type=Path, metavar="RUN", help="the folder of a run")
        count = partial(whole_number, least=1)
        add("--steps", type=count, default=20, help="train at least so many; default: 20")
        add("--checkpoint", type=Path, help="begin at this checkpoint of the run, not anew")
        add("--device", help="cpu, cuda, cuda:1 or mps; default: the best there is")
        return parser
    add("folders", nargs="*", metavar="FOLDER", help="runs, or folders that hold runs")
    add("--save_dir", help="as in a config: the folder that holds the runs; default: checkpoints")
    add("--json", action="store_true", help="print JSON")
    parser.epilog = "python runs.py report --help, python runs.py verify --help"
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments, with `command`: "report", "verify", or an empty text for the list."""
    command = argv[0] if argv[:1] in ([REPORT], [VERIFY]) else ""
    return make_parser(command).parse_intermixed_args(normalized(argv[len(command) > 0 :]))


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    if args.command == REPORT and not args.print_config:
        write_report(args.folders, args.output, dry_run=args.dry_run)
        return EXIT_OK
    if args.command == VERIFY and not args.print_config:
        from reporting.verify import distributed_runtime, verify_run  # torch, which the list omits

        options = dict(num_steps=args.steps, checkpoint=args.checkpoint, dry_run=args.dry_run)
        with distributed_runtime(args.device) as runtime:
            line = verify_run(args.folders[0], runtime, **options)
            say(line) if runtime.is_main else None
        return EXIT_OK
    named = [*args.folders, *filter(None, [args.save_dir])]
    folders = named or [Config.model_fields["save_dir"].default]
    runs = by_name(find_runs(folders))
    facts = [facts_of(folder, name) for name, folder in runs.items()]
    if args.print_config:
        path = run_files.CONFIG
        configs = {name: run_files.read_json(folder / path) for name, folder in runs.items()}
        say(json.dumps(configs, indent=2, ensure_ascii=False))
    elif args.json:
        say(json.dumps([of_run._asdict() for of_run in facts], indent=2))
    else:
        say(format_table(facts) if facts else f"no runs in {', '.join(folders)}")
    return EXIT_OK


def write_report(folders: Sequence[Path], output: str | None, *, dry_run: bool = False) -> None:
    """Write the page of these runs and say where; a `dry_run` makes it without writing it. Raises a
    `UserError` if it cannot be written."""
    from reporting.runs import render_report  # Pillow and numpy, which the list does without

    for folder in folders:
        if not is_run(folder):
            raise ConfigError(f"{folder}: not the folder of a run; `python runs.py` lists them")
    path = Path(output) if output is not None else folders[0] / "report.html"
    if path.suffix not in (".html", ".htm"):  # anything else may be a file of the run
        raise ConfigError(f"--output {show(path)}: name the page, NAME.html")
    if not path.parent.is_dir():
        raise ConfigError(f"--output {path}: {path.parent} is not a folder")
    text = render_report(list(dict.fromkeys(folders)))
    if not dry_run:
        with told_as(UserError, f"{path}: cannot be written", OSError):
            write_text(path, text)
    end = "not written" if dry_run else "open it in a browser"
    say(f"{path}: {len(text) / 1e6:.1f} MB, {end}")


def format_table(runs: Sequence[RunFacts]) -> str:
    """The facts of at least one run in aligned columns: names to the left, numbers to the right."""
    texts, columns = [texts_of(run) for run in runs], []
    for head in texts[0]:
        cells = [head, *(show(of_run[head]) for of_run in texts)]
        align, width = "<" if head in ("name", "status") else ">", max(map(len, cells))
        columns.append([f"{cell:{align}{width}}" for cell in cells])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns, strict=True))


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
