"""Where the pretrained weights of a metric are: named file, torch-hub cache, or download."""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from utils.distributed import Runtime
from utils.errors import MissingWeightsError

DOWNLOAD_TIMEOUT = 20  # seconds without a byte; urllib alone would wait for ever behind a firewall


class WeightsSource(NamedTuple):
    """Pretrained weights that can be fetched, and the flag that names a local file instead."""

    name: str
    url: str
    flag: str
    file_names: tuple[str, ...]  # accepted in the torch-hub cache; a download gets the first one
    hash_prefix: str | None = None  # of the sha256, checked after a download


class Weights(NamedTuple):
    """A weights file that was found and read."""

    path: Path
    sha256: str


def cache_path(source: WeightsSource) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / source.file_names[0]


def find_weights(source: WeightsSource, given: str | None, *, download: bool = True) -> Weights:
    """The file `given`, else one in the torch-hub cache, else a download into that cache.

    Raises:
        MissingWeightsError: one line with the URL, the place to put the file, and the flag.
    """
    path = Path(given) if given is not None else _cached(source)
    if path is None:
        if not download:
            raise MissingWeightsError(_advice(source, "not on this machine; a run downloads them"))
        path = _download(source)
    elif not path.is_file():
        raise MissingWeightsError(_advice(source, f"{source.flag} {path}: no such file"))
    load_plain(path, source)
    return Weights(path, file_sha256(path))


def shared_weights(
    source: WeightsSource, given: str | None, runtime: Runtime, *, download: bool = True
) -> Weights:
    """`find_weights` on the main process alone, its answer (or error) on every process."""
    found: Any = None
    if runtime.is_main:
        try:
            weights = find_weights(source, given, download=download)
            found = (str(weights.path), weights.sha256, None)
        except MissingWeightsError as error:
            found = (None, None, str(error))
    path, sha256, problem = runtime.broadcast_object(found)
    if problem is not None:
        raise MissingWeightsError(problem)
    return Weights(Path(path), sha256)


def load_plain(path: Path, source: WeightsSource) -> dict[str, Any]:
    """Read a state dict as tensors and plain types only: a stranger's file must not run code.

    Raises:
        MissingWeightsError: the file is damaged or holds anything else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise MissingWeightsError(
            _advice(source, f"{path} cannot be read as plain weights ({first_line})")
        ) from error
    if not isinstance(state, dict):
        raise MissingWeightsError(_advice(source, f"{path} does not hold a state dict"))
    return state


def wrong_weights(path: Path, source: WeightsSource, error: Exception) -> MissingWeightsError:
    """For weights that were read but do not fit the network."""
    first_line = (str(error).splitlines() or [""])[0]
    return MissingWeightsError(_advice(source, f"{path} does not fit ({first_line})"))


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _cached(source: WeightsSource) -> Path | None:
    folder = cache_path(source).parent
    return next((folder / n for n in source.file_names if (folder / n).is_file()), None)


def _download(source: WeightsSource) -> Path:
    path = cache_path(source)
    fetch: Callable[..., None] = torch.hub.download_url_to_file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _socket_timeout(DOWNLOAD_TIMEOUT):
            fetch(source.url, str(path), hash_prefix=source.hash_prefix, progress=True)
    except (OSError, RuntimeError) as error:  # URLError and timeouts are OSErrors
        raise MissingWeightsError(_advice(source, f"download failed ({error})")) from error
    return path


@contextlib.contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _advice(source: WeightsSource, problem: str) -> str:
    return (
        f"{source.name} weights: {problem}; get {source.url} and put it at {cache_path(source)} "
        f"or name it with {source.flag} PATH"
    )
