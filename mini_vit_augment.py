"""mini_vit_augment.py: the model of mini_vit.py, on digits that are never the same twice.

    python mini_vit_augment.py             on a CUDA GPU: full size, 118M parameters; elsewhere:
                                           the small model
    python mini_vit_augment.py --small     0.2M parameters

Measured on MNIST's test set (seeds 0, 1, 2): 99.577 % +- 0.040 with --tta 1, 100 epochs in 8
minutes on a shared H100. --small 99.573 % +- 0.012, 17 epochs in 12.5 minutes on two cores of an
AMD EPYC.

A big network can memorize its training set. So it never sees a picture twice: digits are rotated,
scaled, sheared, shifted and elastically deformed, differently in every epoch, a whole batch in one
step; when training on a GPU by worker processes, while the model learns. main() is that of
mini_vit.py, but for the batches and --predict.
"""

import math
import os
import signal
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common import (CudaGraph, Digits, Run, between, draw_attention, draw_grid, generator,
                    load_digits, make_optimizers, make_parser, mixed_precision, model_options,
                    normalise, progress_bar, report_errors, seed_from, show_loss,
                    shuffled_indices)
from mini_vit import ViT, add_adversarial_gradients, learning_rate

FULL = dict(layers=16, heads=14, dim=784, patch_size=28, dropout=0.1,
            tta=1, epochs=100, batch_size=2048, lr=6e-4, weight_decay=0.05)
SMALL = dict(layers=4, heads=4, dim=64, patch_size=4, overlap=4, input_dropout=0.5,
             epochs=21, batch_size=128, lr=5e-3, weight_decay=0.05, muon=True)


def augment(images: Tensor, random: torch.Generator, degrees: float = 10, scale: float = 0.1,
            shear: float = 0.1, shift: float = 1.5, bend: float = 0.8) -> Tensor:
    """Bytes (B, 28, 28) to bytes (B, 28, 28), each image changed differently.

    Draws uniformly: a rotation of up to `degrees`, factors 1 +- `scale` for width and height, a
    `shear`, a `shift` in pixels. Then comes an elastic deformation (Simard et al., 2003), a smooth
    field with a standard deviation of `bend` pixels. All of it goes into one sampling grid, so that
    an image is resampled only once. No flips: a mirrored 2 is no 2.
    """
    count, size = len(images), images.shape[-1]
    angle, scale_x, scale_y, shears, shift_x, shift_y = (
        2 * torch.rand(6, count, generator=random) - 1)
    cos, sin = torch.cos(angle * math.radians(degrees)), torch.sin(angle * math.radians(degrees))
    scale_x, scale_y, shears = 1 + scale_x * scale, 1 + scale_y * scale, shears * shear
    shift_x, shift_y = shift_x * shift * 2 / size, shift_y * shift * 2 / size  # grid: -1 to 1
    affine = torch.stack([scale_x * cos, shears - scale_y * sin, shift_x,
                          scale_x * sin, scale_y * cos, shift_y], dim=1)
    # A pixel takes its value from sampling coordinates (x, y). Each of the two is a weighted sum of
    # the pixel's own x, its own y, and 1.
    centers = (2 * torch.arange(size) + 1) / size - 1
    pixels = torch.stack([centers.repeat(size), centers.repeat_interleave(size),
                          torch.ones(size**2)])
    coordinates = affine.view(2 * count, 3) @ pixels  # (2 B, 3) @ (3, 784)
    weights = torch.randn(2 * count, 49, generator=random)
    coordinates.addmm_(weights, bumps(size) * bend * 2 / size)
    grid = coordinates.view(count, 2, size, size).permute(0, 2, 3, 1)
    augmented = F.grid_sample(images.unsqueeze(1).float(), grid, align_corners=False)
    return augmented.squeeze(1).round().byte()


def bumps(size: int) -> Tensor:
    """Smooth fields (49, size^2): a Gaussian bump every four pixels. At each pixel their squares
    sum to 1, so with normal weights the sum of all has a standard deviation of 1."""
    distance = torch.arange(size)[:, None] - (1.5 + torch.arange(0, size, 4))
    bump = F.normalize(torch.exp(-(distance**2) / (2 * 4**2)), dim=1)  # (28, 7), along one axis
    return torch.kron(bump, bump).T


class AugmentedBatches(Dataset):
    """A batch of augmented digits for an epoch and the indices of the batch. It depends on these
    and the seed only, so the number of workers changes nothing."""

    def __init__(self, digits: Digits, seed: int) -> None:
        self.digits, self.seed = digits, seed

    def __getitem__(self, step: tuple[int, list[int]]) -> tuple[Tensor, Tensor]:
        epoch, indices = step
        # Seeded with the epoch and the first index: no other batch of the run has both.
        random = generator(self.seed, epoch * len(self.digits.images) + indices[0])
        return augment(self.digits.images[indices], random), self.digits.labels[indices]


def ignore_ctrl_c(worker: int) -> None:
    """For a worker: Ctrl-C reaches it too, but the main process ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def augmented_batches(digits: Digits, options: Namespace,
                      first_epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of augmented images and labels, epoch after epoch, on the device. Worker processes
    make them while the model learns; with --workers 0 the main process makes them itself."""
    on_gpu = options.device.type == "cuda"
    loader = DataLoader(AugmentedBatches(digits, options.seed), batch_size=None,
                        sampler=shuffled_indices(len(digits.images), options, first_epoch),
                        num_workers=options.workers, worker_init_fn=ignore_ctrl_c,
                        pin_memory=on_gpu, generator=torch.Generator())
    for images, labels in loader:
        yield (images.to(options.device, non_blocking=on_gpu),
               labels.to(options.device, non_blocking=on_gpu))


def add_workers_option(parser: ArgumentParser) -> None:
    on_cpu = parser.get_default("device").type == "cpu"  # where they would take the model's cores
    parser.add_argument("--workers", type=between(int, 0, 999), help="processes that augment",
                        default=0 if on_cpu else min(4, os.cpu_count() or 1))


def draw_augmented(path: Path, digits: Digits, seed: int) -> None:
    """Draws five digits on the left, and seven augmented versions beside each."""
    images = augment(digits.images[:5].repeat_interleave(8, dim=0), generator(seed))
    images[::8] = digits.images[:5]
    draw_grid(path, images, ["original", *["augmented"] * 7] * 5, columns=8)


def main() -> None:
    parser = make_parser(__doc__, FULL, SMALL)
    add_workers_option(parser)
    options = parser.parse_args()
    train_set, test_set = load_digits(options)
    torch.manual_seed(options.seed)
    model = ViT(**model_options(options)).to(options.device)
    if options.compile:
        model.compile()
    lr = torch.zeros((), device=options.device)  # a tensor, which a CUDA graph can read anew
    optimizers = make_optimizers(model, lr, options)
    run = Run(options, train_set)
    run.start(model)
    first_epoch = run.resume(model, optimizers)  # 0, unless --resume finds a checkpoint

    @CudaGraph  # on a GPU: captured once, then replayed
    def train_step(images: Tensor, labels: Tensor) -> Tensor:
        images = normalise(images).requires_grad_(options.adversarial > 0)
        with mixed_precision(options.device):
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
        loss.backward()
        if options.adversarial:
            add_adversarial_gradients(model, images, labels, options.adversarial)
        gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        accuracy = (logits.argmax(dim=1) == labels).float().mean()
        return torch.stack([loss.detach(), accuracy, gradient_norm])

    batches = augmented_batches(train_set, options, first_epoch)
    steps = len(train_set.images) // options.batch_size  # per epoch
    for epoch in range(first_epoch, options.epochs):
        model.train()
        torch.manual_seed(seed_from(options.seed, epoch))  # for dropout
        metrics = torch.zeros(steps, 3, device=options.device)
        bar = progress_bar(steps, epoch, options.batch_size)
        for step in bar:
            lr.fill_(learning_rate(epoch * steps + step, options.epochs * steps, options.lr))
            images, labels = next(batches)
            metrics[step] = train_step(images, labels)
            if step % 20 == 0 or step == steps - 1:  # seldom: to read a number is to wait for a GPU
                show_loss(bar, metrics[: step + 1])
        run.save(model, optimizers, metrics)
    run.test(model, test_set)
    draw_augmented(run.folder / "augmented.png", train_set, options.seed)
    draw_attention(run.folder / "attention.png", model, test_set.images[0], options)


if __name__ == "__main__":
    with report_errors():
        main()
