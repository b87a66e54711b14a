"""The benchmarks at toy sizes: they run and print their tables, and the comparison is fair. No time is judged."""

import dataclasses
import importlib
import math

import pytest
import torch
from tiny_runs import tiny_settings

from benchmarks import hard_gradient, report, roofline
from benchmarks.hard_oracle import estimate, new_baseline, small_oracle
from benchmarks.report import Line, formats, table
from benchmarks.roofline import Machine, Phase
from benchmarks.train_step import Sizes, as_ports_batch, build_pair, make_batch, necessary, ours_loss
from captioning import training
from captioning.config import DecoderConfig, EncoderConfig, HardConfig
from captioning.hard_objective import training_look
from captioning.losses import word_nll
from captioning.models.attention import looking
from captioning.vocabulary import END, PAD, START

TOY = ["--locations", "4", "--annotation-dim", "8", "--dim", "4", "--vocabulary", "20", "--repeats", "1"]
COMMANDS = {
    "train_step": ["--images", "2", "--product", "8", *TOY],
    "beam_search": ["--images", "2", "--product", "8", "--words", "3", *TOY],
    "hard_step": ["--count", "20", "--batches", "1", "--images", "2", *TOY, "--decoder.hidden_dim", "8"],
    "preprocess": ["--count", "3", "--image-size", "64", "--batch-size", "2", "--repeats", "1", "--workers", "0"],
    "finetune_step": ["--batch-size", "1", "--image-size", "64", "--repeats", "1"],
    "epoch": ["--count", "20", "--steps", "1", "--decoder.hidden_dim", "8", "--batch_size", "4"],
}
STORED = {
    "encoder": EncoderConfig(name="resnet18", image_size=32),
    "decoder": DecoderConfig(embedding_dim=8, hidden_dim=12, attention_dim=6),
    "augment": "none",
}
GOALS = {
    "train_step": {
        "fp32, one caption per image": [">= 6", "<= 1.6"],
        "fp32, five captions per image": [">= 10", "<= 1.6"],
    },
    "beam_search": {"fp32, batch of 2": [">= 8", "-"], "fp32, batch of 1": ["-"]},
    "preprocess": {"fp32, mobilenet_v2": [">= 0.75"]},
    "finetune_step": {"fp32, the library's": ["-"], "fp32, depthwise": ["-"]},
    "epoch": {"flickr8k_soft, 1 steps, ": ["<= 0.03", "-"]},
    "hard_step": {
        "4x8, soft": ["-"],
        "4x8, hard, K = 1, learned": ["<= 1.1"],
        "flickr8k_soft, soft": ["-"],
        "flickr8k_soft, hard, K = 5, leave-one-out": ["<= 3"],
    },
}
"""Of each line that begins so, what it asks for."""
SIZES = Sizes(images=3, captions=2, locations=5, annotation_dim=6, dim=4, attention_dim=7, vocabulary=30)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_prints_figures_ratios_limits_and_goals(name, capsys):
    main = importlib.import_module(f"benchmarks.{name}").main
    assert main([*COMMANDS[name], "--markdown"]) == 0
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in printed.splitlines() if " | " in line]
    assert rows[0] == ["what", "figure", "ratio", "limit", "goal", "met?"]
    for start, goals in GOALS[name].items():
        found = [row for row in rows if row[0] == start or (start.endswith(", ") and row[0].startswith(start))]
        assert [row[4] for row in found] == goals
        assert all((row[5] in ("met", "not met")) == (row[4] != "-") for row in found)
        assert all(row[2][0].isdigit() for row in found if row[4] != "-")
    assert "torch 2" in printed.splitlines()[-1]


def test_a_table_is_plain_unless_asked(capsys):
    assert importlib.import_module("benchmarks.beam_search").main(COMMANDS["beam_search"]) == 0
    assert "|" not in capsys.readouterr().out


def test_bf16_is_measured_where_the_processor_has_it(monkeypatch):
    monkeypatch.setattr(report, "has_bf16", lambda device: True)
    assert formats() == {"fp32": torch.float32, "bf16": torch.bfloat16}
    monkeypatch.setattr(report, "has_bf16", lambda device: False)
    assert formats() == {"fp32": torch.float32}
    assert "no instructions for bf16" in report.machine()


def test_the_estimators_are_measured_by_hand(monkeypatch):
    # Estimates (1, 4), (3, 0) and (2, 2), each the mean of 10, of a gradient of (3, 4): their mean is (2, 2), and the
    # squared distances from it are 5, 5 and 0, with a variance of 10 / 2.
    drawn = iter(torch.tensor([[1.0, 4.0], [3.0, 0.0], [2.0, 2.0], *[[0.0, 0.0]] * 6]))
    monkeypatch.setattr(hard_gradient, "estimate", lambda *_, **__: next(drawn))
    hard = HardConfig(baseline="none")
    row = hard_gradient.measure(small_oracle(), torch.tensor([3.0, 4.0]), hard, draws=3, copies=10, soft=1.0)
    assert row.bias == pytest.approx(math.hypot(1, 2) / 5)
    assert row.noise == pytest.approx(math.sqrt(5 / 3) / 5)
    assert row.variance == pytest.approx(5 * 10 / 25)


def test_the_estimators_table_has_oracle_batch_and_verdicts(tiny_annotations, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(hard_gradient, "WARM_UP", 2)
    best = training.train(tiny_settings(tiny_annotations, tmp_path / "run", **STORED, epochs=1))
    words = ["--data", str(tiny_annotations), "--checkpoint", str(best), "--images", "2"]
    assert hard_gradient.main([*words, "--draws", "2", "--oracle-draws", "2"]) == 0
    oracle, batch = capsys.readouterr().out.split("\n2 images, ")
    for part in (oracle, batch):
        assert all(name in part for name in hard_gradient.ESTIMATORS)
        assert "goal (5 times less variance, and less variance x cost): " in part
    assert hard_gradient.main([*words, "--draws", "1"]) == 2
    assert "--draws and --oracle-draws 2 (got 2, 1 and 60)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ratio", "cost", "verdict"), [(6.0, 1.0, "met"), (6.0, 7.0, "not met"), (4.0, 1.0, "not met")]
)
def test_the_estimators_verdict_asks_for_both(ratio, cost, verdict, capsys):
    paper, chosen = hard_gradient.Row(0, 0, ratio, 1.0), hard_gradient.Row(0, 0, 1.0, cost)
    hard_gradient.table("t", {hard_gradient.PAPER: paper, hard_gradient.CHOSEN: chosen})
    assert capsys.readouterr().out.endswith(f"variance x cost): {verdict}\n")


def test_the_plain_decoder_with_our_weights_has_our_loss_and_gradients():
    ours, plain = (module.double() for module in build_pair(SIZES, dropout=0.0))
    plain.copy_weights(ours)
    a, words = make_batch(SIZES)
    a = a.double()
    losses = ours_loss(ours, a, words), plain.loss(*as_ports_batch(a, words))
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    n = SIZES.dim
    state = ours.lstm_state.weight.grad[torch.cat([torch.arange(n) + part * n for part in (0, 1, 3, 2)])]
    alignment = ours.attention.alignment
    for mine, theirs in (
        (state[:, :n], plain.cell.weight_hh.grad),
        (state[:, n:], plain.cell.weight_ih.grad[:, n:]),
        (alignment.key.weight.grad, plain.encoder_attention.weight.grad),
        (alignment.query.weight.grad, plain.decoder_attention.weight.grad),
        (ours.E.weight.grad, plain.embedding.weight.grad),
        *((getattr(m, name).weight.grad for m in (ours, plain)) for name in ("init_h", "init_c", "L_h", "L_z", "L_o")),
    ):
        torch.testing.assert_close(mine, theirs)


def test_the_batch_has_captions_of_the_asked_lengths_the_longest_first():
    sizes = SIZES._replace(images=40, captions=5)
    _, words = make_batch(sizes)
    lengths = (words[..., 1:] != PAD).sum(dim=-1)
    assert (lengths.min(), lengths.max()) == (sizes.shortest, sizes.longest)
    assert (words[..., 0] == START).all()
    assert ((words == END).sum(dim=-1) == 1).all()
    assert (lengths.diff(dim=1) <= 0).all()
    assert (lengths[:, 0].diff() <= 0).all()


def test_the_necessary_work_by_hand():
    # One image with one caption of 2 words, L = 3, D = 5, n = m = k = 2, V = 7, in fp32, 11 parameters.
    sizes = Sizes(1, 1, 3, 5, 2, 2, 7)
    words = torch.tensor([[[START, 6, END]]])
    phases = {phase.name.split(",")[0].split(":")[0]: phase for phase in necessary(sizes, words, 11, torch.float32)}
    assert phases["keys"].operations == 2 * (2 * 3 * 5 * 2)  # (3, 5) by (5, 2), forward and for the weights
    assert phases["annotations read"].bytes == 2 * 3 * 5 * 4
    assert phases["logits"].operations == 3 * (2 * 2 * 2 * 7)  # (2, 2) by (2, 7), three times
    state = (2 + 5) * 8 + 2 * (2 + 1)  # gates from h and z; query and beta from h
    assert phases["recurrence"].operations == 2 * (2 * 2 * state)  # 2 words, forward and back
    assert phases["gradient of its weights"].operations == 2 * 2 * state
    assert phases["context"].bytes == 2 * 2 * 3 * 5 * 4  # 2 steps, forward and back
    assert phases["clipping and AdamW"].bytes == 8 * 11 * 4


def test_a_phase_costs_the_larger_of_its_products_and_its_memory():
    machine = Machine({torch.float32: 10.0, torch.bfloat16: 20.0}, bandwidth=5.0)
    phases = [Phase("products", 100, 5), Phase("memory", 10, 50)]
    assert machine.seconds(phases, torch.float32) == 10 + 10
    assert machine.seconds(phases, torch.bfloat16) == 5 + 10


@pytest.mark.parametrize(
    ("sign", "ratio", "verdict"),
    [(">=", 6.0, "met"), (">=", 5.9, "not met"), ("<=", 1.6, "met"), ("<=", 1.7, "not met")],
)
def test_a_goal_is_met_or_not_met(sign, ratio, verdict):
    line = Line("step", "1 words/s", ratio, "x", "2 words/s", (sign, 6.0 if sign == ">=" else 1.6))
    assert line.cells()[-1] == verdict
    assert Line("step", "1 words/s").cells() == ["step", "1 words/s", "-", "-", "-", "-"]


def test_a_table_is_aligned_text_or_markdown():
    lines = [Line("a", "1"), Line("longer", "2", math.pi, "x", "3", ("<=", 4.0))]
    text = table(lines).splitlines()
    assert [row.index(figure) for row, figure in zip(text, ("figure", "1", "2"), strict=True)] == [8, 8, 8]
    assert table(lines, markdown=True).splitlines()[-1] == "| longer | 2 | 3.14 x | 3 | <= 4 | met |"


def test_rates_are_operations_and_bytes_per_second(monkeypatch):
    monkeypatch.setattr(roofline, "best_of", lambda actions, repeats: [0.5] * len(actions))
    machine = roofline.measure(size=10, megabytes=1)
    assert machine.products[torch.float32] == 2 * 10**3 / 0.5
    assert machine.bandwidth == 2 * 2**20 / 0.5  # a copy reads and writes


def test_the_doubt_of_a_mean_of_draws_is_its_variance():
    vectors = [torch.tensor([1.0, 5.0]), torch.tensor([3.0, 5.0]), torch.tensor([5.0, 2.0])]
    mean, squares = hard_gradient.moments(iter(vectors))
    assert mean.tolist() == [3.0, 4.0]
    assert squares == pytest.approx(4 + 1 + 0 + 1 + 4 + 4)


def test_the_baselines_of_the_benchmark_learn():
    oracle, exact = small_oracle(), HardConfig(lambda_e=0.0, expectation_probability=0.0)
    paper = dataclasses.replace(exact, reward="sentence", baseline="moving_average")
    baseline = new_baseline(oracle, paper)
    estimate(oracle, paper, baseline, copies=8, seed=0)
    a, words = (x.repeat_interleave(8, dim=0) for x in (oracle.a, oracle.words))
    with looking(oracle.decoder, training_look(paper, torch.Generator().manual_seed(0))):
        output = oracle.decoder(a, words)
    mean = -word_nll(output.logits, output.targets).sum() / 8
    assert baseline.b.item() == pytest.approx(0.1 * mean.item())
    learned = dataclasses.replace(exact, baseline="learned")
    net = new_baseline(oracle, learned)
    before = [p.detach().clone() for p in net.parameters()]
    hard_gradient.warm_up(oracle, learned, net, 24)
    assert all(not torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))


def test_the_doubt_is_the_variance_of_the_mean_and_joins_the_noise(monkeypatch):
    vectors = [torch.tensor(x) for x in ([1.0, 5.0], [3.0, 5.0], [5.0, 2.0])]  # squared distances: 14
    stream = iter(vectors * 5)
    monkeypatch.setattr(hard_gradient, "estimate", lambda *_, **__: next(stream))
    hard, oracle = HardConfig(baseline="none"), small_oracle()
    assert hard_gradient.mean_of(oracle, hard, 3)[1] == pytest.approx(14 / 2 / 3)
    row = hard_gradient.measure(oracle, torch.tensor([3.0, 4.0]), hard, draws=3, copies=1, soft=1.0, doubt=2.0)
    assert row.noise == pytest.approx(math.sqrt((7 / 3 + 2) / 25))
