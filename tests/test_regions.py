"""What lies between the CNN and the decoder: one vector per place stays, and positions tell places."""

import math
from typing import get_type_hints

import pytest
import torch

from captioning.config import RegionEncoderConfig
from captioning.models.regions import (
    POSITIONS,
    REGION_ENCODERS,
    RegionEncoder,
    RegionLSTM,
    build_region_encoder,
    sinusoids,
)

DIM, GRID = 8, (2, 3)


def annotations() -> torch.Tensor:
    return torch.randn(2, 6, DIM, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("positions", ["none", *POSITIONS])
@pytest.mark.parametrize("name", REGION_ENCODERS)
def test_one_vector_per_place_comes_out(name, positions):
    encoder = build_region_encoder(RegionEncoderConfig(name, positions), annotation_dim=DIM, grid=GRID)
    assert encoder(annotations()).shape == (2, 6, encoder.dim)


def test_without_region_encoder_and_positions_nothing_changes():
    encoder = build_region_encoder(RegionEncoderConfig(), annotation_dim=DIM, grid=GRID)
    assert torch.equal(encoder(annotations()), annotations())
    assert encoder.state_dict() == {}


def test_learned_positions_add_one_vector_per_row_and_one_per_column():
    encoder = build_region_encoder(RegionEncoderConfig(positions="learned"), annotation_dim=DIM, grid=GRID)
    added = (encoder(annotations()) - annotations())[0].view(2, 3, DIM)
    rows, columns = encoder.positions.rows, encoder.positions.columns
    torch.testing.assert_close(added[1, 2], rows[1, 0] + columns[0, 2])
    torch.testing.assert_close(added[1] - added[0], (rows[1] - rows[0]).expand(3, DIM))


def test_sinusoids_by_hand():
    # dim 4: frequencies 1 and 10000^(-2/4) = 0.01; position 3 gives sin 3, cos 3, sin 0.03, cos 0.03.
    code = sinusoids(4, 4)
    assert code[0].tolist() == [0, 1, 0, 1]
    assert code[3].tolist() == pytest.approx([math.sin(3), math.cos(3), math.sin(0.03), math.cos(0.03)])


def test_sinusoidal_positions_have_the_row_in_the_first_half_and_the_column_in_the_second():
    encoder = build_region_encoder(RegionEncoderConfig(positions="sinusoidal"), annotation_dim=DIM, grid=GRID)
    added = (encoder(annotations()) - annotations())[0].view(2, 3, DIM)
    torch.testing.assert_close(added[1, 2], torch.cat([sinusoids(2, 4)[1], sinusoids(3, 4)[2]]))
    assert encoder.state_dict() == {}


def test_sinusoidal_positions_need_a_dim_that_4_divides():
    with pytest.raises(ValueError, match="positions='sinusoidal' needs a dim that 4 divides"):
        build_region_encoder(RegionEncoderConfig(positions="sinusoidal"), annotation_dim=6, grid=GRID)


@pytest.mark.parametrize(("field", "words"), [("name", set(REGION_ENCODERS)), ("positions", {"none", *POSITIONS})])
def test_every_word_of_the_config_has_its_class(field, words):
    assert set(get_type_hints(RegionEncoderConfig)[field].__args__) == words


def build(name: str, **options: object) -> RegionEncoder:
    """A region encoder whose every weight matters: gamma, which begins at 0, does not."""
    torch.manual_seed(1)
    encoder = build_region_encoder(RegionEncoderConfig(name, **options), annotation_dim=DIM, grid=GRID)
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return encoder.double().eval()


@pytest.mark.parametrize("positions", ["none", *POSITIONS])
@pytest.mark.parametrize("name", REGION_ENCODERS)
def test_every_parameter_gets_a_gradient(name, positions):
    encoder = build(name, positions=positions).train()
    weights = torch.randn(encoder.dim, dtype=torch.float64)  # a plain sum of normalised vectors would be constant
    a = annotations().double().requires_grad_()
    (encoder(a) @ weights).tanh().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert a.grad.abs().sum() > 0


@pytest.mark.parametrize("name", REGION_ENCODERS)
def test_images_do_not_see_each_other(name):
    encoder, a = build(name), annotations().double()
    torch.testing.assert_close(encoder(a[:1]), encoder(a)[:1])


def dependence(encoder: RegionEncoder) -> torch.Tensor:
    """(L, L), entry (i, j): whether the i-th vector that comes out depends on the j-th that goes in."""
    a = annotations().double()[:1]
    jacobian = torch.autograd.functional.jacobian(encoder, a)  # (1, L, E, 1, L, D)
    return jacobian[0, :, :, 0].abs().sum(dim=(1, 3)) > 0


def test_the_states_of_a_region_lstm_know_the_regions_so_far_and_those_of_both_directions_all():
    everything = torch.ones(6, 6, dtype=torch.bool)
    assert torch.equal(dependence(build("lstm", dim=4)), everything.tril())  # the first only itself, the last all
    assert torch.equal(dependence(build("bilstm", dim=4)), everything)
    assert torch.equal(dependence(build("none")), torch.eye(6, dtype=torch.bool))
    assert torch.equal(dependence(build("self_attention", dim=4, heads=2)), everything)
    assert torch.equal(dependence(build("transformer", dim=4, heads=2)), everything)


def test_one_step_of_the_region_lstm_by_hand():
    encoder = build_region_encoder(RegionEncoderConfig("lstm", dim=1), annotation_dim=1, grid=(1, 2))
    with torch.no_grad():
        for parameter, values in zip(
            encoder.lstm.parameters(), ([1, 0, 2, 3], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]), strict=True
        ):  # torch's rows: i, f, g, o; of a, of h, and the two biases
            parameter.copy_(torch.tensor(values, dtype=torch.float32).view_as(parameter))
    first, second = 0.2, 0.6

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    c = sigmoid(first) * math.tanh(2 * first)
    h = sigmoid(3 * first) * math.tanh(c)
    c2 = sigmoid(1) * c + sigmoid(second + h) * math.tanh(2 * second)
    h2 = sigmoid(3 * second) * math.tanh(c2)
    found = encoder(torch.tensor([[[first], [second]]]))
    assert found.flatten().tolist() == pytest.approx([h, h2], rel=1e-5)


def test_both_directions_are_a_forward_and_a_backward_lstm_side_by_side():
    encoder = build("bilstm", dim=4)
    forward, backward = build("lstm", dim=4), build("lstm", dim=4)
    weights = encoder.lstm.state_dict()
    forward.lstm.load_state_dict({name: x for name, x in weights.items() if not name.endswith("_reverse")})
    backward.lstm.load_state_dict(
        {name.removesuffix("_reverse"): x for name, x in weights.items() if name.endswith("_reverse")}
    )
    a = annotations().double()
    expected = torch.cat([forward(a), backward(a.flip(1)).flip(1)], dim=-1)
    torch.testing.assert_close(encoder(a), expected)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_forget_gates_of_a_region_lstm_begin_open(bidirectional):
    lstm = RegionLSTM(3, dim=4, bidirectional=bidirectional).lstm
    for name, bias in lstm.named_parameters():
        if name.startswith("bias_ih"):
            assert [bool((gate == 1).all()) for gate in bias.chunk(4)] == [False, True, False, False]  # i, f, g, o


def test_self_attention_begins_as_nothing():
    encoder = build_region_encoder(
        RegionEncoderConfig("self_attention", dim=4, heads=2, blocks=3), annotation_dim=DIM, grid=GRID
    )
    assert torch.equal(encoder(annotations()), annotations())


def test_self_attention_by_hand_and_as_1x1_convolutions():
    encoder = build_region_encoder(RegionEncoderConfig("self_attention", dim=1, heads=1), annotation_dim=1, grid=(1, 2))
    block = encoder.blocks[0]
    with torch.no_grad():
        for layer, weight, bias in ((block.query, 0.0, 1.0), (block.value, 2.0, 0.5), (block.output, 3.0, -1.0)):
            layer.weight.fill_(weight)
            layer.bias.fill_(bias)
        block.key.weight.fill_(1.0)
        encoder.gammas[0].fill_(0.5)
    # q = 1 and k = a: scores 0 and ln 3, weights 1/4 and 3/4; v = 2 a + 0.5, of which the mean is 1.5 ln 3 + 0.5.
    found = encoder(torch.tensor([[[0.0], [math.log(3)]]])).flatten().tolist()
    added = 0.5 * (3 * (1.5 * math.log(3) + 0.5) - 1)
    assert found == pytest.approx([added, math.log(3) + added])
    # A linear map of every vector is a 1x1 convolution of the map.
    a = torch.randn(2, 2, 1)
    convolved = torch.nn.functional.conv2d(
        a.transpose(1, 2).unflatten(2, (1, 2)), block.value.weight[..., None, None], block.value.bias
    )
    torch.testing.assert_close(block.value(a), convolved.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("name", ["self_attention", "transformer"])
@pytest.mark.parametrize("positions", ["none", *POSITIONS])
def test_regions_that_look_at_each_other_are_permutation_equivariant_unless_they_know_their_places(name, positions):
    encoder = build(name, positions=positions, dim=4, heads=2, blocks=2)
    a, order = annotations().double(), torch.tensor([3, 0, 4, 1, 5, 2])
    same = torch.allclose(encoder(a[:, order]), encoder(a)[:, order])
    assert same == (positions == "none")


def test_an_lstm_over_the_regions_knows_their_order():
    encoder = build("lstm", dim=4)
    a, order = annotations().double(), torch.tensor([3, 0, 4, 1, 5, 2])
    assert not torch.allclose(encoder(a[:, order])[:, -1], encoder(a)[:, -1])


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_the_transformer_over_the_regions_is_torchs_encoder_after_a_linear_map(norm):
    ours = build("transformer", dim=8, heads=2, blocks=2, norm=norm)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 32, norm_first=norm == "pre", batch_first=True)
    last = torch.nn.LayerNorm(8) if norm == "pre" else None
    theirs = torch.nn.TransformerEncoder(layer, 2, norm=last, enable_nested_tensor=False).double().eval()
    with torch.no_grad():
        for block, copy in zip(ours.blocks, theirs.layers, strict=False):
            own = block.read
            copy.self_attn.in_proj_weight.copy_(torch.cat([own.query.weight, own.key.weight, own.value.weight]))
            copy.self_attn.in_proj_bias.copy_(torch.cat([own.query.bias, torch.zeros(8), own.value.bias]))
            copy.self_attn.out_proj.load_state_dict(own.output.state_dict())
            copy.linear1.load_state_dict(block.mlp[0].state_dict())
            copy.linear2.load_state_dict(block.mlp[-1].state_dict())
            copy.norm1.load_state_dict(block.around_read.norm.state_dict())
            copy.norm2.load_state_dict(block.around_mlp.norm.state_dict())
        if last is not None:
            theirs.norm.load_state_dict(ours.blocks[-1].state_dict())
    a = annotations().double()
    torch.testing.assert_close(ours(a), theirs(ours.project(a)))


def test_dropout_acts_in_the_blocks_of_the_transformer_over_the_regions_in_training_only():
    a = annotations().double()
    for dropout in (0.0, 0.5):
        encoder = build("transformer", dim=8, heads=2, dropout=dropout)
        assert torch.equal(encoder(a), encoder(a))
        encoder.train()
        assert torch.equal(encoder(a), encoder(a)) == (not dropout)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "self_attention", "dim": 6, "heads": 4}, r"heads must divide region_encoder\.dim \(got 4 and 6\)"),
        ({"name": "lstm", "blocks": 2}, "blocks=2 has no meaning with region_encoder.name='lstm'"),
        ({"name": "none", "dim": 64}, "dim=64 has no meaning with region_encoder.name='none'"),
        ({"name": "bilstm", "heads": 2}, "heads=2 has no meaning with region_encoder.name='bilstm'"),
        ({"name": "self_attention", "norm": "post"}, "norm='post' has no meaning with region_encoder.name='self_att"),
        ({"name": "transformer", "dim": 6}, r"heads must divide region_encoder\.dim \(got 8 and 6\)"),
        ({"name": "lstm", "dim": 0}, "dim must be positive"),
    ],
)
def test_settings_that_nothing_would_read_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RegionEncoderConfig(**options)
