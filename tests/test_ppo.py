"""ppo.py against slow loops, hand-worked cases and exact expectations."""
import inspect
import itertools
import math

import pytest
import torch

import ppo

torch.manual_seed(0)


@pytest.mark.parametrize("step, p", [
    (0, 1.0), (49, 1.0), (50, 1.0), (250, 0.625), (450, 0.25), (825, 0.125), (1200, 0.0),
    (5000, 0.0)])
def test_ground_truth_schedule_is_the_official_one(step, p):
    assert ppo.ground_truth_probability(step, 50, 450, 1200) == pytest.approx(p, abs=1e-12)


def test_ground_truth_can_be_switched_off():
    assert [ppo.ground_truth_probability(step, 0, 0, 0) for step in (0, 1, 100)] == [0, 0, 0]


def test_ground_truth_replaces_own_and_twins_where_it_is_used():
    tokens = torch.arange(2 * 2 * 4 * 3).view(16, 3)
    truth = -1 - torch.arange(2 * 2 * 3).view(2, 2, 3)
    use = torch.tensor([[True, False], [False, True]])
    before = tokens.clone()
    mixed, replaced = ppo.mix_ground_truth(tokens, truth, use)
    mixed = mixed.view(2, 2, 4, 3)
    replaced = replaced.view(2, 2, 4)
    for p in range(2):
        for side in range(2):
            for g in range(4):
                if use[p, side] and g == 0:
                    want, is_truth = truth[p, side], True
                elif use[p, side] and g == 1:
                    want, is_truth = truth[p, 1 - side], True
                else:
                    want, is_truth = before.view(2, 2, 4, 3)[p, side, g], False
                assert mixed[p, side, g].equal(want) and replaced[p, side, g] == is_truth
    assert tokens.equal(before)                     # the rollout itself is left alone


@pytest.mark.parametrize("kind, rewards", [
    ("own", [0.9, 0.5, 0.0, 1.0]), ("margin", [0.7, -0.5, -0.4, 0.5])])
def test_the_rewards_by_hand(kind, rewards):
    own = torch.tensor([0.9, 0.5, 0.0, 1.0]).view(1, 2, 2)
    twin = torch.tensor([0.2, 1.0, 0.4, 0.5]).view(1, 2, 2)
    reward = ppo.REWARDS[kind]
    got = reward(*(own, twin)[:len(inspect.signature(reward).parameters)])
    assert got.shape == own.shape
    assert got.flatten().tolist() == pytest.approx(rewards, abs=1e-6)


@pytest.mark.parametrize("pool", ["pair", "group"])
def test_advantages_against_a_slow_loop(pool):
    rewards, floor = torch.rand(3, 2, 5), 0.01
    got = ppo.group_advantages(rewards, pool, floor=floor)
    for p in range(3):
        for side in range(2):
            peers = (rewards[p].flatten() if pool == "pair" else rewards[p, side]).tolist()
            mean = sum(peers) / len(peers)
            std = math.sqrt(sum((r - mean) ** 2 for r in peers) / len(peers))
            for g in range(5):
                want = (rewards[p, side, g].item() - mean) / (std + floor)
                assert got[p, side, g].item() == pytest.approx(want, abs=1e-5)


def test_the_worked_example_of_the_docs():
    """docs/plain_words.md works these advantages out by hand, for both pools."""
    rewards = torch.tensor([[[0.9, 0.7, 0.2], [0.3, 0.1, 0.2]]])
    pair = ppo.group_advantages(rewards, "pair")[0]
    group = ppo.group_advantages(rewards, "group")[0]
    rounded = [[[round(a, 2) for a in row] for row in pool.tolist()] for pool in (pair, group)]
    assert rounded == [[[1.45, 0.87, -0.58], [-0.29, -0.87, -0.58]],
                       [[0.87, 0.29, -1.16], [0.76, -0.76, 0.0]]]


@pytest.mark.parametrize("pool", ["pair", "group"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1.0])
def test_a_pool_without_spread_has_no_advantages(pool, value):
    """The floor: rounding of the mean must not be blown up into an advantage."""
    rewards = torch.full((2, 2, 7), value)
    assert ppo.group_advantages(rewards, pool, floor=0.01).abs().max() < 1e-4


def test_the_pooled_pair_keeps_the_difference_between_its_prompts():
    """So a prompt whose own rewards are flat still has advantages beside a worse twin."""
    rewards = torch.tensor([[[0.8, 0.9], [0.1, 0.2]]])
    pair = ppo.group_advantages(rewards, "pair", floor=1e-6).mean(-1)[0]
    group = ppo.group_advantages(rewards, "group", floor=1e-6).mean(-1)[0]
    assert pair[0] > 0.5 > -0.5 > pair[1] and pair.sum().abs() < 1e-5
    assert group.abs().max() < 1e-5


def test_both_pools_expect_the_gradient_of_the_reward():
    """What others were rewarded with is a constant to an image, and a constant times grad log pi
    has the mean zero. Without its std the pair's pool therefore expects what the prompt's own does:
    (n-1)/n of the gradient of the expected reward, n in a pool. So `pair` does not want anything
    else than `group`. Here each image is one bit, and every rollout of two prompts with two samples
    is added up."""
    chance = torch.tensor([[0.9], [0.3]])                               # (2, 1), of the bit 1
    reward = torch.tensor([[0.1, 0.8], [0.5, 0.2]])                     # (2, 2), of the bits 0, 1
    gradient = chance * (1 - chance) * reward.diff()                    # (2, 1), by the logit
    for pool, n in (("group", 2), ("pair", 4)):
        expected = torch.zeros(2, 1)
        for bits in itertools.product((0, 1), repeat=4):
            bits = torch.tensor(bits).view(2, 2)
            probability = torch.where(bits == 1, chance, 1 - chance).prod()
            rewards = reward.gather(1, bits)[None]                      # (1, 2, 2)
            advantages = 1e6 * ppo.group_advantages(rewards, pool, floor=1e6)[0]    # no std
            by_sample = advantages * (bits - chance)    # A times the gradient of its log-prob
            expected += probability * by_sample.mean(1, keepdim=True)
        torch.testing.assert_close(expected, (n - 1) / n * gradient)


@pytest.mark.parametrize("pool", ["pair", "group"])
def test_an_image_without_an_answer_is_left_out_of_its_pool(pool):
    """A judge that answers neither yes nor no about one image ended the run, and on a deterministic
    machine ended it again at every --resume. The image now has no say and no advantage."""
    rewards = torch.rand(2, 2, 4)
    rewards[0, 0, 1] = math.nan
    rewards[1] = math.nan                                   # a whole pair
    got = ppo.group_advantages(rewards, pool)
    assert got.isfinite().all() and got[0, 0, 1] == 0 and got[1].eq(0).all()
    kept = rewards[0, :, [0, 2, 3]] if pool == "group" else None
    if pool == "group":
        assert got[0, 0, [0, 2, 3]].allclose(ppo.group_advantages(kept[None], pool)[0, 0])
    else:
        rest = torch.cat([rewards[0, 0, [0, 2, 3]], rewards[0, 1]])
        want = (rest - rest.mean()) / (rest.std(correction=0) + ppo.STD_FLOOR)
        assert torch.cat([got[0, 0, [0, 2, 3]], got[0, 1]]).allclose(want, atol=1e-6)


def test_an_unknown_pool_is_an_error():
    with pytest.raises(KeyError):
        ppo.group_advantages(torch.rand(1, 2, 2), "none")


def test_difference_weights_against_a_slow_loop():
    divergence, strength = torch.rand(2, 2, 3, 9), 0.5
    weights = ppo.difference_weights(divergence, strength, cap=100)
    for p in range(2):
        for side in range(2):
            for g in range(3):
                others = [divergence[p, side, h].mean().item() for h in range(3) if h != g]
                scale = sum(others) / len(others)
                want = 1 - strength + strength * divergence[p, side, g] / scale
                assert weights[p, side, g].allclose(want, atol=1e-5)


def test_a_difference_weight_is_capped():
    """One token with all the divergence among 64 would weigh 32.5 times as much as the average."""
    divergence = torch.zeros(1, 2, 2, 64)
    divergence[..., 5] = 1
    weights = ppo.difference_weights(divergence, 0.5, cap=4)
    assert weights[..., 5].eq(4).all() and weights[..., 0].eq(0.5).all()


def test_a_difference_weight_does_not_know_what_comes_later():
    """The other samples and the own tokens up to t decide w_t, and nothing that is drawn after."""
    divergence = torch.rand(1, 2, 4, 8)
    later = divergence.clone()
    later[:, :, 0, 5:] = torch.rand(1, 2, 3)
    one, two = (ppo.difference_weights(d, 0.5)[:, :, 0, :5] for d in (divergence, later))
    assert one.equal(two)


def expected_gradient(weights_of):
    """The exact expected gradient of a prompt's logit of o_1, in a world of two tokens. Both are
    fair coins. Every image of the prompt has the advantage 1, as in a pair's pool with a twin that
    always fails. No image is better than another, so that o_1 should not move. The twin's prompt
    disagrees about the second token, and more so after o_1 = 1: D is (0.3, 0.05) or (0.3, 0.6)."""
    images = [(a, b) for a in (0, 1) for b in (0, 1)]
    total = 0.0
    for group in itertools.product(images, repeat=2):       # the 16 rollouts of G = 2
        divergence = torch.tensor([[0.3, 0.6 if a else 0.05] for a, _ in group])
        weights = weights_of(divergence.view(1, 1, 2, 2))[0, 0]         # (G, N)
        for g, (a, _) in enumerate(group):
            score = a - 0.5                                 # d log pi(o_1) / d logit
            total += weights[g, 0].item() * score / 16
    return total


def test_difference_weights_leave_the_expected_gradient_unbiased():
    """They were scaled to mean 1 over each sequence, and that brought the later tokens' D into the
    weight of the first. A token without any influence on the reward then had an expected gradient.
    This world is small enough to add up every rollout."""
    def by_sequence(divergence):                            # as it was
        relative = divergence / divergence.mean(-1, keepdim=True)
        weights = 0.5 + 0.5 * relative
        return weights / weights.mean(-1, keepdim=True)

    def by_the_others(divergence):
        return ppo.difference_weights(divergence, 0.5)
    assert expected_gradient(by_sequence) < -0.2
    assert abs(expected_gradient(by_the_others)) < 1e-6


@pytest.mark.parametrize("divergence, strength", [
    (torch.rand(3, 2, 4, 8), 0.0), (torch.zeros(3, 2, 4, 8), 0.7),
    (torch.full((3, 2, 4, 8), 0.2), 0.7)])
def test_no_difference_or_no_strength_gives_weights_of_one(divergence, strength):
    weights = ppo.difference_weights(divergence, strength)
    assert weights.allclose(torch.ones(3, 2, 4, 8), atol=1e-6)


def test_token_advantages_are_those_of_the_images_times_the_weights():
    rewards = torch.tensor([[[0.9, 0.1, 0.5], [0.2, 0.6, 0.4]]])
    weights = torch.rand(1, 2, 3, 4)
    advantages = ppo.group_advantages(rewards, "pair")
    flat = ppo.token_advantages(rewards, None, "pair")
    assert flat.equal(advantages.view(6, 1))
    weighted = ppo.token_advantages(rewards, weights, "pair")
    assert weighted.equal((weights * advantages[..., None]).view(6, 4))


def test_k3_is_zero_at_equal_never_negative_and_finite_at_the_extreme():
    r = torch.cat([torch.linspace(-5, 5, 101), torch.tensor([-1000.0, 1000.0, -90, 90])])
    values = ppo.k3(r, torch.zeros_like(r))
    assert (values >= 0).all() and values.isfinite().all()
    assert ppo.k3(r, r).abs().max() == 0


def test_k3_expects_the_kl_divergence():
    new, ref = torch.randn(6).log_softmax(-1), torch.randn(6).log_softmax(-1)
    kl = (new.exp() * (new - ref)).sum()
    assert (new.exp() * ppo.k3(ref, new)).sum().item() == pytest.approx(kl.item(), abs=1e-6)


def loss_and_gradient(logratio, advantages, clip=0.2, beta=0.0, weights=None, ref=None):
    """-> loss, stats, d loss / d logprobs, for old log-probs of -1 and one advantage a sequence,
    times the weights of its tokens."""
    logratio = torch.as_tensor(logratio)
    old = torch.full_like(logratio, -1.0)
    logprobs = (old + logratio).requires_grad_()
    weights = torch.ones_like(old) if weights is None else weights
    advantages = torch.as_tensor(advantages)[:, None] * weights
    ref = old if ref is None else ref
    loss, stats = ppo.ppo_loss(logprobs, old, ref, advantages, clip, beta)
    loss.backward()
    return loss, stats, logprobs.grad


def test_at_ratio_one_the_gradient_is_the_plain_policy_gradient():
    advantages, weights = torch.tensor([1.5, -0.5, 0.0]), torch.rand(3, 4)
    loss, stats, gradient = loss_and_gradient(torch.zeros(3, 4), advantages, weights=weights)
    weighted = advantages[:, None] * weights
    assert gradient.allclose(-weighted / 12)
    assert loss.item() == pytest.approx(-weighted.mean().item(), abs=1e-6)
    assert stats["clipfrac"] == 0 and stats["approx_kl"] == 0 and stats["ratio_max"] == 1


@pytest.mark.parametrize("ratio, advantage, moves", [
    (1.5, 1.0, False), (1.5, -1.0, True),   # likelier already: do not praise further, but do blame
    (0.5, 1.0, True), (0.5, -1.0, False),   # less likely: do praise, but do not blame further
    (1.1, 1.0, True), (0.9, -1.0, True)])
def test_the_clip_stops_the_gradient_on_the_far_side_only(ratio, advantage, moves):
    _, _, gradient = loss_and_gradient([[math.log(ratio)]], [advantage])
    assert gradient.item() == pytest.approx(-ratio * advantage if moves else 0.0, abs=1e-5)


def test_the_clipped_loss_against_a_slow_loop():
    logratio, advantages = torch.randn(3, 5) * 0.4, torch.randn(3)
    weights, ref = torch.rand(3, 5), torch.randn(3, 5)
    loss, stats, _ = loss_and_gradient(logratio, advantages, 0.2, 0.3, weights, ref)
    pg = kl = clipped = 0.0
    for b in range(3):
        for t in range(5):
            ratio, a = math.exp(logratio[b, t]), advantages[b].item()
            surrogate = min(ratio * a, min(max(ratio, 0.8), 1.2) * a)
            pg -= weights[b, t].item() * surrogate / 15
            r = ref[b, t].item() - (logratio[b, t].item() - 1)
            kl += (math.exp(r) - r - 1) / 15
            clipped += (not 0.8 <= ratio <= 1.2) / 15
    assert loss.item() == pytest.approx(pg + 0.3 * kl, abs=1e-5)
    assert stats["pg_loss"].item() == pytest.approx(pg, abs=1e-5)
    assert stats["kl"].item() == pytest.approx(kl, abs=1e-4)
    assert stats["clipfrac"].item() == pytest.approx(clipped, abs=1e-6)
    approx_kl = (logratio.exp() - 1 - logratio).mean().item()
    assert stats["approx_kl"].item() == pytest.approx(approx_kl, abs=1e-6)


def test_weights_scale_the_policy_term_and_not_the_kl():
    double = torch.full((2, 3), 2.0)
    one, _, g1 = loss_and_gradient(torch.zeros(2, 3), [1.0, -2.0])
    two, _, g2 = loss_and_gradient(torch.zeros(2, 3), [1.0, -2.0], weights=double)
    assert g2.allclose(2 * g1) and two.item() == pytest.approx(2 * one.item())
    ref = torch.zeros(2, 3)
    _, stats1, _ = loss_and_gradient(torch.zeros(2, 3), [1.0, 1.0], beta=1.0, ref=ref)
    _, stats2, _ = loss_and_gradient(torch.zeros(2, 3), [1.0, 1.0], beta=1.0, ref=ref,
                                     weights=double)
    assert stats1["kl"] == stats2["kl"] > 0


def test_the_kl_pulls_towards_the_reference():
    """k3's gradient by log pi is 1 - pi_ref/pi: a descent step lowers a token that the reference
    finds less likely."""
    ref = torch.tensor([[-2.0, 0.0]])
    _, _, gradient = loss_and_gradient([[0.0, 0.0]], [0.0], beta=1.0, ref=ref)
    assert gradient.allclose((1 - (ref + 1).exp()) / 2)
    assert gradient[0, 0] > 0 > gradient[0, 1]


def test_a_token_that_became_enormously_likely_gives_no_nan():
    """exp(90) overflows fp32, and 0 * inf is NaN in the backward of a clipped token or of a zero
    advantage."""
    loss, _, gradient = loss_and_gradient([[90.0, 0.0], [90.0, 0.0]], [1.0, 0.0])
    assert loss.isfinite() and gradient.isfinite().all()
