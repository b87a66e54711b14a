"""Every layout of caption files that preprocessing reads, with its odd cases."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from preprocess.__main__ import _parser as preprocess_parser
from preprocess.__main__ import main as preprocess
from preprocess.readers import read_splits
from preprocess.shapes_grammar import is_true, parse
from preprocess.sources import Record, coco, flickr, folder, karpathy, shapes


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def lists(root: Path, **names: str) -> Path:
    for split, content in names.items():
        write(root / f"Flickr_8k.{split}Images.txt", content.replace(" ", "\n") + "\n")
    return root


def fields(records: list[Record]) -> list[tuple[str, str, tuple[str, ...]]]:
    return [(record.name, record.split, record.captions) for record in records]


def test_flickr8k_reads_the_token_file_and_the_split_lists(tmp_path):
    captions = write(tmp_path / "t.txt", "a.jpg#0\tA red  ball .\na.jpg#1\tBall\nb.jpg#0\tA hat .\n")
    splits = lists(tmp_path, train="a.jpg", dev="b.jpg")
    records = flickr(captions, tmp_path / "Images", splits)
    assert fields(records) == [("a.jpg", "train", ("A red ball .", "Ball")), ("b.jpg", "val", ("A hat .",))]
    assert records[0].image == tmp_path / "Images" / "a.jpg"


def test_flickr8k_leaves_out_images_of_no_split_such_as_the_one_that_ends_in_jpg_1(tmp_path):
    captions = write(tmp_path / "t.txt", "a.jpg#0\tOne .\nb.jpg.1#0\tTwo .\nc.jpg#0\tThree .\n")
    assert [record.name for record in flickr(captions, tmp_path, lists(tmp_path, test="a.jpg"))] == ["a.jpg"]


def test_kaggles_captions_keep_their_commas_with_and_without_quotes(tmp_path):
    captions = write(tmp_path / "captions.txt", 'image,caption\na.jpg,"A cat, a dog ."\na.jpg,One, two\n')
    records = flickr(captions, tmp_path, lists(tmp_path / "splits", train="a.jpg"))
    assert fields(records) == [("a.jpg", "train", ("A cat, a dog .", "One, two"))]


def test_flickr30k_results_are_read_with_and_without_the_missing_bar(tmp_path):
    content = "image_name| comment_number| comment\n1.jpg| 0| A man .\n1.jpg| 4   A dog runs .\n"
    captions = write(tmp_path / "results.csv", content)
    splits = write(tmp_path / "dataset.json", {"images": [{"filename": "1.jpg", "split": "test"}]})
    assert fields(flickr(captions, tmp_path, splits)) == [("1.jpg", "test", ("A man .", "A dog runs ."))]


def test_split_lists_may_name_images_without_their_extension(tmp_path):
    captions = write(tmp_path / "t.token", "1.jpg#0\tA man .\n")
    write(tmp_path / "splits" / "val.txt", "1\n")
    assert flickr(captions, tmp_path, tmp_path / "splits")[0].split == "val"


@pytest.mark.parametrize("line", ["a.jpg A ball", "a.jpg\tA ball", "a.jpg#x\tA ball"])
def test_a_malformed_token_line_is_named_by_file_and_line(tmp_path, line):
    captions = write(tmp_path / "t.txt", f"a.jpg#0\tA ball\n{line}\n")
    with pytest.raises(ValueError, match=r"t\.txt:2: expected 'name#k<TAB>caption'"):
        flickr(captions, tmp_path, lists(tmp_path, train="a.jpg"))


def test_an_image_in_two_split_lists_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jpg is in the splits val and train"):
        read_splits(lists(tmp_path, train="a.jpg", dev="a.jpg"))


def test_what_a_system_hides_is_no_split_list(tmp_path):
    (tmp_path / "._Flickr_8k.trainImages.txt").write_bytes(b"\x00\x05\xff")  # macOS leaves such files on other disks
    assert read_splits(lists(tmp_path, train="a.jpg")) == {"a.jpg": "train"}


def test_a_folder_without_split_lists_is_refused(tmp_path):
    write(tmp_path / "latest.txt", "a.jpg\n")
    with pytest.raises(ValueError, match="no split lists"):
        read_splits(tmp_path)


def entry(name: str, split: str, **more: Any) -> dict[str, Any]:
    return {"filename": name, "split": split, "sentences": [{"raw": "A cat ."}, {"raw": " "}], **more}


def test_karpathy_takes_restval_for_train_or_drops_it(tmp_path):
    file = write(tmp_path / "d.json", {"images": [entry("a.jpg", "restval"), entry("b.jpg", "val")]})
    assert fields(karpathy(file, tmp_path)) == [("a.jpg", "train", ("A cat .",)), ("b.jpg", "val", ("A cat .",))]
    assert [record.name for record in karpathy(file, tmp_path, restval="drop")] == ["b.jpg"]


def test_karpathy_finds_cocos_photos_in_their_folder_or_in_the_given_one(tmp_path):
    file = write(tmp_path / "d.json", {"images": [entry("x_42.jpg", "test", filepath="val2014", cocoid=42)]})
    (tmp_path / "all" / "val2014").mkdir(parents=True)
    assert karpathy(file, tmp_path / "all")[0].image == tmp_path / "all" / "val2014" / "x_42.jpg"
    assert karpathy(file, tmp_path / "flat")[0].image == tmp_path / "flat" / "x_42.jpg"
    assert karpathy(file, tmp_path)[0].name == "42"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"d\.json: is not JSON"),
        ({"pictures": []}, r"d\.json: has no list of objects 'images'"),
        ({"images": [entry("a.jpg", "train"), {"split": "val"}]}, r"images\[1\]: has no list of objects 'sentences'"),
        ({"images": [entry("a.jpg", "holdout")]}, r"split='holdout' is not one of train, val, test, restval"),
        ({"images": [entry("a.jpg", "train"), entry("a.jpg", "val")]}, r"a\.jpg comes twice"),
    ],
)
def test_a_faulty_karpathy_json_is_refused_with_its_place(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        karpathy(write(tmp_path / "d.json", content), tmp_path)


def annotations(root: Path, name: str, *numbers: int) -> Path:
    images = [{"id": n, "file_name": f"{n:012d}.jpg"} for n in numbers]
    captions = [{"image_id": n, "caption": f"Thing {n}.\n"} for n in reversed(numbers)]
    return write(root / name, {"images": images, "annotations": captions})


def test_coco_reads_several_files_each_with_its_folder_and_the_split_in_its_name(tmp_path):
    files = [annotations(tmp_path, "captions_train2017.json", 7, 8), annotations(tmp_path, "captions_val2017.json", 9)]
    records = coco(files, [tmp_path / "train2017", tmp_path / "val2017"])
    assert fields(records) == [
        ("7", "train", ("Thing 7.",)),
        ("8", "train", ("Thing 8.",)),
        ("9", "val", ("Thing 9.",)),
    ]
    assert records[2].image == tmp_path / "val2017" / "000000000009.jpg"


def test_coco_takes_given_splits_by_number_or_file_name_and_leaves_out_the_rest(tmp_path):
    file = annotations(tmp_path, "captions_val2014.json", 1, 2, 3)
    write(tmp_path / "splits" / "test.txt", "1\n000000000003.jpg\n")
    expected = [("1", "test", ("Thing 1.",)), ("3", "test", ("Thing 3.",))]
    assert fields(coco([file], [tmp_path], tmp_path / "splits")) == expected


def test_coco_takes_the_splits_of_a_karpathy_json(tmp_path):
    file = annotations(tmp_path, "captions_val2014.json", 1, 2)
    images = [entry("a.jpg", "restval", cocoid=1), entry("b.jpg", "test", cocoid=2)]
    splits = write(tmp_path / "dataset_coco.json", {"images": images})
    assert [record.split for record in coco([file], [tmp_path], splits)] == ["train", "test"]
    assert [record.split for record in coco([file], [tmp_path], splits, restval="drop")] == ["test"]


def test_a_coco_number_in_two_files_is_refused(tmp_path):
    files = [annotations(tmp_path, "captions_train2014.json", 5), annotations(tmp_path, "captions_val2017.json", 5)]
    with pytest.raises(ValueError, match="image 5 comes twice"):
        coco(files, [tmp_path])


def test_coco_needs_to_know_its_split_and_its_folders(tmp_path):
    file = annotations(tmp_path, "mine.json", 1)
    with pytest.raises(ValueError, match="holds no train, val or test"):
        coco([file], [tmp_path])
    with pytest.raises(ValueError, match="one for each of the 1 files"):
        coco([file], [tmp_path, tmp_path])


def test_a_csv_with_byte_order_mark_quotes_unicode_and_split_lines_is_grouped_by_image(tmp_path):
    lines = ["\ufeffimage,caption,split", 'ü/1.png,"Eine ""große"" Katze,', 'weiß",val', "2.png,x,train"]
    captions = tmp_path / "c.csv"
    captions.write_bytes("\r\n".join([*lines, "ü/1.png,猫,val"]).encode())
    expected = [("ü/1.png", "val", ('Eine "große" Katze, weiß', "猫")), ("2.png", "train", ("x",))]
    assert fields(folder(captions, tmp_path)) == expected


def test_a_jsonl_file_gives_what_the_same_csv_gives(tmp_path):
    table = [("a.png", "A hat, red", "train"), ("b.png", "A cat", "test")]
    csv = write(tmp_path / "c.csv", "image,caption,split\n" + "".join(f'{i},"{c}",{s}\n' for i, c, s in table))
    lines = [json.dumps({"image": i, "caption": c, "split": s}) for i, c, s in table]
    assert folder(write(tmp_path / "c.jsonl", "\n".join(lines)), tmp_path) == folder(csv, tmp_path)


def test_absent_splits_are_drawn_by_image_and_by_seed(tmp_path):
    content = "image,caption\n" + "".join(f"{i}.png,A\n{i}.png,B\n" for i in range(20))
    captions = write(tmp_path / "c.csv", content)
    drawn = [tuple(record.split for record in folder(captions, tmp_path, seed=seed)) for seed in (0, 0, 1)]
    assert Counter(drawn[0]) == {"train": 16, "val": 2, "test": 2}
    assert drawn[0] == drawn[1] != drawn[2]
    shares = Counter(record.split for record in folder(captions, tmp_path, val_fraction=0.5, test_fraction=0.0))
    assert shares == {"train": 10, "val": 10}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,text\na.png,x\n", r"c\.csv:1: the header has no 'caption'"),
        ("image,caption,spilt\na.png,x,val\n", r"c\.csv:1: the header has 'spilt' too many"),
        ("image,caption\na.png,x\nb.png\n", r"c\.csv:3: 1 fields for image,caption"),
        ("image,caption\na.png,x,y\n", r"c\.csv:2: 3 fields"),
        ("image,caption\na.png, \n", r"c\.csv: has no captions"),
        ("image;caption\na.png;x\n", r"c\.csv:1: the header is 'image;caption': fields must be separated by commas"),
        ("image\tcaption\na.png\tx\n", r"c\.csv:1: the header is .* fields must be separated by commas"),
        ("image,caption\n,x\n", r"c\.csv:2: image='' is not a text"),
        ('image,caption\na.png,"x\n', r"c\.csv:2: unexpected end of data"),
        ("image,caption,split\na.png,x,holdout\n", r"c\.csv:2: split='holdout' is not one of train, val, test"),
        ("image,caption,split\na.png,x,val\nb.png,x,\n", r"c\.csv:3: split must stand in every row or in none"),
        ("image,caption,split\na.png,x,val\na.png,y,test\n", r"c\.csv:3: split='test', but an earlier row .* 'val'"),
        ("image,caption\n", r"c\.csv: has no captions"),
        ("", r"c\.csv:1: the header has no 'image'"),
    ],
)
def test_a_malformed_csv_is_refused_with_file_line_and_field(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        folder(write(tmp_path / "c.csv", content), tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"c\.jsonl:2: is not JSON"),
        ("[1]", r"c\.jsonl:2: expected an object"),
        ('{"image": 7, "caption": "x"}', r"c\.jsonl:2: image=7 is not a text"),
        ('{"image": "a.png"}', r"c\.jsonl:2 has no 'caption'"),
    ],
)
def test_a_malformed_jsonl_line_is_refused_with_its_number(tmp_path, line, message):
    first = '{"image": "b.png", "caption": "x"}'
    with pytest.raises(ValueError, match=message):
        folder(write(tmp_path / "c.jsonl", f"{first}\n{line}\n"), tmp_path)


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "x/../../a.png", r"..\a.png", r"C:\a.png", r"\\host\a.png"])
def test_a_path_that_leaves_the_folder_of_the_images_is_refused_by_every_source(tmp_path, name):
    coco_file = {"images": [{"id": 1, "file_name": name}], "annotations": []}
    attempts: list[Callable[[], list[Record]]] = [
        lambda: folder(write(tmp_path / "c.jsonl", json.dumps({"image": name, "caption": "x"})), tmp_path),
        lambda: flickr(write(tmp_path / "t.txt", f"{name}#0\tx\n"), tmp_path, lists(tmp_path / "s", train="a.png")),
        lambda: karpathy(write(tmp_path / "d.json", {"images": [entry(name, "train")]}), tmp_path),
        lambda: karpathy(write(tmp_path / "d.json", {"images": [entry("a", "train", filepath=name)]}), tmp_path),
        lambda: coco([write(tmp_path / "captions_val.json", coco_file)], [tmp_path]),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match="is no path below the folder of the images"):
            attempt()


def test_a_name_that_no_file_can_have_is_refused_before_any_photo_is_read(tmp_path):
    rows = write(tmp_path / "c.jsonl", '{"image": "\\ud83d.png", "caption": "x"}')
    with pytest.raises(ValueError, match=r"c\.jsonl:1: image: '\\ud83d.png' is no path below the folder"):
        folder(rows, tmp_path)


def test_text_that_is_not_utf8_is_refused(tmp_path):
    captions = tmp_path / "c.csv"
    captions.write_bytes("image,caption\na.png,große\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"c\.csv: is not UTF-8 text"):
        folder(captions, tmp_path)


def test_shapes_are_split_eight_one_one_and_a_larger_count_begins_with_the_same_scenes():
    small, large = shapes(10, seed=3), shapes(20, seed=3)
    assert [record.split for record in small] == ["train"] * 8 + ["val", "test"]
    assert large[:10] == small
    assert shapes(10, seed=4) != small


def test_shapes_have_five_true_captions_each():
    for record in shapes(20, seed=0):
        assert len(record.captions) == 5
        for caption in record.captions:
            statement = parse(caption)
            assert statement is not None
            assert is_true(statement, record.image)


@pytest.mark.data
def test_the_official_flickr8k_files_give_their_eight_thousand_images(shared):
    root = shared("data", "flickr8k")
    records = flickr(root / "Flickr8k.token.txt", root / "Images", root)
    assert Counter(record.split for record in records) == {"train": 6000, "val": 1000, "test": 1000}
    assert {len(record.captions) for record in records} == {5}


@pytest.mark.data
def test_cocos_validation_file_gives_its_five_thousand_images(shared):
    root = shared("data", "coco")
    records = coco([root / "captions_val2017.json"], [root / "val2017"])
    assert {record.split for record in records} == {"val"}
    assert (len(records), sum(len(record.captions) for record in records)) == (5000, 25014)
    assert sum(record.image.is_file() for record in records) == 300


def test_a_number_may_stand_between_image_and_caption(tmp_path):
    content = "image_name,comment_number,comment\na.jpg,0,A cat, a dog .\na.jpg,1,Two .\n"
    captions = write(tmp_path / "captions.txt", content)
    (record,) = flickr(captions, tmp_path, lists(tmp_path, train="a.jpg"))
    assert record.captions == ("A cat, a dog .", "Two .")


def test_a_caption_file_of_no_known_layout_is_told_all_layouts(tmp_path):
    captions = write(tmp_path / "captions.csv", "raw,sentids,split,filename,img_id\n")
    with pytest.raises(
        ValueError, match=r"captions\.csv:1: expected 'name#k<TAB>caption'; or a first line of 'image,capt"
    ):
        flickr(captions, tmp_path, lists(tmp_path, train="a.jpg"))


def test_a_row_without_a_caption_says_nothing(tmp_path):
    rows = "image,caption,split\na.png,A cat,train\na.png, ,train\nb.png,,train\n"
    (record,) = folder(write(tmp_path / "c.csv", rows), tmp_path)
    assert (record.name, record.captions) == ("a.png", ("A cat",))


def test_a_quote_that_is_never_closed_swallows_no_rows(tmp_path):
    content = 'image,caption\na.jpg,A dog .\nb.jpg,"a dog runs .\nc.jpg,A cat .\nd.jpg,A bird .\n'
    captions = write(tmp_path / "captions.txt", content)
    with pytest.raises(ValueError, match=r"captions\.txt:5: a quote that was opened some lines above is never closed"):
        flickr(captions, tmp_path, lists(tmp_path, train="a.jpg b.jpg c.jpg d.jpg"))


def test_a_quoted_caption_may_have_two_lines(tmp_path):
    captions = write(tmp_path / "captions.txt", 'image,caption\na.jpg,"A dog\nruns , fast ."\n')
    (record,) = flickr(captions, tmp_path, lists(tmp_path, train="a.jpg"))
    assert record.captions == ("A dog runs , fast .",)


@pytest.mark.parametrize(("asked", "names"), [("train", ["a.jpg", "b.jpg"]), ("drop", ["b.jpg"])])
def test_the_command_passes_restval_on(asked, names, tmp_path):
    images = [
        {"filename": name, "split": split, "sentences": [{"raw": "A dog."}]}
        for name, split in (("a.jpg", "restval"), ("b.jpg", "val"))
    ]
    file = write(tmp_path / "dataset.json", {"images": images})
    words = ["karpathy", "--json", str(file), "--images", str(tmp_path), "--output", "x.h5", "--restval", asked]
    options = preprocess_parser().parse_args(words)
    assert [record.name for record in options.read(options)] == names


def test_the_seed_makes_the_scenes():
    read = {}
    for seed in ("0", "1"):
        options = preprocess_parser().parse_args(["shapes", "--count", "3", "--seed", seed, "--output", "x.h5"])
        read[seed] = [record.image for record in options.read(options)]
        assert read[seed] == [record.image for record in shapes(3, seed=int(seed))]
    assert read["0"] != read["1"]


@pytest.mark.parametrize("option", ["--weights", "--layer", "--grid"])
def test_options_of_an_encoder_need_one(option, tmp_path, capsys):
    assert preprocess(["shapes", "--count", "3", "--output", str(tmp_path / "x.h5"), option, "7"]) == 2
    assert f"{option} needs --encoder" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["karpathy", "--json", "d.json"], ["coco", "--captions", "c.json"]])
def test_restval_is_train_unless_told(words):
    assert preprocess_parser().parse_args([*words, "--images", "i", "--output", "x.h5"]).restval == "train"
