"""mini_vit.py: a transformer that sees the whole digit as one vector.

    python mini_vit.py             16 layers, 14 heads x 56 = 784 wide, 118M parameters, for a GPU
    python mini_vit.py --small     the paper's ViT on patches of 7 x 7 pixels, 0.2M parameters, for a CPU

Measured on MNIST's test set (seeds 0, 1, 2): 99.147 % +- 0.035, 36 epochs in 8 minutes, shared H100.
--small 99.22 % +- 0.03, 36 epochs of 16 s on two cores of an AMD EPYC; --small --patch-size 4
--input-dropout 0.5 --muon --lr 5e-3 --weight-decay 0.3 --epochs 50: 99.387 % +- 0.021, epochs of 43 s.

The flat 28 x 28 image goes into the first block as it is, with no projection. A transformer works on a
sequence of tokens, and this is a sequence of one: so attention is over features, see Attention in common.py.
With patches, the same class is the ViT of Dosovitskiy et al. (2020, arXiv 2010.11929).
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import RANK, RANKS, Attention, Block, Problem, Recipe, generator, normalise, run, sheet

FULL = Recipe(layers=16, heads=14, dim=784, patch_size=28, dropout=0.1, input_dropout=0.2,
              adversarial=2.0, epochs=36, batch_size=512, lr=3e-4, weight_decay=2.0)
SMALL = Recipe(small=True, layers=4, heads=4, dim=64, patch_size=7, dropout=0.1, input_dropout=0.3,
               epochs=36, batch_size=128, lr=2e-3, weight_decay=0.05)


class PatchEmbedding(nn.Module):
    """Images (B, C, S, S) to tokens (B, N, D): a class token, then one a patch, N = 1 + (S / patch_size)^2.

    One linear layer takes each patch, with `overlap` pixels around it (Yuan et al., 2021, arXiv 2101.11986).
    The class token, which will carry the answer, goes first. A learned vector is added for each place, or no
    place could be told from another. Training leaves out a share `dropout` of the patches (PatchDropout, Liu
    et al., 2022, arXiv 2208.07220), so N is smaller. Raises Problem when patches do not fill the image."""

    def __init__(self, dim: int, patch_size: int, image_size: int, channels: int, overlap: int = 0,
                 dropout: float = 0) -> None:
        super().__init__()
        if image_size % patch_size:
            raise Problem(f"--patch-size {patch_size} does not divide {image_size} pixels: choose another")
        self.dropout, window = dropout, patch_size + 2 * overlap
        self.unfold = nn.Unfold(window, padding=overlap, stride=patch_size)
        self.linear = nn.Linear(channels * window**2, dim)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (image_size // patch_size) ** 2, dim))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.unfold(images).mT  # (B, N - 1, C * (patch_size + 2 * overlap)^2)
        tokens = self.linear(patches) + self.positions[:, 1:]  # (B, N - 1, D)
        if self.training and self.dropout:
            order = torch.rand(tokens.shape[:2], device=tokens.device).argsort(dim=1)  # one for each image
            kept = order[:, : max(1, round(tokens.shape[1] * (1 - self.dropout)))]
            tokens = tokens.take_along_dim(kept.unsqueeze(-1), dim=1)  # (B, fewer, D)
        class_tokens = (self.class_token + self.positions[:, :1]).expand(len(images), -1, -1)  # (B, 1, D)
        return torch.cat([class_tokens, tokens], dim=1)  # (B, N, D)


def embedding(dim: int, patch_size: int, overlap: int, dropout: float, image_size: int = 28,
              channels: int = 1) -> nn.Module:
    """What images go through first: a PatchEmbedding; or, where the patch is the whole image, only a change
    of shape to (B, D) and dropout. Raises Problem when a flat image is not `dim` wide, or is to overlap."""
    if patch_size != image_size:
        return PatchEmbedding(dim, patch_size, image_size, channels, overlap, dropout)
    width = channels * image_size**2
    if dim != width or overlap:
        raise Problem(f"a flat image needs --dim {width} and no --overlap: give these, or smaller patches")
    return nn.Sequential(nn.Flatten(), nn.Dropout(dropout))


class Head(nn.Module):
    """A flat image (B, D), or the class token of (B, N, D), to logits (B, classes)."""

    def __init__(self, dim: int, classes: int = 10) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.linear = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            x = x[:, 0]  # (B, D)
        return self.linear(self.norm(x))


class ViT(nn.Module):
    """Images (B, channels, image_size, image_size) to logits (B, classes).

    With a patch as big as the image it is flat, and a block sees (B, D). With smaller ones it is the paper's
    ViT, and a block sees (B, N, D). ViT-B/16 is layers=12, heads=12, dim=768, patch_size=16, image_size=224,
    channels=3, classes=1000."""

    def __init__(self, *, layers: int, heads: int, dim: int, patch_size: int, overlap: int = 0,
                 dropout: float = 0.0, input_dropout: float = 0.0, image_size: int = 28, channels: int = 1,
                 classes: int = 10) -> None:
        super().__init__()
        self.embed = embedding(dim, patch_size, overlap, input_dropout, image_size, channels)
        qkv_bias = patch_size < image_size  # the paper's ViT has one; nothing else here does
        self.blocks = nn.Sequential(*(Block(dim, heads, dropout, qkv_bias) for _ in range(layers)))
        self.head = Head(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(images)))


def sample_numbers(size: int, recipe: Recipe, first_epoch: int = 0) -> Iterator[Tensor]:
    """All batches from `first_epoch` on, in an order that follows from seed and epoch. Number n is digit
    n % size in epoch n // size: none comes twice, so each can be augmented anew. Only whole batches."""
    for epoch in range(first_epoch, recipe.epochs):
        numbers = torch.randperm(size, generator=generator(recipe.seed, epoch)) + epoch * size
        for batch in numbers.split(recipe.batch_size)[: size // recipe.batch_size]:
            yield batch[RANK::RANKS]  # with several GPUs, each takes its share of a batch


def plain_batches(images: Tensor, labels: Tensor, recipe: Recipe, first_epoch: int = 0) -> Iterator:
    """The batches of all epochs. All digits lie on the device (47 MB), where a batch is one indexing away."""
    images, labels = images.to(recipe.device), labels.to(recipe.device)
    for numbers in sample_numbers(len(images), recipe, first_epoch):
        index = (numbers % len(images)).to(recipe.device, non_blocking=recipe.device.startswith("cuda"))
        yield images[index], labels[index]


@torch.no_grad()
def show_attention(out: Path, model: nn.Module, images: Tensor, test_images: Tensor, recipe: Recipe) -> None:
    """Draws attention.png: a row for each Attention of the model, a column a head, the largest weight of each
    in full orange. Flat: d x d, row i for query i. Patches: what the class token takes from each."""
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    Attention.fused = False
    with torch.compiler.set_stance("force_eager"):
        model(normalise(test_images[:1].to(recipe.device)))
    Attention.fused = True
    weights = torch.cat([layer.weights.cpu() for layer in layers])  # (layers, H, d, d) or (layers, H, N, N)
    ink = torch.zeros(1)
    if recipe.patch_size < 28:
        weights = weights[:, :, 0, 1:].unflatten(-1, (28 // recipe.patch_size, -1))
        weights, ink = F.interpolate(weights, (28, 28)), test_images[0] / 255
    share = (weights / weights.amax((2, 3), keepdim=True)).flatten(0, 1).unsqueeze(-1)
    paper = 1 - share * torch.tensor([0.0, 0.5, 1.0])  # from white to orange
    names = [f"no. {i + 1}, head {j + 1}" for i in range(len(layers)) for j in range(recipe.heads)]
    sheet(out / "attention.png", (255 * paper * (1 - ink.unsqueeze(-1))).byte(), names, recipe.heads)


def main() -> None:
    from mini_vit_augment import read_pictures  # here, because that script imports this one

    run(__file__, __doc__, ViT, FULL, SMALL, plain_batches, read_pictures, show_attention)


if __name__ == "__main__":
    main()
