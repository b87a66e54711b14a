import json
import math
import random
from types import SimpleNamespace

import pytest

from captioning.metrics import PTB_TOKENISATION, PYTHON_TOKENISATION, cider, java_found, score

JAVA_FREE = ("BLEU", "ROUGE-L", "CIDEr")


def made_captions(count):
    """Made sentences with all that tokenisers stumble over: `count` images with three references and one candidate."""
    choose = random.Random(7)
    who = ["A man's dog", "Two girls", "The boys' team", "An old (grey) cat", "Someone who isn't tired", "A 3-year-old"]
    does = ["runs", "is sitting", "jumps over it", "can't swim", "looks at a 'no entry' sign", "sleeps"]
    where = [
        "on the grass .",
        "near St. Mary's Ave.",
        'by a "red" car!',
        "in the U.S.",
        "at 5 p.m. .",
        "in a café",
        "; why?",
    ]

    def sentence():
        return " ".join(choose.choice(part) for part in (who, does, where))

    references = {i: [sentence() for _ in range(3)] for i in range(count)}
    return {i: sentence() for i in references}, references


@pytest.mark.slow  # METEOR takes seconds to start
@pytest.mark.java
def test_scores_equal_the_coco_evaluation_of_pycocoevalcap(monkeypatch, capfd):
    from pycocoevalcap import eval as coco_eval

    candidates, references = made_captions(40)
    candidates[3], candidates[5] = "", "Something else entirely ..."

    class NoSpice:  # it would download its parser
        def compute_score(self, gts, res):
            return 0.0, [{} for _ in gts]

        def method(self):
            return "SPICE"

    monkeypatch.setattr(coco_eval, "Spice", NoSpice)
    truth = {i: [{"caption": text} for text in texts] for i, texts in references.items()}
    found = {i: [{"caption": text}] for i, text in candidates.items()}
    coco = SimpleNamespace(imgToAnns=truth, getImgIds=lambda: list(truth))
    theirs = coco_eval.COCOEvalCap(coco, SimpleNamespace(imgToAnns=found))
    theirs.evaluate()
    capfd.readouterr()

    ours = score(candidates, references, per_image=True)

    assert capfd.readouterr() == ("", "")
    names = {"BLEU-1": "Bleu_1", "BLEU-2": "Bleu_2", "BLEU-3": "Bleu_3", "BLEU-4": "Bleu_4"}
    names |= {"METEOR": "METEOR", "ROUGE-L": "ROUGE_L", "CIDEr": "CIDEr"}
    assert ours.values == {name: theirs.eval[theirs_name] for name, theirs_name in names.items()}
    assert ours.per_image[7] == {name: theirs.imgToEval[7][theirs_name] for name, theirs_name in names.items()}
    assert (ours.tokenisation, ours.images, ours.omitted) == (PTB_TOKENISATION, 40, ())


@pytest.mark.slow  # METEOR takes seconds to start
@pytest.mark.java
def test_unusual_and_empty_captions_keep_every_image_in_its_place():
    odd = ["", "|||", "a ||| b", "\x00", "x\u2028y\x85z", "\ud800", "😀", "a\nb\rc", "..."]
    candidates = dict(enumerate(odd)) | {"last": "a small dog runs"}
    references = {key: ["a cat ||| sleeps", "😀"] for key in candidates} | {"last": ["a small dog runs", "a dog"]}
    scores = score(candidates, references, per_image=True)
    assert scores.per_image["last"]["BLEU-4"] == pytest.approx(1)
    assert scores.per_image["last"]["METEOR"] == pytest.approx(1)
    assert all(scores.per_image[i]["METEOR"] < 0.5 for i in range(len(odd)))


@pytest.mark.java
def test_both_tokenisations_give_the_same_scores_for_plain_captions():
    candidates = {1: "A dog's ball .", 2: "Two men walk"}
    references = {1: ["A dog's red ball ."], 2: ["Two men walk home .", "Men don't walk"]}
    ptb, python = (score(candidates, references, tokenizer=name, metrics=JAVA_FREE) for name in ("ptb", "python"))
    assert ptb.values == python.values
    assert (ptb.tokenisation, python.tokenisation) == (PTB_TOKENISATION, PYTHON_TOKENISATION)


@pytest.mark.java
def test_meteor_that_dies_is_one_error_and_no_hang(monkeypatch):
    from pycocoevalcap.meteor import meteor

    monkeypatch.setattr(meteor, "METEOR_JAR", "no-such.jar")
    with pytest.raises(RuntimeError, match=r"METEOR failed in Java: .*no-such\.jar"):
        score({1: "a"}, {1: ["a"]}, metrics=("METEOR",))


@pytest.mark.java
def test_ptb_tokenizer_that_fails_is_one_error(monkeypatch):
    from pycocoevalcap.tokenizer import ptbtokenizer

    monkeypatch.setattr(ptbtokenizer, "STANFORD_CORENLP_3_4_1_JAR", "no-such.jar")
    with pytest.raises(RuntimeError, match=r"PTB tokenizer failed in Java: .*PTBTokenizer"):
        score({1: "a"}, {1: ["a"]}, metrics=("BLEU",))


def test_bleu_equals_hand_worked_precision_and_brevity_penalty():
    # "a dog runs a": a (twice, but once in the reference), dog, runs -> 3 of 4; bigrams "a dog", "dog runs" -> 2 of 3.
    # The reference has 6 words, the candidate 4: brevity penalty exp(1 - 6/4).
    scores = score({1: "A dog runs a."}, {1: ["a dog runs on the beach"]}, tokenizer="python", metrics=("BLEU",))
    penalty = math.exp(1 - 6 / 4)
    assert scores.values["BLEU-1"] == pytest.approx(penalty * 3 / 4)
    assert scores.values["BLEU-2"] == pytest.approx(penalty * math.sqrt(3 / 4 * 2 / 3))


def test_bleu_takes_the_reference_length_that_is_closest():
    # 3 of 3 words right, lengths 4 and 8: closest 4 -> exp(1 - 4/3).
    references = {1: ["a dog runs fast", "a dog that runs so fast is here"]}
    scores = score({1: "a dog runs"}, references, tokenizer="python", metrics=("BLEU",))
    assert scores.values["BLEU-1"] == pytest.approx(math.exp(1 - 4 / 3))


def test_rouge_l_equals_the_hand_worked_f_measure():
    # Longest common subsequence "a dog runs" = 3 of 4 candidate words and 3 of 5 reference words, beta = 1.2.
    scores = score({1: "a dog quickly runs"}, {1: ["a brown dog runs home"]}, tokenizer="python", metrics=("ROUGE-L",))
    precision, recall = 3 / 4, 3 / 5
    assert scores.values["ROUGE-L"] == pytest.approx(2.44 * precision * recall / (recall + 1.44 * precision))


def test_perfect_captions_score_one_and_cider_ten():
    candidates = {1: "a small dog runs", 2: "two red cars turn left"}
    references = {key: [text] for key, text in candidates.items()}
    scores = score(candidates, references, tokenizer="python", metrics=JAVA_FREE)
    assert [scores.values[f"BLEU-{n}"] for n in range(1, 5)] == pytest.approx([1] * 4)
    assert scores.values["ROUGE-L"] == pytest.approx(1)
    assert scores.values["CIDEr"] == pytest.approx(10)
    assert cider(candidates, references) == scores.values["CIDEr"]


def test_case_and_final_full_stop_change_no_score():
    candidates, references = made_captions(10)
    shouted = {key: [text.upper() + " ." for text in texts] for key, texts in references.items()}
    plain, loud = (score(candidates, truth, tokenizer="python", metrics=JAVA_FREE) for truth in (references, shouted))
    assert plain == loud


def test_an_unknown_word_is_never_correct():
    scores = score({1: "<unk>"}, {1: ["a dog"]}, tokenizer="python", metrics=("BLEU",))
    assert scores.values["BLEU-1"] == pytest.approx(0, abs=1e-6)


def test_empty_candidates_score_nothing_and_do_not_crash():
    scores = score({1: "", 2: "."}, {1: ["a dog"], 2: ["a cat"]}, tokenizer="python", metrics=JAVA_FREE)
    assert all(value == pytest.approx(0) for value in scores.values.values())


def test_java_is_looked_for_on_the_path(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not java_found()
    (tmp_path / "java").touch(mode=0o755)
    assert java_found()


def test_without_java_meteor_is_left_out_and_named():
    scores = score({1: "a dog"}, {1: ["a dog"]})
    assert list(scores.values) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]
    assert scores.tokenisation == PYTHON_TOKENISATION
    assert scores.omitted == ("METEOR: needs Java, and there is no java on the PATH",)
    assert "left out: METEOR" in scores.table()


@pytest.mark.parametrize("settings", [{"tokenizer": "ptb"}, {"metrics": ("METEOR",)}])
def test_asking_for_java_without_java_is_an_error(settings):
    with pytest.raises(ValueError, match="no java on the PATH"):
        score({1: "a"}, {1: ["a"]}, **settings)


@pytest.mark.java
def test_spice_that_cannot_be_downloaded_is_left_out_with_the_reason(monkeypatch):
    from pycocoevalcap.spice import spice

    def offline():
        raise OSError("no network")

    monkeypatch.setattr(spice, "get_stanford_models", offline)
    scores = score({1: "a"}, {1: ["a"]}, metrics=("BLEU", "SPICE"))
    assert "SPICE" not in scores.values
    assert scores.omitted == ("SPICE: its download or its Java program failed (no network)",)


def test_table_shows_four_decimals_and_the_dict_is_json():
    scores = score({1: "a dog"}, {1: ["a dog runs"]}, tokenizer="python", metrics=("BLEU",))
    assert scores.table().splitlines()[0] == f"BLEU-1   {math.exp(-1 / 2):.4f}"
    assert "images: 1" in scores.table()
    read_back = json.loads(json.dumps(scores.as_dict()))
    assert read_back["BLEU-1"] == scores.values["BLEU-1"]
    assert (read_back["images"], read_back["tokenisation"]) == (1, PYTHON_TOKENISATION)


@pytest.mark.parametrize(
    ("candidates", "references", "message"),
    [
        ({}, {}, "candidates are empty"),
        (dict.fromkeys("vwxyz", "a"), {"v": ["a"]}, "references have no captions for 'w', 'x', 'y' and 1 more"),
        ({1: "a"}, {1: ["a"], 2: ["b"]}, "candidates have no caption for 2"),
        ({1: "a"}, {1: []}, "references have no captions for 1"),
        ({1: "a"}, {1: "a dog"}, "must be lists, not one string, for 1"),
        ({1: "a"}, {1: [" . "]}, "references hold no word"),
    ],
)
def test_captions_that_do_not_fit_together_are_named(candidates, references, message):
    with pytest.raises(ValueError, match=message):
        score(candidates, references, tokenizer="python", metrics=("BLEU",))


@pytest.mark.parametrize(
    "settings", [{"tokenizer": "nltk"}, {"metrics": ("BLEU-5",)}, {"metrics": ()}, {"metrics": "BLEU"}]
)
def test_unknown_settings_are_errors(settings):
    with pytest.raises(ValueError, match=rf"^{next(iter(settings))}="):
        score({1: "a"}, {1: ["a"]}, **settings)


def test_a_caption_meets_the_references_of_its_own_image_in_whatever_order():
    truth = {1: ["a small dog runs"], 2: ["two red cars turn left"]}
    found = score({2: truth[2][0], 1: truth[1][0]}, truth, tokenizer="python", metrics=("BLEU",), per_image=True)
    assert found.values["BLEU-4"] == pytest.approx(1)
    assert found.per_image[1]["BLEU-4"] == pytest.approx(1)
