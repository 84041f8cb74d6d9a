"""Images: opening, preprocessing, seeded order and augmentation, caching, mixing; generated and real ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from acmize.data import (
    NO_LABEL,
    CachedImages,
    ImageSet,
    cached,
    data_config,
    eval_transform,
    loader,
    mixup,
    open_images,
    split_holdout,
    train_transform,
)
from acmize.errors import AcmizeError

CLASSES = ("cat", "dog", "fox")


def picture(seed: int, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of three classes: 12 images to train on, 6 to test on."""
    root = tmp_path_factory.mktemp("data") / "pets"
    for split, count in (("train", 4), ("test", 2)):
        for number, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                picture(100 * number + i).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return timm.create_model("test_vit", num_classes=3).eval()


def in_memory(images: list[Any], labels: list[Any] | None = None, **columns: Any) -> datasets.Dataset:
    data = {"image": images, **columns} | ({} if labels is None else {"label": labels})
    return datasets.Dataset.from_dict(data).cast_column("image", datasets.Image())


def random_states() -> tuple[Any, ...]:
    numpy_state = np.random.get_state()
    return random.getstate(), numpy_state[1].tobytes(), numpy_state[2], torch.get_rng_state().numpy().tobytes()


# --- opening ---------------------------------------------------------------------------------------------


def test_image_folder(folder: Path) -> None:
    splits = open_images(folder)
    assert splits.train is not None
    assert splits.test is not None
    assert (len(splits.train), len(splits.test)) == (12, 6)
    assert (splits.image_column, splits.label_column, splits.name) == ("image", "label", "pets")
    splits.check_labels(3)
    assert open_images(str(folder)).name == "pets"


def test_parquet_folder_with_other_names(tmp_path: Path) -> None:
    data = in_memory([picture(i) for i in range(4)]).rename_column("image", "img")
    data = data.add_column("coarse", [0, 0, 1, 1]).add_column("fine_label", [3, 2, 1, 0])
    data.to_parquet(tmp_path / "train-0.parquet")
    data.select([2, 3]).to_parquet(tmp_path / "validation-0.parquet")
    splits = open_images(tmp_path)
    assert (splits.image_column, splits.label_column) == ("img", "fine_label")
    assert splits.test is not None
    assert splits.test["fine_label"][:] == [1, 0]
    assert open_images(tmp_path, label_column="coarse").label_column == "coarse"


def test_no_labels(tmp_path: Path) -> None:
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    splits = open_images(tmp_path)
    assert splits.test is None
    assert splits.label_column is None
    assert splits.train is not None
    item = ImageSet(splits.train, lambda image: torch.zeros(1), label_column=splits.label_column)[2]
    assert item[1] == NO_LABEL
    with pytest.raises(AcmizeError, match="found no labels, expected one per image"):
        splits.check_labels(3)
    with pytest.raises(AcmizeError, match="found only a train split, expected 'test' as well"):
        splits.split("test")


def test_validation_split_stands_in_for_a_test_split_with_hidden_labels() -> None:
    images = [picture(i) for i in range(2)]
    labelled, hidden = in_memory(images, [0, 1]), in_memory(images, [-1, -1])
    given = {"train": labelled, "test": hidden, "validation": labelled}
    splits = open_images(datasets.DatasetDict(given))
    assert splits.test is not None
    assert splits.test["label"][:] == [0, 1]
    only = open_images(datasets.DatasetDict(train=labelled, test=hidden)).test
    assert only is not None
    assert only["label"][:] == [-1, -1]


def test_limit_is_seeded_and_nested(folder: Path) -> None:
    def files(limit: int | None, seed: int = 0) -> list[str]:
        train = open_images(folder, limit=limit, seed=seed).train
        assert train is not None
        return [row["path"] for row in train.cast_column("image", datasets.Image(decode=False))["image"]]

    every = files(None)
    assert files(5) == files(5) == [file for file in every if file in files(5)]
    assert len(set(files(5))) == 5
    assert set(files(5)) < set(files(8))
    assert files(5) != files(5, seed=1)
    assert files(99) == every


def test_holdout(folder: Path) -> None:
    train = open_images(folder).split("train").add_column("row", list(range(12)))
    fit, held = split_holdout(train, 0.25, 0)
    assert (len(fit), len(held)) == (9, 3)
    assert sorted([*fit["row"], *held["row"]]) == list(range(12))
    assert held["row"][:] == split_holdout(train, 3, 0)[1]["row"][:]
    assert held["row"][:] != split_holdout(train, 3, 1)[1]["row"][:]
    for wrong in (0, 12, 1.0, 0.001, -1):
        with pytest.raises(AcmizeError, match="of 12 images, expected at least 1 held out"):
            split_holdout(train, wrong, 0)


def _text_only(path: Path) -> None:
    (path / "notes.txt").write_text("no image here\n")


def _no_file(path: Path) -> None:
    pass


def _broken_parquet(path: Path) -> None:
    (path / "train.parquet").write_bytes(b"123")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_text_only, r"found the columns text \(\w+\), expected one image column; give a folder of image files"),
        (_no_file, "expected images that can be loaded, found: .*; lay them out as train/CLASS"),
        (_broken_parquet, "expected images that can be loaded, found: .*; lay them out as train/CLASS"),
    ],
)
def test_wrong_folder(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(AcmizeError, match=message) as caught:
        open_images(tmp_path)
    assert "\n" not in str(caught.value)


def test_wrong_path(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(AcmizeError, match="found a file, expected a folder or a hub id; "):
        open_images(tmp_path / "a.png")
    for missing in (tmp_path / "gone", str(tmp_path / "gone"), "./gone", Path("gone"), ""):
        with pytest.raises(AcmizeError, match="found no such folder, expected one with images; check the path"):
            open_images(missing)
    with pytest.raises(AcmizeError, match=r"data nobody/nothing: found no such folder here, and not on the Hub"):
        open_images("nobody/nothing")


def test_wrong_data() -> None:
    images = [picture(0), picture(1)]
    with pytest.raises(AcmizeError, match=r"found Dataset, expected a path, a hub id or a datasets\.DatasetDict"):
        open_images(in_memory(images))  # type: ignore[arg-type]
    with pytest.raises(AcmizeError, match="found an empty DatasetDict"):
        open_images(datasets.DatasetDict())
    with pytest.raises(AcmizeError, match="found the splits 'first', 'second', expected 'train' or 'test'"):
        open_images(datasets.DatasetDict(first=in_memory(images), second=in_memory(images)))
    named = datasets.DatasetDict(train=in_memory(images, ["cat", "dog"]))
    with pytest.raises(AcmizeError, match="column 'label': found string, expected class indices"):
        open_images(named)
    two = datasets.DatasetDict(train=in_memory(images, left=images, right=images).remove_columns("image"))
    two["train"] = two["train"].cast_column("left", datasets.Image()).cast_column("right", datasets.Image())
    with pytest.raises(AcmizeError, match="expected one image column; name one of them as image_column"):
        open_images(two)
    assert open_images(two, image_column="right").image_column == "right"
    with pytest.raises(AcmizeError, match="limit: found 0, expected at least 1"):
        open_images(named, limit=0)


def test_labels_that_cannot_be_the_models(folder: Path) -> None:
    with pytest.raises(AcmizeError, match="found 3 classes, expected the 1000 of the model, in its order"):
        open_images(folder).check_labels(1000)
    indices = open_images(datasets.DatasetDict(train=in_memory([picture(0), picture(1)], [0, 1000])))
    indices.check_labels(1001)
    with pytest.raises(AcmizeError, match="found labels from 0 to 1000, expected 0 to 999"):
        indices.check_labels(1000)


# --- items -----------------------------------------------------------------------------------------------


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).float()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "LA", "1", "CMYK"])
@pytest.mark.parametrize(("in_chans", "shape"), [(3, (30, 40, 3)), (1, (30, 40))])
def test_images_of_any_mode(mode: str, in_chans: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    file = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    picture(0, mode).save(file, **({"transparency": bytes(range(256))} if mode == "P" else {}))
    data = in_memory([str(file)], [0])
    assert ImageSet(data, to_tensor, in_chans=in_chans)[0][0].shape == shape


def test_stored_orientation_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by a quarter when shown
    picture(0).save(tmp_path / "a.png", exif=exif)
    data = in_memory([str(tmp_path / "a.png")], [0])
    assert data[0]["image"].size == (30, 40)  # `datasets` would turn it
    assert torch.equal(ImageSet(data, to_tensor)[0][0], to_tensor(picture(0)))


def test_broken_image_is_named(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "cut.png"
    whole = (folder / "train" / "cat" / "0.png").read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    missing = tmp_path / "gone.png"
    features = datasets.Features(image=datasets.Image())  # paths and bytes mixed
    stored = [str(folder / "train" / "cat" / "0.png"), str(file), None, b"", str(missing)]
    rows = datasets.Dataset.from_dict({"image": stored}, features=features)
    data = ImageSet(rows, to_tensor, label_column=None)
    assert data[0][0].shape == (30, 40, 3)
    with pytest.raises(AcmizeError, match=r"image 1 \(.*cut\.png\): expected a readable image, found: .*truncated"):
        data[1]
    with pytest.raises(AcmizeError, match="image 2: found none, expected an image"):
        data[2]
    with pytest.raises(AcmizeError, match=r"image 3 \(stored in the data\): expected a readable image"):
        data[3]
    with pytest.raises(AcmizeError, match=r"image 4 \(.*gone\.png\): expected a readable image, found: .*No such file"):
        data[4]
    with pytest.raises(AcmizeError, match="in_chans: found 4, expected 1"):
        ImageSet(rows, to_tensor, in_chans=4)


# --- the model's preprocessing ---------------------------------------------------------------------------


def test_preprocessing_follows_the_model(folder: Path) -> None:
    splits = open_images(folder)
    for options, shape in [({}, (3, 160, 160)), ({"img_size": 32}, (3, 32, 32)), ({"in_chans": 1}, (1, 160, 160))]:
        changed = timm.create_model("test_vit", num_classes=3, **options)
        x_CHW, label = ImageSet.of(splits, "train", changed)[0]
        assert x_CHW.shape == shape
        assert x_CHW.dtype == torch.float32
        assert label == 0
        assert changed(x_CHW[None]).shape == (1, 3)
        x_CHW, _ = ImageSet.of(splits, "train", changed, transform=train_transform(changed))[0]
        assert x_CHW.shape == shape
    with pytest.raises(AcmizeError, match="Linear: found no pretrained_cfg, expected one with input_size"):
        data_config(nn.Linear(2, 2))


def test_augmentation_can_be_switched_off(model: nn.Module) -> None:
    plain = train_transform(model, crop_scale=(1.0, 1.0), hflip=0.0, randaugment=None)
    image = picture(0, size=(160, 160))
    assert torch.equal(plain(image), plain(image))
    assert torch.allclose(plain(image), eval_transform(timm.create_model("test_vit", num_classes=3))(image), atol=2.5)
    assert "ColorJitter" in str(train_transform(model, randaugment=None, color_jitter=0.4))


def test_augmentation_depends_on_seed_epoch_and_index_alone(folder: Path, model: nn.Module) -> None:
    splits = open_images(folder)

    def items(seed: int, epoch: int, order: range) -> dict[int, Tensor]:
        data = ImageSet.of(splits, "train", model, transform=train_transform(model), seed=seed)
        data.set_epoch(epoch)
        return {index: data[index][0] for index in order}

    torch.manual_seed(1)
    before = random_states()
    first = items(0, 3, range(12))
    assert random_states() == before  # the global generators are as they were
    torch.manual_seed(2)
    random.seed(2)
    np.random.seed(2)
    again = items(0, 3, range(11, -1, -1))
    assert all(torch.equal(first[index], again[index]) for index in range(12))
    for other in (items(1, 3, range(12)), items(0, 4, range(12))):
        assert sum(torch.equal(first[index], other[index]) for index in range(12)) <= 1
    same_picture = ImageSet.of(splits, "train", model, transform=train_transform(model))
    same_picture._decode = lambda index: picture(0)  # type: ignore[method-assign]
    assert not torch.equal(same_picture[0][0], same_picture[1][0])


# --- batches ---------------------------------------------------------------------------------------------


class Numbers(torch.utils.data.Dataset):
    """Item i is (i, i)."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((1, 2, 2), float(index)), index


def order(batches: Any) -> list[int]:
    return [int(label) for _, labels in batches for label in labels]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    batches = loader(Numbers(20), 8, seed=3, shuffle=True)
    before = random_states()
    first = order(batches)
    assert random_states() == before
    assert sorted(first) == list(range(20))
    assert order(batches) == first  # the same epoch again
    batches.set_epoch(1)
    second = order(batches)
    assert second != first
    fresh = loader(Numbers(20), 8, seed=3, shuffle=True)
    fresh.set_epoch(1)
    torch.manual_seed(5)
    assert order(fresh) == second
    assert order(loader(Numbers(20), 8, seed=4, shuffle=True)) != first
    assert order(loader(Numbers(20), 8)) == list(range(20))
    assert len(order(loader(Numbers(20), 8, drop_last=True))) == 16
    for size, batch_size, drop_last in [(20, 21, True), (0, 1, False), (20, 0, False)]:
        with pytest.raises(AcmizeError, match=f"batch_size: found {batch_size} for {size} images"):
            loader(Numbers(size), batch_size, drop_last=drop_last)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # where there is one core
def test_workers_change_nothing(folder: Path, model: nn.Module) -> None:
    splits = open_images(folder)

    def epoch(workers: int) -> list[tuple[Tensor, Tensor]]:
        data = ImageSet.of(splits, "train", model, transform=train_transform(model), seed=1)
        batches = loader(data, 5, shuffle=True, workers=workers)
        batches.set_epoch(2)
        return list(batches)

    here, there = epoch(0), epoch(2)
    assert [len(labels) for _, labels in here] == [5, 5, 2]
    for (x, labels), (x_worker, labels_worker) in zip(here, there, strict=True):
        assert labels.dtype == torch.int64
        assert torch.equal(x, x_worker)
        assert torch.equal(labels, labels_worker)


def test_accelerate_sets_the_epoch(folder: Path, model: nn.Module) -> None:
    from accelerate import Accelerator

    splits = open_images(folder)
    batches, reference = (
        loader(ImageSet.of(splits, "train", model, transform=train_transform(model)), 4, shuffle=True) for _ in "ab"
    )
    prepared = Accelerator(cpu=True).prepare(batches)
    for epoch in (1, 2):
        prepared.set_epoch(epoch)
        reference.set_epoch(epoch)
        for (x, labels), (x_ref, labels_ref) in zip(prepared, reference, strict=True):
            assert torch.equal(labels, labels_ref)
            assert torch.equal(x, x_ref)


def test_cached(folder: Path, model: nn.Module) -> None:
    data = ImageSet.of(open_images(folder), "test", model)
    kept = cached(data)
    assert isinstance(kept, CachedImages)
    assert kept.tensors[0].dtype == torch.float16
    assert len(kept) == len(data) == 6
    for (x, label), (x_kept, label_kept) in zip(data, kept, strict=False):
        assert x_kept.dtype == torch.float32
        assert (x - x_kept).abs().max() < 2e-3
        assert label == label_kept
    assert order(loader(kept, 4)) == data.labels_N.tolist()
    assert cached(kept) is kept
    assert cached(data, max_bytes=2 * 6 * 3 * 160 * 160 - 1) is data
    augmented = ImageSet.of(open_images(folder), "test", model, transform=train_transform(model))
    augmented.set_epoch(7)
    with pytest.raises(ValueError, match="images that change from epoch to epoch"):
        cached(augmented)
    assert augmented.epoch == 7


def test_mixup_depends_on_seed_and_step_alone() -> None:
    x, labels = torch.rand(7, 3, 16, 16), torch.arange(7) % 4
    original, before = x.clone(), random_states()
    mix = mixup(4, seed=1)
    mixed, targets = mix(x, labels, 10)
    assert random_states() == before
    assert torch.equal(x, original)
    assert targets is not None
    assert torch.allclose(targets.sum(1), torch.ones(7))
    assert torch.equal(mixed[6], x[6])  # the odd one out
    assert targets[6].argmax() == labels[6]
    assert not torch.equal(mixed[:6], x[:6])
    np.random.seed(9)
    assert torch.equal(mixup(4, seed=1)(x, labels, 10)[0], mixed)
    assert not torch.equal(mix(x, labels, 11)[0], mixed)
    assert not torch.equal(mixup(4, seed=2)(x, labels, 10)[0], mixed)
    unlabelled, none = mix(x, torch.full((7,), NO_LABEL), 10)
    assert none is None
    assert torch.equal(unlabelled, mixed)
    assert torch.equal(mix(x[:1], labels[:1], 0)[0], x[:1])
    with pytest.raises(AcmizeError, match="with and without label"):
        mix(x, labels - 1, 10)
    with pytest.raises(AcmizeError, match="expected one above 0"):
        mixup(4, mixup_alpha=0, cutmix_alpha=0)


# --- real photographs ------------------------------------------------------------------------------------


@pytest.mark.assets
def test_real_photographs(assets: Path) -> None:
    """A pretrained model sees what it was trained to see: labels, channels, crop and scale are right."""
    splits = open_images(assets / "data" / "imagenet_mini")
    assert (len(splits.split("train")), len(splits.split("test"))) == (900, 600)
    splits.check_labels(1000)
    weights = assets / "models" / "deit_tiny_patch16_224" / "model.safetensors"
    overlay = {"file": str(weights)}
    model = timm.create_model("deit_tiny_patch16_224", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    data = ImageSet.of(open_images(assets / "data" / "imagenet_mini", limit=96), "test", model)
    with torch.inference_mode():
        right = sum(int((model(x).argmax(1) == labels).sum()) for x, labels in loader(data, 32))
    assert right / 96 > 0.75  # 86.2 % on all 600


@pytest.mark.assets
def test_real_parquet(assets: Path) -> None:
    splits = open_images(assets / "data" / "cifar10")
    assert (len(splits.split("train")), len(splits.split("test"))) == (10_000, 10_000)
    assert (splits.image_column, splits.label_column) == ("img", "label")
    splits.check_labels(10)
    data = ImageSet(splits.split("test"), to_tensor, image_column="img", in_chans=3)
    assert data[0][0].shape == (32, 32, 3)
    assert data.labels_N.bincount().tolist() == [1000] * 10
