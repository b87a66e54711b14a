"""Whether captions of the synthetic world are checked rightly: truth, the attention's mass, the cell looked at."""

import dataclasses
import json

import pytest
import torch

from captioning.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from captioning.config import SearchConfig
from captioning.decoding import Hypothesis
from captioning.evaluate import SplitCaption
from captioning.models.captioner import build_model
from preprocess import shapes_check
from preprocess.__main__ import main as preprocess
from preprocess.shapes import Scene, Thing, instances
from preprocess.shapes_check import check, main

SIZE, GRID = 32, (2, 2)
# A large square of half a side 0.18 / sqrt 2 around (0.25, 0.25) lies in the first of four cells.
SCENE = Scene((Thing("square", "red", "large", 0.25, 0.25, 0.18), Thing("circle", "blue", "small", 0.8, 0.8, 0.11)))
INSTANCES = instances([SCENE], SIZE)


def caption(text: str, alpha: list[float], location: int | None = None) -> dict[str, SplitCaption]:
    """A caption whose every word looks alike."""
    words = len(text.split()) + 1
    hypothesis = Hypothesis(
        ids=(0,) * words,
        log_probs=(0.0,) * words,
        alphas=torch.tensor(alpha).expand(words, 4),
        betas=None,
        locations=None if location is None else torch.full((words, 1), location),
        finished=True,
        score=0.0,
    )
    return {"000000.png": SplitCaption(text, hypothesis)}


def test_the_mass_on_a_thing_that_fills_part_of_a_cell():
    report = check(caption("there is a large red square", [0.5, 0.25, 0.25, 0.0]), GRID, INSTANCES)
    pixels = float(SCENE.mask(0, SIZE).sum())
    assert (report.sentences, report.parsed, report.true, report.nouns) == (1, 1, 1, 1)
    assert report.area == pytest.approx(pixels / 32**2)
    assert report.mass == pytest.approx(0.5 * pixels / 16**2)  # half of the attention, spread over a cell of 16 x 16
    assert report.ratio == pytest.approx(2.0)  # twice what uniform attention, 0.25, would give
    assert report.hits == 1.0


def test_a_false_sentence_is_counted_named_and_looked_at_no_further():
    said = caption("there is a large blue square", [1.0, 0.0, 0.0, 0.0])
    report = check(said, GRID, INSTANCES)
    assert (report.parsed, report.true, report.nouns, report.mass, report.ratio) == (1, 0, 0, None, None)
    assert report.false == (("000000.png", "there is a large blue square"),)


def test_a_sentence_that_the_grammar_cannot_read_is_neither_parsed_nor_true():
    report = check(caption("square red the", [1.0, 0.0, 0.0, 0.0]), GRID, INSTANCES)
    assert (report.parsed, report.true) == (0, 0)


def test_each_of_several_looks_counts():
    said = caption("there is a large red square", [0.7, 0.1, 0.1, 0.1], 0)
    (only,) = said.values()
    both = torch.tensor([0, 3]).expand(len(only.hypothesis.ids), 2)
    hypothesis = dataclasses.replace(only.hypothesis, locations=both)
    report = check({"000000.png": SplitCaption(only.text, hypothesis)}, GRID, INSTANCES)
    assert report.hits == 0.5


@pytest.mark.parametrize(("location", "hits"), [(None, 1.0), (0, 1.0), (3, 0.0)])
def test_the_cell_looked_at_is_the_sampled_one_of_hard_attention_and_the_likeliest_of_soft(location, hits):
    said = caption("there is a large red square", [0.7, 0.1, 0.1, 0.1], location)
    assert check(said, GRID, INSTANCES).hits == hits


@pytest.mark.parametrize(("cell", "hits"), [(1, 1.0), (2, 0.0)])
@pytest.mark.parametrize("hard", [False, True])
def test_cells_are_counted_row_by_row(hard, cell, hits):
    scene = Scene((Thing("square", "red", "large", 0.75, 0.25, 0.18),))  # on the upper right: the second of four cells
    alpha = [float(i == cell) for i in range(4)]
    report = check(
        caption("there is a large red square", alpha, cell if hard else None), GRID, instances([scene], SIZE)
    )
    assert report.hits == hits
    assert bool(report.mass) == bool(hits)


def test_each_noun_is_held_against_its_own_thing():
    said = caption("a large red square and a small blue circle", [1.0, 0.0, 0.0, 0.0])
    report = check(said, GRID, INSTANCES)
    assert (report.true, report.nouns, report.hits) == (1, 2, 0.5)


def test_a_checkpoint_of_other_pictures_is_refused(tiny_checkpoint, tiny_annotations, tmp_path, capsys):
    other = load_checkpoint(tiny_checkpoint)
    with torch.no_grad():
        next(other.model.encoder.network.parameters()).add_(1)
    save_checkpoint(tmp_path / "other", other)
    assert main(["--checkpoint", str(tmp_path / "other"), "--data", str(tiny_annotations)]) == 2
    assert "annotation vectors of another encoder" in capsys.readouterr().err


def test_the_command_searches_as_asked_and_says_how(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    data, hard = tmp_path / "shapes.h5", load_checkpoint(tiny_checkpoint)
    assert preprocess(["shapes", "--count", "20", "--image-size", "32", "--output", str(data)]) == 0
    decoder = dataclasses.replace(hard.decoder, attention="hard")
    model, encoder = build_model(hard.encoder, decoder, len(hard.vocabulary))
    save_checkpoint(tmp_path / "hard", Checkpoint(model, encoder, decoder, hard.vocabulary))
    real, searches = shapes_check.caption_split, []

    def noted(model, data, indices, vocabulary, search):
        searches.append(search)
        return real(model, data, indices, vocabulary, search)

    monkeypatch.setattr(shapes_check, "caption_split", noted)
    words = ["--checkpoint", str(tmp_path / "hard"), "--data", str(data), "--location", "sample", "--beam-size", "2"]
    capsys.readouterr()
    assert main([*words, "--device", "cpu"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert searches == [SearchConfig(beam_size=2, location="sample")]
    assert (said["sentences"], said["split"], said["beam_size"], said["location"]) == (2, "val", 2, "sample")
    data.with_suffix(".instances.json").write_text('{"images": 5, "annotations": []}')
    assert main([*words, "--device", "cpu"]) == 2
    assert "shapes.instances.json: is not what preprocess shapes writes" in capsys.readouterr().err


@pytest.mark.parametrize("hard", [False, True])
def test_a_noun_is_held_against_the_look_at_its_own_word(hard):
    (said,) = caption("a large red square and a small blue circle", [0.0, 1.0, 0.0, 0.0]).values()
    alphas = said.hypothesis.alphas.clone()
    alphas[3], alphas[8] = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 0, 0, 1.0])  # at the nouns alone
    places = alphas.argmax(dim=-1, keepdim=True) if hard else None
    looked = dataclasses.replace(said.hypothesis, alphas=alphas, locations=places)
    report = check({"000000.png": SplitCaption(said.text, looked)}, GRID, INSTANCES)
    assert (report.nouns, report.hits) == (2, 1.0)
    assert report.mass == pytest.approx(sum(SCENE.mask(i, SIZE).sum() for i in (0, 1)) / 2 / 16**2)
