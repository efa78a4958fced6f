"""What must not change the training: workers, previews, logging, trackers, number of processes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.faults.harness import Fault, Figure, Lab, count_bad
from tests.faults.kills import AUTO, metrics

STEPS = 50
NOT_RESIDENT = "resident=false"
VARIANTS: dict[str, Sequence[str]] = {
    "workers 2": (NOT_RESIDENT, "num_workers=2"),
    "previews": ("sample_interval=1", "sample_start_epoch=1"),
    "evaluation": ("eval_interval=1", "eval_num_samples=6", "eval_metrics=class_acc,sanity"),
    "tracker": ("use_swanlab=true", "swanlab_mode=offline"),
    "workers 0": (NOT_RESIDENT, "num_workers=0"),
    "workers 1": (NOT_RESIDENT, "num_workers=1"),
    "workers 4": (NOT_RESIDENT, "num_workers=4"),
    "no logging, one save": ("log_interval=1000000", "save_interval=1000000"),
    "all at once": (
        *(NOT_RESIDENT, "num_workers=2", "sample_interval=1", "sample_start_epoch=1"),
        *("use_swanlab=true", "swanlab_mode=offline", "log_interval=3", "save_interval=2"),
        *("eval_interval=2", "eval_num_samples=6", "eval_metrics=sanity"),
    ),
}
TOLERANCE = 1e-4
DIT = """
config |= dict(
    model_type="dit", model_params=dict(patch_size=2, hidden_size=32, depth=2, num_heads=2)
)
"""


class Segment(NamedTuple):
    """A part of a run."""

    processes: int
    last_step: int
    strategy: str = "ddp"


def options_around(lab: Lab, trials: int) -> Figure:
    """One training hash with any of `VARIANTS`."""

    def trial(variant: str) -> None:
        name = lab.new_name(variant.replace(" ", "_").replace(",", ""))
        try:
            lab.complete(name, f"max_steps={STEPS}", *VARIANTS[variant])
            lab.check_final(lab.run_dir(name), steps=STEPS)
        except Fault as fault:
            raise Fault(f"{variant}: {fault}") from fault

    chosen = list(VARIANTS)[:trials]
    bad, detail = count_bad([lambda variant=variant: trial(variant) for variant in chosen])
    return Figure(
        "workers, previews, evaluation, tracker, logging: one hash",
        trials,
        bad,
        "differ",
        detail or ", ".join(chosen),
    )


def world_sizes(lab: Lab, _trials: int) -> list[Figure]:
    """1 -> 2 -> 1 processes across two resumes."""
    segments = (Segment(1, 20), Segment(2, 40), Segment(1, 60))
    # the masks of dropout belong to a process and its micro-batch
    return changing(lab, "processes 1 -> 2 -> 1", segments, lab.config, "model_params.dropout=0")


def sharded(lab: Lab, _trials: int) -> list[Figure]:
    """A DiT, by FSDP2 on two processes, DDP on two, alone, and by FSDP2 again."""
    config = lab.folder / "dit.py"
    config.write_text(lab.config.read_text(encoding="utf-8") + DIT, encoding="utf-8")
    segments = (Segment(2, 20, "fsdp"), Segment(2, 30), Segment(1, 40), Segment(2, 60, "fsdp"))
    return changing(lab, "DiT, FSDP2 on 2 -> DDP on 2 -> 1 -> FSDP2 on 2", segments, config)


def changing(
    lab: Lab, label: str, segments: Sequence[Segment], config: Path, *options: str
) -> list[Figure]:
    """A run that resumes in another way in each segment, against one process that never stopped."""
    rows, losses, steps = {}, {}, segments[-1].last_step
    try:
        for kind, parts in {"whole": (Segment(1, steps),), "parts": segments}.items():
            name = lab.new_name(kind)
            path = lab.folder / f"examples_{name}"
            for part in parts:
                settings = (AUTO, f"max_steps={part.last_step}", f"strategy={part.strategy}")
                lab.complete(
                    name,
                    *(*options, *settings),
                    processes=part.processes,
                    inject={"examples": {"path": str(path)}},
                    config=config,
                )
            rows[kind], losses[kind] = examples(str(path)), dict(metrics(lab, name))
    except Fault as fault:
        return [Figure(label, steps, steps, "steps differ", str(fault))]
    other = [s for s in range(steps) if rows["parts"].get(s) != rows["whole"][s]]
    worst = max(
        (abs(losses["parts"].get(s, 1e9) / losses["whole"][s] - 1), s) for s in losses["whole"]
    )
    far = [
        s
        for s, loss in losses["whole"].items()
        if abs(losses["parts"].get(s, 1e9) - loss) > TOLERANCE * abs(loss)
    ]
    return [
        Figure(f"{label}: same images, labels, t, noise", steps, len(other), "steps differ"),
        Figure(
            f"{label}: loss within {TOLERANCE}",
            steps,
            len(far),
            "steps differ",
            f"largest relative difference {worst[0]:.1e} at step {worst[1]}",
        ),
    ]


def examples(path: str) -> dict[int, list[str]]:
    """step -> a hash per row of the global batch, from what each rank's loss was given."""
    found: dict[int, list[str]] = {}
    for rank in (0, 1):
        try:
            with open(f"{path}.{rank}", encoding="utf-8") as file:
                lines = file.read().splitlines()
        except FileNotFoundError:
            continue
        for step, _, hashes in map(json.loads, lines):
            found.setdefault(step, []).extend(hashes)
    return found
