"""The difference-aware PPO objective, as pure functions of tensors (FocusDiff, arXiv 2506.05501, Pair-GRPO).

There is no critic. A picture is judged once, when its last token is drawn, so that a value network would have to guess that one
number from half-drawn pictures; the mean reward of the other samples of the same pair is an unbiased baseline that costs nothing.

Shapes: P pairs, 2 prompts, G samples a prompt, B = P*2*G sequences, N image tokens.
"""
import torch

SAMPLED, OWN_TRUTH, TWIN_TRUTH = 0, 1, 2        # where a sequence of the group comes from


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


def mix_ground_truth(tokens, truth, use):
    """Replace the first two samples of each prompt by its own image (the positive example) and its twin's (the hard negative).

    tokens (P, 2, G, N), truth (P, 2, N), use (P, 2) bool -> mixed tokens (P, 2, G, N), origin (P, 2, G) of SAMPLED, OWN_TRUTH and
    TWIN_TRUTH."""
    origin = torch.zeros(tokens.shape[:3], dtype=torch.long, device=tokens.device)
    origin[:, :, 0], origin[:, :, 1] = OWN_TRUTH * use, TWIN_TRUTH * use
    mixed = tokens.clone()
    mixed[:, :, 0] = torch.where(use[..., None], truth, tokens[:, :, 0])
    mixed[:, :, 1] = torch.where(use[..., None], truth.flip(1), tokens[:, :, 1])
    return mixed, origin


def group_advantages(rewards, pool, floor):
    """A = (R - mean) / (std + floor), the mean and std over the pool. rewards (P, 2, G) -> advantages (P, 2, G).

    pool "pair" pools all 2G samples of a pair (Pair-GRPO); "group" pools a prompt's own G (vanilla GRPO). A prompt whose twin is
    harder keeps a positive mean advantage under "pair". The floor keeps a group without spread from blowing up noise."""
    dims = {"pair": (1, 2), "group": (2,)}[pool]
    mean, std = rewards.mean(dims, keepdim=True), rewards.std(dims, keepdim=True, correction=0)
    return (rewards - mean) / (std + floor)


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


def ppo_loss(logprobs, old_logprobs, ref_logprobs, advantages, weights, clip, beta):
    """The clipped objective (Schulman et al. 2017, eq. 7; k3 as in GRPO, eq. 4).

        ratio_t = exp(log pi(o_t) - log pi_old(o_t))
        loss = - mean_t w_t min(ratio_t A, clip(ratio_t, 1 - eps, 1 + eps) A)  +  beta mean_t k3_t

    logprobs, old_logprobs (the ones stored at the rollout), ref_logprobs (None with beta = 0), weights (B, N); advantages (B,).
    Every picture has N tokens, so that the mean over tokens is also the mean over pictures. -> (loss, {name: value tensor})."""
    logratio = (logprobs - old_logprobs).clamp(-20, 20)                 # exp(90) * 0 would be NaN
    ratio = logratio.exp()
    a = advantages[:, None]
    surrogate = torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
    pg_loss = -(weights * surrogate).mean()
    kl = torch.zeros((), device=logprobs.device) if ref_logprobs is None else k3(ref_logprobs, logprobs).mean()
    with torch.no_grad():
        stats = {"pg_loss": pg_loss, "kl": kl, "approx_kl": (ratio - 1 - logratio).mean(), "ratio_max": ratio.max(),
                 "clipfrac": ((ratio - 1).abs() > clip).float().mean()}
    return pg_loss + beta * kl, {k: v.detach() for k, v in stats.items()}
