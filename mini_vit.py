"""mini_vit.py: a transformer that sees the whole digit as one vector.

    python mini_vit.py            full size, 118M parameters; without a CUDA GPU, the small model
    python mini_vit.py --small    a ViT on patches of 4 x 4 pixels, 0.2M parameters

MNIST test accuracy, mean and standard deviation over seeds 0, 1, 2:
full size 99.15 +- 0.04%, 36 epochs in 7.7 minutes on an H100 that trained six models at once.
small     99.47 +- 0.01%, 22 epochs in 12.4 minutes on two cores of an Intel Xeon.

At full size (16 layers, 14 heads x 56 = 784 wide), the flat 28 x 28 image goes into the first block
as it is, with no projection. A transformer works on a sequence of tokens, and this is a sequence of
one, so attention is over the token's features: see FeatureAttention in common.py. A network so big
soon memorizes its training digits, so it also trains on adversarial examples. With patches, ViT is
the model of Dosovitskiy et al. (2020, arXiv 2010.11929).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (Block, CudaGraph, Run, UserError, check_and_show, draw_attention, load_digits,
                    make_optimizers, make_parser, mixed_precision, model_options, normalize,
                    plain_batches, progress_bar, report_errors, seed_from)

FULL = dict(layers=16, heads=14, dim=784, patch_size=28, dropout=0.1, input_dropout=0.2,
            adversarial=2.0, epochs=36, batch_size=512, lr=3e-4, weight_decay=2.0)
SMALL = dict(layers=4, heads=4, dim=64, patch_size=4, overlap=4, dropout=0.1, input_dropout=0.5,
             epochs=22, batch_size=128, lr=6e-3, weight_decay=0.1, muon=True)


class PatchEmbedding(nn.Module):
    """Images (B, C, S, S) to tokens (B, N, D): a class token, then one for each patch.

    A linear layer maps each patch, extended by `overlap` pixels on each side (Yuan et al., 2021,
    arXiv 2101.11986), to a token. The class token, from which the prediction is read, comes first.
    Attention does not know where a token came from, so a learned vector for its position is added.
    Training drops a fraction `dropout` of the patches (PatchDropout, Liu et al., 2022, arXiv
    2208.07220), so N is smaller in training. Raises UserError if patches do not fill the image."""

    def __init__(self, dim: int, patch_size: int, image_size: int, channels: int, overlap: int = 0,
                 dropout: float = 0.0) -> None:
        super().__init__()
        if image_size % patch_size:
            raise UserError(f"--patch-size {patch_size} must divide {image_size}: choose another")
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
            tokens = self.drop_patches(tokens)
        class_token = self.class_token + self.positions[:, :1]  # (1, 1, D)
        return torch.cat([class_token.expand(len(images), -1, -1), tokens], dim=1)  # (B, N, D)

    def drop_patches(self, tokens: Tensor) -> Tensor:
        """Puts each image's tokens into a random order, and keeps the first ones."""
        count = max(1, round(tokens.shape[1] * (1 - self.dropout)))
        order = torch.rand(tokens.shape[:2], device=tokens.device).argsort(dim=1)
        return tokens.take_along_dim(order[:, :count, None], dim=1)  # (B, count, D)


def make_embedding(dim: int, patch_size: int, overlap: int, dropout: float, image_size: int = 28,
                   channels: int = 1) -> nn.Module:
    """The first stage of a model: a PatchEmbedding or, if the patch is the whole image, just a
    reshape to (B, D) and dropout of pixels. Raises UserError if a flat image is not D wide."""
    if patch_size != image_size:
        return PatchEmbedding(dim, patch_size, image_size, channels, overlap, dropout)
    width = channels * image_size**2
    if dim != width or overlap:
        raise UserError(f"a flat image needs --dim {width} and --overlap 0: pass both")
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

    If the patch is the whole image, the model is flat, and its blocks work on (B, D). With smaller
    patches it is the paper's ViT, and its blocks work on (B, N, D). ViT-B/16 is layers=12,
    heads=12, dim=768, patch_size=16, image_size=224, channels=3, classes=1000."""

    def __init__(self, *, layers: int, heads: int, dim: int, patch_size: int, overlap: int = 0,
                 dropout: float = 0.0, input_dropout: float = 0.0, image_size: int = 28,
                 channels: int = 1, classes: int = 10) -> None:
        super().__init__()
        flat = patch_size == image_size
        self.embed = make_embedding(dim, patch_size, overlap, input_dropout, image_size, channels)
        self.blocks = nn.Sequential()
        for _ in range(layers):  # as in the paper, queries, keys and values of patches have biases
            self.blocks.append(Block(dim, heads, flat=flat, dropout=dropout, qkv_bias=not flat))
        self.blocks[-1].class_token_only = not flat  # the head reads no other token
        self.head = Head(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(images)))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warmup over the first tenth of all steps, then cosine decay to zero."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def add_adversarial_gradients(model: nn.Module, images: Tensor, labels: Tensor,
                              size: float) -> None:
    """Makes adversarial examples of the images with the fast gradient method (Goodfellow et al.,
    2014, arXiv 1412.6572), and adds their gradients to those that the model already has.

    Each image moves along its own gradient, the direction in which its loss grows fastest, by an L2
    distance of `size`. Turning one pixel from black to white is a distance of 1, or of 1 / 0.3081
    in normalized images. Call it after the backward pass, which computes images.grad."""
    direction = F.normalize(images.grad.flatten(1)).view_as(images)
    examples = (images.detach() + direction * size / 0.3081).requires_grad_()  # avoids recompiling
    with mixed_precision(images.device):
        loss = F.cross_entropy(model(examples), labels)
    loss.backward()


def main() -> None:
    options = make_parser(__doc__, FULL, SMALL).parse_args()
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

    batches = plain_batches(train_set, options, first_epoch)  # one iterator for all epochs
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
    draw_attention(run.folder / "attention.png", model, test_set.images[0], options)


if __name__ == "__main__":
    with report_errors():
        main()
