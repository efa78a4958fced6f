"""What runs have done, as one page that needs nothing but itself, see `reporting.html`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from reporting.html import Picture, figures, number, page, plain, safe, section, table
from reporting.plot import NUM_COLORS, curve_chart, legend
from reporting.run_files import (
    CONFIG,
    METRICS,
    RunFacts,
    Series,
    epoch_text,
    facts_of,
    names_of,
    previews,
    read_json,
    read_series,
    size_text,
    step_text,
    time_text,
)
from utils.config import Config

MAX_BYTES = 10_000_000  # of the page
MAX_PICTURES = 24  # of all runs together
MAX_PER_RUN, MIN_PER_RUN = 8, 2
MAX_SIDE = 640  # pixels; larger grids are reduced by a whole factor
LOSS = "train/loss"
QUARTILES = [f"train/loss_q{k}" for k in (1, 2, 3, 4)]
TRAINING = [
    "train/loss_smoothed",
    "train/lr",
    "train/grad_norm",
    "train/images_per_sec",
    "train/memory_mib",
]
LOGARITHMIC = {LOSS, *QUARTILES, "train/loss_smoothed", "train/grad_norm"}
NOT_DRAWN = {"epoch"}  # says what the step says
QUARTILES_NOTE = (
    "Mean loss of the examples whose timestep lies in the first (q1, the least noise) to the last "
    "quarter (q4) of T."
)


class RunRecord(NamedTuple):
    """All that the page shows of a run."""

    facts: RunFacts
    config: Mapping[str, Any]  # as config.json has it; empty if there is none
    series: Series
    pictures: Mapping[str, Picture]
    notes: Sequence[str]  # what is missing or could not be read


def render_report(folders: Sequence[Path]) -> str:
    """The page for the runs in `folders`: facts, curves, pictures, differing settings."""
    per_run = min(MAX_PER_RUN, max(MIN_PER_RUN, MAX_PICTURES // len(folders)))
    names = names_of(folders)
    runs = [read_run(*pair, per_run) for pair in zip(folders, names, strict=True)]
    title = f"Training of {', '.join(names) if len(names) <= 3 else f'{len(names)} runs'}"
    notes = "".join(f"<li>{safe(note)}</li>" for run in runs for note in run.notes)
    before = section("Runs", _facts(runs))
    before += section("Not shown", f"<ul>{notes}</ul>" if notes else "", "warnings") + _curves(runs)
    heading, settings = config_differences({run.facts.name: run.config for run in runs})
    after = section(heading, settings)
    room = MAX_BYTES - len(page(title, before + after, CSS)) - 200 * len(runs)  # their headings
    return page(title, before + section("Samples", _strips(runs, room)) + after, CSS)


def read_run(folder: Path, name: str, num_pictures: int) -> RunRecord:
    """Read a run's folder; at most `num_pictures` of its previews, evenly chosen."""
    config, notes = read_json(folder / CONFIG), []
    series, num_torn = read_series(folder / METRICS)
    if not config:
        notes.append(f"{name}: {CONFIG} is missing or torn")
    if not series:
        notes.append(f"{name}: {METRICS} is missing or has no numbers")
    if num_torn:
        notes.append(f"{name}: {num_torn} torn line(s) of {METRICS}")
    pictures = {}
    for epoch, path in evenly(previews(folder, config), num_pictures):
        try:
            pictures[f"{name}/{epoch}"] = _picture(path, f"epoch {epoch}")
        except (OSError, ValueError, SyntaxError) as error:  # what Pillow raises for torn files
            notes.append(f"{name}: {path.name} cannot be read ({error})")
    return RunRecord(facts_of(folder, name), config, series, pictures, notes)


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` > 1 of the items, evenly spread; the first and the last are among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def config_differences(configs: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """Heading and table of the keys that differ: between the runs, or of one from the defaults."""
    if len(configs) == 1:
        heading, columns = "Settings that differ from the defaults", {"default": Config().to_dict()}
    else:
        heading, columns = "Settings that differ", {}
    columns |= {name: config for name, config in configs.items() if config}
    flat = {name: _flat(config) for name, config in columns.items()}
    rows = []
    for key in dict.fromkeys(key for config in flat.values() for key in config):
        texts = [plain(config[key]) if key in config else None for config in flat.values()]
        if len(set(texts)) > 1 and key != "experiment_name":  # which is in the column's head
            cells = ["&ndash;" if text is None else safe(text) for text in texts]
            rows.append([f"<code>{safe(key)}</code>", *cells])
    return heading, table(["key", *flat], rows, "settings") if len(flat) > 1 else ""


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """`model_params` key by key."""
    params = config.get("model_params")
    inner = params if isinstance(params, dict) else {}
    rest = {key: value for key, value in config.items() if key != "model_params"}
    return rest | {f"model_params.{key}": value for key, value in inner.items()}


def _facts(runs: Sequence[RunRecord]) -> str:
    head = ["run", "status", "epoch", "step", "best", "last loss", "images/s", "memory", "size"]
    rows = []
    for i, run in enumerate(runs):
        facts = run.facts
        swatch = f'<i class="swatch c{i % NUM_COLORS}"></i>' if len(runs) > 1 else ""
        best = "" if facts.best is None else f"{number(facts.best)} {safe(facts.best_metric)}"
        speeds, memory = (
            [y for _, y in run.series.get(key, ()) if math.isfinite(y)]
            for key in ("train/images_per_sec", "train/memory_mib")
        )
        cells = [
            f"{swatch}{safe(facts.name)}",
            safe(facts.status),
            epoch_text(facts),
            step_text(facts),
            best,
            "" if facts.loss is None else number(facts.loss),
            f"{statistics.median(speeds):.0f}" if speeds else "",
            f"{max(memory):.0f} MiB" if memory else "",
            size_text(facts.size),
        ]
        rows.append([*cells, time_text(facts.changed)])
    return table([*head, "last change"], rows, "numbers")


def _curves(runs: Sequence[RunRecord]) -> str:
    """A chart for every name in the runs' metrics.jsonl, all runs in one."""
    names = [run.facts.name for run in runs]
    keys = dict.fromkeys(key for run in runs for key in run.series if key not in NOT_DRAWN)

    def chart(key: str, *, wide: bool = False) -> str:
        curves = {run.facts.name: run.series.get(key, ()) for run in runs}
        return curve_chart(key, "step", curves, log=key in LOGARITHMIC, wide=wide)

    def charts(heading: str, chosen: Sequence[str], note: str = "") -> str:
        if not (drawn := "".join(map(chart, chosen))):
            return ""
        said = f'<p class="dim">{note}</p>' if note else ""
        return section(heading, f'{said}{key_to_runs}<div class="charts">{drawn}</div>')

    key_to_runs = legend(names) if len(runs) > 1 else ""
    wide = chart(LOSS, wide=True)
    found = section("Loss", f'{key_to_runs}<div class="scroll">{wide}</div>' if wide else "")
    quartiles = [key for key in QUARTILES if key in keys]
    if len(runs) == 1 and quartiles:
        found += _quartiles_of(runs[0], quartiles)
    else:
        found += charts("Loss by timestep", quartiles, QUARTILES_NOTE)
    training = [key for key in TRAINING if key in keys]
    evaluation = [key for key in keys if key.startswith("eval/")]
    known = {LOSS, *quartiles, *training, *evaluation}
    found += charts("Training", training) + charts("Evaluation", evaluation)
    return found + charts("Further values", [key for key in keys if key not in known])


def _quartiles_of(run: RunRecord, keys: Sequence[str]) -> str:
    """One run's quartiles in one chart."""
    curves = {key.removeprefix("train/loss_"): run.series[key] for key in keys}
    drawn = curve_chart("train/loss_q1 to q4", "step", curves, log=True, wide=True)
    if not drawn:
        return ""
    note = f'<p class="dim">{QUARTILES_NOTE}</p>{legend(curves)}'
    return section("Loss by timestep", f'{note}<div class="scroll">{drawn}</div>')


def _strips(runs: Sequence[RunRecord], room: int) -> str:
    """A film strip for each run that has previews, in `room` bytes together."""
    every = {key: picture for run in runs for key, picture in run.pictures.items()}
    shown, strips = figures(every, room, MAX_BYTES), ""
    for run in runs:
        if run.pictures:
            heading = f"<h3>{safe(run.facts.name)}</h3>" if len(runs) > 1 else ""
            frames = "".join(shown[key] for key in run.pictures)
            strips += f'{heading}<div class="strip">{frames}</div>'
    return strips


def _picture(path: Path, title: str) -> Picture:
    with Image.open(path) as image:
        image = image.convert("L" if image.mode == "L" else "RGB")
    factor = math.ceil(max(image.size) / MAX_SIDE)
    caption = f"at 1/{factor} of its size" if factor > 1 else ""
    return Picture(np.asarray(image.reduce(factor)), title, caption)


CSS = """
.swatch{display:inline-block;width:.8rem;height:.8rem;margin-right:.5rem;border-radius:2px;
background:currentcolor;vertical-align:-.05rem}h3{font-size:1rem;margin:1rem 0 .3rem}
.strip{display:flex;gap:1rem;overflow-x:auto;padding-bottom:.6rem}.strip figure{flex:none;margin:0}
.strip img{display:block;width:auto;max-width:none;max-height:22rem;image-rendering:auto}
.settings td,.settings th{padding-right:2rem;overflow-wrap:anywhere}
.settings code{white-space:nowrap}
"""
