"""What generated images can be scored by. Imports only `utils`; images arrive as tensors.

`METRICS` is the one list of names. The networks are loaded by the scorers that need them, so
checking a name or printing the list costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from utils.config import Config, Problem, did_you_mean
from utils.errors import ConfigError


class Metric(NamedTuple):
    """Which way is better, and what has to be there before it can run."""

    better: str | None  # "lower", "higher", or None: near the value of real images
    network: str | None = None  # pretrained weights: "inception" or "lpips"
    real_images: bool = False  # the train split of the data set
    classes: bool = False  # real images with class labels
    labels: bool = False  # a class-conditional model


METRICS: dict[str, Metric] = {
    "fid": Metric("lower", network="inception", real_images=True),
    "kid": Metric("lower", network="inception", real_images=True),
    "is": Metric("higher", network="inception"),
    "prdc": Metric("higher", network="inception", real_images=True),
    "lpips": Metric(None, network="lpips"),  # real images add a baseline, but are not needed
    "class_acc": Metric("higher", real_images=True, classes=True, labels=True),
    "fd_domain": Metric("lower", real_images=True, classes=True),
    "prdc_domain": Metric("higher", real_images=True, classes=True),
    "memorization": Metric("lower", real_images=True),
    "sanity": Metric("higher"),
}
ALL = "all"


def check_metric_names(names: Iterable[str]) -> tuple[str, ...]:
    """The names without repeats, in the given order.

    Raises:
        ConfigError: a name that is not in `METRICS`, or none at all.
    """
    names = tuple(dict.fromkeys(name.strip() for name in names))
    if names == (ALL,):
        return tuple(METRICS)
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        hints = {
            "accuracy": "class_acc",
            "inception_score": "is",
            "isc": "is",
            "precision": "prdc",
            "recall": "prdc",
            "density": "prdc",
            "coverage": "prdc",
            "duplicates": "sanity",
        }
        lines = [f"{n!r} is not a metric{did_you_mean(n.lower(), METRICS, hints)}" for n in unknown]
        raise ConfigError("\n       ".join([*lines, f"metrics are {', '.join(METRICS)}, or {ALL}"]))
    if not names:
        raise ConfigError(f"no metric was named; metrics are {', '.join(METRICS)}")
    return names


def check_config(config: Config) -> Iterator[Problem]:
    """`eval_metrics` and `eval_best_metric` against the table and each other."""
    try:
        names = check_metric_names(config.eval_metrics)
    except ConfigError as error:
        yield Problem(("eval_metrics",), f"eval_metrics: {' '.join(str(error).split())}")
        return
    best = config.eval_best_metric
    if best is None:
        return
    if config.eval_interval == 0:
        yield Problem(
            ("eval_best_metric", "eval_interval"),
            f"eval_best_metric={best!r} needs evaluations during training; set eval_interval to "
            "a number of epochs",
        )
    usable = [name for name in names if METRICS[name].better is not None]
    if best not in usable:
        hint = did_you_mean(best, usable)
        yield Problem(
            ("eval_best_metric", "eval_metrics"),
            f"eval_best_metric={best!r}: must be one of the eval_metrics that are better when "
            f"lower or higher: {', '.join(usable) or 'there is none'}{hint}",
        )
