"""Statistics in files: as others write them, as we do, and nothing else."""

import numpy as np
import pytest
import torch

from metrics.reference import (
    GIVEN,
    Reference,
    given_references,
    read_reference,
    write_reference,
)
from utils.errors import ConfigError


def make(dim=6):
    features = torch.randn(50, dim, generator=torch.Generator().manual_seed(0)).double()
    return Reference(features.mean(0), features.T.cov(), 50, {"layer": "64", "data": "digits"})


def test_round_trip(tmp_path):
    reference, path = make(), tmp_path / "new" / "stats.npz"
    write_reference(path, reference)
    found = read_reference(path, 6)
    assert torch.equal(found.mu, reference.mu)
    assert torch.equal(found.sigma, reference.sigma)
    assert (found.num_images, found.meta) == (50, reference.meta)
    assert list(path.parent.iterdir()) == [path]


def test_others_read_ours_and_we_read_theirs(tmp_path):
    """pytorch-fid and EDM: np.load(path)["mu"], ["sigma"], and no more."""
    write_reference(tmp_path / "ours.npz", make())
    with np.load(tmp_path / "ours.npz") as stored:
        assert stored["mu"].shape == (6,)
        assert stored["sigma"].shape == (6, 6)
        assert stored["mu"].dtype == stored["sigma"].dtype == np.float64
    np.savez(tmp_path / "theirs.npz", mu=np.zeros(6, np.float32), sigma=np.eye(6), mu_s=np.ones(2))
    found = read_reference(tmp_path / "theirs.npz", 6)
    assert found.num_images is None
    assert found.meta == {}
    assert found.mu.dtype == torch.float64


def test_a_file_may_hold_the_statistics_of_several_metrics(tmp_path, monkeypatch):
    """ADM's files have those of sFID beside those of FID."""
    for name, (_, end) in GIVEN.items():
        monkeypatch.setitem(GIVEN, name, (len(name), end))
    theirs = dict(mu=np.zeros(3), sigma=np.eye(3), mu_s=np.ones(4), sigma_s=2 * np.eye(4))
    np.savez(tmp_path / "adm.npz", **theirs)
    given = given_references(tmp_path / "adm.npz")
    assert given["fid"].mu.tolist() == 3 * [0]
    assert (given["sfid"].mu.tolist(), given["sfid"].sigma.trace()) == (4 * [1], 8)
    assert given.keys() == {"fid", "sfid"}
    np.savez(tmp_path / "adm.npz", **theirs | dict(sigma_s=np.eye(3)))
    with pytest.raises(ConfigError, match=r"sigma_s .* are not of 4 features"):
        given_references(tmp_path / "adm.npz")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "cannot be read"),
        (lambda path: path.write_bytes(b"PK no zip"), "cannot be read"),
        (lambda path: np.savez(path, mean=np.zeros(6)), "mu and sigma"),
        (lambda path: np.savez(path, mu=np.zeros(4), sigma=np.eye(4)), "not of 6 features"),
        (lambda path: np.savez(path, mu=np.zeros(6), sigma=np.eye(6), meta="{"), "cannot be read"),
        (lambda path: np.savez(path, mu=np.array([{}], object), sigma=np.eye(6)), "cannot be read"),
    ],
)
def test_what_is_no_reference_is_refused_in_one_line(tmp_path, write, message):
    path = tmp_path / "stats.npz"
    write(path)
    with pytest.raises(ConfigError, match=message) as caught:
        read_reference(path, 6)
    assert "\n" not in str(caught.value)
