"""What the four scripts share: 1. attention and blocks, 2. digits, 3. training, 4. pictures and options.
Letters in the shape comments: B images, N tokens, D width of a token, H heads, d = D / H width of a head."""

import argparse
import gzip
import itertools
import json
import math
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, get_args

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from tqdm import tqdm

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
DATASETS = ("MNIST", "FashionMNIST", "KMNIST", "drawn")


class Problem(ValueError):
    """An error that the user can fix: the message says what is wrong and what to do, in a sentence."""


# ---- 1. attention and blocks -------------------------------------------------------------------------------
class Attention(nn.Module):
    """Scaled dot-product attention (Vaswani et al., 2017, arXiv 1706.03762) in several heads:

        weights = softmax(query @ key^T / sqrt(query's width)),   out = weights @ value

    Input (B, N, D): its N tokens attend to each other, as in every ViT. Each head has d of the D numbers.
    Input (B, D), a flat image: one token, and softmax over one token is always 1. So its features attend:
    query, key and value of a head, d numbers each, are taken as d tokens of width 1, and number i attends to
    j with softmax_j(query[i] * key[j]) (cross-covariance attention: El-Nouby et al., 2021, arXiv 2106.09681).
    Queries come from x; keys and values from context, else x. Raises Problem if heads do not divide dim."""

    fused = True  # False, and not compiled: step by step, which leaves `weights` to look at

    def __init__(self, dim: int, heads: int, qkv_bias: bool = False) -> None:
        super().__init__()
        if dim % heads:
            raise Problem(f"{heads} heads do not divide a width of {dim}: choose other --heads or --dim")
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.proj = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, H, N, d): N tokens of width d; and (B, D) to (B, H, d, 1): d tokens of width 1."""
        heads = x.unflatten(-1, (self.heads, -1))  # (B, H, d) or (B, N, H, d)
        return heads.unsqueeze(3) if x.dim() == 2 else heads.transpose(1, 2)  # (B, H, d, 1) or (B, H, N, d)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        query = self.split(self.query(x))
        key, value = self.split(self.key(context)), self.split(self.value(context))
        if x.dim() == 2 and torch.compiler.is_compiling():  # the compiler makes one kernel of this
            out = ((query * key.mT).softmax(dim=-1) * value.mT).sum(dim=-1)  # (B, H, d)
        elif self.fused:
            out = F.scaled_dot_product_attention(query, key, value)
        else:
            scores = query @ key.mT / math.sqrt(query.shape[-1])  # (B, H, d, d) or (B, H, N, N)
            self.weights = scores.softmax(dim=-1)
            out = self.weights @ value
        out = out.transpose(1, 2) if x.dim() == 3 else out  # (B, H, N, d) to (B, N, H, d)
        return self.proj(out.reshape(x.shape))


class Block(nn.Module):
    """A pre-norm transformer block. The shape, (B, N, D) or (B, D), stays."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0, qkv_bias: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = Attention(dim, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


# ---- 2. digits: images are bytes, (B, 28, 28), until they are on the device --------------------------------
def normalise(images: Tensor) -> Tensor:
    """Bytes (B, 28, 28) to floats (B, 1, 28, 28) with mean 0 and variance 1 over MNIST's training pixels."""
    return (images.unsqueeze(1) / 255 - 0.1307) / 0.3081


def generator(*numbers: int) -> torch.Generator:
    """Random numbers that follow from all of these. (torch uses 32 bits of a seed, so they are hashed.)"""
    return torch.Generator().manual_seed(hash(numbers) % 2**32)


def draw_digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images and labels of stand-in digits: PIL's built-in font, each turned, sized and moved at random."""
    page = Image.new("L", (28, 280))
    for digit in range(10):
        ImageDraw.Draw(page).text((14, 28 * digit + 14), str(digit), 255, ImageFont.load_default(24), "mm")
    images, labels = torch.tensor(list(page.tobytes())).float().view(10, 1, 28, 28), torch.arange(count) % 10
    affine = torch.eye(2, 3) + 0.15 * torch.randn(count, 2, 3, generator=generator(seed))
    grid = F.affine_grid(affine, [count, 1, 28, 28], align_corners=False)
    return F.grid_sample(images[labels], grid, align_corners=False).squeeze(1).byte(), labels


def load_digits(name: str | None, data_dir: str | None) -> tuple[str, list[Tensor], list[Tensor]]:
    """The data set's name; images and labels for training, and for the test. No name means MNIST or, failing
    that, drawn digits and a warning. Raises Problem if one asked for is not to be had, or one is damaged."""
    if name == "drawn":
        return name, list(draw_digits(10_000, seed=0)), list(draw_digits(2_000, seed=1))
    source = getattr(torchvision.datasets, name or "MNIST")
    root = Path(data_dir or Path(__file__).parent / "data")
    socket.setdefaulttimeout(30)  # seconds without an answer
    try:
        train, test, failure = *(source(root, train=train, download=True) for train in (True, False)), None
    except Exception as error:  # of the network, the disk, a checksum: a dozen kinds
        failure = error
    for file, md5 in source.resources:  # torchvision checks what it unpacks, and trusts what is unpacked
        packed = root / source.__name__ / "raw" / file
        unpacked = packed.with_suffix("")
        sound = torchvision.datasets.utils.check_integrity(packed, md5)
        if packed.exists() and not sound:
            raise Problem(f"{packed} is damaged: replace it, or delete it to have it downloaded again")
        if sound and unpacked.exists() and gzip.decompress(packed.read_bytes()) != unpacked.read_bytes():
            raise Problem(f"{unpacked} is damaged: delete it, and it is unpacked again")
    if not failure:
        return source.__name__, [train.data, train.targets], [test.data, test.targets]
    files, reason = ", ".join(file for file, md5 in source.resources), " ".join(str(failure).split())
    missing = (f"{source.__name__} is not on disk, or not whole, and cannot be downloaded ({reason}): "
               f"put {files} into {packed.parent}, or choose --dataset drawn")
    if name:
        raise Problem(missing) from failure
    warning = f"WARNING: {missing}\nThis run goes on with DRAWN digits, which say nothing about MNIST."
    print("!" * 100, warning, "!" * 100, sep="\n", file=sys.stderr)
    return load_digits("drawn", data_dir)


# ---- 3. training -------------------------------------------------------------------------------------------
@dataclass(kw_only=True)
class Recipe:
    """A model and its training; each field is an option. Raises Problem for a value that makes no sense."""

    small: Annotated[bool, "the small model, on patches, for a CPU"] = False
    layers: Annotated[int, 1, 1000, "layers of the model"]
    heads: Annotated[int, 1, "attention heads of a layer"]
    dim: Annotated[int, 1, 100_000, "width of a token; a flat image is 784 wide"]
    patch_size: Annotated[int, 1, "side of a patch in pixels; 28 is the flat image"]
    overlap: Annotated[int, 0, 28, "pixels around a patch that it also sees, as do its neighbours"] = 0
    dropout: Annotated[float, 0, 1, "share of what a block adds that training sets to 0"] = 0.0
    input_dropout: Annotated[float, 0, 1, "share of patches left out, or pixels made grey, in training"] = 0.0
    adversarial: Annotated[float, 0, "learn each digit changed for the worst, too (1: by one pixel)"] = 0.0
    reach: Annotated[int, 0, 28, "pixels: answer with the mean over a digit moved by up to so many"] = 0
    epochs: Annotated[int, 0, "how often the model sees each training digit; 0 --resume only evaluates"]
    batch_size: Annotated[int, 1, "digits in a training step"]
    lr: Annotated[float, 0, "the highest learning rate"]
    weight_decay: Annotated[float, 0, "weight decay, on matrices only"]
    muon: Annotated[bool | None, "Muon in place of AdamW, for the matrices"] = False
    seed: Annotated[int, 0, "what everything random follows from"] = 0
    seeds: Annotated[int, 1, "train this often, with the seeds seed, seed + 1, ..."] = 1
    out: Annotated[str, "folder for the runs, in <script>-<dataset>[-small][-validate]-seed<N>"] = "runs"
    resume: Annotated[bool, "go on from the run's checkpoint"] = False
    predict: Annotated[list[str] | None, "pictures of digits, for the run's model to read"] = None
    validate: Annotated[bool, "hold out the last 5,000 training digits, and test on them"] = False
    dataset: Annotated[str | None, f"{', '.join(DATASETS)} (default MNIST, else drawn)"] = None
    data_dir: Annotated[str | None, "folder of the data sets (default data, beside the scripts)"] = None
    workers: Annotated[int | None, 0, "processes that augment (default up to 4; none on a CPU)"] = None
    device: Annotated[str | None, "cpu, cuda, mps, ... (default the fastest there is)"] = None
    compile: Annotated[bool | None, "torch.compile the blocks (default on Linux with CUDA)"] = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value, (*bounds, _) = getattr(self, field.name), field.type.__metadata__  # [], [low], [low, high]
            if bounds and value is not None and not bounds[0] <= value < [*bounds, math.inf][1]:
                name, limits = field.name.replace("_", "-"), " to below ".join(map(str, bounds))
                raise Problem(f"--{name} {value} fails: choose a number from {limits}")

    def sizes(self) -> dict:
        """What a model is made from."""
        names = ("layers", "heads", "dim", "patch_size", "overlap", "dropout", "input_dropout")
        return {name: getattr(self, name) for name in names}


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Grows over the first tenth of the steps, then falls along half a cosine."""
    warmup = max(1, steps // 10)
    falling = math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)) / 2 + 0.5
    return peak * min((step + 1) / warmup, falling)


def make_optimizers(model: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov & Hutter, 2017, arXiv 1711.05101), or for matrices Muon (Jordan et al., 2024): a step
    of one length in all directions of a matrix, about that of AdamW's. Only matrices decay."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    rest = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    if recipe.muon:
        first = torch.optim.Muon(matrices, recipe.lr, recipe.weight_decay, adjust_lr_fn="match_rms_adamw")
    else:
        first = torch.optim.AdamW(matrices, recipe.lr, weight_decay=recipe.weight_decay, fused=True)
    return [first, torch.optim.AdamW(rest, recipe.lr, weight_decay=0.0, fused=True)]


def mixed_precision(device: str) -> torch.autocast:
    """bfloat16 on a GPU that is made for it; float32 elsewhere."""
    fast = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=fast)


def train_epoch(model: nn.Module, batches: Iterator, steps: int, optimizers: list[torch.optim.Optimizer],
                recipe: Recipe, epoch: int) -> Tensor:
    """Learns from `steps` batches; returns mean loss and share of right answers. Raises Problem on NaN."""
    model.train()
    pinned, read_at, total = recipe.device.startswith("cuda"), 0.0, recipe.epochs * steps
    losses, right = torch.zeros(steps, device=recipe.device), torch.zeros((), device=recipe.device)
    bar = tqdm(itertools.islice(batches, steps), desc=f"epoch {epoch + 1}", total=steps, leave=False,
               unit=" images", unit_scale=recipe.batch_size, disable=RANK > 0)
    for step, (images, labels) in enumerate(bar):
        images, labels = (part.to(recipe.device, non_blocking=pinned) for part in (images, labels))
        images = normalise(images).requires_grad_(recipe.adversarial > 0)
        with mixed_precision(recipe.device):
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
        loss.backward()
        if recipe.adversarial:  # (Goodfellow et al., 2014) 0.3081: the unit is a pixel from black to white
            move = F.normalize(images.grad.flatten(1)).view_as(images) * recipe.adversarial / 0.3081
            with mixed_precision(recipe.device):
                F.cross_entropy(model(images.detach() + move), labels).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(epoch * steps + step, total, recipe.lr)
            optimizer.step()
            optimizer.zero_grad()
        losses[step] = loss.detach() + 0 * norm  # NaN where a gradient is not finite
        right += (logits.argmax(dim=1) == labels).sum()
        if time.perf_counter() - read_at > 0.5 or step == steps - 1:  # rarely: reading waits for the GPU
            read_at = time.perf_counter()
            bar.set_postfix(loss=f"{losses[step]:.3f}")
            if not losses.isfinite().all():
                number = epoch * steps + losses.isfinite().int().argmin().item() + 1
                raise Problem(f"the loss is no longer a number in step {number}: choose a lower --lr")
    return torch.stack([losses.mean(), right / steps / (recipe.batch_size // RANKS)])


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, device: str, reach: int = 0) -> Tensor:
    """Mean probabilities (B, 10) on the CPU of images (B, 28, 28) rolled up to `reach` pixels; no dropout."""
    model.eval()
    looks = (images.roll(move, (1, 2)) for move in itertools.product(range(-reach, reach + 1), repeat=2))
    with mixed_precision(device):
        logits = [torch.cat([model(normalise(x.to(device))) for x in look.split(500)]) for look in looks]
    return torch.stack(logits).float().softmax(dim=2).mean(dim=0).cpu()


def write(path: Path, put: Callable) -> None:
    """Writes a file, in the first process only. It is renamed when whole: `path` never names half a file."""
    if RANK == 0:
        with open(path.with_suffix(".part"), "wb") as file:
            put(file)
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).replace(path)


def load(out: Path, expected: dict) -> dict:
    """A run's checkpoint. Raises Problem where there is none, it is damaged, or other options made it."""
    path = out / "checkpoint.pt"
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises a dozen kinds
        raise Problem(f"{path} is no checkpoint ({type(error).__name__}): train it first, without --resume")
    other = {name: value for name, value in expected.items() if state.get(name, 0) != value}
    if other:
        raise Problem(f"{path} was not made with {other}: give its own options, or choose another --out")
    return state


def train(model: nn.Module, batches: Callable, steps: int, recipe: Recipe, out: Path) -> None:
    """Trains all epochs of `steps` batches: writes the options, learns, saves a checkpoint, prints a line."""
    optimizers, first, log, signals = make_optimizers(model, recipe), 0, ["epoch,loss,accuracy,seconds"], []
    names = ("adversarial", "muon", "epochs", "batch_size", "lr", "weight_decay") if recipe.epochs else ()
    made_by = {"run": out.name, **recipe.sizes(), **{name: getattr(recipe, name) for name in names}}
    if recipe.resume and (not recipe.epochs or (out / "checkpoint.pt").exists()):
        state = load(out, made_by)
        first, log = state["epoch"], state["log"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers if recipe.epochs else (), state["optimizers"]):
            optimizer.load_state_dict(saved)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    stream = itertools.takewhile(lambda batch: not signals, batches(first))  # workers start, deaf to signals
    for number in before:  # a run ends between two steps, never within one
        signal.signal(number, lambda number, frame: signals.append(number))
    learner = nn.parallel.DistributedDataParallel(model) if RANKS > 1 else model  # averages gradients
    for epoch in range(first, recipe.epochs):
        write(out / "options.json", lambda file: file.write(json.dumps(asdict(recipe), indent=2).encode()))
        start = time.perf_counter()
        torch.manual_seed(hash((recipe.seed, epoch, RANK)) % 2**32)  # for dropout, patches left out
        means = train_epoch(learner, stream, steps, optimizers, recipe, epoch)
        if signals:
            break
        if RANKS > 1:
            torch.distributed.all_reduce(means)
        loss, share = (means / RANKS).tolist()
        log.append(f"{epoch + 1},{loss!r},{share!r},{time.perf_counter() - start:.1f}")
        state = {**made_by, "epoch": epoch + 1, "log": log, "model": model.state_dict(),
                 "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
        write(out / "log.csv", lambda file: file.write("\n".join([*log, ""]).encode()))
        write(out / "checkpoint.pt", lambda file: torch.save(state, file))
        print(f"epoch {epoch + 1} of {recipe.epochs}: loss {loss:.4f}, {share:.2%} of the {recipe.dataset} "
              f"training digits right, {time.perf_counter() - start:.1f} s", flush=True)
    for number in before:
        signal.signal(number, before[number])
    if signals:
        raise KeyboardInterrupt(signals[0])


# ---- 4. pictures and the command line ----------------------------------------------------------------------
def sheet(path: Path, images: Tensor, captions: list[str], columns: int) -> None:
    """Writes bytes (B, height, width) or, in colour, (B, height, width, 3) as one PNG, with captions."""
    page = Image.new("RGB", (120 * columns, 140 * max(1, math.ceil(len(images) / columns))), "white")
    for number, (image, caption) in enumerate(zip(images, captions)):
        y, x = 140 * (number // columns), 120 * (number % columns)
        page.paste(Image.fromarray(image.numpy()).resize((112, 112), Image.NEAREST), (x + 4, y + 24))
        ImageDraw.Draw(page).text((x + 60, y + 12), caption, 0, ImageFont.load_default(14), "mm")
    write(path, lambda file: page.save(file, "PNG"))


def three_best(row: Tensor) -> str:
    """The three most probable digits, and how probable they are."""
    return "   ".join(f"{i} {p:6.1%}" for p, i in zip(*(best.tolist() for best in row.topk(3))))


def read_options(about: str, full: Recipe, small: Recipe) -> Recipe:
    """The recipe that the command line asks for."""
    parser = argparse.ArgumentParser(usage="%(prog)s [--small] [options]", description=about,
        argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Recipe):
        name, kind, meaning = field.name, field.type.__origin__, field.type.__metadata__[-1]
        how = {"type": [*get_args(kind), kind][0], "metavar": "X", "choices": {"dataset": DATASETS}.get(name)}
        if how["type"] == list[str]:
            how = {"nargs": "+", "metavar": "X"}
        elif how["type"] is bool:
            how = {"action": argparse.BooleanOptionalAction if kind == bool | None else "store_true"}
        elif getattr(full, name) is not None:
            meaning += f" (default {getattr(full, name)}; small {getattr(small, name)})"
        parser.add_argument("--" + name.replace("_", "-"), help=meaning, **how)
    given = vars(parser.parse_args())
    return replace(small if "small" in given else full, **given)


def choose_device(name: str | None) -> str:
    """The device asked for, or the fastest there is. Raises Problem when it is not available."""
    try:  # current_accelerator is None where there is but a CPU
        if "LOCAL_RANK" in os.environ and name != "cpu" and torch.accelerator.is_available():  # a GPU each
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        return str(torch.zeros(1, device=name or torch.accelerator.current_accelerator(True)).device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise Problem(f"--device {name or '(default)'} does not work here: choose another, or cpu") from error


def experiment(script: str, build: Callable, recipe: Recipe, batches: Callable,
               read: Callable, shows: tuple[Callable, ...]) -> None:
    """From the first line to the last: trains the recipe's model, once a seed, and prints its accuracy."""
    device = choose_device(recipe.device)
    torch.set_float32_matmul_precision("high")  # TF32, where a GPU computes in float32 at all
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build(**recipe.sizes()).parameters())
    digits = None if RANK else load_digits("drawn" if recipe.predict else recipe.dataset, recipe.data_dir)
    found = [digits and digits[0]]
    if RANKS > 1:  # the first process has fetched the digits: the others wait, and take the same
        torch.distributed.init_process_group()
        torch.distributed.broadcast_object_list(found)
    name, (images, labels), (test_images, test_labels) = digits or load_digits(found[0], recipe.data_dir)
    name = recipe.dataset or "MNIST" if recipe.predict else name  # (--predict needs no digits)
    kind, tail = ("validation", "-validate") if recipe.validate else ("test", "")
    if recipe.validate:
        (images, test_images), (labels, test_labels) = [(x[:-5000], x[-5000:]) for x in (images, labels)]
    steps, total, what = len(images) // recipe.batch_size, len(test_images), f"{name} {kind} digits"
    if (steps == 0 or recipe.batch_size % RANKS) and not recipe.predict:
        raise Problem(f"--batch-size {recipe.batch_size}: choose a multiple of {RANKS}, up to {len(images)}")
    workers = min(4, os.cpu_count() or 1) * (device != "cpu") if recipe.workers is None else recipe.workers
    recipe = replace(recipe, dataset=name, device=device, workers=workers)
    print(f"{script}: {parameters:,} parameters, {device}, {name}, {recipe}", flush=True)
    if device == "cpu" and recipe.patch_size == 28 and recipe.epochs and not recipe.predict:  # at 1e11 FLOP/s
        flops = 6 * parameters * len(images) * (2 if recipe.adversarial else 1)
        print(f"about {flops / 6e12:.0f} minutes an epoch; see --small", flush=True)
    accuracies = []
    for recipe in [replace(recipe, seed=recipe.seed + more) for more in range(recipe.seeds)]:
        torch.manual_seed(recipe.seed % 2**32)
        model = build(**recipe.sizes()).to(device)
        out = Path(recipe.out, f"{Path(script).stem}-{name}{'-small' * recipe.small}{tail}-seed{recipe.seed}")
        if recipe.predict:
            model.load_state_dict(load(out, {"run": out.name, **recipe.sizes()})["model"])
            return read(model, recipe)
        out.mkdir(parents=True, exist_ok=True)
        if recipe.compile or (recipe.compile is None and device[:4] == "cuda" and sys.platform == "linux"):
            model.apply(lambda module: isinstance(module, Block) and module.compile())  # alike: compiled once
        train(model, lambda first: batches(images, labels, recipe, first), steps, recipe, out)
        probabilities = predict(model, test_images, device, recipe.reach)
        answers = probabilities.argmax(dim=1)
        wrong = (answers != test_labels).nonzero().flatten()
        captions = [f"{label}, not {answer}" for label, answer in zip(test_labels[wrong], answers[wrong])]
        sheet(out / "mistakes.png", test_images[wrong][:40], captions, columns=8)
        for show in shows:
            show(out, model, images, test_images, recipe)
        accuracies.append(1 - len(wrong) / total)
        print(f"\nten {what}, and the model's three most probable answers:")
        for label, answer, row in zip(test_labels[:10], answers, probabilities):
            print(f"  {label}:   {three_best(row)}" + "   wrong" * (answer != label).item())
        print(f"\n{kind} accuracy: {accuracies[-1]:.2%} ({total - len(wrong)} of {total} {what})", flush=True)
    if recipe.seeds > 1:
        deviation, mean = torch.std_mean(torch.tensor(accuracies, dtype=torch.float64))
        print(f"{kind} accuracy: {mean:.3%} +- {deviation:.3%} ({recipe.seeds} seeds, {total} {what})")


def run(script: str, about: str, build: Callable[..., nn.Module], full: Recipe, small: Recipe,
        batches: Callable[..., Iterator], read: Callable, *shows: Callable) -> None:
    """A script's main(): `read` answers --predict, `shows` draw. What a user can mend exits with code 2."""
    sys.stdout = open(os.devnull, "w") if RANK else sys.stdout
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")  # a notebook's has no such method
    try:
        recipe = read_options(about, full, small)
        return experiment(Path(script).name, build, recipe, batches, read, shows)
    except Problem as problem:
        code, sentence = 2, str(problem)
    except KeyboardInterrupt as stopped:
        code = 128 + (stopped.args or [signal.SIGINT])[0]
        sentence = f"stopped: go on with python {shlex.join(x for x in sys.argv if x != '--resume')} --resume"
    except (MemoryError, RuntimeError, OSError) as error:
        sys.unraisablehook = lambda unraisable: None  # a loader whose worker died cannot end in good order
        lower = f"out of memory: choose a --batch-size below {recipe.batch_size}, or a small model (--small)"
        died = "a worker, or another rank, died: add --resume to go on, maybe with fewer --workers"
        eager = "the model cannot be compiled: add --no-compile"
        hints = {"MemoryError": lower, "out of memory": lower, "allocate": lower, "ALLOC_FAILED": lower,
                 "Connection": died, "DataLoader worker": died, "'torch._": eager, "torch.compile": eager}
        error = error.__context__ if "inline_container" in str(error) else error  # torch.save on a full disk
        disk = isinstance(error, OSError) and f"cannot read or write ({error}): make room, or change --out"
        code, sentence = 2, next((hints[w] for w in hints if w in f"{type(error)} {error}"), disk)
        if not sentence:
            raise
    print(f"{Path(script).name}: {sentence}", file=sys.stderr)
    sys.exit(code)
