"""Any user's image file becomes upright RGB or one clear error, and overlays find their way back to the photo."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from captioning.images import Box, open_image, to_array, to_rgb, to_square, visible_box

RED, BLUE = (255, 0, 0), (0, 0, 255)


def pixels_of(image: Image.Image, path: Path, **options: Any) -> list[tuple[int, ...]]:
    """The RGB values, row by row, of the image after it went through a file."""
    image.save(path, **options)
    opened = open_image(path)
    assert opened.mode == "RGB"
    return [tuple(int(v) for v in pixel) for pixel in to_array(opened).reshape(-1, 3)]


def row(mode: str, *values: object) -> Image.Image:
    image = Image.new(mode, (len(values), 1))
    for x, value in enumerate(values):
        image.putpixel((x, 0), value)  # type: ignore[arg-type]
    return image


def header_of_png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    chunks = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IEND", b"")):
        chunks += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return chunks


def test_black_and_white_becomes_rgb(tmp_path):
    assert pixels_of(row("1", 0, 255), tmp_path / "x.png") == [(0, 0, 0), (255, 255, 255)]


def test_grey_becomes_rgb(tmp_path):
    assert pixels_of(row("L", 0, 100, 255), tmp_path / "x.png") == [(0, 0, 0), (100, 100, 100), (255, 255, 255)]


def test_transparent_grey_lies_on_white(tmp_path):
    # half transparent: 100 * 128/255 + 255 * 127/255 = 177.2
    found = pixels_of(row("LA", (100, 255), (100, 128), (100, 0)), tmp_path / "x.png")
    assert found == [(100, 100, 100), (177, 177, 177), (255, 255, 255)]


def test_transparent_colour_lies_on_white(tmp_path):
    # half transparent: 200 * 128/255 + 255 * 127/255 = 227.4 and 0 + 127
    found = pixels_of(row("RGBA", (200, 0, 0, 255), (200, 0, 0, 128), (9, 9, 9, 0)), tmp_path / "x.png")
    assert found == [(200, 0, 0), (227, 127, 127), (255, 255, 255)]


def test_a_palette_keeps_its_colours(tmp_path):
    image = row("P", 0, 1)
    image.putpalette([*RED, *BLUE])
    assert pixels_of(image, tmp_path / "x.png") == [RED, BLUE]


def test_the_transparent_entry_of_a_palette_lies_on_white(tmp_path):
    image = row("P", 0, 1)
    image.putpalette([*RED, *BLUE])
    assert pixels_of(image, tmp_path / "x.png", transparency=0) == [(255, 255, 255), BLUE]


def test_the_transparent_value_of_a_grey_image_lies_on_white(tmp_path):
    assert pixels_of(row("L", 7, 8), tmp_path / "x.png", transparency=7) == [(255, 255, 255), (8, 8, 8)]


def test_cmyk_becomes_rgb(tmp_path):
    found = pixels_of(row("CMYK", (0, 255, 255, 0), (255, 255, 0, 0), (0, 0, 0, 255)), tmp_path / "x.tif")
    assert found == [RED, BLUE, (0, 0, 0)]


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    # 65535 -> 255, 128 * 257 -> 128, and 255 of 65535 is 1 of 255
    found = pixels_of(row("I;16", 65535, 128 * 257, 257, 0), tmp_path / "x.png")
    assert found == [(255,) * 3, (128,) * 3, (1,) * 3, (0,) * 3]


def test_a_dark_sixteen_bit_image_stays_dark(tmp_path):
    # 257 are one of 255; the nearest value is taken
    assert pixels_of(row("I;16", 129, 128), tmp_path / "x.png") == [(1, 1, 1), (0, 0, 0)]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_wide_grey_values_are_scaled_when_they_exceed_eight_bits(mode, tmp_path):
    assert pixels_of(row(mode, 200, 255, 0), tmp_path / "x.tif") == [(200,) * 3, (255,) * 3, (0,) * 3]
    assert pixels_of(row(mode, 65535, 514, 0), tmp_path / "x.tif") == [(255,) * 3, (2,) * 3, (0,) * 3]


# What a viewer does to the stored 2x1 image [red, blue] for each EXIF orientation: 1 nothing, 2 mirrored, 3 turned by
# 180 degrees, 4 upside down, 5 transposed, 6 turned clockwise, 7 transversed, 8 turned anti-clockwise.
@pytest.mark.parametrize(
    ("orientation", "expected"),
    [
        (1, [[RED, BLUE]]),
        (2, [[BLUE, RED]]),
        (3, [[BLUE, RED]]),
        (4, [[RED, BLUE]]),
        (5, [[RED], [BLUE]]),
        (6, [[RED], [BLUE]]),
        (7, [[BLUE], [RED]]),
        (8, [[BLUE], [RED]]),
    ],
)
def test_exif_orientation_is_applied(orientation, expected, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    row("RGB", RED, BLUE).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(to_array(open_image(tmp_path / "x.png")), expected)


def test_a_malformed_exif_block_hides_no_photo(tmp_path):
    # Two entries: a width (0x0100) that is the text "x" instead of a number, and the orientation 3 (0x0112, SHORT).
    entries = struct.pack("<HHI4s", 0x0100, 2, 2, b"x") + struct.pack("<HHIHH", 0x0112, 3, 1, 3, 0)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + struct.pack("<I", 0)
    row("RGB", RED, BLUE).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(to_array(open_image(tmp_path / "x.png")), [[BLUE, RED]])


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert set(map(tuple, to_array(open_image(tmp_path / "x.gif")).reshape(-1, 3).tolist())) == {RED}


def test_a_truncated_file_is_one_line_that_names_it(tmp_path):
    path = tmp_path / "cut.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"cut\.jpg: cannot be read as an image: .*truncated") as error:
        open_image(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"no image at all", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_no_photo_is_refused(content, tmp_path):
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.jpg: cannot be read as an image"):
        open_image(tmp_path / "x.jpg")


@pytest.mark.parametrize(("name", "said"), [("absent.jpg", "no such image file"), (".", "is no ordinary file")])
def test_a_missing_file_is_named(name, said, tmp_path):
    with pytest.raises(FileNotFoundError, match=said):
        open_image(tmp_path / name)


@pytest.mark.parametrize("side", [10_001, 60_000, 2_000_000_000])
def test_a_huge_image_is_refused_before_it_is_decoded(side, tmp_path):
    (tmp_path / "bomb.png").write_bytes(header_of_png(side, side))
    with pytest.raises(ValueError, match=r"bomb\.png: .*too many.*100,000,000") as error:
        open_image(tmp_path / "bomb.png")
    assert "\n" not in str(error.value)


def test_the_limit_of_pixels_is_inclusive(tmp_path):
    Image.new("RGB", (5, 4)).save(tmp_path / "x.png")
    assert open_image(tmp_path / "x.png", max_pixels=20).size == (5, 4)
    with pytest.raises(ValueError, match=r"x\.png: .*5x4 pixels are too many; at most 19"):
        open_image(tmp_path / "x.png", max_pixels=19)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_damaged_file_is_opened_or_refused_with_its_name(kind, tmp_path):
    rng = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "damaged"
    Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(path, kind, exif=exif)
    whole, errors = path.read_bytes(), []
    for _ in range(150):
        damaged = bytearray(whole)
        for place in rng.integers(0, min(len(whole), 200), 4):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            open_image(path)
        except ValueError as error:
            errors.append(str(error))
    assert errors
    assert [error for error in errors if not error.startswith(f"{path}: ") or "\n" in error] == []


def test_an_image_in_memory_is_made_rgb_like_a_file():
    assert to_rgb(row("RGBA", (9, 9, 9, 0))).getpixel((0, 0)) == (255, 255, 255)


def test_the_crop_shows_the_largest_square_in_the_centre():
    assert visible_box(600, 300, "crop") == Box(150, 0, 450, 300)
    assert visible_box(300, 601, "crop") == Box(0, 150.5, 300, 450.5)


def test_the_squashed_photo_is_all_visible():
    assert visible_box(600, 300, "squash") == Box(0, 0, 600, 300)


def centre_of_red(image: Image.Image) -> tuple[float, float]:
    """(x, y), in pixels, of the mean place of what is red on black."""
    red = to_array(image)[..., 0].astype(float)
    y, x = np.indices(red.shape)
    return float((red * (x + 0.5)).sum() / red.sum()), float((red * (y + 0.5)).sum() / red.sum())


# A block of 60x60 with its centre at (330, 90) of a 600x300 photo, seen in a square of 100 pixels:
# crop: the box begins at x = 150 and 3 pixels become one: ((330 - 150) / 3, 90 / 3) = (60, 30), 20 wide and high;
# squash: 6 pixels become one in x and 3 in y: (330 / 6, 90 / 3) = (55, 30), 10 wide and 20 high.
# The same at ten times the size, where Pillow first reduces by a whole factor.
@pytest.mark.parametrize("scale", [1, 10])
@pytest.mark.parametrize(("fit", "centre", "area"), [("crop", (60, 30), 400), ("squash", (55, 30), 200)])
def test_a_block_of_a_wide_photo_falls_where_the_visible_box_says(fit, centre, area, scale):
    photo = Image.new("RGB", (600 * scale, 300 * scale))
    photo.paste(RED, tuple(v * scale for v in (300, 60, 360, 120)))
    square = to_square(photo, 100, fit)
    assert square.size == (100, 100)
    assert centre_of_red(square) == pytest.approx(centre, abs=0.05)
    assert to_array(square)[..., 0].sum() / 255 == pytest.approx(area, rel=0.03)


@pytest.mark.parametrize("fit", ["crop", "squash"])
@pytest.mark.parametrize("size", [(301, 200), (200, 333), (97, 97)])
def test_the_visible_box_leads_back_to_the_photo(fit, size):
    x, y = size[0] / 2 + 30, size[1] / 2 - 20
    photo = Image.new("RGB", size)
    photo.paste(RED, (round(x - 5.5), round(y - 5.5), round(x + 5.5), round(y + 5.5)))
    box = visible_box(size[0], size[1], fit)
    u, v = centre_of_red(to_square(photo, 64, fit))
    back = (box.left + u / 64 * (box.right - box.left), box.top + v / 64 * (box.bottom - box.top))
    assert back == pytest.approx(centre_of_red(photo), abs=0.15)


def test_a_square_of_the_right_size_is_left_as_it_is():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    for fit in ("crop", "squash"):
        np.testing.assert_array_equal(to_array(to_square(photo, 32, fit)), to_array(photo))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_opened_photo_is_turned_once_only(orientation, kind, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x", kind, exif=exif)
    opened = open_image(tmp_path / "x")
    assert opened.size == ((12, 8) if orientation < 5 else (8, 12))
    np.testing.assert_array_equal(to_array(to_rgb(opened)), to_array(opened))


def test_grey_floats_up_to_one_are_scaled(tmp_path):
    assert pixels_of(row("F", 0.0, 0.5, 1.0), tmp_path / "x.tif") == [(0,) * 3, (128,) * 3, (255,) * 3]
    assert pixels_of(row("F", float("nan"), 1.0), tmp_path / "x.tif") == [(0,) * 3, (255,) * 3]
