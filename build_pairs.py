"""Training pairs from edited pictures, as FocusDiff-Data was made: a VLM captions before and after, and a judge keeps what it can tell apart.

    python data.py --build edits.json --judge http://localhost:8000/v1 --out DIR         # the same as python build_pairs.py --build ...
    python train.py --stage ppo --data DIR/pairs.json

edits.json is a JSON list of {before, after, instruction}, picture paths absolute or relative to the file; an optional `category` is kept.
For each edit the VLM sees both pictures and the instruction, says whether the edit was carried out and writes captions T1 and T2.
The pair stays if the judge gives S(I1,T1) and S(I2,T2) at least --high and S(I1,T2) and S(I2,T1) at most --low. Pictures are judged as
training will see them: resized and cropped to --size.

DIR/decisions.jsonl   a line a decision: the edit, captions, scores, `kept` and the `reasons` if it is not
DIR/pairs.json        what was kept, in the FocusDiff-Data layout, with paths to the pictures where they lie
DIR/summary.json      how many were kept and dropped, and for which reasons

A run that was stopped goes on where it was; edits are known by their three fields, so the list may grow or shrink in between.
Scores are recorded, so other thresholds need no new ones. The official release has no such script; the thresholds' defaults are ours.
"""
import argparse
import json
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from data import UserError, load_image, read_json, some
from judges import JudgeError, ServerJudge, UnreadableAnswer, data_url, open_judges
from tokenizer import write_atomically

PLACES = (("S(I1,T1)", 0, 0), ("S(I2,T2)", 1, 1), ("S(I1,T2)", 0, 1), ("S(I2,T1)", 1, 0))               # name, picture, caption
FIELDS = ("before", "after", "instruction")
NO_PICTURE, NO_EDIT = "a picture cannot be read", "the edit was not carried out"
NO_CAPTIONS, SAME, NO_SCORE = "no captions in the answer", "the captions are the same", "the judge answers neither yes nor no"
DESCRIBE = """The second picture was made from the first by this edit: "{instruction}".
Answer with one JSON object and nothing else, with three keys. "followed": true if the second picture shows what the edit asks for and is \
otherwise like the first, else false. "caption1": one sentence of at most 30 words that describes the first picture. "caption2": the same \
sentence changed in as few words as possible, so that it describes the second picture and no longer the first. Each caption stands alone: it \
names what is seen and mentions neither the edit nor another picture."""


# ---------------------------------------------------------------------------------------------------------------------
# What is decided, and why

def decide(row, high, low):
    """A row with captions and scores, thresholds -> the row with `kept` and `reasons`. A row that has reasons and no scores stays."""
    if not row["scores"]:
        return row
    reasons = [f"{name} is low" for name, i, k in PLACES if i == k and not row["scores"][name] >= high]          # NaN is a reason too
    reasons += [f"{name} is high" for name, i, k in PLACES if i != k and not row["scores"][name] <= low]
    return row | {"kept": not reasons, "reasons": reasons}


def read_captions(answer):
    """What the VLM said -> {followed, caption1, caption2}, or None if that is not in it. Words around the JSON object do no harm."""
    start, end = answer.find("{"), answer.rfind("}")
    try:
        told = json.loads(answer[start:end + 1], strict=False)          # a line break inside a caption is no reason to drop it
    except json.JSONDecodeError:
        return None
    if not isinstance(told, dict) or not isinstance(told.get("followed"), bool):
        return None
    captions = {key: told.get(key) for key in ("caption1", "caption2")}
    if not all(isinstance(caption, str) and caption.strip() for caption in captions.values()):
        return None
    return {"followed": told["followed"], **{key: " ".join(caption.split()) for key, caption in captions.items()}}


def describe_by(server):
    """A `judges.ServerJudge` -> describe(before, after, instruction): pictures (H, W, 3) uint8 -> the VLM's answer, a string.

    One chat completion with two pictures. Tries again, time-outs and the key are the server's own; its JudgeError comes through."""
    def describe(before, after, instruction):
        content = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in (before, after)]
        content.append({"type": "text", "text": DESCRIBE.format(instruction=instruction)})
        answer = server.request("POST", "/chat/completions", {
            "model": server.model, "messages": [{"role": "user", "content": content}], "max_tokens": 400, "temperature": 0})
        try:
            text = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as e:
            raise JudgeError(f"{server.url}: not a chat completion: {server.safe(answer)}") from e
        return text if isinstance(text, str) else ""                    # null: a refusal, or a model that only thought
    return describe


def consider(edit, score, describe, size):
    """An edit, with its `files` (before, after) -> an undecided row: captions by the VLM, then four scores by the judge.

    score(images, prompts) -> B scores in [0, 1], a list of (H, W, 3) uint8 and B strings; describe(before, after, instruction) -> text.
    Whatever cannot be scored is dropped with its reason; a judge that is gone is an error."""
    row = {key: edit[key] for key in FIELDS} | {"prompt1": None, "prompt2": None, "scores": None, "kept": False, "reasons": []}
    try:
        images = [load_image(file, size) for file in edit["files"]]
    except UserError as e:
        return row | {"reasons": [NO_PICTURE], "told": str(e)}
    answer = describe(*images, edit["instruction"])
    told = read_captions(answer)
    if not told:
        return row | {"reasons": [NO_CAPTIONS], "told": answer[:500]}
    captions = [told["caption1"], told["caption2"]]
    row |= {"prompt1": captions[0], "prompt2": captions[1]}
    if not told["followed"]:
        return row | {"reasons": [NO_EDIT]}
    if captions[0].lower() == captions[1].lower():
        return row | {"reasons": [SAME]}
    try:
        scores = score([images[i] for _, i, _ in PLACES], [captions[k] for _, _, k in PLACES])
    except UnreadableAnswer as e:
        return row | {"reasons": [NO_SCORE], "told": str(e)}
    return row | {"scores": {name: round(float(value), 6) for (name, _, _), value in zip(PLACES, scores)}}


# ---------------------------------------------------------------------------------------------------------------------
# Files

def key_of(row):
    return tuple(row[field] for field in FIELDS)


def read_edits(path):
    """edits.json -> edits with `files`, paths of before and after. An edit that is there twice counts once; UserError lists what lacks."""
    entries, folder, edits, bad = read_json(path, "edits"), Path(path).parent, {}, []
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: should hold a JSON list of edits, found {type(entries).__name__ if entries else 'an empty list'}")
    for i, entry in enumerate(entries):
        lacks = [key for key in FIELDS if not isinstance(entry, dict) or not isinstance(entry.get(key), str) or not entry[key].strip()]
        if lacks:
            bad.append(f"edit {i} has no {' and no '.join(lacks)}")
            continue
        files = [folder / entry[key] for key in ("before", "after")]
        bad += [f"edit {i}: {file} does not exist" for file in files if not file.is_file()]
        edits.setdefault(key_of(entry), {key: entry[key] for key in FIELDS} | {"files": files, "category": str(entry.get("category") or "")})
    if bad:
        raise UserError(f"{path}: {some(bad)}")
    return edits


def read_decisions(path, judge, size):
    """decisions.jsonl of an earlier run -> {key: row}. A last line that a kill cut short is left out: its edit is asked about again."""
    if not path.exists():
        return {}
    rows, lines = {}, path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):                       # what follows the last line break was not finished
        try:
            row = json.loads(line)
            rows[key_of(row)] = row
            made = row["judge"], row["size"]
            row["scores"], row["reasons"], row["kept"]
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{path}: line {number} is no decision ({e!r}); repair or remove the file") from e
        if made != (judge, size):
            raise UserError(f"{path}: was made with the judge {made[0]} and --size {made[1]}, not {judge} and {size}; give another --out")
    return rows


def build(path, out, score, describe, judge, size=384, high=0.7, low=0.3, workers=16):
    """edits.json -> the files of OUT (see the file's head) and the summary. score and describe as in `consider`; judge: the name of who
    scores and describes, without what may change from run to run."""
    edits, out = read_edits(path), Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{out}: cannot be made a folder ({e.strerror})") from e
    file = out / "decisions.jsonl"
    if (out / "pairs.json").exists() and not file.exists():
        raise UserError(f"{out}: holds a pairs.json that was not built here; give another --out")
    rows = {key: decide(row, high, low) for key, row in read_decisions(file, judge, size).items()}
    write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows.values()).encode())
    todo = [edit for key, edit in edits.items() if key not in rows]
    with open(file, "a", encoding="utf-8") as decisions, ThreadPoolExecutor(workers) as pool, \
            tqdm(total=len(edits), initial=len(edits) - len(todo), desc="decide", unit="edit") as bar:
        for start in range(0, len(todo), workers):
            try:
                for row in pool.map(lambda edit: consider(edit, score, describe, size), todo[start:start + workers]):
                    row = decide(row | {"judge": judge, "size": size}, high, low)
                    rows[key_of(row)] = row
                    decisions.write(json.dumps(row) + "\n")
                    bar.update()
            except UserError as e:
                raise UserError(f"{e}; {len(rows)} decisions are kept in {file}; mend it, and the same command goes on from there") from e
            decisions.flush()
            os.fsync(decisions.fileno())
    mine = [(edit, rows[key]) for key, edit in edits.items()]
    pairs = [{"prompt1": row["prompt1"], "prompt2": row["prompt2"], **{f"image{i + 1}": os.path.relpath(edit["files"][i], out) for i in (0, 1)},
              "category": edit["category"]} for edit, row in mine if row["kept"]]
    reasons = Counter(reason for _, row in mine for reason in row["reasons"])
    summary = {"edits": len(mine), "kept": len(pairs), "dropped": len(mine) - len(pairs), "reasons": dict(reasons.most_common()),
               "judge": judge, "size": size, "high": high, "low": low}
    write_atomically(out / "pairs.json", json.dumps(pairs, indent=1).encode())
    write_atomically(out / "summary.json", json.dumps(summary, indent=1).encode())
    return summary


def format_summary(summary):
    lines = [f"{summary['kept']} of {summary['edits']} edits kept, {summary['dropped']} dropped (an edit may have several reasons):"]
    return "\n".join(lines + [f"{count:>8}  {reason}" for reason, count in summary["reasons"].items()])


def main(argv=None):
    parser = argparse.ArgumentParser(prog="data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--build", metavar="EDITS", required=True, help="JSON list of before, after, instruction")
    parser.add_argument("--judge", metavar="URL", action="append", required=True, help="who scores, as in judges.py; twice: the mean of both")
    parser.add_argument("--captions", metavar="URL", help="the server that writes the captions (the first --judge)")
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of pairs.json, decisions.jsonl and summary.json")
    parser.add_argument("--high", type=float, default=0.7, help="least S of a picture and its own caption (0.7)")
    parser.add_argument("--low", type=float, default=0.3, help="largest S of a picture and the other caption (0.3)")
    parser.add_argument("--size", type=int, default=384, help="pixels of the training pictures, as which they are judged (384)")
    parser.add_argument("--workers", type=int, default=16, help="edits asked about at once (16)")
    args = parser.parse_args(argv)
    if not 0 <= args.low <= args.high <= 1 or args.size < 1 or args.workers < 1:
        raise UserError(f"--high {args.high} --low {args.low}: should be in 0..1 and the low one not above the high one; --size {args.size} --workers {args.workers}: should be positive")
    judges = open_judges(args.judge, workers=args.workers)
    writer = ServerJudge(args.captions, workers=args.workers) if args.captions else judges.judges[0]
    if not isinstance(writer, ServerJudge):
        raise UserError(f"--judge {args.judge[0]}: cannot write captions; give --captions URL, a server with a vision-language model")
    name = ", ".join(dict.fromkeys([*judges.who, writer.who]))
    summary = build(args.build, args.out, judges.score, describe_by(writer), name, args.size, args.high, args.low, args.workers)
    print(format_summary(summary))
    print(f"pairs in {args.out}/pairs.json, every decision in {args.out}/decisions.jsonl")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")
