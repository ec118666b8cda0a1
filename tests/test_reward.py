"""reward.py: which answer is yes, splices, calibration, and that a judge's answer depends on the picture and the prompt alone."""
import numpy as np
import pytest
import torch
import torch.nn as nn

import pairworld as world
import reward
from pairworld import TextTokens
from reward import NO, YES, Judge, JudgeConfig, NetworkJudge, OracleJudge

KINDS = ["attend", "convolve"]


def small(kind, n_layer=1):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return Judge(JudgeConfig(kind=kind, width=32, n_layer=n_layer, n_head=2)).eval()


def ids(prompts):
    return torch.from_numpy(TextTokens().prompts(prompts, 48))


def tensors(pairs, n):
    """The first n pairs as `judge_loss` wants them: pictures (n, 2, 3, 32, 32), prompts (n, 2, T)."""
    return (reward.from_pixels(pairs.images[:n].reshape(-1, 32, 32, 3)).unflatten(0, (n, 2)),
            ids([p for two in pairs.prompts[:n] for p in two]).unflatten(0, (n, 2)))


@pytest.fixture(scope="module")
def pairs():
    return world.pairworld(24, "test", seed=3)


class Comparer(nn.Module):
    """A judge that needs no training: picture k is filled with the value k, and prompt [k] describes it."""

    def __init__(self, when_equal, when_not):
        super().__init__()
        self.answers = {True: when_equal, False: when_not}

    def look(self, picture):
        flat = picture.flatten(1)
        return torch.where((flat == flat[:, :1]).all(-1), flat[:, 0], -1.0)                 # more than one value: nobody describes it

    def read(self, prompts):
        return prompts

    def forward(self, features, told, real):
        assert real.all() and len(features) == len(told) == len(real)
        logits = torch.zeros(len(told), 2)
        for row, f, p in zip(logits, features, told[:, -1]):
            row[self.answers[bool(f == p)]] = 6.0
        return logits


class FirstPixel(Comparer):
    def look(self, picture):
        return picture[:, 0, 0, 0]


PICTURES = torch.tensor([[3.0, 5.0], [7.0, 4.0], [1.0, 9.0]])[..., None, None, None].expand(3, 2, 3, 8, 8)
PROMPTS = torch.tensor([[3, 5], [7, 4], [1, 9]])[..., None]


def loss_of(network, splices=False, pictures=PICTURES, seed=0):
    return reward.judge_loss(network, pictures, PROMPTS, pictures if splices else None, np.random.default_rng(seed))


def test_judge_loss_has_yes_and_no_the_right_way_round():
    right, all_right = loss_of(Comparer(YES, NO))
    wrong, all_wrong = loss_of(Comparer(NO, YES))
    undecided, half_right = loss_of(Comparer(YES, YES))          # says yes to everything
    assert right < 0.02 and wrong > 5 and right < undecided < wrong
    assert (all_right, half_right, all_wrong) == (1.0, 0.5, 0.0)


@pytest.mark.parametrize("seed", range(4))                              # seeds draw both sizes of blocks
def test_a_splice_is_a_no_for_both_prompts(seed):
    right, all_right = loss_of(Comparer(YES, NO), splices=True, seed=seed)
    assert right < 0.02 and all_right == 1.0
    assert loss_of(Comparer(NO, YES), splices=True, seed=seed)[1] == 0.0
    assert loss_of(Comparer(YES, YES), splices=True, seed=seed)[1] == pytest.approx(2 / 6)  # of 3 pictures x 2 prompts, 2 are a yes
    fooled, most_right = loss_of(FirstPixel(YES, NO), splices=True, seed=seed)              # takes the splice for one of the twins
    assert fooled > right and most_right == pytest.approx(5 / 6)


@pytest.mark.parametrize("seed", range(4))
def test_a_splice_that_equals_a_twin_is_labelled_as_that_twin(seed):
    """The twins differ in one pixel, so whichever of them gives it, the splice is that twin."""
    pictures = torch.full_like(PICTURES, 2.0)
    pictures[..., 0, 0] = PICTURES[..., 0, 0]
    loss, accuracy = loss_of(FirstPixel(YES, NO), splices=True, pictures=pictures, seed=seed)
    assert loss < 0.02 and accuracy == 1.0
    assert loss_of(FirstPixel(NO, YES), splices=True, pictures=pictures, seed=seed)[1] == 0.0


def test_a_splice_of_reconstructions_is_told_by_the_renderings():
    """Found in review: a decoder spreads one token's change over its whole picture (GroupNorm), so no splice of two reconstructions ever
    equalled a twin, and all that showed the same as one were labelled no. The renderings know."""
    renderings = torch.full_like(PICTURES, 2.0)
    renderings[..., 0, 0] = PICTURES[..., 0, 0]                         # the twins differ in one pixel
    decoded = renderings + 0.01 * torch.randn(renderings.shape, generator=torch.Generator().manual_seed(0))
    assert not reward.splice(decoded, decoded, np.random.default_rng(0))[1].any()
    assert (reward.splice(decoded, renderings, np.random.default_rng(0))[1].sum(1) == 1).all()


# --- splices

@pytest.mark.parametrize("seed", range(6))
def test_every_block_of_a_splice_comes_from_one_of_the_two_pictures(seed):
    pictures = torch.randn(20, 2, 3, 32, 32)
    before = pictures.clone()
    spliced, equal = reward.splice(pictures, pictures, np.random.default_rng(seed))
    assert spliced.shape == (20, 1, 3, 32, 32) and equal.shape == (20, 2) and equal.dtype == torch.bool
    assert torch.equal(pictures, before) and not equal.any()
    blocks = (spliced == pictures).unflatten(-1, (8, 4)).unflatten(-3, (8, 4))              # (P, 2, 3, 8, 4, 8, 4)
    whole, any_of_it = (blocks.float().amin((2, 4, 6)), blocks.float().amax((2, 4, 6)))     # (P, 2, 8, 8)
    assert torch.equal(whole, any_of_it) and (whole.sum(1) == 1).all()                      # all of a block, and of one picture only
    share = whole[:, 0].mean((1, 2))
    assert 0.4 < share.mean() < 0.6 and share.min() > 0 and share.max() < 1


def test_splices_come_in_two_sizes_of_block_and_by_the_seed_alone():
    pictures = torch.stack([torch.zeros(40, 3, 32, 32), torch.ones(40, 3, 32, 32)], 1)
    grids = set()
    for seed in range(8):
        spliced = reward.splice(pictures, pictures, np.random.default_rng(seed))[0]
        assert torch.equal(spliced, reward.splice(pictures, pictures, np.random.default_rng(seed))[0])
        fours = spliced[:, 0, 0].unflatten(-1, (4, 8)).unflatten(-3, (4, 8))                # (P, 4, 8, 4, 8)
        grids.add(4 if torch.equal(fours.amin((2, 4)), fours.amax((2, 4))) else 8)
    assert grids == {4, 8}


def test_a_splice_says_truly_which_twins_it_equals(pairs):
    pictures = tensors(pairs, 24)[0]
    pictures[0, 1] = pictures[0, 0]                                                         # twins that are one picture
    found = []
    for seed in range(30):
        spliced, equal = reward.splice(pictures, pictures, np.random.default_rng(seed))
        assert equal.tolist() == [[torch.equal(s[0], twin) for twin in two] for s, two in zip(spliced, pictures)]
        assert equal[0].all() and not equal[1:].all(-1).any()
        found.append(equal[1:])
    assert {(True, False), (False, True), (False, False)} == {tuple(row) for row in torch.cat(found).tolist()}


@pytest.mark.parametrize("splices", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_judge_loss_teaches_every_part_of_the_network(kind, splices, pairs):
    network = small(kind)
    pictures, prompts = tensors(pairs, 4)
    loss, accuracy = reward.judge_loss(network, pictures, prompts, pictures if splices else None, np.random.default_rng(0))
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


def answer(support, real):
    """The logits of a judge whose words have this support (B, T)."""
    class Said(nn.Module):
        def forward(self, x):
            return support[..., None]
    network, (b, t) = small("attend"), support.shape
    network.support = Said()
    return network(torch.zeros(b, 16, 32), torch.zeros(b, t, 32), real)


def test_one_unsupported_word_is_enough_for_a_no_and_padding_does_not_count():
    support = torch.tensor([[9.0, 9.0, 9.0], [9.0, -9.0, 9.0], [-9.0, 9.0, 9.0]])
    real = torch.tensor([[True] * 3, [True] * 3, [False, True, True]])
    logits = answer(support, real)
    assert logits.exp().sum(-1).allclose(torch.ones(3), atol=1e-5)                          # two log-probabilities
    assert logits.argmax(-1).tolist() == [YES, NO, YES]
    assert logits[1, YES].exp().item() == pytest.approx(torch.sigmoid(support[1]).prod().item(), rel=1e-4)


def test_certain_answers_stay_finite():
    for value in (200.0, -200.0):
        support = torch.full((1, 4), value, requires_grad=True)
        logits = answer(support, torch.ones(1, 4, dtype=torch.bool))
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
    network = small(kind, n_layer=3)                    # more than one: what a layer leaks into the padding the next one reads
    prompt = ids([pairs.prompts[0][0]])
    features = network.look(reward.from_pixels(pairs.images[:1, 0]))
    told = network.read(prompt)
    alone = network(features, told, prompt != TextTokens.pad)
    for n in (1, 5, 20):
        padded = nn.functional.pad(prompt, (n, 0), value=TextTokens.pad)
        assert network.read(padded)[:, n:].allclose(told, atol=1e-4)
        assert network(features, network.read(padded), padded != TextTokens.pad).allclose(alone, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_alone_and_in_a_batch_gets_the_same_answer(kind, pairs):
    judge = NetworkJudge(small(kind, n_layer=3))
    images, prompts = pairs.images[:, 1], [two[1] for two in pairs.prompts]
    assert len({len(p.split()) for p in prompts}) > 3                                       # so that most are padded in the batch
    together = judge.score(images, prompts)
    alone = torch.cat([judge.score(images[i:i + 1], prompts[i:i + 1]) for i in range(len(prompts))])
    assert together.allclose(alone, atol=1e-5) and together.std() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_judge_learns_a_handful_of_pairs(kind):
    """After 350 steps one of the 24 answers was still wrong on a processor without AVX-512, whose sums round differently; 600 steps learn all
    of them from each of four starts."""
    pairs = world.pairworld(6, "test", seed=0)                                               # one of each category
    pictures, prompts = tensors(pairs, 6)
    network, rng = small(kind).train(), np.random.default_rng(0)
    assert reward.judge_report(NetworkJudge(small(kind)), pairs.images, pairs)["accuracy"] < 0.8
    optimizer = torch.optim.Adam(network.parameters(), betas=(0.9, 0.95))
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / 600)
        optimizer.zero_grad()
        loss, _ = reward.judge_loss(network, pictures, prompts, pictures if step > 100 else None, rng)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    report = reward.judge_report(NetworkJudge(network), pairs.images, pairs)
    assert report["accuracy"] == 1.0 and report["ece"] < 0.1


def test_the_two_judges_are_different_networks():
    """The held-out judge has to be able to disagree with the one that gives the rewards."""
    attend, convolve = (small(kind) for kind in KINDS)
    for part in ("eye", "layers"):                                                          # how they look and how they read
        one, other = ({(k, v.shape) for k, v in getattr(n, part).state_dict().items() if v.dim() > 1} for n in (attend, convolve))
        assert len(one ^ other) > len(one & other)
    assert type(attend.layers[0]) is not type(convolve.layers[0])


# --- calibration

def test_a_calibrated_judge_has_no_calibration_error():
    rng = np.random.default_rng(0)
    p = rng.random(200_000)
    assert reward.calibration_error(p, rng.random(200_000) < p) < 0.01


@pytest.mark.parametrize("p, truth, error", [
    ([0.0] * 50 + [1.0] * 50, [False] * 50 + [True] * 50, 0.0),       # certain and right
    ([0.0] * 50 + [1.0] * 50, [True] * 50 + [False] * 50, 1.0),       # certain and wrong
    ([0.9] * 100, [True] * 100, 0.1),                                 # too modest
    ([0.8] * 100, [True, False] * 50, 0.3),                           # too sure
    ([0.02, 0.08, 0.95, 1.0], [False, True, True, True], 0.2375)])    # equal intervals: the first two together, 0.45 off; the last two 0.025
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
    assert set(perfect) == {*world.CATEGORIES, "accuracy", "ece"}
    assert all(v == 1.0 for k, v in perfect.items() if k != "ece") and perfect["ece"] < 1e-6
    assert all(v == 0.5 for k, v in blind.items() if k != "ece") and 0.3 < blind["ece"] < 0.5
