"""Processes that are killed at any moment, and processes that are asked to stop."""

from __future__ import annotations

import json
import os
import signal
import time

from tests.faults.harness import REFERENCE_STEPS, Fault, Figure, Job, Lab
from training.run_dir import STATES, STATUS
from training.signals import REPEAT_SECONDS, SIGNALS
from utils.errors import EXIT_OK, EXIT_PREEMPTED

MOST_STEPS = 6  # between the first step of a start and its kill
START_SECONDS = 4.0  # one kill in four comes this early: while importing, reading, building
STOP_SECONDS = 11.0  # ten, and a step
AUTO = "resume_path=auto"
TORCHRUN_STOPPED = 1  # torchrun returns that, whatever its processes do
PASS_ON = f"--signals-to-handle={','.join(number.name for number in SIGNALS)}"


def kill_one_process(lab: Lab, trials: int) -> list[Figure]:
    """A run that is killed `trials` times and started again each time."""
    name = lab.new_name("killed")
    bad, detail = kill_and_go_on(lab, name, trials, processes=1)
    figure = Figure("kill -9, 1 process", trials, bad, "lost", detail)
    return [figure, metrics_rows(lab, name)]


def kill_job(lab: Lab, trials: int) -> Figure:
    """torchrun and both of its processes at once."""
    bad, detail = kill_and_go_on(lab, lab.new_name("killed_job"), trials, processes=2)
    return Figure("kill -9, whole torchrun job of 2", trials, bad, "lost", detail)


def kill_and_go_on(lab: Lab, name: str, trials: int, *, processes: int) -> tuple[int, str]:
    """(number of lost trials, what happened): after each kill the newest file is checked."""
    options = dict(processes=processes, torchrun=[] if processes > 1 else None)
    kept = []
    for trial in range(trials):
        try:
            job = lab.start(name, AUTO, **options)
            kill_at_random(lab, job)
            if job.is_running():
                raise Fault("survived kill -9")
            kept.append(lab.check_newest(lab.run_dir(name), processes))
        except Fault as fault:  # the rest of the chain is lost with it
            return trials - trial, f"kill {trial + 1}: {fault}"
    try:
        last = lab.complete(name, AUTO, **options)
        if last.resumed_from() != kept[-1]:
            raise Fault(f"went on from step {last.resumed_from()}, the newest file has {kept[-1]}")
        lab.check_final(lab.run_dir(name), processes)
    except Fault as fault:
        return trials, str(fault)
    return 0, f"went on from steps {', '.join(map(str, kept))}; final hash equal"


def kill_at_random(lab: Lab, job: Job) -> None:
    """During start-up, or some steps and a part of a step later."""
    if lab.random.random() < 0.25:
        time.sleep(lab.random.uniform(0.5, START_SECONDS))
    else:
        job.wait_for_steps(1 + lab.random.randrange(MOST_STEPS))
        time.sleep(lab.random.uniform(0, 0.06))
    job.kill()


def metrics_rows(lab: Lab, name: str) -> Figure:
    """Every step is in metrics.jsonl once, with the loss of the uninterrupted run."""
    wanted, found = (metrics(lab, run) for run in ("reference_1", name))
    wrong = [row for row in found if row not in wanted]
    bad = len(wrong) + len(wanted) - len(set(found))
    return Figure("metrics.jsonl after those kills", len(wanted), bad, "rows wrong")


def metrics(lab: Lab, name: str) -> list[tuple[int, float]]:
    text = (lab.run_dir(name) / "metrics.jsonl").read_text(encoding="utf-8")
    return [(row["step"], row["train/loss"]) for row in map(json.loads, text.splitlines())]


def kill_ranks(lab: Lab, trials: int) -> Figure:
    """Single processes of a torchrun job, rank 0 and rank 1 in turn; torchrun restarts both."""
    label = "kill -9, one rank of 2 under torchrun --max-restarts"
    name, waits = lab.new_name("killed_ranks"), []
    job = lab.start(name, AUTO, processes=2, torchrun=[f"--max-restarts={trials}"])
    try:
        for trial in range(trials):
            waits.append(kill_rank(lab, job, trial % 2))
    except Fault as fault:
        job.kill()
        return Figure(label, trials, trials - len(waits), "lost", str(fault))
    try:
        if codes := [code for code in job.finish() if code != EXIT_OK]:
            raise Fault(f"torchrun returned {codes}: {job.tail()}")
        lab.check_final(lab.run_dir(name), processes=2)
    except Fault as fault:
        return Figure(label, trials, trials, "lost", str(fault))
    detail = f"back in {min(waits):.0f} to {max(waits):.0f} s; final hash equal"
    return Figure(label, trials, 0, "lost", detail)


def kill_rank(lab: Lab, job: Job, rank: int) -> float:
    """Returns the seconds until the restarted job has made a step."""
    job.wait_for_steps(1 + lab.random.randrange(MOST_STEPS))
    time.sleep(lab.random.uniform(0, 0.06))
    victim = job.ranks()[rank]
    began = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    time.sleep(0.05)  # what a dying job still prints is not the next one's
    job.forget()
    job.wait_until(lambda: b"\nplan: " in job.text(), "going on")  # which a fresh start prints, too
    job.wait_for_steps(1)
    return time.monotonic() - began


# --- stop signals


def stop_one_process(lab: Lab, trials: int) -> Figure:
    return stop_and_go_on(lab, trials, processes=1)


def stop_two_processes(lab: Lab, trials: int) -> Figure:
    """To torchrun, to rank 0 alone and to rank 1 alone: both stop at the same step."""
    return stop_and_go_on(lab, trials, processes=2)


def stop_and_go_on(lab: Lab, trials: int, *, processes: int) -> Figure:
    """A run that gets the signals in turn, `trials` altogether, and is started again each time."""
    names = ", ".join(number.name for number in SIGNALS)
    label = f"{names}, {processes} process{'es' * (processes > 1)}"
    name, seconds = lab.new_name("stopped"), []
    for trial in range(trials):
        target = (trial + trial // len(SIGNALS)) % 3
        torchrun = [PASS_ON] if processes > 1 and target == 2 else None
        job = lab.start(name, AUTO, processes=processes, torchrun=torchrun)
        number = SIGNALS[trial % len(SIGNALS)]
        try:
            seconds.append(stop_once(lab, job, number, target, name))
        except Fault as fault:
            job.kill()
            detail = f"{number.name} {trial + 1}: {fault}"
            return Figure(label, trials, trials - trial, "lost", detail)
    try:
        lab.complete(name, AUTO, processes=processes)
        lab.check_final(lab.run_dir(name), processes)
    except Fault as fault:
        return Figure(label, trials, trials, "lost", str(fault))
    detail = f"saved and out in {max(seconds):.1f} s at most; final hash equal"
    return Figure(label, trials, 0, "lost", detail)


def stop_once(lab: Lab, job: Job, number: int, target: int, name: str) -> float:
    """Signal one of the job's processes, check what is left. Returns the seconds to the end."""
    through_torchrun = "torch.distributed.run" in job.process.args
    processes = 2 if through_torchrun else len(job.processes)
    job.wait_for_steps(1 + lab.random.randrange(MOST_STEPS))
    time.sleep(lab.random.uniform(0, 0.06))
    began = time.monotonic()
    if number == signal.SIGINT and processes == 1:
        os.killpg(job.process.pid, number)  # as a terminal does
    else:
        job.processes[target % len(job.processes)].send_signal(number)
    codes = job.finish(STOP_SECONDS + 30)
    seconds = time.monotonic() - began
    wanted = TORCHRUN_STOPPED if through_torchrun else EXIT_PREEMPTED
    if set(codes) != {wanted}:
        raise Fault(f"exit codes {codes}, wanted {wanted}: {job.tail()}")
    step = lab.check_newest(lab.run_dir(name), processes)
    if step >= REFERENCE_STEPS:
        raise Fault("the run was over before the signal")
    if step != job.last_step():
        raise Fault(f"stopped at step {job.last_step()}, saved step {step}")
    status = json.loads((lab.run_dir(name) / STATUS).read_text(encoding="utf-8"))
    if status["state"] != STATES[EXIT_PREEMPTED]:
        raise Fault(f"{STATUS} says {status['state']}")
    if seconds > STOP_SECONDS:
        raise Fault(f"took {seconds:.0f} s to stop")
    return seconds


def stop_twice(lab: Lab, trials: int) -> Figure:
    """A second Ctrl-C while the first is at work: out at once, the previous file is whole."""
    label = "second Ctrl-C during a save that hangs"
    name, seconds = lab.new_name("twice"), []
    for trial in range(trials):
        job = lab.start(name, AUTO, inject={"slow_saves": {"quick": 2, "seconds": 30}})
        try:
            job.wait_for_steps(4)
            job.process.send_signal(signal.SIGINT)
            time.sleep(REPEAT_SECONDS + 0.3)
            began = time.monotonic()
            job.process.send_signal(signal.SIGINT)
            job.finish(30)
            seconds.append(time.monotonic() - began)
            if seconds[-1] > 2:
                raise Fault(f"took {seconds[-1]:.1f} s")
            lab.check_newest(lab.run_dir(name))
        except Fault as fault:
            job.kill()
            return Figure(label, trials, trials - trial, "lost", str(fault))
    return Figure(label, trials, 0, "lost", f"out in {max(seconds):.1f} s at most")
