"""The scripts lie beside this folder; tests import them, and run them without a network."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
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
    """A run on one core, of a minute or so, on large patches, for the tests that need a trained
    model. It begins before all tests, and goes on beside them: its process, its options, and the
    file with what it prints."""
    if not any("trained" in item.fixturenames for item in request.session.items):
        yield None
        return
    folder = tmp_path_factory.mktemp("trained")
    options = "--small --patch-size 7 --overlap 0 --input-dropout 0 --device cpu --out".split()
    options += [str(folder), "--epochs"]
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


# processes of their own


NURSERY = """
import json, os, pwd, resource, runpy, signal, sys

def find_no_name(number):
    raise KeyError(f"getpwuid(): uid not found: {number}")

pwd.getpwuid = find_no_name  # as in a container that is started with a number for a user
import torch, torchvision
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
    else:
        child = os.fork()
        if child == 0:
            break
        print(child, flush=True)
else:
    sys.exit()
os.setsid()
for number, file in ((1, order["out"]), (2, order["err"])):
    os.dup2(os.open(file, os.O_WRONLY), number)
os.chdir(order["folder"])
os.environ.update(order["environment"])
signal.signal(signal.SIGINT, signal.default_int_handler)
if order["open_files"]:
    resource.setrlimit(resource.RLIMIT_NOFILE, (order["open_files"], order["open_files"]))
sys.argv = order["command"]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")


class Child:
    """A script in a process of its own, which leads a group of its own."""

    def __init__(self, ask: Callable, command: list[str], environment: dict[str, str],
                 open_files: int) -> None:
        self.ask, name = ask, f"{time.time_ns()}"
        self.out, self.err = Path(f"{name}.out").absolute(), Path(f"{name}.err").absolute()
        self.out.touch()
        self.err.touch()
        self.number = ask(command=command, folder=os.getcwd(), out=str(self.out),
                          err=str(self.err), environment=environment, open_files=open_files)
        self.ended = False

    def wait_for(self, words: str) -> None:
        """Until it has said these words."""
        for _ in range(6000):
            if words in self.out.read_text():
                return
            time.sleep(0.01)
        raise TimeoutError(self.out.read_text() + self.err.read_text())

    def end(self) -> tuple[int, str]:
        """Its exit code, in a minute at most, and what it said to stderr."""
        watchdog = threading.Timer(60, os.killpg, (self.number, signal.SIGKILL))
        watchdog.start()
        code = self.ask(wait=self.number)
        watchdog.cancel()
        self.ended = True
        return code, self.err.read_text().replace("\r", "\n")


@pytest.fixture(scope="session", autouse=True)
def nursery(request: pytest.FixtureRequest) -> Iterator[Callable | None]:
    """A process that imports PyTorch, which takes seconds, beside the first tests, and forks all
    others. The user has no name there."""
    wanted = any("start" in item.fixturenames for item in request.session.items)
    if not wanted or not hasattr(os, "fork"):
        yield None
        return
    names = "LOGNAME", "USER", "LNAME", "USERNAME"
    environment = {name: os.environ[name] for name in os.environ if name not in names}
    process = subprocess.Popen([sys.executable, "-c", NURSERY], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True, env=environment)

    def ask(**order: object) -> int:
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    yield ask
    process.communicate()


@pytest.fixture
def start(nursery: Callable) -> Iterator[Callable]:
    """Starts a Child with a script and the options of a string."""
    children = []

    def call(script: object, options: str, environment: dict[str, str] | None = None,
             open_files: int = 0) -> Child:
        command = [script.__file__, *options.split()]
        children.append(Child(nursery, command, environment or {}, open_files))
        return children[-1]

    yield call
    for child in children:
        if not child.ended:
            os.killpg(child.number, signal.SIGKILL)
            child.end()


def train_in_two_processes(start: Callable, script: object, options: str) -> list[Child]:
    """As torchrun starts them; to their end."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    both = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "TORCHELASTIC_RUN_ID": "test"}
    ranks = [start(script, options, both | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    for rank in ranks:
        code, err = rank.end()
        assert code == 0, err
    return ranks
