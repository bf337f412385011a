"""Nothing is lost: stopped runs resume, and checkpoints survive faults of every kind."""

import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import TINY, read_options
from pytest import MonkeyPatch
from torch.testing import assert_close

import common
import mini_vit
import mini_vit_augment

LONG = TINY.replace("--epochs 1 ", "--epochs 1000 ").replace("100", "1000") + " --workers 2"
RUN = Path("runs/mini_vit-drawn-small-seed0")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")
needs_proc = pytest.mark.skipif(not Path("/proc").exists(), reason="finds processes in /proc")
pytestmark = pytest.mark.usefixtures("few_digits")

def load(run: Path) -> dict:
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    return {"log": [row[:2] for row in state["log"]], "model": state["model"],
            "optimizers": [optimizer["state"] for optimizer in state["optimizers"]]}

def log_of(run: Path) -> list[str]:
    return [line.rpartition(",")[0] for line in (run / "log.csv").read_text().splitlines()]

def fork(action: Callable[[], object]) -> int:
    """Calls it in a forked process, and returns the number of that."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    return child

# ---- stopped and resumed -------------------------------------------------------------------------

@pytest.mark.parametrize("script, more", [
    (mini_vit, "--no-muon"), (mini_vit, "--muon --adversarial 1 --tta 1"),
    (mini_vit_augment, "--muon --workers 0"), (mini_vit_augment, "--no-muon --workers 2")])
def test_a_stopped_run_ends_where_an_unbroken_one_does(
        command_line: Callable, monkeypatch: MonkeyPatch, script: ModuleType, more: str) -> None:
    """It is stopped by Ctrl-C at the end of its second epoch, and resumed from a checkpoint like
    that of a GPU, whose AdamW is capturable."""
    calls, check_and_show = [], script.check_and_show

    def press_ctrl_c(*args: object) -> None:
        calls.append(args)
        if len(calls) == 4:  # two calls per epoch
            raise KeyboardInterrupt
        check_and_show(*args)

    options = f"{TINY} --epochs 3 --dropout 0.1 {more} --out"
    unbroken = command_line(script, f"{options} unbroken")[1]
    with monkeypatch.context() as patch:
        patch.setattr(script, "check_and_show", press_ctrl_c)
        code, out, err = command_line(script, f"{options} stopped")
    assert code == 130 and "epoch 1 of 3" in out and "epoch 2 of 3" not in out
    name, _, command = err.strip().partition(": stopped. Resume with: python ")
    assert name == Path(script.__file__).name
    assert shlex.split(command) == [script.__file__, *options.split(), "stopped", "--resume"]
    run = Path("stopped", f"{script.__name__}-drawn-small-seed0")
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    for group in (optimizer["param_groups"][0] for optimizer in state["optimizers"]):
        group.update({"capturable": True} if "capturable" in group else {})
    torch.save(state, run / "checkpoint.pt")
    code, resumed, _ = command_line(script, f"{options} stopped --resume")
    assert code == 0 and "epoch 1 of 3" not in resumed and "epoch 2 of 3" in resumed
    assert resumed.splitlines()[-12:] == unbroken.splitlines()[-12:]
    other = Path("unbroken", run.name)
    assert_close(load(run), load(other), rtol=0, atol=0)
    assert log_of(run) == log_of(other) and len(log_of(run)) - 1 == len(load(run)["log"]) == 3

def test_a_checkpoint_of_a_cpu_resumes_on_a_gpu(command_line: Callable) -> None:
    """There, AdamW stays capturable and reads the run's own learning rate. No GPU is needed."""
    assert command_line(mini_vit, TINY)[0] == 0
    options = read_options(TINY + " --resume")
    options.device = torch.device("cuda")
    model, lr = mini_vit.ViT(**common.model_options(options)), torch.zeros(())
    optimizers = common.make_optimizers(model, lr, options)
    digits = common.draw_digits(10, seed=0)
    assert common.Run(options, digits, model, optimizers).resume() == 1
    assert all(optimizer.param_groups[0]["lr"] is lr for optimizer in optimizers)
    assert optimizers[1].param_groups[0]["capturable"] and optimizers[1].state

def test_a_finished_run_is_tested_again_and_stays_as_it_is(command_line: Callable) -> None:
    first = command_line(mini_vit, TINY)[1]
    before = {path.name: path.read_bytes() for path in RUN.iterdir()}
    code, out, _ = command_line(mini_vit, TINY + " --resume")
    assert code == 0 and out.splitlines()[3:] == first.splitlines()[3:]  # no epoch
    assert {path.name: path.read_bytes() for path in RUN.iterdir()} == before

@pytest.mark.parametrize("error, code, complete", [
    (KeyboardInterrupt(), 130, False), (KeyboardInterrupt(), 130, True),
    (OSError(28, "No space left on device"), 2, False)], ids=str)
def test_a_run_that_ends_while_it_saves_loses_its_epoch_at_most(
        command_line: Callable, monkeypatch: MonkeyPatch, error: BaseException, code: int,
        complete: bool) -> None:
    """When half of its second checkpoint is written, or when all of it is."""
    atomic_write, written = common.atomic_write, []

    @contextmanager
    def failing_write(path: Path) -> Iterator:
        written.append(path)
        with atomic_write(path) as file:
            if len(written) == 2 and not complete:
                file.write(b"half a checkpoint")
                raise error
            yield file
        if len(written) == 2:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(common, "atomic_write", failing_write)
        ended, _, err = command_line(mini_vit, TINY + " --epochs 2")
    assert ended == code and err.count("\n") == 2 and (code == 130 or str(error) in err)
    assert len(load(RUN)["log"]) == 1 + complete and not list(RUN.glob("*.part"))
    code, out, _ = command_line(mini_vit, TINY + " --epochs 2 --resume")
    assert code == 0 and "epoch 1 of 2" not in out and ("epoch 2 of 2" in out) is not complete
    assert [line.split(",")[0] for line in log_of(RUN)] == ["epoch", "1", "2"]

# ---- processes of their own ----------------------------------------------------------------------

@pytest.fixture
def start() -> Iterator[Callable]:
    """Starts augmented runs with two workers each, in processes, sessions and folders of their own,
    and waits until they have saved an epoch."""
    runs = []

    def call(*folders: str) -> list[subprocess.Popen]:
        for out in folders:
            Path(out).mkdir()
            command = [sys.executable, mini_vit_augment.__file__, *LONG.split(), "--out", out]
            with open(f"{out}/stdout", "w") as stdout, open(f"{out}/stderr", "w") as stderr:
                runs.append(subprocess.Popen(command, stdout=stdout, stderr=stderr,
                                             start_new_session=True))
        for out in folders:
            wait_until(lambda: "epoch 1 of" in Path(out, "stdout").read_text())
        return runs

    yield call
    for run in runs:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()

def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited for a minute"
        time.sleep(0.02)

def processes_of(run: subprocess.Popen) -> list[int]:
    """Those of a run's session that have not ended, oldest first."""
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended just now
            state, _, _, session, *_ = file.read_text().rpartition(")")[2].split()
            if state != "Z" and int(session) == run.pid:
                found.append(int(file.parent.name))
    return sorted(found)

@needs_proc
def test_ctrl_c_and_a_killed_worker_end_a_run_with_all_its_processes(start: Callable) -> None:
    stopped, broken = start("stopped", "broken")
    os.killpg(stopped.pid, signal.SIGINT)  # as a terminal does: to the workers, too
    os.kill(processes_of(broken)[-1], signal.SIGKILL)
    assert (stopped.wait(60), broken.wait(60)) == (130, 1)
    said = Path("stopped/stderr").read_text()
    assert re.search(r"^mini_vit_augment.py: stopped. Resume with: python .* --resume$", said, re.M)
    assert "KeyboardInterrupt" not in said
    assert re.search("killed by signal|exited|ConnectionReset", Path("broken/stderr").read_text())
    wait_until(lambda: not processes_of(stopped) + processes_of(broken))

@needs_proc
def test_a_killed_run_leaves_a_checkpoint_and_no_workers(start: Callable) -> None:
    runs = start("terminated", "killed")
    for run, number in zip(runs, (signal.SIGTERM, signal.SIGKILL)):
        assert len(processes_of(run)) >= 3
        run.send_signal(number)
        assert run.wait(10) == -number
    wait_until(lambda: not processes_of(runs[0]) + processes_of(runs[1]))
    for out in ("terminated", "killed"):
        assert len(load(Path(out, "mini_vit_augment-drawn-small-seed0"))["log"]) >= 1

@needs_fork
def test_two_runs_at_once_in_one_folder_both_end_well(command_line: Callable) -> None:
    options = TINY + " --epochs 4"
    child = fork(lambda: os._exit(command_line(mini_vit, options)[0]))
    assert command_line(mini_vit, options)[::2] == (0, "") and os.waitpid(child, 0)[1] == 0
    assert len(load(RUN)["log"]) == 4 and len(log_of(RUN)) == 5 and not list(RUN.glob("*.part"))

# ---- files ---------------------------------------------------------------------------------------

@needs_fork
def test_kill_9_while_saving_leaves_the_last_checkpoint_complete(tmp_path: Path) -> None:
    def save(numbers: range) -> None:
        for number in numbers:
            with common.atomic_write(tmp_path / "checkpoint.pt") as file:
                torch.save({"number": number, "tensor": torch.full((200_000,), number)}, file)

    save(range(1))
    last = 0
    for _ in range(40):
        child = fork(lambda: save(range(last, last + 10_000)))
        time.sleep(random.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        state = common.load_checkpoint(tmp_path, {})
        assert state["number"] >= last and (state["tensor"] == state["number"]).all()
        last = state["number"]
    assert list(tmp_path.glob("*.part")) and last > 0  # some were killed in the middle of a file

@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
@pytest.mark.parametrize("room", [100_000, 250_000, 400_000])
def test_too_little_room_for_a_checkpoint_is_reported(command_line: Callable, room: int) -> None:
    """By a limit to the size of a file. Wherever it strikes, torch.save raises its own errors."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        code, _, err = command_line(mini_vit, TINY + " --dim 64")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and err.startswith("\nmini_vit.py: cannot read or write a file ([Errno 27]")
    assert "--out" in err and err.count("\n") == 2 and not list(RUN.glob("*.part"))

def test_out_may_be_in_the_home_folder_and_must_not_be_a_file(command_line: Callable,
                                                              monkeypatch: MonkeyPatch) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(Path("home").absolute()))
    assert command_line(mini_vit, TINY + " --epochs 0 --out=~/mine")[0] == 0
    assert (Path("home/mine") / RUN.name).is_dir() and not Path("~").exists()
    Path("file").write_text("no folder")
    code, out, err = command_line(mini_vit, TINY + " --out file")
    assert code == 2 and "'file" in err and "--out" in err and err.count("\n") == 2
    assert "epoch 1" not in out

# ---- checkpoints that do not fit -----------------------------------------------------------------

class Code:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("ran",)

def test_a_bad_checkpoint_is_reported(command_line: Callable, monkeypatch: MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    assert command_line(mini_vit, TINY)[0] == 0
    path = RUN / "checkpoint.pt"
    sound, state = path.read_bytes(), torch.load(path, weights_only=True)
    for content, words in (
            (b"", "corrupt"), (b"hello", "corrupt"), ({"run": Code()}, "corrupt"),
            ([1, 2], "corrupt"), (sound[: len(sound) // 2], "corrupt"), (sound[:2000], "corrupt"),
            (state["model"], "not trained with"), (state | {"run": 7}, f"with run {RUN.name}: "),
            (state | {"muon": 7}, "not trained with muon True: pass the options")):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        code, out, err = command_line(mini_vit, TINY + " --resume")
        assert code == 2 and "accuracy: " not in out and err.count("\n") == 2
        assert str(path) in err and words in err and " --" in err
    assert not Path("ran").exists()
    monkeypatch.setattr(torch, "load", refuse)
    code, _, err = command_line(mini_vit, TINY + " --resume")
    assert code == 2 and f"[Errno 13] Permission denied: '{path}'" in err and "corrupt" not in err

def test_options_that_a_run_was_not_trained_with_are_named(command_line: Callable) -> None:
    assert command_line(mini_vit, TINY)[0] == 0
    before = (RUN / "checkpoint.pt").read_bytes()
    for name, value in dict(layers=2, dropout=0.5, adversarial=1.0, epochs=2, batch_size=50,
                            lr=1e-5, weight_decay=0.5).items():
        more = f" --resume --{name.replace('_', '-')} {value}"
        code, out, err = command_line(mini_vit, TINY + more)
        assert code == 2 and "accuracy: " not in out and err.count("\n") == 2
        assert f"was not trained with {name} {value}: pass the options that it was" in err
    assert (RUN / "checkpoint.pt").read_bytes() == before
