"""mini_vit_augment.py: the model of mini_vit.py, on digits that are never the same twice.

    python mini_vit_augment.py               full size on a CUDA GPU, the small model elsewhere
    python mini_vit_augment.py --no-small    full size, 118M parameters
    python mini_vit_augment.py --small       on patches of 4 x 4 pixels, 0.2M parameters

MNIST test accuracy, mean and standard deviation over seeds 0, 1, 2:
full size 99.58 +- 0.04% (--tta 1), 100 epochs in 8.1 minutes on an H100 that trained 8 at once.
small     99.60 +- 0.03% (seeds 0 to 5), 21 epochs in 12.3 minutes on two cores of an Intel Xeon.

A big network can memorize its training set. So this one never sees a picture twice: digits are
rotated, scaled, sheared, shifted and elastically deformed, differently in every epoch, a batch at a
time. On a GPU, worker processes do this while the model trains. main() is that of mini_vit.py,
except for the batches and --predict, which reads your own digits.
"""

import glob
import math
import os
import signal
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor

from common import (CudaGraph, Digits, Run, UserError, between, check_and_show, draw_attention,
                    draw_grid, generator, load_checkpoint, load_digits, make_optimizers,
                    make_parser, mixed_precision, model_options, normalize, predict, progress_bar,
                    report_errors, run_folder, seed_from, shuffled_indices, three_best)
from mini_vit import ViT, add_adversarial_gradients, learning_rate

FULL = dict(layers=16, heads=14, dim=784, patch_size=28, dropout=0.1,
            tta=1, epochs=100, batch_size=2048, lr=6e-4, weight_decay=0.05)
SMALL = dict(layers=4, heads=4, dim=64, patch_size=4, overlap=4, input_dropout=0.5,
             epochs=21, batch_size=128, lr=5e-3, weight_decay=0.05, muon=True)


def augment(images: Tensor, random: torch.Generator, degrees: float = 10, scale: float = 0.1,
            shear: float = 0.1, shift: float = 1.5, bend: float = 0.8) -> Tensor:
    """Bytes (B, 28, 28) to bytes (B, 28, 28), each image changed differently.

    Draws uniformly: a rotation of up to `degrees`, factors 1 +- `scale` for width and height, a
    shear of up to `shear`, shifts of up to `shift` pixels. Then comes an elastic deformation
    (Simard et al., 2003), a smooth displacement field with a standard deviation of `bend` pixels.
    All of it goes into one sampling grid, so that an image is resampled only once. No flips: a
    mirrored 2 is not a 2."""
    count, size = len(images), images.shape[-1]
    angle, scale_x, scale_y, shears, shift_x, shift_y = (
        2 * torch.rand(6, count, generator=random) - 1)
    cos, sin = torch.cos(angle * math.radians(degrees)), torch.sin(angle * math.radians(degrees))
    scale_x, scale_y, shears = 1 + scale_x * scale, 1 + scale_y * scale, shears * shear
    shift_x, shift_y = shift_x * shift * 2 / size, shift_y * shift * 2 / size  # grid: -1 to 1
    # A pixel takes its value from the image at sampling coordinates (x, y). Each of the two is a
    # weighted sum of the pixel's own x, its own y, and 1. The weights are a row of `affine`.
    affine = torch.stack([scale_x * cos, shears - scale_y * sin, shift_x,
                          scale_x * sin, scale_y * cos, shift_y], dim=1)
    centers = (2 * torch.arange(size) + 1) / size - 1
    pixels = torch.stack([centers.repeat(size), centers.repeat_interleave(size),
                          torch.ones(size**2)])
    coordinates = affine.view(2 * count, 3) @ pixels  # (2 B, 3) @ (3, 784)
    fields = bumps(size) * bend * 2 / size  # (49, 784)
    coordinates.addmm_(torch.randn(2 * count, len(fields), generator=random), fields)
    grid = coordinates.view(count, 2, size, size).permute(0, 2, 3, 1)
    augmented = F.grid_sample(images.unsqueeze(1).float(), grid, align_corners=False)
    return augmented.squeeze(1).round().byte()


def bumps(size: int) -> Tensor:
    """Smooth fields (49, size^2): a Gaussian bump every four pixels. At each pixel their squares
    sum to 1, so a sum with standard normal weights has a standard deviation of 1."""
    distance = torch.arange(size)[:, None] - (1.5 + torch.arange(0, size, 4))
    bump = F.normalize(torch.exp(-(distance**2) / (2 * 4**2)), dim=1)  # (28, 7), along one axis
    return torch.kron(bump, bump).T


class AugmentedBatches(Dataset):
    """Makes a batch from an epoch and the indices of its digits. A batch depends only on these two
    and the seed, so the number of workers changes nothing."""

    def __init__(self, digits: Digits, seed: int) -> None:
        self.digits, self.seed = digits, seed

    def __getitem__(self, step: tuple[int, list[int]]) -> tuple[Tensor, Tensor]:
        epoch, indices = step
        # Seeded with the epoch and the first index, a pair that no other batch of the run has.
        random = generator(self.seed, epoch * len(self.digits.images) + indices[0])
        return augment(self.digits.images[indices], random), self.digits.labels[indices]


def ignore_ctrl_c(worker: int) -> None:
    """Runs in each worker: Ctrl-C reaches workers, too, but the main process stops them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def augmented_batches(digits: Digits, options: Namespace, first_epoch: int) -> Iterator:
    """Batches of augmented images and labels for all epochs, on the device. Worker processes make
    them while the model trains; with --workers 0, the main process makes them itself."""
    on_gpu = options.device.type == "cuda"
    loader = DataLoader(AugmentedBatches(digits, options.seed), batch_size=None,
                        sampler=shuffled_indices(len(digits.images), options, first_epoch),
                        num_workers=options.workers, worker_init_fn=ignore_ctrl_c,
                        pin_memory=on_gpu, generator=torch.Generator())  # not dropout's generator
    for images, labels in loader:
        yield (images.to(options.device, non_blocking=on_gpu),
               labels.to(options.device, non_blocking=on_gpu))


def add_workers_option(parser: ArgumentParser) -> None:
    on_cpu = parser.get_default("device").type == "cpu"  # there, workers would slow down the model
    parser.add_argument("--workers", type=between(int, 0, 999), help="processes for augmentation",
                        default=0 if on_cpu else min(4, os.cpu_count() or 1))


def read_options() -> Namespace:
    parser = make_parser(__doc__, FULL, SMALL)
    add_workers_option(parser)
    parser.add_argument("--predict", nargs="+", action="extend", metavar="PICTURE",
                        help="pictures, or folders of pictures, to read with the trained model")
    return parser.parse_args()


def draw_augmented(path: Path, digits: Digits, seed: int) -> None:
    """Draws five digits on the left, and seven augmented versions beside each."""
    images = augment(digits.images[:5].repeat_interleave(8, dim=0), generator(seed))
    images[::8] = digits.images[:5]
    draw_grid(path, images, ["original", *["augmented"] * 7] * 5, columns=8)


def main() -> None:
    options = read_options()
    if options.predict:
        return read_pictures(ViT(**model_options(options)), options)
    train_set, test_set = load_digits(options)
    torch.manual_seed(options.seed)
    model = ViT(**model_options(options)).to(options.device)
    if options.compile:
        model.compile()
    lr = torch.zeros((), device=options.device)  # set in place: a CUDA graph freezes plain numbers
    optimizers = make_optimizers(model, lr, options)
    run = Run(options, train_set, model, optimizers)
    run.start()
    first_epoch = run.resume()  # 0, unless --resume finds a checkpoint

    @CudaGraph  # on a GPU: captured once, then replayed
    def train_step(images: Tensor, labels: Tensor) -> Tensor:
        images = normalize(images).requires_grad_(options.adversarial > 0)
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

    batches = augmented_batches(train_set, options, first_epoch)  # one iterator for all epochs
    steps = len(train_set.images) // options.batch_size  # per epoch
    for epoch in range(first_epoch, options.epochs):
        model.train()
        torch.manual_seed(seed_from(options.seed, epoch))  # the same dropout after --resume
        metrics = torch.zeros(steps, 3, device=options.device)
        bar = progress_bar(steps, epoch, options.batch_size)
        for step in bar:
            lr.fill_(learning_rate(epoch * steps + step, options.epochs * steps, options.lr))
            images, labels = next(batches)
            metrics[step] = train_step(images, labels)
            if step % 20 == 0 or step == steps - 1:  # rarely: reading a number waits for the GPU
                check_and_show(bar, metrics[: step + 1])
        run.save(metrics)
    run.test(test_set)
    draw_augmented(run.folder / "augmented.png", train_set, options.seed)
    draw_attention(run.folder / "attention.png", model, test_set.images[0], options)


# ---- appendix: reading your own pictures (--predict) --------------------------------------------

def open_picture(path: Path) -> Tensor:
    """A picture's brightness (h, w) from 0 to 1, its longer side 400 pixels. Raises UserError."""
    Image.MAX_IMAGE_PIXELS = 200_000_000  # allows large photos: PIL refuses only above twice this
    try:
        if path.is_dir():
            raise ValueError("the folder is empty")
        with Image.open(path) as picture:
            if picture.mode[0] in "IF":  # more than 8 bits: scaled by the picture's own range
                low, high = picture.convert("F").getextrema()
                scale = 255 / max(high - low, 1e-9)
                picture = picture.convert("F").point(lambda x: (x - low) * scale).convert("L")
            elif picture.mode in ("1", "P"):  # PIL does not average these when it resizes
                picture = picture.convert("L" if picture.mode == "1" else "RGBA")
            picture.thumbnail((400, 400))  # uses little memory, however large the picture
            ImageOps.exif_transpose(picture, in_place=True)
    except Exception as error:  # PIL raises many kinds of errors
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}): check its name, "
                        "or take a screenshot of the picture and use that") from error
    page = Image.alpha_composite(Image.new("RGBA", picture.size, "gray"), picture.convert("RGBA"))
    return pil_to_tensor(ImageOps.contain(page.convert("L"), (400, 400)))[0] / 255

def find_ink(brightness: Tensor) -> Tensor:
    """The fraction of light (h, w) that ink absorbs, by a black-hat filter (Meyer, 1979): ink is
    dark and narrow; paper, shadows and the desk are wide. A maximum over a window, then a minimum
    over it, remove the ink and leave the paper."""
    brightness = F.avg_pool2d(brightness[None], 3, stride=1, padding=1, count_include_pad=False)
    gamma = brightness**0.7  # brings a shadow closer to the paper than to the ink
    if gamma.median() < (gamma.min() + gamma.max()) / 2:  # the median is the paper: here it is dark
        brightness = 1 - brightness
    paper = F.avg_pool2d(brightness, 2, ceil_mode=True)  # half the size, for speed
    radius = max(paper.shape) // 6  # of the window
    paper = F.pad(paper, [2 * radius] * 4, mode="replicate")  # widens a desk at the edge
    for sign in (1, -1):  # maximum, minimum
        for window in ((2 * radius + 1, 1), (1, 2 * radius + 1)):
            paper = sign * F.max_pool2d(sign * paper, window, stride=1)
    paper = F.interpolate(paper[None], brightness.shape[1:], mode="bilinear")[0]
    return ((paper - brightness).clamp(min=0) / (paper + 0.1))[0]

def connected_parts(mask: Tensor) -> list[Tensor]:
    """The connected parts of a mask, each a mask. Every pixel starts with a number of its own, and
    the largest spreads until nothing changes."""
    numbers = torch.arange(1.0, mask.numel() + 1).view_as(mask) * mask
    while True:
        spread = F.max_pool2d(numbers[None], 3, stride=1, padding=1)[0] * mask
        if torch.equal(spread, numbers):
            return [numbers == number for number in numbers.unique() if number > 0]
        numbers = spread

def margins(mask: Tensor) -> Tensor:
    """Counts a mask's (h, w) empty rows at top and bottom, and empty columns left and right."""
    rows, columns = mask.any(dim=1).int(), mask.any(dim=0).int()
    return torch.stack([x.argmax() for x in (rows, rows.flip(0), columns, columns.flip(0))])

def digit_part(mask: Tensor) -> Tensor:
    """The digit in a mask of ink, without what touches the edge, a box around it, or specks."""
    squares = F.max_pool2d(mask[None].float(), 4, ceil_mode=True)[0] > 0  # bridges small gaps
    parts = sorted(connected_parts(squares), key=Tensor.sum)[-20:]  # the largest
    parts = [part for part in parts if margins(part).all()] or parts  # clear of the edge, if any
    parts = [part for part in parts if not any((margins(part) < margins(other)).all()
                                               for other in parts if 20 * other.sum() > part.sum())]
    digit = torch.stack([part for part in parts if 20 * part.sum() > parts[-1].sum()]).any(dim=0)
    return mask & digit.repeat_interleave(4, 0).repeat_interleave(4, 1)[: len(mask), : len(mask.T)]

def prepare(path: Path) -> Tensor:
    """A picture of a digit as bytes (28, 28) like MNIST's: bright on black, scaled to fit 20 x
    20 pixels, its center of mass in the middle (LeCun et al., 1998). Raises UserError."""
    ink = find_ink(open_picture(path))
    if ink.max() < max(0.1, 12 * ink.quantile(0.1)):
        raise UserError(f"{path} shows no digit that stands out from the paper: retake the picture")
    digit = digit_part(ink > ink.max() / 2)
    ink = ink * F.max_pool2d(digit[None].float(), 13, stride=1, padding=6)[0]  # with its soft edge
    top, bottom, left, right = margins(digit)
    ink = ink[top : len(ink) - bottom, left : ink.shape[1] - right]
    ink = (ink / ink.max() - 0.2).clamp(min=0) / 0.8  # the paper's noise becomes black
    while ink.mean() < 0.3:  # a thin line becomes as wide as MNIST's
        ink = F.max_pool2d(ink[None], 3, stride=1, padding=1)[0]
    height, width = (max(1, round(20 * side / max(ink.shape))) for side in ink.shape)
    ink = F.interpolate(ink[None, None], (height, width), mode="bilinear", antialias=True)[0, 0]
    top = round(13.5 - float(ink.sum(1) @ torch.arange(float(height)) / ink.sum()))
    left = round(13.5 - float(ink.sum(0) @ torch.arange(float(width)) / ink.sum()))
    return (255 * F.pad(ink / ink.max(), (left, 28 - width - left, top, 28 - height - top))).byte()

def read_pictures(model: nn.Module, options: Namespace) -> None:
    """Prints each picture's prediction. Finally, raises one UserError for all unreadable ones."""
    folder, drawn = run_folder(options, options.dataset), run_folder(options, "drawn")
    if options.dataset == "MNIST" and not folder.exists() and (drawn / "checkpoint.pt").exists():
        folder = drawn
        print("This model was trained on drawn digits: it has never seen handwriting.")
    shape = {name: x for name, x in model_options(options).items() if "dropout" not in name}
    state = load_checkpoint(folder, {"run": folder.name, **shape})  # dropout plays no part
    model.to(options.device).load_state_dict(state["model"])
    paths, errors = [], []
    for name in options.predict:
        for path in map(Path, sorted(glob.glob(name)) or [name]):  # Windows does not expand *
            files = sorted(file for file in path.rglob("[!.]*") if file.is_file())
            paths += files or [path]
    for number, path in enumerate(paths, start=1):
        try:
            image = prepare(path)
        except UserError as error:
            errors.append(str(error))
            continue
        probabilities = predict(model, image[None], options.device, options.tta)[0]
        print(f"\n{path}:   {three_best(probabilities)}")
        for row in image.tolist():  # two characters per pixel look about square
            print("".join(" .:-=+*#%@"[value * 9 // 255] * 2 for value in row).rstrip())
        draw_attention(folder / f"attention-{number}-{path.stem}.png", model, image, options)
    if errors:
        raise UserError("\n".join(errors))


if __name__ == "__main__":
    with report_errors():
        main()
