"""Does looking at pairs help? Arms of PPO, run and compared; docs/ablation.md has the plan.

    python -m extras.ablation group-0 pair-0            # ARM-SEED ..., from --base runs/tiny
    python -m extras.ablation group-0 group-1 --base "runs/seed{seed}"      # a base of each seed
    python -m extras.ablation group-0 --lr 4e-4 --runs runs/4e-4 --results docs/ablation/grid/4e-4
    python -m extras.ablation --grid docs/ablation/grid/*/*.json         # which lr is best
    python -m extras.ablation --compare docs/ablation/*.json --baseline docs/ablation/group-*.json
    python -m extras.ablation --difference runs/tiny    # how well D_t finds the true difference

An arm is a name, its settings of PPO, and an objective: ppo.py, or an object that has other
functions in place of a few of its. All arms go through `train_ppo` of train.py. A run's folder is
runs/ablation/ARM-SEED, its result docs/ablation/ARM-SEED.json: what paircomp.json holds, the score
on validation pairs, the commit and the machine that made it, and where PPO changed the policy.
A run that was stopped goes on; one that has its result is left alone. Further settings of PPO are
flags too, e.g. --steps 40.

Shapes: P pairs, 2 prompts, G samples a prompt, B = P*2*G sequences, N image tokens of a grid x grid
image. In a comparison: S seeds.
"""
import argparse
import json
import math
import platform
import subprocess
import sys
import zlib
from dataclasses import asdict, replace
from functools import partial
from itertools import combinations, takewhile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from einops import rearrange, repeat

import ppo
import train
from common import (Loop, UserError, first_few, load_module, make_folder, only_process, pick_device,
                    read_json, write_atomically)
from data import read_splits
from eval_paircomp import benchmark, category_means, text_table
from extras.draw_world import difference_mask
from extras.judges import name_judges
from extras.plots import JUDGES, load_pyplot, save_figure
from model import load_policy, prompt_divergence, run_settings, score
from pairworld import GRID, IMAGE_SIZE, different_attributes, pairworld, read_cells
from tokenizer import VQConfig, VQModel, decode_ids, encode_images

# --------------------------------------------------------------------------------------------------
# What the weights are made of in place of D_t. All have the signature of model.prompt_divergence:
# (policy, prompt_ids (B, T), twin_ids (B, T), tokens (B, N), **sampling) -> (B, N).

def shuffled(policy, prompt_ids, twin_ids, tokens, **sampling):
    """D_t of an image of another pair, in a random order: a control. In the own image's D_t, put in
    another order, a weight would hold the values of later tokens, and these depend on the token
    that it weighs."""
    d_t = prompt_divergence(policy, prompt_ids, twin_ids, tokens, **sampling)
    of_another = d_t.roll(len(d_t) // 2, 0)     # prompts stay whole if the pairs are even in number
    return of_another.gather(1, random_like(tokens).argsort(1))


def random_like(tokens):
    """Uniform numbers (B, N) seeded by the tokens, so that a resumed run draws them again. A
    checksum knows nothing of rewards: no weight made of it leans towards good tokens."""
    seed = zlib.crc32(tokens.cpu().numpy().tobytes())
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tokens.shape, generator=generator).to(tokens.device)


def oracle_mask(cfg):
    """1 on the cells in which an image shows what its pair's prompts differ in, as the oracle sees
    it: a reference that no real data has. Unlike D_t it depends on the finished image."""
    path = Path(cfg.out) / "tokenizer.safetensors"
    vq = load_module(path, VQModel, VQConfig, pick_device(cfg.device))

    def mask(policy, prompt_ids, twin_ids, tokens, **sampling):
        prompts = [policy.text.decode(ids) for ids in prompt_ids.tolist()]
        twins = [policy.text.decode(ids) for ids in twin_ids.tolist()]
        cells = shown_in(decode_ids(vq, tokens), list(zip(prompts, twins)), vq.cfg.grid)
        return torch.from_numpy(cells).flatten(1).float().to(tokens.device)

    return mask


# Kinds of cells that carry an attribute; those not listed are carried by the objects.
CARRIERS = {"count": ["object", "style"], "relation": ["object", "ref"], "ref_color": ["ref"],
            "ref_shape": ["ref"], "style": ["style"], "letter": ["letter"]}


def shown_in(images, prompts, grid):
    """Where an image of any quality shows what its pair's prompts differ in: the cells of the kind
    that carries the attribute. images (B, 32, 32, 3) uint8, B tuples of a pair's two prompts ->
    (B, grid, grid) bool, all False for an unpaired prompt, which is its own twin."""
    out = np.zeros((len(images), GRID * GRID), bool)
    for row, cells, pair in zip(out, read_cells(images), prompts):
        if pair[0] == pair[1]:
            continue
        differing = {name for side in different_attributes(pair) for name in side}
        carriers = {kind for name in differing for kind in CARRIERS.get(name, ["object"])}
        row[:] = [kind in carriers for kind, *_ in cells]
    size = grid // GRID                     # tokens a cell
    return repeat(out, "b (y x) -> b (y i) (x j)", y=GRID, i=size, j=size)


# --------------------------------------------------------------------------------------------------
# Objectives: what train_ppo calls in place of ppo.py

def fork(cfg, **functions):
    """ppo.py with other functions in place of a few of its. They need no settings."""
    return SimpleNamespace(**vars(ppo) | functions)


def weights_from_oracle(cfg):
    return fork(cfg, prompt_divergence=oracle_mask(cfg))


def own_image_alone(tokens, truth, use):
    """Ground truth without the twin's image. tokens (B, N), truth (P, 2, N), use (P, 2) bool ->
    mixed (B, N), replaced (B,)."""
    mixed, replaced = ppo.mix_ground_truth(tokens, truth, use)
    samples = len(tokens) // use.numel()                                        # G
    own = torch.arange(len(tokens), device=tokens.device) % samples == 0        # (B,)
    replaced = replaced & own
    return torch.where(replaced[:, None], mixed, tokens), replaced


def strangers(rewards, weights, pool):
    """Advantages (B, 1) in pools of two prompts that are no twins: the second prompts of the pairs
    (P, 2, G) move on by one pair, and their advantages back."""
    def move(x, by):
        return torch.stack([x[:, 0], x[:, 1].roll(by, 0)], 1)
    return move(ppo.group_advantages(move(rewards, 1), pool), -1).reshape(-1, 1)


def shared_std(rewards, weights, pool):
    """Advantages (B, 1): the mean is that of a prompt's samples, the std that of all the rollout's
    deviations. Prompts whose images are about equally good then move the policy little."""
    deviation = rewards - rewards.mean(2, keepdim=True)                 # (P, 2, G)
    return (deviation / (deviation.square().mean().sqrt() + ppo.STD_FLOOR)).reshape(-1, 1)


def pair_std(rewards, weights, pool):
    """Advantages (B, 1): the mean is that of a prompt's samples, the std that of its pair's."""
    deviation = rewards - rewards.mean(2, keepdim=True)                 # (P, 2, G)
    std = rewards.std((1, 2), correction=0, keepdim=True)               # (P, 1, 1)
    return (deviation / (std + ppo.STD_FLOOR)).reshape(-1, 1)


def near_miss_reward(own, twin):
    """S(I, T) + S(I, T') / 2: an image that is wrong in the one detail alone gets half (ours)."""
    return own + twin / 2


class Confused:
    """Samples go to pairs whose twins the base model confuses (ours): of twice as many random pairs
    those with the smallest margins. A pair's margin is how much likelier its two images are by
    their own prompts than by each other's, in nats. A model that learned "left" for "right" has a
    negative one. No image is sampled for it; a pair without images comes last."""
    factor = 2

    def __init__(self, cfg):
        self.vq, self.base = load_policy(cfg.out, "pretrain", pick_device(cfg.device), cfg.dtype)

    def __getattr__(self, name):
        return getattr(ppo, name)

    def draw_pairs(self, rng, pairs, n):
        chosen, prompts, has_images = ppo.draw_pairs(rng, pairs, self.factor * n)
        order = np.where(has_images, self.margins(pairs, chosen, prompts), np.inf).argsort()
        kept = np.sort(order[:n])
        return chosen[kept], [prompts[i] for i in kept], has_images[kept]

    @torch.no_grad()
    def margins(self, pairs, chosen, prompts):
        """Indices of p pairs and their prompts -> margins (p,)."""
        device = self.base.embed_tokens.weight.device
        tokens = train.encode_pairs(self.vq, pairs, chosen, device)             # (p, 2, N)
        ids = self.base.prompt_ids([prompt for pair in prompts for prompt in pair])     # (2p, T)
        own, crossed = (score(self.base, ids, shown.flatten(0, 1))[0].sum(-1)   # (2p,)
                        for shown in (tokens, tokens.flip(1)))
        return (own - crossed).view(-1, 2).sum(1).cpu().numpy()


class Factored:
    """S(I, T) as a product of two rewards with advantages of their own (ours):

        S(I, T) = (S(I, T) + S(I, T')) * C,     C = S(I, T) / (S(I, T) + S(I, T'))

    What the prompts share divides out of the choice C, so that it grades the one detail, even in an
    image that is wrong in all else. The token weights act on the choice's advantage alone. C of an
    unpaired prompt is always 1/2."""

    def __init__(self, cfg):
        self.REWARDS = {"shared": self.shared_reward}
        self.choice = None              # (P, 2, G) of this rollout

    def __getattr__(self, name):
        return getattr(ppo, name)

    def shared_reward(self, own, twin):
        self.choice = choice_reward(own, twin)
        return own + twin

    def token_advantages(self, rewards, weights, pool):
        """rewards (P, 2, G), weights (P, 2, G, N) or None -> (B, N), or (B, 1) without weights."""
        of_choice = ppo.token_advantages(self.choice, weights, pool)
        return ppo.token_advantages(rewards, None, pool) + of_choice


def choice_reward(own, twin, floor=1e-3):
    """C of scores (P, 2, G). The floor lets two scores that are mere noise count as a draw."""
    return (own + floor) / (own + twin + 2 * floor)


# --------------------------------------------------------------------------------------------------
# Arms

GROUP = {"advantage": "group"}
PAIR = {"advantage": "pair"}
WEIGHTS = {"difference": 0.5}
TRUTH = {"ground_truth": [3, 22, 60]}   # the official schedule 50, 450, 1200 of 1600, for 80
ARMS = {  # name: (settings of PPO, objective as a function of the settings, None is ppo.py)
    "group": (GROUP, None),
    "pair": (PAIR, None),
    "strangers": (PAIR, partial(fork, token_advantages=strangers)),
    "shared-std": (GROUP, partial(fork, token_advantages=shared_std)),
    "pair-std": (GROUP, partial(fork, token_advantages=pair_std)),
    "margin": (GROUP | {"reward": "margin"}, None),
    "near-miss": (GROUP | {"reward": "near-miss"},
                  partial(fork, REWARDS={"near-miss": near_miss_reward})),
    "weights": (GROUP | WEIGHTS, None),
    "shuffled": (GROUP | WEIGHTS, partial(fork, prompt_divergence=shuffled)),
    "mask": (GROUP | WEIGHTS, weights_from_oracle),
    "factored": (GROUP | WEIGHTS | {"reward": "shared"}, Factored),
    "truth": (PAIR | TRUTH, None),
    "own-image": (PAIR | TRUTH, partial(fork, mix_ground_truth=own_image_alone)),
    "confused": (GROUP, Confused),
    "tuned": (PAIR, None),              # its base was fine-tuned on the pairs' images: --base
}
# Settings of all arms, unless --preset or a flag says otherwise; the others are the default's.
RECIPE = {"eval_pairs": 60, "lr": 4e-4}

# --------------------------------------------------------------------------------------------------
# Running

ROOT = Path(__file__).parents[1]


def settings_of(run, preset, flags, runs="runs/ablation"):
    """ARM-SEED, further flags of train.py and the folder of the runs -> (settings of PPO, function
    that makes the objective of them)."""
    arm, _, seed = run.rpartition("-")
    if arm not in ARMS or not seed.isdigit():
        raise UserError(f"{run}: should be ARM-SEED, ARM one of {', '.join(ARMS)}")
    overrides, objective = ARMS[arm]
    for word in flags:
        setting = word.split("=")[0].removeprefix("--").replace("-", "_")
        if word.startswith("--") and setting in (*overrides, "seed", "out"):
            raise UserError(f"{word}: arm {arm} and the run's name set this; leave it out")
    argv = ["--stage", "ppo", "--preset", preset]
    if preset == "tiny":
        for setting, value in RECIPE.items():
            argv += [f"--{setting.replace('_', '-')}", str(value)]
    _, _, cfg, _ = train.parse([*argv, *flags, "--seed", seed, "--out", str(Path(runs) / run)])
    cfg = replace(cfg, **overrides)
    train.check(replace(cfg, reward="own"))     # an objective has rewards of its own
    return cfg, objective or (lambda cfg: ppo)


def run_arm(run, args, flags):
    """Train an arm and write its result, RESULTS/ARM-SEED.json, or go on where it was stopped."""
    path = Path(args.results) / f"{run}.json"
    cfg, make_objective = settings_of(run, args.preset, flags, args.runs)
    if cfg.judge or cfg.heldout_judge:
        cfg = name_judges(cfg)
    if path.exists():
        if not same_settings(read_json(path, "result of an arm")["config"], cfg):
            raise UserError(f"{path}: has other settings; give another --results and --runs")
        print(f"{run}: has its result already, {path}")
        return
    out = Path(cfg.out)
    commit = current_commit()
    base = Path(args.base.replace("{seed}", str(cfg.seed)))
    copy_base(base, out, judges=not cfg.judge)
    if (out / "ppo.state").exists() or not (out / "ppo.safetensors").exists():
        print(f"{run}: {cfg}")
        train.begin_folder(cfg, args.preset)
        with only_process(out), Loop("ppo", cfg, resume=True) as loop:
            train.train_ppo(cfg, loop, make_objective(cfg))
    result = read_json(out / "paircomp.json", "result of a PPO run")
    if not same_settings(result["config"], cfg):
        raise UserError(f"{out}: was trained with other settings; remove it to run {run} again")
    device = pick_device(cfg.device)
    if not (cfg.test or cfg.data):      # the true difference is known of PairWorld alone
        for policy, found in difference_of_run(out, device).items():
            result[policy] |= found
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    seconds = [entry["seconds"] for entry in log if entry["stage"] == "ppo" and "step" in entry]
    result |= {"validation_s_g": validation_s_g(cfg, device, *result["ppo_setting"]),
               "commit": commit, "machine": machine(device), "minutes": round(seconds[-1] / 60, 2)}
    for policy in ("base", "ppo"):
        del result[policy]["pairs"]     # a result is committed: it holds means alone
    make_folder(path.parent)
    write_atomically(path, json.dumps(result).encode())
    print(f"{run}: done, {path}")


def same_settings(config, cfg):
    """Whether a result, perhaps of an earlier commit, was made with the settings cfg. What train.py
    did not have then had its default, and the folder does not matter."""
    defaults = asdict(train.PPO())
    return all(config.get(name, defaults[name]) == value for name, value in asdict(cfg).items()
               if name != "out")


def validation_s_g(cfg, device, guidance, temperature):
    """A run's policy on validation pairs, more of them than its quick tests have: what an arm's
    settings are chosen by. The held-out judge's s_g, or the training judge's with --judge alone."""
    vq, policy = load_policy(cfg.out, "ppo", device, cfg.dtype)
    if cfg.data:
        pairs = read_splits(cfg.data, vq.cfg.image_size)["validation"]
    else:
        pairs = pairworld(6 * cfg.eval_pairs, "validation", seed=1)
    judges = train.open_judges(cfg, device)
    judge = judges.get("heldout", judges["train"])
    sampling = SimpleNamespace(guidance=guidance, temperature=temperature, seed=cfg.seed)
    report, _ = benchmark(policy, vq, {"judge": judge}, pairs, sampling)
    return report["judge"]["average"]["s_g"]


def copy_base(base, out, judges=True):
    """The tokenizer, base model and judges of another run. Those that are in `out` already must be
    the same."""
    names = ["tokenizer.safetensors", "pretrain.safetensors"]
    names += ["reward.safetensors"] * judges
    names += ["text.json"] * (base / "text.json").exists()      # of a Janus checkpoint
    for name in names:
        if not (base / name).is_file():
            raise UserError(f"--base {base}: has no {name}; train.py --stage ppo --out {base} "
                            "makes what is missing")
    make_folder(out)
    for name in names:
        content = (base / name).read_bytes()
        if not (out / name).exists():
            write_atomically(out / name, content)
        elif (out / name).read_bytes() != content:
            raise UserError(f"--base {base}: {out / name} is there already and differs; give the "
                            f"base that {out} was begun with, or remove that folder")


def current_commit():
    """The commit of this code, "-dirty" if a Python file differs from it; "unknown" without git."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    try:
        commit = git("rev-parse", "--short", "HEAD").stdout.strip()
        dirty = git("status", "--porcelain", "--", "*.py").stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("-dirty" if dirty else "")


def machine(device):
    """What the last bits of a result depend on, and its minutes."""
    on_cuda = device.type == "cuda"
    return {"processor": processor_name(), "capability": torch.backends.cpu.get_cpu_capability(),
            "device": torch.cuda.get_device_name(device) if on_cuda else device.type,
            "threads": torch.get_num_threads(), "torch": torch.__version__}


def processor_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:                     # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# --------------------------------------------------------------------------------------------------
# Where the prompts differ, and where the policy has changed

def divergence_auc(divergence, mask):
    """How well D_t finds the true difference: the chance that a token inside the mask has a larger
    D_t than one outside, ties counting half. Each row by itself, as the weights are relative too.

    divergence (B, N), mask (B, N) bool -> (B,) AUC, NaN where a row's mask is all or nothing."""
    out = np.full(len(mask), np.nan)
    rows = zip(np.asarray(divergence, np.float64), np.asarray(mask, bool))
    for i, (d, inside) in enumerate(rows):
        if inside.any() and not inside.all():
            out[i] = np.sign(d[inside][:, None] - d[~inside]).mean() / 2 + 0.5
    return out


def true_difference(vq, pairs, model, other, twins):
    """Where do two models disagree, token by token, on the true images of pairs? With `twins` the
    other model reads the twin's prompt: one model and twins is D_t, two models and the same prompt
    is what PPO changed.

    -> ({category: AUC}, {"inside": {category: mean JS of the tokens that truly differ}, "outside":
    of those that do not})."""
    device = model.embed_tokens.weight.device
    images = pairs.load(np.arange(len(pairs)))                                  # (P, 2, H, W, 3)
    tokens = encode_images(vq, rearrange(images, "p i h w c -> (p i) h w c"), device)
    ids = model.prompt_ids(pairs.flat_prompts())                                # (2P, T)
    twin_ids = rearrange(ids, "(p i) t -> p i t", i=2).flip(1).flatten(0, 1)
    divergence = prompt_divergence(model, ids, twin_ids if twins else ids, tokens, other=other)
    divergence = divergence.cpu()                                               # (2P, N)
    mask = difference_mask(images, vq.cfg.grid).reshape(len(pairs), -1).repeat(2, 0)   # (2P, N)
    categories = np.repeat(pairs.categories, 2)

    auc = category_means(divergence_auc(divergence, mask), categories)
    change = {}
    for where, chosen in (("inside", mask), ("outside", ~mask)):
        means = (divergence.numpy() * chosen).sum(1) / chosen.sum(1)            # (2P,)
        change[where] = category_means(means, categories)
    return auc, change


def difference_of_run(run, device):
    """A run of PairWorld with a base model and a policy -> what a result's reports have besides:
    {"base": {"divergence_auc"}, "ppo": {"divergence_auc", "change"}}."""
    models = {}
    for policy, name in (("base", "pretrain"), ("ppo", "ppo")):
        vq, models[policy] = load_policy(run, name, device)
    if vq.cfg.image_size != IMAGE_SIZE or models["base"].text.empty is None:
        raise UserError(f"{run}: is no model of PairWorld, and only there the true difference is "
                        "known")
    pairs = pairworld(6 * run_settings(run, "ppo").get("eval_pairs", 20), "test", seed=0)
    found = {}
    for policy, model in models.items():
        auc, _ = true_difference(vq, pairs, model, model, twins=True)
        found[policy] = {"divergence_auc": auc}
    _, change = true_difference(vq, pairs, models["ppo"], models["base"], twins=False)
    found["ppo"]["change"] = change
    return found


def format_difference(found):
    """The two tables of `difference_of_run`."""
    aucs, changes = [], []
    for policy in ("base", "ppo"):
        values = found[policy]["divergence_auc"]
        aucs.append((f"D_t, {policy}", {c: f"{v:.2f}" for c, v in values.items()}))
    for where, values in found["ppo"]["change"].items():
        changes.append((f"{where} the difference", {c: f"{v:.3f}" for c, v in values.items()}))
    return "\n".join(["AUC of D_t against the true difference (0.5 is chance)", text_table(aucs),
                      "change of the policy by PPO, nats a token", text_table(changes)])


# --------------------------------------------------------------------------------------------------
# Comparing

def read_arms(paths):
    """Folders or files of runs -> {arm: {seed: result}}, in the order in which the arms come."""
    arms = {}
    for path in map(Path, paths):
        file = path / "paircomp.json" if path.is_dir() else path
        result = read_json(file, "result of a PPO run")
        for key in ("base", "ppo", "curve", "config"):
            if not isinstance(result, dict) or key not in result:
                raise UserError(f"{path}: has no {key!r}; should be the paircomp.json that "
                                "train.py --stage ppo leaves, or a result of extras.ablation")
        arm = path.name.removesuffix(".json").rsplit("-", 1)[0]
        seed = result["config"]["seed"]
        if seed in arms.setdefault(arm, {}):
            raise UserError(f"{path}: arm {arm} has a run of seed {seed} already; a run is named "
                            "ARM-SEED")
        arms[arm][seed] = result
    return arms


def metrics_of(report):
    """A report of eval_paircomp.paircomp -> {metric: mean of the categories}: s_a, s_g and their
    gap of each judge, pair accuracy, and what extras/own_images.py reads, as far as the report has
    them. A run with --judge alone has no held-out judge, one with --test neither oracle nor pair
    accuracy, one with --data no oracle that is a judge."""
    metrics = {}
    for judge in JUDGES:
        if judge in report:
            s_a, s_g = (report[judge]["average"][key] for key in ("s_a", "s_g"))
            metrics |= {f"{judge} s_a": s_a, f"{judge} s_g": s_g, f"{judge} gap": s_a - s_g}
    for part in ("pair_accuracy", "exact", "choice"):
        if part in report:
            metrics[part.replace("_", " ")] = report[part]["average"]
    return metrics


def missing_parts(arms):
    """{arm: {seed: result}} -> {judge or "pair_accuracy": the runs without it}."""
    missing = {}
    for arm, results in arms.items():
        for seed, result in results.items():
            for part in (*JUDGES, "pair_accuracy"):
                if part not in result["ppo"]:
                    missing.setdefault(part, []).append(f"{arm}-{seed}")
    return missing


# 97.5 % quantiles of Student's t for 1, 2, ... 10 seeds; one seed says nothing of the others.
T = [math.inf, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]


def interval(values):
    """values (S,) -> (mean, low, high): Student's 95 % interval of the mean. It says what other
    seeds would have given on the same test pairs, if each had a base model of its own."""
    n = len(values)
    error = values.std(ddof=1) / math.sqrt(n) if n > 1 else 1.0
    half = T[min(n, len(T)) - 1] * error        # beyond ten seeds a little wide
    return values.mean(), values.mean() - half, values.mean() + half


def compare(arm, baseline):
    """Two {seed: result} -> ({metric: (arm's mean, baseline's mean, difference, low, high)} of the
    metrics that all these runs have, the seeds that both have)."""
    seeds = sorted(arm.keys() & baseline.keys())
    if not seeds:
        raise UserError(f"no seed in common: {sorted(arm)} and {sorted(baseline)}; runs are paired "
                        "by seed")
    for seed in seeds:
        if arm[seed]["base"]["train"] != baseline[seed]["base"]["train"]:
            raise UserError(f"the runs of seed {seed} began with different base models, judges or "
                            "test pairs; only runs from the same --base compare")
    arm_metrics, baseline_metrics = ([metrics_of(runs[seed]["ppo"]) for seed in seeds]
                                     for runs in (arm, baseline))
    table = {}
    for metric in arm_metrics[0]:
        if all(metric in metrics for metrics in arm_metrics + baseline_metrics):
            a, b = (np.array([metrics[metric] for metrics in runs])             # (S,) each
                    for runs in (arm_metrics, baseline_metrics))
            table[metric] = a.mean(), b.mean(), *interval(a - b)
    return table, seeds


def difference_report(arm):
    """How well D_t finds the true difference and where PPO changed the policy, averaged over the
    arm's seeds: lines of text."""
    def line(label, reports, decimals):
        means = {c: np.mean([report[c] for report in reports]) for c in reports[0]}
        return f"{label}: " + ", ".join(f"{c} {mean:.{decimals}f}" for c, mean in means.items())

    lines = []
    for policy in ("base", "ppo"):
        seen = [r[policy]["divergence_auc"] for r in arm.values() if "divergence_auc" in r[policy]]
        if seen:
            lines.append(line(f"divergence_auc {policy}", seen, 2))
    for where in ("inside", "outside"):
        seen = [r["ppo"]["change"][where] for r in arm.values() if "change" in r["ppo"]]
        if seen:
            lines.append(line(f"change {where} the true difference, nats a token", seen, 3))
    return lines


def format_grid(paths):
    """Results of arms at several learning rates -> the table of their validation s_g, means over
    the seeds, and under it the mean of the arms."""
    scores = {}
    for path in map(Path, paths):
        result = read_json(path, "result of an arm")
        if not isinstance(result, dict) or "validation_s_g" not in result:
            raise UserError(f"{path}: has no 'validation_s_g'; should be a result of "
                            "extras.ablation")
        arm, lr = path.stem.rpartition("-")[0], result["config"]["lr"]
        scores.setdefault(arm, {}).setdefault(lr, []).append(100 * result["validation_s_g"])
    rates = sorted({lr for of_arm in scores.values() for lr in of_arm})
    rows = {arm: {lr: np.mean(of_arm[lr]) if lr in of_arm else math.nan for lr in rates}
            for arm, of_arm in scores.items()}
    rows["mean"] = {lr: np.mean([row[lr] for row in rows.values()]) for lr in rates}
    return text_table([(arm, {f"{lr:g}": f"{value:.1f}" for lr, value in row.items()})
                       for arm, row in rows.items()])


METRICS = ["heldout s_g", "heldout s_a", "heldout gap", "train s_g", "oracle s_g", "pair accuracy",
           "exact", "choice"]


def markdown(arms, baseline_name, baseline):
    """The table of the base model and of every arm against the baseline, x100, with the intervals
    of the differences. It has the metrics that all runs have; a line under it says which runs lack
    what."""
    missing = missing_parts({baseline_name: baseline, **arms})
    before = {seed: result | {"ppo": result["base"]} for seed, result in baseline.items()}
    arms = {baseline_name: baseline, "base": before, **arms}
    tables = {name: compare(arm, baseline) for name, arm in arms.items()}
    metrics = [m for m in METRICS if all(m in table for table, _ in tables.values())]
    rows = [["arm", "seeds", *metrics]]
    for name, (table, seeds) in tables.items():
        row = [name, str(len(seeds))]
        for metric in metrics:
            mean, _, difference, low, high = (100 * value for value in table[metric])
            interval = f" ({difference:+.1f} [{low:+.1f}, {high:+.1f}])"
            row.append(f"{mean:.1f}" + ("" if name == baseline_name else interval))
        rows.append(row)
    lines = [markdown_table(rows)]
    if missing:
        parts = [f"{part} (not in {first_few(runs)})" for part, runs in missing.items()]
        lines += ["", f"not compared: {', '.join(parts)}"]
    return "\n".join(lines)


def markdown_table(rows):
    """Rows of cells, the heading first -> a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines)


def categories_markdown(arms, name):
    """The table of the categories, s_g x100: the baseline `name`'s, and every arm's difference to
    it on the seeds that both have. By the held-out judge, or by the training judge if a run has no
    other."""
    judge, baseline = judge_of_all(arms), arms[name]
    categories = list(next(iter(baseline.values()))["ppo"][judge])
    rows = [["arm", *categories]]
    for arm, runs in arms.items():
        seeds = runs.keys() & baseline.keys()
        means = [np.mean([[100 * of[seed]["ppo"][judge][c]["s_g"] for c in categories]
                          for seed in seeds], 0) for of in (runs, baseline)]    # (categories,) each
        shown = means[0] if arm == name else means[0] - means[1]
        rows.append([arm, *(f"{value:{'' if arm == name else '+'}.1f}" for value in shown)])
    return markdown_table(rows)


def judge_of_all(arms):
    """The held-out judge if all runs have one, else the training judge."""
    results = [result for runs in arms.values() for result in runs.values()]
    return "heldout" if all("heldout" in result["ppo"] for result in results) else "train"


def s_g_at_end(result, judge):
    return 100 * result["ppo"][judge]["average"]["s_g"]


def curve_line(arm, baseline, judge):
    """How fast an arm learns: the mean of the quick tests after the first, and its difference to
    the baseline's. They are at the (w, tau) of training, and on validation pairs: a mean of several
    tests scatters less over the seeds than the end does, but says nothing of it."""
    def mean(result):
        tests = result["curve"][1:] or result["curve"]
        return np.mean([100 * test[judge]["s_g"] for test in tests])

    seeds = sorted(arm.keys() & baseline.keys())
    means = np.array([mean(arm[seed]) for seed in seeds])                       # (S,)
    difference, low, high = interval(means - [mean(baseline[seed]) for seed in seeds])
    return (f"mean of the quick tests, {judge} s_g: {means.mean():.1f} "
            f"({difference:+.1f} [{low:+.1f}, {high:+.1f}])")


def fit(arms, name):
    """s_g x100 of every run as the sum of its arm's effect, its seed's effect and noise, by least
    squares: -> ({arm: (effect over the baseline `name`'s, standard error)}, std of the noise), NaN
    if there are too few runs to tell noise from effects.

    A difference to the baseline has the noise of the baseline's run in it too, and arms ran with
    different seeds. Here all runs of a seed say what its base model is worth."""
    judge = judge_of_all(arms)
    others = [arm for arm in arms if arm != name]
    seeds = sorted({seed for runs in arms.values() for seed in runs})
    design, values = [], []             # (runs, others + seeds), (runs,)
    for arm, runs in arms.items():
        for seed, result in runs.items():
            design.append([arm == other for other in others] + [seed == s for s in seeds])
            values.append(s_g_at_end(result, judge))
    design, values = np.array(design, float), np.array(values)
    effects, _, rank, _ = np.linalg.lstsq(design, values, rcond=None)
    spare = len(values) - rank          # degrees of freedom
    squares = np.square(values - design @ effects).sum()
    std = math.sqrt(squares / spare) if spare else math.nan
    errors = std * np.sqrt(np.diag(np.linalg.pinv(design.T @ design)))
    return dict(zip(others, zip(effects, errors))), std


def fit_markdown(arms, name):
    """The effects of `fit` as a table."""
    effects, std = fit(arms, name)
    rows = [["arm", f"over {name}", "+-"]]
    rows += [[arm, f"{effect:+.1f}", f"{error:.1f}"] for arm, (effect, error) in effects.items()]
    return f"{markdown_table(rows)}\nstd of a run's noise: {std:.1f}"


RANKED = ["heldout s_g", "oracle s_g", "pair accuracy"]


def ranking(arms, baseline):
    """Do the judges rank the arms alike? By the difference to the baseline, as arms may have run
    with different seeds: lines of text, best arm first."""
    tables = [compare(runs, baseline)[0] for runs in arms.values()]
    gains = {metric: [table[metric][2] for table in tables] for metric in RANKED
             if all(metric in table for table in tables)}
    pairs = list(combinations(range(len(arms)), 2))
    lines, first = [], next(iter(gains), None)
    for metric, of_arm in gains.items():
        order = [name for _, name in sorted(zip(of_arm, arms), reverse=True)]
        lines.append(f"{metric}: {' > '.join(order)}")
        if metric != first:
            alike = sum((gains[first][i] - gains[first][j]) * (of_arm[i] - of_arm[j]) > 0
                        for i, j in pairs)
            lines[-1] += f" ({alike} of {len(pairs)} pairs of arms in the order of {first})"
    return lines


def run_compare(paths, baseline_paths, out):
    """Print the table of each arm against the baseline, and draw it with --out."""
    arms = read_arms(paths)
    baseline = read_arms(baseline_paths)
    if len(baseline) > 1:
        raise UserError("--baseline: should be the runs of one arm, found "
                        f"{', '.join(baseline)}")
    (name, runs), = baseline.items()
    arms.pop(name, None)
    print(markdown(arms, name, runs))
    arms = {name: runs, **arms}
    judge = judge_of_all(arms)
    print(f"\n{judge} s_g by category", categories_markdown(arms, name), sep="\n")
    print("\nranking", *ranking(arms, runs), sep="\n  ")
    print(f"\n{judge} s_g as arm + seed + noise", fit_markdown(arms, name), sep="\n")
    for arm, results in arms.items():
        print(f"\n{arm}", curve_line(results, runs, judge), sep="\n  ")
        print(*(f"  {line}" for line in difference_report(results)), sep="\n")
    if out:
        draw_comparison(arms, name, out)
        print(f"image: {out}")


def draw_comparison(arms, name, path):
    """{arm: {seed: result}} of `read_arms`, the baseline `name` among them -> an image of the
    differences to the baseline on the seeds that both have: their mean along the quick tests, and
    at the end a dot a seed with the 95 % interval of the mean, from three seeds on. By the held-out
    judge, or by the training judge if a run has no other. UserError without matplotlib."""
    try:
        plt = load_pyplot()
    except ImportError:
        raise UserError(f"--out {path}: wants matplotlib; pip install matplotlib") from None
    figure, (curves, ends) = plt.subplots(1, 2, figsize=(13, 5.5))
    judge = judge_of_all(arms)
    judge_name = {"heldout": "held-out", "train": "training"}[judge]
    colors = plt.get_cmap("tab20").colors
    labels = []
    for row, (arm, runs) in enumerate(arms.items()):
        color, baseline = colors[row % len(colors)], arms[name]
        seeds = sorted(runs.keys() & baseline.keys())
        labels.append(f"{arm} ({len(seeds)})")
        pairs = [(runs[seed], baseline[seed]) for seed in seeds]
        tests = min(len(result["curve"]) for pair in pairs for result in pair)
        gains = [[100 * (a["curve"][i][judge]["s_g"] - b["curve"][i][judge]["s_g"])
                  for i in range(tests)] for a, b in pairs]                     # (S, tests)
        steps = [test["step"] for test in pairs[0][0]["curve"][:tests]]
        curves.plot(steps, np.mean(gains, 0), color=color, label=arm)

        gains = np.array([s_g_at_end(a, judge) - s_g_at_end(b, judge) for a, b in pairs])   # (S,)
        mean, low, high = interval(gains)
        ends.plot(gains, [row] * len(seeds), "o", color=color, alpha=0.5)
        ends.plot([mean], [row], "|", color="black", markersize=14)
        if len(seeds) > 2:              # that of two is wider than all the others together
            ends.plot([low, high], [row, row], color="black", linewidth=1)
    curves.set(xlabel="rollouts", ylabel=f"points of {judge_name} s_g",
               title=f"quick tests: mean difference to {name}")
    curves.legend(fontsize=8)
    ends.set_yticks(range(len(arms)), labels)
    ends.invert_yaxis()
    ends.axvline(0, color="gray", linewidth=1)
    ends.set(title=f"at the end: difference to {name}, a dot a seed",
             xlabel=f"points of {judge_name} s_g")
    save_figure(plt, figure, (curves, ends), path)


# --------------------------------------------------------------------------------------------------
# Command line

def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    runs = list(takewhile(lambda word: not word.startswith("-"), argv))
    parser = train.Parser(prog="python -m extras.ablation", description=__doc__, allow_abbrev=False,
                          usage="%(prog)s ARM-SEED ... | --compare RUN ... | --grid RESULT ... | "
                          "--difference RUN",
                          formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", metavar="RUN", default="runs/tiny",
                        help="whose tokenizer, base model and judges are used; {seed} in it is the "
                        "run's (%(default)s)")
    parser.add_argument("--preset", choices=list(train.PRESETS), default="tiny",
                        help="with tiny the recipe of docs/ablation.md (%(default)s)")
    parser.add_argument("--runs", metavar="DIR", default="runs/ablation",
                        help="where the folders ARM-SEED of the runs are (%(default)s)")
    parser.add_argument("--results", metavar="DIR", default="docs/ablation",
                        help="where a run's result goes (%(default)s)")
    parser.add_argument("--compare", metavar="RUN", nargs="+",
                        help="folders or results of runs named ARM-SEED, against --baseline")
    parser.add_argument("--baseline", metavar="RUN", nargs="+", help="the runs of one arm")
    parser.add_argument("--grid", metavar="RESULT", nargs="+",
                        help="results of one seed at several learning rates: validation s_g")
    parser.add_argument("--out", metavar="PNG", help="draw the comparison too")
    parser.add_argument("--difference", metavar="RUN", help="AUC of D_t before and after PPO, and "
                        "where PPO changed the policy")
    args, flags = parser.parse_known_args(argv[len(runs):])
    if sum(map(bool, (runs, args.compare, args.grid, args.difference))) != 1:
        raise UserError("say one of: ARM-SEED ..., --compare RUN ... --baseline RUN ..., --grid "
                        f"RESULT ..., or --difference RUN; arms are {', '.join(ARMS)}")
    if bool(args.compare) != bool(args.baseline):
        raise UserError("--compare and --baseline go together")
    if args.out and not args.compare:
        raise UserError("--out: goes with --compare; --runs says where arms are trained")
    if flags and not runs:
        raise UserError(f"{flags[0]}: goes with ARM-SEED ... alone")
    if args.compare:
        run_compare(args.compare, args.baseline, args.out)
    elif args.grid:
        print(format_grid(args.grid))
    elif args.difference:
        print(format_difference(difference_of_run(args.difference, pick_device("auto"))))
    for run in runs:
        run_arm(run, args, flags)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
