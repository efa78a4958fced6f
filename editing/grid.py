"""Guidance against steps on one sheet."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from editing.command import Job, part, spread_both, wrote
from generation.run import check_labels
from generation.sampling import sample_steps
from generation.sweep import settings_of
from utils.captions import contact_sheet
from utils.errors import ConfigError
from utils.images import MAX_GRID_IMAGES, make_grid, save_image


def grid(job: Job) -> Iterator[str]:
    """The same images with every guidance scale, a row each, and number of steps, a column each."""
    args, run, device = job.args, job.run, job.runtime.device
    scales, counts = args.cfg_scale or [None], args.num_inference_steps or [None]
    options = dict(method=args.sampling_method, eta=args.ddim_eta)
    settings = settings_of(run.config, 1, cfg_scales=scales, step_counts=counts, **options)
    samplings = [setting.sampling for setting in settings]
    if args.labels:
        check_labels(args.labels, run)
    every = list(run.classes) if run.config.conditional else [None]
    seeds, labels = spread_both(args.seeds or [job.first_seed], args.labels or every)
    count, last = len(seeds), samplings[-1]
    if count * len(samplings) > MAX_GRID_IMAGES:
        raise ConfigError(
            f"{len(samplings)} cells of {count} images: a sheet shows at most {MAX_GRID_IMAGES} "
            "images; give fewer --labels or --seeds"
        )
    yield f"{len(samplings)} settings of {count} images, up to {last.describe()}"

    cells, asked = [], labels if run.config.conditional else None
    for s in samplings:
        images = job.draw(
            count, lambda rows, s=s: sample_steps(run, seeds[rows], part(asked, rows), s, device)
        )
        if images is not None:
            cells.append(images[0] if count == 1 else make_grid(images, [list(range(count))]))
    if not cells:
        return
    rows = [list(range(i, i + len(counts))) for i in range(0, len(cells), len(counts))]
    above = [[f"{s.num_inference_steps} steps" for s in samplings[: len(counts)]]]
    left = [f"cfg {s.cfg_scale:g}" for s in samplings[:: len(counts)]]
    above += [[]] * (len(rows) - 1)
    save_image(job.path(".png"), contact_sheet(torch.stack(cells), rows, above=above, left=left))
    best = f"--num_inference_steps {last.num_inference_steps} --cfg_scale {last.cfg_scale:g}"
    command = f"python sample.py --checkpoint {args.checkpoint} {best}, with the best of them"
    yield wrote([job.path(".png")], command)
