"""eval_paircomp.py: the official arithmetic, what is refused, and generate -> score -> summarize on
a tiny random model."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval_paircomp as ev
import extras.paircomp_files as files
import reward
from common import UserError, save_weights
from extras.own_images import nearest_images
from model import ImageModel, ModelConfig, load_policy
from pairworld import CATEGORIES, pairworld
from reward import Judge, JudgeConfig, OracleJudge
from sample import fill_sampling
from tokenizer import VQConfig, VQModel

SHARED = Path(__file__).parents[2] / "shared" / "data"
OFFICIAL = list(files.OFFICIAL_NAMES)
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"{SHARED} is not here: the official example cannot be compared"
)


def write(path, value):
    path.write_text(json.dumps(value))
    return str(path)


def entry(category, caption1, caption2):
    return {"category": category, "caption1": caption1, "caption2": caption2}


def score_of(pair, prompt, image, score):
    return {"pair_idx": pair, "prompt_idx": prompt, "image_idx": image, "score": score}


def official_scores(scores):
    """(P, 2, 2) -> the official layout."""
    entries = {}
    for p, rows in enumerate(np.asarray(scores).tolist()):
        entries[str(p)] = [score_of(p, i, k, rows[i][k]) for i in range(2) for k in range(2)]
    return entries


# ----------------------------------------------------------------------------------------------
# Arithmetic


@needs_shared
@pytest.mark.parametrize("words", [["summarize"], ["--summarize"]])
def test_the_official_example_to_the_last_digit(words, tmp_path, capsys):
    out, scores = tmp_path / "summary.json", SHARED / "paircomp_scores_example.json"
    ev.main([*words, str(scores), "--prompts", str(SHARED / "PairComp.json"), "--out", str(out)])
    expected = json.loads((SHARED / "paircomp_scores_example_expected.json").read_text())
    ours = json.loads(out.read_text())
    assert list(ours) == list(expected)
    for category, values in expected.items():
        for key, value in values.items():
            assert abs(ours[category][key] - value) <= 1e-12
    printed = capsys.readouterr().out
    assert "67.8" in printed and "63.6" in printed
    assert json.loads(printed[printed.index("{") :]) == ours


@needs_shared
def test_the_official_prompts():
    prompts, categories = files.read_benchmark(SHARED / "PairComp.json")
    assert len(prompts) == 550
    assert prompts[0][0] == "The firefighter's helmet appears new and unscratched."
    assert [categories.count(c) for c in CATEGORIES] == [250, 50, 50, 50, 100, 50]


def test_summarize_by_hand():
    # s_a: (.5 + .5 + 1 + 1)/4 = .75, .25, 1; s_g: (1/4)^(1/4) = .5^.5, .25, 1.
    # Two color pairs count as much as one text pair.
    scores, categories = [[0.5, 0.5, 1, 1], [0.25] * 4, [1] * 4], ["color", "color", "text"]
    s_g = (0.5**0.5 + 0.25) / 2
    report = ev.summarize(scores, categories)
    assert list(report) == ["color", "text", "average"]
    assert report["color"] == pytest.approx({"s_a": 0.5, "s_g": s_g}, abs=1e-15)
    assert report["text"] == {"s_a": 1, "s_g": 1}
    assert report["average"] == pytest.approx({"s_a": 0.75, "s_g": (s_g + 1) / 2}, abs=1e-15)
    assert ev.summarize(np.reshape(scores, (3, 2, 2)), categories) == report


def test_one_zero_makes_the_geometric_mean_zero():
    assert ev.summarize([[0, 1, 1, 1]], ["style"])["style"] == {"s_a": 0.75, "s_g": 0}


def test_categories_come_in_the_papers_order():
    reversed_categories = list(CATEGORIES)[::-1]
    assert list(ev.summarize(np.ones((6, 4)), reversed_categories)) == [*CATEGORIES, "average"]


def test_pair_accuracy_of_ground_truth_swapped_and_half():
    pairs = ev.pairworld(120, "test", seed=0)
    assert len(pairs) == 120 and all(pairs.categories.count(c) == 20 for c in CATEGORIES)
    own = np.stack([pairs.images, pairs.images], 2)  # (P, 2, K, H, W, 3)
    assert (ev.pair_accuracy(own, pairs.prompts) == 1).all()
    assert (ev.pair_accuracy(own[:, ::-1], pairs.prompts) == 0).all()
    half = own.copy()
    half[:, 1, 1] = half[:, 0, 1]  # the second image of prompt 2 shows prompt 1: 3 of 4 are right
    assert (ev.pair_accuracy(half, pairs.prompts) == 0).all()


def test_pair_accuracy_depends_only_on_the_difference():
    pairs = pairworld(60, "test", seed=5)
    others = pairworld(600, "test", seed=6)
    captions, flat = others.flat_prompts(), others.images.reshape(-1, 32, 32, 3)
    k = pairs.categories.index("text")
    images = []
    for prompt in pairs.prompts[k]:
        letter = prompt.rsplit(" ", 1)[1]
        i = next(i for i, caption in enumerate(captions) if caption.endswith("letter " + letter))
        images.append(flat[i])
    accuracy = ev.pair_accuracy(np.stack(images)[None, :, None], [pairs.prompts[k]])
    assert accuracy == [1.0]


def test_pair_accuracy_refuses_what_it_cannot_judge():
    images = np.zeros((1, 2, 1, 32, 32, 3), np.uint8)
    with pytest.raises(UserError, match="not a PairWorld caption"):
        ev.pair_accuracy(images, [("a dog", "a cat")])
    with pytest.raises(UserError, match="say the same"):
        ev.pair_accuracy(images, [("one red circle", "one red circle")])


class FirstValue:
    """Scores the brightness of an image's first value, so that the order of images and prompts
    shows."""

    def score(self, images, prompts):
        self.seen = list(zip(images[:, 0, 0, 0].tolist(), prompts))
        return torch.tensor([value / 255 for value, _ in self.seen])


def test_paircomp_keeps_images_with_their_prompts():
    pairs, judge = pairworld(2, "test", seed=1), FirstValue()
    values = np.arange(12, dtype=np.uint8).reshape(2, 2, 3, 1, 1, 1)
    images = np.zeros((2, 2, 3, 32, 32, 3), np.uint8) + values
    report = ev.paircomp(images, pairs, {"fixed": judge})
    expected = []
    for p, prompts in enumerate(pairs.prompts):
        expected += [(6 * p + 3 * i + k, prompts[i]) for i in range(2) for k in range(3)]
    assert judge.seen == expected
    assert list(report) == ["fixed", "pairs"]
    assert report["fixed"]["overall"]["s_a"] == pytest.approx(2.5 / 255)
    assert report["pairs"]["categories"] == pairs.categories
    # prompt by prompt, as in the files
    scores = np.arange(12).reshape(2, 6) / 255
    assert np.array(report["pairs"]["fixed"]) == pytest.approx(scores, rel=1e-3)


def test_paircomp_of_ground_truth():
    pairs = pairworld(2, "test", seed=1)
    judges = {"oracle": OracleJudge()}
    report = ev.paircomp(pairs.images[:, :, None], pairs, judges, ev.measure_pairworld(pairs))
    assert report["pair_accuracy"]["average"] == 1
    assert report["oracle"]["average"] == {"s_a": 1, "s_g": 1}
    right = {"oracle": [[1, 1]] * 2, "pair_accuracy": [1, 1], "categories": pairs.categories}
    assert report["pairs"] == right


def test_nearest_images_by_hand():
    """Own images have an oracle too: the images themselves."""
    own = np.zeros((2, 2, 4, 4, 3), np.uint8)
    own[0, 1], own[1, 0], own[1, 1] = 60, 120, 240
    other = np.full((1, 4, 4, 3), 20, np.uint8)                         # of another pair
    shown = np.stack([own, own], 2)                                     # (2, 2, K=2, 4, 4, 3)
    gallery = np.concatenate([own.reshape(4, 4, 4, 3), other])
    perfect = nearest_images(shown, own, gallery)
    assert {name: values.tolist() for name, values in perfect.items()} == {
        "exact": [1, 1], "choice": [1, 1], "pair_accuracy": [1, 1]}
    shown[0, 0, 0] = 25                 # nearer to its own than to its twin's, nearest to the other
    shown[1, 1, 1] = 130                # nearer to its twin's
    found = nearest_images(shown, own, gallery)
    assert {name: values.tolist() for name, values in found.items()} == {
        "exact": [0.75, 0.75], "choice": [1, 0.75], "pair_accuracy": [1, 0]}


def cells(table):
    return [line.split() for line in table.splitlines()]


def test_tables():
    categories = ["color", "text"]
    base = {
        "heldout": ev.summarize([[0.5] * 4, [0] * 4], categories),
        "pair_accuracy": {"color": 0.25, "text": 0.0, "average": 0.125},
    }
    ppo = {
        "heldout": ev.summarize([[0.75] * 4, [1] * 4], categories),
        "pair_accuracy": {"color": 0.5, "text": 1.0, "average": 0.75},
    }
    assert cells(files.format_report(base)) == [
        ["color", "text", "average"],
        ["heldout", "s_a", "50.0", "0.0", "25.0"],
        ["heldout", "s_g", "50.0", "0.0", "25.0"],
        ["pair", "accuracy", "25.0", "0.0", "12.5"],
    ]
    raw = {"pairs": {"heldout": [[0.5] * 4, [0] * 4]}}  # what was averaged: no line of the table
    rows = cells(ev.format_before_after(base | raw, ppo | raw))
    assert rows[1:4] == [
        ["heldout", "s_a", "base", "50.0", "0.0", "25.0"],
        ["heldout", "s_a", "ppo", "75.0", "100.0", "87.5"],
        ["heldout", "s_a", "gain", "+50.0%", "-", "+250.0%"],
    ]
    assert rows[-1] == ["pair", "accuracy", "gain", "+100.0%", "-", "+500.0%"]


# ----------------------------------------------------------------------------------------------
# Files that are wrong

BAD_PROMPTS = [
    ({}, "JSON list"),
    ([], "JSON list"),
    ([3], "pair 0 has no 'category'"),
    ([{"category": OFFICIAL[0], "caption1": "x"}], "pair 0 has no 'caption2'"),
    ([entry(OFFICIAL[0], "x", 3)], "pair 0 has no 'caption2'"),
    ([entry(["color"], "x", "y")], "pair 0 has no 'category'"),
    ([entry(OFFICIAL[0], "x", "y"), entry("Smell", "x", "y")], "pair 1 has category 'Smell'"),
]


@pytest.mark.parametrize("entries, says", BAD_PROMPTS)
def test_bad_prompts(tmp_path, entries, says):
    with pytest.raises(UserError, match=says):
        files.read_benchmark(write(tmp_path / "p.json", entries))


def change(pair, row, **values):
    return lambda entries: entries[pair][row].update(values)


SPOILERS = [
    (lambda e: e.pop("1"), ["pair 1: missing"]),
    (lambda e: e.update({"7": e["0"]}), ["unexpected pair '7'"]),
    (lambda e: e.update({"01": e["1"]}), ["unexpected pair '01'"]),
    (lambda e: e["2"].pop(), ["pair 2: 3 scores, should be 4", r"pair 2: \(1, 1\) is missing"]),
    (
        lambda e: e["2"].append(dict(e["2"][0])),
        ["pair 2: 5 scores", r"pair 2: \(0, 0\) is there twice"],
    ),
    (change("0", 3, image_idx=0), [r"\(1, 0\) is there twice", r"\(1, 1\) is missing"]),
    (change("0", 0, image_idx=2), [r"\(0, 2\)"]),
    (change("0", 0, prompt_idx="0"), [r"\('0', 0\)"]),
    (change("1", 2, pair_idx=2), ["pair 1: pair_idx is 2"]),
    (change("1", 2, pair_idx=True), ["pair 1: pair_idx is True"]),
    (change("1", 2, score=1.5), ["score of .1, 0. is 1.5"]),
    (change("1", 2, score=-0.01), ["is -0.01"]),
    (change("1", 2, score=float("nan")), ["is nan"]),
    (change("1", 2, score="0.5"), ["is '0.5'"]),
    (change("1", 2, score=None), ["is None"]),
    (lambda e: e.update({"0": {"score": 1}}), ["pair 0: not a list"]),
    (lambda e: e.update({"0": [1, 2, 3, 4]}), ["pair 0: not a list"]),
]


@pytest.mark.parametrize("spoil, says", SPOILERS)
def test_bad_scores(tmp_path, spoil, says):
    entries = official_scores(np.full((3, 2, 2), 0.5))
    spoil(entries)
    with pytest.raises(UserError) as error:
        files.read_scores(write(tmp_path / "s.json", entries), 3)
    for words in says:
        error.match(words)
    assert "\n" not in str(error.value)


def test_bad_scores_are_counted_not_all_listed(tmp_path):
    with pytest.raises(UserError, match=r"pair 0: missing.*and 95 more \(100 in all\)"):
        files.read_scores(write(tmp_path / "s.json", {}), 100)
    with pytest.raises(UserError, match="JSON object"):
        files.read_scores(write(tmp_path / "s.json", []), 1)


def test_scores_are_read_whatever_their_order(tmp_path):
    scores = np.random.default_rng(0).random((3, 2, 2))
    entries = {key: rows[::-1] for key, rows in reversed(official_scores(scores).items())}
    found = files.read_scores(write(tmp_path / "s.json", entries), 3)
    assert np.array_equal(found, scores.reshape(3, 4))


# ----------------------------------------------------------------------------------------------
# What can be typed wrong


def message_of(capsys, argv):
    """What a command that cannot be carried out says; it ends with a status other than 0."""
    with pytest.raises((SystemExit, UserError)) as end:
        ev.main(argv)
    if isinstance(end.value, UserError):
        assert "\n" not in str(end.value)
        return str(end.value)
    assert end.value.code == 2
    return capsys.readouterr().err


BAD_FLAGS = [
    ([], "choose generate, score, summarize, or --run DIR"),
    (["--policy", "ppo"], "COMMAND"),
    (["benchmark"], "the following arguments are required: --run"),
    (["summarise", "x.json"], "choose from 'benchmark', 'generate', 'score', 'summarize'"),
    (["--generate", "--score"], "--generate and --score: choose one"),
    (["--score", "--summarize", "x.json"], "--score and --summarize: choose one"),
    (["--summarize", "x.json"], "required: --prompts"),
    (["--generate", "--run", "x"], "required: --prompts, --images"),
    (
        ["--score", "--images", "x", "--prompts", "y", "--out", "z"],
        "score needs --judge URL or transformers:DIR, or --run",
    ),
    (["--run", "x", "--judge", "train"], "asks the run's own judges and the oracle anyway"),
    (
        ["--summarize", "x.json", "--prompts", "y", "--seed", "0"],
        "unrecognized arguments: --seed 0",
    ),
    (["--run", "x", "--n", "0"], "--n 0: should be positive"),
    (["--run", "x", "--batch", "0"], "--batch 0: should be positive"),
    (["--run", "x", "--seed", "-1"], "--seed -1: should be 0 or more"),
    (["--run", "x", "--temperature", "0"], "--temperature 0.0: should be positive"),
    (["--run", "x", "--n", "many"], "invalid int"),
    (["--run", "x", "--policy", "best"], "invalid choice"),
    (["--run", "x", "--sed", "1"], "unrecognized arguments: --sed"),
    (["--run", "x", "--pol", "pretrain"], "unrecognized arguments: --pol"),
]


@pytest.mark.parametrize("argv, says", BAD_FLAGS)
def test_bad_flags(capsys, argv, says):
    assert says in message_of(capsys, argv)


IMPORT = "python -m extras.janus --import"
OLD_COMMANDS = [
    (["--generate", "--janus", "x", "--prompts", "y", "--images", "z"], IMPORT),
    (["generate", "--janus", "x", "--prompts", "y", "--images", "z"], IMPORT),
    (["--generate", "--janus=x", "--prompts", "y", "--images", "z"], IMPORT),
    (["--compare", "a", "b", "--baseline", "c"], "python -m extras.ablation --compare"),
    (["--compare=a", "--baseline", "c"], "python -m extras.ablation --compare"),
]


@pytest.mark.parametrize("argv, says", OLD_COMMANDS)
def test_a_command_that_moved_names_the_new_one_in_one_line(argv, says):
    with pytest.raises(UserError, match=says) as error:
        ev.main(argv)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------
# A run folder with a tiny random model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    cfg = VQConfig(ch=8, norm_groups=4, z_channels=8, codebook_size=32, codebook_dim=4)
    vq = VQModel(cfg)
    save_weights(folder / "tokenizer.safetensors", vq.state_dict(), config=asdict(cfg))
    small = dict(n_layer=1, n_head=2, n_embd=16, n_ffn=32, image_vocab=32, code_dim=4)
    for policy in ("pretrain", "ppo"):
        model = ImageModel(ModelConfig(**small))
        save_weights(
            folder / f"{policy}.safetensors", model.state_dict(), config=asdict(model.cfg)
        )
    judges = {
        "train": Judge(JudgeConfig(width=16, n_layer=1, n_head=2)),
        "heldout": Judge(JudgeConfig(kind="convolve", width=16, n_head=2)),
    }
    reward.save_judges(folder / "reward.safetensors", judges)
    return folder


@pytest.fixture
def prompts(tmp_path):
    """Three pairs in PairComp's layout, the last of unknown words."""
    pairs = [*pairworld(2, "test", seed=2).prompts, ("a dög", "two dögs")]
    entries = [entry(category, *captions) for category, captions in zip(OFFICIAL, pairs)]
    return write(tmp_path / "prompts.json", entries)


def generate_command(run, prompts, images, word="generate"):
    command = [word, "--run", run, "--prompts", prompts, "--images", images, "--device", "cpu"]
    return [str(part) for part in command]


def score_command(run, prompts, images, out, word="score"):
    command = [word, "--images", images, "--prompts", prompts, "--run", run, "--out", out]
    return [str(part) for part in [*command, "--device", "cpu"]]


def places(n_pairs):
    return [(p, i, k) for p in range(n_pairs) for i in range(2) for k in range(2)]


def png(folder, place):
    return folder / ("_".join(map(str, place)) + ".png")


def files_of(folder):
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}


@pytest.mark.parametrize("old", [False, True], ids=["subcommands", "switches"])
def test_generate_score_summarize(run, prompts, tmp_path, capsys, old):
    words = ["--generate", "--score", "--summarize"] if old else ["generate", "score", "summarize"]
    images, scores, out = tmp_path / "images", tmp_path / "scores.json", tmp_path / "summary.json"
    generate = generate_command(run, prompts, images, words[0])
    ev.main(generate)
    before = files_of(images)
    assert set(before) == {png(images, place).name for place in places(3)}
    assert len({content for content, _ in before.values()}) == 12
    assert Image.open(images / "0_0_0.png").size == (32, 32)

    (images / "1_1_0.png").unlink()  # what a killed run had not written yet
    ev.main([*generate, "--batch", "3"])  # less memory; the images are the same
    after = files_of(images)
    assert after.pop("1_1_0.png")[0] == before.pop("1_1_0.png")[0] and after == before
    assert "1 images made, 11 were there" in capsys.readouterr().out

    ev.main(score_command(run, prompts, images, scores, words[1]))
    entries = json.loads(scores.read_text())
    assert list(entries) == ["0", "1", "2"]
    assert set(entries["0"][0]) == {"pair_idx", "prompt_idx", "image_idx", "score"}
    captions = json.loads(Path(prompts).read_text())
    pixels = np.stack([np.array(Image.open(png(images, place))) for place in places(3)])
    asked = [captions[p][f"caption{i + 1}"] for p, i, _ in places(3)]
    answers = reward.load_judges(run, "cpu")["heldout"].score(pixels, asked)
    ours = [entries[str(p)][2 * i + k]["score"] for p, i, k in places(3)]
    assert ours == pytest.approx(answers.tolist(), abs=1e-6) and len(set(ours)) == 12

    ev.main([words[2], str(scores), "--prompts", prompts, "--out", str(out)])
    rows = [[row["score"] for row in rows] for rows in entries.values()]
    assert json.loads(out.read_text()) == ev.summarize(rows, list(CATEGORIES)[:3])


def test_images_of_two_policies_do_not_come_into_one_folder(run, prompts, tmp_path):
    """What is there is skipped. With another policy, guidance or prompts the folder once became a
    mixture, with a score like any other."""
    generate = generate_command(run, prompts, tmp_path / "images")
    ev.main(generate)
    others = write(tmp_path / "others.json", [entry(OFFICIAL[0], "a", "b")])
    refused = [
        (["--policy", "pretrain"], "other weights; choose"),
        (["--guidance", "2", "--seed", "1"], "guidance 1.0 -> 2.0; seed 0 -> 1"),
        (
            ["--prompts", others],
            "other prompts; choose another folder, or remove it and images.settings.json",
        ),
    ]
    for changes, says in refused:
        with pytest.raises(UserError, match=says):
            ev.main([*generate, *changes])
    (tmp_path / "theirs").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "theirs" / "0_0_0.png")
    with pytest.raises(UserError, match="holds images that were not made here"):
        ev.main([*generate, "--images", str(tmp_path / "theirs")])


def test_guidance_and_temperature_are_those_of_the_table(run, tmp_path):
    """A Janus policy sampled without guidance draws badly, and --guidance 5 had to be typed each
    time. A policy trained and tested at tau 0.6 was sampled at 1, and its table not reproduced."""
    model = load_policy(run, "ppo", "cpu")[1]

    def filled(policy="ppo", guidance=None, temperature=None):
        args = argparse.Namespace(run=str(tmp_path), policy=policy, guidance=guidance,
                                  temperature=temperature)
        fill_sampling(args, model)
        return args.guidance, args.temperature
    assert filled() == (1.0, 1.0)
    model.text = argparse.Namespace(empty=None)  # as Janus' text has it
    assert filled() == filled("pretrain") == (5.0, 1.0)
    write(tmp_path / "paircomp.json", {"base_setting": [7.5, 0.4], "ppo_setting": [5.0, 0.6]})
    assert filled() == (5.0, 0.6)
    assert filled("pretrain") == (7.5, 0.4)
    assert filled("pretrain", 2.0, 0.4) == filled("ppo", 2.0, 0.4) == (2.0, 0.4)


def test_an_image_without_a_score_is_named_and_the_others_are_kept(prompts, tmp_path, monkeypatch):
    """A score that nobody gave is never made up, and the rest need not be asked about again."""
    class Judge:
        names = ["a judge"]

        def remember(self, path):
            path.write_text("answers")

        def score(self, images, prompts):
            return torch.tensor([0.5] * (len(prompts) - 1) + [float("nan")])
    out = tmp_path / "scores.json"
    n_pairs = len(json.loads(Path(prompts).read_text()))
    (tmp_path / "images").mkdir()
    for place in np.ndindex(n_pairs, 2, 2):
        Image.new("RGB", (8, 8)).save(files.image_path(tmp_path / "images", *place))
    monkeypatch.setattr(files, "open_judges", lambda *args: Judge())
    command = ["score", "--images", str(tmp_path / "images"), "--prompts", str(prompts), "--judge",
               "http://h:1/v1", "--out", str(out)]
    with pytest.raises(UserError, match=f"neither yes nor no to {n_pairs - 1}_1_1.png; the other"):
        ev.main(command)
    assert not out.exists() and Path(f"{out}.answers").exists()


def test_score_wants_every_image(run, prompts, tmp_path):
    score = score_command(run, prompts, tmp_path, tmp_path / "s")
    score += ["--judge", "train"]
    with pytest.raises(UserError, match=r"12 of 12 images are missing: 0_0_0.png.*and 7 more"):
        ev.main(score)
    for place in places(3):
        Image.new("RGB", (32, 32)).save(png(tmp_path, place))
    (tmp_path / "2_1_1.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match="2_1_1.png"):
        ev.main(score)
    assert not (tmp_path / "s").exists()


WRONG_FILES = [
    ("3_0_0.png", "3_0_0.png is unexpected"),
    ("0_0_0.jpg", "0_0_0.jpg and 0_0_0.png are the same image's"),
    ("00_1_0.png", "0_1_0.png"),
]


@pytest.mark.parametrize("name, says", WRONG_FILES)
def test_a_folder_with_an_image_too_many_is_refused(tmp_path, name, says):
    """Anybody's folder comes here, and the wrong file beside the right prompt would look like a
    result."""
    for place in places(3):
        Image.new("RGB", (32, 32)).save(png(tmp_path, place))
    (tmp_path / "notes.txt").write_text("other files do no harm")
    files.check_images(tmp_path, 3)
    Image.new("RGB", (32, 32)).save(tmp_path / name)
    with pytest.raises(UserError, match=says):
        files.check_images(tmp_path, 3)


def test_the_oracle_scores_without_a_run(tmp_path):
    pairs = pairworld(6, "test", seed=4)
    entries = [entry(category, *captions) for category, captions in zip(OFFICIAL, pairs.prompts)]
    prompts, out = write(tmp_path / "p.json", entries), tmp_path / "s.json"
    for p, i, k in places(6):
        Image.fromarray(pairs.images[p, i if k == 0 else 0]).save(png(tmp_path, (p, i, k)))
    score = ["score", "--images", str(tmp_path), "--prompts", prompts, "--judge", "oracle"]
    ev.main([*score, "--out", str(out)])
    assert files.read_scores(out, 6).tolist() == [[1, 1, 1, 0]] * 6


def test_a_prompt_that_is_too_long_stops_before_the_first_image(run, tmp_path):
    prompts = write(tmp_path / "p.json", [entry(OFFICIAL[0], "short", "long " * 40)])
    with pytest.raises(UserError, match="longer than the context of 160"):
        ev.main(generate_command(run, prompts, tmp_path / "images"))
    assert files_of(tmp_path / "images") == {}


def test_an_image_depends_on_the_seed_and_its_place_alone(run):
    """Whatever the batch and whatever is left out. Draws once followed from the batch: who took a
    smaller one, to fit a GPU's memory, got other images."""
    vq, model = load_policy(run, "ppo", "cpu")
    prompts = ["one red circle", "two red circles on a plain background", "three hearts", "ä"]
    how, done = dict(guidance=2.0, temperature=0.9), []
    images = ev.generate_images(model, vq, prompts, 3, seed=7, batch=6, progress=done.append, **how)
    assert images.shape == (4, 3, 32, 32, 3) and images.dtype == np.uint8 and done == [2, 2]
    torch.manual_seed(123)  # the global generator has no say
    for batch in (1, 9, 64):
        again = ev.generate_images(model, vq, prompts, 3, seed=7, batch=batch, **how)
        assert np.array_equal(again, images)
    wanted = lambda indices: 3 in indices
    chunks = ev.image_chunks(model, vq, prompts, 3, seed=7, batch=6, wanted=wanted, **how)
    ((indices, last),) = chunks
    assert list(indices) == [2, 3] and np.array_equal(last, images[2:])
    other_seed = ev.generate_images(model, vq, prompts, 3, seed=8, batch=6, **how)
    assert not np.array_equal(other_seed, images)
    assert not np.array_equal(images[0, 0], images[0, 1])


@pytest.mark.parametrize("words", [[], ["benchmark"]], ids=["run", "benchmark"])
def test_the_pairworld_benchmark(run, capsys, words):
    for policy in ("ppo", "pretrain"):
        command = [*words, "--run", str(run), "--policy", policy, "--n", "1", "--device", "cpu"]
        ev.main(command)
        report = json.loads((run / f"paircomp_{policy}.json").read_text())
        assert list(report) == ["train", "heldout", "oracle", "pairs", "pair_accuracy"]
        for name in ("train", "heldout", "oracle", "pair_accuracy"):
            assert list(report[name]) == [*CATEGORIES, "average"]
        assert report["pairs"]["categories"] == list(CATEGORIES)
        assert np.shape(report["pairs"]["heldout"]) == (6, 4)
        assert files.format_report(report) in capsys.readouterr().out


def test_the_run_may_stand_anywhere_on_the_line(tmp_path):
    for argv in (["--policy", "pretrain", "--run", str(tmp_path)], [f"--run={tmp_path}"]):
        with pytest.raises(UserError, match="tokenizer.safetensors: no such checkpoint"):
            ev.main(argv)


def test_a_run_without_judges_of_its_own_asks_for_one(run, tmp_path):
    """A run with --judge URL has no reward.safetensors; the benchmark must not invent a judge."""
    for name in ("tokenizer", "ppo"):
        weights = (run / f"{name}.safetensors").read_bytes()
        (tmp_path / f"{name}.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="has no judges of its own.*--judge URL"):
        ev.main(["--run", str(tmp_path), "--n", "1", "--device", "cpu"])


def test_a_run_that_lacks_or_mixes_checkpoints(run, tmp_path):
    with pytest.raises(UserError, match="tokenizer.safetensors: no such checkpoint"):
        load_policy(tmp_path, "ppo", "cpu")
    (tmp_path / "ppo.safetensors").write_bytes((run / "ppo.safetensors").read_bytes())
    other = VQModel(VQConfig(ch=8, norm_groups=4, z_channels=8, codebook_size=16, codebook_dim=4))
    save_weights(tmp_path / "tokenizer.safetensors", other.state_dict(), config=asdict(other.cfg))
    with pytest.raises(UserError, match="knows 32 codes and 64 tokens.*16 and 64"):
        load_policy(tmp_path, "ppo", "cpu")
