"""The difference-aware PPO objective, as pure functions of tensors (FocusDiff, arXiv 2506.05501, Pair-GRPO).

There is no critic. A picture is judged once, when its last token is drawn, so that a value network would have to guess that one
number from half-drawn pictures; the mean reward of the other samples of the same pair is an unbiased baseline that costs nothing.

Shapes: P pairs, 2 prompts, G samples a prompt, B = P*2*G sequences, N image tokens.
"""
import torch
import torch.nn.functional as F

SAMPLED, OWN_TRUTH, TWIN_TRUTH = 0, 1, 2        # where a sequence of the group comes from
ORIGINS = {"sampled": SAMPLED, "own_truth": OWN_TRUTH, "twin_truth": TWIN_TRUTH}


def ground_truth_probability(step, full_until, low_at, zero_at, low=0.25):
    """p(step): the chance that two of a prompt's G samples are replaced by ground truth. 1 until `full_until`, linear to `low` at
    `low_at`, linear to 0 at `zero_at` (official code: 50, 450, 1200; grpo_trainer_pair.py:71-79). zero_at = 0 switches it off."""
    if step >= zero_at:
        return 0.0
    if step < full_until:
        return 1.0
    if step < low_at:
        return 1.0 - (1.0 - low) * (step - full_until) / (low_at - full_until)
    return low * (zero_at - step) / (zero_at - low_at)


def mix_ground_truth(tokens, truth, use, twins=True):
    """Replace the first two samples of each prompt by its own image (the positive example) and its twin's (the hard negative); the
    first alone without `twins`.

    tokens (P, 2, G, N), truth (P, 2, N), use (P, 2) bool -> mixed tokens (P, 2, G, N), origin (P, 2, G) of SAMPLED, OWN_TRUTH and
    TWIN_TRUTH."""
    origin = torch.zeros(tokens.shape[:3], dtype=torch.long, device=tokens.device)
    origin[:, :, 0], origin[:, :, 1] = OWN_TRUTH * use, TWIN_TRUTH * (use & twins)
    mixed = tokens.clone()
    mixed[:, :, 0] = torch.where(use[..., None], truth, tokens[:, :, 0])
    mixed[:, :, 1] = torch.where((use & twins)[..., None], truth.flip(1), tokens[:, :, 1])
    return mixed, origin


def pair_reward(own, twin, kind):
    """Judge's scores of pictures for their own prompt, S(I, T), and for its twin, S(I, T'), both (P, 2, G) -> rewards (P, 2, G).

    "own" is the paper's S(I, T); "root" its fourth root, of which s_g is made, where 0.01 is much better than 0.0001. "product" S(I, T) (1 - S(I, T')) and "margin" S(I, T) - S(I, T') also ask that the twin's prompt be
    wrong. "shared" S(I, T) + S(I, T') grades what the prompts have in common and leaves the one detail to `choice_reward`: S(I, T) is
    the product of the two (ours)."""
    return {"own": own, "root": own ** 0.25, "product": own * (1 - twin), "margin": own - twin, "shared": own + twin}[kind]


def choice_reward(own, twin, floor=1e-3):
    """Which of the pair's two prompts does the picture show? C = S(I, T) / (S(I, T) + S(I, T')), shapes as in `pair_reward` (ours).

    What the prompts share divides out, so that C grades the one detail even in a picture that is wrong in all else, where S is near
    0 for both. The floor lets two such scores that are mere noise count as a draw."""
    return (own + floor) / (own + twin + 2 * floor)


def group_advantages(rewards, pool, floor, counted=None):
    """A = (R - mean) / (std + floor), rewards (P, 2, G) -> advantages (P, 2, G).

    pool "group": mean and std over a prompt's own G samples (vanilla GRPO). "pair": over all 2G of a pair (Pair-GRPO); a prompt whose
    twin is harder keeps a positive mean advantage. "scaled": a prompt's own mean and the pair's std. "joint" (ours): the same, of
    rewards that count as much as the twin succeeds, the gradient of the product of the two prompts' mean rewards: the harder one of
    a pair gets the larger advantages. It is for rewards >= 0. The floor keeps a group without spread from blowing up noise.
    counted (P, 2, G) bool says whose rewards make mean and std; None is everybody's."""
    share = torch.ones_like(rewards) if counted is None else counted.to(rewards.dtype)

    def mean_of(values, *dims):
        return (share * values).sum(dims, keepdim=True) / share.sum(dims, keepdim=True)

    pair, prompt = (1, 2), (2,)                                         # dimensions of the mean and of the std
    centre, spread = {"group": (prompt, prompt), "pair": (pair, pair), "scaled": (prompt, pair), "joint": (prompt, pair)}[pool]
    deviation = rewards - mean_of(rewards, *centre)
    if pool == "joint":
        own = mean_of(rewards, *prompt)                                                                 # (P, 2, 1)
        deviation = deviation * own.flip(1) / own.mean(1, keepdim=True).clamp(min=1e-6)
    std = mean_of(deviation.square(), *spread).sqrt()
    return deviation / (std + floor)


def spread_difference(divergence, grid, radius):
    """Each token's largest D_t among itself and its neighbours drawn before it, up to `radius` tokens away in the rows above and to the
    left (ours). divergence (B, N) of a grid x grid picture, row by row -> (B, N).

    D_t is large where the choice is made, the first token of an object, and small in the rest of the object, which follows from what
    is drawn. The difference is the whole object. Only tokens drawn before count, so that a weight still depends on the prefix alone."""
    side = 2 * radius + 1
    windows = F.unfold(divergence.view(-1, 1, grid, grid), side, padding=radius)                        # (B, side*side, N)
    return windows[:, :side * side // 2 + 1].amax(1)                    # the window's first half is drawn before, its middle is the token


def token_advantages(rewards, choice, origin, weights, cfg):
    """Advantages of pictures, then of their tokens. rewards, choice, origin (P, 2, G), weights (P, 2, G, N) or 1 -> (P, 2, G, N), or
    (P, 2, G, 1) where all tokens have the same.

    cfg: advantage, std_floor; choice, the weight of being told from the twin; difference_on, what the weights act on; truth_counted,
    truth_floor, of ground truth."""
    sampled = (origin == SAMPLED)[..., None]
    counted = None if cfg.truth_counted else origin == SAMPLED
    advantages = group_advantages(rewards, cfg.advantage, cfg.std_floor, counted)[..., None]
    if cfg.difference_on == "truth":
        weights = torch.where(sampled, 1.0, weights)
    if cfg.choice:
        told = cfg.choice * group_advantages(choice, cfg.advantage, cfg.std_floor, counted)[..., None]
        advantages = advantages + weights * told if cfg.difference_on == "choice" else weights * (advantages + told)
    else:
        advantages = weights * advantages
    return torch.where(sampled, advantages, advantages.clamp(min=cfg.truth_floor))


def difference_weights(divergence, strength, cap):
    """w_t = (1 - lambda) + lambda * D_t / mean(D), capped, then scaled to mean 1 over each sequence (ours; lambda = 0 is the paper).

    divergence (B, N) >= 0 of `model.prompt_divergence` -> weights (B, N). Where the two prompts tell the same (mean(D) = 0, a lone
    prompt) the weights are 1."""
    mean = divergence.mean(-1, keepdim=True)
    relative = torch.where(mean > 1e-6, divergence / mean.clamp(min=1e-6), 1.0)
    weights = ((1 - strength) + strength * relative).clamp(max=cap)
    return weights / weights.mean(-1, keepdim=True)


def k3(ref_logprobs, logprobs):
    """The estimator exp(r) - r - 1 of KL(pi || pi_ref), r = log pi_ref - log pi, per token: unbiased, never negative
    (http://joschu.net/blog/kl-approx.html). r is clamped, since one token at r = 90 overflows fp32."""
    r = (ref_logprobs.float() - logprobs.float()).clamp(-20, 20)
    return r.exp() - r - 1


def ppo_loss(logprobs, old_logprobs, ref_logprobs, advantages, clip, beta, shaped=None, gamma=0.1, held=None):
    """The clipped objective (Schulman et al. 2017, eq. 7; k3 as in GRPO, eq. 4).

        ratio_t = exp(log pi(o_t) - log pi_old(o_t))
        loss = - mean_t min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps) A_t)  +  beta mean_t k3_t

    logprobs, old_logprobs (the ones stored at the rollout), ref_logprobs (None with beta = 0), advantages (B, N): A_t = w_t A. Every
    picture has N tokens, so that the mean over tokens is also the mean over pictures. Sequences marked in shaped (B,) bool, which
    nobody sampled, get f(pi) A_t, f(pi) = pi / (pi + gamma), instead of min(...): the gradient of a token that the policy finds next
    to impossible vanishes there (LUFFY, arXiv 2504.14945, eq. 6). held (B,) bool says whose k3 counts in the loss; None is everybody's.
    -> (loss, {name: value tensor}, k3 (B,) of each sequence)."""
    logratio = (logprobs - old_logprobs).clamp(-20, 20)                 # exp(90) * 0 would be NaN
    ratio = logratio.exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    if shaped is not None:
        pi = logprobs.exp()
        surrogate = torch.where(shaped[:, None], pi / (pi + gamma) * advantages, surrogate)
    pg_loss = -surrogate.mean()
    kl = torch.zeros_like(logprobs) if ref_logprobs is None else k3(ref_logprobs, logprobs)
    penalty = kl.mean() if held is None else (kl * held[:, None]).mean()
    with torch.no_grad():
        stats = {"pg_loss": pg_loss, "kl": kl.mean(), "approx_kl": (ratio - 1 - logratio).mean(), "ratio_max": ratio.max(),
                 "clipfrac": ((ratio - 1).abs() > clip).float().mean()}
    return pg_loss + beta * penalty, {k: v.detach() for k, v in stats.items()}, kl.detach().mean(-1)
