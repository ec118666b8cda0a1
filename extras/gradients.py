"""How well the gradients of the ablation's arms point up the reward.

    python -m extras.gradients runs/seed5 runs/seed6                # of the base models
    python -m extras.gradients runs/ablation/group-5 --policy ppo   # of what PPO made of one

A policy samples rollouts of 16 pairs x 2 prompts x 6 images. Each arm makes its advantages and of
these its gradient, of the same images where it can. REINFORCE's, without a std, is the ruler: its
expectation is the gradient of the expected reward. One rollout's gradient is that and noise:

    norm        the length of an arm's gradients
    signal      the share of its square that is the expected gradient's; the rest is noise
    direction   the cosine of the expected gradient and that of the expected reward
    up          the cosine of one rollout's gradient and that of the expected reward
    gain        of up over `group`'s

+- d and +- g are the standard errors of direction and gain; nan: so few rollouts show no signal.
`truth` and `own-image` have ground truth in all prompts, as in their first rollouts.

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
from eval_paircomp import text_table
from extras.ablation import ARMS, settings_of
from model import empty_ids, generate, load_policy, run_settings, score
from reward import submit
from tokenizer import decode_ids

NAMES = [name for name in ARMS if name != "tuned"]      # that one is `pair`, from another base
TRUTH_PARTS = ["truth: own", "truth: twin's", "truth: sampled"]     # images, add up to `truth`


def gradients_of_run(run, policy_name, rollouts):
    """A PairWorld run folder -> gradients (A, R, D) of the arms, of the parts of `truth`, and of
    REINFORCE."""
    arms, seed = [], run_settings(run, "ppo", "pretrain").get("seed", 0)
    for name in NAMES:
        cfg, make_objective = settings_of(f"{name}-{seed}", "tiny", [])
        cfg = replace(cfg, out=run)
        arms.append((cfg, make_objective(cfg)))
    device = pick_device(cfg.device)
    vq, policy = load_policy(run, policy_name, device, "fp32", "off")
    judge = train.open_judges(cfg, device)["train"]
    pairs = train.train_and_test_pairs(cfg, vq.cfg.image_size, train.SHORT)[0]
    parameters = list(policy.parameters())

    found = []
    for step in tqdm(range(rollouts), desc=run):
        made, gradients, parts = {}, [], []
        for name, (cfg, algo) in zip(NAMES, arms):
            source = algo.draw_pairs, algo.mix_ground_truth if any(cfg.ground_truth) else None
            if source not in made:              # most arms learn from the same images
                made[source] = rollout(cfg, algo, vq, policy, judge, pairs, step)
            ids, tokens, scores, logprobs = made[source]
            advantages = advantages_of(cfg, algo, policy, ids, tokens, scores)
            gradients.append(gradient(logprobs, advantages, parameters))
            if name == "truth":                 # own image, twin's image, samples of each prompt
                sample = torch.arange(len(advantages), device=device)[:, None] % cfg.samples
                parts = [gradient(logprobs, advantages * part, parameters)
                         for part in (sample == 0, sample == 1, sample > 1)]
        _, _, (own, _), logprobs = next(iter(made.values()))        # of `group`, the first arm
        unbiased = (own - own.mean(2, keepdim=True)) * cfg.samples / (cfg.samples - 1)
        gradients += [*parts, gradient(logprobs, unbiased.reshape(-1, 1), parameters)]
        found.append(torch.stack(gradients).cpu())
    return torch.stack(found, 1)                                                # (A, R, D)


def rollout(cfg, algo, vq, policy, judge, pairs, step):
    """What an arm learns from in a rollout, like `train_ppo`, with ground truth in all prompts if
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
            use = torch.ones(P, 2, dtype=torch.bool, device=device)
            tokens, _ = algo.mix_ground_truth(tokens, truth, use)
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


def gradient(logprobs, advantages, parameters):
    """The ascent direction (D,) of mean A log pi: PPO's at the policy that sampled, where all
    ratios are 1 and the KL's gradient is 0."""
    parts = torch.autograd.grad((advantages * logprobs).mean(), parameters, retain_graph=True,
                                allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def compare_gradients(gradients):
    """gradients (A, R, D) of the same R rollouts, `group`'s first and the ruler's last -> {column:
    (values (A,), their standard errors (A,))}. The errors are a jackknife's: by how much the values
    change if one rollout is left out."""
    a, r, d = gradients.shape
    flat = gradients.reshape(a * r, d)
    products = (flat @ flat.T).view(a, r, a, r).double()
    values = columns_of(products)
    without = []
    for k in range(r):
        kept = torch.arange(r) != k
        without.append(columns_of(products[:, kept][:, :, :, kept]))
    errors = {}
    for name in values:
        changed = torch.stack([columns[name] for columns in without])           # (R, A)
        errors[name] = (changed.var(0, correction=0) * (r - 1)).sqrt()          # (A,)
    return {name: (values[name], errors[name]) for name in values}


def columns_of(products):
    """products (A, R, A, R) of all gradients with each other -> {column: values (A,)}. Means of
    products of different rollouts have no noise in them, as their noise has nothing in common."""
    r = products.shape[1]
    different = 1 - torch.eye(r)                                                # (R, R)
    within = products.diagonal(dim1=0, dim2=2).permute(2, 0, 1)                 # (A, R, R)
    squares = within.diagonal(dim1=1, dim2=2)                                   # (A, R)
    signal = (within * different).sum((1, 2)) / (r * (r - 1))                   # (A,)
    with_ruler = (products[:, :, -1] * different).sum(2) / (r - 1)              # (A, R)
    up = (with_ruler / squares.sqrt()).mean(1) / signal[-1].sqrt()              # (A,)
    return {"norm": squares.sqrt().mean(1), "signal": signal / squares.mean(1),
            "direction": with_ruler.mean(1) / (signal * signal[-1]).sqrt(), "up": up,
            "gain": up - up[0]}


def format_gradients(runs):
    """Results of `compare_gradients`, one a run -> the table of their means."""
    rows = [(name, {}) for name in [*NAMES, *TRUTH_PARTS, "REINFORCE"]]
    for column in runs[0]:
        values, errors = (torch.stack(part) for part in zip(*(run[column] for run in runs)))
        mean, error = values.mean(0), errors.square().sum(0).sqrt() / len(runs)     # (A,) each
        for i, (_, cells) in enumerate(rows):
            cells[column] = f"{mean[i]:.3f}"
            if column in ("direction", "gain"):
                cells[f"+- {column[0]}"] = f"{error[i]:.3f}"
    return text_table(rows)


def main(argv=None):
    parser = train.Parser(prog="python -m extras.gradients", description=__doc__,
                          formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders with a model and judges")
    parser.add_argument("--policy", choices=("pretrain", "ppo"), default="pretrain",
                        help="whose rollouts (%(default)s)")
    parser.add_argument("--rollouts", type=int, default=12, help="a run (%(default)s)")
    args = parser.parse_args(argv)
    if args.rollouts < 3:
        raise UserError(f"--rollouts {args.rollouts}: should be at least 3: what they have in "
                        "common is the signal")
    print(format_gradients([compare_gradients(gradients_of_run(run, args.policy, args.rollouts))
                            for run in args.runs]))


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
