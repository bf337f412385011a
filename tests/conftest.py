"""The scripts lie beside this folder; tests import them, and run them without a network."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(autouse=True)
def quiet_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The same random numbers for each test, a folder of its own, no download; Ctrl-C still stops pytest."""
    import torchvision

    def no_network(*args: object, **kwargs: object) -> None:
        raise OSError("no network in tests")

    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", no_network)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number in before:  # a script that stops in the middle leaves its own behind
        signal.signal(number, before[number])


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Calls a script's main() with the options of a string; returns exit code, stdout, stderr."""

    def call(script: object, options: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script.__file__, *options.split()])
        try:
            script.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return call
