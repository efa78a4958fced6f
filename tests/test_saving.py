"""Which checkpoints are written, what a disk that refuses costs, and what counts as best."""

import json
import math
import threading
from contextlib import closing, contextmanager, nullcontext

import pytest
import torch

from tests.conftest import largest_file
from training import saving
from training.run_dir import Status
from training.saving import LOSS, MAX_FAILED_SAVES, BestScore, Saver
from training.sharding import snapshot
from utils.checkpoint import BEST, CURRENT, load_checkpoint
from utils.config import Config
from utils.distributed import Runtime
from utils.errors import EXIT_FAILURE, UserError

ALONE = Runtime(torch.device("cpu"))


def make_saver(folder, runtime=ALONE, status=None):
    best = BestScore(LOSS, lower_is_better=True)
    return Saver(folder, 2, runtime, best=best, status=status or Status(None))


def state_at(step):
    return {
        "format_version": 1,
        "model_state_dict": {"weight": torch.full((1000,), float(step))},
        "epoch": 0,
        "step": step,
        "config": Config(experiment_name="x", image_size=8).to_dict(),
        "spec": [1, 8, 8, 10],
        "best": {"metric": LOSS, "value": 1.0},
    }


def save(saver, step, epoch=None, is_best=False):
    saver.start(state_at(step), epoch=epoch, is_best=is_best)
    return saver.settle()


def step_in(path):
    return load_checkpoint(path)["step"]


def almost_full_disk():
    """The kernel refuses the second KiB of a file; the weights alone are four."""
    return largest_file(1024)


def test_names_of_the_files(tmp_path):
    saver = make_saver(tmp_path)
    assert saver.last_step is None
    assert saver.describe_last() == "none yet"
    assert save(saver, 5)
    assert [p.name for p in tmp_path.iterdir()] == [CURRENT]
    for epoch in (1, 2, 3):
        assert save(saver, 10 * epoch, epoch, is_best=epoch == 2)
    steps = {p.name: step_in(p) for p in tmp_path.iterdir()}
    epochs = {"model_epoch_0002.pth": 20, "model_epoch_0003.pth": 30}
    assert steps == {CURRENT: 30, BEST: 20, **epochs}
    assert saver.last_step == 30
    assert saver.describe_last() == f"{tmp_path / CURRENT}, step 30"


def test_a_disk_that_refuses_is_a_warning_until_the_third_time_in_a_row(tmp_path, caplog):
    saver = make_saver(tmp_path)
    full = [False, True, True, False, True, True]
    assert MAX_FAILED_SAVES == 3
    for step, is_full in enumerate(full, start=1):
        with almost_full_disk() if is_full else nullcontext():
            assert save(saver, step, epoch=step, is_best=True) == (not is_full)
        newest = 4 if step >= 4 else 1
        assert saver.last_step == newest
        assert step_in(tmp_path / CURRENT) == step_in(tmp_path / BEST) == newest
        assert not list(tmp_path.glob("*.tmp-*"))
    warned = [record.message for record in caplog.records]
    assert [text.partition(" in ")[0] for text in warned] == [
        f"no checkpoint at step {step}" for step in (2, 3, 5, 6)
    ]
    with (
        almost_full_disk(),
        pytest.raises(UserError, match="3 checkpoints in a row could not be written") as error,
    ):
        save(saver, 7)
    assert error.value.exit_code == EXIT_FAILURE
    assert saver.last_step == step_in(tmp_path / CURRENT) == 4


def test_all_ranks_hear_of_a_failure(tmp_path, monkeypatch):
    """Rank 0 alone writes; the others would go on, and wait for it in vain."""
    sent = []

    class Rank:
        def __init__(self, rank):
            self.is_main = rank == 0

        def broadcast_object(self, value):
            if self.is_main:
                sent.append(value)
            return sent[-1]

    def refuse(path, state):
        raise RuntimeError("unexpected pos 64\n vs 0")

    savers = [make_saver(tmp_path, Rank(rank)) for rank in (0, 1)]
    assert [save(saver, 1) for saver in savers] == [True, True]
    assert [saver.settle() for saver in savers] == [None, None]
    monkeypatch.setattr(saving.files, "save_checkpoint", refuse)
    for step in (2, 3):
        assert [save(saver, step) for saver in savers] == [False, False]
    for saver in savers:
        with pytest.raises(UserError, match=r"in a row .*unexpected pos 64 vs 0"):
            save(saver, 4)
        assert saver.last_step == 1


@contextmanager
def slow_disk(monkeypatch):
    """Nothing arrives before the body sets the event."""
    arrive, honest = threading.Event(), saving.files.save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(
            saving.files, "save_checkpoint", lambda *args: arrive.wait(30) and honest(*args)
        )
        yield arrive


def test_what_is_written_is_what_was_handed_over(tmp_path, monkeypatch):
    """Training goes on in place while the disk is at work."""
    status = tmp_path / "status.json"
    saver = make_saver(tmp_path, status=Status(status))
    state = state_at(1)
    with closing(saver), slow_disk(monkeypatch) as arrive:
        saver.start(state, epoch=None, is_best=False)
        state["model_state_dict"]["weight"].fill_(-1)
        state["config"]["late"] = True
        assert saver.last_step is None
        assert not status.exists()
        arrive.set()
        assert saver.settle()
    written = load_checkpoint(tmp_path / CURRENT)
    assert (written["model_state_dict"]["weight"] == 1).all()
    assert written["config"]["image_size"] == [8, 8]
    assert json.loads(status.read_text())["step"] == 1


def test_closing_waits_for_the_disk_and_tells_of_a_failure(tmp_path, monkeypatch, caplog):
    for is_full in (False, True):
        saver = make_saver(tmp_path)
        with almost_full_disk() if is_full else nullcontext():
            saver.start(state_at(2 if is_full else 1), epoch=None, is_best=False)
            saver.close()
        assert step_in(tmp_path / CURRENT) == 1
        assert ("no checkpoint at step 2" in caplog.text) == is_full


def test_a_snapshot_has_the_values_types_and_attributes_of_what_it_copies():
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "names": ("a", 1)}
    copied = snapshot(state)
    assert type(copied["model"]) is type(state["model"])
    assert copied["model"]._metadata == state["model"]._metadata
    assert copied["names"] == ("a", 1)
    assert copied["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    moments = copied["optimizer"]["state"][0]
    for name, tensor in optimizer.state_dict()["state"][0].items():
        assert torch.equal(moments[name], tensor)
        assert moments[name].data_ptr() != tensor.data_ptr()
    assert not any(tensor.requires_grad for tensor in copied["model"].values())


def test_what_is_best():
    for lower_is_better, values in ((True, [3.0, 2.0, 2.5, 1.0]), (False, [1.0, 2.0, 1.5, 3.0])):
        best = BestScore("fd_domain", lower_is_better=lower_is_better)
        assert [best.take(9.0, value) for value in values] == [True, True, False, True]
        assert best.value == values[3]


def test_a_model_that_did_not_arrive_on_disk_is_not_the_best():
    for metric in (LOSS, "fid"):
        best = BestScore(metric, lower_is_better=True)
        assert best.take(3.0, 7.0)
        before = best.state_dict()
        assert best.take(2.0, 6.0)
        best.undo()
        assert best.state_dict() == before
        assert best.take(2.0, 6.0)
        assert best.state_dict()["best_loss"] == 2.0


def test_a_failed_save_takes_the_best_score_back(tmp_path):
    saver = make_saver(tmp_path)
    for step, loss in enumerate((3.0, 2.0), start=1):
        saver.best.take(loss)
        with almost_full_disk() if step == 2 else nullcontext():
            save(saver, step, is_best=True)
    assert (saver.best.value, saver.best.lowest_loss) == (3.0, 3.0)


@pytest.mark.parametrize("lower_is_better", [True, False])
@pytest.mark.parametrize("before", [None, 2.0])
def test_nothing_and_numbers_that_are_none_are_never_best(lower_is_better, before):
    """A first value of infinity could never be beaten where higher is better."""
    best = BestScore("psnr", lower_is_better=lower_is_better)
    best.value = before
    for value in (None, math.nan, math.inf, -math.inf):
        assert not best.is_beaten_by(value)


@pytest.mark.parametrize("lower_is_better", [True, False])
def test_the_first_of_equals_stays_best(lower_is_better):
    best = BestScore(LOSS, lower_is_better=lower_is_better)
    best.value = 2.0
    assert not best.is_beaten_by(2.0)


def test_a_best_value_of_another_metric_does_not_count():
    best = BestScore("fid", lower_is_better=True)
    best.take(1.5, 7.0)
    same, other = BestScore("fid", lower_is_better=True), BestScore(LOSS, lower_is_better=True)
    for score in (same, other):
        score.load_state_dict(best.state_dict())
    assert (same.value, other.value) == (7.0, None)
    assert same.lowest_loss == other.lowest_loss == 1.5
    older = BestScore(LOSS, lower_is_better=True)
    older.load_state_dict({"best_loss": 2.5})
    assert older.value == 2.5
