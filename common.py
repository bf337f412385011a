"""What the four scripts share, leaf to root, in six chapters:

    1  attention and blocks      3  training      5  pictures, drawn and read
    2  digits and batches        4  runs          6  the command line

Letters in the comments on shapes: B images, N tokens, D width of a token, H heads, d = D / H width
of a head. What a `recipe` holds is in chapter 6."""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import math
import os
import shlex
import shutil
import signal
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.serialization
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

# torchrun starts a process for each GPU, and numbers them; any other run is process 0 of 1.
BY_TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
RANK = int(os.environ["RANK"]) if BY_TORCHRUN else 0
RANKS = int(os.environ["WORLD_SIZE"]) if BY_TORCHRUN else 1

class Problem(ValueError):
    """An error that the user can mend: a sentence that says what is wrong and what to do."""

# ---- 1. attention and blocks --------------------------------------------------------------------

class Attention(nn.Module):
    """Scaled dot-product attention in several heads (Vaswani et al., 2017, arXiv 1706.03762):

        weights = softmax(query @ key^T / sqrt(d)),   out = weights @ value

    Queries come from x (B, N, D), keys and values from context (B, M, D): in self-attention, x
    again. Each head works on d of the D numbers. The result has the shape of x. Raises Problem if
    the heads do not divide the width."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool = False) -> None:
        super().__init__()
        if dim % heads:
            raise Problem(f"{heads} heads do not divide a width of {dim}: change --heads or --dim")
        self.heads = heads
        self.query = nn.Linear(dim, dim, bias=qkv_bias)
        self.key = nn.Linear(dim, dim, bias=qkv_bias)
        self.value = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, H, N, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, split into heads."""
        query, key, value = self.query(x), self.key(context), self.value(context)
        return self.split(query), self.split(key), self.split(value)

    def weights(self, x: Tensor, context: Tensor) -> Tensor:
        """For draw_attention: how much of each value (a column) goes into each result (a row). The
        formula's first half, (B, H, N, M), or in FeatureAttention (B, H, d, d)."""
        query, key, _ = self.project(x, context)
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        return scores.softmax(dim=-1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        query, key, value = self.project(x, context)
        out = F.scaled_dot_product_attention(query, key, value)  # both halves; stores no weights
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, H, N, d) to (B, N, D)

class FeatureAttention(Attention):
    """Attention inside a flat image: x and context are (B, D), and so is the result.

    A flat image is a single token, and softmax over a single score is always 1. So here the d
    numbers of a head attend to each other: they are taken as d tokens of width 1, and

        weights[i, j] = softmax_j(query[i] * key[j]),   out[i] = sum_j weights[i, j] * value[j]

    (the square root above is that of the width, here 1). For one token it is the cross-covariance
    attention of El-Nouby et al. (2021, arXiv 2106.09681)."""

    def split(self, x: Tensor) -> Tensor:
        """(B, D) to (B, H, d, 1)."""
        return x.unflatten(-1, (self.heads, -1)).unsqueeze(-1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        query, key, value = self.project(x, context)
        if torch.compiler.is_compiling():  # the formula; the compiler makes a fast program of it
            weights = (query * key.mT).softmax(dim=-1)  # (B, H, d, d)
            out = (weights * value.mT).sum(dim=-1)  # (B, H, d)
        else:  # the same in one call, which stores no weights
            out = F.scaled_dot_product_attention(query, key, value)  # (B, H, d, 1)
        return self.proj(out.flatten(1))  # (B, D)

class Block(nn.Module):
    """A pre-norm transformer block. Its input, (B, N, D) or flat (B, D), keeps its shape."""

    def __init__(self, dim: int, heads: int, *, flat: bool, dropout: float = 0.0,
                 qkv_bias: bool = False) -> None:
        super().__init__()
        kind = FeatureAttention if flat else Attention
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = kind(dim, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    @torch.compiler.nested_compile_region  # blocks are alike: one is compiled, for all
    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.dropout(self.attention(normed, normed))
        return x + self.dropout(self.mlp(self.norm2(x)))

# ---- 2. digits and batches ----------------------------------------------------------------------

class Digits(NamedTuple):
    """Part of the data set `name`: images are bytes (count, 28, 28), labels numbers (count)."""
    name: str
    images: Tensor
    labels: Tensor

def normalise(images: Tensor) -> Tensor:
    """Bytes (B, 28, 28) to floats (B, 1, 28, 28) of mean 0 and variance 1 over MNIST's pixels."""
    return (images.unsqueeze(1) / 255 - 0.1307) / 0.3081

def seed_from(*numbers: int) -> int:
    """A seed of 32 bits that follows from all of these, in every run the same."""
    return hash(numbers) % 2**32

def generator(*numbers: int) -> torch.Generator:
    """Random numbers that follow from all of these."""
    return torch.Generator().manual_seed(seed_from(*numbers))

def draw_digits(count: int, seed: int) -> Digits:
    """Stand-in digits of PIL's own font, each turned, sized and moved at random."""
    page = Image.new("L", (28, 280))
    font = ImageFont.load_default(24)
    for digit in range(10):
        ImageDraw.Draw(page).text((14, 28 * digit + 14), str(digit), 255, font, anchor="mm")
    ten, labels = pil_to_tensor(page).float().view(10, 1, 28, 28), torch.arange(count) % 10
    affine = torch.eye(2, 3) + 0.15 * torch.randn(count, 2, 3, generator=generator(seed))
    grid = F.affine_grid(affine, [count, 1, 28, 28], align_corners=False)
    images = F.grid_sample(ten[labels], grid, align_corners=False)
    return Digits("drawn", images.squeeze(1).byte(), labels)

def check_files(source: type, folder: Path) -> None:
    """Raises Problem for a damaged file. (torchvision does not check what is unpacked already.)"""
    for file, md5 in source.resources:
        packed = folder / file
        unpacked = packed.with_suffix("")
        if packed.exists() and not torchvision.datasets.utils.check_integrity(packed, md5):
            raise Problem(f"{packed} is damaged: replace it, or delete it to download it again")
        if packed.exists() and unpacked.exists():
            if gzip.decompress(packed.read_bytes()) != unpacked.read_bytes():
                raise Problem(f"{unpacked} is damaged: delete it, and it is unpacked again")

def find_digits(name: str | None, data_dir: str) -> tuple[Digits, Digits]:
    """A data set's training and test digits, from disk or else from the network. No name means
    MNIST, or failing that drawn digits and a warning. Raises Problem."""
    if name == "drawn":
        return draw_digits(10_000, seed=0), draw_digits(2_000, seed=1)
    source = getattr(torchvision.datasets, name or "MNIST")
    folder = Path(data_dir, source.__name__, "raw")
    check_files(source, folder)
    socket.setdefaulttimeout(30)  # seconds to wait for an answer
    try:
        train = source(data_dir, train=True, download=True)
        test = source(data_dir, train=False, download=True)
    except (OSError, RuntimeError, ValueError) as error:
        files = ", ".join(file for file, md5 in source.resources)
        missing = (f"{source.__name__} is not on disk, or not whole, and cannot be downloaded "
                   f"({' '.join(str(error).split())}): put {files} into {folder}, or choose "
                   "--dataset drawn")
        if name:
            raise Problem(missing) from error
        print(f"{'!' * 99}\nWARNING: {missing}\nThis run goes on with DRAWN digits, which say "
              f"nothing about MNIST.\n{'!' * 99}", file=sys.stderr)
        return find_digits("drawn", data_dir)
    name = source.__name__
    return Digits(name, train.data, train.targets), Digits(name, test.data, test.targets)

def load_digits(recipe: Recipe) -> tuple[Digits, Digits]:
    """The digits to train on, and those to test on: with --validate the last 5,000 of training."""
    found = [recipe.dataset]
    if RANK == 0:
        digits, test_digits = find_digits(recipe.dataset, recipe.data_dir)
        found = [digits.name]
    if RANKS > 1:
        torch.distributed.init_process_group()
        torch.distributed.broadcast_object_list(found)  # the others wait for the first process
    if RANK > 0:
        digits, test_digits = find_digits(found[0], recipe.data_dir)
    if recipe.validate:
        test_digits = Digits(digits.name, digits.images[-5000:], digits.labels[-5000:])
        digits = Digits(digits.name, digits.images[:-5000], digits.labels[:-5000])
    if recipe.batch_size % RANKS or recipe.batch_size > len(digits.images):
        raise Problem(f"--batch-size {recipe.batch_size} does not fit: choose a multiple of "
                      f"{RANKS}, up to {len(digits.images)}")
    return digits, test_digits

@lru_cache(maxsize=1)  # AugmentedBatches asks again for each batch of an epoch
def shuffled_batches(count: int, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """The numbers below `count` in an order that follows from seed and epoch, in whole batches."""
    order = torch.randperm(count, generator=generator(seed, epoch))
    batches = order.split(batch_size)[: count // batch_size]
    return [batch[RANK::RANKS] for batch in batches]  # each process has its share

def plain_batches(digits: Digits, recipe: Recipe, first_epoch: int) -> Iterator:
    """Batches of images and labels, epoch after epoch. All digits lie on the device (47 MB)."""
    images, labels = digits.images.to(recipe.device), digits.labels.to(recipe.device)
    for epoch in range(first_epoch, recipe.epochs):
        for index in shuffled_batches(len(images), recipe.batch_size, recipe.seed, epoch):
            index = index.to(recipe.device)
            yield images[index], labels[index]

# ---- 3. training --------------------------------------------------------------------------------

def make_ready(model: nn.Module, recipe: Recipe) -> nn.Module:
    """The model on its device, compiled if asked for, and bound to its copies on other GPUs."""
    def average(parameter: nn.Parameter) -> None:
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= RANKS

    model.to(recipe.device)
    if recipe.compile:
        model.compile()
    for parameter in model.parameters():
        if RANKS > 1:  # each process sees its share of a batch: all take the mean gradient
            parameter.register_post_accumulate_grad_hook(average)
    return model

def has_bfloat16(device: str) -> bool:
    """Whether it is a GPU that is made for bfloat16: elsewhere float32 is faster."""
    return device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)

def mixed_precision(device: str) -> torch.autocast:
    """bfloat16 where that is fast, for matrix products."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=has_bfloat16(device))

def learning_rate(step: int, steps: int, peak: float) -> float:
    """Grows over the first tenth of all steps, then falls along half a cosine."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

def orthogonalise(matrices: Tensor) -> Tensor:
    """Matrices (count, rows, columns) with the same singular vectors, and singular values near 1.
    Each of five Newton-Schulz steps puts a singular value s through a*s + b*s^3 + c*s^5, which
    lifts the small ones most. It takes matrix products only."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # the products below are then small
    x = x.bfloat16() if has_bfloat16(str(x.device)) else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value is above 1
    for _ in range(5):
        square = x @ x.mT
        factor = torch.baddbmm(square, square, square, beta=b, alpha=c)  # b * square + c * square^2
        x = torch.baddbmm(x, factor, x, beta=a)  # a * x + factor @ x
    return x.mT if tall else x

class Muon(torch.optim.Optimizer):
    """A step of the same length in all directions of a matrix (Jordan et al., 2024,
    kellerjordan.github.io/posts/muon).

    A gradient is often long in a few directions and short in the rest. Made orthogonal, it is as
    long in all. The step is about as long as AdamW's, so that its learning rates fit (Liu et al.,
    2025, arXiv 2502.16982). torch.optim.Muon does the same with one matrix after the other."""

    def __init__(self, matrices: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        lr, weight_decay = self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]
        by_shape = defaultdict(list)
        for matrix in self.param_groups[0]["params"]:
            by_shape[matrix.shape].append(matrix)
        for shape, matrices in by_shape.items():  # all of one shape in one batch
            gradients = torch.stack([matrix.grad for matrix in matrices])
            state = self.state[matrices[0]]  # one for all of this shape
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(gradients)
            momentum = state["momentum"]
            momentum.lerp_(gradients, 0.05)  # the mean over the last twenty steps or so
            ahead = gradients.lerp(momentum, 0.95)  # Nesterov's: this gradient counts once more
            changes = orthogonalise(ahead) * 0.2 * math.sqrt(max(shape))  # as long as AdamW's
            for matrix, change in zip(matrices, changes):
                matrix.mul_(1 - lr * weight_decay).sub_(lr * change)

def make_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon or AdamW (Loshchilov & Hutter, 2017, arXiv 1711.05101) for matrices; for the rest AdamW
    without weight decay."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    rest = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    if recipe.muon:
        main = Muon(matrices, recipe.lr, recipe.weight_decay)
    else:
        main = torch.optim.AdamW(matrices, recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    return [main, torch.optim.AdamW(rest, recipe.lr, weight_decay=0.0, fused=True)]

def learn_worst_neighbours(model: nn.Module, images: Tensor, labels: Tensor, size: float) -> None:
    """Adds to the model's gradients those of a second batch: the images again, each changed in the
    way that raises its loss most, along its gradient (Goodfellow et al., 2014, arXiv 1412.6572). A
    change of size 1 is as long as one pixel from black to white, 1 / 0.3081 when normalised."""
    change = F.normalize(images.grad.flatten(1)).view_as(images) * size / 0.3081
    moved = (images.detach() + change).requires_grad_()  # as in learn, or it is compiled again
    with mixed_precision(images.device.type):
        loss = F.cross_entropy(model(moved), labels)
    loss.backward()

def progress_bar(steps: int, epoch: int, batch_size: int) -> tqdm:
    """Counts steps on stderr: many times a second on a terminal, every ten seconds in a file."""
    silent = RANK > 0 or sys.stderr is None or os.environ.get("TQDM_DISABLE", "0") != "0"
    seconds = 0.1 if not silent and sys.stderr.isatty() else 10.0
    return tqdm(range(steps), f"epoch {epoch + 1}", leave=False, unit=" images",
                unit_scale=batch_size, disable=silent, mininterval=seconds, maxinterval=seconds)

def check_finite(gradient_norms: Tensor, epoch: int) -> None:
    """Raises Problem for the first step of an epoch whose gradient was no number."""
    bad = (~gradient_norms.isfinite()).nonzero()
    if len(bad):
        number = epoch * len(gradient_norms) + bad[0].item() + 1
        raise Problem(f"the loss is no longer a number in step {number}: choose a lower --lr")

class TrainingStep:
    """What is done with each batch: `learn`.

    A GPU goes through the hundreds of small programs of a step faster than Python can start them.
    So there, after three steps that set everything up, `learn` is recorded as a CUDA graph. From
    then on Python only starts the recording. Its input and results are always in the same places,
    but what is random is new each time. (Not with several GPUs: that was never tried.)"""

    def __init__(self, model: nn.Module, optimizers: list[torch.optim.Optimizer],
                 recipe: Recipe) -> None:
        self.model, self.optimizers, self.recipe = model, optimizers, recipe
        self.count = 0

    def learn(self, images: Tensor, labels: Tensor) -> Tensor:
        """Returns three numbers: loss, count of right answers, length of the gradient."""
        images = normalise(images).requires_grad_(self.recipe.adversarial > 0)
        with mixed_precision(self.recipe.device):
            logits = self.model(images)
            loss = F.cross_entropy(logits, labels)
        loss.backward()
        if self.recipe.adversarial:  # adds the gradients of a second batch
            learn_worst_neighbours(self.model, images, labels, self.recipe.adversarial)
        gradient_norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        right = (logits.argmax(dim=1) == labels).sum()
        return torch.stack([loss.detach(), right, gradient_norm])

    def record(self, images: Tensor, labels: Tensor) -> None:
        """Records `learn`, without doing it."""
        self.images, self.labels = images.clone(), labels.clone()
        self.lr = torch.zeros((), device=images.device)  # a plain number would be recorded as it is
        for optimizer in self.optimizers:  # capturable: AdamW's word for recordable
            optimizer.param_groups[0].update(lr=self.lr, capturable=True)
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's own thread may use the GPU meanwhile
        with (torch.cuda.device(images.device),
              torch.cuda.graph(self.graph, capture_error_mode="thread_local")):
            self.results = self.learn(self.images, self.labels)

    def __call__(self, images: Tensor, labels: Tensor, lr: float) -> Tensor:
        """One step. Its results are good until the next."""
        device = self.recipe.device
        images = images.to(device, non_blocking=images.is_pinned())
        labels = labels.to(device, non_blocking=labels.is_pinned())
        self.count += 1
        if not device.startswith("cuda") or RANKS > 1 or self.count <= 3:
            for optimizer in self.optimizers:  # a checkpoint may say that it is capturable
                optimizer.param_groups[0].update(lr=lr, capturable=False)
            return self.learn(images, labels)
        if self.count == 4:
            self.record(images, labels)
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.lr.fill_(lr)
        self.graph.replay()
        return self.results

def train_epoch(training_step: TrainingStep, batches: Iterator, steps: int, recipe: Recipe,
                epoch: int) -> tuple[float, float]:
    """Learns from the next `steps` batches. Returns mean loss and the share of right answers."""
    training_step.model.train()
    torch.manual_seed(seed_from(recipe.seed, epoch, RANK))  # for dropout and patches left out
    results = torch.zeros(steps, 3, device=recipe.device)  # loss, right answers, gradient's length
    bar = progress_bar(steps, epoch, recipe.batch_size)
    for step in bar:
        images, labels = next(batches)
        lr = learning_rate(epoch * steps + step, recipe.epochs * steps, recipe.lr)
        results[step] = training_step(images, labels, lr)
        if step % 20 == 0 or step == steps - 1:  # seldom: to read a number is to wait for the GPU
            check_finite(results[:, 2], epoch)
            bar.set_postfix_str(f"loss={results[step, 0]:.3f}", refresh=False)
    loss, right, _ = results.mean(dim=0)
    means = torch.stack([loss, right / len(labels)])
    if RANKS > 1:
        torch.distributed.all_reduce(means)
    return tuple((means / RANKS).tolist())

@torch.no_grad()
def predict(model: nn.Module, images: Tensor, device: str, reach: int = 0) -> Tensor:
    """Probabilities (B, 10), on the CPU, of images (B, 28, 28): the mean over all looks at an image
    that is moved by up to `reach` pixels, up or down and left or right."""
    model.eval()
    moves = list(itertools.product(range(-reach, reach + 1), repeat=2))
    total = torch.zeros(len(images), 10)
    for move in moves:
        look = images.roll(move, dims=(1, 2))  # black edges come in on the other side
        with mixed_precision(device):
            # forward: not compiled, which would take longer than all the answers
            logits = [model.forward(normalise(x.to(device))) for x in look.split(500)]
        total += torch.cat(logits).float().softmax(dim=1).cpu()
    return total / len(moves)

# ---- 4. runs: folder, checkpoint, resume --------------------------------------------------------

@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, named so only when it is whole: a run may be stopped at any moment."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
        part.replace(path)
    except RuntimeError as error:  # torch.save puts one of its own on top of the disk's
        raise error.__context__ if isinstance(error.__context__, OSError) else error
    finally:
        part.unlink(missing_ok=True)

def load_checkpoint(folder: Path, expected: dict) -> dict:
    """A run's checkpoint. Raises Problem if there is none, it is damaged, or of other options."""
    path = folder / "checkpoint.pt"
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        small = " --small" if "-small" in folder.name else ""
        raise Problem(f"{folder} holds no trained model: first run python "
                      f"{folder.name.split('-')[0]}.py{small} and its other options") from None
    except Exception as error:  # torch raises a dozen kinds
        raise Problem(f"{path} is damaged: train again, without --resume") from error
    other = {name: value for name, value in expected.items() if state.get(name) != value}
    if other:
        raise Problem(f"{path} was not made with {other}: give its own options, or another --out")
    return state

class Run:
    """A training with one seed: its folder, its log, and the checkpoint that it goes on from."""

    def __init__(self, recipe: Recipe, model: nn.Module, digits: Digits) -> None:
        self.recipe, self.data_set = recipe, digits.name
        self.folder = recipe.folder(digits.name)
        if not recipe.evaluate:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.log: list[list[float]] = []  # of each epoch: loss, accuracy, seconds
        self.started = time.perf_counter()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        count = len(digits.images)
        print(f"{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}: {parameters:,} parameters, "
              f"{recipe.device}, {count:,} {digits.name} digits, {recipe.epochs} epochs of "
              f"{count // recipe.batch_size} steps, seed {recipe.seed}", flush=True)
        if recipe.device == "cpu" and not recipe.small:
            print("full size takes a CPU hours: --small takes it minutes", flush=True)

    def load(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
        """The epoch to begin with: 0, unless --resume or --evaluate takes up an earlier run."""
        recipe = self.recipe
        made_by = {"run": self.folder.name, **recipe.sizes()}
        if recipe.evaluate:
            model.load_state_dict(load_checkpoint(self.folder, made_by)["model"])
            return recipe.epochs
        if recipe.resume and (self.folder / "checkpoint.pt").exists():
            state = load_checkpoint(self.folder, {**made_by, **recipe.training()})
            model.load_state_dict(state["model"])
            for optimizer, saved in zip(optimizers, state["optimizers"]):
                optimizer.load_state_dict(saved)
            self.log = state["log"]
        return len(self.log)

    def save(self, model: nn.Module, optimizers: list[torch.optim.Optimizer], loss: float,
             accuracy: float) -> None:
        """Ends an epoch: writes log.csv, curve.png, options.json and checkpoint.pt, and prints."""
        if RANK > 0:
            return
        recipe, now = self.recipe, time.perf_counter()
        seconds, self.started = now - self.started, now
        self.log.append([loss, accuracy, seconds])
        rows = [f"{epoch},{l},{a},{s:.1f}" for epoch, (l, a, s) in enumerate(self.log, start=1)]
        try:
            with whole_file(self.folder / "log.csv") as file:
                file.write("\n".join(["epoch,loss,accuracy,seconds", *rows, ""]).encode())
        except PermissionError as error:  # on Windows, a program that shows the file
            print(f"{error}: it is written again after the next epoch", file=sys.stderr)
        with whole_file(self.folder / "options.json") as file:
            file.write(json.dumps(asdict(recipe), indent=2).encode())
        saving = torch.utils.serialization.config.save
        saving.compute_crc32 = False  # checksums would take a third of the time
        saving.use_pinned_memory_for_d2h = recipe.device.startswith("cuda")  # and this a quarter
        with whole_file(self.folder / "checkpoint.pt") as file:
            torch.save({"run": self.folder.name, **recipe.sizes(), **recipe.training(),
                        "log": self.log, "model": model.state_dict(),
                        "optimizers": [optimizer.state_dict() for optimizer in optimizers]}, file)
        draw_curve(self.folder / "curve.png", self.log)
        left = f"{(recipe.epochs - len(self.log)) * seconds / 60:.0f} minutes left"
        if recipe.compile and len(self.log) == 1:  # the first epoch has the compiling in it
            left = "less than " + left
        print(f"epoch {len(self.log)} of {recipe.epochs}: loss {loss:.4f}, {accuracy:.2%} of the "
              f"{self.data_set} training digits right, {seconds:.1f} s, {left}", flush=True)

    def test(self, model: nn.Module, digits: Digits) -> float:
        """Prints ten answers and the accuracy, which it returns; draws mistakes.png."""
        probabilities = predict(model, digits.images, self.recipe.device, self.recipe.reach)
        answers = probabilities.argmax(dim=1)
        kind = "validation" if self.recipe.validate else "test"
        print(f"\nten {digits.name} {kind} digits, and the model's three most probable answers:")
        for label, answer, row in zip(digits.labels[:10], answers, probabilities):
            print(f"  {label}:   {three_best(row)}{'' if answer == label else '   wrong'}")
        wrong = (answers != digits.labels).nonzero().flatten()
        total, right = len(answers), len(answers) - len(wrong)
        print(f"\n{kind} accuracy: {right / total:.2%} ({right} of {total} {digits.name} {kind} "
              "digits)", flush=True)
        captions = [f"{digits.labels[number]}, not {answers[number]}" for number in wrong]
        draw_sheet(self.folder / "mistakes.png", digits.images[wrong][:40], captions, columns=8)
        return right / total

def print_mean(accuracies: list[float]) -> None:
    """With --seeds: mean and standard deviation."""
    if len(accuracies) > 1:
        deviation, mean = torch.std_mean(torch.tensor(accuracies, dtype=torch.float64))
        print(f"mean accuracy: {mean:.3%} +- {deviation:.3%} ({len(accuracies)} seeds)")

# ---- 5. pictures, drawn and read ----------------------------------------------------------------

@contextmanager
def picture(path: Path, width: int, height: int) -> Iterator[Image.Image]:
    """A white page to draw on, saved as PNG. What goes wrong is told, and costs no training."""
    try:
        page = Image.new("RGB", (width, height), "white")
        yield page
        if RANK == 0:
            with whole_file(path) as file:
                page.save(file, "PNG")
    except Exception as error:
        print(f"{path} was not drawn: {type(error).__name__}: {error}", file=sys.stderr)

def draw_sheet(path: Path, images: Tensor, captions: list[str], columns: int) -> None:
    """Draws images, bytes (B, height, width) or in colour (B, height, width, 3), with captions."""
    rows = max(1, math.ceil(len(images) / columns))
    with picture(path, 120 * columns, 140 * rows) as page:
        font = ImageFont.load_default(14)
        for number, (image, caption) in enumerate(zip(images, captions)):
            x, y = 120 * (number % columns), 140 * (number // columns)
            tile = Image.fromarray(image.numpy()).resize((112, 112), Image.Resampling.NEAREST)
            page.paste(tile, (x + 4, y + 24))
            ImageDraw.Draw(page).text((x + 60, y + 12), caption, "black", font, anchor="mm")

def draw_curve(path: Path, log: list[list[float]]) -> None:
    """Draws loss and accuracy in training, epoch by epoch."""
    with picture(path, 840, 300) as page:
        pen, font = ImageDraw.Draw(page), ImageFont.load_default(16)
        for column, (title, left) in enumerate([("training loss", 80), ("accuracy", 500)]):
            values = [row[column] for row in log]
            low, high = min(values), max(values)
            across = [left + 300 * n / max(1, len(values) - 1) for n in range(len(values))]
            down = [250 - 200 * (value - low) / max(1e-9, high - low) for value in values]
            pen.rectangle((left, 50, left + 300, 250), outline="gray")
            pen.line(list(zip(across, down)), "darkorange", width=3)
            pen.ellipse((across[-1] - 4, down[-1] - 4, across[-1] + 4, down[-1] + 4), "darkorange")
            for x, y, text in ((left + 150, 25, title), (left - 35, 50, f"{high:.3f}"),
                               (left - 35, 250, f"{low:.3f}"), (left, 270, "epoch 1"),
                               (left + 300, 270, str(len(values)))):
                pen.text((x, y), text, "black", font, anchor="mm")

@torch.no_grad()
def draw_attention(path: Path, model: nn.Module, image: Tensor, recipe: Recipe) -> None:
    """Draws the weights with which the model sees an image, bytes (28, 28): a row for each of its
    attentions, a column for each head, each head's largest weight in full orange. On patches: what
    the class token takes from each of them. Flat: all d x d weights, a row for each query."""
    weights = []

    def keep(attention: Attention, inputs: tuple[Tensor, Tensor]) -> None:
        weights.append(attention.weights(*inputs)[0].float().cpu())  # (H, N, N) or (H, d, d)

    layers = [module for module in model.modules() if isinstance(module, Attention)]
    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    predict(model, image[None], recipe.device)
    for hook in hooks:
        hook.remove()
    strength = torch.cat(weights)
    if recipe.patch_size < 28:  # of (layers * H, N, N) the class token's row, as a map of patches
        strength = strength[:, 0, 1:].unflatten(-1, (28 // recipe.patch_size, -1))
        strength = F.interpolate(strength[None], (28, 28))[0]
    strength = strength / strength.amax(dim=(1, 2), keepdim=True)
    colours = 1 - strength.unsqueeze(-1) * torch.tensor([0.0, 0.5, 1.0])  # from white to orange
    if recipe.patch_size < 28:
        colours = colours * (1 - image.unsqueeze(-1) / 255)  # the digit, in black
    names = [f"no. {i + 1}, head {j + 1}" for i in range(len(layers)) for j in range(recipe.heads)]
    draw_sheet(path, (255 * colours).byte(), names, columns=recipe.heads)

def three_best(row: Tensor) -> str:
    """The three most probable digits, and how probable they are."""
    best = row.topk(3)
    return "   ".join(f"{digit} {p:6.1%}" for p, digit in zip(best.values, best.indices))

def open_picture(path: Path) -> Tensor:
    """A picture, upright, its longer side 400 pixels, as floats (h, w, 4) from 0 to 1."""
    Image.MAX_IMAGE_PIXELS = None  # it warns of pictures that phones take; here is a limit, too
    try:
        with Image.open(path) as picture:
            if picture.width * picture.height <= 250e6:
                return shrink(picture)
    except FileNotFoundError as error:
        raise Problem(f"{path} cannot be read, there is no such file: check its name") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise Problem(f"{path} cannot be read as a picture ({error}): save it as PNG") from error
    raise Problem(f"{path} is too large, of more than 250 megapixels: save it smaller")

def shrink(picture: Image.Image) -> Tensor:
    """Does it in steps that need little memory, however many pixels there are."""
    picture.draft(None, (800, 800))  # a JPEG is decoded at down to an eighth of its size
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode[0] == "I":  # 16 bits a pixel, which convert would cut off at 255
        picture = picture.convert("F").point(lambda x: x / 257)
    elif picture.mode in ("1", "P"):  # reduce needs colours, not their numbers in a palette
        picture = picture.convert("RGBA")
    picture = picture.reduce(max(1, max(picture.size) // 800)).convert("RGBA")
    size = [max(1, round(400 * side / max(picture.size))) for side in picture.size]
    pixels = pil_to_tensor(picture.resize(size)).permute(1, 2, 0) / 255
    pixels[..., :3] *= pixels[..., 3:]  # what is transparent has no colour
    return pixels

def edge_of(pixels: Tensor) -> Tensor:
    """A mask of the outermost rows and columns."""
    edge = torch.ones(pixels.shape[:2], dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    return edge

def find_ink(pixels: Tensor) -> Tensor:
    """How much each pixel differs from the paper, darker or brighter, (h, w). Paper is a plane, as
    light may fall off, fitted to the edge but for what differs like ink: a table, or the digit."""
    edge = edge_of(pixels)
    down, right = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in edge.shape), indexing="ij")
    plane = torch.stack([down, right, torch.ones_like(down)], dim=2)  # (h, w, 3)
    paper = pixels[edge].median(dim=0).values
    for _ in range(3):
        ink = (pixels - paper).norm(dim=2)
        like_paper = edge & (ink <= torch.maximum(ink.max() / 2, ink[edge].median()))
        paper = plane @ torch.linalg.lstsq(plane[like_paper], pixels[like_paper]).solution
    return (pixels - paper).norm(dim=2)

def connected_parts(mask: Tensor) -> list[Tensor]:
    """The connected parts of a mask, each a mask. Every pixel starts with a number of its own,
    and the largest spreads until nothing changes."""
    numbers = torch.arange(1.0, mask.numel() + 1).view_as(mask) * mask
    while True:
        spread = F.max_pool2d(numbers[None], 3, stride=1, padding=1)[0] * mask
        if torch.equal(spread, numbers):
            return [numbers == number for number in numbers.unique() if number > 0]
        numbers = spread

def surrounds(part: Tensor, other: Tensor) -> bool:
    """Whether a part lies above, below, left and right of (most of) another, as a box does."""
    inside = torch.ones_like(part)
    for dim in (0, 1):
        inside &= part.cummax(dim).values & part.flip(dim).cummax(dim).values.flip(dim)
    return bool((inside & other).sum() > 0.9 * other.sum())

def near(part: Tensor) -> Tensor:
    """A mask of the rectangle round a part, larger by a quarter: a pen's line may have gaps."""
    (top, bottom), (left, right) = (part.any(dim).nonzero().aminmax() for dim in (1, 0))
    reach = max(bottom - top, right - left) // 4
    box = torch.zeros_like(part)
    box[max(0, top - reach) : bottom + reach + 1, max(0, left - reach) : right + reach + 1] = True
    return box

def digit_part(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Splits a mask of ink into the digit and the other large parts, two masks. Not part of the
    digit are: what runs along the picture's edge, like a table; what touches the edge far from the
    largest part, unless that does, too; a box round the rest; what is tiny and far from it."""
    # Squares of 4 x 4 pixels are faster; parts that are in neighbouring squares count as one.
    squares = F.max_pool2d(mask[None].float(), 4, ceil_mode=True)[0] > 0
    edge, parts = edge_of(squares), connected_parts(squares)
    along = max(edge.shape) / 4  # a table lies along the edge, a pen's line only crosses it
    whole = max(parts, key=Tensor.sum)
    lines = [part for part in parts
             if part.sum() > whole.sum() / 20 and (part & edge).sum() < along]
    largest = max(lines or [whole], key=Tensor.sum)
    cut_off = (largest & edge).any()

    def belongs(part: Tensor) -> bool:
        touching = (part & edge).sum()
        if part is largest or touching == 0:
            return True
        return bool(touching < along and (cut_off or (part & near(largest)).any()))

    large = [part for part in parts if part.sum() > largest.sum() / 20]
    digit = [part for part in large if belongs(part)]
    digit = [part for part in digit if not any(surrounds(part, x) for x in digit if x is not part)]
    kept = torch.stack(digit).any(dim=0)
    other = torch.stack(large).any(dim=0) & ~kept
    pixels = [part.repeat_interleave(4, 0).repeat_interleave(4, 1)
              for part in (squares & near(kept) & ~other, other)]
    return tuple(mask & part[: mask.shape[0], : mask.shape[1]] for part in pixels)

def place(ink: Tensor) -> Tensor:
    """Ink (h, w) as bytes (28, 28): in 20 x 20 pixels, its centre of mass in the middle (LeCun et
    al., 1998)."""
    ink = (ink / ink.max() - 0.2).clamp(min=0) / 0.8  # the paper's noise becomes black
    while ink.mean() < 0.3:  # a thin pen's line becomes as wide as MNIST's
        ink = F.max_pool2d(ink[None], 3, stride=1, padding=1)[0]
    high, wide = (max(1, round(20 * side / max(ink.shape))) for side in ink.shape)
    ink = F.interpolate(ink[None, None], (high, wide), mode="bilinear", antialias=True)[0, 0]
    sums = (ink.sum(1) / ink.sum(), ink.sum(0) / ink.sum())
    centre = [(part * torch.arange(len(part))).sum().item() for part in sums]
    top, left = (min(max(0, round(13.5 - at)), 28 - len(part)) for at, part in zip(centre, sums))
    return (255 * F.pad(ink / ink.max(), (left, 28 - wide - left, top, 28 - high - top))).byte()

def prepare(path: Path) -> Tensor:
    """A picture of a digit, of any size and colours, as bytes (28, 28) like MNIST's: bright on
    black. Raises Problem for what shows no digit."""
    ink = find_ink(open_picture(path))
    smooth = F.avg_pool2d(ink[None], 3, stride=1, padding=1)[0]
    if smooth.max() < max(0.1, 4 * ink[edge_of(ink)].median()):
        raise Problem(f"{path} shows no digit: take a picture where it stands out from the paper")
    digit, other = digit_part(smooth > smooth.max() / 2)
    soft_edge = F.max_pool2d(other[None].float(), 13, stride=1, padding=6)[0] > 0
    ink[soft_edge & ~digit] = 0
    rows, columns = (digit.any(dim).nonzero() for dim in (1, 0))
    return place(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])

def read_pictures(model: nn.Module, recipe: Recipe) -> None:
    """--predict: the three most probable digits for each picture, and what the model saw of it."""
    folder = recipe.folder(recipe.dataset or "MNIST")
    drawn = recipe.folder("drawn")
    if not recipe.dataset and not folder.exists() and (drawn / "checkpoint.pt").exists():
        folder = drawn
        print("This model has learned from drawn digits: it knows no handwriting.")
    state = load_checkpoint(folder, {"run": folder.name, **recipe.sizes()})
    model.load_state_dict(state["model"])
    model.to(recipe.device)
    paths, problems = [], []
    for path in map(Path, recipe.predict):
        paths += sorted(path.glob("[!.]*.*")) if path.is_dir() else [path]
    if not paths:
        raise Problem(f"{path} is empty: name pictures, or folders that hold some")
    for number, path in enumerate(paths, start=1):
        try:
            image = prepare(path)
        except Problem as problem:
            problems.append(str(problem))
            continue
        row = predict(model, image[None], recipe.device, recipe.reach)[0]
        print(f"\n{path}:   {three_best(row)}")
        for line in image.tolist():  # two letters a pixel: together about as wide as high
            print("".join(" .:-=+*#%@"[value * 9 // 255] * 2 for value in line).rstrip())
        draw_attention(folder / f"attention-{number}-{path.stem}.png", model, image, recipe)
    if problems:
        raise Problem("\n".join(problems))

# ---- 6. the command line ------------------------------------------------------------------------

def option(group: str, meaning: str, kind: type, default: object = MISSING,
           least: float = -math.inf, below: float = math.inf) -> object:
    """A field of Recipe, which allows numbers from `least` to below `below`. Where it has no
    default, each script's FULL and SMALL give its value."""
    return field(default=default, metadata={"group": group, "meaning": meaning, "kind": kind,
                                            "least": least, "below": below})

@dataclass(kw_only=True)
class Recipe:
    """A model, its training and a run: each field is an option of the command line. Raises Problem
    for a number that makes no sense."""
    layers: int = option("model", "layers", int, least=1, below=1000)
    heads: int = option("model", "attention heads of a layer", int, least=1)
    dim: int = option("model", "width of a token; a flat image's is 784", int, least=1, below=1e5)
    patch_size: int = option("model", "side of a patch; a flat image's is 28", int, least=1)
    overlap: int = option("model", "pixels around a patch that it sees, too", int, 0, 0, 28)
    dropout: float = option("model", "share of a block's results set to 0", float, 0.0, 0, 1)
    input_dropout: float = option("model", "share of patches left out, or of a flat image's pixels "
                                  "greyed", float, 0.0, 0, 1)

    epochs: int = option("training", "times that each digit is learned from", int, least=0)
    batch_size: int = option("training", "digits in a step", int, least=1)
    lr: float = option("training", "the highest learning rate", float, least=0)
    weight_decay: float = option("training", "weight decay of matrices", float, least=0)
    muon: bool = option("training", "Muon in place of AdamW, for matrices", bool, False)
    adversarial: float = option("training", "size of a change for the worst with which a digit is "
                                "learned once more; 1 is a pixel", float, 0.0, 0)

    small: bool = option("run", "the small model, on patches, for a CPU", bool, False)
    seed: int = option("run", "what everything random follows from", int, 0, 0, 2**32)
    seeds: int = option("run", "train so often, with seed, seed + 1, ...", int, default=1, least=1)
    validate: bool = option("run", "test on 5,000 training digits that are held out", bool, False)
    reach: int = option("run", "answer with the mean of looks, moved by up to so many pixels", int,
                        default=0, least=0, below=28)
    resume: bool = option("run", "go on with a stopped run", bool, False)
    evaluate: bool = option("run", "only test what an earlier run has trained", bool, False)
    predict: list | None = option("run", "pictures to read with an earlier run's model: it answers "
                                  "with a digit, whatever they show", list, None)
    out: str = option("run", "folder of the runs", str, "runs")
    dataset: str | None = option("run", "MNIST, FashionMNIST, KMNIST or drawn", str, None)
    data_dir: str = option("run", "folder of the data", str, str(Path(__file__).parent / "data"))
    workers: int | None = option("run", "processes that augment", int, None, 0)
    device: str | None = option("run", "cpu, cuda, mps, ...", str, None)
    compile: bool | None = option("run", "torch.compile the model", bool, None)

    def __post_init__(self) -> None:
        for each in fields(self):
            value, limits = getattr(self, each.name), each.metadata
            if isinstance(value, (int, float)) and not limits["least"] <= value < limits["below"]:
                raise Problem(f"{flag(each.name)} {value} makes no sense: choose a number from "
                              f"{limits['least']} to below {limits['below']}")
        if self.dataset not in (None, "MNIST", "FashionMNIST", "KMNIST", "drawn"):
            raise Problem(f"--dataset {self.dataset} is not known: choose MNIST, FashionMNIST, "
                          "KMNIST or drawn")

    def sizes(self) -> dict:
        """What a model is made from."""
        return {each.name: getattr(self, each.name) for each in fields(self)
                if each.metadata["group"] == "model"}

    def training(self) -> dict:
        """What its training follows from, besides digits and seed."""
        return {each.name: getattr(self, each.name) for each in fields(self)
                if each.metadata["group"] == "training"}

    def folder(self, data_set: str) -> Path:
        """The folder of a run on this data set."""
        small, validate = "-small" if self.small else "", "-validate" if self.validate else ""
        script = Path(sys.argv[0]).stem
        return Path(self.out, f"{script}-{data_set}{small}{validate}-seed{self.seed}")

    def each_seed(self) -> Iterator[Recipe]:
        """The recipe with each of its seeds, from which torch's random numbers then follow."""
        for seed in range(self.seed, self.seed + self.seeds):
            torch.manual_seed(seed)
            yield replace(self, seed=seed)

def flag(name: str) -> str:
    """batch_size to --batch-size."""
    return "--" + name.replace("_", "-")

def choose_device(name: str | None) -> str:
    """The device asked for, or the fastest there is. Raises Problem when it does not work."""
    torch.set_float32_matmul_precision("high")  # TF32, where a GPU computes in float32 at all
    try:
        if BY_TORCHRUN and name != "cpu" and torch.accelerator.is_available():  # a GPU each
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        device = name or torch.accelerator.current_accelerator(check_available=True) or "cpu"
        one = torch.ones(1, device=device)
        (one + one).item()  # fails where the driver or the GPU is too old
        return str(one.device)
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        raise Problem(f"--device {name or '(default)'} does not work here: choose another, such as "
                      "--device cpu") from error

def make_parser(about: str, full: Recipe, small: Recipe) -> argparse.ArgumentParser:
    """An option for each field of Recipe. What is not given is left out of the answer."""
    parser = argparse.ArgumentParser(description=about, usage="%(prog)s [--small] [options]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    groups = {name: parser.add_argument_group(name) for name in ("model", "training", "run")}
    for each in fields(Recipe):
        group, kind = groups[each.metadata["group"]], each.metadata["kind"]
        meaning = each.metadata["meaning"]
        value, small_value = getattr(full, each.name), getattr(small, each.name)
        if kind is bool:
            meaning += " (with --small the default)" if small_value else ""
            group.add_argument(flag(each.name), help=meaning, action=argparse.BooleanOptionalAction)
        elif kind is list:
            group.add_argument(flag(each.name), help=meaning, nargs="+", metavar="PICTURE")
        else:
            meaning += f" (default {value})" if value is not None else ""
            meaning += f" (with --small {small_value})" if value != small_value else ""
            group.add_argument(flag(each.name), help=meaning, type=kind, metavar=kind.__name__)
    return parser

def read_options(about: str, full: Recipe, small: Recipe) -> Recipe:
    """The recipe that the command line asks for: full or small, changed by the options given."""
    given = vars(make_parser(about, full, small).parse_args())
    recipe = replace(small if given.get("small") else full, **given)
    recipe.device = choose_device(recipe.device)
    if recipe.workers is None:  # beside a GPU; on a CPU they would take the cores that train
        recipe.workers = 0 if recipe.device == "cpu" else min(4, os.cpu_count() or 1)
    if recipe.compile is None:  # takes a C compiler, and longer than a small model gains
        recipe.compile = (recipe.device.startswith("cuda") and shutil.which("cc") is not None
                          and not recipe.small)
    return recipe

@contextmanager
def faults_told() -> Iterator[None]:
    """Around main(): what the user can mend, or a stop, ends with a sentence and no traceback."""
    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    if not BY_TORCHRUN:  # whose processes wait for each other, deaf to all but the end
        signal.signal(signal.SIGTERM, stop)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    elif hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
        return
    except Problem as problem:
        code, sentence = 2, str(problem)
    except KeyboardInterrupt as stopped:
        code = 128 + (stopped.args[0] if stopped.args else signal.SIGINT)
        print(file=sys.stderr)  # below the bar
        words = [word for word in sys.argv if word != "--resume"]
        sentence = f"stopped: go on with python {shlex.join(words)} --resume"
    except (MemoryError, torch.OutOfMemoryError):
        code, sentence = 2, "out of memory: choose a lower --batch-size, or --small"
    except OSError as error:
        code, sentence = 2, f"cannot read or write ({error}): make room, or choose another --out"
    print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
    sys.exit(code)
