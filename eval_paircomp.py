"""PairComp: does each prompt of a pair get its own detail?

    python eval_paircomp.py --run runs/tiny                     # the PairWorld benchmark, of a run
    python eval_paircomp.py --run runs/tiny --policy pretrain   # the same before PPO
    python eval_paircomp.py generate --run RUN --prompts PairComp.json --images DIR
    python eval_paircomp.py score --images DIR --prompts PairComp.json --judge J --out scores.json
    python eval_paircomp.py summarize scores.json --prompts PairComp.json   # the paper's table

A pair has two prompts with K images each, so 2K scores in [0, 1]. s_a is their arithmetic mean. s_g
is their geometric mean, which one bad image pulls down. Both are averaged over the pairs of a
category, and `average` is the mean of the categories (official code: summary_scores.py).

The oracle's scores are 0 or 1, so its s_g is the share of pairs in which all 2K images are right in
everything that their prompts name. *Pair accuracy* asks less: in how many pairs the oracle reads
the attribute in which the prompts *differ* right off all 2K images. Scores are 0..1 in files and
x100 in tables.

Shapes: P pairs, 2 prompts, K images a prompt, R prompts, N tokens, H W image.
"""
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from common import UserError, load_weights, make_folder, save_weights, write_atomically
from data import image_grid
from model import empty_ids, generate
from pairworld import ATTRIBUTES, CATEGORIES, different_attributes, pairworld, read_scene
from tokenizer import decode_ids

IMAGES_PER_PROMPT = 2                   # K of the official protocol
QUICK_PAIRS = 4                         # test pairs a category in the quick tests during PPO


# -- The arithmetic --------------------------------------------------------------------------------
def category_means(values, categories):
    """values (P,), P categories -> {category: mean, ..., "average": mean of the means}, in the
    paper's order."""
    values = np.asarray(values, np.float64)
    categories = np.asarray(categories)
    names = dict.fromkeys([*CATEGORIES, *categories.tolist()])
    means = {c: float(values[categories == c].mean()) for c in names if c in categories}
    return means | {"average": float(np.mean(list(means.values())))}


def summarize(scores, categories):
    """Scores (P, 4) or (P, 2, K) in 0..1, P categories -> {category: {"s_a", "s_g"}, ...,
    "average": {"s_a", "s_g"}}."""
    scores = np.asarray(scores, np.float64).reshape(len(categories), -1)        # (P, 2K)
    s_a = category_means(scores.mean(1), categories)
    s_g = category_means(scores.prod(1) ** (1 / scores.shape[1]), categories)
    return {c: {"s_a": s_a[c], "s_g": s_g[c]} for c in s_a}


def pair_accuracy(images, prompts):
    """images (P, 2, K, H, W, 3) uint8, P tuples of two PairWorld captions -> (P,) of 0 and 1."""
    n_pairs, _, k = images.shape[:3]
    found = read_scene(rearrange(images, "p i k h w c -> (p i k) h w c"))
    found = found.reshape(n_pairs, 2, k, -1)                            # (P, 2, K, 10)
    names = list(ATTRIBUTES)
    out = np.zeros(n_pairs)
    for p, pair in enumerate(prompts):
        right = []
        for i, asked in enumerate(different_attributes(pair)):
            for name, value in asked.items():
                right.append(found[p, i, :, names.index(name)] == value)
        out[p] = np.all(right)
    return out


def paircomp(images, pairs, judges, pairworld=False):
    """images (P, 2, K, H, W, 3) uint8, a PairSet, {name: judge} -> {name: summarize(...), ...,
    "pairs": what was averaged}. With pairworld, every prompt is a caption of PairWorld and
    "pair_accuracy" {category: mean} comes too."""
    k = images.shape[2]
    flat = rearrange(images, "p i k h w c -> (p i k) h w c")
    prompts = [prompt for prompt in pairs.flat_prompts() for _ in range(k)]
    report, raw = {}, {}
    for name, judge in judges.items():
        scores = judge.score(flat, prompts).view(len(pairs), 2 * k).numpy()
        known = np.isfinite(scores).all(1)              # NaN: the judge could not answer
        if not known.all():
            print(f"{name} judge: no answer to {np.isnan(scores).sum()} images; of its averages "
                  f"{(~known).sum()} of {len(known)} pairs are left out")
        if not known.any():
            raise UserError(f"the {name} judge answers to no pair; choose another")
        categories = [c for c, ok in zip(pairs.categories, known) if ok]
        report[name] = summarize(scores[known], categories)
        raw[name] = [[float(f"{value:.4g}") if value == value else None for value in row]
                     for row in scores.tolist()]
    if pairworld:
        right = pair_accuracy(images, pairs.prompts)
        raw["pair_accuracy"] = right.astype(int).tolist()
    raw["categories"] = list(pairs.categories)
    report["pairs"] = raw
    if pairworld:
        report["pair_accuracy"] = category_means(right, pairs.categories)
    return report


# -- Images of a policy ----------------------------------------------------------------------------
def image_chunks(model, vq, prompts, per_prompt, guidance, temperature, seed, batch=64,
                 wanted=None):
    """Images of R prompts, about `batch` at a time. Yields (indices of the prompts, images
    (r, K, H, W, 3) uint8).

    A chunk's randomness follows from (seed, number of the chunk) alone, so that a chunk can be left
    out, wanted(indices) = False, without a change in the others."""
    device = model.embed_tokens.weight.device
    model.prompt_ids(prompts)           # one that is too long is an error now, not half way
    batch = min(batch, len(prompts) * per_prompt)
    step = max(1, batch // per_prompt)
    for chunk, start in enumerate(range(0, len(prompts), step)):
        indices = range(start, min(start + step, len(prompts)))
        if wanted and not wanted(indices):
            continue
        state = np.random.SeedSequence([seed, chunk]).generate_state(1, np.uint64)[0]
        generator = torch.Generator(device).manual_seed(int(state >> 1))
        ids = model.prompt_ids([prompts[i] for i in indices])
        tokens, _ = generate(model, ids, empty_ids(model), per_prompt, guidance, temperature,
                             generator, batch)                          # (r*K, N)
        images = decode_ids(vq, tokens)
        yield indices, rearrange(images, "(r k) h w c -> r k h w c", k=per_prompt)


def generate_images(model, vq, prompts, per_prompt, guidance, temperature, seed, batch=64,
                    progress=None):
    """R prompts -> (R, K, H, W, 3) uint8. progress (tqdm's update) gets the number of prompts."""
    out = []
    for indices, images in image_chunks(model, vq, prompts, per_prompt, guidance, temperature, seed,
                                        batch):
        out.append(images)
        if progress:
            progress(len(indices))
    return np.concatenate(out)


# -- Before and after PPO --------------------------------------------------------------------------
def benchmark_pairs(n_per_category=20):
    """The PairWorld benchmark: the same held-out pairs for every run -> PairSet."""
    return pairworld(6 * n_per_category, "test", seed=0)


def benchmark(model, vq, judges, pairs, cfg, batch=64, progress=None, pairworld=True):
    """A policy's images of the pairs' prompts, judged -> (report of `paircomp`, images
    (P, 2, K, H, W, 3)). cfg has guidance, temperature and seed."""
    images = generate_images(model.eval(), vq, pairs.flat_prompts(), IMAGES_PER_PROMPT,
                             cfg.guidance, cfg.temperature, cfg.seed, batch, progress)
    images = rearrange(images, "(p i) k h w c -> p i k h w c", i=2)
    return paircomp(images, pairs, judges, pairworld), images


class BeforeAfter:
    """The test of a PPO run: quick tests on the way, and a table of the base model and the policy.

    It is taken on PairWorld's held-out pairs, or on those of --test. With --data alone there is
    nothing to test on."""

    def __init__(self, cfg, vq, judges):
        self.cfg = cfg
        self.vq = vq
        self.judges = judges
        self.pairs = self.test_pairs(cfg.eval_pairs)
        self.quick_pairs = self.test_pairs(QUICK_PAIRS)
        categories = self.pairs.categories if self.pairs else []
        # What before_after.png shows: the first pair of each category, not the best.
        self.picks = [categories.index(category) for category in dict.fromkeys(categories)]

    def test_pairs(self, n_per_category):
        """The first n pairs of each category -> PairSet, or None."""
        if not self.cfg.test:
            return None if self.cfg.data else benchmark_pairs(n_per_category)
        from extras.paircomp_files import first_pairs
        return first_pairs(self.cfg.test, n_per_category)

    def run(self, model, pairs):
        at_once = 8 * self.cfg.microbatch or 64
        return benchmark(model, self.vq, self.judges, pairs, self.cfg, at_once,
                         pairworld=not self.cfg.test)

    def quick(self, model):
        """{"test": {judge: {"s_a", "s_g"}, ...}} of the quick pairs, for the log; {} if none."""
        if self.quick_pairs is None:
            return {}
        report, _ = self.run(model, self.quick_pairs)
        names = [name for name in (*self.judges, "pair_accuracy") if name in report]
        return {"test": {name: report[name]["average"] for name in names}}

    def before(self, reference, loop):
        """The base model's side of the table. A resumed run keeps the one that it began with."""
        kept = loop.path.with_suffix(".before")
        if self.pairs is None:
            return
        if loop.resumed and kept.exists():
            tensors, meta = load_weights(kept)
            self.base = meta["report"]
            self.base_images = tensors["images"].numpy()
        else:
            self.base, images = self.run(reference, self.pairs)
            reference.graphed = None    # it samples no more: its caches are free for the policy
            self.base_images = self.first_images(images)
            save_weights(kept, {"images": torch.from_numpy(self.base_images)}, report=self.base)

    def first_images(self, images):
        """images (P, 2, K, H, W, 3) -> (categories, 2, H, W, 3): of each pick the first image of
        each prompt."""
        return images[self.picks, :, 0]

    def after(self, policy, steps):
        """Print the table, write paircomp.json and samples/before_after.png. steps: the run's log,
        whose quick tests are kept as the curve."""
        if self.pairs is None:
            print(without_test(steps))
            return
        curve = [{"step": e["step"], **e["test"]} for e in steps if "test" in e]
        out = Path(self.cfg.out)
        ppo, images = self.run(policy, self.pairs)
        result = {"base": self.base, "ppo": ppo, "curve": curve, "config": asdict(self.cfg)}
        write_atomically(out / "paircomp.json", json.dumps(result).encode())
        path = out / "samples" / "before_after.png"
        self.draw(path, self.first_images(images))
        print(format_before_after(self.base, ppo))
        print(f"images: {path}")

    def draw(self, path, ppo_images):
        """What is asked, if the pairs have images, the base model's images and the policy's."""
        shown = {"base": self.base_images, "ppo": ppo_images}           # (categories, 2, H, W, 3)
        if self.pairs.has_images(self.picks).all():
            shown = {"asked": self.pairs.load(self.picks)} | shown
        rows = np.stack(list(shown.values()), 1)                        # (.., 2 or 3, 2, H, W, 3)
        labels = []
        for pick in self.picks:
            for policy in shown:
                labels += [f"{policy}: {prompt}" for prompt in self.pairs.prompts[pick]]
        make_folder(path.parent)
        scale = max(1, 160 // rows.shape[3])
        flat = rows.reshape(-1, *rows.shape[3:])
        image_grid(flat, labels, 2 * len(shown), scale).save(path)


def without_test(steps):
    """What the log of a run without a test can say of it."""
    tenth = -(-len(steps) // 10)
    first, last = steps[:tenth], steps[-tenth:]
    reward, kl = ([np.nanmean([e[key] for e in part]) for part in (first, last)]
                  for key in ("reward", "kl"))
    worse = not reward[1] >= reward[0] - 0.01           # prompts differ from rollout to rollout
    better = "FELL: this policy may be worse than its base" if worse else "did not fall"
    return (f"not tested: --data without --test has no held-out pairs. Mean of the first and the "
            f"last {tenth} rollouts: reward {reward[0]:.3f} -> {reward[1]:.3f}, KL {kl[0]:.3f} -> "
            f"{kl[1]:.3f}. The reward of the training judge {better}")


# -- Tables ----------------------------------------------------------------------------------------
def report_lines(report):
    """(label, {column: value}) for every line of a report."""
    for name, summary in report.items():
        if name == "pair_accuracy":
            yield "pair accuracy", summary
        elif name != "pairs":
            for key in ("s_a", "s_g"):
                yield f"{name} {key}", {c: values[key] for c, values in summary.items()}


def text_table(rows):
    """Rows of (label, {column: text}) under a heading of the columns."""
    columns = list(rows[0][1])
    width = max(len(label) for label, _ in rows)
    lines = [" " * width + "".join(f"{c:>10}" for c in columns)]
    for label, cells in rows:
        lines.append(label.ljust(width) + "".join(f"{cells.get(c, ''):>10}" for c in columns))
    return "\n".join(lines)


def percents(values):
    return {c: f"{100 * v:.1f}" for c, v in values.items()}


def format_before_after(base, ppo):
    """Two reports -> a table, x100: base, ppo and relative gain of every line."""
    after = dict(report_lines(ppo))
    rows = []
    for label, before in report_lines(base):
        rows.append((f"{label:<14} base", percents(before)))
        rows.append((f"{label:<14} ppo", percents(after[label])))
        gains = {c: f"{100 * (after[label][c] / v - 1):+.1f}%" if v else "-"
                 for c, v in before.items() if c in after[label]}
        rows.append((f"{label:<14} gain", gains))
    return text_table(rows)


# -- The command -----------------------------------------------------------------------------------
def main(argv=None):
    from extras.paircomp_files import run
    run(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
