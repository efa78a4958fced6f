"""Pretrained networks of metrics, and where their weights are: a named file, cache, or download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from utils.checkpoint import read_tensors
from utils.errors import MissingWeightsError, one_line
from utils.files import file_sha256, socket_timeout

DOWNLOAD_TIMEOUT = 20  # seconds without a byte; urllib alone would wait for ever behind a firewall


@dataclass(eq=False)
class Network:
    """A pretrained network that metrics name as the one they need."""

    name: str  # one word, from which `flag` is made
    title: str  # for messages
    load: Callable[[Path, torch.device], Any]  # (weights, device) -> whatever the metrics call
    url: str
    help: str  # what --help says of `flag`
    other_names: tuple[str, ...] = ()  # names of the same file, also accepted in the cache
    hash_prefix: str | None = None  # how their SHA-256 begins; checked after a download

    @property
    def flag(self) -> str:
        """The command-line option that names a local file."""
        return f"--{self.name}_weights"

    @property
    def cache_path(self) -> Path:
        """The place of a downloaded file."""
        return Path(torch.hub.get_dir(), "checkpoints", self.url.rpartition("/")[2])

    def missing(self, problem: str) -> MissingWeightsError:
        """The error to raise for a `problem` with the weights: it says what to do."""
        return MissingWeightsError(
            f"{self.title} weights: {problem}; get {self.url} and put it at {self.cache_path} or "
            f"name it with {self.flag} PATH"
        )


class Weights(NamedTuple):
    """A weights file that was found and read."""

    path: Path
    sha256: str


def find_weights(network: Network, given: str | None, *, download: bool = True) -> Weights:
    """Take the file `given`, else one in the torch-hub cache, else download one into that cache.

    Raises a MissingWeightsError, in one line with the URL, the place to put the file, and the flag.
    """
    target = network.cache_path
    cached = (target, *(target.with_name(name) for name in network.other_names))
    path = next(filter(Path.is_file, cached), None) if given is None else Path(given)
    if path is None:
        if not download:
            raise network.missing("not on this machine; a run downloads them")
        path, fetch = target, torch.hub.download_url_to_file
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with socket_timeout(DOWNLOAD_TIMEOUT):
                fetch(network.url, str(path), hash_prefix=network.hash_prefix, progress=True)
        except (OSError, RuntimeError) as error:  # URLError and timeouts are OSErrors
            raise network.missing(f"download failed ({error})") from error
    elif not path.is_file():
        raise network.missing(f"{network.flag} {path}: no such file")
    load_plain(path, network)
    return Weights(path, file_sha256(path))


def load_plain(path: Path, network: Network) -> dict[str, Any]:
    """Read a state dict as tensors and plain types only: a stranger's file must not run code.

    Raises a MissingWeightsError if the file is damaged or holds anything else.
    """
    try:
        state = read_tensors(path)
    except Exception as error:
        problem = f"{path} cannot be read as plain weights ({one_line(error)})"
        raise network.missing(problem) from error
    if not isinstance(state, dict):
        raise network.missing(f"{path} does not hold a state dict")
    return state
