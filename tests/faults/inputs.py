"""Data that is not what it says: label files that lead astray, images that are none or bombs."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.faults.harness import ROOT, Figure, Lab, environment
from tests.hostile_files import BAD, KINDS
from tests.traversals import make_attempts

MOST_MEMORY = 100  # MiB, to refuse one file

READ = """
import json, sys
from pathlib import Path
from datasets import build_dataset
from tests.hostile_files import KINDS, write_kind
from tests.image_files import custom, write_image
from utils.errors import DataError

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

def names(folder, how):
    dataset = build_dataset(custom(folder, image_size=8, on_bad_image=how))
    [dataset[i] for i in range(len(dataset))]
    return dataset.names

results = {}
for number, kind in enumerate(KINDS):
    folder = Path(sys.argv[1]) / str(number)
    for name in "acd":
        write_image(folder / "class" / f"{name}.png")
    names(folder, "error")
    write_kind(folder / "class", kind)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    try:
        ends = names(folder, "error"), None
    except DataError as error:
        ends = [], str(error)
    results[kind] = [*ends, names(folder, "skip"), status("VmHWM") - before]
print(json.dumps(results))
"""


def traversals(lab: Lab, _trials: int) -> Figure:
    """Absolute, `..`, links, odd encodings: no file outside the folder of images is opened."""
    folder = lab.folder / "traversals"
    folder.mkdir()
    good, attempts = make_attempts(folder)
    bad = [name for name, found in attempts.items() if found.end != "refused" or found.outside]
    detail = f"good names: {good[0]}" + (f"; {ascii(bad[0])[:60]}" if bad else "")
    return Figure("path traversals in label files", len(attempts), len(bad), "got out", detail)


def hostile_images(lab: Lab, _trials: int) -> Figure:
    """Each kind beside three good images: refused by name, or skipped and counted, or used."""
    folder = lab.folder / "hostile"
    folder.mkdir()
    command = [sys.executable, "-c", READ, str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    results = json.loads(done.stdout)
    wrong = [kind for kind, found in results.items() if not is_right(kind, *found)]
    most = max(found[-1] for kind, found in results.items() if kind in BAD)
    detail = (
        f"{len(BAD)} bad ones, each in at most {most:.0f} MiB, {len(KINDS) - len(BAD)} good ones"
    )
    if wrong:
        detail += f"; {wrong[0]}"
    return Figure("hostile images: counts, memory", len(results), len(wrong), "wrong", detail)


def is_right(
    kind: str, names: list[str], message: str | None, kept: list[str], memory: float
) -> bool:
    """Used, under both settings; or an error that names it, and skipped, so that one of the good
    ones stands there twice, in little memory."""
    if kind not in BAD:
        return message is None and len(set(names)) == 4 and kept == names
    is_refused = message is not None and KINDS[kind].message in message
    return is_refused and (len(kept), len(set(kept))) == (4, 3) and memory < MOST_MEMORY
