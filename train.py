"""Train nanoFocusDiff. Four stages, each a function below, in the order they run:

    tokenizer   a VQ model turns pictures into tokens and back
    pretrain    a transformer learns to write a prompt's tokens: the base model, coarse right and fine wrong
    reward      two judges learn to answer "Does this image match the description?"
    ppo         the base model samples pictures for pairs of prompts, the training judge scores them, PPO learns from it

    python train.py --stage ppo                      # trains what is missing first; ends on a before/after PairComp table
    python train.py --stage pretrain --lr 5e-4       # every field of a stage's config is a flag; --help lists them
    python train.py --stage ppo --preset smoke --out runs/smoke      # the whole way in under a minute, to see that it works
    python train.py --stage ppo --resume             # go on where a run was stopped
    python train.py --curves runs/tiny               # draw curves.png again from log.jsonl

A run folder holds the weights (*.safetensors), `<stage>.state` while a stage is unfinished (everything to resume), config.json,
log.jsonl (one object a step), paircomp.json, samples/*.png and curves.png.

Every random choice of step n is drawn from generators seeded by (seed, stage, n). There is no generator state to save, and a run
that was killed ends, on CPU, with the same bits as one that was not.
"""
import argparse
import difflib
import json
import math
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat
from tqdm import tqdm

from data import (ATTRIBUTES, CATEGORIES, LONG, SHORT, PairSet, TextTokens, UserError, difference_mask, pairworld, picture_grid, read_json, read_pairs, read_prompts,
                  read_scene)
from eval_paircomp import (benchmark_pairs, category_means, divergence_auc, format_before_after, generate_images, load_judges, load_policy,
                           paircomp, save_judges)
from model import ImageModel, ModelConfig, generate, pick_device, prompt_divergence, score
from ppo import SAMPLED, difference_weights, ground_truth_probability, group_advantages, mix_ground_truth, ppo_loss
from reward import Judge, JudgeConfig, NetworkJudge, judge_loss, judge_report
from tokenizer import (VQConfig, VQModel, code_statistics, decode_ids, encode_images, from_pixels, kmeans_codes, load_module, load_strictly,
                       load_weights, save_weights, update_codebook, vq_loss, write_atomically)

# ---------------------------------------------------------------------------------------------------------------------
# Configuration: a dataclass a stage; its fields are the flags


def flag(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Common:
    out: str = flag("runs/tiny", "run folder")
    seed: int = flag(0, "every random choice follows from it")
    device: str = flag("auto", "auto, cpu, cuda or mps")
    dtype: str = flag("auto", "fp32, bf16 (autocast), or auto: bf16 on cuda, fp32 elsewhere")
    compile: bool = flag(False, "torch.compile the transformer")
    data: str = flag("", "pairs.json in the FocusDiff-Data layout; empty is PairWorld")
    n_pairs: int = flag(12000, "how many PairWorld pairs to train on")
    extra: float = flag(LONG, "chance that a PairWorld caption names a part that is not the pair's difference")
    save_every: int = flag(100, "steps between saved states")


@dataclass
class Tokenizer(Common):
    steps: int = flag(1400, "optimizer steps")
    batch: int = flag(16, "pictures a step")
    lr: float = flag(3e-3, "peak learning rate")
    warmup: int = flag(20, "steps of rising learning rate")
    decay: float = flag(0.5, "last share of the steps, over which the learning rate falls")
    unquantized: int = flag(400, "steps before the code book is made, by k-means")
    commitment: float = flag(0.25, "weight of the pull of latents to their codes")
    rate: float = flag(0.003, "preference for codes in use, see vq_loss")
    ch: int = flag(128, "channels")
    codebook_size: int = flag(320, "V")
    codebook_dim: int = flag(16, "D")


@dataclass
class Pretrain(Common):
    steps: int = flag(600, "optimizer steps")
    batch: int = flag(32, "pictures a step")
    lr: float = flag(1e-3, "peak learning rate of AdamW, for embeddings, norms and the head")
    muon_lr: float = flag(0.007, "peak learning rate of Muon, for the layers' matrices; 0 leaves them to AdamW")
    warmup: int = flag(50, "steps of rising learning rate")
    decay: float = flag(0.5, "last share of the steps, over which the learning rate falls")
    weight_decay: float = flag(0.01, "of both")
    caption_dropout: float = flag(0.05, "share of the pictures shown with the empty prompt, for guidance")
    n_layer: int = flag(4, "layers")
    n_head: int = flag(4, "attention heads")
    n_embd: int = flag(128, "width C")
    n_ffn: int = flag(384, "width of the SwiGLU")
    n_text: int = flag(160, "longest prompt, in tokens; a word that PairWorld does not know takes one a byte")


@dataclass
class Reward(Common):
    steps: int = flag(1000, "optimizer steps")
    batch: int = flag(32, "pairs a step; each makes two yes and two no")
    lr: float = flag(1e-3, "peak learning rate of AdamW")
    muon_lr: float = flag(0.005, "peak learning rate of Muon; 0 leaves its matrices to AdamW")
    warmup: int = flag(50, "steps of rising learning rate")
    decay: float = flag(0.5, "last share of the steps, over which the learning rate falls")
    weight_decay: float = flag(0.01, "of both")
    splices_from: int = flag(500, "step from which splices of a pair's pictures are shown too, see reward.splice")
    width: int = flag(96, "width of the judges")


@dataclass
class PPO(Common):
    extra: float = flag(SHORT, Common.__dataclass_fields__["extra"].metadata["help"] + "; prompts are shorter than captions")
    prompts: str = flag("", "a text file of unpaired prompts to mix in, a prompt a line")
    prompts_share: float = flag(0.25, "share of the step's pairs that are unpaired prompts, with --prompts")
    steps: int = flag(280, "rollouts")
    pairs: int = flag(6, "pairs of prompts a rollout (P)")
    samples: int = flag(12, "pictures a prompt (G)")
    minibatches: int = flag(2, "optimizer steps an epoch; pairs are kept whole")
    epochs: int = flag(1, "passes over a rollout")
    lr: float = flag(2e-4, "peak learning rate")
    warmup: int = flag(10, "rollouts of rising learning rate")
    decay: float = flag(0.3, "last share of the rollouts, over which the learning rate falls")
    grad_clip: float = flag(1.0, "largest gradient norm")
    advantage: str = flag("pair", "pool rewards over the pair (Pair-GRPO) or over a prompt's own group (vanilla)")
    std_floor: float = flag(0.05, "added to the pool's standard deviation")
    clip: float = flag(0.2, "PPO's epsilon")
    beta: float = flag(0.01, "weight of the KL to the base model")
    difference: float = flag(0.0, "lambda of the difference-aware token weights; 0 is the paper")
    difference_cap: float = flag(5.0, "cap of such a weight, before they are scaled to mean 1")
    guidance: float = flag(1.0, "w of classifier-free guidance; 1 has no second branch")
    temperature: float = flag(1.0, "tau")
    truth_full_until: int = flag(0, "ground truth: with probability 1 until this rollout (official code: 50)")
    truth_low_at: int = flag(0, "falling to 0.25 at this one (official code: 450)")
    truth_zero_at: int = flag(0, "and to 0 at this one (official code: 1200); 0 switches ground truth off")
    eval_every: int = flag(25, "rollouts between quick tests on the held-out pairs")
    eval_pairs: int = flag(20, "test pairs a category in the final table")


STAGES = {"tokenizer": Tokenizer, "pretrain": Pretrain, "reward": Reward, "ppo": PPO}
NEEDS = {"tokenizer": [], "pretrain": ["tokenizer"], "reward": ["tokenizer"], "ppo": ["tokenizer", "pretrain", "reward"]}
PRESETS = {
    "tiny": {stage: {} for stage in STAGES},
    "smoke": {"tokenizer": dict(out="runs/smoke", n_pairs=600, steps=60, unquantized=20, ch=32, codebook_size=64),
              "pretrain": dict(out="runs/smoke", n_pairs=600, steps=40, n_layer=2, n_embd=64, n_ffn=128),
              "reward": dict(out="runs/smoke", n_pairs=600, steps=25, splices_from=10, width=32),
              "ppo": dict(out="runs/smoke", n_pairs=600, steps=6, pairs=4, samples=4, eval_every=3, eval_pairs=2)},
}
MINUTES = {"tokenizer": 1, "pretrain": 2, "reward": 2.5, "ppo": 6}     # of preset tiny on two CPU cores


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def parse(argv):
    """Command line -> (stage or None, resume, config of the stage, its preset's name)."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--stage", choices=list(STAGES))
    first.add_argument("--preset", choices=list(PRESETS), default="tiny")
    first.add_argument("--resume", action="store_true")
    known, rest = first.parse_known_args(argv)
    if known.stage is None and not {"-h", "--help"} & set(rest):
        if rest:
            raise UserError(f"{rest[0]}: say which stage it is for: --stage {'|'.join(STAGES)}")
        return None, False, None, known.preset
    parser = Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--stage", choices=list(STAGES), help="which stage to train; its flags follow, all of them: --stage STAGE --help")
    parser.add_argument("--preset", choices=list(PRESETS), help="tiny (default) or smoke")
    parser.add_argument("--resume", action="store_true", help="go on with an unfinished stage")
    defaults = replace(STAGES[known.stage or "ppo"](), **PRESETS[known.preset][known.stage or "ppo"])
    for f in fields(defaults):
        value = getattr(defaults, f.name)
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(value, bool) else {"type": type(value), "metavar": type(value).__name__}
        parser.add_argument("--" + f.name.replace("_", "-"), dest=f.name, default=value, help=f"{f.metadata['help']} ({value})", **kind)
    flags = [option for action in parser._actions for option in action.option_strings]
    for word in rest:
        name = word.split("=")[0]
        if name.startswith("--") and name not in flags:
            near = difflib.get_close_matches(name, flags, 1, 0.5)
            raise UserError(f"unknown flag {name} for stage {known.stage}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
    args = vars(parser.parse_args(argv))
    cfg = STAGES[known.stage](**{f.name: args[f.name] for f in fields(defaults)})
    check(cfg)
    return known.stage, known.resume, cfg, known.preset


def check(cfg):
    """UserError for a value that no stage can use."""
    allowed = {"device": ("auto", "cpu", "cuda", "mps"), "dtype": ("auto", "fp32", "bf16"), "advantage": ("pair", "group")}
    for name, values in allowed.items():
        if getattr(cfg, name, values[0]) not in values:
            raise UserError(f"--{name} {getattr(cfg, name)}: should be one of {', '.join(values)}")
    for name in ("steps", "batch", "pairs", "samples", "n_pairs", "epochs", "minibatches", "save_every", "eval_every", "temperature"):
        if getattr(cfg, name, 1) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: should be positive")
    for name, least in (("seed", 0), ("lr", 0), ("samples", 2), ("eval_pairs", 1), ("std_floor", 1e-6)):
        if getattr(cfg, name, least) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: should be at least {least}")
    for name, unit in (("n_embd", 2 * getattr(cfg, "n_head", 1)), ("ch", VQConfig.norm_groups), ("width", 8)):
        if getattr(cfg, name, 0) % unit:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: should be a multiple of {unit}")
    if isinstance(cfg, PPO) and not cfg.truth_full_until <= cfg.truth_low_at <= cfg.truth_zero_at:
        raise UserError("--truth-full-until, --truth-low-at and --truth-zero-at: should rise in this order; 0 0 0 switches ground truth off")
    if getattr(cfg, "pairs", 1) % getattr(cfg, "minibatches", 1):
        raise UserError(f"--minibatches {cfg.minibatches}: should divide --pairs {cfg.pairs}")


def autocast(cfg, device):
    bf16 = cfg.dtype == "bf16" or cfg.dtype == "auto" and device.type == "cuda"
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def step_random(cfg, stage, step, device="cpu"):
    """The generators of one step, numpy's and torch's, from (seed, stage, step) alone."""
    seeds = np.random.SeedSequence([cfg.seed, list(STAGES).index(stage), step])
    return np.random.default_rng(seeds), torch.Generator(device).manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))


def schedule(cfg, step):
    """Share of the peak learning rate at a step: rises linearly, stays, falls linearly towards 0."""
    return min(1, (step + 1) / max(1, cfg.warmup), (cfg.steps - step) / max(1, cfg.decay * cfg.steps))


def training_pairs(cfg, image_size):
    return read_pairs(cfg.data, image_size) if cfg.data else pairworld(cfg.n_pairs, "train", cfg.seed, cfg.extra)


# ---------------------------------------------------------------------------------------------------------------------
# What the four loops share: their place, their log, their state on disk

class Loop:
    """Steps of a stage, with bar, log and resume.

    modules {name: nn.Module}, optimizers, extra {name: tensor} are what a state holds. `for step in loop` saves it every
    cfg.save_every steps and when Ctrl-C is pressed, always between two steps."""

    def __init__(self, stage, cfg, resume, modules, optimizers, extra=None):
        self.stage, self.cfg, self.modules, self.optimizers, self.extra = stage, cfg, modules, optimizers, extra or {}
        self.peak = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        self.folder = Path(cfg.out)
        self.path, self.log_path = self.folder / f"{stage}.state", self.folder / "log.jsonl"
        self.start, self.seconds, self.stopped = 0, 0.0, False
        if self.path.exists() and not resume:
            raise UserError(f"{self.path} holds an unfinished run; add --resume to go on with it, or delete it to start again")
        if self.path.exists():
            self.load()
        keep = []
        if self.log_path.exists():                      # drop what a killed run logged after the state it goes on from
            for line in self.log_path.read_text().splitlines():
                entry = json.loads(line) if line.endswith("}") else {"stage": stage, "step": self.start}
                if entry["stage"] != stage or entry.get("step", self.start) < self.start:
                    keep.append(line + "\n")
        write_atomically(self.log_path, "".join(keep).encode())
        config = read_json(self.folder / "config.json", "config of the run") if (self.folder / "config.json").exists() else {}
        config[stage] = asdict(cfg) | {"torch": torch.__version__}
        write_atomically(self.folder / "config.json", json.dumps(config, indent=1).encode())

    def load(self):
        tensors, meta = load_weights(self.path)
        ours, theirs = asdict(self.cfg), meta.get("config", {})
        changed = [f"--{k.replace('_', '-')} {theirs.get(k)} -> {v}" for k, v in ours.items() if theirs.get(k) != v and k not in ("out", "save_every")]
        if changed:
            raise UserError(f"{self.path} was begun with other settings ({'; '.join(changed)}); repeat them, or delete it to start again")
        parts = {}
        for key, value in tensors.items():
            part, name = key.split("|", 1)
            parts.setdefault(part, {})[name] = value
        for name, module in self.modules.items():
            load_strictly(module, parts.get(name, {}), self.path)
        for n, optimizer in enumerate(self.optimizers):
            state = {}
            for key, value in parts.get(f"optimizer{n}", {}).items():
                i, name = key.split(".", 1)
                state.setdefault(int(i), {})[name] = value
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        for name, tensor in self.extra.items():
            tensor.copy_(parts["extra"][name])
        self.start, self.seconds = meta["step"], meta["seconds"]

    def save(self, step):
        tensors = {f"{name}|{k}": v for name, module in self.modules.items() for k, v in module.state_dict().items()}
        for n, optimizer in enumerate(self.optimizers):
            for i, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer{n}|{i}.{k}": torch.as_tensor(v) for k, v in state.items()}
        tensors |= {f"extra|{k}": v for k, v in self.extra.items()}
        save_weights(self.path, tensors, step=step, seconds=self.elapsed(), config=asdict(self.cfg))

    def elapsed(self):
        return self.seconds + time.time() - self.began

    def stop(self, signum, frame):
        if self.stopped:
            raise KeyboardInterrupt                     # pressed twice: the last saved state counts
        self.stopped = True

    def __iter__(self):
        self.began, self.saved = time.time(), self.start
        previous = {s: signal.signal(s, self.stop) for s in (signal.SIGINT, signal.SIGTERM)}
        with open(self.log_path, "a", buffering=1) as self.log_file, tqdm(total=self.cfg.steps, initial=self.start, desc=self.stage, unit="step") as self.bar:
            try:
                for step in range(self.start, self.cfg.steps):
                    yield step
                    self.bar.update()
                    if self.stopped or (step + 1) % self.cfg.save_every == 0 or step + 1 == self.cfg.steps:
                        self.save(step + 1)
                        self.saved = step + 1
                    if self.stopped:
                        self.bar.close()
                        raise UserError(f"stopped after step {step + 1} of {self.stage}; nothing is lost, go on with the same command and --resume")
            finally:
                for s, handler in previous.items():
                    signal.signal(s, handler)

    def log(self, step, show=(), **metrics):
        """One line of log.jsonl; the metrics named in `show` go on the bar too."""
        values = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in metrics.items()}
        self.log_file.write(json.dumps({"stage": self.stage, "step": step, "seconds": round(self.elapsed(), 2), **values}) + "\n")
        self.bar.set_postfix({k: f"{values[k]:.3g}" for k in show}, refresh=False)

    def update(self, step, loss, grad_clip=1.0):
        """backward and one optimizer step -> gradient norm. A loss or gradient that is not finite ends the run before it harms."""
        for optimizer, peaks in zip(self.optimizers, self.peak):
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * schedule(self.cfg, step)
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norms = [torch.nn.utils.clip_grad_norm_(module.parameters(), grad_clip) for module in self.modules.values()]
        norm = torch.stack(norms).max()
        if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
            last = f"{self.path} of step {self.saved} is intact: --resume" if self.saved else "nothing was saved yet: start again"
            raise UserError(f"{self.stage}, step {step}: loss is {loss.item()}, gradient norm {norm.item()}; try a smaller --lr. {last}")
        for optimizer in self.optimizers:
            optimizer.step()
        return norm

    def finish(self):
        """The stage's weights are on disk: its state is needed no more."""
        self.path.unlink(missing_ok=True)


def adamw(params, lr, weight_decay, eps=1e-8):
    """AdamW; matrices decay, vectors do not."""
    params = [p for p in params if p.requires_grad]
    return torch.optim.AdamW([{"params": [p for p in params if p.dim() > 1], "weight_decay": weight_decay},
                              {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.95), eps=eps)


def muon_and_adamw(modules, cfg):
    """Muon for the matrices inside the layers, AdamW for embeddings, heads, convolutions and vectors. muon_lr = 0 leaves
    everything to AdamW."""
    named = [(name, p) for module in modules for name, p in module.named_parameters()]
    inside = {id(p) for name, p in named if cfg.muon_lr and p.dim() == 2 and name.split(".")[0] in ("layers", "attention")}
    optimizers = [adamw([p for _, p in named if id(p) not in inside], cfg.lr, cfg.weight_decay)]
    if inside:
        optimizers.append(torch.optim.Muon([p for _, p in named if id(p) in inside], lr=cfg.muon_lr, weight_decay=cfg.weight_decay))
    return optimizers


def save_picture(cfg, name, images, labels=None, columns=8, scale=3):
    folder = Path(cfg.out) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    picture_grid(images, labels, columns, scale).save(folder / name)


def training_texts(pairs, n_text):
    """Every prompt of a set, two a pair; one that is too long is told now and not in the middle of a run."""
    texts = [text for two in pairs.prompts for text in two]
    TextTokens().prompts(texts, n_text)
    return texts


def tokens_of(prompts, n_text, device):
    return torch.from_numpy(TextTokens().prompts(prompts, n_text)).to(device)


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1

def train_tokenizer(cfg, resume):
    device = pick_device(cfg.device)
    pairs = training_pairs(cfg, VQConfig.image_size)
    torch.manual_seed(cfg.seed)
    vq = VQModel(VQConfig(ch=cfg.ch, codebook_size=cfg.codebook_size, codebook_dim=cfg.codebook_dim)).to(device)
    codebook, usage = vq.quantize.embedding.weight.data, torch.ones(cfg.codebook_size, device=device)
    loop = Loop("tokenizer", cfg, resume, {"model": vq}, [adamw(vq.parameters(), cfg.lr, 0.0)], {"usage": usage})
    for step in loop:
        rng, generator = step_random(cfg, "tokenizer", step)
        if step == cfg.unquantized:
            with torch.no_grad():
                z = [vq.latents(from_pixels(draw(pairs, rng, 128), device)) for _ in range(8)]
            codebook.copy_(kmeans_codes(rearrange(torch.cat(z), "b d h w -> (b h w) d"), cfg.codebook_size, generator))
        x = from_pixels(draw(pairs, rng, cfg.batch), device)
        with autocast(cfg, device):
            loss, z, ids, picture = vq_loss(vq, x, step >= cfg.unquantized, cfg.commitment, cfg.rate * usage.log())
        norm = loop.update(step, loss)
        restarts = update_codebook(codebook, usage, z.detach(), ids, generator) if ids is not None and step < 0.8 * cfg.steps else 0
        used, perplexity = code_statistics(ids, cfg.codebook_size) if ids is not None else (0.0, 0.0)
        psnr = 10 * math.log10(4 / (picture - x).square().mean().item())
        loop.log(step, ("loss", "psnr", "perplexity"), loss=loss, psnr=psnr, perplexity=perplexity, batch_usage=used, restarts=restarts, grad_norm=norm)
    vq.eval()
    test = pairs if cfg.data else pairworld(300, "test", 1)
    test = test.load(np.arange(min(300, len(test))))
    test = rearrange(test, "p i h w c -> (p i) h w c")
    ids = encode_images(vq, test, device)
    seen = decode_ids(vq, ids)
    used, perplexity = code_statistics(ids, cfg.codebook_size)
    report = {"psnr": float(-10 * np.log10(((seen / 255.0 - test / 255.0) ** 2).mean())), "usage": used, "perplexity": perplexity}
    if not cfg.data:                                    # the oracle reads the same attribute off the picture and its reconstruction
        report["legibility"] = dict(zip(ATTRIBUTES, (read_scene(test) == read_scene(seen)).mean(0).tolist()))
    append_log(cfg, {"stage": "tokenizer", "report": report})
    print(f"tokenizer, {'training' if cfg.data else 'held-out'} pictures: {show(report)}")
    save_picture(cfg, "tokenizer.png", np.stack([test[:16], seen[:16]], 1).reshape(-1, *test.shape[1:]))
    save_weights(Path(cfg.out) / "tokenizer.safetensors", vq.state_dict(), config=asdict(vq.cfg))
    loop.finish()


def draw(pairs, rng, n):
    """n pictures, both sides of n/2 random pairs. -> (n, H, W, 3) uint8"""
    return rearrange(pairs.load(rng.integers(len(pairs), size=max(1, n // 2))), "p i h w c -> (p i) h w c")


def show(report):
    return ", ".join(f"{k} ({show(v)})" if isinstance(v, dict) else f"{k} {v:.3f}" for k, v in report.items())


def append_log(cfg, entry):
    """A line that belongs to no step."""
    with open(Path(cfg.out) / "log.jsonl", "a") as f:
        f.write(json.dumps(entry) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Stage 2

def encode_pairs(vq, pairs, device):
    """Every picture of a set as tokens, once: (P, 2, N) int64 on the CPU."""
    chunks = np.array_split(np.arange(len(pairs)), -(-len(pairs) // 256))
    ids = [encode_images(vq, pairs.load(c).reshape(-1, vq.cfg.image_size, vq.cfg.image_size, 3), device).cpu() for c in tqdm(chunks, "encoding", leave=False)]
    return rearrange(torch.cat(ids), "(p i) n -> p i n", i=2)


def train_pretrain(cfg, resume):
    device = pick_device(cfg.device)
    vq = load_module(Path(cfg.out) / "tokenizer.safetensors", VQModel, VQConfig, device)
    pairs = training_pairs(cfg, vq.cfg.image_size)
    codes = encode_pairs(vq, pairs, device).flatten(0, 1)                                               # (2P, N)
    texts = training_texts(pairs, cfg.n_text)
    torch.manual_seed(cfg.seed)
    model = ImageModel(ModelConfig(TextTokens().vocab_size, vq.cfg.codebook_size, cfg.n_text, vq.cfg.grid ** 2, cfg.n_layer, cfg.n_head, cfg.n_embd,
                                   cfg.n_ffn, vq.cfg.codebook_dim)).to(device)
    # what the tokenizer knows of which codes are alike
    model.gen_embed.weight.data.copy_(vq.quantize.embedding.weight * vq.cfg.codebook_dim ** 0.5)
    maybe_compile(model, cfg)
    loop = Loop("pretrain", cfg, resume, {"model": model}, muon_and_adamw([model], cfg))
    for step in loop:
        rng, _ = step_random(cfg, "pretrain", step)
        chosen = rng.integers(len(texts), size=cfg.batch)
        dropped = rng.random(cfg.batch) < cfg.caption_dropout
        prompts = tokens_of([None if drop else texts[i] for i, drop in zip(chosen, dropped)], cfg.n_text, device)
        with autocast(cfg, device):
            logprobs, entropy = score(model, prompts, codes[chosen].to(device))
        loss = -logprobs.mean()
        norm = loop.update(step, loss)
        loop.log(step, ("loss",), loss=loss, entropy=entropy.mean(), grad_norm=norm)
    test = benchmark_pairs(4) if not cfg.data else pairs
    prompts = [text for two in test.prompts[:16] for text in two]
    images = generate_images(model.eval(), vq, prompts, 1, 1.0, 1.0, cfg.seed)[:, 0]
    save_picture(cfg, "pretrain.png", images, prompts, scale=5)
    save_weights(Path(cfg.out) / "pretrain.safetensors", model.state_dict(), config=asdict(model.cfg))
    loop.finish()


def maybe_compile(model, cfg):
    if cfg.compile:
        model.hidden = torch.compile(model.hidden, dynamic=True)


# ---------------------------------------------------------------------------------------------------------------------
# Stage 3

def train_reward(cfg, resume):
    device = pick_device(cfg.device)
    vq = load_module(Path(cfg.out) / "tokenizer.safetensors", VQModel, VQConfig, device)
    pairs = training_pairs(cfg, vq.cfg.image_size)
    codes = encode_pairs(vq, pairs, device)
    training_texts(pairs, JudgeConfig.n_text)
    torch.manual_seed(cfg.seed)
    shape = dict(width=cfg.width, grid=vq.cfg.image_size // JudgeConfig.patch)
    judges = {name: Judge(JudgeConfig(kind=kind, **shape)).to(device) for name, kind in (("train", "attend"), ("heldout", "convolve"))}
    loop = Loop("reward", cfg, resume, judges, muon_and_adamw(judges.values(), cfg))
    for step in loop:
        losses, rights = {}, {}
        for n, (name, judge) in enumerate(judges.items()):
            rng, _ = step_random(replace(cfg, seed=cfg.seed + 1000 * n), "reward", step)                # each judge sees pairs of its own
            chosen = rng.integers(len(pairs), size=cfg.batch)
            x = rearrange(from_pixels(pairs.load(chosen).reshape(-1, vq.cfg.image_size, vq.cfg.image_size, 3), device), "(p i) c h w -> p i c h w", i=2)
            renderings = x.clone()
            with torch.no_grad():                       # half the pairs as the policy would draw them: through the tokenizer
                half = cfg.batch // 2
                x[:half] = vq.decode(codes[chosen[:half]].to(device).flatten(0, 1)).clamp(-1, 1).view_as(x[:half])
            prompts = tokens_of([text for i in chosen for text in pairs.prompts[i]], judge.cfg.n_text, device)
            with autocast(cfg, device):
                losses[name], rights[name] = judge_loss(judge, x, rearrange(prompts, "(p i) t -> p i t", i=2),
                                                        renderings if step >= cfg.splices_from else None, rng)
        norm = loop.update(step, sum(losses.values()))
        loop.log(step, ("loss_train", "loss_heldout"), grad_norm=norm, **{f"loss_{k}": v for k, v in losses.items()}, **{f"accuracy_{k}": v for k, v in rights.items()})
    test = pairworld(300, "test", 2) if not cfg.data else pairs
    images = test.load(np.arange(min(300, len(test))))
    seen = decode_ids(vq, encode_images(vq, images.reshape(-1, *images.shape[2:]), device)).reshape(images.shape)
    test = PairSet(test.prompts[:300], images, test.categories[:300])
    for name, judge in judges.items():
        for kind, shown in (("renderings", images), ("reconstructions", seen)):
            report = judge_report(NetworkJudge(judge, device), shown, test)
            append_log(cfg, {"stage": "reward", "judge": name, "on": kind, "report": report})
            print(f"{name} judge, {'training' if cfg.data else 'held-out'} {kind}: {show(report)}")
    save_judges(Path(cfg.out) / "reward.safetensors", judges)
    loop.finish()


# ---------------------------------------------------------------------------------------------------------------------
# Stage 4

def rollout(policy, vq, judge, prompts, empty, cfg, generator):
    """Sample G pictures for each of P pairs of prompts and have them judged.

    prompts: 2P strings. -> tokens (P, 2, G, N), logprobs (P, 2, G, N) they were sampled with, rewards (P, 2, G), pictures (P*2*G, H, W, 3)."""
    with autocast(cfg, empty.device):
        tokens, logprobs = generate(policy, tokens_of(prompts, policy.cfg.n_text, empty.device), empty, cfg.samples, cfg.guidance, cfg.temperature, generator)
    pictures = decode_ids(vq, tokens)
    rewards = judge.score(pictures, [text for text in prompts for _ in range(cfg.samples)]).to(tokens.device)
    tokens, logprobs, rewards = (rearrange(t, "(p i g) ... -> p i g ...", i=2, g=cfg.samples) for t in (tokens, logprobs, rewards))
    return tokens, logprobs, rewards, pictures


def train_ppo(cfg, resume):
    device, out = pick_device(cfg.device), Path(cfg.out)
    vq, policy = load_policy(out, "pretrain", device)
    reference = load_policy(out, "pretrain", device)[1].requires_grad_(False)
    judges = load_judges(out, device)
    pairs = training_pairs(cfg, vq.cfg.image_size)
    lone = read_prompts(cfg.prompts) if cfg.prompts else None
    for told in filter(None, (pairs, lone)):
        training_texts(told, min(policy.cfg.n_text, JudgeConfig.n_text))
    test, quick_test = (None, None) if cfg.data else (benchmark_pairs(cfg.eval_pairs), benchmark_pairs(4))
    for model in (policy, reference):
        maybe_compile(model, cfg)
    empty = tokens_of([None], policy.cfg.n_text, device)
    loop = Loop("ppo", cfg, resume, {"model": policy}, [adamw(policy.parameters(), cfg.lr, 0.0, eps=1e-5)])
    before = None if test is None else benchmark(reference, vq, judges, test, cfg)
    for step in loop:
        rng, generator = step_random(cfg, "ppo", step, device)
        chosen = rng.integers(len(pairs), size=cfg.pairs)
        prompts, has_truth = [pairs.prompts[i] for i in chosen], pairs.has_images(chosen)
        if lone:
            for p in np.flatnonzero(rng.random(cfg.pairs) < cfg.prompts_share):
                prompts[p], has_truth[p] = lone.prompts[rng.integers(len(lone))], False
        texts = [text for two in prompts for text in two]
        truth_p = ground_truth_probability(step, cfg.truth_full_until, cfg.truth_low_at, cfg.truth_zero_at)
        use_truth = torch.from_numpy((rng.random((cfg.pairs, 2)) < truth_p) & has_truth[:, None]).to(device)

        # Rollout: sample, mix the ground truth in, judge
        with torch.no_grad():
            tokens, old_logprobs, rewards, pictures = rollout(policy, vq, judges["train"], texts, empty, cfg, generator)
            origin = torch.zeros_like(rewards, dtype=torch.long)
            ids = repeat(tokens_of(texts, policy.cfg.n_text, device), "(p i) t -> p i g t", i=2, g=cfg.samples)
            if use_truth.any():
                images = pairs.load(chosen)
                truth = rearrange(encode_images(vq, images.reshape(-1, *images.shape[2:]), device), "(p i) n -> p i n", i=2)
                tokens, origin = mix_ground_truth(tokens, truth, use_truth)
                seen = decode_ids(vq, truth.flatten(0, 1))                                              # (2P, H, W, 3): judged as a sample would be
                own = judges["train"].score(seen, texts).view(-1, 2).to(device)
                twin = judges["train"].score(seen, [t for two in prompts for t in two[::-1]]).view(-1, 2).flip(1).to(device)
                rewards[:, :, 0] = torch.where(use_truth, own, rewards[:, :, 0])
                rewards[:, :, 1] = torch.where(use_truth, twin, rewards[:, :, 1])
                rows = origin > 0                       # nobody sampled these; the policy of the rollout stands in for pi_old
                with autocast(cfg, device):
                    old_logprobs[rows] = score(policy, ids[rows], tokens[rows], empty, cfg.guidance, cfg.temperature)[0]
            advantages = group_advantages(rewards, cfg.advantage, cfg.std_floor)                        # (P, 2, G)
            flat = (ids.flatten(0, 2), tokens.flatten(0, 2))
            weights = torch.ones_like(old_logprobs)
            with autocast(cfg, device):
                ref_logprobs = score(reference, *flat, empty, cfg.guidance, cfg.temperature)[0].view_as(old_logprobs) if cfg.beta else None
                if cfg.difference:
                    divergence = prompt_divergence(policy, flat[0], ids.flip(1).flatten(0, 2), flat[1], empty, cfg.guidance, cfg.temperature)
                    weights = difference_weights(divergence, cfg.difference, cfg.difference_cap).view_as(old_logprobs)

        # Update: minibatches of whole pairs
        stats = []
        for _ in range(cfg.epochs):
            for mb in torch.from_numpy(rng.permutation(cfg.pairs)).split(cfg.pairs // cfg.minibatches):
                with autocast(cfg, device):
                    newlogprobs, entropy = score(policy, ids[mb].flatten(0, 2), tokens[mb].flatten(0, 2), empty, cfg.guidance, cfg.temperature)
                    loss, values = ppo_loss(newlogprobs, old_logprobs[mb].flatten(0, 2), None if ref_logprobs is None else ref_logprobs[mb].flatten(0, 2),
                                            advantages[mb].flatten(), weights[mb].flatten(0, 2), cfg.clip, cfg.beta)
                norm = loop.update(step, loss, cfg.grad_clip)
                stats.append(values | {"entropy": entropy.mean(), "grad_norm": norm})
        mean = {k: torch.stack([s[k] for s in stats]).mean() for k in stats[0]}
        sampled = origin == SAMPLED
        flat_groups = rewards.std(2, correction=0) < 1e-3
        extra = {}
        if test is not None and (step + 1) % cfg.eval_every == 0:
            quick = benchmark(policy, vq, judges, quick_test, cfg)[0]
            extra["test"] = {judge: quick[judge]["average"] for judge in judges} | {"pair_accuracy": quick["pair_accuracy"]["average"]}
            save_picture(cfg, f"ppo_{step + 1:04d}.png", pictures[::cfg.samples][:16], texts[:16], scale=5)
        loop.log(step, ("reward", "kl", "entropy", "clipfrac"), reward=rewards[sampled].mean(), reward_std=rewards[sampled].std(), truth_probability=truth_p,
                 frac_zero_std=flat_groups.float().mean(), **mean, **extra)
    if test is not None:
        finish_benchmark(cfg, policy, reference, vq, judges, test, before)
    save_weights(out / "ppo.safetensors", policy.state_dict(), config=asdict(policy.cfg))
    loop.finish()
    print(f"curves: {draw_curves(out)}")


def benchmark(model, vq, judges, test, cfg):
    """The PairWorld benchmark of a policy -> (report, images (P, 2, 2, H, W, 3))."""
    model.eval()
    images = generate_images(model, vq, [text for two in test.prompts for text in two], 2, cfg.guidance, cfg.temperature, cfg.seed)
    images = rearrange(images, "(p i) k h w c -> p i k h w c", i=2)
    return paircomp(images, test, judges, pairworld=True), images


def finish_benchmark(cfg, policy, reference, vq, judges, test, before):
    """Before/after: the table, paircomp.json, the picture, and how well D_t finds the true difference."""
    (base, base_images), (ppo, ppo_images) = before, benchmark(policy, vq, judges, test, cfg)
    for report, model in ((base, reference), (ppo, policy)):
        report["divergence_auc"] = true_difference_auc(model, vq, test)
    write_atomically(Path(cfg.out) / "paircomp.json", json.dumps({"base": base, "ppo": ppo}, indent=1).encode())
    picks = list(range(len(CATEGORIES)))                              # the first pair of each category, not the best
    rows = np.stack([test.images[picks], base_images[picks, :, 0], ppo_images[picks, :, 0]], 1)         # (6, 3, 2, H, W, 3)
    labels = [label for i in picks for who in ("asked: ", "base: ", "ppo: ") for label in (who + t for t in test.prompts[i])]
    save_picture(cfg, "before_after.png", rows.reshape(-1, *rows.shape[3:]), labels, columns=6, scale=5)
    print(format_before_after(base, ppo))
    print("AUC of D_t against the true difference:", *(f"\n  {who:5} {show(r['divergence_auc'])}" for who, r in (("base", base), ("ppo", ppo))))
    print(f"pictures: {Path(cfg.out) / 'samples' / 'before_after.png'}")


@torch.no_grad()
def true_difference_auc(model, vq, pairs):
    """How well D_t finds the tokens in which the two pictures of a pair differ -> {category: mean AUC, ..., "average"}."""
    device = next(model.parameters()).device
    tokens = encode_pairs(vq, pairs, device).flatten(0, 1).to(device)                                   # (2P, N)
    ids = tokens_of([text for two in pairs.prompts for text in two], model.cfg.n_text, device)
    twins = rearrange(ids, "(p i) t -> p i t", i=2).flip(1).flatten(0, 1)
    divergence = prompt_divergence(model, ids, twins, tokens).cpu().numpy()
    mask = difference_mask(pairs.load(np.arange(len(pairs))), vq.cfg.grid).reshape(len(pairs), -1).repeat(2, 0)
    return category_means(divergence_auc(divergence, mask), np.repeat(pairs.categories, 2))


def draw_curves(out):
    """log.jsonl -> curves.png, with matplotlib where it is installed. -> where they are, or how to get them."""
    try:
        import matplotlib
    except ImportError:
        return f"not drawn; pip install matplotlib, then python train.py --curves {out}"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    panels = [("tokenizer", "psnr", "tokenizer: PSNR (dB)"), ("pretrain", "loss", "pretrain: loss (nats/token)"),
              ("reward", ("loss_train", "loss_heldout"), "judges: loss"), ("ppo", "reward", "ppo: reward of the samples"),
              ("ppo", "kl", "ppo: KL to the base model"), ("ppo", "entropy", "ppo: entropy (nats)"), ("ppo", "clipfrac", "ppo: share of clipped ratios"),
              ("ppo", "pg_loss", "ppo: loss (no progress signal)"), ("ppo", "test", "ppo: s_g on held-out pairs")]
    figure, axes = plt.subplots(3, 3, figsize=(13, 9))
    for ax, (stage, keys, title) in zip(axes.flat, panels):
        rows = [e for e in log if e["stage"] == stage and "step" in e]
        if keys == "test":
            rows = [e for e in rows if "test" in e]
            for judge in ("train", "heldout", "oracle"):
                ax.plot([e["step"] for e in rows], [e["test"][judge]["s_g"] for e in rows], label=judge)
            ax.plot([e["step"] for e in rows], [e["test"]["pair_accuracy"] for e in rows], label="pair accuracy", linestyle="--")
            ax.legend()
        else:
            for key in [keys] if isinstance(keys, str) else keys:
                ax.plot([e["step"] for e in rows if key in e], [e[key] for e in rows if key in e], linewidth=0.8, label=key)
            if not isinstance(keys, str):
                ax.legend()
        ax.set_title(title, fontsize=10)
        ax.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=90)
    plt.close(figure)
    return out / "curves.png"


# ---------------------------------------------------------------------------------------------------------------------

TRAIN = {"tokenizer": train_tokenizer, "pretrain": train_pretrain, "reward": train_reward, "ppo": train_ppo}


def overview():
    lines = ["python train.py --stage STAGE trains one of (minutes on two CPU cores, preset tiny):"]
    for stage in STAGES:
        needs = f"needs {', '.join(NEEDS[stage])}" if NEEDS[stage] else "needs nothing"
        lines.append(f"  {stage:10} about {MINUTES[stage]:g} min, {needs}")
    lines.append("A missing earlier stage is trained first: `python train.py --stage ppo` is the whole way. --stage STAGE --help lists the flags.")
    return "\n".join(lines)


def peak_memory():
    """The process' largest resident size so far, where the system tells it."""
    try:
        import resource
    except ImportError:                                 # Windows
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    return f", peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30:.2f} GB"


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--curves"]:
        if len(argv) != 2 or not (Path(argv[1]) / "log.jsonl").is_file():
            raise UserError("--curves RUN: wants one run folder, with a log.jsonl in it")
        print(f"curves: {draw_curves(Path(argv[1]))}")
        return
    stage, resume, cfg, preset = parse(argv)
    if stage is None:
        print(overview())
        return
    out = Path(cfg.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {out}: cannot be made ({e.strerror})") from e
    if (out / f"{stage}.safetensors").exists() and not (out / f"{stage}.state").exists():
        raise UserError(f"{out / stage}.safetensors is there already; choose another --out, or delete it to train {stage} again")
    missing = [s for s in NEEDS[stage] if not (out / f"{s}.safetensors").exists()]
    if missing and preset == "tiny":
        print(f"{', '.join(missing)}: missing in {out}, trained first. About {sum(MINUTES[s] for s in [*missing, stage]):g} minutes in all on two CPU cores.")
    elif missing:
        print(f"{', '.join(missing)}: missing in {out}, trained first.")
    for name in [*missing, stage]:
        shared = {f.name: getattr(cfg, f.name) for f in fields(Common) if f.name != "extra"}            # which belongs to a stage
        own = cfg if name == stage else replace(STAGES[name](), **{**PRESETS[preset][name], **shared})
        print(f"{name}: {own}")
        began = time.time()
        TRAIN[name](own, resume)
        print(f"{name}: done in {(time.time() - began) / 60:.1f} min{peak_memory()}")


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
    except OSError as e:                                # a full disk, most likely, under a log or a picture
        sys.exit(f"error: {e}; what was saved before is intact, make room and go on with --resume")
    except KeyboardInterrupt:
        sys.exit("stopped at once; what was saved before is intact, go on with the same command (and --resume, if a .state is there)")
