"""Attention on photos: geometry, honest colours, the figure, and what is refused."""

import math
import subprocess
import sys

import numpy as np
import pytest
from made_photos import WORDS, made_photo, one_hot, some_maps
from PIL import Image

from captioning.visualize import animation, html, overlay, place, upsample
from captioning.visualize_scene import blend, legend_ticks, paint, prepare


def centroid(density):
    """Centre of mass in pixels, (x, y): the pixel [0, 1) has its centre at 0.5."""
    rows, columns = np.indices(density.shape) + 0.5
    mass = np.nan_to_num(density)
    return (columns * mass).sum() / mass.sum(), (rows * mass).sum() / mass.sum()


def corners(axis):
    """The left, upper, right and lower end of all lines of a tile's outline."""
    points = np.concatenate(axis.collections[0].get_segments())
    return (*points.min(axis=0), *points.max(axis=0))


def pictures(figure_and_axes):
    return [np.asarray(axis.images[0].get_array()) for axis in figure_and_axes[1]]


# Geometry


@pytest.mark.parametrize("smooth", [True, False])
def test_a_cell_stays_centred_where_it_was(smooth):
    # 14 cells over 224 pixels are 16 each: row 5 spans 80-96, column 8 spans 128-144, on 224 x 224.
    pixels = upsample(one_hot(5, 8, (14, 14)), (224, 224), smooth=smooth)
    assert centroid(pixels) == pytest.approx((136.0, 88.0), abs=1e-3)


def test_a_size_that_is_no_multiple_of_the_grid_does_not_shift_either():
    # 7 cells over 100 x 150 pixels: row 3 is the middle, column 2 has its centre at 2.5 / 7 of the width.
    pixels = upsample(one_hot(3, 2), (100, 150))
    assert centroid(pixels) == pytest.approx((150 * 2.5 / 7, 50.0), abs=0.02)


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("cell", [(0, 0), (3, 3), (0, 6), (6, 2)])
def test_no_mass_is_lost_even_at_the_border(cell, smooth):
    pixels = upsample(0.25 * one_hot(*cell), (90, 61), smooth=smooth)
    assert pixels.sum() == pytest.approx(0.25, abs=1e-5)
    assert pixels.min() >= 0


def test_unsmoothed_cells_are_plain_rectangles():
    pixels = upsample(np.array([[0.4, 0.6]]), (2, 4), smooth=False)
    np.testing.assert_allclose(pixels, [[0.1, 0.1, 0.15, 0.15]] * 2, rtol=1e-6)


def test_smoothing_is_a_gaussian_of_half_a_cell():
    # One cell of 100 pixels in a row of nine, far from both ends: a box of variance 1/12 and a Gaussian of 1/4.
    row = upsample(one_hot(0, 4, (1, 9)), (1, 900))[0].astype(float)
    position = (np.arange(900) + 0.5) / 100 - 4.5
    assert (row * position**2).sum() == pytest.approx(1 / 12 + 1 / 4, rel=1e-3)


@pytest.mark.parametrize("grid", [(1, 1), (1, 3), (7, 7), (14, 14), (5, 9)])
def test_a_uniform_map_stays_uniform_up_to_the_border(grid):
    pixels = upsample(np.full(grid, 1 / math.prod(grid)), (50, 40))
    np.testing.assert_allclose(pixels, 1 / 2000, rtol=1e-5)


def test_a_cell_of_a_centre_crop_lands_on_the_photo():
    # A 900 x 600 photo, centre crop 600 x 600 from x = 150: with 6 x 6 cells of 100 pixels, cell (row 2, column 3)
    # spans x 450-550 and y 200-300.
    density = place(one_hot(2, 3, (6, 6)), (150, 0, 750, 600), (600, 900))
    assert centroid(density) == pytest.approx((500.0, 250.0), abs=0.01)
    hard = place(one_hot(2, 3, (6, 6)), (150, 0, 750, 600), (600, 900), smooth=False)
    rows, columns = np.nonzero(np.nan_to_num(hard) > 1e-6)
    assert (columns.min(), columns.max(), rows.min(), rows.max()) == (450, 549, 200, 299)
    assert hard[250, 500] == pytest.approx(36.0)  # all of the attention on one of 36 cells


def test_a_squashed_photo_spreads_its_map_over_the_whole_photo():
    # 4 x 4 cells on 400 wide and 200 high: cell (0, 1) of 100 x 50 pixels.
    density = place(one_hot(1, 1, (4, 4)), (0, 0, 400, 200), (200, 400), smooth=False)
    assert centroid(density) == pytest.approx((150.0, 75.0))
    assert not np.isnan(density).any()


def test_what_the_network_never_saw_is_nan():
    density = place(np.full((2, 2), 0.25), (1.0, 0.0, 3.0, 2.0), (2, 4))
    assert np.isnan(density).tolist() == [[True, False, False, True]] * 2


def test_a_pixel_on_the_edge_of_the_box_counts_by_what_was_seen_of_it():
    density = place(np.full((3, 3), 1 / 9), (0.5, 0.25, 4.5, 4.25), (5, 5))
    np.testing.assert_allclose(density, 1.0, rtol=1e-5)


def test_rounding_errors_in_the_box_do_not_matter():
    density = place(np.full((2, 2), 0.25), (1 - 1e-12, 0.0, 3 + 1e-12, 2.0), (2, 4))
    assert np.isnan(density).tolist() == [[True, False, False, True]] * 2


# Colours


def test_equal_attention_has_equal_colours_in_all_tiles():
    # The second map equals the first in its left half, and gathers the right half's attention in the last cell.
    flat, peaked = np.full((1, 8), 1 / 8), np.array([[1 / 8] * 4 + [0, 0, 0, 1 / 2]])
    grey = np.full((50, 400, 3), 128, dtype=np.uint8)
    _, first, second = pictures(overlay(grey, ["flat", "peaked"], np.stack([flat, peaked])))
    np.testing.assert_array_equal(first[:, :50], second[:, :50])
    assert second[-1, -1].sum() > first[-1, -1].sum() + 60


def test_a_uniform_map_is_one_colour():
    grey = np.full((120, 180, 3), 128, dtype=np.uint8)
    uniform = pictures(overlay(grey, ["x"], np.full((1, 7, 7), 1 / 49)))[1]
    assert len(np.unique(uniform.reshape(-1, 3), axis=0)) == 1


def test_colours_go_with_the_square_root_of_the_multiple_and_the_legend_says_so():
    multiples = np.array([[0.0, 1.0, 4.0, 16.0, 99.0]])
    assert paint(multiples, 16.0).tolist() == [[0, 63, 126, 253, 253]]  # 253 times 0, 1/4, 1/2 and 1
    assert legend_ticks(16.0) == {"0×": 0.0, "1×": 0.25, "4×": 0.5, "16×": 1.0}


def test_a_flat_map_does_not_glow():
    # The scale reaches 4 times uniform at least: uniform attention has half of its height, by the square root.
    scene = prepare(np.full((70, 70, 3), 128, np.uint8), ["x"], np.full((1, 7, 7), 1 / 49))
    assert scene.maximum == 4
    assert np.abs(scene.maps.astype(int) - 126.5).max() <= 1
    peaked = prepare(np.full((70, 70, 3), 128, np.uint8), ["x"], one_hot(3, 3)[None])
    assert peaked.maximum == pytest.approx(peaked.peaks[0])
    assert peaked.maximum > 10


def test_more_attention_is_never_darker_on_grey():
    grey = np.full((1, 254, 3), 128, dtype=np.uint8)
    luminance = blend(grey, np.arange(254, dtype=np.uint8)[None])[0] @ np.array([0.2126, 0.7152, 0.0722])
    assert np.diff(luminance).min() > -1.5  # within the rounding to whole levels of three channels
    assert luminance[-1] > luminance[0] + 100


def test_the_photo_stays_visible_under_every_level():
    black, white = np.zeros((1, 256, 3), np.uint8), np.full((1, 256, 3), 255, np.uint8)
    levels = np.arange(256, dtype=np.uint8)[None]
    contrast = blend(white, levels).astype(int) - blend(black, levels)
    assert contrast[:, :254].min() >= 0.3 * 255


def test_unseen_is_hatched_and_unlike_unattended():
    alphas = np.stack([one_hot(0, 0)])
    grey = np.full((100, 200, 3), 128, dtype=np.uint8)
    picture = pictures(overlay(grey, ["x"], alphas, box=(50, 0, 150, 100)))[1]
    outside = np.unique(picture[:, :50].reshape(-1, 3), axis=0)
    assert len(outside) == 2
    unattended = picture[90, 140].astype(int)
    assert np.abs(outside.astype(int) - unattended).max(axis=1).min() > 40


# The figure


def test_one_tile_for_the_photo_and_one_per_word():
    photo = made_photo(120, 80)
    _, axes = overlay(photo, WORDS, some_maps(), betas=[0.5, 0.25, 1], log_probs=np.log([0.9, 0.5, 0.001]))
    assert [axis.texts[0].get_text() for axis in axes] == ["photo", *WORDS]
    assert [axis.texts[1].get_text() for axis in axes[1:]] == ["β 0.50  p 0.90", "β 0.25  p 0.50", "β 1.00  p < 0.01"]
    np.testing.assert_array_equal(axes[0].images[0].get_array(), photo)


@pytest.mark.parametrize(("width", "height"), [(300, 200), (200, 300), (800, 100), (100, 800)])
def test_tiles_keep_the_aspect_of_the_photo(width, height):
    _, axes = overlay(made_photo(width, height), WORDS, some_maps())
    for axis in axes:
        extent = axis.get_window_extent()
        assert extent.width / extent.height == pytest.approx(width / height, rel=0.01)


def test_large_photos_are_shrunk_with_their_box():
    # 2000 x 1000 becomes 640 x 320, and the box 500-1500 becomes 160-480.
    scene = prepare(made_photo(2000, 1000), ["x"], np.full((1, 2, 2), 0.25), box=(500, 0, 1500, 1000))
    assert scene.photo.shape == (320, 640, 3)
    seen = np.nonzero((scene.maps[0] < 254).all(axis=0))[0]
    assert (seen.min(), seen.max()) == (160, 479)


@pytest.mark.parametrize(("width", "height"), [(300, 200), (200, 300)])
def test_labels_of_a_long_caption_do_not_collide(width, height):
    words = ["counterrevolutionary", "incomprehensibilities-and-more-of-them", *(["$x_1$"] * 13), "<end>"]
    figure, axes = overlay(made_photo(width, height), words, some_maps(16), betas=[0.5] * 16, title="t" * 400)
    page = figure.bbox
    labels = [text.get_window_extent() for axis in axes for text in axis.texts]
    labels += [text.get_window_extent() for text in figure.texts]
    for index, label in enumerate(labels):
        assert page.x0 <= label.x0 < label.x1 <= page.x1
        assert page.y0 <= label.y0 < label.y1 <= page.y1
        assert not any(label.overlaps(other) for other in labels[index + 1 :])


def test_the_sampled_cell_of_hard_attention_is_outlined():
    # Location 9 of 4 x 4 cells is row 2, column 1; cells of the centre crop are 25 x 25 pixels from x = 50.
    _, axes = overlay(made_photo(200, 100), ["x"], np.full((1, 4, 4), 1 / 16), box=(50, 0, 150, 100), locations=[9])
    assert corners(axes[1]) == (75.0, 50.0, 100.0, 75.0)
    assert len(axes[1].collections) == 1  # the outline says it: no dot


@pytest.mark.parametrize(
    ("location", "seen", "dot"),
    [
        (9, (50.0, 25.0, 125.0, 100.0), (87.5, 62.5)),
        (15, (100.0, 50.0, 150.0, 100.0), (137.5, 87.5)),
        (4, (50.0, 0.0, 100.0, 75.0), (62.5, 37.5)),
    ],
)
def test_the_window_is_outlined_as_far_as_the_grid_goes_and_the_cell_in_its_middle_is_a_dot(location, seen, dot):
    maps = np.full((1, 4, 4), 1 / 16)
    _, axes = overlay(made_photo(200, 100), ["x"], maps, box=(50, 0, 150, 100), locations=[location], window=3)
    assert corners(axes[1]) == seen
    np.testing.assert_array_equal(axes[1].collections[1].get_offsets(), [dot])


def test_windows_that_overlap_have_one_border_around_all_that_they_show():
    # Squares of 3 around cells 5 and 10 of 4 x 4, one pixel each: rows and columns 0-2 and 1-3, less two corners.
    scene = prepare(made_photo(4, 4), ["x"], np.full((1, 4, 4), 1 / 16), locations=[[5, 10]], window=3)
    level = {(0, 0, 3, 0), (3, 1, 4, 1), (0, 3, 1, 3), (1, 4, 4, 4)}
    upright = {(0, 0, 0, 3), (1, 3, 1, 4), (3, 0, 3, 1), (4, 1, 4, 4)}
    assert {(*line.start, *line.stop) for line in scene.outlines[0]} == level | upright
    assert scene.dots[0] == ((1.5, 1.5), (2.5, 2.5))


def test_what_was_not_seen_between_windows_has_a_border_of_its_own():
    # Cells 1, 3, 5 and 7 of 3 x 3: the middle is surrounded, and so are the four corners.
    scene = prepare(made_photo(3, 3), ["x"], np.full((1, 3, 3), 1 / 9), locations=[[1, 3, 5, 7]])
    length = sum(math.dist(*line) for line in scene.outlines[0])
    assert length == 16  # four unit squares that touch at corners only
    assert not any(scene.dots)


def test_the_legend_says_what_outlines_and_dots_are():
    subject = made_photo(8, 8), ["x"], np.full((1, 4, 4), 1 / 16)
    assert prepare(*subject).legend == ("attention ÷ uniform, for all words",)
    assert prepare(*subject, box=(0, 0, 8, 4), locations=[9]).legend[1:] == (
        "hatched: not seen by the network",
        "outlined: where hard attention looked",
    )
    figure, _ = overlay(*subject, locations=[9], window=3)
    assert any("outlined: what hard attention saw; dots" in text.get_text() for text in figure.texts)


def test_columns_are_obeyed():
    _, axes = overlay(made_photo(60, 40), WORDS, some_maps(), columns=4)
    assert len({round(axis.get_position().y0, 6) for axis in axes}) == 1


def test_neither_pyplot_nor_a_display_is_needed(tmp_path):
    script = (
        "import sys, numpy as np; from captioning.visualize import overlay;"
        "figure, _ = overlay(np.zeros((20, 30, 3), np.uint8), ['x'], np.full((1, 2, 2), 0.25));"
        "figure.savefig(sys.argv[1]); sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    picture = tmp_path / "overlay.png"
    subprocess.run([sys.executable, "-c", script, str(picture)], check=True, env={"MPLCONFIGDIR": str(tmp_path)})
    assert Image.open(picture).size[0] > 100


# Errors


def test_a_model_without_attention_has_nothing_to_overlay():
    for draw in (overlay, animation, html):
        with pytest.raises(ValueError, match=r"^this model has no attention: nothing to overlay$"):
            draw(made_photo(6, 4), WORDS, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"photo": np.zeros((4, 6, 3))}, r"photo must be uint8 of shape \(H, W, 3\), got float64"),
        ({"photo": np.zeros((4, 6), np.uint8)}, r"photo must be uint8 .* of shape \(4, 6\)"),
        ({"words": []}, "words must be a non-empty sequence of strings"),
        ({"words": "abc"}, "words must be a non-empty sequence of strings"),
        ({"words": ["a", "b"]}, r"T = 2 words, got shape \(3, 7, 7\)"),
        ({"alphas": np.full((3, 49), 1 / 49)}, r"alphas must have shape \(T, h, w\)"),
        ({"alphas": np.full((3, 7, 7), np.nan)}, "alphas must be finite and non-negative"),
        ({"alphas": -some_maps()}, "alphas must be finite and non-negative"),
        ({"box": (0, 0, 7, 4)}, r"box must be .* right <= 6 .* got \(0, 0, 7, 4\)"),
        ({"box": (3, 0, 3, 4)}, "box must be"),
        ({"box": (0, 0, float("nan"), 4)}, "box must be"),
        ({"betas": [0.5]}, r"betas must be one finite number per word, shape \(3,\)"),
        ({"log_probs": [0.0, -1.0, float("nan")]}, "log_probs must be one finite number"),
        ({"locations": [0, 1, 49]}, "locations must be whole numbers from 0 to 48"),
        ({"locations": [[0, 1], [1, 49], [2, 2]]}, "locations must be whole numbers from 0 to 48"),
        ({"locations": [[0, 1], [1], [2, 2]]}, "locations must be one number per word, or equally many"),
        ({"locations": [0, 1]}, r"locations must have shape \(3,\) or \(3, G\), got \(2,\)"),
        ({"locations": np.zeros((3, 1, 1))}, r"locations must have shape .* got \(3, 1, 1\)"),
        ({"locations": [0, 1, 1.5]}, "locations must be whole numbers from 0 to 48"),
        ({"window": 2}, "window must be an odd number of cells, got 2"),
        ({"window": -1}, "window must be an odd number of cells, got -1"),
        ({"columns": 0}, "columns must be at least 1, got 0"),
    ],
)
def test_a_wrong_argument_is_named(change, message):
    arguments = {"photo": made_photo(6, 4), "words": WORDS, "alphas": some_maps(), **change}
    with pytest.raises(ValueError, match=message) as caught:
        overlay(arguments.pop("photo"), arguments.pop("words"), arguments.pop("alphas"), **arguments)
    assert "\n" not in str(caught.value)


def test_a_photo_like_a_ribbon_makes_no_giant_figure(tmp_path):
    figure, _ = overlay(np.zeros((640, 1, 3), dtype=np.uint8), ["one"] * 30, np.full((30, 4, 4), 1 / 16))
    width, height = figure.get_size_inches() * figure.dpi
    assert width * height < 40e6
    figure.savefig(tmp_path / "x.png", format="png")
    with Image.open(tmp_path / "x.png") as drawn:
        assert drawn.size == (round(width), round(height))
