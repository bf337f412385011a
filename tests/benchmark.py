"""Speed beside its peers, measured in one run: python tests/benchmark.py [--quick]

Ratios above 1 mean that ours is faster; in the table of Muon, that it takes longer than AdamW. Let
nothing else run meanwhile. Times are medians of steps in turn, so that a machine that slows down
slows both sides.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

import common
import mini_vit
import mini_vit_augment

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def side_by_side(ours: Callable, theirs: Callable, least: float,
                 warm_up: int = 2) -> tuple[float, float]:
    """Median seconds of each, called in turn for at least so many seconds, after a warm-up."""
    for _ in range(warm_up):
        ours(), theirs()
    times, start = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < least:
        times.append((seconds(ours), seconds(theirs)))
    return tuple(map(statistics.median, zip(*times)))


def random_images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 28, 28), dtype=torch.uint8)


def training_step(model: nn.Module, images: Tensor, muon: bool = False) -> Callable:
    """A whole step on images of bytes (B, 28, 28), as the scripts do it; the same for all models.
    (Not recorded on a GPU, where a model has no say in the time that Python takes.)"""
    recipe = common.replace(mini_vit_augment.SMALL, muon=muon, device=str(DEVICE))
    labels = torch.arange(len(images), device=DEVICE) % 10
    model, images = model.to(DEVICE), images.to(DEVICE)
    whole = common.TrainingStep(model, common.make_optimizers(model, recipe), recipe)
    return lambda: whole.learn(images, labels)


def beside_torchvision(least: float, quick: bool) -> None:
    print("\na training step beside torchvision's VisionTransformer of the same sizes")
    print("| patch | dim | layers | batch | form | ours, images/s | torchvision, images/s | "
          "ratio |")
    print("|---|---|---|---|---|---|---|---|")
    compiled = (False, True) if DEVICE.type == "cuda" else (False,)
    widths = (64, 4), (64, 12), (128, 8), (192, 4), (192, 12)
    sizes = [(patch, dim, layers) for patch in (7, 4) for dim, layers in widths]
    for patch, dim, layers in sizes[:1] if quick else sizes:
        for batch in (128,) if quick else (128, 1024):
            for compile in compiled:
                images = random_images(batch)
                ours = mini_vit.ViT(layers=layers, heads=4, dim=dim, patch_size=patch)
                theirs = torchvision.models.VisionTransformer(28, patch, layers, 4, dim, 4 * dim,
                                                              num_classes=10)
                theirs.conv_proj = nn.Conv2d(1, dim, patch, patch)
                if compile:
                    ours.compile(), theirs.compile()
                a, b = side_by_side(training_step(ours, images), training_step(theirs, images),
                                    least)
                form = "compiled" if compile else "eager"
                print(f"| {patch} | {dim} | {layers} | {batch} | {form} | {batch / a:.0f} | "
                      f"{batch / b:.0f} | {b / a:.2f} |", flush=True)


class PerHead(nn.Module):
    """The earlier experiment's attention over features: 14 separate heads, each with three linear
    layers."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        width = dim // heads
        self.heads = nn.ModuleList(
            nn.ModuleList(nn.Linear(dim, width, bias=False) for _ in range(3))
            for _ in range(heads))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        outs = []
        for query, key, value in self.heads:
            scores = query(x)[:, :, None] * key(context)[:, None, :]
            outs.append((scores.softmax(-1) @ value(context)[:, :, None]).squeeze(2))
        return self.proj(torch.cat(outs, dim=1))


class Identity(common.FeatureAttention):
    """Attention whose d x d part is the identity on the values."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.proj(self.query(x) * 0 + self.key(context) * 0 + self.value(context))


def flat(attention: type | None, layers: int) -> nn.Module:
    model = mini_vit.ViT(layers=layers, heads=14, dim=784, patch_size=28)
    for block in model.blocks if attention else ():
        block.attention = attention(784, 14)
    return model


def flat_model(least: float, quick: bool) -> None:
    print("\na training step of the flat full-size model, batch 256")
    print("| layers | against | ours, s | theirs, s | ratio theirs / ours |\n|---|---|---|---|---|")
    layers = 2 if quick else 16
    images = random_images(256)
    for what, attention in {"per-head loop": PerHead, "d x d part left out": Identity}.items():
        a, b = side_by_side(training_step(flat(None, layers), images),
                            training_step(flat(attention, layers), images), least, warm_up=1)
        print(f"| {layers} | {what} | {a:.3f} | {b:.3f} | {b / a:.2f} |", flush=True)
    x = torch.randn(256, 784, device=DEVICE, requires_grad=True)
    one, loop = common.FeatureAttention(784, 14).to(DEVICE), PerHead(784, 14).to(DEVICE)
    a, b = side_by_side(lambda: one(x, x).sum().backward(), lambda: loop(x, x).sum().backward(),
                        least)
    print(f"| attention alone, no step | per-head loop | {a:.3f} | {b:.3f} | {b / a:.2f} |",
          flush=True)


def augmentation(least: float, quick: bool) -> None:
    print("\naugmentation, images a second in one process with one thread")
    print("| ours | images/s | PIL, one image at a time | ratio |\n|---|---|---|---|")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    images = common.draw_digits(512, seed=0).images
    pictures = [Image.fromarray(image.numpy()) for image in images[:64]]
    usual = v2.Compose([v2.RandomRotation(10),
                        v2.RandomAffine(0, (0.05, 0.05), (0.9, 1.1), shear=5),
                        v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    random = common.generator(0)
    for what, bend in {"no bend": 0.0, "with bend": 0.8}.items():
        a, b = side_by_side(lambda: mini_vit_augment.augment(images, random, bend=bend),
                            lambda: [usual(picture) for picture in pictures], least)
        print(f"| {what} | {512 / a:.0f} | {64 / b:.0f} | {(512 / a) / (64 / b):.1f} |", flush=True)
    torch.set_num_threads(threads)


def loaders(least: float, quick: bool) -> None:
    small = DEVICE.type == "cpu"
    print("\na training step with its loader against one on a batch that is already on the device"
          + (" (--small)" if small else ""))
    print("| workers | with loader, ms | on the device, ms | slower by |\n|---|---|---|---|")
    recipe = mini_vit_augment.SMALL if small else mini_vit_augment.FULL
    digits = common.draw_digits(10_000, seed=0)
    for workers in (0, 1) if quick else (0, 1, 2, 4):
        recipe = common.replace(recipe, workers=workers, device=str(DEVICE), epochs=1000)
        model = mini_vit.ViT(**recipe.sizes()).to(DEVICE)
        whole = common.TrainingStep(model, common.make_optimizers(model, recipe), recipe)
        stream = mini_vit_augment.augmented_batches(digits, recipe, 0)
        some = [part.to(DEVICE) for part in next(stream)]

        def steps(source: object, count: int = 50) -> None:
            common.train_epoch(whole, source, count, recipe, 0)

        a, b = side_by_side(lambda: steps(stream), lambda: steps(iter([some] * 50)), least,
                            warm_up=1)
        print(f"| {workers} | {a * 20:.1f} | {b * 20:.1f} | {a / b - 1:.1%} |", flush=True)
        del stream


def muon_beside_adamw(least: float, quick: bool) -> None:
    print("\na training step of --small, 128 digits, with AdamW and with Muon")
    print("| model | with AdamW, ms | with Muon, ms | slower by a factor of |\n|---|---|---|---|")
    images = random_images(128)
    embeddings = {"patches of 7": {"patch_size": 7, "overlap": 0, "input_dropout": 0.0},
                  "patches of 4, overlap 4, input dropout 0.5":
                      {"patch_size": 4, "overlap": 4, "input_dropout": 0.5}}
    for what, changes in embeddings.items():
        sizes = {**mini_vit_augment.SMALL.sizes(), **changes}
        adamw, muon = (training_step(mini_vit.ViT(**sizes), images, muon)
                       for muon in (False, True))
        a, b = side_by_side(adamw, muon, least)
        print(f"| {what} | {1000 * a:.1f} | {1000 * b:.1f} | {b / a:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rows and readings")
    tables = {"augmentation": augmentation, "loaders": loaders, "flat": flat_model,
              "torchvision": beside_torchvision, "muon": muon_beside_adamw}
    parser.add_argument("--only", choices=tables)
    options = parser.parse_args()
    threads = f"{torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else threads
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, {DEVICE} ({name})")
    for name, table in tables.items():
        if options.only in (None, name):
            table(0.5 if options.quick else 5.0, options.quick)


if __name__ == "__main__":
    main()
