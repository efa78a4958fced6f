"""How often the verdict of `memorization` is wrong on real images, and how many copies it needs.

python -m benchmarks.memorization dataset=mnist data_root=data
python -m benchmarks.memorization --splits 100 --num_train 6000 dataset=custom data_root=my_images

Real images are split at random, again and again, into train images, images that play the generated
ones, and held-out ones. No model is involved, so every alarm is false. Then some of the played
images are replaced by copies of train images, as they are or changed, and every alarm is right.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from datasets.real import real_sets
from metrics.memorization import NUM_CHECKED, compare, nearest_images, num_equal
from metrics.sanity import image_hash
from utils.cli import parse_int_list
from utils.config import RawConfig, apply_overrides, validate
from utils.distributed import Runtime

Change = Callable[[Tensor, torch.Generator], Tensor]


def noisy(deviation: float) -> Change:
    """Add normal noise of this deviation, in 8-bit steps, and round."""

    def change(images: Tensor, rng: torch.Generator) -> Tensor:
        noise = deviation * torch.randn(images.shape, generator=rng)
        return (images + noise).round().clamp(0, 255).to(torch.uint8)

    return change


def brighter(images: Tensor, rng: torch.Generator) -> Tensor:
    return (images.float() * 1.1).round().clamp(0, 255).to(torch.uint8)


def shifted(images: Tensor, rng: torch.Generator) -> Tensor:
    return images.roll(1, 3)


def mirrored(images: Tensor, rng: torch.Generator) -> Tensor:
    return images.flip(3)


COPIES: dict[str, Change] = {
    "exact": lambda images, rng: images,
    "noise of sd 20": noisy(20),
    "noise of sd 40": noisy(40),
    "noise of sd 80": noisy(80),
    "a tenth brighter": brighter,
    "shifted by one pixel": shifted,
    "mirrored": mirrored,
}


def two_nearest(queries: Tensor, train: Tensor) -> np.ndarray:
    """(Q, 2) root mean squares over pixels in [0, 1]."""
    squared, _ = nearest_images(
        queries,
        train.split(1024),
        len(train),
        num_neighbours=2,
        left_out=torch.full((len(queries),), -1),
        device=torch.device("cpu"),
    )
    return (squared.double() / queries[0].numel()).sqrt().numpy() / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--splits", type=int, default=300)
    parser.add_argument("--num_train", type=int, default=4000)
    parser.add_argument("--copies", type=parse_int_list, default=[3, 10, 50], help="of 1,000")
    parser.add_argument("--copy_splits", type=int, default=100, help="of the splits, with copies")
    args, overrides = parser.parse_known_args()
    raw = RawConfig({"experiment_name": "copies"}, {})
    config = validate(raw, problems=apply_overrides(raw, overrides))
    sets = real_sets(config, Runtime(torch.device("cpu")), 1000)
    parts = [sets.train, sets.test]
    images = torch.cat([part.load(part.indices)[0] for part in parts if part is not None])
    hashes = np.array([image_hash(image) for image in images])
    alarms, right, most = Counter(), Counter(), max(args.copies)
    for split in range(args.splits):
        rng = torch.Generator().manual_seed(split)
        order = torch.randperm(len(images), generator=rng)
        sizes = [args.num_train, NUM_CHECKED, NUM_CHECKED]
        train, played, held_out = (images[rows] for rows in order[: sum(sizes)].split(sizes))
        real = {"equal": num_equal(hashes[order[: args.num_train]]), "searched": args.num_train}
        kinds = COPIES if split < args.copy_splits else {}
        copies = [change(train[:most], rng) for change in kinds.values()]
        near = two_nearest(torch.cat([played, held_out, *copies]), train)
        played, held_out, *copies = np.split(
            near, np.cumsum([NUM_CHECKED, NUM_CHECKED, *[most] * len(kinds)])[:-1]
        )
        verdict = compare(played, held_out, **real)
        alarms.update(["any"] * verdict["flagged"] + verdict["signs"])
        for kind, distances in zip(kinds, copies, strict=True):
            for count in args.copies:
                planted = np.concatenate([distances[:count], played[count:]])
                verdict = compare(planted, held_out, **real)
                signs = ["any"] * verdict["flagged"] + verdict["signs"]
                right.update((kind, count, sign) for sign in signs)
        if (split + 1) % 25 == 0:
            print(split + 1, dict(alarms), flush=True)
    signs = ("any", "distance", "ratio", "copies")
    print(f"{len(images)} images, {args.num_train} searched, alarms by {', '.join(signs)}")
    print(f"no copies: {[alarms[sign] for sign in signs]} of {args.splits}")
    for kind in COPIES:
        for count in args.copies:
            shares = [right[kind, count, sign] for sign in signs]
            print(f"{count} {kind}: {shares} of {min(args.splits, args.copy_splits)}")


if __name__ == "__main__":
    main()
