"""PairWorld as files: `python pairworld.py --write DIR` and `--image PNG`."""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image

import pairworld
from common import UserError
from data import image_grid


def difference_mask(images, grid):
    """Where the two images of a pair differ, on the token grid. images (P, 2, H, W, 3) uint8 ->
    (P, grid, grid) bool."""
    differs = (images[:, 0] != images[:, 1]).any(-1)                    # (P, H, W)
    return rearrange(differs, "p (y i) (x j) -> p y x (i j)", y=grid, x=grid).any(-1)


def write_pairs(pairs, folder):
    """A PairSet -> folder/pairs.json and folder/images/*.png, in FocusDiff-Data's layout."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    entries = []
    for i, (prompts, category) in enumerate(zip(pairs.prompts, pairs.categories)):
        entry = {"prompt1": prompts[0], "prompt2": prompts[1]}
        entry |= {"image1": None, "image2": None, "category": category}
        if pairs.images[i] is not None:
            for side, image in enumerate(pairs.load([i])[0], 1):
                entry[f"image{side}"] = f"images/{i:05d}_{side}.png"
                Image.fromarray(image).save(folder / entry[f"image{side}"])
        entries.append(entry)
    (folder / "pairs.json").write_text(json.dumps(entries, indent=1))


def draw_categories(path, seed):
    """A test pair of each category: the two images, and white where they differ."""
    pairs = pairworld.pairworld(len(pairworld.CATEGORIES), "test", seed)
    mask = difference_mask(pairs.images, 8).repeat(4, 1).repeat(4, 2)   # (6, 32, 32)
    mask = np.repeat(mask[..., None] * np.uint8(255), 3, -1)            # (6, 32, 32, 3)
    rows = np.stack([pairs.images[:, 0], pairs.images[:, 1], mask], 1)  # (6, 3, 32, 32, 3)
    labels = []
    for prompts, category in zip(pairs.prompts, pairs.categories):
        labels += [*prompts, f"difference: {category}"]
    image_grid(rows.reshape(-1, *rows.shape[2:]), labels, columns=3, scale=7).save(path)


def main():
    try:
        draw_or_write()
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")


def draw_or_write():
    parser = argparse.ArgumentParser(prog="pairworld.py", description=pairworld.__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", metavar="DIR", help="write pairs in FocusDiff-Data's layout")
    parser.add_argument("--image", metavar="PNG", help="draw a test pair of each category")
    parser.add_argument("--n", type=int, default=60, help="how many pairs to write (60)")
    parser.add_argument("--split", choices=["train", "test"], default="train")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if not args.write and not args.image:
        parser.error("give --write DIR or --image PNG")
    most = 100_000 if args.split == "train" else 1000
    if not 1 <= args.n <= most:
        parser.error(f"--n {args.n}: should be 1 to {most} for the split {args.split}")
    if args.write:
        write_pairs(pairworld.pairworld(args.n, args.split, args.seed), args.write)
        print(f"{args.n} pairs in {args.write}/pairs.json")
    if args.image:
        draw_categories(args.image, args.seed)
        print(args.image)
