"""EmojiPairs: real images in which PPO can be tried, made of an npm package that you fetch.

    npm pack emoji-datasource-twitter && tar xzf emoji-datasource-twitter-*.tgz
    python -m extras.emoji package --out emoji
    python train.py --stage ppo --data emoji/pairs.json --out runs/emoji      # all emoji
    python train.py --stage ppo --data emoji/people.json --out runs/people    # the part below

A caption is an emoji's name in lower case, with the skin tone in words: "woman astronaut dark
skin". A pair is two captions that differ in one word or two neighboring ones.

pairs.json has all emoji. people.json is compositional: the people that exist as man and woman in
six tones, e.g. role x gender x tone. Half of these captions have images to learn from. A fifth is
for PPO alone: such a caption has no image, but what the policy draws for it can be judged. On the
rest, also without images in training, PPO is validated and tested.

The code of the package is MIT. The images are Twemoji's, CC-BY 4.0: the attribution that this asks
for is printed, and nothing of them is in this repository.
"""
import argparse
import json
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image

from common import UserError, make_folder, read_json
from data import split_by_caption

ATTRIBUTION = ("Images: Twemoji, copyright Twitter, Inc. and other contributors, "
               "https://github.com/jdecked/twemoji, CC-BY 4.0 "
               "(https://creativecommons.org/licenses/by/4.0/), here pasted on white")
TONES = {"1F3FB": "light skin", "1F3FC": "medium light skin", "1F3FD": "medium skin",
         "1F3FE": "medium dark skin", "1F3FF": "dark skin"}
# Shares of the captions of people.json: with images for all stages, then without for PPO alone.
PEOPLE = {"train": 0.45, "prompts": 0.24, "validation": 0.13, "test": 0.18}
MOST = 30               # captions of which all are paired with each other


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


def read_people(files):
    """{caption: path} -> {(role, gender, tone): caption}: the roles that have a man and a woman,
    each in six tones. The tone "" is the emoji's yellow."""
    people = {}
    for caption in files:
        gender, _, rest = caption.partition(" ")
        if gender in ("man", "woman"):
            tones = [tone for tone in TONES.values() if rest.endswith(" " + tone)]
            tone = max(tones, key=len, default="")      # "dark skin" ends "medium dark skin" too
            people[rest.removesuffix(tone).strip(), gender, tone] = caption
    every = [(gender, tone) for gender in ("man", "woman") for tone in ("", *TONES.values())]
    roles = sorted({role for role, _, _ in people})
    full = [role for role in roles if role and all((role, *kind) in people for kind in every)]
    return {(role, *kind): people[role, *kind] for role in full for kind in every}


def people_pairs(people):
    """-> list of (caption, caption, category, split or "prompts"), for pairs that differ in tone or
    in gender, and whose captions are in one part of PEOPLE. The parts are fixed."""
    order = np.random.default_rng(2506).permutation(len(people))
    bounds = np.cumsum([round(share * len(people)) for share in PEOPLE.values()])
    part_of = {}
    for rank, i in enumerate(order):
        part = int((bounds <= rank).sum())
        part_of[list(people)[i]] = list(PEOPLE)[min(part, len(PEOPLE) - 1)]
    pairs = []
    for one, other in combinations(people, 2):
        differs = [a != b for a, b in zip(one, other)]
        one_detail = not differs[0] and sum(differs) == 1
        if one_detail and part_of[one] == part_of[other]:
            category = "gender" if differs[1] else "tone"
            pairs.append((people[one], people[other], category, part_of[one]))
    return pairs


def write_pairs(path, pairs, files):
    """(caption, caption, category, split) -> FocusDiff-Data's layout. Pairs of the part "prompts"
    are training pairs without images."""
    entries = []
    for one, other, category, split in pairs:
        shown = split != "prompts"
        entries.append({"prompt1": one, "prompt2": other, "category": category,
                        "image1": files[one] if shown else None,
                        "image2": files[other] if shown else None,
                        "split": split if shown else "train"})
    path.write_text(json.dumps(entries, indent=1))
    counts = {split: sum(pair[3] == split for pair in pairs)
              for split in dict.fromkeys(pair[3] for pair in pairs)}
    print(f"{path}: " + ", ".join(f"{n} {split}" for split, n in sorted(counts.items())))


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
    pairs = similar_pairs(sources)
    splits = split_by_caption(pairs)
    kept = [(*pair, "", split) for pair, split in zip(pairs, splits) if split != "dropped"]
    write_pairs(out / "pairs.json", kept, files)
    write_pairs(out / "people.json", people_pairs(read_people(sources)), files)
    print(ATTRIBUTION)


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
