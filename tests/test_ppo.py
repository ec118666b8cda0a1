"""ppo.py against slow loops, hand-worked cases and exact expectations."""
import math
from dataclasses import replace

import pytest
import torch

import ppo
from config import PPO

torch.manual_seed(0)


@pytest.mark.parametrize("step, p", [(0, 1.0), (49, 1.0), (50, 1.0), (250, 0.625), (450, 0.25), (825, 0.125), (1200, 0.0), (5000, 0.0)])
def test_ground_truth_schedule_is_the_official_one(step, p):
    assert ppo.ground_truth_probability(step, 50, 450, 1200) == pytest.approx(p, abs=1e-12)


def test_ground_truth_can_be_switched_off():
    assert [ppo.ground_truth_probability(step, 0, 0, 0) for step in (0, 1, 100)] == [0, 0, 0]


def test_ground_truth_replaces_own_and_twins_where_it_is_used():
    tokens = torch.arange(2 * 2 * 4 * 3).view(2, 2, 4, 3)
    truth = -1 - torch.arange(2 * 2 * 3).view(2, 2, 3)
    use = torch.tensor([[True, False], [False, True]])
    before = tokens.clone()
    mixed, origin = ppo.mix_ground_truth(tokens, truth, use)
    for p in range(2):
        for side in range(2):
            for g in range(4):
                if use[p, side] and g == 0:
                    want, kind = truth[p, side], ppo.OWN_TRUTH
                elif use[p, side] and g == 1:
                    want, kind = truth[p, 1 - side], ppo.TWIN_TRUTH
                else:
                    want, kind = before[p, side, g], ppo.SAMPLED
                assert mixed[p, side, g].equal(want) and origin[p, side, g] == kind
    assert tokens.equal(before)                                     # the rollout itself is left alone


def test_ground_truth_without_twins_leaves_the_second_sample_alone():
    tokens, truth = torch.arange(2 * 2 * 4 * 3).view(2, 2, 4, 3), -1 - torch.arange(2 * 2 * 3).view(2, 2, 3)
    use = torch.tensor([[True, False], [False, True]])
    both, _ = ppo.mix_ground_truth(tokens, truth, use)
    mixed, origin = ppo.mix_ground_truth(tokens, truth, use, twins=False)
    assert mixed[:, :, 0].equal(both[:, :, 0]) and origin[:, :, 0].tolist() == [[ppo.OWN_TRUTH, ppo.SAMPLED], [ppo.SAMPLED, ppo.OWN_TRUTH]]
    assert mixed[:, :, 1:].equal(tokens[:, :, 1:]) and (origin[:, :, 1:] == ppo.SAMPLED).all()


def test_every_origin_has_a_name():
    assert ppo.ORIGINS == {"sampled": ppo.SAMPLED, "own_truth": ppo.OWN_TRUTH, "twin_truth": ppo.TWIN_TRUTH} and len(set(ppo.ORIGINS.values())) == 3


@pytest.mark.parametrize("kind, rewards", [("own", [0.9, 0.5, 0.0, 1.0]), ("product", [0.72, 0.0, 0.0, 0.5]), ("margin", [0.7, -0.5, -0.4, 0.5]),
                                           ("shared", [1.1, 1.5, 0.4, 1.5])])
def test_the_three_rewards_by_hand(kind, rewards):
    own, twin = torch.tensor([0.9, 0.5, 0.0, 1.0]).view(1, 2, 2), torch.tensor([0.2, 1.0, 0.4, 0.5]).view(1, 2, 2)
    got = ppo.pair_reward(own, twin, kind)
    assert got.shape == own.shape and got.flatten().tolist() == pytest.approx(rewards, abs=1e-6)


def test_an_unknown_reward_is_an_error():
    with pytest.raises(KeyError):
        ppo.pair_reward(torch.rand(1, 2, 2), torch.rand(1, 2, 2), "sum")


def test_the_choice_by_hand():
    own, twin = torch.tensor([0.9, 0.5, 0.0, 0.004]), torch.tensor([0.3, 0.5, 1.0, 0.0])
    assert ppo.choice_reward(own, twin, floor=0).tolist() == pytest.approx([0.75, 0.5, 0.0, 1.0])
    assert ppo.choice_reward(own, twin, floor=1e-3).tolist() == pytest.approx([0.901 / 1.202, 0.5, 0.001 / 1.002, 0.005 / 0.006], abs=1e-6)


def test_what_the_prompts_share_divides_out_of_the_choice():
    """A picture that is wrong in all else scores lower for both prompts, by the same factor."""
    own, twin, factor = torch.rand(50) + 0.01, torch.rand(50) + 0.01, torch.logspace(-8, 0, 50)
    assert ppo.choice_reward(factor * own, factor * twin, floor=0).allclose(ppo.choice_reward(own, twin, floor=0), atol=1e-6)
    assert ppo.choice_reward(0.5 * own, 0.5 * twin).allclose(ppo.choice_reward(own, twin), atol=0.02)         # all but for the floor


def test_the_score_is_what_the_prompts_share_times_the_choice():
    own, twin = torch.rand(50) + 0.01, torch.rand(50)
    assert (ppo.pair_reward(own, twin, "shared") * ppo.choice_reward(own, twin, floor=0)).allclose(own)


def test_noise_is_a_draw_and_a_difference_is_not():
    """1e-6 against 1e-8 is a hundred times as much and says nothing; 0.1 against 0.001 does."""
    noise, told = ppo.choice_reward(torch.tensor([1e-6, 0.1]), torch.tensor([1e-8, 1e-3]))
    assert noise.item() == pytest.approx(0.5, abs=1e-3) and told > 0.97


def test_the_choice_rises_with_the_own_score_falls_with_the_twins_and_is_shared_between_the_two():
    own, twin = torch.rand(50), torch.rand(50)
    choice = ppo.choice_reward(own, twin)
    assert (ppo.choice_reward(own + 0.01, twin) > choice).all() and (ppo.choice_reward(own, twin + 0.01) < choice).all()
    assert ((choice > 0.5) == (own > twin)).all() and (choice > 0).all() and (choice < 1).all()
    assert (choice + ppo.choice_reward(twin, own)).allclose(torch.ones(50))


@pytest.mark.parametrize("pool", ["pair", "group"])
def test_advantages_against_a_slow_loop(pool):
    rewards, floor = torch.rand(3, 2, 5), 0.01
    got = ppo.group_advantages(rewards, pool, floor)
    for p in range(3):
        for side in range(2):
            peers = (rewards[p].flatten() if pool == "pair" else rewards[p, side]).tolist()
            mean = sum(peers) / len(peers)
            std = math.sqrt(sum((r - mean) ** 2 for r in peers) / len(peers))
            for g in range(5):
                assert got[p, side, g].item() == pytest.approx((rewards[p, side, g].item() - mean) / (std + floor), abs=1e-5)


@pytest.mark.parametrize("pool", ["pair", "group"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1.0])
def test_a_group_without_spread_teaches_nothing(pool, value):
    """The floor: rounding of the mean must not be blown up into an advantage."""
    assert ppo.group_advantages(torch.full((2, 2, 7), value), pool, 0.01).abs().max() < 1e-4


def test_the_pooled_pair_keeps_the_difference_between_its_prompts():
    rewards = torch.tensor([[[0.8, 0.9], [0.1, 0.2]]])
    pair, group = (ppo.group_advantages(rewards, pool, 1e-6).mean(-1)[0] for pool in ("pair", "group"))
    assert pair[0] > 0.5 > -0.5 > pair[1] and pair.sum().abs() < 1e-5
    assert group.abs().max() < 1e-5


@pytest.mark.parametrize("pool", ["pair", "group"])
def test_what_is_not_counted_has_an_advantage_but_no_say(pool):
    rewards, counted, floor = torch.rand(3, 2, 5), torch.rand(3, 2, 5) < 0.6, 0.01
    counted[..., -1] = True
    got = ppo.group_advantages(rewards, pool, floor, counted)
    for p in range(3):
        for side in range(2):
            peers = (rewards[p][counted[p]] if pool == "pair" else rewards[p, side][counted[p, side]]).tolist()
            mean = sum(peers) / len(peers)
            std = math.sqrt(sum((r - mean) ** 2 for r in peers) / len(peers))
            for g in range(5):
                assert got[p, side, g].item() == pytest.approx((rewards[p, side, g].item() - mean) / (std + floor), rel=1e-4, abs=1e-5)
    other = ppo.group_advantages(torch.where(counted, rewards, 7.0), pool, floor, counted)
    assert other[counted].equal(got[counted]) and (other[~counted] > got[~counted]).all()


@pytest.mark.parametrize("pool", ["pair", "group"])
def test_to_count_everybody_is_to_count_nobody_out(pool):
    rewards = torch.rand(3, 2, 5)
    assert ppo.group_advantages(rewards, pool, 0.01, torch.ones(3, 2, 5, dtype=torch.bool)).equal(ppo.group_advantages(rewards, pool, 0.01))


def test_an_unknown_pool_is_an_error():
    with pytest.raises(KeyError):
        ppo.group_advantages(torch.rand(1, 2, 2), "none", 0.1)


def test_difference_weights_are_the_equation_with_mean_one():
    divergence, strength = torch.rand(4, 9), 0.5
    weights = ppo.difference_weights(divergence, strength, cap=100)
    for d, w in zip(divergence.tolist(), weights.tolist()):
        mean = sum(d) / len(d)
        assert w == pytest.approx([1 - strength + strength * x / mean for x in d], abs=1e-5)
    assert weights.mean(-1).allclose(torch.ones(4), atol=1e-5)


def test_difference_weights_are_capped_before_they_are_renormalised():
    """One token with all the divergence among 64: without the cap it would weigh 32.5 times as much as the average."""
    divergence = torch.zeros(1, 64)
    divergence[0, 5] = 1
    weights = ppo.difference_weights(divergence, 0.5, cap=4)
    assert weights.mean().item() == pytest.approx(1, abs=1e-5)
    assert (weights[0, 5] / weights[0, 0]).item() == pytest.approx(4 / 0.5, rel=1e-4)


@pytest.mark.parametrize("divergence, strength", [(torch.rand(3, 8), 0.0), (torch.zeros(3, 8), 0.7), (torch.full((3, 8), 0.2), 0.7)])
def test_no_difference_or_no_strength_gives_weights_of_one(divergence, strength):
    assert ppo.difference_weights(divergence, strength, cap=5).allclose(torch.ones(3, 8), atol=1e-6)


def test_k3_is_zero_at_equal_never_negative_and_finite_at_the_extreme():
    r = torch.cat([torch.linspace(-5, 5, 101), torch.tensor([-1000.0, 1000.0, -90, 90])])
    values = ppo.k3(r, torch.zeros_like(r))
    assert (values >= 0).all() and values.isfinite().all()
    assert ppo.k3(r, r).abs().max() == 0


def test_k3_expects_the_kl_divergence():
    new, ref = torch.randn(6).log_softmax(-1), torch.randn(6).log_softmax(-1)
    kl = (new.exp() * (new - ref)).sum()
    assert (new.exp() * ppo.k3(ref, new)).sum().item() == pytest.approx(kl.item(), abs=1e-6)


def loss_and_gradient(logratio, advantages, clip=0.2, beta=0.0, weights=None, ref=None, **shape):
    """-> loss, stats, d loss / d logprobs, for old log-probs of -1 and one advantage a sequence, times the weights of its tokens."""
    logratio = torch.as_tensor(logratio)
    old = torch.full_like(logratio, -1.0)
    logprobs = (old + logratio).requires_grad_()
    token_advantages = torch.as_tensor(advantages)[:, None] * (torch.ones_like(old) if weights is None else weights)
    loss, stats, _ = ppo.ppo_loss(logprobs, old, ref, token_advantages, clip, beta, **shape)
    loss.backward()
    return loss, stats, logprobs.grad


def test_at_ratio_one_the_gradient_is_the_plain_policy_gradient():
    advantages, weights = torch.tensor([1.5, -0.5, 0.0]), torch.rand(3, 4)
    loss, stats, gradient = loss_and_gradient(torch.zeros(3, 4), advantages, weights=weights)
    assert gradient.allclose(-advantages[:, None] * weights / 12)
    assert loss.item() == pytest.approx(-(advantages[:, None] * weights).mean().item(), abs=1e-6)
    assert stats["clipfrac"] == 0 and stats["approx_kl"] == 0 and stats["ratio_max"] == 1


@pytest.mark.parametrize("ratio, advantage, moves", [
    (1.5, 1.0, False), (1.5, -1.0, True),       # already more likely: do not praise further, but do blame
    (0.5, 1.0, True), (0.5, -1.0, False),       # already less likely: do praise, but do not blame further
    (1.1, 1.0, True), (0.9, -1.0, True)])
def test_the_clip_stops_the_gradient_on_the_far_side_only(ratio, advantage, moves):
    _, _, gradient = loss_and_gradient([[math.log(ratio)]], [advantage])
    assert gradient.item() == pytest.approx(-ratio * advantage if moves else 0.0, abs=1e-5)


def test_the_clipped_loss_against_a_slow_loop():
    logratio, advantages, weights, ref = torch.randn(3, 5) * 0.4, torch.randn(3), torch.rand(3, 5), torch.randn(3, 5)
    loss, stats, _ = loss_and_gradient(logratio, advantages, 0.2, 0.3, weights, ref)
    pg = kl = clipped = 0.0
    for b in range(3):
        for t in range(5):
            ratio, a = math.exp(logratio[b, t]), advantages[b].item()
            pg -= weights[b, t].item() * min(ratio * a, min(max(ratio, 0.8), 1.2) * a) / 15
            r = ref[b, t].item() - (logratio[b, t].item() - 1)
            kl += (math.exp(r) - r - 1) / 15
            clipped += (not 0.8 <= ratio <= 1.2) / 15
    assert loss.item() == pytest.approx(pg + 0.3 * kl, abs=1e-5)
    assert stats["pg_loss"].item() == pytest.approx(pg, abs=1e-5) and stats["kl"].item() == pytest.approx(kl, abs=1e-4)
    assert stats["clipfrac"].item() == pytest.approx(clipped, abs=1e-6)
    assert stats["approx_kl"].item() == pytest.approx((logratio.exp() - 1 - logratio).mean().item(), abs=1e-6)


def test_weights_scale_the_policy_term_and_not_the_kl():
    one, _, g1 = loss_and_gradient(torch.zeros(2, 3), [1.0, -2.0])
    two, _, g2 = loss_and_gradient(torch.zeros(2, 3), [1.0, -2.0], weights=torch.full((2, 3), 2.0))
    assert g2.allclose(2 * g1) and two.item() == pytest.approx(2 * one.item())
    _, stats1, _ = loss_and_gradient(torch.zeros(2, 3), [1.0, 1.0], beta=1.0, ref=torch.zeros(2, 3))
    _, stats2, _ = loss_and_gradient(torch.zeros(2, 3), [1.0, 1.0], beta=1.0, ref=torch.zeros(2, 3), weights=torch.full((2, 3), 2.0))
    assert stats1["kl"] == stats2["kl"] > 0


def test_the_kl_pulls_towards_the_reference():
    """k3's gradient by log pi is 1 - pi_ref/pi: a descent step lowers a token that the reference finds less likely."""
    ref = torch.tensor([[-2.0, 0.0]])
    _, _, gradient = loss_and_gradient([[0.0, 0.0]], [0.0], beta=1.0, ref=ref)
    assert gradient.allclose((1 - (ref + 1).exp()) / 2)
    assert gradient[0, 0] > 0 > gradient[0, 1]


def test_a_token_that_became_enormously_likely_gives_no_nan():
    """exp(90) overflows fp32, and 0 * inf is NaN in the backward of a clipped token or of a zero advantage."""
    loss, _, gradient = loss_and_gradient([[90.0, 0.0], [90.0, 0.0]], [1.0, 0.0])
    assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("pi", [1e-6, 0.05, 0.5, 0.99])
@pytest.mark.parametrize("advantage", [1.5, -0.5])
def test_a_shaped_token_follows_its_formula(pi, advantage):
    """Loss -pi/(pi + gamma) A and, by log pi, gradient -gamma pi/(pi + gamma)^2 A, wherever the ratio stands."""
    loss, _, gradient = loss_and_gradient([[math.log(pi) + 1]], [advantage], shaped=torch.tensor([True]), gamma=0.1)
    logp = torch.tensor(math.log(pi), requires_grad=True)
    (-logp.exp() / (logp.exp() + 0.1) * advantage).backward()
    assert loss.item() == pytest.approx(-pi / (pi + 0.1) * advantage, rel=1e-4)
    assert gradient.item() == pytest.approx(logp.grad.item(), rel=1e-4)
    assert gradient.item() == pytest.approx(-0.1 * pi / (pi + 0.1) ** 2 * advantage, rel=1e-4)


def test_the_gradient_of_a_next_to_impossible_token_vanishes_when_it_is_shaped():
    """Ground truth is scored by the policy itself, so that its ratio is 1 and an impossible token pulls as hard as any other."""
    old = torch.tensor([[math.log(1e-6), math.log(0.1)]])
    for shaped, sizes in ((None, [0.5, 0.5]), (torch.tensor([True]), [0.5e-5, 0.125])):
        logprobs = old.clone().requires_grad_()
        ppo.ppo_loss(logprobs, old, None, torch.ones(1, 2), 0.2, 0.0, shaped, gamma=0.1)[0].backward()
        assert (-logprobs.grad[0]).tolist() == pytest.approx(sizes, rel=1e-3)


def test_shaping_leaves_the_other_sequences_and_the_kl_alone():
    logratio, advantages, ref = torch.randn(4, 5) * 0.4, torch.randn(4), torch.randn(4, 5)
    marked = torch.tensor([False, True, False, True])
    _, plain_stats, plain = loss_and_gradient(logratio, advantages, beta=0.3, ref=ref)
    _, stats, gradient = loss_and_gradient(logratio, advantages, beta=0.3, ref=ref, shaped=marked)
    assert gradient[~marked].equal(plain[~marked]) and not gradient[marked].allclose(plain[marked], atol=1e-3) and stats["kl"] == plain_stats["kl"]
    _, _, nobody = loss_and_gradient(logratio, advantages, beta=0.3, ref=ref, shaped=torch.zeros(4, dtype=torch.bool))
    assert nobody.equal(plain)


def test_the_loss_tells_the_k3_of_each_sequence():
    logprobs, old, ref = (torch.randn(4, 5) - 3 for _ in range(3))
    logprobs.requires_grad_()
    _, stats, rows = ppo.ppo_loss(logprobs, old, ref, torch.randn(4, 5), 0.2, 0.01)
    assert rows.equal(ppo.k3(ref, logprobs).detach().mean(-1)) and not rows.requires_grad
    assert rows.mean().item() == pytest.approx(stats["kl"].item(), rel=1e-5)
    loss, stats, rows = ppo.ppo_loss(logprobs, old, None, torch.randn(4, 5), 0.2, 0.0)
    assert rows.tolist() == [0] * 4 and stats["kl"] == 0 and loss.item() == stats["pg_loss"].item()


def test_the_kl_of_a_sequence_that_is_not_held_pulls_nothing():
    """Ground truth under the official recipe: a token pushed 5 nats below the reference by a negative advantage is pulled back by e^5."""
    ref = torch.full((2, 3), -1.0)
    _, _, both = loss_and_gradient(torch.full((2, 3), -5.0), [0.0, 0.0], beta=1.0, ref=ref)
    _, stats, one = loss_and_gradient(torch.full((2, 3), -5.0), [0.0, 0.0], beta=1.0, ref=ref, held=torch.tensor([True, False]))
    assert both.allclose(torch.full((2, 3), (1 - math.exp(5)) / 6))
    assert one[0].equal(both[0]) and one[1].equal(torch.zeros(3))
    assert stats["kl"] == pytest.approx(math.exp(5) - 6)                # the log still tells everybody's


def test_d_t_spreads_to_the_neighbours_that_are_drawn_later():
    """A choice at row 1, column 1 reaches the rest of its object, to the right and below, and nothing that was drawn before it."""
    divergence = torch.zeros(2, 16)
    divergence[0, 5] = 1.0
    spread = ppo.spread_difference(divergence, 4, 1)
    assert spread[0].view(4, 4).tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert spread[1].equal(divergence[1])


def test_a_spread_weight_depends_on_the_prefix_alone():
    """Otherwise it would know the token that it weighs, and the baseline would be biased."""
    divergence, n = torch.rand(1, 64), 27
    later = torch.cat([divergence[:, :n + 1], torch.rand(1, 63 - n)], 1)
    assert ppo.spread_difference(later, 8, 2)[:, :n + 1].equal(ppo.spread_difference(divergence, 8, 2)[:, :n + 1])


def test_token_advantages_by_hand():
    """What weights, the choice's advantage and the floor of ground truth act on."""
    rewards, choice = torch.tensor([[[0.9, 0.1, 0.5], [0.2, 0.6, 0.4]]]), torch.tensor([[[0.7, 0.3, 0.5], [0.5, 0.6, 0.2]]])
    origin = torch.tensor([[[ppo.OWN_TRUTH, ppo.TWIN_TRUTH, ppo.SAMPLED], [ppo.SAMPLED] * 3]])
    weights = torch.rand(1, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    cfg = PPO(choice=0.0)
    told = lambda weights, **changes: ppo.token_advantages(rewards, choice, origin, weights, replace(cfg, **changes))
    a = ppo.group_advantages(rewards, "pair", cfg.std_floor)[..., None]
    c = ppo.group_advantages(choice, "pair", cfg.std_floor)[..., None]
    assert told(1.0).equal(a) and told(weights).equal(weights * a)
    torch.testing.assert_close(told(weights, choice=2.0), weights * (a + 2 * c))
    torch.testing.assert_close(told(weights, choice=2.0, difference_on="choice"), a + weights * 2 * c)
    sampled = (origin == ppo.SAMPLED)[..., None]
    assert told(weights, difference_on="truth").equal(torch.where(sampled, 1.0, weights) * a)
    floored = told(1.0, truth_floor=0.0)
    assert floored[0, 0, 1] == 0 and a[0, 0, 1] < 0 and floored[sampled].equal(a[sampled])
    assert told(1.0, truth_counted=False).equal(ppo.group_advantages(rewards, "pair", cfg.std_floor, origin == ppo.SAMPLED)[..., None])
