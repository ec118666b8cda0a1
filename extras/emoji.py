"""EmojiPairs: real images in which PPO can be tried, made of an npm package that you fetch.

    npm pack emoji-datasource-twitter && tar xzf emoji-datasource-twitter-*.tgz
    python -m extras.emoji package --out emoji
    python train.py --stage ppo --data emoji/pairs.json --out runs/emoji

A caption is an emoji's name in lower case, with the skin tone in words: "woman astronaut dark
skin". A pair is two captions that differ in one word or two neighboring ones. The captions of
held-out pairs are in no training pair.

tones.json has the pairs that differ in the skin tone alone. Of two in five emoji one such pair is
held out; the emoji's other tones are trained on. careless.json is the same, but most of its
training captions mistake the tone for the next darker one, and so may name a held-out caption. A
base model that learns from it draws emoji well and their tone wrongly: what PPO can repair.

    python train.py --stage pretrain --data emoji/careless.json --out runs/tones
    python train.py --stage ppo --data emoji/tones.json --out runs/tones

The code of the package is MIT. The images are Twemoji's, CC-BY 4.0: the attribution that this asks
for is printed, and nothing of them is in this repository.
"""
import argparse
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from common import UserError, make_folder, read_json, write_json
from data import TEST_PAIRS, split_by_caption

ATTRIBUTION = ("Images: Twemoji, copyright Twitter, Inc. and other contributors, "
               "https://github.com/jdecked/twemoji, CC-BY 4.0 "
               "(https://creativecommons.org/licenses/by/4.0/), here pasted on white")
TONES = {"1F3FB": "light skin", "1F3FC": "medium light skin", "1F3FD": "medium skin",
         "1F3FE": "medium dark skin", "1F3FF": "dark skin"}
MOST = 30               # captions of which all are paired with each other
MISTAKES = 0.6          # share of careless captions that mistake the tone


def read_package(package):
    """The unpacked npm package -> {caption: path of its PNG}. Of emoji with the same caption the
    first counts."""
    entries = read_json(Path(package) / "emoji.json", "list of the package's emoji")
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise UserError(f"{package}/emoji.json: should hold a JSON list of emoji")
    files = {}
    for entry in entries:
        name = entry.get("name")
        if not name or not entry.get("image"):
            continue
        name = name.lower().replace(":", "").replace(",", "")
        shown = {name: entry} | {f"{name} {tone_words(key)}": variation
                                 for key, variation in entry.get("skin_variations", {}).items()}
        for caption, emoji in shown.items():
            path = Path(package) / "img" / "twitter" / "64" / emoji["image"]
            if path.is_file():
                files.setdefault(caption, path)
    if len(files) < 2:
        raise UserError(f"{package}: has no emoji with a name and a file in img/twitter/64; should "
                        "be the unpacked npm package emoji-datasource-twitter")
    return files


def tone_words(key):
    """"1F3FB" -> "light skin"; "1F3FB-1F3FF", of two people -> "light skin and dark skin"."""
    return " and ".join(TONES.get(tone, tone.lower()) for tone in key.split("-"))


def similar_pairs(captions):
    """Pairs of captions that have all words in common but one or two neighboring ones. Words that
    more than MOST captions have around a gap ("... flag") make no pairs: they would be most."""
    around = {}
    for caption in captions:
        words = caption.split()
        for start in range(len(words) + 1):
            for end in range(start, min(start + 2, len(words)) + 1):
                context = tuple(words[:start]), tuple(words[end:])
                if any(context):
                    around.setdefault(context, []).append(caption)
    groups = [group for group in around.values() if len(group) <= MOST]
    return sorted({pair for group in groups for pair in combinations(sorted(set(group)), 2)})


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", help="folder of the unpacked npm package")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    args = parser.parse_args(argv)
    sources = read_package(args.package)
    out = Path(args.out)
    make_folder(out / "images")
    files = {}
    for number, (caption, source) in enumerate(sources.items()):
        files[caption] = f"images/{number:04d}.png"
        paste_on_white(source).save(out / files[caption])
    print(ATTRIBUTION)
    pairs = similar_pairs(sources)
    write_pairs(out / "pairs.json", pairs, split_by_caption(pairs), files)
    pairs, splits = tone_pairs(sources)
    write_pairs(out / "tones.json", pairs, splits, files)
    rng = np.random.default_rng(0)
    careless = [tuple(mistake_tone(caption, rng) for caption in pair) for pair in pairs]
    captions = [wrong if split == "train" else right
                for right, wrong, split in zip(pairs, careless, splits)]
    write_pairs(out / "careless.json", pairs, splits, files, captions)


def write_pairs(path, pairs, splits, files, captions=None):
    """Pairs of captions as a file for --data. files: {caption: path of its image}. captions: what
    the file calls them, if they are mistaken."""
    entries = []
    for (one, other), (prompt1, prompt2), split in zip(pairs, captions or pairs, splits):
        if split != "dropped":
            entries.append({"prompt1": prompt1, "prompt2": prompt2, "image1": files[one],
                            "image2": files[other], "split": split})
    write_json(path, entries)
    counts = Counter(entry["split"] for entry in entries)
    print(f"{path}: " + ", ".join(f"{n} {split}" for split, n in counts.items()))


def split_tone(caption):
    """"hand dark skin" -> ("hand", "dark skin"). The tone is "" where there is none, or two."""
    for tone in sorted(TONES.values(), key=len, reverse=True):
        if caption.endswith(f" {tone}") and " skin and " not in caption:
            return caption.removesuffix(f" {tone}"), tone
    return caption, ""


def tone_pairs(captions):
    """Pairs of captions that differ in the skin tone alone, and which split each is in. An emoji
    has one held-out pair at most: judge and policy know it in its other tones."""
    groups = {}
    for caption in captions:
        name, tone = split_tone(caption)
        if tone:
            groups.setdefault(name, []).append(caption)
    groups = list(groups.values())
    rng = np.random.default_rng(0)
    n_test = min(TEST_PAIRS, 2 * len(groups) // 5)
    order = rng.permutation(len(groups)).tolist()
    held_out = {"test": order[:n_test], "validation": order[n_test:][:-(-n_test // 2)]}
    split_of = {}                       # of the held-out captions
    for split, numbers in held_out.items():
        for n in numbers:
            chosen = rng.permutation(len(groups[n]))[:2]
            split_of |= {groups[n][i]: split for i in chosen}
    pairs = [pair for group in groups for pair in combinations(group, 2)]
    found = [[split_of.get(caption, "train") for caption in pair] for pair in pairs]
    splits = [one if one == other else "dropped" for one, other in found]
    return pairs, splits


def mistake_tone(caption, rng):
    """A caption, which with a chance of MISTAKES names the next darker tone, and light for dark."""
    tones = list(TONES.values())
    name, tone = split_tone(caption)
    if rng.random() < MISTAKES:
        tone = tones[(tones.index(tone) + 1) % len(tones)]
    return f"{name} {tone}"


def paste_on_white(path):
    """A PNG with a transparent background -> PIL image, RGB. UserError if it cannot be read."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGBA")
    except (OSError, ValueError, SyntaxError) as e:
        raise UserError(f"{path}: cannot be read as an image ({e}); unpack the package again"
                        ) from e
    sheet = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(sheet, image).convert("RGB")


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
