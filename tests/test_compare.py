"""compare.py: the bootstrap against what is known beforehand, the pairing of runs, and the files that cannot be compared."""
import json
import runpy
import sys

import numpy as np
import pytest
from PIL import Image

import compare as cmp
import eval_paircomp as ev
from data import UserError
from pairworld import CATEGORIES

UNEQUAL = ["color"] * 4 + ["counting"] * 2 + ["text"]
EACH = [c for c in CATEGORIES for _ in range(2)]


def report(scores, categories):
    """What `eval_paircomp.paircomp` says of scores (P, 4), here the same of all judges; a pair is right where all its scores are 1."""
    scores = np.asarray(scores, np.float64)
    right = (scores == 1).all(1).astype(int)
    return {**{judge: ev.summarize(scores, categories) for judge in cmp.JUDGES}, "pair_accuracy": ev.category_means(right, categories),
            "pairs": {**{judge: scores.tolist() for judge in cmp.JUDGES}, "pair_accuracy": right.tolist(), "categories": list(categories)}}


def result(seed, scores, categories=EACH, tests=(0.5, 0.6, 0.7)):
    """A paircomp.json: a run of a seed with the scores at its end, and its quick tests at rollouts 0, 20, 40, ..."""
    curve = [{"step": 20 * i, **{judge: {"s_a": s, "s_g": s} for judge in cmp.JUDGES}, "pair_accuracy": s} for i, s in enumerate(tests)]
    auc = {"divergence_auc": {"average": 0.6}}
    change = {"change": {"inside": {"average": 0.03}, "outside": {"average": 0.01}}}
    return {"base": report(np.full_like(scores, 0.25), categories) | auc, "ppo": report(scores, categories) | auc | change, "curve": curve, "config": {"seed": seed}}


def random_scores(seed, categories=EACH):
    return np.random.default_rng(seed).uniform(0.3, 0.7, (len(categories), 4))


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


@pytest.fixture
def runs(tmp_path):
    """Two arms of two seeds: a folder as a run leaves it and three files; the second arm is 10 points better throughout."""
    (tmp_path / "pair-0").mkdir()
    write(tmp_path / "pair-0" / "paircomp.json", result(0, random_scores(0)))
    return {"pair": [str(tmp_path / "pair-0"), write(tmp_path / "pair-1.json", result(1, random_scores(1)))],
            "pair-choice": [write(tmp_path / f"pair-choice-{s}.json", result(s, random_scores(s) + 0.1)) for s in (0, 1)]}


# ---------------------------------------------------------------------------------------------------------------------
# The bootstrap

def test_the_mean_is_exact_and_inside_its_interval():
    """Mean of the categories' means, whatever their sizes: colour's four pairs count as much as the one of text."""
    values = np.random.default_rng(0).normal(size=(3, 7))
    mean, low, high = cmp.bootstrap(values, UNEQUAL)
    by_hand = (values[:, :4].mean() + values[:, 4:6].mean() + values[:, 6].mean()) / 3
    assert mean == pytest.approx(by_hand, abs=1e-12) and abs(mean - values.mean()) > 1e-3
    assert low < mean < high
    assert cmp.bootstrap(values, UNEQUAL, 1)[0] == mean


def test_the_order_of_the_pairs_and_of_the_seeds_does_not_matter_to_the_mean():
    values, order = np.random.default_rng(1).normal(size=(3, 7)), np.random.default_rng(2).permutation(7)
    assert cmp.bootstrap(values[::-1, order], np.array(UNEQUAL)[order])[0] == pytest.approx(cmp.bootstrap(values, UNEQUAL)[0], abs=1e-12)


def test_without_spread_the_interval_has_no_width():
    """Categories may differ: pairs are drawn again within theirs."""
    for values in (np.full((3, 7), 0.3), np.tile([1.0] * 4 + [2.0] * 2 + [6.0], (3, 1))):
        mean, low, high = cmp.bootstrap(values, UNEQUAL)
        assert low == pytest.approx(mean, abs=1e-12) and high == pytest.approx(mean, abs=1e-12)


def test_seeds_and_pairs_both_widen_the_interval():
    rng = np.random.default_rng(3)
    seeds, pairs = np.tile(rng.normal(size=(4, 1)), 12), np.tile(rng.normal(size=(1, 12)), (4, 1))
    of_seeds, of_pairs, of_both = (high - low for _, low, high in (cmp.bootstrap(v, EACH) for v in (seeds, pairs, seeds + pairs)))
    assert 0 < max(of_seeds, of_pairs) < of_both < of_seeds + of_pairs


def test_the_bootstrap_is_determined_by_its_seed():
    values = np.random.default_rng(4).normal(size=(3, 7))
    one, same, other = (cmp.bootstrap(values, UNEQUAL, seed=s) for s in (0, 0, 1))
    assert one == same and one[0] == other[0] and one[1:] != other[1:]
    assert one[1:] == pytest.approx(other[1:], abs=0.05)


@pytest.mark.parametrize("of_seeds, of_pairs, of_both", [(0.03, 0.1, 0.1), (0.0, 0.1, 0.1), (0.05, 0.0, 0.0)])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(of_seeds, of_pairs, of_both):
    """Twelve seeds, a truth of 0.1, and effects of seeds, of pairs and of both: 95 %, a little less for so few seeds."""
    rng, hits, n = np.random.default_rng(5), 0, 200
    categories = ["color"] * 10 + ["counting"] * 20 + ["text"] * 5
    for i in range(n):
        values = 0.1 + of_seeds * rng.normal(size=(12, 1)) + of_pairs * rng.normal(size=35) + of_both * rng.normal(size=(12, 35))
        _, low, high = cmp.bootstrap(values, categories, 300, i)
        hits += low <= 0.1 <= high
    assert 0.86 <= hits / n <= 0.99


# ---------------------------------------------------------------------------------------------------------------------
# Metrics, pairing, table

def test_metrics_of_the_pairs_by_hand():
    metrics = cmp.pair_metrics(report([[0.5, 0.5, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]], ["color", "color", "text"]))
    assert set(metrics) == {f"{judge} {m}" for judge in cmp.JUDGES for m in ("s_a", "s_g", "gap")} | {"pair accuracy"}
    for judge in cmp.JUDGES:
        assert metrics[f"{judge} s_a"] == pytest.approx([0.75, 0.75, 1]) and metrics[f"{judge} s_g"] == pytest.approx([0.5 ** 0.5, 0, 1])
        assert metrics[f"{judge} gap"] == pytest.approx([0.75 - 0.5 ** 0.5, 0.75, 0])
    assert metrics["pair accuracy"].tolist() == [0, 0, 1]


def test_the_means_are_those_of_the_report():
    """The macro average of the pairs' metrics is the "average" that training prints."""
    scores = random_scores(0, UNEQUAL)
    run = {0: result(0, scores, UNEQUAL)}
    table, _ = cmp.compare(run, run)
    for judge in cmp.JUDGES:
        for key, value in run[0]["ppo"][judge]["average"].items():
            assert table[f"{judge} {key}"][:2] == pytest.approx([value, value], abs=1e-12)
            assert table[f"{judge} {key}"][2:] == (0, 0, 0)


def test_runs_are_paired_by_seed():
    """Seeds that scatter far more than the arms differ: seed by seed and pair by pair the difference is the same, and so it is certain."""
    arm, baseline = ({s: result(s, np.full((12, 4), 0.1 * s + plus)) for s in seeds} for plus, seeds in ((0.15, (2, 1, 5)), (0.1, (6, 1, 2))))
    table, seeds = cmp.compare(arm, baseline)
    assert seeds == [1, 2]                                              # the means are of the seeds that both have
    assert table["heldout s_a"] == pytest.approx([0.3, 0.25, 0.05, 0.05, 0.05], abs=1e-9)
    swapped = cmp.compare(baseline, arm)[0]
    assert swapped["heldout s_a"][2] == pytest.approx(-0.05)


def test_the_worst_dip_is_that_of_the_worst_seed_after_the_first_rollouts():
    arm = {s: result(s, random_scores(s), tests=tests) for s, tests in ((0, (0.5, 0.6, 0.45, 0.7)), (1, (0.4, 0.39, 0.5, 0.5)))}
    assert cmp.worst_dip(arm) == pytest.approx(0.9)
    assert cmp.worst_dip(arm, after=60) == pytest.approx(1.25)
    assert cmp.worst_dip(arm, after=0) == pytest.approx(0.9)
    assert cmp.worst_dip({1: arm[1]}) == pytest.approx(0.975)


def test_the_table_has_a_row_an_arm_and_intervals_but_for_the_baseline():
    baseline = {s: result(s, np.full((12, 4), 0.5), tests=(0.5, 0.4)) for s in (0, 1, 2)}
    better = {s: result(s, np.full((12, 4), 0.6)) for s in (0, 1)}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in cmp.markdown({"better": better}, "plain", baseline).splitlines()]
    assert rows[0][:2] == ["arm", "seeds"] and rows[0][-1] == "worst dip" and {len(row) for row in rows} == {len(rows[0])}
    assert rows[2] == ["plain", "3", "50.0", "50.0", "0.0", "50.0", "50.0", "0.0", "-20 %"]
    assert rows[3][:4] == ["better", "2", "60.0 (+10.0 [+10.0, +10.0])", "60.0 (+10.0 [+10.0, +10.0])"] and rows[3][-1] == "+20 %"
    assert len(rows) == 4


# ---------------------------------------------------------------------------------------------------------------------
# Files

def test_runs_are_read_by_arm_and_seed(runs):
    arms = cmp.read_arms([*runs["pair-choice"], *runs["pair"]])
    assert list(arms) == ["pair-choice", "pair"] and all(list(arm) == [0, 1] for arm in arms.values())
    assert arms["pair"][0]["ppo"]["pairs"]["heldout"] == random_scores(0).tolist()


@pytest.mark.parametrize("lacking", ["base", "ppo", "curve", "config"])
def test_a_file_that_is_no_result_is_refused(tmp_path, lacking):
    whole = result(0, random_scores(0))
    path = write(tmp_path / "pair-0.json", {k: v for k, v in whole.items() if k != lacking})
    with pytest.raises(UserError, match=rf"pair-0.json: has no '{lacking}'"):
        cmp.read_arms([path])


@pytest.mark.parametrize("content, says", [("[]", "has no 'base'"), ("null", "has no 'base'"), ("{", "broken JSON at line 1")])
def test_a_file_that_is_no_object_is_refused(tmp_path, content, says):
    with pytest.raises(UserError, match=says):
        cmp.read_arms([write(tmp_path / "pair-0.json", content)])


def test_a_run_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="pair-7: no such file"):
        cmp.read_arms([tmp_path / "pair-7"])
    (tmp_path / "pair-8").mkdir()
    with pytest.raises(UserError, match="pair-8.paircomp.json: no such file"):
        cmp.read_arms([tmp_path / "pair-8"])


def test_a_seed_that_comes_twice_is_refused(tmp_path):
    """The seed is that of the config, not of the name: a copied run would count twice."""
    paths = [write(tmp_path / f"pair-{i}.json", result(0, random_scores(0))) for i in (0, 1)]
    with pytest.raises(UserError, match="pair-1.json: arm pair has a run of seed 0 already"):
        cmp.read_arms(paths)


def test_runs_without_a_seed_in_common_are_refused():
    with pytest.raises(UserError, match=r"no seed in common: \[0, 1\] and \[2\]"):
        cmp.compare({s: result(s, random_scores(s)) for s in (1, 0)}, {2: result(2, random_scores(2))})


@pytest.mark.parametrize("other", [EACH[:-1], EACH[::-1]])
def test_runs_of_different_test_pairs_are_refused(other):
    with pytest.raises(UserError, match="different pairs.*--eval-pairs"):
        cmp.compare({0: result(0, random_scores(0))}, {0: result(0, random_scores(0, other), other)})


# ---------------------------------------------------------------------------------------------------------------------
# eval_paircomp.py --compare

def test_the_table_and_the_picture_on_the_command_line(runs, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    ev.main(["--compare", *runs["pair"], *runs["pair-choice"], "--baseline", *runs["pair"], "--out", str(tmp_path / "x.png")])
    out = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in out.splitlines()[2:4]] == ["pair", "pair-choice"]        # the baseline only once
    assert "(+10.0 [+10.0, +10.0])" in out and out.splitlines()[-1] == f"picture: {tmp_path / 'x.png'}"
    with Image.open(tmp_path / "x.png") as picture:
        assert min(picture.size) > 300 and len(picture.convert("RGB").getcolors(10 ** 6)) > 50


def test_without_matplotlib_there_is_a_table_but_no_picture(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        ev.main(["--compare", *runs["pair-choice"], "--baseline", *runs["pair"], "--out", str(tmp_path / "x.png")])
    assert "| pair-choice | 2 |" in capsys.readouterr().out and not (tmp_path / "x.png").exists()


def test_a_baseline_is_one_arm(runs):
    with pytest.raises(UserError, match="--baseline: should be the runs of one arm, found pair, pair-choice"):
        ev.main(["--compare", *runs["pair"], "--baseline", *runs["pair"], *runs["pair-choice"]])


def test_what_cannot_be_compared_leaves_with_one_line_and_a_status(runs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval_paircomp.py", "--compare", runs["pair-choice"][0], "--baseline", runs["pair"][1]])
    with pytest.raises(SystemExit) as end:                              # a message as its code: python prints it and leaves with 1
        runpy.run_path(ev.__file__, run_name="__main__")
    assert end.value.code == "error: no seed in common: [0] and [1]; runs are paired by seed" and not capsys.readouterr().out


@pytest.mark.parametrize("argv, says", [
    (["--compare", "x"], "--compare needs --baseline"), (["--compare", "x", "--baseline", "y", "--seed", "1"], "--compare has no use for --seed"),
    (["--compare", "--baseline", "y"], "expected at least one argument"), (["--baseline", "y"], "nothing was chosen"),
    (["--compare", "x", "--score"], "--score and --compare was chosen"), (["--run", "x", "--baseline", "y"], "no use for --baseline"),
])
def test_flags_that_do_not_go_with_compare(capsys, argv, says):
    with pytest.raises(SystemExit) as end:
        ev.main(argv)
    assert end.value.code == 2 and says in capsys.readouterr().err


def test_ground_truth_is_reported_by_origin():
    """Averaged over the tests that saw some; an arm without ground truth has nothing to report."""
    run = result(0, random_scores(0))
    assert cmp.truth_report({0: run}) == []
    run["curve"][1] |= {"grad_norm_of": {"sampled": 0.1, "twin_truth": 0.4}, "kl_of": {"sampled": 0.0, "twin_truth": 3.0}}
    run["curve"][2] |= {"grad_norm_of": {"sampled": 0.3}, "kl_of": {"sampled": 1.0}}
    assert cmp.truth_report({0: run}) == ["gradient norm of 2 rollouts: sampled 0.200, twin_truth 0.400", "k3, nats a token of 2 rollouts: sampled 0.500, twin_truth 3.000"]


def test_the_difference_is_reported_before_and_after():
    lines = cmp.difference_report({s: result(s, random_scores(s)) for s in (0, 1)})
    assert lines == ["divergence_auc base: average 0.60", "divergence_auc ppo: average 0.60", "change inside the true difference, nats a token: average 0.030",
                     "change outside the true difference, nats a token: average 0.010"]
