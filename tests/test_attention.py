"""Values and heads: what a look brings back when it is projected, and several looks at once."""

import math

import pytest
import torch
from known_weights import noisy
from torch import nn

from captioning.config import DecoderConfig
from captioning.models.alignment import DotAlignment, ScaledDotAlignment
from captioning.models.attention import (
    HardAttention,
    Look,
    MultiHeadAttention,
    ScoredAttention,
    SoftAttention,
    build_attention,
    looking,
)
from captioning.models.multihead import MultiHead, show_head
from captioning.models.registry import build_decoder

N, K, L, D, QUERY, DIM = 2, 3, 5, 7, 4, 6


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def projected(kind: type[ScoredAttention]) -> ScoredAttention:
    alignment = ScaledDotAlignment(query_dim=QUERY, annotation_dim=D, dim=DIM)
    return noisy(kind(alignment, nn.Linear(D, DIM)))


def test_queries_keys_and_values_by_hand():
    alignment = ScaledDotAlignment(query_dim=1, annotation_dim=2, dim=4)
    attention = SoftAttention(alignment, nn.Linear(2, 1))
    with torch.no_grad():
        alignment.query.weight.copy_(torch.tensor([[2.0], [0.0], [0.0], [0.0]]))
        alignment.query.bias.zero_()
        alignment.key.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 5.0], [0.0, 0.0], [0.0, 0.0]]))
        attention.value.weight.copy_(torch.tensor([[10.0, 1.0]]))
        attention.value.bias.fill_(3.0)
    a = torch.tensor([[[math.log(3), 0.0], [0.0, 8.0]]])
    # q = (2, 0, 0, 0); keys (ln 3, 0, ..) and (0, 40, ..); scores 2 ln 3 / sqrt(4) = ln 3 and 0; weights 3/4 and 1/4.
    # Values 10 ln 3 + 3 and 8 + 3.
    context = attention(torch.tensor([[1.0]]), attention.prepare(a))
    assert context.alpha[0].tolist() == pytest.approx([3 / 4, 1 / 4])
    assert context.z.item() == pytest.approx(3 / 4 * (10 * math.log(3) + 3) + 1 / 4 * 11)
    assert attention.context_dim == 1


def test_without_projection_the_values_are_the_annotation_vectors_themselves():
    attention = SoftAttention(DotAlignment(query_dim=D, annotation_dim=D, dim=0))
    memory = attention.prepare(torch.randn(N, L, D))
    assert memory.values is memory.a
    assert attention.context_dim is None


def test_hard_attention_brings_back_the_projected_value_of_its_place():
    attention = projected(HardAttention)
    a, query = torch.randn(N, L, D), torch.randn(N * K, QUERY)
    memory = attention.prepare(a)
    context = attention(query, memory)
    for row in range(N * K):
        expected = attention.value(a[row // K, context.location[row]])
        torch.testing.assert_close(context.z[row], expected)
    with looking(attention, Look("expected")):
        soft = attention(query, memory).z
    torch.testing.assert_close(soft, torch.einsum("rl,rlv->rv", context.alpha, memory.values.repeat_interleave(K, 0)))


def test_straight_through_is_a_sample_whose_gradient_is_that_of_the_gumbel_softmax():
    attention = projected(HardAttention).double()
    a, query = torch.randn(N, L, D).double(), torch.randn(N * K, QUERY).double().requires_grad_()
    memory, w = attention.prepare(a), torch.randn(N * K, DIM).double()
    with looking(attention, Look("gumbel_straight_through", generator=torch.Generator().manual_seed(1))):
        z = attention(query, memory).z
    # Jang et al. (2017), eqs. 1 and 2, at temperature 1: Gumbel noise is -log of an exponential variable.
    noise = torch.empty(N * K, L).double().exponential_(generator=torch.Generator().manual_seed(1))
    scores = attention.alignment(query.view(N, K, QUERY), memory.keys).flatten(0, 1) - noise.log()
    values = memory.values.repeat_interleave(K, dim=0)
    torch.testing.assert_close(z, values[torch.arange(N * K), scores.argmax(dim=-1)])
    relaxed = torch.einsum("rl,rlv->rv", scores.softmax(dim=-1), values)
    found, expected = (torch.autograd.grad((x * w).sum(), query, retain_graph=True)[0] for x in (z, relaxed))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", [SoftAttention, HardAttention])
def test_contexts_lie_in_the_convex_hull_of_the_values(kind):
    attention = projected(kind)
    memory = attention.prepare(torch.randn(N, L, D))
    z = attention(3 * torch.randn(N * K, QUERY), memory).z.view(N, K, DIM)
    # A point lies in the hull of others if and only if in no direction it lies beyond all of them.
    directions = torch.randn(DIM, 500)
    reach = (memory.values @ directions).amax(dim=1, keepdim=True)
    assert (z @ directions <= reach + 1e-5).all()
    outside = memory.values.mean(dim=1, keepdim=True) + 9.0
    assert not (outside @ directions <= reach + 1e-5).all()


def test_one_head_is_scaled_dot_with_projected_values_and_one_more_matrix():
    multihead = noisy(MultiHead(QUERY, D, heads=1, dim=DIM, output_dim=DIM))
    alignment = ScaledDotAlignment(query_dim=QUERY, annotation_dim=D, dim=DIM)
    alignment.query.load_state_dict(multihead.query.state_dict())
    alignment.key.load_state_dict(multihead.key.state_dict())
    single = SoftAttention(alignment, multihead.value)
    a, query = torch.randn(N, L, D), torch.randn(N * K, QUERY)
    several = MultiHeadAttention(multihead)
    one, other = single(query, single.prepare(a)), several(query, several.prepare(a))
    torch.testing.assert_close(other.alpha, one.alpha)
    torch.testing.assert_close(other.z, multihead.output(one.z))


def test_several_heads_are_torchs_multihead_attention():
    ours = MultiHeadAttention(noisy(MultiHead(QUERY, D, heads=2, dim=QUERY, output_dim=QUERY)))
    theirs = nn.MultiheadAttention(QUERY, 2, kdim=D, vdim=D, batch_first=True).eval()
    with torch.no_grad():
        theirs.q_proj_weight.copy_(ours.multihead.query.weight)
        theirs.k_proj_weight.copy_(ours.multihead.key.weight)
        theirs.v_proj_weight.copy_(ours.multihead.value.weight)
        biases = (ours.multihead.query.bias, torch.zeros(QUERY), ours.multihead.value.bias)
        theirs.in_proj_bias.copy_(torch.cat(biases))
        theirs.out_proj.load_state_dict(ours.multihead.output.state_dict())
    a, query = torch.randn(N, L, D), torch.randn(N, K, QUERY)
    context = ours(query.flatten(0, 1), ours.prepare(a))
    z, mean_weights = theirs(query, a, a)
    torch.testing.assert_close(context.z.view(N, K, QUERY), z)
    torch.testing.assert_close(context.alpha.view(N, K, L), mean_weights)


def test_alpha_is_the_mean_of_the_heads_or_the_head_that_is_to_be_shown():
    attention = MultiHeadAttention(noisy(MultiHead(QUERY, D, heads=3, dim=DIM, output_dim=DIM)))
    query, memory = torch.randn(N * K, QUERY), attention.prepare(torch.randn(N, L, D))
    mean = attention(query, memory)
    each = []
    for head in range(3):
        show_head(attention, head)
        context = attention(query, memory)
        assert torch.equal(context.z, mean.z)  # what is shown changes nothing that is said
        each.append(context.alpha)
    torch.testing.assert_close(torch.stack(each).mean(dim=0), mean.alpha)
    assert (each[0] - each[1]).abs().max() > 0.01


@pytest.mark.parametrize("name", ["soft", "multi_head"])
def test_mixing_by_the_alphas_found_gives_the_context_found(name):
    config = DecoderConfig(attention=name, hidden_dim=QUERY, attention_dim=DIM, heads=1 if name == "multi_head" else 8)
    attention = noisy(build_attention(config, D))
    query, memory = torch.randn(N * K, QUERY), attention.prepare(torch.randn(N, L, D))
    context = attention(query, memory)
    torch.testing.assert_close(attention.mix(context.alpha.view(N, K, L), memory).flatten(0, 1), context.z)


@pytest.mark.parametrize("changed", [{"values": "projected"}, {"attention": "multi_head", "heads": 2}])
@pytest.mark.parametrize(("name", "layer"), [("attention_lstm", "L_z"), ("luong", "W_c")])
def test_a_decoder_makes_room_for_contexts_of_another_size(changed, name, layer):
    config = DecoderConfig(name, gate="vector", hidden_dim=8, embedding_dim=5, attention_dim=DIM, **changed)
    decoder = build_decoder(config, vocabulary_size=11, annotation_dim=D)
    assert decoder.gate.f_beta.out_features == DIM
    assert decoder.get_submodule(layer).in_features == DIM + (8 if name == "luong" else 0)
    assert decoder.init_h.in_features == D  # the state begins with the annotation vectors all the same


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"heads": 2}, r"heads=2 needs decoder.attention='multi_head' or decoder.name='transformer'"),
        ({"attention": "multi_head", "heads": 7}, r"decoder.heads must divide decoder.attention_dim \(got 7 and 512\)"),
        ({"attention": "multi_head", "alignment": "dot"}, "alignment='dot' has no meaning with multi_head"),
        ({"name": "lstm", "values": "projected"}, "values='projected' has no meaning with decoder.name='lstm'"),
        ({"name": "lstm", "attention": "multi_head"}, "attention='multi_head' has no meaning with decoder.name='lstm'"),
        (
            {"name": "transformer", "attention": "multi_head"},
            "attention='multi_head' has no meaning with .*transformer",
        ),
    ],
)
def test_combinations_without_a_meaning_are_refused(changed, message):
    with pytest.raises(ValueError, match=message) as error:
        DecoderConfig(**changed)
    assert "\n" not in str(error.value)
