"""Every decoder by its name, and how a config becomes one."""

from collections.abc import Callable

from captioning.config import DecoderConfig
from captioning.models.baselines import build_lstm
from captioning.models.decoder import Decoder, build_attention_lstm
from captioning.models.luong import build_luong
from captioning.models.transformer import build_transformer

DECODERS: dict[str, Callable[[DecoderConfig, int, int], Decoder]] = {
    "attention_lstm": build_attention_lstm,
    "lstm": build_lstm,
    "luong": build_luong,
    "transformer": build_transformer,
}
"""Name -> builder from (config, vocabulary_size, annotation_dim)."""


def build_decoder(config: DecoderConfig, *, vocabulary_size: int, annotation_dim: int) -> Decoder:
    """The decoder of a config.

    Raises:
        ValueError: the alignment does not fit the dimensions.
    """
    return DECODERS[config.name](config, vocabulary_size, annotation_dim)
