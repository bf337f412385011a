"""The schedule, the optimizers, the training step and loop, CUDA graphs, and that models learn."""

import ast
import copy
import difflib
import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, read_options
from pytest import MonkeyPatch, approx
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import mini_vit
import mini_vit_augment
import mini_vit_concat
import mini_vit_crossattn

SCRIPTS = {mini_vit: mini_vit.ViT, mini_vit_concat: mini_vit_concat.ConcatViT,
           mini_vit_augment: mini_vit.ViT, mini_vit_crossattn: mini_vit_crossattn.CrossViT}
check_equal = partial(assert_close, rtol=0, atol=0)

def save_and_stop(run: common.Run, metrics: Tensor, save: Callable = common.Run.save) -> None:
    save(run, metrics)
    raise KeyboardInterrupt

@pytest.fixture
def train(command_line: Callable, few_digits: None) -> Callable:
    """Trains a tiny model, ten steps per epoch; returns its checkpoint without seconds."""
    def call(options: str, script: ModuleType = mini_vit, stopped: bool = False) -> dict:
        with MonkeyPatch.context() as patch:
            if stopped:  # by Ctrl-C, after the first epoch
                patch.setattr(common.Run, "save", save_and_stop)
            code, _, err = command_line(script, f"{TINY} {options}")
        assert code == 130 * stopped, err
        latest = max(Path("runs").rglob("checkpoint.pt"), key=lambda path: path.stat().st_mtime)
        state = torch.load(latest)
        return {"log": [row[:2] for row in state["log"]], "model": state["model"],
                "optimizers": [optimizer["state"] for optimizer in state["optimizers"]]}

    return call

@pytest.mark.parametrize("step, steps, expected", [
    (0, 100, 0.2), (4, 100, 1.0), (9, 100, 2.0), (10, 100, 2.0), (55, 100, 1.0), (99, 100, 0.0006),
    (0, 1, 2.0), (0, 3, 2.0), (2, 3, 1.0)])
def test_learning_rate(step: int, steps: int, expected: float) -> None:
    assert mini_vit.learning_rate(step, steps, 2.0) == approx(expected, abs=1e-4)

@pytest.mark.parametrize("build", dict.fromkeys(SCRIPTS.values()))
@pytest.mark.parametrize("muon", ["muon", "no-muon"])
def test_matrices_decay_and_nothing_else(build: type, muon: str) -> None:
    options = read_options(f"{TINY} --weight-decay 0.3 --{muon}")
    model = build(**common.model_options(options))
    optimizers = common.make_optimizers(model, torch.tensor(0.1), options)
    kinds = [common.Muon if muon == "muon" else torch.optim.AdamW, torch.optim.AdamW]
    assert [type(optimizer) for optimizer in optimizers] == kinds
    (decay,), (rest,) = (optimizer.param_groups for optimizer in optimizers)
    assert decay["weight_decay"] == 0.3 and rest["weight_decay"] == 0
    matrices = {id(parameter) for name, parameter in model.named_parameters()
                if name.endswith("weight") and "norm" not in name}
    others = {id(parameter) for parameter in model.parameters()} - matrices
    assert {*map(id, decay["params"])} == matrices and {*map(id, rest["params"])} == others

def random_matrices() -> list[nn.Parameter]:
    """Wide and tall ones, some with a thousand times the norm of others."""
    shapes = (12, 40), (40, 12), (12, 40), (40, 12), (40, 12)
    return [nn.Parameter(torch.randn(shape) / 10**power) for power, shape in enumerate(shapes)]

def take_steps(optimizer: torch.optim.Optimizer, seed: int) -> list[Tensor]:
    matrices, changes = optimizer.param_groups[0]["params"], []
    torch.manual_seed(seed)
    for number in (1, 2, 3):
        before = copy.deepcopy(matrices)
        for matrix, gradient in zip(matrices, random_matrices()):
            matrix.grad = gradient.detach()
        optimizer.param_groups[0]["lr"].fill_(0.1 / number)
        optimizer.step()
        changes += [(matrix - old).detach() for matrix, old in zip(matrices, before)]
    return changes

def with_svd(matrix: Tensor, factors: tuple, steps: int, least: float) -> Tensor:
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm().clamp(min=least)
    a, b, c = factors
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return (u * s @ v).float()

@pytest.mark.parametrize("exact, tolerance", [(False, 0.02), (True, 1e-5)])
def test_muon_takes_the_steps_of_torchs(exact: bool, tolerance: float,
                                        monkeypatch: MonkeyPatch) -> None:
    if exact:
        monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", with_svd)
    matrices = random_matrices()
    theirs = torch.optim.Muon(copy.deepcopy(matrices), torch.tensor(0.1), weight_decay=0.3,
                              momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw")
    ours = common.Muon(matrices, torch.tensor(0.1), weight_decay=0.3)
    for change, expected in zip(take_steps(ours, 1), take_steps(theirs, 1), strict=True):
        assert (change - expected).norm() < tolerance * expected.norm()

def test_muon_continues_from_its_saved_state_and_two_muons_are_independent() -> None:
    first = common.Muon(random_matrices(), torch.tensor(0.1), weight_decay=0.3)
    take_steps(first, 1)
    second = common.Muon(copy.deepcopy(first.param_groups[0]["params"]), torch.tensor(0.5), 0.0)
    torch.save(first.state_dict(), "muon.pt")
    expected = take_steps(first, 2)
    second.load_state_dict(torch.load("muon.pt", weights_only=True))
    check_equal(take_steps(second, 2), expected)

def test_a_muon_step_is_equally_large_in_all_directions() -> None:
    """From a gradient 100 times as large in one direction as in another. The step's root mean
    square is about 0.2 lr, as it is with AdamW (Liu et al., 2025, arXiv 2502.16982)."""
    matrix = nn.Parameter(torch.randn(256, 64))
    u, _, v = torch.linalg.svd(torch.randn(256, 64), full_matrices=False)
    before, matrix.grad = matrix.detach().clone(), u * torch.logspace(-1, 1, 64) @ v
    common.Muon([matrix], torch.tensor(0.01), weight_decay=0.0).step()
    change = matrix.detach() - before
    sizes = torch.linalg.svdvals(change)
    assert sizes.max() < 2 * sizes.min()
    assert change.square().mean().sqrt().item() == approx(0.2 * 0.01, rel=0.3)

@pytest.mark.parametrize("size, std", [(0.0, 0.01), (0.0, 1.0), (2.0, 1.0)])
def test_a_step_takes_the_clipped_gradients_of_a_batch_and_its_adversarial_examples(
        command_line: Callable, monkeypatch: MonkeyPatch, size: float, std: float) -> None:
    kept, seen = [], []
    monkeypatch.setattr(mini_vit, "CudaGraph", kept.append)
    options = f"--epochs 0 --dropout 0 --input-dropout 0 --adversarial {size}"
    assert command_line(mini_vit, f"{TINY} {options}")[0] == 0
    _, images, labels = common.draw_digits(20, seed=0)
    used = inspect.getclosurevars(kept[0]).nonlocals
    model, parameters = used["model"], list(used["model"].parameters())
    nn.init.normal_(model.head.linear.weight, std=std)
    kept[0](images, labels)
    assert all(parameter.grad is None for parameter in parameters)
    used["optimizers"].clear()  # then the gradients stay
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    metrics = kept[0](images, labels)
    gradients = [parameter.grad for parameter in parameters]
    first, *examples = seen
    assert_close(first, common.normalize(images))
    assert len(examples) == (size > 0)
    logits = model(first.requires_grad_())
    loss = F.cross_entropy(logits, labels)
    steepest, *expected = torch.autograd.grad(loss, [first, *parameters])
    for example in examples:
        move = 0.3081 * (example - first)  # 1 is one pixel from black to white
        assert_close(move.flatten(1).norm(dim=1), torch.full((20,), size))
        assert F.cosine_similarity(steepest.flatten(1), move.flatten(1)).min() > 0.9999
        second = torch.autograd.grad(F.cross_entropy(model(example), labels), parameters)
        expected = [one + other for one, other in zip(expected, second)]
    norm = torch.cat([gradient.flatten() for gradient in expected]).norm()
    assert (norm > 1) == (std == 1)
    assert_close(gradients, [gradient / norm.clamp(min=1) for gradient in expected])
    accuracy = (logits.argmax(dim=1) == labels).float().mean()
    assert_close(metrics, torch.stack([loss.detach(), accuracy, norm]))

@pytest.mark.parametrize("size, call, step, saved", [
    (0, 3, 3, 0), (0, 25 + 23, 23, 1), (1, 5, 3, 0), (1, 6, 3, 0), (1, 50 + 2, 1, 1)])
def test_nan_is_reported_with_its_step_and_not_saved(
        command_line: Callable, few_digits: None, monkeypatch: MonkeyPatch, size: int, call: int,
        step: int, saved: int) -> None:
    """In an epoch of 25 steps. With adversarial examples of any size a step has two losses."""
    cross_entropy, calls = F.cross_entropy, itertools.count(1)
    monkeypatch.setattr(F, "cross_entropy", lambda logits, labels: cross_entropy(
        logits * (math.nan if next(calls) == call else 1), labels))
    _, _, err = command_line(mini_vit, f"{TINY} --epochs 2 --batch-size 40 --adversarial {size}")
    assert f" NaN in step {step} of this epoch: choose a lower --lr" in err
    states = [torch.load(path) for path in Path("runs").rglob("checkpoint.pt")]
    assert [len(state["log"]) for state in states] == [1] * saved
    assert all(tensor.isfinite().all() for state in states for tensor in state["model"].values())

@pytest.mark.parametrize("muon", ["--muon", "--no-muon"])
def test_each_step_has_its_own_learning_rate_and_dropout(train: Callable, muon: str) -> None:
    """The same after --resume; and each seed has its own dropout."""
    seen, options = [], f"--epochs 2 --lr 0.01 {muon}"

    def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
        seen.append((optimizer.param_groups[0]["lr"].item(), torch.rand(1).item()))

    with register_optimizer_step_pre_hook(keep):
        train(options)
        train(f"{options} --seed 1")
        train(options, stopped=True)
        train(f"{options} --resume")
    expected = [mini_vit.learning_rate(step, 20, 0.01) for step in range(20) for _ in range(2)]
    assert [rate for rate, _ in seen] == approx(3 * expected)
    assert len({random for _, random in seen[:80]}) == 80 and seen[80:] == seen[:40]

class StandIn(TorchDispatchMode):
    """A CUDA graph on the CPU: a capture keeps its operations, with their tensors, and undoes what
    they changed; a replay does them again on the same tensors."""
    made = []

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.before, self.replays = [], [], 0
        self.made.append(self)

    def __torch_dispatch__(self, operation: Callable, types: object, args: tuple = (),
                           kwargs: dict | None = None) -> object:
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a capture cannot read a number")
        if operation._schema.is_mutable:
            changing = [part for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)]
            self.before += [(tensor, tensor.detach().clone()) for tensor in changing]
        result = operation(*args, **kwargs or {})
        self.operations.append((operation, args, kwargs or {}, result))
        return result

    @contextmanager
    def capture(self, capture_error_mode: str) -> Iterator[None]:
        with torch.random.fork_rng(devices=[]), self:
            yield
        with torch.no_grad():
            for tensor, old in reversed(self.before):
                tensor.copy_(old)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for operation, args, kwargs, result in self.operations:
            again = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("options", ["--muon", "--no-muon --adversarial 1"])
def test_replayed_steps_train_as_plain_ones_do(
        train: Callable, options: str, stopped: bool, monkeypatch: MonkeyPatch) -> None:
    """In whole runs with a stand-in, with dropout: three plain steps, one capture, and replays."""
    options += " --epochs 2"
    plain = train(options)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandIn)
    monkeypatch.setattr(torch.cuda, "graph", StandIn.capture)
    monkeypatch.setattr(StandIn, "made", [])
    if stopped:
        train(options, stopped=True)
        options += " --resume"
    check_equal(train(options), plain)
    assert [graph.replays for graph in StandIn.made] == ([7, 7] if stopped else [17])

@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("options", [" ".join(words) for words in itertools.product(
    ["--compile", "--no-compile"], ["--muon", "--no-muon"],
    ["", "--dim 784 --heads 14 --patch-size 28"])])
def test_on_a_gpu_replayed_steps_train_as_plain_ones_do(
        train: Callable, options: str, monkeypatch: MonkeyPatch) -> None:
    options += " --device cuda --small --layers 2 --lr 1e-3 --adversarial 1 --epochs 2"
    capture = common.CudaGraph.capture
    with mock.patch.object(common.CudaGraph, "capture", autospec=True, side_effect=capture) as spy:
        captured = torch.tensor(train(options)["log"])
        monkeypatch.setattr(mini_vit, "CudaGraph", lambda step: step)
        torch.compiler.reset()
        plain = torch.tensor(train(options)["log"])
    spy.assert_called_once()
    assert_close(captured, plain, rtol=0.02, atol=0.02)
    assert plain[1, 0] < plain[0, 0]

@pytest.mark.parametrize("tta", [0, 2])
def test_predict_is_the_mean_over_shifted_images_without_dropout_and_gradients(tta: int) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(784, 10))
    padded = torch.zeros(600, 32, 32, dtype=torch.uint8)
    padded[:, 2:30, 2:30] = common.draw_digits(600, seed=0).images.clamp(min=99)  # up to the edge
    starts = range(2 - tta, 3 + tta)
    shifted = [padded[:, y : y + 28, x : x + 28] for y in starts for x in starts]
    logits = [model[2](common.normalize(images).flatten(1)) for images in shifted]
    probabilities = common.predict(model, padded[:, 2:30, 2:30], torch.device("cpu"), tta)
    assert not probabilities.requires_grad
    assert_close(probabilities, torch.stack(logits).softmax(dim=2).mean(dim=0).detach())

@pytest.mark.parametrize("script, workers", [(mini_vit, ""), (mini_vit_augment, "--workers 2")])
def test_a_seed_repeats_itself_and_another_differs(train: Callable, script: ModuleType,
                                                   workers: str) -> None:
    first = train("--epochs 2", script)
    check_equal(train(f"--epochs 2 {workers}", script), first)
    assert train("--epochs 2 --seed 1", script)["log"][0] != first["log"][0]

@pytest.mark.parametrize("script, options", [
    (mini_vit, "--no-muon --lr 2e-2 --epochs 12"),
    *((script, "--muon --lr 2e-2 --epochs 5") for script in SCRIPTS)])
def test_a_short_run_on_drawn_digits_is_well_above_chance(
        command_line: Callable, few_digits: None, script: ModuleType, options: str) -> None:
    options = f"{TINY} --dim 32 --batch-size 50 --dropout 0 --input-dropout 0 {options}"
    code, out, err = command_line(script, options)
    assert code == 0, err
    assert float(out.splitlines()[-1].split("%")[0].split()[-1]) > 30  # chance is 10

@pytest.mark.parametrize("script, build", SCRIPTS.items())
@pytest.mark.parametrize("validate", ["", "--validate"])
def test_a_run_trains_its_model_on_its_digits_logs_means_and_tests_on_other_digits(
        command_line: Callable, script: ModuleType, build: type, validate: str,
        monkeypatch: MonkeyPatch) -> None:
    """The step only counts: its number is its loss."""
    trained, tested = [], []

    def step(*batch: Tensor) -> Tensor:
        trained.append(batch)
        return torch.tensor([1.0, 0.5, 0.0]) * len(trained)

    monkeypatch.setattr(script, "CudaGraph", lambda train_step: step)
    monkeypatch.setattr(common.Run, "test",
                        lambda run, test_set: tested.extend([run.model, test_set]))
    assert command_line(script, f"{TINY} {validate}")[0] == 0
    (_, digits, labels), (_, held_out, _) = map(common.draw_digits, (10_000, 2_000), (0, 1))
    if validate:
        digits, held_out, labels = digits[:5000], digits[5000:], labels[:5000]
    model, test_set = tested
    assert type(model) is build and torch.equal(test_set.images, held_out)
    images, of_images = map(torch.cat, zip(*trained))
    assert torch.equal(of_images.bincount(), labels.bincount())
    seen, given = (sorted(map(bytes, part.flatten(1).numpy())) for part in (images, digits))
    is_augmented = script in (mini_vit_augment, mini_vit_crossattn)
    assert len({*seen} & {*given}) < 0.01 * len(given) if is_augmented else seen == given
    (log,), mean = Path("runs").rglob("log.csv"), (len(trained) + 1) / 2
    assert log.read_text().splitlines()[1].startswith(f"1,{mean},{mean / 2},")

def statements(script: ModuleType) -> list[str]:
    text = Path(script.__file__).read_text(encoding="utf-8")
    (main,) = (part for part in ast.parse(text).body if getattr(part, "name", "") == "main")
    assert main.end_lineno - main.lineno < 48
    starts = [min(part.lineno for part in (statement, *getattr(statement, "decorator_list", [])))
              for statement in main.body]
    ends, lines = [*starts[1:], main.end_lineno + 1], text.splitlines()
    return ["\n".join(lines[start - 1 : end - 1]) for start, end in zip(starts, ends)]

def differences(script: ModuleType, other: ModuleType) -> list[str]:
    return [line for line in difflib.Differ().compare(statements(other), statements(script))
            if line[0] in "+-"]

def test_a_diff_of_two_mains_shows_the_experiment_and_nothing_else() -> None:
    (step, loop), *others = ([part for part in statements(script)
                              if part.startswith(("    @CudaGraph", "    for epoch in "))]
                             for script in SCRIPTS)
    assert "\n        loss.backward()\n" in step and "= train_step(images, labels)\n" in loop
    assert others == [[step, loop]] * 3
    replaced, model = differences(mini_vit_concat, mini_vit)
    assert model[2:] == replaced[2:].replace("ViT(", "ConcatViT(") != replaced[2:]
    for difference in differences(mini_vit_augment, mini_vit):
        assert re.search(r"options = |options\.predict|batches = |draw_augmented\(", difference)
    assert sum(line[0] == "+" for line in differences(mini_vit_crossattn, mini_vit)) <= 7
    for difference in differences(mini_vit_crossattn, mini_vit_augment):
        assert re.search(r"ViT\(|predict|options = |parser", difference)
