"""The scripts lie beside this folder; tests import them, and run them without a network."""

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # also for the processes that tests start
import torch
import torchvision

ROOT = Path(__file__).parent.parent
MNIST = (ROOT / "data/MNIST/raw/train-images-idx3-ubyte.gz").exists()
sys.path.insert(0, str(ROOT))

import common
import mini_vit

# A model of one layer that trains in a part of a second, where digits are few.
TINY = ("--device cpu --layers 1 --heads 2 --dim 16 --patch-size 7 --overlap 0 --dataset drawn "
        "--epochs 1 --batch-size 100")

@pytest.fixture(autouse=True)
def quiet_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same random numbers for each test, a folder of its own, and no download."""
    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("no network in tests")

    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    for name in ("_urlretrieve", "_get_redirect_url"):
        monkeypatch.setattr(torchvision.datasets.utils, name, no_network)

@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """--dataset drawn has 1,000 training digits and 200 test digits, where that is enough."""
    draw = common.draw_digits
    monkeypatch.setattr(common, "draw_digits", lambda count, seed: draw(count // 10, seed))

@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """Calls a script's main() as its last lines do, with the options of a string; returns exit
    code, stdout, stderr."""
    def call(script: ModuleType, options: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script.__file__, *options.split()])
        code = 0
        try:
            with common.report_errors():
                script.main()
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return call

class Parsed(Exception):
    """Carries the options out of a script's main()."""

def read_options(options: str, script: ModuleType = mini_vit) -> Namespace:
    """What a script's main() makes of a command line."""
    def stop(parser: ArgumentParser) -> None:
        raise Parsed(parse_args(parser))

    parse_args = ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed) as caught:
        patch.setattr(sys, "argv", [script.__file__, *options.split()])
        patch.setattr(ArgumentParser, "parse_args", stop)
        script.main()
    return caught.value.args[0]
