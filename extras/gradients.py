"""Why does an arm of the ablation gain, or not? How well its gradients point up the reward.

    python -m extras.gradients runs/seed5 runs/seed6                # of the base models
    python -m extras.gradients runs/ablation/group-5 --policy ppo   # of what PPO made of one

A policy samples rollouts of 16 pairs x 2 prompts x 6 images. Each arm makes its advantages and of
these its gradient, of the same images where it can. REINFORCE's, without a std, is the ruler: its
expectation is the gradient of the expected reward. One rollout's gradient is that and noise:

    norm        the length of an arm's gradients
    signal      how much of their square all rollouts have in common; the rest is noise
    direction   the cosine of what they have in common and the gradient of the expected reward
    up          the cosine of one rollout's gradient and the gradient of the expected reward
    gain        of up over `group`'s, and its standard error over the rollouts

Shapes: P pairs, 2 prompts, G samples a prompt, B = P*2*G sequences, N image tokens; A arms,
R rollouts, D weights.
"""
import argparse
import sys
from dataclasses import replace

import torch
from tqdm import tqdm

import train
from common import UserError, pick_device, step_random
from eval_paircomp import mean_and_error, text_table
from extras.ablation import ARMS, settings_of
from model import empty_ids, generate, load_policy, score
from reward import submit
from tokenizer import decode_ids

NAMES = [name for name in ARMS if name != "tuned"]      # that one is `pair`, from another base
TRUTH_PARTS = ["truth: own", "truth: twin's", "truth: sampled"]     # images, add up to `truth`


def gradients_of_run(run, policy_name, rollouts):
    """A PairWorld run folder -> gradients (A, R, D) of the arms, of the parts of `truth`, and of
    REINFORCE."""
    arms = []
    for name in NAMES:
        cfg, make_objective = settings_of(f"{name}-0", "tiny", [])
        cfg = replace(cfg, out=run)
        arms.append((cfg, make_objective(cfg)))
    device = pick_device(cfg.device)
    vq, policy = load_policy(run, policy_name, device, "fp32", "off")
    judge = train.open_judges(cfg, device)["train"]
    pairs = train.train_and_test_pairs(cfg, vq.cfg.image_size, train.SHORT)[0]
    weights = list(policy.parameters())

    found = []
    for step in tqdm(range(rollouts), desc=run):
        made, gradients, parts = {}, [], []
        for name, (cfg, algo) in zip(NAMES, arms):
            images_of = algo.draw_pairs, algo.mix_ground_truth if any(cfg.ground_truth) else None
            if images_of not in made:           # most arms learn from the same images
                made[images_of] = rollout(cfg, algo, vq, policy, judge, pairs, step)
            advantages = advantages_of(cfg, algo, policy, *made[images_of][:3])
            logprobs = made[images_of][3]
            gradients.append(gradient(logprobs, advantages, weights))
            if name == "truth":                 # own image, twin's image, samples of each prompt
                sample = torch.arange(len(advantages), device=device)[:, None] % cfg.samples
                parts = [gradient(logprobs, advantages * part, weights)
                         for part in (sample == 0, sample == 1, sample > 1)]
        _, _, (own, _), logprobs = next(iter(made.values()))        # of `group`, the first arm
        unbiased = (own - own.mean(2, keepdim=True)) * cfg.samples / (cfg.samples - 1)
        gradients += [*parts, gradient(logprobs, unbiased.reshape(-1, 1), weights)]
        found.append(torch.stack(gradients))
    return torch.stack(found, 1)                                                # (A, R, D)


def rollout(cfg, algo, vq, policy, judge, pairs, step):
    """What an arm learns from in a rollout, as in `train_ppo`, with ground truth in all prompts if
    the arm has it -> ids (B, T), tokens (B, N), scores for the own and for the twin's prompt
    (P, 2, G) each, and log-probs (B, N) with their graph."""
    device, P, G = policy.embed_tokens.weight.device, cfg.pairs, cfg.samples
    rng, generator = step_random(cfg, "ppo", step, device)
    sampling = sampling_of(cfg, policy)
    with torch.no_grad():
        chosen, drawn, _ = algo.draw_pairs(rng, pairs, P)
        prompts = [prompt for pair in drawn for prompt in pair]                 # 2P
        ids = policy.prompt_ids(prompts).repeat_interleave(G, 0)                # (B, T)
        tokens, _ = generate(policy, ids[::G], samples=G, generator=generator, **sampling)
        if any(cfg.ground_truth):
            truth = train.encode_pairs(vq, pairs, chosen, device)               # (P, 2, N)
            tokens, _ = algo.mix_ground_truth(tokens, truth, torch.ones(P, 2, dtype=torch.bool))
        images = decode_ids(vq, tokens)                                         # (B, H, W, 3)
        asked = [prompt for prompt in prompts for _ in range(G)]
        twins = [prompt for pair in drawn for prompt in pair[::-1] for _ in range(G)]
        scores = [submit(judge, images, of)().to(device).view(P, 2, G) for of in (asked, twins)]
    return ids, tokens, scores, score(policy, ids, tokens, **sampling)[0]


def sampling_of(cfg, policy):
    return dict(empty=empty_ids(policy), guidance=cfg.guidance, temperature=cfg.temperature)


@torch.no_grad()
def advantages_of(cfg, algo, policy, ids, tokens, scores):
    """The advantages (B, N or 1) that an arm makes of a rollout, as in `train_ppo`."""
    rewards = algo.REWARDS[cfg.reward](*scores[:1 if cfg.reward == "own" else 2])
    weights = None
    if cfg.difference > 0:
        shape = scores[0].shape
        twin_ids = ids.view(*shape, -1).flip(1).flatten(0, 2)                   # (B, T)
        d_t = algo.prompt_divergence(policy, ids, twin_ids, tokens, **sampling_of(cfg, policy))
        weights = algo.difference_weights(d_t.view(*shape, -1), cfg.difference)
    return algo.token_advantages(rewards, weights, cfg.advantage)


def gradient(logprobs, advantages, weights):
    """The ascent direction (D,) of mean A log pi: PPO's at the policy that sampled, where all
    ratios are 1 and the KL's gradient is 0."""
    parts = torch.autograd.grad((advantages * logprobs).mean(), weights, retain_graph=True,
                                allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def compare_gradients(gradients):
    """gradients (A, R, D) of the same R rollouts, the ruler's last -> norm, signal, direction (A,)
    each, and up (A, R). Means of products are over different rollouts: these have no noise in
    common, so that it drops out."""
    a, r, d = gradients.shape
    flat = gradients.reshape(a * r, d)
    products = (flat @ flat.T).view(a, r, a, r)
    others = 1 - torch.eye(r)                                                   # (R, R)
    n = r * (r - 1)
    own = products.diagonal(dim1=0, dim2=2).permute(2, 0, 1)                    # (A, R, R)
    squares = own.diagonal(dim1=1, dim2=2)                                      # (A, R)
    common = (own * others).sum((1, 2)) / n                                     # (A,)
    with_ruler = (products[:, :, -1] * others).sum(2) / (r - 1)                 # (A, R)
    up = with_ruler / squares.sqrt() / common[-1].sqrt()
    direction = with_ruler.mean(1) / (common * common[-1]).sqrt()
    return squares.sqrt().mean(1), common / squares.mean(1), direction, up


def format_gradients(runs):
    """Results of `compare_gradients`, one a run -> the table, means over the runs. The standard
    errors are over all rollouts."""
    norm, signal, direction = (torch.stack(part).mean(0) for part in list(zip(*runs))[:3])
    up = torch.cat([run[3] for run in runs], 1)                                 # (A, all R)
    rows = []
    for i, name in enumerate([*NAMES, *TRUTH_PARTS, "REINFORCE"]):
        gain, error = mean_and_error(up[i] - up[0])
        rows.append((name, {"norm": f"{norm[i]:.3f}", "signal": f"{signal[i]:.2f}",
                            "direction": f"{direction[i]:.2f}", "up": f"{up[i].mean():.3f}",
                            "gain": f"{gain:+.3f}", "error": f"{error:.3f}"}))
    return text_table(rows)


def main(argv=None):
    parser = train.Parser(prog="python -m extras.gradients", description=__doc__,
                          formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders with a model and judges")
    parser.add_argument("--policy", choices=("pretrain", "ppo"), default="pretrain",
                        help="whose rollouts (%(default)s)")
    parser.add_argument("--rollouts", type=int, default=16, help="a run (%(default)s)")
    args = parser.parse_args(argv)
    if args.rollouts < 2:
        raise UserError(f"--rollouts {args.rollouts}: should be at least 2: what they have in "
                        "common is the signal")
    print(format_gradients([compare_gradients(gradients_of_run(run, args.policy, args.rollouts))
                            for run in args.runs]))


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
