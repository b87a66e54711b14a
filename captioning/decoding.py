"""Search: greedy, sampling and batched beam search over `Decoder.step`, whatever the decoder is."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from captioning.config import SearchConfig
from captioning.models.attention import Look, is_hard, looking
from captioning.models.decoder import Decoder, Step
from captioning.models.ensemble import EnsembleDecoder
from captioning.models.layout import laid_out
from captioning.vocabulary import END, PAD, START, UNK

Vectors = Float[Tensor, "N L D"] | Sequence[Float[Tensor, "N _ _"]]
"""Annotation vectors of N images; those of each decoder, if there are several."""

NEVER = (PAD, START, UNK)
"""Words that no search ever says."""


@dataclass(frozen=True)
class Hypothesis:
    """One caption as ids, with what the model thought and where it looked at each of its steps.

    Args:
        ids: words, without START; END is the last one if `finished`.
        log_probs: the model's log p of each id (its own: no temperature, nothing renormalised).
        alphas: (T, L) attention at each id, None for a model without.
        betas: (T,) gate at each id, None likewise.
        locations: (T, G) where hard attention looked at each id: at as many as it has glimpses, with several views and
            in ensembles at those of all; None for any other, and for the mean context.
        finished: END was reached; otherwise this is the best that `max_length` allowed.
        score: what hypotheses are ranked by: sum of log_probs / T ** length_penalty.
    """

    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    alphas: Float[Tensor, "T L"] | None
    betas: Float[Tensor, " T"] | None
    locations: Integer[Tensor, "T G"] | None
    finished: bool
    score: float


class _Trace(NamedTuple):
    """One step of N images with B rows each, which found C candidates for the next words.

    Candidate c continues row `parents[c]`; `slots[b]` is the candidate that became row b of the next step.
    """

    parents: Integer[Tensor, "N C"]
    words: Integer[Tensor, "N C"]
    log_probs: Float[Tensor, "N C"]
    slots: Integer[Tensor, "N B"]
    alphas: Float[Tensor, "N B L"] | None
    betas: Float[Tensor, "N B"] | None
    locations: Integer[Tensor, "N B G"] | None

    def cpu(self) -> "_Trace":
        parents, words, log_probs, slots = (x.cpu() for x in self[:4])
        alphas, betas, locations = (None if x is None else x.cpu() for x in self[4:])
        return _Trace(parents, words, log_probs, slots, alphas, betas, locations)


class _Ending(NamedTuple):
    """Where a hypothesis ends: with candidate `slot` of trace `time`."""

    score: float
    time: int
    slot: int
    finished: bool


def search(
    decoder: Decoder | Sequence[Decoder],
    a: Vectors,
    config: SearchConfig,
    *,
    generator: torch.Generator | None = None,
) -> list[list[Hypothesis]]:
    """Caption N images: by beam search, or by sampling when the config says so.

    Args:
        decoder: any decoder, in evaluation mode; several are an `EnsembleDecoder`.
        a: annotation vectors; those of each, if there are several decoders.
        config: how.
        generator: of sampled words and locations, on the device of `a`.

    Returns:
        For every image `config.num_captions` hypotheses, best first (fewer if the vocabulary has no more).

    Raises:
        ValueError: `config.location` for a decoder that has no hard attention.
    """
    if isinstance(decoder, Decoder):
        decoder = laid_out(decoder)
    else:
        twins = {each: laid_out(each) for each in decoder}  # one with several views comes several times
        decoder = [twins[each] for each in decoder]
    if isinstance(decoder, Decoder) and config.paths > 1:
        decoder, a = [decoder], [cast(Tensor, a)]
    if not isinstance(decoder, Decoder):
        alone = len(decoder) * config.paths == 1
        decoder, a = (decoder[0], a[0]) if alone else (EnsembleDecoder(decoder, paths=config.paths), a)
    if config.location != "argmax" and not is_hard(decoder):
        raise ValueError(f"location={config.location!r} needs a model with hard attention")
    with torch.no_grad(), looking(decoder, Look(config.location, generator=generator)):
        if config.sample:
            return sample(decoder, a, config, generator=generator)
        return [found[: config.num_captions] for found in beam_search(decoder, a, config)]


def greedy(decoder: Decoder, a: Vectors, config: SearchConfig) -> list[list[Hypothesis]]:
    """The likeliest word at every step; one hypothesis per image."""
    best = _roll_out(decoder, a, config, rows_per_image=1, choose=lambda log_p: log_p.argmax(dim=-1))
    return _endings(*best, config)


def sample(
    decoder: Decoder, a: Vectors, config: SearchConfig, *, generator: torch.Generator | None = None
) -> list[list[Hypothesis]]:
    """Words drawn from p(y_t)^(1/temperature), cut to the top k and to the nucleus top p (Holtzman et al., 2020)."""
    choose = _drawn(config, generator)
    return _endings(*_roll_out(decoder, a, config, rows_per_image=config.num_captions, choose=choose), config)


def draw_words(
    decoder: Decoder, a: Vectors, config: SearchConfig, *, generator: torch.Generator | None = None
) -> Integer[Tensor, "N K S"]:
    """The captions of `sample` as words to be fed back: framed by START and END, padded with PAD.

    One that did not end has all the `max_length + 1` words that were drawn, and no END.
    """
    with torch.no_grad():
        choose = _drawn(config, generator)
        _, history = _roll_out(decoder, a, config, rows_per_image=config.num_captions, choose=choose)
    ended = (history == END).cumsum(dim=-1) - (history == END).int() > 0
    words = torch.cat([torch.full_like(history[:, :1], START), history.masked_fill(ended, PAD)], dim=-1)
    return words.unflatten(0, (len(_one_of(a)), -1))


def sayable(logits: Float[Tensor, "W V"]) -> Float[Tensor, "W V"]:
    """Logits of the distribution that is drawn from: the words that no search ever says are impossible."""
    return logits.index_fill(-1, torch.tensor(NEVER, device=logits.device), -torch.inf)


def _drawn(config: SearchConfig, generator: torch.Generator | None) -> Callable[[Tensor], Tensor]:
    """How `sample` chooses words."""
    temperature = min(max(config.temperature, 1e-30), 1e30)  # in float32 others would be 0 or infinite

    def choose(log_p: Float[Tensor, "R V"]) -> Integer[Tensor, " R"]:
        below_best = log_p - log_p.amax(dim=-1, keepdim=True)  # so that no temperature makes all of them infinite
        p = nucleus((below_best / temperature).softmax(dim=-1), top_k=config.top_k, top_p=config.top_p)
        exact = torch.float32 if p.device.type == "mps" else torch.float64  # which Apple's devices do not know
        below = p.to(exact).cumsum(dim=-1)  # torch.multinomial draws a random number per word: that takes longer than p
        u = torch.rand(len(p), 1, dtype=below.dtype, device=p.device, generator=generator) * below[:, -1:]
        return torch.searchsorted(below, u, right=True).squeeze(-1).clamp(max=p.shape[-1] - 1)

    return choose


def nucleus(p: Float[Tensor, "R V"], *, top_k: int, top_p: float) -> Float[Tensor, "R V"]:
    """Keep the k likeliest words (0: all), and of them the fewest whose probabilities reach top_p; renormalise."""
    if not top_k and top_p >= 1:
        return p
    ordered, order = p.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    keep = before < top_p if top_p < 1 else torch.ones_like(p, dtype=torch.bool)
    if top_k:
        keep[:, top_k:] = False
    kept = torch.zeros_like(p).scatter(-1, order, ordered * keep)
    return kept / kept.sum(dim=-1, keepdim=True)


def _roll_out(
    decoder: Decoder,
    a: Vectors,
    config: SearchConfig,
    *,
    rows_per_image: int,
    choose: Callable[[Tensor], Tensor],
) -> tuple[list[_Trace], Integer[Tensor, "R T"]]:
    """One word after the other, `choose`n from the allowed log p; rows never branch. Returns traces and words."""
    n, k, device = len(_one_of(a)), rows_per_image, _one_of(a).device
    memory = decoder.prepare(a)
    state = decoder.initial_state(memory, k)
    words = torch.full((n * k,), START, device=device)
    history = words.new_empty(n * k, 0)
    same = torch.arange(k, device=device).expand(n, k)
    traces: list[_Trace] = []
    for _ in range(config.max_length + 1):
        step = decoder.step(words, state, memory)
        exact = torch.promote_types(step.logits.dtype, torch.float32)  # what is drawn from is what is learned from
        log_p = step.logits.to(exact).log_softmax(dim=-1)
        words = choose(_forbid(log_p, history, config))
        spent = log_p.gather(-1, words.unsqueeze(-1)).view(n, k)
        traces.append(_Trace(same, words.view(n, k), spent, same, *_looks(step, n)))
        state, history = step.state, torch.cat([history, words.unsqueeze(-1)], dim=-1)
        if bool((history == END).any(dim=-1).all()):
            break
    return traces, history


def _endings(traces: list[_Trace], history: Integer[Tensor, "R T"], config: SearchConfig) -> list[list[Hypothesis]]:
    """What a roll-out said, up to its first END."""
    n, k = traces[0].words.shape
    endings = []
    totals = torch.stack([trace.log_probs for trace in traces], dim=-1).tolist()
    for i, rows in enumerate(history.view(n, k, -1).tolist()):
        ends = [row.index(END) if END in row else -1 for row in rows]
        times = [end if end >= 0 else config.max_length - 1 for end in ends]
        scores = [_rank(sum(totals[i][j][: time + 1]), time + 1, config) for j, time in enumerate(times)]
        endings.append([_Ending(scores[j], times[j], j, ends[j] >= 0) for j in range(k)])
    return _hypotheses(traces, endings)


def beam_search(decoder: Decoder, a: Vectors, config: SearchConfig) -> list[list[Hypothesis]]:
    """Beam search over N images x `beam_size` hypotheses at once.

    Finished hypotheses leave the beam, which stays full. An image is done when no hypothesis that is still open can
    beat its `beam_size` best finished ones; its result depends on no other image, unless locations are sampled, for
    which all images of a batch share one generator.

    Returns:
        For every image up to `beam_size` hypotheses, best first. Where END came less often than `num_captions` asks,
        the best open ones follow, marked.

    Raises:
        ValueError: the probabilities are no numbers.
    """
    n, width, device = len(_one_of(a)), config.beam_size, _one_of(a).device
    memory = decoder.prepare(a)
    state = decoder.initial_state(memory, width)
    words = torch.full((n * width,), START, device=device)
    history = words.new_empty(n * width, 0)
    totals = _one_of(a).new_full((n, width), -torch.inf)
    totals[:, 0] = 0  # all rows are the same before the first word: only one may branch
    first_row = torch.arange(n, device=device).unsqueeze(-1) * width
    traces: list[_Trace] = []
    finished: list[list[_Ending]] = [[] for _ in range(n)]
    done = [False] * n
    for t in range(config.max_length + 1):
        step = decoder.step(words, state, memory)
        log_p = _forbid(step.logits.log_softmax(dim=-1), history, config).to(totals.dtype)
        # At most `width` candidates end, so that twice as many hold enough others to keep the beam full.
        likely, ids = log_p.topk(min(2 * width, log_p.shape[-1]), dim=-1)
        candidates = totals.unsqueeze(-1) + likely.unflatten(0, (n, width))
        best, index = candidates.flatten(1).topk(min(2 * width, candidates[0].numel()), dim=-1)
        parents, chosen = index // likely.shape[-1], ids.view(n, -1).gather(1, index)
        if t < config.max_length:
            totals, slots = best.masked_fill(chosen == END, -torch.inf).topk(width, dim=-1)
        rows = first_row + parents
        traces.append(_Trace(parents, chosen, likely.view(n, -1).gather(1, index), slots, *_looks(step, n)))
        _collect(finished, done, best, traces[-1], t, config)
        _mark_done(finished, done, totals, config)
        if all(done):
            break
        rows, words = rows.gather(1, slots).flatten(), chosen.gather(1, slots).flatten()
        state = _rows_of(step.state, rows)
        history = torch.cat([history[rows], words.unsqueeze(-1)], dim=-1)
    _add_open(finished, traces, totals, config)
    if not all(finished):
        raise ValueError(
            f"image {finished.index([]) + 1} of {n} in its batch: no word has a probability; weights or annotation "
            "vectors are broken"
        )
    return [found[:width] for found in _hypotheses(traces, finished)]


def _one_of(a: Vectors) -> Float[Tensor, "N _ _"]:
    """Any of an ensemble's annotation vectors: they are of the same images, on the same device."""
    return a if isinstance(a, Tensor) else a[0]


def _rows_of(state: Any, rows: Integer[Tensor, " R"]) -> Any:
    """The state with which the rows go on; an ensemble has a list of states."""
    if isinstance(state, list):
        return [_rows_of(own, rows) for own in state]
    return type(state)(*(x[rows] for x in state))


def _collect(
    finished: list[list[_Ending]],
    done: list[bool],
    best: Float[Tensor, "N C"],
    trace: _Trace,
    time: int,
    config: SearchConfig,
) -> None:
    """Note which candidates end. They must be among the `beam_size` best, so that a beam of one is greedy."""
    width = config.beam_size
    ends = (trace.words[:, :width] == END) & best[:, :width].isfinite()
    for i, slot in ends.nonzero().tolist():
        if not done[i]:
            finished[i].append(_Ending(_rank(float(best[i, slot]), time + 1, config), time, slot, True))


def _mark_done(
    finished: list[list[_Ending]], done: list[bool], totals: Float[Tensor, "N B"], config: SearchConfig
) -> None:
    """An image is done when its best open row, were it to gain no more loss, could not enter its finished ones."""
    for i, total in enumerate(totals.amax(dim=-1).tolist()):
        attainable = _rank(total, config.max_length + 1, config)  # log p only falls; the longest has the mildest rank
        scores = sorted((ending.score for ending in finished[i]), reverse=True)
        beaten = len(scores) >= config.beam_size and attainable <= scores[config.beam_size - 1]
        done[i] = done[i] or beaten or total == -torch.inf


def _add_open(
    finished: list[list[_Ending]], traces: list[_Trace], totals: Float[Tensor, "N B"], config: SearchConfig
) -> None:
    """Where fewer finished than were asked for, and at least one must come out, the best open rows stand in."""
    time = min(config.max_length, len(traces)) - 1
    for i, endings in enumerate(finished):
        lacking = max(config.num_captions - len(endings), 0)
        for total, row in zip(*(x.tolist() for x in totals[i].topk(min(lacking, config.beam_size))), strict=True):
            if total > -torch.inf:
                endings.append(_Ending(_rank(total, time + 1, config), time, int(traces[time].slots[i, row]), False))


def _by_score(ending: _Ending) -> tuple[bool, float]:
    """Finished ones first, the best first."""
    return not ending.finished, -ending.score


def _rank(total: float, length: int, config: SearchConfig) -> float:
    """The rank log p / length ** length_penalty; Wu et al. (2016), section 7, without their constant."""
    return total / length**config.length_penalty


def _forbid(log_p: Float[Tensor, "R V"], history: Integer[Tensor, "R t"], config: SearchConfig) -> Float[Tensor, "R V"]:
    """In place: the special words become impossible, and those that would repeat an n-gram of the row's history."""
    log_p[:, NEVER] = -torch.inf
    n, t = config.no_repeat_ngram, history.shape[1]
    if 0 < n <= t:
        ngrams = history.unfold(1, n, 1)
        last = history[:, t - n + 1 :]
        row, place = (ngrams[..., :-1] == last.unsqueeze(1)).all(dim=-1).nonzero(as_tuple=True)
        log_p[row, ngrams[row, place, -1]] = -torch.inf
    return log_p


def _looks(step: Step, images: int) -> Iterator[Any]:
    """A step's alphas, betas and locations by image."""
    location = step.location
    if location is not None and location.dim() == 1:
        location = location.unsqueeze(-1)  # one look
    return (None if x is None else x.unflatten(0, (images, -1)) for x in (step.alpha, step.beta, location))


def _hypotheses(traces: list[_Trace], endings: list[list[_Ending]]) -> list[list[Hypothesis]]:
    """Follow every ending back to its first word, best first."""
    on_cpu = [trace.cpu() for trace in traces]
    return [
        [_backtrack(on_cpu, i, ending) for ending in sorted(found, key=_by_score)] for i, found in enumerate(endings)
    ]


def _backtrack(traces: list[_Trace], image: int, ending: _Ending) -> Hypothesis:
    ids: list[int] = []
    log_probs: list[float] = []
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    locations: list[Tensor] = []
    slot = ending.slot
    for t in range(ending.time, -1, -1):
        trace = traces[t]
        row = int(trace.parents[image, slot])
        ids.append(int(trace.words[image, slot]))
        log_probs.append(float(trace.log_probs[image, slot]))
        if trace.alphas is not None:
            alphas.append(trace.alphas[image, row])
        if trace.betas is not None:
            betas.append(trace.betas[image, row])
        if trace.locations is not None:
            locations.append(trace.locations[image, row])
        slot = int(traces[t - 1].slots[image, row]) if t else 0
    return Hypothesis(
        ids=tuple(reversed(ids)),
        log_probs=tuple(reversed(log_probs)),
        alphas=torch.stack(alphas[::-1]) if alphas else None,
        betas=torch.stack(betas[::-1]) if betas else None,
        locations=torch.stack(locations[::-1]) if locations else None,
        finished=ending.finished,
        score=ending.score,
    )
