"""Nothing is lost: checkpoints under faults of every kind, and runs that are stopped and go on."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import common
import mini_vit
import mini_vit_augment

TINY = "--device cpu --small --layers 1 --heads 2 --dim 16 --dataset drawn --batch-size 500 --dropout 0.1"


def folder(out: Path, script: object) -> Path:
    return out / f"{script.__name__}-drawn-small-seed0"


def log_of(out: Path, script: object) -> list[str]:
    """The log's lines without the seconds."""
    lines = (folder(out, script) / "log.csv").read_text().splitlines()
    assert lines[0] == "epoch,loss,accuracy,seconds"
    return [line.rsplit(",", 1)[0] for line in lines[1:]]


@pytest.mark.parametrize("script, more", [(mini_vit, "--muon"), (mini_vit_augment, "--workers 0"),
                                          (mini_vit_augment, "--workers 2")])
def test_a_stopped_run_ends_where_an_unbroken_one_does(command_line: object, monkeypatch: pytest.MonkeyPatch,
                                                       tmp_path: Path, script: object, more: str) -> None:
    options = f"{TINY} --epochs 3 {more} --out {tmp_path}"
    code, unbroken, _ = command_line(script, options + "/unbroken")
    assert code == 0

    original, epochs = common.train_epoch, []

    def stops(*args: object) -> tuple[float, float]:
        epochs.append(args[-1])
        if args[-1] == 1:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(common, "train_epoch", stops)
    code, _, err = command_line(script, options + "/stopped")
    assert code == 130 and "--resume" in err and "Traceback" not in err and epochs == [0, 1]
    monkeypatch.setattr(common, "train_epoch", original)
    code, resumed, _ = command_line(script, options + "/stopped --resume")
    assert code == 0 and "epoch 1 of 3" not in resumed and "epoch 2 of 3" in resumed
    assert log_of(tmp_path / "stopped", script) == log_of(tmp_path / "unbroken", script)
    assert resumed.splitlines()[-12:] == unbroken.splitlines()[-12:]
    one, other = (torch.load(folder(tmp_path / name, script) / "checkpoint.pt", weights_only=True)["model"]
                  for name in ("unbroken", "stopped"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_of_several_seeds_goes_on_in_the_seed_it_was_in(command_line: object,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    options, original = TINY + " --epochs 2 --seeds 2", common.train_epoch
    unbroken = command_line(mini_vit, options + " --out unbroken")[1].splitlines()[-1]

    def stops(*args: object) -> tuple[float, float]:
        if args[-2].seed == 1 and args[-1] == 0:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(common, "train_epoch", stops)
    assert command_line(mini_vit, options)[0] == 130
    monkeypatch.setattr(common, "train_epoch", original)
    code, out, _ = command_line(mini_vit, options + " --resume")
    assert code == 0 and out.splitlines()[-1] == unbroken and out.count("epoch 1 of 2") == 1


def test_after_training_a_signal_ends_a_run_at_once_again(command_line: object) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert command_line(mini_vit, f"{TINY} --epochs 1")[0] == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("training", ["", "--muon"])
def test_a_finished_run_is_evaluated_again(command_line: object, tmp_path: Path, training: str) -> None:
    first = command_line(mini_vit, f"{TINY} {training} --epochs 1 --out {tmp_path}")[1].splitlines()[-1]
    code, out, _ = command_line(mini_vit, f"{TINY} --epochs 0 --resume --out {tmp_path}")
    assert code == 0 and out.splitlines()[-1] == first and "epoch 1" not in out


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to catch")
@pytest.mark.parametrize("number, code, group", [
    (signal.SIGINT, 130, True), (signal.SIGTERM, 143, False), (signal.SIGTERM, 143, True)])
def test_signals_end_a_run_with_a_sentence(tmp_path: Path, number: int, code: int, group: bool) -> None:
    run = subprocess.Popen([sys.executable, mini_vit_augment.__file__, *TINY.split(), "--epochs", "1000",
                            "--workers", "2", "--out", str(tmp_path), *["--resume"] * group],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    while not run.stdout.readline().startswith("epoch 2"):
        assert run.poll() is None
    try:
        os.killpg(run.pid, number) if group else run.send_signal(number)  # the workers get it, too, or not
        _, err = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == code and "Traceback" not in err
    options = f"{TINY} --epochs 1000 --workers 2 --out {tmp_path}"
    command = f"python {mini_vit_augment.__file__} {options} --resume"
    assert err.splitlines()[-1] == f"mini_vit_augment.py: stopped: go on with {command}"
    assert torch.load(folder(tmp_path, mini_vit_augment) / "checkpoint.pt", weights_only=True)["epoch"] >= 2


def workers_of(process: int) -> list[int]:
    """Its children; or, where a fork server makes the workers, the children of that."""
    children = [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    return [worker for child in children for worker in workers_of(child)] or children


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the workers in /proc")
def test_a_killed_worker_is_told(tmp_path: Path) -> None:
    run = subprocess.Popen([sys.executable, mini_vit_augment.__file__, *TINY.split(), "--epochs", "1000",
                            "--workers", "2", "--out", str(tmp_path)],
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not run.stdout.readline().startswith("epoch 1"):
        assert run.poll() is None
    try:
        os.kill(workers_of(run.pid)[0], signal.SIGKILL)
        _, err = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 2 and "Traceback" not in err
    assert "mini_vit_augment.py: a worker, or another rank, died: add --resume" in err.splitlines()[-1]
    assert torch.load(folder(tmp_path, mini_vit_augment) / "checkpoint.pt", weights_only=True)["epoch"] >= 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
def test_workers_that_cannot_start_do_not_hang_a_run(tmp_path: Path) -> None:
    import resource

    command = [sys.executable, mini_vit_augment.__file__, *TINY.split(), "--epochs", "1", "--workers", "40"]
    run = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=60,
                         preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "Too many open files" in run.stderr.splitlines()[-1]


def test_a_signal_while_the_last_epoch_is_saved_is_heard(command_line: object,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.save

    def interrupted(content: object, file: object) -> None:
        signal.raise_signal(signal.SIGTERM)
        original(content, file)

    monkeypatch.setattr(torch, "save", interrupted)
    code, out, err = command_line(mini_vit, TINY + " --epochs 1 --seeds 2")
    assert code == 143 and "accuracy" not in out and "--resume" in err
    monkeypatch.setattr(torch, "save", original)
    code, out, _ = command_line(mini_vit, TINY + " --epochs 1 --seeds 2 --resume")
    assert code == 0 and out.count("epoch 1 of 1") == 1  # only the second seed's


def save(out: Path, number: int) -> None:
    state = {"run": out.name, "number": number, "tensor": torch.full((200_000,), number)}
    common.write(out / "checkpoint.pt", lambda file: torch.save(state, file))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_while_saving(tmp_path: Path) -> None:
    save(tmp_path, 0)
    last, inside = 0, 0
    for _ in range(50):
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
        inside += (tmp_path / "checkpoint.part").exists()
        loaded = common.load(tmp_path, {"run": tmp_path.name})
        assert loaded["number"] >= last and (loaded["tensor"] == loaded["number"]).all()
        last = loaded["number"]
    assert inside > 0  # some were killed in the middle of a file


def test_a_full_disk_loses_nothing(command_line: object, monkeypatch: pytest.MonkeyPatch,
                                   tmp_path: Path) -> None:
    options = f"{TINY} --epochs 2 --out {tmp_path}"
    original, times = torch.save, []

    def full(content: object, file: object) -> None:
        times.append(1)
        if len(times) == 2:
            file.write(b"half a checkpoint")
            raise OSError(28, "No space left on device")
        original(content, file)

    monkeypatch.setattr(torch, "save", full)
    code, _, err = command_line(mini_vit, options)
    assert code == 2 and "No space left" in err and "--out" in err and "Traceback" not in err
    code, out, _ = command_line(mini_vit, options + " --resume")
    assert code == 0 and "epoch 2 of 2" in out and "epoch 1 of 2" not in out


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
@pytest.mark.parametrize("room", [100_000, 300_000, 500_000])
def test_a_disk_with_too_little_room_for_a_checkpoint_is_told(tmp_path: Path, room: int) -> None:
    """By a limit to the size of a file. Wherever it strikes, torch.save has its own errors on top."""
    import resource

    command = [sys.executable, mini_vit.__file__, *TINY.split(), "--dim", "64", "--epochs", "1"]
    run = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=60,
                         preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)))
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "mini_vit.py: cannot read or write ([Errno 27] File too large)" in run.stderr.splitlines()[-1]


@pytest.mark.parametrize("files", [4, 5])
def test_a_run_that_ends_as_it_saves_loses_no_line_of_its_log(command_line: object,
                                                              monkeypatch: pytest.MonkeyPatch,
                                                              tmp_path: Path, files: int) -> None:
    """An epoch writes three files; this run ends when the second epoch has written one, or two."""
    options, original, written = f"{TINY} --epochs 2 --out {tmp_path}", common.write, []

    def stops(path: Path, put: object) -> None:
        if len(written) == files:
            raise KeyboardInterrupt
        original(path, put)
        written.append(path)

    monkeypatch.setattr(common, "write", stops)
    assert command_line(mini_vit, options)[0] == 130
    monkeypatch.setattr(common, "write", original)
    assert command_line(mini_vit, options + " --resume")[0] == 0
    log = (folder(tmp_path, mini_vit) / "log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in log] == ["epoch", "1", "2"]


def test_a_folder_that_cannot_be_written(command_line: object, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    code, _, err = command_line(mini_vit, f"{TINY} --epochs 1 --out {tmp_path / 'file'}")
    assert code == 2 and "--out" in err and len(err.splitlines()) == 1  # at once, before any epoch


class Code:
    """What a checkpoint must not run."""

    def __reduce__(self) -> tuple:
        return (os.mkdir, ("ran",))


@pytest.mark.parametrize("fault", "empty truncated text code run heads muon weights".split())
def test_a_bad_checkpoint_is_told(command_line: object, tmp_path: Path, fault: str) -> None:
    path = folder(tmp_path, mini_vit) / "checkpoint.pt"
    command_line(mini_vit, f"{TINY} --epochs 1 --out {tmp_path}")
    sound, state = path.read_bytes(), torch.load(path, weights_only=True)
    bad = {"empty": b"", "truncated": sound[: len(sound) // 2], "text": b"hello"}
    path.write_bytes(bad.get(fault, sound))
    if fault == "code":
        torch.save({"run": Code()}, path)
    if fault in state:
        torch.save(state | {fault: 7}, path)
    if fault == "weights":
        torch.save(state["model"], path)
    code, _, err = command_line(mini_vit, f"{TINY} --epochs 2 --out {tmp_path} --resume")
    assert code == 2 and str(path) in err and "--" in err and "Traceback" not in err
    assert not Path("ran").exists()


def test_other_options_are_told(command_line: object, tmp_path: Path) -> None:
    """--resume does not go on with what other options have trained, nor hand it out as their result."""
    options = f"{TINY} --epochs 1 --out {tmp_path}"
    command_line(mini_vit, options)
    record = next(tmp_path.glob("*/options.json"))
    before = record.read_text()
    changed = dict(layers=2, adversarial=1.0, epochs=2, batch_size=50, lr=1e-5, weight_decay=0.5)
    for name, value in changed.items():
        code, out, err = command_line(mini_vit, f"{options} --resume --{name.replace('_', '-')} {value}")
        assert code == 2 and "accuracy" not in out and len(err.splitlines()) == 1
        assert f"was not made with {{'{name}': {value}}}" in err
    assert record.read_text() == before and '"layers": 1' in before


def test_a_checkpoint_from_before_an_option_was_there_goes_on(command_line: object, tmp_path: Path) -> None:
    path = folder(tmp_path, mini_vit) / "checkpoint.pt"
    command_line(mini_vit, f"{TINY} --epochs 1 --out {tmp_path}")
    state = torch.load(path, weights_only=True)
    del state["adversarial"], state["overlap"]
    torch.save(state, path)
    code, out, _ = command_line(mini_vit, f"{TINY} --epochs 1 --out {tmp_path} --resume")
    assert code == 0 and "epoch 1" not in out and "accuracy" in out
    code, _, err = command_line(mini_vit, f"{TINY} --epochs 1 --out {tmp_path} --resume --overlap 2")
    assert code == 2 and "was not made with {'overlap': 2}" in err


def test_an_evaluation_of_nothing_is_told(command_line: object, tmp_path: Path) -> None:
    code, out, err = command_line(mini_vit, f"{TINY} --epochs 0 --resume --out {tmp_path}")
    assert code == 2 and "accuracy" not in out and "train it first" in err
