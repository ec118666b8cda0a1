"""Prompts, pairs and pictures: where everything that is trained or tested on comes from.

    python data.py --write pairs --n 60        # PairWorld pairs as a folder in the FocusDiff-Data layout
    python data.py --picture pairworld.png     # one pair of each category, with the true difference mask
    python data.py --build edits.json --judge URL --out DIR    # pairs from before/after pictures of edits (build_pairs.py)

PairWorld is a procedural world in which FocusDiff's whole story happens on two CPU cores.
A picture is 32x32 pixels, 4x4 cells of 8x8. One to four equal objects stand in a 2x2 block of cells; a reference
object on a black tile stands on the other side of the picture; a letter stands in a corner beside the reference.
The two pictures of a pair share everything that their prompts do not tell apart.

The embedded pairs and a user's `pairs.json` become the same `PairSet`, and from there on there is one path.
A set holds B pictures as uint8 (B, H, W, 3), RGB, 0..255.
"""
import argparse
import json
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from einops import rearrange, repeat


class UserError(Exception):
    """Something the user can repair. The message is one line: what, where, what to do. Scripts print it and exit with 1."""


def some(problems, most=5):
    """A list for an error message: the first few and how many there are."""
    rest = f"; and {len(problems) - most} more ({len(problems)} in all)" if len(problems) > most else ""
    return "; ".join(problems[:most]) + rest


# ---------------------------------------------------------------------------------------------------------------------
# PairWorld: what a scene is, how it is told and how it is drawn

IMAGE_SIZE, CELL, GRID = 32, 8, 4
ATTRIBUTES = {
    "count": ["one", "two", "three", "four"],
    "size": ["small", "large"],
    "fill": ["solid", "hollow"],
    "colour": ["red", "green", "blue", "yellow"],
    "shape": ["circle", "square", "triangle", "heart"],
    "relation": ["left of", "right of", "above", "below"],
    "ref_colour": ["red", "green", "blue", "yellow"],
    "ref_shape": ["circle", "square", "triangle", "heart"],
    "style": ["plain", "striped", "dotted", "checkered"],
    "letter": ["A", "C", "K", "T"],
}
# PairComp's six categories: which attributes the two prompts of a pair may differ in
CATEGORIES = {
    "overall": ["shape", "size", "fill", "ref_shape"],
    "color": ["colour", "ref_colour"],
    "counting": ["count"],
    "position": ["relation"],
    "style": ["style"],
    "text": ["letter"],
}
# What a caption may leave unsaid: attributes that are named together, count, colour and shape being named always.
OPTIONAL = {"size": ["size"], "fill": ["fill"], "ref": ["relation", "ref_colour", "ref_shape"], "style": ["style"],
            "letter": ["letter"]}
# Chance that a caption names an optional part that is not the pair's difference. Captions to learn from are long; prompts, in PPO and
# in the test, are short, as people's and PairComp's are.
LONG, SHORT = 0.6, 0.1
HELD_OUT = 0.2           # share of the (count, colour, shape) combinations that only the test split may draw

RGB = {"red": (230, 20, 20), "green": (20, 160, 40), "blue": (20, 40, 230), "yellow": (250, 210, 0)}
WHITE, TILE, INK = (250, 250, 250), (15, 15, 15), (25, 25, 25)
BITMAPS = {  # 7x7 large and 5x5 small; the hollow form is the border of the solid one
    "circle": ("..###.. .#####. ####### ####### ####### .#####. ..###..", ".###. ##### ##### ##### .###."),
    "square": ("####### ####### ####### ####### ####### ####### #######", "##### ##### ##### ##### #####"),
    "triangle": ("...#... ..###.. ..###.. .#####. .#####. ####### #######", "..#.. .###. .###. ##### #####"),
    "heart": (".##.##. ####### ####### ####### .#####. ..###.. ...#...", ".#.#. ##### ##### .###. ..#.."),
}
GLYPHS = {
    "A": "..#.. .#.#. #...# #...# ##### #...# #...#", "C": ".###. #...# #.... #.... #.... #...# .###.",
    "K": "#...# #..#. #.#.. ##... #.#.. #..#. #...#", "T": "##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..",
}


class Scene(NamedTuple):
    """What a picture shows, one index into ATTRIBUTES a field."""
    count: int
    size: int
    fill: int
    colour: int
    shape: int
    relation: int
    ref_colour: int
    ref_shape: int
    style: int
    letter: int


class Layout(NamedTuple):
    """Nuisance: where things stand. No caption tells it, and the two pictures of a pair share it."""
    offset: int             # 0..2: the block of objects slides along its side of the picture
    cells: tuple            # order in which the block's four cells are filled
    ref_slot: int           # 0..1: which of the two middle cells of its edge the reference takes
    letter_slot: int        # 0..1: which corner of that edge the letter takes


def words(scene):
    """Scene -> {attribute: its word}."""
    return {name: ATTRIBUTES[name][i] for name, i in scene._asdict().items()}


def caption(scene, named):
    """The scene in plain English; `named` holds the keys of OPTIONAL that are said."""
    w = words(scene)
    noun = [w["count"], w["size"] if "size" in named else "", w["fill"] if "fill" in named else "", w["colour"],
            w["shape"] + ("s" if scene.count else "")]
    if "ref" in named:
        noun.append(f"{w['relation']} a {w['ref_colour']} {w['ref_shape']}")
    if "style" in named:
        noun.append(f"on a {w['style']} background")
    if "letter" in named:
        noun.append(f"with the letter {w['letter']}")
    return " ".join(filter(None, noun))


@cache
def _caption_pattern():
    def one_of(name):
        return f"(?P<{name}>{'|'.join(ATTRIBUTES[name])})"
    return re.compile(f"{one_of('count')}(?: {one_of('size')})?(?: {one_of('fill')})? {one_of('colour')} {one_of('shape')}s?"
                      f"(?: {one_of('relation')} a {one_of('ref_colour')} {one_of('ref_shape')})?"
                      f"(?: on a {one_of('style')} background)?(?: with the letter {one_of('letter')})?")


def read_caption(prompt):
    """Inverse of `caption`: {attribute: index} of what the prompt names. UserError if it is not a PairWorld caption."""
    match = _caption_pattern().fullmatch(prompt)
    if not match:
        raise UserError(f"not a PairWorld caption, so the oracle cannot check it: {prompt!r}")
    return {name: ATTRIBUTES[name].index(word) for name, word in match.groupdict().items() if word}


def _bits(art):
    return np.array([[c == "#" for c in row] for row in art.split()])


def _cell(background, mask, colour):
    """(8, 8, 3): a mask drawn in a colour, left and top aligned so that it leaves the cell's last row and column free."""
    cell = np.empty((CELL, CELL, 3), np.uint8)
    cell[:] = background
    y, x = (CELL - mask.shape[0]) // 2, (CELL - mask.shape[1]) // 2
    cell[y:y + mask.shape[0], x:x + mask.shape[1]][mask] = colour
    return cell


def _object_mask(shape, size, fill):
    mask = _bits(BITMAPS[shape][0 if size == "large" else 1])
    if fill == "solid":
        return mask
    p = np.pad(mask, 1)
    inside = p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:]        # all four neighbours belong to the shape
    return mask & ~inside


def _texture(style):
    y, x = np.mgrid[:CELL, :CELL]
    on, tint = {"plain": (x < 0, WHITE), "striped": (y % 4 < 2, (190, 210, 245)),
                "dotted": ((x % 4 // 2 == 0) & (y % 4 // 2 == 0), (245, 170, 190)),
                "checkered": ((x // 4 + y // 4) % 2 == 0, (200, 230, 190))}[style]
    return _cell(WHITE, on, tint)


@cache
def _templates():
    """Every cell that can occur: {("object", size, fill, colour, shape) | ("ref", colour, shape) | ("style", i) | ("letter", i): (8, 8, 3)}."""
    cells = {}
    for c, colour in enumerate(ATTRIBUTES["colour"]):
        for s, shape in enumerate(ATTRIBUTES["shape"]):
            for z, size in enumerate(ATTRIBUTES["size"]):
                for f, fill in enumerate(ATTRIBUTES["fill"]):
                    cells["object", z, f, c, s] = _cell(WHITE, _object_mask(shape, size, fill), RGB[colour])
            cells["ref", c, s] = _cell(TILE, _object_mask(shape, "large", "solid"), RGB[colour])
    for i, style in enumerate(ATTRIBUTES["style"]):
        cells["style", i] = _texture(style)
    for i, letter in enumerate(ATTRIBUTES["letter"]):
        cells["letter", i] = _cell(WHITE, _bits(GLYPHS[letter]), INK)
    return cells


def _turn(relation, along, across):
    """Cell (row, col) of a place given for the relation "left of": `along` runs to the reference, `across` at right angles."""
    along = along if relation in (0, 2) else GRID - 1 - along
    return (across, along) if relation in (0, 1) else (along, across)


def render(scene, layout):
    """Scene, Layout -> (32, 32, 3) uint8."""
    cells = _templates()
    image = np.tile(cells["style", scene.style], (GRID, GRID, 1))

    def put(place, cell):
        y, x = place[0] * CELL, place[1] * CELL
        image[y:y + CELL, x:x + CELL] = cell

    for k in layout.cells[:scene.count + 1]:
        put(_turn(scene.relation, k // 2, layout.offset + k % 2), cells["object", scene.size, scene.fill, scene.colour, scene.shape])
    put(_turn(scene.relation, GRID - 1, 1 + layout.ref_slot), cells["ref", scene.ref_colour, scene.ref_shape])
    put(_turn(scene.relation, GRID - 1, (GRID - 1) * layout.letter_slot), cells["letter", scene.letter])
    return image


def read_scene(images):
    """The oracle: read the attributes back by comparing each cell with every cell that can occur. Nothing is learned.

    It is strict: where the cells of a picture disagree (two colours among the objects, two letters, objects on both sides of
    the reference), the attribute is unreadable. images (B, 32, 32, 3) uint8 -> (B, 10) int, columns as in ATTRIBUTES, -1 =
    unreadable."""
    out = np.full((len(images), len(ATTRIBUTES)), -1)
    for row, cells in zip(out, _read_cells(images)):
        found = {"object": [], "ref": [], "style": [], "letter": []}
        for place, (kind, *value) in enumerate(cells):
            found[kind].append((divmod(place, GRID), value))
        row[:] = [_agreed(name, found) for name in ATTRIBUTES]
    return out


def _read_cells(images):
    """images (B, 32, 32, 3) uint8 -> for each its 16 cells, row by row, as keys of the nearest of `_templates`."""
    keys, values = list(_templates()), np.stack(list(_templates().values()))
    templates = values.reshape(len(keys), -1).astype(np.float32) / 255                                  # (K, 192)
    cells = rearrange(images, "b (y i) (x j) c -> b (y x) (i j c)", i=CELL, j=CELL).astype(np.float32) / 255
    distance = (templates ** 2).sum(-1) - 2 * cells @ templates.T                                       # (B, 16, K), less a constant
    return [[keys[k] for k in row] for row in distance.argmin(-1)]


def _agreed(name, found):
    """The one value that the cells of a picture agree on for an attribute, or -1."""
    objects, refs = found["object"], found["ref"]
    if name == "count":
        return len(objects) - 1 if 1 <= len(objects) <= 4 else -1
    if name == "relation":
        if len(refs) != 1:
            return -1
        for relation in range(4):
            edge = [_turn(relation, GRID - 1, 1 + slot) for slot in (0, 1)]
            half = [_turn(relation, along, across) for along in (0, 1) for across in range(GRID)]
            if refs[0][0] in edge and objects and all(place in half for place, _ in objects):
                return relation
        return -1
    if name == "style":       # the one attribute that many cells tell: the majority decides
        votes = [value[0] for _, value in found["style"]]
        return max(set(votes), key=votes.count) if votes else -1
    column, kind = {"size": (0, "object"), "fill": (1, "object"), "colour": (2, "object"), "shape": (3, "object"),
                    "ref_colour": (0, "ref"), "ref_shape": (1, "ref"), "letter": (0, "letter")}[name]
    values = [value[column] for _, value in found[kind]]
    if not values or len(set(values)) > 1 or (kind != "object" and len(values) > 1):
        return -1
    return values[0]


def different_attributes(prompts):
    """Two PairWorld captions -> for each, {attribute: index} of what it says otherwise than the other."""
    one, two = map(read_caption, prompts)
    sides = [{k: v for k, v in a.items() if b.get(k) != v} for a, b in ((one, two), (two, one))]
    if not any(sides):
        raise UserError(f"the two prompts of a pair say the same, so the oracle has nothing to tell apart: {prompts[0]!r}")
    return sides


def shown_in(images, prompts, grid):
    """Where a picture of any quality shows what its pair's prompts differ in, as the oracle sees it: the cells of the kind that carries
    the attribute. images (B, 32, 32, 3) uint8, B tuples of a pair's two prompts -> (B, grid, grid) bool."""
    kinds = {"count": ("object", "style"), "relation": ("object", "ref"), "ref_colour": ("ref",), "ref_shape": ("ref",), "style": ("style",),
             "letter": ("letter",)}
    out = np.zeros((len(images), GRID * GRID), bool)
    for row, cells, two in zip(out, _read_cells(images), prompts):
        carriers = {kind for side in different_attributes(two) for name in side for kind in kinds.get(name, ("object",))}
        row[:] = [kind in carriers for kind, *_ in cells]
    return repeat(out, "b (y x) -> b (y i) (x j)", y=GRID, i=grid // GRID, j=grid // GRID)


def difference_mask(images, grid):
    """Where the two pictures of a pair differ, on the token grid. images (P, 2, H, W, 3) uint8 -> (P, grid, grid) bool."""
    differs = (images[:, 0] != images[:, 1]).any(-1)                                                    # (P, H, W)
    return rearrange(differs, "p (y i) (x j) -> p y x (i j)", y=grid, x=grid).any(-1)


@cache
def held_out_combinations():
    """The (count, colour, shape) combinations that only the test split draws. Every caption names all three, so no training
    prompt is ever a test prompt. The choice is fixed: every run in the world has the same test."""
    combos = [(n, c, s) for n in range(4) for c in range(4) for s in range(4)]
    chosen = np.random.default_rng(2506).permutation(len(combos))[:round(HELD_OUT * len(combos))]
    return frozenset(combos[i] for i in chosen)


def _random_pair(rng, name, split):
    """Two scenes of a split that differ in the attribute `name` alone."""
    while True:
        scene = Scene(*(int(rng.integers(len(options))) for options in ATTRIBUTES.values()))
        other = int(rng.choice([i for i in range(len(ATTRIBUTES[name])) if i != getattr(scene, name)]))
        pair = scene, scene._replace(**{name: other})
        held = [(s.count, s.colour, s.shape) in held_out_combinations() for s in pair]
        if all(held) if split == "test" else not any(held):
            return pair


def pairworld(n, split, seed, extra=SHORT):
    """n PairWorld pairs -> PairSet. split "test": held-out combinations, the six categories in turn as in PairComp's average, no two pairs
    with the same prompts. split "train": the other combinations, the ten attributes in turn, so that each is told apart equally
    often. extra: chance that a caption names a part it need not."""
    attributes = {name: category for category, names in CATEGORIES.items() for name in names}
    rng = np.random.default_rng([seed, split == "test"])
    prompts, images, categories, seen = [], [], [], set()
    while len(prompts) < n:
        if split == "train":
            name = list(attributes)[len(prompts) % len(attributes)]
        else:
            name = str(rng.choice(CATEGORIES[list(CATEGORIES)[len(prompts) % len(CATEGORIES)]]))
        first, second = _random_pair(rng, name, split)
        named = {part for part, names in OPTIONAL.items() if name in names or rng.random() < extra}
        layout = Layout(int(rng.integers(3)), tuple(rng.permutation(4).tolist()), int(rng.integers(2)), int(rng.integers(2)))
        told = caption(first, named), caption(second, named)
        if split == "test" and frozenset(told) in seen:
            continue
        seen.add(frozenset(told))
        prompts.append(told)
        images.append(np.stack([render(first, layout), render(second, layout)]))
        categories.append(attributes[name])
    return PairSet(prompts, np.stack(images), categories)


# ---------------------------------------------------------------------------------------------------------------------
# A set of pairs, from PairWorld or from files

@dataclass
class PairSet:
    """P pairs of prompts with the pictures that show them.

    prompts: P tuples of two strings. images: (P, 2, H, W, 3) uint8, or P tuples of two paths that are opened when asked for, or
    None in place of a tuple for a prompt without pictures. categories: P strings, "" where there is none."""
    prompts: list
    images: object
    categories: list
    size: int = IMAGE_SIZE

    def __len__(self):
        return len(self.prompts)

    def texts(self):
        """The 2P prompts in a row, a pair's two beside each other."""
        return [text for two in self.prompts for text in two]

    def has_images(self, indices):
        return np.array([self.images[i] is not None for i in indices])

    def with_images(self):
        """The pairs that have pictures, for what learns from pictures. UserError if there is none."""
        kept = np.flatnonzero(self.has_images(range(len(self))))
        if not len(kept):
            raise UserError("none of the pairs has pictures, and this stage learns from pictures; give --data with image1 and image2")
        if len(kept) == len(self):
            return self
        return PairSet([self.prompts[i] for i in kept], [self.images[i] for i in kept], [self.categories[i] for i in kept], self.size)

    def load(self, indices):
        """Indices (n,) -> (n, 2, H, W, 3) uint8; zeros where a prompt has no pictures. UserError names a file that cannot be read."""
        if isinstance(self.images, np.ndarray):
            return self.images[indices]
        blank = np.zeros((2, self.size, self.size, 3), np.uint8)
        return np.stack([blank if self.images[i] is None else np.stack([load_image(p, self.size) for p in self.images[i]]) for i in indices])

    def load_rows(self, rows):
        """Rows (n,) of the 2P pictures, in the order of `texts` -> (n, H, W, 3) uint8."""
        if isinstance(self.images, np.ndarray):
            return self.images[rows // 2, rows % 2]
        return np.stack([load_image(self.images[row // 2][row % 2], self.size) for row in rows])


def load_image(path, size):
    """A file -> (size, size, 3) uint8 RGB: short side resized, centre cropped. size None: as it is, (H, W, 3).

    As the official code resizes (grpo_trainer_pair.py, center_crop_arr): halved by averaging while the short side is at least twice
    too long, since bicubic alone would skip pixels; then bicubic, then cropped."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:       # what Pillow raises for a broken file
        raise UserError(f"{path}: cannot be read as an image ({str(e).splitlines()[0]}); replace the file or drop its pair") from e
    if size is not None and image.size != (size, size):
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = size / min(image.size)
        w, h = (max(size, round(s * scale)) for s in image.size)
        left, top = (w - size) // 2, (h - size) // 2
        image = image.resize((w, h), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return np.array(image)


def read_json(path, what):
    """A JSON file, or a UserError that says where it is broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file ({what})") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read ({e})") from e
    except json.JSONDecodeError as e:
        raise UserError(f"{path}: broken JSON at line {e.lineno}, column {e.colno} ({e.msg})") from e


def read_pairs(path, size):
    """FocusDiff-Data layout: a JSON list of {prompt1, prompt2, image1, image2}, image paths absolute or relative to the file. -> PairSet.

    image1 and image2 may both be null or left out: a pair without pictures, whose prompts PPO samples for and no stage reads pictures of.
    Every image is looked for now and opened when used, so that a missing one does not stop a run half way. An optional `category` is
    kept, prompts lose the spaces around them (official mydataset.py). All the pairs are served: the official reader puts each pair on
    two rows, counts the rows' half of the *pairs* and so serves the first half of the file."""
    entries, folder = read_json(path, "FocusDiff-Data pairs"), Path(path).parent
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: should hold a JSON list of pairs, found {type(entries).__name__ if entries else 'an empty list'}")
    prompts, images = [], []
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise UserError(f"{path}: pair {i} is no JSON object; a pair needs prompt1 and prompt2, and image1 and image2 unless it has no pictures")
        bare = entry.get("image1") is None and entry.get("image2") is None
        for key in ("prompt1", "prompt2") if bare else ("prompt1", "prompt2", "image1", "image2"):
            if not isinstance(entry.get(key), str) or not entry[key].strip():
                raise UserError(f"{path}: pair {i} has no {key!r}; a pair needs prompt1 and prompt2, and either both or none of image1 and image2")
        files = None if bare else tuple(folder / entry[key] for key in ("image1", "image2"))
        for file in files or ():
            if not file.is_file():
                raise UserError(f"{path}: pair {i}: image {file} does not exist; image paths are relative to the folder of the JSON file")
        prompts.append((entry["prompt1"].strip(), entry["prompt2"].strip()))
        images.append(files)
    return PairSet(prompts, images, [str(entry.get("category") or "") for entry in entries], size)


def read_prompts(path):
    """A text file, a prompt a line -> PairSet without pictures. A lone prompt is a pair with itself: pooling "over the pair" is
    then the vanilla group of GRPO, and nothing after this line has to know."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read as a text file, a prompt a line ({e})") from e
    if not lines:
        raise UserError(f"{path}: holds no prompt")
    return PairSet([(line, line) for line in lines], [None] * len(lines), [""] * len(lines))


def write_pairs(pairs, folder):
    """A PairSet -> folder/pairs.json and folder/images/*.png in the FocusDiff-Data layout."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    entries = []
    for i, (two, category) in enumerate(zip(pairs.prompts, pairs.categories)):
        names = [f"images/{i:05d}_{side}.png" for side in (1, 2)] if pairs.images[i] is not None else [None, None]
        for name, image in zip(names, pairs.load([i])[0]):
            if name:
                Image.fromarray(image).save(folder / name)
        entries.append({"prompt1": two[0], "prompt2": two[1], "image1": names[0], "image2": names[1], "category": category})
    (folder / "pairs.json").write_text(json.dumps(entries, indent=1))


# ---------------------------------------------------------------------------------------------------------------------
# Text tokens

class TextTokens:
    """PairWorld's words, and UTF-8 bytes for everything else: every string encodes, and decodes to itself.

    A word token carries the space before it. Ids: 0 pad, 1 beginning of text, 2 beginning of image, 3..258 the bytes, then words."""
    pad, bos, boi, first_byte = 0, 1, 2, 3
    empty = [[bos, boi]]                # the prompt of guidance's second branch

    def __init__(self):
        vocabulary = {w for options in ATTRIBUTES.values() for option in options for w in option.split()}
        vocabulary |= {s + "s" for s in ATTRIBUTES["shape"]} | {"a", "on", "background", "with", "the", "letter"}
        self.words = {" " + w: self.first_byte + 256 + i for i, w in enumerate(sorted(vocabulary))}
        self.texts = {i: w.encode() for w, i in self.words.items()}
        self.vocab_size = self.first_byte + 256 + len(self.words)

    def encode(self, text):
        ids = []
        for piece in re.findall(r" ?[A-Za-z]+|.", " " + text, flags=re.DOTALL):
            if piece in self.words:
                ids.append(self.words[piece])
            else:                                                        # lone surrogates are legal in a Python string
                ids.extend(self.first_byte + b for b in piece.encode("utf-8", "surrogatepass"))
        return ids

    def decode(self, ids):
        raw = b"".join(self.texts[i] if i in self.texts else bytes([i - self.first_byte]) for i in ids if i >= self.first_byte)
        return raw.decode("utf-8", "surrogatepass")[1:]

    def prompts(self, texts, max_len, dropped=None):
        """B strings -> (B, T) int64: `bos text boi`, padded on the left to the longest. UserError if one is longer than max_len.
        None instead of a string is the empty prompt of guidance, and so is a string that dropped (B,) bool marks."""
        texts = [None if drop else t for t, drop in zip(texts, dropped if dropped is not None else [False] * len(texts))]
        return left_padded([[self.bos, *(self.encode(t) if t is not None else []), self.boi] for t in texts], texts, self.pad, max_len)


def left_padded(rows, texts, pad, max_len):
    """B lists of ids -> (B, T) int64, padded on the left to the longest. UserError with its text if one is longer than max_len."""
    longest = max(map(len, rows))
    if longest > max_len:
        text = texts[[len(r) for r in rows].index(longest)]
        raise UserError(f"prompt of {longest} tokens is longer than the context of {max_len}: {text[:60]!r}...; shorten it, or pretrain with a larger --n-text")
    return np.array([[pad] * (longest - len(r)) + r for r in rows], dtype=np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures for people

def picture_grid(images, labels=None, columns=4, scale=3):
    """B pictures (B, H, W, 3) uint8, enlarged, each over its label -> PIL image."""
    h, w = images.shape[1] * scale, images.shape[2] * scale
    band = 0 if labels is None else 26
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (w + 8) + 8, rows * (h + band + 8) + 8), "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = 8 + i % columns * (w + 8), 8 + i // columns * (h + band + 8)
        sheet.paste(Image.fromarray(image).resize((w, h), Image.Resampling.NEAREST), (x, y))
        if labels is not None:
            per_line, text = max(1, w // 6), labels[i]
            lines = [text[k:k + per_line] for k in range(0, len(text), per_line)][:2]
            draw.multiline_text((x, y + h + 1), "\n".join(lines), fill="black", spacing=1)
    return sheet


def main():
    if any(word.split("=")[0] == "--build" for word in sys.argv[1:]):   # a program of its own, which imports this file
        from build_pairs import main as build
        return build(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--build", metavar="EDITS", help="pairs from before/after pictures of edits; its flags: data.py --build EDITS --help")
    parser.add_argument("--write", metavar="DIR", help="write PairWorld pairs there in the FocusDiff-Data layout")
    parser.add_argument("--picture", metavar="PNG", help="draw a test pair of each category with its difference mask")
    parser.add_argument("--n", type=int, default=60, help="how many pairs to write")
    parser.add_argument("--split", choices=["train", "test"], default="train")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.write and not args.picture:
        parser.error("say --write DIR or --picture PNG")
    if not 1 <= args.n <= (100_000 if args.split == "train" else 1000):
        parser.error(f"--n {args.n}: should be 1 to 100000, of the test split 1 to 1000")
    if args.write:
        write_pairs(pairworld(args.n, args.split, args.seed), args.write)
        print(f"{args.n} pairs in {args.write}/pairs.json")
    if args.picture:
        pairs = pairworld(6, "test", args.seed)
        mask = difference_mask(pairs.images, 8).repeat(4, 1).repeat(4, 2)                               # (6, 32, 32)
        mask = np.repeat(mask[..., None] * np.uint8(255), 3, -1)
        rows = np.stack([pairs.images[:, 0], pairs.images[:, 1], mask], 1).reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3)
        labels = [t for two, c in zip(pairs.prompts, pairs.categories) for t in (*two, f"difference: {c}")]
        picture_grid(rows, labels, columns=3, scale=7).save(args.picture)


if __name__ == "__main__":
    from data import UserError, main            # the module that build_pairs imports, so that its UserError is the one caught here
    try:
        main()
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")
