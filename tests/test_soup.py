"""The mean of several models' weights."""

import dataclasses

import pytest
import torch

from captioning.checkpoint import load_checkpoint, save_checkpoint
from captioning.soup import main, soup


def shifted(checkpoint, by: float):
    """The checkpoint with every floating-point weight moved by the same."""
    with torch.no_grad():
        for x in checkpoint.model.state_dict().values():
            if x.is_floating_point():
                x += by
    return checkpoint


@pytest.fixture
def three(tiny_checkpoint, tmp_path):
    """The tiny checkpoint, and two others: 0.25 and 0.5 above it."""
    for name, by in (("a", 0.25), ("b", 0.5)):
        save_checkpoint(tmp_path / name, shifted(load_checkpoint(tiny_checkpoint), by))
    return [tiny_checkpoint, tmp_path / "a", tmp_path / "b"]


def test_a_soup_has_the_mean_of_every_weight_and_tells_of_all_it_is_made_of(three, tiny_checkpoint):
    found, first = soup(three), load_checkpoint(tiny_checkpoint)
    expected = shifted(load_checkpoint(tiny_checkpoint), 0.25).model.state_dict()
    state = found.model.state_dict()
    assert state.keys() == expected.keys()
    for name, x in state.items():
        assert x.dtype == expected[name].dtype
        torch.testing.assert_close(x, expected[name], rtol=1e-6, atol=1e-6)
    assert [each["name"] for each in found.about["soup"]] == [tiny_checkpoint.name, "a", "b"]
    assert all(each["about"] == "untrained" for each in found.about["soup"])
    assert (found.decoder, found.vocabulary, found.search) == (first.decoder, first.vocabulary, first.search)


def test_a_soup_of_one_model_with_itself_is_that_model(tiny_checkpoint):
    state, same = load_checkpoint(tiny_checkpoint).model.state_dict(), soup([tiny_checkpoint] * 2).model.state_dict()
    assert all(torch.equal(same[name], x) for name, x in state.items())


def test_the_command_writes_a_checkpoint_that_loads(three, tmp_path, capsys):
    assert main([*map(str, three), "--output", str(tmp_path / "soup"), "--half"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'soup'}: the mean of 3 checkpoints\n"
    state, expected = load_checkpoint(tmp_path / "soup").model.state_dict(), soup(three).model.state_dict()
    assert all(torch.allclose(state[name].float(), x.float(), 1e-2, 1e-3) for name, x in expected.items())


def test_another_kind_of_model_is_refused_and_nothing_is_written(tiny_checkpoint, tmp_path, capsys):
    other = load_checkpoint(tiny_checkpoint)
    save_checkpoint(
        tmp_path / "a", dataclasses.replace(other, encoder=dataclasses.replace(other.encoder, fit="squash"))
    )
    assert main([str(tiny_checkpoint), str(tmp_path / "a"), "--output", str(tmp_path / "soup")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"{tmp_path / 'a'}: its encoder is not that of {tiny_checkpoint}" in said
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["CHECKPOINT", "--output", "soup"], "two checkpoints at least (got 1)"),
        (["CHECKPOINT", "absent", "--output", "soup"], "absent: no checkpoint folder"),
        (["CHECKPOINT", "CHECKPOINT", "--output", "CHECKPOINT"], "is there already"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(words, named, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([str(tiny_checkpoint) if word == "CHECKPOINT" else word for word in words]) == 2
    said = capsys.readouterr().err
    assert named in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())
