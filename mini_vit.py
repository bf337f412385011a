"""mini_vit.py: a transformer that sees the whole digit as one vector.

    python mini_vit.py             16 layers, 14 heads x 56 = 784 wide, 118M parameters, for a GPU
    python mini_vit.py --small     the paper's ViT on patches of 4 x 4 pixels, 0.2M, for a CPU

Measured on MNIST's test set (seeds 0, 1, 2): 99.147 % +- 0.035, 36 epochs in 8 minutes on a shared
H100. --small 99.423 % +- 0.040, 18 epochs in 15.7 minutes on two cores of an AMD EPYC.

The flat 28 x 28 image goes into the first block as it is, with no projection. A transformer works
on a sequence of tokens, and this is a sequence of one: so attention is over the token's features,
see FeatureAttention in common.py. It soon knows its training digits by heart; so it learns each a
second time, changed for the worst (adversarial). With patches, the same class is the ViT of
Dosovitskiy et al. (2020, arXiv 2010.11929).
"""

import torch
from torch import Tensor, nn

from common import (Block, Problem, Recipe, Run, TrainingStep, draw_attention, faults_told,
                    load_digits, make_optimizers, make_ready, plain_batches, print_mean,
                    read_options, read_pictures, train_epoch)

FULL = Recipe(layers=16, heads=14, dim=784, patch_size=28, dropout=0.1, input_dropout=0.2,
              adversarial=2.0, epochs=36, batch_size=512, lr=3e-4, weight_decay=2.0)
SMALL = Recipe(layers=4, heads=4, dim=64, patch_size=4, overlap=4, dropout=0.1, input_dropout=0.5,
               epochs=18, batch_size=128, lr=6e-3, weight_decay=0.1, muon=True)


class PatchEmbedding(nn.Module):
    """Images (B, C, S, S) to tokens (B, N, D): a class token, then one for each patch.

    One linear layer takes each patch, with `overlap` pixels around it (Yuan et al., 2021, arXiv
    2101.11986). The class token, which will carry the answer, goes first. A learned vector is added
    for each place, or no place could be told from another. Training leaves out a share `dropout` of
    the patches (PatchDropout, Liu et al., 2022, arXiv 2208.07220), so N is smaller. Raises Problem
    when patches do not fill the image.
    """

    def __init__(self, dim: int, patch_size: int, image_size: int, channels: int, overlap: int = 0,
                 dropout: float = 0.0) -> None:
        super().__init__()
        if image_size % patch_size:
            raise Problem(f"--patch-size {patch_size} does not divide {image_size} pixels: "
                          "choose another")
        self.dropout = dropout
        window = patch_size + 2 * overlap
        self.unfold = nn.Unfold(window, padding=overlap, stride=patch_size)
        self.linear = nn.Linear(channels * window**2, dim)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (image_size // patch_size)**2, dim))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.unfold(images).mT  # (B, N - 1, C * window^2)
        tokens = self.linear(patches) + self.positions[:, 1:]  # (B, N - 1, D)
        if self.training and self.dropout:
            tokens = self.leave_out(tokens)
        class_token = self.class_token + self.positions[:, :1]
        class_tokens = class_token.expand(len(images), -1, -1)  # (B, 1, D)
        return torch.cat([class_tokens, tokens], dim=1)  # (B, N, D)

    def leave_out(self, tokens: Tensor) -> Tensor:
        """Keeps a random choice of each image's tokens."""
        count = max(1, round(tokens.shape[1] * (1 - self.dropout)))
        order = torch.rand(tokens.shape[:2], device=tokens.device).argsort(dim=1)
        return tokens.take_along_dim(order[:, :count, None], dim=1)  # (B, count, D)


def embedding(dim: int, patch_size: int, overlap: int, dropout: float, image_size: int = 28,
              channels: int = 1) -> nn.Module:
    """What images go through first: a PatchEmbedding; or, where the patch is the whole image, only
    a change of shape to (B, D), and dropout. Raises Problem when a flat image is not D wide."""
    if patch_size != image_size:
        return PatchEmbedding(dim, patch_size, image_size, channels, overlap, dropout)
    width = channels * image_size**2
    if dim != width or overlap:
        raise Problem(f"a flat image needs --dim {width} and no --overlap: give these, or smaller "
                      "patches")
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

    With a patch as big as the image it is flat, and a block sees (B, D). With smaller ones it is
    the paper's ViT, and a block sees (B, N, D). ViT-B/16 is layers=12, heads=12, dim=768,
    patch_size=16, image_size=224, channels=3, classes=1000.
    """

    def __init__(self, *, layers: int, heads: int, dim: int, patch_size: int, overlap: int = 0,
                 dropout: float = 0.0, input_dropout: float = 0.0, image_size: int = 28,
                 channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        flat = patch_size == image_size
        self.embed = embedding(dim, patch_size, overlap, input_dropout, image_size, channels)
        self.blocks = nn.Sequential()
        for _ in range(layers):  # only the paper's queries, keys and values have biases
            self.blocks.append(Block(dim, heads, flat=flat, dropout=dropout, qkv_bias=not flat))
        self.head = Head(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(images)))


def main() -> None:
    options = read_options(__doc__, FULL, SMALL)
    if options.predict:
        return read_pictures(ViT(**options.sizes()), options)
    digits, test_digits = load_digits(options)
    steps = len(digits.images) // options.batch_size  # of an epoch
    accuracies = []
    for recipe in options.each_seed():
        model = make_ready(ViT(**recipe.sizes()), recipe)
        optimizers = make_optimizers(model, recipe)
        training_step = TrainingStep(model, optimizers, recipe)
        run = Run(recipe, model, digits)
        first_epoch = run.load(model, optimizers)  # not 0 where a stopped run goes on
        batches = plain_batches(digits, recipe, first_epoch)
        for epoch in range(first_epoch, recipe.epochs):
            loss, accuracy = train_epoch(training_step, batches, steps, recipe, epoch)
            run.save(model, optimizers, loss, accuracy)
        accuracies.append(run.test(model, test_digits))
        draw_attention(run.folder / "attention.png", model, test_digits.images[0], recipe)
    print_mean(accuracies)


if __name__ == "__main__":
    with faults_told():
        main()
