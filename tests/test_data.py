"""The data file's reader, the plan of an epoch, and batches."""

import pickle
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from captioning.data import (
    ANNOTATIONS,
    ENCODER,
    NAMES,
    PIXELS,
    VOCABULARY,
    CaptionData,
    CaptionDataset,
    Collate,
    Sample,
    load_batches,
    plan_epoch,
    resizing,
    shard,
)
from captioning.images import to_array, to_square
from captioning.models.encoder import build_encoder
from captioning.tokenization import tokenize
from captioning.vocabulary import END, PAD, START
from preprocess.sources import shapes


def batches_of(data: CaptionData, *, per_image: int = 3, size: int = 7, seed: int = 0, epoch: int = 0):
    return plan_epoch(data, "train", captions_per_image=per_image, batch_size=size, seed=seed, epoch=epoch)


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def test_a_file_holds_the_images_and_captions_of_its_source(tiny_data):
    data = CaptionData(tiny_data)
    assert len(data) == 40
    assert [len(data.indices(split)) for split in ("train", "val", "test")] == [32, 4, 4]
    record = shapes(40, seed=0)[8]
    assert data.names[8] == record.name
    assert data.references(8) == list(record.captions)
    pixels = data.image(8)
    assert (pixels.shape, pixels.dtype) == ((3, 32, 32), torch.uint8)
    drawn = np.asarray(record.image.render(32))  # type: ignore[union-attr]
    np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), drawn)


def test_words_are_the_captions_in_the_vocabulary(tiny_data):
    data = CaptionData(tiny_data)
    first = data.captions_of(0)[0]
    assert data.vocabulary.decode(data.words(first).tolist()) == tokenize(data.references(0)[0])


def test_an_annotation_file_holds_what_its_network_makes_of_the_pixels(tiny_data, tiny_annotations):
    data = CaptionData(tiny_annotations)
    assert (data.kind, data.grids, data.image_shape) == (ANNOTATIONS, ((4, 4),), (16, 128))
    assert data.encoder is not None
    encoder, _ = build_encoder(data.encoder, state=data.encoder_state())
    a = encoder(CaptionData(tiny_data).image(3)[None])[0]
    torch.testing.assert_close(data.image(3).float(), a, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("per_image", "size"), [(1, 1), (2, 7), (5, 32), (9, 4)])
def test_an_epoch_holds_every_caption_once(tiny_data, per_image, size):
    data = CaptionData(tiny_data)
    batches = batches_of(data, per_image=per_image, size=size)
    samples = [sample for batch in batches for sample in batch]
    seen = [caption for sample in samples for caption in sample.captions]
    assert sorted(seen) == sorted(c for i in data.indices("train") for c in data.captions_of(int(i)))
    assert all(set(sample.captions) <= set(data.captions_of(sample.image)) for sample in samples)
    assert max(len(sample.captions) for sample in samples) <= per_image
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert 0 < len(batches[-1]) <= size


def test_the_plan_depends_on_seed_and_epoch_only(tiny_data):
    data = CaptionData(tiny_data)
    plan = batches_of(data, seed=3, epoch=2)
    torch.manual_seed(9)
    np.random.seed(9)  # noqa: NPY002  the global state that must not matter
    assert batches_of(CaptionData(tiny_data), seed=3, epoch=2) == plan
    assert batches_of(data, seed=3, epoch=1) != plan
    assert batches_of(data, seed=2, epoch=2) != plan


def test_samples_come_in_another_order_and_with_other_seeds_in_each_epoch(tiny_data):
    epochs = [[s for batch in batches_of(CaptionData(tiny_data), epoch=epoch) for s in batch] for epoch in (0, 1)]
    seeds = [sample.seed for samples in epochs for sample in samples]
    assert len(set(seeds)) == len(seeds)
    assert 0.3 < np.mean([seed % 2 for seed in seeds]) < 0.7  # by which a photo is mirrored
    one, other = ([sample.image for sample in samples] for samples in epochs)
    assert sorted(one) == sorted(other)
    assert one != sorted(one)
    assert one != other


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_parts_of_all_processes_are_the_whole_batch(world):
    batch = [Sample(i, (2 * i, 2 * i + 1), i) for i in range(7)]
    parts = [shard([batch], rank, world)[0] for rank in range(world)]
    assert len({len(part) for part in parts}) == 1  # a process with less work would wait for ever
    with_captions = [sample for part in parts for sample in part if sample.captions]
    assert sorted(with_captions) == batch
    assert len(parts[0]) == -(-7 // world)


def test_an_epoch_of_images_has_each_of_them_once(tiny_data):
    data = CaptionData(tiny_data)
    batches = plan_epoch(data, "train", captions_per_image=2, batch_size=5, seed=0, epoch=1, every_caption=False)
    samples = [sample for batch in batches for sample in batch]
    assert sorted(sample.image for sample in samples) == data.indices("train").tolist()
    assert all(len(sample.captions) == 2 for sample in samples)
    assert {len(batch) for batch in batches[:-1]} == {5}


def test_a_batch_is_framed_padded_and_ordered_longest_first():
    images = [torch.full((2,), value) for value in (1.0, 2.0, 3.0)]
    items = [
        (images[0], [ids(7), ids(8, 9)], 10, False),
        (images[1], [ids(4, 5, 6)], 11, True),
        (images[2], [], 12, False),
    ]
    batch = Collate(2)(items)
    assert batch.words.tolist() == [
        [[START, 4, 5, 6, END], [PAD] * 5],
        [[START, 8, 9, END, PAD], [START, 7, END, PAD, PAD]],
        [[PAD] * 5, [PAD] * 5],
    ]
    assert batch.images[:, 0].tolist() == [2.0, 1.0, 3.0]
    assert batch.indices.tolist() == [11, 10, 12]
    assert batch.mirrored.tolist() == [True, False, False]


def test_an_empty_caption_is_start_and_end():
    assert Collate(1)([(torch.zeros(1), [ids()], 0, False)]).words.tolist() == [[[START, END]]]


def test_images_of_one_length_keep_their_order():
    items = [(torch.tensor([float(i)]), [ids(4)], i, False) for i in range(5)]
    assert Collate(1)(items).images[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_a_reader_travels_to_another_process_with_its_file_open(tiny_data):
    data = CaptionData(tiny_data)
    image = data.image(0)
    copy = pickle.loads(pickle.dumps(data))
    torch.testing.assert_close(copy.image(0), image)


def test_workers_read_the_same_batches(tiny_data):
    data = CaptionData(tiny_data)
    data.image(0)  # open before the workers start
    dataset = CaptionDataset(data, sides=(24,), augment="crop_flip")
    plan = batches_of(data)[:4]
    here = list(load_batches(dataset, plan, captions_per_image=3))
    there = list(load_batches(dataset, plan, captions_per_image=3, workers=2))
    assert len(here) == len(there) == 4
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.words, other.words)


def test_a_batch_holds_the_words_of_its_samples(tiny_data):
    data = CaptionData(tiny_data)
    sample = Sample(5, tuple(data.captions_of(5))[:2], 0)
    batch = next(load_batches(CaptionDataset(data, sides=(32,)), [[sample]], captions_per_image=2))
    assert torch.equal(batch.images[0], data.image(5))
    found = sorted([i for i in row.tolist() if i not in (PAD, START, END)] for row in batch.words[0])
    assert found == sorted(data.words(caption).tolist() for caption in sample.captions)


@pytest.mark.parametrize("augment", ["flip", "crop", "crop_flip"])
def test_augmentation_depends_on_the_seed_of_the_sample_only(tiny_data, augment):
    dataset = CaptionDataset(CaptionData(tiny_data), sides=(32,), augment=augment)
    first = [dataset[Sample(1, (), seed)][0] for seed in range(8)]
    torch.manual_seed(1)
    again = [dataset[Sample(1, (), seed)][0] for seed in reversed(range(8))][::-1]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert any(not torch.equal(first[0], other) for other in first[1:])


def test_augmentation_leaves_the_global_generator_alone(tiny_data):
    dataset = CaptionDataset(CaptionData(tiny_data), sides=(32,), augment="crop_flip")
    state = torch.get_rng_state()
    dataset[Sample(1, (), 5)]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_flip_is_the_photo_or_its_mirror_image(tiny_data):
    data = CaptionData(tiny_data)
    dataset = CaptionDataset(data, sides=(32,), augment="flip")
    image = data.image(2)
    kinds = set()
    for seed in range(12):
        found, *_, mirrored = dataset[Sample(2, (), seed)]
        assert torch.equal(found, image.flip(-1) if mirrored else image)
        kinds.add(mirrored)
    assert kinds == {True, False}


def test_a_crop_is_half_of_the_photo_or_more_and_is_mirrored_when_asked(tiny_data):
    y, x = torch.meshgrid(torch.arange(128) * 2, torch.arange(128) * 2, indexing="ij")
    ramp, crop, areas = torch.stack([x, y, x]).byte(), resizing(64, crop=True), []
    for seed in range(200):
        torch.manual_seed(seed)
        seen = crop(ramp).float()
        areas.append(float((seen[0].max() - seen[0].min()) * (seen[1].max() - seen[1].min())) / 254**2)
    assert 0.45 < min(areas) < 0.6
    assert max(areas) > 0.9
    dataset = CaptionDataset(CaptionData(tiny_data), sides=(32,), augment="crop_flip")
    assert {dataset[Sample(2, (), seed)][3] for seed in range(4)} == {True, False}


def test_no_augmentation_resizes_only(tiny_data):
    transform = resizing(16)
    image = torch.full((3, 32, 32), 7, dtype=torch.uint8)
    assert torch.equal(transform(image), torch.full((3, 16, 16), 7, dtype=torch.uint8))


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
def test_training_and_captioning_see_the_same_picture(resample):
    # Stored pixels are resized as tensors, a user's photo by Pillow: the same filter must give the same picture.
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))
    pixels = torch.from_numpy(to_array(small.resize((40, 40), Image.Resampling.BICUBIC)).copy()).permute(2, 0, 1)
    photo = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    other = {"bicubic": "bilinear", "bilinear": "bicubic"}[resample]
    for size in (57, 24):
        seen = resizing(size, resample)(pixels).int()
        captioned, wrong = (
            torch.from_numpy(to_array(to_square(photo, size, "squash", filter_)).copy()).permute(2, 0, 1).int()
            for filter_ in (resample, other)
        )
        assert (seen - captioned).abs().max() <= 2
        assert (seen - wrong).abs().max() > 5


def test_a_missing_file_says_what_makes_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.h5: no such data file; `python -m preprocess` makes one"):
        CaptionData(tmp_path / "absent.h5")


@pytest.mark.parametrize("content", [b"", b"caption,image\n"])
def test_what_is_no_hdf5_file_is_refused(content, tmp_path):
    (tmp_path / "x.h5").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.h5: not an HDF5 file"):
        CaptionData(tmp_path / "x.h5")


def damaged(whole: Path, tmp_path: Path) -> h5py.File:
    shutil.copyfile(whole, tmp_path / "x.h5")
    return h5py.File(tmp_path / "x.h5", "r+")


@pytest.mark.parametrize("schema", [None, "show-attend-tell/0", 3])
def test_another_schema_is_refused(tiny_data, tmp_path, schema):
    with damaged(tiny_data, tmp_path) as file:
        del file.attrs["schema"]
        if schema is not None:
            file.attrs["schema"] = schema
    with pytest.raises(ValueError, match=r"x\.h5: schema is .*this version reads 'show-attend-tell/1'; preprocess it"):
        CaptionData(tmp_path / "x.h5")


@pytest.mark.parametrize("name", [VOCABULARY, NAMES, PIXELS])
def test_a_file_without_one_of_its_tables_is_refused(tiny_data, tmp_path, name):
    with damaged(tiny_data, tmp_path) as file:
        del file[name]
    missing = ANNOTATIONS if name == PIXELS else name  # one of the two must be there
    with pytest.raises(ValueError, match=rf"x\.h5: {missing}: is not there$"):
        CaptionData(tmp_path / "x.h5")


def test_an_unknown_setting_of_the_stored_encoder_is_named(tiny_annotations, tmp_path):
    with damaged(tiny_annotations, tmp_path) as file:
        file[ENCODER].attrs["config"] = '{"name": "resnet18", "colour": "red"}'
    with pytest.raises(ValueError, match=r"x\.h5: encoder: .*colour"):
        CaptionData(tmp_path / "x.h5")


def test_an_unknown_or_empty_split_names_those_that_are_there(tiny_data, tmp_path):
    with pytest.raises(ValueError, match=r"no images of split 'dev'; there are train, val, test"):
        CaptionData(tiny_data).indices("dev")
    with damaged(tiny_data, tmp_path) as file:
        file["image/split"][()] = 1
    with pytest.raises(ValueError, match=r"x\.h5: no images of split 'train'; there are val$"):
        CaptionData(tmp_path / "x.h5").indices("train")


def test_a_batch_without_captions_has_words_to_leave_out():
    batch = Collate(2)([(torch.zeros(3, 4), [], 0, False), (torch.zeros(3, 4), [], 1, False)])
    assert batch.words.shape == (2, 2, 2)
    assert (batch.words == PAD).all()


@pytest.mark.parametrize(
    ("table", "place", "value", "message"),
    [
        ("caption/words", 3, 99999, r"caption/words: numbers of words must lie in \[3, \d+\)"),
        ("caption/words", 0, -1, r"caption/words: numbers of words must lie in"),
        ("image/first_caption", 3, 99999, r"image/first_caption: must be 41 numbers that rise from 0 to 200"),
        ("image/first_caption", 0, 1, r"image/first_caption: must be 41 numbers that rise from 0 to 200"),
        ("caption/first_word", -1, 1, r"caption/first_word: must be 201 numbers that rise from 0 to \d+"),
        ("image/split", 2, 3, r"image/split: must be 40 numbers below 3"),
    ],
)
def test_a_table_that_points_at_nothing_is_named(tiny_data, tmp_path, table, place, value, message):
    shutil.copy(tiny_data, tmp_path / "d.h5")
    with h5py.File(tmp_path / "d.h5", "r+") as file:
        values = file[table][()]
        values[place] = value
        file[table][...] = values
    with pytest.raises(ValueError, match=rf"d\.h5: {message}"):
        CaptionData(tmp_path / "d.h5")
