"""eval_paircomp.py: the official arithmetic, what is refused, and generate -> score -> summarize on a tiny random model."""
import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval_paircomp as ev
import runs
from data import UserError
from model import ImageModel, ModelConfig
from pairworld import CATEGORIES, pairworld
from reward import Judge, JudgeConfig, OracleJudge
from tokenizer import VQConfig, VQModel, save_weights

SHARED = Path(__file__).parents[2] / "shared" / "data"
OFFICIAL = list(ev.OFFICIAL_NAMES)
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not here: the official example cannot be compared")


def write(path, value):
    path.write_text(json.dumps(value))
    return str(path)


def official_scores(scores):
    """(P, 2, 2) -> the official layout."""
    return {str(p): [{"pair_idx": p, "prompt_idx": i, "image_idx": k, "score": float(scores[p][i][k])}
                     for i in range(2) for k in range(2)] for p in range(len(scores))}


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic

@needs_shared
def test_the_official_example_to_the_last_digit(tmp_path, capsys):
    out = tmp_path / "summary.json"
    ev.main(["--summarize", str(SHARED / "paircomp_scores_example.json"), "--prompts", str(SHARED / "PairComp.json"),
             "--out", str(out)])
    expected = json.loads((SHARED / "paircomp_scores_example_expected.json").read_text())
    ours = json.loads(out.read_text())
    assert list(ours) == list(expected)
    for category, values in expected.items():
        for key, value in values.items():
            assert abs(ours[category][key] - value) <= 1e-12
    printed = capsys.readouterr().out
    assert "67.8" in printed and "63.6" in printed and json.loads(printed[printed.index("{"):]) == ours


@needs_shared
def test_the_official_prompts():
    prompts, categories = ev.read_benchmark(SHARED / "PairComp.json")
    assert len(prompts) == 550 and prompts[0][0] == "The firefighter's helmet appears new and unscratched."
    assert [categories.count(c) for c in CATEGORIES] == [250, 50, 50, 50, 100, 50]


def test_summarize_by_hand():
    # s_a: (.5 + .5 + 1 + 1)/4 = .75, .25, 1; s_g: (1/4)^(1/4) = .5^.5, .25, 1. Two colour pairs count as much as one text pair.
    scores = [[0.5, 0.5, 1, 1], [0.25] * 4, [1] * 4]
    report = ev.summarize(scores, ["color", "color", "text"])
    assert list(report) == ["color", "text", "average"]
    assert report["color"] == pytest.approx({"s_a": 0.5, "s_g": (0.5 ** 0.5 + 0.25) / 2}, abs=1e-15)
    assert report["text"] == {"s_a": 1, "s_g": 1}
    assert report["average"] == pytest.approx({"s_a": 0.75, "s_g": ((0.5 ** 0.5 + 0.25) / 2 + 1) / 2}, abs=1e-15)
    assert ev.summarize(np.reshape(scores, (3, 2, 2)), ["color", "color", "text"]) == report


def test_one_zero_makes_the_geometric_mean_zero():
    assert ev.summarize([[0, 1, 1, 1]], ["style"])["style"] == {"s_a": 0.75, "s_g": 0}


def test_categories_come_in_the_papers_order():
    assert list(ev.summarize(np.ones((6, 4)), list(CATEGORIES)[::-1])) == [*CATEGORIES, "average"]


def test_pair_accuracy_of_ground_truth_swapped_and_half():
    pairs = ev.benchmark_pairs(20)
    assert len(pairs) == 120 and all(pairs.categories.count(c) == 20 for c in CATEGORIES)
    own = np.stack([pairs.images, pairs.images], 2)                                                     # (P, 2, K, H, W, 3)
    assert (ev.pair_accuracy(own, pairs.prompts) == 1).all()
    assert (ev.pair_accuracy(own[:, ::-1], pairs.prompts) == 0).all()
    half = own.copy()
    half[:, 1, 1] = half[:, 0, 1]                 # the second picture of prompt 2 shows prompt 1: three of four are not enough
    assert (ev.pair_accuracy(half, pairs.prompts) == 0).all()


def test_pair_accuracy_looks_only_at_the_difference():
    pairs = pairworld(60, "test", seed=5)
    others = pairworld(600, "test", seed=6)
    k = next(i for i, c in enumerate(pairs.categories) if c == "text")
    letters = [t.rsplit(" ", 1)[1] for t in pairs.prompts[k]]
    images = [next(others.images[i][s] for i, two in enumerate(others.prompts) for s in (0, 1)
                   if two[s].endswith("letter " + letter)) for letter in letters]
    assert ev.pair_accuracy(np.stack(images)[None, :, None], [pairs.prompts[k]]) == [1.0]


def test_pair_accuracy_refuses_what_it_cannot_judge():
    images = np.zeros((1, 2, 1, 32, 32, 3), np.uint8)
    with pytest.raises(UserError, match="not a PairWorld caption"):
        ev.pair_accuracy(images, [("a dog", "a cat")])
    with pytest.raises(UserError, match="say the same"):
        ev.pair_accuracy(images, [("one red circle", "one red circle")])


class Fixed:
    """Scores the brightness of a picture's first value, so that the order of pictures and prompts shows."""

    def score(self, images, prompts):
        self.seen = list(zip(images[:, 0, 0, 0].tolist(), prompts))
        return torch.tensor([i / 255 for i, _ in self.seen])


def test_paircomp_keeps_pictures_with_their_prompts():
    pairs, judge = pairworld(2, "test", seed=1), Fixed()
    images = np.zeros((2, 2, 3, 32, 32, 3), np.uint8) + np.arange(12, dtype=np.uint8).reshape(2, 2, 3, 1, 1, 1)
    report = ev.paircomp(images, pairs, {"fixed": judge})
    assert judge.seen == [(6 * p + 3 * i + k, pairs.prompts[p][i]) for p in range(2) for i in range(2) for k in range(3)]
    assert list(report) == ["fixed", "pairs"] and report["fixed"]["overall"]["s_a"] == pytest.approx(2.5 / 255)
    assert report["pairs"]["categories"] == pairs.categories
    assert np.array(report["pairs"]["fixed"]) == pytest.approx(np.arange(12).reshape(2, 6) / 255, rel=1e-3)      # prompt by prompt, as in the files
    truth = ev.paircomp(pairs.images[:, :, None], pairs, {"oracle": OracleJudge()}, pairworld=True)
    assert truth["pair_accuracy"]["average"] == 1 and truth["oracle"]["average"] == {"s_a": 1, "s_g": 1}
    assert truth["pairs"] == {"oracle": [[1, 1]] * 2, "pair_accuracy": [1, 1], "categories": pairs.categories}


def test_divergence_auc():
    mask = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]], bool)
    d = np.array([[4, 3, 2, 1], [1, 2, 3, 4], [5, 5, 5, 5], [1, 2, 3, 4]])
    assert ev.divergence_auc(d, mask)[:3].tolist() == [1, 0, 0.5] and np.isnan(ev.divergence_auc(d, mask)[3])


def test_tables():
    base = {"heldout": ev.summarize([[0.5] * 4, [0] * 4], ["color", "text"]),
            "pair_accuracy": {"color": 0.25, "text": 0.0, "average": 0.125}}
    ppo = {"heldout": ev.summarize([[0.75] * 4, [1] * 4], ["color", "text"]),
           "pair_accuracy": {"color": 0.5, "text": 1.0, "average": 0.75}}
    rows = [line.split() for line in ev.format_report(base).splitlines()]
    assert rows == [["color", "text", "average"], ["heldout", "s_a", "50.0", "0.0", "25.0"],
                    ["heldout", "s_g", "50.0", "0.0", "25.0"], ["pair", "accuracy", "25.0", "0.0", "12.5"]]
    text = ev.format_before_after(base | {"divergence_auc": {"average": 0.5}}, ppo | {"divergence_auc": {"average": 0.5}})
    rows = [line.split() for line in text.splitlines()]
    assert rows[1:4] == [["heldout", "s_a", "base", "50.0", "0.0", "25.0"], ["heldout", "s_a", "ppo", "75.0", "100.0", "87.5"],
                         ["heldout", "s_a", "gain", "+50.0%", "-", "+250.0%"]]
    assert rows[-1] == ["pair", "accuracy", "gain", "+100.0%", "-", "+500.0%"]


# ---------------------------------------------------------------------------------------------------------------------
# Files that are wrong

@pytest.mark.parametrize("entries, says", [
    ({}, "JSON list"), ([], "JSON list"), ([3], "pair 0 has no 'category'"),
    ([{"category": OFFICIAL[0], "caption1": "x"}], "pair 0 has no 'caption2'"),
    ([{"category": OFFICIAL[0], "caption1": "x", "caption2": 3}], "pair 0 has no 'caption2'"),
    ([{"category": ["color"], "caption1": "x", "caption2": "y"}], "pair 0 has no 'category'"),
    ([{"category": OFFICIAL[0], "caption1": "x", "caption2": "y"}, {"category": "Smell", "caption1": "x", "caption2": "y"}],
     "pair 1 has category 'Smell'"),
])
def test_bad_prompts(tmp_path, entries, says):
    with pytest.raises(UserError, match=says):
        ev.read_benchmark(write(tmp_path / "p.json", entries))


def change(pair, row, **values):
    def apply(entries):
        entries[pair][row].update(values)
    return apply


@pytest.mark.parametrize("spoil, says", [
    (lambda e: e.pop("1"), ["pair 1: missing"]),
    (lambda e: e.update({"7": e["0"]}), ["unexpected pair '7'"]),
    (lambda e: e.update({"01": e["1"]}), ["unexpected pair '01'"]),
    (lambda e: e["2"].pop(), ["pair 2: 3 scores, should be 4", r"pair 2: \(1, 1\) is missing"]),
    (lambda e: e["2"].append(dict(e["2"][0])), ["pair 2: 5 scores", r"pair 2: \(0, 0\) is there twice"]),
    (change("0", 3, image_idx=0), [r"\(1, 0\) is there twice", r"\(1, 1\) is missing"]),
    (change("0", 0, image_idx=2), [r"\(0, 2\)"]), (change("0", 0, prompt_idx="0"), [r"\('0', 0\)"]),
    (change("1", 2, pair_idx=2), ["pair 1: pair_idx is 2"]), (change("1", 2, pair_idx=True), ["pair 1: pair_idx is True"]),
    (change("1", 2, score=1.5), ["score of .1, 0. is 1.5"]), (change("1", 2, score=-0.01), ["is -0.01"]),
    (change("1", 2, score=float("nan")), ["is nan"]), (change("1", 2, score="0.5"), ["is '0.5'"]),
    (change("1", 2, score=None), ["is None"]),
    (lambda e: e.update({"0": {"score": 1}}), ["pair 0: not a list"]),
    (lambda e: e.update({"0": [1, 2, 3, 4]}), ["pair 0: not a list"]),
])
def test_bad_scores(tmp_path, spoil, says):
    entries = official_scores(np.full((3, 2, 2), 0.5))
    spoil(entries)
    with pytest.raises(UserError) as error:
        ev.read_scores(write(tmp_path / "s.json", entries), 3)
    for words in says:
        error.match(words)
    assert "\n" not in str(error.value)


def test_bad_scores_are_counted_not_all_listed(tmp_path):
    with pytest.raises(UserError, match=r"pair 0: missing.*and 95 more \(100 in all\)"):
        ev.read_scores(write(tmp_path / "s.json", {}), 100)
    with pytest.raises(UserError, match="JSON object"):
        ev.read_scores(write(tmp_path / "s.json", []), 1)


def test_scores_are_read_whatever_their_order(tmp_path):
    scores = np.random.default_rng(0).random((3, 2, 2))
    entries = {k: v[::-1] for k, v in reversed(official_scores(scores).items())}
    assert np.array_equal(ev.read_scores(write(tmp_path / "s.json", entries), 3), scores.reshape(3, 4))


@pytest.mark.parametrize("argv, says", [
    ([], "nothing was chosen"), (["--policy", "ppo"], "nothing was chosen"),
    (["--generate", "--score"], "--generate and --score was chosen"),
    (["--score", "--summarize", "x.json"], "choose one of"),
    (["--summarize", "x.json"], "--summarize needs --prompts"), (["--generate", "--run", "x"], "needs --prompts and --images"),
    (["--score", "--images", "x", "--prompts", "y", "--out", "z"], "--score needs --judge URL or transformers:DIR, or --run"),
    (["--run", "x", "--judge", "train"], "asks the run's own judges and the oracle anyway"),
    (["--summarize", "x.json", "--prompts", "y", "--seed", "0"], "no use for --seed"),
    (["--run", "x", "--n", "0"], "--n 0"), (["--run", "x", "--seed", "-1"], "--seed -1"),
    (["--run", "x", "--temperature", "0"], "--temperature 0.0: should be positive"),
    (["--run", "x", "--n", "many"], "invalid int"), (["--run", "x", "--policy", "best"], "invalid choice"),
    (["--run", "x", "--sed", "1"], "unrecognized arguments: --sed"),
])
def test_bad_flags(capsys, argv, says):
    with pytest.raises(SystemExit) as end:
        ev.main(argv)
    assert end.value.code == 2 and says in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# A run folder with a tiny random model

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    vq = VQModel(VQConfig(ch=8, norm_groups=4, z_channels=8, codebook_size=32, codebook_dim=4))
    save_weights(folder / "tokenizer.safetensors", vq.state_dict(), config=asdict(vq.cfg))
    for policy in ("pretrain", "ppo"):
        model = ImageModel(ModelConfig(n_layer=1, n_head=2, n_embd=16, n_ffn=32, image_vocab=32, code_dim=4))
        save_weights(folder / f"{policy}.safetensors", model.state_dict(), config=asdict(model.cfg))
    runs.save_judges(folder / "reward.safetensors", {"train": Judge(JudgeConfig(width=16, n_layer=1, n_head=2)),
                                                   "heldout": Judge(JudgeConfig(kind="convolve", width=16, n_head=2))})
    return folder


@pytest.fixture
def prompts(tmp_path):
    """Three pairs in PairComp's layout, the last of unknown words."""
    pairs = pairworld(2, "test", seed=2)
    two = [*pairs.prompts, ("a dög", "two dögs")]
    return write(tmp_path / "prompts.json", [{"category": c, "caption1": a, "caption2": b} for c, (a, b) in zip(OFFICIAL, two)])


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_generate_score_summarize(run, prompts, tmp_path, capsys):
    images, scores, out = tmp_path / "images", tmp_path / "scores.json", tmp_path / "summary.json"
    generate = ["--generate", "--run", str(run), "--prompts", prompts, "--images", str(images), "--device", "cpu"]
    ev.main(generate)
    assert names(images) == sorted(f"{p}_{i}_{k}.png" for p in range(3) for i in range(2) for k in range(2))
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in images.iterdir()}
    assert len({b for b, _ in before.values()}) == 12 and Image.open(images / "0_0_0.png").size == (32, 32)

    (images / "1_1_0.png").unlink()                                     # what a killed run had not written yet
    ev.main(generate)
    after = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in images.iterdir()}
    assert after.pop("1_1_0.png")[0] == before.pop("1_1_0.png")[0] and after == before
    assert "1 pictures made, 11 were there" in capsys.readouterr().out

    ev.main(["--score", "--images", str(images), "--prompts", prompts, "--run", str(run), "--out", str(scores),
             "--device", "cpu"])
    entries = json.loads(scores.read_text())
    assert list(entries) == ["0", "1", "2"] and set(entries["0"][0]) == {"pair_idx", "prompt_idx", "image_idx", "score"}
    captions = json.loads(Path(prompts).read_text())
    places = [(p, i, k) for p in range(3) for i in range(2) for k in range(2)]
    pictures = np.stack([np.array(Image.open(images / f"{p}_{i}_{k}.png")) for p, i, k in places])
    answers = runs.load_judges(run, "cpu")["heldout"].score(pictures, [captions[p][f"caption{i + 1}"] for p, i, _ in places])
    ours = [entries[str(p)][2 * i + k]["score"] for p, i, k in places]
    assert ours == pytest.approx(answers.tolist(), abs=1e-6) and len(set(ours)) == 12

    ev.main(["--summarize", str(scores), "--prompts", prompts, "--out", str(out)])
    expected = ev.summarize([[e["score"] for e in rows] for rows in entries.values()], list(CATEGORIES)[:3])
    assert json.loads(out.read_text()) == expected


def test_pictures_of_two_policies_do_not_come_into_one_folder(run, prompts, tmp_path):
    """What is there is skipped. With another policy, guidance or prompts the folder once became a mixture, with a score like any other."""
    generate = ["--generate", "--run", str(run), "--prompts", prompts, "--images", str(tmp_path / "images"), "--device", "cpu"]
    ev.main(generate)
    ev.main([*generate, "--batch", "3"])                                # fewer at once is no other setting: a smaller card may go on
    others = write(tmp_path / "others.json", [{"category": OFFICIAL[0], "caption1": "a", "caption2": "b"}])
    for change, says in ((["--policy", "pretrain"], "other weights; choose"), (["--guidance", "2", "--seed", "1"], "guidance 1.0 -> 2.0; seed 0 -> 1"),
                         (["--prompts", others], "other prompts; choose another folder, or remove it and images.settings.json")):
        with pytest.raises(UserError, match=says):
            ev.main([*generate, *change])
    (tmp_path / "theirs").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "theirs" / "0_0_0.png")
    with pytest.raises(UserError, match="holds pictures that were not made here"):
        ev.main([*generate, "--images", str(tmp_path / "theirs")])


def test_guidance_follows_the_training(run, tmp_path):
    """A Janus policy sampled without guidance draws badly, and --guidance 5 had to be typed each time."""
    args = argparse.Namespace(run=str(tmp_path), policy="ppo", guidance=None)
    model = runs.load_policy(run, "ppo", "cpu")[1]
    assert runs.guidance_of(args, model) == 1.0
    model.text = argparse.Namespace(empty=None)                         # as Janus' text has it
    assert runs.guidance_of(args, model) == 5.0
    write(tmp_path / "config.json", {"ppo": {"guidance": 3.0}})
    assert runs.guidance_of(args, model) == 3.0
    args.policy = "pretrain"
    assert runs.guidance_of(args, model) == 5.0
    args.guidance = 2.0
    assert runs.guidance_of(args, model) == 2.0


def test_score_wants_every_picture(run, prompts, tmp_path):
    score = ["--score", "--images", str(tmp_path), "--prompts", prompts, "--judge", "train", "--run", str(run),
             "--out", str(tmp_path / "s"), "--device", "cpu"]
    with pytest.raises(UserError, match=r"12 of 12 pictures are missing: 0_0_0.png.*and 7 more"):
        ev.main(score)
    for p in range(3):
        for i in range(2):
            for k in range(2):
                Image.new("RGB", (32, 32)).save(tmp_path / f"{p}_{i}_{k}.png")
    (tmp_path / "2_1_1.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match="2_1_1.png"):
        ev.main(score)
    assert not (tmp_path / "s").exists()


def test_the_oracle_scores_without_a_run(tmp_path):
    pairs = pairworld(6, "test", seed=4)
    prompts = write(tmp_path / "p.json", [{"category": c, "caption1": a, "caption2": b}
                                          for c, (a, b) in zip(OFFICIAL, pairs.prompts)])
    for p in range(6):
        for i in range(2):
            for k in range(2):
                Image.fromarray(pairs.images[p, i if k == 0 else 0]).save(tmp_path / f"{p}_{i}_{k}.png")
    ev.main(["--score", "--images", str(tmp_path), "--prompts", prompts, "--judge", "oracle", "--out", str(tmp_path / "s.json")])
    assert ev.read_scores(tmp_path / "s.json", 6).tolist() == [[1, 1, 1, 0]] * 6


def test_a_prompt_that_is_too_long_stops_before_the_first_picture(run, tmp_path):
    prompts = write(tmp_path / "p.json", [{"category": OFFICIAL[0], "caption1": "short", "caption2": "long " * 40}])
    with pytest.raises(UserError, match="longer than the context of 160"):
        ev.main(["--generate", "--run", str(run), "--prompts", prompts, "--images", str(tmp_path / "images"), "--device", "cpu"])
    assert names(tmp_path / "images") == []


def test_a_chunk_depends_on_the_seed_and_its_place_alone(run):
    vq, model = runs.load_policy(run, "ppo", "cpu")
    prompts = ["one red circle", "two red circles on a plain background", "three blue squares", "ä"]
    done = []
    images = runs.generate_images(model, vq, prompts, 3, 2.0, 0.9, seed=7, batch=6, progress=done.append)
    assert images.shape == (4, 3, 32, 32, 3) and images.dtype == np.uint8 and done == [2, 2]
    torch.manual_seed(123)                                              # the global generator has no say
    first = runs.generate_images(model, vq, prompts[:2], 3, 2.0, 0.9, seed=7, batch=6)
    assert np.array_equal(first, images[:2])
    (indices, last), = runs.image_chunks(model, vq, prompts, 3, 2.0, 0.9, 7, batch=6, wanted=lambda i: 3 in i)
    assert list(indices) == [2, 3] and np.array_equal(last, images[2:])
    assert not np.array_equal(runs.generate_images(model, vq, prompts[:2], 3, 2.0, 0.9, seed=8, batch=6), first)
    assert not np.array_equal(images[0, 0], images[0, 1])


def test_the_pairworld_benchmark(run, capsys):
    for policy in ("ppo", "pretrain"):
        ev.main(["--run", str(run), "--policy", policy, "--n", "1", "--device", "cpu"])
        report = json.loads((run / f"paircomp_{policy}.json").read_text())
        assert list(report) == ["train", "heldout", "oracle", "pairs", "pair_accuracy"]
        assert all(list(r) == [*CATEGORIES, "average"] for name, r in report.items() if name != "pairs")
        assert report["pairs"]["categories"] == list(CATEGORIES) and np.shape(report["pairs"]["heldout"]) == (6, 4)
        assert ev.format_report(report) in capsys.readouterr().out


def test_judges_come_back_as_they_were_saved(tmp_path):
    torch.manual_seed(1)
    networks = {"train": Judge(JudgeConfig(width=16, n_layer=1, n_head=2)),
                "heldout": Judge(JudgeConfig(kind="convolve", width=16))}
    runs.save_judges(tmp_path / "reward.safetensors", networks)
    judges = runs.load_judges(tmp_path, "cpu")
    assert list(judges) == ["train", "heldout", "oracle"]
    for name, network in networks.items():
        loaded = judges[name].network
        assert loaded.cfg == network.cfg and not loaded.training
        assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), loaded.state_dict().values(), strict=True))
    stray = {f"{n}.{k}": v for n, net in networks.items() for k, v in net.state_dict().items()} | {"third.x": torch.zeros(1)}
    save_weights(tmp_path / "reward.safetensors", stray, **{n: asdict(net.cfg) for n, net in networks.items()})
    with pytest.raises(UserError, match="unexpected third.x"):
        runs.load_judges(tmp_path, "cpu")
    save_weights(tmp_path / "reward.safetensors", {}, train=asdict(networks["train"].cfg))
    with pytest.raises(UserError, match="does not fit this Judge"):
        runs.load_judges(tmp_path, "cpu")
    save_weights(tmp_path / "reward.safetensors", {"x": torch.zeros(1)}, config={})
    with pytest.raises(UserError, match="no config of the judge 'train'"):
        runs.load_judges(tmp_path, "cpu")


def test_a_run_that_lacks_or_mixes_checkpoints(run, tmp_path):
    with pytest.raises(UserError, match="tokenizer.safetensors: no such checkpoint"):
        runs.load_policy(tmp_path, "ppo", "cpu")
    (tmp_path / "ppo.safetensors").write_bytes((run / "ppo.safetensors").read_bytes())
    other = VQModel(VQConfig(ch=8, norm_groups=4, z_channels=8, codebook_size=16, codebook_dim=4))
    save_weights(tmp_path / "tokenizer.safetensors", other.state_dict(), config=asdict(other.cfg))
    with pytest.raises(UserError, match="knows 32 codes and 64 tokens.*16 and 64"):
        runs.load_policy(tmp_path, "ppo", "cpu")
