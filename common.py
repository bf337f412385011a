"""What the four scripts share, from the leaves to the root:

1. attention and blocks   what every model is made of
2. digits                 loading them, handing them out in batches
3. training               the recipe, the learning rate, the loop
4. the command line       options, and a run from its first line to its last

Letters in the shape comments: B images, N tokens, D width of a token, H heads, d = D / H width of a head.
"""

import argparse
import itertools
import json
import math
import os
import signal
import socket
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, get_args

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.datasets.utils import check_integrity
from tqdm import tqdm


class Problem(ValueError):
    """An error that the user can fix: the message says what is wrong and what to do, in a sentence."""


# ---- 1. attention and blocks -------------------------------------------------------------------------------


class Attention(nn.Module):
    """Scaled dot-product attention (Vaswani et al., 2017, arXiv 1706.03762) in several heads:

        weights = softmax(query @ key^T / sqrt(width)),   out = weights @ value

    The shape of the input says what attends to what.
    (B, N, D): the N tokens, as in every ViT. A head sees N tokens of width d.
    (B, D), a flat image: its features. The image is one token, and softmax over one token is always 1, so
    attention over tokens would do nothing. But query, key and value of a head are d numbers each: taken as d
    tokens of width 1, they attend to each other, number i to number j with softmax_j(query[i] * key[j]). This
    is the one-token case of cross-covariance attention (El-Nouby et al., 2021, arXiv 2106.09681).

    Queries come from x; keys and values from the context, which has x's shape, or from x if there is none.
    Raises Problem when the heads do not divide dim.
    """

    fused = True  # False takes the formula as it is written, and leaves `weights` behind to look at

    def __init__(self, dim: int, heads: int, qkv_bias: bool = False) -> None:
        super().__init__()
        if dim % heads:
            raise Problem(f"{heads} heads do not divide a width of {dim}: choose other --heads or --dim")
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> Tensor:
        """Cuts the last axis into heads, each with tokens of some width."""
        flat, x = x.dim() == 2, x.unflatten(-1, (self.heads, -1))  # (B, H, d) or (B, N, H, d)
        return x.unsqueeze(3) if flat else x.transpose(1, 2)  # (B, H, d, 1) or (B, H, N, d)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        query, key, value = map(self.split, (self.query(x), self.key(context), self.value(context)))
        if self.fused:
            out = F.scaled_dot_product_attention(query, key, value)
        else:
            scores = query @ key.mT / math.sqrt(query.shape[-1])  # (B, H, d, d) or (B, H, N, N)
            self.weights = scores.softmax(dim=-1)
            out = self.weights @ value
        if x.dim() == 3:
            out = out.transpose(1, 2)  # (B, H, N, d) to (B, N, H, d)
        return self.proj(out.reshape(x.shape))


class MLP(nn.Sequential):
    """Two linear layers, 4 D wide between them; the shape (..., D) stays."""

    def __init__(self, dim: int) -> None:
        super().__init__(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))


class Block(nn.Module):
    """A pre-norm transformer block. The shape, (B, N, D) or (B, D), stays."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0, qkv_bias: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = Attention(dim, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


# ---- 2. digits: images are bytes, (N, 28, 28), until they are on the device --------------------------------

DATASETS = ("MNIST", "FashionMNIST", "KMNIST", "drawn")


def normalise(images: Tensor) -> Tensor:
    """Bytes (B, 28, 28) to floats (B, 1, 28, 28) with mean 0 and variance 1 over MNIST's training pixels."""
    return (images.unsqueeze(1) / 255 - 0.1307) / 0.3081


def generator(*numbers: int) -> torch.Generator:
    """Random numbers that follow from all of these. (torch uses 32 bits of a seed, so they are hashed.)"""
    return torch.Generator().manual_seed(hash(numbers) % 2**32)


def draw_digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images and labels of stand-in digits: PIL's built-in font, each turned, sized and moved at random."""
    pictures = []
    for digit in "0123456789":
        picture = Image.new("L", (28, 28))
        ImageDraw.Draw(picture).text((14, 14), digit, fill=255, font=ImageFont.load_default(24), anchor="mm")
        pictures.append(torch.tensor(list(picture.tobytes()), dtype=torch.float32).view(1, 28, 28))
    labels = torch.arange(count) % 10
    affine = torch.eye(2, 3) + 0.15 * torch.randn(count, 2, 3, generator=generator(seed))
    grid = F.affine_grid(affine, [count, 1, 28, 28], align_corners=False)
    return F.grid_sample(torch.stack(pictures)[labels], grid, align_corners=False).squeeze(1).byte(), labels


def load_digits(name: str | None, data_dir: str | None) -> tuple[str, list[Tensor], list[Tensor]]:
    """The data set's name, then images and labels for training, then for the test.

    With no name it is MNIST, or drawn digits and a warning where MNIST is not to be had.
    Raises Problem when the data set asked for cannot be had, or a file is damaged.
    """
    if name == "drawn":
        return name, list(draw_digits(10_000, seed=0)), list(draw_digits(2_000, seed=1))
    source = getattr(torchvision.datasets, name or "MNIST")
    root = Path(data_dir or Path(__file__).parent / "data")
    raw = root / source.__name__ / "raw"
    try:
        for file, md5 in source.resources:  # torchvision checks what it unpacks, and trusts what is unpacked
            unpacked, count = raw / file.removesuffix(".gz"), 60_000 if "train" in file else 10_000
            content = unpacked.read_bytes() if unpacked.exists() else None
            sound = content is None or len(content) == (16 + 784 * count if "images" in file else 8 + count)
            if content and check_integrity(raw / file, md5):  # a .gz ends with its content's crc and length
                sound = zlib.crc32(content) == int.from_bytes((raw / file).read_bytes()[-8:-4], "little")
            if not sound:
                raise Problem(f"{unpacked} is damaged: delete it and run again, it is then unpacked anew")
        socket.setdefaulttimeout(30)  # seconds without an answer
        train, test = (source(root, train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:
        for file, md5 in source.resources:
            if os.path.exists(raw / file) and not check_integrity(raw / file, md5):
                raise Problem(f"{raw / file} is damaged and cannot be downloaded: replace it") from error
        reason, files = " ".join(str(error).split()), ", ".join(file for file, _ in source.resources)
        missing = (f"{source.__name__} is not on disk and cannot be downloaded ({reason}): put {files} into "
                   f"{raw}, or choose --dataset drawn")
        if name:
            raise Problem(missing) from error
        warning = f"WARNING: {missing}\nThis run goes on with DRAWN digits, which say nothing about MNIST."
        print("!" * 100, warning, "!" * 100, sep="\n", file=sys.stderr)
        return load_digits("drawn", data_dir)
    return source.__name__, [train.data, train.targets], [test.data, test.targets]


def sample_numbers(size: int, recipe: "Recipe", first_epoch: int = 0) -> Iterator[Tensor]:
    """The batches of all epochs from the first; sample number n is digit n % size, seen in epoch n // size.
    The order follows from the seed and the epoch. What does not fill a last batch is left out."""
    for epoch in range(first_epoch, recipe.epochs):
        numbers = torch.randperm(size, generator=generator(recipe.seed, epoch)) + epoch * size
        yield from numbers.split(recipe.batch_size)[: size // recipe.batch_size]


# ---- 3. training -------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Recipe:
    """A model's sizes and how it is trained. Each field is an option of the command line, with its lowest
    value and its help. Raises Problem for a value that makes no sense."""

    small: Annotated[bool, "the small model, on patches, for a CPU"] = False
    layers: Annotated[int, 1, "layers of the model"]
    heads: Annotated[int, 1, "attention heads of a layer"]
    dim: Annotated[int, 1, "width of a token; a flat image is 784 wide"]
    patch_size: Annotated[int, 1, "side of a patch in pixels; 28 is the flat image"]
    dropout: Annotated[float, 0, "share of a block's outputs that training sets to 0"] = 0.0
    epochs: Annotated[int, 0, "how often the model sees each training digit; 0 only evaluates"]
    batch_size: Annotated[int, 1, "digits in a training step"]
    lr: Annotated[float, 0, "the highest learning rate"]
    weight_decay: Annotated[float, 0, "AdamW's weight decay, on matrices only"]
    seed: Annotated[int, 0, "what everything random follows from"] = 0
    seeds: Annotated[int, 1, "train this often, with the seeds seed, seed + 1, ..."] = 1
    out: Annotated[str, "folder for the runs, in <script>-<dataset>[-small]-seed<N>"] = "runs"
    resume: Annotated[bool, "go on from the run's checkpoint"] = False
    validate: Annotated[bool, "hold out the last 5,000 training digits, and test on them"] = False
    dataset: Annotated[str | None, f"{', '.join(DATASETS)} (default MNIST, else drawn)"] = None
    data_dir: Annotated[str | None, "folder of the data sets (default data, beside the scripts)"] = None
    workers: Annotated[int | None, 0, "processes that augment, if any do (default 4, on a CPU 0)"] = None
    device: Annotated[str | None, "cpu, cuda, mps, ... (default the fastest there is)"] = None
    compile: Annotated[bool | None, "torch.compile the model (default on Linux with CUDA)"] = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value, (*lowest, meaning) = getattr(self, field.name), field.type.__metadata__
            if lowest and value is not None and not lowest[0] <= value < math.inf:
                raise Problem(f"--{field.name.replace('_', '-')} {value} fails: choose {lowest[0]} or more")
        if self.dropout >= 1:
            raise Problem(f"--dropout {self.dropout} leaves nothing: choose a share below 1")
        if self.dataset not in (None, *DATASETS):
            raise Problem(f"--dataset {self.dataset} is not known: choose one of {', '.join(DATASETS)}")

    def sizes(self) -> dict:
        """What a model is made from."""
        return {name: getattr(self, name) for name in ("layers", "heads", "dim", "patch_size", "dropout")}


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Grows over the first tenth of the steps, then falls along half a cosine."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, 2017, arXiv 1711.05101); only matrices decay."""
    groups = [{"params": [p for p in model.parameters() if p.dim() == 2]},
              {"params": [p for p in model.parameters() if p.dim() != 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, recipe.lr, weight_decay=recipe.weight_decay, fused=True)


def mixed_precision(device: str) -> torch.autocast:
    """bfloat16 on a GPU that is made for it; float32 elsewhere."""
    fast = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=fast)


def train_epoch(model: nn.Module, batches: Iterator, steps: int, optimizer: torch.optim.Optimizer,
                recipe: Recipe, epoch: int) -> tuple[float, float]:
    """Learns from `steps` batches; returns the mean loss and the share of right answers on the way. Raises
    Problem when the loss is no longer a number."""
    model.train()
    pinned, read_at = recipe.device.startswith("cuda"), 0.0
    losses, right = torch.zeros(steps, device=recipe.device), torch.zeros((), device=recipe.device)
    bar = tqdm(itertools.islice(batches, steps), desc=f"epoch {epoch + 1}", total=steps, leave=False,
               unit=" images", unit_scale=recipe.batch_size)
    for step, (images, labels) in enumerate(bar):
        images, labels = (part.to(recipe.device, non_blocking=pinned) for part in (images, labels))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(epoch * steps + step, recipe.epochs * steps, recipe.lr)
        with mixed_precision(recipe.device):
            logits = model(normalise(images))
            loss = F.cross_entropy(logits, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        losses[step] = loss.detach()
        right += (logits.argmax(dim=1) == labels).sum()
        if time.perf_counter() - read_at > 0.5 or step == steps - 1:  # rarely: reading waits for the GPU
            read_at = time.perf_counter()
            bar.set_postfix(loss=f"{losses[step]:.3f}")
            bad = losses.isfinite().logical_not().nonzero()
            if len(bad):
                number = epoch * steps + bad[0].item() + 1
                raise Problem(f"the loss is {losses[bad[0]].item()} in step {number}: choose a lower --lr")
    return losses.mean().item(), right.item() / (steps * recipe.batch_size)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, device: str) -> Tensor:
    """The model's probabilities for images (N, 28, 28), as (N, 10) on the CPU; without dropout."""
    model.eval()
    with mixed_precision(device):
        logits = torch.cat([model(normalise(part.to(device))) for part in images.split(500)])
    return logits.float().softmax(dim=1).cpu()


def save(out: Path, state: dict, recipe: Recipe) -> None:
    """Writes a run's files. The checkpoint gets its name when complete, so that it is whole at any moment."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "checkpoint.part", "wb") as file:
            torch.save(state, file)
            os.fsync(file.fileno())
        (out / "checkpoint.part").replace(out / "checkpoint.pt")
        (out / "log.csv").write_text("\n".join(["epoch,loss,accuracy,seconds", *state["log"], ""]))
        (out / "options.json").write_text(json.dumps(asdict(recipe), indent=2))
    except (OSError, RuntimeError) as error:
        raise Problem(f"cannot write to {out} ({error}): make room, or choose another --out") from error


def load(path: Path, made_by: dict) -> dict:
    """A checkpoint's state. Raises Problem where there is none, it is damaged, or something else made it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds
        raise Problem(f"{path} is missing or damaged ({type(error).__name__}): omit --resume") from error
    if not isinstance(state, dict) or state.get("made_by") != made_by:
        raise Problem(f"{path} is not a checkpoint of {made_by}: give its options, or choose another --out")
    return state


def train(model: nn.Module, batches: Callable, steps: int, recipe: Recipe, out: Path, made_by: dict) -> None:
    """Trains for all epochs of `steps` batches each; after each, prints a line and saves a checkpoint."""
    optimizer, first, log, signals = make_optimizer(model, recipe), 0, [], []
    if recipe.resume and (out / "checkpoint.pt").exists():
        state = load(out / "checkpoint.pt", made_by)
        first, log = state["epoch"], state["log"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for number in (signal.SIGINT, signal.SIGTERM):  # a run ends between two steps, never within one
        signal.signal(number, lambda number, frame: signals.append(number))
    stream = iter(batches(first))

    def until_signal() -> Iterator:
        while not signals:
            yield next(stream)
        raise KeyboardInterrupt(signals[0])

    for epoch in range(first, recipe.epochs):
        start = time.perf_counter()
        torch.manual_seed(generator(recipe.seed, epoch).initial_seed())  # for dropout
        loss, share = train_epoch(model, until_signal(), steps, optimizer, recipe, epoch)
        log.append(f"{epoch + 1},{loss!r},{share!r},{time.perf_counter() - start:.1f}")
        save(out, {"made_by": made_by, "epoch": epoch + 1, "log": log, "model": model.state_dict(),
                   "optimizer": optimizer.state_dict()}, recipe)
        print(f"epoch {epoch + 1} of {recipe.epochs}: loss {loss:.4f}, {share:.2%} of the {recipe.dataset} "
              f"training digits right, {time.perf_counter() - start:.1f} s", flush=True)


# ---- 4. the command line -----------------------------------------------------------------------------------


def read_options(about: str, full: Recipe, small: Recipe) -> Recipe:
    """The recipe that the command line asks for."""
    parser = argparse.ArgumentParser(usage="%(prog)s [--small] [options]", description=about,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Recipe):
        kind, meaning = field.type.__origin__, field.type.__metadata__[-1]
        how = {"type": (get_args(kind) or [kind])[0], "metavar": "X"}
        if how["type"] is bool:
            how = {"action": argparse.BooleanOptionalAction if kind == bool | None else "store_true"}
        elif getattr(full, field.name) is not None:
            meaning += f" (default {getattr(full, field.name)}; small {getattr(small, field.name)})"
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, default=argparse.SUPPRESS, help=meaning, **how)
    given = vars(parser.parse_args())
    return replace(small if "small" in given else full, **given)


def choose_device(name: str | None) -> str:
    """The device asked for, or the fastest there is. Raises Problem when it is not available."""
    try:  # current_accelerator is None where there is but a CPU
        probe = torch.zeros(1, device=name or torch.accelerator.current_accelerator(True))
        probe.cpu()  # the device "meta" has nothing to give back
        return str(probe.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise Problem(f"--device {name} does not work here ({reason}): choose another, or cpu") from error


def show_ten(probabilities: Tensor, labels: Tensor, what: str) -> None:
    """Prints the three most probable answers to the first ten images."""
    print(f"\nten {what}, and the model's three most probable answers:")
    for label, row in zip(labels[:10].tolist(), probabilities):
        best = row.topk(3)
        answers = "   ".join(f"{i} {p:6.1%}" for p, i in zip(best.values.tolist(), best.indices.tolist()))
        print(f"  {label}:   {answers}" + ("" if best.indices[0] == label else "   wrong"))


def experiment(script: str, build: Callable, recipe: Recipe, batches: Callable) -> None:
    """From the first line to the last: trains the recipe's model, once a seed, and prints its accuracy."""
    device = choose_device(recipe.device)
    torch.set_float32_matmul_precision("high")  # TF32, where a GPU computes in float32 at all
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build(**recipe.sizes()).parameters())
    name, (images, labels), (test_images, test_labels) = load_digits(recipe.dataset, recipe.data_dir)
    kind, what = "test", f"{name} test digits"
    if recipe.validate:
        kind, what = "validation", f"held-out {name} training digits"
        (images, test_images), (labels, test_labels) = [(x[:-5000], x[-5000:]) for x in (images, labels)]
    steps, total = len(images) // recipe.batch_size, len(test_images)
    if steps == 0:
        raise Problem(f"--batch-size {recipe.batch_size} is more than all {len(images)} digits: lower it")
    chosen = {"workers": 0 if device.startswith("cpu") else min(4, os.cpu_count() or 1),
              "compile": device.startswith("cuda") and sys.platform == "linux"}
    chosen = {name: value for name, value in chosen.items() if getattr(recipe, name) is None}
    recipe = replace(recipe, dataset=name, device=device, **chosen)
    print(f"{script}: {parameters:,} parameters, {device}, {len(images)} {name} digits, {recipe}", flush=True)

    accuracies = []
    for seed in range(recipe.seed, recipe.seed + recipe.seeds):
        torch.manual_seed(seed % 2**32)
        model = build(**recipe.sizes()).to(device)
        recipe = replace(recipe, seed=seed)
        made_by = {"script": script, **recipe.sizes(), "on": name, "seed": seed, "validate": recipe.validate}
        kinds = "-small" * recipe.small + "-validate" * recipe.validate
        out = Path(recipe.out, f"{Path(script).stem}-{name}{kinds}-seed{seed}")
        if recipe.compile:
            torch.compiler.reset()  # or, after some seeds, PyTorch finds that it compiled this often enough
            model.compile()
        if device.startswith("cpu") and not recipe.small and recipe.epochs:
            start = time.perf_counter()
            model(normalise(images[: recipe.batch_size])).sum().backward()
            model.zero_grad()
            minutes = (time.perf_counter() - start) * steps / 60
            print(f"an epoch will take about {minutes:.0f} minutes here; --small is for a CPU", flush=True)
        train(model, lambda first: batches(images, labels, recipe, first), steps, recipe, out, made_by)
        probabilities = predict(model, test_images, device)
        right = (probabilities.argmax(dim=1) == test_labels).sum().item()
        accuracies.append(right / total)
        show_ten(probabilities, test_labels, what)
        print(f"\n{kind} accuracy: {right / total:.2%} ({right} of {total} {what})", flush=True)
    if recipe.seeds > 1:
        mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
        print(f"{kind} accuracy: {mean:.3%} +- {deviation:.3%} (mean and standard deviation of "
              f"{recipe.seeds} seeds, {total} {what})")


def run(script: str, about: str, build: Callable[..., nn.Module], full: Recipe, small: Recipe,
        batches: Callable[..., Iterator]) -> None:
    """All of a script's main(): `build` makes a model from Recipe.sizes(), `batches` what it learns from. An
    error that the user can fix ends in a sentence on stderr and exit code 2."""
    script = Path(script).name
    try:
        recipe = read_options(about, full, small)
        return experiment(script, build, recipe, batches)
    except Problem as problem:
        code, sentence = 2, str(problem)
    except KeyboardInterrupt as stopped:
        code, sentence = 128 + (stopped.args or [signal.SIGINT])[0], "stopped: add --resume to go on"
    except (MemoryError, RuntimeError) as error:  # on a CPU and on MPS it is no OutOfMemoryError
        if not any(words in repr(error) for words in ("MemoryError", "out of memory", "allocate memory")):
            raise
        code, sentence = 2, f"out of memory: choose a --batch-size below {recipe.batch_size}, or --small"
    print(f"{script}: {sentence}", file=sys.stderr)
    sys.exit(code)
