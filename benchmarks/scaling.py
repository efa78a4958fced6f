"""Images per second of `torchrun` with several processes over those of one: the real train.py.

python -m benchmarks.scaling
python -m benchmarks.scaling --processes 8 --device cuda --batch_size 128

Every process gets `batch_size` images a step, and on a CPU one thread. Needs an idle machine, as
wall-clock time is measured. One and several take turns; the ratio is taken within each round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.timing import Report, add_options, describe, ratio

ROOT = Path(__file__).resolve().parents[1]
LOG_INTERVAL = 5  # steps
WARM_UP = 2  # log lines that do not count
CONFIG = """
config = dict(
    dataset="synthetic",
    image_size=32,
    conditional=True,
    model_params=dict(model_channels=32, channel_mult=(1, 2, 2), num_res_blocks=2),
    learning_rate=1e-4,
    sample_interval=10**6,
    sample_start_epoch=10**6,
    save_interval=10**6,
    epochs=10**6,
)
"""


def images_per_second(args: argparse.Namespace, processes: int, folder: Path) -> float:
    """Of a run of its own; the median over its log lines."""
    config = folder / "config.py"
    config.write_text(CONFIG, encoding="utf-8")
    name = f"run_{len(list(folder.iterdir()))}"
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={processes}"]
    command += [str(ROOT / "train.py"), "--config", str(config), "--device", args.device]
    settings = {
        "experiment_name": name,
        "save_dir": folder,
        "batch_size": args.batch_size * processes,
        "max_steps": args.steps,
        "log_interval": LOG_INTERVAL,
    }
    command += [f"{key}={value}" for key, value in settings.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    lines = (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    speeds = [json.loads(line)["train/images_per_sec"] for line in lines]
    return statistics.median(speeds[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, rounds=5)
    parser.set_defaults(batch_size=16)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    args = parser.parse_args()
    report = Report(describe(args) | {"clock": "wall clock"})
    one, several = "1 process", f"{args.processes} processes"
    speeds = {one: [], several: []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            speeds[one].append(images_per_second(args, 1, Path(folder)))
            speeds[several].append(images_per_second(args, args.processes, Path(folder)))
    row = {name: statistics.median(values) for name, values in speeds.items()}
    report.table("Images per second", [row | {"ratio": ratio(speeds, several, one)}])
    report.finish(args.json)


if __name__ == "__main__":
    main()
