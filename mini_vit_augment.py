"""mini_vit_augment.py: the model of mini_vit.py, on digits that are never twice the same.

    python mini_vit_augment.py             118M parameters, for a GPU
    python mini_vit_augment.py --small     0.2M parameters, for a CPU

On MNIST's test set (seeds 0, 1, 2): 99.577 % +- 0.040 (--reach 1), 100 epochs in 8 minutes on a shared H100.
--small 99.49 % +- 0.01, 28 epochs of 16 s on two AMD EPYC cores; --small --patch-size 4 --overlap 4
--input-dropout 0.5 --adversarial 0.5 --muon --lr 5e-3 --epochs 56 --reach 1: 99.700 % +- 0.020, 70 s each.

A big network can learn its training set by heart. So it never sees a picture twice: digits are turned, sized,
slanted, moved and bent anew, a whole batch in one step; beside a GPU by workers, while the model learns."""

import math
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor

from common import Problem, Recipe, generator, predict, run, sheet, three_best
from mini_vit import ViT, sample_numbers, show_attention

FULL = Recipe(layers=16, heads=14, dim=784, patch_size=28, dropout=0.1,
              reach=1, epochs=100, batch_size=2048, lr=6e-4, weight_decay=0.05)
SMALL = Recipe(small=True, layers=4, heads=4, dim=64, patch_size=7,
               epochs=28, batch_size=128, lr=2e-3, weight_decay=0.05)


def augment(images: Tensor, random: torch.Generator, degrees: float = 10, scale: float = 0.1,
            shear: float = 0.1, shift: float = 1.5, bend: float = 0.8) -> Tensor:
    """Bytes (B, 28, 28) to bytes (B, 28, 28), each image changed in a way of its own: uniformly, up to some
    `degrees` of rotation, factors 1 +- `scale` of width and height, `shear`, and `shift` pixels; then by an
    elastic deformation (Simard et al., 2003), a smooth field with a standard deviation of `bend` pixels. All
    in one grid of places to look at: an image is resampled only once. No flips: a mirrored 2 is no 2."""
    count, size = len(images), images.shape[-1]
    angle, wide, high, slant, right, down = 2 * torch.rand(6, count, generator=random) - 1
    cos, sin = torch.cos(angle * math.radians(degrees)), torch.sin(angle * math.radians(degrees))
    wide, high, slant = 1 + wide * scale, 1 + high * scale, slant * shear
    right, down = right * shift * 2 / size, down * shift * 2 / size  # places go from -1 to 1
    affine = torch.stack([wide * cos, slant - high * sin, right, wide * sin, high * cos, down], dim=1)
    # A pixel looks at a place (x, y). In an affine map both are weighted sums of its own x, its own y, and 1.
    middle = (2 * torch.arange(size) + 1) / size - 1
    fields = torch.stack([middle.repeat(size), middle.repeat_interleave(size), torch.ones(size**2)])
    places = affine.view(2 * count, 3) @ fields  # (2 B, 3) @ (3, 784)
    # To bend adds 49 more terms: a Gaussian bump every four pixels, with random weights. At each pixel the
    # squares of the bumps sum to 1, so with normal weights it moves by a standard deviation of `bend`.
    distance = torch.arange(size)[:, None] - (1.5 + torch.arange(0, size, 4))
    bump = F.normalize(torch.exp(-(distance**2) / (2 * 4**2)), dim=1)  # (28, 7), along one axis
    bumps = torch.kron(bump, bump).T * bend * 2 / size  # (49, 784)
    places.addmm_(torch.randn(2 * count, len(bumps), generator=random), bumps)
    grid = places.view(count, 2, size, size).permute(0, 2, 3, 1)
    return F.grid_sample(images.unsqueeze(1).float(), grid, align_corners=False).squeeze(1).round().byte()


class AugmentedDigits(Dataset):
    """Hands out augmented images and labels, a whole batch at a time, asked for by its sample numbers. The
    first seeds the augmentation, so no two batches are alike and the number of workers changes nothing."""

    def __init__(self, images: Tensor, labels: Tensor, seed: int) -> None:
        self.images, self.labels, self.seed = images, labels, seed

    def __getitems__(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        index = torch.tensor(numbers) % len(self.images)
        return augment(self.images[index], generator(self.seed, numbers[0])), self.labels[index]


def quiet(worker: int) -> None:
    """In a worker: no Ctrl-C, and no words about errors. The main process has both, and ends its workers."""
    sys.excepthook = lambda *error: None
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.name == "posix":
        os.setpgrp()  # what is sent to the group of the main process is not for its workers


def augmented_batches(images: Tensor, labels: Tensor, recipe: Recipe, first_epoch: int = 0) -> Iterator:
    """The batches of all epochs, made by `recipe.workers` processes as the model learns; by this one if 0."""
    return iter(DataLoader(AugmentedDigits(images, labels, recipe.seed), collate_fn=tuple,
                           batch_sampler=map(Tensor.tolist, sample_numbers(len(images), recipe, first_epoch)),
                           num_workers=recipe.workers, worker_init_fn=quiet,
                           pin_memory=recipe.device.startswith("cuda")))


def show_augmented(out: Path, model: nn.Module, images: Tensor, test_images: Tensor, recipe: Recipe) -> None:
    """Draws augmented.png: five digits on the left, and beside each what it can become."""
    pages = augment(images[:5].repeat_interleave(8, dim=0), generator(recipe.seed))
    pages[::8] = images[:5]
    sheet(out / "augmented.png", pages, ["original", *["augmented"] * 7] * 5, columns=8)


def prepare(path: str) -> Tensor:
    """A picture of a digit, of any size and colours, as bytes (28, 28) like MNIST's: bright on black, in 20 x
    20 pixels, centre of mass in the middle (LeCun et al., 1998). Raises Problem for what shows no digit."""
    try:
        picture = ImageOps.exif_transpose(Image.open(path))
        deep = picture.mode[0] == "I"  # 16 bits a pixel, which convert would cut off at 255
        picture = (picture.convert("F").point(lambda x: x / 257) if deep else picture).convert("RGBA")
    except Exception as error:  # each format of a picture has errors of its own
        raise Problem(f"{path} cannot be read as a picture ({error}): save it anew as PNG or JPEG") from error
    picture = picture.resize([max(1, round(400 * side / max(picture.size))) for side in picture.size])
    pixels = pil_to_tensor(picture).permute(1, 2, 0) / 255  # (h, w, 4)
    pixels[..., :3] *= pixels[..., 3:]  # what is transparent has no colour
    # Paper is a plane fitted to the border, as light may fall off; ink what differs, darker or brighter.
    down, right = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in pixels.shape[:2]), indexing="ij")
    plane = torch.stack([down, right, torch.ones_like(down)], dim=2)  # (h, w, 3)
    border = torch.maximum(down.abs(), right.abs()) == 1
    paper = plane @ torch.linalg.lstsq(plane[border], pixels[border]).solution
    ink = (pixels - paper).norm(dim=2)  # (h, w)
    smooth = F.avg_pool2d(ink[None], 3, stride=1, padding=1)[0]
    if smooth.max() < max(0.1, 3 * ink[border].square().mean().sqrt()):
        raise Problem(f"{path} shows no digit: take a picture where it stands out, with paper all around it")
    rows, columns = ((smooth > smooth.max() / 2).any(dim).nonzero() for dim in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    ink = (ink / ink.max() - 0.2).clamp(min=0) / 0.8  # the paper's noise becomes black
    while ink.mean() < 0.3:  # a thin pen's line becomes as wide as MNIST's
        ink = F.max_pool2d(ink[None], 3, stride=1, padding=1)[0]
    high, wide = (max(1, round(20 * side / max(ink.shape))) for side in ink.shape)
    ink = F.interpolate(ink[None, None], (high, wide), mode="bilinear", antialias=True)[0, 0]
    centre = ((ink.sum(dim) * torch.arange(ink.shape[1 - dim])).sum() / ink.sum() for dim in (1, 0))
    top, left = (min(max(0, round(13.5 - at.item())), 28 - side) for at, side in zip(centre, (high, wide)))
    return (255 * F.pad(ink / ink.max(), (left, 28 - wide - left, top, 28 - high - top))).byte()


def read_pictures(model: nn.Module, recipe: Recipe) -> None:
    """Answers --predict: the three most probable digits for each picture, and what the model saw of it."""
    problems = []
    for path in recipe.predict:
        try:
            image = prepare(path)
            print(f"\n{path}:   {three_best(predict(model, image[None], recipe.device, recipe.reach)[0])}")
            for row in image.tolist():  # two letters a pixel: together they are about as wide as high
                print("".join(" .:-=+*#%@"[value * 9 // 255] * 2 for value in row).rstrip())
        except Problem as problem:
            problems.append(str(problem))
    if problems:
        raise Problem("\n".join(problems))


def main() -> None:
    run(__file__, __doc__, ViT, FULL, SMALL, augmented_batches, read_pictures, show_attention, show_augmented)


if __name__ == "__main__":
    main()
