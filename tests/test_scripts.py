"""The scripts as a person runs them, what they draw, and the rules of the house."""

import ast
import io
import itertools
import math
import re
import runpy
import statistics
import sys
import threading
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, read_options
from PIL import Image, ImageDraw
from pytest import MonkeyPatch
from torchvision.transforms.functional import pil_to_tensor

import common
import mini_vit
import mini_vit_augment
import mini_vit_concat
import mini_vit_crossattn

MODELS = {mini_vit: mini_vit.ViT, mini_vit_concat: mini_vit_concat.ConcatViT,
          mini_vit_augment: mini_vit.ViT, mini_vit_crossattn: mini_vit_crossattn.CrossViT}
AUGMENTED = mini_vit_augment, mini_vit_crossattn
TEXTS = ROOT / "README.md", ROOT / ".github" / "measurements.md"
WORDS = "\n".join(file.read_text(encoding="utf-8") for file in TEXTS)
DRAW = common.draw_digits

pytestmark = pytest.mark.usefixtures("few_digits")

@pytest.fixture(scope="module", params=MODELS, ids=lambda script: script.__name__)
def finished(request: pytest.FixtureRequest,
             tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Each script, run once, from another folder, in a thread and with a stdout like a notebook's:
    what it printed, and each grid it drew with what it had printed by then."""
    script, folder, draw_grid = request.param, tmp_path_factory.mktemp("finished"), common.draw_grid
    grids = {}

    def draw(path: Path, images: torch.Tensor, captions: list[str], columns: int) -> None:
        grids[path.name] = images, captions, out.getvalue()
        draw_grid(path, images, captions, columns)

    with (MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out,
          redirect_stderr(io.StringIO()) as err):
        patch.chdir(folder)
        patch.setattr(common, "draw_digits", lambda count, seed: DRAW(count // 10, seed))
        patch.setattr(common, "draw_grid", draw)
        patch.setattr(sys, "argv", [script.__file__, *TINY.split()])
        thread = threading.Thread(target=runpy.run_path, args=(script.__file__, {}, "__main__"))
        thread.start()
        thread.join()
    return SimpleNamespace(script=script, out=out.getvalue(), err=err.getvalue(), grids=grids,
                           folder=folder / "runs" / f"{script.__name__}-drawn-small-seed0")

def count_parameters(script: ModuleType, command: str) -> str:
    with torch.device("meta"):
        model = MODELS[script](**common.model_options(read_options(command, script)))
    return f"{sum(parameter.numel() for parameter in model.parameters()):,}"

# ---- a run, from its first line to its last ------------------------------------------------------

def test_a_run_reports_what_it_does(
        finished: SimpleNamespace) -> None:
    script, lines = finished.script, finished.out.splitlines()
    assert finished.err == "" and lines[:2] == [
        f"{script.__name__}.py {TINY}: the small model (--no-small trains the other), "
        f"{count_parameters(script, TINY)} parameters, on cpu",
        "1,000 drawn digits, 1 epochs of 10 steps, seed 0"]
    assert re.fullmatch(r"epoch 1 of 1: loss \d\.\d{4}, \d+\.\d\d% of the drawn training digits "
                        r"correct, \d+\.\d s, 0 minutes left", lines[2])

def test_predictions_accuracy_and_mistakes_are_those_of_the_checkpoint(
        finished: SimpleNamespace) -> None:
    """And the accuracy is printed before any picture is drawn of it."""
    model = MODELS[finished.script](**common.model_options(read_options(TINY, finished.script)))
    model.load_state_dict(torch.load(finished.folder / "checkpoint.pt")["model"])
    _, images, labels = DRAW(200, seed=1)
    order = model.eval()(common.normalize(images)).softmax(1).sort(dim=1, descending=True)
    wrong = [index for index in range(200) if order.indices[index, 0] != labels[index]]
    lines = finished.out.splitlines()
    for index, line in enumerate(lines[5:15]):
        best = zip(order.indices[index, :3], order.values[index, :3])
        three = "   ".join(f"{digit} {share:6.1%}" for digit, share in best)
        assert line == f"  {labels[index]}:   {three}" + "   wrong" * (index in wrong)
    count = 200 - len(wrong)
    assert lines[-1] == f"test accuracy: {count / 200:.2%} ({count} of 200 drawn test digits)"
    drawn, captions, _ = finished.grids["mistakes.png"]
    assert wrong and torch.equal(drawn, images[wrong][:40])
    assert captions == [f"{labels[index]}, not {order.indices[index, 0]}" for index in wrong]
    assert all(printed == finished.out for _, _, printed in finished.grids.values())

def test_a_run_leaves_its_files(finished: SimpleNamespace) -> None:
    folder, names = finished.folder, {"curve.png", "mistakes.png", "attention.png"}
    names |= {"augmented.png"} if finished.script in AUGMENTED else set()
    assert {path.name for path in folder.iterdir()} == {"checkpoint.pt", "log.csv"} | names
    for name in names:
        pixels = pil_to_tensor(Image.open(folder / name))
        assert pixels.max() == 255 and pixels.min() < 30
        assert name == "curve.png" or pixels.shape[1] % 140 == pixels.shape[2] % 120 == 0
    head, row = (folder / "log.csv").read_text().splitlines()
    epoch, *values = map(float, row.split(","))
    assert (head, epoch) == ("epoch,loss,accuracy,seconds", 1)
    loss, accuracy = re.search(r"loss (.*), (.*)% of", finished.out).groups()
    assert values[:2] == pytest.approx([float(loss), float(accuracy) / 100], abs=1e-4)

@pytest.mark.parametrize("stderr, disable, bar", [
    ("terminal", "", True), ("terminal", "1", False), ("file", "", False), (None, "", False)])
def test_only_a_terminal_shows_a_progress_bar(command_line: Callable, monkeypatch: MonkeyPatch,
                                              stderr: str | None, disable: str, bar: bool) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: stderr == "terminal"
    monkeypatch.setattr(sys, "stderr", stream if stderr else None)  # None with Windows' pythonw
    monkeypatch.setenv("TQDM_DISABLE", disable)
    assert command_line(mini_vit, TINY)[0] == 0
    assert bool(re.search(r"epoch 1: .*images/s", stream.getvalue())) is bar
    assert bar or stream.getvalue() == ""

def test_after_each_epoch_a_run_says_how_many_minutes_are_left(
        command_line: Callable, monkeypatch: MonkeyPatch) -> None:
    clock = itertools.count(step=50)  # read at the start and after each epoch
    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: None)
    for options, minutes in (("--epochs 4", ["2", "2", "1", "0"]),
                             ("--epochs 3 --compile", ["less than 2", "1", "0"])):
        out = command_line(mini_vit, f"{TINY} {options}")[1]
        assert re.findall(r"50.0 s, (.*) minutes left", out) == minutes

def test_full_size_on_a_cpu_warns_and_no_epochs_test_what_is_untrained(
        command_line: Callable) -> None:
    options = "--no-small --device cpu --dataset drawn --layers 1 --epochs 0"
    code, out, _ = command_line(mini_vit, options)
    assert code == 0 and ": the full-size model (--small trains the other), " in out
    assert "takes hours on a CPU" in out and "epoch 1 of" not in out and "test accuracy: " in out

# ---- mistakes and faults -------------------------------------------------------------------------

@pytest.mark.parametrize("options, words", [
    ("--heads 3", "a width of 16 is not divisible by 3 heads: change --heads or --dim"),
    ("--patch-size 5", "--patch-size 5 must divide 28: choose another"),
    ("--patch-size 28", "needs --dim 784 and --overlap 0: pass both"),
    ("--patch-size 28 --dim 784 --overlap 2", "needs --dim 784 and --overlap 0: pass both"),
    ("--batch-size 1001", "more than the 1000 training digits: choose a smaller one"),
    ("--lr 1e12 --epochs 2", "choose a lower --lr"), ("--patch-size 56", "not between 1 and 28"),
    ("--dataset KMNIST --data-dir nowhere", "KMNIST cannot be downloaded"),
    ("--epochs -1", "-1 is not between 0 and"), ("--batch-size 0", "0 is not between 1 and"),
    ("--lr nan", "--lr: nan is not between"), ("--lr inf", "--lr: inf is not between 0 and"),
    ("--dropout 1", "1 is not between 0 and 0.99"), ("--tta 28", "28 is not between 0 and 27"),
    ("--overlap 28", "28 is not between 0 and 27"), ("--dim 1000000000000", "is not between 1 and"),
    ("--dataset CIFAR10", "invalid choice: 'CIFAR10'"), ("--layers many", "--layers: invalid"),
    ("--device nowhere", "nowhere does not work here: try --device cpu"),
    ("--device hpu", "hpu does not work here"), ("--layer 1", "unrecognized arguments: --layer"),
    ("--workers 1", "unrecognized arguments"), ("--epochs", "--epochs: expected one argument")])
def test_a_users_mistake_is_reported_in_one_sentence(command_line: Callable, options: str,
                                                     words: str) -> None:
    code, _, err = command_line(mini_vit, f"{TINY} {options}")
    lead, sentence = err.splitlines()
    assert code == 2 and lead in ("", "usage: mini_vit.py [options]")
    assert sentence.startswith("mini_vit.py: ") and words in sentence

@pytest.mark.parametrize("error, words", [
    (torch.OutOfMemoryError("CUDA out of memory."), "out of memory: choose a smaller --batch-size"),
    (MemoryError(), "out of memory: choose a smaller --batch-size"),
    (BrokenPipeError(32, "Broken pipe"), "cannot read or write a file ([Errno 32] Broken pipe): "),
    (OSError(5, "Input/output error"), "cannot read or write a file ([Errno 5] Input/output error"),
    (RuntimeError("a bug"), None)], ids=repr)
def test_a_fault_of_the_machine_is_a_sentence_and_a_bug_keeps_its_traceback(
        command_line: Callable, monkeypatch: MonkeyPatch, error: Exception, words: str) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(mini_vit, "check_and_show", fail)
    if words:
        code, _, err = command_line(mini_vit, TINY)
        assert code == 2 and err.startswith(f"\nmini_vit.py: {words}") and err.count("\n") == 2
    else:
        with pytest.raises(RuntimeError, match="a bug"):
            command_line(mini_vit, TINY)

def test_a_default_device_that_does_not_work_is_reported_first(command_line: Callable,
                                                               monkeypatch: MonkeyPatch) -> None:
    def too_old(tensor: torch.Tensor) -> float:
        raise torch.AcceleratorError("CUDA error: no kernel image is available for execution")

    for owner, name, value in ((torch.Tensor, "item", too_old), (
            torch.accelerator, "current_accelerator", lambda **_: torch.device("xla"))):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            code, out, err = command_line(mini_vit, "--dataset drawn")
        assert (code, out) == (2, "") and err.count("\n") == 2
        assert "does not work here: try --device cpu" in err

def test_only_torchrun_with_several_processes_is_refused(command_line: Callable,
                                                         monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")  # left by another program
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command_line(mini_vit, TINY + " --epochs 0")[::2] == (0, "")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    code, out, err = command_line(mini_vit, TINY)
    assert (code, out) == (2, "") and err.count("\n") == 2 and "start it with python, not" in err

def test_a_log_that_a_spreadsheet_has_open_costs_no_epoch(command_line: Callable,
                                                          monkeypatch: MonkeyPatch) -> None:
    write, refused = Path.write_text, []

    def refuse_once(path: Path, text: str) -> int:  # as Windows does
        if path.name == "log.csv" and not refused:
            refused.append(path)
            raise PermissionError(13, "Permission denied", str(path))
        return write(path, text)

    monkeypatch.setattr(Path, "write_text", refuse_once)
    code, out, err = command_line(mini_vit, TINY + " --epochs 2")
    assert code == 0 and "epoch 2 of 2" in out and len(refused[0].read_text().splitlines()) == 3
    assert err.count("\n") == 1 and "log.csv': it will be written" in err

# ---- the command line ----------------------------------------------------------------------------

@pytest.mark.parametrize("size", ["", "--no-small"])
@pytest.mark.parametrize("script", MODELS, ids=lambda script: script.__name__)
def test_help_lists_each_option_with_its_default_in_three_groups(
        command_line: Callable, script: ModuleType, size: str) -> None:
    code, out, _ = command_line(script, f"--device cpu {size} --help")
    _, _, model, _, training, _, run = re.split(r"^(model|training|run):$", out, flags=re.M)
    assert code == 0 and script.__doc__.splitlines()[0] in " ".join(out.split())
    options = read_options(f"--device cpu {size}", script)
    assert ("workers" in options) is (script in AUGMENTED)  # only where they do something
    assert "predict" not in options or script is mini_vit_augment
    groups = ((common.model_options(options), model), (common.training_options(options), training))
    for name, default in {**vars(options), "small": True}.items():
        text = next((text for names, text in groups if name in names), out.replace(model, ""))
        pattern = rf"^  --{name.replace('_', '-')}[ ,\n](.*?)(?=^  -|^\w|\Z)"
        entry = re.search(pattern, text, re.M | re.S)[1]
        assert name == "predict" or f"(default:{default})" in "".join(entry.split()), name
        assert len(entry.split("(default")[0].split()) > 2, name

def test_commands_in_readme_measurements_and_docstrings_are_understood() -> None:
    texts = [WORDS, *(script.__doc__ for script in MODELS)]
    commands = {command.split("  ")[0] for text in texts for command in
                re.findall(r"python3? (mini_vit\w*\.py[^`\n&#|;]*)", text)}
    assert len(commands) >= 8
    for command in commands:
        name, _, options = command.partition(".py")
        read_options(re.sub(r'"?\$\w+"?', "0", options), sys.modules[name])

# ---- pictures ------------------------------------------------------------------------------------

@pytest.mark.parametrize("flat", [False, True])
def test_the_picture_of_attention_shows_the_weights(flat: bool) -> None:
    options = read_options("--device cpu --layers 2 " + (
        "--no-small" if flat else "--heads 4 --dim 64 --patch-size 7 --overlap 0"))
    model, image = mini_vit.ViT(**common.model_options(options)).eval(), DRAW(10, seed=0).images[0]
    common.draw_attention(Path("attention.png"), model, image, options)
    page = pil_to_tensor(Image.open("attention.png"))
    assert page.shape == (3, 2 * 140, options.heads * 120)
    tile = page[2, 140 + 24 : 140 + 24 + 112, 120 + 4 : 120 + 4 + 112]  # layer 2, head 2, blue
    block, d = model.blocks[1], options.dim // options.heads
    with torch.no_grad():
        x = block.norm1(model.blocks[0](model.embed(common.normalize(image[None]))))[0]
        query, key = (linear(x)[..., d : 2 * d]
                      for linear in (block.attention.query, block.attention.key))
        weights = torch.outer(query, key) if flat else query @ key.T / 4
    weights = weights.softmax(dim=1) if flat else weights.softmax(dim=1)[0, 1:].view(4, 4)
    blue = 255 * (1 - weights / weights.max())  # orange has no blue
    blue = torch.kron(blue, torch.ones(112 // len(blue), 112 // len(blue)))
    if not flat:
        blue = blue * (1 - torch.kron(image, torch.ones(4, 4)) / 255)
    assert (tile - blue).abs().max() < 1.01

def test_the_curve_follows_the_log_between_axes_with_numbers(monkeypatch: MonkeyPatch) -> None:
    texts, write = set(), ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda pen, place, text, *rest, anchor: (
        texts.add(text), write(pen, place, text, *rest, anchor=anchor)))
    columns = (2.5, 1.0, 0.5), (0.1, 0.9, 0.7)
    common.draw_curve(Path("curve.png"), [[*row, 9.0] for row in zip(*columns)])
    page = pil_to_tensor(Image.open("curve.png")).int()
    orange = (page - torch.tensor([255, 140, 0]).view(3, 1, 1)).abs().sum(dim=0) < 100
    for side, values in zip(orange.chunk(2, dim=1), columns):
        left, *_, right = side.any(dim=0).nonzero().flatten().tolist()
        down = torch.tensor([side[:, column].nonzero().float().mean()
                             for column in (left + 2, (left + right) // 2, right - 2)])
        heights, values = down.max() - down, torch.tensor(values) - min(values)
        assert right - left > 250 and heights.max() > 150
        assert torch.allclose(heights / heights.max(), values / values.max(), atol=0.02)
    assert texts >= {"training loss", "accuracy", "2.500", "0.500", "0.900", "0.100", "epoch 1"}

# ---- the house -----------------------------------------------------------------------------------

LIMITS = {"common.py": 682, "mini_vit.py": 190, "mini_vit_concat.py": 105, "README.md": 200,
          "mini_vit_augment.py": 300, "mini_vit_crossattn.py": 135, "measurements.md": 120,
          "conftest.py": 80, "tests": 2000}

def test_files_lines_and_functions_are_short() -> None:
    counts = {"tests": 0}
    for file in (*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *TEXTS):
        text = file.read_text(encoding="utf-8")
        lines = text.splitlines()
        counts[file.name] = len(lines)
        counts["tests"] += len(lines) if file.parent.name == "tests" else 0
        if file.suffix == ".py":
            assert [line for line in lines if len(line) > 100] == [], file.name
        for node in ast.walk(ast.parse(text)) if file in ROOT.glob("*.py") else ():
            if isinstance(node, ast.FunctionDef):
                most = 48 if node.name == "main" else 35
                assert node.end_lineno - node.lineno < most, f"{file.name}: {node.name}"
    assert {name: counts[name] for name in LIMITS if counts[name] > LIMITS[name]} == {}

def test_arrows_between_the_files_are_eight_and_none_begins_inside_a_function() -> None:
    ours, arrows = {path.stem for path in ROOT.glob("*.py")}, set()
    for name in ours:
        tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert node in tree.body, f"{name}.py:{node.lineno}"
                modules = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                arrows |= {(name, module) for module in modules & ours}
            assert getattr(node, "id", "") not in ("__import__", "import_module"), name
    others = "mini_vit_concat", "mini_vit_augment", "mini_vit_crossattn"
    assert arrows == {("mini_vit", "common"), ("mini_vit_crossattn", "mini_vit_augment"),
                      *((name, to) for name in others for to in ("common", "mini_vit"))}

def test_nothing_happens_at_import(capfd: pytest.CaptureFixture, tmp_path: Path) -> None:
    before = torch.initial_seed(), torch.get_float32_matmul_precision(), sys.stdout
    for file in ROOT.glob("*.py"):
        runpy.run_path(str(file))
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())
    assert (torch.initial_seed(), torch.get_float32_matmul_precision(), sys.stdout) == before

# ---- the numbers in README and measurements ------------------------------------------------------

def test_numbers_of_parameters_are_those_of_the_models() -> None:
    rows = re.findall(r"^\| `(?:python )?(mini_vit\w*)\.py([^`]*)` \| ([\d,]+) \|", WORDS, re.M)
    for name, options, number in rows:
        both = [count_parameters(sys.modules[name], f"{size} --device cpu {options}")
                for size in ("--small", "--no-small")]
        assert number in both, (name, options)
    assert len({(name, number) for name, options, number in rows if not options.strip()}) >= 8

def test_means_deviations_and_differences_are_those_of_the_seeds() -> None:
    rows = re.findall(r"\| ([\d.]+)% ± ([\d.]+) \(([\d., ]+)\) \| ([\d, ]+) \|", WORDS)
    assert len(rows) >= 8
    runs = {}
    for mean, deviation, each, seeds in rows:
        runs[mean] = each = [float(percent) for percent in each.split(", ")]
        digits = len(mean.split(".")[1])
        assert mean == f"{statistics.mean(each):.{digits}f}", each
        assert deviation == f"{statistics.stdev(each):.{digits}f}", each
        assert len(each) == len(seeds.split(", ")) >= 3
    pattern = r"\| ([\d.]+)% \|[^|\n]*\| ([\d.]+)% \| ([+-][\d.]+) \| ([\d.]+) \|"
    for first, second, difference, errors in re.findall(pattern, WORDS):
        pair = runs[first], runs[second]
        gap = statistics.mean(pair[0]) - statistics.mean(pair[1])
        error = math.sqrt(sum(statistics.variance(run) / len(run) for run in pair))
        assert (difference, errors) == (f"{gap:+.3f}", f"{abs(gap) / error:.1f}"), (first, second)

def test_the_readmes_attention_gives_the_numbers_beside_it() -> None:
    code = re.search(r"```python\n(.*?)```", TEXTS[0].read_text(encoding="utf-8"), re.S)[1]
    names: dict = {}
    exec(code, names)
    numbers = re.findall(r"\d\.\d\d", re.sub(r"(?m)^(?!print).*$|^print.*#", "", code))
    shown = torch.cat([names["weights"].flatten(), names["out"].flatten()]).tolist()
    assert [float(number) for number in numbers] == pytest.approx(shown, abs=0.005)
