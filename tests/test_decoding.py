"""Searches over small random decoders, compared with brute force and with each other, in double precision."""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from captioning import decoding
from captioning.config import DecoderConfig, SearchConfig
from captioning.decoding import beam_search, draw_words, greedy, nucleus, sample, sayable, search
from captioning.models.decoder import Decoder, Step
from captioning.models.registry import build_decoder
from captioning.vocabulary import END, PAD, START, UNK


class TableState(NamedTuple):
    word: Tensor


class TableDecoder(Decoder):
    """p(next | last word) from a table: a model whose best captions can be worked out by hand."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.table = table.double()

    def prepare(self, a):
        return a

    def initial_state(self, memory, rows_per_image=1):
        return TableState(torch.zeros(len(memory) * rows_per_image, dtype=torch.long))

    def step(self, word, state, memory):
        return Step(self.table[word].log(), TableState(word), None, None)


def small_decoder(seed: int = 0, vocabulary: int = 8, scale: float = 1.0) -> Decoder:
    torch.manual_seed(seed)
    config = DecoderConfig(embedding_dim=6, hidden_dim=6, attention_dim=6, dropout=0.0)
    decoder = build_decoder(config, vocabulary_size=vocabulary, annotation_dim=5).double().eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    return decoder


def annotations(n: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(n, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def brute_force(decoder: Decoder, a: Tensor, vocabulary: int, config: SearchConfig) -> list[tuple[float, tuple]]:
    """Every caption of at most max_length words that ends with END, with its score, best first."""
    allowed = [w for w in range(vocabulary) if w not in (PAD, START, UNK, END)]
    found = []
    for length in range(config.max_length + 1):
        for words in itertools.product(allowed, repeat=length):
            output = decoder(a, torch.tensor([[[START, *words, END]]]))
            log_p = output.logits.log_softmax(-1).gather(-1, output.targets.unsqueeze(-1)).sum()
            found.append((float(log_p) / (length + 1) ** config.length_penalty, (*words, END)))
    return sorted(found, reverse=True)


def repeats(words, n):
    ngrams = list(zip(*(words[i:] for i in range(n)), strict=False))
    return len(set(ngrams)) < len(ngrams)


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("n", [0, 1, 2])
def test_a_wide_beam_finds_what_brute_force_finds(seed, length_penalty, n):
    decoder, a = small_decoder(seed, vocabulary=7), annotations(1, seed)
    config = SearchConfig(
        beam_size=200, max_length=4, length_penalty=length_penalty, num_captions=20, no_repeat_ngram=n
    )
    allowed = [found for found in brute_force(decoder, a, 7, config) if not repeats(found[1], n)]
    expected = allowed[:20]
    found = search(decoder, a, config)[0]
    assert [h.ids for h in found] == [ids for _, ids in expected]
    assert [h.score for h in found] == pytest.approx([score for score, _ in expected], rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_beam_of_one_equals_greedy(seed):
    decoder, a = small_decoder(seed), annotations(6, seed)
    config = SearchConfig(beam_size=1, max_length=6)
    for beam, walk in zip(beam_search(decoder, a, config), greedy(decoder, a, config), strict=True):
        assert beam[0].ids == walk[0].ids
        assert beam[0].finished == walk[0].finished
        assert beam[0].log_probs == pytest.approx(walk[0].log_probs)
        torch.testing.assert_close(beam[0].alphas, walk[0].alphas)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_a_batch_equals_its_images_one_by_one(n):
    decoder, a = small_decoder(3), annotations(7)
    config = SearchConfig(beam_size=4, max_length=8, num_captions=4, no_repeat_ngram=n)
    together = search(decoder, a, config)
    for i in range(len(a)):
        alone = search(decoder, a[i : i + 1], config)[0]
        assert [h.ids for h in alone] == [h.ids for h in together[i]]
        for one, many in zip(alone, together[i], strict=True):
            torch.testing.assert_close(one.alphas, many.alphas)
            torch.testing.assert_close(one.betas, many.betas)


def test_an_image_does_not_depend_on_its_neighbours():
    decoder, a = small_decoder(4), annotations(5)
    config = SearchConfig(beam_size=3, max_length=8)
    before = search(decoder, a, config)[2][0]
    a[[0, 1, 3, 4]] = annotations(4, seed=9) * 3
    assert search(decoder, a, config)[2][0].ids == before.ids


@pytest.mark.parametrize("beam_size", [1, 4])
def test_alphas_betas_and_log_probs_are_those_of_the_words_they_stand_beside(beam_size):
    decoder, a = small_decoder(5), annotations(4)
    for i, found in enumerate(search(decoder, a, SearchConfig(beam_size=beam_size, max_length=9, num_captions=1))):
        hypothesis = found[0]
        ids = hypothesis.ids if hypothesis.finished else (*hypothesis.ids, END)
        output = decoder(a[i : i + 1], torch.tensor([[[START, *ids]]]))
        log_p = output.logits.log_softmax(-1).gather(-1, output.targets.unsqueeze(-1)).squeeze(-1)
        length = len(hypothesis.ids)
        assert hypothesis.log_probs == pytest.approx(log_p[:length].tolist())
        torch.testing.assert_close(hypothesis.alphas, output.alphas[0, 0, :length])
        torch.testing.assert_close(hypothesis.betas, output.betas[0, 0, :length])


def test_beam_search_finds_the_sentence_that_greedy_misses():
    # After START: word 4 with 0.6, word 5 with 0.4. After 4: END 0.5, 4 0.5. After 5: END with 1.
    # p(4 END) = 0.30 < p(5 END) = 0.40, so greedy, which begins with 4, ends with the lesser sentence.
    table = torch.full((6, 6), 1e-30)
    table[START, 4], table[START, 5] = 0.6, 0.4
    table[4, END], table[4, 4] = 0.501, 0.499
    table[5, END] = 1.0
    decoder, a = TableDecoder(table), torch.zeros(1, 1, 1)
    assert greedy(decoder, a, SearchConfig(beam_size=1))[0][0].ids == (4, END)
    best = beam_search(decoder, a, SearchConfig(beam_size=2))[0][0]
    assert best.ids == (5, END)
    assert best.score == pytest.approx(torch.tensor(0.4).log().item())
    assert best.alphas is None


@pytest.mark.parametrize("method", [greedy, beam_search])
def test_without_an_end_the_best_open_caption_is_returned_and_marked(method):
    table = torch.full((6, 6), 1e-3)
    table[:, END] = 1e-300
    table[:, 4] = 0.9
    found = method(TableDecoder(table), torch.zeros(2, 1, 1), SearchConfig(beam_size=2, max_length=5))
    assert [h[0].ids for h in found] == [(4,) * 5] * 2
    assert not found[0][0].finished


def test_open_captions_fill_up_the_n_best_list_after_the_finished_ones():
    table = torch.full((6, 6), 1e-30)
    table[START, 4], table[START, 5], table[4, END], table[5, 5] = 0.2, 0.8, 1.0, 1.0
    found = beam_search(
        TableDecoder(table), torch.zeros(1, 1, 1), SearchConfig(beam_size=2, max_length=3, num_captions=2)
    )[0]
    assert [(h.ids, h.finished) for h in found] == [((4, END), True), ((5, 5, 5), False)]


def test_the_longest_caption_may_still_end():
    table = torch.full((6, 6), 1e-30)
    table[START, 4] = table[4, 5] = table[5, END] = 1.0
    best = beam_search(TableDecoder(table), torch.zeros(1, 1, 1), SearchConfig(beam_size=2, max_length=2))[0][0]
    assert best.ids == (4, 5, END)
    assert best.finished


def test_unk_never_comes_out_even_when_it_is_likeliest():
    table = torch.full((7, 7), 0.01)
    table[:, UNK] = 0.9
    decoder, a = TableDecoder(table), torch.zeros(3, 1, 1)
    found = search(decoder, a, SearchConfig(beam_size=3, num_captions=3, max_length=5))
    found += search(decoder, a, SearchConfig(sample=True, num_captions=10, max_length=5))
    assert not {PAD, START, UNK} & {i for hypotheses in found for h in hypotheses for i in h.ids}


@pytest.mark.parametrize("method", [greedy, beam_search])
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("loop", [(4,), (4, 5)])
def test_no_ngram_comes_twice_when_blocked(loop, n, method):
    table = torch.full((6, 6), 1e-30)
    table[START, 4] = 1.0
    for i, word in enumerate(loop):
        table[word, loop[(i + 1) % len(loop)]], table[word, END] = 0.6, 0.4
    config = SearchConfig(beam_size=1, no_repeat_ngram=n, max_length=9)
    ids = method(TableDecoder(table), torch.zeros(1, 1, 1), config)[0][0].ids
    assert ids == (*(loop * 9)[: n + len(loop) - 1], END)  # one more word, and the first n-gram would come again


@pytest.mark.parametrize("method", [greedy, beam_search])
def test_what_is_blocked_is_the_pair_that_came_before_and_nothing_else(method):
    # 4 5 4 must not be followed by 5 once more; but 4 itself may come twice, and so may what follows another word.
    table = torch.full((7, 7), 1e-30)
    table[START, 4], table[4, 5], table[4, 6], table[5, 4], table[6, END] = 1.0, 0.6, 0.4, 1.0, 1.0
    config = SearchConfig(beam_size=1, no_repeat_ngram=2, max_length=8)
    assert method(TableDecoder(table), torch.zeros(1, 1, 1), config)[0][0].ids == (4, 5, 4, 6, END)


def test_a_beam_goes_on_while_a_longer_caption_may_still_be_the_better_one():
    # 4 END has log(1/2)/2 = -0.35, 4 5 END log(1/4)/3 = -0.46; 4 5 6 7 8 END, certain from 6 on, log(1/4)/6 = -0.23.
    table = torch.full((9, 9), 1e-30)
    table[START, 4], table[4, END], table[4, 5], table[5, END], table[5, 6] = 1.0, 0.5, 0.5, 0.5, 0.5
    table[6, 7] = table[7, 8] = table[8, END] = 1.0
    config = SearchConfig(beam_size=2, max_length=6, length_penalty=1.0)
    assert beam_search(TableDecoder(table), torch.zeros(1, 1, 1), config)[0][0].ids == (4, 5, 6, 7, 8, END)


def test_a_beam_goes_on_while_a_longer_caption_may_still_enter_the_n_best_list():
    # END at once has 0.5 and 5 END 0.2; 4 6 END, still open when both have ended, has 0.3 * 0.95 = 0.285.
    table = torch.full((7, 7), 1e-30)
    table[START, END], table[START, 4], table[START, 5] = 0.5, 0.3, 0.2
    table[4, 6], table[4, END], table[5, END], table[6, END] = 0.95, 0.05, 1.0, 1.0
    config = SearchConfig(beam_size=2, num_captions=2)
    found = beam_search(TableDecoder(table), torch.zeros(1, 1, 1), config)[0]
    assert [h.ids for h in found] == [(END,), (4, 6, END)]
    assert [h.score for h in found] == pytest.approx([math.log(0.5), math.log(0.285)])


def test_length_normalisation_prefers_the_longer_sentence():
    # p(END) = 0.3 at once, against 0.5 * 0.5 = 0.25 for word 4 and END: less likely, but with the better mean log p.
    table = torch.full((6, 6), 1e-30)
    table[START, END], table[START, 4], table[START, 5] = 0.3, 0.5, 0.2
    table[4, END], table[4, 5], table[5, END], table[5, 5] = 0.5, 0.5, 0.4, 0.6
    decoder, a = TableDecoder(table), torch.zeros(1, 1, 1)
    plain = beam_search(decoder, a, SearchConfig(beam_size=5, max_length=2, length_penalty=0.0))[0][0]
    normalised = beam_search(decoder, a, SearchConfig(beam_size=5, max_length=2, length_penalty=1.0))[0][0]
    assert plain.ids == (END,)
    assert normalised.ids == (4, END)


def test_samples_follow_the_models_distribution():
    table = torch.full((6, 6), 1e-30)
    table[START, 4], table[START, 5], table[4, END], table[5, END] = 0.25, 0.75, 1.0, 1.0
    generator = torch.Generator().manual_seed(0)
    config = SearchConfig(sample=True, num_captions=4000)
    found = sample(TableDecoder(table), torch.zeros(1, 1, 1), config, generator=generator)[0]
    share = sum(h.ids[0] == 4 for h in found) / len(found)
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5


def test_drawn_words_are_the_samples_framed_to_be_fed_back():
    decoder, a = small_decoder(6, scale=0.5), annotations(4)
    config = SearchConfig(sample=True, num_captions=3, max_length=4)
    words = draw_words(decoder, a, config, generator=torch.Generator().manual_seed(0))
    found = sample(decoder, a, config, generator=torch.Generator().manual_seed(0))
    assert words.shape == (4, 3, 6)
    for rows, hypotheses in zip(words.tolist(), found, strict=True):
        said = [[word for word in row[1:] if word != PAD] for row in rows]
        assert all(row == [START, *ids, *[PAD] * (5 - len(ids))] for row, ids in zip(rows, said, strict=True))
        cut = [ids if END in ids else ids[:4] for ids in said]  # a hypothesis leaves out the word that is one too many
        assert sorted(cut) == sorted(list(h.ids) for h in hypotheses)
    assert {END in row for rows in words.tolist() for row in rows} == {True, False}


def test_words_are_drawn_from_the_softmax_of_the_sayable_logits():
    table = torch.tensor([[0.1, 0.2, 0.1, 0.3, 0.1, 0.2]]).repeat(6, 1)  # 0.6 of it can never be said
    p = sayable(table.log()).softmax(-1)[0]
    torch.testing.assert_close(p, torch.tensor([0, 0, 0.25, 0, 0.25, 0.5]))
    config = SearchConfig(sample=True, num_captions=4000, max_length=1)
    generator = torch.Generator().manual_seed(0)
    first = draw_words(TableDecoder(table), torch.zeros(1, 1, 1), config, generator=generator)[0, :, 1]
    for word, share in ((END, 0.25), (4, 0.25), (5, 0.5)):
        assert abs((first == word).double().mean() - share) < 4 * (share * (1 - share) / 4000) ** 0.5


def test_words_are_drawn_from_what_is_learned_from_whatever_the_products_are_made_in(monkeypatch):
    seen, real = [], decoding._drawn

    def noted(config, generator):
        choose = real(config, generator)
        return lambda log_p: seen.append(log_p.dtype) or choose(log_p)

    monkeypatch.setattr(decoding, "_drawn", noted)
    decoder = small_decoder(0).float()
    with torch.autocast("cpu", torch.bfloat16):
        draw_words(decoder, annotations(2).float(), SearchConfig(sample=True, max_length=3))
    assert set(seen) == {torch.float32}


def test_equal_seeds_give_equal_samples_and_others_do_not():
    decoder, a = small_decoder(6, scale=0.1), annotations(4)
    config = SearchConfig(sample=True, num_captions=3)
    ids = [
        [h.ids for found in search(decoder, a, config, generator=torch.Generator().manual_seed(s)) for h in found]
        for s in (0, 0, 1)
    ]
    assert ids[0] == ids[1] != ids[2]


def test_a_low_temperature_samples_the_greedy_caption():
    decoder, a = small_decoder(7), annotations(4)
    cold = sample(decoder, a, SearchConfig(sample=True, temperature=1e-4, max_length=6))
    assert [h[0].ids for h in cold] == [h[0].ids for h in greedy(decoder, a, SearchConfig(max_length=6))]


def test_top_k_and_top_p_keep_the_likeliest_words():
    p = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    torch.testing.assert_close(nucleus(p, top_k=2, top_p=1.0), torch.tensor([[0, 2 / 3, 0, 1 / 3]]))
    # 0.5 < 0.6, so that 0.25 is needed too; together 0.75 >= 0.6.
    torch.testing.assert_close(nucleus(p, top_k=0, top_p=0.6), torch.tensor([[0, 2 / 3, 0, 1 / 3]]))
    torch.testing.assert_close(nucleus(p, top_k=0, top_p=1.0), p)


@pytest.mark.parametrize(("cut", "said"), [({}, {4, 5, 6}), ({"top_k": 2}, {4, 5}), ({"top_p": 0.45}, {4})])
def test_samples_are_cut_as_asked(cut, said):
    table = torch.full((7, 7), 1e-30)
    table[START, 4:], table[4:, END] = torch.tensor([0.5, 0.3, 0.2]), 1.0
    config = SearchConfig(sample=True, num_captions=300, **cut)
    found = sample(TableDecoder(table), torch.zeros(1, 1, 1), config, generator=torch.Generator().manual_seed(0))[0]
    assert {hypothesis.ids[0] for hypothesis in found} == said


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("temperature", "said"), [(1e-300, {4}), (1e300, {4, 5, 6})])
def test_no_temperature_makes_nonsense(temperature, said, dtype):
    table = torch.full((7, 7), 1e-30)
    table[START, 4:], table[4:, END] = torch.tensor([0.5, 0.3, 0.2]), 1.0
    config = SearchConfig(sample=True, num_captions=100, temperature=temperature, max_length=3)
    decoder = TableDecoder(table)
    decoder.table = decoder.table.to(dtype)
    found = sample(decoder, torch.zeros(1, 1, 1), config, generator=torch.Generator().manual_seed(0))[0]
    assert {hypothesis.ids[0] for hypothesis in found} >= said
    assert not {PAD, START, UNK} & {i for hypothesis in found for i in hypothesis.ids}


def test_a_caption_that_ends_leaves_its_place_in_the_beam_to_another():
    table = torch.full((8, 8), 1e-30)
    table[START, END], table[START, 4], table[START, 5] = 0.4, 0.35, 0.25
    table[4, 6] = table[4, 7] = 0.5
    table[5, END] = table[6, END] = table[7, END] = 1.0
    found = beam_search(TableDecoder(table), torch.zeros(1, 1, 1), SearchConfig(beam_size=2, num_captions=2))[0]
    assert [h.ids for h in found] == [(END,), (5, END)]  # 0.4 and 0.25; 4 6 END has 0.175


def test_a_drawn_caption_has_the_score_of_its_own_words():
    config = SearchConfig(sample=True, num_captions=30, max_length=6, length_penalty=0.7)
    found = sample(small_decoder(6, scale=0.5), annotations(2), config, generator=torch.Generator().manual_seed(0))
    drawn = [h for one in found for h in one]
    for h in drawn:
        assert h.score == pytest.approx(sum(h.log_probs) / len(h.ids) ** 0.7)
    assert len({len(h.ids) for h in drawn}) > 2
