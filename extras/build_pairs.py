"""Training pairs from edited images, as FocusDiff-Data was made: a vision-language model captions
an image before and after an edit, and a judge keeps the pairs that it can tell apart.

    python -m extras.build_pairs edits.json --judge http://localhost:8000/v1 --out DIR
    python train.py --stage ppo --data DIR/pairs.json

edits.json is a JSON list of {before, after, instruction}: paths of images, absolute or relative to
the file, and what was asked for. An optional `category` is kept. For each edit the model sees both
images and the instruction, says whether the edit was carried out, and writes the captions T1 and
T2. The pair is kept if the judge gives S(I1,T1) and S(I2,T2) at least --high, and S(I1,T2) and
S(I2,T1) at most --low. Images are judged as training will see them: resized and cropped to --size.

DIR/decisions.jsonl   one line a decision: the edit, captions, scores, `kept`, and the `reasons` if
                      it is not kept
DIR/pairs.json        what was kept, in the FocusDiff-Data layout; images stay where they are
DIR/summary.json      how many were kept and dropped, and for which reasons

A run that was stopped goes on where it was. An edit is known by its three fields, so the list may
grow or shrink in between. Scores are recorded, so other thresholds need no new ones. The official
release has no such script; the default thresholds are ours.
"""
import argparse
import json
import math
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from common import UserError, first_few, read_json, write_atomically
from data import load_image
from extras.judges import (WORKERS, JudgeError, ServerJudge, UnreadableAnswer, check_spec,
                           image_part, open_judges)

# name, index of the image, index of the caption
PLACES = (("S(I1,T1)", 0, 0), ("S(I2,T2)", 1, 1), ("S(I1,T2)", 0, 1), ("S(I2,T1)", 1, 0))
FIELDS = ("before", "after", "instruction")

# why an edit is dropped before it is scored, or because it cannot be
NO_IMAGE = "an image cannot be read"
NO_EDIT = "the edit was not carried out"
NO_CAPTIONS = "no captions in the answer"
SAME = "the captions are the same"
NO_SCORE = "the judge answers neither yes nor no"

DESCRIBE = """The second image was made from the first by this edit: "{instruction}".
Answer with one JSON object and nothing else, with three keys. "followed": true if the second \
image shows what the edit asks for and is otherwise like the first, else false. "caption1": one \
sentence of at most 30 words that describes the first image. "caption2": the same sentence changed \
in as few words as possible, so that it describes the second image and no longer the first. Each \
caption stands alone: it names what is seen and mentions neither the edit nor another image."""


# --------------------------------------------------------------------------------------------------
# What is decided, and why

def decide(row, high, low):
    """A row with captions and scores -> the row with `kept` and `reasons` by the thresholds. A row
    without scores has its reasons already and stays as it is."""
    if not row["scores"]:
        return row
    reasons = []
    for name, image, caption in PLACES:
        score = row["scores"][name]
        if image == caption and not score >= high:  # written so that NaN is a reason too
            reasons.append(f"{name} is low")
    for name, image, caption in PLACES:
        score = row["scores"][name]
        if image != caption and not score <= low:
            reasons.append(f"{name} is high")
    return row | {"kept": not reasons, "reasons": reasons}


def read_captions(answer):
    """What the model said -> {followed, caption1, caption2}, or None if it does not hold that.
    Words around the JSON object do no harm."""
    start = answer.find("{")
    end = answer.rfind("}")
    try:
        # not strict: a line break inside a caption is no reason to drop it
        found = json.loads(answer[start:end + 1], strict=False)
    except json.JSONDecodeError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("followed"), bool):
        return None
    captions = {"followed": found["followed"]}
    for key in ("caption1", "caption2"):
        caption = found.get(key)
        if not isinstance(caption, str) or not caption.strip():
            return None
        captions[key] = " ".join(caption.split())
    return captions


def describe_by(server):
    """A ServerJudge -> describe(before, after, instruction), which takes two images (H, W, 3) uint8
    and a string and returns the answer of the model, a string.

    One chat completion with two images. Repetitions, time limits and the key are those of the
    server; its JudgeError comes through."""

    def describe(before, after, instruction):
        text = DESCRIBE.format(instruction=instruction)
        content = [image_part(before), image_part(after), {"type": "text", "text": text}]
        body = {
            "model": server.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 400,
            "temperature": 0,
        }
        answer = server.request("POST", "/chat/completions", body)
        try:
            text = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as e:
            raise JudgeError(f"{server.url}: not a chat completion: {server.safe(answer)}") from e
        return text if isinstance(text, str) else ""  # null is a refusal, or thoughts alone

    return describe


def consider(edit, score, describe, size):
    """An edit with the paths of its `files` -> a row: captions by the model, then four scores by
    the judge.

    score(images, prompts): B images (H, W, 3) uint8 and B strings -> B scores in [0, 1], NaN where
    the judge answers neither yes nor no.
    describe(before, after, instruction) -> a string. What cannot be scored is dropped with its
    reason; a judge that is gone is an error."""
    row = {key: edit[key] for key in FIELDS}
    row |= {"prompt1": None, "prompt2": None, "scores": None, "kept": False, "reasons": []}
    try:
        images = [load_image(file, size) for file in edit["files"]]
    except UserError as e:
        return row | {"reasons": [NO_IMAGE], "detail": str(e)}
    answer = describe(*images, edit["instruction"])
    found = read_captions(answer)
    if not found:
        return row | {"reasons": [NO_CAPTIONS], "detail": answer[:500]}
    captions = [found["caption1"], found["caption2"]]
    row |= {"prompt1": captions[0], "prompt2": captions[1]}
    if not found["followed"]:
        return row | {"reasons": [NO_EDIT]}
    if captions[0].lower() == captions[1].lower():
        return row | {"reasons": [SAME]}
    judged_images = [images[image] for _, image, _ in PLACES]
    judged_captions = [captions[caption] for _, _, caption in PLACES]
    try:
        values = score(judged_images, judged_captions)
    except UnreadableAnswer as e:
        return row | {"reasons": [NO_SCORE], "detail": str(e)}
    scores = {name: round(float(value), 6) for (name, _, _), value in zip(PLACES, values)}
    missing = [name for name, value in scores.items() if math.isnan(value)]
    if missing:
        return row | {"reasons": [NO_SCORE], "detail": f"no {' and no '.join(missing)}"}
    return row | {"scores": scores}


# --------------------------------------------------------------------------------------------------
# Files

def key_of(row):
    """What an edit is known by: its three fields."""
    return tuple(row[field] for field in FIELDS)


def read_edits(path):
    """edits.json -> {key: edit with `files`, the paths of before and after}. An edit that is there
    twice counts once. UserError lists what is missing."""
    entries = read_json(path, "edits")
    if not isinstance(entries, list) or not entries:
        found = type(entries).__name__ if entries else "an empty list"
        raise UserError(f"{path}: should hold a JSON list of edits, found {found}")
    edits = {}
    problems = []
    for i, entry in enumerate(entries):
        fields = entry if isinstance(entry, dict) else {}
        missing = [key for key in FIELDS if not is_text(fields.get(key))]
        if missing:
            problems.append(f"edit {i} has no {' and no '.join(missing)}")
            continue
        files = [Path(path).parent / entry[key] for key in ("before", "after")]
        problems += [f"edit {i}: {file} does not exist" for file in files if not file.is_file()]
        edit = {key: entry[key] for key in FIELDS}
        edit |= {"files": files, "category": str(entry.get("category") or "")}
        edits.setdefault(key_of(entry), edit)
    if problems:
        raise UserError(f"{path}: {first_few(problems)}")
    return edits


def is_text(value):
    return isinstance(value, str) and bool(value.strip())


def read_decisions(path, judge, size):
    """decisions.jsonl of an earlier run -> {key: row}. What follows the last line break was not
    finished when that run was killed: its edit is considered again."""
    if not path.exists():
        return {}
    rows = {}
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
            rows[key_of(row)] = row
            made_by, made_with = row["judge"], row["size"]
            row["scores"], row["reasons"], row["kept"]  # KeyError if one is missing
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{path}: line {number} is no decision ({e!r}); repair or remove the "
                            "file") from e
        if (made_by, made_with) != (judge, size):
            raise UserError(f"{path}: was made with the judge {made_by} and --size {made_with}, "
                            f"not {judge} and {size}; give another --out")
    return rows


def build(path, out, score, describe, judge, size=384, high=0.7, low=0.3, workers=WORKERS):
    """edits.json -> the files of the folder `out` and the summary, a dict.

    score and describe as in `consider`. judge: the name of who scores and describes, without what
    may change from run to run."""
    edits = read_edits(path)
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{out}: cannot be made a folder ({e.strerror})") from e
    file = out / "decisions.jsonl"
    if (out / "pairs.json").exists() and not file.exists():
        raise UserError(f"{out}: holds a pairs.json that was not built here; give another --out")
    earlier = read_decisions(file, judge, size)
    rows = {key: decide(row, high, low) for key, row in earlier.items()}
    write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows.values()).encode())
    todo = [edit for key, edit in edits.items() if key not in rows]

    def decision(edit):
        row = consider(edit, score, describe, size) | {"judge": judge, "size": size}
        return decide(row, high, low)

    bar = tqdm(total=len(edits), initial=len(edits) - len(todo), desc="decide", unit="edit")
    with open(file, "a", encoding="utf-8") as decisions, ThreadPoolExecutor(workers) as pool, bar:
        for start in range(0, len(todo), workers):
            try:
                for row in pool.map(decision, todo[start:start + workers]):
                    rows[key_of(row)] = row
                    decisions.write(json.dumps(row) + "\n")
                    bar.update()
            except UserError as e:
                raise UserError(f"{e}; {len(rows)} decisions are kept in {file}; mend it, and the "
                                "same command goes on from there") from e
            decisions.flush()
            os.fsync(decisions.fileno())
    settings = {"judge": judge, "size": size, "high": high, "low": low}
    return write_pairs(out, edits, rows, settings)


def write_pairs(out, edits, rows, settings):
    """Decided rows -> pairs.json and summary.json of the folder `out`, and the summary."""
    pairs = []
    reasons = Counter()
    for key, edit in edits.items():
        row = rows[key]
        reasons.update(row["reasons"])
        if row["kept"]:
            before, after = (os.path.relpath(file, out) for file in edit["files"])
            pairs.append({"prompt1": row["prompt1"], "prompt2": row["prompt2"],
                          "image1": before, "image2": after, "category": edit["category"]})
    summary = {"edits": len(edits), "kept": len(pairs), "dropped": len(edits) - len(pairs),
               "reasons": dict(reasons.most_common()), **settings}
    write_atomically(out / "pairs.json", json.dumps(pairs, indent=1).encode())
    write_atomically(out / "summary.json", json.dumps(summary, indent=1).encode())
    return summary


def format_summary(summary):
    """The summary as lines to print."""
    lines = [f"{summary['kept']} of {summary['edits']} edits kept, {summary['dropped']} dropped "
             "(an edit may have more than one reason):"]
    lines += [f"{count:>8}  {reason}" for reason, count in summary["reasons"].items()]
    return "\n".join(lines)


def parse(argv):
    """The command line -> its settings. UserError for one that is out of range."""
    parser = argparse.ArgumentParser(prog="python -m extras.build_pairs", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    add = parser.add_argument
    add("edits", nargs="?", metavar="EDITS", help="JSON list of before, after, instruction")
    add("--build", metavar="EDITS", help="the same")
    add("--judge", metavar="URL", action="append", required=True,
        help="who scores, as in extras/judges.py; given more than once: the mean")
    add("--captions", metavar="URL", help="the server that writes captions (the first --judge)")
    add("--out", metavar="DIR", required=True,
        help="folder of pairs.json, decisions.jsonl and summary.json")
    add("--high", type=float, default=0.7, help="least S of an image and its own caption (0.7)")
    add("--low", type=float, default=0.3, help="largest S of an image and the other caption (0.3)")
    add("--size", type=int, default=384, help="pixels of the images in training (384)")
    add("--workers", type=int, default=WORKERS, help=f"edits considered at once ({WORKERS})")
    args = parser.parse_args(argv)
    if bool(args.edits) == bool(args.build):
        parser.error("give EDITS or --build EDITS: a JSON list of before, after, instruction")
    args.edits = args.edits or args.build
    if not 0 <= args.low <= args.high <= 1:
        raise UserError(f"--high {args.high} --low {args.low}: should be in 0..1, and the low one "
                        "not above the high one")
    if args.size < 1 or args.workers < 1:
        raise UserError(f"--size {args.size} --workers {args.workers}: should be positive")
    for spec in args.judge + [args.captions] * bool(args.captions):
        check_spec(spec)
    return args


def main(argv=None):
    """The command line."""
    args = parse(argv)
    judges = open_judges(args.judge, workers=args.workers)
    writer = judges.judges[0]
    if args.captions:
        writer = ServerJudge(args.captions, workers=args.workers)
    if not isinstance(writer, ServerJudge):
        raise UserError(f"--judge {args.judge[0]}: cannot write captions; give --captions URL, a "
                        "server with a vision-language model")
    judge = ", ".join(dict.fromkeys([*judges.who, writer.who]))
    summary = build(args.edits, args.out, judges.score, describe_by(writer), judge,
                    args.size, args.high, args.low, args.workers)
    print(format_summary(summary))
    print(f"pairs in {args.out}/pairs.json, every decision in {args.out}/decisions.jsonl")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")
