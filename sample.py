"""Images of a policy for your prompts.

    python sample.py --run runs/tiny --prompt "three red circles left of a blue square" --out a.png
    python sample.py --run runs/tiny --prompt "three red circles" --prompt "two red circles"

Two prompts are taken as a pair. Each sample of the first stands beside a sample of the second, and
between them are two maps over the tokens of the left one: where the model thinks that the prompts
ask for different things, D_t = JS( pi(.|o_<t, T1), pi(.|o_<t, T2) ), and where PPO changed the base
model, the same distance between the two models with one prompt. A map is scaled to its maximum.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from common import UserError, make_folder, pick_device, read_json
from data import image_grid
from model import empty_ids, generate, load_policy, prompt_divergence, usual_guidance
from tokenizer import decode_ids


def add_policy_flags(parser):
    """The flags of everything that draws images of a run's policy."""
    parser.add_argument("--run", metavar="DIR", required=True, help="run folder of train.py")
    parser.add_argument("--policy", choices=["ppo", "pretrain"], default="ppo",
                        help="whose images (ppo)")
    parser.add_argument("--guidance", type=float,
                        help="w of classifier-free guidance (the policy's best, as PPO found it)")
    parser.add_argument("--temperature", type=float, help="tau (likewise)")
    parser.add_argument("--seed", type=int, default=0, help="images follow from it (0)")
    parser.add_argument("--batch", type=int, default=64, help="images at once (64)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    parser.add_argument("--compile", choices=["auto", "off", "on"],
                        help="as of train.py --stage ppo (as in the run's PPO)")


def check_policy_flags(args):
    for name in ("n", "batch", "temperature"):
        value = getattr(args, name, None)
        if value is not None and value <= 0:
            raise UserError(f"--{name} {value}: should be positive")
    if getattr(args, "seed", 0) < 0:
        raise UserError(f"--seed {args.seed}: should be 0 or more")


def fill_sampling(args, model):
    """--guidance and --temperature where they are not given: at which the policy, or the base
    model, was best on validation pairs in the run's PPO. Without PPO what is usual."""
    path = Path(args.run) / "paircomp.json"
    result = read_json(path, "result of PPO") if path.exists() else {}
    setting = result.get({"pretrain": "base_setting", "ppo": "ppo_setting"}[args.policy])
    guidance, temperature = setting or (usual_guidance(model), 1.0)
    if args.guidance is None:
        args.guidance = guidance
    if args.temperature is None:
        args.temperature = temperature


def heat_map(divergence, images, grid):
    """D_t (B, N) and the images (B, H, W, 3) uint8 that it is about -> the faded images, red where
    D_t is large."""
    heat = divergence / divergence.max().clamp(min=1e-8)
    heat = rearrange(heat, "b (y x) -> b y x 1", y=grid).cpu().numpy()
    scale = images.shape[1] // grid
    heat = heat.repeat(scale, 1).repeat(scale, 2)                       # (B, H, W, 1)
    faded = 255 - (255 - images.astype(np.float32)) * 0.35
    red = np.array([220.0, 0.0, 0.0])
    return (faded * (1 - heat) + red * heat).astype(np.uint8)


def pair_maps(args, model, ids, tokens, images, grid, sampling):
    """{label: images (n, H, W, 3)} of the two maps. ids (2, T), tokens (n, N) and images of the
    first prompt's samples."""
    first, second = (row.expand(len(tokens), -1) for row in ids)
    divergence = prompt_divergence(model, first, second, tokens, **sampling)
    maps = {"where they differ: D_t": heat_map(divergence, images, grid)}
    if args.policy == "ppo" and (Path(args.run) / "pretrain.safetensors").exists():
        _, base = load_policy(args.run, "pretrain", pick_device(args.device),
                              compile=args.compile)
        change = prompt_divergence(model, first, first, tokens, other=base, **sampling)
        maps["what PPO changed"] = heat_map(change, images, grid)
    return maps


@torch.no_grad()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_policy_flags(parser)
    parser.add_argument("--prompt", action="append", required=True, help="twice for a pair")
    parser.add_argument("--n", type=int, default=8, help="images a prompt (8)")
    parser.add_argument("--out", default="picture.png", help="PNG to write (picture.png)")
    argv = sys.argv[1:] if argv is None else argv
    for word, instead in (("--layout", "python -m extras.layouts --layout"),
                          ("--janus", "python -m extras.janus --import DIR --out RUN, then --run")):
        if word in [w.split("=")[0] for w in argv]:
            raise UserError(f"{word} is gone: use {instead}")
    args = parser.parse_args(argv)
    check_policy_flags(args)
    if len(args.prompt) > 2:
        raise UserError(f"{len(args.prompt)} prompts: give one, or two for a pair")

    device = pick_device(args.device)
    vq, model = load_policy(args.run, args.policy, device, compile=args.compile)
    fill_sampling(args, model)
    sampling = dict(empty=empty_ids(model), guidance=args.guidance, temperature=args.temperature)
    ids = model.prompt_ids(args.prompt)
    generator = torch.Generator(device).manual_seed(args.seed)
    batch = min(args.batch, len(ids) * args.n)
    tokens, _ = generate(model, ids, samples=args.n, generator=generator, batch=batch,
                         **sampling)                                    # (prompts*n, N)
    images = decode_ids(vq, tokens)
    scale = max(1, 160 // vq.cfg.image_size)
    if len(args.prompt) == 1:
        sheet = image_grid(images, args.prompt * args.n, min(args.n, 4), scale)
    else:
        left = images[:args.n]
        maps = pair_maps(args, model, ids, tokens[:args.n], left, vq.cfg.grid, sampling)
        rows = np.stack([left, *maps.values(), images[args.n:]], 1)     # (n, 3 or 4, H, W, 3)
        labels = [args.prompt[0], *maps, args.prompt[1]] * args.n
        sheet = image_grid(rows.reshape(-1, *images.shape[1:]), labels, rows.shape[1], scale)
    make_folder(Path(args.out).parent)
    try:
        sheet.save(args.out)
    except (OSError, ValueError) as e:
        raise UserError(f"--out {args.out}: cannot be written ({e})") from e
    print(args.out)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
