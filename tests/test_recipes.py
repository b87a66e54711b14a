"""The recipes whose scores are written down stay what was measured; so do the searches of the checkpoints."""

import hashlib
import json

import pytest

from captioning import load_captioner
from captioning.config import to_dict
from captioning.settings import parse_settings
from preprocess.shapes import make_scene

MEASURED = {
    "flickr8k_hard": "d8f70f36ea63",
    "flickr8k_hard_tuned": "67a5efa42db6",
    "flickr8k_soft": "e911e3030941",
    "flickr8k_soft_finetuned": "d1935b1c3a87",
    "flickr8k_soft_tuned": "28054ef8d90d",
    "shapes_hard": "1ec926c03c5c",
    "shapes_soft": "26f28431ef45",
}
"""SHA-256 of all that a recipe comes to, the defaults that it leans on too; its header and docs/results.md have scores.

Who changes one, measures it, and writes down its scores and this. A new setting changes all of them and no score.
"""


@pytest.mark.parametrize("name", MEASURED)
def test_a_recipe_is_what_its_scores_were_measured_with(name):
    values = to_dict(parse_settings(["--config", name, "--data", "d.h5", "--output", "runs/x"]))
    found = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
    assert found == MEASURED[name], f"{name} or a default has changed: measure it again, see MEASURED"


@pytest.mark.parametrize(("name", "score"), [("flickr8k-soft", -2.0089), ("flickr8k-hard", -1.6338)])
def test_a_checkpoint_searches_and_says_as_it_did_when_it_was_scored(name, score):
    captioner = load_captioner(name)
    search = captioner.ensemble.search
    assert (search.beam_size, search.length_penalty, search.no_repeat_ngram, search.mirror) == (5, 0.8, 2, True)
    caption = captioner.caption(make_scene(0, 0).render(200))[0]
    assert caption.score == pytest.approx(score, abs=0.003)  # weights, pixels, their statistics, the search
