"""extras/layouts.py and extras/leaderboard.py: images where the official evaluators look for them,
the published table, and folders of any model's images."""

import csv
import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval_paircomp as ev
from common import UserError, save_weights
from extras import layouts, paircomp_files
from extras.leaderboard import COLUMNS, format_leaderboard, published
from model import ImageModel, ModelConfig
from pairworld import CATEGORIES
from tokenizer import VQConfig, VQModel


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a tiny random model."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    vq = VQModel(VQConfig(ch=8, norm_groups=4, z_channels=8, codebook_size=32, codebook_dim=4))
    save_weights(folder / "tokenizer.safetensors", vq.state_dict(), config=asdict(vq.cfg))
    cfg = ModelConfig(n_layer=1, n_head=2, n_embd=16, n_ffn=32, image_vocab=32, code_dim=4)
    model = ImageModel(cfg)
    save_weights(folder / "ppo.safetensors", model.state_dict(), config=asdict(cfg))
    return folder


def state(folder):
    """{file: its content and when it was written}"""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


GENEVAL = [
    {
        "tag": "single_object",
        "include": [{"class": "bench", "count": 1}],
        "prompt": "a photo of a bench",
    },
    {
        "tag": "counting",
        "include": [{"class": "cow", "count": 2}],
        "exclude": [{"class": "cow", "count": 3}],
        "prompt": "a photo of two cows",
    },
]


def benchmark_files(folder):
    """A small file of each benchmark in the official form."""
    lines = "".join(json.dumps(entry) + "\n" for entry in GENEVAL)
    (folder / "evaluation_metadata.jsonl").write_text(lines)
    (folder / "color_val.txt").write_text("a green bench and a blue bowl\tseen\na red car")
    (folder / "prompts").mkdir()
    for name, text in (
        ("0", "eight cabbages\nin a field"),
        ("whoops31", "a moon"),
        ("COCOval2014000000183648", "a dög"),
    ):
        (folder / "prompts" / f"{name}.txt").write_text(text, encoding="utf-8")
    return {
        "geneval": folder / "evaluation_metadata.jsonl",
        "t2icompbench": folder / "color_val.txt",
        "dpg": folder / "prompts",
    }


def command(run, folder, layout, *more):
    """A command line for the small file of a benchmark; the images go to folder/out."""
    prompts = benchmark_files(folder)[layout]
    argv = ["--run", str(run), "--prompts", str(prompts), "--layout", layout]
    return [*argv, "--out", str(folder / "out"), "--device", "cpu", *more]


FILES = {
    "geneval": [f"0000{i}/metadata.jsonl" for i in range(2)]
    + [f"0000{i}/samples/000{k}.png" for i in range(2) for k in range(4)],
    "t2icompbench": [
        "samples/a green bench and a blue bowl_000000.png",
        "samples/a green bench and a blue bowl_000001.png",
        "samples/a red car_000002.png",
        "samples/a red car_000003.png",
    ],
    "dpg": ["0.png", "COCOval2014000000183648.png", "whoops31.png"],
}


@pytest.mark.parametrize("layout", list(layouts.LAYOUTS))
def test_a_benchmark_is_sampled_and_a_killed_run_goes_on(run, tmp_path, layout, capsys):
    out = tmp_path / "out"
    more = ["--n", "2"] if layout == "t2icompbench" else []
    argv = command(run, tmp_path, layout, "--batch", "4", *more)
    layouts.main(argv)
    whole = state(out)
    assert list(whole) == sorted(FILES[layout])
    size = (64, 64) if layout == "dpg" else (32, 32)
    images = [name for name in whole if name.endswith(".png")]
    assert all(Image.open(out / name).size == size for name in images)
    assert len({whole[name][0] for name in images}) == len(images)

    # What a killed run leaves: one image is not there, half of it is written beside its name.
    lost = images[-1]
    (out / lost).unlink()
    (out / (lost + ".tmp")).write_bytes(whole[lost][0][:20])
    layouts.main(argv)
    again = state(out)
    assert again.pop(lost)[0] == whole.pop(lost)[0]
    assert all(again[name] == whole[name] for name in images if name != lost)
    assert {k: content for k, (content, _) in again.items()} == {
        k: content for k, (content, _) in whole.items()
    }
    printed = capsys.readouterr().out
    assert f"1 files made, {len(images) - 1} were there" in printed
    assert str(out) in printed.split("evaluate with:")[1]


def test_images_of_another_n_are_not_mixed_in(run, tmp_path):
    """T2I-CompBench numbers all images in a row, and its evaluators read every file there is."""
    argv = command(run, tmp_path, "t2icompbench")
    layouts.main([*argv, "--n", "2"])
    before = state(tmp_path / "out")
    says = r"not of these prompts and this --n: .*bowl_000001.png.*another --out"
    with pytest.raises(UserError, match=says):
        layouts.main([*argv, "--n", "1"])
    assert state(tmp_path / "out") == before


def test_geneval_is_found_as_its_evaluator_looks(run, tmp_path):
    """evaluate_images.py: digits for a folder, one JSON object in metadata.jsonl, digits and .png
    for an image."""
    layouts.main(command(run, tmp_path, "geneval", "--n", "1"))
    folders = sorted(path for path in (tmp_path / "out").iterdir())
    assert all(folder.name.isdigit() for folder in folders)
    metadata = [json.loads((folder / "metadata.jsonl").read_text()) for folder in folders]
    assert metadata == GENEVAL
    for folder in folders:
        assert all(re.match(r"\d+\.png", name) for name in os.listdir(folder / "samples"))


def test_dpg_images_lie_in_the_order_in_which_the_evaluator_cuts():
    images = np.arange(4, dtype=np.uint8)[:, None, None, None]
    images = images.repeat(8, 1).repeat(8, 2).repeat(3, 3)
    grid = Image.fromarray(layouts.as_grid(images))
    boxes = [(0, 0, 8, 8), (8, 0, 16, 8), (0, 8, 8, 16), (8, 8, 16, 16)]
    values = [np.unique(np.array(grid.crop(box))).tolist() for box in boxes]
    assert values == [[0], [1], [2], [3]]
    assert np.array_equal(layouts.as_grid(images[2:3]), images[2])


def test_dpg_prompts_from_the_csv(tmp_path):
    rows = [
        ["item_id", "text", "proposition_id"],
        ["7", "a cat, and\na dog", 1],
        ["7", "a cat, and\na dog", 2],
        ["vrd29", "a tree", 1],
    ]
    with open(tmp_path / "dpg_bench.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    tasks = layouts.read_tasks(tmp_path / "dpg_bench.csv", "dpg", 4)
    found = [(task.prompt, task.files) for task in tasks]
    assert found == [("a cat, and\na dog", ["7.png"]), ("a tree", ["vrd29.png"])]


@pytest.mark.parametrize(
    "layout, content, n, says",
    [
        ("geneval", '{"prompt": "a", "tag": "x"}\n{"prompt"', 4, "line 2 is broken JSON"),
        ("geneval", '{"tag": "x"}', 4, "line 1 has no 'prompt'"),
        ("geneval", '["a"]', 4, "line 1 has no 'prompt'"),
        ("geneval", '{"prompt": "a"}', 4, "no 'tag'"),
        ("geneval", "", 4, "holds no prompt"),
        ("t2icompbench", "a cat\na_dog\nand/or\n", 2, "'a_dog'; 'and/or'"),
        ("t2icompbench", "x" * 231, 2, "longer than 230 bytes"),
        ("t2icompbench", "\n\n", 2, "holds no prompt"),
        ("dpg", "id,words\n1,a\n", 4, "item_id and text"),
        ("dpg", "item_id,text\na.b,cat\n", 4, "'a.b'"),
        ("dpg", "item_id,text\n1,a cat\n", 3, "--n 3"),
        ("dpg", "item_id,text\n", 4, "holds no prompt"),
    ],
)
def test_files_that_do_not_fit_the_layout(tmp_path, layout, content, n, says):
    (tmp_path / "file").write_text(content)
    with pytest.raises(UserError, match=re.escape(says)):
        layouts.read_tasks(tmp_path / "file", layout, n)
    with pytest.raises(UserError, match="nowhere"):
        layouts.read_tasks(tmp_path / "nowhere", layout, 4)


@pytest.mark.parametrize("flag", ["--n", "--batch", "--temperature"])
def test_a_number_that_should_be_positive(run, tmp_path, flag):
    with pytest.raises(UserError, match=f"{flag} 0.*: should be positive"):
        layouts.main(command(run, tmp_path, "geneval", flag, "0"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lacks", ["--run", "--prompts", "--layout", "--out"])
def test_a_command_line_that_lacks_something(run, tmp_path, lacks, capsys):
    argv = command(run, tmp_path, "geneval")
    i = argv.index(lacks)
    with pytest.raises(SystemExit):
        layouts.main(argv[:i] + argv[i + 2 :])
    assert f"the following arguments are required: {lacks}" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# The published table


def test_published_averages_follow_from_their_columns():
    """A check of what was read off the image: a figure misread by one point moves its row's average
    by 0.17."""
    table = published()
    assert len(table) == 19 and list(COLUMNS) == [*CATEGORIES, "average"]
    for model, values in table.items():
        for k in (0, 1):
            average = np.mean([values[c][k] for c in CATEGORIES])
            assert abs(average - values["average"][k]) < 0.105, (model, k)
        assert all(s_g <= s_a for s_a, s_g in values.values()), model
    assert table["Janus-FocusDiff-7B"]["average"] == (85.0, 83.5)
    assert table["Janus-Pro-7B"]["average"] == (75.5, 70.4)


def test_ones_own_row_stands_in_its_place():
    summary = {c: {"s_a": 0.82, "s_g": 0.805} for c in COLUMNS}
    lines = format_leaderboard(summary, "ours", 550).splitlines()
    names = [re.split(r"\s{2,}", line.strip().removeprefix("-> "))[0] for line in lines[2:22]]
    assert names[:4] == ["Janus-FocusDiff-7B", "SD3", "ours", "Sana-1.5"]
    assert len(names) == 20 and names[-1] == "LLamaGen"
    assert lines[4].startswith("-> ours") and lines[4].split()[2:] == ["82.0", "80.5"] * 7
    assert len({len(line) for line in lines[:22]}) == 1
    assert lines[0].split() == ["Overall", "Appear.", *list(COLUMNS.values())[1:]]
    assert "2506.05501" in lines[-1] and "not comparable" not in lines[-1]


def test_a_slice_of_the_benchmark_is_called_not_comparable():
    summary = ev.summarize([[0.5] * 4], ["color"])
    text = format_leaderboard(summary, "slice", 1)
    assert "not comparable" in text and "overall" in text
    assert re.search(r"-> slice +- +- +50.0  50.0", text)


# --------------------------------------------------------------------------------------------------
# Folders of any model's images


def paint(folder, names, size=(32, 32)):
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.new("RGB", size, (len(name), 0, 0)).save(folder / name)


def image_names(n_pairs):
    return [f"{p}_{i}_{k}.png" for p in range(n_pairs) for i in range(2) for k in range(2)]


def test_a_complete_folder_passes_whatever_else_lies_in_it(tmp_path):
    paint(tmp_path / "a", [*image_names(3), "grid.png", "0_0.png", "notes_0_0_0.png"])
    (tmp_path / "a" / "0_0_0.png.tmp").write_bytes(b"")
    (tmp_path / "a" / "README.txt").write_text("")
    assert paircomp_files.check_images(tmp_path / "a", 3) is None  # it raises nothing


@pytest.mark.parametrize(
    "lacks, has, says",
    [
        (["1_0_1.png", "2_1_1.png"], [], ["2 of 12 images are missing: 1_0_1.png; 2_1_1.png"]),
        ([], ["3_0_0.png"], ["3_0_0.png is unexpected, the prompts have pairs 0..2"]),
        ([], ["0_2_0.png"], ["0_2_0.png is unexpected"]),
        ([], ["0_0_2.png"], ["0_0_2.png is unexpected"]),
        ([], ["00_0_0.png"], ["00_0_0.png and 0_0_0.png are the same"]),
        ([], ["1_1_1.jpg"], ["1_1_1.jpg and 1_1_1.png are the same"]),
        (["1_1_1.png"], ["1_1_1.jpg"], ["1_1_1.jpg should be 1_1_1.png"]),
        (
            ["0_0_0.png"],
            ["7_0_0.png", "1_1_1.PNG"],
            [
                "1 of 12 images are missing: 0_0_0.png",
                "7_0_0.png is unexpected",
                "1_1_1.PNG and 1_1_1.png",
            ],
        ),
    ],
)
def test_a_folder_that_is_wrong_says_all_of_it(tmp_path, lacks, has, says):
    paint(tmp_path / "a", [name for name in image_names(3) + has if name not in lacks])
    with pytest.raises(UserError) as error:
        paircomp_files.check_images(tmp_path / "a", 3)
    assert all(words in str(error.value) for words in says) and "\n" not in str(error.value)


def test_no_folder_is_no_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        paircomp_files.check_images(tmp_path / "nowhere", 3)


def test_the_official_benchmark_wants_2200_images(tmp_path):
    official = Path(__file__).parents[2] / "shared" / "data" / "PairComp.json"
    if not official.is_file():
        pytest.skip(f"{official} is not here")
    paint(tmp_path / "a", image_names(10))
    pairs, _ = paircomp_files.read_benchmark(official)
    with pytest.raises(UserError, match=r"2160 of 2200 images are missing: 10_0_0.png"):
        paircomp_files.check_images(tmp_path / "a", len(pairs))


class Area:
    """A judge elsewhere, which takes any size: the score is how large the image is."""

    names = ["area"]

    def remember(self, path):
        """Nothing is worth keeping."""

    def score(self, images, prompts):
        assert len(images) == len(prompts)
        return torch.tensor([len(image) / 100 for image in images])


def test_images_of_several_sizes_are_scored_as_they_are(tmp_path, monkeypatch):
    """As other people's models make them: each is scored in its size, and scores keep their
    places."""
    pairs = []
    for c, category in enumerate(list(paircomp_files.OFFICIAL_NAMES)[:2]):
        pairs.append({"category": category, "caption1": f"{c} a", "caption2": f"{c} b"})
    (tmp_path / "p.json").write_text(json.dumps(pairs))
    for n, name in enumerate(image_names(2)):
        paint(tmp_path / "a", [name], (40, 10 + 10 * (n % 3)))
    monkeypatch.setattr(paircomp_files, "open_judge", lambda *args: Area())
    argv = ["score", "--images", str(tmp_path / "a"), "--prompts", str(tmp_path / "p.json")]
    ev.main([*argv, "--judge", "transformers:x", "--out", str(tmp_path / "s.json")])
    scores = paircomp_files.read_scores(tmp_path / "s.json", 2).ravel()
    assert scores == pytest.approx([(10 + 10 * (n % 3)) / 100 for n in range(8)])
