"""extras/ablation.py: the arms, their weights and objectives, runs that are stopped and resumed,
the comparison with its intervals, the committed results. And extras/plots.py and gradients.py."""
import itertools
import json
import math
import os
import re
import runpy
import shutil
import signal
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import eval_paircomp
import pairworld as world
import ppo
import reward
import train
from common import UserError, load_weights, save_weights
from extras import ablation, gradients, plots
from extras.ablation import ARMS
from extras.draw_world import difference_mask, write_pairs
from model import ImageModel, ModelConfig, load_policy, prompt_divergence
from pairworld import ATTRIBUTES, CATEGORIES, GRID, OPTIONAL, Layout, Scene
from reward import Judge, JudgeConfig
from tokenizer import VQConfig, VQModel

ROOT = Path(__file__).parents[1]
RESULTS = sorted((ROOT / "docs" / "ablation").glob("*.json"))
TONES = sorted((ROOT / "docs" / "ablation" / "tones").glob("*.json"))
EARLIER = sorted((ROOT / "docs" / "ablation_earlier").glob("*.json"))
JUDGES = ablation.JUDGES


# --------------------------------------------------------------------------------------------------
# The table of arms and the committed results

def arm_and_seed(path):
    arm, _, seed = path.stem.rpartition("-")
    return arm, int(seed)


def test_the_plan_names_every_arm_and_every_result_is_of_one():
    text = (ROOT / "docs" / "ablation.md").read_text().partition("### The arms")[2]
    planned = re.findall(r"^\| `([a-z-]+)` \|", text, re.MULTILINE)
    assert list(dict.fromkeys(planned)) == list(ARMS)
    assert {arm_and_seed(path)[0] for path in RESULTS} <= ARMS.keys()


@pytest.mark.parametrize("path", RESULTS + TONES, ids=lambda path: "/".join(path.parts[-2:]))
def test_a_committed_result_has_the_settings_of_its_arm(path):
    result = json.loads(path.read_text())
    arm, seed = arm_and_seed(path)
    assert re.fullmatch("[0-9a-f]{7}(-dirty)?", result["commit"])
    recipe = ablation.RECIPE | ({"lr": 2e-4} if path in TONES else {})
    assert (recipe | ARMS[arm][0] | {"seed": seed}).items() <= result["config"].items()


def cells_of(table):
    """A Markdown table -> rows of cells, without the line under the heading."""
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")]
            for line in table.splitlines()]
    return rows[:1] + rows[2:]


@pytest.mark.parametrize("heading, results", [
    ("## What is found", RESULTS), ("## Images that nobody here drew", TONES)])
def test_the_report_has_the_figures_of_its_comparisons(heading, results):
    """The first table below a heading has columns of what --compare prints of the committed
    results. PairWorld's report has two more, of the fit and of the categories."""
    text = (ROOT / "docs" / "ablation.md").read_text().partition(f"{heading}\n")[2]
    first, *others = re.findall(r"(?:^\|.*\n)+", text.partition("\n## ")[0], re.MULTILINE)
    arms = ablation.read_arms(results)
    arms = {"group": arms.pop("group"), **arms}
    heading, *printed = cells_of(ablation.markdown(arms, "group", arms["group"]).split("\n\n")[0])
    columns, *said = cells_of(first)
    by_arm = {row[0]: [row[heading.index(name)] for name in columns] for row in printed}
    assert len(said) == len(by_arm) and all(row == by_arm[row[0]] for row in said)
    assert len(others) == (2 if results is RESULTS else 0)
    for table, function in zip(others, [ablation.fit_markdown, ablation.categories_markdown]):
        whole = "\n".join(re.findall(r"^\|.*", function(arms, "group"), re.MULTILINE))
        assert sorted(cells_of(table)) == sorted(cells_of(whole))


def test_the_earlier_report_has_every_figure_of_its_comparison():
    """The tables of docs/ablation_earlier.md, one after the other, are what --compare prints of the
    committed results, but for the worst dips."""
    text = (ROOT / "docs" / "ablation_earlier.md").read_text()
    names = ["group", "pair", "truth", "truth-tamed", "group-spread", "group-mask",
             "group-shuffled", "group-random", "factored"]
    arms = ablation.read_arms(EARLIER)
    others = {name: arms[name] for name in names[1:]}
    printed = ablation.markdown(others, "group", arms["group"]).splitlines()[2:]
    assert printed.pop(1).startswith("| base |")
    for name, line in zip(names, printed):
        arm, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert arm == name
        said = [row for row in text.splitlines() if row.startswith(f"| `{name}` |")]
        assert len(said) == 4           # what it is, and three tables
        found = [cell for row in said[1:] for cell in row[2:-2].split(" | ")[1:]]
        assert set(cells) <= set(found) and len(found) == len(cells) + 1
    for arm in arms:
        assert f"`{arm}`" in text


# --------------------------------------------------------------------------------------------------
# Where the weights come from

scenes = st.builds(Scene, *(st.integers(0, len(o) - 1) for o in ATTRIBUTES.values()))
layouts = st.builds(Layout, st.integers(0, 2), st.permutations(range(4)).map(tuple),
                    st.integers(0, 1), st.integers(0, 1))


def carrying_cells(scene, layout, name):
    """The cells (4, 4) of a rendering that carry an attribute, from where `render` puts things."""
    def at(along, across):
        return world.place(scene.relation, along, across)

    cells = {"object": [at(k // 2, layout.offset + k % 2)
                        for k in layout.cells[:scene.count + 1]],
             "ref": [at(GRID - 1, 1 + layout.ref_slot)],
             "letter": [at(GRID - 1, (GRID - 1) * layout.letter_slot)]}
    filled = sum(cells.values(), [])
    everywhere = itertools.product(range(GRID), range(GRID))
    cells["style"] = [cell for cell in everywhere if cell not in filled]
    kinds = {"letter": ["letter"], "style": ["style"], "ref_color": ["ref"], "ref_shape": ["ref"],
             "relation": ["object", "ref"], "count": ["object", "style"]}.get(name, ["object"])
    out = np.zeros((GRID, GRID), bool)
    for kind in kinds:
        for cell in cells[kind]:
            out[cell] = True
    return out


@pytest.mark.parametrize("name", list(ATTRIBUTES))
@settings(max_examples=15, deadline=None)
@given(scenes, layouts, st.integers(1, 3), st.sets(st.sampled_from(list(OPTIONAL))))
def test_an_image_shows_a_difference_in_the_cells_that_carry_it(name, scene, layout, step, named):
    """Wherever the prompts differ, the clean image has the difference itself inside these cells,
    and nothing else unless the number or the place of the objects differs: the twin then has
    objects where this image has background, letter or reference."""
    other = scene._replace(**{name: (getattr(scene, name) + step) % len(ATTRIBUTES[name])})
    if other == scene:                  # two sizes and two fills: two steps lead back
        other = scene._replace(**{name: 1 - getattr(scene, name)})
    named = named | {part for part, names in OPTIONAL.items() if name in names}
    images = np.stack([world.render(s, layout) for s in (scene, other)])
    prompts = world.caption(scene, named), world.caption(other, named)
    fine, coarse = (difference_mask(images[None], grid)[0] for grid in (8, GRID))
    for image, s, pair in zip(images, (scene, other), (prompts, prompts[::-1])):
        shown = ablation.shown_in(image[None], [pair], 8)[0]
        cells = carrying_cells(s, layout, name)
        assert shown.shape == (8, 8) and np.array_equal(shown, cells.repeat(2, 0).repeat(2, 1))
        assert np.array_equal(ablation.shown_in(image[None], [pair], GRID)[0], cells)
        if name != "relation":
            assert shown[fine].all()
        if name not in ("relation", "count"):
            assert np.array_equal(cells, coarse)
    if name == "relation":
        anywhere = [carrying_cells(s, layout, n) for s in (scene, other)
                    for n in ("relation", "letter")]
        assert np.any(anywhere, 0)[coarse].all()


@pytest.fixture(scope="module")
def held_out():
    return world.pairworld(60, "test", seed=0)


def test_what_an_image_shows_is_found_row_by_row_and_in_what_was_sampled(held_out):
    """The rows are images with pairs of their own, noise does no harm, and a blank image is
    background alone."""
    images, prompts = held_out.images[:, 0], held_out.prompts
    shown = ablation.shown_in(images, prompts, 8)
    for i in range(60):
        alone = ablation.shown_in(images[i:i + 1], prompts[i:i + 1], 8)
        assert np.array_equal(shown[i], alone[0])
    noise = np.random.default_rng(0).normal(0, 12, images.shape)
    noisy = (images + noise).clip(0, 255).astype(np.uint8)
    assert np.array_equal(ablation.shown_in(noisy, prompts, 8), shown)
    blank = ablation.shown_in(np.full_like(images, 250), prompts, 8)
    on_background = [c in ("counting", "style") for c in held_out.categories]
    assert blank.mean((1, 2)).tolist() == on_background


def test_an_unpaired_prompt_shows_nothing_apart_whatever_it_says(held_out):
    """It is a pair with itself. Its weights are then 1: there is nothing to weigh."""
    prompts = [held_out.prompts[0][:1] * 2, ("a dog in the snow",) * 2]
    assert not ablation.shown_in(held_out.images[:2, 0], prompts, 8).any()
    weights = ppo.difference_weights(torch.zeros(1, 2, 3, 64), 0.5)
    assert weights.equal(torch.ones(1, 2, 3, 64))


def test_what_is_no_caption_of_pairworld_has_no_mask(held_out):
    with pytest.raises(UserError, match="not a PairWorld caption"):
        ablation.shown_in(held_out.images[:1, 0], [("a dog", "two dogs")], 8)


@torch.no_grad()
def test_where_the_weights_come_from(base):
    """D_t of the model, that of another pair's image in another order, and the oracle's cells."""
    vq, policy = load_policy(base, "pretrain", "cpu")
    pairs = world.pairworld(4, "train", 0)
    tokens = train.encode_pairs(vq, pairs, np.arange(4), "cpu").flatten(0, 1)   # (8, N)
    ids = policy.prompt_ids(pairs.flat_prompts())                               # (8, T)
    twin_ids = ids.view(4, 2, -1).flip(1).flatten(0, 1)
    given = policy, ids, twin_ids, tokens
    sampling = dict(empty=None, guidance=1.0, temperature=1.0)
    d_t = prompt_divergence(*given, **sampling)
    cfg = train.PPO(out=str(base), device="cpu")
    mask = ablation.oracle_mask(cfg)(*given, **sampling)
    shuffled = ablation.shuffled(*given, **sampling)
    assert d_t.shape == shuffled.shape == mask.shape == (8, 64)
    of_another = d_t[[4, 5, 6, 7, 0, 1, 2, 3]]          # two of the four pairs further
    assert shuffled.sort(-1)[0].equal(of_another.sort(-1)[0])
    assert not any(a.equal(b) for a, b in zip(shuffled, of_another))
    decoded = eval_paircomp.decode_ids(vq, tokens)
    sides = [pair[::order] for pair in pairs.prompts for order in (1, -1)]
    cells = ablation.shown_in(decoded, sides, 8)
    assert mask.equal(torch.from_numpy(cells).flatten(1).float())


@torch.no_grad()
def test_a_shuffled_weight_knows_nothing_of_the_image_that_it_weighs(base):
    """It was once the own image's D_t in another order. A weight then held values of later tokens,
    which depend on the token that it weighs."""
    _, policy = load_policy(base, "pretrain", "cpu")
    ids = policy.prompt_ids(world.pairworld(2, "train", 0).flat_prompts())              # (4, T)
    tokens = torch.randint(32, (4, 64), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[0, 5:] = (other[0, 5:] + 1) % 32              # of the first image alone

    def values(tokens):
        return ablation.shuffled(policy, ids, ids.flip(0), tokens).sort(-1)[0]
    same = [a.allclose(b) for a, b in zip(values(tokens), values(other))]
    assert same == [True, True, False, True]            # it stands in the third image's weights


def test_the_random_order_follows_from_the_tokens():
    """A resumed run draws the same again, another rollout draws others."""
    tokens = torch.randint(320, (625, 64), generator=torch.Generator().manual_seed(0))
    one, same, other = (ablation.random_like(t) for t in (tokens, tokens.clone(), tokens.roll(1)))
    assert one.equal(same) and not one.equal(other)
    assert one.mean().item() == pytest.approx(0.5, abs=0.01)


# --------------------------------------------------------------------------------------------------
# Objectives

def test_an_objective_is_ppo_but_for_its_own_functions():
    fork = ablation.fork(train.PPO(), prompt_divergence=ablation.shuffled)
    for objective in (fork, ablation.Factored(train.PPO())):
        assert objective.difference_weights is ppo.difference_weights
        assert objective.group_advantages is ppo.group_advantages
    assert fork.prompt_divergence is ablation.shuffled


def test_ground_truth_of_the_own_image_alone():
    tokens = torch.arange(2 * 2 * 4 * 3).view(16, 3)
    truth = -1 - torch.arange(2 * 2 * 3).view(2, 2, 3)
    use = torch.tensor([[True, False], [False, True]])
    before = tokens.clone()
    mixed, replaced = ablation.own_image_alone(tokens, truth, use)
    both, _ = ppo.mix_ground_truth(tokens, truth, use)
    rows = torch.arange(16).view(2, 2, 4)
    assert replaced.nonzero().flatten().tolist() == [rows[0, 0, 0], rows[1, 1, 0]]
    assert mixed[replaced].equal(both[replaced]) and mixed[~replaced].equal(tokens[~replaced])
    assert tokens.equal(before)         # the rollout itself is left alone


def test_a_near_miss_gets_half():
    """By hand: right, wrong in the detail alone, wrong in all."""
    own, twin = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    rewards = ARMS["near-miss"][1](None).REWARDS["near-miss"](own, twin)
    assert rewards.tolist() == [1.0, 0.5, 0.0]


def test_strangers_share_a_pool():
    """By hand: a prompt's advantage is that of `pair` with the second prompt of another pair."""
    rewards = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(0))
    advantages = ablation.strangers(rewards, None, "pair").view(3, 2, 4)
    for p, q in ((0, 2), (1, 0), (2, 1)):
        pool = torch.stack([rewards[p, 0], rewards[q, 1]])[None]
        first, second = ppo.group_advantages(pool, "pair")[0]
        assert advantages[p, 0].equal(first) and advantages[q, 1].equal(second)


def test_a_std_for_the_whole_rollout():
    """By hand: prompts with deviations of 0.1 and 0.3 from their means, one std for both."""
    rewards = torch.tensor([[[0.0, 0.2], [0.2, 0.8]]])
    std = ((0.1 ** 2 + 0.3 ** 2) / 2) ** 0.5 + ppo.STD_FLOOR
    expected = torch.tensor([-0.1, 0.1, -0.3, 0.3])[:, None] / std
    torch.testing.assert_close(ablation.shared_std(rewards, None, "group"), expected)


def test_the_std_of_the_pair_alone():
    """`pair-std` is `pair` without what the two prompts' means differ by: it lacks a constant a
    prompt."""
    rewards = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(0))
    pair = ppo.group_advantages(rewards, "pair")
    expected = pair - pair.mean(2, keepdim=True)
    torch.testing.assert_close(ablation.pair_std(rewards, None, "group").view(3, 2, 4), expected)


def test_samples_go_to_the_pairs_that_the_base_model_confuses(base):
    """Half of twice as many random pairs, in the order in which they were drawn. Prompts the wrong
    way round turn a pair's margin into its negative: so does a model that learned them so."""
    cfg = train.PPO(out=str(base), device="cpu")
    confused, pairs = ablation.Confused(cfg), world.pairworld(40, "train", 0)
    drawn, prompts, has_images = ppo.draw_pairs(np.random.default_rng(7), pairs, 16)
    margins = confused.margins(pairs, drawn, prompts)
    swapped = confused.margins(pairs, drawn, [pair[::-1] for pair in prompts])
    assert swapped == pytest.approx(-margins, abs=1e-3) and abs(margins).max() > 1e-2
    chosen, kept, has_images = confused.draw_pairs(np.random.default_rng(7), pairs, 8)
    expected = np.sort(margins.argsort()[:8])
    assert chosen.tolist() == drawn[expected].tolist() and has_images.all()
    assert kept == [prompts[i] for i in expected]


def test_a_pair_without_images_is_not_known_to_be_confused(base):
    cfg = train.PPO(out=str(base), device="cpu")
    confused, pairs = ablation.Confused(cfg), world.pairworld(40, "train", 0)
    confused.factor = 6                 # enough with images among so many
    pairs.images = [two if i % 2 else None for i, two in enumerate(pairs.images)]
    pairs.load = lambda indices: world.pairworld(40, "train", 0).images[indices]
    chosen, _, has_images = confused.draw_pairs(np.random.default_rng(0), pairs, 2)
    assert has_images.all() and (chosen % 2 == 1).all()


def test_the_choice_by_hand():
    own, twin = torch.tensor([0.9, 0.5, 0.0, 0.004]), torch.tensor([0.3, 0.5, 1.0, 0.0])
    assert ablation.choice_reward(own, twin, 0).tolist() == pytest.approx([0.75, 0.5, 0.0, 1.0])
    expected = [0.901 / 1.202, 0.5, 0.001 / 1.002, 0.005 / 0.006]
    assert ablation.choice_reward(own, twin).tolist() == pytest.approx(expected, abs=1e-6)


def test_what_the_prompts_share_divides_out_of_the_choice():
    """An image that is wrong in all else scores lower for both prompts, by the same factor."""
    own, twin = torch.rand(50), torch.rand(50)
    choice = ablation.choice_reward(own, twin, floor=0)
    assert choice.allclose(ablation.choice_reward(0.01 * own, 0.01 * twin, floor=0), atol=1e-5)


def test_a_score_is_what_the_prompts_share_times_the_choice():
    own, twin = torch.rand(50) + 0.01, torch.rand(50)
    shared = ablation.Factored(train.PPO()).REWARDS["shared"](own, twin)
    assert shared.equal(own + twin)
    assert (shared * ablation.choice_reward(own, twin, floor=0)).allclose(own)


def test_noise_is_a_draw_and_a_difference_is_not():
    """1e-6 against 1e-8 is a hundred times as much and says nothing; 0.1 against 0.001 does."""
    own, twin = torch.tensor([1e-6, 0.1]), torch.tensor([1e-8, 1e-3])
    noise, difference = ablation.choice_reward(own, twin)
    assert noise.item() == pytest.approx(0.5, abs=1e-3) and difference > 0.97


def test_the_choice_rises_with_the_own_score_falls_with_the_twins_and_is_shared_between_them():
    own, twin = torch.rand(50), torch.rand(50)
    choice = ablation.choice_reward(own, twin)
    assert (ablation.choice_reward(own + 0.01, twin) > choice).all()
    assert (ablation.choice_reward(own, twin + 0.01) < choice).all()
    assert ((choice > 0.5) == (own > twin)).all() and (choice > 0).all() and (choice < 1).all()
    assert (choice + ablation.choice_reward(twin, own)).allclose(torch.ones(50))


def test_an_unpaired_prompt_is_not_paid_for_a_choice_that_does_not_exist():
    """Its twin is itself and scores the same: C is 1/2, and the advantages of the choice are 0. The
    twin's score was once set to 0 before C was made, which paid such a prompt for being good."""
    objective = ablation.Factored(train.PPO())
    scores = torch.rand(1, 2, 6)
    rewards = objective.REWARDS["shared"](scores, scores)
    assert objective.choice.equal(torch.full((1, 2, 6), 0.5))
    advantages = objective.token_advantages(rewards, None, "group")
    assert advantages.equal(ppo.token_advantages(rewards, None, "group"))


@pytest.mark.parametrize("pool", ["pair", "group"])
def test_the_weights_act_on_the_choice_alone(pool):
    own, twin, weights = torch.rand(2, 2, 3), torch.rand(2, 2, 3), torch.rand(2, 2, 3, 4)
    objective = ablation.Factored(train.PPO())
    rewards = objective.REWARDS["shared"](own, twin)
    of_reward = ppo.group_advantages(own + twin, pool)[..., None]
    of_choice = ppo.group_advantages(ablation.choice_reward(own, twin), pool)[..., None]
    plain = objective.token_advantages(rewards, None, pool)
    weighted = objective.token_advantages(rewards, weights, pool)
    torch.testing.assert_close(plain, (of_reward + of_choice).flatten(0, 2))
    torch.testing.assert_close(weighted, (of_reward + weights * of_choice).flatten(0, 2))


# --------------------------------------------------------------------------------------------------
# Running

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run folder with a tokenizer, a base model and judges that have learned nothing."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base") / "run"
    folder.mkdir()
    cfg = VQConfig(ch=8, norm_groups=4, z_channels=8, codebook_size=32, codebook_dim=4)
    vq = VQModel(cfg)
    save_weights(folder / "tokenizer.safetensors", vq.state_dict(), config=asdict(cfg))
    model = ImageModel(ModelConfig(n_layer=1, n_head=2, n_embd=16, n_ffn=32, image_vocab=32,
                                   code_dim=4))
    save_weights(folder / "pretrain.safetensors", model.state_dict(), config=asdict(model.cfg))
    judges = {"train": Judge(JudgeConfig(width=16, n_layer=1, n_head=2)),
              "heldout": Judge(JudgeConfig(kind="convolve", width=16, n_head=2))}
    reward.save_judges(folder / "reward.safetensors", judges)
    return folder


SMALL = ["--device", "cpu", "--n-pairs", "60", "--pairs", "2", "--samples", "3", "--eval-every",
         "2", "--eval-pairs", "1", "--lr", "3e-3"]


@pytest.fixture
def run_arms(base, tmp_path, monkeypatch):
    """main() in a folder of its own, with small runs -> that folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(eval_paircomp, "VALIDATION_PAIRS", 6)

    def run(*runs, flags=(), base=base, preset="smoke"):
        words = ["--base", str(base), "--preset", preset, "--results", "results"]
        ablation.main([*runs, *words, *SMALL, *flags])
        return tmp_path
    return run


@pytest.mark.parametrize("arm", list(ARMS))
def test_every_arm_runs(arm, run_arms, monkeypatch):
    """One rollout of each, in which all of its own functions are used, and its result."""
    # The state after the rollout, were it worse than the base.
    monkeypatch.setattr("train.BestState.finish", lambda self, step, base: (1.0, 1.0))
    folder = run_arms(f"{arm}-3", flags=["--steps", "1"])
    result = json.loads((folder / "results" / f"{arm}-3.json").read_text())
    out = folder / "runs" / "ablation" / f"{arm}-3"
    before, after = (load_weights(out / f"{policy}.safetensors")[0]
                     for policy in ("pretrain", "ppo"))
    assert any(not before[name].equal(after[name]) for name in before)
    assert result["config"]["seed"] == 3 and result["config"]["out"] == f"runs/ablation/{arm}-3"
    assert ARMS[arm][0].items() <= result["config"].items()
    assert re.fullmatch("unknown|[0-9a-f]{7,}(-dirty)?", result["commit"])
    assert set(result["machine"]) == {"processor", "capability", "device", "threads", "torch"}
    assert result["machine"]["torch"] == torch.__version__ and result["minutes"] >= 0
    categories = [*CATEGORIES, "average"]
    for policy in ("base", "ppo"):
        assert list(result[policy]["divergence_auc"]) == categories
    for where in ("inside", "outside"):
        change = result["ppo"]["change"][where]
        assert list(change) == categories and change["average"] > 0
    assert [list(entry)[:2] for entry in result["curve"]] == [["step", "train"]]


KINDS = {"own-image": ["--minibatches", "1"], "shuffled": ["--guidance", "2"], "mask": [],
         "factored": [], "confused": []}


@pytest.mark.parametrize("arm", list(KINDS))
def test_an_arm_stopped_and_resumed_ends_bitwise_equal(arm, run_arms, monkeypatch, tmp_path):
    """Ctrl-C in the second of three rollouts, which is still ended, and the same command again. An
    objective remembers nothing from one rollout to the next, and what it draws follows from the
    tokens."""
    flags = ["--steps", "3", *KINDS[arm]]
    run_arms(f"{arm}-0", flags=flags)
    kept = tmp_path / "whole"
    shutil.move(tmp_path / "runs" / "ablation" / f"{arm}-0", kept)
    shutil.move(tmp_path / "results" / f"{arm}-0.json", kept / "result.json")

    decode, calls = train.decode_ids, []

    def press_ctrl_c(*args):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return decode(*args)
    monkeypatch.setattr(train, "decode_ids", press_ctrl_c)
    with pytest.raises(UserError, match="stopped after step 2"):
        run_arms(f"{arm}-0", flags=flags)
    assert not (tmp_path / "results" / f"{arm}-0.json").exists()
    run_arms(f"{arm}-0", flags=flags)
    assert len(calls) == 3

    out = tmp_path / "runs" / "ablation" / f"{arm}-0"
    assert (out / "ppo.safetensors").read_bytes() == (kept / "ppo.safetensors").read_bytes()
    whole, resumed = (json.loads(path.read_text()) for path in
                      (kept / "result.json", tmp_path / "results" / f"{arm}-0.json"))
    for key in ("base", "ppo", "curve", "config"):
        assert whole[key] == resumed[key]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    used = [1, 1, 1] if arm == "own-image" else [0, 0, 0]
    assert [entry["truth_probability"] for entry in log] == used


def test_an_arm_of_ppo_alone_is_what_train_py_does(run_arms, base, tmp_path):
    """The same settings, the same bits: an arm is no loop of its own."""
    run_arms("group-5", flags=["--steps", "2"])
    out = tmp_path / "by_hand"
    shutil.copytree(base, out)
    train.main(["--stage", "ppo", "--preset", "smoke", "--out", str(out), "--seed", "5",
                "--advantage", "group", "--steps", "2", *SMALL])
    arm = tmp_path / "runs" / "ablation" / "group-5"
    assert (arm / "ppo.safetensors").read_bytes() == (out / "ppo.safetensors").read_bytes()


def test_a_run_that_has_its_result_is_left_alone_and_one_that_lacks_it_gets_it(run_arms, capsys):
    folder = run_arms("group-0", flags=["--steps", "1"])
    result, weights = folder / "results/group-0.json", folder / "runs/ablation/group-0"
    before = result.read_bytes(), (weights / "ppo.safetensors").stat().st_mtime_ns
    run_arms("group-0", flags=["--steps", "1"])
    assert before == (result.read_bytes(), (weights / "ppo.safetensors").stat().st_mtime_ns)
    assert "has its result already" in capsys.readouterr().out
    with pytest.raises(UserError, match="group-0.json: has other settings; give another"):
        run_arms("group-0", flags=["--steps", "2"])     # another lr's result stood for this one's
    result.unlink()                     # stopped between its weights and its result
    run_arms("group-0", flags=["--steps", "1"])
    assert result.read_bytes() == before[0]
    result.unlink()
    with pytest.raises(UserError, match="was trained with other settings; remove it to run"):
        run_arms("group-0", flags=["--steps", "2"])


def test_the_recipe_is_the_default_and_a_preset_or_a_flag_replaces_it():
    cfg, _ = ablation.settings_of("truth-4", "tiny", ["--steps", "40"])
    expected = ablation.RECIPE | {"steps": 40, "seed": 4, "ground_truth": [3, 22, 60]}
    assert expected.items() <= asdict(cfg).items()
    cfg, _ = ablation.settings_of("pair-0", "smoke", [])
    assert train.PRESETS["smoke"]["ppo"].items() <= (asdict(cfg) | {"out": "runs/smoke"}).items()


def test_a_base_that_lacks_a_stage_is_refused(run_arms, base, tmp_path):
    poor = tmp_path / "poor"
    shutil.copytree(base, poor)
    (poor / "reward.safetensors").unlink()
    with pytest.raises(UserError, match="--base .*poor: has no reward.safetensors"):
        run_arms("group-0", base=poor)
    with pytest.raises(UserError, match="--base nowhere: has no tokenizer.safetensors"):
        run_arms("group-0", base="nowhere")
    assert not (tmp_path / "runs").exists()


def test_each_seed_may_have_a_base_of_its_own(run_arms, base, tmp_path):
    shutil.copytree(base, tmp_path / "base4")
    run_arms("group-4", base=tmp_path / "base{seed}", flags=["--steps", "1"])
    assert (tmp_path / "results" / "group-4.json").exists()
    with pytest.raises(UserError, match="base5: has no tokenizer.safetensors"):
        run_arms("group-5", base=tmp_path / "base{seed}")


def test_a_grid_has_a_folder_for_each_learning_rate(run_arms, capsys):
    """ARM-SEED alone fixed a run's folder and result: the second learning rate of an arm was
    "has its result already"."""
    for lr in ("1e-3", "3e-3"):
        where = f"grid/{lr}"
        flags = ["--steps", "1", "--lr", lr, "--runs", where, "--results", where]
        folder = run_arms("group-0", "pair-0", flags=flags)
        assert (folder / where / "pair-0" / "ppo.safetensors").exists()
    results = sorted((folder / "grid").glob("*/*.json"))
    values = [json.loads(path.read_text())["validation_s_g"] for path in results]
    assert len(values) == 4 and all(0 <= value <= 1 for value in values)
    capsys.readouterr()
    ablation.main(["--grid", *map(str, results)])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["0.001", "0.003"]
    assert [row[0] for row in rows[1:]] == ["group", "pair", "mean"]
    shown = [float(cell) for row in rows[1:] for cell in row[1:]]
    in_order = [100 * values[i] for i in (0, 2, 1, 3)]      # group at both rates, pair at both
    in_order += [50 * (values[0] + values[1]), 50 * (values[2] + values[3])]
    assert shown == pytest.approx(in_order, abs=0.06)


def test_a_result_without_a_validation_score_is_in_no_grid(tmp_path):
    path = write(tmp_path / "pair-0.json", result(0, random_scores(0)))
    with pytest.raises(UserError, match="pair-0.json: has no 'validation_s_g'"):
        ablation.main(["--grid", path])


def test_arms_on_own_images_are_compared_by_their_oracle(run_arms, tmp_path, capsys):
    """--data once wanted a --test beside it, when own images had no test pairs."""
    write_pairs(world.pairworld(40, "train", 0), tmp_path / "own")
    flags = ["--steps", "1", "--data", str(tmp_path / "own" / "pairs.json")]
    run_arms("group-0", "pair-0", flags=flags)
    capsys.readouterr()
    ablation.main(["--compare", "results/pair-0.json", "--baseline", "results/group-0.json"])
    lines = capsys.readouterr().out.splitlines()
    assert "pair accuracy" in lines[0] and "heldout s_g" in lines[0] and "oracle" not in lines[0]


def test_a_base_does_not_replace_other_weights(run_arms, base, tmp_path):
    """Two bases' runs under one name would be compared as one."""
    out = tmp_path / "runs" / "ablation" / "group-0"
    shutil.copytree(base, out)
    tensors, meta = load_weights(out / "pretrain.safetensors")
    tensors["norm.weight"] = tensors["norm.weight"] * 2
    save_weights(out / "pretrain.safetensors", tensors, **meta)
    before = (out / "pretrain.safetensors").read_bytes()
    with pytest.raises(UserError, match="pretrain.safetensors is there already and differs"):
        run_arms("group-0")
    assert (out / "pretrain.safetensors").read_bytes() == before
    assert not (out / "ppo.state").exists()


@pytest.mark.parametrize("words, says", [
    (["critic-0"], "critic-0: should be ARM-SEED, ARM one of group, pair"),
    (["group"], "group: should be ARM-SEED"),
    (["group-0", "--seed", "1"], "--seed: arm group and the run's name set this"),
    (["group-0", "--advantage=pair"], "--advantage=pair: arm group and the run's name set this"),
    (["group-0", "--sample", "3"], "did you mean --samples"),
    (["group-0", "--out", "x"], "--out: goes with --compare"),
    (["truth-0", "--samples", "2"], "should be at least 3, since ground truth"),
    ([], "say one of: ARM-SEED"), (["--baseline", "y"], "say one of: ARM-SEED"),
    (["group-0", "--compare", "x", "--baseline", "y"], "say one of: ARM-SEED"),
    (["--compare", "x"], "--compare and --baseline go together"),
    (["--compare", "--baseline", "y"], "expected at least one argument"),
    (["--compare", "x", "--baseline", "y", "--seed", "1"], "--seed: goes with ARM-SEED"),
    (["--difference", "nowhere"], "nowhere.tokenizer.safetensors: no such checkpoint"),
])
def test_what_is_typed_wrong_is_one_line(words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says) as error:
        ablation.main(words)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_model_without_pairworlds_images_has_no_true_difference(base, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(base, run)
    cfg = VQConfig(image_size=64, ch=8, norm_groups=4, z_channels=8, codebook_size=32,
                   codebook_dim=4)
    save_weights(run / "tokenizer.safetensors", VQModel(cfg).state_dict(), config=asdict(cfg))
    tensors, meta = load_weights(run / "pretrain.safetensors")
    model = ImageModel(ModelConfig(**meta["config"] | {"n_image": cfg.grid ** 2}))
    for policy in ("pretrain", "ppo"):
        save_weights(run / f"{policy}.safetensors", model.state_dict(), config=asdict(model.cfg))
    with pytest.raises(UserError, match="is no model of PairWorld"):
        ablation.main(["--difference", str(run)])


# --------------------------------------------------------------------------------------------------
# Where the prompts differ

def test_divergence_auc():
    mask = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]], bool)
    d = np.array([[4, 3, 2, 1], [1, 2, 3, 4], [5, 5, 5, 5], [1, 2, 3, 4]])
    auc = ablation.divergence_auc(d, mask)
    assert auc[:3].tolist() == [1, 0, 0.5] and np.isnan(auc[3])


def test_the_difference_of_a_run_is_its_results(run_arms, capsys):
    """--difference prints what the result of an arm holds, from the weights alone."""
    folder = run_arms("weights-0", flags=["--steps", "1"])
    result = json.loads((folder / "results" / "weights-0.json").read_text())
    capsys.readouterr()
    ablation.main(["--difference", "runs/ablation/weights-0"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    columns = [*CATEGORIES, "average"]
    assert rows[1] == rows[5] == columns
    printed = {" ".join(row[:-7]): row[-7:] for row in rows[2:4] + rows[6:]}

    def cells(values, decimals):
        return [f"{values[column]:.{decimals}f}" for column in columns]
    change = result["ppo"]["change"]
    assert printed == {
        "D_t, base": cells(result["base"]["divergence_auc"], 2),
        "D_t, ppo": cells(result["ppo"]["divergence_auc"], 2),
        "inside the difference": cells(change["inside"], 3),
        "outside the difference": cells(change["outside"], 3)}


@torch.no_grad()
def test_an_unchanged_policy_has_changed_nowhere_and_finds_the_difference_as_before(base):
    vq, model = load_policy(base, "pretrain", "cpu")
    pairs = world.pairworld(12, "test", 0)
    _, change = ablation.true_difference(vq, pairs, model, model, twins=False)
    assert set(change["inside"].values()) == set(change["outside"].values()) == {0.0}
    auc, size = ablation.true_difference(vq, pairs, model, model, twins=True)
    assert all(0 <= value <= 1 for value in auc.values())
    assert size["inside"]["average"] > 0


# --------------------------------------------------------------------------------------------------
# The interval

UNEQUAL = ["color"] * 4 + ["counting"] * 2 + ["text"]
EACH = [c for c in CATEGORIES for _ in range(2)]


def report(scores, categories):
    """What `eval_paircomp.paircomp` says of scores (P, 4), here the same of all judges. A pair is
    right where all its scores are 1."""
    scores = np.asarray(scores, np.float64)
    right = (scores == 1).all(1).astype(int)
    of_judges = {judge: eval_paircomp.summarize(scores, categories) for judge in JUDGES}
    pairs = {judge: scores.tolist() for judge in JUDGES}
    pairs |= {"pair_accuracy": right.tolist(), "categories": list(categories)}
    accuracy = eval_paircomp.category_means(right, categories)
    return {**of_judges, "pair_accuracy": accuracy, "pairs": pairs}


def result(seed, scores, categories=EACH):
    """A result: a run of a seed with the scores at its end, and its quick tests at rollouts 0, 20,
    40, ..."""
    curve = [{"step": 20 * i, **{judge: {"s_a": s, "s_g": s} for judge in JUDGES},
              "pair_accuracy": s} for i, s in enumerate((0.5, 0.6, 0.7))]
    auc = {"divergence_auc": {"average": 0.6}}
    change = {"change": {"inside": {"average": 0.03}, "outside": {"average": 0.01}}}
    base = report(np.full_like(scores, 0.25), categories) | auc
    return {"base": base, "ppo": report(scores, categories) | auc | change, "curve": curve,
            "config": {"seed": seed}}


def random_scores(seed, categories=EACH):
    return np.random.default_rng(seed).uniform(0.3, 0.7, (len(categories), 4))


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


@pytest.fixture
def runs(tmp_path):
    """Two arms of two seeds: a folder as a run leaves it and three files; the second arm is 10
    points better throughout."""
    (tmp_path / "pair-0").mkdir()
    write(tmp_path / "pair-0" / "paircomp.json", result(0, random_scores(0)))
    pair = [str(tmp_path / "pair-0"), write(tmp_path / "pair-1.json", result(1, random_scores(1)))]
    better = [write(tmp_path / f"pair-choice-{s}.json", result(s, random_scores(s) + 0.1))
              for s in (0, 1)]
    return {"pair": pair, "pair-choice": better}


def test_the_interval_by_hand():
    """Three seeds: mean 2, standard deviation 1, Student's quantile 4.30."""
    mean, low, high = ablation.interval(np.array([1.0, 2.0, 3.0]))
    half = 4.30 / 3 ** 0.5
    assert (mean, low, high) == pytest.approx((2, 2 - half, 2 + half))
    assert ablation.interval(np.full(4, 0.3)) == pytest.approx((0.3, 0.3, 0.3))


def test_one_seed_says_nothing_of_the_others():
    assert ablation.interval(np.array([0.5])) == (0.5, -math.inf, math.inf)


@pytest.mark.parametrize("seeds", [2, 5, 10, 14])
def test_the_interval_holds_the_truth_as_often_as_it_says(seeds):
    """It was once a percentile bootstrap over seeds and pairs, which is too narrow for few seeds:
    of three it is the lowest to the highest, which holds the truth in three of four cases."""
    values = 0.1 + np.random.default_rng(5).normal(size=(2000, seeds))
    found = [ablation.interval(row) for row in values]
    hits = np.mean([low <= 0.1 <= high for _, low, high in found])
    assert hits == pytest.approx(0.95, abs=0.015)


# --------------------------------------------------------------------------------------------------
# Metrics, pairing, table

def test_metrics_of_a_report_by_hand():
    scores = [[0.5, 0.5, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]
    metrics = ablation.metrics_of(report(scores, ["color", "color", "text"]))
    of_judges = {f"{judge} {m}" for judge in JUDGES for m in ("s_a", "s_g", "gap")}
    assert set(metrics) == of_judges | {"pair accuracy"}
    s_a, s_g = (0.75 + 1) / 2, (0.5 ** 1.5 + 1) / 2     # of color 0.75 and sqrt 1/2 / 2, of text 1
    for judge in JUDGES:
        assert metrics[f"{judge} s_a"] == pytest.approx(s_a)
        assert metrics[f"{judge} s_g"] == pytest.approx(s_g)
        assert metrics[f"{judge} gap"] == pytest.approx(s_a - s_g)
    assert metrics["pair accuracy"] == 0.5


def test_the_means_are_those_of_the_report():
    """The macro average of the pairs' metrics is the "average" that training prints."""
    run = {0: result(0, random_scores(0, UNEQUAL), UNEQUAL)}
    table, _ = ablation.compare(run, run)
    for judge in JUDGES:
        for key, value in run[0]["ppo"][judge]["average"].items():
            assert table[f"{judge} {key}"][:2] == pytest.approx([value, value], abs=1e-12)
            assert table[f"{judge} {key}"][2] == 0


def test_runs_are_paired_by_seed():
    """Seeds that scatter far more than the arms differ: seed by seed and pair by pair the
    difference is the same, and so it is certain."""
    def runs_of(plus, seeds):
        return {s: result(s, np.full((12, 4), 0.1 * s + plus)) for s in seeds}
    arm, baseline = runs_of(0.15, (2, 1, 5)), runs_of(0.1, (6, 1, 2))
    table, seeds = ablation.compare(arm, baseline)
    assert seeds == [1, 2]              # the means are of the seeds that both have
    assert table["heldout s_a"] == pytest.approx([0.3, 0.25, 0.05, 0.05, 0.05], abs=1e-9)
    swapped = ablation.compare(baseline, arm)[0]
    assert swapped["heldout s_a"][2] == pytest.approx(-0.05)


def test_the_table_has_a_row_an_arm_and_intervals_but_for_the_baseline():
    scores = np.full((12, 4), 0.5)
    baseline = {s: result(s, scores) for s in (0, 1, 2)}
    better = {s: result(s, scores + 0.1) for s in (0, 1)}
    text = ablation.markdown({"better": better}, "plain", baseline)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert rows[0][:2] == ["arm", "seeds"] and rows[0][-1] == "pair accuracy"
    assert {len(row) for row in rows} == {len(rows[0])} and len(rows) == 5
    assert rows[2] == ["plain", "3", "50.0", "50.0", "0.0", "50.0", "50.0", "0.0"]
    assert rows[3][:3] == ["base", "3", "25.0 (-25.0 [-25.0, -25.0])"]
    assert rows[4][:4] == ["better", "2"] + ["60.0 (+10.0 [+10.0, +10.0])"] * 2


def test_two_judges_rank_the_arms():
    """By hand: the held-out judge says b, c, a; the oracle, which has its own opinion, c, b, a."""
    scores = np.full((12, 4), 0.5)
    arms = {name: {s: result(s, scores + gain) for s in (0, 1)}
            for name, gain in {"a": 0.0, "b": 0.2, "c": 0.1}.items()}
    for run in arms["c"].values():
        run["ppo"]["oracle"] = result(0, scores + 0.3)["ppo"]["oracle"]
    heldout, oracle, accuracy = ablation.ranking(arms, arms["a"])
    assert heldout == "heldout s_g: b > c > a"
    assert oracle == "oracle s_g: c > b > a (2 of 3 pairs of arms in the order of heldout s_g)"
    assert accuracy.startswith("pair accuracy: ")


def test_categories_and_curves_are_differences_too():
    """By hand: an arm that is 10 points better throughout, on two of the baseline's three seeds,
    and whose quick tests are 5 points better."""
    scores = np.full((12, 4), 0.5)
    plain = {s: result(s, scores - 0.1 * s) for s in (0, 1, 2)}
    better = {s: result(s, scores - 0.1 * s + 0.1) for s in (1, 2)}
    for run in better.values():
        for test in run["curve"]:
            test["heldout"] = {"s_g": test["heldout"]["s_g"] + 0.05}
    arms = {"plain": plain, "better": better}
    text = ablation.categories_markdown(arms, "plain")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert rows[0] == ["arm", *plain[0]["ppo"]["heldout"]]
    assert set(rows[2][1:]) == {"40.0"} and set(rows[3][1:]) == {"+10.0"}
    assert ablation.curve_line(better, plain, ablation.judge_of_all(arms)) == (
        "mean of the quick tests, heldout s_g: 70.0 (+5.0 [+5.0, +5.0])")


def test_a_seed_that_is_hard_for_all_is_no_merit_of_an_arm():
    """The story: `pair` led by 14 points on seed 1, where `group` had a bad run, and five of the
    six other arms led too. Here `late` has run on the easy seeds alone: the fit finds that it is no
    better, and that `better` is by 5 points, as these runs have no noise. Where the baseline's run
    of one seed has noise, a third of it is found to be that, by two arms that ran on the same two
    seeds."""
    scores = np.full((12, 4), 0.5)

    def of(gain, seeds):
        return {s: result(s, scores + gain + 0.1 * s) for s in seeds}

    arms = {"plain": of(0, (0, 1, 2)), "late": of(0, (2, 3)), "better": of(0.05, (0, 1, 3))}
    effects, std = ablation.fit(arms, "plain")
    assert effects["late"][0] == pytest.approx(0) and effects["better"][0] == pytest.approx(5)
    assert std == pytest.approx(0, abs=1e-9)
    assert "| better | +5.0 | 0.0 |" in ablation.fit_markdown(arms, "plain")

    arms = {name: of(0, (0, 1)) for name in ("plain", "a", "b", "c")}
    arms["a"] = of(0, (1,))             # it ran where the baseline was lucky
    arms["plain"][1] = result(1, scores + 0.1 + 0.1)
    difference = ablation.compare(arms["a"], arms["plain"])[0]["heldout s_g"][2]
    effects, std = ablation.fit(arms, "plain")
    effect, error = effects["a"]
    assert 100 * difference == pytest.approx(-10) and effect == pytest.approx(-20 / 3)
    assert error > 0 and std > 0

    alone = {"plain": of(0, (0,)), "a": of(0.1, (0,))}
    assert math.isnan(ablation.fit(alone, "plain")[1])      # no run is left to tell noise from


def test_without_a_judge_that_all_have_the_training_judge_is_compared():
    runs = {s: result(s, np.full((12, 4), 0.5)) for s in (0, 1)}
    assert ablation.judge_of_all({"a": runs}) == "heldout"
    del runs[1]["ppo"]["heldout"]
    assert ablation.judge_of_all({"a": runs}) == "train"


def test_the_difference_is_reported_before_and_after():
    arm = {s: result(s, random_scores(s)) for s in (0, 1)}
    assert ablation.difference_report(arm) == [
        "divergence_auc base: average 0.60", "divergence_auc ppo: average 0.60",
        "change inside the true difference, nats a token: average 0.030",
        "change outside the true difference, nats a token: average 0.010"]


# --------------------------------------------------------------------------------------------------
# Files

def test_runs_are_read_by_arm_and_seed(runs):
    arms = ablation.read_arms([*runs["pair-choice"], *runs["pair"]])
    assert list(arms) == ["pair-choice", "pair"]
    assert all(list(arm) == [0, 1] for arm in arms.values())
    assert arms["pair"][0]["ppo"]["heldout"] == report(random_scores(0), EACH)["heldout"]


@pytest.mark.parametrize("lacking", ["base", "ppo", "curve", "config"])
def test_a_file_that_is_no_result_is_refused(tmp_path, lacking):
    whole = result(0, random_scores(0))
    path = write(tmp_path / "pair-0.json", {k: v for k, v in whole.items() if k != lacking})
    with pytest.raises(UserError, match=rf"pair-0.json: has no '{lacking}'"):
        ablation.read_arms([path])


@pytest.mark.parametrize("content, says", [("[]", "has no 'base'"), ("null", "has no 'base'"),
                                           ("{", "broken JSON at line 1")])
def test_a_file_that_is_no_object_is_refused(tmp_path, content, says):
    with pytest.raises(UserError, match=says):
        ablation.read_arms([write(tmp_path / "pair-0.json", content)])


def test_a_run_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="pair-7: no such file"):
        ablation.read_arms([tmp_path / "pair-7"])
    (tmp_path / "pair-8").mkdir()
    with pytest.raises(UserError, match="pair-8.paircomp.json: no such file"):
        ablation.read_arms([tmp_path / "pair-8"])


def test_a_seed_that_comes_twice_is_refused(tmp_path):
    """The seed is that of the config, not of the name: a copied run would count twice."""
    paths = [write(tmp_path / f"pair-{i}.json", result(0, random_scores(0))) for i in (0, 1)]
    with pytest.raises(UserError, match="pair-1.json: arm pair has a run of seed 0 already"):
        ablation.read_arms(paths)


def test_runs_without_a_seed_in_common_are_refused():
    arm = {s: result(s, random_scores(s)) for s in (1, 0)}
    with pytest.raises(UserError, match=r"no seed in common: \[0, 1\] and \[2\]"):
        ablation.compare(arm, {2: result(2, random_scores(2))})


def test_runs_from_different_bases_are_refused():
    """An arm that was begun from another base model would win or lose by that."""
    baseline = {0: result(0, random_scores(0))}
    other = {0: result(0, random_scores(0))}
    other[0]["base"]["train"]["average"]["s_g"] += 0.01
    with pytest.raises(UserError, match="runs of seed 0 began with different base models"):
        ablation.compare(other, baseline)


# --------------------------------------------------------------------------------------------------
# --compare on the command line, and the images of plots.py

def test_the_table_and_the_image_on_the_command_line(runs, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    ablation.main(["--compare", *runs["pair"], *runs["pair-choice"], "--baseline", *runs["pair"],
                   "--out", str(tmp_path / "x.png")])
    out = capsys.readouterr().out
    names = [line.split("|")[1].strip() for line in out.splitlines()[2:5]]
    assert names == ["pair", "base", "pair-choice"]                     # the baseline only once
    assert "(+10.0 [+10.0, +10.0])" in out
    assert out.splitlines()[-1] == f"image: {tmp_path / 'x.png'}"
    with Image.open(tmp_path / "x.png") as image:
        assert min(image.size) > 300 and len(image.convert("RGB").getcolors(10 ** 6)) > 50


def test_without_matplotlib_there_is_a_table_but_no_image(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        ablation.main(["--compare", *runs["pair-choice"], "--baseline", *runs["pair"],
                       "--out", str(tmp_path / "x.png")])
    assert "| pair-choice | 2 |" in capsys.readouterr().out
    assert not (tmp_path / "x.png").exists()


def without(result, *parts):
    """A result as a run leaves it that had no such judge, or no oracle and pair accuracy."""
    def kept(report):
        return {k: v for k, v in report.items() if k not in parts}
    out = result | {"curve": [kept(entry) for entry in result["curve"]]}
    for policy in ("base", "ppo"):
        report = kept(result[policy])
        out[policy] = report | {"pairs": kept(report["pairs"])}
    return out


def test_arms_of_a_real_model_are_compared_by_what_all_runs_have(tmp_path, capsys):
    """A run with --judge alone has no held-out judge, and one with --test has neither oracle nor
    pair accuracy nor D_t's true difference. Such runs, all arms of a real model, ended in a
    traceback, KeyError: 'heldout'. They are compared by what they all have, and a line says what is
    missing in which run."""
    pytest.importorskip("matplotlib")
    no_heldout = [without(result(s, random_scores(s)), "heldout") for s in (0, 1)]
    lost = "oracle", "pair_accuracy", "divergence_auc", "change"
    only_train = [without(result(s, random_scores(s) + 0.1), "heldout", *lost) for s in (0, 1)]
    group = [write(tmp_path / f"group-{s}.json", no_heldout[s]) for s in (0, 1)]
    pair = [write(tmp_path / f"pair-{s}.json", only_train[s]) for s in (0, 1)]
    ablation.main(["--compare", *pair, "--baseline", *group, "--out", str(tmp_path / "x.png")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| arm | seeds | train s_g |"
    assert lines[4].startswith("| pair | 2 | 60.2 (+10.2 [")
    assert lines[6] == ("not compared: heldout (not in group-0; group-1; pair-0; pair-1), "
                        "oracle (not in pair-0; pair-1), pair_accuracy (not in pair-0; pair-1)")
    assert any(line.startswith("  change inside") for line in lines)    # of group, which has it
    assert (tmp_path / "x.png").stat().st_size > 0

    # Every judge alone, and runs of an arm that differ in what they have
    ablation.main(["--compare", *pair, "--baseline", *pair])
    assert capsys.readouterr().out.splitlines()[0] == "| arm | seeds | train s_g |"
    mixed = [write(tmp_path / "mixed-0.json", result(0, random_scores(0))), pair[1]]
    shutil.copy(mixed[1], tmp_path / "mixed-1.json")
    ablation.main(["--compare", mixed[0], str(tmp_path / "mixed-1.json"), "--baseline", *group])
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "| arm | seeds | train s_g |" and "(not in mixed-1)" in out


def test_arms_that_were_run_with_a_test_of_their_own_are_compared(run_arms, tmp_path, capsys):
    """The same with real files: --test PairComp.json, in a run's own folder."""
    entries = [{"category": f"{name} difference", "caption1": "a red circle", "caption2": "a dog"}
               for name in ("Color", "Text")]
    test = write(tmp_path / "PairComp.json", entries)
    run_arms("group-0", "pair-0", flags=["--steps", "1", "--test", test])
    capsys.readouterr()
    ablation.main(["--compare", "runs/ablation/pair-0", "--baseline", "runs/ablation/group-0"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| arm | seeds | heldout s_g |") and "oracle" not in lines[0]
    assert lines[6].startswith("not compared: oracle (not in group-0; pair-0), pair_accuracy")


def test_a_baseline_is_one_arm(runs):
    says = "--baseline: should be the runs of one arm, found pair, pair-choice"
    with pytest.raises(UserError, match=says):
        ablation.main(["--compare", *runs["pair"], "--baseline", *runs["pair"],
                       *runs["pair-choice"]])


def test_what_cannot_be_compared_leaves_with_one_line_and_a_status(runs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ablation.py", "--compare", runs["pair-choice"][0],
                                      "--baseline", runs["pair"][1]])
    with pytest.raises(SystemExit) as end:          # python prints its code and leaves with 1
        runpy.run_path(ablation.__file__, run_name="__main__")
    assert end.value.code == "error: no seed in common: [0] and [1]; runs are paired by seed"
    assert not capsys.readouterr().out


def log_line(stage, step, **values):
    return json.dumps({"stage": stage, "step": step, "seconds": 1.0, **values}) + "\n"


@pytest.fixture
def run_log(tmp_path):
    """A run folder with a log of all four stages and of lines that belong to no step."""
    test = {judge: {"s_a": 0.5, "s_g": 0.4} for judge in JUDGES} | {"pair_accuracy": 0.6}
    lines = [log_line("tokenizer", 0, psnr=10.0), json.dumps({"stage": "tokenizer", "report": {}})]
    lines[1] += "\n"
    lines += [log_line("pretrain", 0, loss=3.0), log_line("reward", 0, loss_train=1.0)]
    for step in range(3):
        values = dict(reward=0.5, kl=0.1, entropy=1.0, clipfrac=0.0, pg_loss=0.0)
        lines.append(log_line("ppo", step, **values, **({"test": test} if step == 0 else {})))
    (tmp_path / "log.jsonl").write_text("".join(lines))
    return tmp_path


def test_curves_are_drawn_of_a_log_on_the_command_line(run_log, capsys):
    pytest.importorskip("matplotlib")
    plots.main([str(run_log)])
    assert capsys.readouterr().out == f"curves: {run_log / 'curves.png'}\n"
    with Image.open(run_log / "curves.png") as image:
        assert min(image.size) > 500 and len(image.convert("RGB").getcolors(10 ** 6)) > 50


def test_curves_of_a_run_without_tests_or_judges_have_no_empty_legends(run_log, monkeypatch):
    """A run with --data and without --test has nothing to test on, and one with --judge trains no
    judges. Their panels had a legend of nothing, of which matplotlib warned after each such run."""
    plt = pytest.importorskip("matplotlib.pyplot")
    path = run_log / "log.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [{k: v for k, v in e.items() if k != "test"} for e in entries if e["stage"] != "reward"]
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    plots.draw_curves(run_log)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.draw_curves(run_log)
    monkeypatch.undo()
    for figure, n_legends in zip(figures, (2, 0)):
        legends = [ax.get_legend() for ax in figure.axes]
        assert sum(legend is not None for legend in legends) == n_legends
        plt.close(figure)
    titles = [ax.get_title() for ax in figures[1].axes]
    assert titles[-1] == "ppo: s_g on held-out pairs: not tested"


def test_without_matplotlib_curves_are_not_drawn_and_it_says_how(run_log, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    says = plots.draw_curves(run_log)
    assert "pip install matplotlib" in says and f"python -m extras.plots {run_log}" in says
    assert not (run_log / "curves.png").exists()


@pytest.mark.parametrize("words", [[], ["nowhere"], ["one", "two"]])
def test_curves_want_one_run_folder(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="wants one run folder, with a log.jsonl"):
        plots.main(words)


# --------------------------------------------------------------------------------------------------
# Gradients

def test_signal_is_told_from_noise():
    """By hand, in 2000 dimensions: a common part of length 1, noise of length 2 (an arm), 1 (the
    ruler); an arm that goes elsewhere."""
    generator = torch.Generator().manual_seed(0)
    signal, elsewhere = torch.eye(2000)[:2]
    noise = torch.randn(3, 64, 2000, generator=generator) / 2000 ** 0.5
    arms = torch.stack([signal + 2 * noise[0], 3 * elsewhere + noise[1], signal + noise[2]])
    found = gradients.compare_gradients(arms)
    norm, share, direction, up, gain = (values.tolist() for values, _ in found.values())
    assert norm == pytest.approx([5 ** 0.5, 10 ** 0.5, 2 ** 0.5], rel=0.02)
    assert share == pytest.approx([1 / 5, 9 / 10, 1 / 2], abs=0.02)
    assert direction == pytest.approx([1, 0, 1], abs=0.02)
    assert up == pytest.approx([5 ** -0.5, 0, 2 ** -0.5], abs=0.02)
    assert gain == pytest.approx([0, -5 ** -0.5, 2 ** -0.5 - 5 ** -0.5], abs=0.02)


def test_the_errors_are_those_of_another_draw():
    """The jackknife's errors of one draw are about the scatter of forty, and none where there is
    nothing to compare."""
    generator = torch.Generator().manual_seed(0)
    signal = torch.eye(300)[0]
    draws = []
    for _ in range(40):
        noise = torch.randn(2, 12, 300, generator=generator) / 300 ** 0.5
        draws.append(gradients.compare_gradients(torch.stack([signal + 2 * noise[0],
                                                              signal + noise[1]])))
    for column in ("norm", "up", "gain"):
        values, errors = (torch.stack(part) for part in zip(*(draw[column] for draw in draws)))
        torch.testing.assert_close(errors.mean(0), values.std(0), rtol=0.4, atol=1e-6)
    assert draws[0]["gain"][1][0] == 0


def test_the_gradient_is_that_of_the_objective():
    """At the policy that sampled: ratios are 1, and the KL to itself has no gradient."""
    weights = torch.rand(6, 5, requires_grad=True)
    logprobs = weights.log_softmax(-1)
    fixed, advantages = logprobs.detach(), torch.randn(6, 1)
    ppo.ppo_loss(logprobs, fixed, fixed, advantages, 0.2, 0.01)[0].backward(retain_graph=True)
    found = gradients.gradient(logprobs, advantages, [weights])
    torch.testing.assert_close(found, -weights.grad.flatten())


def test_gradients_of_a_run(base, capsys):
    """A row an arm but `tuned`, and those that do not learn from the images of `group` have others:
    the true ones, or of other pairs."""
    gradients.main([str(base), "--rollouts", "3"])
    lines = capsys.readouterr().out.splitlines()[1:]
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in lines)
    assert [*rows] == [*ARMS][:-1] + gradients.TRUTH_PARTS + ["REINFORCE"]
    assert len({rows[name] for name in ("pair", "truth", "own-image", "group", "confused")}) == 5
    with pytest.raises(UserError, match="--rollouts 2"):
        gradients.main([str(base), "--rollouts", "2"])


def test_the_parts_of_truth_add_up(base):
    found = gradients.gradients_of_run(str(base), "pretrain", 1)[:, 0]
    parts = found[len(gradients.NAMES):-1]
    assert (parts.norm(dim=1) > 0).all()
    torch.testing.assert_close(parts.sum(0), found[gradients.NAMES.index("truth")])
