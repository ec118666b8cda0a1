"""Prompts of other benchmarks, and where their official evaluators look for the pictures.

geneval      evaluation_metadata.jsonl, a JSON object with `prompt` and `tag` a line. DIR/00000/metadata.jsonl is the prompt's line,
             DIR/00000/samples/0000.png ... its pictures (djghosh13/geneval README and evaluation/evaluate_images.py). 4 a prompt.
t2icompbench examples/dataset/*_val.txt, a prompt a line. DIR/samples/PROMPT_000000.png, the number counts all pictures and the
             prompt is read back from the name (Karine-Huang/T2I-CompBench Readme, GORS_finetune/inference_eval.py). 10 a prompt.
dpg          the folder dpg_bench/prompts, a prompt a file, or a CSV with item_id and text. DIR/NAME.png, 4 pictures as a 2x2 grid row by row,
             which the evaluator cuts up again (TencentQQGYLab/ELLA README, dpg_bench/compute_dpg_bench.py).
"""
import csv
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import UserError, some


class Task(NamedTuple):
    """A prompt and where its pictures go, relative to the output folder."""
    prompt: str
    files: list             # as many as pictures, or one for all of them as a grid
    texts: dict             # {file: text} of what has to lie beside them


PICTURES = {"geneval": 4, "t2icompbench": 10, "dpg": 4}                 # a prompt, as officially


def _lines(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read as a text file ({e})") from e


def geneval(path, n):
    tasks = []
    for number, line in enumerate(filter(str.strip, _lines(path)), 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as e:
            raise UserError(f"{path}: line {number} is broken JSON ({e.msg}); should be GenEval's evaluation_metadata.jsonl") from e
        for key in ("prompt", "tag"):
            if not isinstance(entry, dict) or not isinstance(entry.get(key), str) or not entry[key]:
                raise UserError(f"{path}: line {number} has no {key!r}; should be GenEval's evaluation_metadata.jsonl")
        folder = f"{len(tasks):05d}"
        tasks.append(Task(entry["prompt"], [f"{folder}/samples/{k:04d}.png" for k in range(n)], {f"{folder}/metadata.jsonl": json.dumps(entry)}))
    return tasks


def t2icompbench(path, n):
    prompts = [prompt for prompt in (line.split("\t")[0] for line in _lines(path)) if prompt.strip()]
    bad = [f"{prompt[:60]!r}" for prompt in prompts if set(prompt) & set("_/\0") or len(prompt.encode()) > 230]
    if bad:         # the evaluators take what stands before the first underscore of the file name for the prompt
        raise UserError(f"{path}: cannot be T2I-CompBench file names, because they hold _ or / or are longer than 230 bytes: {some(bad)}")
    return [Task(prompt, [f"samples/{prompt}_{i * n + k:06d}.png" for k in range(n)], {}) for i, prompt in enumerate(prompts)]


def dpg(path, n):
    if n not in (1, 4):
        raise UserError(f"--n {n}: DPG-Bench takes 4 pictures a prompt, as a 2x2 grid, or 1 (its evaluator then needs --pic-num 1)")
    if Path(path).is_dir():
        prompts = [(file.stem, " ".join(_lines(file)).strip()) for file in sorted(Path(path).glob("*.txt"))]
    else:
        try:
            with open(path, encoding="utf-8-sig", newline="") as file:
                rows = list(csv.DictReader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as e:
            raise UserError(f"{path}: cannot be read ({e}); should be the folder dpg_bench/prompts or a CSV with item_id and text") from e
        if any(not row.get("item_id") or not row.get("text") for row in rows):
            raise UserError(f"{path}: should be the folder dpg_bench/prompts, or a CSV whose every row has item_id and text")
        prompts = list({row["item_id"]: row["text"].strip() for row in rows}.items())                   # a row a question, many for a prompt
    bad = [f"{name!r}" for name, prompt in prompts if not prompt or set(name) & set("./\0")]
    if bad:         # the evaluator takes what stands before the first point of the file name for the prompt's name
        raise UserError(f"{path}: prompts that are empty or whose name holds . or /: {some(bad)}")
    return [Task(prompt, [f"{name}.png"], {}) for name, prompt in prompts]


LAYOUTS = {"geneval": geneval, "t2icompbench": t2icompbench, "dpg": dpg}
EVALUATE = {  # each in its own repository's folder; {out} is absolute, and ends in no slash, which T2I-CompBench's 3D evaluator could not bear
    "geneval": "python evaluation/evaluate_images.py {out} --outfile results.jsonl --model-path FOLDER_OF_THE_DETECTOR; "
               "python evaluation/summary_scores.py results.jsonl",
    "t2icompbench": "BLIPvqa_eval/BLIP_vqa.py --out_dir={out}; CLIPScore_eval, UniDet_eval and 3_in_1_eval (which wants 10 pictures a prompt of all of "
                    "complex_val.txt) --outpath={out}; MLLM_eval --image_path or --file-path",
    "dpg": "python dpg_bench/compute_dpg_bench.py --image-root-path {out} --resolution {size} --pic-num {n} --vqa-model mplug    (dist_eval.sh is for "
           "two GPUs or more)",
}


def read_tasks(path, layout, n):
    """A benchmark's prompts -> Tasks with n pictures each. UserError names the line or the prompts that do not fit the layout."""
    tasks = LAYOUTS[layout](path, n)
    if not tasks:
        raise UserError(f"{path}: holds no prompt")
    return tasks


def as_grid(images):
    """(4, H, W, 3) -> (2H, 2W, 3), row by row; one picture stays as it is."""
    return images[0] if len(images) == 1 else np.concatenate([np.concatenate(list(row), 1) for row in (images[:2], images[2:])])
