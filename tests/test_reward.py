"""reward.py: which answer is yes, calibration, and that a judge's answer depends on the picture and the prompt alone."""
import numpy as np
import pytest
import torch
import torch.nn as nn

import data
import reward
from data import TextTokens
from reward import NO, YES, JudgeConfig, NetworkJudge, OracleJudge

KINDS = ["attend", "reader"]


def small(kind):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return reward.build_judge(JudgeConfig(kind=kind, width=32, n_layer=1, n_head=2)).eval()


@pytest.fixture(scope="module")
def pairs():
    return data.pairworld(24, "test", seed=3)


class Comparer(nn.Module):
    """A judge that needs no training: picture k is filled with the value k, and prompt [k] describes it."""

    def __init__(self, when_equal, when_not):
        super().__init__()
        self.answers = {True: when_equal, False: when_not}

    def look(self, picture):
        return picture[:, 0, 0, 0]

    def forward(self, features, prompts):
        logits = torch.zeros(len(prompts), 2)
        for row, f, p in zip(logits, features, prompts[:, -1]):
            row[self.answers[bool(f == p)]] = 6.0
        return logits


PICTURES = torch.tensor([[3.0, 5.0], [7.0, 4.0], [1.0, 9.0]])[..., None, None, None].expand(3, 2, 3, 8, 8)
PROMPTS = torch.tensor([[3, 5], [7, 4], [1, 9]])[..., None]


def test_judge_loss_has_yes_and_no_the_right_way_round():
    right, all_right = reward.judge_loss(Comparer(YES, NO), PICTURES, PROMPTS)
    wrong, all_wrong = reward.judge_loss(Comparer(NO, YES), PICTURES, PROMPTS)
    undecided, half_right = reward.judge_loss(Comparer(YES, YES), PICTURES, PROMPTS)          # says yes to everything
    assert right < 0.02 and wrong > 5 and right < undecided < wrong
    assert (all_right, half_right, all_wrong) == (1.0, 0.5, 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_judge_loss_teaches_every_part_of_the_network(kind, pairs):
    network = small(kind)
    pictures = reward.from_pixels(pairs.images[:4].reshape(-1, 32, 32, 3)).unflatten(0, (4, 2))
    prompts = torch.from_numpy(TextTokens().prompts([p for two in pairs.prompts[:4] for p in two], 48)).unflatten(0, (4, 2))
    loss, accuracy = reward.judge_loss(network, pictures, prompts)
    loss.backward()
    assert loss.isfinite() and loss.dim() == 0 and 0 <= accuracy <= 1 and not accuracy.requires_grad
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert sum((p.grad != 0).any().item() for p in network.parameters()) > 0.9 * len(list(network.parameters()))


def test_reward_is_the_softmax_share_of_yes():
    logits = torch.randn(50, 2) * 4
    want = logits.exp()[:, YES] / (logits.exp()[:, YES] + logits.exp()[:, NO])
    assert reward.answer_probability(logits).allclose(want, atol=1e-6)
    extreme = reward.answer_probability(torch.tensor([[0.0, -500.0], [-500.0, 0.0]]))
    assert extreme.tolist() == [1.0, 0.0]


def test_one_unsupported_word_is_enough_for_a_no_and_padding_does_not_count():
    support = torch.tensor([[9.0, 9.0, 9.0], [9.0, -9.0, 9.0], [-9.0, 9.0, 9.0]])
    real = torch.tensor([[True] * 3, [True] * 3, [False, True, True]])
    logits = reward.all_supported(support, real)
    assert logits.exp().sum(-1).allclose(torch.ones(3), atol=1e-5)                          # two log-probabilities
    assert logits.argmax(-1).tolist() == [YES, NO, YES]
    assert logits[1, YES].exp().item() == pytest.approx(torch.sigmoid(support[1]).prod().item(), rel=1e-4)


def test_certain_answers_stay_finite():
    for value in (200.0, -200.0):
        support = torch.full((1, 4), value, requires_grad=True)
        logits = reward.all_supported(support, torch.ones(1, 4, dtype=torch.bool))
        logits.sum().backward()
        assert logits.isfinite().all() and support.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_judge_gives_a_probability_for_each_picture_and_prompt(kind, pairs):
    judge = NetworkJudge(small(kind))
    images, prompts = pairs.images[:, 0], [two[0] for two in pairs.prompts]
    r = judge.score(images, prompts)
    assert r.shape == (24,) and r.dtype == torch.float32 and (0 <= r).all() and (r <= 1).all() and not r.requires_grad
    assert r.allclose(judge.score(images, prompts, batch=5), atol=1e-5)                     # batches change nothing
    assert judge.score(images[:1].repeat(24, 0), prompts).std() > 0                         # it reads the prompt
    assert judge.score(images, prompts[:1] * 24).std() > 0                                  # and looks at the picture


@pytest.mark.parametrize("kind", KINDS)
def test_left_padding_does_not_change_an_answer(kind, pairs):
    """A prompt is padded to the longest one in its call; its reward must not depend on its neighbours."""
    network = small(kind)
    prompt = torch.from_numpy(TextTokens().prompts([pairs.prompts[0][0]], 48))
    features = network.look(reward.from_pixels(pairs.images[:1, 0]))
    alone = network(features, prompt)
    for n in (1, 5, 20):
        padded = torch.nn.functional.pad(prompt, (n, 0), value=TextTokens.pad)
        assert network(features, padded).allclose(alone, atol=1e-4)


def test_the_two_judges_are_different_networks():
    """The held-out judge has to be able to disagree with the one that gives the rewards."""
    names = [set(small(kind).state_dict()) for kind in KINDS]
    assert type(small("attend")) is not type(small("reader")) and len(names[0] ^ names[1]) > len(names[0] & names[1])


# --- calibration

def test_a_calibrated_judge_has_no_calibration_error():
    rng = np.random.default_rng(0)
    p = rng.random(200_000)
    assert reward.calibration_error(p, rng.random(200_000) < p) < 0.01


@pytest.mark.parametrize("p, truth, error", [
    ([0.0] * 50 + [1.0] * 50, [False] * 50 + [True] * 50, 0.0),       # certain and right
    ([0.0] * 50 + [1.0] * 50, [True] * 50 + [False] * 50, 1.0),       # certain and wrong
    ([0.9] * 100, [True] * 100, 0.1),                                 # too modest
    ([0.8] * 100, [True, False] * 50, 0.3)])                          # too sure
def test_calibration_error_of_known_cases(p, truth, error):
    assert reward.calibration_error(np.array(p), np.array(truth)) == pytest.approx(error, abs=1e-9)


def test_calibration_error_does_not_depend_on_the_order_of_the_answers():
    rng = np.random.default_rng(1)
    p, truth = rng.random(500), rng.random(500) < 0.3
    order = rng.permutation(500)
    assert reward.calibration_error(p, truth) == pytest.approx(reward.calibration_error(p[order], truth[order]), abs=1e-9)


def test_calibration_error_of_equal_answers_does_not_depend_on_their_order():
    """Half of the coins at 0.5 come up heads: perfectly calibrated, also when the heads happen to be listed first."""
    assert reward.calibration_error(np.full(100, 0.5), np.array([True] * 50 + [False] * 50)) == pytest.approx(0, abs=1e-9)


# --- the oracle

def test_oracle_says_yes_to_the_own_prompt_and_no_to_the_twins(pairs):
    oracle = OracleJudge()
    for side in (0, 1):
        assert oracle.score(pairs.images[:, side], [two[side] for two in pairs.prompts]).tolist() == [1.0] * 24
        assert oracle.score(pairs.images[:, side], [two[1 - side] for two in pairs.prompts]).tolist() == [0.0] * 24


def test_report_of_a_perfect_and_of_a_blind_judge(pairs):
    class Blind:
        def score(self, images, prompts):
            return torch.full((len(prompts),), 0.9)
    perfect, blind = (reward.judge_report(judge, pairs.images, pairs) for judge in (OracleJudge(), Blind()))
    assert set(perfect) == {*data.CATEGORIES, "accuracy", "ece"}
    assert all(v == 1.0 for k, v in perfect.items() if k != "ece") and perfect["ece"] < 1e-6
    assert all(v == 0.5 for k, v in blind.items() if k != "ece") and 0.3 < blind["ece"] < 0.5
