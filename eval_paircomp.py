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

On own images (train.py --data) the oracle is the set of images itself: extras/own_images.py.

Shapes: P pairs, 2 prompts, K images a prompt, R prompts, N tokens, H W image.
"""
import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from common import UserError, gather, leads, load_weights, make_folder, save_weights, share
from common import world, write_atomically
from data import TEST_PAIRS, image_grid, read_splits
from model import empty_ids, generate
from pairworld import ATTRIBUTES, CATEGORIES, different_attributes, pairworld, read_scene
from tokenizer import decode_ids

IMAGES_PER_PROMPT = 2                   # K of the official protocol
VALIDATION_PAIRS = 48                   # at most; what PPO's rule and the choice of (w, tau) see
TEMPERATURES = (1.0, 0.6, 0.4)          # of which each model has its best


# -- The arithmetic --------------------------------------------------------------------------------
def category_means(values, categories):
    """values (P,), P categories -> {category: mean, ..., "average": mean of the means}, in the
    paper's order. Without categories (all "") the average is all."""
    values = np.asarray(values, np.float64)
    categories = np.asarray(categories)
    if set(categories.tolist()) == {""}:
        return {"average": float(values.mean())}
    names = dict.fromkeys([*CATEGORIES, *categories.tolist()])
    means = {c: float(values[categories == c].mean()) for c in names if c in categories}
    return means | {"average": float(np.mean(list(means.values())))}


def geometric_mean(scores):
    """Scores (P, 2K) -> (P,), NaN where one is."""
    return scores.prod(1) ** (1 / scores.shape[1])


def summarize(scores, categories):
    """Scores (P, 4) or (P, 2, K) in 0..1, P categories -> {category: {"s_a", "s_g"}, ...,
    "average": {"s_a", "s_g"}}."""
    scores = np.asarray(scores, np.float64).reshape(len(categories), -1)        # (P, 2K)
    s_a = category_means(scores.mean(1), categories)
    s_g = category_means(geometric_mean(scores), categories)
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


def paircomp(images, pairs, judges, measure=None):
    """images (P, 2, K, H, W, 3) uint8, a PairSet, {name: judge} -> {name: summarize(...), ...,
    "pairs": what was averaged}. measure(images) -> {name: values (P,)}, of an oracle; their means
    {category: mean} come too."""
    k = images.shape[2]
    flat = rearrange(images, "p i k h w c -> (p i k) h w c")
    prompts = [prompt for prompt in pairs.flat_prompts() for _ in range(k)]
    report, raw, own = {}, {}, share(len(flat))
    for name, judge in judges.items():
        scores = judge.score(flat[own], prompts[own]) if prompts[own] else torch.empty(0)
        scores = gather(len(flat), scores).view(len(pairs), 2 * k).numpy()
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
    measures = measure(images) if measure else {}
    raw |= {name: [round(float(v), 4) for v in values] for name, values in measures.items()}
    raw["categories"] = list(pairs.categories)
    report["pairs"] = raw
    for name, values in measures.items():
        report[name] = category_means(values, pairs.categories)
    return report


# -- Images of a policy ----------------------------------------------------------------------------
def image_noise(model, n, seed):
    """What decides the tokens of n images, (N, n) for `generate`. 64 images share a stream, made of
    (seed, number of the stream), whatever the batch in which they are sampled."""
    device, parts = model.embed_tokens.weight.device, []
    for number, start in enumerate(range(0, n, 64)):
        state = np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0]
        generator = torch.Generator(device).manual_seed(int(state >> 1))
        shape = model.cfg.n_image, min(64, n - start)
        parts.append(torch.rand(shape, generator=generator, device=device))
    return torch.cat(parts, 1)


def image_chunks(model, vq, prompts, per_prompt, guidance, temperature, seed, batch=64,
                 wanted=None):
    """Images of this process' share of R prompts, about `batch` at a time. Yields (indices of the
    prompts, images (r, K, H, W, 3) uint8). A chunk can be left out, wanted(indices) = False."""
    model.prompt_ids(prompts)           # one that is too long is an error now, not half way
    noise = image_noise(model, len(prompts) * per_prompt, seed)         # (N, R*K)
    missing = -len(prompts) % world()[1]        # then each process has as many, and none waits
    prompts = [*prompts, *prompts[-1:] * missing]
    noise = F.pad(noise, (0, missing * per_prompt))
    own = share(len(prompts))
    batch = min(batch, (own.stop - own.start) * per_prompt)
    step = max(1, batch // per_prompt)
    for start in range(own.start, own.stop, step):
        indices = range(start, min(start + step, own.stop))
        if wanted and not wanted(indices):
            continue
        ids = model.prompt_ids([prompts[i] for i in indices])
        columns = noise[:, start * per_prompt:indices.stop * per_prompt]
        tokens, _ = generate(model, ids, empty_ids(model), per_prompt, guidance, temperature,
                             batch=batch, noise=columns)                # (r*K, N)
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
    own = torch.from_numpy(np.concatenate(out))         # each process has as many
    return gather(len(own) * world()[1], own)[:len(prompts)].numpy()


# -- Before and after PPO --------------------------------------------------------------------------
def benchmark(model, vq, judges, pairs, cfg, batch=64, progress=None, measure=None):
    """A policy's images of the pairs' prompts, judged -> (report of `paircomp`, images
    (P, 2, K, H, W, 3)). cfg has guidance, temperature and seed."""
    images = generate_images(model.eval(), vq, pairs.flat_prompts(), IMAGES_PER_PROMPT,
                             cfg.guidance, cfg.temperature, cfg.seed, batch, progress)
    images = rearrange(images, "(p i) k h w c -> p i k h w c", i=2)
    return paircomp(images, pairs, judges, measure), images


def measure_pairworld(pairs):
    """The oracle's measure of PairWorld's pairs, for `paircomp`."""
    return lambda images: {"pair_accuracy": pair_accuracy(images, pairs.prompts)}


def held_out_sets(cfg, size):
    """{"validation", "test": (PairSet, its measure)} of a PPO run: held-out pairs of --data or of
    PairWorld. --test has other prompts for the test, which no oracle reads."""
    if cfg.data:
        splits = read_splits(cfg.data, size)
        sets = {name: splits[name].select(range(min(most, len(splits[name]))))
                for name, most in (("validation", VALIDATION_PAIRS), ("test", TEST_PAIRS))}
        from extras.own_images import load_gallery, measure_own
        gallery = load_gallery(splits["train"], sets.values())
        sets = {name: (pairs, measure_own(pairs, gallery)) for name, pairs in sets.items()}
    else:
        sets = {"validation": pairworld(VALIDATION_PAIRS, "validation", seed=0),
                "test": pairworld(6 * cfg.eval_pairs, "test", seed=0)}
        sets = {name: (pairs, measure_pairworld(pairs)) for name, pairs in sets.items()}
    if cfg.test:
        from extras.paircomp_files import first_pairs
        sets["test"] = first_pairs(cfg.test, cfg.eval_pairs), None
    return sets


def pair_scores(report, judge):
    """The s_g of each pair by a judge of the report (P,), NaN where it had no answer."""
    return geometric_mean(np.array(report["pairs"][judge], np.float64))         # None becomes NaN


def mean_and_error(values):
    """values (n,), a tensor -> their mean and its standard error, two floats. NaN, where a judge
    had no answer, is left out."""
    values = values[values.isfinite()]
    return values.mean().item(), (values.std() / len(values) ** 0.5).item()


class BeforeAfter:
    """What is measured of a PPO run: quick tests on validation pairs on the way, and at the end, on
    test pairs, a table of the base model and the policy."""

    def __init__(self, cfg, vq, judges):
        self.cfg = cfg
        self.vq = vq
        self.judges = judges
        # Who says what is best.
        self.referee = "heldout" if "heldout" in judges else next(iter(judges))
        self.sets = held_out_sets(cfg, vq.cfg.image_size)
        self.pairs = self.sets["test"][0]
        # What before_after.png shows: the first pair of each category, not the best.
        categories = self.pairs.categories
        self.picks = [categories.index(category) for category in dict.fromkeys(categories)]
        if len(self.picks) == 1:
            self.picks = list(range(min(6, len(self.pairs))))

    def run(self, model, split, guidance, temperature, batch=0, progress=None):
        """A policy's images of a split's pairs, judged: `benchmark`."""
        pairs, measure = self.sets[split]
        judges = self.judges
        if self.cfg.data or measure is None:            # the oracle reads PairWorld alone
            judges = {name: judge for name, judge in judges.items() if name != "oracle"}
        cfg = SimpleNamespace(guidance=guidance, temperature=temperature, seed=self.cfg.seed)
        at_once = batch or 8 * self.cfg.microbatch or 192
        return benchmark(model, self.vq, judges, pairs, cfg, at_once, progress, measure)

    def quick(self, model):
        """The validation pairs -> (their s_g by the referee (P,), {judge: {"s_a", "s_g"}, ...} for
        the log)."""
        report, _ = self.run(model, "validation", self.cfg.guidance, self.cfg.temperature)
        averages = {name: summary["average"] for name, summary in report.items() if name != "pairs"}
        return pair_scores(report, self.referee), averages

    def best_setting(self, model):
        """The (w, tau) at which a model does best on the validation pairs, by the referee, and
        their s_g there (P,)."""
        averages, scores = {}, {}
        for guidance in (self.cfg.guidance, 1.5 * self.cfg.guidance):
            for temperature in TEMPERATURES:
                report, _ = self.run(model, "validation", guidance, temperature)
                averages[guidance, temperature] = report[self.referee]["average"]["s_g"]
                scores[guidance, temperature] = pair_scores(report, self.referee)
        best = max(averages, key=averages.get)
        return best, scores[best]

    def before(self, reference, loop):
        """The base model's side of the table, at its best setting. A resumed run keeps the one that
        it began with."""
        kept = loop.path.with_suffix(".before")
        if loop.resumed and kept.exists():
            tensors, meta = load_weights(kept)
            self.base, self.base_setting = meta["report"], meta["setting"]
            self.base_images = tensors["images"].numpy()
            self.base_scores = tensors["scores"].numpy()
            return
        self.base_setting, self.base_scores = self.best_setting(reference)
        self.base, images = self.run(reference, "test", *self.base_setting)
        reference.graphed = None        # it samples no more: its caches are free for the policy
        self.base_images = images[self.picks, :, 0]                     # (.., 2, H, W, 3)
        save_weights(kept, {"images": torch.from_numpy(self.base_images),
                            "scores": torch.from_numpy(self.base_scores)},
                     report=self.base, setting=self.base_setting)

    def after(self, policy, setting, steps):
        """Test the policy at a setting (w, tau), print the table, write paircomp.json and
        samples/before_after.png. steps: the run's log, whose quick tests are kept as the curve."""
        curve = [{"step": e["step"], **e["test"]} for e in steps if "test" in e]
        out = Path(self.cfg.out)
        ppo, images = self.run(policy, "test", *setting)
        result = {"base": self.base, "ppo": ppo, "curve": curve, "config": asdict(self.cfg),
                  "base_setting": self.base_setting, "ppo_setting": setting}
        write_atomically(out / "paircomp.json", json.dumps(result).encode())
        path = out / "samples" / "before_after.png"
        if leads():
            self.draw(path, images[self.picks, :, 0])
        print("best (w, tau) on validation pairs: base {:g}, {:g}; ppo {:g}, {:g}".format(
            *self.base_setting, *setting))
        print(format_before_after(self.base, ppo))
        print(f"images: {path}")
        self.verdict(ppo)

    def verdict(self, ppo):
        """The run's last words: whether PPO is better than its base, by how much, and how sure."""
        gain = pair_scores(ppo, self.referee) - pair_scores(self.base, self.referee)
        mean, error = mean_and_error(torch.from_numpy(100 * gain))
        low, high = mean - 1.96 * error, mean + 1.96 * error
        words = ("PPO improved its base" if low > 0 else "PPO made its base WORSE" if high < 0 else
                 "PPO did NOT improve its base, as far as these pairs can tell")
        print(f"{words}: s_g of the {self.referee} judge {mean:+.1f} (95 % interval {low:+.1f} to "
              f"{high:+.1f}, {np.isfinite(gain).sum()} test pairs), each at the setting above")

    def draw(self, path, ppo_images):
        """What is asked, if the pairs have images, the base model's images and the policy's."""
        shown = {"base": self.base_images, "ppo": ppo_images}           # (categories, 2, H, W, 3)
        if self.pairs.has_images()[self.picks].all():
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


# -- Tables ----------------------------------------------------------------------------------------
def report_lines(report):
    """(label, {column: value}) for every line of a report."""
    for name, summary in report.items():
        if name in ("pair_accuracy", "exact", "choice"):
            yield name.replace("_", " "), summary
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
