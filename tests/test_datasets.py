"""Datasets in memory: what they hold, how they are cut into pieces, how batches are augmented."""

import numpy as np
import pytest
import torch

from dinv.data import DATASETS, Dataset, augment, data_root, load_dataset, to_rgb


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(n=60, classes=10, shape=(1, 4, 5)):
    """n images, each filled with its own number; labels 0, 1, ..., 0, 1, ..."""
    images = torch.arange(n, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, *shape).contiguous()
    names = tuple(f"class{i}" for i in range(classes))
    return Dataset("numbered", "train", images, torch.arange(n) % classes, names)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", "train")


# ---- loading


@pytest.mark.parametrize(("split", "n"), [("train", 1437), ("test", 360)])
def test_digits(split, n):
    data = load_dataset("digits", split)
    assert data.images.shape == (n, 1, 8, 8)
    assert (data.name, data.split, len(data)) == ("digits", split, n)
    assert (data.images.min(), data.images.max()) == (0, 255)
    assert repr(data) == f"Dataset(digits {split}: {n} images 1x8x8 on cpu)"
    counts = data.labels.bincount()
    share = n / 1797 * torch.tensor([178, 182, 177, 183, 181, 182, 181, 179, 174, 180])
    assert (counts - share).abs().max() < 1  # stratified as finely as whole images allow


def test_digits_splits_are_the_whole_and_do_not_overlap(digits):
    both = torch.cat([digits.images, load_dataset("digits", "test").images])
    assert len(both.flatten(1).unique(dim=0)) == 1797


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="unknown dataset 'CIFAR-10': did you mean cifar10.*mnist"):
        load_dataset("CIFAR-10", "train")
    with pytest.raises(ValueError, match="unknown dataset 'svhn'. There are: cifar10, mnist, dig"):
        load_dataset("svhn", "train")
    with pytest.raises(ValueError, match="unknown split 'tets': did you mean test"):
        load_dataset("digits", "tets")


# ---- a dataset


def test_wrong_tensors_are_refused():
    good = numbered()
    with pytest.raises(ValueError, match=r"uint8 \(N, C, H, W\), not float32 \(60, 1, 4, 5\)"):
        Dataset("x", "train", good.images.float(), good.labels, good.classes)
    with pytest.raises(ValueError, match=r"int64 \(60,\), one for each image, not int64 \(59,\)"):
        Dataset("x", "train", good.images, good.labels[1:], good.classes)


def test_take():
    data = numbered()
    for indices in ([5, 3, 59], torch.tensor([5, 3, 59]), torch.arange(60) % 7 == 3, slice(2, 9, 3), []):
        part, expected = data.take(indices), torch.arange(60)[indices].tolist()
        assert part.images[:, 0, 0, 0].tolist() == expected and part.classes == data.classes
        assert part.labels.tolist() == [i % 10 for i in expected]
    moved = data.to("meta")
    assert moved.device.type == moved.labels.device.type == "meta"
    with pytest.raises(IndexError, match="out of bounds"):
        data.take(torch.tensor([0, 60]))


def test_per_class(digits):
    assert numbered().per_class(2).images[:, 0, 0, 0].tolist() == list(range(20))
    some = digits.per_class(14, generator(1))
    assert some.labels.bincount().tolist() == [14] * 10
    assert torch.equal(some.images, digits.per_class(14, generator(1)).images)
    assert not torch.equal(some.images, digits.per_class(14, generator(2)).images)
    with pytest.raises(ValueError, match="7 images of every class.*has 6 of class class0"):
        numbered().per_class(7)
    with pytest.raises(ValueError, match="0 images of every class"):
        numbered().per_class(0)


def test_to_rgb(digits):
    colour = to_rgb(digits.take(slice(5)))
    assert colour.images.shape == (5, 3, 32, 32)
    assert colour.images.dtype == torch.uint8
    assert torch.equal(colour.images[:, 0], colour.images[:, 2])
    expected = torch.nn.functional.interpolate(
        digits.images[:5].double(), (32, 32), mode="bilinear", align_corners=False
    )
    assert (colour.images[:, :1] - expected).abs().max() <= 0.5 + 1e-4
    same = numbered(shape=(3, 32, 32))
    assert torch.equal(to_rgb(same).images, same.images)


# ---- augmentation


def one_by_one(images, source, pad, flip):
    """The reference: pad, crop and flip image by image, from the same draws."""
    dy, dx = torch.randint(-pad, pad + 1, (2, len(images), 1), generator=source).squeeze(2).tolist()
    mirrored = [0] * len(images)
    if flip:
        mirrored = torch.randint(2, (len(images), 1), generator=source).squeeze(1).tolist()
    height, width = images.shape[2:]
    result = []
    for i, image in enumerate(images.numpy()):
        padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
        top, left = pad + dy[i], pad + dx[i]
        crop = padded[:, top : top + height, left : left + width]
        result.append(crop[:, :, ::-1] if mirrored[i] else crop)
    return torch.from_numpy(np.stack(result))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    ("shape", "pad", "flip"),
    [
        ((64, 3, 32, 32), 4, True),
        ((64, 3, 32, 32), 4, False),
        ((32, 2, 5, 9), 4, True),
        ((0, 3, 8, 8), 4, True),
    ],
)
def test_augment_against_one_by_one(dtype, shape, pad, flip):
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(1)).to(dtype)
    before = images.clone()
    out = augment(images, generator(2), pad, flip)
    assert out.dtype == dtype
    assert torch.equal(images, before)
    expected = one_by_one(images, generator(2), pad, flip) if len(images) else images
    assert torch.equal(out, expected)
    last = images.to(memory_format=torch.channels_last)
    assert torch.equal(augment(last, generator(2), pad, flip), expected)


def test_augment_draws_evenly():
    n = 20_000
    picture = torch.arange(81.0).view(1, 1, 9, 9).expand(n, 1, 9, 9)
    out = augment(picture, generator(), pad=2)
    centre, right = out[:, 0, 4, 4], out[:, 0, 4, 5]
    pairs = torch.stack([centre, (right - centre > 0).float()])
    kinds, counts = pairs.unique(dim=1, return_counts=True)
    assert kinds.shape[1] == 5 * 5 * 2
    assert (counts - n / 50).abs().max() < 5 * (n / 50) ** 0.5


def test_augment_copies_lets_gradients_through_and_takes_a_generator_elsewhere():
    images = numbered().images
    out = augment(images, generator(), pad=0, flip=False)
    assert torch.equal(out, images) and out.data_ptr() != images.data_ptr()
    images = torch.rand(8, 3, 16, 16, requires_grad=True)
    augment(images, generator()).sum().backward()
    assert images.grad.sum() == images.numel()
    out = augment(torch.empty(8, 3, 16, 16, device="meta"), generator())
    assert out.device.type == "meta" and out.shape == (8, 3, 16, 16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_same_crops_on_cuda(digits):
    on_cpu, on_cuda = (augment(images, generator(), 2) for images in (digits.images, digits.images.cuda()))
    assert torch.equal(on_cpu, on_cuda.cpu())
    source = torch.Generator("cuda").manual_seed(0)
    assert augment(digits.images, source).device.type == "cpu"


def test_augment_refuses():
    with pytest.raises(ValueError, match=r"pad must be .* below .* 8 x 8, not 8"):
        augment(torch.zeros(1, 1, 8, 8), generator(), pad=8)
    with pytest.raises(ValueError, match=r"must be \(N, C, H, W\), not float32 \(3, 8, 8\)"):
        augment(torch.zeros(3, 8, 8), generator())


# ---- the real data, where they lie ready


@pytest.mark.parametrize(
    ("name", "split", "shape", "first", "counts"),
    [
        ("cifar10", "train", (50_000, 3, 32, 32), [6, 9, 9, 4, 1, 1, 2, 7], [5000] * 10),
        ("cifar10", "test", (10_000, 3, 32, 32), [3, 8, 8, 0, 6, 6, 1, 6], [1000] * 10),
        ("mnist", "train", (60_000, 1, 28, 28), [5, 0, 4, 1, 9, 2, 1, 3], None),
        ("mnist", "test", (10_000, 1, 28, 28), [7, 2, 1, 0, 4, 1, 4, 9], None),
    ],
)
def test_real_data(name, split, shape, first, counts):
    if not (data_root() / f"{name}.safetensors").exists():
        pytest.skip(f"{name} has not been fetched into the data folder")
    data = load_dataset(name, split)
    assert data.images.shape == shape
    assert data.labels[:8].tolist() == first
    assert data.labels.unique().tolist() == list(range(len(DATASETS[name])))
    if counts:
        assert data.labels.bincount().tolist() == counts
    if (name, split) == ("cifar10", "train"):
        # The numbers everybody normalises with: in NCHW, RGB order, nothing else gives them.
        mean = data.images.double().mean((0, 2, 3)) / 255
        assert mean.tolist() == pytest.approx([0.49140, 0.48216, 0.44653], abs=1e-5)
