"""Configs with a mistake in them: all refused, by name, before anything is written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path

from generation.run import CONFIG_CHECKS
from tests.faults.harness import ROOT, Fault, Figure, Lab, count_bad, environment
from training.sharding import check_processes
from utils.config import load_config
from utils.errors import EXIT_USAGE, ConfigError

COUNTS = ("batch_size", "epochs", "num_timesteps", "save_interval", "keep_last", "log_interval")
RATES = ("learning_rate", "grad_clip", "beta_start", "min_snr_gamma")
SHARES = ("ema_decay", "cfg_dropout_prob", "ddim_eta", "gamma")
FLAGS = ("use_ema", "conditional", "use_scheduler", "use_swanlab", "horizontal_flip")
CHOICES = {
    "prediction_type": "epsilon",
    "loss_type": "mse",
    "beta_schedule": "sigmoidal",
    "process": "vp",
    "loss_space": "score",
    "timestep_sampling": "normal",
    "optimizer": "sgd",
    "precision": "fp64",
    "sampling_method": "euler",
    "scheduler_type": "exponential",
    "model_type": "unett",
    "dataset": "digitz",
    "timestep_spacing": "middle",
    "swanlab_mode": "online!",
    "loss_weighting": "snr",
    "threshold": "clip",
    "compile": "fast",
    "eval_metrics": "fidd",
}
TYPOS = (
    *("lerning_rate", "batchsize", "epoch", "model_param", "use_emma", "lr", "num_worker"),
    *("resume", "cfg-scale", "Seed", "beta_end ", ""),
)
MODEL_PARAMS = {
    "model_chanels": "8",
    "model_channels": "-8",
    "channel_mult": "'wide'",
    "dropout": "1.5",
    "num_res_blocks": "None",
    "attention_resolutions": "'all'",
}
# a value per key; together they cannot work, and the message names one of the keys
COMBINATIONS: tuple[dict[str, str], ...] = (
    {"beta_start": "0.02", "beta_end": "0.01"},
    {"num_inference_steps": "500", "num_timesteps": "100"},
    {"dataset": "'celeba'", "conditional": "True"},
    {"dataset": "'digits'", "classes": "(3, 10)"},
    {"cfg_dropout_prob": "0", "cfg_scale": "2.0"},
    {"cfg_interval": "(0.8, 0.2)"},
    {"batch_size": "20", "gradient_accumulation_steps": "3"},
    {"use_subdirs": "False"},
    {"init_from": "'a.pth'", "resume_path": "'b.pth'"},
    {"dataset": "'digits'", "num_classes": "11"},
    {"experiment_name": "'../elsewhere'"},
    {"label_file": "'labels.json'"},
)
# numbers that no machine has room for
HUGE = {
    "num_timesteps": "10**12",
    "batch_size": "10**15",
    "image_size": "10**7",
    "num_samples": "10**15",
    "max_nonfinite_steps": "10**9",
    "port": "10**6",
    "learning_rate": "10**400",
    "beta_end": "1e300",
    "epochs": "10**400",
    "gradient_accumulation_steps": "10**9",
}
ON_COMMAND_LINE = ("batch_size=-1", "lerning_rate=1", "precision=fp64", "epochs=nan", "seed=")


def mutations() -> Iterator[tuple[str, dict[str, str]]]:
    """(kind, {key: Python expression}), the whole lot."""
    yield from (("unknown key", {key: "1"}) for key in TYPOS)
    yield from (("wrong choice", {key: repr(value)}) for key, value in CHOICES.items())
    yield from (("wrong combination", values) for values in COMBINATIONS)
    yield from (("huge", {key: value}) for key, value in HUGE.items())
    for key, value in MODEL_PARAMS.items():
        yield "model_params", {"model_params": f"{{{key!r}: {value}}}"}
    for key in (*COUNTS, *RATES, *SHARES):
        yield "negative", {key: "-1"}
        yield "NaN", {key: "float('nan')"}
    for key in (*COUNTS[:3], *RATES[:2], *SHARES[:2], *FLAGS):
        yield "wrong type", {key: "[1, 2]"}
    for key in (*COUNTS[:3], *RATES[:1], "dataset", "resume_path", "data_root", "optimizer"):
        yield "empty", {key: "''"}
    for key in FLAGS:
        yield "wrong type", {key: "'yes'"}


def mutated_configs(lab: Lab, trials: int) -> Figure:
    """Through the function that train.py calls; a handful through the command itself."""
    everything = list(mutations())
    chosen = everything if trials >= len(everything) else lab.random.sample(everything, trials)
    trial_list = [partial(refuse, lab, kind, values) for kind, values in chosen]
    commands = [partial(refuse_command, lab, override) for override in ON_COMMAND_LINE]
    trial_list += commands if trials >= 100 else commands[:1]
    bad, detail = count_bad(trial_list)
    return Figure("mutated configs", len(trial_list), bad, "accepted", detail)


def refuse(lab: Lab, kind: str, values: dict[str, str]) -> None:
    label = f"{kind}: {', '.join(f'{k}={v}' for k, v in values.items())}"
    path = lab.folder / "mutated.py"
    body = ", ".join(f"{key!r}: {value}" for key, value in values.items())
    text = lab.config.read_text(encoding="utf-8") + f"\nconfig.update({{{body}}})\n"
    path.write_text(text, encoding="utf-8")
    before = everything_in(lab)
    try:
        load_config(path, checks=(*CONFIG_CHECKS, check_processes))
    except ConfigError as error:
        words = chain(values, values.get("model_params", "").split("'")[1:2])
        if not any(word in str(error) for word in words):
            raise Fault(f"{label}: the message does not name the key: {error}") from error
        if everything_in(lab) != before:
            raise Fault(f"{label}: something was written") from error
        return
    except Exception as error:
        raise Fault(f"{label}: {type(error).__name__} instead of ConfigError") from error
    raise Fault(f"{label}: accepted")


def refuse_command(lab: Lab, override: str) -> None:
    """Code 2 and a line, no traceback, no folder."""
    before = everything_in(lab)
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--config", str(lab.config), override],
        cwd=lab.folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != EXIT_USAGE or not done.stderr.startswith("error: "):
        raise Fault(f"{override}: exit code {done.returncode}, {done.stderr[-200:]}")
    if everything_in(lab) != before:
        raise Fault(f"{override}: something was written")


def everything_in(lab: Lab) -> set[Path]:
    return set(lab.folder.rglob("*"))
