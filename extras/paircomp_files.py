"""The commands of eval_paircomp.py: the PairWorld benchmark, and PairComp as files.

    python eval_paircomp.py --run runs/tiny
    python eval_paircomp.py generate --run RUN --prompts PairComp.json --images DIR
    python eval_paircomp.py score --images DIR --prompts PairComp.json --judge J --out scores.json
    python eval_paircomp.py summarize scores.json --prompts PairComp.json

Images are named X_Y_Z.png: pair, prompt, image. A score file is a JSON object: key = pair index as
a string, value = four objects with pair_idx, prompt_idx, image_idx and score. `generate` and
`score` go on where they were stopped.
"""
import argparse
import hashlib
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image
from tqdm import tqdm

import eval_paircomp
from common import UserError, first_few, make_folder, pick_device, read_json
from common import write_atomically, write_json
from data import PairSet, load_image
from eval_paircomp import IMAGES_PER_PROMPT, BeforeAfter, image_chunks, percents, report_lines
from eval_paircomp import summarize, text_table
from extras.judges import JudgeError, check_spec, is_elsewhere, open_judges
from extras.leaderboard import format_leaderboard
from model import load_policy, run_settings, usual_guidance
from pairworld import IMAGE_SIZE
from reward import OracleJudge, load_judges
from sample import add_policy_flags, check_policy_flags, fill_sampling

OFFICIAL_NAMES = {
    "Overall appearance difference": "overall", "Color difference": "color",
    "Counting difference": "counting", "Position difference": "position",
    "Style & Tone difference": "style", "Text difference": "text"}
SCORED_AT_ONCE = 256                    # images


def open_judge(specs, device, run=None):
    """--judge -> a judge: "train", "heldout" or "oracle" of a run folder, or one or more of
    http://HOST:PORT/v1[#MODEL] and transformers:DIR, whose mean counts."""
    for spec in filter(is_elsewhere, specs):            # no error below may print a secret
        check_spec(spec)
    if all(is_elsewhere(spec) for spec in specs):
        return open_judges(specs, device)
    if specs == ["oracle"]:
        return OracleJudge()
    if len(specs) > 1 or specs[0] not in ("train", "heldout"):
        raise UserError(f"--judge {' '.join(specs)}: should be heldout, train or oracle, or one or "
                        "more of http://HOST:PORT/v1 and transformers:DIR")
    return load_judges(run, device)[specs[0]]


def format_report(report):
    """A report of `paircomp` -> the paper's table, x100."""
    return text_table([(label, percents(values)) for label, values in report_lines(report)])


def run_benchmark(args):
    """Judge a policy's images of the held-out pairs of PairWorld, or of the run's --data: prints a
    table, writes RUN/paircomp_POLICY.json."""
    device = pick_device(args.device)
    vq, model = load_policy(args.run, args.policy, device, compile=args.compile)
    data = run_settings(args.run, "ppo", "pretrain").get("data", "")
    if not data and (vq.cfg.image_size != IMAGE_SIZE or model.text.empty is None):
        raise UserError(f"{args.run}: is no model of PairWorld, whose benchmark this is; use "
                        "generate, score and summarize")
    if args.judge:
        judges = {"judge": open_judge(args.judge, device), "oracle": OracleJudge()}
    elif (Path(args.run) / "reward.safetensors").exists():
        judges = load_judges(args.run, device)
    else:
        raise UserError(f"{args.run}: has no judges of its own (it was trained with --judge); give "
                        "--judge URL or transformers:DIR")
    fill_sampling(args, model)
    test = BeforeAfter(SimpleNamespace(data=data, test="", eval_pairs=args.n, seed=args.seed,
                                       microbatch=0, guidance=usual_guidance(model)), vq, judges)
    if args.best:
        (args.guidance, args.temperature), _ = test.best_setting(model)
    with tqdm(total=2 * len(test.pairs), desc="generate", unit="prompt") as bar:
        report, _ = test.run(model, "test", args.guidance, args.temperature, args.batch, bar.update)
    path = Path(args.run) / f"paircomp_{args.policy}.json"
    write_json(path, report)
    print(f"w {args.guidance:g}, tau {args.temperature:g}", format_report(report),
          f"written to {path}", sep="\n")


# --------------------------------------------------------------------------------------------------
# The prompts

def read_benchmark(path):
    """PairComp.json, a list of {category, caption1, caption2} -> (P tuples of two prompts, P short
    categories)."""
    entries = read_json(path, "PairComp prompts")
    if not isinstance(entries, list) or not entries:
        found = type(entries).__name__ if entries else "nothing"
        raise UserError(f"{path}: should hold a JSON list of pairs, found {found}")
    for i, entry in enumerate(entries):
        for key in ("category", "caption1", "caption2"):
            value = entry.get(key) if isinstance(entry, dict) else None
            if not isinstance(value, str) or not value:
                raise UserError(f"{path}: pair {i} has no {key!r}; a pair needs category, caption1 "
                                "and caption2")
        if entry["category"] not in OFFICIAL_NAMES:
            raise UserError(f"{path}: pair {i} has category {entry['category']!r}; should be one "
                            f"of {', '.join(OFFICIAL_NAMES)}")
    prompts = [(entry["caption1"], entry["caption2"]) for entry in entries]
    return prompts, [OFFICIAL_NAMES[entry["category"]] for entry in entries]


def first_pairs(path, n_per_category):
    """The first n pairs of each category -> PairSet without images."""
    prompts, categories = read_benchmark(path)
    rows = []
    for category in dict.fromkeys(categories):
        same = [row for row, other in enumerate(categories) if other == category]
        rows += same[:n_per_category]
    return PairSet([prompts[row] for row in rows], [None] * len(rows),
                   [categories[row] for row in rows])


# --------------------------------------------------------------------------------------------------
# Images of a policy as files

def save_png(path, image):
    """(H, W, 3) uint8 -> a PNG that is there whole or not at all."""
    png = io.BytesIO()
    Image.fromarray(image).save(png, "png")
    write_atomically(path, png.getvalue())


def generate_files(model, vq, prompts, files, per_prompt, guidance, temperature, seed, batch,
                   combine=list):
    """Images of R prompts as PNG files, R lists of paths. What is there is left alone, so that a
    run that was killed goes on. combine: (K, H, W, 3) -> one image a path. Returns how many files
    were made."""
    missing = [[file for file in own if not file.is_file()] for own in files]
    for folder in {file.parent for own in files for file in own}:
        make_folder(folder)

    def wanted(indices):
        return any(missing[i] for i in indices)
    chunks = image_chunks(model, vq, prompts, per_prompt, guidance, temperature, seed, batch,
                          wanted)
    total = sum(len(own) for own in files)
    made = sum(len(own) for own in missing)
    with tqdm(total=total, initial=total - made, desc="generate", unit="file") as bar:
        for indices, images in chunks:
            for i, samples in zip(indices, images):
                for file, image in zip(files[i], combine(samples)):
                    if file in missing[i]:
                        save_png(file, image)
                        bar.update()
    return made


def same_settings(folder, model, prompts, guidance, temperature, seed):
    """UserError if a folder's images were made by another policy, for other prompts or with other
    settings: images that are there are skipped, and a folder of two models' images would look like
    a result. FOLDER.settings.json, beside it, remembers."""
    def digest(parts):
        return hashlib.sha256(b"".join(parts)).hexdigest()
    weights = [model.norm.weight, model.gen_head[-1].bias]              # every training moves them
    if model.lora:
        weights.append(model.layers[-1].mlp.down_proj.up)               # and with --lora this
    settings = {"weights": digest([w.detach().float().cpu().numpy().tobytes() for w in weights]),
                "prompts": digest([json.dumps(prompts).encode()]),
                "guidance": guidance, "temperature": temperature, "seed": seed}
    folder = Path(folder)
    path = folder.with_name(folder.name + ".settings.json")
    if path.is_file():
        known = read_json(path, "settings of the images")
        changed = []
        for name, value in settings.items():
            if known.get(name) != value:
                digests = name in ("weights", "prompts")
                changed.append(name if digests else f"{name} {known.get(name)} -> {value}")
        if changed:
            raise UserError(f"{folder}: its images were made with other {'; '.join(changed)}; "
                            f"choose another folder, or remove it and {path.name}")
    elif any(folder.rglob("*.png")):
        raise UserError(f"{folder}: holds images that were not made here; choose another folder")
    make_folder(folder)
    write_json(path, settings)


def run_generate(args):
    """X_Y_Z.png for every pair X, prompt Y and image Z that is not in the folder yet."""
    pairs, _ = read_benchmark(args.prompts)
    prompts = [prompt for pair in pairs for prompt in pair]
    device = pick_device(args.device)
    vq, model = load_policy(args.run, args.policy, device, compile=args.compile)
    fill_sampling(args, model)
    same_settings(args.images, model, prompts, args.guidance, args.temperature, args.seed)
    files = [[image_path(args.images, i // 2, i % 2, k) for k in range(IMAGES_PER_PROMPT)]
             for i in range(len(prompts))]
    made = generate_files(model, vq, prompts, files, IMAGES_PER_PROMPT, args.guidance,
                          args.temperature, args.seed, args.batch)
    there = IMAGES_PER_PROMPT * len(prompts) - made
    print(f"{made} images made, {there} were there, in {args.images}")


# --------------------------------------------------------------------------------------------------
# Scores as files

def read_scores(path, n_pairs):
    """A score file in the official layout -> (P, 4) in the order (prompt, image) 00 01 10 11. One
    UserError lists all that is wrong: a mean over the scores that happen to be there would look
    like a result."""
    entries = read_json(path, "PairComp scores")
    if not isinstance(entries, dict):
        raise UserError(f"{path}: should hold a JSON object of pair index -> four scores, found "
                        f"{type(entries).__name__}")
    scores = np.full((n_pairs, 2, IMAGES_PER_PROMPT), np.nan)
    known = {str(i): i for i in range(n_pairs)}
    bad = [f"unexpected pair {key!r}, the prompts have 0..{n_pairs - 1}"
           for key in entries if key not in known]
    for key, pair in known.items():
        rows = entries.get(key)
        if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
            bad += [f"pair {key}: {problem}" for problem in read_rows(rows, pair, scores[pair])]
        else:
            bad.append(f"pair {key}: {'missing' if rows is None else 'not a list of objects'}")
    if bad:
        raise UserError(f"{path}: {first_few(bad)}")
    return scores.reshape(n_pairs, -1)


def read_rows(rows, pair, scores):
    """The four entries of a pair of a score file -> scores (2, K), filled in place, and a list of
    what is wrong."""
    bad = []
    if len(rows) != scores.size:
        bad.append(f"{len(rows)} scores, should be {scores.size}")
    seen = []
    for row in rows:
        where = row.get("prompt_idx"), row.get("image_idx")
        if row.get("pair_idx") != pair or type(row["pair_idx"]) is not int:
            bad.append(f"pair_idx is {row.get('pair_idx')!r}")
        if where not in np.ndindex(scores.shape) or any(type(i) is not int for i in where):
            bad.append(f"(prompt_idx, image_idx) is {where}")
            continue
        if where in seen:
            bad.append(f"{where} is there twice")
        seen.append(where)
        score = row.get("score")
        if type(score) not in (int, float) or not 0 <= score <= 1:      # NaN fails the comparison
            bad.append(f"score of {where} is {score!r}, should be in 0..1")
        else:
            scores[where] = score
    return bad + [f"{where} is missing" for where in np.ndindex(scores.shape) if where not in seen]


def image_path(folder, pair, prompt, image):
    return Path(folder) / f"{pair}_{prompt}_{image}.png"


def check_images(folder, n_pairs):
    """UserError that lists which of the 4P images X_Y_Z.png are missing, there twice, too many or
    wrongly named. Any model's folder comes here, and a wrong file beside the right prompt would
    look like a result. Other files do no harm."""
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder of images")
    places = np.ndindex(n_pairs, 2, IMAGES_PER_PROMPT)
    expected = [image_path(folder, *place).name for place in places]
    found = {}
    for file in sorted(Path(folder).iterdir()):
        match = re.fullmatch(r"(\d+)_(\d+)_(\d+)\.[A-Za-z]+", file.name)
        if match:
            name = "_".join(str(int(n)) for n in match.groups()) + ".png"
            found.setdefault(name, []).append(file.name)
    known = set(expected)
    bad = []
    missing = [name for name in expected if name not in found]
    if missing:
        bad.append(f"{len(missing)} of {len(expected)} images are missing: {first_few(missing)}; "
                   "`eval_paircomp.py generate` makes them")
    wrong = []
    for name, files in found.items():
        if name not in known:
            wrong.append(f"{files[0]} is unexpected, the prompts have pairs 0..{n_pairs - 1}, two "
                         f"prompts each and {IMAGES_PER_PROMPT} images a prompt")
        elif len(files) > 1:
            wrong.append(f"{' and '.join(files)} are the same image's")
        elif files != [name]:
            wrong.append(f"{files[0]} should be {name}")
    if wrong:
        bad.append(first_few(wrong))
    if bad:
        raise UserError(f"{folder}: {'; '.join(bad)}")


def run_score(args):
    """A judge's scores of a folder of X_Y_Z.png, in the official layout. A judge elsewhere, whom
    asking costs time and perhaps money, keeps the answers in a file beside --out: a run that was
    stopped goes on from there."""
    pairs, _ = read_benchmark(args.prompts)
    check_images(args.images, len(pairs))
    judge = open_judge(args.judge, pick_device(args.device), args.run)
    elsewhere = is_elsewhere(args.judge[0])
    kept = Path(f"{args.out}.answers")
    size = None                         # of the images that the judge wants; None: as they are
    if elsewhere:
        judge.remember(kept)
    else:
        network = getattr(judge, "network", None)
        size = network.cfg.grid * network.cfg.patch if network else IMAGE_SIZE
    places = list(np.ndindex(len(pairs), 2, IMAGES_PER_PROMPT))
    scores = {str(p): [] for p in range(len(pairs))}
    unanswered = []
    for start in tqdm(range(0, len(places), SCORED_AT_ONCE), desc="score", unit="batch"):
        chunk = places[start:start + SCORED_AT_ONCE]
        images = [load_image(image_path(args.images, *place), size) for place in chunk]
        images = np.stack(images) if size else images
        try:
            answers = judge.score(images, [pairs[p][i] for p, i, _ in chunk])
        except JudgeError as e:
            answered = (len(kept.read_text().splitlines()) - 1) // len(judge.names)
            raise UserError(f"{e}; {answered} of {len(places)} scores are kept in {kept}, the same "
                            "command goes on from there") from e
        for (p, i, k), score in zip(chunk, answers.tolist()):
            entry = {"pair_idx": p, "prompt_idx": i, "image_idx": k, "score": score}
            scores[str(p)].append(entry)
            if np.isnan(score):
                unanswered.append(image_path("", p, i, k).name)
    if unanswered:
        raise UserError(f"the judge answers neither yes nor no to {first_few(unanswered)}; the "
                        f"other scores are kept in {kept}: try again, or another judge")
    write_json(args.out, scores)
    kept.unlink(missing_ok=True)
    names = judge.names if elsewhere else args.judge
    print(f"{len(places)} scores of the judge {' and '.join(names)} in {args.out}")


def run_summarize(args):
    """The official table of a score file, with its row in it."""
    pairs, categories = read_benchmark(args.prompts)
    summary = summarize(read_scores(args.scores, len(pairs)), categories)
    print(format_leaderboard(summary, Path(args.scores).stem, len(pairs)))
    print(json.dumps(summary, indent=1))
    if args.out:
        write_json(args.out, summary)


# --------------------------------------------------------------------------------------------------

def as_command(argv):
    """The switches --generate, --score and --summarize SCORES are accepted too, and --run alone is
    the benchmark."""
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--summarize=")
                                               else [word])]
    words = [word.split("=")[0] for word in argv]
    for word, instead in (("--compare", "python -m extras.ablation --compare"),
                          ("--janus", "python -m extras.janus --import DIR --out RUN, then --run")):
        if word in words:
            raise UserError(f"{word} is gone: use {instead}")
    switches = [word for word in argv if word in ("--generate", "--score", "--summarize")]
    if len(switches) > 1:
        raise UserError(f"{' and '.join(switches)}: choose one")
    if switches:
        return [switches[0][2:]] + [word for word in argv if word != switches[0]]
    if "--run" in words and words[0].startswith("--"):
        return ["benchmark", *argv]
    if not argv:
        raise UserError("choose generate, score, summarize, or --run DIR alone for the benchmark; "
                        "--help says more")
    return argv


def parse(argv):
    parser = argparse.ArgumentParser(prog="eval_paircomp.py", description=eval_paircomp.__doc__,
                                     allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    world = commands.add_parser("benchmark", allow_abbrev=False,
                                help="the PairWorld benchmark of --run DIR (the default)")
    add_policy_flags(world)
    world.add_argument("--n", type=int, default=20, help="pairs a category of PairWorld (20)")
    world.add_argument("--best", action="store_true", help="at the (w, tau) that is best on "
                       "validation pairs, by the held-out judge")
    world.add_argument("--judge", action="append",
                       help="instead of the run's own: http://HOST:PORT/v1 or transformers:DIR")

    generate = commands.add_parser("generate", allow_abbrev=False,
                                   help="images of a policy, X_Y_Z.png")
    add_policy_flags(generate)
    generate.add_argument("--prompts", metavar="JSON", required=True, help="PairComp.json")
    generate.add_argument("--images", metavar="DIR", required=True, help="where they go")

    score = commands.add_parser("score", allow_abbrev=False,
                                help="a judge's scores of a folder of images")
    score.add_argument("--images", metavar="DIR", required=True)
    score.add_argument("--prompts", metavar="JSON", required=True, help="PairComp.json")
    score.add_argument("--out", metavar="FILE", required=True, help="the score file")
    score.add_argument("--judge", action="append", help="heldout (the run's, default), train, "
                       "oracle, http://HOST:PORT/v1[#MODEL] or transformers:DIR; the last two may "
                       "be given twice: the mean")
    score.add_argument("--run", metavar="DIR", help="whose judge scores")
    score.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")

    table = commands.add_parser("summarize", allow_abbrev=False,
                                help="s_a and s_g of a score file")
    table.add_argument("scores", metavar="SCORES")
    table.add_argument("--prompts", metavar="JSON", required=True, help="PairComp.json")
    table.add_argument("--out", metavar="FILE", help="write them as JSON too")

    return parser.parse_args(argv)


def check(args):
    """UserError for what the parser cannot know."""
    check_policy_flags(args)
    judges = getattr(args, "judge", None) or []
    for spec in filter(is_elsewhere, judges):           # no error below may print a secret
        check_spec(spec)
    if args.command == "benchmark" and not all(is_elsewhere(spec) for spec in judges):
        raise UserError(f"--judge {' '.join(judges)}: the benchmark asks the run's own judges and "
                        "the oracle anyway; give one elsewhere, or none")
    if args.command == "score":
        args.judge = judges or ["heldout"]
        if args.judge[0] in ("heldout", "train") and not args.run:
            raise UserError("score needs --judge URL or transformers:DIR, or --run, whose judge "
                            "scores then")


COMMANDS = {"benchmark": run_benchmark, "generate": run_generate, "score": run_score,
            "summarize": run_summarize}


def run(argv):
    args = parse(as_command(argv))
    check(args)
    COMMANDS[args.command](args)
