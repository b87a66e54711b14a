"""Encoder, region encoder and decoder together: pixels (or stored annotation vectors) and words in, logits out."""

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor, nn

from captioning.models.decoder import Decoder, Output
from captioning.models.encoder import Encoder
from captioning.models.regions import RegionEncoder


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
    def decoder_dtype(self) -> torch.dtype:
        """Type of the decoder's parameters."""
        return next(self.decoder.parameters()).dtype
