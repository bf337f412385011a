"""What the four scripts share, bottom-up. Read chapter 1 first: it has the building blocks of the
models. Chapters 2 and 3 have the data and the optimizers. The rest is plumbing.

    1  attention and blocks      4  runs: checkpoint, resume, test
    2  digits and batches        5  drawings
    3  training                  6  the command line

Shapes in the comments: B images, N tokens, D width of a token, H heads, d = D / H width of a head.
`options` are those of the command line (chapter 6).
"""

import itertools
import math
import os
import shlex
import shutil
import signal
import socket
import sys
import sysconfig
import tempfile
import time
import warnings
from argparse import (ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError,
                      BooleanOptionalAction, Namespace)
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.serialization
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm


class UserError(Exception):
    """A mistake that the user can correct. Its text says what is wrong and what to do."""

# ---- 1. attention and blocks --------------------------------------------------------------------

class Attention(nn.Module):
    """Scaled dot-product attention with several heads (Vaswani et al., 2017, arXiv 1706.03762):

        weights = softmax(query @ key^T / sqrt(d)),   out = weights @ value

    Queries come from x (B, N, D), keys and values from context (B, M, D). In self-attention, the
    context is x. Each head works on d of the D features. The result has the shape of x. Raises
    UserError if the width is not divisible by the heads."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool = False) -> None:
        super().__init__()
        if dim % heads:
            raise UserError(f"a width of {dim} is not divisible by {heads} heads: change --heads "
                            "or --dim")
        self.heads = heads
        self.query = nn.Linear(dim, dim, bias=qkv_bias)
        self.key = nn.Linear(dim, dim, bias=qkv_bias)
        self.value = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, H, N, d)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def qkv(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, split into heads."""
        query, key, value = self.query(x), self.key(context), self.value(context)
        return self.split(query), self.split(key), self.split(value)

    def weights(self, x: Tensor, context: Tensor) -> Tensor:
        """The weights of the formula, for draw_attention: how much of each value (a column) goes
        into each result (a row). (B, H, N, M), or (B, H, d, d) in FeatureAttention."""
        query, key, _ = self.qkv(x, context)
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        return scores.softmax(dim=-1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        query, key, value = self.qkv(x, context)
        out = F.scaled_dot_product_attention(query, key, value)  # the formula, in one call
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, H, N, d) to (B, N, D)

class FeatureAttention(Attention):
    """Attention inside a flat image: x and context are (B, D), and so is the result.

    A flat image is a single token, and softmax over a single score is always 1. So here the d
    features of a head attend to each other: they are taken as d tokens of width 1, and

        weights[i, j] = softmax_j(query[i] * key[j]),   out[i] = sum_j weights[i, j] * value[j]

    (a token's width is 1 here, so there is no scaling). This is the cross-covariance attention of
    El-Nouby et al. (2021, arXiv 2106.09681) for a single image token, without normalization."""

    def split(self, x: Tensor) -> Tensor:
        """(B, D) to (B, H, d, 1)."""
        return x.unflatten(-1, (self.heads, -1)).unsqueeze(-1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        query, key, value = self.qkv(x, context)
        # Both compute the formula above. Which is faster depends on whether the model is compiled.
        if torch.compiler.is_compiling():  # the compiler fuses these two lines into one kernel
            weights = (query * key.mT).softmax(dim=-1)  # (B, H, d, 1) * (B, H, 1, d)
            out = (weights * value.mT).sum(dim=-1)  # (B, H, d)
        else:  # one call, which does not store the weights
            out = F.scaled_dot_product_attention(query, key, value)  # (B, H, d, 1)
        return self.proj(out.flatten(1))  # (B, D)

class Block(nn.Module):
    """A pre-norm transformer block on (B, N, D) or flat (B, D). The result has the same shape. With
    `class_token_only`, only the first of the N tokens is computed: (B, 1, D)."""

    def __init__(self, dim: int, heads: int, *, flat: bool, dropout: float = 0.0,
                 qkv_bias: bool = False) -> None:
        super().__init__()
        kind = FeatureAttention if flat else Attention
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = kind(dim, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)
        self.class_token_only = False

    @torch.compiler.nested_compile_region  # identical blocks are compiled only once
    def forward(self, x: Tensor) -> Tensor:
        normed = queries = self.norm1(x)
        if self.class_token_only:  # one query, but still all keys and values
            x, queries = x[:, :1], normed[:, :1]
        x = x + self.dropout(self.attention(queries, normed))
        return x + self.dropout(self.mlp(self.norm2(x)))

# ---- 2. digits and batches ----------------------------------------------------------------------

class Digits(NamedTuple):
    """Images as bytes (count, 28, 28), their labels (count), and the name of their data set."""
    name: str
    images: Tensor
    labels: Tensor

def normalize(images: Tensor) -> Tensor:
    """Bytes (B, 28, 28) to floats (B, 1, 28, 28) with mean 0 and variance 1 over MNIST's pixels."""
    return (images.unsqueeze(1) / 255 - 0.1307) / 0.3081

def seed_from(*numbers: int) -> int:
    """A seed below 2^32, made from these numbers. (Only a string's hash differs between runs.)"""
    return hash(numbers) % 2**32

def generator(*numbers: int) -> torch.Generator:
    """A random number generator that is seeded with these numbers."""
    return torch.Generator().manual_seed(seed_from(*numbers))

def draw_digits(count: int, seed: int) -> Digits:
    """Stand-in digits in PIL's default font, each randomly rotated, scaled, sheared and shifted."""
    page = Image.new("L", (28, 280))
    font = ImageFont.load_default(24)
    for digit in range(10):
        ImageDraw.Draw(page).text((14, 28 * digit + 14), str(digit), 255, font, anchor="mm")
    ten = pil_to_tensor(page).float().view(10, 1, 28, 28)
    labels = torch.arange(count) % 10
    affine = torch.eye(2, 3) + 0.15 * torch.randn(count, 2, 3, generator=generator(seed))
    grid = F.affine_grid(affine, [count, 1, 28, 28], align_corners=False)
    images = F.grid_sample(ten[labels], grid, align_corners=False)
    return Digits("drawn", images.squeeze(1).byte(), labels)

def fetch(source: type, folder: Path) -> None:
    """Unpacks a data set's .gz files in a temporary folder, after downloading missing ones, and
    moves all files into `folder`, so two runs that start together never read partial files."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent.parent) as temporary:
        raw = Path(temporary, source.__name__, "raw")
        raw.mkdir(parents=True)
        for packed in folder.glob("*.gz"):
            shutil.copy(packed, raw)
        source(temporary, download=True)  # torchvision checks the .gz files, and unpacks them
        for file in raw.iterdir():
            file.replace(folder / file.name)

def find_digits(name: str, data_dir: Path) -> tuple[Digits, Digits]:
    """The training and test set `name`, from disk or else from the network. If MNIST is not on
    disk and cannot be downloaded, drawn digits stand in, with a warning. Raises UserError."""
    if name == "drawn":
        return draw_digits(10_000, seed=0), draw_digits(2_000, seed=1)
    source = getattr(torchvision.datasets, name)
    folder = data_dir / name / "raw"
    files = [file for file, md5 in source.resources]
    on_disk = any(path.is_file() for path in folder.parent.rglob("[!.]*"))  # not .DS_Store
    socket.setdefaulttimeout(30)  # seconds to wait for a server's answer
    try:
        if not all((folder / file).with_suffix("").exists() for file in files):
            fetch(source, folder)
        train, test = source(data_dir, train=True), source(data_dir, train=False)
    except PermissionError:
        raise  # the files may be intact: report_errors names the one that cannot be opened
    except Exception as error:  # torchvision raises many kinds of errors
        reason = f"({type(error).__name__}: {' '.join(str(error).split())})"
        put = f"put {', '.join(files)} into {folder}"
        if on_disk:
            raise UserError(f"{name} cannot be read {reason}: delete {folder.parent} to download "
                            f"it again, or {put}, with no other files") from error
        problem = f"{name} cannot be downloaded {reason}: {put}, or choose --dataset drawn"
        if name != "MNIST":
            raise UserError(problem) from error
        print(f"{'!' * 99}\nWARNING: {problem}\nThis run uses DRAWN digits instead, which say "
              f"nothing about MNIST.\n{'!' * 99}", file=sys.stderr)
        return find_digits("drawn", data_dir)
    return Digits(name, train.data, train.targets), Digits(name, test.data, test.targets)

def load_digits(options: Namespace) -> tuple[Digits, Digits]:
    """The training set and the test set. With --validate, the last 5,000 training digits are held
    out and take the place of the test set. Raises UserError."""
    train_set, test_set = find_digits(options.dataset, options.data_dir.expanduser())
    if options.validate:
        test_set = Digits(train_set.name, train_set.images[-5000:], train_set.labels[-5000:])
        train_set = Digits(train_set.name, train_set.images[:-5000], train_set.labels[:-5000])
    if options.batch_size > len(train_set.images):
        raise UserError(f"--batch-size {options.batch_size} is more than the "
                        f"{len(train_set.images)} training digits: choose a smaller one")
    return train_set, test_set

def shuffled_indices(count: int, options: Namespace, first_epoch: int) -> Iterator:
    """For each training step, its epoch and a list of its digits' indices. Every epoch has its own
    order, and drops an incomplete last batch."""
    for epoch in range(first_epoch, options.epochs):
        order = torch.randperm(count, generator=generator(options.seed, epoch))
        for indices in order.split(options.batch_size)[: count // options.batch_size]:
            yield epoch, indices.tolist()

def plain_batches(digits: Digits, options: Namespace, first_epoch: int) -> Iterator:
    """Batches of images and labels for all epochs. The whole data set is on the device (47 MB)."""
    images, labels = digits.images.to(options.device), digits.labels.to(options.device)
    for _, indices in shuffled_indices(len(images), options, first_epoch):
        yield images[indices], labels[indices]

# ---- 3. training --------------------------------------------------------------------------------

def mixed_precision(device: torch.device) -> torch.autocast:
    """Matrix products in bfloat16 on a GPU that is built for it, and in float32 elsewhere."""
    built_for_it = (device.type == "cuda"
                    and torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.autocast(device.type, torch.bfloat16, enabled=built_for_it)

def orthogonalize(matrices: Tensor) -> Tensor:
    """Matrices (count, rows, columns) with the same singular vectors, and singular values near 1.
    Each of five Newton-Schulz steps maps a singular value s to a*s + b*s^3 + c*s^5, which raises
    the small ones most. It needs only matrix products."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # makes x @ x.mT the smaller square
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value is above 1
    with mixed_precision(x.device):
        for _ in range(5):
            square = x @ x.mT
            factor = torch.baddbmm(square, square, square, beta=b, alpha=c)  # b*square + c*square^2
            x = torch.baddbmm(x, factor, x, beta=a)  # a * x + factor @ x
    return x.mT if tall else x

class Muon(torch.optim.Optimizer):
    """Changes a matrix by the same amount in every direction (Jordan et al., 2024,
    kellerjordan.github.io/posts/muon).

    A gradient is often large in a few directions and small in the rest; after orthogonalization it
    is equally large in all. The norm of a step is about the same as AdamW's, so the same learning
    rates fit (Liu et al., 2025, arXiv 2502.16982). torch.optim.Muon does the same, one matrix at a
    time; here all matrices of the same shape form one batch."""

    def __init__(self, matrices: list[nn.Parameter], lr: Tensor, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        lr, weight_decay = self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]
        by_shape = defaultdict(list)
        for matrix in self.param_groups[0]["params"]:
            by_shape[matrix.shape].append(matrix)
        for shape, matrices in by_shape.items():
            gradients = torch.stack([matrix.grad for matrix in matrices])
            state = self.state[matrices[0]]  # holds the momentum of all: (count, rows, columns)
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(gradients)
            momentum = state["momentum"]
            momentum.lerp_(gradients, 0.05)  # a mean over about the last twenty steps
            ahead = gradients.lerp(momentum, 0.95)  # Nesterov: the gradient counts once more
            changes = orthogonalize(ahead) * 0.2 * math.sqrt(max(shape))  # AdamW's norm
            for matrix, change in zip(matrices, changes):
                matrix.mul_(1 - lr * weight_decay).sub_(lr * change)

def make_optimizers(model: nn.Module, lr: Tensor, options: Namespace) -> list:
    """Muon or AdamW (Loshchilov & Hutter, 2017, arXiv 1711.05101) for the matrices, and AdamW
    without weight decay for the rest. They share the learning rate `lr`, a tensor on the device."""
    capturable = options.device.type == "cuda"  # needed for CudaGraph, below
    # A capturable AdamW warns about steps outside a graph, but the first three must be outside.
    warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    rest = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    if options.muon:
        main = Muon(matrices, lr, options.weight_decay)
    else:
        main = torch.optim.AdamW(matrices, lr, weight_decay=options.weight_decay, fused=True,
                                 capturable=capturable)
    return [main, torch.optim.AdamW(rest, lr, weight_decay=0.0, fused=True, capturable=capturable)]

class CudaGraph:
    """A decorator for a training step, a function from images and labels to metrics.

    A step launches hundreds of small kernels, and a GPU runs them faster than Python can launch
    them. So on a GPU, after three ordinary steps as a warmup, this captures the step as a CUDA
    graph, and from then on replays the graph: one launch for all kernels. A graph always reads its
    inputs from one place in memory, and writes its results to another, so results are valid only
    until the next step. Random numbers are new in each replay."""

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.step = step
        self.calls = 0

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        if not images.is_cuda or self.calls <= 3:
            return self.step(images, labels)
        if self.calls == 4:
            self.capture(images, labels)
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.metrics

    def capture(self, images: Tensor, labels: Tensor) -> None:
        """Captures the kernels of a step without running them."""
        self.images, self.labels = images.clone(), labels.clone()
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: the data loader's own thread may use the GPU meanwhile
        with (torch.cuda.device(images.device),
              torch.cuda.graph(self.graph, capture_error_mode="thread_local")):
            self.metrics = self.step(self.images, self.labels)

def progress_bar(steps: int, epoch: int, batch_size: int) -> tqdm:
    """Counts an epoch's images on stderr, if that is a terminal and TQDM_DISABLE is not set."""
    shown = sys.stderr and sys.stderr.isatty() and not os.environ.get("TQDM_DISABLE")
    return tqdm(range(steps), f"epoch {epoch + 1}", leave=False, unit=" images",
                unit_scale=batch_size, disable=not shown)

def check_and_show(bar: tqdm, metrics: Tensor) -> None:
    """Shows the loss of an epoch's latest step. `metrics` (steps so far, 3) are loss, accuracy and
    gradient norm. Raises UserError if a step's gradient was infinite or NaN."""
    bad = (~metrics[:, 2].isfinite()).nonzero()
    if len(bad):
        raise UserError(f"the gradient became infinite or NaN in step {bad[0].item() + 1} of this "
                        "epoch: choose a lower --lr")
    bar.set_postfix_str(f"loss={metrics[-1, 0]:.3f}", refresh=False)

# ---- 4. runs: checkpoint, resume, test ----------------------------------------------------------

@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A file opened for writing. It gets its name only once it is complete, since a run may be
    stopped at any moment."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
        part.replace(path)
    except RuntimeError as error:  # torch.save turns the OSError of a full disk into its own error
        if isinstance(error.__context__, OSError):
            raise error.__context__
        raise
    finally:
        part.unlink(missing_ok=True)

def load_checkpoint(folder: Path, expected: dict) -> dict:
    """A run's checkpoint. Raises UserError if there is none, it is corrupt, or it does not have the
    expected values; PermissionError if it cannot be opened."""
    path = folder / "checkpoint.pt"
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no trained model: train one first, with python "
                        f"{folder.name.split('-')[0]}.py and the same options") from None
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # torch raises a dozen kinds of errors
        raise UserError(f"{path} is corrupt: train again, without --resume") from error
    different = [f"{name} {value}" for name, value in expected.items() if state.get(name) != value]
    if different:
        raise UserError(f"{path} was not trained with {', '.join(different)}: pass the options "
                        "that it was trained with, or another --out")
    return state

@torch.no_grad()
def predict(model: nn.Module, images: Tensor, device: torch.device, tta: int = 0) -> Tensor:
    """Probabilities (B, 10), on the CPU, for images (B, 28, 28). With test-time augmentation, the
    mean over all shifts of an image by up to `tta` pixels along both axes."""
    model.eval()
    shifts = list(itertools.product(range(-tta, tta + 1), repeat=2))
    total = torch.zeros(len(images), 10)
    for dx, dy in shifts:
        shifted = F.pad(images, (dx, -dx, dy, -dy))  # adds black on one side, and crops the other
        with mixed_precision(device):
            # forward: not compiled, since compiling would take longer than all predictions
            logits = [model.forward(normalize(x.to(device))) for x in shifted.split(500)]
        total += torch.cat(logits).float().softmax(dim=1).cpu()
    return total / len(shifts)

def three_best(probabilities: Tensor) -> str:
    """The three most probable digits and their probabilities, as text. The input is (10)."""
    best = probabilities.topk(3)
    return "   ".join(f"{digit} {p:6.1%}" for p, digit in zip(best.values, best.indices))

class Run:
    """A training run: its folder, its log, and the checkpoint from which it can be resumed."""

    def __init__(self, options: Namespace, train_set: Digits, model: nn.Module,
                 optimizers: list[torch.optim.Optimizer]) -> None:
        self.options, self.train_set = options, train_set
        self.model, self.optimizers = model, optimizers
        self.folder = run_folder(options, train_set.name)
        self.trained_with = {"run": self.folder.name, **model_options(options),
                             **training_options(options)}
        self.log: list[list[float]] = []  # for each epoch: loss, accuracy, seconds
        self.epoch_began = time.perf_counter()

    def start(self) -> None:
        """Makes the folder and prints what will be trained."""
        self.folder.mkdir(parents=True, exist_ok=True)
        options, count = self.options, len(self.train_set.images)
        size, other = ("small", "--no-small") if options.small else ("full-size", "--small")
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        print(f"{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}: the {size} model "
              f"({other} trains the other), {parameters:,} parameters, on {options.device}")
        print(f"{count:,} {self.train_set.name} digits, {options.epochs} epochs of "
              f"{count // options.batch_size} steps, seed {options.seed}", flush=True)
        if options.device.type == "cpu" and not options.small:
            print("full size takes hours on a CPU: --small takes minutes", flush=True)

    def resume(self) -> int:
        """With --resume, continues from the checkpoint if there is one. Returns the first epoch to
        train. Raises UserError."""
        if not self.options.resume or not (self.folder / "checkpoint.pt").exists():
            return 0
        state = load_checkpoint(self.folder, self.trained_with)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            group = dict(optimizer.param_groups[0])
            optimizer.load_state_dict(saved)  # replaces main()'s tensor lr with a copy
            optimizer.param_groups[0].update(group)
        self.log = state["log"]
        print(f"resumed after epoch {len(self.log)}", flush=True)
        return len(self.log)

    def save(self, metrics: Tensor) -> None:
        """Ends an epoch with its metrics (steps, 3): writes log.csv, curve.png and the checkpoint,
        and prints the means."""
        options, now = self.options, time.perf_counter()
        seconds, self.epoch_began = now - self.epoch_began, now
        loss, accuracy, _ = metrics.mean(dim=0).tolist()
        self.log.append([loss, accuracy, seconds])
        try:
            rows = [f"{epoch},{l},{a},{s:.1f}" for epoch, (l, a, s) in enumerate(self.log, start=1)]
            text = "\n".join(["epoch,loss,accuracy,seconds", *rows, ""])
            (self.folder / "log.csv").write_text(text)
            draw_curve(self.folder / "curve.png", self.log)
        except PermissionError as error:  # on Windows, while another program has it open
            print(f"{error}: it will be written after the next epoch", file=sys.stderr)
        saving = torch.utils.serialization.config.save
        saving.compute_crc32 = False  # without checksums, saving takes a third less time
        saving.use_pinned_memory_for_d2h = options.device.type == "cuda"  # and another quarter less
        with atomic_write(self.folder / "checkpoint.pt") as file:
            torch.save({**self.trained_with, "log": self.log, "model": self.model.state_dict(),
                        "optimizers": [each.state_dict() for each in self.optimizers]}, file)
        left = f"{(options.epochs - len(self.log)) * seconds / 60:.0f} minutes left"
        if options.compile and len(self.log) == 1:  # this epoch's time includes compiling
            left = "less than " + left
        print(f"epoch {len(self.log)} of {options.epochs}: loss {loss:.4f}, {accuracy:.2%} of the "
              f"{self.train_set.name} training digits correct, {seconds:.1f} s, {left}", flush=True)

    def test(self, test_set: Digits) -> None:
        """Prints ten predictions and the accuracy, and draws mistakes.png."""
        name, images, labels = test_set
        kind = "validation" if self.options.validate else "test"
        probabilities = predict(self.model, images, self.options.device, self.options.tta)
        predicted = probabilities.argmax(dim=1)
        print(f"\nten {name} {kind} digits, and the model's top three predictions:")
        for label, digit, row in zip(labels[:10], predicted, probabilities):
            print(f"  {label}:   {three_best(row)}{'' if digit == label else '   wrong'}")
        wrong = (predicted != labels).nonzero().flatten()
        total, correct = len(labels), len(labels) - len(wrong)
        print(f"\n{kind} accuracy: {correct / total:.2%} ({correct} of {total} {name} {kind} "
              "digits)", flush=True)
        captions = [f"{labels[index]}, not {predicted[index]}" for index in wrong]
        draw_grid(self.folder / "mistakes.png", images[wrong][:40], captions, columns=8)

# ---- 5. drawings --------------------------------------------------------------------------------

def draw_grid(path: Path, images: Tensor, captions: list[str], columns: int) -> None:
    """Draws a grid of images, bytes (B, height, width) or in color (B, height, width, 3)."""
    rows = max(1, math.ceil(len(images) / columns))
    page = Image.new("RGB", (120 * columns, 140 * rows), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    for index, (image, caption) in enumerate(zip(images, captions)):
        x, y = 120 * (index % columns), 140 * (index // columns)
        tile = Image.fromarray(image.numpy()).resize((112, 112), Image.Resampling.NEAREST)
        page.paste(tile, (x + 4, y + 24))
        pen.text((x + 60, y + 12), caption, "black", font, anchor="mm")
    page.save(path)

def draw_curve(path: Path, log: list[list[float]]) -> None:
    """Draws the training loss and accuracy over the epochs."""
    page = Image.new("RGB", (840, 300), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(16)
    for column, (title, left) in enumerate([("training loss", 80), ("accuracy", 500)]):
        values = [row[column] for row in log]
        low, high = min(values), max(values)
        xs = [left + 300 * n / max(1, len(values) - 1) for n in range(len(values))]
        ys = [250 - 200 * (value - low) / max(1e-9, high - low) for value in values]
        pen.rectangle((left, 50, left + 300, 250), outline="gray")
        pen.line(list(zip(xs, ys)), "darkorange", width=3)
        pen.ellipse((xs[-1] - 4, ys[-1] - 4, xs[-1] + 4, ys[-1] + 4), "darkorange")
        for x, y, text in ((left + 150, 25, title), (left - 35, 50, f"{high:.3f}"),
                           (left - 35, 250, f"{low:.3f}"), (left, 270, "epoch 1"),
                           (left + 300, 270, str(len(values)))):
            pen.text((x, y), text, "black", font, anchor="mm")
    page.save(path)

@torch.no_grad()
def draw_attention(path: Path, model: nn.Module, image: Tensor, options: Namespace) -> None:
    """Draws the attention weights for an image, bytes (28, 28): a row for each attention layer (a
    decoder layer has three), a column for each head, with orange for large weights. On patches: the
    class token's weights, over the image. Flat: all d x d weights, a row for each query."""
    weights = []

    def keep(attention: Attention, inputs: tuple[Tensor, Tensor]) -> None:
        weights.append(attention.weights(*inputs)[0].float().cpu())  # (H, N or 1, N) or (H, d, d)

    layers = [module for module in model.modules() if isinstance(module, Attention)]
    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    predict(model, image[None], options.device)
    for hook in hooks:
        hook.remove()
    on_patches = options.patch_size < 28
    if on_patches:  # the class token's row, without its own weight, as a map of the patches
        side = 28 // options.patch_size
        maps = torch.cat([layer[:, 0, 1:].unflatten(-1, (side, side)) for layer in weights])
        maps = F.interpolate(maps[None], (28, 28))[0]  # (layers * H, 28, 28)
    else:
        maps = torch.cat(weights)  # (layers * H, d, d)
    maps = maps / maps.amax(dim=(1, 2), keepdim=True)
    colors = 1 - maps.unsqueeze(-1) * torch.tensor([0.0, 0.5, 1.0])  # from white to orange
    if on_patches:
        colors = colors * (1 - image.unsqueeze(-1) / 255)  # the digit, in black
    captions = [f"layer {layer + 1}, head {head + 1}"
                for layer in range(len(layers)) for head in range(options.heads)]
    draw_grid(path, (255 * colors).byte(), captions, columns=options.heads)

# ---- 6. the command line ------------------------------------------------------------------------

def between(kind: type, least: float, most: float) -> Callable[[str], float]:
    """A type for argparse: a number of this kind from `least` to `most`, both included."""
    def number(text: str) -> float:
        value = kind(text)
        if not least <= value <= most:  # also true for NaN
            raise ArgumentTypeError(f"{text} is not between {least} and {most}")
        return value
    return number

def working_device(name: str) -> torch.device:
    """A type for argparse: a device that can add two numbers."""
    try:
        one = torch.ones(1, device=name)
        (one + one).item()  # fails where the driver or the GPU is too old
        return one.device
    except (RuntimeError, AssertionError, ImportError, NotImplementedError) as error:
        raise ArgumentTypeError(f"{name} does not work here: try --device cpu") from error

def make_parser(about: str, full: dict, small: dict) -> ArgumentParser:
    """The options of all scripts. --device and --small are parsed first: other defaults depend on
    them. --small is on unless the device is a CUDA GPU, and takes `small` in place of `full`."""
    torch.set_float32_matmul_precision("high")  # for the whole run: TF32 where bfloat16 is not used
    parser = ArgumentParser(description=about.splitlines()[0], usage="%(prog)s [options]",
                            add_help=False, allow_abbrev=False,
                            formatter_class=ArgumentDefaultsHelpFormatter)
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ["WORLD_SIZE"] != "1":
        parser.error("this trains on one GPU: start it with python, not with torchrun")
    model, training, run = map(parser.add_argument_group, ("model", "training", "run"))
    fastest = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    run.add_argument("--device", type=working_device, default=str(fastest), help="cpu, cuda or mps")
    device = parser.parse_known_args()[0].device
    run.add_argument("--small", action=BooleanOptionalAction, default=device.type != "cuda",
                     help="train the small model, on patches, instead of the full-size one")
    is_small = parser.parse_known_args()[0].small
    add_model_options(model)
    add_training_options(training)
    add_run_options(run)
    # Compiling needs a C compiler and Python's headers. It would not pay off for a small model.
    headers = Path(sysconfig.get_path("include"), "Python.h")
    compiles = (device.type == "cuda" and not is_small and headers.exists()
                and shutil.which("cc") is not None)
    parser.set_defaults(device=device, compile=compiles, **(small if is_small else full))
    return parser

def add_model_options(group: ArgumentParser) -> None:
    group.add_argument("--layers", type=between(int, 1, 999), help="number of layers")
    group.add_argument("--heads", type=between(int, 1, 99_999), help="attention heads per layer")
    group.add_argument("--dim", type=between(int, 1, 99_999), help="embedding width")
    group.add_argument("--patch-size", type=between(int, 1, 28),
                       help="side of a patch in pixels; 28 is the whole image, flat")
    group.add_argument("--overlap", type=between(int, 0, 27), default=0,
                       help="pixels by which a patch extends into its neighbors on each side")
    group.add_argument("--dropout", type=between(float, 0, 0.99), default=0.0,
                       help="dropout probability after attention and MLP")
    group.add_argument("--input-dropout", type=between(float, 0, 0.99), default=0.0,
                       help="fraction of patches, or of a flat image's pixels, to drop in training")

def add_training_options(group: ArgumentParser) -> None:
    group.add_argument("--epochs", type=between(int, 0, 999_999), help="number of epochs")
    group.add_argument("--batch-size", type=between(int, 1, 999_999), help="digits per step")
    group.add_argument("--lr", type=between(float, 0, 1e99), help="peak learning rate")
    group.add_argument("--weight-decay", type=between(float, 0, 1e99),
                       help="weight decay for the matrices")
    group.add_argument("--muon", action=BooleanOptionalAction, default=False,
                       help="Muon instead of AdamW for the matrices")
    group.add_argument("--adversarial", type=between(float, 0, 1e99), metavar="SIZE", default=0.0,
                       help="also train on adversarial examples, at this L2 distance from the "
                            "digits; 1 is one pixel turned from black to white")

def add_run_options(group: ArgumentParser) -> None:
    group.add_argument("--seed", type=between(int, 0, 2**32 - 1), default=0, help="random seed")
    group.add_argument("--validate", action="store_true",
                       help="hold out 5,000 training digits and test on them")
    group.add_argument("--tta", type=between(int, 0, 27), metavar="PIXELS", default=0,
                       help="test-time augmentation: average the predictions over all shifts by up "
                            "to this many pixels")
    group.add_argument("--resume", action="store_true", help="continue a run that was stopped")
    group.add_argument("--dataset", choices=("MNIST", "FashionMNIST", "KMNIST", "drawn"),
                       default="MNIST", help="drawn: digits in one font, which need no files")
    group.add_argument("--data-dir", type=Path, default=Path(__file__).parent / "data",
                       help="folder for the data sets")
    group.add_argument("--out", type=Path, default=Path("runs"), help="folder for the runs")
    group.add_argument("--compile", action=BooleanOptionalAction, help="torch.compile the model")
    group.add_argument("-h", "--help", action="help", help="show this help and exit")

def model_options(options: Namespace) -> dict:
    """The options that a model is built with, by name."""
    names = "layers", "heads", "dim", "patch_size", "overlap", "dropout", "input_dropout"
    return {name: getattr(options, name) for name in names}

def training_options(options: Namespace) -> dict:
    """The options that training depends on, by name, apart from the data set and the seed."""
    names = "epochs", "batch_size", "lr", "weight_decay", "muon", "adversarial"
    return {name: getattr(options, name) for name in names}

def run_folder(options: Namespace, data_set: str) -> Path:
    """The folder of this script's run on a data set."""
    small, validate = "-small" if options.small else "", "-validate" if options.validate else ""
    name = f"{Path(sys.argv[0]).stem}-{data_set}{small}{validate}-seed{options.seed}"
    return options.out.expanduser() / name

@contextmanager
def report_errors() -> Iterator[None]:
    """Wraps main(). A user's mistake, a system error or Ctrl-C ends the program with one line on
    stderr. Any other exception is a bug and keeps its traceback."""
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may be unable to print a file name
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
        return
    except UserError as error:
        code, message = 2, str(error)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
        command = shlex.join(word for word in sys.argv if word != "--resume")
        message = f"stopped. Resume with: python {command} --resume"
    except (MemoryError, torch.OutOfMemoryError):
        code, message = 2, "out of memory: choose a smaller --batch-size, or --small"
    except ConnectionResetError:
        raise  # a worker process was killed: no file is at fault
    except OSError as error:
        code, message = 2, (f"cannot read or write a file ({error}): check its permissions and the "
                            "free disk space, or choose another --out or --data-dir")
    print(f"\n{Path(sys.argv[0]).name}: {message}", file=sys.stderr)  # below the progress bar
    sys.exit(code)
