"""extras/emoji.py, on a dozen images that are drawn here."""

import json

import numpy as np
import pytest
from PIL import Image

from common import UserError
from data import read_splits
from extras import emoji


def write_package(folder, entries):
    images = folder / "img" / "twitter" / "64"
    images.mkdir(parents=True)
    for entry in entries:
        for shown in [entry, *entry.get("skin_variations", {}).values()]:
            Image.new("RGBA", (64, 64), (200, 30, 30, 0)).save(images / shown["image"])
    (folder / "emoji.json").write_text(json.dumps(entries))
    return folder


def waving(name, number):
    tones = {key: {"image": f"{number}-{key}.png"} for key in emoji.TONES}
    return {"name": name, "image": f"{number}.png", "skin_variations": tones}


@pytest.fixture()
def package(tmp_path):
    entries = [waving("MAN WAVING", 1), waving("WOMAN WAVING", 2), waving("HAND: OPEN", 3)]
    return write_package(tmp_path / "package", entries)


def test_captions_are_names_with_the_tone_in_words(package):
    files = emoji.read_package(package)
    assert len(files) == 18
    assert {"man waving", "woman waving medium dark skin", "hand open light skin"} < set(files)
    assert emoji.tone_words("1F3FB-1F3FF") == "light skin and dark skin"


def test_pairs_differ_in_one_word_or_two_neighbors():
    captions = ["man waving", "woman waving", "man waving dark skin", "man waving light skin",
                "clock face six thirty", "clock face twelve thirty", "red clock"]
    assert emoji.similar_pairs(captions) == [
        ("clock face six thirty", "clock face twelve thirty"),
        ("man waving", "man waving dark skin"), ("man waving", "man waving light skin"),
        ("man waving", "woman waving"), ("man waving dark skin", "man waving light skin")]
    flags = [f"{i} flag" for i in range(emoji.MOST + 1)]  # most pairs would be of flags
    assert emoji.similar_pairs(flags) == []


def test_the_package_becomes_pairs_with_splits(package, tmp_path, capsys):
    emoji.main([str(package), "--out", str(tmp_path / "emoji")])
    said = capsys.readouterr().out
    assert "CC-BY 4.0" in said and "Twemoji" in said  # the license asks for the attribution
    parts = read_splits(tmp_path / "emoji" / "pairs.json", 32)
    captions = [set(part.flat_prompts()) for part in parts.values()]
    assert all(len(part) for part in parts.values())
    assert not captions[0] & captions[1] and not captions[0] & captions[2]
    image = parts["test"].load([0])
    assert image.shape == (1, 2, 32, 32, 3) and (image == 255).all()  # transparent is white


@pytest.mark.parametrize(
    "entries, says",
    [
        ([{"image": "1.png"}, {"image": "2.png"}], "has no emoji with a name"),
        ({"name": "x"}, "should hold a JSON list of emoji"),
    ],
)
def test_a_package_without_names_is_one_clear_line(tmp_path, entries, says):
    (tmp_path / "emoji.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match=says):
        emoji.read_package(tmp_path)


def test_an_image_that_cannot_be_read_is_named(package, tmp_path):
    broken = package / "img" / "twitter" / "64" / "2.png"
    broken.write_bytes(broken.read_bytes()[:50])
    with pytest.raises(UserError, match="2.png: cannot be read as an image"):
        emoji.main([str(package), "--out", str(tmp_path / "emoji")])


def test_careless_captions_name_the_next_darker_tone(package, tmp_path):
    """On all emoji PPO had nothing to gain: what the base model does not know, the judges, trained
    on the same images, do not know either. Here the judges know a detail that the base mistakes."""
    assert emoji.split_tone("man medium light skin") == ("man", "medium light skin")
    assert emoji.split_tone("couple light skin and dark skin")[1] == ""
    assert emoji.split_tone("cat") == ("cat", "")
    rng = np.random.default_rng(0)
    found = {emoji.mistake_tone("man dark skin", rng) for _ in range(20)}
    assert found == {"man dark skin", "man light skin"}
    emoji.main([str(package), "--out", str(tmp_path)])
    tones, careless = (json.loads((tmp_path / f"{name}.json").read_text())
                       for name in ("tones", "careless"))
    changed = {"train": [], "validation": [], "test": []}
    for right, wrong in zip(tones, careless):
        changed[wrong["split"]] += [right[k] != wrong[k] for k in ("prompt1", "prompt2")]
    assert 0.4 < np.mean(changed["train"]) < 0.8
    assert not any(changed["validation"] + changed["test"])
    for key in ("image1", "image2", "split"):
        assert [e[key] for e in tones] == [e[key] for e in careless]


def test_an_emoji_has_one_held_out_pair_of_tones_at_most():
    """Where more was held out, the judges hardly knew the emoji: PPO drew heads instead of swimmers
    in the right tone, and was paid."""
    names = [f"person {i}" for i in range(50)]
    captions = [f"{name} {tone}" for name in names for tone in emoji.TONES.values()]
    pairs, splits = emoji.tone_pairs([*captions, "cat", "pair light skin and dark skin"])
    counts = {split: splits.count(split) for split in set(splits)}
    # of 5 tones 10 pairs; with one held out, 3 are left and 6 name a held-out caption
    assert counts == {"test": 20, "validation": 10, "train": 20 * 10 + 30 * 3, "dropped": 30 * 6}
    held_out = [emoji.split_tone(pair[0])[0] for pair, split in zip(pairs, splits)
                if split in ("test", "validation")]
    assert len(set(held_out)) == len(held_out) == 30
    captions_of = {split: {caption for pair, s in zip(pairs, splits) if s == split
                           for caption in pair} for split in ("train", "validation", "test")}
    assert not captions_of["train"] & (captions_of["validation"] | captions_of["test"])
    assert emoji.tone_pairs(captions) == (pairs, splits)
    tones = {emoji.split_tone(caption)[1] for caption in captions_of["test"]}
    assert tones == set(emoji.TONES.values())
