"""Pretrained networks of metrics, and where their weights are: a named file, cache, or download."""

from __future__ import annotations

import contextlib
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils.checkpoint import read_tensors
from utils.errors import MissingWeightsError, one_line, show
from utils.files import file_sha256, looks_like, socket_timeout

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
    place: Callable[[], str] | None = None  # of weights that a package brings
    large: str = ""  # of weights that "all" metrics do not download: what does

    @property
    def flag(self) -> str:
        """The command-line option that names a local file."""
        return f"--{self.name}_weights"

    @property
    def cache_path(self) -> Path:
        """The place of a downloaded file, or of the package's."""
        if self.place is not None:
            return Path(self.place())
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
    with usable(network, "not there"):
        target = network.cache_path
    cached = (target, *(target.with_name(name) for name in network.other_names))
    path = next(filter(Path.is_file, cached), None) if given is None else Path(given)
    if path is None:
        if not download:
            raise network.missing(f"not on this machine; {network.large or 'a run downloads them'}")
        path, fetch = target, torch.hub.download_url_to_file
        with usable(network, "download failed"), socket_timeout(DOWNLOAD_TIMEOUT):
            path.parent.mkdir(parents=True, exist_ok=True)
            fetch(network.url, str(path), hash_prefix=network.hash_prefix, progress=True)
    elif not path.is_file():
        raise network.missing(f"{network.flag} {show(path)}: no such file")
    load_plain(path, network)
    with usable(network, f"{show(path)} cannot be read"):
        return Weights(path, file_sha256(path))


@contextlib.contextmanager
def usable(network: Network, problem: str) -> Iterator[None]:
    """Turn whatever the body raises into a MissingWeightsError of the `problem`: what a stranger's
    file makes torch raise has no end. Absent packages and full devices are no fault of the file."""
    try:
        yield
    except (MissingWeightsError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise MissingWeightsError(f"{error.name} is missing: pip install {error.name}") from error
    except Exception as error:
        reason = one_line(error)
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
            reason = "damaged, or more in it than tensors"  # torch advises to load it unsafely
        raise network.missing(f"{problem} ({reason})") from error


def load_plain(path: Path, network: Network) -> dict[str, Tensor]:
    """Read a state dict as finite tensors only: a stranger's file must not run code.

    Raises a MissingWeightsError if the file is damaged or holds anything else.
    """
    with usable(network, f"{show(path)} cannot be read as plain weights"):
        if what := looks_like(path):
            raise ValueError(what)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats and TorchScript
            state = read_tensors(path)
        tensors = state.values() if isinstance(state, dict) else [None]
        if not all(isinstance(x, Tensor) and x.isfinite().all() for x in tensors):
            raise ValueError("not a state dict of finite tensors")
        return state
