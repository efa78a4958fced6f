"""The arithmetic of benchmarks/learning.py: what is trained, judged and compared."""

from __future__ import annotations

import pytest
import torch

from benchmarks import learning
from benchmarks.learning_judge import Court, Judge, compute_needed
from utils.config import load_config
from utils.errors import EXIT_OK, exit_code_of

CURVE = [(1.0, 8.0), (2.0, 4.0), (4.0, 2.0), (8.0, 1.0)]


@pytest.mark.parametrize(
    ("target", "share"),
    [(2.0, "0.5"), (1.0, "1"), (8**0.5, "0.35"), (8.0, "< 0.12"), (9.0, "< 0.12"), (0.9, "> 1")],
)
def test_compute_to_reach_a_distance_is_read_off_the_curve_in_logarithms(target, share):
    assert compute_needed(CURVE, target) == share


def test_of_a_curve_that_turns_the_first_crossing_counts():
    assert compute_needed([(1.0, 4.0), (2.0, 1.0), (4.0, 3.0)], 2.0) == "0.35"


def test_one_slow_round_of_the_probe_does_not_decide_how_long_a_contestant_trains():
    assert learning.steps_for(10, [0.1, 0.11, 0.1, 0.1, 7.0, 0.09]) == 100
    assert (learning.steps_for(0.001, [0.1]), learning.steps_for(9.7, [0.1], 10)) == (1, 101)
    assert learning.budgets_of([100.0]) == [12.5, 25.0, 50.0, 100.0]
    assert learning.budgets_of([50.0, 10.0]) == [10.0, 50.0]


def test_the_judge_finds_nothing_between_images_and_themselves():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (150, 1, 16, 16), dtype=torch.uint8)
    judge = Judge(1, 10).eval()
    court = Court(judge, images)
    seen = judge.classes(judge.features(images))
    same = court.verdict(images, seen)
    assert same["distance"] == pytest.approx(0, abs=1e-6)
    assert (same["accuracy"], same["recall"], same["precision"]) == (1, 1, 1)
    assert same["low"] < 1
    wrong = court.verdict(images // 4, (seen + 1) % 10)
    assert wrong["distance"] > same["distance"] + 1e-3
    assert court.verdict(images, (seen + 1) % 10)["accuracy"] == 0


@pytest.mark.parametrize("name", learning.OURS)
def test_ours_train_as_shipped_but_for_their_size_and_length(name, tmp_path):
    args = learning.make_parser().parse_args(["--work", str(tmp_path)])
    bench = learning.Bench("mnist28", args)
    bench.results["images"] = 60_000
    file, overrides = bench.config_of(name, 300)
    config, shipped = load_config(file, overrides), load_config(file)
    changed = {k for k, v in config.to_dict().items() if v != shipped.to_dict()[k]}
    length = {"epochs", "max_steps", "warmup_epochs"}
    silence = {"save_interval", "sample_interval", "log_interval", "save_dir"}
    assert changed <= {"dataset", "image_size", "model_params"} | length | silence
    of_all_epochs = shipped.warmup_epochs / shipped.epochs
    warm_up = config.warmup_epochs * 60_000 / config.batch_size
    assert warm_up == pytest.approx(300 * of_all_epochs)


def test_the_best_peer_is_judged_by_its_better_sampler(tmp_path):
    command = ["--work", str(tmp_path), "--contestants", "JiT", "diffusers, course"]
    args = learning.make_parser().parse_args([*command, "--samples", "100"])
    args.budget = learning.budgets_of([8.0])
    bench = learning.Bench("mnist16", args)
    bench.results["seconds of a step"] = {"JiT": [0.01], "diffusers, course": [0.1, 0.1]}
    score = {"accuracy": 0.5, "low": 0.4, "high": 0.6, "recall": 0.7}
    for budget, distance in CURVE:
        ours = score | {"distance": distance, "of a share": distance + 0.5}
        bench.results[f"JiT {100 * budget:.0f}_common_100"] = ours
        bench.results[f"diffusers__course {10 * budget:.0f}_common_100"] = ours | {"distance": 9}
    bench.results["JiT 800_guided_100"] = score | {"distance": 3.0}
    bench.results["diffusers__course 80_own_50"] = score | {"distance": 2.0}
    ours, theirs = bench.rows()
    assert (ours["steps"], theirs["steps"]) == (800, 80)
    needed = "compute to peers' best FD"
    assert (ours[needed], theirs[needed]) == ("0.5", "> 1")
    own = "FD, own sampler, 50 images"
    assert (ours[own], theirs[own]) == (1.5, 2.0)
    assert (ours["guided: distance"], theirs["guided: distance"]) == (3.0, None)
    assert ours["FD at 4"] == 2.0


def test_what_is_missing_is_said_and_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(learning, "find_spec", lambda name: None)
    command = ["--work", str(tmp_path), "--arenas", "cifar16"]
    assert exit_code_of(lambda: learning.main(command)) == EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [*learning.PEERS, "cifar16"]
    assert "diffusers is not installed; see benchmarks/requirements.txt" in lines[0]
    assert "--cifar" in lines[-1]
