"""Multi-head attention: by hand, against PyTorch's own, and why scores are scaled."""

import math

import pytest
import torch
from known_weights import noisy
from torch import nn

from captioning.models.alignment import ScaledDotAlignment
from captioning.models.multihead import KeysValues, MultiHead, causal_mask, scaled_dot_product

N, T, L, DIM, MEMORY_DIM = 2, 3, 5, 12, 7


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_one_look_by_hand():
    # d = 4, so that scores are halved. q = (2 ln 3, 0, 0, 0); keys have first entries 1, 0, 0: scores ln 3, 0, 0.
    q = torch.tensor([[2 * math.log(3), 0.0, 0.0, 0.0]])
    k = torch.tensor([[1.0, 5.0, 0.0, 0.0], [0.0, 0.0, 7.0, 0.0], [0.0, 0.0, 0.0, 9.0]])
    assert scaled_dot_product(q, k)[0].tolist() == pytest.approx([3 / 5, 1 / 5, 1 / 5])
    mask = torch.tensor([True, False, True])
    assert scaled_dot_product(q, k, mask)[0].tolist() == pytest.approx([3 / 4, 0, 1 / 4])


def test_two_heads_look_at_different_places_by_hand():
    attention = MultiHead(2, 2, heads=2)  # heads of size 1: head j sees entry j alone
    with torch.no_grad():
        for layer in (attention.query, attention.key, attention.value, attention.output):
            layer.weight.copy_(torch.eye(2))
    a = torch.tensor([[[math.log(2), 0.0], [0.0, math.log(3)]]])
    z, weights = attention(torch.ones(1, 1, 2), a)
    # Head 1 has scores ln 2, 0 and weights 2/3, 1/3; head 2 has 0, ln 3 and 1/4, 3/4.
    assert weights[0, :, 0].tolist() == [pytest.approx([2 / 3, 1 / 3]), pytest.approx([1 / 4, 3 / 4])]
    assert z[0, 0].tolist() == pytest.approx([2 / 3 * math.log(2), 3 / 4 * math.log(3)])


@pytest.mark.parametrize("heads", [1, 3, 4])
def test_equals_torch_multihead_attention_with_copied_weights(heads):
    ours = noisy(MultiHead(DIM, MEMORY_DIM, heads=heads))
    torchs = nn.MultiheadAttention(DIM, heads, kdim=MEMORY_DIM, vdim=MEMORY_DIM, batch_first=True).eval()
    with torch.no_grad():
        torchs.q_proj_weight.copy_(ours.query.weight)
        torchs.k_proj_weight.copy_(ours.key.weight)
        torchs.v_proj_weight.copy_(ours.value.weight)
        any_key_bias = torch.randn(DIM)  # it shifts all scores of a query alike, so ours has none
        torchs.in_proj_bias.copy_(torch.cat([ours.query.bias, any_key_bias, ours.value.bias]))
        torchs.out_proj.load_state_dict(ours.output.state_dict())
    query, memory = torch.randn(N, T, DIM), torch.randn(N, L, MEMORY_DIM)
    mask = torch.rand(T, L) < 0.6
    mask[:, 0] = True
    for allowed in (None, mask):
        z, weights = ours(query, memory, allowed)
        forbidden = None if allowed is None else ~allowed
        expected = torchs(query, memory, memory, attn_mask=forbidden, average_attn_weights=False)
        torch.testing.assert_close(z, expected[0])
        torch.testing.assert_close(weights, expected[1])


def test_one_head_equals_scaled_dot():
    attention = noisy(MultiHead(DIM, MEMORY_DIM, heads=1))
    alignment = ScaledDotAlignment(query_dim=DIM, annotation_dim=MEMORY_DIM, dim=DIM)
    alignment.query.load_state_dict(attention.query.state_dict())
    alignment.key.load_state_dict(attention.key.state_dict())
    query, a = torch.randn(N, T, DIM), torch.randn(N, L, MEMORY_DIM)
    alpha = alignment(query, alignment.keys(a)).softmax(dim=-1)
    z, weights = attention(query, a)
    torch.testing.assert_close(weights[:, 0], alpha)
    torch.testing.assert_close(z, attention.output(alpha @ attention.value(a)))


def test_masked_positions_have_exactly_zero_weight_and_no_influence():
    attention = noisy(MultiHead(DIM, MEMORY_DIM, heads=3))
    query, memory = torch.randn(N, T, DIM), torch.randn(N, L, MEMORY_DIM)
    mask = torch.tensor([True, False, True, True, False])
    z, weights = attention(query, memory, mask)
    assert (weights[..., ~mask] == 0).all()
    assert (weights[..., mask] > 0).all()
    other = memory.clone()
    other[:, ~mask] = 1e4 * torch.randn(N, 2, MEMORY_DIM)
    assert torch.equal(attention(query, other, mask)[0], z)


def test_under_the_causal_mask_what_comes_later_changes_nothing():
    attention = noisy(MultiHead(DIM, DIM, heads=2))
    x = torch.randn(N, T, DIM)
    assert causal_mask(3).tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    assert causal_mask(2, past=1).tolist() == [[True, True, False], [True, True, True]]
    whole, _ = attention(x, x, causal_mask(T))
    for t in range(1, T + 1):
        torch.testing.assert_close(attention(x[:, :t], x[:, :t], causal_mask(t))[0], whole[:, :t])


def test_self_attention_without_positions_is_permutation_equivariant_and_with_positions_is_not():
    attention = noisy(MultiHead(DIM, DIM, heads=3))
    x, positions = torch.randn(N, L, DIM), torch.randn(L, DIM)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(attention(x[:, order], x[:, order])[0], attention(x, x)[0][:, order])
    placed, moved = x + positions, x[:, order] + positions
    assert (attention(moved, moved)[0] - attention(placed, placed)[0][:, order]).abs().max() > 0.1


def test_contexts_lie_in_the_convex_hull_of_the_values():
    attention = noisy(MultiHead(DIM, MEMORY_DIM, heads=3))
    with torch.no_grad():  # so that the result is the heads side by side
        attention.output.weight.copy_(torch.eye(DIM))
        attention.output.bias.zero_()
    memory = attention.project(torch.randn(N, L, MEMORY_DIM))
    z, _ = attention.attend(5 * torch.randn(N, T, DIM), memory)
    # A point lies in the hull of others if and only if in no direction it lies beyond all of them.
    directions = torch.randn(500, DIM // 3)
    reach = (memory.v @ directions.T).amax(dim=2, keepdim=True)
    assert (z.unflatten(-1, (3, -1)).transpose(1, 2) @ directions.T <= reach + 1e-5).all()


def test_scaled_scores_keep_their_variance_as_the_dimension_grows_and_unscaled_ones_saturate():
    # With entries of variance 1, q k' is a sum of d terms of variance 1. Over 50 places, softmax of scores of deviation
    # 1 gives its first choice about e^2.2 / (50 e^0.5) = 0.11; of deviation 32, nearly everything.
    first, variance = {}, {}
    for d in (4, 64, 1024):
        q, k = torch.randn(400, 1, d), torch.randn(400, 50, d)
        scores = q @ k.transpose(1, 2)
        unscaled = scores.softmax(dim=-1)
        variance[d] = (scores.var().item(), (scaled_dot_product(q, k).log()).var(dim=-1).mean().item())
        first[d] = (unscaled.amax(dim=-1).mean().item(), scaled_dot_product(q, k).amax(dim=-1).mean().item())
    for d in first:
        assert variance[d][0] == pytest.approx(d, rel=0.1)
        assert variance[d][1] == pytest.approx(1, rel=0.15)
        assert 0.05 < first[d][1] < 0.2
    assert first[1024][0] > 0.9
    # What saturates does not learn: the derivative of the first choice's weight p is p (1 - p).
    assert first[1024][0] > first[64][0] > 2 * first[4][0]


def test_the_rows_of_an_image_share_its_keys_and_values():
    attention = noisy(MultiHead(DIM, MEMORY_DIM, heads=2))
    query, a = torch.randn(N * T, 1, DIM), torch.randn(N, L, MEMORY_DIM)  # T rows of one query each, by image
    shared, weights = attention(query.view(N, T, DIM), a)
    copied, copied_weights = attention(query, a.repeat_interleave(T, dim=0))
    torch.testing.assert_close(shared.flatten(0, 1), copied.flatten(0, 1))
    torch.testing.assert_close(weights.transpose(1, 2).flatten(0, 1), copied_weights.squeeze(2))


def test_keys_and_values_can_be_cached_piece_by_piece():
    attention = noisy(MultiHead(DIM, DIM, heads=2))
    x = torch.randn(N, L, DIM)
    pieces = [attention.project(x[:, :2]), attention.project(x[:, 2:])]
    cached = KeysValues(*(torch.cat(parts, dim=2) for parts in zip(*pieces, strict=True)))
    torch.testing.assert_close(attention.attend(x, cached)[0], attention(x, x)[0])


def test_dropout_acts_on_the_contexts_but_not_on_the_weights_returned():
    attention = MultiHead(DIM, DIM, heads=2, dropout=0.5).train()
    x = torch.randn(N, L, DIM)
    (z, weights), (other, same) = attention(x, x), attention(x, x)
    assert not torch.equal(z, other)
    assert torch.equal(weights, same)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(N, 2, L))


def test_heads_must_divide_the_size():
    with pytest.raises(ValueError, match=r"heads must divide the attention's size \(got heads=5 and 12\)"):
        MultiHead(DIM, DIM, heads=5)
