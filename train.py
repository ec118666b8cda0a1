"""Train nanoFocusDiff. Four stages, each a function below, in the order in which they run:

    tokenizer   a VQ model learns to turn images into tokens and back
    pretrain    a transformer learns to write a prompt's tokens: the base model
    reward      two judges learn to answer "Does this image match the description?"
    ppo         the base model samples images for pairs of prompts, a judge scores them, PPO learns

    python train.py --stage ppo                     # trains what is missing first, then PPO
    python train.py --stage ppo --preset smoke      # everything in under a minute, to see it work
    python train.py --stage pretrain --lr 5e-4      # every field of a stage's config is a flag
    python train.py --stage ppo --resume            # go on where a run was stopped

A run folder (--out) holds the weights (*.safetensors), <stage>.state while a stage is unfinished,
config.json, log.jsonl (one object a step), paircomp.json, samples/*.png and curves.png.

Shapes: P pairs, 2 prompts, G samples a prompt, B = P*2*G sequences in the flat order (pair, prompt,
sample), T text tokens, N image tokens, H W image.
"""
import argparse
import inspect
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from tqdm import tqdm

import ppo
from common import Loop, UserError, adamw, copy_file, gather, leads, load_module, make_folder
from common import muon_and_adamw, only_process, pick_device, read_json, save_weights, several
from common import share, step_random, total, trained, uses_bf16, world, write_json
from data import PairSet, image_grid, read_splits
from eval_paircomp import BeforeAfter, generate_images, mean_and_error
from model import ImageModel, ModelConfig, empty_ids, generate, load_policy, save_policy, score
from model import usual_guidance
from pairworld import ATTRIBUTES, LONG, SHORT, TextTokens, pairworld, read_scene
from reward import Judge, JudgeConfig, NetworkJudge, OracleJudge, judge_loss, judge_report
from reward import load_judges, most_alike, save_judges, splice, submit
from tokenizer import VQConfig, VQModel, code_statistics, decode_ids, encode_images, from_pixels
from tokenizer import kmeans_codes, update_codebook, vq_loss


# --------------------------------------------------------------------------------------------------
# Settings: a dataclass a stage, whose fields are its flags. A name without a type is a constant.

def flag(default, text, origin="ours", **limits):
    """origin: whose value the default is: paper, official or ours. limits: least, or choices."""
    metadata = {"help": text, "origin": origin, **limits}
    if isinstance(default, tuple):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class Common:
    out: str = flag("runs/tiny", "run folder")
    seed: int = flag(0, "every random choice follows from it", least=0)
    device: str = flag("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = flag("auto", "of products; auto: bf16 on cuda", choices=("auto", "fp32", "bf16"))
    data: str = flag("", "pairs.json in FocusDiff-Data's layout; empty is PairWorld")
    n_pairs: int = flag(12000, "how many PairWorld pairs to train on", least=1)


@dataclass
class Tokenizer(Common):
    steps: int = flag(1400, "optimizer steps", least=1)
    batch: int = flag(16, "images a step", least=1)
    lr: float = flag(3e-3, "peak learning rate", least=0)
    unquantized: int = flag(400, "steps before the codebook is made, by k-means")
    ch: int = flag(128, "channels, a multiple of 32")
    codebook_size: int = flag(320, "V", least=2)
    codebook_dim: int = flag(16, "D", least=1)
    warmup = 20
    decay = 0.5
    commitment = 0.25                   # weight of the pull of latents to their codes
    rate = 0.003                        # preference for codes in use, see vq_loss


@dataclass
class Pretrain(Common):
    init: str = flag("", "run folder whose base model is fine-tuned; empty starts from nothing")
    extra: float = flag(0.65, "chance that a PairWorld caption names an optional part")
    mistakes: float = flag(0.6, "chance that a careless caption mistakes a detail", least=0)
    steps: int = flag(1200, "optimizer steps", least=1)
    batch: int = flag(32, "images a step", least=1)
    microbatch: int = flag(0, "images a backward, with activations made again; 0: all", least=0)
    lr: float = flag(1e-3, "peak learning rate of AdamW: embeddings, norms, head", least=0)
    muon_lr: float = flag(0.007, "peak learning rate of Muon: the layers' matrices; 0: AdamW too")
    shard: int = flag(0, "as of stage ppo; wants --muon-lr 0", least=0)
    warmup: int = flag(50, "steps of rising learning rate")
    caption_dropout: float = flag(0.05, "share of images with the empty prompt", least=0)
    n_layer: int = flag(4, "layers")
    n_head: int = flag(4, "attention heads")
    n_embd: int = flag(128, "width C")
    n_ffn: int = flag(384, "width of the SwiGLU")
    n_text: int = flag(160, "longest prompt, in tokens; an unknown word takes one a byte")
    decay = 0.5
    weight_decay = 0.01


@dataclass
class Reward(Common):
    steps: int = flag(2000, "optimizer steps", least=1)
    batch: int = flag(24, "pairs a step; each makes two yes and two no", least=1)
    lr: float = flag(7e-4, "peak learning rate of AdamW", least=0)
    muon_lr: float = flag(0.005, "peak learning rate of Muon; 0 leaves its matrices to AdamW")
    splices_from: int = flag(500, "step from which splices are shown too, see reward.splice")
    negatives: str = flag("twins", "whose prompts the training judge learns to refuse; others: it "
                          "never sees near misses", choices=("twins", "others"))
    width: int = flag(96, "width of the judges, a multiple of 8")
    warmup = 50
    decay = 0.5
    weight_decay = 0.01


@dataclass
class PPO(Common):
    steps: int = flag(80, "rollouts", "ours; official 1600", least=1)
    pairs: int = flag(16, "pairs a rollout (P)", "ours; official 8, one a GPU", least=1)
    samples: int = flag(6, "images a prompt (G)", "ours; official 7", least=2)
    minibatches: int = flag(2, "optimizer steps a rollout", "ours; official 1", least=1)
    microbatch: int = flag(0, "sequences a backward, with activations made again, and at most 8 "
                              "times as many sampled at once, to fit the memory; 0: all", least=0)
    lr: float = flag(2e-4, "peak learning rate", "ours; official 1e-5 for 7B", least=0)
    lora: int = flag(0, "rank of adapters, trained in place of the weights; 0: none", least=0)
    shard: int = flag(0, "1: each process of torchrun holds a part of the model", least=0)
    guidance: float = flag(1.0, "w of classifier-free guidance; 1: none", "ours; official 5")
    temperature: float = flag(0.6, "tau of all samples", "ours; official 1", least=1e-6)
    advantage: str = flag("pair", "pool of mean and std", "paper", choices=tuple(ppo.POOLS))
    clip: float = flag(0.2, "PPO's epsilon", "ours; no effect in the official code", least=0)
    beta: float = flag(0.01, "weight of the KL to the base model", least=0)
    difference: float = flag(0.0, "lambda of the difference-aware token weights",
                             "paper; above 0 is ours", least=0)
    reward: str = flag("own", "own: S(I,T); margin: S(I,T) - S(I,T'); see ppo.REWARDS", "paper",
                       choices=tuple(ppo.REWARDS))
    ground_truth: list = flag((0, 0, 0), "two samples are replaced by ground truth: always until "
                              "rollout FULL, 1 in 4 at LOW, never from ZERO on; 0 0 0 is off",
                              "ours; official 50 450 1200")
    judge: list = flag((), "who gives the rewards: http://HOST:PORT/v1[#MODEL] or transformers:DIR;"
                           " twice: the mean", "ours; official InternVL2.5-26B")
    heldout_judge: str = flag("", "who tests instead of the run's held-out judge")
    test: str = flag("", "PairComp.json to test on instead of PairWorld's held-out pairs")
    compile: str = flag("auto", "off: plain PyTorch; auto: on cuda decoding is a CUDA graph; on: "
                                "torch.compile, of scoring too", choices=("auto", "off", "on"))
    eval_every: int = flag(10, "rollouts between quick tests, see BestState", least=1)
    eval_pairs: int = flag(20, "test pairs a category in the table before and after", least=1)
    warmup = 1 / 16                     # of the rollouts; official 100 of 1600
    decay = 0.3


BY_TORCHRUN = "TORCHELASTIC_RUN_ID"     # what torchrun sets in the environment of its processes
STAGES = {"tokenizer": Tokenizer, "pretrain": Pretrain, "reward": Reward, "ppo": PPO}
NEEDS = {"tokenizer": [], "pretrain": ["tokenizer"], "reward": ["tokenizer"],
         "ppo": ["tokenizer", "pretrain", "reward"]}
SMALL = ("tiny", "smoke")               # presets whose stages can be trained from nothing
MINUTES = {"tokenizer": 1, "pretrain": 4, "reward": 3.5, "ppo": 3.5}     # tiny, two CPU cores
PRESETS = {
    "tiny": {stage: {} for stage in STAGES},
    "smoke": {
        "tokenizer": dict(out="runs/smoke", n_pairs=600, steps=60, unquantized=20, ch=32,
                          codebook_size=64),
        "pretrain": dict(out="runs/smoke", n_pairs=600, steps=40, n_layer=2, n_embd=64, n_ffn=128),
        "reward": dict(out="runs/smoke", n_pairs=600, steps=25, splices_from=10, width=32),
        "ppo": dict(out="runs/smoke", n_pairs=600, steps=6, pairs=4, samples=4, eval_every=3,
                    eval_pairs=2)},
    # A real checkpoint. lr, samples and guidance are the official recipe's, the rest ours.
    "janus": {
        "tokenizer": dict(out="runs/janus"), "reward": dict(out="runs/janus"),
        "pretrain": dict(out="runs/janus", lr=1e-5, muon_lr=0.0, caption_dropout=0.1, microbatch=4),
        "ppo": dict(out="runs/janus", lr=1e-5, steps=1600, pairs=4, samples=7,
                    guidance=5.0, temperature=1.0, eval_every=25, microbatch=4)},
}


# -- What the stages share -------------------------------------------------------------------------
def train_and_test_pairs(cfg, image_size, extra, mistakes=0.0):
    """(training pairs, test pairs) of --data, or of PairWorld, whose training captions name an
    optional part with a chance of `extra` and mistake details with a chance of `mistakes`."""
    if cfg.data:
        splits = read_splits(cfg.data, image_size)
        return splits["train"], splits["test"]
    return pairworld(cfg.n_pairs, "train", cfg.seed, extra, mistakes), pairworld(300, "test", 1)


def images_of(pairs, indices):
    """Both images of n pairs in a row: (2n, H, W, 3) uint8."""
    return rearrange(pairs.load(indices), "p i h w c -> (p i) h w c")


def encode_pairs(vq, pairs, indices, device):
    """The images of n pairs as tokens: (n, 2, N) int64 on the device."""
    tokens = encode_images(vq, images_of(pairs, indices), device)
    return rearrange(tokens, "(p i) n -> p i n", i=2)


def encode_all_pairs(vq, pairs, device):
    """Every pair, once: (P, 2, N) int64 on the CPU."""
    chunks = np.array_split(np.arange(len(pairs)), -(-len(pairs) // 256))
    chunks = tqdm(chunks, "encoding", leave=False)
    return torch.cat([encode_pairs(vq, pairs, chunk, device).cpu() for chunk in chunks])


def reconstruct_all_pairs(vq, pairs, device):
    """Every pair's images as they come back from the tokenizer, once: (P, 2, H, W, 3) uint8."""
    images = decode_ids(vq, encode_all_pairs(vq, pairs, device).to(device).flatten(0, 1))
    return images.reshape(len(pairs), 2, *images.shape[1:])


def save_samples(cfg, name, images, labels=None, columns=8, scale=3):
    if not leads():
        return
    folder = Path(cfg.out) / "samples"
    make_folder(folder)
    scale = max(1, scale * 32 // images.shape[1])
    image_grid(images, labels, columns, scale).save(folder / name)


def show(report):
    """A report for people: {name: number, or such a dict} on one line."""
    parts = [f"{k} ({show(v)})" if isinstance(v, dict) else f"{k} {v:.3f}"
             for k, v in report.items()]
    return ", ".join(parts)


def average(stats):
    """Dicts of scalar tensors, each with its number of "rows" -> {name: mean over the rows of the
    dicts that have it}, over all processes."""
    means = {}
    for name in {name: None for values in stats for name in values if name != "rows"}:
        having = [values for values in stats if name in values]
        rows = torch.tensor([values["rows"] for values in having])
        values = torch.stack([values[name].cpu() for values in having])
        means[name] = total((values * (rows / total(rows.sum()))).sum())
    return means


# -- Stage 1 ---------------------------------------------------------------------------------------
def train_tokenizer(cfg, loop):
    device = pick_device(cfg.device)
    pairs, test = map(PairSet.with_images, train_and_test_pairs(cfg, VQConfig.image_size, LONG))
    torch.manual_seed(cfg.seed)
    vq = VQModel(VQConfig(ch=cfg.ch, codebook_size=cfg.codebook_size,
                          codebook_dim=cfg.codebook_dim)).to(device)
    codebook = vq.quantize.embedding.weight.data                        # (V, D)
    usage = torch.ones(cfg.codebook_size, device=device)
    loop.start({"model": vq}, [adamw(vq.parameters(), cfg.lr, 0.0)], {"usage": usage})
    for step in loop:
        rng, generator = step_random(cfg, "tokenizer", step)
        if step == cfg.unquantized:     # the codebook begins as clusters of latents
            with torch.no_grad():
                z = [vq.latents(draw_images(pairs, rng, 128, device)) for _ in range(8)]
            z = rearrange(torch.cat(z), "b d h w -> (b h w) d")
            codebook.copy_(kmeans_codes(z, cfg.codebook_size, generator))

        x = draw_images(pairs, rng, cfg.batch, device)                  # (B, 3, H, W)
        quantized = step >= cfg.unquantized
        with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(cfg.dtype, device)):
            preference = cfg.rate * usage.log()
            loss, z, ids, reconstruction = vq_loss(vq, x, quantized, cfg.commitment, preference)
        loss.backward()
        grad_norm = loop.optimizer_step(step)

        restarts, used, perplexity = 0, 0.0, 0.0
        if quantized:
            if step < 0.8 * cfg.steps:  # the last fifth trains the decoder on codes at rest
                restarts = update_codebook(codebook, usage, z.detach(), ids, generator)
            used, perplexity = code_statistics(ids, cfg.codebook_size)
        psnr = 10 * math.log10(4 / (reconstruction - x).square().mean().item())
        loop.log(step, loss=loss, psnr=psnr, perplexity=perplexity, batch_usage=used,
                 restarts=restarts, grad_norm=grad_norm)
    report_tokenizer(cfg, vq.eval(), test, device, loop)
    save_weights(Path(cfg.out) / "tokenizer.safetensors", vq.state_dict(), config=asdict(vq.cfg))
    loop.finish()


def draw_images(pairs, rng, n, device):
    """n images, both of n/2 random pairs. -> (n, 3, H, W) in [-1, 1]"""
    return from_pixels(images_of(pairs, rng.integers(len(pairs), size=max(1, n // 2))), device)


def report_tokenizer(cfg, vq, test, device, loop):
    """How well images come back. PairWorld's legibility: how often the oracle reads the same value
    of an attribute off an image and its reconstruction."""
    images = images_of(test, np.arange(min(300, len(test))))
    ids = encode_images(vq, images, device)
    again = decode_ids(vq, ids)
    error = ((again / 255.0 - images / 255.0) ** 2).mean()
    used, perplexity = code_statistics(ids, cfg.codebook_size)
    report = {"psnr": float(-10 * np.log10(error)), "usage": used, "perplexity": perplexity}
    if not cfg.data:
        same = (read_scene(images) == read_scene(again)).mean(0).tolist()
        report["legibility"] = dict(zip(ATTRIBUTES, same))
    loop.report(report=report)
    print(f"tokenizer, held-out images: {show(report)}")
    beside = np.stack([images[:16], again[:16]], 1)                     # (16, 2, H, W, 3)
    save_samples(cfg, "tokenizer.png", beside.reshape(-1, *images.shape[1:]))


# -- Stage 2 ---------------------------------------------------------------------------------------
def train_pretrain(cfg, loop):
    """The loss is the mean of -log pi(o_t | o_<t, T): what any language model minimizes, on the
    tokens of the images. Some prompts are replaced by the empty one, which guidance needs."""
    device = pick_device(cfg.device)
    vq, model = new_model(cfg, device)
    model.recompute = cfg.microbatch > 0
    model.bf16 = uses_bf16(cfg.dtype, device)
    if cfg.shard:
        several().split_model(model)
    pairs, test = train_and_test_pairs(cfg, vq.cfg.image_size, cfg.extra, cfg.mistakes)
    pairs = pairs.with_images()
    prompts = pairs.flat_prompts()
    model.prompt_ids(prompts)           # one that is too long is an error now, not half way
    # PairWorld's images are encoded once. A folder's may be too many: when a batch has them.
    codes = None if cfg.data else encode_all_pairs(vq, pairs, device).flatten(0, 1)     # (2P, N)
    loop.start({"model": model}, muon_and_adamw([model], cfg))
    for step in loop:
        rng, _ = step_random(cfg, "pretrain", step)
        chosen = rng.integers(len(prompts), size=cfg.batch)
        dropped = rng.random(cfg.batch) < cfg.caption_dropout
        chosen, dropped = chosen[share(cfg.batch)], dropped[share(cfg.batch)]
        prompt_ids = model.prompt_ids([prompts[i] for i in chosen], dropped)            # (B, T)
        if codes is None:
            tokens = encode_images(vq, pairs.load_flat(chosen), device)                 # (B, N)
        else:
            tokens = codes[chosen].to(device)

        stats = []
        for mb in torch.arange(len(chosen)).split(cfg.microbatch or cfg.batch):
            logprobs, entropy = score(model, prompt_ids[mb], tokens[mb])                # (b, N)
            loss = -logprobs.mean()
            (loss * (len(mb) / cfg.batch)).backward()
            stats.append({"loss": loss.detach(), "entropy": entropy.mean(), "rows": len(mb)})
        grad_norm = loop.optimizer_step(step)
        loop.log(step, **average(stats), grad_norm=grad_norm)

    prompts = test.flat_prompts()[:32]
    at_once = min(64, 2 * (cfg.microbatch or cfg.batch))                # less memory than training
    images = generate_images(model.eval(), vq, prompts, 1, usual_guidance(model), 1.0, cfg.seed,
                             at_once)[:, 0]
    save_samples(cfg, "pretrain.png", images, prompts, scale=5)
    save_policy(cfg.out, "pretrain", model)
    loop.finish()


def new_model(cfg, device):
    """(tokenizer, model to train): a new one, or with --init the base model of another run, whose
    tokenizers become this run's. fp32 weights, whatever the file has."""
    out = Path(cfg.out)
    if cfg.init:
        for name in ("tokenizer.safetensors", "text.json"):
            if (Path(cfg.init) / name).exists():
                copy_file(Path(cfg.init) / name, out / name)
        vq, model = load_policy(cfg.init, "pretrain", device, cfg.dtype)
        return vq, model.float()
    vq = load_module(out / "tokenizer.safetensors", VQModel, VQConfig, device)
    torch.manual_seed(cfg.seed)
    model = ImageModel(ModelConfig(
        text_vocab=TextTokens().vocab_size, image_vocab=vq.cfg.codebook_size, n_text=cfg.n_text,
        n_image=vq.cfg.grid ** 2, n_layer=cfg.n_layer, n_head=cfg.n_head, n_embd=cfg.n_embd,
        n_ffn=cfg.n_ffn, code_dim=vq.cfg.codebook_dim)).to(device)
    # What the tokenizer knows of which codes are alike.
    model.gen_embed.weight.data.copy_(vq.quantize.embedding.weight * vq.cfg.codebook_dim ** 0.5)
    return vq, model


# -- Stage 3 ---------------------------------------------------------------------------------------
def train_reward(cfg, loop):
    device = pick_device(cfg.device)
    vq = load_module(Path(cfg.out) / "tokenizer.safetensors", VQModel, VQConfig, device)
    pairs, test = map(PairSet.with_images, train_and_test_pairs(cfg, vq.cfg.image_size, LONG))
    drawn = reconstruct_all_pairs(vq, pairs, device)                    # (P, 2, H, W, 3) uint8
    torch.manual_seed(cfg.seed)
    shape = dict(width=cfg.width, grid=vq.cfg.image_size // JudgeConfig.patch)
    judges = {"train": Judge(JudgeConfig(kind="attend", **shape)).to(device),
              "heldout": Judge(JudgeConfig(kind="convolve", **shape)).to(device)}
    text = TextTokens()
    text.encode_prompts(pairs.flat_prompts(), JudgeConfig.n_text)       # none is too long
    loop.start(judges, muon_and_adamw(judges.values(), cfg))
    for step in loop:
        metrics = {}
        for n, (name, judge) in enumerate(judges.items()):
            # Each judge sees pairs of its own.
            rng, _ = step_random(replace(cfg, seed=cfg.seed + 1000 * n), "reward", step)
            chosen = rng.integers(len(pairs), size=cfg.batch)
            renderings = pairs.load(chosen)                             # (P, 2, H, W, 3)
            # Half of the pairs as the policy would draw them: through the tokenizer.
            half = cfg.batch // 2
            images = np.concatenate([drawn[chosen[:half]], renderings[half:]])
            images = from_pixels(images, device)                        # (P, 2, 3, H, W)
            renderings = from_pixels(renderings, device)
            prompts = [pairs.prompts[i] for i in chosen]
            ids = text.encode_prompts([p for pair in prompts for p in pair], judge.cfg.n_text)
            ids = torch.from_numpy(rearrange(ids, "(p i) t -> p i t", i=2)).to(device)
            coarse = name == "train" and cfg.negatives == "others"
            if coarse:                  # the second twin becomes that of the pair before
                images[:, 1], ids[:, 1] = images[:, 1].roll(1, 0), ids[:, 1].roll(1, 0)
            third = None
            if step >= cfg.splices_from and not coarse:
                third = splice(images, renderings, most_alike(prompts), rng)
            with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(cfg.dtype, device)):
                loss, accuracy = judge_loss(judge, images, ids, third)
            loss.backward()
            metrics[f"loss_{name}"] = loss
            metrics[f"accuracy_{name}"] = accuracy
        grad_norm = loop.optimizer_step(step)
        loop.log(step, **metrics, grad_norm=grad_norm)
    report_judges(vq, judges, test, device, loop)
    save_judges(Path(cfg.out) / "reward.safetensors", judges)
    loop.finish()


def report_judges(vq, judges, test, device, loop):
    """Accuracy and calibration on images as they are, and as they come back from the tokenizer."""
    images = test.load(np.arange(len(test)))                            # (P, 2, H, W, 3)
    ids = encode_images(vq, images.reshape(-1, *images.shape[2:]), device)
    again = decode_ids(vq, ids).reshape(images.shape)
    for name, judge in judges.items():
        for kind, shown in (("renderings", images), ("reconstructions", again)):
            report = judge_report(NetworkJudge(judge, device), shown, test)
            loop.report(judge=name, on=kind, report=report)
            print(f"{name} judge, held-out {kind}: {show(report)}")


# -- Stage 4 ---------------------------------------------------------------------------------------
def train_ppo(cfg, loop, algo=ppo):
    """algo: ppo.py, or a module (or object) with the same functions: your fork of it."""
    device, P, G, B = pick_device(cfg.device), cfg.pairs, cfg.samples, 2 * cfg.pairs * cfg.samples
    own = share(B)                      # the rows of this process: all of them without torchrun
    vq, policy, reference = load_for_ppo(cfg, device)
    judges = open_judges(cfg, device)                                   # train, heldout, oracle
    pairs = train_and_test_pairs(cfg, vq.cfg.image_size, SHORT)[0]
    test = BeforeAfter(cfg, vq, judges)
    check_ppo_prompts(cfg, policy, [pairs, *(part for part, _ in test.sets.values())])
    sampling = dict(empty=empty_ids(policy), guidance=cfg.guidance, temperature=cfg.temperature)
    n_questions = len(inspect.signature(algo.REWARDS[cfg.reward]).parameters)
    optimizer = adamw(policy.parameters(), cfg.lr, 0.0, eps=1e-5)
    best = BestState(policy, optimizer, test, loop)
    loop.start({"model": policy}, [optimizer], best.tensors)
    test.before(reference, loop)

    for step in loop:
        rng, generator = step_random(cfg, "ppo", step, device)
        metrics = best.test(step) if step % cfg.eval_every == 0 else {}

        with torch.no_grad():
            # 1. Rollout: G images for each of 2P prompts. Rows are (pair, prompt, sample)
            chosen, drawn, has_images = algo.draw_pairs(rng, pairs, P)
            prompts = [prompt for pair in drawn for prompt in pair]                     # 2P
            prompt_ids = policy.prompt_ids(prompts).repeat_interleave(G, 0)             # (B, T)
            noise = torch.rand(policy.cfg.n_image, B, generator=generator, device=device)
            sampled = generate(policy, prompt_ids[own][::G], samples=G, noise=noise[:, own],
                               batch=min(8 * cfg.microbatch, own.stop - own.start), **sampling)
            tokens, old_logprobs = (gather(B, x) for x in sampled)                      # (B, N)

            # 2. Ground truth: a pair's own images replace two samples of a prompt
            p_truth = algo.ground_truth_probability(step, *cfg.ground_truth)
            use_truth = (rng.random((P, 2)) < p_truth) & has_images[:, None]
            replaced = torch.zeros(len(tokens), dtype=torch.bool, device=device)        # (B,)
            if use_truth.any():
                truth = encode_pairs(vq, pairs, chosen, device)                         # (P, 2, N)
                use_truth = torch.from_numpy(use_truth).to(device)
                tokens, replaced = algo.mix_ground_truth(tokens, truth, use_truth)
                # Nobody sampled these: the policy of the rollout scores them
                old_logprobs[replaced] = score(policy, prompt_ids[replaced], tokens[replaced],
                                               **sampling)[0]

            # 3. Reward: the judge scores each image for its own prompt, perhaps for its twin's too.
            # Meanwhile the reference scores the tokens
            images = decode_ids(vq, tokens[own])                                # (B, H, W, 3)
            asked = [prompt for prompt in prompts for _ in range(G)]
            twins = [prompt for pair in drawn for prompt in pair[::-1] for _ in range(G)]
            answers = [submit(judges["train"], images, asked_of[own])
                       for asked_of in (asked, twins)[:n_questions]]
            ref_logprobs = gather(B, score(reference, prompt_ids[own], tokens[own], **sampling)[0])
            scores = [gather(B, answer().to(device)).view(P, 2, G) for answer in answers]
            is_pair = torch.tensor([a != b for a, b in drawn], device=device)[:, None, None]
            rewards = torch.where(is_pair, algo.REWARDS[cfg.reward](*scores), scores[0])

            # 4. Advantage: one number an image, times a weight a token with --difference
            weights = None
            if cfg.difference > 0:
                twin_ids = prompt_ids.view(P, 2, G, -1).flip(1).flatten(0, 2)           # (B, T)
                d_t = algo.prompt_divergence(policy, prompt_ids, twin_ids, tokens, **sampling)
                weights = algo.difference_weights(d_t.view(P, 2, G, -1), cfg.difference)
            advantages = algo.token_advantages(rewards, weights, cfg.advantage) # (B, N or 1)

        # 5. Update: minibatches of whole pairs, in microbatches that fit in memory
        stats, pair_rows = [], torch.arange(B, device=device).view(P, 2 * G)
        for minibatch in torch.from_numpy(rng.permutation(P)).chunk(cfg.minibatches):
            rows = pair_rows[minibatch].flatten()
            for mb in rows[share(len(rows))].split(cfg.microbatch or len(rows)):
                logprobs, entropy = score(policy, prompt_ids[mb], tokens[mb], **sampling)
                loss, mb_stats = algo.ppo_loss(logprobs, old_logprobs[mb], ref_logprobs[mb],
                                               advantages[mb], cfg.clip, cfg.beta)
                (loss * (len(mb) / len(rows))).backward()
                stats.append({"entropy": entropy.mean(), "rows": len(mb)} | mb_stats)
            stats[-1]["grad_norm"] = loop.optimizer_step(step)

        # 6. Log
        if replaced.any():              # nobody sampled these: their KL may be thousands
            metrics["kl_truth"] = algo.k3(ref_logprobs, old_logprobs)[replaced].mean()
        judged = scores[0].flatten()[~replaced]
        judged = judged[judged.isfinite()]                              # NaN: no answer
        flat = rewards.std(2, correction=0) < 1e-3
        loop.log(step, reward=judged.mean(), **average(stats), **metrics,
                 truth_probability=p_truth, reward_std=judged.std(correction=0),
                 frac_zero_std=flat.float().mean(), unanswered=rewards.isnan().sum())
        if (step + 1) % cfg.eval_every == 0:
            save_samples(cfg, f"ppo_{step + 1:04d}.png", images[G - 1::G][:16], prompts[:16], 8, 5)

    setting = best.finish(cfg.steps, reference)
    test.after(policy, setting, loop.entries())
    save_policy(cfg.out, "ppo", policy)
    loop.finish()


def load_for_ppo(cfg, device):
    """(tokenizer, policy, reference): the base model twice, to be trained and to be compared with.
    The policy has fp32 weights of its own, or with --lora an adapter on the reference's."""
    vq, reference = load_policy(cfg.out, "pretrain", device, cfg.dtype, cfg.compile)
    if cfg.lora:
        from extras.lora import with_adapter
        policy = with_adapter(reference, cfg.lora, cfg.seed)
    else:
        policy = load_policy(cfg.out, "pretrain", device, cfg.dtype, cfg.compile)[1].float()
    policy.recompute = cfg.microbatch > 0
    if cfg.shard:
        several().split_model(policy)
        several().split_model(reference.requires_grad_(False))          # which may mix dtypes
    return vq, policy, reference


class BestState:
    """The rule that keeps PPO safe on any data. Every `eval_every` rollouts the policy is tested on
    validation pairs. Its state is kept unless it is worse than the best test so far by more than
    one standard error of the pairs' differences: the best of noisy tests is often a lucky one. If
    it is worse by more than three, it goes back to the kept state, at half the learning rate. At
    the end the kept state meets the base model, each at its own best (w, tau). Unless it is better
    by more than one standard error, the base model stays."""

    def __init__(self, policy, optimizer, test, loop):
        self.policy = policy
        self.optimizer = optimizer
        self.before_after = test
        # In main memory. With --shard each process keeps its part there.
        self.weights = {name: x.cpu().clone() for name, x in trained(policy).items()}
        self.scores = torch.full([len(test.sets["validation"][0])], -1.0)   # the best test's s_g
        self.rollouts = torch.tensor(0)                 # after which the kept state was tested
        loop.lr_share = self.lr_share = torch.tensor(1.0)
        self.tensors = {f"best.{name}": x for name, x in self.weights.items()}      # for --resume
        self.tensors |= dict(scores=self.scores, rollouts=self.rollouts, lr_share=self.lr_share)

    def test(self, step):
        """Tests the policy after `step` rollouts and follows the rule -> what to log."""
        scores, report = self.before_after.quick(self.policy)
        scores = torch.from_numpy(scores).float()
        gain, error = mean_and_error(scores - self.scores)
        if gain > 0:
            self.scores.copy_(scores)
        if gain > -error:
            self.rollouts.fill_(step)
            for name, x in trained(self.policy).items():
                self.weights[name].copy_(x)
        elif gain < -3 * error:
            self.policy.load_state_dict(self.weights, strict=False)
            self.optimizer.state.clear()
            self.lr_share *= 0.5
        return {"test": report, "lr_share": self.lr_share.item()}

    def finish(self, step, reference):
        """The policy becomes the kept state or the base model. -> the (w, tau) to test it at."""
        halved = round(-self.lr_share.log2().item())
        self.test(step)
        self.policy.load_state_dict(self.weights, strict=False)
        test, gain, error = self.before_after, 0.0, 0.0
        if self.rollouts > 0:
            setting, scores = test.best_setting(self.policy)
            gain, error = mean_and_error(torch.from_numpy(scores - test.base_scores))
        print(f"\nkept: after {self.rollouts} of {step} rollouts; s_g of the {test.referee} judge, "
              f"validation, {100 * gain:+.1f} +- {100 * error:.1f}; lr halved {halved} times")
        if gain > error:
            return setting
        print("not plainly better than the base model: ppo.safetensors holds the base model")
        base = reference.state_dict()
        for name, x in trained(self.policy).items():
            x.copy_(base.get(name, torch.zeros_like(x)))                # no adapter is one of zeros
        return test.base_setting


def open_judges(cfg, device):
    """{"train", "heldout", "oracle": judge}: the run's own, or --judge and --heldout-judge. With
    --judge alone nobody is held out, and the oracle reads PairWorld alone."""
    judges = {} if cfg.judge else load_judges(cfg.out, device)
    for name, specs in {"train": cfg.judge, "heldout": [cfg.heldout_judge]}.items():
        if any(specs):
            from extras.judges import open_judges as open_elsewhere
            judges[name] = open_elsewhere(specs, device)
    return judges | {"oracle": OracleJudge()}


def check_ppo_prompts(cfg, policy, sets):
    """No prompt of these sets is too long, for the policy and for the small judges."""
    for pairs in sets:
        policy.prompt_ids(pairs.flat_prompts())
        if not cfg.judge:
            TextTokens().encode_prompts(pairs.flat_prompts(), JudgeConfig.n_text)


# -- Command line ----------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def parse(argv):
    """Command line -> (stage or None, resume, settings of the stage, name of the preset)."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--stage", choices=list(STAGES))
    first.add_argument("--preset", choices=list(PRESETS))
    first.add_argument("--resume", action="store_true")
    first.add_argument("--out", default="")
    first.add_argument("--init", default="")
    known, rest = first.parse_known_args(argv)
    preset = known.preset or folder_preset(known.out) or folder_preset(known.init) or "tiny"
    help_asked = "-h" in rest or "--help" in rest
    if known.stage is None and not help_asked:
        if len(argv) > 0 and argv != ["--resume"]:
            from extras.moved import explain
            raise UserError(explain(argv[0], "", {}, STAGES))
        return None, False, None, preset
    stage = known.stage or "ppo"
    parser = Parser(prog="train.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=list(STAGES), help="which stage to train; its flags "
                        "follow, all of them with --stage STAGE --help")
    parser.add_argument("--preset", choices=list(PRESETS),
                        help="tiny, smoke or janus (the run folder's, else tiny)")
    parser.add_argument("--resume", action="store_true", help="go on with an unfinished stage")
    defaults = replace(STAGES[stage](), **PRESETS[preset][stage])
    for f in fields(defaults):
        add_flag(parser, f, getattr(defaults, f.name))
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        from extras.moved import explain
        raise UserError(explain(unknown[0], stage, parser._option_string_actions, STAGES))
    cfg = STAGES[stage](**{f.name: getattr(args, f.name) for f in fields(defaults)})
    check(cfg)
    return stage, known.resume, cfg, preset


def folder_preset(run):
    """The preset with which a run folder was begun, or None. A checkpoint's folder has its own."""
    path = Path(run) / "config.json"
    if not run or not path.is_file():
        return None
    preset = read_json(path, "config of the run").get("preset")
    return preset if preset in PRESETS else None


def add_flag(parser, f, value):
    kind = {"type": type(value), "metavar": type(value).__name__.upper()}
    if f.name == "ground_truth":
        kind = {"type": int, "nargs": 3, "metavar": ("FULL", "LOW", "ZERO")}
    elif isinstance(value, list):
        kind = {"action": "append", "metavar": "JUDGE"}
    shown = "none" if value in ("", []) else str(value)
    text = f"{f.metadata['help']} ({shown}; {f.metadata['origin']})"
    parser.add_argument("--" + f.name.replace("_", "-"), dest=f.name, default=value, help=text,
                        **kind)


def check(cfg):
    """UserError for a value that no stage can use."""
    def bad(name, problem):
        raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: should {problem}")
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if value not in f.metadata.get("choices", [value]):
            bad(f.name, f"be one of {', '.join(f.metadata['choices'])}")
        if isinstance(value, float) and not math.isfinite(value):
            bad(f.name, "be a finite number")
        if "least" in f.metadata and value < f.metadata["least"]:
            bad(f.name, f"be at least {f.metadata['least']}")
    size = int(os.environ["WORLD_SIZE"]) if BY_TORCHRUN in os.environ else 1
    units = {"n_embd": 2 * getattr(cfg, "n_head", 1), "ch": VQConfig.norm_groups, "width": 8}
    for name, unit in units.items():
        if getattr(cfg, name, 0) % unit:
            bad(name, f"be a multiple of {unit}")
    others = getattr(cfg, "muon_lr", 0) or getattr(cfg, "lora", 0)
    if getattr(cfg, "shard", 0) and (size < 2 or others):
        bad("shard", "go with several processes of torchrun, with --muon-lr 0, and without --lora")
    if isinstance(cfg, Tokenizer) and cfg.unquantized >= cfg.steps:
        bad("unquantized", f"be less than --steps {cfg.steps}: the codebook is made then")
    if isinstance(cfg, Pretrain) and cfg.batch % size:
        bad("batch", f"be a multiple of {size} processes")
    if isinstance(cfg, PPO):
        check_ppo(cfg, bad, size)


def check_ppo(cfg, bad, size):
    full, low, zero = cfg.ground_truth
    if not 0 <= full <= low <= zero:
        bad("ground_truth", "be three rising numbers of rollouts; 0 0 0 switches it off")
    if zero and cfg.samples < 3:
        bad("samples", "be at least 3, since ground truth replaces 2 of them")
    if cfg.pairs % cfg.minibatches:
        bad("minibatches", f"divide --pairs {cfg.pairs}")
    if cfg.pairs // cfg.minibatches % size:
        bad("pairs", f"be a multiple of --minibatches {cfg.minibatches} times {size} processes")
    specs = [*cfg.judge, *([cfg.heldout_judge] if cfg.heldout_judge else [])]
    if specs:
        from extras.judges import check_spec
        for spec in specs:
            check_spec(spec)


# --------------------------------------------------------------------------------------------------

TRAIN = {"tokenizer": train_tokenizer, "pretrain": train_pretrain, "reward": train_reward,
         "ppo": train_ppo}


def missing_stages(stage, cfg, preset):
    """What has to be trained first. With --judge nobody needs the small judges."""
    needed = [s for s in NEEDS[stage] if s != "reward" or not getattr(cfg, "judge", [])]
    if getattr(cfg, "init", ""):
        needed = []                     # the tokenizer comes with the base model
    missing = [s for s in needed if not (Path(cfg.out) / f"{s}.safetensors").exists()]
    if preset in SMALL:
        return missing
    # The folder of a real checkpoint: PairWorld has nothing for it.
    if "tokenizer" in missing or "pretrain" in missing:
        raise UserError(f"--preset {preset}: {cfg.out} holds no checkpoint; docs/janus.md says how "
                        "it becomes a run folder")
    if not cfg.data:
        raise UserError(f"--preset {preset}: wants --data pairs.json, pairs in FocusDiff-Data's "
                        "layout (python pairworld.py --write DIR makes small ones)")
    if missing:
        raise UserError("say who judges: --judge URL or transformers:DIR (PairWorld's small judges "
                        "can be trained first, by --stage reward)")
    return missing


def begin_folder(cfg, preset):
    """The folder remembers the preset with which it was begun."""
    path = Path(cfg.out) / "config.json"
    config = read_json(path, "config of the run") if path.exists() else {}
    write_json(path, {"preset": preset} | config)


def train_stages(stage, cfg, preset, resume):
    """What is missing, then the stage."""
    weights = Path(cfg.out) / f"{stage}.safetensors"
    if weights.exists() and not weights.with_suffix(".state").exists():
        raise UserError(f"{weights} is there already; choose another --out, or delete it to train "
                        f"{stage} again")
    missing = missing_stages(stage, cfg, preset)
    if world()[1] > 1 and (missing or stage not in ("pretrain", "ppo")):
        raise UserError(f"stage {missing[0] if missing else stage} is for one process: train it "
                        "first, without torchrun")
    begin_folder(cfg, preset)
    if missing:
        minutes = sum(MINUTES[s] for s in [*missing, stage])
        time_needed = f" About {minutes:g} minutes in all on two CPU cores." * (preset == "tiny")
        print(f"{', '.join(missing)}: missing in {cfg.out}, trained first.{time_needed}")
    for name in [*missing, stage]:
        shared = {f.name: getattr(cfg, f.name) for f in fields(Common)}
        own = cfg if name == stage else STAGES[name](**{**PRESETS[preset][name], **shared})
        print(f"{name}: {own}")
        began = time.time()
        with Loop(name, own, resume) as loop:
            TRAIN[name](own, loop)
        print(f"{name}: done in {(time.time() - began) / 60:.1f} min")


def main(argv=None):
    stage, resume, cfg, preset = parse(sys.argv[1:] if argv is None else argv)
    if stage is None:
        print(__doc__)
        print("\n".join(f"{name}: about {MINUTES[name]:g} min on two CPU cores, preset tiny; needs "
                        f"{', '.join(NEEDS[name]) or 'nothing'}" for name in STAGES))
        return
    if stage == "ppo" and (cfg.judge or cfg.heldout_judge):
        from extras.judges import name_judges
        cfg = name_judges(cfg)
    make_folder(cfg.out)
    processes = several().joined(cfg.device) if BY_TORCHRUN in os.environ else nullcontext()
    with processes, only_process(cfg.out):
        train_stages(stage, cfg, preset, resume)
        if stage == "ppo" and leads():
            from extras.plots import draw_curves
            print(f"curves: {draw_curves(Path(cfg.out))}")


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
    except OSError as e:                # a full disk, most likely, under a log or an image
        sys.exit(f"error: {e}; what was saved before is intact, make room and go on with --resume")
    except KeyboardInterrupt:
        sys.exit("stopped at once; what was saved before is intact, go on with the same command "
                 "(and --resume, if there is a .state)")
