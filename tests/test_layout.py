"""Weights that are laid out once multiply as they did, and nobody else notices."""

import pytest
import torch
from torch.nn.functional import linear

from captioning.config import DecoderConfig, SearchConfig
from captioning.decoding import search
from captioning.models import late, layout
from captioning.models.late import LateLinear
from captioning.models.layout import FixedLinear, fixed_product, laid_out
from captioning.models.registry import build_decoder


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("rows", [1, 32, 70])
def test_a_large_weight_that_is_laid_out_once_multiplies_as_it_did(rows, packs, monkeypatch):
    monkeypatch.setattr(layout, "_onednn_packs", lambda: packs)
    monkeypatch.setattr(late, "LARGE", 1)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1024, 512, generator=generator)
    x = torch.randn(512, rows, generator=generator).t()  # as a slice of a batch it need not be contiguous
    for w, y in ((weight, x), (weight.t(), torch.randn(rows, 1024, generator=generator))):
        torch.testing.assert_close(fixed_product(w, 1)(y), y @ w.t(), rtol=1e-4, atol=1e-4)
    offsets = [torch.zeros(rows, 1024, requires_grad=True)]
    x = x.detach().requires_grad_()
    y = LateLinear(weight.requires_grad_(), offsets)(x)
    found = torch.autograd.grad(y.square().sum(), [weight, x])
    expected = torch.autograd.grad(linear(x, weight).square().sum(), [weight, x])
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)


def test_where_the_operators_are_not_the_librarys_product_is_taken(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    layout._onednn_packs.cache_clear()
    try:
        weight = torch.randn(1024, 512)
        x = torch.randn(3, 512)
        assert torch.equal(fixed_product(weight, 1)(x), linear(x, weight))
    finally:
        layout._onednn_packs.cache_clear()


@pytest.mark.parametrize("name", ["attention_lstm", "lstm", "luong", "transformer"])
def test_a_search_with_weights_laid_out_finds_what_it_found(name, monkeypatch):
    torch.manual_seed(0)
    dim = {"hidden_dim": 64, "embedding_dim": 64, "heads": 4} if name == "transformer" else {"hidden_dim": 64}
    config = DecoderConfig(name=name, dropout=0.0, **dim)
    decoder = build_decoder(config, vocabulary_size=50, annotation_dim=32).eval()
    a, options = torch.randn(3, 9, 32), SearchConfig(beam_size=4, max_length=6, num_captions=2)
    plain = search(decoder, a, options)
    monkeypatch.setattr(layout, "LARGE", 64 * 32)
    twin = laid_out(decoder)
    assert any(isinstance(part, FixedLinear) for part in twin.modules())
    assert not any(isinstance(part, FixedLinear) for part in decoder.modules())
    for found, expected in zip(search(decoder, a, options), plain, strict=True):
        assert [x.ids for x in found] == [x.ids for x in expected]
        assert [x.score for x in found] == pytest.approx([x.score for x in expected], abs=1e-4)


def test_a_module_with_nothing_to_lay_out_is_itself_and_so_it_is_under_autocast(monkeypatch):
    decoder = build_decoder(DecoderConfig(), vocabulary_size=9, annotation_dim=8)
    monkeypatch.setattr(layout, "LARGE", 2**40)
    assert laid_out(decoder) is decoder
    monkeypatch.setattr(layout, "LARGE", 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert laid_out(decoder) is decoder
    assert laid_out(decoder) is not decoder
    assert laid_out(decoder.double()) is decoder
