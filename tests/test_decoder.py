"""The Decoder contract, for every registered decoder, alignment, attention and gate."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import get_type_hints

import pytest
import torch

from captioning.config import DecoderConfig, SearchConfig
from captioning.decoding import search
from captioning.losses import word_nll
from captioning.models.alignment import ALIGNMENTS
from captioning.models.attention import ATTENTIONS
from captioning.models.baselines import CONTEXTS, INJECTIONS
from captioning.models.blocks import NORMS
from captioning.models.decoder import Decoder, Output
from captioning.models.registry import DECODERS, build_decoder
from captioning.models.transformer import POSITIONS
from captioning.vocabulary import END, PAD, START

VOCABULARY, DIM, LOCATIONS = 11, 6, 5
ATTENDING = [name for name in DECODERS if name != "lstm"]
SIZES = {"embedding_dim": 4, "hidden_dim": DIM, "attention_dim": 3}
DROPOUTS = {"dropout": 0.3, "embedding_dropout": 0.2, "annotation_dropout": 0.1}
GATES, VALUES = ("scalar", "vector", "none"), ("annotations", "projected")
SCORED = [
    *({"alignment": alignment} for alignment in ALIGNMENTS),
    *({"gate": gate, "values": values} for gate in GATES for values in VALUES),
]
LOOKS = [
    *({"attention": name, **look} for name in ATTENTIONS if name != "multi_head" for look in SCORED),
    *({"attention": "multi_head", "heads": heads, "gate": gate} for heads in (1, 3) for gate in GATES),
]
OWN = {  # what each decoder has of its own, and all values of it
    "attention_lstm": {"query": ("state", "state_and_word")},
    "luong": {"input_feeding": (False, True)},
    "transformer": {"norm": NORMS, "positions": POSITIONS, "heads": (1, 2)},
    "lstm": {"inject": INJECTIONS, "context": CONTEXTS},
}
MORE = {  # with each of these, what else
    "attention_lstm": LOOKS,
    "luong": LOOKS,
    "transformer": [{"embedding_dim": DIM, "layers": 2, "max_positions": 8}],
    "lstm": [{}],
}


def variants(name: str) -> Iterator[DecoderConfig]:
    """A decoder with all its own settings; embeddings are tied in every other variant."""
    tied = itertools.cycle([False, True])
    for values, more in itertools.product(itertools.product(*OWN[name].values()), MORE[name]):
        own = dict(zip(OWN[name], values, strict=True))
        yield DecoderConfig(name=name, tie_embeddings=next(tied), **{**SIZES, **DROPOUTS, **own, **more})


def different(config: DecoderConfig) -> str:
    """What tells a variant from its like."""
    names = dict.fromkeys([*OWN[config.name], *(name for more in MORE[config.name] for name in more)])
    return "-".join([config.name, *(str(getattr(config, name)) for name in names)])


VARIANTS = [config for name in DECODERS for config in variants(name)]
ONE_OF_EACH = [next(variants(name)) for name in DECODERS]
every_variant = pytest.mark.parametrize("config", VARIANTS, ids=different)
every_decoder = pytest.mark.parametrize("config", ONE_OF_EACH, ids=different)


def build(config: DecoderConfig) -> Decoder:
    torch.manual_seed(0)
    return build_decoder(config, vocabulary_size=VOCABULARY, annotation_dim=DIM).double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two images with three captions each; the last caption of the second image is absent."""
    a = torch.randn(2, LOCATIONS, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    captions = [[[4, 5, 6, 7], [5, 5], [8]], [[9, 10, 4], [6], None]]
    words = torch.full((2, 3, 6), PAD)
    for n, k in itertools.product(range(2), range(3)):
        if captions[n][k] is not None:
            framed = [START, *captions[n][k], END]
            words[n, k, : len(framed)] = torch.tensor(framed)
    return a, words


@every_variant
def test_forward_equals_repeated_step(config):
    assert_forward_equals_repeated_step(build(config).eval(), *batch())


def assert_forward_equals_repeated_step(decoder: Decoder, a: torch.Tensor, words: torch.Tensor) -> None:
    rows = words.shape[:2]
    output = decoder(a, words)
    memory = decoder.prepare(a)
    state = decoder.initial_state(memory, rows[1])
    for t in range(words.shape[-1] - 1):
        step = decoder.step(words[..., t].flatten(), state, memory)
        state = step.state
        real = output.mask[..., t]
        at_t = torch.zeros_like(output.mask)
        at_t[..., t] = real
        torch.testing.assert_close(output.logits[at_t[output.mask]], step.logits.unflatten(0, rows)[real])
        for whole, one in ((output.alphas, step.alpha), (output.betas, step.beta)):
            assert (whole is None) == (one is None)
            if one is not None:
                torch.testing.assert_close(whole[:, :, t][real], one.unflatten(0, rows)[real])


@every_variant
def test_gradients_of_forward_equal_those_of_repeated_step(config):
    decoder = build(config).eval()
    a, words = batch()
    leaves = [a.requires_grad_(), *decoder.parameters()]
    whole = decoder(a, words).logits.logsumexp(dim=-1).sum()
    memory = decoder.prepare(a)
    state, stepwise = decoder.initial_state(memory, 3), a.new_zeros(())
    for t in range(words.shape[-1] - 1):
        step = decoder.step(words[..., t].flatten(), state, memory)
        state = step.state
        stepwise = stepwise + step.logits.logsumexp(dim=-1)[words[..., t + 1].flatten() != PAD].sum()
    gradients = [torch.autograd.grad(x, leaves, materialize_grads=True) for x in (whole, stepwise)]
    torch.testing.assert_close(*gradients)


@every_variant
def test_padding_and_neighbours_change_nothing(config):
    decoder = build(config).eval()
    a, words = batch()
    together = decoder(a, words)
    alone = decoder(a[1:], words[1:, 1:2, :3])  # one short caption without its padding and its neighbours
    own = torch.zeros_like(together.mask)
    own[1, 1] = together.mask[1, 1]
    torch.testing.assert_close(together.logits[own[together.mask]], alone.logits)


def by_caption(output: Output) -> torch.Tensor:
    """The logits as (N, K, T, V), zero where there is no word."""
    logits = output.logits.new_zeros(*output.mask.shape, VOCABULARY)
    logits[output.mask] = output.logits
    return logits


@every_variant
def test_the_order_of_captions_changes_only_the_order_of_results(config):
    decoder = build(config).eval()
    a, words = batch()
    before, after = decoder(a, words), decoder(a.flip(0), words.flip(0, 1))
    torch.testing.assert_close(by_caption(after).flip(0, 1), by_caption(before))
    if config.name in ATTENDING:
        torch.testing.assert_close(after.alphas.flip(0, 1)[before.mask], before.alphas[before.mask])


@every_variant
def test_every_parameter_gets_a_gradient(config):
    decoder = build(config).train()
    output = decoder(*batch())
    loss = torch.nn.functional.cross_entropy(output.logits, output.targets)
    if output.log_probs is not None:  # hard attention learns where to look through log p(s) alone
        loss = loss + output.log_probs.sum()
    loss.backward()
    without = [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@every_variant
def test_alphas_are_distributions_over_locations_or_none_where_nothing_attends(config):
    decoder = build(config).eval()
    output = decoder(*batch())
    assert decoder.attends == (output.alphas is not None) == (config.name in ATTENDING)
    if output.alphas is None:
        return
    sums = output.alphas.sum(dim=-1)[output.mask]
    torch.testing.assert_close(sums, torch.ones_like(sums))
    assert output.alphas.shape == (2, 3, 5, LOCATIONS)


@every_decoder
def test_captions_of_one_image_equal_the_same_image_repeated(config):
    decoder = build(config).eval()
    a, words = batch()
    shared = decoder(a, words)
    repeated = decoder(a.repeat_interleave(3, dim=0), words.flatten(0, 1).unsqueeze(1))
    torch.testing.assert_close(shared.logits, repeated.logits)


def test_long_captions_first_let_the_batch_shrink():
    from captioning.models.decoder import active_rows

    _, words = batch()
    # With END the captions have 5, 3, 2 words and 4, 2: both images with three captions for two steps, and so on.
    assert active_rows(words[..., 1:] != PAD) == [(2, 3), (2, 3), (2, 2), (2, 1), (1, 1)]


@pytest.mark.parametrize("attention", ["soft", "hard"])
@pytest.mark.parametrize("gate", ["scalar", "none"])
def test_projecting_the_locations_first_changes_neither_logits_nor_gradients(attention, gate, monkeypatch):
    decoder = build(dataclasses.replace(VARIANTS[0], attention=attention, gate=gate)).eval()
    found = []
    for project in (True, False):
        monkeypatch.setattr(decoder, "_projects", lambda memory, mask, project=project: project)
        decoder.zero_grad()
        output = decoder(*batch())
        (output.logits.sin().sum() + output.alphas.sin().sum()).backward()
        found.append([output.logits, *(p.grad for p in decoder.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_locations_are_projected_first_where_words_are_more_than_twice_as_many():
    decoder = build(VARIANTS[0])
    a, words = batch()
    memory = decoder.prepare(a)
    mask = words[..., 1:] != PAD  # 16 words over 2 x 5 locations
    assert not decoder._projects(memory, mask)
    assert decoder._projects(memory, mask.repeat_interleave(2, dim=1))


@pytest.mark.parametrize(
    "look", [look for look in LOOKS if "gate" in look], ids=lambda look: "-".join(map(str, look.values()))
)
def test_with_many_words_locations_are_projected_only_where_that_is_repeated_step(look):
    decoder, (a, words) = build(DecoderConfig(**SIZES, **look)).eval(), batch()
    words = words.repeat_interleave(2, dim=1)  # 32 words over 2 x 5 locations
    projects = decoder._projects(decoder.prepare(a), words[..., 1:] != PAD)
    assert projects == (look["attention"] != "multi_head" and look["gate"] != "vector")
    assert_forward_equals_repeated_step(decoder, a, words)


@every_decoder
def test_a_batch_of_absent_captions_is_harmless(config):
    decoder = build(config)
    output = decoder(batch()[0], torch.full((2, 1, 2), PAD))
    assert output.logits.shape == (0, VOCABULARY)
    assert not output.mask.any()


@every_decoder
def test_dropout_acts_in_training_only(config):
    decoder = build(config)
    a, words = batch()
    assert not torch.equal(decoder.train()(a, words).logits, decoder(a, words).logits)
    assert torch.equal(decoder.eval()(a, words).logits, decoder(a, words).logits)


@every_decoder
@pytest.mark.parametrize("name", DROPOUTS)
def test_each_dropout_acts_by_itself(name, config):
    decoder = build(dataclasses.replace(config, **dict.fromkeys(DROPOUTS, 0.0) | {name: 0.3})).train()
    a, words = batch()
    assert not torch.equal(decoder(a, words).logits, decoder(a, words).logits)
    memory = decoder.prepare(a)
    if name != "annotation_dropout":  # a search's step is the same model, one word at a time
        one, other = (decoder.step(words[..., 0].flatten(), decoder.initial_state(memory, 3), memory) for _ in range(2))
        assert not torch.equal(one.logits, other.logits)


def test_embedding_dropout_alone_reaches_the_query_and_the_gates():
    none = dict.fromkeys(DROPOUTS, 0.0)
    config = dataclasses.replace(VARIANTS[0], query="state_and_word", **none | {"embedding_dropout": 0.5})
    decoder, (a, words) = build(config).train(), batch()
    one, other = decoder(a, words), decoder(a, words)
    assert torch.equal(one.states[:, :, 0], other.states[:, :, 0])  # h_0 has read no word
    assert not torch.equal(one.alphas[:, :, 0], other.alphas[:, :, 0])
    config = dataclasses.replace(config, query="state")
    decoder = build(config).train()
    one, other = decoder(a, words), decoder(a, words)
    assert torch.equal(one.alphas[:, :, 0], other.alphas[:, :, 0])
    assert not torch.equal(one.states[:, :, 1], other.states[:, :, 1])


def test_the_deep_output_drops_of_the_state_and_of_the_hidden_layer():
    decoder, (a, words) = build(VARIANTS[0]).train(), batch()
    dropped = []
    decoder.dropout.register_forward_hook(lambda _, inputs, __: dropped.append(tuple(inputs[0].shape)))
    count = len(decoder(a, words).targets)
    assert dropped == [(count, DIM), (count, SIZES["embedding_dim"])]  # h_t, and the tanh of eq. 7


@pytest.mark.parametrize("config", [c for c in ONE_OF_EACH if c.name != "transformer"], ids=different)
def test_the_forget_gate_begins_open_and_no_other_gate_does(config):
    gates = dict(zip("ifog", build(config).lstm_word.bias.chunk(4), strict=True))
    assert all(bool((bias == 1).all()) == (name == "f") for name, bias in gates.items())


@every_decoder
def test_words_begin_small_enough_to_be_logits_too(config):
    decoder = build_decoder(config, vocabulary_size=500, annotation_dim=DIM)
    assert decoder.E.weight[4:].std().item() == pytest.approx(decoder.E.embedding_dim**-0.5, rel=0.1)
    assert not decoder.E.weight[PAD].any()


@every_decoder
@pytest.mark.parametrize("width", [1, 3])
def test_any_decoder_can_be_searched(config, width):
    a, _ = batch()
    decoder = build(config).eval()
    found = search(decoder, a, SearchConfig(beam_size=width, num_captions=width, max_length=4))
    for one, hypotheses in zip(a, found, strict=True):  # the log p that search found is that of teacher forcing
        for hypothesis in hypotheses:
            ids = [*hypothesis.ids, *([] if hypothesis.finished else [END])]
            output = decoder(one.unsqueeze(0), torch.tensor([[[START, *ids]]]))
            expected = output.logits.log_softmax(-1).gather(1, output.targets.unsqueeze(1))[: len(hypothesis.ids)]
            assert list(hypothesis.log_probs) == pytest.approx(expected.flatten().tolist())
            if output.alphas is not None:
                torch.testing.assert_close(hypothesis.alphas, output.alphas[0, 0, : len(hypothesis.ids)])
        alone = search(decoder, one.unsqueeze(0), SearchConfig(beam_size=width, num_captions=width, max_length=4))[0]
        assert [each.ids for each in alone] == [each.ids for each in hypotheses]  # no image knows of another


@every_decoder
def test_a_word_knows_nothing_of_the_words_after_it(config):
    decoder = build(config).eval()
    a, words = batch()
    other = words.clone()
    other[0, 0, 3:5] = torch.tensor([9, 10])  # the first caption's third and fourth word
    before, after = by_caption(decoder(a, words)), by_caption(decoder(a, other))
    torch.testing.assert_close(after[0, 0, :3], before[0, 0, :3])  # up to the third word, which is read only then
    assert (after[0, 0, 3] - before[0, 0, 3]).abs().max() > 1e-6


@every_decoder
def test_tied_embeddings_are_one_matrix(config):
    tied, untied = (build(dataclasses.replace(config, embedding_dim=DIM, tie_embeddings=tie)) for tie in (True, False))
    assert tied.L_o.weight is tied.E.weight
    sizes = [sum(p.numel() for p in decoder.parameters()) for decoder in (untied, tied)]
    assert sizes[0] - sizes[1] == VOCABULARY * DIM


@pytest.mark.parametrize(
    ("field", "registry"),
    [("name", DECODERS), ("attention", ATTENTIONS), ("alignment", ALIGNMENTS), ("inject", INJECTIONS)],
)
def test_every_word_of_the_config_has_its_class(field, registry):
    assert set(get_type_hints(DecoderConfig)[field].__args__) == set(registry)


@every_variant
def test_a_process_whose_part_of_a_batch_has_no_captions_learns_nothing_from_it(config):
    decoder, (a, words) = build(config), batch()
    output = decoder(a, torch.full_like(words[..., :2], PAD))
    assert len(output.logits) == len(output.targets) == int(output.mask.sum()) == 0
    word_nll(output.logits, output.targets).sum().backward()
    assert all(p.grad is None or not p.grad.abs().sum() for p in decoder.parameters())
