"""PairWorld: a small procedural world in which FocusDiff's whole story happens on two CPU cores.

    python pairworld.py --write pairs --n 60        # pairs as a folder in FocusDiff-Data's layout
    python pairworld.py --image pairworld.png       # a pair of each category, and its difference

An image has 32x32 pixels, 4x4 cells of 8x8. One to four equal objects stand in a block of 2x2
cells. A reference object on a black tile stands on the other side of the image, and a letter in a
corner beside it. The two images of a pair share everything that their prompts do not tell apart.

`pairworld` makes pairs. `read_scene`, the oracle, reads every attribute back without learning.
`TextTokens` makes ids of prompts.
"""
import re
from functools import cache
from typing import NamedTuple

import numpy as np
from einops import rearrange

from common import UserError
from data import PairSet, pad_prompts

# -- The world -------------------------------------------------------------------------------------
IMAGE_SIZE, CELL, GRID = 32, 8, 4       # pixels of an image, pixels of a cell, cells along a side
ATTRIBUTES = {
    "count": ["one", "two", "three", "four"],
    "size": ["small", "large"],
    "fill": ["solid", "hollow"],
    "color": ["red", "green", "blue", "yellow"],
    "shape": ["circle", "square", "triangle", "heart"],
    "relation": ["left of", "right of", "above", "below"],
    "ref_color": ["red", "green", "blue", "yellow"],
    "ref_shape": ["circle", "square", "triangle", "heart"],
    "style": ["plain", "striped", "dotted", "checkered"],
    "letter": ["A", "C", "K", "T"],
}
# PairComp's six categories, and the attributes in which the two prompts of a pair may differ.
CATEGORIES = {
    "overall": ["shape", "size", "fill", "ref_shape"],
    "color": ["color", "ref_color"],
    "counting": ["count"],
    "position": ["relation"],
    "style": ["style"],
    "text": ["letter"],
}
# What a caption may leave out: attributes that are named together. Count, color and shape are
# always named.
OPTIONAL = {"size": ["size"], "fill": ["fill"], "ref": ["relation", "ref_color", "ref_shape"],
            "style": ["style"], "letter": ["letter"]}
# Chance that a caption names an optional part that is not the pair's difference. Captions to learn
# from are long. Prompts, in PPO and in the test, are short, as people's and PairComp's are.
LONG, SHORT = 0.6, 0.1
# Whose captions are careless, with `mistakes`: hearts, and all that is yellow.
CARELESS = {"shape": "heart", "color": "yellow"}
MISTAKABLE = ("size", "fill", "relation", "style", "letter")
# Shares of the (count, color, shape) combinations that training does not have.
HELD_OUT = {"test": 0.2, "validation": 0.125}

RGB = {"red": (230, 20, 20), "green": (20, 160, 40), "blue": (20, 40, 230), "yellow": (250, 210, 0)}
WHITE, TILE, INK = (250, 250, 250), (15, 15, 15), (25, 25, 25)
BITMAPS = {             # 7x7 large, 5x5 small; the hollow form is the border of the solid one
    "circle": ("..###.. .#####. ####### ####### ####### .#####. ..###..",
               ".###. ##### ##### ##### .###."),
    "square": ("####### ####### ####### ####### ####### ####### #######",
               "##### ##### ##### ##### #####"),
    "triangle": ("...#... ..###.. ..###.. .#####. .#####. ####### #######",
                 "..#.. .###. .###. ##### #####"),
    "heart": (".##.##. ####### ####### ####### .#####. ..###.. ...#...",
              ".#.#. ##### ##### .###. ..#.."),
}
GLYPHS = {
    "A": "..#.. .#.#. #...# #...# ##### #...# #...#",
    "C": ".###. #...# #.... #.... #.... #...# .###.",
    "K": "#...# #..#. #.#.. ##... #.#.. #..#. #...#",
    "T": "##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..",
}


class Scene(NamedTuple):
    """What an image shows: for each attribute an index into ATTRIBUTES."""
    count: int
    size: int
    fill: int
    color: int
    shape: int
    relation: int
    ref_color: int
    ref_shape: int
    style: int
    letter: int


class Layout(NamedTuple):
    """Nuisance: where things stand. No caption says it, and the two images of a pair share it."""
    offset: int             # 0..2: the block of objects slides along its side of the image
    cells: tuple            # the order in which the block's four cells are filled
    ref_slot: int           # 0..1: which of the two middle cells of its edge the reference takes
    letter_slot: int        # 0..1: which corner of that edge the letter takes


# -- Captions --------------------------------------------------------------------------------------
def caption(scene, named):
    """The scene in plain English. `named`: the keys of OPTIONAL that are said."""
    word = {name: ATTRIBUTES[name][i] for name, i in scene._asdict().items()}
    parts = [word["count"]]
    parts += [word[name] for name in ("size", "fill") if name in named]
    parts += [word["color"], word["shape"] + ("s" if scene.count else "")]
    if "ref" in named:
        parts.append(f"{word['relation']} a {word['ref_color']} {word['ref_shape']}")
    if "style" in named:
        parts.append(f"on a {word['style']} background")
    if "letter" in named:
        parts.append(f"with the letter {word['letter']}")
    return " ".join(parts)


@cache
def caption_pattern():
    def one_of(name):
        return f"(?P<{name}>{'|'.join(ATTRIBUTES[name])})"
    return re.compile(
        f"{one_of('count')}(?: {one_of('size')})?(?: {one_of('fill')})?"
        f" {one_of('color')} {one_of('shape')}s?"
        f"(?: {one_of('relation')} a {one_of('ref_color')} {one_of('ref_shape')})?"
        f"(?: on a {one_of('style')} background)?(?: with the letter {one_of('letter')})?")


def read_caption(prompt):
    """Inverse of `caption`: {attribute: index} of what the prompt names. UserError if it is no
    caption of PairWorld."""
    match = caption_pattern().fullmatch(prompt)
    if not match:
        raise UserError(f"not a PairWorld caption, so the oracle cannot check it: {prompt!r}")
    named = {name: word for name, word in match.groupdict().items() if word}
    return {name: ATTRIBUTES[name].index(word) for name, word in named.items()}


def different_attributes(prompts):
    """Two captions -> for each, {attribute: index} of what it says otherwise than the other."""
    first, second = (read_caption(prompt) for prompt in prompts)
    sides = [{name: i for name, i in a.items() if b.get(name) != i}
             for a, b in ((first, second), (second, first))]
    if not any(sides):
        raise UserError("the two prompts of a pair say the same, so the oracle has nothing to tell "
                        f"apart: {prompts[0]!r}")
    return sides


# -- Drawings --------------------------------------------------------------------------------------
def bits(art):
    """A string of rows -> a mask."""
    return np.array([[c == "#" for c in row] for row in art.split()])


def draw_cell(background, mask, color):
    """(8, 8, 3): a mask drawn in a color on a background."""
    cell = np.empty((CELL, CELL, 3), np.uint8)
    cell[:] = background
    height, width = mask.shape
    y = (CELL - height) // 2
    x = (CELL - width) // 2
    cell[y:y + height, x:x + width][mask] = color
    return cell


def object_mask(shape, size, fill):
    mask = bits(BITMAPS[shape][0 if size == "large" else 1])
    if fill == "solid":
        return mask
    p = np.pad(mask, 1)
    inside = p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:]    # all four neighbors are set
    return mask & ~inside


def texture(style):
    y, x = np.mgrid[:CELL, :CELL]
    if style == "plain":
        return draw_cell(WHITE, x < 0, WHITE)
    if style == "striped":
        return draw_cell(WHITE, y % 4 < 2, (190, 210, 245))
    if style == "dotted":
        return draw_cell(WHITE, (x % 4 // 2 == 0) & (y % 4 // 2 == 0), (245, 170, 190))
    return draw_cell(WHITE, (x // 4 + y // 4) % 2 == 0, (200, 230, 190))


@cache
def templates():
    """Every cell that can occur, (8, 8, 3) each, by what it shows: ("object", size, fill, color,
    shape), ("ref", color, shape), ("style", i) or ("letter", i)."""
    cells = {}
    for c, color in enumerate(ATTRIBUTES["color"]):
        for s, shape in enumerate(ATTRIBUTES["shape"]):
            for z, size in enumerate(ATTRIBUTES["size"]):
                for f, fill in enumerate(ATTRIBUTES["fill"]):
                    mask = object_mask(shape, size, fill)
                    cells["object", z, f, c, s] = draw_cell(WHITE, mask, RGB[color])
            cells["ref", c, s] = draw_cell(TILE, object_mask(shape, "large", "solid"), RGB[color])
    for i, style in enumerate(ATTRIBUTES["style"]):
        cells["style", i] = texture(style)
    for i, letter in enumerate(ATTRIBUTES["letter"]):
        cells["letter", i] = draw_cell(WHITE, bits(GLYPHS[letter]), INK)
    return cells


def place(relation, along, across):
    """Cell (row, column) of a place. It is given as for the relation "left of": `along` runs
    towards the reference, `across` at right angles. The other relations turn the image."""
    along = along if relation in (0, 2) else GRID - 1 - along
    return (across, along) if relation in (0, 1) else (along, across)


def render(scene, layout):
    """Scene, Layout -> (32, 32, 3) uint8."""
    cells = templates()
    image = np.tile(cells["style", scene.style], (GRID, GRID, 1))

    def put(row_and_column, cell):
        y, x = (CELL * i for i in row_and_column)
        image[y:y + CELL, x:x + CELL] = cell

    thing = cells["object", scene.size, scene.fill, scene.color, scene.shape]
    for k in layout.cells[:scene.count + 1]:
        put(place(scene.relation, k // 2, layout.offset + k % 2), thing)
    reference = cells["ref", scene.ref_color, scene.ref_shape]
    put(place(scene.relation, GRID - 1, 1 + layout.ref_slot), reference)
    corner = place(scene.relation, GRID - 1, (GRID - 1) * layout.letter_slot)
    put(corner, cells["letter", scene.letter])
    return image


# -- The oracle ------------------------------------------------------------------------------------
def read_scene(images):
    """Read the attributes back, by comparing each cell with every cell that can occur.

    It is strict: where the cells of an image disagree (two colors among the objects, two letters,
    objects on both sides of the reference), the attribute is unreadable. images (B, 32, 32, 3)
    uint8 -> (B, 10) int, columns as in ATTRIBUTES, -1 for unreadable."""
    out = np.full((len(images), len(ATTRIBUTES)), -1)
    for row, cells in zip(out, read_cells(images)):
        found = {"object": [], "ref": [], "style": [], "letter": []}
        for i, (kind, *value) in enumerate(cells):
            found[kind].append((divmod(i, GRID), value))
        row[:] = [agreed_value(name, found) for name in ATTRIBUTES]
    return out


def read_cells(images):
    """images (B, 32, 32, 3) uint8 -> for each its 16 cells, row by row, as keys of the nearest of
    `templates`."""
    keys = list(templates())
    known = np.stack(list(templates().values())).reshape(len(keys), -1)
    known = known.astype(np.float32) / 255                              # (K, 192)
    cells = rearrange(images, "b (y i) (x j) c -> b (y x) (i j c)", i=CELL, j=CELL)
    cells = cells.astype(np.float32) / 255                              # (B, 16, 192)
    distance = (known ** 2).sum(-1) - 2 * cells @ known.T               # (B, 16, K), shifted
    return [[keys[k] for k in row] for row in distance.argmin(-1)]


def agreed_value(name, found):
    """The value of an attribute on which an image's cells agree, or -1. found {kind: [((row,
    column), values)]}."""
    objects = found["object"]
    if name == "count":
        return len(objects) - 1 if 1 <= len(objects) <= 4 else -1
    if name == "relation":
        return agreed_relation(objects, found["ref"])
    if name == "style":                 # the one attribute that many cells show: the majority
        votes = [value[0] for _, value in found["style"]]
        return max(set(votes), key=votes.count) if votes else -1
    column, kind = {"size": (0, "object"), "fill": (1, "object"), "color": (2, "object"),
                    "shape": (3, "object"), "ref_color": (0, "ref"), "ref_shape": (1, "ref"),
                    "letter": (0, "letter")}[name]
    values = [value[column] for _, value in found[kind]]
    too_many = kind != "object" and len(values) > 1
    return values[0] if len(set(values)) == 1 and not too_many else -1


def agreed_relation(objects, refs):
    if len(refs) != 1:
        return -1
    for relation in range(4):
        edge = [place(relation, GRID - 1, 1 + slot) for slot in (0, 1)]
        half = [place(relation, along, across) for along in (0, 1) for across in range(GRID)]
        if refs[0][0] in edge and objects and all(where in half for where, _ in objects):
            return relation
    return -1


# -- Pairs -----------------------------------------------------------------------------------------
@cache
def combinations(split):
    """The (count, color, shape) combinations of a split. Every caption names all three, so that no
    prompt of one split is ever one of another. They are fixed: every run has the same test."""
    every = [(n, c, s) for n in range(4) for c in range(4) for s in range(4)]
    order = [every[i] for i in np.random.default_rng(2506).permutation(len(every))]
    n_test, n_validation = (round(HELD_OUT[name] * len(every)) for name in ("test", "validation"))
    splits = {"test": order[:n_test], "validation": order[-n_validation:],
              "train": order[n_test:-n_validation]}
    return frozenset(splits[split])


def random_scenes(rng, name, split):
    """Two scenes of a split that differ in the attribute `name` alone."""
    while True:
        scene = Scene(*(int(rng.integers(len(options))) for options in ATTRIBUTES.values()))
        others = [i for i in range(len(ATTRIBUTES[name])) if i != getattr(scene, name)]
        twin = scene._replace(**{name: int(rng.choice(others))})
        if all((s.count, s.color, s.shape) in combinations(split) for s in (scene, twin)):
            return scene, twin


def is_careless(scene):
    """Whether captions of this scene mistake details."""
    return any(ATTRIBUTES[name][getattr(scene, name)] == word for name, word in CARELESS.items())


def mistake(scenes, chance, rng):
    """What careless captions say of a pair's scenes: each detail of MISTAKABLE is mistaken with
    this chance, in both scenes alike, so that the captions still differ in one detail. A mistaken
    value is its neighbor in ATTRIBUTES: left for right, small for large, A for C."""
    names = [name for name in MISTAKABLE if rng.random() < chance]
    return [scene._replace(**{name: getattr(scene, name) ^ 1 for name in names})
            for scene in scenes]


def pairworld(n, split, seed, extra=SHORT, mistakes=0.0):
    """n pairs -> PairSet.

    split "test" and "validation": held-out combinations, the six categories in turn, as in
    PairComp's average, no two pairs with the same prompts. "train": the other combinations, the ten
    attributes in turn, so that each is learned equally often.

    extra: see LONG and SHORT. mistakes: the chance of `mistake` where a scene `is_careless`."""
    category_of = {name: category for category, names in CATEGORIES.items() for name in names}
    rng = np.random.default_rng([seed, ("train", "test", "validation").index(split)])
    prompts, images, categories, seen = [], [], [], set()
    while len(prompts) < n:
        if split == "train":
            name = list(category_of)[len(prompts) % len(category_of)]
        else:
            category = list(CATEGORIES)[len(prompts) % len(CATEGORIES)]
            name = str(rng.choice(CATEGORIES[category]))
        scene, twin = random_scenes(rng, name, split)
        named = {part for part, names in OPTIONAL.items() if name in names or rng.random() < extra}
        layout = Layout(int(rng.integers(3)), tuple(rng.permutation(4).tolist()),
                        int(rng.integers(2)), int(rng.integers(2)))
        said = scene, twin
        if mistakes > 0 and any(is_careless(s) for s in said):
            said = mistake(said, mistakes, rng)
        pair = tuple(caption(s, named) for s in said)
        if split == "test" and frozenset(pair) in seen:
            continue
        seen.add(frozenset(pair))
        prompts.append(pair)
        images.append(np.stack([render(scene, layout), render(twin, layout)]))
        categories.append(category_of[name])
    return PairSet(prompts, np.stack(images), categories)


# -- Text tokens -----------------------------------------------------------------------------------
class TextTokens:
    """PairWorld's words, and UTF-8 bytes for everything else: every string becomes ids, and ids
    become the string again.

    A word includes the space before it. Ids: 0 pad, 1 beginning of text, 2 beginning of image,
    3..258 the bytes, then the words."""
    pad, bos, boi, first_byte = 0, 1, 2, 3
    empty = [[bos, boi]]                # the prompt of guidance's second branch

    def __init__(self):
        options = [option for options in ATTRIBUTES.values() for option in options]
        vocabulary = {word for option in options for word in option.split()}
        vocabulary |= {shape + "s" for shape in ATTRIBUTES["shape"]}
        vocabulary |= {"a", "on", "background", "with", "the", "letter"}
        first_word = self.first_byte + 256
        self.words = {" " + word: first_word + i for i, word in enumerate(sorted(vocabulary))}
        self.word_bytes = {i: word.encode() for word, i in self.words.items()}
        self.vocab_size = first_word + len(self.words)

    def encode(self, text):
        ids = []
        for piece in re.findall(r" ?[A-Za-z]+|.", " " + text, flags=re.DOTALL):
            if piece in self.words:
                ids.append(self.words[piece])
            else:                       # a Python string may hold unpaired surrogates
                ids.extend(self.first_byte + b for b in piece.encode("utf-8", "surrogatepass"))
        return ids

    def decode(self, ids):
        parts = [self.word_bytes[i] if i in self.word_bytes else bytes([i - self.first_byte])
                 for i in ids if i >= self.first_byte]
        return b"".join(parts).decode("utf-8", "surrogatepass")[1:]

    def encode_prompts(self, prompts, max_len, dropped=None):
        """B strings -> (B, T) int64: `bos text boi`, padded at the end to the longest. UserError
        if one is longer than max_len.

        None is the empty prompt of guidance, and so is a prompt that dropped (B,) bool marks."""
        if dropped is not None:
            prompts = [None if drop else prompt for prompt, drop in zip(prompts, dropped)]
        encoded = [[] if prompt is None else self.encode(prompt) for prompt in prompts]
        rows = [[self.bos, *ids, self.boi] for ids in encoded]
        return pad_prompts(rows, prompts, self.pad, max_len)


if __name__ == "__main__":
    from extras.draw_world import main
    main()
