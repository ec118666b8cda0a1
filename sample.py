"""Prompts -> a picture of pictures, or the folder that another benchmark's evaluator reads.

    python sample.py --run runs/tiny --prompt "three red circles left of a blue square" --n 8 --out picture.png
    python sample.py --run runs/tiny --prompt "three red circles" --prompt "two red circles"     # a pair, with the map of D_t

Given two prompts it shows each sample of the one beside a sample of the other, and between them two maps over the tokens of the
left sample: where the model thinks that the prompts differ, D_t = JS( pi(.|o_<t, T1), pi(.|o_<t, T2) ), and, if the run has both,
where PPO changed the base model: the same distance between the two models with the same prompt. A map is scaled to its largest value.

    python sample.py --run runs/tiny --prompts evaluation_metadata.jsonl --layout geneval --out DIR      # layouts.py; goes on where it stopped
    python sample.py --run runs/tiny --prompts color_val.txt --layout t2icompbench --out DIR
    python sample.py --run runs/tiny --prompts dpg_bench/prompts --layout dpg --out DIR
"""
import argparse
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from data import UserError, picture_grid, some
from layouts import EVALUATE, LAYOUTS, PICTURES, as_grid, read_tasks
from model import empty_ids, generate, pick_device, prompt_divergence, stored_autocast
from runs import chosen_policy, generate_files, guidance_of, load_policy, make_folder, same_settings
from tokenizer import decode_ids, write_atomically


def heat_map(divergence, images, grid):
    """D_t (B, N) and the pictures it was measured on (B, H, W, 3) uint8 -> red where D_t is large, over the faded picture."""
    heat = rearrange(divergence / divergence.max().clamp(min=1e-8), "b (y x) -> b y x 1", y=grid).cpu().numpy()
    scale = images.shape[1] // grid
    heat = heat.repeat(scale, 1).repeat(scale, 2)                                                       # (B, H, W, 1)
    faded = 255 - (255 - images.astype(np.float32)) * 0.35
    return (faded * (1 - heat) + np.array([220.0, 0.0, 0.0]) * heat).astype(np.uint8)


def write_layout(args):
    """Pictures of a benchmark's prompts where its evaluator looks for them. What is there is skipped."""
    n = args.n or PICTURES[args.layout]
    tasks, out = read_tasks(args.prompts, args.layout, n), Path(args.out)
    files = [[out / file for file in task.files] for task in tasks]
    ours = {file for own in files for file in own}
    strangers = sorted(str(file) for folder in {file.parent for file in ours} for file in folder.glob("*.png") if file not in ours)
    if strangers:           # the evaluators read whatever lies there: pictures of other prompts or another --n would count
        raise UserError(f"{out}: holds pictures that are not of these prompts and this --n: {some(strangers)}; give another --out")
    vq, model = chosen_policy(args)
    args.guidance = guidance_of(args, model)
    same_settings(out, args, model, [task.prompt for task in tasks])
    for task in tasks:
        for file, text in task.texts.items():
            make_folder((out / file).parent)
            write_atomically(out / file, text.encode())
    combine = list if args.layout != "dpg" else lambda pictures: [as_grid(pictures)]
    made = generate_files(model, vq, [task.prompt for task in tasks], files, n, args.guidance, args.temperature, args.seed, args.batch, combine)
    print(f"{made} files made, {len(ours) - made} were there, for {len(tasks)} prompts in {out}")
    print("evaluate with: " + EVALUATE[args.layout].format(out=shlex.quote(str(out.resolve())), n=n, size=vq.cfg.image_size))


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--run", metavar="DIR", help="run folder of train.py")
    parser.add_argument("--janus", metavar="DIR", help="a Janus checkpoint instead of a run")
    parser.add_argument("--policy", choices=["ppo", "pretrain"], default="ppo", help="whose pictures (ppo)")
    parser.add_argument("--prompt", action="append", help="give it twice for a pair")
    parser.add_argument("--prompts", metavar="FILE", help="a benchmark's prompts, with --layout")
    parser.add_argument("--layout", choices=list(LAYOUTS), help="whose evaluator will read the pictures")
    parser.add_argument("--n", type=int, help=f"pictures a prompt (8; with --layout {', '.join(f'{k} {n}' for k, n in PICTURES.items())})")
    parser.add_argument("--out", help="PNG to write (picture.png); with --layout the folder")
    parser.add_argument("--batch", type=int, default=64, help="pictures drawn at a time with --layout; fewer need less memory (64)")
    parser.add_argument("--guidance", type=float, help="w of classifier-free guidance (as the policy was trained with; 5 for a Janus checkpoint)")
    parser.add_argument("--temperature", type=float, default=1.0, help="tau (1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    args = parser.parse_args(argv)
    if args.n is not None and args.n < 1 or args.batch < 1 or args.temperature <= 0:
        raise UserError(f"--n {args.n} --batch {args.batch} --temperature {args.temperature}: should be positive")
    if args.prompts or args.layout:
        if args.prompt or not (args.prompts and args.layout and args.out):
            raise UserError("--prompts FILE, --layout and --out DIR go together, and without --prompt")
        return write_layout(args)
    if not args.prompt:
        raise UserError("give --prompt TEXT, or --prompts FILE with --layout and --out DIR")
    args.n, args.out = args.n or 8, args.out or "picture.png"
    if len(args.prompt) > 2:
        raise UserError(f"{len(args.prompt)} prompts: give one, or two for a pair")

    device = pick_device(args.device)
    vq, model = chosen_policy(args)
    args.guidance = guidance_of(args, model)
    prompts, empty = torch.from_numpy(model.text.prompts(args.prompt, model.cfg.n_text)).to(device), empty_ids(model)
    generator = torch.Generator(device).manual_seed(args.seed)
    with stored_autocast(model):
        tokens, _ = generate(model, prompts, empty, args.n, args.guidance, args.temperature, generator) # (prompts*n, N)
    images, scale = decode_ids(vq, tokens), max(1, 160 // vq.cfg.image_size)
    if len(args.prompt) == 1:
        sheet = picture_grid(images, args.prompt * args.n, columns=min(args.n, 4), scale=scale)
    else:
        one, two = (row.expand(args.n, -1) for row in prompts)
        left, right = images[:args.n], images[args.n:]
        maps = {"where they differ: D_t": (two, model)}
        if args.run and args.policy == "ppo" and (Path(args.run) / "pretrain.safetensors").exists():
            maps["what PPO changed"] = one, load_policy(args.run, "pretrain", device)[1]
        with stored_autocast(model):
            found = [prompt_divergence(model, one, ids, tokens[:args.n], empty, args.guidance, args.temperature, other=other) for ids, other in maps.values()]
        heats = [heat_map(divergence, left, vq.cfg.grid) for divergence in found]
        rows, labels = np.stack([left, *heats, right], 1), [args.prompt[0], *maps, args.prompt[1]] * args.n
        sheet = picture_grid(rows.reshape(-1, *images.shape[1:]), labels, columns=len(maps) + 2, scale=scale)
    try:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        sheet.save(args.out)
    except (OSError, ValueError) as e:
        raise UserError(f"--out {args.out}: cannot be written ({e})") from e
    print(args.out)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
