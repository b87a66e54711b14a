"""A synthetic world of coloured shapes: scenes, their pictures and their COCO-style masks.

A picture holds one to three things on a softly tinted ground. Centres lie on a jittered 3x3 lattice, so that places and
relations are never in doubt: two centres are either at most 0.12 apart along an axis (same row or column) or at least
0.15. Coordinates are fractions of the picture's side, x to the right and y down.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from pycocotools import mask as coco_mask

KINDS = ("circle", "square", "triangle", "star", "heart")
COLOURS = {
    "red": (222, 62, 58),
    "yellow": (246, 196, 40),
    "green": (62, 164, 88),
    "blue": (54, 118, 218),
    "purple": (132, 74, 186),
}
RADII = {"small": (0.110, 0.120), "large": (0.180, 0.190)}  # lowest and highest radius of the circle around a thing
BACKGROUNDS = {  # tints at the top and at the bottom of the picture
    "cream": ((253, 249, 240), (245, 236, 220)),
    "sky": ((241, 247, 253), (222, 234, 246)),
    "mint": ((242, 250, 245), (223, 239, 230)),
    "lavender": ((247, 245, 253), (232, 228, 245)),
    "sand": ((250, 246, 242), (236, 228, 221)),
}
LATTICE = (0.23, 0.50, 0.77)
JITTER = 0.06  # a centre leaves its lattice point by at most this, along each axis
MARGIN = 0.02  # free space between a thing and the edge of the picture, and between two things
MAX_ANGLE = 0.15  # radians by which a thing may lean
SMALLEST_PICTURE = 16  # pixels; below it a small thing has no shape

_THINGS = ((1, 0.30), (2, 0.45), (3, 0.25))  # how many things, and how often
_GROUP_SHARE = 0.40  # of the scenes with room for it, how many hold a group of equal things
_LARGE_SHARE = 0.45
_TRIES = 20  # random cells are drawn this often before the four corners, which always fit, are taken
_SUPERSAMPLING = 8


@dataclass(frozen=True)
class Thing:
    """One coloured shape.

    Args:
        kind: One of `KINDS`.
        colour: A key of `COLOURS`.
        size: "small" or "large".
        x: Centre, 0 (left edge) to 1 (right edge).
        y: Centre, 0 (top edge) to 1 (bottom edge).
        radius: Radius of the circle that holds the whole shape, within `RADII[size]`.
        angle: Lean in radians, clockwise, -MAX_ANGLE to MAX_ANGLE.

    Raises:
        ValueError: If a field is out of its range.
    """

    kind: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    angle: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (("kind", KINDS), ("colour", COLOURS), ("size", RADII)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        low, high = RADII[self.size]
        if not low <= self.radius <= high:
            raise ValueError(f"radius={self.radius} of a {self.size} thing must lie in {low}..{high}")
        for name in ("x", "y"):
            value = getattr(self, name)
            if not self.radius <= value <= 1 - self.radius:
                raise ValueError(f"{name}={value} puts a thing of radius {self.radius} outside the picture")
        if not abs(self.angle) <= MAX_ANGLE:
            raise ValueError(f"angle={self.angle} must lie in {-MAX_ANGLE}..{MAX_ANGLE}")

    def outline(self) -> NDArray[np.float64]:
        """The shape's polygon in unit coordinates, (points, 2)."""
        cosine, sine = math.cos(self.angle), math.sin(self.angle)
        turn = np.array([[cosine, sine], [-sine, cosine]])
        return _unit_outline(self.kind) @ turn * self.radius + (self.x, self.y)


@dataclass(frozen=True)
class Scene:
    """What one picture shows: things that do not overlap, and a background tint.

    Raises:
        ValueError: If the scene is empty, the background unknown, or two things overlap.
    """

    things: tuple[Thing, ...]
    background: str = "cream"

    def __post_init__(self) -> None:
        if not self.things:
            raise ValueError("things=() is empty: a scene needs at least one thing")
        if self.background not in BACKGROUNDS:
            raise ValueError(f"background={self.background!r} is not one of {', '.join(BACKGROUNDS)}")
        for (i, first), (j, second) in combinations(enumerate(self.things), 2):
            if math.hypot(first.x - second.x, first.y - second.y) < first.radius + second.radius:
                raise ValueError(f"things[{i}] and things[{j}] overlap")

    def render(self, size: int) -> Image.Image:
        """Draws the scene as an anti-aliased RGB picture of `size` x `size` pixels."""
        picture = _ground(self.background, _checked_size(size)).copy()
        tiles = [(thing, *_coverage(thing, size)) for thing in self.things]
        for _, tile, (left, top) in tiles:  # all shadows first: none may fall on a thing
            shadow = tile.filter(ImageFilter.GaussianBlur(size / 80)).point([value // 5 for value in range(256)])
            picture.paste((60, 60, 90), (left, top + round(size / 60)), shadow)
        for thing, tile, corner in tiles:
            picture.paste(_paint(thing.colour, tile.size[0]), corner, tile)
        return picture

    def mask(self, index: int, size: int) -> NDArray[np.bool_]:
        """The pixels of a `size` x `size` picture that thing `index` covers by at least half, bool (size, size)."""
        tile, corner = _coverage(self.things[index], _checked_size(size))
        whole = Image.new("L", (size, size))
        whole.paste(tile, corner)
        return np.asarray(whole) >= 128


def make_scene(seed: int, index: int) -> Scene:
    """Makes scene `index` of the world `seed`; it depends on these two numbers and on nothing else.

    Raises:
        ValueError: If `seed` or `index` is negative.
    """
    for name, value in (("seed", seed), ("index", index)):
        if value < 0:
            raise ValueError(f"{name}={value} must not be negative")
    rng = np.random.default_rng([seed, index])
    looks = _draw_looks(rng)
    radii = [float(rng.uniform(*RADII[size])) for _, _, size in looks]
    centres = _draw_centres(rng, radii)
    angles = rng.uniform(-MAX_ANGLE, MAX_ANGLE, len(looks)).tolist()
    things = tuple(
        Thing(*look, *centre, radius=radius, angle=angle)
        for look, centre, radius, angle in zip(looks, centres, radii, angles, strict=True)
    )
    return Scene(things, background=tuple(BACKGROUNDS)[rng.integers(len(BACKGROUNDS))])


def scene_to_dict(scene: Scene) -> dict[str, Any]:
    """The scene as plain JSON values; `scene_from_dict` rebuilds an equal scene."""
    return {"things": [asdict(thing) for thing in scene.things], "background": scene.background}


def scene_from_dict(values: Mapping[str, Any]) -> Scene:
    """Rebuilds a scene from what `scene_to_dict` gave.

    Raises:
        ValueError: If a key is missing or unknown, or a value is of the wrong type or out of its range.
    """
    _check_fields(values, "scene", Scene, {"things": (list, tuple), "background": str})
    numbers = dict.fromkeys(("x", "y", "radius", "angle"), (int, float))
    for number, thing in enumerate(values["things"]):
        _check_fields(thing, f"things[{number}]", Thing, {"kind": str, "colour": str, "size": str, **numbers})
    return Scene(tuple(Thing(**thing) for thing in values["things"]), values["background"])


def instances(scenes: Iterable[Scene], size: int, *, file_names: Sequence[str] | None = None) -> dict[str, Any]:
    """Describes scenes in COCO's instances format, one annotation per thing.

    Args:
        scenes: In picture order; image ids count from 0.
        size: Side of the pictures and masks in pixels.
        file_names: One per scene; "000000.png", "000001.png", ... when not given.

    Returns:
        A JSON-ready dict. Annotations (ids from 1) hold a run-length `segmentation`, `bbox` [x, y, width, height] and
        `area` in pixels, and `attributes` with colour and size; each image also holds its whole `scene`.
    """
    category_ids = {kind: number for number, kind in enumerate(KINDS, start=1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, scene in enumerate(scenes):
        name = file_names[image_id] if file_names is not None else f"{image_id:06d}.png"
        images.append(
            {"id": image_id, "file_name": name, "width": size, "height": size, "scene": scene_to_dict(scene)},
        )
        for index, thing in enumerate(scene.things):
            runs = coco_mask.encode(np.asfortranarray(scene.mask(index, size), dtype=np.uint8))
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": category_ids[thing.kind],
                "segmentation": {"size": [size, size], "counts": runs["counts"].decode("ascii")},
                "area": float(coco_mask.area(runs)),
                "bbox": coco_mask.toBbox(runs).tolist(),
                "iscrowd": 0,
                "attributes": {"colour": thing.colour, "size": thing.size},
            }
            annotations.append(annotation)
    categories = [{"id": number, "name": kind, "supercategory": "shape"} for kind, number in category_ids.items()]
    return {
        "info": {"description": "A synthetic world of coloured shapes"},
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


def _draw_looks(rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """(kind, colour, size) per thing: a group of two or three equal ones at times, all others of distinct looks."""
    counts, shares = zip(*_THINGS, strict=True)
    count = int(rng.choice(counts, p=shares))
    group = int(rng.integers(2, count + 1)) if count > 1 and rng.random() < _GROUP_SHARE else 1
    distinct = count - group + 1
    colours = tuple(COLOURS)
    pairs = rng.choice(len(KINDS) * len(colours), size=distinct, replace=False).tolist()
    looks = [
        (KINDS[pair // len(colours)], colours[pair % len(colours)], "large" if rng.random() < _LARGE_SHARE else "small")
        for pair in pairs
    ]
    return looks[:1] * group + looks[1:]


def _draw_centres(rng: np.random.Generator, radii: list[float]) -> list[tuple[float, float]]:
    """One centre per radius, in different cells of the lattice, with `MARGIN` around every thing."""
    for _ in range(_TRIES):
        centres = _jittered(rng, rng.permutation(9)[: len(radii)].tolist(), radii)
        placed = list(zip(centres, radii, strict=True))
        if all(math.dist(p, q) >= r + s + MARGIN for (p, r), (q, s) in combinations(placed, 2)):
            return centres
    return _jittered(rng, rng.permutation([0, 2, 6, 8])[: len(radii)].tolist(), radii)


def _jittered(rng: np.random.Generator, cells: list[int], radii: list[float]) -> list[tuple[float, float]]:
    jitter = rng.uniform(-JITTER, JITTER, (len(cells), 2)).tolist()
    centres = []
    for cell, radius, (right, down) in zip(cells, radii, jitter, strict=True):
        low = radius + MARGIN
        x = min(max(LATTICE[cell % 3] + right, low), 1 - low)
        y = min(max(LATTICE[cell // 3] + down, low), 1 - low)
        centres.append((x, y))
    return centres


def _coverage(thing: Thing, size: int) -> tuple[Image.Image, tuple[int, int]]:
    """How much of each pixel the thing covers, 0-255, on a square tile, and the tile's top left pixel."""
    pad = max(2, size // 24)  # room for the blurred shadow
    left, top = (math.floor((centre - thing.radius) * size) - pad for centre in (thing.x, thing.y))
    side = math.ceil(2 * thing.radius * size) + 2 * pad + 1
    fine = Image.new("L", (side * _SUPERSAMPLING, side * _SUPERSAMPLING))
    points = (thing.outline() * size - (left, top)) * _SUPERSAMPLING - 0.5  # Pillow counts from pixel centres
    ImageDraw.Draw(fine).polygon(points.ravel().tolist(), fill=255)
    return fine.reduce(_SUPERSAMPLING), (left, top)


@cache
def _ground(background: str, size: int) -> Image.Image:
    top, bottom = BACKGROUNDS[background]
    return ImageOps.colorize(Image.linear_gradient("L").resize((size, size)), top, bottom)


@cache
def _paint(colour: str, side: int) -> Image.Image:
    """A square of the colour, a little lighter at the top and darker at the bottom."""
    rgb = COLOURS[colour]
    light, dark = tuple(round(0.84 * c + 41) for c in rgb), tuple(round(0.88 * c) for c in rgb)
    return ImageOps.colorize(Image.linear_gradient("L").resize((side, side)), light, dark, mid=rgb)


@cache
def _unit_outline(kind: str) -> NDArray[np.float64]:
    """The kind's polygon around (0, 0), inside the unit circle, y down."""
    turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    match kind:
        case "circle":
            return 0.9 * np.stack([np.cos(turn), np.sin(turn)], axis=1)
        case "heart":
            down = 5 * np.cos(2 * turn) + 2 * np.cos(3 * turn) + np.cos(4 * turn) - 13 * np.cos(turn)
            outline = np.stack([16 * np.sin(turn) ** 3, down - 2.5], axis=1)
        case "square":
            outline = _rounded([(1.0, 1.0), (-1.0, 1.0), (-1.0, -1.0), (1.0, -1.0)], 0.12)
        case "triangle":
            outline = _rounded([(np.sin(a), -np.cos(a)) for a in np.arange(3) * 2 * np.pi / 3], 0.08)
        case _:  # star
            tips = np.arange(10) * np.pi / 5
            lengths = np.where(np.arange(10) % 2, 0.48, 1.0)
            outline = _rounded([(r * np.sin(a), -r * np.cos(a)) for a, r in zip(tips, lengths, strict=True)], 0.12)
    return outline / np.linalg.norm(outline, axis=1).max()


def _rounded(corners: Sequence[tuple[float, float]], share: float) -> NDArray[np.float64]:
    """Replaces each corner by a quadratic Bézier curve that starts and ends `share` of an edge away from it."""
    corner = np.array(corners, dtype=np.float64)
    before, after = np.roll(corner, 1, axis=0), np.roll(corner, -1, axis=0)
    start, end = corner + share * (before - corner), corner + share * (after - corner)
    t = np.linspace(0, 1, 6)[:, None, None]
    curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * corner + t**2 * end
    return curve.transpose(1, 0, 2).reshape(-1, 2)


def _checked_size(size: int) -> int:
    if size < SMALLEST_PICTURE:
        raise ValueError(f"size={size} must be at least {SMALLEST_PICTURE} pixels")
    return size


def _check_fields(values: Any, name: str, owner: type[Any], types: Mapping[str, Any]) -> None:
    expected = {field.name for field in fields(owner)}
    if not isinstance(values, Mapping) or set(values) != expected:
        raise ValueError(f"{name}={values!r} must be an object with exactly the keys {', '.join(sorted(expected))}")
    for key, kind in types.items():
        if not isinstance(values[key], kind):
            raise ValueError(f"{name}: {key}={values[key]!r} is of the wrong type")
