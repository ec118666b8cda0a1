"""PairComp: does each prompt of a pair get its own detail? Generate pictures, let judges score them, summarise by category.

    python eval_paircomp.py --run runs/tiny                                                  # the PairWorld benchmark
    python eval_paircomp.py --run runs/tiny --policy pretrain                                # the same before PPO
    python eval_paircomp.py --run runs/tiny --judge http://HOST:8000/v1                      # the same by another judge
    python eval_paircomp.py --generate --run runs/tiny --prompts PairComp.json --images DIR  # X_Y_Z.png; goes on where it stopped
    python eval_paircomp.py --score --images DIR --prompts PairComp.json --run runs/tiny --out scores.json
    python eval_paircomp.py --score --images DIR --prompts PairComp.json --judge http://HOST:8000/v1 --out scores.json     # judges.py has more
    python eval_paircomp.py --summarize scores.json --prompts PairComp.json                  # the paper's table, with this row in it
    python eval_paircomp.py --compare runs/pair-* --baseline runs/group-* --out compare.png  # arms of an ablation, with intervals

A pair has two prompts with K pictures each, so 2K scores in [0, 1]. s_a is their arithmetic mean and s_g their geometric mean,
which one bad picture pulls down; both are averaged over a category's pairs, and `average` is the mean of the categories, whatever
their sizes (official code: summary_scores.py). *Pair accuracy* needs no learned judge: the share of pairs in which the oracle
sees each of the four pictures carry its own prompt's side of the difference. Scores are 0..1 in files and x100 in tables.

Shapes: P pairs, 2 prompts, K pictures a prompt, R prompts, H W picture.
"""
import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
from einops import rearrange
from tqdm import tqdm

from compare import difference_report, markdown, read_arms, truth_report
from data import UserError, load_image, read_json, some
from judges import JudgeError, is_elsewhere, open_judges
from leaderboard import format_leaderboard
from model import pick_device
from pairworld import ATTRIBUTES, CATEGORIES, IMAGE_SIZE, different_attributes, pairworld, read_scene
from plots import draw_comparison
from reward import OracleJudge
from runs import chosen_policy, generate_files, generate_images, guidance_of, load_judges, load_policy, same_settings, write_json

OFFICIAL_NAMES = {"Overall appearance difference": "overall", "Color difference": "color", "Counting difference": "counting",
                  "Position difference": "position", "Style & Tone difference": "style", "Text difference": "text"}
PICTURES = 2                                                            # K of the official protocol
SCORED_AT_ONCE = 256                                                    # pictures; what a judge elsewhere said of them is then on disk
OWN_JUDGE = "heldout"                                                   # of a run, and who judges where nobody is named


# ---------------------------------------------------------------------------------------------------------------------
# The protocol's arithmetic

def category_means(values, categories):
    """values (P,), P categories -> {category: mean, ..., "average": mean of the means}, in the paper's order."""
    values, categories = np.asarray(values, np.float64), np.asarray(categories)
    present = [c for c in dict.fromkeys([*CATEGORIES, *categories.tolist()]) if c in categories]
    means = {c: float(values[categories == c].mean()) for c in present}
    return means | {"average": float(np.mean(list(means.values())))}


def summarize(scores, categories):
    """Scores (P, 4) or (P, 2, K) in 0..1, P categories -> {category: {"s_a", "s_g"}, ..., "average": {"s_a", "s_g"}}."""
    scores = np.asarray(scores, np.float64).reshape(len(categories), -1)                                # (P, 2K)
    s_a = category_means(scores.mean(1), categories)
    s_g = category_means(scores.prod(1) ** (1 / scores.shape[1]), categories)
    return {c: {"s_a": s_a[c], "s_g": s_g[c]} for c in s_a}


def pair_accuracy(images, prompts):
    """images (P, 2, K, H, W, 3) uint8, P tuples of two PairWorld captions -> (P,) of 0 and 1: whether the oracle reads the attributes
    that the prompts differ in right off every one of the pair's 2K pictures."""
    n_pairs, _, k = images.shape[:3]
    found = read_scene(rearrange(images, "p i k h w c -> (p i k) h w c")).reshape(n_pairs, 2, k, -1)     # (P, 2, K, 10)
    names, out = list(ATTRIBUTES), np.zeros(n_pairs)
    for p, two in enumerate(prompts):
        right = [found[p, i, :, names.index(name)] == value
                 for i, side in enumerate(different_attributes(two)) for name, value in side.items()]
        out[p] = np.all(right)
    return out


def paircomp(images, pairs, judges, pairworld=False):
    """images (P, 2, K, H, W, 3) uint8, a PairSet, {name: judge} -> {name: summarize(...), ..., "pairs": what was averaged}.

    pairworld=True says that every prompt is a PairWorld caption; "pair_accuracy" {category: mean, ..., "average"} comes too."""
    k = images.shape[2]
    flat = rearrange(images, "p i k h w c -> (p i k) h w c")
    prompts = [text for text in pairs.texts() for _ in range(k)]
    scores = {name: judge.score(flat, prompts).view(len(pairs), 2 * k) for name, judge in judges.items()}
    report = {name: summarize(s.numpy(), pairs.categories) for name, s in scores.items()}
    report["pairs"] = {name: [[float(f"{v:.4g}") for v in row] for row in s.tolist()] for name, s in scores.items()}
    if pairworld:
        right = pair_accuracy(images, pairs.prompts)
        report["pair_accuracy"], report["pairs"]["pair_accuracy"] = category_means(right, pairs.categories), right.astype(int).tolist()
    report["pairs"]["categories"] = list(pairs.categories)
    return report


def benchmark_pairs(n_per_category=20):
    """The PairWorld benchmark: the same held-out pairs for every run -> PairSet."""
    return pairworld(6 * n_per_category, "test", seed=0)


def benchmark(model, vq, judges, pairs, cfg, batch=64, progress=None, pairworld=True):
    """A policy's pictures of the pairs' prompts, judged -> (report of `paircomp`, images (P, 2, 2, H, W, 3)). cfg has guidance, temperature and
    seed."""
    images = generate_images(model.eval(), vq, pairs.texts(), PICTURES, cfg.guidance, cfg.temperature, cfg.seed, batch, progress)
    images = rearrange(images, "(p i) k h w c -> p i k h w c", i=2)
    return paircomp(images, pairs, judges, pairworld), images


def divergence_auc(divergence, mask):
    """How well D_t of `model.prompt_divergence` finds the true difference: the chance that a token inside the mask has a larger
    D_t than one outside, ties counting half. Each row by itself, since the weights made of D_t are relative too.

    divergence (B, N), mask (B, N) bool -> (B,) AUC, NaN where a row's mask is all or nothing."""
    out = np.full(len(mask), np.nan)
    for row, (d, inside) in enumerate(zip(np.asarray(divergence, np.float64), np.asarray(mask, bool))):
        if inside.any() and not inside.all():
            out[row] = np.sign(d[inside][:, None] - d[~inside]).mean() / 2 + 0.5
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Tables

def _lines(report):
    """(label, {column: value}) for every line of a report."""
    for name, summary in report.items():
        if name == "pair_accuracy":
            yield "pair accuracy", summary
        elif name not in ("pairs", "divergence_auc", "spread_auc", "change"):
            for key in ("s_a", "s_g"):
                yield f"{name} {key}", {c: values[key] for c, values in summary.items()}


def _table(rows):
    """Rows of (label, {column: text}) under a heading of the columns."""
    columns, width = list(rows[0][1]), max(len(label) for label, _ in rows)
    lines = [" " * width + "".join(f"{c:>10}" for c in columns)]
    return "\n".join(lines + [label.ljust(width) + "".join(f"{cells.get(c, ''):>10}" for c in columns) for label, cells in rows])


def format_report(report):
    """A report of `paircomp` -> the paper's table, x100."""
    return _table([(label, {c: f"{100 * v:.1f}" for c, v in values.items()}) for label, values in _lines(report)])


def format_before_after(base, ppo):
    """Two reports -> a table, x100: for every judge's s_a and s_g and for pair accuracy the lines base, ppo and relative gain."""
    rows, after = [], dict(_lines(ppo))
    for label, before in _lines(base):
        for policy, values in (("base", before), ("ppo", after[label])):
            rows.append((f"{label:<14} {policy}", {c: f"{100 * v:.1f}" for c, v in values.items()}))
        gains = {c: f"{100 * (after[label][c] / v - 1):+.1f}%" if v else "-" for c, v in before.items()}
        rows.append((f"{label:<14} gain", gains))
    return _table(rows)


# ---------------------------------------------------------------------------------------------------------------------
# Files

def read_benchmark(path):
    """PairComp.json, a list of {category, caption1, caption2} -> (P tuples of two prompts, P short categories)."""
    entries = read_json(path, "PairComp prompts")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: should hold a JSON list of pairs, found {type(entries).__name__ if entries else 'nothing'}")
    for i, entry in enumerate(entries):
        for key in ("category", "caption1", "caption2"):
            if not isinstance(entry, dict) or not isinstance(entry.get(key), str) or not entry[key]:
                raise UserError(f"{path}: pair {i} has no {key!r}; a pair needs category, caption1 and caption2")
        if entry["category"] not in OFFICIAL_NAMES:
            raise UserError(f"{path}: pair {i} has category {entry['category']!r}; should be one of {', '.join(OFFICIAL_NAMES)}")
    return [(e["caption1"], e["caption2"]) for e in entries], [OFFICIAL_NAMES[e["category"]] for e in entries]


def read_scores(path, n_pairs):
    """The official score layout (README) -> (P, 4) in the order (prompt, picture) 00 01 10 11. One UserError lists all
    that is wrong: a mean over the scores that happen to be there would look like a result."""
    entries = read_json(path, "PairComp scores")
    if not isinstance(entries, dict):
        raise UserError(f"{path}: should hold a JSON object of pair index -> four scores, found {type(entries).__name__}")
    scores, known = np.full((n_pairs, 2, PICTURES), np.nan), {str(i): i for i in range(n_pairs)}
    bad = [f"unexpected pair {key!r}, the prompts have 0..{n_pairs - 1}" for key in entries if key not in known]
    for key, pair in known.items():
        rows = entries.get(key)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            bad.append(f"pair {key}: {'missing' if rows is None else 'not a list of objects'}")
            continue
        if len(rows) != 2 * PICTURES:
            bad.append(f"pair {key}: {len(rows)} scores, should be {2 * PICTURES}")
        places = []
        for row in rows:
            place, score = (row.get("prompt_idx"), row.get("image_idx")), row.get("score")
            if row.get("pair_idx") != pair or type(row["pair_idx"]) is not int:
                bad.append(f"pair {key}: pair_idx is {row.get('pair_idx')!r}")
            if not all(type(i) is int for i in place) or not (0 <= place[0] < 2 and 0 <= place[1] < PICTURES):
                bad.append(f"pair {key}: (prompt_idx, image_idx) is {place}")
                continue
            if place in places:
                bad.append(f"pair {key}: {place} is there twice")
            places.append(place)
            if type(score) not in (int, float) or not 0 <= score <= 1:                 # NaN fails the comparison
                bad.append(f"pair {key}: score of {place} is {score!r}, should be in 0..1")
            else:
                scores[pair, place[0], place[1]] = score
        bad += [f"pair {key}: {(i, k)} is missing" for i in range(2) for k in range(PICTURES) if (i, k) not in places]
    if bad:
        raise UserError(f"{path}: {some(bad)}")
    return scores.reshape(n_pairs, -1)


# ---------------------------------------------------------------------------------------------------------------------
# Command line

def image_path(folder, pair, prompt, picture):
    return Path(folder) / f"{pair}_{prompt}_{picture}.png"


def check_pictures(folder, n_pairs):
    """UserError that lists the pictures of 2 * 2 * n_pairs X_Y_Z.png that are missing, there twice, too many or wrongly named. Anybody's
    folder comes here, and the wrong file beside the right prompt would look like a result. Other files are none of our business."""
    expected = [image_path(folder, p, i, k).name for p in range(n_pairs) for i in range(2) for k in range(PICTURES)]
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder of pictures")
    found, bad = {}, []
    for file in sorted(Path(folder).iterdir()):
        match = re.fullmatch(r"(\d+)_(\d+)_(\d+)\.[A-Za-z]+", file.name)
        if match:
            found.setdefault("_".join(str(int(n)) for n in match.groups()) + ".png", []).append(file.name)
    known = set(expected)
    for name, files in found.items():
        if name not in known:
            bad.append(f"{files[0]} is unexpected, the prompts have pairs 0..{n_pairs - 1}, two prompts each and {PICTURES} pictures a prompt")
        elif len(files) > 1:
            bad.append(f"{' and '.join(files)} are the same picture's")
        elif files != [name]:
            bad.append(f"{files[0]} should be {name}")
    missing = [name for name in expected if name not in found]
    if missing or bad:
        told = f"{len(missing)} of {len(expected)} pictures are missing: {some(missing)}; --generate makes them" if missing else ""
        raise UserError(f"{folder}: " + "; ".join(filter(None, (told, some(bad)))))


def run_benchmark(args):
    """Pictures of a policy for the PairWorld benchmark, judged: prints the table, writes RUN/paircomp_POLICY.json."""
    device, pairs = pick_device(args.device), benchmark_pairs(args.n)
    vq, model = load_policy(args.run, args.policy, device)
    if vq.cfg.image_size != IMAGE_SIZE or model.text.empty is None:
        raise UserError(f"{args.run}: is no model of PairWorld, whose benchmark this is; use --generate, --score and --summarize")
    if args.judge == [OWN_JUDGE]:
        if not (Path(args.run) / "reward.safetensors").exists():
            raise UserError(f"{args.run}: has no judges of its own (it was trained with --judge); say who judges: --judge URL or transformers:DIR")
        judges = load_judges(args.run, device)
    else:
        judges = {"judge": open_judges(args.judge, device), "oracle": OracleJudge()}
    args.guidance = guidance_of(args, model)
    with tqdm(total=2 * len(pairs), desc="generate", unit="prompt") as bar:
        report, _ = benchmark(model, vq, judges, pairs, args, args.batch, bar.update)
    path = Path(args.run) / f"paircomp_{args.policy}.json"
    write_json(path, report)
    print(format_report(report), f"written to {path}", sep="\n")


def run_generate(args):
    """X_Y_Z.png for every pair X, prompt Y, picture Z that is not in the folder yet."""
    two, _ = read_benchmark(args.prompts)
    vq, model = chosen_policy(args)
    prompts = [text for texts in two for text in texts]
    args.guidance = guidance_of(args, model)
    same_settings(args.images, args, model, prompts)
    files = [[image_path(args.images, i // 2, i % 2, k) for k in range(PICTURES)] for i in range(len(prompts))]
    made = generate_files(model, vq, prompts, files, PICTURES, args.guidance, args.temperature, args.seed, args.batch)
    print(f"{made} pictures made, {PICTURES * len(prompts) - made} were there, in {args.images}")


def open_judge(args):
    """--judge -> the judge and the size of picture that it wants, None for pictures as they are. A judge elsewhere, whom asking costs time
    and perhaps money, remembers in a file beside --out."""
    if all(map(is_elsewhere, args.judge)):
        panel = open_judges(args.judge, pick_device(args.device))
        panel.remember(answers_path(args))
        return panel, None
    if args.judge == ["oracle"]:
        return OracleJudge(), IMAGE_SIZE
    judge = load_judges(args.run, pick_device(args.device))[args.judge[0]]
    return judge, judge.network.cfg.grid * judge.network.cfg.patch


def answers_path(args):
    return Path(f"{args.out}.answers")


def run_score(args):
    """A judge's scores of a folder of X_Y_Z.png, in the official layout. A run that was stopped goes on where it was."""
    two, _ = read_benchmark(args.prompts)
    places = [(p, i, k) for p in range(len(two)) for i in range(2) for k in range(PICTURES)]
    check_pictures(args.images, len(two))
    judge, size = open_judge(args)
    scores = {str(p): [] for p in range(len(two))}
    for start in tqdm(range(0, len(places), SCORED_AT_ONCE), desc="score", unit="batch"):
        some_places = places[start:start + SCORED_AT_ONCE]
        images = [load_image(image_path(args.images, *place), size) for place in some_places]
        images = np.stack(images) if size else images
        try:
            answers = judge.score(images, [two[p][i] for p, i, _ in some_places])
        except JudgeError as e:
            raise UserError(f"{e}; {start} of {len(places)} scores are kept in {answers_path(args)}, the same command goes on from there") from e
        for (p, i, k), score in zip(some_places, answers.tolist()):
            scores[str(p)].append({"pair_idx": p, "prompt_idx": i, "image_idx": k, "score": score})
    write_json(args.out, scores)
    answers_path(args).unlink(missing_ok=True)
    print(f"{len(places)} scores of the judge {' and '.join(judge.names if size is None else args.judge)} in {args.out}")


def run_summarize(args):
    """The official table of a score file."""
    two, categories = read_benchmark(args.prompts)
    summary = summarize(read_scores(args.summarize, len(two)), categories)
    print(format_leaderboard(summary, Path(args.summarize).stem, len(two)))
    print(json.dumps(summary, indent=1))
    if args.out:
        write_json(args.out, summary)


def run_compare(args):
    """The table of each arm against the baseline, and with --out the picture."""
    arms, baseline = read_arms(args.compare), read_arms(args.baseline)
    if len(baseline) > 1:
        raise UserError(f"--baseline: should be the runs of one arm, found {', '.join(baseline)}")
    (name, runs), = baseline.items()
    arms = {k: v for k, v in arms.items() if k != name}
    print(markdown(arms, name, runs))
    for arm, its in {name: runs, **arms}.items():
        print(f"\n{arm}", *truth_report(its), *difference_report(its), sep="\n  ")
    if args.out:
        draw_comparison({name: runs, **arms}, args.out)
        print(f"picture: {args.out}")


POLICY = {"policy": "ppo", "seed": 0, "device": "auto", "guidance": None, "temperature": 1.0, "batch": 64}
MODES = {  # mode: what it does, the flags it needs, the flags it may have and their defaults
    "benchmark": (run_benchmark, ["run"], {"n": 20, "judge": [OWN_JUDGE], **POLICY}),
    "generate": (run_generate, ["prompts", "images"], {"run": None, "janus": None, **POLICY}),
    "score": (run_score, ["images", "prompts", "out"], {"run": None, "judge": [OWN_JUDGE], "device": "auto"}),
    "summarize": (run_summarize, ["prompts"], {"out": None}),
    "compare": (run_compare, ["baseline"], {"out": None}),
}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="eval_paircomp.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generate", action="store_true", help="write the X_Y_Z.png (pair, prompt, picture) not there yet")
    parser.add_argument("--score", action="store_true", help="judge a folder of X_Y_Z.png")
    parser.add_argument("--summarize", metavar="SCORES", help="s_a and s_g of a score file")
    parser.add_argument("--compare", metavar="RUN", nargs="+", help="PPO runs named ARM-SEED, against those of --baseline")
    parser.add_argument("--baseline", metavar="RUN", nargs="+", help="the runs of one arm")
    parser.add_argument("--run", metavar="DIR", help="run folder of train.py; alone: the PairWorld benchmark")
    parser.add_argument("--janus", metavar="DIR", help="a Janus checkpoint instead of a run, for --generate")
    parser.add_argument("--batch", type=int, help="pictures at once, for --generate (64); they follow from it too")
    parser.add_argument("--prompts", metavar="JSON", help="PairComp.json")
    parser.add_argument("--images", metavar="DIR", help="folder of the pictures")
    parser.add_argument("--out", metavar="FILE", help="file to write")
    parser.add_argument("--policy", choices=["ppo", "pretrain"], help="whose pictures (ppo)")
    parser.add_argument("--judge", action="append", help="who scores: heldout (the run's, default), train, oracle, http://HOST:PORT/v1 (an "
                        "OpenAI-compatible server, with #MODEL for one of several) or transformers:DIR; these two may be given twice: the mean")
    parser.add_argument("--n", type=int, help="pairs a category of the PairWorld benchmark (20)")
    parser.add_argument("--guidance", type=float, help="w of classifier-free guidance (as the policy was trained with; 5 for a Janus checkpoint)")
    parser.add_argument("--temperature", type=float, help="tau, as in training (1)")
    parser.add_argument("--seed", type=int, help="the pictures follow from it and from --batch (0)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], help="where to compute (auto)")
    args = parser.parse_args(argv)

    chosen = [mode for mode in ("generate", "score", "summarize", "compare") if getattr(args, mode)]
    given = {name for name, value in vars(args).items() if value is not None and value is not False} - set(chosen)
    if len(chosen) > 1 or not chosen and args.run is None:
        parser.error(f"{' and '.join('--' + c for c in chosen) or 'nothing'} was chosen; choose one of --generate, --score, "
                     "--summarize SCORES, --compare RUN ..., or --run DIR alone for the PairWorld benchmark")
    mode = (chosen or ["benchmark"])[0]
    what, needs, options = MODES[mode]
    judges = args.judge or [OWN_JUDGE]
    if not all(map(is_elsewhere, judges)) and (len(judges) > 1 or judges[0] not in ("heldout", "train", "oracle")):
        parser.error(f"--judge {' '.join(judges)}: should be heldout, train or oracle, or one or more of http://HOST:PORT/v1 and transformers:DIR")
    if mode == "score" and judges[0] in ("heldout", "train"):
        needs = needs + ["run"]
    if mode == "benchmark" and args.judge and not is_elsewhere(judges[0]):
        parser.error(f"--judge {judges[0]}: the PairWorld benchmark asks the run's own judges and the oracle anyway; name one elsewhere, or none")
    lacking, alien = [n for n in needs if n not in given], sorted(given - {*needs, *options})
    if lacking or alien:
        if mode == "score" and lacking == ["run"]:
            parser.error("--score needs --judge URL or transformers:DIR, or --run, whose judge scores then")
        parser.error(f"{'the PairWorld benchmark' if mode == 'benchmark' else '--' + mode} "
                     + (f"needs --{' and --'.join(lacking)}" if lacking else f"has no use for --{' or --'.join(alien)}"))
    for name, default in options.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    for name, fine in (("n", lambda v: v > 0), ("batch", lambda v: v > 0), ("seed", lambda v: v >= 0), ("temperature", lambda v: v > 0)):
        if getattr(args, name) is not None and not fine(getattr(args, name)):
            parser.error(f"--{name} {getattr(args, name)}: should be {'0 or more' if name == 'seed' else 'positive'}")
    what(args)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
