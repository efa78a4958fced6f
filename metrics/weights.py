"""Pretrained networks of metrics, and where their weights are: a named file, cache, or download."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from utils.distributed import Runtime
from utils.errors import MissingWeightsError, one_line
from utils.files import file_sha256, socket_timeout

DOWNLOAD_TIMEOUT = 20  # seconds without a byte; urllib alone would wait for ever behind a firewall


@dataclass(eq=False)
class Network:
    """A pretrained network that metrics name as the one they need."""

    name: str  # a word, of which `flag` is made
    title: str  # for messages
    load: Callable[[Path, torch.device], Any]  # (weights, device) -> whatever the metrics call
    url: str
    file_names: tuple[str, ...]  # accepted in torch.hub's cache; a download gets the first one
    help: str  # of `flag`
    hash_prefix: str | None = None  # of the weights' SHA-256, checked after a download

    @property
    def flag(self) -> str:
        """The command-line option that names a local file."""
        return f"--{self.name}_weights"

    @property
    def cache_path(self) -> Path:
        """The place of a downloaded file."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.file_names[0]


class Weights(NamedTuple):
    """A weights file that was found and read."""

    path: Path
    sha256: str


def find_weights(network: Network, given: str | None, *, download: bool = True) -> Weights:
    """Take the file `given`, else one in the torch-hub cache, else download one into that cache.

    Raises:
        MissingWeightsError: one line with the URL, the place to put the file, and the flag.
    """
    folder = network.cache_path.parent
    cached = (folder / name for name in network.file_names if (folder / name).is_file())
    path = Path(given) if given is not None else next(cached, None)
    if path is None:
        if not download:
            raise _missing(network, "not on this machine; a run downloads them")
        path = _download(network)
    elif not path.is_file():
        raise _missing(network, f"{network.flag} {path}: no such file")
    load_plain(path, network)
    return Weights(path, file_sha256(path))


def shared_weights(
    network: Network, given: str | None, runtime: Runtime, *, download: bool = True
) -> Weights:
    """Call `find_weights` on the main process alone; every process gets its answer or its error."""
    weights, problem = None, None
    if runtime.is_main:
        try:
            weights = find_weights(network, given, download=download)
        except MissingWeightsError as error:
            problem = str(error)
    weights, problem = runtime.broadcast_object((weights, problem))
    if problem is not None:
        raise MissingWeightsError(problem)
    return weights


def load_plain(path: Path, network: Network) -> dict[str, Any]:
    """Read a state dict as tensors and plain types only: a stranger's file must not run code.

    Raises:
        MissingWeightsError: the file is damaged or holds anything else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        problem = f"{path} cannot be read as plain weights ({one_line(error)})"
        raise _missing(network, problem) from error
    if not isinstance(state, dict):
        raise _missing(network, f"{path} does not hold a state dict")
    return state


def wrong_weights(path: Path, network: Network, error: Exception) -> MissingWeightsError:
    """The error to raise for weights that were read but do not fit the network."""
    return _missing(network, f"{path} does not fit ({one_line(error)})")


def _download(network: Network) -> Path:
    path = network.cache_path
    fetch: Callable[..., None] = torch.hub.download_url_to_file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with socket_timeout(DOWNLOAD_TIMEOUT):
            fetch(network.url, str(path), hash_prefix=network.hash_prefix, progress=True)
    except (OSError, RuntimeError) as error:  # URLError and timeouts are OSErrors
        raise _missing(network, f"download failed ({error})") from error
    return path


def _missing(network: Network, problem: str) -> MissingWeightsError:
    return MissingWeightsError(
        f"{network.title} weights: {problem}; get {network.url} and put it at "
        f"{network.cache_path} or name it with {network.flag} PATH"
    )
