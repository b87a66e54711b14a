"""Attention on photos as an animation and as a page: every word has its own map, cells and place."""

import base64
import io
import itertools
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from made_photos import WORDS, made_photo, some_maps
from PIL import Image

from captioning import visualize
from captioning.visualize import animation, html, overlay, save_gif
from captioning.visualize_scene import blend, palette, prepare

# The animation


def test_the_animation_shows_the_photo_and_then_every_word(tmp_path):
    photo = made_photo(300, 200)
    frames = animation(photo, WORDS, some_maps(), betas=[0.1, 0.2, 0.3], locations=[0, 1, 2])
    assert len({frame.size for frame in frames}) == 1
    np.testing.assert_array_equal(np.asarray(frames[0])[:200], photo)
    save_gif(frames, tmp_path / "x.gif", 250)
    with Image.open(tmp_path / "x.gif") as gif:
        assert gif.n_frames == 4
        assert gif.info["duration"] == 250


def test_the_sentence_grows_in_place():
    frames = [np.asarray(frame.convert("L")) for frame in animation(made_photo(300, 200), WORDS, some_maps())]
    inked = [frame[200:] < 250 for frame in frames]
    assert not inked[0].any()
    for earlier, later in itertools.pairwise(inked[1:]):
        assert later[earlier].mean() > 0.95  # the earlier words are still there, in a lighter grey
        assert later.sum() > earlier.sum()


def test_every_frame_shows_the_map_of_its_word():
    photo, maps = made_photo(120, 80), some_maps()
    scene = prepare(photo, WORDS, maps)
    frames = [np.asarray(frame) for frame in animation(photo, WORDS, maps)]
    left = (frames[0].shape[1] - 120) // 2
    for frame, own in zip(frames[1:], scene.maps, strict=True):
        np.testing.assert_array_equal(frame[:80, left : left + 120], blend(photo, own))


def test_a_gif_needs_frames_and_time(tmp_path):
    with pytest.raises(ValueError, match="frames is empty"):
        save_gif([], tmp_path / "x.gif")
    with pytest.raises(ValueError, match="at least 20, got 5"):
        save_gif([Image.new("RGB", (2, 2))], tmp_path / "x.gif", 5)


# The page


class Page(HTMLParser):
    """Collects tags and text, and notices tags that are not closed."""

    VOID = frozenset({"meta", "img", "input"})

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.texts = [], [], {}
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


def test_the_page_has_one_button_and_one_map_per_word():
    page = Page(html(made_photo(120, 80), WORDS, some_maps(), locations=[3, 4, 5]))
    assert page.open == []
    assert page.texts["label"] == ["photo", *WORDS]
    maps = [attributes for tag, attributes in page.tags if attributes.get("class") == "map"]
    assert [attributes["data-word"] for attributes in maps] == ["0", "1", "2"]
    assert all("×" in attributes["alt"] for attributes in maps)
    assert [attributes["data-word"] for tag, attributes in page.tags if tag == "svg"] == ["0", "1", "2"]


def test_every_picture_of_the_page_is_the_map_of_its_word():
    photo, maps = made_photo(120, 80), some_maps()
    page = Page(html(photo, WORDS, maps))
    sources = [attributes["src"] for _, attributes in page.tags if attributes.get("class") == "map"]
    for source, own in zip(sources, prepare(photo, WORDS, maps).maps, strict=True):
        picture = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))
        colours = palette() * [1, 1, 1, 255]
        np.testing.assert_array_equal(np.asarray(picture.convert("RGBA")), np.rint(colours).astype(np.uint8)[own])


def test_a_cell_of_the_page_lies_where_it_lies_on_the_photo():
    # Location 9 of 4 x 4 cells is row 2, column 1: of the box 50-150 on a photo of 200 x 100 it is x 75-100, y 50-75.
    page = Page(html(made_photo(200, 100), ["x"], np.full((1, 4, 4), 1 / 16), box=(50, 0, 150, 100), locations=[9]))
    (box,) = [attributes["viewbox"] for tag, attributes in page.tags if tag == "svg"]
    (path,) = [attributes["d"] for tag, attributes in page.tags if tag == "path"]
    assert box == "0 0 200 100"
    assert sorted(path.split("M")[1:]) == [
        "100.00 50.00L100.00 75.00",
        "75.00 50.00L100.00 50.00",
        "75.00 50.00L75.00 75.00",
        "75.00 75.00L100.00 75.00",
    ]


def test_the_places_that_windows_lie_around_are_dots():
    photo, maps = made_photo(200, 100), np.full((1, 4, 4), 1 / 16)
    page = Page(html(photo, ["x"], maps, box=(50, 0, 150, 100), locations=[[9, 4]], window=3))
    (dots,) = [attributes["d"] for _, attributes in page.tags if attributes.get("class") == "dots"]
    assert dots == "M62.50 37.50h0M87.50 62.50h0"
    frame = animation(photo, ["x"], maps, box=(50, 0, 150, 100), locations=[9], window=3)[1]
    assert frame.getpixel(((frame.width - 200) // 2 + 87, 62)) == (0, 213, 238)


def test_the_page_loads_nothing_from_elsewhere():
    source = html(made_photo(120, 80), WORDS, some_maps())
    assert not any(reference in source for reference in ("http:", "https:", "@import", "<link"))
    sources = [attributes["src"] for _, attributes in Page(source).tags if "src" in attributes]
    assert len(sources) == 4
    assert all(address.startswith("data:image/") for address in sources)


def test_words_and_title_are_escaped():
    words = ["<script>alert(1)</script>", '"&', "$maps"]
    source = html(made_photo(60, 40), words, some_maps(), title="<b>t</b>")
    assert "<script>alert" not in source
    assert "<b>" not in source
    assert Page(source).texts["label"] == ["photo", *words]


def test_a_page_of_a_long_caption_of_noisy_maps_is_small():
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3)).astype(np.uint8)
    coarse = np.asarray(Image.fromarray(noise[:90, :90]).resize((900, 900)))
    source = html(coarse, ["word"] * 30, some_maps(30, (14, 14)))
    assert len(source.encode()) < 1_500_000


# Both


def test_where_several_looked_every_cell_is_outlined_once():
    photo, maps, looked = made_photo(200, 100), np.full((2, 4, 4), 1 / 16), [[9, 2, 9], [0, 0, 0]]
    _, axes = overlay(photo, ["x", "y"], maps, locations=looked)
    lines = [[tuple(map(tuple, ends)) for ends in axis.collections[0].get_segments()] for axis in axes[1:]]
    for word, left, top in ((0, 50, 50), (0, 100, 0), (1, 0, 0)):
        assert ((left, top), (left + 50, top)) in lines[word]
    assert [len(each) for each in lines] == [8, 4]
    page = Page(html(photo, ["x", "y"], maps, locations=looked))
    assert [attributes["data-word"] for tag, attributes in page.tags if tag == "svg"] == ["0", "1"]
    assert [attributes["d"].count("M") for tag, attributes in page.tags if tag == "path"] == [8, 4]
    plain, drawn = (np.asarray(animation(photo, ["x", "y"], maps, locations=each)[1]) for each in (None, looked))
    changed = np.nonzero((plain != drawn).any(-1)[:100].any(0))[0]
    shift = (drawn.shape[1] - 200) // 2
    assert changed.min() - shift == pytest.approx(50, abs=2)  # lines are two pixels wide
    assert changed.max() - shift == pytest.approx(150, abs=2)


def test_cells_smaller_than_a_pixel_can_be_outlined():
    frames = animation(made_photo(1600, 12), WORDS, some_maps(), betas=[0.1, 0.2, 0.3], locations=[0, 1, 2])
    assert len(frames) == 4
    assert len(animation(made_photo(1, 1), WORDS, some_maps(), locations=[0, 1, 2])) == 4


def test_every_word_of_page_and_animation_has_its_own_numbers(monkeypatch):
    photo, maps, betas, p = made_photo(120, 80), some_maps(), [0.1, 0.2, 0.3], [0.9, 0.5, 0.25]
    known = {"betas": betas, "log_probs": np.log(p)}
    numbers = [f"β {b:.2f}  p {q:.2f}" for b, q in zip(betas, p, strict=True)]
    peaks = prepare(photo, WORDS, maps).peaks
    wanted = [f"peak {peak:.1f}× uniform  ·  {both}" for peak, both in zip(peaks, numbers, strict=True)]
    page = Page(html(photo, WORDS, maps, **known))
    assert [attributes["data-note"] for _, attributes in page.tags if "data-note" in attributes] == wanted
    seen, real = [], visualize._Sentence.frame
    monkeypatch.setattr(visualize._Sentence, "frame", lambda *x: seen.append(x[3]) or real(*x))
    animation(photo, WORDS, maps, **known)
    assert seen == ["", *numbers]


def test_the_legends_begin_dark_at_nothing_and_end_bright():
    subject = made_photo(60, 40), ["x"], np.full((1, 2, 2), 0.25)
    figure, _ = overlay(*subject)
    (bar,) = [axis for axis in figure.axes if axis.get_label() == "legend"]
    row = np.asarray(bar.images[0].get_array())[0].astype(int).sum(axis=-1)
    assert tuple(bar.images[0].get_extent()) == (0, 1, 0, 1)
    assert row[0] + 200 < row[-1]
    colours = [sum(map(int, found)) for found in re.findall(r"rgb\((\d+) (\d+) (\d+)\)", html(*subject))]
    assert colours[0] + 200 < colours[-1]
