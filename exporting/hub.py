"""What the Hub of Hugging Face shows of an exported model, its model card, and the upload."""

from __future__ import annotations

import json
import re
from pathlib import Path

from generation.run import Run
from generation.sampling import Sampling
from metrics.report import Report, code_version, read_report, stamped
from utils.config import Config
from utils.errors import ConfigError, UserError, one_line, printable, say, shell_line, show
from utils.files import file_sha256

REPOSITORY = re.compile(r"(?=.{3,96}$)(?!.*\.git$)\w+([-.]\w+)*/\w+([-.]\w+)*", re.ASCII)
LICENSES = "apache-2.0 mit bsd-3-clause gpl-3.0 cc0-1.0 cc-by-4.0 cc-by-nc-4.0 openrail other"


def model_card(
    run: Run, output: Path, license: str | None, sampling: Sampling | None, difference: float
) -> str:
    """The card of a run that is exported to `output`, with the `output_difference`; for diffusers
    with the settings to sample with. The same bytes for the same checkpoint, reports, versions."""
    from jinja2 import ChainableUndefined, Template

    facts = dict(run=run, file=Path(output.name), license=license, sampling=sampling)
    facts["difference"] = difference
    facts |= dict(config=run.config.to_dict(), defaults=Config().to_dict(), reports=reports_of(run))
    facts |= stamped({"code": code_version()})
    text = Path(__file__).with_name("model_card.md.jinja").read_text(encoding="utf-8") + "\n"
    template = Template(text, trim_blocks=True, undefined=ChainableUndefined)
    return template.render(facts, json=json.dumps, printable=printable, shell_line=shell_line)


def reports_of(run: Run) -> dict[str, Report]:
    """Name -> report, of those in `eval/` that scored these weights; tells of each other one."""
    reports, weights = {}, [file_sha256(run.checkpoint), run.ema, next(iter(run.averages), None)]
    for path in sorted(run.checkpoint.parent.glob("eval/report*.json")):
        try:
            made = (report := read_report(path, "")).get("provenance") or {}
            if [made.get(key) for key in ("sha256", "ema", "ema_width")] != weights:
                raise ConfigError(f"{show(path)}: it scored other weights")
            reports[path.name] = report
        except ConfigError as error:
            say(f"the card leaves out {error}")
    return reports


def push(name: str, output: Path) -> str:
    """Upload an export with its card to the repository `name` of the Hub, in one commit, and return
    that commit's address. A new repository is private. A UserError says what prevents it: network,
    token, or a file that is there already; the export stays as it is."""
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    files = {output.name: output, "README.md": output.with_suffix(".md")}
    if output.is_dir():
        inner = filter(Path.is_file, output.rglob("*"))
        files = {path.relative_to(output).as_posix(): path for path in inner}
    try:
        if get_token() is None:
            raise ValueError("there is no token; log in by `hf auth login`, or set HF_TOKEN")
        api = HfApi()
        api.create_repo(name, private=True, exist_ok=True)
        if there := files.keys() & set(api.list_repo_files(name)):
            raise ValueError(f"it has {min(there)} already; remove it there, or give another name")
        parts = [CommitOperationAdd(place, str(path)) for place, path in files.items()]
        return api.create_commit(name, parts, commit_message=f"Add {output.name}").commit_url
    except Exception as error:  # of the Hub's client and its networking: of dozens of kinds
        reason = one_line(getattr(error, "server_message", None) or error)
        raise UserError(f"--push {name}: {reason}; {show(output)} stays") from error
