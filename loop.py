"""What the four training loops share: their data, their random numbers, their log, their optimizers, their state on disk."""
import json
import math
import signal
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from tqdm import tqdm

from config import STAGES
from data import UserError, picture_grid, read_json, read_pairs
from pairworld import TextTokens, pairworld
from tokenizer import encode_images, load_strictly, load_weights, save_weights, write_atomically


def training_pairs(cfg, image_size, bare=False):
    """bare: pairs without pictures come too."""
    if not cfg.data:
        return pairworld(cfg.n_pairs, "train", cfg.seed, cfg.extra)
    pairs = read_pairs(cfg.data, image_size)
    return pairs if bare else pairs.with_images()


def training_texts(pairs, n_text, text=TextTokens()):
    """Every prompt of a set, two a pair; one that is too long is told now and not in the middle of a run."""
    texts = pairs.texts()
    text.prompts(texts, n_text)
    return texts


def tokens_of(prompts, n_text, device, text=TextTokens(), dropped=None):
    """B strings -> ids (B, T) on the device, as `TextTokens.prompts`."""
    return torch.from_numpy(text.prompts(prompts, n_text, dropped)).to(device)


def encode_pairs(vq, pairs, device):
    """Every picture of a set as tokens, once: (P, 2, N) int64 on the CPU."""
    chunks = np.array_split(np.arange(len(pairs)), -(-len(pairs) // 256))
    ids = [encode_images(vq, pairs.load(c).reshape(-1, vq.cfg.image_size, vq.cfg.image_size, 3), device).cpu() for c in tqdm(chunks, "encoding", leave=False)]
    return rearrange(torch.cat(ids), "(p i) n -> p i n", i=2)


def save_picture(cfg, name, images, labels=None, columns=8, scale=3):
    folder = Path(cfg.out) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    picture_grid(images, labels, columns, max(1, scale * 32 // images.shape[1])).save(folder / name)


def show(report):
    return ", ".join(f"{k} ({show(v)})" if isinstance(v, dict) else f"{k} {v:.3f}" for k, v in report.items())


def bf16(cfg, device):
    return cfg.dtype == "bf16" or cfg.dtype == "auto" and device.type == "cuda"


def autocast(cfg, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16(cfg, device))


def step_random(cfg, stage, step, device="cpu"):
    """The generators of one step, numpy's and torch's, from (seed, stage, step) alone."""
    seeds = np.random.SeedSequence([cfg.seed, list(STAGES).index(stage), step])
    return np.random.default_rng(seeds), torch.Generator(device).manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> 1))


def schedule(cfg, step):
    """Share of the peak learning rate at a step: rises linearly, stays, falls linearly towards 0."""
    return min(1, (step + 1) / max(1, cfg.warmup), (cfg.steps - step) / max(1, cfg.decay * cfg.steps))


def append_log(cfg, entry):
    """A line that belongs to no step."""
    with open(Path(cfg.out) / "log.jsonl", "a") as f:
        f.write(json.dumps(entry) + "\n")


def read_log(cfg, stage="ppo"):
    """The steps of a stage in log.jsonl."""
    entries = map(json.loads, (Path(cfg.out) / "log.jsonl").read_text().splitlines())
    return [e for e in entries if e["stage"] == stage and "step" in e]


def same(name, value):
    """What may not change of a setting between a run and its resumption: nothing of where things are and how long one waits for them,
    of a judge's address URL#MODEL the model."""
    if name in ("out", "save_every", "judge_workers", "judge_timeout", "judge_retries"):
        return None
    if name in ("judge", "heldout_judge") and value:
        return [judge.partition("#")[2] or judge for judge in ([value] if isinstance(value, str) else value)]
    return value


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
        changed = [f"--{k.replace('_', '-')} {theirs.get(k)} -> {v}" for k, v in ours.items() if same(k, theirs.get(k)) != same(k, v)]
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

    def update(self, step, losses, grad_clip=1.0):
        """backward and one optimizer step -> gradient norm. losses: a loss, or an iterable of parts that add up to it, each of which is
        made after the backward of the one before (gradient accumulation). A loss or gradient that is not finite ends the run before it
        harms."""
        for optimizer, peaks in zip(self.optimizers, self.peak):
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * schedule(self.cfg, step)
        loss = 0.0
        for part in [losses] if isinstance(losses, torch.Tensor) else losses:
            part.backward()
            loss = loss + part.detach()
        norms = [torch.nn.utils.clip_grad_norm_(module.parameters(), grad_clip) for module in self.modules.values()]
        norm = torch.stack(norms).max()
        if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
            last = f"{self.path} of step {self.saved} is intact: --resume" if self.saved else "nothing was saved yet: start again"
            raise UserError(f"{self.stage}, step {step}: loss is {loss.item()}, gradient norm {norm.item()}; try a smaller --lr. {last}")
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)       # their memory is free for the next rollout
        return norm

    def guarded(self, step, ask):
        """ask(), of what comes before a step's update and may fail for a reason that the user can mend: a judge that is gone, a picture that
        cannot be read. The run then ends, and nothing that it learned is lost."""
        try:
            return ask()
        except UserError as e:
            self.save(step)
            raise UserError(f"{self.stage}, step {step}: {e}. {self.path} of step {step} is intact: mend it, then the same command with --resume") from e

    def finish(self):
        """The stage's weights are on disk: its state is needed no more."""
        self.path.unlink(missing_ok=True)


def adamw(params, lr, weight_decay, eps=1e-8):
    """AdamW; matrices decay, vectors do not."""
    params = [p for p in params if p.requires_grad]
    fused = params[0].is_cuda or None                   # otherwise the update on a GPU makes copies as large as the weights
    return torch.optim.AdamW([{"params": [p for p in params if p.dim() > 1], "weight_decay": weight_decay},
                              {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.95), eps=eps,
                             fused=fused)


def bf16_is_fast(device):
    """Whether matrices multiply in bf16 about as fast as in fp32, or faster. Below AVX-512 a CPU takes 8 to 50 times as long."""
    return device.type == "cuda" or device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512"


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with the dtype of its matrix products as an argument: the library's are always in bf16, in which two stages took five times
    as long on a CPU without AVX-512. In bf16 it ends with the library's bits (tests/test_train.py)."""

    def __init__(self, params, lr, weight_decay, dtype, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.dtype, self.momentum = dtype, momentum

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum_buffer"]
                momentum.lerp_(p.grad, 1 - self.momentum)
                update = orthogonal(p.grad.lerp(momentum, self.momentum), self.dtype)                   # Nesterov's look ahead
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def orthogonal(matrix, dtype):
    """A matrix (M, N) with singular values all near 1, by five Newton-Schulz steps (kellerjordan.github.io/posts/muon)."""
    x = (matrix.T if len(matrix) > matrix.shape[1] else matrix).to(dtype)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x.T if len(matrix) > matrix.shape[1] else x


def muon_and_adamw(modules, cfg):
    """Muon for the matrices inside the layers, AdamW for embeddings, heads, convolutions and vectors. muon_lr = 0 leaves
    everything to AdamW."""
    named = [(name, p) for module in modules for name, p in module.named_parameters()]
    inside = {id(p) for name, p in named if cfg.muon_lr and p.dim() == 2 and name.split(".")[0] in ("layers", "attention")}
    optimizers = [adamw([p for _, p in named if id(p) not in inside], cfg.lr, cfg.weight_decay)]
    if inside:
        dtype = torch.bfloat16 if bf16_is_fast(named[0][1].device) else torch.float32
        optimizers.append(Muon([p for _, p in named if id(p) in inside], cfg.muon_lr, cfg.weight_decay, dtype))
    return optimizers
