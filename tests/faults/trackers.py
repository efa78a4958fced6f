"""A tracker whose server is down, slow or silent."""

from __future__ import annotations

import json

from tests.faults.harness import Fault, Figure, Lab, count_bad
from tests.faults.kills import metrics
from training.tracking import FINISH_SECONDS

STEPS = 200
LARGEST_SHARE = 0.05  # of the training time
END_SECONDS = FINISH_SECONDS + 15  # from the last step to the end of the process
CASES = {
    "raises in init": {"how": "raise", "where": "init"},
    "raises in log": {"how": "raise", "where": "log"},
    "raises in finish": {"how": "raise", "where": "finish"},
    "SwanLab offline": None,
    "hangs in log": {"how": "hang", "where": "log"},
}
HANGS = {
    "hangs in init": {"how": "hang", "where": "init"},
    "hangs in finish": {"how": "hang", "where": "finish"},
}


def trackers(lab: Lab, trials: int) -> list[Figure]:
    """Same training, all rows in metrics.jsonl, at most 5 % of the time spent on the tracker."""
    shares: list[str] = []
    chosen = list(CASES)[-trials:]
    bad, detail = count_bad([lambda case=case: run_with(lab, case, shares) for case in chosen])
    shown = "; ".join(shares)
    first = Figure(
        "tracker raises, hangs, offline: hash, rows, < 5 % time",
        len(chosen),
        bad,
        "failed",
        f"{detail}; {shown}" if detail else shown,
    )
    if trials < len(CASES):
        return [first]
    bad, detail = count_bad([lambda case=case: run_with(lab, case, shares) for case in HANGS])
    label = f"tracker hangs in init, finish: ends in {END_SECONDS} s"
    return [first, Figure(label, len(HANGS), bad, "failed", detail)]


def run_with(lab: Lab, case: str, shares: list[str]) -> None:
    """Raises:
    Fault: the run hung, differs, lost rows, or waited for its tracker.
    """
    name, path = lab.new_name("tracker"), lab.folder / f"{case.replace(' ', '_')}.json"
    fault = {**CASES, **HANGS}[case]
    inject = {"time": {"path": str(path)}, **({"tracker": fault} if fault else {})}
    job = lab.start(
        name,
        *("use_swanlab=true", "swanlab_mode=offline", "log_interval=10", "save_interval=100"),
        inject=inject,
    )
    try:
        job.wait_until(lambda: job.last_step() == STEPS, "last step")
        if any(codes := job.finish(END_SECONDS)):
            raise Fault(f"exit codes {codes}: {job.tail()}")
        lab.check_final(lab.run_dir(name), steps=STEPS)
    except Fault as problem:
        raise Fault(f"{case}: {problem}") from problem
    if [step for step, _ in metrics(lab, name)] != [1, *range(10, STEPS + 1, 10)]:
        raise Fault(f"{case}: rows are missing in metrics.jsonl")
    times = json.loads(path.read_text(encoding="utf-8"))
    share = times["tracker"] / times["train"]
    shares.append(f"{case} {share:.1%} of {times['train']:.1f} s")
    if share > LARGEST_SHARE:
        raise Fault(f"{case}: {share:.0%} of the training time")
