"""The scripts as a person runs them, and the house's own rules."""

import ast
import contextlib
import io
import itertools
import json
import math
import os
import re
import runpy
import shlex
import signal
import statistics
import sys
import threading
from collections.abc import Iterator
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import pil_to_tensor

import common
import mini_vit
import mini_vit_augment
import mini_vit_concat
import mini_vit_crossattn

SCRIPTS = (mini_vit, mini_vit_concat, mini_vit_augment, mini_vit_crossattn)
MODELS = (mini_vit.ViT, mini_vit_concat.ConcatViT, mini_vit.ViT, mini_vit_crossattn.CrossViT)
TINY = ("--device cpu --small --layers 1 --heads 2 --dim 16 --patch-size 7 --overlap 0 "
        "--dataset drawn --epochs 1 --batch-size 100")
FILES = ROOT / "README.md", ROOT / ".github" / "measurements.md"
LAST = r"test accuracy: (\d+\.\d\d)% \((\d+) of (\d+) drawn test digits\)"
DRAW_ALL = common.draw_digits


@lru_cache
def draw_few(count: int, seed: int) -> common.Digits:
    """A tenth of the digits, drawn once for all tests."""
    return DRAW_ALL(max(10, count // 10), seed)


def draw_enough(count: int, seed: int) -> common.Digits:
    """Enough to hold out 5,000 of them and train on 500."""
    return DRAW_ALL(5500 if seed == 0 else 200, seed)


@pytest.fixture(autouse=True)
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most tests need no more: a run then takes a part of a second."""
    monkeypatch.setattr(common, "draw_digits", draw_few)


class Finished(NamedTuple):
    script: object
    out: str
    err: str
    folder: Path


@pytest.fixture(scope="module", params=SCRIPTS, ids=lambda script: script.__name__)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Each script, run once, from another folder: what it said, and its run's folder. Its stdout
    is like a notebook's, which cannot be reconfigured."""
    name, folder = request.param.__name__, tmp_path_factory.mktemp("finished")
    before = signal.getsignal(signal.SIGTERM)
    with (pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out,
          contextlib.redirect_stderr(io.StringIO()) as err):
        patch.chdir(folder)
        patch.setattr(common, "draw_digits", draw_few)
        patch.setattr(sys, "argv", [f"{ROOT}/{name}.py", *TINY.split(), "--workers", "1"])
        runpy.run_path(sys.argv[0], run_name="__main__")
    signal.signal(signal.SIGTERM, before)
    run = folder / "runs" / f"{name}-drawn-small-seed0"
    return Finished(request.param, out.getvalue(), err.getvalue(), run)


def test_a_script_says_what_it_does_from_the_first_line_to_the_last(finished: Finished) -> None:
    lines = finished.out.splitlines()
    said = shlex.join(lines[0].split(": ")[0].split())
    assert said == f"{finished.script.__name__}.py {TINY} --workers 1"
    assert re.fullmatch(r"[\d,]+ parameters, cpu, 1,000 drawn digits, 1 epochs of 10 steps, seed 0",
                        lines[0].split(": ")[1])
    assert re.fullmatch(r"epoch 1 of 1: loss \d\.\d+, [\d.]+% of the drawn training digits right, "
                        r"\d+\.\d s, 0 minutes left", lines[1])
    answers = [line for line in lines if re.match(r"  \d: ( +\d +\d+\.\d%){3}", line)]
    assert len(answers) == 10
    percent, right, total = re.fullmatch(LAST, lines[-1]).groups()
    assert float(percent) == pytest.approx(100 * int(right) / int(total)) and total == "200"


def test_a_run_leaves_its_files(finished: Finished) -> None:
    augmented = finished.script in (mini_vit_augment, mini_vit_crossattn)
    assert {path.name for path in finished.folder.iterdir()} == {
        "checkpoint.pt", "log.csv", "options.json", "curve.png", "mistakes.png", "attention.png",
        *["augmented.png"] * augmented}
    options = json.loads((finished.folder / "options.json").read_text())
    assert list(options) == [field.name for field in fields(common.Recipe)]
    small = finished.script.SMALL
    given = dict(layers=1, heads=2, dim=16, batch_size=100, dataset="drawn", epochs=1, small=True)
    assert given.items() <= options.items() and options["lr"] == small.lr
    first, second = (finished.folder / "log.csv").read_text().splitlines()
    assert first == "epoch,loss,accuracy,seconds"
    loss, accuracy = re.search(r"loss (.*), (.*)% of", finished.out).groups()
    row = [float(number) for number in second.split(",")]
    assert row[:3] == pytest.approx([1, float(loss), float(accuracy) / 100], abs=1e-4)


@pytest.mark.parametrize("left, ranks", [
    ({"RANK": "1"}, (0, 1)),
    ({"RANK": ""}, (0, 1)),
    ({"WORLD_SIZE": "2"}, (0, 1)),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, (0, 1)),
    ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}, (1, 2)),
], ids=str)
def test_only_torchrun_makes_a_run_one_of_several(monkeypatch: pytest.MonkeyPatch,
                                                  left: dict[str, str],
                                                  ranks: tuple[int, int]) -> None:
    for name in left:
        monkeypatch.setenv(name, left[name])
    names = runpy.run_path(common.__file__)
    assert (names["RANK"], names["RANKS"]) == ranks


def test_a_notebook_may_train_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, main() is called without faults_told, which sets signals."""
    monkeypatch.setattr(sys, "argv", ["mini_vit.py", *TINY.split()])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        thread = threading.Thread(target=mini_vit.main)
        thread.start()
        thread.join()
    assert re.fullmatch(LAST, out.getvalue().splitlines()[-1])


# what a run tells as it goes on


def test_where_there_is_no_stderr_a_run_has_no_bar(command_line: object,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)  # as with pythonw on Windows
        code, out, _ = command_line(mini_vit, TINY)
        assert code == 0 and re.fullmatch(LAST, out.splitlines()[-1])
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert command_line(mini_vit, TINY)[::2] == (0, "")


@pytest.mark.parametrize("terminal, lines", [(False, 12), (True, 101)])
def test_the_bar_writes_to_a_file_every_ten_seconds_only(monkeypatch: pytest.MonkeyPatch,
                                                         terminal: bool, lines: int) -> None:
    """A hundred steps of a second each."""
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    monkeypatch.setattr(sys, "stderr", Stream())
    bar = common.progress_bar(100, epoch=0, batch_size=5)
    clock = [bar.start_t]
    bar._time = lambda: clock[0]
    for _ in bar:
        clock[0] += 1
        bar.set_postfix_str("loss=1.000", refresh=False)
    shown = [line for line in sys.stderr.getvalue().split("\r") if line.strip()]
    assert lines - 3 <= len(shown) <= lines and "images/s, loss=1.000" in shown[-1]


def test_after_each_epoch_a_run_says_how_long_the_rest_will_take(
        command_line: object, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(step=50)  # seconds at each look: at the start, and twice an epoch
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(mini_vit, "train_epoch", lambda *args: (1.0, 0.5))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: None)
    _, out, _ = command_line(mini_vit, TINY + " --epochs 4 --seeds 2")
    told = re.findall(r"right, (.*) s, (.*) minutes left", out)
    assert told == [("50.0", "2"), ("50.0", "2"), ("50.0", "1"), ("50.0", "0")] * 2
    _, out, _ = command_line(mini_vit, TINY + " --epochs 3 --compile")  # in the first epoch
    assert re.findall(r"50.0 s, (.*) minutes left", out) == ["less than 2", "1", "0"]


def test_full_size_on_a_cpu_says_how_long(command_line: object,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mini_vit, "train_epoch", lambda *args: (1.0, 0.1))
    options = "--layers 1 --epochs 1 --dataset drawn --device cpu"
    code, out, _ = command_line(mini_vit, options)
    assert code == 0 and "hours: --small" in out.splitlines()[1]
    assert "--small takes" not in command_line(mini_vit, TINY)[1]


def test_reach_changes_the_answers_and_not_the_training(command_line: object) -> None:
    one, nine = (command_line(mini_vit, TINY + more)[1].splitlines()[1:]
                 for more in ("", " --reach 1"))
    assert one[0].split(",")[:2] == nine[0].split(",")[:2] and one[0].startswith("epoch 1 of 1")
    assert len(one) == len(nine) and one[3:13] != nine[3:13]


def test_zero_epochs_test_what_has_learned_nothing(command_line: object) -> None:
    code, out, _ = command_line(mini_vit, TINY + " --epochs 0")
    assert code == 0 and "epoch 1" not in out and re.fullmatch(LAST, out.splitlines()[-1])


def test_seeds_and_validation(command_line: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "draw_digits", draw_enough)
    options = TINY + " --seeds 2 --seed 5 --validate"
    code, out, _ = command_line(mini_vit, options)
    pattern = r"^validation accuracy: (.*)% \(\d+ of 5000 drawn validation digits\)$"
    first, second = map(float, re.findall(pattern, out, re.M))
    pattern = r"mean accuracy: (.*)% \+- (.*)% \(2 seeds\)"
    mean, deviation = re.fullmatch(pattern, out.splitlines()[-1]).groups()
    assert code == 0 and first != second
    assert float(mean) == pytest.approx((first + second) / 2, abs=0.006)
    assert float(deviation) == pytest.approx(abs(first - second) / 2**0.5, abs=0.006)


@pytest.mark.parametrize("validate", [False, True])
def test_what_a_run_is_tested_on_it_has_not_learned(command_line: object, validate: bool,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    learned, tested = [], []

    def learn(model: object, batches: Iterator, steps: int, *rest: object) -> tuple[float, float]:
        learned.extend(images for images, _ in itertools.islice(batches, steps))
        return 0.0, 0.0

    def answer(model: object, images: torch.Tensor, *rest: object) -> torch.Tensor:
        tested.append(images)
        return torch.ones(len(images), 10)

    monkeypatch.setattr(common, "draw_digits", lru_cache(draw_enough))
    monkeypatch.setattr(mini_vit, "train_epoch", learn)
    monkeypatch.setattr(mini_vit, "draw_attention", lambda *args: None)
    monkeypatch.setattr(common, "predict", answer)
    assert command_line(mini_vit, TINY + " --validate" * validate)[0] == 0
    digits, held_out = (common.draw_digits(count, seed).images for count, seed in
                        ((10_000, 0), (2_000, 1)))
    if validate:
        digits, held_out = digits[:-5000], digits[-5000:]
    assert torch.equal(torch.cat(tested), held_out)
    one, other = (sorted(map(bytes, images.flatten(1).numpy()))
                  for images in (torch.cat(learned), digits))
    assert one == other
    run = f"runs/mini_vit-drawn-small{'-validate' * validate}-seed0"
    assert Path(run, "checkpoint.pt").exists()


def test_each_script_trains_its_own_model_on_digits_of_its_kind(
        command_line: object, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def learn(step: common.TrainingStep, batches: Iterator, *rest: object) -> tuple[float, float]:
        given.append((type(step.model), getattr(batches, "__name__", "augmented")))
        return 0.0, 0.0

    for script in SCRIPTS:
        monkeypatch.setattr(script, "train_epoch", learn)
        assert command_line(script, TINY)[0] == 0
    kinds = ["plain_batches", "plain_batches", "augmented", "augmented"]
    assert given == list(zip(MODELS, kinds))


# what goes wrong, and is told


@pytest.mark.parametrize("options, words", [
    ("--heads 15", "heads do not divide"),
    ("--small --heads 3", "heads do not divide"),
    ("--small --patch-size 5", "--patch-size 5 does not divide 28"),
    ("--patch-size 56", "--patch-size 56 does not divide 28"),
    ("--dim 512", "--dim 784"),
    ("--epochs -1", "--epochs -1"),
    ("--batch-size 0", "--batch-size 0"),
    ("--lr nan", "--lr nan"),
    ("--lr -1", "--lr -1"),
    ("--dropout 1", "--dropout 1"),
    ("--seeds 0", "--seeds 0"),
    ("--workers -1", "--workers -1"),
    ("--reach 28", "--reach 28"),
    ("--small --overlap 28", "--overlap 28"),
    ("--dim 1000000000000 --heads 1", "--dim 1000000000000"),
    ("--dataset CIFAR10", "--dataset"),
    ("--dataset nonsense", "--dataset"),
    ("--device nowhere", "--device nowhere"),
    ("--device hpu", "--device hpu"),
    ("--dataset FashionMNIST --data-dir /nowhere/at/all", "FashionMNIST is not on disk"),
    ("--dataset drawn --batch-size 1001", "--batch-size 1001"),
    ("--small --dataset drawn --lr 1e12 --epochs 2", "in step"),
])
def test_what_a_person_can_mend_is_told_in_a_sentence(command_line: object, options: str,
                                                      words: str) -> None:
    code, _, err = command_line(mini_vit, "--device cpu --dataset drawn " + options)
    last = err.replace("\r", "\n").splitlines()[-1].strip()
    assert code == 2 and words in last and last.startswith("mini_vit.py: ")
    assert ": " in last.removeprefix("mini_vit.py: ")  # and what to do
    assert "Traceback" not in err


def test_what_argparse_refuses_has_the_same_exit_code(command_line: object) -> None:
    for options in ("--layers many", "--no-such-option", "--epochs"):
        code, _, err = command_line(mini_vit, options)
        assert code == 2 and "error" in err and len(err.splitlines()) == 2


@pytest.mark.parametrize("error, sentence", [
    (torch.OutOfMemoryError("CUDA out of memory."), "out of memory: choose a lower --batch-size"),
    (MemoryError(), "out of memory: choose a lower --batch-size"),
    (BrokenPipeError(32, "Broken pipe"), "cannot read or write ([Errno 32] Broken pipe)"),
], ids=str)
def test_what_the_machine_refuses_is_told(command_line: object, monkeypatch: pytest.MonkeyPatch,
                                          error: Exception, sentence: str) -> None:
    def refuse(*args: object) -> None:
        raise error

    monkeypatch.setattr(mini_vit, "train_epoch", refuse)
    code, _, err = command_line(mini_vit, TINY)
    assert code == 2 and err.startswith(f"mini_vit.py: {sentence}") and err.count("\n") == 1


def test_an_error_of_the_program_keeps_its_traceback(command_line: object,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(mini_vit, "train_epoch", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        command_line(mini_vit, TINY)


def test_first_use_without_mnist(command_line: object, tmp_path: Path) -> None:
    options = f"--small --epochs 0 --device cpu --data-dir {tmp_path}"
    code, out, err = command_line(mini_vit, options)
    assert code == 0 and "WARNING" in err and re.fullmatch(LAST, out.splitlines()[-1])


def test_a_default_device_that_does_not_work_is_told(command_line: object,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("xla"))
    code, _, err = command_line(mini_vit, "--small --dataset drawn")
    assert code == 2 and "--device (default) does not work here" in err and err.count("\n") == 1


def test_a_gpu_that_is_too_old_is_told_before_anything_else(
        command_line: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives memory, but runs no kernel: the first sum fails."""
    class TooOld(torch.Tensor):
        def __add__(self, other: object) -> None:
            raise torch.AcceleratorError("CUDA error: no kernel image is available for execution")

    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device: ones(*size).as_subclass(TooOld))
    code, out, err = command_line(mini_vit, "--small --dataset drawn")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "--device cpu" in err


def test_a_log_that_is_shown_by_another_program_costs_no_epoch(
        command_line: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows, a file that a spreadsheet shows cannot be replaced."""
    replace, refused = Path.replace, []

    def refuse(part: Path, path: Path) -> Path:
        if Path(path).name == "log.csv" and not refused:
            refused.append(part)
            raise PermissionError(13, "Access is denied", str(path))
        return replace(part, path)

    def check(*args: object) -> tuple[float, float]:
        run = Path("runs/mini_vit-drawn-small-seed0")
        seen.append(((run / "log.csv").exists(), (run / "checkpoint.pt").exists()))
        return 1.0, 0.5

    seen: list[tuple[bool, bool]] = []
    monkeypatch.setattr(Path, "replace", refuse)
    monkeypatch.setattr(mini_vit, "train_epoch", check)
    code, out, err = command_line(mini_vit, TINY + " --epochs 3")
    assert code == 0 and re.fullmatch(LAST, out.splitlines()[-1])
    assert seen == [(False, False), (False, True), (True, True)]
    assert err.count("\n") == 1 and "log.csv" in err and "after the next epoch" in err
    run = Path("runs/mini_vit-drawn-small-seed0")
    assert len((run / "log.csv").read_text().splitlines()) == 4 and not list(run.glob("*.part"))


@pytest.mark.parametrize("error", [TypeError("takes 0 arguments, but 1 was given"),
                                   ImportError("The _imagingft C module is not installed")])
def test_a_pillow_that_draws_no_text_costs_no_accuracy(command_line: object, error: Exception,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    def load_default(size: float | None = None) -> None:
        raise error

    digits = common.draw_digits(10_000, seed=0), common.draw_digits(2_000, seed=1)
    monkeypatch.setattr(mini_vit_augment, "load_digits", lambda recipe: digits)
    monkeypatch.setattr(ImageFont, "load_default", load_default)
    code, out, err = command_line(mini_vit_augment, TINY)
    assert code == 0 and re.fullmatch(LAST, out.splitlines()[-1])
    for name in ("curve", "mistakes", "augmented", "attention"):
        assert len(re.findall(rf"{name}.png was not drawn: .*{error}\n", err)) == 1


def test_the_accuracy_is_told_before_its_pictures_are_drawn(
        command_line: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(path: Path, *rest: object, columns: int) -> None:
        print("drawn", Path(path).name)

    monkeypatch.setattr(common, "draw_sheet", draw)
    monkeypatch.setattr(mini_vit_augment, "draw_sheet", draw)
    lines = command_line(mini_vit_augment, TINY)[1].splitlines()
    assert re.fullmatch(LAST, lines[-4])
    assert lines[-3:] == ["drawn mistakes.png", "drawn augmented.png", "drawn attention.png"]


# the command line


def test_help_says_each_option_with_its_default_in_three_groups(command_line: object) -> None:
    code, out, _ = command_line(mini_vit, "--help")
    assert code == 0 and "a transformer that sees the whole digit" in out
    parts = re.split(r"^(model|training|run):$", out, flags=re.M)
    assert parts[1::2] == ["model", "training", "run"]
    groups = {"model": ["layers", "heads", "dim", "patch_size", "overlap", "dropout",
                        "input_dropout"],
              "training": ["epochs", "batch_size", "lr", "weight_decay", "muon", "adversarial"]}
    for field in fields(common.Recipe):
        group = next((each for each in groups if field.name in groups[each]), "run")
        text = parts[parts.index(group) + 1]
        name = "--" + field.name.replace("_", "-")
        entry = re.search(rf"^  {name}\b(?!-)(.*?)(?=^  --|\Z)", text, re.M | re.S)[1]
        entry = " ".join(entry.split())
        value, small = getattr(mini_vit.FULL, field.name), getattr(mini_vit.SMALL, field.name)
        assert field.metadata["meaning"] in entry
        if field.metadata["kind"] in (int, float, str) and value is not None:
            assert f"(default {value}" in entry
            assert (f"with --small {small})" in entry) == (small != value)


def test_the_commands_of_readme_and_docstrings_are_understood(
        monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [file.read_text(encoding="utf-8") for file in FILES]
    texts += [script.__doc__ for script in SCRIPTS]
    pattern = r"(?:python|gpu) (mini_vit\w*\.py[^`\n&#|]*)"
    commands = {line for text in texts for line in re.findall(pattern, text)}
    assert len(commands) >= 8
    for command in commands:
        name, *options = command.split("  ")[0].split()
        script = sys.modules[name.removesuffix(".py")]
        monkeypatch.setattr(sys, "argv", [name, *options])
        common.read_options("", script.FULL, script.SMALL)


# curve.png


def test_the_curve_follows_the_log_between_axes_with_numbers(
        monkeypatch: pytest.MonkeyPatch) -> None:
    written, original = [], ImageDraw.ImageDraw.text

    def write(pen: object, place: tuple, text: str, *rest: object, anchor: str) -> None:
        written.append((text, *place))
        original(pen, place, text, *rest, anchor=anchor)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", write)
    common.draw_curve(Path("curve.png"), [[2.5, 0.1, 9.0], [1.0, 0.9, 9.0], [0.5, 0.7, 9.0]])
    page = pil_to_tensor(Image.open("curve.png")).permute(1, 2, 0).int()
    orange = (page - torch.tensor([255, 140, 0])).abs().sum(dim=2) < 100
    middle = page.shape[1] // 2
    for side, values in ((orange[:, :middle], (2.5, 1.0, 0.5)), (orange[:, middle:], (.1, .9, .7))):
        across = side.any(dim=0).nonzero().flatten()
        first, last = across[0].item(), across[-1].item()
        at = [first + 2, (first + last) // 2, last - 2]
        down = [side[:, column].nonzero().float().mean().item() for column in at]
        top, bottom = min(down), max(down)
        low, high = min(values), max(values)
        for place, value in zip(down, values):
            share = (value - low) / (high - low)
            assert place == pytest.approx(bottom - share * (bottom - top), abs=4)
        assert bottom - top > 150 and last - first > 250
    texts = {text for text, *_ in written}
    assert texts == {"training loss", "accuracy", "2.500", "0.500", "0.900", "0.100", "epoch 1",
                     "3"}
    for text, x, y in written:  # where it is written there is something black
        assert (page[round(y) - 8 : round(y) + 8, round(x) - 8 : round(x) + 8] < 90).any(), text


def test_the_curve_of_one_epoch_is_a_dot() -> None:
    common.draw_curve(Path("curve.png"), [[2.5, 0.1, 9.0]])
    page = pil_to_tensor(Image.open("curve.png")).permute(1, 2, 0).int()
    orange = (page - torch.tensor([255, 140, 0])).abs().sum(dim=2) < 100
    assert all(30 < side.sum() < 100 for side in orange.chunk(2, dim=1))


def test_the_curve_of_a_run_is_that_of_its_log(finished: Finished, tmp_path: Path) -> None:
    row = (finished.folder / "log.csv").read_text().splitlines()[1]
    common.draw_curve(tmp_path / "curve.png", [[float(number) for number in row.split(",")[1:]]])
    assert (tmp_path / "curve.png").read_bytes() == (finished.folder / "curve.png").read_bytes()


# the house


LIMITS = {"common.py": 940, "README.md": 200, "measurements.md": 150}
LIMITS |= {f"{script.__name__}.py": 150 for script in SCRIPTS}


@pytest.mark.parametrize("file", sorted([*ROOT.glob("*.py"), *FILES]), ids=lambda file: file.name)
def test_files_are_short(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= LIMITS[file.name]


@pytest.mark.parametrize("file", sorted([*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]),
                         ids=lambda file: file.name)
def test_lines_are_short(file: Path) -> None:
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        assert len(line) <= 100, f"{file.name}:{number}"


def test_functions_are_short() -> None:
    for file in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 35, f"{file.name}: {node.name}"


def test_arrows_between_the_files_are_few_and_none_begins_inside_a_function() -> None:
    ours = {path.stem for path in ROOT.glob("*.py")}
    arrows = set()
    for name in ours:
        tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert node in tree.body, f"{name}.py:{node.lineno}"
                modules = [alias.name for alias in node.names]
                modules = [node.module] if isinstance(node, ast.ImportFrom) else modules
                arrows |= {(name, module) for module in modules if module in ours}
            if isinstance(node, ast.Name):
                assert node.id not in ("__import__", "import_module"), f"{name}.py:{node.lineno}"
    others = "mini_vit_concat", "mini_vit_augment", "mini_vit_crossattn"
    assert arrows == {("mini_vit", "common"), ("mini_vit_crossattn", "mini_vit_augment"),
                      *((name, to) for name in others for to in ("common", "mini_vit"))}


def test_nothing_happens_at_import(capfd: pytest.CaptureFixture, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), torch.initial_seed(), sys.stdout
    for name in ("common", *(script.__name__ for script in SCRIPTS)):
        runpy.run_path(str(ROOT / f"{name}.py"))
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())
    assert (signal.getsignal(signal.SIGTERM), torch.initial_seed(), sys.stdout) == before


def test_the_readmes_numbers_of_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    models = dict(zip(SCRIPTS, MODELS))
    readme = "".join(file.read_text(encoding="utf-8") for file in FILES)
    rows = re.findall(r"^\| `python (mini_vit\w*)\.py([^`]*)` \| ([\d,]+) \|", readme, re.M)
    assert len(rows) >= 8
    for name, options, said in rows:
        monkeypatch.setattr(sys, "argv", [name, *options.split()])
        script = sys.modules[name]
        sizes = common.read_options("", script.FULL, script.SMALL).sizes()
        with torch.device("meta"):
            parameters = models[script](**sizes).parameters()
        total = sum(parameter.numel() for parameter in parameters)
        assert said == f"{total:,}", (name, options)


def test_the_readmes_means_deviations_and_differences_are_those_of_its_seeds() -> None:
    readme = "".join(file.read_text(encoding="utf-8") for file in FILES)
    rows = re.findall(r"\| ([\d.]+) % ± ([\d.]+) \(([\d., ]+)\) \| ([\d, ]+) \|", readme)
    assert len(rows) >= 8
    runs = {}
    for mean, deviation, each, seeds in rows:
        runs[mean] = each = [float(percent) for percent in each.split(", ")]
        digits = len(mean.split(".")[1])
        said = f"{statistics.mean(each):.{digits}f}", f"{statistics.stdev(each):.{digits}f}"
        assert (mean, deviation) == said and len(each) == len(seeds.split(", ")) >= 3
    pattern = r"\| ([\d.]+) % \|[^|\n]*\| ([\d.]+) % \| ([+-][\d.]+) \| ([\d.]+) \|"
    compared = re.findall(pattern, readme)
    assert len(runs) == len(rows) and len(compared) >= 4
    for first, second, difference, errors in compared:
        pair = runs[first], runs[second]
        gap = statistics.mean(pair[0]) - statistics.mean(pair[1])
        error = math.sqrt(sum(statistics.variance(run) / len(run) for run in pair))
        said = f"{gap:+.3f}", f"{abs(gap) / error:.1f}"
        assert (difference, errors) == said, (first, second)


def test_the_readmes_attention_gives_the_numbers_beside_it() -> None:
    readme = ROOT.joinpath("README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", readme, re.S)[1]
    names: dict = {}
    exec(code, names)
    comments = [line.split("#")[1] for line in code.splitlines() if line.startswith("print")]
    said = re.findall(r"\d\.\d\d", " ".join(comments))
    shown = torch.cat([names["weights"].flatten(), names["out"].flatten()]).tolist()
    assert [float(number) for number in said] == pytest.approx(shown, abs=0.005)
