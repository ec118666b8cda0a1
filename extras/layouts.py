"""Images for other benchmarks, written where their official evaluators look for them.

    python -m extras.layouts --run RUN --prompts FILE --layout geneval|t2icompbench|dpg --out DIR

The same command goes on after a stop: images that are there are kept. FILE and DIR of a layout:

geneval       evaluation_metadata.jsonl, a JSON object with `prompt` and `tag` a line.
              DIR/00000/metadata.jsonl is the prompt's line, DIR/00000/samples/0000.png ... are
              the images, 4 a prompt (djghosh13/geneval: README, evaluation/evaluate_images.py).
t2icompbench  examples/dataset/*_val.txt, a prompt a line. DIR/samples/PROMPT_000000.png, 10 a
              prompt; the number counts all images, and the evaluators read the prompt back from
              the name (Karine-Huang/T2I-CompBench: Readme, GORS_finetune/inference_eval.py).
dpg           the folder dpg_bench/prompts, a prompt a file, or a CSV with item_id and text.
              DIR/NAME.png, 4 images as a 2x2 grid row by row, which the evaluator cuts up again
              (TencentQQGYLab/ELLA: README, dpg_bench/compute_dpg_bench.py).
"""

import argparse
import csv
import json
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import UserError, first_few, make_folder, pick_device, write_atomically
from extras.paircomp_files import generate_files, same_settings
from model import load_policy
from sample import add_policy_flags, check_policy_flags, fill_sampling


class Task(NamedTuple):
    """A prompt and where its images go, relative to the output folder."""

    prompt: str
    files: list  # one for each image, or one for all of them as a grid
    texts: dict  # {file: text} of what must lie beside them


IMAGES_PER_PROMPT = {"geneval": 4, "t2icompbench": 10, "dpg": 4}  # as officially


def read_lines(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read as a text file ({e})") from e


def geneval(path, n):
    expected = "should be GenEval's evaluation_metadata.jsonl"
    tasks = []
    for number, line in enumerate(filter(str.strip, read_lines(path)), 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as e:
            raise UserError(f"{path}: line {number} is broken JSON ({e.msg}); {expected}") from e
        for key in ("prompt", "tag"):
            value = entry.get(key) if isinstance(entry, dict) else None
            if not isinstance(value, str) or not value:
                raise UserError(f"{path}: line {number} has no {key!r}; {expected}")
        folder = f"{len(tasks):05d}"
        files = [f"{folder}/samples/{k:04d}.png" for k in range(n)]
        texts = {f"{folder}/metadata.jsonl": json.dumps(entry)}
        tasks.append(Task(entry["prompt"], files, texts))
    return tasks


def t2icompbench(path, n):
    prompts = [line.split("\t")[0] for line in read_lines(path)]
    prompts = [prompt for prompt in prompts if prompt.strip()]
    # The evaluators take what stands before the first underscore of a file's name for the prompt.
    bad = [p[:60] for p in prompts if set(p) & set("_/\0") or len(p.encode()) > 230]
    if bad:
        raise UserError(f"{path}: cannot be T2I-CompBench file names, because they hold _ or / or "
                        f"are longer than 230 bytes: {first_few(list(map(repr, bad)))}")
    tasks = []
    for i, prompt in enumerate(prompts):
        files = [f"samples/{prompt}_{i * n + k:06d}.png" for k in range(n)]
        tasks.append(Task(prompt, files, {}))
    return tasks


def dpg(path, n):
    if n not in (1, 4):
        raise UserError(f"--n {n}: DPG-Bench takes 4 images a prompt, as a 2x2 grid, or 1 (its "
                        "evaluator then needs --pic-num 1)")
    if Path(path).is_dir():
        files = sorted(Path(path).glob("*.txt"))
        prompts = {file.stem: " ".join(read_lines(file)).strip() for file in files}
    else:
        prompts = read_dpg_csv(path)
    # The evaluator takes what stands before the first dot of a file's name for the prompt's name.
    bad = [name for name, prompt in prompts.items() if not prompt or set(name) & set("./\0")]
    if bad:
        raise UserError(f"{path}: prompts that are empty or whose name holds . or /: "
                        f"{first_few(list(map(repr, bad)))}")
    return [Task(prompt, [f"{name}.png"], {}) for name, prompt in prompts.items()]


def read_dpg_csv(path):
    """A CSV with a row for each question, many for a prompt -> {item_id: prompt}."""
    expected = "should be the folder dpg_bench/prompts or a CSV with item_id and text in every row"
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"{path}: cannot be read ({e}); {expected}") from e
    if any(not row.get("item_id") or not row.get("text") for row in rows):
        raise UserError(f"{path}: {expected}")
    return {row["item_id"]: row["text"].strip() for row in rows}


LAYOUTS = {"geneval": geneval, "t2icompbench": t2icompbench, "dpg": dpg}
# Each runs in the folder of its own repository. {out} is absolute and does not end in a slash,
# which T2I-CompBench's 3D evaluator could not bear.
EVALUATE = {
    "geneval": "python evaluation/evaluate_images.py {out} --outfile results.jsonl "
    "--model-path FOLDER_OF_THE_DETECTOR; python evaluation/summary_scores.py results.jsonl",
    "t2icompbench": "BLIPvqa_eval/BLIP_vqa.py --out_dir={out}; CLIPScore_eval, UniDet_eval and "
    "3_in_1_eval (which wants 10 images a prompt of all of complex_val.txt) --outpath={out}; "
    "MLLM_eval --image_path or --file-path",
    "dpg": "python dpg_bench/compute_dpg_bench.py --image-root-path {out} --resolution {size} "
    "--pic-num {n} --vqa-model mplug    (dist_eval.sh is for two GPUs or more)",
}


def read_tasks(path, layout, n):
    """A benchmark's prompts -> Tasks with n images each.

    UserError names the line or the prompts that do not fit the layout."""
    tasks = LAYOUTS[layout](path, n)
    if not tasks:
        raise UserError(f"{path}: holds no prompt")
    return tasks


def as_grid(images):
    """(4, H, W, 3) -> (2H, 2W, 3), row by row; one image (1, H, W, 3) stays as it is."""
    if len(images) == 1:
        return images[0]
    top = np.concatenate(list(images[:2]), 1)  # (H, 2W, 3)
    bottom = np.concatenate(list(images[2:]), 1)
    return np.concatenate([top, bottom])


def refuse_strangers(out, files):
    """UserError if the folders of the files hold other images.

    The evaluators read whatever lies there, so that images of other prompts, or of another --n,
    would count."""
    folders = {file.parent for file in files}
    images = [image for folder in folders for image in folder.glob("*.png")]
    strangers = sorted(str(image) for image in images if image not in files)
    if strangers:
        raise UserError(f"{out}: holds images that are not of these prompts and this --n: "
                        f"{first_few(strangers)}; give another --out")


def write_layout(args):
    """Sample a benchmark's prompts into the files that its evaluator reads."""
    n = args.n or IMAGES_PER_PROMPT[args.layout]
    out = Path(args.out)
    tasks = read_tasks(args.prompts, args.layout, n)
    prompts = [task.prompt for task in tasks]
    files = [[out / file for file in task.files] for task in tasks]
    refuse_strangers(out, {file for row in files for file in row})
    device = pick_device(args.device)
    vq, model = load_policy(args.run, args.policy, device, compile=args.compile)
    fill_sampling(args, model)
    settings = args.guidance, args.temperature, args.seed
    same_settings(out, model, prompts, *settings)
    for task in tasks:
        for file, text in task.texts.items():
            make_folder((out / file).parent)
            write_atomically(out / file, text.encode())
    combine = list if args.layout != "dpg" else lambda images: [as_grid(images)]
    made = generate_files(model, vq, prompts, files, n, *settings, args.batch, combine)
    total = sum(map(len, files))
    print(f"{made} files made, {total - made} were there, for {len(tasks)} prompts in {out}")
    quoted = shlex.quote(str(out.resolve()))
    print(f"evaluate with: {EVALUATE[args.layout].format(out=quoted, n=n, size=vq.cfg.image_size)}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m extras.layouts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    usual = ", ".join(f"{layout} {n}" for layout, n in IMAGES_PER_PROMPT.items())
    add_policy_flags(parser)
    add = parser.add_argument
    add("--prompts", metavar="FILE", required=True, help="the benchmark's prompts")
    add("--layout", choices=list(LAYOUTS), required=True, help="whose evaluator reads the images")
    add("--out", metavar="DIR", required=True, help="folder to write")
    add("--n", type=int, help=f"images a prompt ({usual})")
    args = parser.parse_args(argv)
    check_policy_flags(args)
    write_layout(args)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
