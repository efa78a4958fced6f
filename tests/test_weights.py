"""The trained models in weights/: what they draw, how large they are, and what their cards say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from generation.run import load_run
from generation.sampling import sample_steps, sampling_from
from tests.conftest import ROOT
from utils.config import load_config
from utils.images import to_uint8

pytest.importorskip("safetensors")

WEIGHTS = sorted((ROOT / "weights").glob("*.safetensors"))
REFERENCES = ROOT / "tests" / "data" / "weights"
LABELS = [0, 3, 6, 9]
MEGABYTE = 10**6
# Settings that may be others in the file than in the command it was trained with
DRAWN_WITH = {"sampling_method", "num_inference_steps", "cfg_scale", "precision"}
LICENCES = {"digits": "CC BY 4.0", "mnist": "CC BY-SA 3.0", "custom": "no licence"}


def pictures_of(path) -> np.ndarray:
    """Four images side by side, (H, 4 W) or (H, 4 W, 3), by five steps of DDIM."""
    run = load_run(path, torch.device("cpu"))
    sampling = sampling_from(run.config, "ddim", 5)
    with torch.inference_mode():
        *_, last = sample_steps(run, [0, 1, 2, 3], LABELS, sampling, torch.device("cpu"))
    images = to_uint8(last.x).permute(2, 0, 3, 1).flatten(1, 2)  # (H, 4 W, C)
    return images.squeeze(-1).numpy()


def test_there_are_some_and_they_are_small():
    names = [path.stem for path in WEIGHTS]
    assert {"digits_flow", "mnist_unet"} <= {*names}, "the demo and the docs draw from these"
    sizes = [path.stat().st_size for path in WEIGHTS]
    assert max(sizes) <= 3 * MEGABYTE
    assert sum(sizes) <= 10 * MEGABYTE
    kept = {path.name for path in (ROOT / "weights").iterdir() if path.is_file()}
    assert kept == {f"{name}.{suffix}" for name in names for suffix in ("safetensors", "md")}
    assert sorted(path.stem for path in REFERENCES.glob("*")) == names


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_they_draw_what_they_drew(path):
    reference = np.asarray(Image.open(REFERENCES / f"{path.stem}.png")).astype(int)
    drawn = pictures_of(path).astype(int)
    assert drawn.shape == reference.shape
    assert np.abs(drawn - reference).max() <= 1, "8-bit steps"
    assert reference.std() > 30, "the comparison would say little"


@pytest.mark.parametrize("path", WEIGHTS, ids=lambda path: path.stem)
def test_their_cards_name_what_they_hold(path):
    card = path.with_suffix(".md").read_text(encoding="utf-8")
    run = load_run(path, torch.device("cpu"))
    assert path.name in card
    assert f"for {run.step} steps" in card
    config = json.loads(card.split("```json\n")[1].split("```")[0])
    assert config == run.config.to_dict()
    file, *overrides = card.split("python train.py --config ")[1].split("\n")[0].split()
    trained = load_config(ROOT / file, overrides).to_dict()
    assert {key for key in config if config[key] != trained[key]} <= DRAWN_WITH
    if "No metric was measured" not in card:
        assert f"python evaluate.py --checkpoint checkpoints/{path.stem}" in card
        assert "| class_acc |" in card
    assert LICENCES[run.config.dataset] in card
    assert "with changes since" not in card
