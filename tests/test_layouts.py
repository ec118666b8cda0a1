"""layouts.py, leaderboard.py and sample.py --layout: pictures where the official evaluators look for them, the published table."""
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
import layouts
import sample
from data import UserError
from leaderboard import COLUMNS, format_leaderboard, published
from model import ImageModel, ModelConfig
from pairworld import CATEGORIES
from tokenizer import VQConfig, VQModel, save_weights


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a tiny random model."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    vq = VQModel(VQConfig(ch=8, norm_groups=4, z_channels=8, codebook_size=32, codebook_dim=4))
    save_weights(folder / "tokenizer.safetensors", vq.state_dict(), config=asdict(vq.cfg))
    model = ImageModel(ModelConfig(n_layer=1, n_head=2, n_embd=16, n_ffn=32, image_vocab=32, code_dim=4))
    save_weights(folder / "ppo.safetensors", model.state_dict(), config=asdict(model.cfg))
    return folder


def state(folder):
    """{file: its content and when it was written}"""
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


GENEVAL = [{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
           {"tag": "counting", "include": [{"class": "cow", "count": 2}], "exclude": [{"class": "cow", "count": 3}], "prompt": "a photo of two cows"}]


def benchmark_files(folder):
    """A small file of each benchmark in the official form."""
    (folder / "evaluation_metadata.jsonl").write_text("".join(json.dumps(e) + "\n" for e in GENEVAL))
    (folder / "color_val.txt").write_text("a green bench and a blue bowl\tseen\na red car")
    (folder / "prompts").mkdir()
    for name, text in (("0", "eight cabbages\nin a field"), ("whoops31", "a moon"), ("COCOval2014000000183648", "a dög")):
        (folder / "prompts" / f"{name}.txt").write_text(text, encoding="utf-8")
    return {"geneval": folder / "evaluation_metadata.jsonl", "t2icompbench": folder / "color_val.txt", "dpg": folder / "prompts"}


@pytest.mark.parametrize("layout", list(layouts.LAYOUTS))
def test_a_benchmark_is_drawn_and_a_killed_run_goes_on(run, tmp_path, layout, capsys):
    out = tmp_path / "out"
    argv = ["--run", str(run), "--prompts", str(benchmark_files(tmp_path)[layout]), "--layout", layout, "--out", str(out), "--device", "cpu"]
    argv += ["--batch", "4"]
    argv += ["--n", "2"] if layout == "t2icompbench" else []
    sample.main(argv)
    whole = state(out)
    assert list(whole) == sorted({
        "geneval": [f"0000{i}/{name}" for i in range(2) for name in ("metadata.jsonl", *(f"samples/000{k}.png" for k in range(4)))],
        "t2icompbench": [f"samples/a green bench and a blue bowl_00000{k}.png" for k in (0, 1)] + [f"samples/a red car_00000{k}.png" for k in (2, 3)],
        "dpg": ["0.png", "COCOval2014000000183648.png", "whoops31.png"]}[layout])
    size = (64, 64) if layout == "dpg" else (32, 32)
    pictures = [name for name in whole if name.endswith(".png")]
    assert all(Image.open(out / name).size == size for name in pictures) and len({whole[name][0] for name in pictures}) == len(pictures)

    lost = pictures[-1]                             # what a killed run leaves: one picture not there, another half written beside its name
    (out / lost).unlink()
    (out / (lost + ".tmp")).write_bytes(whole[lost][0][:20])
    sample.main(argv)
    again = state(out)
    assert again.pop(lost)[0] == whole.pop(lost)[0]
    assert all(again[name] == whole[name] for name in pictures if name != lost)
    assert {n: content for n, (content, _) in again.items()} == {n: content for n, (content, _) in whole.items()}
    printed = capsys.readouterr().out
    assert f"1 files made, {len(pictures) - 1} were there" in printed and str(out) in printed.split("evaluate with:")[1]


def test_pictures_of_another_n_are_not_mixed_in(run, tmp_path):
    """T2I-CompBench numbers all pictures in a row, and its evaluators read every file there is."""
    argv = ["--run", str(run), "--prompts", str(benchmark_files(tmp_path)["t2icompbench"]), "--layout", "t2icompbench", "--out", str(tmp_path / "out"),
            "--device", "cpu"]
    sample.main([*argv, "--n", "2"])
    before = state(tmp_path / "out")
    with pytest.raises(UserError, match=r"not of these prompts and this --n: .*bowl_000001.png.*another --out"):
        sample.main([*argv, "--n", "1"])
    assert state(tmp_path / "out") == before


def test_geneval_is_found_as_its_evaluator_looks(run, tmp_path):
    """evaluate_images.py: digits for a folder, one JSON object in metadata.jsonl, digits and .png for a picture."""
    sample.main(["--run", str(run), "--prompts", str(benchmark_files(tmp_path)["geneval"]), "--layout", "geneval", "--out", str(tmp_path / "out"),
                 "--n", "1", "--device", "cpu"])
    folders = sorted(os.listdir(tmp_path / "out"))
    assert all(f.isdigit() for f in folders)
    assert [json.load(open(tmp_path / "out" / f / "metadata.jsonl")) for f in folders] == GENEVAL
    assert all(re.match(r"\d+\.png", name) for f in folders for name in os.listdir(tmp_path / "out" / f / "samples"))


def test_dpg_pictures_lie_in_the_order_in_which_the_evaluator_cuts():
    images = np.arange(4, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3)
    grid = Image.fromarray(layouts.as_grid(images))
    boxes = [(0, 0, 8, 8), (8, 0, 16, 8), (0, 8, 8, 16), (8, 8, 16, 16)]
    assert [np.unique(np.array(grid.crop(box))).tolist() for box in boxes] == [[0], [1], [2], [3]]
    assert np.array_equal(layouts.as_grid(images[2:3]), images[2])


def test_dpg_prompts_from_the_csv(tmp_path):
    with open(tmp_path / "dpg_bench.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerows([["item_id", "text", "proposition_id"], ["7", "a cat, and\na dog", 1], ["7", "a cat, and\na dog", 2], ["vrd29", "a tree", 1]])
    tasks = layouts.read_tasks(tmp_path / "dpg_bench.csv", "dpg", 4)
    assert [(t.prompt, t.files) for t in tasks] == [("a cat, and\na dog", ["7.png"]), ("a tree", ["vrd29.png"])]


@pytest.mark.parametrize("layout, content, n, says", [
    ("geneval", '{"prompt": "a", "tag": "x"}\n{"prompt"', 4, "line 2 is broken JSON"), ("geneval", '{"tag": "x"}', 4, "line 1 has no 'prompt'"),
    ("geneval", '["a"]', 4, "line 1 has no 'prompt'"), ("geneval", '{"prompt": "a"}', 4, "no 'tag'"), ("geneval", "", 4, "holds no prompt"),
    ("t2icompbench", "a cat\na_dog\nand/or\n", 2, "'a_dog'; 'and/or'"), ("t2icompbench", "x" * 231, 2, "longer than 230 bytes"),
    ("t2icompbench", "\n\n", 2, "holds no prompt"), ("dpg", "id,words\n1,a\n", 4, "item_id and text"), ("dpg", "item_id,text\na.b,cat\n", 4, "'a.b'"),
    ("dpg", "item_id,text\n1,a cat\n", 3, "--n 3"), ("dpg", "item_id,text\n", 4, "holds no prompt"),
])
def test_files_that_do_not_fit_the_layout(tmp_path, layout, content, n, says):
    (tmp_path / "file").write_text(content)
    with pytest.raises(UserError, match=re.escape(says)):
        layouts.read_tasks(tmp_path / "file", layout, n)
    with pytest.raises(UserError, match="nowhere"):
        layouts.read_tasks(tmp_path / "nowhere", layout, 4)


@pytest.mark.parametrize("argv, says", [
    ([], "give --prompt"), (["--prompts", "x"], "go together"), (["--layout", "dpg", "--out", "x"], "go together"),
    (["--prompts", "x", "--layout", "dpg"], "go together"),
    (["--prompts", "x", "--layout", "dpg", "--out", "x", "--prompt", "a"], "without --prompt"),
    (["--prompts", "x", "--layout", "dpg", "--out", "x", "--n", "0"], "positive"), (["--prompt", "a", "--n", "0"], "positive"),
])
def test_flags_of_sample_that_do_not_go_together(argv, says):
    with pytest.raises(UserError, match=says):
        sample.main(["--run", "nowhere", *argv])


# ---------------------------------------------------------------------------------------------------------------------
# The published table

def test_published_averages_follow_from_their_columns():
    """A check of what was read off the picture: a figure misread by one point moves its row's average by 0.17."""
    table = published()
    assert len(table) == 19 and list(COLUMNS) == [*CATEGORIES, "average"]
    for model, values in table.items():
        for k in (0, 1):
            assert abs(np.mean([values[c][k] for c in CATEGORIES]) - values["average"][k]) < 0.105, (model, k)
        assert all(s_g <= s_a for s_a, s_g in values.values()), model
    assert table["Janus-FocusDiff-7B"]["average"] == (85.0, 83.5) and table["Janus-Pro-7B"]["average"] == (75.5, 70.4)


def test_ones_own_row_stands_in_its_place():
    summary = {c: {"s_a": 0.82, "s_g": 0.805} for c in COLUMNS}
    lines = format_leaderboard(summary, "mine", 550).splitlines()
    names = [re.split(r"\s{2,}", line.strip().removeprefix("-> "))[0] for line in lines[2:22]]
    assert names[:4] == ["Janus-FocusDiff-7B", "SD3", "mine", "Sana-1.5"] and len(names) == 20 and names[-1] == "LLamaGen"
    assert lines[4].startswith("-> mine") and lines[4].split()[2:] == ["82.0", "80.5"] * 7
    assert len({len(line) for line in lines[:22]}) == 1 and lines[0].split() == ["Overall", "Appear.", *list(COLUMNS.values())[1:]]
    assert "2506.05501" in lines[-1] and "not comparable" not in lines[-1]


def test_a_slice_of_the_benchmark_is_called_not_comparable():
    summary = ev.summarize([[0.5] * 4], ["color"])
    text = format_leaderboard(summary, "slice", 1)
    assert "not comparable" in text and "overall" in text and re.search(r"-> slice +- +- +50.0  50.0", text)


# ---------------------------------------------------------------------------------------------------------------------
# Folders of any model's pictures

def paint(folder, names, size=(32, 32)):
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.new("RGB", size, (len(name), 0, 0)).save(folder / name)


def names(n_pairs):
    return [f"{p}_{i}_{k}.png" for p in range(n_pairs) for i in range(2) for k in range(2)]


def test_a_complete_folder_passes_whatever_else_lies_in_it(tmp_path):
    paint(tmp_path / "a", [*names(3), "grid.png", "0_0.png", "notes_0_0_0.png"])
    (tmp_path / "a" / "0_0_0.png.tmp").write_bytes(b"")
    (tmp_path / "a" / "README.txt").write_text("")
    ev.check_pictures(tmp_path / "a", 3)


@pytest.mark.parametrize("lacks, has, says", [
    (["1_0_1.png", "2_1_1.png"], [], ["2 of 12 pictures are missing: 1_0_1.png; 2_1_1.png"]),
    ([], ["3_0_0.png"], ["3_0_0.png is unexpected, the prompts have pairs 0..2"]), ([], ["0_2_0.png"], ["0_2_0.png is unexpected"]),
    ([], ["0_0_2.png"], ["0_0_2.png is unexpected"]), ([], ["00_0_0.png"], ["00_0_0.png and 0_0_0.png are the same"]),
    ([], ["1_1_1.jpg"], ["1_1_1.jpg and 1_1_1.png are the same"]), (["1_1_1.png"], ["1_1_1.jpg"], ["1_1_1.jpg should be 1_1_1.png"]),
    (["0_0_0.png"], ["7_0_0.png", "1_1_1.PNG"], ["1 of 12 pictures are missing: 0_0_0.png", "7_0_0.png is unexpected", "1_1_1.PNG and 1_1_1.png"]),
])
def test_a_folder_that_is_wrong_is_told_all_of_it(tmp_path, lacks, has, says):
    paint(tmp_path / "a", [name for name in names(3) + has if name not in lacks])
    with pytest.raises(UserError) as error:
        ev.check_pictures(tmp_path / "a", 3)
    assert all(words in str(error.value) for words in says) and "\n" not in str(error.value)


def test_no_folder_is_no_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        ev.check_pictures(tmp_path / "nowhere", 3)


def test_the_official_benchmark_wants_2200_pictures(tmp_path):
    official = Path(__file__).parents[2] / "shared" / "data" / "PairComp.json"
    if not official.is_file():
        pytest.skip(f"{official} is not here")
    paint(tmp_path / "a", names(10))
    pairs, _ = ev.read_benchmark(official)
    with pytest.raises(UserError, match=r"2160 of 2200 pictures are missing: 10_0_0.png"):
        ev.check_pictures(tmp_path / "a", len(pairs))


class Area:
    """A judge that takes any size: the score is how large the picture is."""
    names = ["area"]

    def score(self, images, prompts):
        assert len(images) == len(prompts)
        return torch.tensor([len(image) / 100 for image in images])


def test_pictures_of_several_sizes_are_scored_as_they_are(tmp_path, monkeypatch):
    """As other people's models draw them: each is scored at its own size, and the scores keep their places."""
    two = [{"category": list(ev.OFFICIAL_NAMES)[c], "caption1": f"{c} a", "caption2": f"{c} b"} for c in range(2)]
    (tmp_path / "p.json").write_text(json.dumps(two))
    for n, name in enumerate(names(2)):
        paint(tmp_path / "a", [name], (40, 10 + 10 * (n % 3)))
    monkeypatch.setattr(ev, "open_judge", lambda args: (Area(), None))
    ev.main(["--score", "--images", str(tmp_path / "a"), "--prompts", str(tmp_path / "p.json"), "--judge", "oracle",
             "--out", str(tmp_path / "s.json")])
    assert ev.read_scores(tmp_path / "s.json", 2).ravel() == pytest.approx([(10 + 10 * (n % 3)) / 100 for n in range(8)])
