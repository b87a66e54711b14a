"""Hard attention with a window: what a look brings back is the mean of the places around its location."""

import dataclasses
import math
import re
import sys

import numpy as np
import pytest
import torch
from test_decoder import assert_forward_equals_repeated_step, batch
from tiny_runs import TINY, tiny_settings

from captioning import training
from captioning.api import load_captioner
from captioning.caption import as_json, print_words
from captioning.checkpoint import load_checkpoint, save_checkpoint
from captioning.config import DecoderConfig, HardConfig
from captioning.data import CaptionData
from captioning.listening import forced
from captioning.models.alignment import GeneralAlignment
from captioning.models.attention import HardAttention, Look, looking, window_means
from captioning.models.decoder import Decoder
from captioning.models.registry import build_decoder
from captioning.run import start
from captioning.vocabulary import END

SIDE, PLACES, DIM, QUERY = 4, 16, 3, 5


def attention_with(window: float, glimpses: int = 1) -> HardAttention:
    torch.manual_seed(0)
    alignment = GeneralAlignment(query_dim=QUERY, annotation_dim=DIM, dim=0)
    return HardAttention(alignment, window=window, glimpses=glimpses).double().eval()


def vectors() -> torch.Tensor:
    return torch.randn(2, PLACES, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def queries() -> torch.Tensor:
    return torch.randn(2 * PLACES, QUERY, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def around(place: int, reach: int = 1) -> list[int]:
    """The cells of the window around a cell, those beyond the edge apart."""
    row, column = divmod(place, SIDE)
    rows = [r for r in range(row - reach, row + reach + 1) if 0 <= r < SIDE]
    columns = [c for c in range(column - reach, column + reach + 1) if 0 <= c < SIDE]
    return [r * SIDE + c for r in rows for c in columns]


@pytest.mark.parametrize(("window", "reach", "cells"), [(0.0, 0, {1}), (0.75, 1, {4, 6, 9}), (0.99, 1, {4, 6, 9})])
def test_a_look_brings_back_the_mean_of_the_window_around_its_location(window, reach, cells):
    a, attention = vectors(), attention_with(window)
    everywhere = torch.arange(PLACES).repeat(2)
    context = attention(queries(), attention.prepare(a), everywhere)
    assert {len(around(place, reach)) for place in range(PLACES)} == cells
    for row, place in enumerate(everywhere.tolist()):
        torch.testing.assert_close(context.z[row], a[row // PLACES, around(place, reach)].mean(dim=0))


def test_where_to_look_does_not_depend_on_the_window():
    one, three = (attention(queries(), attention.prepare(vectors())) for attention in map(attention_with, (0.0, 0.75)))
    torch.testing.assert_close(one.alpha, three.alpha, rtol=0, atol=0)
    assert torch.equal(one.location, three.location)
    assert not torch.allclose(one.z, three.z)


def test_several_glimpses_have_a_window_each():
    a, attention = vectors(), attention_with(0.75, glimpses=2)
    context = attention(queries(), attention.prepare(a))
    for row, places in enumerate(context.location.tolist()):
        weights = context.alpha[row, places] / context.alpha[row, places].sum()
        means = torch.stack([a[row // PLACES, around(place)].mean(dim=0) for place in places])
        torch.testing.assert_close(context.z[row], weights @ means)


def test_the_gradient_reaches_the_window_and_nothing_else_of_the_annotation_vectors():
    a, attention = vectors().requires_grad_(), attention_with(0.75)
    places = torch.tensor([5, 15])
    context = attention(queries()[:2], attention.prepare(a), places)
    (gradient,) = torch.autograd.grad(context.z.sum(), a)
    for image, place in enumerate(places.tolist()):
        assert gradient[image].any(dim=-1).nonzero().flatten().tolist() == around(place)


def decoder_with(**settings) -> Decoder:
    torch.manual_seed(0)
    sizes = {"embedding_dim": 4, "hidden_dim": 6, "attention_dim": 3, "dropout": 0.0}
    config = DecoderConfig(attention="hard", **sizes, **settings)
    return build_decoder(config, vocabulary_size=11, annotation_dim=DIM).double().eval()


@pytest.mark.parametrize("captions", [1, 30], ids=["few words", "many words"])
@pytest.mark.parametrize("settings", [{}, {"values": "projected"}, {"name": "luong"}], ids=str)
def test_forward_equals_repeated_step(settings, captions):
    decoder, (_, words) = decoder_with(window=0.75, **settings), batch()
    assert_forward_equals_repeated_step(decoder, vectors(), words.repeat_interleave(captions, dim=1))


def test_projected_values_are_the_same_before_and_after_the_mean():
    decoder = decoder_with(window=0.75, values="projected")
    memory = decoder.prepare(vectors())
    means = torch.stack([vectors()[:, around(place)].mean(dim=1) for place in range(PLACES)], dim=1)
    torch.testing.assert_close(memory.values, decoder.attention.value(means))


def test_the_listening_test_forces_whole_windows():
    decoder, (_, words) = decoder_with(window=0.75), batch()
    own = decoder(vectors(), words)
    alphas = torch.nn.functional.one_hot(own.locations, PLACES).double()
    with forced(decoder, alphas):
        told = decoder(vectors(), words)
    torch.testing.assert_close(told.logits, own.logits)


def test_the_mean_context_is_of_windows_too():
    a, attention = vectors(), attention_with(0.75)
    with looking(attention, Look("expected")):
        context = attention(queries(), attention.prepare(a))
    means = torch.stack([a[:, around(place)].mean(dim=1) for place in range(PLACES)], dim=1)
    torch.testing.assert_close(context.z, (context.alpha.unflatten(0, (2, -1)) @ means).flatten(0, 1))


# ----------------------------------------------------------------------------------------------------------------------
# Settings, training, captions


def with_window(window: float) -> DecoderConfig:
    return dataclasses.replace(TINY["decoder"], attention="hard", window=window)


@pytest.mark.parametrize(
    ("share", "side", "size"),
    [
        (0.5, 10, 5),
        (0.5, 7, 3),
        (0.5, 14, 7),
        (0.3, 10, 3),
        (0.29, 10, 1),
        (0.1, 7, 1),
        (0.99, 4, 3),
        (0.5, 1, 1),
        (0.58, 50, 29),
    ],
)
def test_the_window_is_the_largest_odd_square_within_its_share(share, side, size):
    corner = torch.zeros(1, side * side, 1)
    corner[:, 0] = 1.0
    reached = window_means(corner, share).view(side, side) > 0
    across = size // 2 + 1
    assert reached[:across, :across].all()
    assert reached.sum() == across**2


def test_only_hard_attention_has_a_window():
    with pytest.raises(ValueError, match=r"decoder\.window=0\.5 needs decoder\.attention='hard' \(got 'soft'\)"):
        DecoderConfig(window=0.5)


@pytest.mark.parametrize("window", [-0.1, 1.0, math.nan])
def test_a_window_is_a_share_of_the_side(window):
    with pytest.raises(ValueError, match=r"window must lie in \[0, 1\)"):
        DecoderConfig(attention="hard", window=window)


def test_a_window_needs_a_square_grid():
    with pytest.raises(ValueError, match=r"decoder\.window=0\.75 needs a square grid \(got 15 locations\)"):
        attention_with(0.75).prepare(torch.zeros(1, 15, DIM, dtype=torch.float64))


def test_training_refuses_a_window_that_is_one_place(tiny_data, tmp_path):
    with pytest.raises(
        ValueError, match=r"decoder\.window=0\.7 must take in 3 of the 4 locations across the grid, or be"
    ):
        start(tiny_settings(tiny_data, tmp_path / "run", decoder=with_window(0.7)))
    assert not (tmp_path / "run").exists()


def test_a_run_with_a_window_starts_from_a_soft_model_and_captions(tiny_data, tmp_path, capsys):
    soft = training.train(tiny_settings(tiny_data, tmp_path / "soft", epochs=1))
    hard = HardConfig(baseline="leave_one_out", samples=2)
    settings = tiny_settings(tiny_data, tmp_path / "run", decoder=with_window(0.75), hard=hard, init_from=str(soft))
    best = training.train(dataclasses.replace(settings, epochs=1))
    checkpoint = load_checkpoint(best)
    assert checkpoint.decoder.window == checkpoint.model.decoder.attention.window == 0.75
    with torch.no_grad():
        checkpoint.model.decoder.get_parameter("L_o.bias")[END] = -9.0  # so that it has something to say
    save_checkpoint(tmp_path / "talkative", checkpoint)
    photo = CaptionData(tiny_data).image(0).permute(1, 2, 0).numpy()
    captioner = load_captioner(tmp_path / "talkative")
    caption = captioner.caption(photo, max_length=5)[0]
    assert caption.window == as_json(tmp_path, caption)["window"] == 3
    assert captioner.caption(photo, max_length=5, location="expected")[0].window == 1
    page = tmp_path / "page.html"
    caption.overlay(photo, page)
    side = photo.shape[1]
    outlines = re.findall(r'<svg class="looks".*?<path d="([^"]*)"', page.read_text())
    assert len(outlines) == len(caption.words)
    for outline in outlines:
        across = [float(x) for x in re.findall(r"[ML]([0-9.]+) ", outline)]
        assert (max(across) - min(across)) / side in (0.5, 0.75)  # three of four places, two at the edge
    for alpha, place in zip(caption.alphas.reshape(len(caption.words), -1), caption.locations, strict=True):
        assert place.tolist() == [np.argmax(alpha)]
    print_words(caption, sys.stdout)
    row, column = divmod(int(caption.locations[0, 0]), 4)
    assert f"looked at row {row + 1} of 4, column {column + 1} of 4, 1 around it (" in capsys.readouterr().out
    changes = {"decoder": with_window(0.0), "init_from": str(best), "output": str(tmp_path / "next")}
    again = start(dataclasses.replace(settings, **changes)).model.state_dict()
    saved = load_checkpoint(best).model.state_dict()
    assert all(torch.equal(x, again[name]) for name, x in saved.items())
