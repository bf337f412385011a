"""Loading, batches and augmentation."""

import gzip
import hashlib
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

import common
import mini_vit
import mini_vit_augment
from mini_vit_augment import augment, augmented_batches

ON_DISK = common.Path(common.__file__).parent / "data" / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
NOTHING = dict(degrees=0, scale=0, shear=0, shift=0, bend=0)


def recipe(**changes: object) -> common.Recipe:
    return common.replace(mini_vit_augment.SMALL, device="cpu", workers=0, **changes)


def generator(seed: int = 0) -> torch.Generator:
    return common.generator(seed)


# batches


def test_an_epoch_shows_each_digit_once_in_an_order_of_its_own() -> None:
    numbers = torch.stack(list(mini_vit.sample_numbers(40, recipe(epochs=3, batch_size=8)))).view(3, 40)
    for epoch in range(3):
        assert sorted(numbers[epoch].tolist()) == list(range(40 * epoch, 40 * epoch + 40))
    assert len({tuple((row % 40).tolist()) for row in numbers}) == 3
    again = torch.cat(list(mini_vit.sample_numbers(40, recipe(epochs=3, batch_size=8), first_epoch=2)))
    assert torch.equal(again, numbers[2])
    other = torch.cat(list(mini_vit.sample_numbers(40, recipe(epochs=1, batch_size=8, seed=1))))
    assert not torch.equal(other, numbers[0])


def test_a_short_last_batch_is_left_out() -> None:
    assert [len(part) for part in mini_vit.sample_numbers(10, recipe(epochs=2, batch_size=4))] == [4, 4, 4, 4]


def test_plain_batches_keep_image_and_label_together() -> None:
    images = torch.arange(20, dtype=torch.uint8).view(20, 1, 1).expand(20, 28, 28)
    for some, labels in mini_vit.plain_batches(images, torch.arange(20), recipe(epochs=2, batch_size=5)):
        assert torch.equal(some[:, 0, 0].long(), labels)


def test_normalised_mnist_has_mean_0_and_variance_1() -> None:
    assert common.normalise(torch.zeros(2, 28, 28, dtype=torch.uint8)).shape == (2, 1, 28, 28)
    if not ON_DISK.exists():
        pytest.skip("MNIST is not on disk")
    floats = common.normalise(common.load_digits("MNIST", None)[1][0])
    assert abs(floats.mean()) < 1e-3 and abs(floats.std() - 1) < 1e-3


# augmentation


def test_augmenting_by_nothing_changes_nothing() -> None:
    images, _ = common.draw_digits(20, seed=0)
    assert torch.equal(augment(images, generator(), **NOTHING), images)


def test_images_of_a_batch_are_augmented_differently() -> None:
    image = common.draw_digits(1, seed=0)[0]
    images = augment(image.expand(16, 28, 28), generator())
    assert images.dtype == torch.uint8 and images.shape == (16, 28, 28)
    assert len({picture.numpy().tobytes() for picture in images}) == 16
    assert torch.equal(images, augment(image.expand(16, 28, 28), generator()))
    assert not torch.equal(images, augment(image.expand(16, 28, 28), generator(1)))


def centres(images: torch.Tensor) -> torch.Tensor:
    """The centre of mass of each image, (B, 2), in pixels: down, right."""
    mass, place = images.float(), torch.arange(28.0)
    total = mass.sum((1, 2))
    return torch.stack([(mass.sum(2) * place).sum(1) / total, (mass.sum(1) * place).sum(1) / total], dim=1)


@pytest.mark.parametrize("amount", [1.0, 3.0])
def test_shift_is_in_pixels(amount: float) -> None:
    image = torch.zeros(1, 28, 28, dtype=torch.uint8)
    image[0, 12:16, 12:16] = 200
    moved = centres(augment(image.expand(500, 28, 28), generator(), **{**NOTHING, "shift": amount})) - 13.5
    assert amount * 0.95 < moved.abs().max() < amount * 1.05
    assert moved.mean(0).abs().max() < amount * 0.1  # to all sides


@pytest.mark.parametrize("changes, expected", [
    ({"degrees": 30}, {"angle": (-30, 30), "wide": (1, 1), "high": (1, 1)}),
    ({"scale": 0.2}, {"angle": (0, 0), "wide": (1 / 1.2, 1 / 0.8), "high": (1 / 1.2, 1 / 0.8)}),
])
def test_rotation_and_scale_are_as_large_as_said(changes: dict, expected: dict) -> None:
    """Measured on the second moments of a bar, 4 pixels high and 14 wide."""
    bar = torch.zeros(1, 28, 28, dtype=torch.uint8)
    bar[0, 12:16, 7:21] = 250
    images = augment(bar.expand(400, 28, 28), generator(), **{**NOTHING, **changes}).double()
    total, place = images.sum((1, 2)), torch.arange(28.0).double() - 13.5
    down = (images.sum(2) * place**2).sum(1) / total
    right = (images.sum(1) * place**2).sum(1) / total
    both = torch.einsum("bij,i,j->b", images, place, place) / total
    angle = torch.rad2deg(torch.atan2(2 * both, right - down) / 2)
    assert angle.min() == pytest.approx(expected["angle"][0], abs=1.5)
    assert angle.max() == pytest.approx(expected["angle"][1], abs=1.5)
    if changes == {"scale": 0.2}:
        wide = (right / (14**2 / 12)).sqrt()
        assert wide.min() == pytest.approx(expected["wide"][0], abs=0.05)
        assert wide.max() == pytest.approx(expected["wide"][1], abs=0.05)


def test_both_sides_scale_on_their_own_and_shear_is_as_large_as_said() -> None:
    """Measured on the second moments of a square of 14 pixels."""
    square, place = torch.zeros(400, 28, 28, dtype=torch.uint8), torch.arange(28.0) - 13.5
    square[:, 7:21, 7:21] = 250
    scaled, slanted = (augment(square, generator(), **{**NOTHING, **change}).float()
                       for change in ({"scale": 0.2}, {"shear": 0.3}))
    sides = [(scaled.sum(dim) @ place**2 / scaled.sum((1, 2)) / (14**2 / 12)).sqrt() for dim in (1, 2)]
    for side in sides:
        assert [side.min(), side.max()] == pytest.approx([1 / 1.2, 1 / 0.8], abs=0.05)
    assert torch.corrcoef(torch.stack(sides))[0, 1].abs() < 0.2
    slant = torch.einsum("bij,i,j->b", slanted, place, place) / (slanted.sum(2) @ place**2)
    assert [slant.min(), slant.max()] == pytest.approx([-0.3, 0.3], abs=0.02)


def test_bend_is_a_standard_deviation_in_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    grids = []
    monkeypatch.setattr(mini_vit_augment.F, "grid_sample",
                        lambda images, grid, align_corners: grids.append(grid) or images)
    images = torch.zeros(2000, 28, 28, dtype=torch.uint8)
    augment(images, generator(), **NOTHING)
    augment(images, generator(), **{**NOTHING, "bend": 1.5})
    field = (grids[1] - grids[0]) * 14
    assert field.std() == pytest.approx(1.5, abs=0.05)
    assert (field[:, 1:] - field[:, :-1]).std() < 0.3 * field.std()  # smooth


def test_digits_stay_in_the_picture() -> None:
    images = common.draw_digits(500, seed=0)[0]
    kept = augment(images, generator()).float().sum((1, 2)) / images.float().sum((1, 2))
    assert kept.min() > 0.6 and abs(kept.mean() - 1) < 0.1


def all_batches(workers: int, **changes: object) -> list:
    images, labels = common.draw_digits(64, seed=0)
    return list(augmented_batches(images, labels, common.replace(recipe(epochs=2, batch_size=16, **changes),
                                                                 workers=workers)))


def check_batches(batches: list) -> None:
    """Two epochs of 64 digits in batches of 16: each augmented differently, each with its own label."""
    assert [tuple(images.shape) for images, _ in batches] == [(16, 28, 28)] * 8
    assert all(images.dtype == torch.uint8 for images, _ in batches)
    assert len({image.numpy().tobytes() for images, _ in batches for image in images}) == 128
    for epoch in (batches[:4], batches[4:]):
        labels = torch.cat([labels for _, labels in epoch])
        assert torch.equal(labels.sort().values, (torch.arange(64) % 10).sort().values)


def test_workers_differ_from_each_other_and_their_number_changes_nothing() -> None:
    alone, together = all_batches(0), all_batches(2)
    assert not torch.equal(alone[0][0], all_batches(0, seed=1)[0][0])
    check_batches(alone)
    for (images, labels), (same_images, same_labels) in zip(alone, together, strict=True):
        assert torch.equal(images, same_images) and torch.equal(labels, same_labels)


def test_labels_stay_with_their_images() -> None:
    labels = torch.arange(10)
    images = (labels + 100).byte().view(10, 1, 1).repeat(1, 28, 28)
    for some, theirs in augmented_batches(images, labels, recipe(epochs=2, batch_size=5)):
        assert torch.equal(some[:, 14, 14].long() - 100, theirs)


def test_spawned_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        check_batches(all_batches(2))
    finally:
        multiprocessing.set_start_method(before, force=True)


# loading


def test_drawn_digits_can_be_told_apart_and_are_the_same_each_time() -> None:
    images, labels = common.draw_digits(200, seed=0)
    assert images.shape == (200, 28, 28) and images.dtype == torch.uint8
    assert torch.equal(images, common.draw_digits(200, seed=0)[0])
    train, test = (set(map(tuple, images.flatten(1).tolist()))
                   for images, _ in common.load_digits("drawn", None)[1:])
    assert not train & test
    assert labels.bincount().tolist() == [20] * 10
    means = torch.stack([images[labels == digit].float().mean(0) for digit in range(10)])
    assert torch.cdist(means.flatten(1), means.flatten(1)).add(torch.eye(10) * 1e9).min() > 300


@pytest.fixture
def small_mnist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder with four packed files of the right form; torchvision is told their checksums."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    resources = []
    for part, count in ("train", 60_000), ("t10k", 10_000):
        for kind, magic, shape in ("images-idx3", 2051, (count, 28, 28)), ("labels-idx1", 2049, (count,)):
            header = b"".join(number.to_bytes(4, "big") for number in (magic, *shape))
            packed = gzip.compress(header + bytes(np.prod(shape)), 1)
            (raw / f"{part}-{kind}-ubyte.gz").write_bytes(packed)
            resources.append((f"{part}-{kind}-ubyte.gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    return tmp_path


def test_the_four_files_on_disk_are_enough(small_mnist: Path) -> None:
    name, (images, labels), (test_images, _) = common.load_digits(None, str(small_mnist))
    assert (name, len(images), len(labels), len(test_images)) == ("MNIST", 60_000, 60_000, 10_000)
    for packed in (small_mnist / "MNIST" / "raw").glob("*.gz"):
        packed.unlink()
    assert common.load_digits("MNIST", str(small_mnist))[0] == "MNIST"  # the unpacked ones are, too


FILES = [file for file, _ in torchvision.datasets.MNIST.resources]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", [None, "MNIST"])
def test_a_damaged_file_is_named(small_mnist: Path, file: str, name: str | None) -> None:
    path = small_mnist / "MNIST" / "raw" / file
    sound = path.read_bytes()
    for damaged in (b"", sound[:-10], b"<html>503 Unavailable</html>", sound[:20] + b"x" + sound[21:]):
        path.write_bytes(damaged)
        with pytest.raises(common.Problem, match=f"{file} is damaged"):
            common.load_digits(name, str(small_mnist))


def test_a_damaged_unpacked_file_is_named(small_mnist: Path) -> None:
    common.load_digits("MNIST", str(small_mnist))
    path = small_mnist / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(common.Problem, match="t10k-images-idx3-ubyte is damaged"):
        common.load_digits("MNIST", str(small_mnist))
    path.with_suffix(".gz").unlink()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(common.Problem, match="not whole.*7839999.*put.*t10k-images"):
        common.load_digits("MNIST", str(small_mnist))


def test_without_mnist_drawn_digits_and_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    name, (images, _), _ = common.load_digits(None, str(tmp_path))
    err = capsys.readouterr().err
    assert name == "drawn" and len(images) == 10_000
    assert "WARNING" in err and str(tmp_path / "MNIST" / "raw") in err and all(file in err for file in FILES)


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
def test_a_data_set_that_was_asked_for_and_is_not_there_is_a_problem(tmp_path: Path, name: str) -> None:
    with pytest.raises(common.Problem, match=name) as problem:
        common.load_digits(name, str(tmp_path))
    assert all(file in str(problem.value) for file in FILES) and "\n" not in str(problem.value)


def test_a_data_folder_that_is_read_only(small_mnist: Path, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture) -> None:
    """With the unpacked files in it, it is read; without, that is told. (root may write anywhere: so the
    refusal is simulated.)"""
    real = open

    def refuse(file: object, mode: str = "r", *args: object, **kwargs: object) -> object:
        if str(file).startswith(str(small_mnist)) and set(mode) & set("wax+"):
            raise PermissionError(13, "Permission denied", str(file))
        return real(file, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(common.Problem, match="Permission denied.*put "):
        common.load_digits("MNIST", str(small_mnist))
    monkeypatch.undo()
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", [])
    for packed in (small_mnist / "MNIST" / "raw").glob("*.gz"):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    monkeypatch.setattr("builtins.open", refuse)
    assert common.load_digits("MNIST", str(small_mnist))[0] == "MNIST"
