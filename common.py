"""What every file needs: errors, files, checkpoints, and the loop that the four stages share.

`Loop` owns the log, the bar, the saved states and what happens when something goes wrong, so that
the stages in train.py hold the method alone. Skip this file at first.

Weights are safetensors with the config in the metadata. Every file is written beside the old one,
synced, and renamed: a kill or a full disk leaves the old file whole. Nothing is ever unpickled.
"""
import json
import math
import os
import signal
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

try:
    import fcntl
except ImportError:                     # Windows
    fcntl = None

GRAD_CLIP = 1.0                     # largest gradient norm, in every stage
SAVE_SECONDS = 60                   # a state is saved about this often, but
SAVE_SHARE = 0.05                   # saving takes at most this share of the time


class UserError(Exception):
    """Something the user can repair. One line: what, where, what to do. Scripts exit with it."""


class Stopped(UserError):
    """Ctrl-C between two steps. Everything is saved already."""


def first_few(problems, most=5):
    """Problems for an error message: the first few and how many there are."""
    rest = len(problems) - most
    more = f"; and {rest} more ({len(problems)} in all)" if rest > 0 else ""
    return "; ".join(problems[:most]) + more


# -- Files -----------------------------------------------------------------------------------------
def read_json(path, what):
    """A JSON file's content. UserError says where it is broken; `what` names it for the reader."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file ({what})") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, should be a JSON file ({what})") from None
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read ({e})") from e
    except json.JSONDecodeError as e:
        where = f"line {e.lineno}, column {e.colno}"
        raise UserError(f"{path}: broken JSON at {where} ({e.msg})") from e


def replace_file(path, write):
    """A file that is there whole or not at all. write(temporary path) writes it beside the old
    one, then it is synced and renamed. Of several processes the first one writes."""
    if not leads():
        return
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as e:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be saved ({getattr(e, 'strerror', None) or e}); the last "
                        "saved one is untouched. Make room, then --resume") from e


def write_atomically(path, data):
    """Bytes -> a file."""
    replace_file(path, lambda temporary: temporary.write_bytes(data))


def write_json(path, value):
    write_atomically(path, json.dumps(value, indent=1).encode())


def copy_file(source, target):
    """UserError if the target is there already and is another file."""
    data = Path(source).read_bytes()
    if target.exists() and target.read_bytes() != data:
        raise UserError(f"{target} is there already and differs from {source}; choose another "
                        "--out")
    write_atomically(target, data)


def make_folder(path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{path}: cannot be made a folder ({e.strerror})") from e


@contextmanager
def only_process(folder):
    """The run folder is this process' alone, or that of the processes of one torchrun. UserError if
    another run trains there. The lock goes with the process, so that a kill leaves none behind."""
    if not leads():
        yield
        return
    with open(Path(folder) / ".lock", "a") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process trains there; wait for it, or give another "
                            "--out") from None
        except OSError as e:            # a file system without locks
            print(f"{folder}: cannot be locked ({e.strerror}); see that no other process uses it")
        yield


# -- Several processes -----------------------------------------------------------------------------
# torchrun starts the script several times. Each process does its share of the rows, all see all
# results and decide alike, and the first one writes. extras/several.py: how they speak.

def world():
    """(the number of this process, how many there are): 0, 1 without torchrun."""
    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


def leads():
    return world()[0] == 0


def share(n):
    """Which of n rows are this process' to do: a slice, all of them without torchrun."""
    rank, size = world()
    return slice(n * rank // size, n * (rank + 1) // size)


def gather(n, own):
    """The rows `share(n)` of a tensor, from each process -> all n rows, in each process."""
    return own if world()[1] == 1 else several().gather_rows(n, own)


def total(x):
    """The sum of a tensor over the processes, in each process."""
    return x if world()[1] == 1 else several().add_up(x)


def whole(x):
    """A tensor, or one that is split among the processes (--shard) -> all of it, in each."""
    return several().joined_parts(x) if hasattr(x, "full_tensor") else x


def like(x, own):
    """A whole tensor, split as `own` is."""
    return several().split_like(x, own) if hasattr(own, "full_tensor") else x


def several():
    from extras import several
    return several


# -- Weights ---------------------------------------------------------------------------------------
def trained(module):
    """{name: tensor} of what training changes: all, or with --lora the adapter alone."""
    lora, own = getattr(module, "lora", 0), module.state_dict()
    return {k: x for k, x in own.items() if not lora or k.endswith((".down", ".up"))}


def save_weights(path, tensors, **metadata):
    """{name: tensor} and JSON-able metadata -> a safetensors file."""
    tensors = ((name, whole(tensor.detach())) for name, tensor in tensors.items())
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors if leads()}
    # All metadata under one key, because the order of several would change from run to run.
    metadata = {"nanofocusdiff": json.dumps(metadata)}
    replace_file(path, lambda temporary: save_file(tensors, temporary, metadata))
    total(torch.zeros(1))               # no process goes on, or ends, before it is written


def read_tensor(path, name):
    """One tensor of a safetensors file, in memory of its own.

    The file is opened for it alone: what is read through a mapping counts as memory until the
    mapping closes, and one mapping for the whole file would hold it twice."""
    with safe_open(path, "pt", device="cpu") as f:
        return f.get_tensor(name).clone()


def load_weights(path):
    """A file of `save_weights` -> ({name: CPU tensor}, metadata). UserError if it is not whole."""
    try:
        with safe_open(path, "pt", device="cpu") as f:
            metadata = json.loads((f.metadata() or {}).get("nanofocusdiff", "{}"))
            names = list(f.keys())
        return {k: read_tensor(path, k) for k in names}, metadata
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; train that stage first") from None
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{path}: not a whole checkpoint ({e}); delete it and train that stage "
                        "again") from e


def load_strictly(module, tensors, path, assign=False):
    """Fill a module. UserError lists every key that is missing, unexpected or of another shape.

    assign: the tensors become the module's own instead of being copied. The module may then be on
    the device "meta", without memory."""
    own = trained(module)
    bad = [f"missing {k}" for k in own if k not in tensors]
    bad += [f"unexpected {k}" for k in tensors if k not in own]
    for k in own.keys() & tensors.keys():
        if tensors[k].shape != own[k].shape:
            bad.append(f"{k} is {tuple(tensors[k].shape)}, should be {tuple(own[k].shape)}")
    if bad:
        raise UserError(f"{path}: does not fit this {type(module).__name__}: {'; '.join(bad)}")
    module.load_state_dict({k: like(v, own[k]) for k, v in tensors.items()}, False, assign)
    return module


def load_module(path, module_class, config_class, device="cpu"):
    """A checkpoint -> the module in eval mode, rebuilt from the config that it carries."""
    tensors, metadata = load_weights(path)
    config = metadata.get("config", {})
    known = {name: config.get(name) for name in asdict(config_class())}
    missing = [name for name, value in known.items() if value is None]
    if missing:
        raise UserError(f"{path}: its metadata lacks {missing}; not a {module_class.__name__} "
                        "checkpoint")
    known = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}
    with torch.device("meta"):
        module = module_class(config_class(**known))
    return load_strictly(module, tensors, path, assign=True).to(device).eval()


# -- Devices, randomness, learning rates -----------------------------------------------------------
def pick_device(name):
    """auto, cpu, cuda or mps -> torch.device. UserError if torch sees no such device. On cuda it
    switches cuDNN's attention off, which makes a plan for each new length."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if name == "auto":
        name = next(name for name, there in available.items() if there)
    if not available[name]:
        raise UserError(f"--device {name}: torch {torch.__version__} sees no such device here; "
                        "try --device auto")
    if name == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device(name)


def uses_bf16(dtype, device):
    """Whether matrices multiply in bf16 (autocast). auto: on CUDA. A CPU seldom gains from it."""
    return dtype == "bf16" or dtype == "auto" and device.type == "cuda"


def step_random(cfg, stage, step, device="cpu"):
    """numpy's and torch's generator of one step, from (seed, stage, step) alone.

    There is no generator to save, and a run that was killed goes on as if it had not been."""
    number = ["tokenizer", "pretrain", "reward", "ppo"].index(stage)
    seeds = np.random.SeedSequence([cfg.seed, number, step])
    torch_seed = int(seeds.generate_state(1, np.uint64)[0] >> 1)
    return np.random.default_rng(seeds), torch.Generator(device).manual_seed(torch_seed)


def schedule(cfg, step):
    """Share of the peak learning rate: rises over cfg.warmup steps (or, below 1, that share of the
    steps), stays, and falls towards 0 over the last cfg.decay (a share) of the steps."""
    warmup = cfg.warmup * cfg.steps if cfg.warmup < 1 else cfg.warmup
    rise = (step + 1) / max(1, warmup)
    fall = (cfg.steps - step) / max(1, cfg.decay * cfg.steps)
    return min(1, rise, fall)


# -- The loop --------------------------------------------------------------------------------------
# What may change between a run and its resumption: where the folder is, and what fits in memory.
FREE_TO_CHANGE = ("out", "microbatch", "compile", "shard")


def same_setting(name, one, other):
    """Whether a resumed run may have the value `other` for `one`. Of a judge URL#MODEL the model
    counts, not the address."""
    if name in ("judge", "heldout_judge"):
        one, other = ([spec.partition("#")[2] or spec for spec in np.atleast_1d(specs or [])]
                      for specs in (one, other))
    return name in FREE_TO_CHANGE or one == other


class Loop:
    """The steps of a stage, with bar, log and resume.

        with Loop("ppo", cfg, resume) as loop:          # train_stages; a failure ends here
            loop.start({"model": policy}, [optimizer])  # the stage; loads the state of --resume
            for step in loop:
                ...                                     # loss.backward()
                loop.optimizer_step(step)
                loop.log(step, loss=loss)
            loop.finish()                               # the weights are saved: drop the state

    A judge that is gone, an image that cannot be read and memory that is full end the run in
    `__exit__`, for all stages: if the step has not changed the weights yet, its state is saved (by
    one process alone), and --resume repeats it."""

    def __init__(self, stage, cfg, resume):
        self.stage = stage
        self.cfg = cfg
        self.path = Path(cfg.out) / f"{stage}.state"
        self.log_path = Path(cfg.out) / "log.jsonl" if leads() else Path(os.devnull)
        self.first = 0                  # the first step that is still to do
        self.saved = 0                  # the last one that a state is saved of
        self.step = None                # the one under way
        self.changed = False            # the weights have moved in this step
        self.diverged = False           # its gradient is not finite
        self.lr_share = 1.0             # of the scheduled learning rate; train.BestState lowers it
        self.seconds = 0.0              # spent before this process
        self.interrupted = False
        self.resumed = self.path.exists()
        if self.resumed and not resume:
            raise UserError(f"{self.path} holds an unfinished run; add --resume to go on with it, "
                            "or delete it to start again")

    def start(self, modules, optimizers, extra=None):
        """modules {name: nn.Module}, optimizers and extra {name: tensor} are what a state holds.
        Loads them with --resume and makes ready to log."""
        self.modules = modules
        self.optimizers = optimizers
        self.extra = extra or {}
        self.peaks = [[group["lr"] for group in o.param_groups] for o in optimizers]
        if self.resumed:
            self._load()
        self._trim_log()
        config_path = self.path.with_name("config.json")
        config = read_json(config_path, "config of the run") if config_path.exists() else {}
        config[self.stage] = asdict(self.cfg) | {"torch": torch.__version__}
        write_json(config_path, config)

    def _trim_log(self):
        """Drop what a killed run logged after the state that it goes on from."""
        kept = []
        if self.log_path.exists():
            for line in self.log_path.read_text().splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:      # cut short by a kill: that step is done again
                    continue
                if entry["stage"] != self.stage or entry.get("step", self.first) < self.first:
                    kept.append(line + "\n")
        write_atomically(self.log_path, "".join(kept).encode())

    def _load(self):
        tensors, meta = load_weights(self.path)
        saved = meta.get("config", {})
        changed = [f"--{k.replace('_', '-')} {saved.get(k)} -> {v}"
                   for k, v in asdict(self.cfg).items() if not same_setting(k, saved.get(k), v)]
        if changed:
            raise UserError(f"{self.path} was begun with other settings ({'; '.join(changed)}); "
                            "repeat them, or delete it to start again")
        parts = {}
        for key, value in tensors.items():
            part, name = key.split("|", 1)
            parts.setdefault(part, {})[name] = value
        for name, module in self.modules.items():
            load_strictly(module, parts.get(name, {}), self.path)
        for n, optimizer in enumerate(self.optimizers):
            state, params = {}, [p for group in optimizer.param_groups for p in group["params"]]
            for key, value in parts.get(f"optimizer{n}", {}).items():
                i, name = key.split(".", 1)
                value = like(value, params[int(i)]) if value.dim() else value   # a step's number
                state.setdefault(int(i), {})[name] = value
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        for name, tensor in self.extra.items():
            tensor.copy_(like(parts["extra"][name], tensor))
        self.first = self.saved = meta["step"]
        self.seconds = meta["seconds"]

    def save(self, step):
        """The state before `step`: everything that --resume needs."""
        tensors = {f"extra|{k}": v for k, v in self.extra.items()}
        for name, module in self.modules.items():
            tensors |= {f"{name}|{k}": v for k, v in trained(module).items()}
        for n, optimizer in enumerate(self.optimizers):
            for i, state in optimizer.state_dict()["state"].items():
                for k, v in state.items():
                    tensors[f"optimizer{n}|{i}.{k}"] = torch.as_tensor(v)
        save_weights(self.path, tensors, step=step, seconds=self._elapsed(),
                     config=asdict(self.cfg))
        self.saved = step

    def _elapsed(self):
        return self.seconds + time.time() - self.began

    def __enter__(self):
        self.began = time.time()
        self.bar = self.log_file = None
        self.handlers = {s: signal.signal(s, self._interrupt)
                         for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _interrupt(self, signum, frame):
        if self.interrupted or self.step is None:
            raise KeyboardInterrupt     # pressed twice, or no step to end: the saved state counts
        self.interrupted = True

    def __exit__(self, kind, error, traceback):
        for s, handler in self.handlers.items():
            signal.signal(s, handler)
        for open_one in (self.bar, self.log_file):
            if open_one is not None:
                open_one.close()
        if isinstance(error, torch.OutOfMemoryError):
            error = UserError("out of memory; go on with a smaller --microbatch, or --compile off "
                              f"({str(error).splitlines()[0]})")
        if not isinstance(error, UserError) or isinstance(error, Stopped):
            return
        if self.step is None:           # before the first step, or after the last
            if self.path.exists():
                raise UserError(f"{self.stage}: {error}. {self.path} is intact: mend it, then the "
                                "same command with --resume") from error
            raise error
        if self.diverged:               # --resume would come to the same step again
            raise UserError(f"{self.stage}, step {self.step}: {error}") from error
        if not self.changed and world()[1] == 1:
            self.save(self.step)
        intact = (f"{self.path} of step {self.saved} is intact: mend it, then the same command "
                  "with --resume" if self.path.exists() else "Nothing was saved yet: start again")
        raise UserError(f"{self.stage}, step {self.step}: {error}. {intact}") from error

    def __iter__(self):
        self.log_file = open(self.log_path, "a", buffering=1)
        self.bar = tqdm(total=self.cfg.steps, initial=self.first, desc=self.stage, unit="step")
        next_save = time.time() + SAVE_SECONDS
        for step in range(self.first, self.cfg.steps):
            self.step = step
            self.changed = False
            yield step
            self.bar.update()
            wishes = torch.tensor([self.interrupted, time.time() > next_save]).float()
            interrupted, due = total(wishes).tolist()           # one process' wish is everybody's
            if interrupted or due or step + 1 == self.cfg.steps:
                began = time.time()
                self.save(step + 1)
                took = time.time() - began
                next_save = time.time() + max(SAVE_SECONDS, took / SAVE_SHARE)
            if interrupted:
                raise Stopped(f"stopped after step {step + 1} of {self.stage}; nothing is lost, go "
                              "on with the same command and --resume")
        self.step = None

    def optimizer_step(self, step):
        """Clip the gradients, step, and forget them -> their norm before clipping. UserError if it
        is not finite, before that harms the weights."""
        share = float(self.lr_share) * schedule(self.cfg, step)
        for optimizer, peaks in zip(self.optimizers, self.peaks):
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * share
        alone = world()[1] == 1
        clip = torch.nn.utils.clip_grad_norm_ if alone else several().add_up_and_clip
        norms = [clip(module.parameters(), GRAD_CLIP) for module in self.modules.values()]
        norm = torch.stack(norms).max()
        self.diverged = not math.isfinite(norm.item())
        if self.diverged:
            raise UserError(f"the gradient's norm is {norm.item()}; start again with a smaller --lr"
                            f" (without {self.path}, where there is one)")
        self.changed = True
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)       # memory for the next rollout
        return norm

    def log(self, step, **metrics):
        """One line of log.jsonl. The first four metrics go on the bar too."""
        values = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in metrics.items()}
        entry = {"stage": self.stage, "step": step, "seconds": round(self._elapsed(), 2)}
        self.log_file.write(json.dumps(entry | values) + "\n")
        first = list(values)[:4]
        self.bar.set_postfix({k: f"{values[k]:.3g}" for k in first}, refresh=False)

    def report(self, **entry):
        """A line of log.jsonl that belongs to no step."""
        with open(self.log_path, "a") as f:
            f.write(json.dumps({"stage": self.stage, **entry}) + "\n")

    def entries(self):
        """The steps of this stage in the log."""
        entries = [json.loads(line) for line in self.log_path.read_text().splitlines()]
        return [e for e in entries if e["stage"] == self.stage and "step" in e]

    def finish(self):
        """The stage's weights are on disk: its state is needed no more."""
        self.path.with_suffix(".before").unlink(missing_ok=True)        # of BeforeAfter
        self.path.unlink(missing_ok=True)


# -- Optimizers ------------------------------------------------------------------------------------
def adamw(params, lr, weight_decay, eps=1e-8):
    """AdamW. Matrices decay, vectors do not."""
    params = [p for p in params if p.requires_grad]
    matrices = [p for p in params if p.dim() > 1]
    vectors = [p for p in params if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    fused = params[0].is_cuda or None   # otherwise a GPU's update makes copies of all weights
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=eps, fused=fused)


def bf16_is_fast(device):
    """Whether bf16 matrices multiply at least as fast as fp32. Below AVX-512 a CPU takes 8 to 50
    times as long."""
    if device.type == "cpu":
        return torch.backends.cpu.get_cpu_capability() == "AVX512"
    return device.type == "cuda"


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon with the dtype of its matrix products as an argument.

    The library's are always in bf16, in which two stages took five times as long on a CPU without
    AVX-512. In bf16 both end with the same bits (tests/test_common.py)."""

    def __init__(self, params, lr, weight_decay, dtype, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.dtype = dtype
        self.momentum = momentum

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}                  # matrices of one shape are multiplied at once
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault(p.shape, []).append(p)
            for (height, width), params in alike.items():
                ahead = torch.stack([self.look_ahead(p) for p in params])       # (n, M, N)
                tall = max(1, height / width) ** 0.5
                for p, update in zip(params, orthogonal(ahead, self.dtype)):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * tall)

    def look_ahead(self, p):
        """Nesterov's gradient: p.grad goes into the momentum, and again some way towards it."""
        if "momentum_buffer" not in self.state[p]:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        momentum = self.state[p]["momentum_buffer"]
        momentum.lerp_(p.grad, 1 - self.momentum)
        return p.grad.lerp(momentum, self.momentum)


def orthogonal(matrices, dtype):
    """(n, M, N) -> (n, M, N) with the same singular vectors and singular values near 1, by five
    Newton-Schulz steps (kellerjordan.github.io/posts/muon)."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    return x.mT if tall else x


def muon_and_adamw(modules, cfg):
    """Muon for the matrices inside the layers, AdamW for all else: embeddings, heads, convolutions,
    vectors. muon_lr = 0 leaves everything to AdamW."""
    inside, outside = [], []
    for module in modules:
        for name, p in module.named_parameters():
            in_layer = name.split(".")[0] in ("layers", "attention")
            muon = cfg.muon_lr > 0 and p.dim() == 2 and in_layer
            (inside if muon else outside).append(p)
    optimizers = [adamw(outside, cfg.lr, cfg.weight_decay)]
    if inside:
        dtype = torch.bfloat16 if bf16_is_fast(outside[0].device) else torch.float32
        optimizers.append(Muon(inside, cfg.muon_lr, cfg.weight_decay, dtype))
    return optimizers
