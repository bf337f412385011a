"""The scripts as a person runs them, and the house's own rules."""

import contextlib
import io
import itertools
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import common
import mini_vit
import mini_vit_augment
import mini_vit_concat
import mini_vit_crossattn

SCRIPTS = (mini_vit, mini_vit_concat, mini_vit_augment, mini_vit_crossattn)
TINY = "--device cpu --small --layers 1 --heads 2 --dim 16 --dataset drawn --epochs 1"
FILES = ROOT / "README.md", ROOT / ".github" / "measurements.md"
LAST = r"test accuracy: (\d+\.\d\d)% \((\d+) of (\d+) drawn test digits\)"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_script_runs_from_any_folder(script: object, tmp_path: object) -> None:
    done = subprocess.run([sys.executable, script.__file__, *TINY.split(), "--workers", "1"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    name = script.__name__ + ".py"
    assert re.match(rf"{name}: [\d,]+ parameters, cpu, drawn, Recipe.small=True, ", lines[0])
    assert re.match(r"epoch 1 of 1: loss \d\.\d+, [\d.]+% of the drawn training digits right, ", lines[1])
    answers = [line for line in lines if re.match(r"  \d: ( +\d +\d+\.\d%){3}", line)]
    assert len(answers) == 10
    percent, right, total = re.fullmatch(LAST, lines[-1]).groups()
    assert float(percent) == pytest.approx(100 * int(right) / int(total)) and total == "2000"
    assert "images/s" in done.stderr and "loss=" in done.stderr and "%" in done.stderr  # the bar


def test_reach_changes_the_answers_and_not_the_training(command_line: object) -> None:
    one, nine = (command_line(mini_vit, TINY + options)[1].splitlines()[1:] for options in ("", " --reach 1"))
    assert one[0].split(",")[:2] == nine[0].split(",")[:2] and one[0].startswith("epoch 1 of 1")
    assert len(one) == len(nine) and one[3:13] != nine[3:13]


def test_zero_epochs_evaluates_only(command_line: object) -> None:
    code, out, _ = command_line(mini_vit, TINY + " --epochs 0")
    assert code == 0 and "epoch 1" not in out and re.fullmatch(LAST, out.splitlines()[-1])


def test_seeds_and_validation(command_line: object) -> None:
    code, out, _ = command_line(mini_vit, TINY + " --seeds 2 --seed 5 --validate --batch-size 500")
    what = "5000 drawn validation digits"
    accuracies = re.findall(rf"^validation accuracy: (.*)% \(\d+ of {what}\)$", out, re.M)
    pattern = rf"validation accuracy: (.*)% \+- (.*)% \(2 seeds, {what}\)"
    mean, deviation = re.fullmatch(pattern, out.splitlines()[-1]).groups()
    first, second = map(float, accuracies)
    assert code == 0 and first != second
    assert float(mean) == pytest.approx((first + second) / 2, abs=0.006)
    assert float(deviation) == pytest.approx(abs(first - second) / 2**0.5, abs=0.006)


@pytest.mark.parametrize("validate", [False, True])
def test_what_a_run_is_tested_on_it_has_not_learned(command_line: object, monkeypatch: pytest.MonkeyPatch,
                                                    validate: bool) -> None:
    learned, tested = [], []

    def learn(model: object, batches: object, steps: int, *rest: object) -> torch.Tensor:
        learned.extend(images for images, _ in itertools.islice(batches, steps))
        return torch.zeros(2)

    def test(model: torch.nn.Module, images: torch.Tensor, *rest: object) -> torch.Tensor:
        model.eval()
        tested.append(images)
        return torch.ones(len(images), 10)

    monkeypatch.setattr(common, "train_epoch", learn)
    monkeypatch.setattr(common, "predict", test)
    assert command_line(mini_vit, TINY + " --batch-size 500" + " --validate" * validate)[0] == 0
    _, (digits, _), (held_out, _) = common.load_digits("drawn", None)
    if validate:
        digits, held_out = digits[:-5000], digits[-5000:]
    assert torch.equal(torch.cat(tested), held_out)
    assert sorted(torch.cat(learned).flatten(1).tolist()) == sorted(digits.flatten(1).tolist())
    assert Path(f"runs/mini_vit-drawn-small{'-validate' * validate}-seed0/checkpoint.pt").exists()


def test_each_script_trains_its_own_model_on_digits_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, augmented, given = mini_vit.plain_batches, mini_vit_augment.augmented_batches, []
    for script in SCRIPTS:
        monkeypatch.setattr(script, "run", lambda *args: given.append((args[2], args[5])))
        script.main()
    assert given == [(mini_vit.ViT, plain), (mini_vit_concat.ConcatViT, plain), (mini_vit.ViT, augmented),
                     (mini_vit_crossattn.CrossViT, augmented)]


def test_help_says_each_option_with_its_default(command_line: object) -> None:
    code, out, _ = command_line(mini_vit, "--help")
    assert code == 0
    for field in common.fields(common.Recipe):
        assert "--" + field.name.replace("_", "-") in out and field.type.__metadata__[-1].split()[-1] in out
    assert "(default 16; small" in " ".join(out.split()) and "a transformer" in out


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
    ("--dataset CIFAR10", "--dataset: invalid choice: 'CIFAR10' (choose from"),
    ("--device nowhere", "--device nowhere"),
    ("--device hpu", "--device hpu"),
    ("--dataset FashionMNIST --data-dir /nowhere/at/all", "FashionMNIST is not on disk"),
    ("--dataset drawn --batch-size 10001", "--batch-size 10001"),
    ("--small --dataset drawn --lr 1e12 --epochs 1", "in step"),
])
def test_what_a_person_can_mend_is_told_in_a_sentence(command_line: object, options: str, words: str) -> None:
    code, _, err = command_line(mini_vit, options)
    last = err.replace("\r", "\n").splitlines()[-1].strip()
    assert code == 2 and words in last and last.startswith("mini_vit.py: ") and "Traceback" not in err
    assert ": " in last.removeprefix("mini_vit.py: ")  # and what to do


def test_what_argparse_refuses_has_the_same_exit_code(command_line: object) -> None:
    for options in ("--layers many", "--no-such-option", "--epochs"):
        code, _, err = command_line(mini_vit, options)
        assert code == 2 and "error" in err and len(err.splitlines()) == 2


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError("can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")], ids=str)
def test_out_of_memory_names_the_option(command_line: object, monkeypatch: pytest.MonkeyPatch,
                                        error: Exception) -> None:
    def full(*args: object) -> None:
        raise error

    monkeypatch.setattr(common, "train_epoch", full)
    code, _, err = command_line(mini_vit, TINY + " --batch-size 512")
    told = "out of memory: choose a --batch-size below 512, or a small model (--small)"
    assert (code, err) == (2, f"mini_vit.py: {told}\n")


def test_output_that_nobody_reads_ends_a_run_without_a_traceback(command_line: object,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*args: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(common, "train_epoch", closed)
    code, _, err = command_line(mini_vit, TINY)
    assert code == 2 and "Broken pipe" in err and len(err.splitlines()) == 1


def test_a_compiler_that_is_missing_is_told(command_line: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    for error in (InductorError(RuntimeError("No working C++ compiler"), None), TorchDynamoException("no"),
                  RuntimeError("torch.compile is not supported on Python 3.14+")):
        def breaks(*args: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(common, "train_epoch", breaks)
        code, _, err = command_line(mini_vit, TINY)
        assert (code, err) == (2, "mini_vit.py: the model cannot be compiled: add --no-compile\n")


def test_full_size_on_a_cpu_says_how_long(command_line: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "train_epoch", lambda *args: torch.tensor([1.0, 0.1]))
    monkeypatch.setattr(common, "predict", lambda model, images, *rest: torch.ones(len(images), 10))
    code, out, _ = command_line(mini_vit, "--layers 1 --epochs 1 --dataset drawn --device cpu")
    assert code == 0 and re.search(r"about \d+ minutes an epoch; see --small", out)


def test_first_use_without_mnist(command_line: object, tmp_path: object) -> None:
    code, out, err = command_line(mini_vit, f"--small --epochs 0 --data-dir {tmp_path}")
    assert code == 0 and "WARNING" in err and re.fullmatch(LAST, out.splitlines()[-1])


def test_a_default_device_that_does_not_work_is_told(command_line: object,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *check: torch.device("xla"))
    code, _, err = command_line(mini_vit, "--small --dataset drawn")
    assert code == 2 and "--device (default) does not work here" in err and len(err.splitlines()) == 1


def test_a_notebook_has_another_kind_of_stdout(command_line: object) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as out:  # which cannot be reconfigured
        assert command_line(mini_vit, TINY + " --epochs 0")[0] == 0
    assert re.fullmatch(LAST, out.getvalue().splitlines()[-1])


# the house


def test_budgets() -> None:
    for script in SCRIPTS:
        assert len(open(script.__file__).readlines()) <= 150
    assert len(open(common.__file__).readlines()) <= 450
    for file in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            assert len(line) <= 110, f"{file.name}:{number}"


def test_the_commands_of_readme_and_docstrings_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [*(file.read_text(encoding="utf-8") for file in FILES), *(script.__doc__ for script in SCRIPTS)]
    commands = {line for text in texts for line in re.findall(r"python (mini_vit\w*\.py[^`\n&#|]*)", text)}
    assert len(commands) >= 8
    for command in commands:
        name, *options = command.split("  ")[0].split()
        script = next(script for script in SCRIPTS if Path(script.__file__).name == name)
        monkeypatch.setattr(sys, "argv", [name, *options])
        common.read_options("", script.FULL, script.SMALL)


def test_the_readmes_numbers_of_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = mini_vit.ViT, mini_vit_concat.ConcatViT, mini_vit.ViT, mini_vit_crossattn.CrossViT
    models = dict(zip(SCRIPTS, classes))
    readme = "".join(file.read_text(encoding="utf-8") for file in FILES)
    rows = re.findall(r"^\| `python (mini_vit\w*)\.py([^`]*)` \| ([\d,]+) \|", readme, re.M)
    assert len(rows) > 20
    for name, options, said in rows:
        monkeypatch.setattr(sys, "argv", [name, *options.split()])
        script = sys.modules[name]
        sizes = common.read_options("", script.FULL, script.SMALL).sizes()
        with torch.device("meta"):
            parameters = models[script](**sizes).parameters()
        assert said == f"{sum(parameter.numel() for parameter in parameters):,}", (name, options)


def test_the_readmes_means_deviations_and_differences_are_those_of_its_seeds() -> None:
    readme = "".join(file.read_text(encoding="utf-8") for file in FILES)
    rows = re.findall(r"\| ([\d.]+) % ± ([\d.]+) \(([\d., ]+)\) \| ([\d, ]+) \|", readme)
    assert len(rows) > 10
    runs = {}
    for mean, deviation, each, seeds in rows:
        runs[mean] = each = [float(percent) for percent in each.split(", ")]
        digits = len(mean.split(".")[1])
        said = f"{statistics.mean(each):.{digits}f}", f"{statistics.stdev(each):.{digits}f}"
        assert (mean, deviation) == said and len(each) == len(seeds.split(", ")) >= 3
    compared = re.findall(r"\| ([\d.]+) % \|[^|\n]*\| ([\d.]+) % \| ([+-][\d.]+) \| ([\d.]+) \|", readme)
    assert len(runs) == len(rows) and len(compared) >= 8
    for first, second, difference, errors in compared:
        gap = statistics.mean(runs[first]) - statistics.mean(runs[second])
        error = math.sqrt(sum(statistics.variance(runs[run]) / len(runs[run]) for run in (first, second)))
        assert (difference, errors) == (f"{gap:+.3f}", f"{abs(gap) / error:.1f}"), (first, second)


def test_nothing_happens_at_import() -> None:
    code = "import mini_vit, mini_vit_concat, mini_vit_augment, mini_vit_crossattn"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_readmes_attention_gives_the_numbers_beside_it() -> None:
    code = re.search(r"```python\n(.*?)```", ROOT.joinpath("README.md").read_text(encoding="utf-8"), re.S)[1]
    names: dict = {}
    exec(code, names)
    comments = [line.split("#")[1] for line in code.splitlines() if line.startswith("print")]
    said = re.findall(r"\d\.\d\d", " ".join(comments))
    shown = torch.cat([names["weights"].flatten(), names["out"].flatten()]).tolist()
    assert [float(number) for number in said] == pytest.approx(shown, abs=0.005)
