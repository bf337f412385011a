"""The scripts lie beside this folder; tests import them, and run them without a network."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # one core for the tests, one for the training beside them
import torch
import torchvision

ROOT = Path(__file__).parent.parent
MNIST = (ROOT / "data/MNIST/raw/train-images-idx3-ubyte.gz").exists()
sys.path.insert(0, str(ROOT))

import common


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests that need a trained model come last, or all others would wait for it, too."""
    items.sort(key=lambda item: "trained" in item.fixturenames)


@pytest.fixture(scope="session", autouse=True)
def training(request: pytest.FixtureRequest,
             tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple | None]:
    """A run on one core, of a minute or so, for the tests that need a trained model. It begins
    before all tests, and goes on beside them: its process, its options, and the file with what it
    prints."""
    if not any("trained" in item.fixturenames for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("trained")
    options = ["--small", "--device", "cpu", "--out", str(folder), "--epochs"]
    options += ["2", "--dataset", "MNIST"] if MNIST else ["6", "--dataset", "drawn"]
    command = [sys.executable, str(ROOT / "mini_vit_augment.py"), *options]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    yield process, options, folder / "log"
    process.kill()
    process.wait()


@pytest.fixture(autouse=True)
def quiet_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The same random numbers for each test, a folder of its own, no download; Ctrl-C still stops
    pytest."""
    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("no network in tests")

    torch.manual_seed(0)
    common.shuffled_batches.cache_clear()  # a test may have changed RANKS
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", no_network)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number in before:  # faults_told leaves its own behind
        signal.signal(number, before[number])


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """--dataset drawn is 2,000 digits to learn and 400 to test, where that is enough."""
    draw = common.draw_digits
    monkeypatch.setattr(common, "draw_digits", lambda count, seed: draw(count // 5, seed))


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable:
    """Calls a script's main() as its last lines do, with the options of a string; returns exit
    code, stdout, stderr."""
    def call(script: object, options: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script.__file__, *options.split()])
        code = 0
        try:
            with common.faults_told():
                script.main()
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return call
