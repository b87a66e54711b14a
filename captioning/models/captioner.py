"""Encoder, region encoder and decoder together: pixels (or stored annotation vectors) and words in, logits out."""

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor, nn

from captioning.config import DecoderConfig, EncoderConfig, RegionEncoderConfig
from captioning.models.attention import check_looks
from captioning.models.decoder import Decoder, Output
from captioning.models.encoder import Encoder, build_encoder
from captioning.models.regions import RegionEncoder, build_region_encoder
from captioning.models.registry import build_decoder


class CaptioningModel(nn.Module):
    """The whole network.

    Args:
        encoder: photo -> annotation vectors.
        regions: annotation vectors -> annotation vectors.
        decoder: annotation vectors and words -> next words.
        further: decoders of the encoder's further scales, one each: a picture of another size is another view, and
            together they know more than any (`SearchConfig.multi_scale`).
    """

    def __init__(self, encoder: Encoder, regions: RegionEncoder, decoder: Decoder, further: Sequence[Decoder] = ()):
        super().__init__()
        self.encoder = encoder
        self.regions = regions
        self.decoder = decoder
        self.further = nn.ModuleList(further)

    @property
    def decoders(self) -> tuple[Decoder, ...]:
        """One for each of the encoder's scales."""
        return (self.decoder, *cast(Iterable[Decoder], self.further))

    def decoder_of(self, a: Float[Tensor, "N L D"]) -> Decoder:
        """The decoder of the scale whose grid has these L locations.

        Raises:
            ValueError: there is none.
        """
        if not self.further:
            return self.decoder
        for (h, w), decoder in zip(self.encoder.grids, self.decoders, strict=True):
            if h * w == a.shape[1]:
                return decoder
        raise ValueError(f"{a.shape[1]} annotation vectors are of no grid of the encoder: {self.encoder.grids}")

    def annotate(self, images: Shaped[Tensor, "N ..."]) -> Float[Tensor, "N L D"]:
        """Annotation vectors of N images, given as uint8 pixels (N, 3, S, S) or as stored vectors (N, L, D)."""
        a = self.encoder(images) if images.dim() == 4 else images
        return self.regions(a.to(self.decoder_dtype))

    def forward(
        self,
        images: Shaped[Tensor, "N ..."],
        words: Integer[Tensor, "N K S"] | Callable[[Tensor], tuple[Tensor, Tensor]],
    ) -> Output:
        """Teacher forcing, see `Decoder.forward`.

        Args:
            images: as for `annotate`.
            words: given, or made from the annotation vectors: (N, L, D) -> the same, perhaps in another order, and the
                words for them. So words that the model draws need no second run of the encoder.
        """
        a = self.annotate(images)
        a, words = (a, words) if isinstance(words, Tensor) else words(a)
        return self.decoder_of(a)(a, words)

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.decoder.parameters()).device

    @property
    def decoder_dtype(self) -> torch.dtype:
        """Type of the decoder's parameters."""
        return next(self.decoder.parameters()).dtype


NO_REGIONS = RegionEncoderConfig()


def build_model(
    encoder: EncoderConfig,
    decoder: DecoderConfig,
    vocabulary_size: int,
    *,
    region_encoder: RegionEncoderConfig = NO_REGIONS,
    encoder_state: dict[str, Tensor] | None = None,
    max_parameters: int | None = None,
) -> tuple[CaptioningModel, EncoderConfig]:
    """A new model, and its encoder's config with layer and grid filled in.

    Args:
        encoder: which CNN; its weights come from `encoder_state` if that is given.
        decoder: which language model.
        vocabulary_size: V.
        region_encoder: what lies between the two; by default nothing.
        encoder_state: weights of the cut network, from a data file or a checkpoint.
        max_parameters: how many parameters there may be beside the encoder's; None sets no limit.

    Raises:
        ValueError: what `build_encoder` raises; more parameters than there may be, found before memory is taken for
            them.
    """
    cnn, encoder = build_encoder(encoder, state=encoder_state)
    if max_parameters is not None:
        with torch.device("meta"):
            regions, decoders = _parts(cnn, region_encoder, decoder, vocabulary_size)
        count = sum(x.numel() for part in (regions, *decoders) for x in part.parameters())
        if count > max_parameters:
            raise ValueError(f"its config describes {count:,} parameters, its file has {max_parameters:,}")
    regions, decoders = _parts(cnn, region_encoder, decoder, vocabulary_size)
    return CaptioningModel(cnn, regions, decoders[0], decoders[1:]), encoder


def _parts(
    cnn: Encoder, region_encoder: RegionEncoderConfig, decoder: DecoderConfig, vocabulary_size: int
) -> tuple[RegionEncoder, list[Decoder]]:
    """The region encoder, and a decoder for each of the CNN's scales."""
    if len(cnn.sides) > 1 and region_encoder.positions != "none":
        raise ValueError(
            f"region_encoder.positions={region_encoder.positions!r} needs a grid of one size: leave encoder.scales out"
        )
    if decoder.attention == "hard":
        check_looks(decoder.glimpses, decoder.window, cnn.grids)
    regions = build_region_encoder(region_encoder, annotation_dim=cnn.dim, grid=cnn.grid)
    sizes = {"vocabulary_size": vocabulary_size, "annotation_dim": regions.dim}
    return regions, [build_decoder(decoder, **sizes) for _ in cnn.sides]
