"""python -m captioning.evaluate: a checkpoint on a data file, and anyone's captions."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY_DECODER

from captioning import evaluate as evaluating
from captioning.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from captioning.compatibility import check_fits
from captioning.config import EncoderConfig, SearchConfig
from captioning.data import CaptionData
from captioning.evaluate import main
from captioning.models.captioner import CaptioningModel, build_model
from captioning.models.encoder import build_encoder
from captioning.vocabulary import END
from preprocess.build import BuildSettings, build
from preprocess.sources import shapes

KEYS = ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr"]


@pytest.fixture
def call(capsys):
    """Calls main; returns the exit code, the lines of standard output and those of standard error."""

    def run(*words: object) -> tuple[int, list[str], list[str]]:
        code = main([*map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out.splitlines(), captured.err.splitlines()

    return run


@pytest.fixture
def references(tiny_data: Path, tmp_path: Path) -> Path:
    """The references of the val split, as a JSON mapping."""
    data = CaptionData(tiny_data)
    path = tmp_path / "references.json"
    path.write_text(json.dumps({data.names[i]: data.references(i) for i in data.indices("val").tolist()}))
    return path


@pytest.mark.java
@pytest.mark.slow
def test_a_split_is_captioned_and_scored(call, tiny_checkpoint, tiny_data):
    code, out, err = call(
        "--checkpoint", tiny_checkpoint, "--data", tiny_data, "--tokenizer", "python", "--device", "cpu"
    )
    scores = json.loads(out[-1])
    assert (code, err) == (0, [])
    assert [key for key in scores if key in KEYS] == KEYS
    assert "METEOR" in scores
    assert all(0 <= scores[key] <= 10 for key in KEYS)
    assert (scores["images"], scores["split"], scores["beam_size"]) == (4, "val", 5)
    table = "\n".join(out[:-1])
    for key in KEYS:
        assert re.search(rf"{key}\s+{scores[key]:.4f}", table)


def test_results_scored_again_give_the_same_numbers(call, tiny_checkpoint, tiny_data, references, tmp_path):
    words = ("--tokenizer", "python")
    _, out, _ = call(
        "--checkpoint", tiny_checkpoint, "--data", tiny_data, "--output", tmp_path / "new" / "r.json", *words
    )
    rows = json.loads((tmp_path / "new" / "r.json").read_text())
    data = CaptionData(tiny_data)
    assert [row["image_id"] for row in rows] == [data.names[i] for i in data.indices("val")]
    assert all(set(row) == {"image_id", "caption"} for row in rows)
    code, again, _ = call("--results", tmp_path / "new" / "r.json", "--references", references, *words)
    first, second = json.loads(out[-1]), json.loads(again[-1])
    assert code == 0
    assert {key: second[key] for key in (*KEYS, "images")} == {key: first[key] for key in (*KEYS, "images")}


def test_a_data_file_is_a_file_of_references(call, tiny_data, references, tmp_path):
    truth = json.loads(references.read_text())
    (tmp_path / "r.json").write_text(json.dumps([{"image_id": key, "caption": truth[key][0]} for key in truth]))
    options = ["--results", tmp_path / "r.json", "--tokenizer", "python", "--references"]
    assert call(*options, tiny_data)[1][:-1] == call(*options, references)[1][:-1]
    (tmp_path / "no.h5").write_text("no")
    code, _, err = call(*options, tmp_path / "no.h5")
    assert (code, len(err)) == (2, 1)
    assert str(tmp_path / "no.h5") in err[0]


def test_perfect_captions_score_one(call, references, tmp_path):
    truth = json.loads(references.read_text())
    (tmp_path / "r.json").write_text(json.dumps([{"image_id": key, "caption": truth[key][0]} for key in truth]))
    _, out, _ = call("--results", tmp_path / "r.json", "--references", references, "--tokenizer", "python")
    scores = json.loads(out[-1])
    assert [scores[key] for key in KEYS[:5]] == pytest.approx([1] * 5, abs=1e-6)


def test_another_split_and_a_limit(call, tiny_checkpoint, tiny_data, tmp_path):
    words = ("--split", "train", "--limit", 3, "--beam-size", 1, "--batch-size", 2, "--tokenizer", "python")
    _, out, _ = call("--checkpoint", tiny_checkpoint, "--data", tiny_data, "--output", tmp_path / "r.json", *words)
    data = CaptionData(tiny_data)
    names = [row["image_id"] for row in json.loads((tmp_path / "r.json").read_text())]
    assert names == [data.names[i] for i in data.indices("train")[:3]]
    assert json.loads(out[-1])["images"] == 3


def test_too_few_images_to_diagnose_are_refused_before_they_are_captioned(
    call, tiny_checkpoint, tiny_data, monkeypatch
):
    monkeypatch.setattr(evaluating, "evaluate", lambda *_, **__: pytest.fail("it captioned"))
    code, _, err = call("--checkpoint", tiny_checkpoint, "--data", tiny_data, "--limit", 1, "--diagnose")
    assert (code, err) == (2, ["evaluate: diagnosing attention needs two images or more (got 1)"])


def test_a_diagnosis_looks_where_the_search_looks_and_at_every_size(call, two_scales, tiny_data, tmp_path, monkeypatch):
    soft = load_checkpoint(two_scales)
    decoder = dataclasses.replace(TINY_DECODER, attention="hard")
    model, encoder = build_model(soft.encoder, decoder, len(soft.vocabulary))
    save_checkpoint(tmp_path / "hard", Checkpoint(model, encoder, decoder, soft.vocabulary))
    real, asked = evaluating.diagnose, []

    def noted(*subject, location, scale, **options):
        asked.append((location, scale))
        return real(*subject, location=location, scale=scale, **options)

    monkeypatch.setattr(evaluating, "diagnose", noted)
    monkeypatch.setattr(evaluating, "signal_to_noise", lambda *_, scale=0, **__: 10.0 + scale)
    words = ("--checkpoint", tmp_path / "hard", "--data", tiny_data, "--beam-size", 1, "--tokenizer", "python")
    _, out, _ = call(*words, "--diagnose", 4, "--location", "expected")
    found = json.loads(out[-1])
    assert asked == [("expected", 0), ("expected", 1)]
    assert [found[name]["gradient_snr"] for name in ("diagnosis", "diagnosis_48")] == [10.0, 11.0]


def test_what_cannot_be_scored_is_refused_before_and_captions_are_kept(
    call, tiny_checkpoint, tiny_data, tmp_path, monkeypatch
):
    words = ("--checkpoint", tiny_checkpoint, "--data", tiny_data, "--beam-size", 1, "--output", tmp_path / "r.json")
    with monkeypatch.context() as patch:
        patch.setattr(evaluating, "caption_split", lambda *_, **__: pytest.fail("it captioned"))
        code, _, err = call(*words, "--tokenizer", "ptb")
        assert (code, "needs Java" in err[0]) == (2, True)

    def broken(*_, **__):
        raise ValueError("METEOR failed in Java")

    monkeypatch.setattr(evaluating, "score", broken)
    assert call(*words)[::2] == (2, ["evaluate: METEOR failed in Java"])
    assert len(json.loads((tmp_path / "r.json").read_text())) == 4


def test_the_data_file_is_not_written_over(call, tiny_checkpoint, tiny_data, tmp_path):
    data = shutil.copy(tiny_data, tmp_path / "d.h5")
    code, _, err = call("--checkpoint", tiny_checkpoint, "--data", data, "--output", data)
    assert (code, err) == (2, [f"evaluate: --output {data}: is the data file; give another file to write"])
    assert Path(data).read_bytes() == tiny_data.read_bytes()


def test_the_attention_of_every_size_is_diagnosed(call, two_scales, tiny_data):
    words = ("--checkpoint", two_scales, "--data", tiny_data, "--beam-size", 1, "--tokenizer", "python")
    code, out, err = call(*words, "--diagnose", 4)
    assert (code, err) == (0, [])
    found = json.loads(out[-1])
    assert (found["diagnosis"]["locations"], found["diagnosis_48"]["locations"]) == (16, 36)
    headings = [i for i, line in enumerate(out) if line.startswith("pictures of ")]
    assert [out[i] for i in headings] == ["pictures of 32 pixels:", "pictures of 48 pixels:"]
    for i, name in zip(headings, ("diagnosis", "diagnosis_48"), strict=True):
        assert out[i + 2].endswith(f"{found[name]['nll']:.4f}")


def test_a_size_whose_vectors_are_not_stored_is_not_diagnosed(call, tiny_annotations, tmp_path):
    data = CaptionData(tiny_annotations)
    config = dataclasses.replace(data.encoder, scales=(48,))
    model, encoder = build_model(config, TINY_DECODER, len(data.vocabulary), encoder_state=data.encoder_state())
    save_checkpoint(tmp_path / "two", Checkpoint(model, encoder, TINY_DECODER, data.vocabulary))
    words = ("--checkpoint", tmp_path / "two", "--data", tiny_annotations, "--beam-size", 1, "--tokenizer", "python")
    code, out, err = call(*words, "--diagnose", 4)
    assert (code, err) == (0, [])
    found = json.loads(out[-1])
    assert found["diagnosis"]["locations"] == 16
    assert "diagnosis_48" not in found


def test_attention_is_diagnosed_when_asked(call, tiny_checkpoint, tiny_data):
    words = ("--checkpoint", tiny_checkpoint, "--data", tiny_data, "--beam-size", 1, "--tokenizer", "python")
    _, without, _ = call(*words)
    code, out, err = call(*words, "--diagnose", 4)
    assert (code, err) == (0, [])
    scores, found = json.loads(without[-1]), json.loads(out[-1])
    diagnosis = found.pop("diagnosis")
    assert {key: scores[key] for key in KEYS} == {key: found[key] for key in KEYS}
    assert diagnosis["images"] == 4
    assert set(diagnosis["listening"]) == {"exchanged", "random", "uniform", "centre"}
    table = "\n".join(out[:-1])
    assert re.search(rf"entropy / ln L\s+{diagnosis['entropy']:.4f}", table)
    assert re.search(rf"NLL, exchanged\s+\{diagnosis['listening']['exchanged']:+.4f}", table)
    assert re.search(rf"gradient signal/noise\s+{diagnosis['gradient_snr']:.3g}", table)
    assert "diagnosis" not in scores


def captions_of(call, checkpoint: Path, data: Path, path: Path) -> list[str]:
    words = ("--output", path, "--beam-size", 1, "--max-length", 4, "--tokenizer", "python")
    code, _, err = call("--checkpoint", checkpoint, "--data", data, *words)
    assert (code, err) == (0, [])
    return [row["caption"] for row in json.loads(path.read_text())]


def test_pixels_and_annotation_vectors_give_the_same_captions(
    call, tiny_checkpoint, tiny_data, tiny_annotations, tmp_path
):
    one, other = (
        captions_of(call, tiny_checkpoint, data, tmp_path / "r.json") for data in (tiny_data, tiny_annotations)
    )
    assert one == other


def test_a_checkpoint_in_half_precision_still_fits_its_annotation_vectors(
    call, tiny_checkpoint, tiny_annotations, tmp_path
):
    save_checkpoint(tmp_path / "half", load_checkpoint(tiny_checkpoint), half=True)
    assert len(captions_of(call, tmp_path / "half", tiny_annotations, tmp_path / "r.json")) == 4


def test_a_checkpoint_is_scored_with_its_own_search_and_the_table_says_which(
    call, tiny_checkpoint, tiny_annotations, tmp_path
):
    own = SearchConfig(beam_size=2, max_length=3, length_penalty=0.5)
    save_checkpoint(tmp_path / "own", dataclasses.replace(load_checkpoint(tiny_checkpoint), search=own))
    words = ("--checkpoint", tmp_path / "own", "--data", tiny_annotations)
    for told, length, beam in (((), 3, 2), (("--max-length", 4, "--beam-size", 3), 4, 3)):
        code, out, _ = call(*words, *told, "--output", tmp_path / "r.json")
        said = json.loads(out[-1])
        assert (code, said["beam_size"], said["search"]["length_penalty"]) == (0, beam, 0.5)
        captions = [entry["caption"].split() for entry in json.loads((tmp_path / "r.json").read_text())]
        assert max(map(len, captions)) == length


@pytest.mark.parametrize(("end", "unfinished"), [(-1e4, 4), (1e4, 0)], ids=["never ends", "ends at once"])
def test_captions_that_found_no_end_are_counted(end, unfinished, call, tiny_checkpoint, tiny_annotations, tmp_path):
    checkpoint = load_checkpoint(tiny_checkpoint)
    with torch.no_grad():
        checkpoint.model.decoder.get_parameter("L_o.bias")[END] = end
    save_checkpoint(tmp_path / "x", checkpoint)
    words = ("--data", tiny_annotations, "--beam-size", 1, "--max-length", 3, "--tokenizer", "python")
    code, out, _ = call("--checkpoint", tmp_path / "x", *words)
    assert (code, json.loads(out[-1])["unfinished"]) == (0, unfinished)
    assert f"unfinished: {unfinished}" in out


def test_pixels_of_another_size_are_resized(call, tiny_checkpoint, tmp_path):
    settings = BuildSettings(image_size=48, min_count=1)
    build(shapes(10), {"name": "shapes"}, settings, output=tmp_path / "48.h5", device="cpu", workers=0)
    assert len(captions_of(call, tiny_checkpoint, tmp_path / "48.h5", tmp_path / "r.json")) == 1


def other_weights(checkpoint: Checkpoint) -> Checkpoint:
    torch.manual_seed(7)
    encoder, _ = build_encoder(checkpoint.encoder)
    return Checkpoint(
        CaptioningModel(encoder, checkpoint.model.regions, checkpoint.model.decoder),
        checkpoint.encoder,
        checkpoint.decoder,
        checkpoint.vocabulary,
    )


def test_annotation_vectors_of_another_encoder_are_refused(call, tiny_checkpoint, tiny_annotations, tmp_path):
    save_checkpoint(tmp_path / "other", other_weights(load_checkpoint(tiny_checkpoint)))
    code, out, err = call("--checkpoint", tmp_path / "other", "--data", tiny_annotations)
    assert (code, out, len(err)) == (2, [], 1)
    assert "annotations.h5 stores annotation vectors of another encoder than the checkpoint's (resnet18)" in err[0]
    assert "preprocess the photos with --fit crop and without --encoder" in err[0]


def test_annotation_vectors_of_another_network_are_refused(call, tiny_checkpoint, tmp_path):
    encoder = EncoderConfig("mobilenet_v2", layer="features.4", weights=None, image_size=32)
    settings = BuildSettings(image_size=32, min_count=1)
    build(shapes(10), {}, settings, output=tmp_path / "x.h5", encoder=encoder, device="cpu", workers=0)
    code, _, err = call("--checkpoint", tiny_checkpoint, "--data", tmp_path / "x.h5")
    assert (code, len(err)) == (2, 1)
    assert "of another encoder than the checkpoint's (mobilenet_v2)" in err[0]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "give --checkpoint and --data, or --results and --references"),
        (["--checkpoint", "CHECKPOINT"], "give --checkpoint and --data"),
        (["--results", "r.json"], "--results and --references go together"),
        (["--results", "absent.json", "--references", "absent.json"], r"absent\.json"),
        (["--results", "r.json", "--references", "r.json", "--diagnose"], "--diagnose needs --checkpoint and --data"),
        (["--checkpoint", "CHECKPOINT", "--data", "DATA", "--diagnose", "1"], r"--diagnose must be 0 .* \(got 1\)"),
        (["--results", ".", "--references", "."], "directory"),
        (["--checkpoint", "absent", "--data", "DATA"], "absent: no checkpoint folder, nor one of the pretrained"),
        (["--checkpoint", "CHECKPOINT", "--data", "absent.h5"], r"absent\.h5: no such data file"),
        (["--checkpoint", "CHECKPOINT", "--data", "DATA", "--beam-size", "0"], "beam_size must be positive"),
        (["--checkpoint", "CHECKPOINT", "--data", "DATA", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--checkpoint", "CHECKPOINT", "--data", "DATA", "--limit", "-1"], "--limit not negative"),
        (["--checkpoint", "CHECKPOINT", "--data", "DATA", "--device", "abacus"], "abacus"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(call, tiny_checkpoint, tiny_data, words, named):
    there = {"CHECKPOINT": tiny_checkpoint, "DATA": tiny_data}
    code, out, err = call(*(there.get(word, word) for word in words))
    assert (code, out, len(err)) == (2, [], 1)
    assert re.search(named, err[0])


def test_the_real_command_prints_no_traceback(tmp_path, tiny_checkpoint):
    (tmp_path / "x.h5").write_text("no data")
    words = ["-m", "captioning.evaluate", "--checkpoint", tiny_checkpoint, "--data", tmp_path / "x.h5"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"evaluate: .*x\.h5: not an HDF5 file: .*\n", done.stderr)


def test_vectors_of_the_same_network_cut_elsewhere_or_seen_otherwise_are_others(tiny_checkpoint, tiny_annotations):
    checkpoint, data = load_checkpoint(tiny_checkpoint), CaptionData(tiny_annotations)
    check_fits(checkpoint, data)
    for change in ({"layer": "layer2.1.add"}, {"resample": "bilinear"}, {"image_size": 48}):
        other = dataclasses.replace(checkpoint, encoder=dataclasses.replace(checkpoint.encoder, **change))
        with pytest.raises(ValueError, match="annotation vectors of another encoder"):
            check_fits(other, data)


def test_photos_made_square_in_another_way_are_refused(tiny_checkpoint, tiny_data):
    checkpoint, data = load_checkpoint(tiny_checkpoint), CaptionData(tiny_data)
    squashed = dataclasses.replace(checkpoint, encoder=dataclasses.replace(checkpoint.encoder, fit="squash"))
    check_fits(squashed, data)  # scenes are square
    data.source = {"name": "flickr8k"}
    check_fits(checkpoint, data)
    with pytest.raises(ValueError, match=r"was made with --fit crop, .* with --fit squash; preprocess the photos so"):
        check_fits(squashed, data)


def test_output_into_a_folder_is_refused_before_the_work(call, tiny_checkpoint, tiny_data, tmp_path):
    code, out, err = call("--checkpoint", tiny_checkpoint, "--data", tiny_data, "--output", tmp_path)
    assert (code, out, err) == (2, [], [f"evaluate: --output {tmp_path}: is a folder; give the file to write"])


@pytest.mark.parametrize("words", [["--output", "x.json"], ["--limit", "1"], ["--split", "test"], ["--beam-size", "9"]])
def test_what_means_nothing_for_captions_that_are_there_is_refused(words, call, references, tmp_path):
    code, out, err = call("--results", tmp_path / "r.json", "--references", references, *words)
    assert (code, out, len(err)) == (2, [], 1)
    assert f"evaluate: {words[0]}: has no meaning for captions that are there already (--results)" in err[0]
