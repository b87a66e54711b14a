"""What lies between the CNN and the decoder: one vector per place stays, and positions tell places."""

import math
from typing import get_type_hints

import pytest
import torch

from captioning.config import RegionEncoderConfig
from captioning.models.regions import POSITIONS, REGION_ENCODERS, build_region_encoder, sinusoids

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
    assert encoder(annotations()) is not None
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
