"""One self-contained HTML page that shows, word by word, where a caption looked; it loads nothing from elsewhere."""

import base64
import io
from collections.abc import Sequence
from html import escape
from string import Template
from typing import Unpack

import numpy as np
from PIL import Image

from captioning.visualize_scene import LEVELS, Looked, Scene, gradient, legend_ticks, palette, prepare

_MAP_SIDE = 256
"""Maps are stored with this many pixels on the longer side; the browser enlarges them smoothly."""

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
  :root { color-scheme: light dark; --paper: #fafafa; --ink: #16181d; --muted: #5f6672; --line: #d9dce2;
          --mark: #ffdd7a; --on-mark: #16181d; }
  @media (prefers-color-scheme: dark) {
    :root { --paper: #121418; --ink: #eceef2; --muted: #9aa1ad; --line: #31353d; --mark: #ffc64a; }
  }
  body { margin: 0; padding: 2rem 1rem; background: var(--paper); color: var(--ink);
         font: 1rem/1.5 system-ui, sans-serif; }
  main { max-width: ${width}px; margin: 0 auto; }
  h1 { margin: 0 0 .75rem; font-size: 1.1rem; font-weight: 600; overflow-wrap: anywhere; }
  .stage { position: relative; overflow: hidden; border-radius: 10px; background: #000;
           aspect-ratio: $width / $height; }
  .stage img { position: absolute; inset: 0; width: 100%; height: 100%; }
  .stage .map, .stage .looks { opacity: 0; visibility: hidden; transition: opacity .18s, visibility .18s; }
  .stage .shown { opacity: 1; visibility: visible; }
  .looks { position: absolute; inset: 0; width: 100%; height: 100%; fill: none; stroke: #00d5ee; }
  .looks path { stroke-width: 2px; stroke-linecap: square; vector-effect: non-scaling-stroke; }
  .looks .dots { stroke-width: 8px; stroke-linecap: round; }
  @media (prefers-reduced-motion: reduce) { .stage * { transition: none; } }
  fieldset { margin: 1rem 0 .25rem; padding: 0; border: 0; display: flex; flex-wrap: wrap; gap: .15rem .1rem; }
  legend { float: left; width: 100%; padding: 0 0 .3rem; color: var(--muted); font-size: .8rem; }
  label { position: relative; padding: .1rem .45rem; border-radius: 6px; font-size: 1.2rem; cursor: pointer;
          overflow-wrap: anywhere; }
  label.plain { align-self: center; margin-right: .4rem; border: 1px solid var(--line); color: var(--muted);
                font-size: .95rem; }
  label:hover { background: var(--line); }
  label:has(:checked) { background: var(--mark); color: var(--on-mark); }
  label:has(:focus-visible) { outline: 2px solid var(--ink); outline-offset: 1px; }
  input { position: absolute; opacity: 0; width: 1px; height: 1px; }
  output { display: block; min-height: 1.5em; color: var(--muted); font-variant-numeric: tabular-nums; }
  .scale { margin-top: 1rem; color: var(--muted); font-size: .8rem; }
  .bar { position: relative; width: 16rem; max-width: 100%; height: 8px; margin-bottom: 1.4rem; border-radius: 4px;
         background: linear-gradient(to right, $colours); }
  .bar span { position: absolute; top: 10px; transform: translateX(-50%); }
  .bar span:first-child { transform: none; }
  .bar span:last-child { transform: translateX(-100%); }
</style>
</head>
<body>
<main>
<h1>$title</h1>
<div class="stage">
<img src="$photo" alt="The captioned photo">
$maps
</div>
<fieldset>
<legend>Point at a word, click it, or use the arrow keys</legend>
<label class="plain"><input type="radio" name="word" checked>photo</label>
$labels
</fieldset>
<output></output>
<div class="scale">
<div class="bar" aria-hidden="true">$ticks</div>
$key
</div>
</main>
<script>
  const inputs = [...document.querySelectorAll("input")];
  const layers = [...document.querySelectorAll(".stage [data-word]")];
  const output = document.querySelector("output");
  function show(index) {
    for (const layer of layers) layer.classList.toggle("shown", layer.dataset.word === inputs[index].dataset.word);
    output.textContent = inputs[index].dataset.note || "";
  }
  const chosen = () => inputs.findIndex(input => input.checked);
  inputs.forEach((input, index) => {
    input.addEventListener("change", () => show(index));
    input.parentElement.addEventListener("pointerenter", () => show(index));
    input.parentElement.addEventListener("pointerleave", () => show(chosen()));
  });
  document.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    const next = (chosen() + step + inputs.length) % inputs.length;
    inputs[next].checked = true;
    inputs[next].focus({ preventScroll: true });
    show(next);
  });
  show(chosen());
</script>
</body>
</html>
""")


def html(
    photo: np.ndarray,
    words: Sequence[str],
    alphas: np.ndarray | None,
    *,
    title: str | None = None,
    **looked: Unpack[Looked],
) -> str:
    """Write a page on which pointing at a word, clicking it or an arrow key shows its attention on the photo.

    `title` is the page's heading, by default the sentence; all other arguments are those of `prepare`.

    Raises:
        ValueError: see `prepare`.
    """
    scene = prepare(photo, words, alphas, **looked)
    height, width = scene.photo.shape[:2]
    layers = [_map(scene, index) + _looks(scene, index) for index in range(len(scene.words))]
    labels = [
        f'<label><input type="radio" name="word" data-word="{index}" data-note="{escape(_describe(scene, index))}">'
        f"{escape(word)}</label>"
        for index, word in enumerate(scene.words)
    ]
    ticks = (f'<span style="left: {100 * at:.1f}%">{label}</span>' for label, at in legend_ticks(scene.maximum).items())
    return _PAGE.substitute(
        title=escape(title or " ".join(scene.words)),
        width=width,
        height=height,
        photo=_data_uri(Image.fromarray(scene.photo), "JPEG"),
        maps="\n".join(layers),
        labels="\n".join(labels),
        colours=", ".join("rgb({} {} {})".format(*colour) for colour in gradient()[:: LEVELS // 16]),
        ticks="".join(ticks),
        key=" ".join(f"{note.capitalize()}." for note in scene.legend),
    )


def _describe(scene: Scene, index: int) -> str:
    return "  ·  ".join(filter(None, (f"peak {scene.peaks[index]:.1f}× uniform", scene.notes[index])))


def _map(scene: Scene, index: int) -> str:
    """The word's map as an image with a transparent palette, which lies over the photo."""
    image = Image.fromarray(scene.maps[index])
    shrink = min(1.0, _MAP_SIDE / max(image.size))
    size = (max(1, round(image.width * shrink)), max(1, round(image.height * shrink)))
    image = image.resize(size, Image.Resampling.NEAREST)  # indices cannot be averaged; maps are smooth already
    colours = palette()
    image.putpalette(np.rint(colours[:, :3]).astype(np.uint8).tobytes())
    opacity = np.rint(255 * colours[:, 3]).astype(np.uint8).tobytes()
    alt = escape(f"Attention for “{scene.words[index]}”: {_describe(scene, index)}")
    return f'<img class="map" data-word="{index}" src="{_data_uri(image, "PNG", transparency=opacity)}" alt="{alt}">'


def _looks(scene: Scene, index: int) -> str:
    """What hard attention saw for the word, outlined, and the places that it took: lines of no length are dots."""
    if not scene.outlines[index]:
        return ""
    height, width = scene.photo.shape[:2]
    lines = (f"M{start.x:.2f} {start.y:.2f}L{stop.x:.2f} {stop.y:.2f}" for start, stop in scene.outlines[index])
    dots = "".join(f"M{x:.2f} {y:.2f}h0" for x, y in scene.dots[index])
    paths = f'<path d="{"".join(lines)}"/>' + (f'<path class="dots" d="{dots}"/>' if dots else "")
    size = f'viewBox="0 0 {width} {height}" preserveAspectRatio="none"'
    return f'<svg class="looks" data-word="{index}" {size} aria-hidden="true">{paths}</svg>'


def _data_uri(image: Image.Image, kind: str, **options: object) -> str:
    stream = io.BytesIO()
    image.save(stream, kind, optimize=True, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
