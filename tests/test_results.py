import json
import os

import pytest

from captioning.results import read_references, read_results, select_references, write_results


@pytest.fixture
def file(tmp_path):
    def make(content):
        path = tmp_path / "captions.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return make


@pytest.mark.parametrize("captions", [{7: "a dog", 9: "ein Café"}, {"b.jpg": "a dog", "a.jpg": ""}])
def test_written_results_are_read_back_with_string_keys(tmp_path, captions):
    write_results(tmp_path / "results.json", captions)
    assert read_results(tmp_path / "results.json") == {str(key): text for key, text in captions.items()}


def test_results_are_in_the_coco_format_with_integer_ids(tmp_path):
    write_results(tmp_path / "results.json", {7: "a dog"})
    assert json.loads((tmp_path / "results.json").read_text()) == [{"image_id": 7, "caption": "a dog"}]


@pytest.mark.parametrize(
    ("keys", "written"),
    [
        (["391895", "0"], [391895, 0]),
        (["391895", "x.jpg"], ["391895", "x.jpg"]),
        (["7", "007"], ["7", "007"]),
        (["9" * 5000], ["9" * 5000]),
    ],
)
def test_ids_that_are_all_numbers_are_written_as_cocos_own_tools_want_them(keys, written, tmp_path):
    write_results(tmp_path / "results.json", dict.fromkeys(keys, "a dog"))
    assert [row["image_id"] for row in json.loads((tmp_path / "results.json").read_text())] == written
    assert list(read_results(tmp_path / "results.json")) == keys


def test_interrupted_writing_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_results(path, {1: "old"})

    def interrupt(*names):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_results(path, {1: "new"})
    assert os.listdir(tmp_path) == ["results.json"]
    assert read_results(path) == {"1": "old"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "is not JSON"),
        ({"a": "b"}, "must be a non-empty JSON list"),
        ([], "must be a non-empty JSON list"),
        ('[{"image_id": 1, "image_id": 2, "caption": "a"}]', "the field 'image_id' comes twice"),
        (["a dog"], r"\[0\]: image_id"),
        ([{"caption": "a"}], r"\[0\]: image_id=None is not of type int or str"),
        ([{"image_id": 1.5, "caption": "a"}], r"\[0\]: image_id"),
        ([{"image_id": True, "caption": "a"}], r"\[0\]: image_id=True"),
        ([{"image_id": 1, "caption": "a"}, {"image_id": 2}], r"\[1\]: caption=None is not of type str"),
        (
            [{"image_id": 1, "caption": "a"}, {"image_id": "1", "caption": "b"}],
            r"\[1\]: image_id='1' has a caption already",
        ),
    ],
)
def test_malformed_results_name_the_file_and_the_field(file, content, message):
    with pytest.raises(ValueError, match=rf"captions\.json: .*{message}"):
        read_results(file(content))


@pytest.mark.parametrize(
    ("content", "references"),
    [
        (
            {"images": [{"id": 4}], "annotations": [{"image_id": 4, "caption": "a"}, {"image_id": 4, "caption": "b"}]},
            {"4": ["a", "b"]},
        ),
        (
            {"images": [{"filename": "x.jpg", "sentences": [{"raw": "a", "tokens": ["a"]}, {"raw": "b"}]}]},
            {"x.jpg": ["a", "b"]},
        ),
        ({"annotations": [{"image_id": 4, "caption": "a"}, {"image_id": "4", "caption": "b"}]}, {"4": ["a", "b"]}),
        ({"images": [{"cocoid": 4, "filename": "x.jpg", "sentences": [{"raw": "a"}]}]}, {"4": ["a"]}),
        ({"x.jpg": ["a", "b"], "y.jpg": ["c"]}, {"x.jpg": ["a", "b"], "y.jpg": ["c"]}),
        ('image,caption\nx.jpg,A dog\nx.jpg,"A cat, too"\n', {"x.jpg": ["A dog", "A cat, too"]}),
        ("image_name| comment_number| comment\nx.jpg| 0| A dog .\n", {"x.jpg": ["A dog ."]}),
        ("x.jpg#0\tA dog .\nx.jpg#1\tA cat\t.\n\ny.jpg#0\tB\r\n", {"x.jpg": ["A dog .", "A cat\t."], "y.jpg": ["B"]}),
    ],
    ids=["coco", "karpathy", "coco-as-text", "karpathy-coco", "mapping", "kaggle", "flickr30k", "flickr8k"],
)
def test_each_format_of_references_is_recognised(file, content, references):
    assert read_references(file(content)) == references


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no captions"),
        ({}, "holds no captions"),
        ([1], "must be a JSON object"),
        ("{", "is not JSON"),
        ("x.jpg#0\ta\nx.jpg a dog\n", r"2: expected 'name#k<TAB>caption'.*or the file must be JSON"),
        ({"annotations": {}}, "has no list of objects 'annotations'"),
        ({"annotations": [{"image_id": 1, "caption": 3}]}, r"annotations\[0\]: caption=3 is not of type str"),
        ({"images": [{"filename": "x", "sentences": [{"tokens": []}]}]}, r"images\[0\]\.sentences\[0\]: raw=None"),
        ({"images": [{"sentences": [{"raw": "a"}]}]}, r"images\[0\]: filename=None is not of type int or str"),
        ({"x.jpg": "a dog"}, "'x.jpg' must be a non-empty list of captions"),
    ],
)
def test_malformed_references_name_the_file_and_the_field(file, content, message):
    with pytest.raises(ValueError, match=rf"captions\.json:.*{message}"):
        read_references(file(content))


def test_files_that_are_no_text_are_one_clear_error(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(ValueError, match=r"photo\.jpg: is not UTF-8 text"):
        read_references(tmp_path / "photo.jpg")


def test_results_for_a_part_of_the_images_select_their_references():
    references = {"1": ["a"], "2": ["b"], "3": ["c"]}
    assert select_references({"3": "x", "1": "y"}, references) == {"3": ["c"], "1": ["a"]}


def test_results_for_unknown_images_are_named():
    with pytest.raises(ValueError, match="'5', '6', '7' and 1 more of the results: not in the references"):
        select_references(dict.fromkeys("15678", "x"), {"1": ["a"]})


@pytest.mark.data
def test_coco_and_flickr8k_files_give_all_their_captions(shared):
    coco = read_references(shared("data", "coco", "captions_val2017.json"))
    flickr8k = read_references(shared("data", "flickr8k", "Flickr8k.token.txt"))
    assert (len(coco), sum(map(len, coco.values()))) == (5_000, 25_014)
    assert sum(map(len, flickr8k.values())) == 40_460
