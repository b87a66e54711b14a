"""Run a model over a split and find out what its attention does.

Nothing here changes the model's weights and mode, or any random state but its own.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor, nn

from captioning.config import HardConfig
from captioning.data import ANNOTATIONS, Batch, CaptionData, Collate, resizing
from captioning.diagnostics import (
    apart,
    as_many_at_random,
    gradient_signal_to_noise,
    histories,
    means_by,
    movement,
    mutual_information,
    normalised_entropy,
    share_off_argmax,
    shuffled_mutual_information,
)
from captioning.findings import Diagnosis
from captioning.hard_objective import hard_loss
from captioning.listening import attention_of, forced, replacements
from captioning.losses import word_nll
from captioning.model_config import View
from captioning.models.attention import Attention, Look, is_hard, looking
from captioning.models.captioner import CaptioningModel
from captioning.models.decoder import Output
from captioning.models.multihead import MultiHead
from captioning.reward_baselines import build_baseline
from captioning.tokenization import tokenize
from captioning.vocabulary import Vocabulary
from captioning.word_classes import CLASSES, NOUN, classify

CAPTIONS = 5
"""Captions of an image that are looked at, at most."""
GRADIENTS = 8
"""From so many gradients, of equally many images each, their signal to noise is estimated."""
STEP = 8
"""Images of the training step whose signal to noise is reported: a step of twice as many has twice as much."""
JUDGE = HardConfig(baseline="leave_one_out", samples=3, lambda_e=0.0, expectation_probability=0.0)
"""The estimator by which hard models are compared, however each was trained."""


class _Words(NamedTuple):
    """The words of a split, caption by caption."""

    alphas: Float[Tensor, "W L"]
    ids: Integer[Tensor, " W"]
    captions: Integer[Tensor, " W"]
    images: Integer[Tensor, " W"]
    positions: Integer[Tensor, " W"]


def diagnose(
    model: CaptioningModel,
    data: CaptionData,
    indices: Sequence[int],
    vocabulary: Vocabulary,
    *,
    batch_size: int = 32,
    location: Literal["argmax", "sample", "expected"] = "argmax",
    scale: int = 0,
    seed: int = 0,
) -> Diagnosis:
    """Teacher-force a model over the captions of some images, as it is and under the listening test.

    Args:
        model: it is run in evaluation mode.
        data: pixels of any size, or annotation vectors of this model's encoder.
        indices: which images, two or more.
        vocabulary: the model's words (not the file's).
        batch_size: images at once; attention is exchanged among them.
        location: where hard attention looks.
        scale: which of the encoder's sizes is looked at, by that scale's decoder.
        seed: of the exchange, of the shuffles and of sampled locations.

    Raises:
        ValueError: fewer than two images.
    """
    check_enough(indices)
    generator = torch.Generator().manual_seed(seed)
    nll: dict[str, float] = {}
    parts: list[_Words] = []
    words = 0
    decoder, grid = model.decoders[scale], model.encoder.grids[scale]
    look = Look(location, generator=torch.Generator(model.device).manual_seed(seed))
    hard = is_hard(decoder)
    places = hard and location != "expected"
    with torch.no_grad(), _evaluating(model), looking(decoder, look):
        for batch in caption_batches(model, data, indices, vocabulary, batch_size=batch_size, scale=scale):
            a, targets = model.annotate(batch.images.to(model.device)), batch.words.to(model.device)
            output = decoder(a, targets)
            words += len(output.targets)
            _add(nll, "as it is", output)
            if output.alphas is None:
                continue
            parts.append(_words_of(output, output.alphas, parts[-1] if parts else None))
            if attention_of(decoder) is not None:
                looked = _looked(output, output.alphas)
                for name, alphas in replacements(looked, output.mask, grid, generator).items():
                    with forced(decoder, alphas):
                        _add(nll, name, decoder(a, targets))
    nll = {name: total / words for name, total in nll.items()}
    own = nll.pop("as it is")
    if not parts:
        return Diagnosis(len(indices), words, own)
    listening = {name: value - own for name, value in nll.items()} or None
    joined = _Words(*(torch.cat(x) for x in zip(*parts, strict=True)))
    return Diagnosis(
        len(indices),
        words,
        own,
        hard=hard,
        heads=max((part.heads for part in decoder.modules() if isinstance(part, MultiHead)), default=1),
        listening=listening,
        **_numbers(joined, vocabulary, generator, places=places),
    )


def check_enough(indices: Sequence[int]) -> None:
    """Attention is exchanged between images.

    Raises:
        ValueError: there are fewer than two.
    """
    if len(indices) < 2:
        raise ValueError(f"diagnosing attention needs two images or more (got {len(indices)})")


def caption_batches(
    model: CaptioningModel,
    data: CaptionData,
    indices: Sequence[int],
    vocabulary: Vocabulary,
    *,
    batch_size: int,
    scale: int = 0,
) -> Iterator[Batch]:
    """Images with up to CAPTIONS captions each, in the words of the model; batches of equal size, none of one image."""
    resize = resizing(model.encoder.sides[scale], model.encoder.resample)
    longest = data.longest_caption()  # references are cut as what is trained on is
    collate = Collate(min(CAPTIONS, max(len(data.captions_of(i)) for i in indices)))
    count = min(-(-len(indices) // batch_size), max(len(indices) // 2, 1))
    for part in np.array_split(np.asarray(indices), count):
        items = []
        for i in part.tolist():
            image = data.image(i, View(scale, mirrored=False))
            captions = [np.asarray(vocabulary.encode(tokenize(x)[:longest])) for x in data.references(i)[:CAPTIONS]]
            items.append((image if data.kind == ANNOTATIONS else resize(image), captions, i, False))
        yield collate(items)


def _add(nll: dict[str, float], name: str, output: Output) -> None:
    total = F.cross_entropy(output.logits.float(), output.targets, reduction="sum").item()
    nll[name] = nll.get(name, 0.0) + total


def _looked(output: Output, alphas: Float[Tensor, "N K T L"]) -> Float[Tensor, "N K T L"]:
    """Where the decoder looked: its weights, or those of its hard locations alone, which sum to one."""
    if output.locations is None:
        return alphas
    places = output.locations if output.locations.dim() == 4 else output.locations.unsqueeze(-1)
    weights = alphas.gather(-1, places).clamp(min=torch.finfo(alphas.dtype).tiny)
    return torch.zeros_like(alphas).scatter(-1, places, weights / weights.sum(dim=-1, keepdim=True))


def _words_of(output: Output, alphas: Float[Tensor, "N K T L"], before: _Words | None) -> _Words:
    """The real words of a batch, whose captions and images are numbered on from those `before`."""
    images, slots, positions = output.mask.nonzero().cpu().unbind(dim=1)
    captions = images * output.mask.shape[1] + slots
    if before is not None:
        images, captions = images + before.images[-1] + 1, captions + before.captions[-1] + 1
    return _Words(alphas[output.mask].float().cpu(), output.targets.cpu(), captions, images, positions)


def _numbers(words: _Words, vocabulary: Vocabulary, generator: torch.Generator, *, places: bool) -> dict[str, Any]:
    """The fields of a Diagnosis that follow from the weights and the words; `places`: from which places are drawn."""
    classes = torch.tensor([CLASSES.index(name) for name in classify(vocabulary.words)])[words.ids]
    entropies = normalised_entropy(words.alphas)
    by_class, sizes = means_by(entropies, classes, len(CLASSES))
    by_position, reached = means_by(entropies, words.positions, int(words.positions.max()) + 1)
    nouns = classes == CLASSES.index(NOUN)
    others = as_many_at_random(words.captions, nouns, generator)
    again, other, elsewhere = apart(*(x[nouns] for x in (*words, histories(words.ids, words.captions))))
    present = [i for i, size in enumerate(sizes) if size]
    return {
        "locations": words.alphas.shape[-1],
        "entropy": entropies.mean().item(),
        "largest": words.alphas.amax(dim=-1).mean().item(),
        "off_argmax": share_off_argmax(words.alphas) if places else None,
        "mutual_information": mutual_information(words.alphas, words.ids),
        "mutual_information_null": shuffled_mutual_information(words.alphas, words.ids, generator),
        "movement_nouns": movement(words.alphas, words.captions, nouns),
        "movement_words": movement(words.alphas, words.captions, others),
        "apart_one_noun": again,
        "apart_two_nouns": other,
        "apart_two_images": elsewhere,
        "entropy_by_class": {CLASSES[i]: by_class[i] for i in present},
        "share_of_class": {CLASSES[i]: sizes[i] / len(words.ids) for i in present},
        "entropy_by_position": [x for x, n in zip(by_position, reached, strict=True) if n >= reached[0] / 10],
    }


def signal_to_noise(
    model: CaptioningModel,
    data: CaptionData,
    indices: Sequence[int],
    vocabulary: Vocabulary,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    scale: int = 0,
    seed: int = 0,
) -> float | None:
    """`gradient_signal_to_noise` of the attention's parameters in a training step of STEP images, from GRADIENTS parts.

    The variance of a mean falls with the number of its images, so that any number of images serves.

    Args:
        model: whose attention learns.
        data: as for `diagnose`.
        indices: which images.
        vocabulary: the model's words (not the file's).
        loss: of annotation vectors (N, L, D) and words (N, K, S); None: `nll_loss` of the model.
        scale: as for `diagnose`.
        seed: of dropout and sampled locations.

    Returns:
        None for a decoder without an attention that learns, and for fewer than four images.
    """
    size = max(len(indices) // GRADIENTS, 2)
    chosen = indices[: len(indices) // size * size]
    if len(chosen) < 2 * size:
        return None
    batches = caption_batches(model, data, chosen, vocabulary, batch_size=size, scale=scale)
    subject = (model, batches, loss or partial(nll_loss, model))
    found = attention_gradients(*subject, scale=scale, seed=seed)
    return None if found is None else gradient_signal_to_noise(found) * STEP / size


def nll_loss(model: CaptioningModel, a: Float[Tensor, "N L D"], words: Integer[Tensor, "N K S"]) -> Float[Tensor, ""]:
    """The NLL per word; for hard attention a value whose gradient is that of minus the bound, eq. 10, by JUDGE."""
    if not is_hard(model):
        output = model(a, words)
        return word_nll(output.logits, output.targets).mean()
    baseline = build_baseline(JUDGE, hidden_dim=0)
    total, count, _ = hard_loss(model, a, words, JUDGE, baseline)
    return total / count


def attention_gradients(
    model: CaptioningModel,
    batches: Iterable[Batch],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    scale: int = 0,
    seed: int = 0,
) -> Float[Tensor, "B P"] | None:
    """The gradients of a loss, one per batch, for the parameters of the attention.

    All but the encoder is in training mode, so that dropout and sampled locations make the noise that training has.

    Args:
        model: whose attention learns.
        batches: images of that scale and words.
        loss: of the encoder's annotation vectors (N, L, D) and words (N, K, S).
        scale: whose decoder's attention is asked.
        seed: of all that is random.

    Returns:
        A row per batch; None for a decoder without an attention that learns.
    """
    attention = getattr(model.decoders[scale], "attention", None)
    parameters = [p for p in attention.parameters() if p.requires_grad] if isinstance(attention, Attention) else []
    if not parameters:
        return None
    found = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), _evaluating(model):
        torch.manual_seed(seed)
        model.train()
        model.encoder.eval()
        for batch in batches:
            images = batch.images.to(model.device)
            with torch.no_grad():
                a = model.encoder(images) if images.dim() == 4 else images
            gradients = torch.autograd.grad(loss(a, batch.words.to(model.device)), parameters, materialize_grads=True)
            found.append(torch.cat([g.flatten() for g in gradients]).cpu())  # some devices know no float64
    return torch.stack(found)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards every module has its own mode again, whatever was set within."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was in before:
            module.training = was
