"""Batches, augmentation, and loading."""

import gzip
import hashlib
import multiprocessing
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from http.client import InvalidURL
from pathlib import Path
from subprocess import PIPE, Popen
from unittest.mock import Mock
from urllib.error import URLError

import pytest
import torch
import torchvision
from conftest import MNIST, ROOT, read_options
from pytest import MonkeyPatch
from torch import Tensor

import common
import mini_vit
from mini_vit_augment import augment, augmented_batches

NOTHING = dict(degrees=0, scale=0, shear=0, shift=0, bend=0)

def options(**changes: object) -> Namespace:
    return Namespace(**{"seed": 0, "epochs": 2, "batch_size": 16, "workers": 0,
                        "device": torch.device("cpu"), **changes})

def numbered_digits(count: int) -> common.Digits:
    labels = torch.arange(count)
    return common.Digits("numbered", (labels + 100).byte().view(-1, 1, 1).repeat(1, 28, 28), labels)

def check_same(batches: list, others: list) -> None:
    for batch, other in zip(batches, others, strict=True):
        assert torch.equal(batch[0], other[0]) and torch.equal(batch[1], other[1])

def distinct(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}

# ---- batches ------------------------------------------------------------------------------------

def test_an_epoch_has_each_digit_once_in_an_order_of_its_own_in_whole_batches() -> None:
    orders = set()
    for seed in (0, 1):
        asked = options(seed=seed, epochs=3, batch_size=8)
        steps = list(common.shuffled_indices(40, asked, 0))
        assert [epoch for epoch, _ in steps] == [0] * 5 + [1] * 5 + [2] * 5
        for first in (0, 5, 10):
            order = sum((indices for _, indices in steps[first : first + 5]), [])
            assert sorted(order) == list(range(40))
            orders.add(tuple(order))
        assert list(common.shuffled_indices(40, asked, 1)) == steps[5:]
        assert [len(indices) for _, indices in common.shuffled_indices(47, asked, 0)] == [8] * 15
    assert len(orders) == 6

@pytest.mark.parametrize("make_batches", [common.plain_batches, augmented_batches])
def test_batches_are_shuffled_and_labelled_and_on_the_device(make_batches: Callable) -> None:
    digits, asked = numbered_digits(20), options(epochs=3, batch_size=5)
    batches, steps = list(make_batches(digits, asked, 0)), common.shuffled_indices(20, asked, 0)
    for (images, labels), (_, indices) in zip(batches, steps, strict=True):
        assert labels.tolist() == indices and images.dtype == torch.uint8
        assert torch.equal(images[:, 14, 14].long() - 100, labels)
    check_same(list(make_batches(digits, asked, 1)), batches[4:])
    batch = next(make_batches(digits, options(device=torch.device("meta")), 0))
    assert [tensor.device.type for tensor in batch] == ["meta", "meta"]

def all_batches(**changes: object) -> list:
    before = torch.get_rng_state()
    batches = list(augmented_batches(common.draw_digits(64, seed=0), options(**changes), 0))
    assert torch.equal(torch.get_rng_state(), before)  # which is dropout's
    return batches

def test_augmentation_depends_on_seed_and_epoch_and_not_on_the_global_generator() -> None:
    batches = all_batches()
    check_same(all_batches(), batches)
    assert len(distinct(torch.cat([images for images, _ in batches]))) == 128
    one = common.draw_digits(1, seed=0)  # whose order is always the same
    images = [images for seed in (0, 1)
              for images, _ in augmented_batches(one, options(batch_size=1, seed=seed), 0)]
    assert len(distinct(torch.cat(images))) == 4

@pytest.mark.parametrize("workers, method", [(2, multiprocessing.get_start_method()),
                                             (1, "spawn")])  # as on macOS and Windows
def test_workers_make_the_same_batches(workers: int, method: str) -> None:
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(method, force=True)
    try:
        check_same(all_batches(workers=workers), all_batches())
    finally:
        multiprocessing.set_start_method(before, force=True)

# ---- augmentation -------------------------------------------------------------------------------

def rectangles(height: int, width: int, **changes: float) -> Tensor:
    """Four hundred in the middle of an image, augmented in these ways only; scaled to sum 1."""
    images = torch.zeros(400, 28, 28, dtype=torch.uint8)
    images[:, 14 - height // 2 : 14 + height // 2, 14 - width // 2 : 14 + width // 2] = 250
    images = augment(images, common.generator(0), **{**NOTHING, **changes})
    return images / images.sum((1, 2), keepdim=True).double()

def moments(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Second moments about the middle: vertical, horizontal, mixed; in square pixels."""
    place = torch.arange(28.0).double() - 13.5
    return (images.sum(2) @ place**2, images.sum(1) @ place**2,
            torch.einsum("bij,i,j->b", images, place, place))

def limits(values: Tensor) -> list[float]:
    return [values.min().item(), values.max().item()]

def test_images_of_a_batch_are_augmented_differently_and_stay_in_the_picture() -> None:
    image, digits = (common.draw_digits(count, seed=0).images for count in (1, 500))
    images = augment(image.expand(300, 28, 28), common.generator(0))
    assert images.dtype == torch.uint8 and len(distinct(images)) == 300
    kept = augment(digits, common.generator(0)).float().sum((1, 2)) / digits.float().sum((1, 2))
    assert kept.min() > 0.6 and abs(kept.mean() - 1) < 0.1
    assert torch.equal(augment(digits, common.generator(0), **NOTHING), digits)

def test_shift_rotation_scale_and_shear_are_as_large_as_asked_for() -> None:
    images, place = rectangles(4, 4, shift=3.0), torch.arange(28.0).double() - 13.5
    for center in images.sum(2) @ place, images.sum(1) @ place:
        assert limits(center) == pytest.approx([-3, 3], abs=0.15)
    vertical, horizontal, mixed = moments(rectangles(4, 14, degrees=30))
    angles = torch.rad2deg(torch.atan2(2 * mixed, horizontal - vertical) / 2)
    assert limits(angles) == pytest.approx([-30, 30], abs=1.5)
    vertical, horizontal, mixed = moments(rectangles(14, 14, scale=0.2))
    sides = (torch.stack([vertical, horizontal]) / (14**2 / 12)).sqrt()
    for side in sides:
        assert limits(side) == pytest.approx([1 / 1.2, 1 / 0.8], abs=0.05)
    assert torch.corrcoef(sides)[0, 1].abs() < 0.2 and mixed.abs().max() < 0.1
    vertical, _, mixed = moments(rectangles(14, 14, shear=0.3))
    assert limits(mixed / vertical) == pytest.approx([-0.3, 0.3], abs=0.02)

def test_bend_is_a_standard_deviation_in_pixels(monkeypatch: MonkeyPatch) -> None:
    sample = Mock(side_effect=lambda images, grid, align_corners: images)
    monkeypatch.setattr(torch.nn.functional, "grid_sample", sample)
    images = torch.zeros(2000, 28, 28, dtype=torch.uint8)
    for bend in (0, 1.5):
        augment(images, common.generator(0), **{**NOTHING, "bend": bend})
    straight, bent = (call.args[1] for call in sample.call_args_list)
    field = (bent - straight) * 14
    assert field.std() == pytest.approx(1.5, abs=0.05)
    assert (field[:, 1:] - field[:, :-1]).std() < 0.3 * field.std()  # smooth

# ---- loading ------------------------------------------------------------------------------------

@pytest.mark.skipif(not MNIST, reason="MNIST is not in data/MNIST/raw")
def test_normalized_mnist_has_mean_0_and_variance_1() -> None:
    floats = common.normalize(common.find_digits("MNIST", ROOT / "data")[0].images)
    assert floats.shape == (60_000, 1, 28, 28)
    assert abs(floats.mean()) < 1e-3 and abs(floats.std() - 1) < 1e-3

def test_drawn_digits_can_be_read_and_repeat_and_others_are_to_test_on() -> None:
    train, test = common.find_digits("drawn", Path("nowhere"))
    assert (train.name, train.images.shape) == ("drawn", (10_000, 28, 28))
    assert torch.equal(train.images, common.find_digits("drawn", Path("nowhere"))[0].images)
    assert train.labels.bincount().tolist() == [1000] * 10
    pixels, others = test.images[:500].flatten(1).float(), train.images.flatten(1).float()
    nearest = torch.cdist(pixels, others).argmin(dim=1)
    assert (train.labels[nearest] == test.labels[:500]).float().mean() > 0.85
    seen, unseen = distinct(train.images), distinct(test.images)
    assert len(seen) > 9_900 and len(unseen) > 1_990 and not seen & unseen

def test_validation_holds_out_the_last_5000_training_digits(monkeypatch: MonkeyPatch) -> None:
    train, test = numbered_digits(6_000), numbered_digits(10)
    monkeypatch.setattr(common, "find_digits", lambda name, data_dir: (train, test))
    assert common.load_digits(read_options("--device cpu")) == (train, test)
    rest, held_out = common.load_digits(read_options("--device cpu --validate"))
    assert rest.name == held_out.name == "numbered" and len(held_out.labels) == 5_000
    for part in (1, 2):  # images, labels
        assert torch.equal(torch.cat([rest[part], held_out[part]]), train[part])

@pytest.fixture
def small_mnist(monkeypatch: MonkeyPatch, tmp_path: Path) -> list[tuple[Tensor, Tensor]]:
    """Four .gz files in the folder data, with random digits that torchvision takes for MNIST's."""
    raw, checksums, digits = tmp_path / "data/MNIST/raw", [], []
    raw.mkdir(parents=True)
    for part, count in ("train", 600), ("t10k", 300):
        images = torch.randint(256, (count, 28, 28), dtype=torch.uint8)
        digits.append((images, torch.arange(count) % 10))
        for kind, number, values in (("images-idx3", 2051, images),
                                     ("labels-idx1", 2049, digits[-1][1].byte())):
            header = b"".join(size.to_bytes(4, "big") for size in (number, *values.shape))
            packed = gzip.compress(header + values.numpy().tobytes(), 1)
            file = f"{part}-{kind}-ubyte.gz"
            (raw / file).write_bytes(packed)
            checksums.append((file, hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", checksums)
    return digits

def test_four_files_are_enough_packed_or_unpacked(small_mnist: list, tmp_path: Path,
                                                  monkeypatch: MonkeyPatch) -> None:
    for home in ("HOME", "USERPROFILE"):  # the second on Windows
        monkeypatch.setenv(home, str(tmp_path))
    for _ in range(2):
        found = common.load_digits(read_options("--device cpu --data-dir ~/data"))
        assert [digits.name for digits in found] == ["MNIST", "MNIST"]
        check_same([digits[1:] for digits in found], small_mnist)
        for packed in Path("data/MNIST/raw").glob("*.gz"):
            packed.unlink()

FIRST_STARTS = """
import sys, common, torchvision
from pathlib import Path
torchvision.datasets.MNIST.resources = {}
for line in sys.stdin:
    train, test = common.find_digits("MNIST", Path("data"))
    print(train.images.sum().item(), test.images.sum().item(), flush=True)
"""

def test_two_first_starts_at_the_same_time_read_sound_files(small_mnist: list) -> None:
    sums = [str(images.sum().item()) for images, _ in small_mnist]
    script = FIRST_STARTS.format(torchvision.datasets.MNIST.resources)
    with Popen([sys.executable, "-c", script], stdin=PIPE, stdout=PIPE, text=True,
               env=os.environ | {"PYTHONPATH": str(ROOT)}) as other:
        for _ in range(30):
            other.stdin.write("start\n")
            other.stdin.flush()
            found = common.find_digits("MNIST", Path("data"))
            check_same([digits[1:] for digits in found], small_mnist)
            assert other.stdout.readline().split() == sums
            for unpacked in Path("data/MNIST/raw").glob("*-ubyte"):
                unpacked.unlink()

ERRORS = URLError("down"), TimeoutError(), RuntimeError("not\nfound"), InvalidURL("port: 'proxy'")
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:440fcabf73cc546f\nsize 9912422\n"

def check_reported(name: str, data_dir: Path, what: str) -> None:
    with pytest.raises(common.UserError, match=f"^{name} cannot be {what} ") as problem:
        common.find_digits(name, data_dir)
    message, folder = str(problem.value), data_dir / name
    assert ("delete " in message) == (what == "read") and f"ubyte.gz into {folder}" in message
    assert message.count("-ubyte.gz") >= 4 and "\n" not in message

@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("suffix", [".gz", ""])
@pytest.mark.parametrize("content", [b"", b"<html>503 Unavailable</html>", LFS, None])
def test_a_file_that_cannot_be_read_is_reported(small_mnist: list, monkeypatch: MonkeyPatch,
                                                number: int, suffix: str, content: bytes) -> None:
    error = Mock(side_effect=ERRORS[number])
    monkeypatch.setattr(torchvision.datasets.utils, "_get_redirect_url", error)
    if not suffix:
        common.find_digits("MNIST", Path("data"))  # unpacks all
    file, _ = torchvision.datasets.MNIST.resources[number]
    path = Path("data/MNIST/raw", file).with_suffix(suffix)
    path.write_bytes(path.read_bytes()[:-10] if content is None else content)
    check_reported("MNIST", Path("data"), "read")

def test_empty_files_of_an_old_torchvision_are_reported(small_mnist: list) -> None:
    Path("data/MNIST/processed").mkdir()
    for file in ("training.pt", "test.pt"):
        Path("data/MNIST/processed", file).touch()
    check_reported("MNIST", Path("data"), "read")

@pytest.mark.parametrize("error", ERRORS)
def test_drawn_digits_stand_in_for_mnist_only_and_where_no_file_is_there(
        error: Exception, few_digits: None, monkeypatch: MonkeyPatch,
        capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(torchvision.datasets.utils, "_get_redirect_url", Mock(side_effect=error))
    for _ in range(2):  # the second time, in folders that are there but have no data
        train, test = common.find_digits("MNIST", Path("data"))
        assert train.name == test.name == "drawn"
        err = capsys.readouterr().err
        assert "WARNING: MNIST cannot be downloaded" in err and str(Path("data/MNIST/raw")) in err
        Path("data/MNIST/.DS_Store").touch()
    for name in ("FashionMNIST", "KMNIST"):
        check_reported(name, Path("data"), "downloaded")

def test_a_file_that_may_not_be_opened_is_not_called_damaged(
        small_mnist: list, command_line: Callable, monkeypatch: MonkeyPatch) -> None:
    """Simulated, as root may open all. What is unpacked needs no right to write."""
    refused, real = "", open

    def refuse(file: object, mode: str = "r", *args: object, **kwargs: object) -> object:
        if "ubyte" in str(file) and set(mode) & set(refused):
            raise PermissionError(13, "Permission denied", str(file))
        return real(file, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refuse)
    for refused in "rw":
        code, _, err = command_line(mini_vit, "--device cpu --data-dir data")
        assert code == 2 and "Permission denied: '" in err and "ubyte" in err
        assert "delete" not in err and "drawn" not in err.lower()
    for refused in ("", "w"):
        assert common.find_digits("MNIST", Path("data"))[0].name == "MNIST"
