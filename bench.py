"""How fast the parts are: random weights at the size of preset tiny, the median of several rounds.

    python bench.py             # a table
    python bench.py --json      # the same, and a last line of JSON

The parts are those of one PPO rollout and update (`train.py --stage ppo`). images/s counts its
pairs * 2 * samples images.
"""
import argparse
import json
import sys
import time

import numpy as np
import torch

from common import UserError, pick_device
from model import ImageModel, ModelConfig, empty_ids, generate, score
from pairworld import pairworld
from reward import Judge, JudgeConfig, NetworkJudge
from tokenizer import VQConfig, VQModel, decode_ids, encode_images
from train import PPO, Pretrain, Reward, Tokenizer


def median_seconds(function, device, rounds):
    """Median wall time of a call, after one that does not count. Waits for the device before and
    after."""
    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()
    times = []
    for _ in range(rounds + 1):
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def parts_of_a_rollout(device):
    """{name: a call}, the number of images, and the model."""
    cfg = PPO()
    pre = Pretrain()
    size = Tokenizer()
    torch.manual_seed(0)
    codes = dict(codebook_size=size.codebook_size, codebook_dim=size.codebook_dim)
    vq = VQModel(VQConfig(ch=size.ch, **codes)).to(device).eval()
    shape = dict(n_layer=pre.n_layer, n_head=pre.n_head, n_embd=pre.n_embd, n_ffn=pre.n_ffn)
    tokens_of = dict(n_text=pre.n_text, n_image=vq.cfg.grid ** 2)
    codes_of = dict(image_vocab=size.codebook_size, code_dim=size.codebook_dim)
    model = ImageModel(ModelConfig(**shape, **tokens_of, **codes_of)).to(device)
    judge = NetworkJudge(Judge(JudgeConfig(width=Reward().width)), device)

    pairs = pairworld(cfg.pairs, "train", 0)
    prompts = [prompt for prompt in pairs.flat_prompts() for _ in range(cfg.samples)]
    images = pairs.images.reshape(-1, 32, 32, 3).repeat(cfg.samples, 0)         # (B, 32, 32, 3)
    tokens = encode_images(vq, images, device)                                  # (B, N)
    prompt_ids = model.prompt_ids(prompts)                                      # (B, T)
    distinct = prompt_ids[::cfg.samples]
    empty = empty_ids(model)

    def update(guidance):
        model.zero_grad(set_to_none=True)
        score(model, prompt_ids, tokens, empty, guidance)[0].mean().backward()

    @torch.no_grad()
    def score_again():
        score(model, prompt_ids, tokens)

    parts = {
        "encode": lambda: encode_images(vq, images, device),
        "decode": lambda: decode_ids(vq, tokens),
        "rollout": lambda: generate(model, distinct, empty, cfg.samples),
        "rollout, guided": lambda: generate(model, distinct, empty, cfg.samples, 2.0),
        "score": score_again,
        "update": lambda: update(1.0),
        "update, guided": lambda: update(2.0),
        "judge": lambda: judge.score(images, prompts),
    }
    return parts, len(images), model


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds a part (5)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    parts, n, model = parts_of_a_rollout(device)
    report = {
        "device": str(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "images": n,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    print(f"{device}, torch {torch.__version__}, {report['threads']} threads; {n} images of "
          f"{model.cfg.n_image} tokens, model of {report['parameters']:,} parameters")
    for name, function in parts.items():
        seconds = median_seconds(function, device, args.rounds)
        report[name] = {"ms": round(1000 * seconds, 1), "images_per_s": round(n / seconds, 1)}
        print(f"{name:16} {1000 * seconds:9.1f} ms {n / seconds:10.0f} images/s")
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
