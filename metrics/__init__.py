"""What generated images can be scored by.

`METRICS` is the one list of names; everything about a metric stands in its class (see
`metrics.base`). Networks and large packages are loaded by the metrics that run, so checking a name
or printing the list costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from metrics.base import Metric
from metrics.class_accuracy import ClassAccuracy, FdDomain, PrdcDomain
from metrics.features import DINOV2, EFFNET
from metrics.fid import Fid, InceptionScore, Kid
from metrics.likelihood import Nll
from metrics.lpips_score import Lpips
from metrics.memorization import Memorization
from metrics.paired import LpipsPaired, Psnr, Ssim
from metrics.prdc import Prdc
from metrics.sanity import Sanity
from metrics.weights import Network
from training.saving import VAL_LOSS
from utils.config import Config, Parts, Problem, did_you_mean, kind_of
from utils.errors import ConfigError

_METRICS = {  # in the order of the report
    "fid": Fid,
    "sfid": type("Sfid", (Fid,), {"keeps": "sfid"}),
    "kid": Kid,
    "is": InceptionScore,
    "prdc": Prdc,
    "fd_dinov2": type("FdDinov2", (Fid,), {"network": DINOV2, "keeps": "fd_dinov2"}),
    "kid_dinov2": type("KidDinov2", (Kid,), {"network": DINOV2}),
    "prdc_dinov2": type("PrdcDinov2", (Prdc,), {"network": DINOV2}),
    "fd_effnet": type("FdEffnet", (Fid,), {"network": EFFNET, "keeps": "fd_effnet"}),
    "kid_effnet": type("KidEffnet", (Kid,), {"network": EFFNET}),
    "lpips": Lpips,
    "psnr": Psnr,
    "ssim": Ssim,
    "lpips_paired": LpipsPaired,
    "class_acc": ClassAccuracy,
    "fd_domain": FdDomain,
    "prdc_domain": PrdcDomain,
    "nll": Nll,
    "memorization": Memorization,
    "sanity": Sanity,
}
METRICS = Parts(_METRICS, kind_of(Metric, "a metric", is_class=True))
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
