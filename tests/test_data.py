"""data.py and pairworld.py: PairWorld, its oracle, the held-out split, pair files, text tokens."""

import itertools
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import data
import pairworld as world
from common import UserError
from data import PairSet
from extras.draw_world import difference_mask, write_pairs
from pairworld import ATTRIBUTES, CATEGORIES, GRID, IMAGE_SIZE, OPTIONAL, Layout, Scene, TextTokens

NAMES = list(ATTRIBUTES)
text_tokens = TextTokens()
scenes = st.builds(Scene, *(st.integers(0, len(options) - 1) for options in ATTRIBUTES.values()))
layouts = st.builds(
    Layout,
    st.integers(0, 2),
    st.permutations(range(4)).map(tuple),
    st.integers(0, 1),
    st.integers(0, 1),
)


@pytest.fixture(scope="module")
def held_out():
    return world.pairworld(300, "test", seed=0)


@pytest.fixture(scope="module")
def train():
    return world.pairworld(6000, "train", seed=0)


def flat_images(pairs):
    """The images of P pairs in one row: (2P, H, W, 3)."""
    return pairs.images.reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 3)


def expected_reading(prompts):
    """Prompts -> (n, 10), the index of each attribute that is named, -2 where it is not."""
    return np.array([[world.read_caption(p).get(name, -2) for name in NAMES] for p in prompts])


def with_noise(images):
    noise = np.random.default_rng(0).normal(0, 12, images.shape)
    return (images + noise).clip(0, 255).astype(np.uint8)


# --- text tokens

PIECES = [" ", "  ", "\n", "red", "circles", " the", "letter", "A", "Red", "redred", "é", "円"]
PIECES += ["\ud83d", "\ude00"]
any_text = st.one_of(
    st.text(),
    st.text(st.characters()),  # includes unpaired surrogates
    st.lists(st.sampled_from(PIECES)).map("".join),
)


@settings(max_examples=300, deadline=None)
@given(any_text)
@example("")
@example(" ")
@example("\ud83d\ude00")  # two halves of an emoji, not the emoji: must come back as two
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
    assert max(len(text_tokens.encode(prompt)) + 2 for prompt in train.flat_prompts()) <= 48


def test_prompts_are_padded_at_the_end():
    rows = text_tokens.encode_prompts(["one red circle", None], max_len=48)
    assert rows.dtype == np.int64
    assert rows.tolist() == [[1, *text_tokens.encode("one red circle"), 2], [1, 2, 0, 0, 0]]


def test_a_dropped_prompt_is_the_empty_one():
    """Caption dropout of pretraining: what is dropped must look as guidance's empty prompt does."""
    prompts = ["one red circle", "two blue hearts"]
    rows = text_tokens.encode_prompts(prompts, max_len=48, dropped=np.array([False, True]))
    assert np.array_equal(rows, text_tokens.encode_prompts(["one red circle", None], max_len=48))


def test_a_prompt_longer_than_the_context_is_named():
    with pytest.raises(UserError, match="longer than the context of 10.*zzzz"):
        text_tokens.encode_prompts(["one red circle", "z" * 50], max_len=10)


# --- scenes, captions, images


@settings(max_examples=200, deadline=None)
@given(scenes, st.sets(st.sampled_from(list(OPTIONAL))))
def test_read_caption_is_the_inverse_of_caption(scene, named):
    said = {"count", "color", "shape"} | {name for part in named for name in OPTIONAL[part]}
    expected = {name: value for name, value in scene._asdict().items() if name in said}
    assert world.read_caption(world.caption(scene, named)) == expected


NO_CAPTIONS = ["", "a cat", "one red circle and more", "red one circle"]
NO_CAPTIONS += ["one red circle left of a blue"]


@pytest.mark.parametrize("text", NO_CAPTIONS)
def test_what_is_not_a_caption_is_refused(text):
    with pytest.raises(UserError, match="not a PairWorld caption"):
        world.read_caption(text)


@settings(max_examples=300, deadline=None)
@given(scenes, layouts)
def test_oracle_reads_every_attribute_of_every_scene(scene, layout):
    image = world.render(scene, layout)
    assert world.read_scene(image[None])[0].tolist() == list(scene)


def test_oracle_is_right_on_all_held_out_renderings(held_out):
    found = world.read_scene(flat_images(held_out))
    said = expected_reading(held_out.flat_prompts())
    assert (found != -1).all()
    assert (found == said)[said != -2].all()


def test_oracle_survives_a_little_noise(held_out):
    """A reconstruction is never exact; the oracle reads the nearest template."""
    images = flat_images(held_out)[:100]
    assert (world.read_scene(with_noise(images)) == world.read_scene(images)).all()


# Two objects, left of one reference.
SCENE = Scene(1, 1, 0, 0, 0, 0, 2, 1, 0, 0)
LAYOUT = Layout(0, (0, 1, 2, 3), 0, 0)


def read_after(change):
    image = world.render(SCENE, LAYOUT)
    change(image)
    return dict(zip(NAMES, world.read_scene(image[None])[0].tolist()))


def test_oracle_refuses_mixed_colors():
    """Strictness: with a red and a green object no color is right, or a policy could hedge."""

    def repaint(image):
        image[:8, :8] = world.render(SCENE._replace(color=1), LAYOUT)[:8, :8]

    seen = read_after(repaint)
    assert seen["color"] == -1
    assert seen["shape"] == SCENE.shape and seen["count"] == SCENE.count


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

    seen = read_after(second_reference)
    assert {seen[name] for name in ("ref_color", "ref_shape", "relation")} == {-1}


def test_oracle_refuses_objects_on_both_sides_and_an_empty_image():
    def object_on_the_wrong_side(image):
        image[16:24, 24:] = image[:8, :8]

    assert read_after(object_on_the_wrong_side)["relation"] == -1

    def blank(image):
        image[:] = 250

    seen = read_after(blank)
    assert {value for name, value in seen.items() if name != "style"} == {-1}


def test_no_two_templates_are_alike():
    cells = np.stack(list(world.templates().values())).reshape(len(world.templates()), -1)
    assert len(np.unique(cells, axis=0)) == len(cells)


# --- pairs


def test_the_images_of_a_pair_differ_only_inside_the_difference_mask(held_out):
    masks = difference_mask(held_out.images, 8)
    assert masks.shape == (300, 8, 8) and masks.any((1, 2)).all()
    for (first, second), mask in zip(held_out.images, masks):
        for y, x in itertools.product(range(8), range(8)):
            patch = np.s_[4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
            assert mask[y, x] == (not np.array_equal(first[patch], second[patch]))


def test_pairs_share_their_nuisance(held_out):
    """Only what the prompts tell apart may differ: as many cells as the difference needs, and all
    attributes that no prompt names agree."""
    found = world.read_scene(flat_images(held_out)).reshape(-1, 2, len(NAMES))
    cells = difference_mask(held_out.images, GRID).sum((1, 2))
    rows = zip(held_out.categories, found, held_out.prompts, cells)
    for category, (first, second), prompts, n in rows:
        differs = [name for name, a, b in zip(NAMES, first, second) if a != b]
        assert len(differs) == 1 and differs[0] in CATEGORIES[category]
        same_length = len(prompts[0].split()) == len(prompts[1].split())
        assert same_length or "relation" in differs
        objects = first[0] + 1
        if differs[0] in ("letter", "ref_color", "ref_shape"):
            assert n == 1
        elif differs[0] in ("size", "fill", "color", "shape"):
            assert n == objects
        elif differs[0] == "count":
            assert n == abs(int(first[0]) - int(second[0]))
        elif differs[0] == "style":
            assert n == GRID**2 - objects - 2


def test_the_flat_prompts_of_a_set_are_its_prompts_pair_by_pair(held_out):
    flat = held_out.flat_prompts()
    assert len(flat) == 2 * len(held_out)
    assert list(zip(flat[::2], flat[1::2])) == held_out.prompts
    pairs = PairSet([("a", "b"), ("c", "d")], [None, None], ["", ""])
    assert pairs.flat_prompts() == ["a", "b", "c", "d"]


def test_categories_come_in_turn(held_out):
    assert held_out.categories[:6] == list(CATEGORIES)
    assert held_out.categories.count("text") == 50


def test_no_test_prompt_or_combination_is_ever_trained_on(train, held_out):
    trained, tested = set(train.flat_prompts()), set(held_out.flat_prompts())
    assert not trained & tested

    def combination(prompt):
        said = world.read_caption(prompt)
        return said["count"], said["color"], said["shape"]

    train_combos = {combination(prompt) for prompt in trained}
    test_combos = {combination(prompt) for prompt in tested}
    assert test_combos <= world.combinations("test")
    assert not train_combos & world.combinations("test")
    # Every single word of a test prompt is trained on: what is new is the combination.
    train_words = {word for prompt in trained for word in prompt.split()}
    assert {word for prompt in tested for word in prompt.split()} <= train_words


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


def read_entries(folder):
    return json.loads((folder / "pairs.json").read_text())


@pytest.fixture
def folder(tmp_path, held_out):
    pairs = PairSet(held_out.prompts[:6], held_out.images[:6], held_out.categories[:6])
    write_pairs(pairs, tmp_path)
    return tmp_path


def test_pairs_come_back_from_disk_as_they_were(folder, held_out):
    pairs = data.read_pairs(folder / "pairs.json", IMAGE_SIZE)
    assert len(pairs) == 6
    assert pairs.prompts == held_out.prompts[:6] and pairs.categories == held_out.categories[:6]
    assert np.array_equal(pairs.load(range(6)), held_out.images[:6])
    assert np.array_equal(pairs.load([4, 1]), held_out.images[[4, 1]])
    assert pairs.has_images()[[0, 5]].all()


def test_single_images_come_in_the_order_of_the_flat_prompts(folder, held_out):
    """In memory and out of files alike: image 2p + side belongs to prompt 2p + side."""
    rows = np.array([11, 0, 3])
    expected = flat_images(held_out)[rows]
    assert np.array_equal(held_out.load_flat(rows), expected)
    from_files = data.read_pairs(folder / "pairs.json", IMAGE_SIZE)
    assert np.array_equal(from_files.load_flat(rows), expected)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.json: no such file"):
        data.read_pairs(tmp_path / "nowhere.json", 32)


def test_broken_json_says_the_line(tmp_path):
    content = '[\n {"prompt1": "a"},\n {"prompt1" "b"}\n]'
    with pytest.raises(UserError, match="pairs.json: broken JSON at line 3"):
        data.read_pairs(write_json(tmp_path / "pairs.json", content), 32)


@pytest.mark.parametrize("content", [[], {}, {"prompt1": "a"}, "null", "3"])
def test_json_that_is_no_list_of_pairs_is_refused(tmp_path, content):
    with pytest.raises(UserError, match="should hold a JSON list of pairs"):
        data.read_pairs(write_json(tmp_path / "pairs.json", content), 32)


BAD_KEYS = [{"drop": "image2"}, {"drop": "prompt1"}, {"image1": None}, {"prompt2": ""}]
BAD_KEYS += [{"image2": 7}]


@pytest.mark.parametrize("bad", BAD_KEYS)
def test_a_pair_without_a_key_is_numbered_and_the_key_named(folder, bad):
    entries = read_entries(folder)
    if "drop" in bad:
        key = bad["drop"]
        del entries[3][key]
    else:
        key = next(iter(bad))
        entries[3] |= bad
    with pytest.raises(UserError, match=f"pair 3 has no '{key}'"):
        data.read_pairs(write_json(folder / "pairs.json", entries), 32)


def test_pairs_without_images_are_read_and_served(folder):
    """image1 and image2 both null (as in the official reader) or both left out."""
    entries = read_entries(folder)
    entries[1] |= {"image1": None, "image2": None}
    del entries[4]["image1"], entries[4]["image2"]
    pairs = data.read_pairs(write_json(folder / "pairs.json", entries), IMAGE_SIZE)
    assert len(pairs) == 6
    assert pairs.has_images().tolist() == [True, False, True, True, False, True]
    kept = [0, 2, 3, 5]
    assert not pairs.load([1, 4]).any() and pairs.load(kept).any((1, 2, 3, 4)).all()
    with_images = pairs.with_images()
    assert with_images.prompts == [pairs.prompts[i] for i in kept]
    assert with_images.categories == [pairs.categories[i] for i in kept]
    assert np.array_equal(with_images.load(range(4)), pairs.load(kept))
    write_pairs(pairs, folder / "again")
    again = data.read_pairs(folder / "again" / "pairs.json", IMAGE_SIZE)
    assert again.prompts == pairs.prompts
    assert np.array_equal(again.has_images(), pairs.has_images())


def test_a_set_without_any_image_cannot_teach_images(tmp_path, held_out):
    entries = [{"prompt1": "a", "prompt2": "b"}]
    pairs = data.read_pairs(write_json(tmp_path / "pairs.json", entries), 32)
    with pytest.raises(UserError, match="none of the pairs has images"):
        pairs.with_images()
    assert held_out.with_images() is held_out


def test_every_pair_of_the_file_is_served_in_order_and_prompts_are_stripped(tmp_path):
    """The official reader serves the first half of the file: it halves a number that already
    counts pairs."""
    entries = [{"prompt1": f" {i} cats\n", "prompt2": f"{i} dogs "} for i in range(11)]
    pairs = data.read_pairs(write_json(tmp_path / "pairs.json", entries), 32)
    assert pairs.prompts == [(f"{i} cats", f"{i} dogs") for i in range(11)]


def test_absolute_image_paths_are_read(tmp_path, folder):
    entries = read_entries(folder)
    for entry in entries:
        entry |= {key: str(folder / entry[key]) for key in ("image1", "image2")}
    (tmp_path / "elsewhere").mkdir()
    path = write_json(tmp_path / "elsewhere" / "pairs.json", entries)
    elsewhere = data.read_pairs(path, IMAGE_SIZE)
    here = data.read_pairs(folder / "pairs.json", IMAGE_SIZE)
    assert np.array_equal(elsewhere.load([2]), here.load([2]))


def test_a_pair_that_is_no_object_is_refused(tmp_path):
    with pytest.raises(UserError, match="pair 0"):
        data.read_pairs(write_json(tmp_path / "pairs.json", ["a red circle"]), 32)


def test_an_image_that_is_not_on_disk_is_found_before_training(folder):
    (folder / "images" / "00002_2.png").unlink()
    with pytest.raises(UserError, match="pair 2: image .*00002_2.png does not exist"):
        data.read_pairs(folder / "pairs.json", 32)


DAMAGES = {
    "empty": lambda whole: b"",
    "text": lambda whole: b"this is no image",
    "half": lambda whole: whole[: len(whole) // 2],
    "head": lambda whole: whole[:40],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_undecodable_image_is_named(folder, damage):
    file = folder / "images" / "00001_1.png"
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    pairs = data.read_pairs(folder / "pairs.json", 32)
    with pytest.raises(UserError, match="00001_1.png: cannot be read as an image"):
        pairs.load([1])


@pytest.mark.filterwarnings("ignore")  # Pillow comments on broken TIFFs
@pytest.mark.parametrize("kind", ["PNG", "GIF", "JPEG", "WEBP", "BMP", "TIFF"])
def test_no_damage_to_an_image_gets_past_as_anything_but_a_user_error(tmp_path, kind):
    """Pillow raises many kinds of exceptions for broken files; a user sees one line for all."""
    file, rng = tmp_path / "x", np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(file, kind)
    whole, refused = file.read_bytes(), 0
    for _ in range(60):
        broken = bytearray(whole)
        for place in rng.integers(0, len(broken), rng.integers(1, 30)):
            broken[place] = rng.integers(256)
        file.write_bytes(bytes(broken[: rng.integers(1, len(broken) + 1)]))
        try:
            assert data.load_image(file, 8).shape == (8, 8, 3)
        except UserError:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize("width, height", [(96, 32), (192, 64), (32, 96), (64, 192)])
def test_another_size_is_resized_by_its_short_side_and_center_cropped(tmp_path, width, height):
    """Three bands, red green blue: the middle one is what is left."""
    bands = np.repeat(np.eye(3, dtype=np.uint8) * 255, max(width, height) // 3, 0)  # (long, 3)
    along = bands[None] if width > height else bands[:, None]
    banded = np.ascontiguousarray(np.broadcast_to(along, (height, width, 3)))
    Image.fromarray(banded).save(tmp_path / "bands.png")
    image = data.load_image(tmp_path / "bands.png", 32)
    assert image.shape == (32, 32, 3) and image.dtype == np.uint8
    assert (image[4:-4, 4:-4] == (0, 255, 0)).all()


HALVINGS = [(100, 80, 1, (50, 40)), (257, 129, 2, (64, 32)), (63, 90, 0, (63, 90))]
HALVINGS += [(32, 64, 0, (32, 64)), (64, 64, 1, (32, 32))]


@pytest.mark.parametrize("width, height, halvings, halved", HALVINGS)
def test_a_large_image_is_halved_by_averages_before_the_bicubic_step(
    tmp_path, width, height, halvings, halved
):
    """As the official code does it, step by step, each step written out by hand: pixels of a fine
    pattern are not skipped."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.png")
    image = Image.fromarray(noise)
    for _ in range(halvings):
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    assert image.size == halved
    scale = 32 / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    resized = np.array(image.resize(size, Image.Resampling.BICUBIC))
    left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
    cropped = resized[top : top + 32, left : left + 32]
    assert np.array_equal(data.load_image(tmp_path / "x.png", 32), cropped)
    assert np.array_equal(data.load_image(tmp_path / "x.png", None), noise)


SIZES = [(1, 1), (33, 50), (50, 33), (31, 32), (1, 90), (640, 427)]


@pytest.mark.parametrize("width, height", SIZES)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1"])
def test_any_size_and_mode_becomes_a_square_rgb_image(tmp_path, width, height, mode):
    Image.new(mode, (width, height), 1).save(tmp_path / "x.png")
    assert data.load_image(tmp_path / "x.png", 32).shape == (32, 32, 3)


def test_an_unpaired_prompt_is_a_pair_with_itself_and_is_never_held_out(tmp_path):
    """The official recipe mixes such prompts in. They take the way of all pairs."""
    entries = [{"prompt1": "a cat", "prompt2": "a cat"}]
    entries += [{"prompt1": f"a {i}", "prompt2": f"b {i}"} for i in range(40)]
    (tmp_path / "pairs.json").write_text(json.dumps(entries))
    splits = data.read_splits(tmp_path / "pairs.json", IMAGE_SIZE)
    assert ("a cat", "a cat") in splits["train"].prompts
    assert not splits["train"].has_images().any() and not splits["train"].load([0]).any()
    assert len(splits["test"]) == 5


def test_pairs_with_and_without_images_load_in_one_call(folder):
    pairs = data.read_pairs(folder / "pairs.json", 32)
    mixed = PairSet(pairs.prompts[:1] + [("a", "a")], pairs.images[:1] + [None], ["", ""], 32)
    images = mixed.load([1, 0])
    assert not images[0].any()
    assert np.array_equal(images[1], pairs.load([0])[0])
    assert mixed.has_images()[:2].tolist() == [True, False]


# --- images for people


def test_a_grid_has_a_cell_an_image_and_labels_under_them():
    images = np.zeros((5, 32, 32, 3), np.uint8) + np.arange(5, dtype=np.uint8)[:, None, None, None]
    bare = data.image_grid(images, columns=2, scale=3)
    labeled = data.image_grid(images, ["label"] * 5, columns=2, scale=3)
    assert bare.width == labeled.width == 2 * (96 + 8) + 8
    assert bare.height == 3 * (96 + 8) + 8 < labeled.height
    for i in range(5):
        x, y = 8 + i % 2 * 104, 8 + i // 2 * 104
        assert bare.getpixel((x, y)) == bare.getpixel((x + 95, y + 95)) == (i, i, i)


# --- command line


def run_script(monkeypatch, module, *argv):
    """python MODULE.py ARGV, without the seconds that a new process takes."""
    script = Path(module.__file__)
    monkeypatch.setattr("sys.argv", [script.name, *map(str, argv)])
    runpy.run_path(str(script), run_name="__main__")


def test_pairworld_is_written_and_drawn_on_the_command_line(tmp_path, monkeypatch, capsys):
    """What README's first steps type: pairs as files in the FocusDiff-Data layout, and one pair of
    each category as an image."""
    write = ["--write", tmp_path / "pairs", "--n", 3, "--split", "test"]
    run_script(monkeypatch, world, *write, "--image", tmp_path / "world.png")
    pairs = data.read_pairs(tmp_path / "pairs" / "pairs.json", IMAGE_SIZE)
    expected = world.pairworld(3, "test", seed=0)
    assert pairs.prompts == expected.prompts
    assert np.array_equal(pairs.load(range(3)), expected.images)
    image = Image.open(tmp_path / "world.png")
    assert image.width > 3 * IMAGE_SIZE and image.height > 6 * IMAGE_SIZE
    assert "3 pairs" in capsys.readouterr().out


WRONG_FLAGS = [
    ([], "--write DIR or --image PNG"),
    (["--write", "x", "--n", "0"], "--n 0: should be 1 to"),
    (["--write", "x", "--split", "test", "--n", "1001"], "--n 1001: should be 1 to 1000"),
]


@pytest.mark.parametrize("argv, says", WRONG_FLAGS)
def test_wrong_flags_of_pairworld_are_named(argv, says, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run_script(monkeypatch, world, *argv)
    assert end.value.code == 2 and says in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit, match="^error: .*file") as end:
        run_script(monkeypatch, world, "--write", tmp_path / "file", "--n", 1)
    assert "\n" not in end.value.code


MOVED = [
    (["--write", "pairs", "--n", "600"], "pairworld.py --write DIR"),
    (["--picture", "docs/pairworld.png"], "--image PNG"),
    (["--build", "edits.json", "--judge", "URL", "--out", "x"], "python -m extras.build_pairs"),
]


@pytest.mark.parametrize("argv, says", MOVED)
def test_an_old_command_of_data_names_the_new_one(argv, says, tmp_path, monkeypatch):
    """Without this, python data.py --write DIR would end well and write nothing."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^error: ") as end:
        run_script(monkeypatch, data, *argv)
    assert says in end.value.code and "\n" not in end.value.code
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("n, held_out", [(80, (10, 5)), (24, (3, 1)), (0, (20, 10))])
def test_the_test_is_held_out_of_the_pairs_with_images(n, held_out):
    """A test pair without images has no oracle. And were the test as large as for all pairs, a few
    with images would all be held out, and none left to train on."""
    prompts = [(f"a {i}", f"b {i}") for i in range(160)]
    has_images = np.arange(160) >= 160 - n
    split = data.split_by_caption(prompts, has_images)
    assert (split.count("test"), split.count("validation")) == held_out
    assert n == 0 or set(split[:160 - n]) == {"train"}
