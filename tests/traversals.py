"""Names in a label file that lead out of the folder of images, and what becomes of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.image_files import write_image

ROOT = Path(__file__).resolve().parent.parent

# `{out}` is a folder outside with a readable image, secret.png; root has 0.png and a/b/, and, where
# an attempt names them, these links.

LINKS = {
    "link.png": "../outside/secret.png",
    "chain.png": "link.png",
    "linked": "../outside",
    "a/linked": "../../outside",
    "up": "..",
}

ATTEMPTS = [
    "../outside/secret.png",
    "./../outside/secret.png",
    "..//outside/secret.png",
    "a/../../outside/secret.png",
    "a/b/../../../outside/secret.png",
    "a/./../b/../../outside/secret.png",
    "0.png/../../outside/secret.png",
    "missing/../../outside/secret.png",
    "../root/../outside/secret.png",
    "../OUTSIDE/secret.png",
    "../outside/SECRET.PNG",
    "../outside/secret.png.",
    "../outside/secret.png/",
    "{out}/secret.png",
    "/{out}/secret.png",
    "/proc/self/root{out}/secret.png",
    "/etc/passwd",
    "/dev/zero",
    "link.png",
    "./link.png",
    "a/../link.png",
    "chain.png",
    "linked/secret.png",
    "a/linked/secret.png",
    "up/outside/secret.png",
    "LINKED/secret.png",
    "..\\outside\\secret.png",
    "a\\..\\..\\outside\\secret.png",
    "C:\\outside\\secret.png",
    "C:/outside/secret.png",
    "\\\\host\\outside\\secret.png",
    "0.png\0/../../outside/secret.png",
    "../outside/secret.png\0.png",
    "\uff0e\uff0e/outside/secret.png",
    "\u2024\u2024/outside/secret.png",
    "\u2025/outside/secret.png",
    "..\u2215outside\u2215secret.png",
    "..\uff0foutside\uff0fsecret.png",
    "..\u200b/outside/secret.png",
    "\u202e../outside/secret.png",
    ".../outside/secret.png",
    ".. /outside/secret.png",
    "../outside/secret.png ",
    "~/secret.png",
    "~root/secret.png",
    "$HOME/secret.png",
    "file://{out}/secret.png",
    "http://localhost{out}/secret.png",
    "%2e%2e/outside/secret.png",
    "..%2foutside%2fsecret.png",
    "..%00/outside/secret.png",
    "..",
    "../",
    ".",
    "/",
    "a",
    "0.png.",
    "0.png/.",
    "a/" * 2500 + "../" * 2501 + "outside/secret.png",
    "x" * 300 + "/../../outside/secret.png",
    "\ud800/../../outside/secret.png",
    "..\n/outside/secret.png",
]

TRY = """
import json, os, sys
from pathlib import Path
from datasets import build_dataset
from utils.config import Config
from utils.errors import DataError

root = os.path.realpath("root")
settings = dict(dataset="custom", data_root="root", use_subdirs=False, image_size=4)
opened, results = [], []
watched = ("open", "os.listdir", "os.scandir")

def attempt(labels):
    opened.clear()
    Path("root/labels.json").write_text(json.dumps(labels))
    try:
        dataset = build_dataset(Config(**settings, label_file="labels.json"))
        return "read", [dataset[i] for i in range(len(dataset))] and dataset.names
    except DataError as error:
        return "refused", str(error).partition("\\n       how to fix: ")[0]

links, attempts = json.loads(sys.stdin.read())
good = attempt({"0.png": 0, "inner.png": 1})  # imports what is imported late
sys.addaudithook(lambda event, args: event in watched and opened.append(args[0]))
for name in attempts:
    made = links if any(key in name.lower() for key in links) else {}
    for key, to in made.items():
        (Path("root") / key).symlink_to(to)
    end, message = attempt({"0.png": 0, "inner.png": 0, name: 1})
    for key in made:
        (Path("root") / key).unlink()
    paths = [os.path.realpath(os.fsdecode(p)) for p in opened if not isinstance(p, int)]
    outside = [p for p in paths if p != root and not p.startswith(root + "/")]
    results.append([end, message, outside, len(paths)])
print(json.dumps([good, results]))
"""


class Attempt(NamedTuple):
    """What became of a label file."""

    end: str  # read, or refused
    message: str | list[str]  # of the error; or the names of the images
    outside: list[str]  # paths opened outside the folder
    num_opened: int


def make_attempts(folder: Path) -> tuple[list, dict[str, Attempt]]:
    """In `folder`: what becomes of a good label file, and of each of `ATTEMPTS`."""
    out, root = folder / "outside", folder / "root"
    write_image(out / "secret.png")
    write_image(root / "0.png")
    (root / "a" / "b").mkdir(parents=True)
    (root / "inner.png").symlink_to("0.png")  # a link that stays inside is allowed
    names = [name.replace("{out}", str(out)) for name in ATTEMPTS]
    done = subprocess.run(
        [sys.executable, "-c", TRY],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(out)},
        input=json.dumps([LINKS, names]),
        capture_output=True,
        text=True,
        check=True,
    )
    good, results = json.loads(done.stdout)
    return good, {name: Attempt(*found) for name, found in zip(ATTEMPTS, results, strict=True)}
