"""The pictures that a model draws images from (`condition`), and what its network is given of them.

A picture is what a user would hand in. Training reduces images to it, in 8 bits if they have them,
or takes their partners of `condition_root`; from there on it goes the way of a user's file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from os.path import splitext

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from datasets.bad_images import read_sizes
from datasets.decoding import decode_image, opened, read_size
from datasets.folder import list_images
from datasets.packed import ImagePath, open_root
from datasets.storage import ImageDataset, ImageFileDataset, Listing
from utils.captions import contact_sheet
from utils.config import Config, condition_channels
from utils.errors import DataError, show
from utils.files import content_key
from utils.images import ImageSpec, Values, as_pictures, to_float, to_rgb
from utils.rng import EvaluationDraw, Stream, numpy_generator

LUMINANCE = (19595, 38470, 7471)  # of RGB, in 65536ths, as Pillow; float32 adds them exactly


def grey(x: Tensor, *_: object) -> Tensor:
    """Luminance of ITU-R 601; of other numbers of channels than three the mean."""
    weights = LUMINANCE if x.shape[1] == 3 else [2**16 / x.shape[1]] * x.shape[1]
    return (x * x.new_tensor(weights)[:, None, None]).sum(1, keepdim=True) / 2**16


def edges(x: Tensor, *_: object) -> Tensor:
    """A quarter of the length of Sobel's gradient of the grey levels."""
    kernel = x.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    padded = F.pad(grey(x), (1, 1, 1, 1), mode="replicate")
    return F.conv2d(padded, torch.stack([kernel, kernel.T])[:, None]).norm(dim=1, keepdim=True) / 4


# How images become pictures, both of levels 0 to 255 (b, c, H, W), with the pixels that a hole
# leaves; how pictures in [-1, 1] become planes, what a network is given, in which nothing is 0 but
# a hole, so that dropped conditions differ from all others; what one has without a model.
IN_UNITS = ("downsample", "grey")  # of images that are floats; other pictures are of 8 bits
KINDS = {
    "downsample": (
        lambda x, c, _: F.avg_pool2d(x, c.condition_factor),
        lambda x, c: F.interpolate(x, scale_factor=c.condition_factor, mode="bicubic"),
        "bicubic",
    ),
    "grey": (grey, lambda x, _: x, "grey"),
    "mask": (
        lambda x, _, known: torch.cat([x * known, 255 * known], 1),
        lambda x, _: torch.cat([x[:, :-1] * (x[:, -1:] >= 0), x[:, -1:].sign()], 1),
        "mean of the rest",
    ),
    "edges": (edges, lambda x, _: x, None),
    "folder": (None, lambda x, _: x, "picture"),
}


def planes_of(config: Config, images: Tensor, partners: Tensor | None, keys: Iterable) -> Tensor:
    """The planes, float32 (b, Cc, H, W), of images, uint8 or float32 in [-1, 1], or of partners if
    there are any. Holes follow from `keys`, one an image, see `numpy_generator`."""
    reduce, expand, _ = KINDS[config.condition]
    if partners is None:
        known, is_float = None, images.is_floating_point()
        if config.condition == "mask":
            known = [known_pixels(numpy_generator(*key), *images.shape[2:]) for key in keys]
            known = torch.stack(known).to(images.device)
        levels = reduce((images + 1) * 127.5 if is_float else images.float(), config, known)
        is_float = is_float and config.condition in IN_UNITS
        partners = levels / 127.5 - 1 if is_float else (levels + 0.5).clamp(max=255).byte()
    return expand(to_float(partners), config).clamp(-1, 1)


def known_pixels(rng: np.random.Generator, *size: int) -> Tensor:
    """Float32 (1, H, W): 0 in a rectangle of 1/4 to 3/4 of each side, 1 around it."""
    spans = [rng.integers(-(-side // 4), max(3 * side // 4, 1), endpoint=True) for side in size]
    y, x = (rng.integers(side - n, endpoint=True) for side, n in zip(size, spans, strict=True))
    known = torch.ones(1, *size)
    known[:, y : y + spans[0], x : x + spans[1]] = 0
    return known


def planes_at(
    config: Config, dataset: ImageDataset, indices: Sequence[int], rows: slice = slice(None)
) -> Tensor:
    """The planes of these rows of `indices` in a data set, by index alone, whatever the step."""
    indices, partners = indices[rows], getattr(dataset, "partners", None)
    images = torch.stack([(partners or dataset)[i][0] for i in indices])
    keys = ((0, Stream.EVALUATION, EvaluationDraw.HOLES, i) for i in indices)
    return planes_of(config, images, partners and images, keys)


def shown(planes: Tensor, config: Config) -> Tensor:
    """The picture as an image in [-1, 1], in its colours, the mean of the rest in its hole."""
    if config.condition_colors is not None:
        colors = to_float(torch.tensor(config.condition_colors).byte())
        return torch.einsum("bnhw,nc->bchw", planes.clamp(min=0), colors)
    if config.condition == "mask":
        known, planes = planes[:, -1:].clamp(min=0), planes[:, :-1]
        mean = planes.sum((2, 3), True) / known.sum((2, 3), True).clamp(min=1)
        planes = planes + (1 - known) * mean
    return planes


def condition_sheet(
    planes: Tensor, config: Config, others: Sequence[Tensor], names: Sequence[str] = ()
) -> Tensor:
    """A row for each picture and the images of `others`, uint8 (n, C, H, W): uint8 (3, H', W')."""
    columns = [as_pictures(shown(planes, config)), *others]
    rows = [list(range(i, len(planes) * len(columns), len(planes))) for i in range(len(planes))]
    return contact_sheet(torch.cat([to_rgb(column) for column in columns]), rows, left=names)


def decode_picture(path: ImagePath, spec: ImageSpec, values: Values, config: Config) -> Tensor:
    """A file as uint8 (c, h, w): for a mask with opacity, a plane for each colour of label maps.
    Raises a DataError if there is no hole, or a colour that is none."""
    if config.condition == "mask":
        image = decode_image(path, spec._replace(channels=spec.channels - 1), values)
        with opened(path, image.shape[0]) as file:
            opacity = ImageOps.exif_transpose(file).convert("RGBA").getchannel("A")
        if opacity.getextrema()[0] >= 128:
            raise DataError(f"{show(path)}: has no hole; make its pixels transparent, alpha < 128")
        return torch.cat([image, torch.from_numpy(np.array(opacity))[None]])
    if config.condition_colors is None:
        return decode_image(path, spec, values)
    colors = torch.tensor(config.condition_colors)[:, :, None, None]
    pixels = decode_image(path, ImageSpec(colors.shape[1], *read_size(path), 0), values)
    same = (pixels == colors).all(1)
    for y, x in (~same.any(0)).nonzero()[:1].tolist():
        color = f"row {y}, column {x} has the colour {tuple(pixels[:, y, x].tolist())}"
        raise DataError(f"{show(path)}: {color}, none of condition_colors; add or correct it")
    numbers = Image.fromarray(same.byte().argmax(0).byte().numpy())
    numbers = ImageOps.fit(numbers, (spec.width, spec.height), Image.Resampling.NEAREST)
    fitted = torch.from_numpy(np.array(numbers))
    return (fitted == torch.arange(len(colors))[:, None, None]).byte() * 255


def file_channels(config: Config, spec: ImageSpec) -> int:
    """How many channels the file of a picture is read with."""
    if config.condition_colors:
        return len(config.condition_colors[0])
    return condition_channels(config, spec.channels) - (config.condition == "mask")


def picture_files(
    config: Config,
    listing: Listing,
    spec: ImageSpec,
    sizes: Sequence[tuple[int, int]] = (),
    values: Values | None = None,
) -> ImageFileDataset:
    """Files as pictures for images of `spec` and `values`. A DataError names the first that has
    another type, or (height, width) than its image, of `sizes`, or without these than the kind
    needs."""
    factor = config.condition_factor if config.condition == "downsample" else 1
    wanted = spec.height // factor, spec.width // factor
    sizes = sizes or [wanted] * len(listing.names)
    channels = condition_channels(config, spec.channels)
    owns = read_sizes(listing, file_channels(config, spec), values.dtype if values else "uint8")
    for name, own, size in zip(listing.names, owns, sizes, strict=True):
        if own != size:
            text = f"is {own[0]} x {own[1]} (height x width), must be {size[0]} x {size[1]}"
            raise DataError(f"{show(listing.root / name)}: {text}; crop or resize it")
    files = ImageFileDataset(listing, channels, *wanted, values=values)
    files.decode = partial(decode_picture, config=config)
    return files


def add_partners(config: Config, dataset: ImageDataset, split: str) -> None:
    """Find the images' pictures in `condition_root`, as `dataset.partners`. Raises a DataError if
    names, up to the suffix, or sizes differ."""
    channels = file_channels(config, dataset.spec)
    theirs = dict(data_root=config.condition_root, label_file=None, image_channels=channels)
    root = config.model_copy(update=theirs)
    listings = (list_images(source, split) for source in (config, root))
    ours, theirs = (sorted(listing.names, key=splitext) for listing in listings)
    stems, others = ([splitext(name)[0] for name in names] for names in (ours, theirs))
    if stems != others:
        odd = sorted({*stems} ^ {*others}) or stems
        rule = f"needs the names of {show(config.data_root)}, with any suffix; {len(odd)} are not"
        raise DataError(f"{show(config.condition_root)}: {rule} in both, first {show(odd[0])}")
    partner = dict(zip(ours, theirs, strict=True))
    names = [partner[name] for name in dataset.names]
    listing = Listing(open_root(config.condition_root), names, [0] * len(names), ())
    sizes = read_sizes(dataset.listing, dataset.spec.channels)
    dataset.partners = picture_files(config, listing, dataset.spec, sizes)
    dataset.fingerprint = content_key([dataset.fingerprint, dataset.partners.fingerprint])
