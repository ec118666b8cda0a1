"""Pairs of prompts with their images: what everything is trained and tested on.

The embedded pairs of pairworld.py and a user's pairs.json become the same `PairSet`, and from there
on there is one path. Images are uint8 (H, W, 3), RGB, 0..255.

FocusDiff-Data's layout, as the official reader reads it (mydataset.py): a JSON list of
{"prompt1", "prompt2", "image1", "image2"}, image paths absolute or relative to the file. A part of
the pairs is held out: `read_splits`.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from common import UserError, read_json

SPLITS = ("train", "validation", "test")
TEST_PAIRS = 120        # most pairs of a file that are held out for the test
LEAST_PAIRS = 16        # fewest pairs of which some are held out


# -- A set of pairs --------------------------------------------------------------------------------
@dataclass
class PairSet:
    """P pairs of prompts, with the images that show them.

    prompts: P tuples of two strings. images: (P, 2, H, W, 3) uint8; or a list of P tuples of two
    paths, opened when asked for, with None for a pair without images. categories: P strings, ""
    where there is none. size: height and width to which files are brought. splits: of pairs from a
    file, which split each says it belongs to, "" where it says nothing."""
    prompts: list
    images: object
    categories: list
    size: int = 32
    splits: list = None

    def __len__(self):
        return len(self.prompts)

    def flat_prompts(self):
        """The 2P prompts in a row, a pair's two side by side."""
        return [prompt for pair in self.prompts for prompt in pair]

    def has_images(self):
        """Which of the pairs have images (P,)."""
        return np.array([images is not None for images in self.images])

    def select(self, indices):
        """Some of the pairs -> PairSet."""
        images = self.images
        images = images[indices] if isinstance(images, np.ndarray) else [images[i] for i in indices]
        return PairSet([self.prompts[i] for i in indices], images,
                       [self.categories[i] for i in indices], self.size)

    def with_images(self):
        """The pairs that have images. UserError if there is none."""
        kept = np.flatnonzero(self.has_images())
        if not len(kept):
            raise UserError("none of the pairs has images, and this stage learns from images; "
                            "give --data with image1 and image2")
        return self if len(kept) == len(self) else self.select(kept)

    def load(self, indices):
        """Indices (n,) -> (n, 2, H, W, 3) uint8, zeros for a pair without images. UserError names
        a file that cannot be read."""
        if isinstance(self.images, np.ndarray):
            return self.images[indices]
        loaded = np.zeros((len(indices), 2, self.size, self.size, 3), np.uint8)
        for row, i in zip(loaded, indices):
            if self.images[i] is not None:
                row[:] = [load_image(path, self.size) for path in self.images[i]]
        return loaded

    def load_flat(self, rows):
        """Rows (n,) of the 2P images, in the order of `flat_prompts` -> (n, H, W, 3) uint8."""
        if isinstance(self.images, np.ndarray):
            return self.images[rows // 2, rows % 2]
        return np.stack([load_image(self.images[row // 2][row % 2], self.size) for row in rows])


# -- Files -----------------------------------------------------------------------------------------
def load_image(path, size):
    """A file -> (size, size, 3) uint8 RGB: short side resized, center cropped. size None: as it is.

    As the official code resizes (grpo_trainer_pair.py, center_crop_arr): halved by averaging while
    the short side is at least twice too long, because bicubic alone would skip pixels."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: no such image") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        reason = str(e).splitlines()[0]                 # these are what Pillow raises
        raise UserError(f"{path}: cannot be read as an image ({reason}); replace the file or drop "
                        "its pair") from e
    if size is not None and image.size != (size, size):
        while min(image.size) >= 2 * size:
            image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
        scale = size / min(image.size)
        width = max(size, round(image.width * scale))
        height = max(size, round(image.height * scale))
        left = (width - size) // 2
        top = (height - size) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        image = image.crop((left, top, left + size, top + size))
    return np.array(image)


def read_pairs(path, size):
    """FocusDiff-Data's JSON file -> PairSet. UserError says which pair lacks what.

    image1 and image2 may both be null or left out: a pair without images, for which PPO samples and
    which the other stages skip. prompt1 may be prompt2: an unpaired prompt, whose pool "over the
    pair" is the group of GRPO. Every image is looked for now and opened when it is used. Optional
    "category" and "split" are kept. The official reader serves the first half of the pairs."""
    entries = read_json(path, "FocusDiff-Data pairs")
    if not isinstance(entries, list) or not entries:
        found = type(entries).__name__ if entries else "an empty list"
        raise UserError(f"{path}: should hold a JSON list of pairs, found {found}")
    prompts, images, categories, splits = [], [], [], []
    for i, entry in enumerate(entries):
        files = check_pair(path, i, entry)
        prompts.append((entry["prompt1"].strip(), entry["prompt2"].strip()))
        images.append(files)
        categories.append(str(entry.get("category") or ""))
        splits.append(entry.get("split") or "")
        if splits[-1] not in ("", *SPLITS):
            raise UserError(f"{path}: pair {i} has the split {splits[-1]!r}; should be one of "
                            f"{', '.join(SPLITS)}, or left out in all pairs")
    return PairSet(prompts, images, categories, size, splits)


def read_splits(path, size):
    """`read_pairs`, in three parts -> {"train", "validation", "test": PairSet}.

    Each pair belongs where its "split" says, or if no pair has one, where `split_by_caption` puts
    it. UserError if a part would be empty."""
    pairs = read_pairs(path, size)
    names = pairs.splits
    if not any(names):
        names = split_by_caption(pairs.prompts, pairs.has_images())
    parts = {}
    for split in SPLITS:
        rows = [i for i, name in enumerate(names) if name == split]
        if not rows:
            raise UserError(f"{path}: too few pairs ({len(pairs)}) to hold any out for {split}; "
                            f"give at least {LEAST_PAIRS} whose captions differ")
        parts[split] = pairs.select(rows)
    return parts


def split_by_caption(prompts, has_images=None):
    """P tuples of two prompts, which of them have images (P,), all by default -> P words: "train",
    "validation", "test" or "dropped".

    No caption is in more than one split: a training pair that shares one with a held-out pair is
    dropped. An eighth of the pairs is tested, half as many are validated, and at most TEST_PAIRS
    and half of that. If some pairs have images, the eighth is of those alone: a test without images
    has no oracle. The choice is fixed: every run has the same test."""
    if len(prompts) < LEAST_PAIRS:
        return ["train"] * len(prompts)
    order = np.random.default_rng(2506).permutation(len(prompts))
    if has_images is not None and any(has_images):
        order = [i for i in order if has_images[i]]
    n_test = min(TEST_PAIRS, len(order) // 8)
    split_of, counts = {}, {"test": n_test, "validation": n_test // 2}
    names = ["train"] * len(prompts)
    for i in order:
        pair = prompts[i]
        found = {split_of[prompt] for prompt in pair if prompt in split_of}
        split = next((name for name, missing in counts.items()
                      if missing > 0 and found <= {name} and pair[0] != pair[1]), None)
        if split:
            counts[split] -= 1
            names[i] = split
            split_of.update(dict.fromkeys(pair, split))
    for i, pair in enumerate(prompts):
        if names[i] == "train" and any(prompt in split_of for prompt in pair):
            names[i] = "dropped"
    return names


def check_pair(path, i, entry):
    """Entry i of a pairs file -> its two image paths, or None for a pair without images."""
    if not isinstance(entry, dict):
        raise UserError(f"{path}: pair {i} is no JSON object; a pair needs prompt1 and prompt2, "
                        "and image1 and image2 unless it has no images")
    keys = ["prompt1", "prompt2"]
    has_images = entry.get("image1") is not None or entry.get("image2") is not None
    if has_images:
        keys += ["image1", "image2"]
    for key in keys:
        if not isinstance(entry.get(key), str) or not entry[key].strip():
            raise UserError(f"{path}: pair {i} has no {key!r}; a pair needs prompt1 and prompt2, "
                            "and either both or none of image1 and image2")
    if not has_images:
        return None
    files = tuple(Path(path).parent / entry[key] for key in ("image1", "image2"))
    for file in files:
        if not file.is_file():
            raise UserError(f"{path}: pair {i}: image {file} does not exist; image paths are "
                            "relative to the folder of the JSON file")
    return files


# -- Prompts as ids, images for people -------------------------------------------------------------
def pad_prompts(rows, prompts, pad, max_len):
    """B lists of ids -> (B, T) int64, padded at the end to the longest. UserError if one is longer
    than max_len; `prompts` are what it names."""
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    if longest > max_len:
        prompt = prompts[lengths.index(longest)]
        raise UserError(f"prompt of {longest} tokens is longer than the context of {max_len}: "
                        f"{prompt[:60]!r}...; shorten it, or pretrain with a larger --n-text")
    return np.array([row + [pad] * (longest - len(row)) for row in rows], dtype=np.int64)


def image_grid(images, labels=None, columns=4, scale=3):
    """(B, H, W, 3) uint8 -> one PIL image of them all, enlarged, each over its label."""
    height = images.shape[1] * scale
    width = images.shape[2] * scale
    band = 0 if labels is None else 26                  # two lines of text
    rows = -(-len(images) // columns)
    size = columns * (width + 8) + 8, rows * (height + band + 8) + 8
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x = 8 + i % columns * (width + 8)
        y = 8 + i // columns * (height + band + 8)
        large = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(large, (x, y))
        if labels is not None:
            per_line = max(1, width // 6)               # a letter is 6 pixels wide
            lines = [labels[i][k:k + per_line] for k in range(0, 2 * per_line, per_line)]
            draw.multiline_text((x, y + height + 1), "\n".join(lines), fill="black", spacing=1)
    return sheet


if __name__ == "__main__":
    sys.exit("error: this is now python pairworld.py --write DIR or --image PNG, and python -m "
             "extras.build_pairs EDITS")
