"""PairWorld: a procedural world in which FocusDiff's whole story happens on two CPU cores.

A picture is 32x32 pixels, 4x4 cells of 8x8. One to four equal objects stand in a 2x2 block of cells; a reference
object on a black tile stands on the other side of the picture; a letter stands in a corner beside the reference.
The two pictures of a pair share everything that their prompts do not tell apart.

`pairworld` makes pairs, `read_scene` reads every attribute back without learning, `difference_mask` tells where two pictures truly
differ, and `TextTokens` are the words, and bytes for everything else.
"""
import re
from functools import cache
from typing import NamedTuple

import numpy as np
from einops import rearrange, repeat

from data import PairSet, UserError, left_padded

# ---------------------------------------------------------------------------------------------------------------------
# What a scene is, how it is told and how it is drawn

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
