"""How fast the parts are. Random weights at the size of preset tiny; warm-up, then the median of several timed rounds.

    python bench.py             # a table
    python bench.py --json      # the same, the last line JSON

The parts are those of one PPO rollout and update (`train.py --stage ppo`): pictures/s is over pairs * 2 * samples pictures.
"""
import argparse
import json
import sys
import time

import numpy as np
import torch

from config import PPO, Pretrain, Reward, Tokenizer
from data import UserError
from model import ImageModel, ModelConfig, generate, pick_device, score
from pairworld import TextTokens, pairworld
from reward import Judge, JudgeConfig, NetworkJudge
from tokenizer import VQConfig, VQModel, decode_ids, encode_images


def median_seconds(function, device, rounds):
    """Median wall time of a call, after one that is not counted; waits for the device on both sides."""
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


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds a part (5)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    args = parser.parse_args(argv)
    device, tok, pre, rew, ppo = pick_device(args.device), Tokenizer(), Pretrain(), Reward(), PPO()
    torch.manual_seed(0)
    text = TextTokens()
    vq = VQModel(VQConfig(ch=tok.ch, codebook_size=tok.codebook_size, codebook_dim=tok.codebook_dim)).to(device).eval()
    model = ImageModel(ModelConfig(text.vocab_size, tok.codebook_size, pre.n_text, vq.cfg.grid ** 2, pre.n_layer, pre.n_head, pre.n_embd, pre.n_ffn,
                                   tok.codebook_dim)).to(device)
    judge = NetworkJudge(Judge(JudgeConfig(text_vocab=text.vocab_size, width=rew.width)), device)
    pairs, n = pairworld(ppo.pairs, "train", 0), ppo.pairs * 2 * ppo.samples
    texts = pairs.texts()
    prompts, empty = (torch.from_numpy(text.prompts(t, pre.n_text)).to(device) for t in (texts, [None]))
    ids = prompts.repeat_interleave(ppo.samples, 0)
    images = pairs.images.reshape(-1, 32, 32, 3).repeat(ppo.samples, 0)                                 # (n, 32, 32, 3)
    tokens = encode_images(vq, images, device)

    def update(guidance):
        model.zero_grad(set_to_none=True)
        score(model, ids, tokens, empty, guidance)[0].mean().backward()

    def rescore():
        with torch.no_grad():
            score(model, ids, tokens)

    parts = {
        "encode": lambda: encode_images(vq, images, device),
        "decode": lambda: decode_ids(vq, tokens),
        "rollout": lambda: generate(model, prompts, empty, ppo.samples),
        "rollout, guided": lambda: generate(model, prompts, empty, ppo.samples, 2.0),
        "re-score": rescore,
        "update": lambda: update(1.0),
        "update, guided": lambda: update(2.0),
        "judge": lambda: judge.score(images, [t for t in texts for _ in range(ppo.samples)]),
    }
    report = {"device": str(device), "torch": torch.__version__, "threads": torch.get_num_threads(), "pictures": n,
              "parameters": sum(p.numel() for p in model.parameters())}
    print(f"{report['device']}, torch {report['torch']}, {report['threads']} threads; {n} pictures of {model.cfg.n_image} tokens, model of {report['parameters']:,} parameters")
    for name, function in parts.items():
        seconds = median_seconds(function, device, args.rounds)
        report[name] = {"ms": round(1000 * seconds, 1), "pictures_per_s": round(n / seconds, 1)}
        print(f"{name:16} {1000 * seconds:9.1f} ms {n / seconds:10.0f} pictures/s")
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
