"""What generated images can be scored by.

`METRICS` is the one list of names; everything about a metric stands in its class (see
`metrics.base`). Networks and large packages are loaded by the metrics that run, so checking a name
or printing the list costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from metrics.weights import Network
from training.saving import VAL_LOSS
from utils.config import Config, Parts, Problem, did_you_mean, kind_of
from utils.errors import ConfigError


def _accept(part: Any) -> Any:
    from metrics.base import Metric

    return kind_of(Metric, "a metric", is_class=True)(part)


METRICS = Parts(
    {  # in the order of the report
        "fid": "metrics.fid:Fid",
        "sfid": "metrics.fid:Sfid",
        "kid": "metrics.fid:Kid",
        "is": "metrics.fid:InceptionScore",
        "prdc": "metrics.prdc:Prdc",
        "fd_dinov2": "metrics.fid:FdDinov2",
        "kid_dinov2": "metrics.fid:KidDinov2",
        "prdc_dinov2": "metrics.prdc:PrdcDinov2",
        "fd_effnet": "metrics.fid:FdEffnet",
        "kid_effnet": "metrics.fid:KidEffnet",
        "lpips": "metrics.lpips_score:Lpips",
        "psnr": "metrics.paired:Psnr",
        "ssim": "metrics.paired:Ssim",
        "lpips_paired": "metrics.paired:LpipsPaired",
        "class_acc": "metrics.class_accuracy:ClassAccuracy",
        "fd_domain": "metrics.class_accuracy:FdDomain",
        "prdc_domain": "metrics.class_accuracy:PrdcDomain",
        "nll": "metrics.likelihood:Nll",
        "memorization": "metrics.memorization:Memorization",
        "sanity": "metrics.sanity:Sanity",
    },
    _accept,
)
ALL = "all"
HINTS = {  # what else metrics are called -> the name here
    **dict.fromkeys(("precision", "recall", "density", "coverage"), "prdc"),
    **dict.fromkeys(("inception_score", "isc"), "is"),
    "accuracy": "class_acc",
    "duplicates": "sanity",
    **dict.fromkeys(("likelihood", "bpd", "bits_per_dim"), "nll"),
}


def networks_of(names: Iterable[str]) -> list[Network]:
    """The pretrained networks that these metrics need, in the order of the table."""
    needed = dict.fromkeys(METRICS[name].network for name in METRICS.ordered(names))
    return [network for network in needed if network is not None]


def check_metric_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names without repeats, in the given order; `ALL` alone stands for all of them.

    Raises a ConfigError for a name that is not in `METRICS`, or none at all.
    """
    names = tuple(dict.fromkeys(name.strip() for name in names))
    if names == (ALL,):
        return tuple(METRICS)
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        lines = [f"{n!r} is not a metric{did_you_mean(n.lower(), METRICS, HINTS)}" for n in unknown]
        raise ConfigError("\n       ".join([*lines, f"metrics are {', '.join(METRICS)}, or {ALL}"]))
    if not names:
        raise ConfigError(f"no metric was named; metrics are {', '.join(METRICS)}")
    return names


def check_config(config: Config) -> Iterator[Problem]:
    """Check `eval_metrics` and `eval_best_metric` against the table and each other."""
    try:
        names = check_metric_names(config.eval_metrics)
        usable = [*(n for n in names if METRICS[n].better in ("lower", "higher")), VAL_LOSS]
    except ConfigError as error:
        yield Problem(("eval_metrics",), f"eval_metrics: {' '.join(str(error).split())}")
        return
    if (best := config.eval_best_metric) is None:
        return
    interval = "val_interval" if best == VAL_LOSS else "eval_interval"
    if getattr(config, interval) == 0:
        text = f"eval_best_metric={best!r} needs its value during training"
        where = ("eval_best_metric", interval)
        yield Problem(where, f"{text}; set {interval} to a number of epochs")
    if best not in usable:
        text = "must be one of the eval_metrics that are better when lower or higher, or val_loss"
        choice = f"{', '.join(usable)}{did_you_mean(best, usable)}"
        where = ("eval_best_metric", "eval_metrics")
        yield Problem(where, f"eval_best_metric={best!r}: {text}: {choice}")
