"""Attention on the photo's pixels: geometry, colours, and the checked scene that every picture is drawn from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, SupportsFloat, TypedDict

import numpy as np
from PIL import Image

BLUR = 0.5
"""Standard deviation of the Gaussian, in cells. (The original code's 20 pixels are 1.25 cells, which hides peaks.)"""
LONGEST_SIDE = 640
"""Photos are drawn no larger than this many pixels."""
SMALLEST_MAXIMUM = 4.0
"""The colour scale always reaches at least this multiple of uniform, so that flat maps look flat."""

LEVELS = 254
"""Palette entries 0..253 are attention, 254 and 255 the two stripes of the hatching."""
_ANCHORS = np.array(  # level 0..1, then red, green, blue, opacity: a dark veil that turns into a warm glow
    [
        (0.00, 10, 12, 22, 0.60),
        (0.25, 52, 24, 70, 0.48),
        (0.50, 196, 48, 80, 0.46),
        (0.75, 252, 132, 36, 0.52),
        (1.00, 255, 238, 120, 0.64),
    ]
)
_HATCHING = ((128, 130, 136, 0.84), (186, 188, 194, 0.84))


Numbers = Sequence[SupportsFloat] | np.ndarray
Cells = Sequence[SupportsFloat] | Sequence[Sequence[SupportsFloat]] | np.ndarray


class Rect(NamedTuple):
    """A rectangle of the photo: edges in pixels, as floats."""

    left: float
    top: float
    right: float
    bottom: float


class Point(NamedTuple):
    """A point of the photo, in pixels from its left upper corner, as floats."""

    x: float
    y: float


class Line(NamedTuple):
    """A straight line on the photo, upright or level."""

    start: Point
    stop: Point


class Looked(TypedDict, total=False):
    """What else is known of a caption, as `prepare` takes it."""

    box: Numbers | None
    betas: Numbers | None
    log_probs: Numbers | None
    locations: Cells | None
    window: int


@dataclass(frozen=True)
class Scene:
    """A captioned photo, checked, shrunk and painted: what figure, animation and page are drawn from.

    Attributes:
        photo: uint8 (H, W, 3).
        words: one per map.
        maps: uint8 (T, H, W), indices into `palette()`.
        notes: per word its gate and probability in print, or an empty string.
        peaks: per word the largest attention drawn, in multiples of uniform.
        outlines: per word the border of what hard attention saw, in the photo's pixels; empty without it.
        dots: per word the middles of the cells that it took, where it saw more than these cells.
        maximum: the multiple of uniform at the top of the colour scale.
        cropped: whether a part of the photo is hatched.
        legend: what the colours mean, and what else is drawn, a line each.
    """

    photo: np.ndarray
    words: tuple[str, ...]
    maps: np.ndarray
    notes: tuple[str, ...]
    peaks: tuple[float, ...]
    outlines: tuple[tuple[Line, ...], ...]
    dots: tuple[tuple[Point, ...], ...]
    maximum: float
    cropped: bool

    @property
    def legend(self) -> tuple[str, ...]:
        notes = ["attention ÷ uniform, for all words"]
        if self.cropped:
            notes.append("hatched: not seen by the network")
        if any(self.dots):
            notes.append("outlined: what hard attention saw; dots: the places that it took")
        elif any(self.outlines):
            notes.append("outlined: where hard attention looked")
        return tuple(notes)


def upsample(alpha: np.ndarray, size: tuple[int, int], *, smooth: bool = True) -> np.ndarray:
    """Enlarge attention to pixels: every cell becomes its rectangle, blurred by a Gaussian of `BLUR` cells.

    Mass is preserved exactly (what the blur would carry over the border is mirrored back), a uniform map stays uniform,
    and nothing shifts: a cell's mass stays centred on the cell.

    Args:
        alpha: (..., h, w), non-negative.
        size: (H, W) in pixels.
        smooth: False leaves the cells as hard-edged rectangles.

    Returns:
        float32 (..., H, W) with the sums of `alpha`.
    """
    alpha = _checked_maps("alpha", alpha)
    rows = _spread(alpha.shape[-2], size[0], 0.0, float(size[0]), smooth)
    columns = _spread(alpha.shape[-1], size[1], 0.0, float(size[1]), smooth)
    return (rows @ alpha @ columns.T).astype(np.float32)


def place(alpha: np.ndarray, box: Numbers, photo_size: tuple[int, int], *, smooth: bool = True) -> np.ndarray:
    """Lay attention on the part of the photo that the network saw.

    Args:
        alpha: (..., h, w), non-negative.
        box: (left, top, right, bottom) in the photo's pixels, fractions allowed: what the grid covers.
        photo_size: (H, W) in pixels.
        smooth: as for `upsample`.

    Returns:
        float32 (..., H, W): attention per area in multiples of uniform attention over the box; NaN outside the box.
    """
    alpha = _checked_maps("alpha", alpha)
    left, top, right, bottom = _checked_box(box, photo_size)
    rows = _spread(alpha.shape[-2], photo_size[0], top, bottom, smooth)
    columns = _spread(alpha.shape[-1], photo_size[1], left, right, smooth)
    with np.errstate(invalid="ignore"):  # 0/0 outside the box is the NaN that is meant
        rows /= rows.mean(axis=1, keepdims=True)
        columns /= columns.mean(axis=1, keepdims=True)
    return (rows @ alpha @ columns.T).astype(np.float32)


def _spread(cells: int, pixels: int, start: float, stop: float, smooth: bool) -> np.ndarray:
    """(pixels, cells): the share of each cell's mass in each pixel, for cells that divide [start, stop] evenly.

    The grid is continued by mirror images on both sides, blurred, cut at the border, folded back; columns sum to one.
    """
    beyond = 4  # cells: eight standard deviations
    edges = np.arange(-beyond, cells + beyond + 1)
    pixel_edges = (np.clip(np.arange(pixels + 1), start, stop) - start) * (cells / (stop - start))
    distance = pixel_edges[:, None] - edges
    ramp = _blurred_ramp(distance / BLUR) * BLUR if smooth else np.maximum(distance, 0.0)
    mass = np.maximum(np.diff(ramp[:, :-1] - ramp[:, 1:], axis=0), 0.0)
    fold = np.pad(np.arange(cells), beyond, mode="symmetric")
    return mass @ np.eye(cells)[fold]


def _blurred_ramp(x: np.ndarray) -> np.ndarray:
    """max(x, 0) convolved with the standard normal density: x Phi(x) + phi(x)."""
    erf = np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2))
    return x * (1 + erf) / 2 + np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def palette() -> np.ndarray:
    """The colours of `Scene.maps`: float (256, 4), red, green, blue in 0-255 and opacity in 0-1."""
    level = np.linspace(0, 1, LEVELS)
    attention = np.stack([np.interp(level, _ANCHORS[:, 0], _ANCHORS[:, i]) for i in range(1, 5)], axis=1)
    return np.concatenate([attention, _HATCHING])


def paint(density: np.ndarray, maximum: float) -> np.ndarray:
    """Multiples of uniform (..., H, W), NaN where unseen -> uint8 palette indices, by the square root of the multiple.

    The root lets a map of many times uniform and one below it be read on the same scale.
    """
    rows, columns = np.indices(density.shape[-2:])
    period = max(4, max(density.shape[-2:]) // 40)
    stripes = LEVELS + ((rows + columns) % period < period // 2)
    level = np.sqrt(np.clip(np.nan_to_num(density) / maximum, 0, 1)) * (LEVELS - 1)
    return np.where(np.isnan(density), stripes, np.rint(level)).astype(np.uint8)


def blend(photo: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """A painted map over the photo: uint8 (H, W, 3) and (H, W) -> uint8 (H, W, 3). The photo stays visible."""
    colour = palette()[indices]
    opacity = colour[..., 3:]
    return np.rint(photo * (1 - opacity) + colour[..., :3] * opacity).astype(np.uint8)


def gradient() -> np.ndarray:
    """The colours of the scale on a mid-grey photo, lowest first: uint8 (LEVELS, 3)."""
    grey = np.full((1, LEVELS, 3), 128, dtype=np.uint8)
    return blend(grey, np.arange(LEVELS, dtype=np.uint8)[None])[0]


def legend_ticks(maximum: float) -> dict[str, float]:
    """Labels of the colour scale and where they stand on it, 0-1."""
    inner = [value for value in (1, 4, 16, 64, 256) if 0.02 * maximum < value < 0.6 * maximum]
    return {f"{value:.3g}×": math.sqrt(value / maximum) for value in (0, *inner, maximum)}


def prepare(
    photo: np.ndarray,
    words: Sequence[str],
    alphas: np.ndarray | None,
    *,
    box: Numbers | None = None,
    betas: Numbers | None = None,
    log_probs: Numbers | None = None,
    locations: Cells | None = None,
    window: int = 1,
    longest_side: int = LONGEST_SIDE,
) -> Scene:
    """Check the arguments of `overlay`, `animation` and `html`, shrink the photo and paint the maps.

    Args:
        photo: uint8, RGB, (H, W, 3), upright.
        words: T words; the end token too, if its map is given.
        alphas: (T, h, w), one distribution over the grid per word; None from a model without attention.
        box: (left, top, right, bottom) in the photo's pixels that the network saw; None: all of it.
        betas: (T,) gates, printed beside the words.
        log_probs: (T,) natural logarithms, printed as probabilities.
        locations: (T,) or (T, G), the cells that hard attention took, counted row by row; outlined together.
        window: an odd number of cells: the looks took in squares so far across, with these cells in the middle. The
            outline is then that of all squares together, and dots are the cells.
        longest_side: larger photos are shrunk to this many pixels.

    Raises:
        ValueError: a wrong shape or value, or no attention.
    """
    photo, words, alphas = _checked_arguments(photo, words, alphas)
    height, width = photo.shape[:2]
    rect = _checked_box((0, 0, width, height) if box is None else box, (height, width))
    gates = _checked_list("betas", betas, len(words))
    scores = _checked_list("log_probs", log_probs, len(words))
    cells = _checked_cells(locations, len(words), alphas[0].size)
    if window < 1 or window % 2 != 1:
        raise ValueError(f"window must be an odd number of cells, got {window!r}")

    photo, rect = _shrunk(photo, rect, longest_side)
    density = place(alphas, rect, photo.shape[:2])
    peaks = np.nanmax(density, axis=(1, 2))
    maximum = max(SMALLEST_MAXIMUM, float(peaks.max()))
    return Scene(
        photo=photo,
        words=words,
        maps=paint(density, maximum),
        notes=tuple(_note(beta, log_prob) for beta, log_prob in zip(gates, scores, strict=True)),
        peaks=tuple(peaks.tolist()),
        outlines=tuple(_outline(_seen(looked, alphas.shape[1:], window // 2), rect) for looked in cells),
        dots=tuple(_middles(looked, alphas.shape[1:], rect) if window > 1 else () for looked in cells),
        maximum=maximum,
        cropped=bool(np.isnan(density[0]).any()),
    )


def _shrunk(photo: np.ndarray, box: Rect, longest_side: int) -> tuple[np.ndarray, Rect]:
    height, width = photo.shape[:2]
    scale = min(1.0, longest_side / max(height, width))
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        photo = np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.LANCZOS))
    down, across = photo.shape[0] / height, photo.shape[1] / width
    return photo, Rect(box.left * across, box.top * down, box.right * across, box.bottom * down)


def _seen(cells: Sequence[int], grid: tuple[int, ...], reach: int) -> np.ndarray:
    """Bool (h, w): these cells, and so many more on every side of each, as far as there are."""
    seen = np.zeros(grid, dtype=bool)
    for row, column in (divmod(cell, grid[1]) for cell in cells):
        seen[max(row - reach, 0) : row + reach + 1, max(column - reach, 0) : column + reach + 1] = True
    return seen


def _outline(seen: np.ndarray, box: Rect) -> tuple[Line, ...]:
    """The border between the cells (h, w) that were seen and all else, in pieces as long as they are straight."""
    rows, columns = np.linspace(box.top, box.bottom, len(seen) + 1), np.linspace(box.left, box.right, seen.shape[1] + 1)
    level = _runs(np.diff(np.pad(seen, ((1, 1), (0, 0))), axis=0))
    upright = _runs(np.diff(np.pad(seen, ((0, 0), (1, 1))), axis=1).T)
    ends = [((start, row), (stop, row)) for row, start, stop in level]
    ends += [((column, start), (column, stop)) for column, start, stop in upright]
    return tuple(Line(*(Point(float(columns[x]), float(rows[y])) for x, y in line)) for line in ends)


def _runs(flags: np.ndarray) -> list[tuple[int, int, int]]:
    """(row, start, stop) of every stretch of True in bool (n, m)."""
    steps = np.diff(np.pad(flags, ((0, 0), (1, 1))).astype(int), axis=1)
    starts, stops = np.argwhere(steps == 1), np.argwhere(steps == -1)
    return [(int(row), int(start), int(stop)) for (row, start), (_, stop) in zip(starts, stops, strict=True)]


def _middles(cells: Sequence[int], grid: tuple[int, ...], box: Rect) -> tuple[Point, ...]:
    down, across = (box.bottom - box.top) / grid[0], (box.right - box.left) / grid[1]
    places = (divmod(cell, grid[1]) for cell in cells)
    return tuple(Point(box.left + (column + 0.5) * across, box.top + (row + 0.5) * down) for row, column in places)


def _note(beta: float | None, log_prob: float | None) -> str:
    parts = [] if beta is None else [f"β {beta:.2f}"]
    if log_prob is not None:
        probability = math.exp(log_prob)
        parts.append("p < 0.01" if probability < 0.01 else f"p {probability:.2f}")
    return "  ".join(parts)


def _checked_arguments(
    photo: np.ndarray, words: Sequence[str], alphas: np.ndarray | None
) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
    if alphas is None:
        raise ValueError("this model has no attention: nothing to overlay")
    photo = np.asarray(photo)
    if photo.dtype != np.uint8 or photo.ndim != 3 or photo.shape[2] != 3 or photo.size == 0:
        raise ValueError(f"photo must be uint8 of shape (H, W, 3), got {photo.dtype} of shape {photo.shape}")
    if isinstance(words, str) or not len(words) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"words must be a non-empty sequence of strings, got {words!r}")
    alphas = _checked_maps("alphas", alphas)
    if alphas.ndim != 3 or len(alphas) != len(words):
        raise ValueError(f"alphas must have shape (T, h, w) with T = {len(words)} words, got shape {alphas.shape}")
    return photo, tuple(words), alphas


def _checked_maps(name: str, maps: np.ndarray) -> np.ndarray:
    maps = np.asarray(maps, dtype=np.float64)
    if maps.ndim < 2 or maps.size == 0:
        raise ValueError(f"{name} must end in two dimensions (h, w), got shape {maps.shape}")
    if not np.isfinite(maps).all() or maps.min() < 0:
        raise ValueError(f"{name} must be finite and non-negative, got {maps.min()} to {maps.max()}")
    return maps


def _checked_box(box: Numbers, photo_size: tuple[int, int]) -> Rect:
    height, width = photo_size
    edges = np.asarray(box, dtype=np.float64).round(6)  # slivers thinner than a millionth of a pixel are rounding
    if edges.shape != (4,) or not (0 <= edges[0] < edges[2] <= width and 0 <= edges[1] < edges[3] <= height):
        allowed = f"0 <= left < right <= {width} and 0 <= top < bottom <= {height}"
        raise ValueError(f"box must be (left, top, right, bottom) with {allowed}, got {tuple(box)}")
    return Rect(*edges.tolist())


def _checked_list(name: str, values: Numbers | None, count: int) -> list[Any]:
    """One number per word, or as many None."""
    if values is None:
        return [None] * count
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (count,) or not np.isfinite(array).all():
        raise ValueError(f"{name} must be one finite number per word, shape ({count},), got {values!r}")
    return array.tolist()


def _checked_cells(locations: Cells | None, count: int, below: int) -> list[list[int]]:
    """The different cells of each word, from one or several per word; none without locations."""
    if locations is None:
        return [[] for _ in range(count)]
    try:
        array = np.asarray(locations, dtype=np.float64)
    except ValueError as error:
        raise ValueError(f"locations must be one number per word, or equally many: {error}") from error
    if array.ndim not in (1, 2) or len(array) != count:
        raise ValueError(f"locations must have shape ({count},) or ({count}, G), got {array.shape}")
    if not ((array >= 0) & (array < below) & (array % 1 == 0)).all():
        raise ValueError(f"locations must be whole numbers from 0 to {below - 1}, got {array.tolist()}")
    return [np.unique(row).astype(int).tolist() for row in array]
