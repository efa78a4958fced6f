"""Take a trained model elsewhere: one `.safetensors` file, or a folder that diffusers loads.

python export.py --checkpoint checkpoints/digits_unet --format safetensors --output a.safetensors
python export.py --checkpoint checkpoints/cifar10_unet --format diffusers --output cifar10
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exporting.diffusers_ddim import ddim_scheduler_config
from exporting.diffusers_unet import to_unet2d, unet2d_config
from generation.run import load_run_of
from generation.sampling import Run, Sampling, sampling_from
from utils.cli import add_checkpoint_options, new_parser, parse_args
from utils.config import format_config
from utils.distributed import choose_device
from utils.errors import EXIT_OK, ConfigError, UserError, exit_code_of, require
from utils.logs import setup_logging
from utils.weights_file import SUFFIX, save_weights

MAX_DIFFERENCE = 1e-4  # of the networks' outputs, over the largest of ours; rounding gives 1e-6

CARD = """\
---
library_name: diffusers
---

# {name}

A UNet for images of {height}x{width} pixels and {channels} channel(s), exported as a `DDIMPipeline`
after {step} training steps ({weights} weights). It needs `pip install torch diffusers safetensors`.
In the folder that holds this one:

```python
import torch
from diffusers import DDIMPipeline

pipe = DDIMPipeline.from_pretrained({folder})
{code}```

The scheduler has the betas of the training. `use_clipped_model_output=True` belongs to it: the
noise of a step then follows from the image after clipping.{steps_note}
"""

UNCONDITIONAL = """\
generator = torch.Generator().manual_seed(0)
images = pipe(
    batch_size=16,
    generator=generator,
    eta={eta},
    num_inference_steps={num_inference_steps},
    use_clipped_model_output=True,
).images
"""

CONDITIONAL = """\
labels = torch.arange({num_classes})  # a class for each image
x = torch.randn(len(labels), {channels}, {height}, {width})
rows = torch.cat([labels + 1, torch.zeros_like(labels)])  # the class, and none
pipe.scheduler.set_timesteps({num_inference_steps})
for t in pipe.scheduler.timesteps:
    with torch.no_grad():
        out = pipe.unet(torch.cat([x, x]), t, rows).sample
    out_class, out_none = out.chunk(2)
    scale = {scale}
    out = out_none + scale * (out_class - out_none)
    x = pipe.scheduler.step(out, t, x, eta={eta}, use_clipped_model_output=True).prev_sample
images = pipe.numpy_to_pil((x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())
"""

LABELS_NOTE = """
Classes are 0 to {last}; `class_labels` of the network are these plus one, and 0 means "no class"
(`num_class_embeds` is {rows}). `scale` is the guidance: 0 ignores the class, 1 follows it, more
exaggerates it.{no_null} `pipe()` itself knows no classes and stops with an error.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__ or "")
    add_checkpoint_options(parser)
    add = parser.add_argument
    add("--format", required=True, choices=("safetensors", "diffusers"), help="what to write")
    add("--output", required=True, help="the file or folder to write; it must not exist")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(make_parser(), sys.argv[1:] if argv is None else argv)
    setup_logging(is_main=not args.print_config)
    output = Path(args.output)
    check_output(output, args.format)
    run = load_run_of(args, choose_device(args.device))
    run.model.cpu()
    if args.print_config:
        print(format_config(run.config))
        return EXIT_OK
    print(run.describe())
    if args.format == "safetensors":
        require("safetensors")
        write = partial(write_file, run)
    else:
        sampling = sampling_from(run.config, "ddim")
        pipeline = to_pipeline(run, sampling)
        write = partial(write_folder, pipeline, model_card(run, sampling, output.name))
    if args.dry_run:
        return EXIT_OK
    try:
        write(output)
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror or error}") from error
    print(f"wrote {output}")
    return EXIT_OK


def check_output(output: Path, file_format: str) -> None:
    """Raises ConfigError unless `output` is free and of the format's kind."""
    if file_format == "safetensors" and output.suffix != SUFFIX:
        raise ConfigError(f"--output {output}: --format safetensors writes a file named *{SUFFIX}")
    if output.exists():
        raise ConfigError(f"--output {output}: exists already; remove it, or give another name")
    if not output.parent.is_dir():
        raise ConfigError(f"--output {output}: {output.parent} is not a folder")


def to_pipeline(run: Run, sampling: Sampling) -> Any:
    """The run as a DDIMPipeline.

    Raises:
        ConfigError: diffusers has no counterpart to the network or to the sampling.
        UserError: diffusers is not installed, or its network computes something else.
    """
    arguments = unet2d_config(run.model, run.config, run.spec)
    scheduler = ddim_scheduler_config(run.diffusion, sampling)
    require("diffusers", "safetensors")
    import diffusers

    unet = to_unet2d(run.model, arguments)
    difference = relative_difference(run, unet)
    if not difference < MAX_DIFFERENCE:
        raise UserError(
            f"diffusers {diffusers.__version__} gives outputs that differ by {difference:.1e} of "
            "the largest value: its UNet2DModel is not the one this project knows"
        )
    print(f"network outputs differ by {difference:.1e} of the largest value")
    return diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler(**scheduler))


@torch.inference_mode()
def relative_difference(run: Run, unet: nn.Module) -> float:
    """Of the outputs for noise at timesteps from end to end, without and with a class."""
    num_classes = run.spec.num_classes if run.config.conditional else 0
    t = torch.linspace(0, run.diffusion.num_timesteps - 1, 4).long()
    x = torch.randn(len(t), *run.spec.shape, generator=torch.Generator().manual_seed(0))
    y = torch.arange(len(t)) % (num_classes + 1) - 1 if num_classes else None  # the first is null
    ours: Tensor = run.model(x, t, y)
    theirs: Tensor = unet(x, t, None if y is None else y + 1).sample
    return ((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-3)).item()


def model_card(run: Run, sampling: Sampling, folder: str) -> str:
    """The README.md of a diffusers folder."""
    spec, config = run.spec, run.config
    scale = repr(sampling.cfg_scale)
    if sampling.cfg_interval is not None:
        low, high = sampling.cfg_interval
        scale = f"{scale} if {low} <= t / {config.num_timesteps} <= {high} else 1.0"
    values = dict(
        channels=spec.channels,
        height=spec.height,
        width=spec.width,
        num_classes=spec.num_classes,
        num_inference_steps=sampling.num_inference_steps,
        eta=sampling.eta,
        scale=scale,
    )
    note = ""
    if sampling.spacing == "trailing":
        note = f" Take a number of steps that\ndivides {config.num_timesteps}."
    text = CARD.format(
        name=config.experiment_name,
        step=run.step,
        weights="EMA" if run.ema else "raw",
        folder=json.dumps(folder),
        code=(CONDITIONAL if sampling.conditional else UNCONDITIONAL).format(**values),
        steps_note=note,
        **values,
    )
    if sampling.conditional:
        untrained = " This model was trained without row 0: leave `scale` at 1."
        text += LABELS_NOTE.format(
            last=spec.num_classes - 1,
            rows=spec.num_classes + 1,
            no_null="" if config.label_dropout else untrained,
        )
    return text


def write_file(run: Run, output: Path) -> None:
    save_weights(
        output,
        run.model.state_dict(),
        config=run.config.to_dict() | {"lora_rank": 0},  # the adapters are in the weights
        spec=run.spec,
        step=run.step,
        epoch=run.epoch,
        ema=run.ema,
    )


def write_folder(pipeline: Any, card: str, output: Path) -> None:
    """The whole folder or none."""
    temporary = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    try:
        pipeline.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
