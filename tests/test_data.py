"""data.py: PairWorld and its oracle, the held-out split, folders in the FocusDiff-Data layout, text tokens."""
import itertools
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import data
import pairworld as world
from data import PairSet, UserError
from pairworld import ATTRIBUTES, CATEGORIES, GRID, IMAGE_SIZE, OPTIONAL, Layout, Scene, TextTokens

NAMES = list(ATTRIBUTES)
text_tokens = TextTokens()
scenes = st.builds(Scene, *(st.integers(0, len(options) - 1) for options in ATTRIBUTES.values()))
layouts = st.builds(Layout, st.integers(0, 2), st.permutations(range(4)).map(tuple), st.integers(0, 1), st.integers(0, 1))


@pytest.fixture(scope="module")
def held_out():
    return world.pairworld(300, "test", seed=0)


@pytest.fixture(scope="module")
def train():
    return world.pairworld(6000, "train", seed=0)


def expected_reading(prompts):
    """Prompts -> (n, 10), the index of each attribute that is named, -2 where it is not."""
    return np.array([[world.read_caption(p).get(name, -2) for name in NAMES] for p in prompts])


# --- text tokens

some_text = st.one_of(
    st.text(), st.text(st.characters()),                                                  # the second includes lone surrogates
    st.lists(st.sampled_from([" ", "  ", "\n", "red", "circles", " the", "letter", "A", "Red", "redred", "é", "円", "\ud83d", "\ude00"])).map("".join))


@settings(max_examples=300, deadline=None)
@given(some_text)
@example("")
@example(" ")
@example("\ud83d\ude00")                             # two halves of an emoji, not the emoji: must come back as two
@example("three red circles left of a blue square")
def test_any_string_decodes_to_itself_and_never_makes_a_special_id(text):
    ids = text_tokens.encode(text)
    assert text_tokens.decode(ids) == text
    assert all(text_tokens.first_byte <= i < text_tokens.vocab_size for i in ids)
    assert not {text_tokens.pad, text_tokens.bos, text_tokens.boi} & set(ids)


def test_a_caption_is_one_token_a_word():
    caption = "three red circles left of a blue square on a plain background with the letter K"
    assert len(text_tokens.encode(caption)) == len(caption.split())


def test_every_caption_fits_the_default_context(train):
    assert max(len(text_tokens.encode(p)) + 2 for two in train.prompts for p in two) <= 48


def test_prompts_are_padded_on_the_left():
    rows = text_tokens.prompts(["one red circle", None], max_len=48)
    assert rows.tolist() == [[1, *text_tokens.encode("one red circle"), 2], [0, 0, 0, 1, 2]]


def test_a_prompt_longer_than_the_context_is_named():
    with pytest.raises(UserError, match="longer than the context of 10.*zzzz"):
        text_tokens.prompts(["one red circle", "z" * 50], max_len=10)


# --- scenes, captions, pictures

@settings(max_examples=200, deadline=None)
@given(scenes, st.sets(st.sampled_from(list(OPTIONAL))))
def test_read_caption_is_the_inverse_of_caption(scene, named):
    told = {"count", "colour", "shape"} | {name for part in named for name in OPTIONAL[part]}
    assert world.read_caption(world.caption(scene, named)) == {k: v for k, v in scene._asdict().items() if k in told}


@pytest.mark.parametrize("text", ["", "a cat", "one red circle and more", "red one circle", "one red circle left of a blue"])
def test_what_is_not_a_caption_is_refused(text):
    with pytest.raises(UserError, match="not a PairWorld caption"):
        world.read_caption(text)


@settings(max_examples=300, deadline=None)
@given(scenes, layouts)
def test_oracle_reads_every_attribute_of_every_scene(scene, layout):
    assert world.read_scene(world.render(scene, layout)[None])[0].tolist() == list(scene)


def test_oracle_is_right_on_all_held_out_renderings(held_out):
    found = world.read_scene(held_out.images.reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3))
    said = expected_reading([p for two in held_out.prompts for p in two])
    assert (found != -1).all()
    assert (found == said)[said != -2].all()


def test_oracle_survives_a_little_noise(held_out):
    """A reconstruction is never exact; the oracle reads the nearest template."""
    images = held_out.images[:50].reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3)
    noisy = (images + np.random.default_rng(0).normal(0, 12, images.shape)).clip(0, 255).astype(np.uint8)
    assert (world.read_scene(noisy) == world.read_scene(images)).all()


SCENE, LAYOUT = Scene(1, 1, 0, 0, 0, 0, 2, 1, 0, 0), Layout(0, (0, 1, 2, 3), 0, 0)      # two objects, left of one reference


def read_after(change):
    image = world.render(SCENE, LAYOUT)
    change(image)
    return dict(zip(NAMES, world.read_scene(image[None])[0].tolist()))


def test_oracle_refuses_mixed_colours():
    """Strictness: with a red and a green object no colour is right, or a policy could hedge."""
    def repaint(image):
        image[:8, :8] = world.render(SCENE._replace(colour=1), LAYOUT)[:8, :8]
    seen = read_after(repaint)
    assert seen["colour"] == -1 and seen["shape"] == SCENE.shape and seen["count"] == SCENE.count


def test_oracle_refuses_mixed_shapes_two_letters_and_two_references():
    def reshape_one(image):
        image[:8, :8] = world.render(SCENE._replace(shape=3), LAYOUT)[:8, :8]
    assert read_after(reshape_one)["shape"] == -1
    corner = world.render(SCENE, LAYOUT)[:8, 24:]

    def second_letter(image):
        image[24:, 24:] = corner
    assert read_after(second_letter)["letter"] == -1

    def second_reference(image):
        image[16:24, 24:] = image[8:16, 24:]
    assert {read_after(second_reference)[k] for k in ("ref_colour", "ref_shape", "relation")} == {-1}


def test_oracle_refuses_objects_on_both_sides_and_an_empty_picture():
    def object_on_the_wrong_side(image):
        image[16:24, 24:] = image[:8, :8]
    assert read_after(object_on_the_wrong_side)["relation"] == -1

    def blank(image):
        image[:] = 250
    seen = read_after(blank)
    assert {v for k, v in seen.items() if k != "style"} == {-1}


def test_no_two_templates_look_alike():
    cells = np.stack(list(world._templates().values())).reshape(len(world._templates()), -1)
    assert len(np.unique(cells, axis=0)) == len(cells)


# --- pairs

def test_the_two_pictures_differ_only_inside_the_difference_mask(held_out):
    mask = world.difference_mask(held_out.images, 8)
    assert mask.shape == (300, 8, 8) and mask.any((1, 2)).all()
    for (one, two), m in zip(held_out.images, mask):
        for y, x in itertools.product(range(8), range(8)):
            patch = np.s_[4 * y:4 * y + 4, 4 * x:4 * x + 4]
            assert m[y, x] == (not np.array_equal(one[patch], two[patch]))


def test_pairs_share_their_nuisance(held_out):
    """Only what the prompts tell apart may differ: as many cells as the difference needs, and all unread attributes agree."""
    found = world.read_scene(held_out.images.reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3)).reshape(-1, 2, len(NAMES))
    cells = world.difference_mask(held_out.images, GRID).sum((1, 2))
    for category, (one, two), prompts, n in zip(held_out.categories, found, held_out.prompts, cells):
        differs = [name for name, a, b in zip(NAMES, one, two) if a != b]
        assert len(differs) == 1 and differs[0] in CATEGORIES[category]
        assert len(prompts[0].split()) == len(prompts[1].split()) or "relation" in differs
        objects = one[0] + 1
        if differs[0] in ("letter", "ref_colour", "ref_shape"):
            assert n == 1
        elif differs[0] in ("size", "fill", "colour", "shape"):
            assert n == objects
        elif differs[0] == "count":
            assert n == abs(int(one[0]) - int(two[0]))
        elif differs[0] == "style":
            assert n == GRID ** 2 - objects - 2


def carriers(scene, layout, name):
    """The cells (4, 4) of a rendering that carry an attribute, from where `render` puts things."""
    at = {"object": [world._turn(scene.relation, k // 2, layout.offset + k % 2) for k in layout.cells[:scene.count + 1]],
          "ref": [world._turn(scene.relation, GRID - 1, 1 + layout.ref_slot)],
          "letter": [world._turn(scene.relation, GRID - 1, (GRID - 1) * layout.letter_slot)]}
    at["style"] = [place for place in itertools.product(range(GRID), range(GRID)) if place not in sum(at.values(), [])]
    kinds = {"letter": ["letter"], "style": ["style"], "ref_colour": ["ref"], "ref_shape": ["ref"], "relation": ["object", "ref"],
             "count": ["object", "style"]}.get(name, ["object"])
    cells = np.zeros((GRID, GRID), bool)
    for place in sum((at[kind] for kind in kinds), []):
        cells[place] = True
    return cells


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(scenes, layouts, st.integers(1, 3), st.sets(st.sampled_from(list(OPTIONAL))))
def test_a_picture_shows_a_difference_in_the_cells_that_carry_it(name, scene, layout, step, named):
    """Wherever the prompts differ, the clean picture has the difference itself inside these cells, and nothing else unless the number
    or the place of the objects differs: the twin then has objects where this picture has background, letter or reference."""
    other = scene._replace(**{name: (getattr(scene, name) + step) % len(ATTRIBUTES[name])})
    if other == scene:                                                  # two sizes and two fills: two steps lead back
        other = scene._replace(**{name: 1 - getattr(scene, name)})
    named = named | {part for part, names in OPTIONAL.items() if name in names}
    images, told = np.stack([world.render(s, layout) for s in (scene, other)]), (world.caption(scene, named), world.caption(other, named))
    for image, s, two in zip(images, (scene, other), (told, told[::-1])):
        shown, cells = world.shown_in(image[None], [two], 8)[0], carriers(s, layout, name)
        assert shown.shape == (8, 8) and np.array_equal(shown, cells.repeat(2, 0).repeat(2, 1))
        assert np.array_equal(world.shown_in(image[None], [two], GRID)[0], cells)
        if name != "relation":
            assert shown[world.difference_mask(images[None], 8)[0]].all()
        if name not in ("relation", "count"):
            assert np.array_equal(cells, world.difference_mask(images[None], GRID)[0])
    if name == "relation":
        anywhere = np.any([carriers(s, layout, n) for s in (scene, other) for n in ("relation", "letter")], 0)
        assert anywhere[world.difference_mask(images[None], GRID)[0]].all()


def test_what_a_picture_shows_is_found_row_by_row_and_in_what_was_sampled(held_out):
    """The rows are pictures with pairs of their own, noise does no harm, and a blank picture is background alone."""
    images, prompts = held_out.images[:60, 0], held_out.prompts[:60]
    shown = world.shown_in(images, prompts, 8)
    assert all(np.array_equal(shown[i], world.shown_in(images[i:i + 1], prompts[i:i + 1], 8)[0]) for i in range(60))
    noisy = (images + np.random.default_rng(0).normal(0, 12, images.shape)).clip(0, 255).astype(np.uint8)
    assert np.array_equal(world.shown_in(noisy, prompts, 8), shown)
    blank = world.shown_in(np.full_like(images, 250), prompts, 8)
    assert blank.mean((1, 2)).tolist() == [c in ("counting", "style") for c in held_out.categories[:60]]


def test_two_captions_that_say_the_same_show_nothing_apart(held_out):
    with pytest.raises(UserError, match="say the same"):
        world.shown_in(held_out.images[:1, 0], [held_out.prompts[0][:1] * 2], 8)


def test_the_texts_of_a_set_are_its_prompts_pair_by_pair(held_out):
    texts = held_out.texts()
    assert len(texts) == 2 * len(held_out) and list(zip(texts[::2], texts[1::2])) == held_out.prompts
    assert PairSet([("a", "b"), ("c", "d")], [None, None], ["", ""]).texts() == ["a", "b", "c", "d"]


def test_categories_come_in_turn(held_out):
    assert held_out.categories[:6] == list(CATEGORIES) and held_out.categories.count("text") == 50


def test_no_test_prompt_or_combination_is_ever_trained_on(train, held_out):
    trained = {p for two in train.prompts for p in two}
    tested = {p for two in held_out.prompts for p in two}
    assert not trained & tested
    def combination(prompt):
        told = world.read_caption(prompt)
        return told["count"], told["colour"], told["shape"]
    train_combos, test_combos = {combination(p) for p in trained}, {combination(p) for p in tested}
    assert test_combos <= world.held_out_combinations() and not train_combos & world.held_out_combinations()
    # and every single word of a test prompt is trained on: what is new is the combination
    assert {w for p in tested for w in p.split()} <= {w for p in trained for w in p.split()}


def test_no_test_pair_comes_twice(held_out):
    assert len(set(held_out.prompts)) == len(held_out)


def test_pairworld_is_determined_by_its_seed():
    one, same, other = (world.pairworld(30, "train", seed) for seed in (1, 1, 2))
    assert one.prompts == same.prompts and np.array_equal(one.images, same.images)
    assert one.prompts != other.prompts


# --- files

def write_json(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture
def folder(tmp_path, held_out):
    data.write_pairs(PairSet(held_out.prompts[:6], held_out.images[:6], held_out.categories[:6]), tmp_path)
    return tmp_path


def test_pairs_come_back_from_disk_as_they_were(folder, held_out):
    pairs = data.read_pairs(folder / "pairs.json", IMAGE_SIZE)
    assert pairs.prompts == held_out.prompts[:6] and pairs.categories == held_out.categories[:6] and len(pairs) == 6
    assert np.array_equal(pairs.load(range(6)), held_out.images[:6])
    assert np.array_equal(pairs.load([4, 1]), held_out.images[[4, 1]])
    assert pairs.has_images([0, 5]).all()


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.json: no such file"):
        data.read_pairs(tmp_path / "nowhere.json", 32)


def test_broken_json_says_the_line(tmp_path):
    with pytest.raises(UserError, match="pairs.json: broken JSON at line 3"):
        data.read_pairs(write_json(tmp_path / "pairs.json", '[\n {"prompt1": "a"},\n {"prompt1" "b"}\n]'), 32)


@pytest.mark.parametrize("content", [[], {}, {"prompt1": "a"}, "null", "3"])
def test_json_that_is_no_list_of_pairs_is_refused(tmp_path, content):
    with pytest.raises(UserError, match="should hold a JSON list of pairs"):
        data.read_pairs(write_json(tmp_path / "pairs.json", content), 32)


@pytest.mark.parametrize("bad", [{"drop": "image2"}, {"drop": "prompt1"}, {"image1": None}, {"prompt2": ""}, {"image2": 7}])
def test_a_pair_without_a_key_is_numbered_and_the_key_named(folder, bad):
    entries = json.loads((folder / "pairs.json").read_text())
    key = bad.get("drop") or next(iter(bad))
    entries[3] = {k: v for k, v in entries[3].items() if k != key} if "drop" in bad else entries[3] | bad
    with pytest.raises(UserError, match=f"pair 3 has no '{key}'"):
        data.read_pairs(write_json(folder / "pairs.json", entries), 32)


def test_pairs_without_pictures_are_read_and_served(folder):
    """image1 and image2 both null (as in the official reader) or both left out."""
    entries = json.loads((folder / "pairs.json").read_text())
    entries[1] |= {"image1": None, "image2": None}
    del entries[4]["image1"], entries[4]["image2"]
    pairs = data.read_pairs(write_json(folder / "pairs.json", entries), IMAGE_SIZE)
    assert len(pairs) == 6 and pairs.has_images(range(6)).tolist() == [True, False, True, True, False, True]
    assert not pairs.load([1, 4]).any() and pairs.load([0, 2, 3, 5]).any((1, 2, 3, 4)).all()
    pictured = pairs.with_images()
    assert pictured.prompts == [pairs.prompts[i] for i in (0, 2, 3, 5)] and pictured.categories == [pairs.categories[i] for i in (0, 2, 3, 5)]
    assert np.array_equal(pictured.load(range(4)), pairs.load([0, 2, 3, 5]))
    data.write_pairs(pairs, folder / "again")
    again = data.read_pairs(folder / "again" / "pairs.json", IMAGE_SIZE)
    assert again.prompts == pairs.prompts and np.array_equal(again.has_images(range(6)), pairs.has_images(range(6)))


def test_a_set_without_any_picture_cannot_teach_pictures(tmp_path, held_out):
    bare = data.read_pairs(write_json(tmp_path / "pairs.json", [{"prompt1": "a", "prompt2": "b"}]), 32)
    with pytest.raises(UserError, match="none of the pairs has pictures"):
        bare.with_images()
    assert held_out.with_images() is held_out


def test_every_pair_of_the_file_is_served_in_order_and_prompts_are_stripped(tmp_path):
    """The official reader serves the first half of the file: it halves a number that already counts pairs."""
    entries = [{"prompt1": f" {i} cats\n", "prompt2": f"{i} dogs "} for i in range(11)]
    assert data.read_pairs(write_json(tmp_path / "pairs.json", entries), 32).prompts == [(f"{i} cats", f"{i} dogs") for i in range(11)]


def test_absolute_image_paths_are_read(tmp_path, folder):
    entries = json.loads((folder / "pairs.json").read_text())
    for entry in entries:
        entry |= {key: str(folder / entry[key]) for key in ("image1", "image2")}
    (tmp_path / "elsewhere").mkdir()
    elsewhere = data.read_pairs(write_json(tmp_path / "elsewhere" / "pairs.json", entries), IMAGE_SIZE)
    assert np.array_equal(elsewhere.load([2]), data.read_pairs(folder / "pairs.json", IMAGE_SIZE).load([2]))


def test_a_pair_that_is_no_object_is_refused(tmp_path):
    with pytest.raises(UserError, match="pair 0"):
        data.read_pairs(write_json(tmp_path / "pairs.json", ["a red circle"]), 32)


def test_an_image_that_is_not_on_disk_is_found_before_training(folder):
    (folder / "images" / "00002_2.png").unlink()
    with pytest.raises(UserError, match="pair 2: image .*00002_2.png does not exist"):
        data.read_pairs(folder / "pairs.json", 32)


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b"this is no picture", lambda b: b[:len(b) // 2], lambda b: b[:40]])
def test_an_undecodable_image_is_named(folder, damage):
    file = folder / "images" / "00001_1.png"
    file.write_bytes(damage(file.read_bytes()))
    pairs = data.read_pairs(folder / "pairs.json", 32)
    with pytest.raises(UserError, match="00001_1.png: cannot be read as an image"):
        pairs.load([1])


@pytest.mark.filterwarnings("ignore")                        # Pillow comments on broken TIFFs
@pytest.mark.parametrize("kind", ["PNG", "GIF", "JPEG", "WEBP", "BMP", "TIFF"])
def test_no_damage_to_an_image_gets_past_as_anything_but_a_user_error(tmp_path, kind):
    """Pillow raises many kinds of exceptions for broken files; a user sees one line for all of them."""
    file, rng = tmp_path / "x", np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(file, kind)
    whole, refused = file.read_bytes(), 0
    for _ in range(60):
        broken = bytearray(whole)
        for place in rng.integers(0, len(broken), rng.integers(1, 30)):
            broken[place] = rng.integers(256)
        file.write_bytes(bytes(broken[:rng.integers(1, len(broken) + 1)]))
        try:
            assert data.load_image(file, 8).shape == (8, 8, 3)
        except UserError:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize("width, height", [(96, 32), (192, 64), (32, 96), (64, 192)])
def test_another_size_is_resized_by_its_short_side_and_centre_cropped(tmp_path, width, height):
    """Three bands, red green blue: the middle one is what is left."""
    bands = np.repeat(np.eye(3, dtype=np.uint8) * 255, max(width, height) // 3, 0)                  # (long, 3)
    picture = np.broadcast_to(bands[None] if width > height else bands[:, None], (height, width, 3))
    Image.fromarray(np.ascontiguousarray(picture)).save(tmp_path / "bands.png")
    image = data.load_image(tmp_path / "bands.png", 32)
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    assert (image[4:-4, 4:-4] == (0, 255, 0)).all()


@pytest.mark.parametrize("width, height, halved", [(100, 80, (50, 40)), (257, 129, (64, 32)), (63, 90, None), (32, 64, None), (64, 64, (32, 32))])
def test_a_large_picture_is_halved_by_averages_before_the_bicubic_step(tmp_path, width, height, halved):
    """As the official code does it, step by step, each step written out by hand: pixels of a fine pattern are not skipped."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.png")
    image = Image.fromarray(noise)
    for _ in range({None: 0, (50, 40): 1, (64, 32): 2, (32, 32): 1}[halved]):
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    assert halved is None or image.size == halved
    short = min(image.size)
    image = image.resize((round(image.width * 32 / short), round(image.height * 32 / short)), Image.Resampling.BICUBIC)
    left, top = (image.width - 32) // 2, (image.height - 32) // 2
    assert np.array_equal(data.load_image(tmp_path / "x.png", 32), np.array(image)[top:top + 32, left:left + 32])
    assert np.array_equal(data.load_image(tmp_path / "x.png", None), noise)


@pytest.mark.parametrize("width, height", [(1, 1), (33, 50), (50, 33), (31, 32), (1, 90), (640, 427)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1"])
def test_any_size_and_mode_becomes_a_square_rgb_picture(tmp_path, width, height, mode):
    Image.new(mode, (width, height), 1).save(tmp_path / "x.png")
    assert data.load_image(tmp_path / "x.png", 32).shape == (32, 32, 3)


def test_a_lone_prompt_is_a_pair_with_itself_and_without_pictures(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n  two dogs \n", encoding="utf-8")
    pairs = data.read_prompts(tmp_path / "prompts.txt")
    assert pairs.prompts == [("a cat", "a cat"), ("two dogs", "two dogs")]
    assert not pairs.has_images([0, 1]).any()
    assert pairs.load([0, 1]).shape == (2, 2, IMAGE_SIZE, IMAGE_SIZE, 3) and not pairs.load([1]).any()


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xff\xfe\x00"])
def test_a_prompt_file_without_prompts_or_without_text_is_refused(tmp_path, content):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(UserError, match="prompts.txt"):
        data.read_prompts(tmp_path / "prompts.txt")


def test_a_missing_prompt_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.txt"):
        data.read_prompts(tmp_path / "nowhere.txt")


def test_pairs_with_and_without_pictures_load_together(folder):
    pairs = data.read_pairs(folder / "pairs.json", 32)
    mixed = PairSet(pairs.prompts[:1] + [("a", "a")], pairs.images[:1] + [None], ["", ""], 32)
    images = mixed.load([1, 0])
    assert not images[0].any() and np.array_equal(images[1], pairs.load([0])[0]) and mixed.has_images([0, 1]).tolist() == [True, False]
