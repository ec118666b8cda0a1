"""Pairs of prompts with their pictures, out of files or out of PairWorld: where everything that is trained or tested on comes from.

    python data.py --write pairs --n 60        # PairWorld pairs as a folder in the FocusDiff-Data layout
    python data.py --picture pairworld.png     # one pair of each category, with the true difference mask
    python data.py --build edits.json --judge URL --out DIR    # pairs from before/after pictures of edits (build_pairs.py)

The embedded pairs (pairworld.py) and a user's `pairs.json` become the same `PairSet`, and from there on there is one path.
A set holds B pictures as uint8 (B, H, W, 3), RGB, 0..255.
"""
import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


class UserError(Exception):
    """Something the user can repair. The message is one line: what, where, what to do. Scripts print it and exit with 1."""


def some(problems, most=5):
    """A list for an error message: the first few and how many there are."""
    rest = f"; and {len(problems) - most} more ({len(problems)} in all)" if len(problems) > most else ""
    return "; ".join(problems[:most]) + rest


# ---------------------------------------------------------------------------------------------------------------------
# A set of pairs

@dataclass
class PairSet:
    """P pairs of prompts with the pictures that show them.

    prompts: P tuples of two strings. images: (P, 2, H, W, 3) uint8, or P tuples of two paths that are opened when asked for, or
    None in place of a tuple for a prompt without pictures. categories: P strings, "" where there is none."""
    prompts: list
    images: object
    categories: list
    size: int = 32                      # of pictures that are files

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
    except FileNotFoundError:
        raise UserError(f"{path}: no such picture") from None
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
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, should be a JSON file ({what})") from None
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
# Prompts as ids

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
    from pairworld import IMAGE_SIZE, difference_mask, pairworld         # which imports this file
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
