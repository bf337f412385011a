"""Nothing is lost: checkpoints under faults of every kind, and runs that are stopped and go on."""

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed.run
from conftest import needs_fork, train_in_two_processes
from test_scripts import LAST, few_digits  # noqa: F401 (for all tests below)

import common
import mini_vit
import mini_vit_augment
import mini_vit_crossattn

TINY = ("--device cpu --small --layers 1 --heads 2 --dim 16 --patch-size 7 --overlap 0 "
        "--dataset drawn --batch-size 100 --dropout 0.1")
QUICK = TINY.replace("100", "1000") + " --patch-size 14"  # where there are ten thousand digits


def folder(out: object, script: object = mini_vit, seed: int = 0) -> Path:
    return Path(out, f"{script.__name__}-drawn-small-seed{seed}")


def state_of(run: Path) -> dict:
    """All that a run's checkpoint holds, but the seconds."""
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    return state | {"log": [row[:2] for row in state["log"]]}


def same(one: object, other: object) -> bool:
    """Whether two checkpoints are alike, bit by bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def stop_at(monkeypatch: pytest.MonkeyPatch, script: object, seed: int, epoch: int,
            stop: Callable) -> None:
    """Until monkeypatch is undone, this happens in place of an epoch."""
    original = script.train_epoch

    def train_epoch(*args: object) -> tuple[float, float]:
        if (args[-2].seed, args[-1]) == (seed, epoch):
            stop()
        return original(*args)

    monkeypatch.setattr(script, "train_epoch", train_epoch)


def press_ctrl_c() -> None:
    raise KeyboardInterrupt


# stopped, and taken up again


@pytest.mark.parametrize("script, more", [
    (mini_vit, "--no-muon"), (mini_vit_augment, "--workers 0"), (mini_vit_augment, "--workers 2")])
def test_a_stopped_run_ends_where_an_unbroken_one_does(
        command_line: Callable, monkeypatch: pytest.MonkeyPatch, script: object, more: str) -> None:
    options = f"{TINY} --epochs 3 {more} --out "
    code, unbroken, _ = command_line(script, options + "unbroken")
    assert code == 0
    with monkeypatch.context() as patch:
        stop_at(patch, script, seed=0, epoch=1, stop=press_ctrl_c)
        code, out, err = command_line(script, options + "stopped")
    assert code == 130 and "Traceback" not in err and "epoch 2" not in out
    command = f"python {script.__file__} {options}stopped --resume"
    name = Path(script.__file__).name
    assert err.splitlines()[-1].strip() == f"{name}: stopped: go on with {command}"
    code, resumed, _ = command_line(script, options + "stopped --resume")
    assert code == 0 and "epoch 1 of 3" not in resumed and "epoch 2 of 3" in resumed
    assert resumed.splitlines()[-12:] == unbroken.splitlines()[-12:]
    one, other = (state_of(folder(out, script)) for out in ("unbroken", "stopped"))
    assert same(one, other) and len(one["log"]) == 3
    one, other = (re.sub(r",[\d.]+$", "", (folder(out, script) / "log.csv").read_text(), flags=re.M)
                  for out in ("unbroken", "stopped"))
    assert one == other and len(one.splitlines()) == 4


def test_a_run_of_several_seeds_goes_on_in_the_seed_it_was_in(
        command_line: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    options = TINY + " --epochs 2 --seeds 2"
    unbroken = command_line(mini_vit, options + " --out unbroken")[1].splitlines()[-1]
    with monkeypatch.context() as patch:
        stop_at(patch, mini_vit, 1, 0, lambda: signal.raise_signal(signal.SIGTERM))
        assert command_line(mini_vit, options)[0] == 143
    code, out, _ = command_line(mini_vit, options + " --resume")
    assert code == 0 and out.splitlines()[-1] == unbroken and "2 seeds" in unbroken
    assert out.count("epoch 1 of 2") == 1


@pytest.mark.parametrize("more", ["", "--no-muon", "--seeds 2"])
def test_a_finished_run_is_evaluated_again(command_line: Callable, more: str) -> None:
    options = f"{TINY} {more} --epochs 1"
    first = command_line(mini_vit, options)[1]
    before = {name: (folder("runs") / name).read_bytes()
              for name in ("checkpoint.pt", "log.csv", "options.json")}
    for again in ("--evaluate", "--evaluate --epochs 9 --lr 7", "--resume"):
        code, out, _ = command_line(mini_vit, f"{options} {again}")
        assert code == 0 and "epoch 1 of" not in out
        results = [[line for line in text.splitlines() if " accuracy: " in line]
                   for text in (first, out)]
        assert results[0] == results[1]
    assert all((folder("runs") / name).read_bytes() == before[name] for name in before)


@pytest.mark.parametrize("files", [4, 5, 6, 7])
def test_a_run_that_ends_as_it_saves_loses_no_line_of_its_log(
        command_line: Callable, monkeypatch: pytest.MonkeyPatch, files: int) -> None:
    """An epoch writes four files; this run ends in the second epoch, after none to three."""
    original, written = common.whole_file, []

    @contextmanager
    def whole_file(path: Path) -> Iterator:
        with original(path) as file:
            yield file
            if len(written) == files:
                signal.raise_signal(signal.SIGTERM)
            written.append(path.name)

    with monkeypatch.context() as patch:
        patch.setattr(common, "whole_file", whole_file)
        code, out, err = command_line(mini_vit, TINY + " --epochs 2")
    assert code == 143 and "accuracy:" not in out and "--resume" in err
    assert not list(folder("runs").glob("*.part"))
    assert written[:4] == ["log.csv", "options.json", "checkpoint.pt", "curve.png"]
    assert len(state_of(folder("runs"))["log"]) == 1 + (files == 7)
    assert command_line(mini_vit, TINY + " --epochs 2 --resume")[0] == 0
    log = (folder("runs") / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in log] == ["epoch", "1", "2"]


# processes of their own


@needs_fork
def test_a_script_is_a_process_of_its_own_and_no_rank_of_a_run_that_is_over(
        start: Callable) -> None:
    """What another run left in the environment does not make it wait for others, or be silent. Its
    stderr is no terminal: it gets a line when an epoch begins, and then one every ten seconds."""
    left = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    run = start(mini_vit_crossattn, QUICK + " --epochs 1 --workers 1", left)
    code, err = run.end()
    assert code == 0, err
    lines = run.out.read_text().splitlines()
    assert lines[0].startswith("mini_vit_crossattn.py ") and re.fullmatch(LAST, lines[-1])
    bar = [line for line in err.splitlines() if line.strip()]
    assert bar[0].startswith("epoch 1:") and "images/s" in bar[0] and len(bar) <= 2


@needs_fork
@pytest.mark.parametrize("number, code, group", [
    (signal.SIGINT, 130, True), (signal.SIGTERM, 143, False), (signal.SIGTERM, 143, True)])
def test_signals_end_a_run_with_a_sentence(start: Callable, number: int, code: int,
                                           group: bool) -> None:
    options = f"{QUICK} --epochs 1000 --workers 2"
    run = start(mini_vit_augment, options + " --resume" * group)
    run.wait_for("epoch 2 of")
    time.sleep(0.05)  # a bar that is just being made would print a traceback of tqdm's
    began = time.monotonic()
    if group:
        os.killpg(run.number, number)  # the workers get it, too
    else:
        os.kill(run.number, number)
    ended, err = run.end()
    assert ended == code and "Traceback" not in err and time.monotonic() - began < 20
    command = f"python {mini_vit_augment.__file__} {options} --resume"
    last = err.splitlines()[-1].strip()
    assert last == f"mini_vit_augment.py: stopped: go on with {command}"
    assert len(state_of(folder("runs", mini_vit_augment))["log"]) >= 2


def workers_of(process: int) -> list[int]:
    """Its children; or, where a fork server makes the workers, the children of that."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [worker for child in children for worker in workers_of(int(child)) or [int(child)]]


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the workers in /proc")
def test_a_killed_worker_ends_a_run_and_leaves_its_checkpoint(start: Callable) -> None:
    run = start(mini_vit_augment, QUICK + " --epochs 1000 --workers 2")
    run.wait_for("epoch 1 of")
    os.kill(workers_of(run.number)[0], signal.SIGKILL)
    code, err = run.end()
    assert code in (1, 2), err  # the watchdog would give another
    assert len(state_of(folder("runs", mini_vit_augment))["log"]) >= 1


@needs_fork
def test_workers_that_cannot_start_do_not_hang_a_run(start: Callable) -> None:
    code, err = start(mini_vit_augment, QUICK + " --epochs 1 --workers 40", open_files=64).end()
    told = [line for line in err.splitlines() if line.startswith("mini_vit_augment.py: ")]
    assert code == 2 and len(told) == 1 and "Too many open files" in told[0], err


@pytest.mark.skipif(os.name == "nt", reason="torchrun needs libuv, which PyTorch for Windows lacks")
def test_a_run_of_two_processes_that_torchrun_is_told_to_end_goes_on_as_if_unbroken(
        start: Callable) -> None:
    options = QUICK + " --validate --epochs 7 --out "
    command = f"--standalone --nproc-per-node=2 {mini_vit.__file__} {options}stopped"
    run = start(torch.distributed.run, command)
    run.wait_for("epoch 2 of")
    began = time.monotonic()
    os.kill(run.number, signal.SIGTERM)
    code, err = run.end()
    assert code != 0 and time.monotonic() - began < 20, err
    name = "mini_vit-drawn-small-validate-seed0"
    assert 2 <= len(state_of(Path("stopped", name))["log"]) < 7

    for more in ("stopped --resume", "unbroken"):
        ranks = train_in_two_processes(start, mini_vit, options + more)
        assert "epoch 7 of 7" in ranks[0].out.read_text() and not ranks[1].out.read_text()
        assert ("epoch 1 of 7" in ranks[0].out.read_text()) == (more == "unbroken")
    one, other = (state_of(Path(out, name)) for out in ("stopped", "unbroken"))
    assert same(one, other) and len(one["log"]) == 7


# files


def save(out: Path, number: int) -> None:
    state = {"run": out.name, "number": number, "tensor": torch.full((200_000,), number)}
    with common.whole_file(out / "checkpoint.pt") as file:
        torch.save(state, file)


@needs_fork
def test_kill_9_while_saving(tmp_path: Path) -> None:
    save(tmp_path, 0)
    last = 0
    for _ in range(40):
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)  # a forked process has no thread pool
                for number in range(last, last + 10_000):
                    save(tmp_path, number)
            finally:
                os._exit(0)
        time.sleep(random.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        loaded = common.load_checkpoint(tmp_path, {"run": tmp_path.name})
        assert loaded["number"] >= last and (loaded["tensor"] == loaded["number"]).all()
        last = loaded["number"]
    assert list(tmp_path.glob("*.part")) and last > 0  # some were killed in the middle of a file


@needs_fork
def test_two_runs_at_once_in_one_folder_do_not_write_into_one_file() -> None:
    path = Path("checkpoint.pt")
    with common.whole_file(path) as file:
        file.write(b"one, ")
        file.flush()
        child = os.fork()
        if child == 0:
            try:
                with common.whole_file(path) as other_file:
                    other_file.write(b"the other")
            finally:
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert path.read_bytes() == b"the other"
        file.write(b"whole")
    assert path.read_bytes() == b"one, whole" and len(list(Path().iterdir())) == 1


@needs_fork
def test_two_runs_at_once_in_one_folder_both_end_well(start: Callable) -> None:
    options = QUICK + " --epochs 4"
    runs = [start(mini_vit, options) for _ in range(2)]
    for run in runs:
        code, err = run.end()
        assert code == 0, err
    assert runs[0].out.read_text().splitlines()[-1] == runs[1].out.read_text().splitlines()[-1]
    assert len(state_of(folder("runs"))["log"]) == 4 and not list(folder("runs").glob("*.part"))


def test_a_full_disk_loses_nothing(command_line: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    original, times = torch.save, []

    def full(content: object, file: object) -> None:
        times.append(1)
        if len(times) == 2:
            file.write(b"half a checkpoint")
            raise OSError(28, "No space left on device")
        original(content, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        code, _, err = command_line(mini_vit, TINY + " --epochs 2")
    assert code == 2 and "No space left" in err and "--out" in err and "Traceback" not in err
    assert not list(folder("runs").glob("*.part"))
    code, out, _ = command_line(mini_vit, TINY + " --epochs 2 --resume")
    assert code == 0 and "epoch 2 of 2" in out and "epoch 1 of 2" not in out


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
@pytest.mark.parametrize("room", [100_000, 250_000, 400_000])
def test_a_disk_with_too_little_room_for_a_checkpoint_is_told(command_line: Callable,
                                                              room: int) -> None:
    """By a limit to the size of a file. Wherever it strikes, torch.save has its own errors."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        code, _, err = command_line(mini_vit, TINY + " --dim 64 --epochs 1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and "Traceback" not in err
    last = err.splitlines()[-1].strip()
    assert "mini_vit.py: cannot read or write" in last and "--out" in last
    assert not list(folder("runs").glob("*.part"))


def test_a_folder_that_cannot_be_written_is_told_before_any_epoch(command_line: Callable) -> None:
    Path("file").write_text("no folder")
    code, out, err = command_line(mini_vit, TINY + " --epochs 1 --out file")
    assert code == 2 and "--out" in err and err.count("\n") == 1 and "epoch 1" not in out


# checkpoints of other runs, or none


class Code:
    """What a checkpoint must not run."""

    def __reduce__(self) -> tuple:
        return (os.mkdir, ("ran",))


def test_a_bad_checkpoint_is_told(command_line: Callable) -> None:
    command_line(mini_vit, TINY + " --epochs 1")
    path = folder("runs") / "checkpoint.pt"
    sound, state = path.read_bytes(), torch.load(path, weights_only=True)
    bad = {"empty": b"", "truncated": sound[: len(sound) // 2], "text": b"hello"}
    contents = {"code": {"run": Code()}, "run": state | {"run": 7}, "heads": state | {"heads": 7},
                "muon": state | {"muon": 7}, "weights": state["model"], "list": [1, 2]}
    for fault in (*bad, *contents):
        if fault in bad:
            path.write_bytes(bad[fault])
        else:
            torch.save(contents[fault], path)
        code, _, err = command_line(mini_vit, TINY + " --epochs 1 --resume")
        assert code == 2 and str(path) in err and "--" in err and err.count("\n") == 1, fault
    assert not Path("ran").exists()


def test_other_options_are_told(command_line: Callable) -> None:
    """--resume does not go on with what other options have trained, nor hand it out as their
    result."""
    options = TINY + " --epochs 1"
    command_line(mini_vit, options)
    record = folder("runs") / "options.json"
    before = record.read_text()
    changed = dict(layers=2, adversarial=1.0, epochs=2, batch_size=50, lr=1e-5, weight_decay=0.5)
    for name, value in changed.items():
        more = f" --resume --{name.replace('_', '-')} {value}"
        code, out, err = command_line(mini_vit, options + more)
        assert code == 2 and "accuracy:" not in out and err.count("\n") == 1
        assert f"was not made with {{'{name}': {value}}}" in err
    code, _, err = command_line(mini_vit, options + " --evaluate --layers 2")
    assert code == 2 and "was not made with {'layers': 2}" in err
    assert record.read_text() == before and '"layers": 1' in before


@pytest.mark.parametrize("more", ["--evaluate", "--predict digit.png"])
@pytest.mark.parametrize("small", ["", "--small "])
def test_where_nothing_was_trained_a_sentence_names_the_command(command_line: Callable, more: str,
                                                                small: str) -> None:
    options = f"--device cpu --layers 1 --dataset drawn {small}{more}"
    code, out, err = command_line(mini_vit, options)
    assert code == 2 and "accuracy:" not in out and err.count("\n") == 1
    assert f"holds no trained model: first run python mini_vit.py {small}" in err
    assert ("--small" in err) == bool(small)
