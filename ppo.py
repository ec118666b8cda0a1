"""The objective of FocusDiff (arXiv 2506.05501), Pair-GRPO, as pure functions.

A *rollout* is a batch of sampled images. A *policy gradient* makes tokens of well-rewarded images
more likely: grad log pi(o_t) times the image's *advantage*, its reward compared with the others'.
PPO takes several steps on one rollout. The *importance ratio* pi(o_t) / pi_old(o_t) corrects for
the policy having moved since it sampled, and the clip ends the gain from moving far. There is no
critic: an image is judged once, at its end, and the pool's mean reward is the baseline.
docs/plain_words.md has all this in plain words, with a worked example.

Shapes: P pairs, 2 prompts, G samples a prompt, B = P*2*G sequences in the flat order (pair, prompt,
sample), N image tokens.
"""
import torch

from model import prompt_divergence     # noqa: F401  part of the objective, for forks to replace

STD_FLOOR = 0.05        # added to a pool's standard deviation: noise of a flat pool stays small
WEIGHT_CAP = 5.0        # largest difference-aware weight
POOLS = {"pair": (1, 2), "group": (2,)}     # --advantage: dimensions of (P, 2, G) in one pool


def draw_pairs(rng, pairs, n):
    """n random pairs: their indices (n,), their prompts, and which of them have images (n,)."""
    chosen = rng.integers(len(pairs), size=n)
    return chosen, [pairs.prompts[i] for i in chosen], pairs.has_images()[chosen]


def ground_truth_probability(step, full_until, low_at, zero_at, low=0.25):
    """p(step): the chance that two of a prompt's samples are replaced by ground truth.

    1 until `full_until`, linear to `low` at `low_at`, linear to 0 at `zero_at` (official code: 50,
    450, 1200; grpo_trainer_pair.py:71-79). zero_at = 0 switches ground truth off."""
    if step >= zero_at:
        return 0.0
    if step < full_until:
        return 1.0
    if step < low_at:
        return 1.0 - (1.0 - low) * (step - full_until) / (low_at - full_until)
    return low * (zero_at - step) / (zero_at - low_at)


def mix_ground_truth(tokens, truth, use):
    """Replace the first two samples of each prompt by ground truth: its own image, the positive
    example, and its twin's, the hard negative.

    tokens (B, N), truth (P, 2, N), use (P, 2) bool -> mixed tokens (B, N), replaced (B,) bool."""
    n_pairs, _, n_tokens = truth.shape
    mixed = tokens.view(n_pairs, 2, -1, n_tokens).clone()               # (P, 2, G, N)
    mixed[:, :, 0] = torch.where(use[..., None], truth, mixed[:, :, 0])
    mixed[:, :, 1] = torch.where(use[..., None], truth.flip(1), mixed[:, :, 1])
    replaced = torch.zeros(mixed.shape[:3], dtype=torch.bool, device=tokens.device)
    replaced[:, :, :2] = use[..., None]
    return mixed.flatten(0, 2), replaced.flatten()


def own_reward(own):
    """S(I, T), the paper's reward: the judge's score of an image for its own prompt."""
    return own


def margin_reward(own, twin):
    """S(I, T) - S(I, T'): the twin's prompt must also be wrong (ours)."""
    return own - twin


# --reward. Scores (P, 2, G) -> rewards (P, 2, G). A function of `own` alone costs the judge one
# question an image. One of `own` and `twin` costs two.
REWARDS = {"own": own_reward, "margin": margin_reward}


def group_advantages(rewards, pool, floor=STD_FLOOR):
    """A = (R - mean) / (std + floor). rewards (P, 2, G) -> advantages (P, 2, G).

    pool "group": mean and std over a prompt's own G samples (vanilla GRPO). "pair": over the 2G of
    a pair (Pair-GRPO); a prompt whose twin is harder then has a positive mean advantage, which has
    no effect in expectation. The own reward is in the mean: that shrinks A by (n-1)/n, n in a pool.

    A reward that is NaN, of an image for which the judge had no answer, does not count and has the
    advantage 0."""
    known, dims = rewards.isfinite(), POOLS[pool]
    n = known.sum(dims, keepdim=True).clamp(min=1)
    rewards = torch.where(known, rewards, 0.0)
    deviation = torch.where(known, rewards - rewards.sum(dims, keepdim=True) / n, 0.0)
    variance = deviation.square().sum(dims, keepdim=True) / n
    return deviation / (variance.sqrt() + floor)


def difference_weights(divergence, strength, cap=WEIGHT_CAP):
    """w_t = (1 - lambda) + lambda * D_t / scale, capped (ours; lambda = 0 is the paper).

    divergence (P, 2, G, N) >= 0 of `model.prompt_divergence` -> weights (P, 2, G, N) around 1. The
    scale is the mean of D over the *other* samples of the prompt: a weight must depend on the
    token's prefix alone. A mean over the own sequence would bring its later tokens in, and bias the
    expected gradient (shown in tests/test_ppo.py). Where the prompts ask for the same (D = 0) the
    weights are 1."""
    mean = divergence.mean(-1, keepdim=True)                            # (P, 2, G, 1)
    others = 1 - torch.eye(mean.shape[2], device=mean.device)           # (G, G)
    scale = others @ mean / (mean.shape[2] - 1)                         # (P, 2, G, 1)
    relative = torch.where(scale > 1e-6, divergence / scale.clamp(min=1e-6), 1.0)
    return ((1 - strength) + strength * relative).clamp(max=cap)


def token_advantages(rewards, weights, pool):
    """A_t = w_t A. rewards (P, 2, G), weights (P, 2, G, N) or None -> (B, N), or (B, 1) if all
    tokens of an image have the same."""
    advantages = group_advantages(rewards, pool)[..., None]             # (P, 2, G, 1)
    if weights is not None:
        advantages = weights * advantages
    return advantages.flatten(0, 2)


def k3(ref_logprobs, logprobs):
    """The estimator exp(r) - r - 1 of KL(pi || pi_ref) per token, r = log pi_ref - log pi.

    -r alone is unbiased too, but is negative for half of the tokens; k3 never is, and varies less
    (http://joschu.net/blog/kl-approx.html). r is clamped: one token at r = 90 overflows fp32."""
    r = (ref_logprobs.float() - logprobs.float()).clamp(-20, 20)
    return r.exp() - r - 1


def ppo_loss(logprobs, old_logprobs, ref_logprobs, advantages, clip, beta):
    """The clipped objective (Schulman et al. 2017, eq. 7) and the KL penalty (GRPO, eq. 4):

        ratio_t = exp(log pi(o_t) - log pi_old(o_t))
        loss = - mean_t min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps) A_t) + beta mean_t k3_t

    The minimum ends the gradient where the ratio has gone the good way by more than eps: above
    1 + eps for A > 0, below 1 - eps for A < 0. On the other side it lets the policy come back.

    All (b, N), advantages perhaps (b, 1) -> (loss, {name: value})."""
    logratio = (logprobs - old_logprobs).clamp(-20, 20)                 # exp(90) * 0 would be NaN
    ratio = logratio.exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    pg_loss = -surrogate.mean()
    kl = k3(ref_logprobs, logprobs)
    loss = pg_loss + beta * kl.mean()
    with torch.no_grad():
        stats = {"kl": kl.mean(), "clipfrac": ((ratio - 1).abs() > clip).float().mean(),
                 "approx_kl": (ratio - 1 - logratio).mean(), "ratio_max": ratio.max(),
                 "pg_loss": pg_loss}
    return loss, {name: value.detach() for name, value in stats.items()}
