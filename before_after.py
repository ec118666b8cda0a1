"""What PPO is tested on, and its before and after: the table, the pictures, and what of PairWorld only a known difference can tell.

Shapes: P pairs, N tokens, H W picture.
"""
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from data import PairSet
from eval_paircomp import benchmark, benchmark_pairs, category_means, divergence_auc, format_before_after, read_benchmark
from loop import encode_pairs, read_log, save_picture, show, tokens_of
from model import prompt_divergence
from pairworld import difference_mask
from ppo import spread_difference
from tokenizer import write_atomically


def tested_pairs(cfg, n):
    """What PPO is tested on, n pairs a category: PairWorld's held-out ones, the first of --test, or None with --data alone."""
    if not cfg.test:
        return None if cfg.data else benchmark_pairs(n)
    prompts, categories = read_benchmark(cfg.test)
    rows = [row for category in dict.fromkeys(categories) for row in np.flatnonzero(np.array(categories) == category)[:n]]
    return PairSet([prompts[row] for row in rows], [None] * len(rows), [categories[row] for row in rows])


def tested(model, vq, judges, pairs, cfg):
    """`benchmark` of a policy, with no more pictures at once than a rollout draws where that is bounded."""
    return benchmark(model, vq, judges, pairs, cfg, 2 * cfg.rollout_pairs * cfg.samples or 64, pairworld=not cfg.test)


def finish_benchmark(cfg, policy, reference, vq, judges, test, before):
    """Before/after: the table, paircomp.json and the picture; of PairWorld also how well D_t finds the true difference and where the policy
    changed."""
    (base, base_images), (ppo, ppo_images) = before, tested(policy, vq, judges, test, cfg)
    if not cfg.test:
        for report, model in ((base, reference), (ppo, policy)):
            report["divergence_auc"], report["spread_auc"], _ = true_difference(vq, test, model, model, twins=True)
        *_, ppo["change"] = true_difference(vq, test, policy, reference, twins=False)
    curve = [{"step": e["step"], **e["test"], **{k: e[k] for k in ("grad_norm_of", "kl_of") if k in e}} for e in read_log(cfg) if "test" in e]
    write_atomically(Path(cfg.out) / "paircomp.json", json.dumps({"base": base, "ppo": ppo, "curve": curve, "config": asdict(cfg)}).encode())
    picks = [test.categories.index(category) for category in dict.fromkeys(test.categories)]           # the first of each category, not the best
    shown = {"base": base_images[picks, :, 0], "ppo": ppo_images[picks, :, 0]}                          # (picks, 2, H, W, 3)
    if not cfg.test:
        shown = {"asked": test.images[picks]} | shown
    rows = np.stack(list(shown.values()), 1)                                                            # (picks, 2 or 3, 2, H, W, 3)
    labels = [f"{who}: {text}" for pick in picks for who in shown for text in test.prompts[pick]]
    save_picture(cfg, "before_after.png", rows.reshape(-1, *rows.shape[3:]), labels, columns=2 * len(shown), scale=5)
    print(format_before_after(base, ppo))
    if not cfg.test:
        print("AUC of D_t against the true difference, and of D_t spread over its neighbours:",
              *(f"\n  {who:4} {kind:10} {show(r[kind + '_auc'])}" for who, r in (("base", base), ("ppo", ppo)) for kind in ("divergence", "spread")))
        print("change of the policy, nats a token:", *(f"\n  {where:7} {show(ppo['change'][where])}" for where in ("inside", "outside")))
    print(f"pictures: {Path(cfg.out) / 'samples' / 'before_after.png'}")


@torch.no_grad()
def true_difference(vq, pairs, model, other, twins):
    """Where do model and `other` disagree, on the pairs' true pictures? With `twins` the other is shown the twin's prompt.

    JS of the two, a token at a time, against the true difference -> ({category: AUC}, {category: AUC of spread_difference}, {"inside":
    {category: mean JS of the tokens that differ}, "outside": the same of those that do not}). One model and twins: D_t; two models and the
    same prompt: what PPO changed."""
    device = next(model.parameters()).device
    tokens = encode_pairs(vq, pairs, device).flatten(0, 1).to(device)                                   # (2P, N)
    ids = tokens_of(pairs.texts(), model.cfg.n_text, device)
    others = rearrange(ids, "(p i) t -> p i t", i=2).flip(1).flatten(0, 1) if twins else ids
    divergence = prompt_divergence(model, ids, others, tokens, other=other).cpu()                       # (2P, N)
    spread, divergence = spread_difference(divergence, vq.cfg.grid, 1), divergence.numpy()
    mask = difference_mask(pairs.load(np.arange(len(pairs))), vq.cfg.grid).reshape(len(pairs), -1).repeat(2, 0)
    categories = np.repeat(pairs.categories, 2)
    means = {where: category_means((divergence * m).sum(1) / m.sum(1), categories) for where, m in (("inside", mask), ("outside", ~mask))}
    return *(category_means(divergence_auc(d, mask), categories) for d in (divergence, spread)), means
