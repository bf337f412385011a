"""Measures speed against alternatives: python tests/benchmark.py [--quick] [--only TABLE]

The two sides of a row run in turn, and times are medians. Run nothing else meanwhile.
"""

import argparse
import statistics
import sys
import time
from argparse import Namespace
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
import mini_vit_concat
import mini_vit_crossattn

DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")

def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start

def print_header(title: str, row: str, one: str, other: str) -> None:
    print(f"\n{title}\n\n| {row} | {one}, ms | {other}, ms | {other} / {one} |\n|---|---|---|---|")

def compare(row: str, one: Callable, other: Callable, quick: bool) -> None:
    """Prints a row: the median times of both, called in turn."""
    one(), other()
    times, start = [], time.perf_counter()
    while len(times) < (1 if quick else 3) or time.perf_counter() - start < (0.3 if quick else 5):
        times.append((1000 * seconds(one), 1000 * seconds(other)))
    first, second = (statistics.median(side) for side in zip(*times))
    print(f"| {row} | {first:.1f} | {second:.1f} | {second / first:.2f} |", flush=True)

def build(model_class: type, recipe: dict, **changes: object) -> nn.Module:
    """A model of a script's FULL or SMALL."""
    defaults = dict(overlap=0, dropout=0.0, input_dropout=0.0)
    return model_class(**common.model_options(Namespace(**{**defaults, **recipe, **changes})))

def training_step(model: nn.Module, muon: bool = False) -> Callable:
    """The scripts' training step, the same for all models."""
    model.to(DEVICE)
    optimizers = common.make_optimizers(model, torch.full((), 1e-3, device=DEVICE),
                                        Namespace(device=DEVICE, muon=muon, weight_decay=0.05))

    def train_step(images: Tensor, labels: Tensor) -> Tensor:
        with common.mixed_precision(DEVICE):
            loss = F.cross_entropy(model(common.normalize(images)), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return train_step

def compare_steps(row: str, one: Callable, other: Callable, batch_size: int, quick: bool) -> None:
    """Training steps on the same batch, without a CUDA graph."""
    images = torch.randint(0, 256, (batch_size, 28, 28), dtype=torch.uint8, device=DEVICE)
    labels = torch.arange(batch_size, device=DEVICE) % 10
    compare(row, lambda: one(images, labels), lambda: other(images, labels), quick)

def augmentation(quick: bool) -> None:
    print_header("Augmenting 512 digits on one thread", "ours", "ours", "torchvision on PIL images")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images, random = common.draw_digits(512, seed=0).images, common.generator(0)
    pictures = [Image.fromarray(image.numpy()) for image in images]
    theirs = v2.Compose([v2.RandomRotation(10), v2.RandomAffine(0, (0.05, 0.05), (0.9, 1.1), 5),
                         v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
    for row, bend in {"without elastic deformation": 0.0, "with elastic deformation": 0.8}.items():
        compare(row, lambda: mini_vit_augment.augment(images, random, bend=bend),
                lambda: [theirs(picture) for picture in pictures], quick)
    torch.set_num_threads(threads)

def torchvisions(quick: bool) -> None:
    print_header("A training step of a ViT (ours computes only the class token in the last block)",
                 "model", "ours", "torchvision")
    sizes = [(7, 64, 4, 128), (4, 64, 4, 128), (4, 64, 12, 128), (4, 192, 12, 128),
             (7, 64, 4, 1024), (4, 192, 4, 1024)]
    for patch, dim, layers, batch in sizes[:2] if quick else sizes:
        ours = mini_vit.ViT(layers=layers, heads=4, dim=dim, patch_size=patch)
        theirs = torchvision.models.VisionTransformer(28, patch, layers, 4, dim, 4 * dim,
                                                      num_classes=10)
        theirs.conv_proj = nn.Conv2d(1, dim, patch, patch)  # for one channel
        compare_steps(f"patch {patch}, dim {dim}, {layers} layers, batch {batch}",
                      training_step(ours), training_step(theirs), batch, quick)

def class_token(quick: bool) -> None:
    print_header("A training step of the small models, with all tokens or only the class token in "
                 "the last block", "script", "all tokens", "class token")
    for script, model_class in {mini_vit: mini_vit.ViT, mini_vit_augment: mini_vit.ViT,
                                mini_vit_concat: mini_vit_concat.ConcatViT,
                                mini_vit_crossattn: mini_vit_crossattn.CrossViT}.items():
        whole, class_token = (build(model_class, script.SMALL) for _ in range(2))
        for module in whole.modules():
            module.class_token_only = False  # only blocks have it
        compare_steps(f"{script.__name__}.py", training_step(whole, muon=True),
                      training_step(class_token, muon=True), 128, quick)

def main() -> None:
    tables = {"augmentation": augmentation, "torchvision": torchvisions, "class-token": class_token}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few measurements, one thread")
    parser.add_argument("--only", choices=tables, metavar="TABLE", help=", ".join(tables))
    options = parser.parse_args()
    torch.set_num_threads(1 if options.quick else torch.get_num_threads())
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, on "
          f"{torch.cuda.get_device_name() if DEVICE.type == 'cuda' else DEVICE}, "
          f"{torch.get_num_threads()} threads")
    for name in [options.only] if options.only else tables:
        tables[name](options.quick)

if __name__ == "__main__":
    main()
