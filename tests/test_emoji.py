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
        assert [e[key] for e in tones][:len(careless)] == [e[key] for e in careless]


def test_tones_are_trained_on_beside_other_emoji(package, tmp_path):
    """With pairs of tones alone the judges never saw a wrong emoji. PPO found out: its swimmers
    became patches of skin in the right tone, and the table, of tones alone too, called it a gain of
    28 points."""
    captions = [f"{name} {tone}" for name in ("man", "woman", "hand")
                for tone in emoji.TONES.values()]
    pairs = emoji.tone_pairs(captions)
    others = emoji.same_tone_pairs(pairs)
    assert len(pairs) == len(others) == 30
    split = [[emoji.split_tone(caption) for caption in pair] for pair in others]
    assert all(one[0] != other[0] and one[1] == other[1] for one, other in split)
    assert {one[1] for one, _ in split} == set(emoji.TONES.values())    # dark patches count too
    emoji.main([str(package), "--out", str(tmp_path)])
    tones = json.loads((tmp_path / "tones.json").read_text())
    held_out, trained = ({e[k] for e in tones for k in ("prompt1", "prompt2")
                          if (e["split"] == "train") == train} for train in (False, True))
    assert held_out and trained and not held_out & trained
