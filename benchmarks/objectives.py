"""What to predict, and whose error to minimise: eleven objectives at equal CPU time, as a table.

python -m benchmarks.objectives --work objectives dataset=mnist image_size=16 data_root=data
python -m benchmarks.objectives --work objectives dataset=custom data_root=my_images image_size=16

All pairs of prediction and loss on the linear path, DDPM as the shipped configs have it, and EDM,
each by the same small JiT with patches of 2 and of 8 pixels: conditional on the class, sampled
without guidance by 25 steps of DDIM. Then the best three of each once more with two other seeds.
Every process runs on one thread; the steps that a budget buys are measured first. Runs that are
done are not run again. The judge is a classifier of the train images, the same one for all.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

BASE = dict(
    conditional=True,
    model_type="jit",
    batch_size=64,
    epochs=1000,
    learning_rate=1e-3,
    ema_decay=0.99,
    use_scheduler=True,
    scheduler_type="warmup_cosine",
    warmup_epochs=0.05,
    save_interval=10**6,
    sample_interval=10**6,
    log_interval=10**6,
)
NETWORK = dict(hidden_size=64, depth=4, num_heads=4, bottleneck=32, num_class_tokens=4)
PATCHES = (2, 8)  # the second is a token of 64 grey values, or 192 of colour
QUANTITIES = ("eps", "x_0", "v")
LOGIT_NORMAL = dict(timestep_sampling="logit_normal", timestep_mean=0.0, timestep_std=1.0)
OBJECTIVES: dict[str, dict[str, Any]] = {
    f"flow, {prediction}, loss in {loss}": dict(
        process="flow", prediction_type=prediction, loss_space=loss, **LOGIT_NORMAL
    )
    for prediction, loss in product(QUANTITIES, QUANTITIES)
}
OBJECTIVES["ddpm cosine, v"] = dict(beta_schedule="cosine", prediction_type="v")
OBJECTIVES["edm"] = dict(
    process="edm", prediction_type="v", timestep_sampling="lognormal", timestep_mean=-1.2
)
OBJECTIVES["edm"]["timestep_std"] = 1.2
SEEDS, NUM_BEST = (42, 43, 44), 3
PROBES = (20, 120)  # steps of two runs, whose difference is the time of a step
METRICS = "class_acc,fd_domain,prdc_domain"
Result = dict[str, Any]


def run(*arguments: object) -> float:
    """Run Python with these arguments on one thread; returns its CPU seconds."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {' '.join(command)}")
    return usage.ru_utime + usage.ru_stime


class Arena:
    """The runs on one data set; `overrides` of the config name it."""

    def __init__(self, work: Path, overrides: Sequence[str], seconds: float, samples: int) -> None:
        self.work, self.seconds, self.samples = work, seconds, samples
        self.overrides = [*overrides, f"save_dir={work}"]
        self.results: dict[str, Result] = {}
        work.mkdir(parents=True, exist_ok=True)
        self._file, self._config = work / "results.json", work / "base.py"
        if self._file.exists():
            self.results = json.loads(self._file.read_text(encoding="utf-8"))
        self._config.write_text(f"config = {BASE!r}\n", encoding="utf-8")

    def train(self, name: str, settings: Mapping[str, Any]) -> float:
        """Train a run of this name in the folder; returns its CPU seconds."""
        given = [f"{key}={value}" for key, value in settings.items()]
        common = ["train.py", "--config", self._config, "--device", "cpu", *self.overrides]
        return run(*common, f"experiment_name={name}", *given)

    def steps(self, patch: int) -> int:
        """How many training steps the budget buys, without those seconds that any start takes."""
        key = f"steps of {self.seconds:g} s, patch {patch}"
        if key not in self.results:
            times = []
            for number in PROBES:
                name = f"probe_{patch}_{number}"
                shutil.rmtree(self.work / name, ignore_errors=True)
                times.append(self.train(name, self.network(patch) | {"max_steps": number}))
            a_step = (times[1] - times[0]) / (PROBES[1] - PROBES[0])
            self.keep(key, {"steps": max(1, round(self.seconds / a_step))})
        return self.results[key]["steps"]

    def network(self, patch: int) -> dict[str, Any]:
        """The keys of the config that make the network."""
        parts = NETWORK | {"patch_size": patch}
        return {f"model_params.{key}": value for key, value in parts.items()}

    def measure(self, objective: str, patch: int, seed: int) -> Result:
        """Train and score one run, unless it is done."""
        key = f"{objective}, patch {patch}, seed {seed}"
        if key not in self.results:
            number = list(OBJECTIVES).index(objective)
            name, steps = f"run_{number}_{patch}_{seed}", self.steps(patch)
            folder = self.work / name
            shutil.rmtree(folder, ignore_errors=True)
            settings = OBJECTIVES[objective] | self.network(patch)
            seconds = self.train(name, settings | {"max_steps": steps, "seed": seed})
            (folder / "eval").mkdir(exist_ok=True)
            for judge in self.work.glob("classifier_*.pth"):
                shutil.copy(judge, folder / "eval")
            sampling = ["--cfg_scale", 1, "--sampling_method", "ddim", "--num_inference_steps", 25]
            scored = ["--num_samples", self.samples, "--metrics", METRICS, "--device", "cpu"]
            run("evaluate.py", "--checkpoint", folder, *sampling, *scored)
            for judge in (folder / "eval").glob("classifier_*.pth"):
                shutil.copy(judge, self.work)
            report = json.loads((folder / "eval" / "report.json").read_text(encoding="utf-8"))
            self.keep(key, {"seconds": seconds, "steps": steps, "metrics": report["metrics"]})
        return self.results[key]

    def keep(self, key: str, result: Result) -> None:
        """Add a result to the file."""
        self.results[key] = result
        self._file.write_text(json.dumps(self.results, indent=1), encoding="utf-8")
        print(f"{key}: {result.get('steps')} steps", flush=True)


def row(objective: str, results: Iterable[Result]) -> list[str]:
    """The cells of a row: means over seeds, with the range of the distance."""
    metrics = [result["metrics"] for result in results]
    distances = [m["fd_domain"]["value"] for m in metrics]
    spread = f" ({min(distances):.2f} to {max(distances):.2f})" if len(distances) > 1 else ""
    shares = [mean(m["class_acc"]["value"] for m in metrics)]
    shares += [mean(m["prdc_domain"][part] for m in metrics) for part in ("precision", "recall")]
    return [objective, f"{mean(distances):.2f}{spread}", *(f"{share:.3f}" for share in shares)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for runs and results.json")
    parser.add_argument("--seconds", type=float, default=100.0, help="of CPU time for each run")
    parser.add_argument("--samples", type=int, default=1000, help="images that are scored")
    args, overrides = parser.parse_known_args()
    arena = Arena(args.work, overrides, args.seconds, args.samples)
    for patch in PATCHES:
        first = {name: arena.measure(name, patch, SEEDS[0]) for name in OBJECTIVES}
        ranked = sorted(first, key=lambda name: first[name]["metrics"]["fd_domain"]["value"])
        seeds = {name: SEEDS if name in ranked[:NUM_BEST] else SEEDS[:1] for name in OBJECTIVES}
        print(f"\npatches of {patch}: {arena.steps(patch)} steps of {BASE['batch_size']} images")
        print("| objective | `fd_domain` | class accuracy | precision | recall |")
        print("| --- " * 5 + "|")
        for name, chosen in seeds.items():
            results = [arena.measure(name, patch, seed) for seed in chosen]
            print("| " + " | ".join(row(name, results)) + " |", flush=True)


if __name__ == "__main__":
    main()
