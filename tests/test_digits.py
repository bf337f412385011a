"""Loading, batches and augmentation."""

import gzip
import hashlib
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import MNIST, ROOT

import common
import mini_vit_augment
from mini_vit_augment import augment, augmented_batches

NOTHING = dict(degrees=0, scale=0, shear=0, shift=0, bend=0)


def recipe(**changes: object) -> common.Recipe:
    return common.replace(mini_vit_augment.SMALL, **{"device": "cpu", "workers": 0, **changes})


def generator(seed: int = 0) -> torch.Generator:
    return common.generator(seed)


def numbered_digits(count: int) -> common.Digits:
    """All pixels of digit n are n + 100, and n is its label."""
    labels = torch.arange(count)
    return common.Digits("numbered", (labels + 100).byte().view(-1, 1, 1).repeat(1, 28, 28), labels)


# batches


def test_an_epoch_shows_each_digit_once_in_an_order_of_its_own() -> None:
    orders = set()
    for seed in (0, 1):
        for epoch in range(3):
            batches = common.shuffled_batches(40, 8, seed, epoch)
            assert [len(batch) for batch in batches] == [8] * 5
            order = torch.cat(batches).tolist()
            assert sorted(order) == list(range(40))
            assert order == torch.cat(common.shuffled_batches(40, 8, seed, epoch)).tolist()
            orders.add(tuple(order))
    assert len(orders) == 6


def test_a_short_last_batch_is_left_out() -> None:
    assert [len(part) for part in common.shuffled_batches(10, 4, 0, 0)] == [4, 4]


def test_processes_share_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = common.shuffled_batches(40, 8, seed=0, epoch=1)
    monkeypatch.setattr(common, "RANKS", 2)
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(common, "RANK", rank)
        common.shuffled_batches.cache_clear()
        shares.append(common.shuffled_batches(40, 8, seed=0, epoch=1))
    for batch, one, other in zip(whole, *shares, strict=True):
        assert len(one) == len(other) == 4
        assert set(batch.tolist()) == set(one.tolist()) | set(other.tolist())


def test_plain_batches_keep_image_and_label_together() -> None:
    """And begin with the epoch that they are asked for."""
    options = recipe(epochs=3, batch_size=5)
    batches = list(common.plain_batches(numbered_digits(20), options, 0))
    assert len(batches) == 3 * 4
    for images, labels in batches:
        assert torch.equal(images[:, 14, 14].long() - 100, labels)
    later = list(common.plain_batches(numbered_digits(20), options, 1))
    assert torch.equal(torch.stack([labels for _, labels in later]),
                       torch.stack([labels for _, labels in batches[4:]]))


def test_normalised_mnist_has_mean_0_and_variance_1() -> None:
    assert common.normalise(torch.zeros(2, 28, 28, dtype=torch.uint8)).shape == (2, 1, 28, 28)
    if not MNIST:
        pytest.skip("MNIST is not in data/MNIST/raw")
    floats = common.normalise(common.find_digits("MNIST", str(ROOT / "data"))[0].images)
    assert abs(floats.mean()) < 1e-3 and abs(floats.std() - 1) < 1e-3


# augmentation


def test_augmenting_by_nothing_changes_nothing() -> None:
    images = common.draw_digits(20, seed=0).images
    assert torch.equal(augment(images, generator(), **NOTHING), images)


def test_images_of_a_batch_are_augmented_differently() -> None:
    image = common.draw_digits(1, seed=0).images
    images = augment(image.expand(16, 28, 28), generator())
    assert images.dtype == torch.uint8 and images.shape == (16, 28, 28)
    assert len({picture.numpy().tobytes() for picture in images}) == 16
    assert torch.equal(images, augment(image.expand(16, 28, 28), generator()))
    assert not torch.equal(images, augment(image.expand(16, 28, 28), generator(1)))


def centres(images: torch.Tensor) -> torch.Tensor:
    """The centre of mass of each image, (B, 2), in pixels: down, right."""
    mass, place = images.float(), torch.arange(28.0)
    both = [(mass.sum(2) * place).sum(1), (mass.sum(1) * place).sum(1)]
    return torch.stack(both, dim=1) / mass.sum((1, 2)).unsqueeze(1)


@pytest.mark.parametrize("amount", [1.0, 3.0])
def test_shift_is_in_pixels(amount: float) -> None:
    images = torch.zeros(500, 28, 28, dtype=torch.uint8)
    images[:, 12:16, 12:16] = 200
    moved = centres(augment(images, generator(), **{**NOTHING, "shift": amount})) - 13.5
    assert amount * 0.95 < moved.abs().max() < amount * 1.05
    assert moved.mean(0).abs().max() < amount * 0.1  # to all sides


@pytest.mark.parametrize("changes, angles, widths", [
    ({"degrees": 30}, (-30, 30), None), ({"scale": 0.2}, (0, 0), (1 / 1.2, 1 / 0.8))])
def test_rotation_and_scale_are_as_large_as_said(changes: dict, angles: tuple,
                                                 widths: tuple | None) -> None:
    """Measured on the second moments of a bar, 4 pixels high and 14 wide."""
    bars = torch.zeros(400, 28, 28, dtype=torch.uint8)
    bars[:, 12:16, 7:21] = 250
    images = augment(bars, generator(), **{**NOTHING, **changes}).double()
    total, place = images.sum((1, 2)), torch.arange(28.0).double() - 13.5
    down = (images.sum(2) * place**2).sum(1) / total
    right = (images.sum(1) * place**2).sum(1) / total
    both = torch.einsum("bij,i,j->b", images, place, place) / total
    angle = torch.rad2deg(torch.atan2(2 * both, right - down) / 2)
    assert [angle.min(), angle.max()] == pytest.approx(angles, abs=1.5)
    if widths:
        wide = (right / (14**2 / 12)).sqrt()
        assert [wide.min(), wide.max()] == pytest.approx(widths, abs=0.05)


def test_both_sides_scale_on_their_own_and_shear_is_as_large_as_said() -> None:
    """Measured on the second moments of a square of 14 pixels."""
    square, place = torch.zeros(400, 28, 28, dtype=torch.uint8), torch.arange(28.0) - 13.5
    square[:, 7:21, 7:21] = 250
    scaled = augment(square, generator(), **{**NOTHING, "scale": 0.2}).float()
    sides = [(scaled.sum(dim) @ place**2 / scaled.sum((1, 2)) / (14**2 / 12)).sqrt()
             for dim in (1, 2)]
    for side in sides:
        assert [side.min(), side.max()] == pytest.approx([1 / 1.2, 1 / 0.8], abs=0.05)
    assert torch.corrcoef(torch.stack(sides))[0, 1].abs() < 0.2
    slanted = augment(square, generator(), **{**NOTHING, "shear": 0.3}).float()
    slant = torch.einsum("bij,i,j->b", slanted, place, place) / (slanted.sum(2) @ place**2)
    assert [slant.min(), slant.max()] == pytest.approx([-0.3, 0.3], abs=0.02)


def test_bend_is_a_standard_deviation_in_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    grids = []

    def keep(images: torch.Tensor, grid: torch.Tensor, align_corners: bool) -> torch.Tensor:
        grids.append(grid)
        return images

    monkeypatch.setattr(mini_vit_augment.F, "grid_sample", keep)
    images = torch.zeros(2000, 28, 28, dtype=torch.uint8)
    augment(images, generator(), **NOTHING)
    augment(images, generator(), **{**NOTHING, "bend": 1.5})
    field = (grids[1] - grids[0]) * 14
    assert field.std() == pytest.approx(1.5, abs=0.05)
    assert (field[:, 1:] - field[:, :-1]).std() < 0.3 * field.std()  # smooth


def test_digits_stay_in_the_picture() -> None:
    images = common.draw_digits(500, seed=0).images
    kept = augment(images, generator()).float().sum((1, 2)) / images.float().sum((1, 2))
    assert kept.min() > 0.6 and abs(kept.mean() - 1) < 0.1


def all_batches(first_epoch: int = 0, **changes: object) -> list:
    """Of two epochs of 64 digits in batches of 16."""
    options = recipe(**{"epochs": 2, "batch_size": 16, **changes})
    return list(augmented_batches(common.draw_digits(64, seed=0), options, first_epoch))


def check_same(batches: list, others: list) -> None:
    for (images, labels), (other_images, other_labels) in zip(batches, others, strict=True):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


def test_no_two_augmented_digits_of_two_epochs_are_alike() -> None:
    batches = all_batches()
    assert [tuple(images.shape) for images, _ in batches] == [(16, 28, 28)] * 8
    assert all(images.dtype == torch.uint8 for images, _ in batches)
    assert len({image.numpy().tobytes() for images, _ in batches for image in images}) == 128
    for epoch in (batches[:4], batches[4:]):
        labels = torch.cat([labels for _, labels in epoch])
        assert torch.equal(labels.sort().values, (torch.arange(64) % 10).sort().values)


def test_augmented_batches_follow_from_the_seed_and_the_step() -> None:
    """Whatever the number of workers, and where the run began."""
    batches = all_batches()
    check_same(all_batches(workers=2), batches)
    check_same(all_batches(first_epoch=1), batches[4:])
    for (images, _), (other_images, _) in zip(batches, all_batches(seed=1), strict=True):
        assert not torch.equal(images, other_images)


def test_each_epoch_and_seed_augments_a_digit_in_its_own_way() -> None:
    """Where there is only one, and so no order."""
    digits, seen = common.draw_digits(1, seed=0), set()
    for seed in (0, 1):
        for image, _ in augmented_batches(digits, recipe(epochs=2, batch_size=1, seed=seed), 0):
            seen.add(image.numpy().tobytes())
    assert len(seen) == 4


def test_each_process_augments_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen times the same digit, eight for each of two processes: no two come out alike."""
    name, images, labels = common.draw_digits(1, seed=0)
    digits = common.Digits(name, images.expand(16, 28, 28), labels.expand(16))
    monkeypatch.setattr(common, "RANKS", 2)
    seen = set()
    for rank in (0, 1):
        monkeypatch.setattr(common, "RANK", rank)
        common.shuffled_batches.cache_clear()
        (images, _), = augmented_batches(digits, recipe(epochs=1, batch_size=16), 0)
        seen |= {image.numpy().tobytes() for image in images}
    assert len(seen) == 16


def test_labels_stay_with_their_images() -> None:
    batches = list(augmented_batches(numbered_digits(10), recipe(epochs=2, batch_size=5), 0))
    assert len(batches) == 4
    for images, labels in batches:
        assert torch.equal(images[:, 14, 14].long() - 100, labels)


def test_a_spawned_worker_makes_the_same_batches() -> None:
    """macOS and Windows start workers so: all that a worker gets is pickled."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        batches = all_batches(workers=1)
    finally:
        multiprocessing.set_start_method(before, force=True)
    check_same(batches, all_batches())


# loading


def test_drawn_digits_can_be_told_apart_and_are_the_same_each_time() -> None:
    name, images, labels = common.draw_digits(200, seed=0)
    assert (name, images.shape, images.dtype) == ("drawn", (200, 28, 28), torch.uint8)
    assert torch.equal(images, common.draw_digits(200, seed=0).images)
    assert labels.bincount().tolist() == [20] * 10
    means = torch.stack([images[labels == digit].float().mean(0) for digit in range(10)])
    distances = torch.cdist(means.flatten(1), means.flatten(1))
    assert distances.add(torch.eye(10) * 1e9).min() > 300


def test_drawn_digits_to_test_on_are_others() -> None:
    train, test = ({image.numpy().tobytes() for image in digits.images}
                   for digits in common.find_digits("drawn", "nowhere"))
    assert len(train) > 9_900 and len(test) > 1_990 and not train & test


def test_validation_holds_out_the_last_5000_training_digits(
        monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = numbered_digits(6_000), numbered_digits(10)
    monkeypatch.setattr(common, "find_digits", lambda name, data_dir: (train, test))
    assert common.load_digits(recipe()) == (train, test)
    rest, held_out = common.load_digits(recipe(validate=True))
    assert rest.name == held_out.name == "numbered"
    for part in (1, 2):  # images, labels
        assert len(rest[part]) == 1_000
        assert torch.equal(torch.cat([rest[part], held_out[part]]), train[part])


@pytest.fixture(scope="session")
def packed_files() -> dict[str, bytes]:
    """Four packed files of the right form."""
    files = {}
    for part, count in ("train", 60_000), ("t10k", 10_000):
        for kind, magic, shape in (("images-idx3", 2051, (count, 28, 28)),
                                   ("labels-idx1", 2049, (count,))):
            header = b"".join(number.to_bytes(4, "big") for number in (magic, *shape))
            content = gzip.compress(header + bytes(np.prod(shape)), 1)
            files[f"{part}-{kind}-ubyte.gz"] = content
    return files


@pytest.fixture
def small_mnist(packed_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch,
                tmp_path: Path) -> Path:
    """A folder with these files; torchvision is told their checksums."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file, content in packed_files.items():
        (raw / file).write_bytes(content)
    checksums = [(file, hashlib.md5(content).hexdigest()) for file, content in packed_files.items()]
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", checksums)
    return tmp_path


def test_the_four_files_on_disk_are_enough(small_mnist: Path) -> None:
    digits, test_digits = common.find_digits(None, str(small_mnist))
    assert (digits.name, len(digits.images), len(digits.labels)) == ("MNIST", 60_000, 60_000)
    assert (test_digits.name, len(test_digits.images)) == ("MNIST", 10_000)
    for packed in (small_mnist / "MNIST" / "raw").glob("*.gz"):
        packed.unlink()
    digits, _ = common.find_digits("MNIST", str(small_mnist))  # the unpacked ones are, too
    assert (digits.name, len(digits.images)) == ("MNIST", 60_000)


FILES = [file for file, _ in torchvision.datasets.MNIST.resources]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("name", [None, "MNIST"])
def test_a_damaged_file_is_named(small_mnist: Path, file: str, name: str | None) -> None:
    path = small_mnist / "MNIST" / "raw" / file
    sound = path.read_bytes()
    for damaged in (b"", sound[:-10], b"<html>503 Unavailable</html>",
                    sound[:20] + b"x" + sound[21:]):
        path.write_bytes(damaged)
        with pytest.raises(common.Problem, match=f"{file} is damaged"):
            common.find_digits(name, str(small_mnist))


def test_a_damaged_unpacked_file_is_named(small_mnist: Path) -> None:
    common.find_digits("MNIST", str(small_mnist))
    path = small_mnist / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(common.Problem, match="t10k-images-idx3-ubyte is damaged"):
        common.find_digits("MNIST", str(small_mnist))
    path.with_suffix(".gz").unlink()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(common.Problem, match="not whole.*7839999.*put.*t10k-images"):
        common.find_digits("MNIST", str(small_mnist))


def test_without_mnist_drawn_digits_and_a_warning(tmp_path: Path,
                                                  capsys: pytest.CaptureFixture) -> None:
    digits, test_digits = common.find_digits(None, str(tmp_path))
    err = capsys.readouterr().err
    assert digits.name == test_digits.name == "drawn" and len(digits.images) == 10_000
    assert "WARNING" in err and str(tmp_path / "MNIST" / "raw") in err
    assert all(file in err for file in FILES)


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
def test_a_data_set_that_was_asked_for_and_is_not_there_is_a_problem(tmp_path: Path,
                                                                     name: str) -> None:
    with pytest.raises(common.Problem, match=name) as problem:
        common.find_digits(name, str(tmp_path))
    assert all(file in str(problem.value) for file in FILES) and "\n" not in str(problem.value)


def test_a_data_folder_that_is_read_only(small_mnist: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """With the unpacked files in it, it is read; without, that is told. (root may write anywhere:
    so the refusal is simulated.)"""
    real = open

    def refuse(file: object, mode: str = "r", *args: object, **kwargs: object) -> object:
        if str(file).startswith(str(small_mnist)) and set(mode) & set("wax+"):
            raise PermissionError(13, "Permission denied", str(file))
        return real(file, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(common.Problem, match="Permission denied.*put "):
        common.find_digits("MNIST", str(small_mnist))
    monkeypatch.setattr("builtins.open", real)
    for packed in (small_mnist / "MNIST" / "raw").glob("*.gz"):
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    monkeypatch.setattr("builtins.open", refuse)
    assert common.find_digits("MNIST", str(small_mnist))[0].name == "MNIST"
