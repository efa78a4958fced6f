"""The page of `python runs.py report`: what runs have done."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from reporting import run_files
from reporting.charts import Chart, Legend, draw_chart, legend_of
from reporting.pages import NOTHING, Picture, Table, render_page, to_text
from utils.config import Config
from utils.errors import one_line

MAX_BYTES = 10_000_000  # the largest page
MAX_PICTURES, MAX_PER_RUN, MIN_PER_RUN = 24, 8, 2  # on a page; of each run
MAX_PIXELS = 64_000_000  # of a preview; a small file can claim to hold many more
MAX_SIDE = 640  # pixels; larger grids are reduced by a whole factor
LOSSES, SPEED, MEMORY = ["train/loss", "val/loss"], "train/images_per_sec", "train/memory_mib"
TRAINING = ["train/loss_smoothed", "train/lr", "train/grad_norm", SPEED, MEMORY]
MEASURED = (("images/s", SPEED, np.median, ""), ("memory", MEMORY, np.max, " MiB"))
LOGARITHMIC = (*LOSSES, "train/grad_norm")  # and what begins so

ChartGroup = tuple[list[Chart | None], Legend]  # without a legend where there is one line


class RunRecord(NamedTuple):
    """All that the page shows of a run."""

    facts: run_files.RunFacts
    config: Mapping[str, Any]  # as config.json has it; empty if there is none
    series: run_files.Series
    num_torn: int  # lines of metrics.jsonl that could not be read
    every: int  # n, where only every n-th was
    pictures: Mapping[str, Picture]
    unreadable: Sequence[str]  # pictures that could not be read, and why


def render_report(folders: Sequence[Path]) -> str:
    """The page for the runs in `folders`: facts, curves, pictures, differing settings."""
    per_run = min(MAX_PER_RUN, max(MIN_PER_RUN, MAX_PICTURES // len(folders)))
    runs = [read_run(at, name, per_run) for name, at in run_files.by_name(folders).items()]
    names = [run.facts.name for run in runs]
    configs = {run.facts.name: run.config for run in runs if run.config}
    defaults = {"default": Config().to_dict()} if len(runs) == 1 else {}
    context = {
        "title": f"Training of {', '.join(names) if len(names) <= 3 else f'{len(names)} runs'}",
        "runs": runs,
        "facts": facts_table(runs),
        "groups": chart_groups({run.facts.name: run.series for run in runs}),
        "settings": differing_settings(defaults | configs),
    }
    pictures = {key: picture for run in runs for key, picture in run.pictures.items()}
    return render_page("runs.html", context, pictures, max_bytes=MAX_BYTES)


def read_run(folder: Path, name: str, num_pictures: int) -> RunRecord:
    """Read the folder of a run: of its previews at most `num_pictures`, from first to last."""
    config, unreadable = run_files.read_json(folder / run_files.CONFIG), []
    series, num_torn, every = run_files.read_series(folder / run_files.METRICS)
    drawn, pictures = run_files.previews(folder, config), {}
    chosen = np.linspace(0, len(drawn) - 1, min(num_pictures, len(drawn))).round().astype(int)
    for epoch, path in (drawn[place] for place in chosen):
        try:
            pictures[f"{name}/{epoch}"] = read_picture(path, f"epoch {epoch}")
        except Exception as error:  # what Pillow raises for torn files are many kinds
            unreadable.append(f"{path.name} cannot be read ({one_line(error)})")
    facts = run_files.facts_of(folder, name)
    return RunRecord(facts, config, series, num_torn, every, pictures, unreadable)


def read_picture(path: Path, title: str) -> Picture:
    """Read a preview, reduced by a whole factor to at most `MAX_SIDE` pixels a side."""
    with Image.open(path) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height}: too large")
        image = image.convert("L" if image.mode == "L" else "RGB")
    factor = math.ceil(max(image.size) / MAX_SIDE)
    caption = f"at 1/{factor} of its size" if factor > 1 else ""
    return Picture(np.asarray(image.reduce(factor)), title, caption)


def facts_table(runs: Sequence[RunRecord]) -> Table:
    """A row for each run: what `python runs.py` lists, its median speed, its peak of memory."""
    rows = [run_files.texts_of(run.facts) for run in runs]
    for texts, run in zip(rows, runs, strict=True):
        for label, key, summary, unit in MEASURED:
            values = [y for _, y in run.series.get(key, ()) if math.isfinite(y)]
            texts[label] = f"{summary(values):.0f}{unit}" if values else ""
    return list(rows[0]), [list(texts.values()) for texts in rows]


def chart_groups(runs: Mapping[str, run_files.Series]) -> dict[str, ChartGroup]:
    """By heading, a chart for every name in the runs' metrics.jsonl, all runs in one.

    The losses of a single run share a chart, and the four quartiles of each.
    """
    keys = dict.fromkeys(key for series in runs.values() for key in series)
    losses = [loss for loss in LOSSES if loss in keys]
    quartiles = {f"{loss}_q1 to q4": [f"{loss}_q{k}" for k in (1, 2, 3, 4)] for loss in losses}
    shared = {"Loss": {" and ".join(losses): losses}, "Loss by timestep": quartiles}
    of_timesteps = [key for lines in quartiles.values() for key in lines]
    rest = [key for key in keys if key not in {"epoch", *losses, *of_timesteps, *TRAINING}]
    headings = {
        "Loss": losses,
        "Loss by timestep": of_timesteps,
        "Training": TRAINING,
        "Evaluation": [key for key in rest if key.startswith("eval/")],
        "Further values": [key for key in rest if not key.startswith("eval/")],
    }
    groups, wide = {}, {*losses, *shared["Loss"], *quartiles}
    for heading, chosen in headings.items():
        charts = {key: {name: runs[name].get(key, ()) for name in runs} for key in chosen}
        if len(runs) == 1 and heading in shared:
            (series,) = runs.values()
            charts = {
                title: {key.rpartition("loss_")[2]: series.get(key, ()) for key in lines}
                for title, lines in shared[heading].items()
            }
        names = next(iter(charts.values()), ())
        legend = legend_of(names) if len(names) > 1 else {}
        drawn = [
            draw_chart(title, "step", lines, log=title.startswith(LOGARITHMIC), wide=title in wide)
            for title, lines in charts.items()
        ]
        if any(drawn):
            groups[heading] = drawn, legend
    return groups


def differing_settings(configs: Mapping[str, Mapping[str, Any]]) -> Table:
    """The keys whose values are not the same in all configs; those of `model_params` one by one."""
    flat = {}
    for name, config in configs.items():
        flat[name] = {key: value for key, value in config.items() if key != "model_params"}
        if isinstance(params := config.get("model_params"), dict):
            flat[name] |= {f"model_params.{key}": value for key, value in params.items()}
    rows = []
    for key in dict.fromkeys(key for config in flat.values() for key in config):
        texts = [to_text(config[key]) if key in config else NOTHING for config in flat.values()]
        if len(set(texts)) > 1 and key != "experiment_name":  # which is in the column's head
            rows.append([key, *texts])
    return ["key", *flat], rows
