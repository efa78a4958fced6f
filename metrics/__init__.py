"""What generated images can be scored by.

`METRICS` is the one list of names; everything about a metric stands in its class (see
`metrics.base`). Networks and large packages are loaded by the metrics that run, so checking a name
or printing the list costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from metrics.base import Metric
from metrics.class_accuracy import ClassAccuracy
from metrics.domain import FdDomain, PrdcDomain
from metrics.fid import Fid
from metrics.fidelity import InceptionScore, Kid
from metrics.lpips_score import Lpips
from metrics.memorization import Memorization
from metrics.prdc import Prdc
from metrics.sanity import Sanity
from metrics.weights import Network
from utils.config import Config, Problem, did_you_mean
from utils.errors import ConfigError

METRICS: dict[str, type[Metric]] = {  # in the order of the report
    "fid": Fid,
    "kid": Kid,
    "is": InceptionScore,
    "prdc": Prdc,
    "lpips": Lpips,
    "class_acc": ClassAccuracy,
    "fd_domain": FdDomain,
    "prdc_domain": PrdcDomain,
    "memorization": Memorization,
    "sanity": Sanity,
}
ALL = "all"
HINTS = {  # what else metrics are called -> the name here
    "accuracy": "class_acc",
    "inception_score": "is",
    "isc": "is",
    "precision": "prdc",
    "recall": "prdc",
    "density": "prdc",
    "coverage": "prdc",
    "duplicates": "sanity",
}


def networks_of(names: Iterable[str]) -> list[Network]:
    """The pretrained networks that these metrics need, in the order of the table."""
    needed = {METRICS[name].network for name in names}
    return [n for n in dict.fromkeys(m.network for m in METRICS.values()) if n and n in needed]


def check_metric_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names without repeats, in the given order; `ALL` alone stands for all of them.

    Raises:
        ConfigError: a name that is not in `METRICS`, or none at all.
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
    usable = [name for name in names if METRICS[name].better in ("lower", "higher")]
    if best not in usable:
        hint = did_you_mean(best, usable)
        yield Problem(
            ("eval_best_metric", "eval_metrics"),
            f"eval_best_metric={best!r}: must be one of the eval_metrics that are better when "
            f"lower or higher: {', '.join(usable) or 'there is none'}{hint}",
        )
