"""docs/slurm/train.sbatch, with stand-ins for SLURM's commands."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.test_train import logged, state_of, wait_for_step

TEMPLATE = ROOT / "docs" / "slurm" / "train.sbatch"

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("bash") is None,
    reason="SLURM's template is for bash on Linux",
)

# Every command leaves a line with its arguments; `scontrol show hostnames` names the nodes.
RECORD = """#!/bin/bash
echo "$(basename "$0") $*" >> "$FAKES/calls"
[[ $1 == show ]] && printf 'localhost\\n%.0s' $(seq "$SLURM_NNODES")
exit 0
"""

# A job step without training: it ends in the state it is told to, at once or when it is signalled.
STEP = """#!/bin/bash
echo "$(basename "$0") $*" >> "$FAKES/calls"
trap 'echo "srun got SIGTERM" >> "$FAKES/calls"; exit 143' TERM
if [[ -n $STEP_WAITS ]]; then
    touch "$FAKES/started"
    until grep -qs scancel "$FAKES/calls"; do sleep 0.01; done
    sleep 0.3
fi
[[ -n $STEP_STATE ]] && echo "{\\"state\\": \\"$STEP_STATE\\", \\"n\\": $$}" > "$STATUS"
exit "$STEP_CODE"
"""

# Runs the command once per node, all on this machine. As the real one, it answers SIGTERM by
# killing its tasks.
SRUN = """
import os, signal, subprocess, sys
from pathlib import Path

assert sys.argv[1] == "--wait=60"
command = sys.argv[2:]
tasks = [subprocess.Popen(command) for _ in range(int(os.environ["SLURM_NNODES"]))]

def kill(*_):
    for task in tasks:
        task.kill()

signal.signal(signal.SIGTERM, kill)
Path(os.environ["FAKES"], "tasks").write_text(" ".join(str(task.pid) for task in tasks))
sys.exit(max(abs(task.wait()) for task in tasks))
"""

# Signals all processes of the step: some ways of tracking them do, others reach the tasks alone.
SCANCEL = """
import os, signal, sys
from pathlib import Path

with open(Path(os.environ["FAKES"], "calls"), "a") as file:
    print("scancel", *sys.argv[1:], file=file)
level = [int(pid) for pid in Path(os.environ["FAKES"], "tasks").read_text().split()]
found = []
while level:
    found += level
    children = [Path(f"/proc/{pid}/task/{pid}/children").read_text().split() for pid in level]
    level = [int(pid) for pids in children for pid in pids]
for pid in found:
    os.kill(pid, signal.Signals["SIG" + sys.argv[1].partition("=")[2]])
"""


class Cluster:
    """Runs the template as SLURM would run it, as job `job_id`."""

    def __init__(self, folder, config, commands, num_nodes=1):
        self.folder, self.job_id = folder, free_job_id()
        self.fakes = folder / "fakes"
        self.fakes.mkdir()
        for name, text in commands.items():
            path = self.fakes / name
            path.write_text(text if text.startswith("#!") else f"#!{sys.executable}\n{text}")
            path.chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": os.pathsep.join(
                [str(self.fakes), str(Path(sys.executable).parent), os.environ["PATH"]]
            ),
            "FAKES": str(self.fakes),
            "SLURM_JOB_ID": str(self.job_id),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NNODES": str(num_nodes),
            "OMP_NUM_THREADS": "1",
            "CONFIG": str(config),
            "SAVE_DIR": str(folder / "checkpoints"),
            "PROCESSES": "1",
        }

    def start(self, name, *overrides, **environment):
        status = self.folder / "checkpoints" / name / "status.json"
        return subprocess.Popen(
            ["bash", TEMPLATE, *overrides],
            cwd=ROOT,
            env={**self.environment, "NAME": name, "STATUS": str(status), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, name, *overrides, **environment):
        job = self.start(name, *overrides, **environment)
        job.output = job.communicate(timeout=300)[0]
        return job

    def calls(self, command):
        lines = (self.fakes / "calls").read_text().splitlines()
        return [line for line in lines if line.startswith(f"{command} ")]

    @property
    def requeues(self):
        return [line for line in self.calls("scontrol") if "requeue" in line]


def free_job_id():
    """One whose rendezvous port, 29500 + id % 1000, is free."""
    for job_id in range(4_000_000 + os.getpid() % 1000, 4_002_000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", 29500 + job_id % 1000))
            except OSError:
                continue
            return job_id
    raise AssertionError("no port is free")


# --- the shell's part


def test_the_shell_accepts_the_template():
    subprocess.run(["bash", "-n", TEMPLATE], check=True)
    lines = TEMPLATE.read_text().splitlines()
    options = [line.partition(" ")[2] for line in lines if line.startswith("#SBATCH ")]
    wanted = {"--signal=B:USR1@120", "--requeue", "--open-mode=append", "--ntasks-per-node=1"}
    assert wanted <= set(options)
    assert lines[0] == "#!/bin/bash"
    assert lines[1 : 1 + len(options)] == [f"#SBATCH {option}" for option in options]


@pytest.fixture
def shell(tmp_path):
    """The template around a step that trains nothing."""
    (tmp_path / "checkpoints" / "a").mkdir(parents=True)
    commands = {"srun": STEP, "scontrol": RECORD, "scancel": RECORD}
    return Cluster(tmp_path, "configs/digits_unet.py", commands, num_nodes=3)


def test_the_command_of_the_step(shell):
    done = shell.run("a", "epochs=3", "model_params.dropout=0.1", STEP_CODE="0")
    assert done.returncode == 0, done.output
    [call] = shell.calls("srun")
    port = 29500 + shell.job_id % 1000
    assert call == (
        f"srun --wait=60 torchrun --nnodes=3 --nproc_per_node=1 --rdzv_backend=c10d "
        f"--rdzv_id={shell.job_id} --rdzv_endpoint=localhost:{port} "
        f"train.py --config configs/digits_unet.py experiment_name=a "
        f"save_dir={shell.environment['SAVE_DIR']} resume_path=auto epochs=3 "
        "model_params.dropout=0.1"
    )
    assert shell.calls("scontrol") == ["scontrol show hostnames node[1-2]"]


@pytest.mark.parametrize(
    ("state", "code", "returned", "is_requeued"),
    [
        ("complete", 0, 0, False),
        ("preempted", 1, 0, True),
        ("failed", 1, 1, False),
        ("non_finite", 41, 41, False),
        ("running", 137, 137, False),
        ("", 2, 2, False),  # refused before the run had a folder
    ],
)
def test_what_follows_a_step(shell, state, code, returned, is_requeued):
    done = shell.run("a", STEP_STATE=state, STEP_CODE=str(code))
    assert done.returncode == returned, done.output
    assert shell.requeues == [f"scontrol requeue {shell.job_id}"] * is_requeued


def test_an_old_status_does_not_requeue_a_job_for_ever(shell):
    """Preempted and requeued, the job fails before it can write what became of it."""
    assert shell.run("a", STEP_STATE="preempted", STEP_CODE="1").returncode == 0
    assert shell.run("a", STEP_STATE="", STEP_CODE="1").returncode == 1
    assert shell.run("a", STEP_STATE="preempted", STEP_CODE="1").returncode == 0
    assert len(shell.requeues) == 2


@pytest.mark.parametrize(
    ("state", "code", "returned", "is_requeued"),
    [("preempted", 1, 0, True), ("complete", 0, 0, False), ("failed", 7, 7, False)],
)
def test_a_warning_goes_to_the_tasks_and_the_shell_waits(shell, state, code, returned, is_requeued):
    job = shell.start("a", STEP_WAITS="1", STEP_STATE=state, STEP_CODE=str(code))
    wait_for_file(job, shell.fakes / "started")
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == returned, output
    assert shell.calls("scancel") == [f"scancel --signal=TERM {shell.job_id}"]
    assert not [call for call in shell.calls("srun") if "SIGTERM" in call]
    assert shell.requeues == [f"scontrol requeue {shell.job_id}"] * is_requeued


def wait_for_file(process, path):
    deadline = time.monotonic() + 60
    while process.poll() is None and not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- with torchrun and train.py


def cluster(tiny, num_nodes):
    commands = {"srun": SRUN, "scancel": SCANCEL, "scontrol": RECORD}
    return Cluster(tiny.parent, tiny, commands, num_nodes)


def status_of(name):
    return json.loads((Path("checkpoints") / name / "status.json").read_text())


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.timeout(900)
def test_a_warned_job_is_requeued_and_ends_as_one_that_was_not(tiny):
    """Two nodes of one process each, both on this machine."""
    nodes = cluster(tiny, num_nodes=2)
    options = ["max_steps=150", "log_interval=1"]
    done = nodes.run("whole", *options)
    assert done.returncode == 0, done.output
    assert status_of("whole") == status_of("whole") | {"state": "complete", "step": 150}
    assert "2 process(es)" in done.output
    assert nodes.requeues == []

    job = nodes.start("parts", *options)
    wait_for_step(job, "parts", 5, tiny.parent)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    stopped = status_of("parts")
    assert stopped == stopped | {"state": "preempted", "exit_code": 75, "signal": "SIGTERM"}
    assert 5 <= stopped["step"] == state_of("parts")["step"] < 150
    assert nodes.requeues == [f"scontrol requeue {nodes.job_id}"]

    done = nodes.run("parts", *options)
    assert done.returncode == 0, done.output
    assert f"going on from {nodes.folder}/checkpoints/parts/current_model.pth" in done.output
    assert status_of("parts") == status_of("parts") | {"state": "complete", "step": 150}
    assert len(nodes.requeues) == 1
    whole, parts = state_of("whole"), state_of("parts")
    for key in ("model_state_dict", "ema_model_state_dict"):
        assert all(torch.equal(whole[key][name], parts[key][name]) for name in whole[key])
    assert logged("parts") == logged("whole")


@pytest.mark.slow
@pytest.mark.ci
def test_a_failing_job_is_not_requeued(tiny):
    node = cluster(tiny, num_nodes=1)
    done = node.run("a", "max_steps=3", "resident=false", "dataset=custom", "data_root=missing")
    assert done.returncode == 1
    assert "missing" in done.output
    assert node.requeues == []
