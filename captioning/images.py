"""Open any user's image file safely, make it square for the network, and know the way back for overlays."""

import io
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, BinaryIO, NamedTuple, TypeVar, cast

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from captioning.console import one_line
from captioning.model_config import Fit, Resample

MAX_PIXELS = 100_000_000
"""Larger images are refused before they are decoded: 100 megapixels are 300 MB of RGB, and of 16 bits twice that."""

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    struct.error,
)
"""What Pillow raises of a file that is broken."""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a photo of each EXIF orientation upright."""

T = TypeVar("T")


class Box(NamedTuple):
    """The part of a photo that the network sees: edges in the photo's pixels, as floats."""

    left: float
    top: float
    right: float
    bottom: float


def open_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open an image file as upright RGB: transparency on white, 16 bit and floats scaled, the first frame.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not an image, broken, truncated, or larger than `max_pixels`; names the file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_image(path, max_pixels=max_pixels)


def read_image(file: str | Path | io.IOBase | BinaryIO, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """`open_image` for threads: Pillow's warnings go wherever the process sends them, which is no thread's own.

    Takes a file that is open for reading, too, e.g. an `io.BytesIO`.
    """
    name = file if isinstance(file, (str, Path)) else getattr(file, "name", None)
    path = name if isinstance(name, (str, Path)) else "image data"  # a file without a name may have a number
    if isinstance(file, (str, Path)) and not Path(file).is_file():
        what = "is no ordinary file" if Path(file).exists() else "no such image file"
        raise FileNotFoundError(f"{path}: {what}")
    try:
        with Image.open(cast("str | Path | IO[bytes]", file), formats=_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise ValueError(f"{image.width}x{image.height} pixels are too many; at most {max_pixels:,} are opened")
            return to_rgb(image)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: too many pixels; at most {max_pixels:,} are opened") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: cannot be read as an image: it is none of {', '.join(_FORMATS)}") from error
    except _BROKEN as error:
        raise ValueError(f"{path}: cannot be read as an image: {one_line(error)}") from error


def whole_image(image: Image.Image) -> Image.Image:
    """`to_rgb` of an image that somebody else opened, perhaps a broken file's.

    Raises:
        ValueError: its file is broken or truncated, or it has no pixels.
    """
    if not all(image.size):
        raise ValueError(f"a photo has pixels, got {image.width}x{image.height}")
    try:
        return to_rgb(image)
    except _BROKEN as error:
        raise ValueError(f"cannot be read as an image: {one_line(error)}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as upright RGB, 8 bit. It says no more which way is up, so that nobody turns it again."""
    image.load()  # TIFF files turn themselves
    turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    if turn is not None:  # ImageOps.exif_transpose also rewrites the EXIF block, and fails on a damaged one
        image = image.transpose(turn)
    if image.mode.startswith("I") or image.mode == "F":
        grey = np.nan_to_num(np.array(image, dtype=np.float32), copy=False, posinf=65535.0, neginf=0.0)
        top = 65535.0 if image.mode.startswith("I;16") or grey.max(initial=0) > 255 else 255.0
        if image.mode == "F" and grey.max(initial=0) <= 1:
            top = 1.0
        grey *= 255.0 / top
        image = Image.fromarray(np.rint(np.clip(grey, 0, 255, out=grey), out=grey).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB")
    image.info = {}  # EXIF and XMP would go along
    return image


def batches(photos: Iterable[T], size: int, pixels: Callable[[T], int]) -> Iterator[list[T]]:
    """`size` photos at a time, and fewer of large ones: none is added to a batch that has more than `MAX_PIXELS`."""
    batch, total = list[T](), 0
    for photo in photos:
        batch.append(photo)
        total += pixels(photo)
        if len(batch) == size or total > MAX_PIXELS:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def visible_box(width: int, height: int, fit: Fit) -> Box:
    """What of a (width, height) photo the network's square input shows: all, or the largest square in the centre."""
    if fit == "squash":
        return Box(0.0, 0.0, float(width), float(height))
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return Box(left, top, left + side, top + side)


def to_square(image: Image.Image, size: int, fit: Fit, resample: Resample = "bicubic") -> Image.Image:
    """The network's input: the visible box of an RGB image, resampled to (size, size).

    One resampling step maps the box (with its sub-pixel edges) onto the square, so that `visible_box` is its exact
    inverse and overlays fall where the network looked.
    """
    if image.size == (size, size):
        return image
    box = visible_box(*image.size, fit)
    return image.resize((size, size), Image.Resampling[resample.upper()], box=box, reducing_gap=3.0)


def to_array(image: Image.Image) -> np.ndarray:
    """Pixels as uint8, RGB, HWC, 0-255."""
    return np.asarray(image, dtype=np.uint8)
