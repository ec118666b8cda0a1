"""How fast sampling and training are, beside what a user would run instead, and beside the floor.

    python bench.py                                     # the size of preset tiny, 96 images
    python bench.py --geometry mid --images 12          # 8 layers of width 512, 256 tokens
    python bench.py --geometry janus-1b --images 14 --compile on --json     # for a GPU; JSON, too

Random weights; guidance 5 in the rows "guided", 1 in the others; medians of rounds in which all
take turns. On CUDA our weights and head are fp32 and products bf16, all of the others' bf16. The
second branch has PairWorld's empty prompt of two tokens, or as long as the prompt for the
geometries of Janus and for the others. Scoring and update take at most 8,192 image tokens at once,
ours and others' alike. "PPO step" is a guided rollout, scoring by the reference, and the update.
The columns:

    ms, images/s, ms/step   ours; a step is one of the N tokens
    floor                   our time over the least possible: operations over the rate of a large
                            matrix product, or in rollouts bytes that have to be read over the
                            copy rate if that takes longer, both rates measured in this process
    transformers            Janus' `generate` in transformers: its time over ours
    official                the official release's loop (extras/peers.py): its time over ours
"""
import argparse
import json
import statistics
import sys
import time

import torch

from common import UserError, pick_device, uses_bf16
from model import ImageModel, ModelConfig, empty_ids, generate, how_to_run, prompt_lengths
from model import score
from pairworld import pairworld
from train import PPO, Pretrain

GUIDANCE = 5.0
TOKENS_AT_ONCE = 8192       # of images that are scored, so that they fit in memory
# deepseek-ai/Janus-Pro-*, config.json: language_config
JANUS = dict(text_vocab=102400, image_vocab=16384, n_text=16384, n_image=576, code_dim=8,
             image_positions=False)
GEOMETRIES = {
    "tiny": ModelConfig(**{name: getattr(Pretrain(), name)
                           for name in ("n_layer", "n_head", "n_embd", "n_ffn")}),
    "mid": ModelConfig(n_layer=8, n_head=8, n_embd=512, n_ffn=1408, n_image=256),
    "janus-1b": ModelConfig(n_layer=24, n_head=16, n_embd=2048, n_ffn=5632, **JANUS),
    "janus-7b": ModelConfig(n_layer=30, n_head=32, n_embd=4096, n_ffn=11008, **JANUS),
}


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(function, device):
    wait(device)
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def medians(functions, device, rounds):
    """{name: a call} -> {name: median seconds}. In each round all take turns, so that a machine
    that gets slower does so for all of them. The first round does not count."""
    times = {name: [] for name in functions}
    for n in range(rounds + 1):
        for name, function in functions.items():
            times[name].append(seconds(function, device))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def models(cfg, device, dtype, compile):
    """Our model of random weights, and the peers', which is None without transformers."""
    torch.manual_seed(0)
    bf16 = uses_bf16(dtype, device)
    model = ImageModel(cfg).to(device).eval()
    model.bf16 = bf16
    model.running = how_to_run(compile, device)
    try:
        from extras.peers import transformers_janus
        peer = transformers_janus(cfg, device)
    except UserError as e:
        print(e)
        return model, None
    return model, peer.bfloat16() if bf16 else peer


def empty_of(model):
    return empty_ids(model) if model.cfg.image_positions else None      # Janus has no positions


def calls(model, peer, n, device):
    """{(row, who): a call} for n images, PPO.samples of each prompt if that divides n, else one."""
    samples = PPO.samples if n % PPO.samples == 0 else 1
    prompts = pairworld(-(-n // (2 * samples)), "train", 0).flat_prompts()[:n // samples]
    distinct = model.prompt_ids(prompts)                                        # (R, T)
    ids = distinct.repeat_interleave(samples, 0)                                # (B, T)
    tokens = torch.randint(model.cfg.image_vocab, (n, model.cfg.n_image), device=device)
    empty = empty_of(model)
    guided = ImageModel(model.cfg).eval()       # the same weights; a CUDA graph of its own
    guided.load_state_dict(model.state_dict(), assign=True)
    guided.bf16, guided.running = model.bf16, model.running

    parts = torch.arange(n, device=device).split(max(1, TOKENS_AT_ONCE // model.cfg.n_image))

    def scored(net, logprobs_of, learn):
        for rows in parts:
            with torch.set_grad_enabled(learn):
                logprobs = logprobs_of(rows)
            if learn:
                logprobs.mean().backward()
        net.zero_grad(set_to_none=True)

    def ours(guidance, learn):
        scored(model, lambda rows: score(model, ids[rows], tokens[rows], empty, guidance)[0], learn)

    found = {
        ("rollout", "ours"): lambda: generate(model, distinct, empty, samples),
        ("rollout, guided", "ours"): lambda: generate(guided, distinct, empty, samples, GUIDANCE),
        ("score", "ours"): lambda: ours(1.0, False),
        ("score, guided", "ours"): lambda: ours(GUIDANCE, False),
        ("update", "ours"): lambda: ours(1.0, True),
        ("update, guided", "ours"): lambda: ours(GUIDANCE, True),
    }
    if peer is None:
        return found, ids
    from extras import peers
    padded = peers.left_padded(ids, prompt_lengths(ids, model.cfg.pad))

    def theirs(learn):
        scored(peer, lambda rows: peers.official_score(peer, *[x[rows] for x in padded],
                                                       tokens[rows], GUIDANCE), learn)

    found |= {
        ("rollout, guided", "transformers"):
            lambda: peers.transformers_rollout(peer, *padded, GUIDANCE),
        ("rollout, guided", "official"): lambda: peers.official_rollout(peer, *padded, GUIDANCE),
        ("score, guided", "official"): lambda: theirs(False),
        ("update, guided", "official"): lambda: theirs(True),
    }
    return found, ids


def linear_weights(module):
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Linear))


def floors(model, ids, device):
    """{row: seconds that the machine needs for what cannot be left out}: reading weights, keys and
    values once a step, and the products with weights, two operations each. Attention's products,
    norms and all that is done an element at a time count as nothing."""
    cfg, n = model.cfg, model.cfg.n_image
    weights = linear_weights(model)
    head = linear_weights(model.gen_head)                           # of image tokens alone
    size = 2 if model.bf16 else 4
    dtype = torch.bfloat16 if model.bf16 else torch.float32
    text = prompt_lengths(ids, cfg.pad).sum().item()                # tokens of all prompts
    empty = empty_of(model)
    empty = text if empty is None else empty.shape[1] * len(ids)

    side = 4096 if device.type == "cuda" else 1024
    square = torch.randn(side, side, device=device, dtype=dtype)
    rates = medians({"product": lambda: square @ square}, device, 9)
    operations = 2 * side ** 3 / rates["product"]                   # a second

    def step_bytes(guidance):
        keys = text + len(ids) * n / 2                              # of all rows, on average
        if guidance != 1:
            keys += empty + len(ids) * n / 2
        return size * (weights + 2 * cfg.n_layer * cfg.n_embd * keys)

    found = {}
    for guidance, name in ((1.0, ""), (GUIDANCE, ", guided")):
        branches = 1 if guidance == 1 else 2
        read = step_bytes(guidance)
        half = torch.zeros(int(read / size / 2), device=device, dtype=dtype)
        other = torch.zeros_like(half)              # a copy reads one half and writes the other
        copy = medians({"copy": lambda: other.copy_(half)}, device, 9)["copy"]
        arithmetic = 2 * weights * len(ids) * branches / operations
        found["rollout" + name] = n * max(copy, arithmetic)
        sequence = text + (n - 1) * len(ids)
        if guidance != 1:
            sequence += empty + (n - 1) * len(ids)
        products = (weights - head) * sequence + head * n * len(ids) * branches
        found["score" + name] = 2 * products / operations
        found["update" + name] = 3 * found["score" + name]
    return found


def add_ppo_step(floor, times):
    """The row "PPO step": the sum of its guided rows, for all who have them."""
    parts = "rollout, guided", "score, guided", "update, guided"
    floor["PPO step"] = sum(floor[row] for row in parts)
    for who in ("ours", "official"):
        if all((row, who) in times for row in parts):
            times["PPO step", who] = sum(times[row, who] for row in parts)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=list(GEOMETRIES), default="tiny")
    parser.add_argument("--images", type=int, default=96, help="images at once (96)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (5)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--compile", choices=["auto", "off", "on"], default="auto",
                        help="as of train.py --stage ppo")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args(argv)
    if args.images < 1 or args.rounds < 1:
        raise UserError("--images and --rounds: should be positive")
    device = pick_device(args.device)
    cfg = GEOMETRIES[args.geometry]
    model, peer = models(cfg, device, args.dtype, args.compile)
    functions, ids = calls(model, peer, args.images, device)
    n = len(ids)
    floor = floors(model, ids, device)
    times = medians(functions, device, args.rounds)
    add_ppo_step(floor, times)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.geometry} on {device}, torch {torch.__version__}, {torch.get_num_threads()} "
          f"threads; {n} images of {cfg.n_image} tokens, {parameters:,} parameters, "
          f"{'bf16' if model.bf16 else 'fp32'}, {model.running}")
    print(f"{'':16} {'ms':>9} {'images/s':>9} {'ms/step':>8} {'floor':>6} {'transformers':>13} "
          f"{'official':>9}")
    report = {"geometry": args.geometry, "device": str(device), "torch": torch.__version__,
              "threads": torch.get_num_threads(), "images": n, "bf16": model.bf16,
              "running": model.running}
    for row in floor:
        ours = times[row, "ours"]
        ratios = {who: times[row, who] / ours for who in ("transformers", "official")
                  if (row, who) in times}
        report[row] = {"ms": 1000 * ours, "images_per_s": n / ours, "over_floor": ours / floor[row],
                       **ratios}
        step = f"{1000 * ours / cfg.n_image:8.2f}" if "rollout" in row else " " * 8
        shown = [f"{ratios[who]:.2f} x" if who in ratios else "-"
                 for who in ("transformers", "official")]
        print(f"{row:16} {1000 * ours:9.1f} {n / ours:9.1f} {step} {ours / floor[row]:6.1f} "
              f"{shown[0]:>13} {shown[1]:>9}")
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
