"""Attention maps drawn on the photo: a figure, an animation, a page. Knows arrays, not models; needs no display.

Every picture is drawn on one colour scale that all words share: multiples of uniform attention, 1/L per location. A
peaked map and a flat one therefore look different, and equal colours mean equal attention. What the network never saw
(the photo outside its crop) is hatched, which is not the same as "seen and not attended".
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Unpack

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image, ImageDraw, ImageFont

from captioning.visualize_html import html
from captioning.visualize_scene import (
    Line,
    Looked,
    Point,
    Scene,
    blend,
    gradient,
    legend_ticks,
    place,
    prepare,
    upsample,
)

__all__ = ["animation", "html", "overlay", "place", "save_gif", "upsample"]

_INK, _MUTED, _ACCENT = "#16181d", "#6b7280", "#00d5ee"
_TILE = 2.3
"""Inches of a tile's longer side."""


@dataclass(frozen=True)
class _Layout:
    """Inches: a page of tiles below a title and above a legend."""

    tile: tuple[float, float]
    columns: int
    rows: int
    title: float
    note: float

    gap, margin, word, legend = 0.16, 0.2, 0.27, 0.64

    @property
    def size(self) -> tuple[float, float]:
        width = 2 * self.margin + self.columns * (self.tile[0] + self.gap) - self.gap
        return width, self.margin + self.title + self.rows * self._pitch + self.legend

    @property
    def _pitch(self) -> float:
        return self.word + self.tile[1] + self.note + 0.06

    def place(self, index: int) -> tuple[float, float, float, float]:
        """The tile's left, bottom, width and height as fractions of the page."""
        row, column = divmod(index, self.columns)
        width, height = self.size
        left = self.margin + column * (self.tile[0] + self.gap)
        top = self.margin + self.title + row * self._pitch + self.word
        return left / width, 1 - (top + self.tile[1]) / height, self.tile[0] / width, self.tile[1] / height


def overlay(
    photo: np.ndarray,
    words: Sequence[str],
    alphas: np.ndarray | None,
    *,
    columns: int | None = None,
    title: str | None = None,
    **looked: Unpack[Looked],
) -> tuple[Figure, np.ndarray]:
    """Draw the photo, then one tile per word with its attention on the photo, as in the paper's figures.

    `columns` is the number of tiles per row, by default for a page a little wider than high; `title` is a line above
    them, such as the file's name; all other arguments are those of `prepare`.

    Returns:
        The figure (save it with `figure.savefig(path)`) and its T + 1 axes, the plain photo's first.

    Raises:
        ValueError: see `prepare`; or `columns` below one.
    """
    scene = prepare(photo, words, alphas, **looked)
    if columns is not None and columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    layout = _arrange(scene, columns, title)
    figure = Figure(figsize=layout.size, dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    axes = np.array([figure.add_axes(layout.place(index)) for index in range(len(scene.words) + 1)], dtype=object)
    _draw_tile(axes[0], scene.photo, "photo", "")
    axes[0].texts[0].set(color=_MUTED, fontweight="normal")
    for index, axis in enumerate(axes[1:]):
        _draw_tile(axis, blend(scene.photo, scene.maps[index]), scene.words[index], scene.notes[index])
        _draw_looks(axis, scene.outlines[index], scene.dots[index])
    if title:
        left, top = layout.margin / layout.size[0], 1 - 0.16 / layout.size[1]
        text = figure.text(left, top, title, va="top", fontsize=12, color=_INK, parse_math=False)
        _fit(text, (layout.size[0] - 2 * layout.margin) * figure.dpi)
    _draw_legend(figure, scene, layout)
    return figure, axes


def _arrange(scene: Scene, columns: int | None, title: str | None) -> _Layout:
    height, width = scene.photo.shape[:2]
    across = max(0.9, _TILE * min(1.0, width / height))
    tile = (across, min(across * height / width, 4 * _TILE))  # a very tall photo becomes a narrow strip in it
    count = len(scene.words) + 1
    if columns is None:
        columns = max(2, round(math.sqrt(1.9 * count * (tile[1] + 0.4) / (tile[0] + 0.16))))
    columns = min(count, columns)
    return _Layout(tile, columns, -(-count // columns), 0.26 if title else 0.0, 0.2 if any(scene.notes) else 0.0)


def _draw_tile(axis: Axes, picture: np.ndarray, word: str, note: str) -> None:
    height, width = picture.shape[:2]
    axis.imshow(picture, extent=(0, width, height, 0), interpolation="antialiased")
    axis.set_axis_off()
    common: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "parse_math": False}
    label = axis.annotate(word, (0, 1), (0, 5), fontsize=12, fontweight="bold", color=_INK, va="baseline", **common)
    _fit(label, axis.get_window_extent().width)
    if note:
        axis.annotate(note, (0, 0), (0, -4), fontsize=8, color=_MUTED, va="top", **common)


def _draw_looks(axis: Axes, outline: Sequence[Line], dots: Sequence[Point]) -> None:
    axis.add_collection(
        LineCollection(list(outline), colors=_ACCENT, linewidths=1.4, capstyle="projecting"), autolim=False
    )
    if dots:
        x, y = [dot.x for dot in dots], [dot.y for dot in dots]
        axis.scatter(x, y, s=11, color=_ACCENT, edgecolors=_INK, linewidths=0.6, zorder=3)


def _fit(text: Text, width: float) -> None:
    """Make a text at most `width` pixels wide: smaller down to 7 points, then cut with an ellipsis."""
    extent = text.get_window_extent().width
    if extent > width:
        text.set_fontsize(max(7.0, 0.97 * float(text.get_fontsize()) * width / extent))  # hinting rounds widths
    full = text.get_text()
    for length in range(len(full) - 1, 0, -1):
        if text.get_window_extent().width <= width:
            return
        text.set_text(full[:length] + "…")


def _draw_legend(figure: Figure, scene: Scene, layout: _Layout) -> None:
    width, height = layout.size
    bar = min(2.2, 0.28 * width)
    axis = figure.add_axes((layout.margin / width, 0.39 / height, bar / width, 0.1 / height), label="legend")
    axis.imshow(gradient()[None], extent=(0, 1, 0, 1), aspect="auto")
    axis.set_yticks([])
    ticks = legend_ticks(scene.maximum)
    axis.set_xticks(list(ticks.values()), list(ticks), fontsize=7.5, color=_MUTED)
    axis.tick_params(length=2, pad=1.5, color=_MUTED)
    axis.get_xticklabels()[0].set_horizontalalignment("left")
    axis.get_xticklabels()[-1].set_horizontalalignment("right")
    for spine in axis.spines.values():
        spine.set_visible(False)
    left = layout.margin + bar + 0.15
    for line, note in enumerate(scene.legend):
        text = figure.text(left / width, (0.51 - 0.145 * line) / height, note, va="top", fontsize=8, color=_MUTED)
        _fit(text, (width - layout.margin - left) * figure.dpi)


def animation(
    photo: np.ndarray,
    words: Sequence[str],
    alphas: np.ndarray | None,
    *,
    longest_side: int = 480,
    **looked: Unpack[Looked],
) -> list[Image.Image]:
    """Draw T + 1 frames of one size: the plain photo, then each word's attention with the sentence growing below.

    The arguments are those of `prepare`.

    Raises:
        ValueError: see `prepare`.
    """
    scene = prepare(photo, words, alphas, longest_side=longest_side, **looked)
    sentence = _Sentence(scene.words, max(240, scene.photo.shape[1]))
    frames = [sentence.frame(scene.photo, 0, "")]
    for index, indices in enumerate(scene.maps):
        picture = _with_looks(blend(scene.photo, indices), scene.outlines[index], scene.dots[index])
        frames.append(sentence.frame(picture, index + 1, scene.notes[index]))
    return frames


def _with_looks(picture: np.ndarray, outline: Sequence[Line], dots: Sequence[Point]) -> np.ndarray:
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    right, bottom = image.width - 1, image.height - 1
    for line in outline:  # the last column and row belong to the photo, its far edges do not
        draw.line([(min(x, right), min(y, bottom)) for x, y in line], fill=_ACCENT, width=2)
    for x, y in dots:
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=_ACCENT, outline=_INK)
    return np.asarray(image)


class _Sentence:
    """The words below the animated photo, each at the place that it has in the whole sentence."""

    def __init__(self, words: Sequence[str], width: int) -> None:
        self.words, self.width = words, width
        face = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")  # Pillow's own font lacks the beta
        self.font, self.small = ImageFont.truetype(face, 17), ImageFont.truetype(face, 12)
        self.places: list[tuple[float, float]] = []
        x = y = margin = 12.0
        for word in words:
            extent = self.font.getlength(word)
            if x > margin and x + extent > width - margin:
                x, y = margin, y + 26
            self.places.append((x, y))
            x += extent + 8
        self.height = int(y + 26 + 24)

    def frame(self, picture: np.ndarray, shown: int, note: str) -> Image.Image:
        """One frame: the picture, the first `shown` words with the last one dark, and its note."""
        height, width = picture.shape[:2]
        frame = Image.new("RGB", (self.width, height + self.height), "white")
        frame.paste(Image.fromarray(picture), ((self.width - width) // 2, 0))
        draw = ImageDraw.Draw(frame)
        for index, (word, (x, y)) in enumerate(zip(self.words[:shown], self.places, strict=False)):
            current = index == shown - 1
            draw.text((x, height + y), word, font=self.font, fill=_INK if current else "#9aa1ab")
        draw.text((12, height + self.height - 22), note, font=self.small, fill=_MUTED)
        return frame


def save_gif(frames: Sequence[Image.Image], path: str | PathLike[str], milliseconds: int = 700) -> None:
    """Write frames as an endless GIF, `milliseconds` per word and three times as long on the last.

    Raises:
        ValueError: no frames, or a duration below 20 ms (which viewers replace by their own).
    """
    if not frames:
        raise ValueError("frames is empty: nothing to save")
    if milliseconds < 20:
        raise ValueError(f"milliseconds must be at least 20, got {milliseconds}")
    indexed = [frame.quantize(128) for frame in frames]
    durations = [milliseconds] * (len(frames) - 1) + [3 * milliseconds]
    indexed[0].save(path, "GIF", save_all=True, append_images=indexed[1:], duration=durations, loop=0, optimize=True)
