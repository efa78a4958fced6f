"""What benchmarks/learning.py trains from other packages: their networks, recipes and samplers.

Each is trained once. Its learning rate is constant, so the weights after fewer steps are those of a
shorter run. Weights and samples that are there already are not made again.
"""

from __future__ import annotations

import argparse
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils.distributed import keep_freed_memory
from utils.files import read_npz, write_npz
from utils.images import block_labels

PASSES = 25  # network passes for an image in the budget that all contestants share
GUIDED_STEPS = PASSES // 2  # of two passes each
OWN_STEPS = 250  # of denoising-diffusion-pytorch's README; of the 1,000 of the course a quarter
OWN_SHARE = 2  # such samples take longest: there are half as many
OWN, COMMON, GUIDED = "own", "common", "guided"
SEED = 42
SAMPLED_AT_A_TIME = 250


class Peer(ABC):
    """A network, how its package trains it, and how it draws images.

    Attributes:
        batch_size, parts: images of one forward pass, and such passes for one step.
        interval: of steps: the weights that images are drawn with change after the first step and
            again after so many more.
        kinds: of samples that it can draw; `OWN` is without guidance, too.
        drawn: the module that images are drawn with; its state is what training keeps.
    """

    batch_size: int
    parts = 1
    interval = 1
    kinds: tuple[str, ...] = (COMMON, OWN)
    drawn: nn.Module

    @abstractmethod
    def step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """One optimizer step on images (B, C, H, W) in [0, 1] with labels (B,)."""

    @abstractmethod
    def draw(self, labels: Tensor, kind: str) -> Tensor:
        """Images (B, C, H, W) in [0, 1] of these labels (B,)."""


class DiffusersCourse(Peer):
    """The class-conditional UNet of the diffusion course of Hugging Face, unit 2.

    An embedding of the class is 4 more channels of the input; eps is predicted, on the schedule
    squaredcos_cap_v2; Adam at 1e-3, no average of the weights. Drawn by DDPM's own sampler.
    """

    batch_size = 128

    def __init__(self, shape: tuple[int, int, int], num_classes: int) -> None:
        from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel

        channels, side = shape[:2]
        network = UNet2DModel(
            sample_size=side,
            in_channels=channels + 4,
            out_channels=channels,
            layers_per_block=2,
            block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )
        self.drawn = nn.ModuleDict({"network": network, "classes": nn.Embedding(num_classes, 4)})
        self.shape = shape
        self.scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")
        self.few_steps = DDIMScheduler.from_config(self.scheduler.config)
        self.optimizer = torch.optim.Adam(self.drawn.parameters(), lr=1e-3)

    def _eps(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        classes = self.drawn["classes"](labels)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        return self.drawn["network"](torch.cat([x, classes], 1), t).sample

    def step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        self.drawn.train()
        images, labels = next(batches)
        noise, t = torch.randn_like(images), torch.randint(0, 1000, (len(images),))
        x = self.scheduler.add_noise(2 * images - 1, noise, t)
        self.optimizer.zero_grad()
        F.mse_loss(self._eps(x, t, labels), noise).backward()
        self.optimizer.step()

    def draw(self, labels: Tensor, kind: str) -> Tensor:
        self.drawn.eval()
        scheduler = self.scheduler if kind == OWN else self.few_steps
        scheduler.set_timesteps(OWN_STEPS if kind == OWN else PASSES)
        x = torch.randn(len(labels), *self.shape)
        for t in scheduler.timesteps:
            x = scheduler.step(self._eps(x, t, labels), t, x).prev_sample
        return (x / 2 + 0.5).clamp(0, 1)


class DenoisingDiffusion(Peer):
    """classifier_free_guidance of denoising-diffusion-pytorch, trained as its Trainer trains.

    Adam with betas 0.9 and 0.99, gradients clipped at 1, an average with decay 0.995 every 10
    steps; width 32 with the levels 1, 2, 2, all else its defaults: eps, cosine, half of the labels
    dropped. Drawn by its DDIM with added noise, in few passes without, guided at its scale of 6.
    """

    batch_size, interval = 32, 10

    def __init__(
        self,
        shape: tuple[int, int, int],
        num_classes: int,
        *,
        rate: float,
        parts: int,
        kinds: tuple[str, ...],
    ) -> None:
        from denoising_diffusion_pytorch.classifier_free_guidance import GaussianDiffusion, Unet
        from ema_pytorch import EMA

        channels, side = shape[:2]
        network = Unet(32, num_classes, dim_mults=(1, 2, 2), channels=channels)
        self.model = GaussianDiffusion(network, image_size=side, timesteps=1000)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=rate, betas=(0.9, 0.99))
        self.average = EMA(self.model, beta=0.995, update_every=self.interval)
        self.drawn, self.parts, self.kinds = self.average.ema_model, parts, kinds

    def step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        self.model.train()
        for _ in range(self.parts):
            images, labels = next(batches)
            (self.model(images, classes=labels) / self.parts).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update()

    def draw(self, labels: Tensor, kind: str) -> Tensor:
        diffusion = self.drawn.eval()
        steps = {COMMON: PASSES, GUIDED: GUIDED_STEPS, OWN: OWN_STEPS}[kind]
        diffusion.sampling_timesteps, diffusion.is_ddim_sampling = steps, True
        diffusion.ddim_sampling_eta = 1.0 if kind == OWN else 0.0
        if kind == GUIDED:
            return diffusion.sample(labels)
        diffusion.model.forward_with_cond_scale = MethodType(conditional_alone, diffusion.model)
        try:
            return diffusion.sample(labels)
        finally:
            del diffusion.model.forward_with_cond_scale


def conditional_alone(
    network: nn.Module, x: Tensor, t: Tensor, labels: Tensor, **_: Any
) -> tuple[Tensor, None]:
    """What the package's forward_with_cond_scale should give at scale 1, where 2.3.4 fails."""
    return network(x, t, labels, cond_drop_prob=0.0), None


# The second is trained as its README has it, which is slow at the start, and so the sampler that
# takes longest of all is left to the third.
PEERS: dict[str, partial[Peer]] = {
    "diffusers, course": partial(DiffusersCourse),
    "denoising-diffusion-pytorch": partial(
        DenoisingDiffusion, rate=8e-5, parts=2, kinds=(COMMON, GUIDED)
    ),
    "denoising-diffusion-pytorch, rate 1e-3": partial(
        DenoisingDiffusion, rate=1e-3, parts=1, kinds=(COMMON, GUIDED, OWN)
    ),
}


def read_images(path: Path) -> tuple[Tensor, Tensor]:
    """uint8 (N, C, H, W) and labels (N,) of an .npz."""
    arrays = read_npz(path, ["arr_0", "arr_1"])
    images = torch.from_numpy(arrays["arr_0"]).permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(arrays["arr_1"]).long()


def batches_of(
    images: Tensor, labels: Tensor, batch_size: int, *, flip: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of uint8 images (N, C, H, W) as floats in [0, 1], each epoch in its own order."""
    while True:
        for rows in torch.randperm(len(images)).split(batch_size)[: len(images) // batch_size]:
            x = images[rows].float() / 255
            if flip:
                x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
            yield x, labels[rows]


def count_of(kind: str, samples: int) -> int:
    return samples // (OWN_SHARE if kind == OWN else 1)


def weights_file(folder: Path, steps: int) -> Path:
    return folder / f"{steps}.pt"


def drawn_file(folder: Path, steps: int, kind: str, count: int) -> Path:
    return folder / f"{steps}_{kind}_{count}.npz"


def train(peer: Peer, batches: Iterator[tuple[Tensor, Tensor]], steps: list[int], folder: Path):
    """Train to the last of `steps`; keep the weights, and the CPU seconds, after each."""
    begun = time.process_time()
    for step in range(1, max(steps) + 1):
        peer.step(batches)
        if step in steps:
            kept = {"weights": peer.drawn.state_dict(), "seconds": time.process_time() - begun}
            torch.save(kept, weights_file(folder, step))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("images", type=Path, help="an .npz: arr_0 (N, H, W, C), arr_1 (N,)")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", required=True, help="the last draws all")
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--flip", action="store_true")
    args = parser.parse_args()
    keep_freed_memory()  # as train.py does
    torch.manual_seed(SEED)
    images, labels = read_images(args.images)
    num_classes = int(labels.max()) + 1
    peer, args.steps = PEERS[args.name](tuple(images.shape[1:]), num_classes), sorted(args.steps)
    args.folder.mkdir(parents=True, exist_ok=True)
    if not all(weights_file(args.folder, steps).exists() for steps in args.steps):
        batches = batches_of(images, labels, peer.batch_size, flip=args.flip)
        train(peer, batches, args.steps, args.folder)
    for steps in args.steps:
        saved = torch.load(weights_file(args.folder, steps), weights_only=True)
        peer.drawn.load_state_dict(saved["weights"])
        for kind in peer.kinds if steps == args.steps[-1] else (COMMON,):
            torch.manual_seed(SEED)
            count = count_of(kind, args.samples)
            path = drawn_file(args.folder, steps, kind, count)
            if not path.exists():
                asked = torch.tensor(block_labels(count, range(num_classes)))
                with torch.inference_mode():
                    parts = [peer.draw(part, kind) for part in asked.split(SAMPLED_AT_A_TIME)]
                drawn = (torch.cat(parts) * 255).round().byte().permute(0, 2, 3, 1)
                write_npz(path, arr_0=drawn.numpy(), arr_1=asked.numpy())


if __name__ == "__main__":
    main()
