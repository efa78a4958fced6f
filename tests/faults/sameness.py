"""What must not change the training: workers, previews, logging, trackers, number of processes."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tests.faults.harness import Fault, Figure, Lab, count_bad
from tests.faults.kills import metrics

STEPS = 50
NOT_RESIDENT = "resident=false"
VARIANTS: dict[str, Sequence[str]] = {
    "workers 2": (NOT_RESIDENT, "num_workers=2"),
    "previews": ("sample_interval=1", "sample_start_epoch=1"),
    "tracker": ("use_swanlab=true", "swanlab_mode=offline"),
    "workers 0": (NOT_RESIDENT, "num_workers=0"),
    "workers 1": (NOT_RESIDENT, "num_workers=1"),
    "workers 4": (NOT_RESIDENT, "num_workers=4"),
    "no logging, one save": ("log_interval=1000000", "save_interval=1000000"),
    "all at once": (
        *(NOT_RESIDENT, "num_workers=2", "sample_interval=1", "sample_start_epoch=1"),
        *("use_swanlab=true", "swanlab_mode=offline", "log_interval=3", "save_interval=2"),
    ),
}
SEGMENTS = ((1, 20), (2, 40), (1, 60))  # (processes, last step)
TOLERANCE = 1e-4


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
        "workers, previews, tracker, logging: one hash",
        trials,
        bad,
        "differ",
        detail or ", ".join(chosen),
    )


def world_sizes(lab: Lab, _trials: int) -> list[Figure]:
    """1 -> 2 -> 1 processes across two resumes, against one process that never stopped."""
    rows, losses = {}, {}
    label = "processes 1 -> 2 -> 1"
    # the masks of dropout belong to a process and its micro-batch
    options = ("model_params.dropout=0", "resume_path=auto")
    try:
        for kind, segments in {"whole": SEGMENTS[-1:], "parts": SEGMENTS}.items():
            name, path = lab.new_name(f"world_{kind}"), lab.folder / f"examples_{kind}"
            for processes, steps in segments:
                inject = {"examples": {"path": str(path)}}
                limit = f"max_steps={steps}"
                lab.complete(name, *options, limit, processes=processes, inject=inject)
            rows[kind], losses[kind] = examples(str(path)), dict(metrics(lab, name))
    except Fault as fault:
        return [Figure(label, 60, 60, "steps differ", str(fault))]
    steps = SEGMENTS[-1][1]
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
