"""How much GPU memory and disk Janus-Pro needs, counted without weights, and without a GPU.

    python -m extras.memory                             # 1B and 7B as `--preset janus` runs them
    python -m extras.memory --microbatch 1              # PPO with other flags of train.py
    python -m extras.memory --compile off               # without the CUDA graph's own memory
    python -m extras.memory --measure                   # beside it what a GPU says, of what fits it

It takes a minute. No formula is behind the table: the functions that train.py calls run on fake
tensors, which have shapes but no memory, and every tensor that is alive is counted. What a GPU adds
is not counted: CUDA itself, workspaces of the libraries and gaps of the allocator, for which SPARE
stands. A judge in the same memory is not counted either.
"""

import argparse
import sys
import weakref
from contextlib import contextmanager, nullcontext, suppress
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import GEOMETRIES
from common import UserError, pick_device
from eval_paircomp import IMAGES_PER_PROMPT
from extras.lora import with_adapter
from extras.several import new_mesh, split_model
from model import ImageModel, generate, score
from ppo import ppo_loss
from tokenizer import VQConfig, VQModel, vq_batch_size
from train import PPO, PRESETS

JANUS = {"1B": GEOMETRIES["janus-1b"], "7B": GEOMETRIES["janus-7b"]}
GPUS = (24, 48, 80, 141)  # their makers' GB, which are GiB
PROMPT = 64  # tokens of a prompt
SPARE = 1.5  # GiB
LORA = 16  # rank of an adapter in the table
PROCESSES = (2, 8)  # among which a model is split in the table
GUIDANCE = 5.0


class Alive(TorchDispatchMode):
    """Counts the bytes of the tensors made inside it: those alive now, and each phase's peak."""

    def __init__(self):
        super().__init__()
        self.sizes = {}  # {storage: bytes}
        self.bytes = 0
        self.peak = 0
        self.phases = {}  # {name: peak in bytes}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            tensor = getattr(tensor, "_local_tensor", tensor)  # of a split one: this process' part
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()  # which views share
                key = storage._cdata
                if key not in self.sizes:
                    self.sizes[key] = storage.nbytes()
                    self.bytes += storage.nbytes()
                    self.peak = max(self.peak, self.bytes)
                    weakref.finalize(storage, self.forget, key)
        return out

    def forget(self, key):
        self.bytes -= self.sizes.pop(key)

    def __enter__(self):
        resize = torch.UntypedStorage.resize_

        def watched(storage, size):     # which FSDP gathers layers in, and frees them by
            out = resize(storage, size)
            if storage._cdata in self.sizes:
                self.bytes += storage.nbytes() - self.sizes[storage._cdata]
                self.sizes[storage._cdata] = storage.nbytes()
                self.peak = max(self.peak, self.bytes)
            return out
        self.patch = mock.patch.object(torch.UntypedStorage, "resize_", watched)
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.stop()
        return super().__exit__(*error)

    def phase(self, name):
        """End a phase: what came since the last one is called so."""
        self.phases[name] = max(self.peak, self.phases.get(name, 0))
        self.rest()

    def rest(self):
        """Forget the peak so far."""
        self.peak = self.bytes


class Measured:
    """Says of a GPU what `Alive` says of fake tensors: its allocator's peaks."""

    def __enter__(self):
        self.phases = {}
        return self

    def __exit__(self, *_):
        pass

    def phase(self, name):
        self.phases[name] = max(torch.cuda.max_memory_allocated(), self.phases.get(name, 0))
        self.rest()

    def rest(self):
        torch.cuda.reset_peak_memory_stats()


class Enough(Exception):
    """Raised inside `generate`, whose memory is all in use after a few of its 576 steps."""


def stop_after(calls):
    """A forward hook that raises Enough after so many calls."""
    left = iter(range(calls))

    def hook(*_):
        if next(left, None) is None:
            raise Enough

    return hook


def take_step(step, pool, stream):
    """In place of the capture of a graph, for which a GPU is needed."""
    step()
    raise Enough


@torch.no_grad()
def sample_start(model, prompts, samples):
    """The prefill of the prompts (R, T) and the first steps of sampling, with guidance; all steps
    where a real graph is captured, which calls a head of its own."""
    handle = model.gen_head.register_forward_pre_hook(stop_after(3))
    with suppress(Enough):
        generate(model, prompts, None, samples, GUIDANCE)
    handle.remove()


def stored_policy(cfg, running):
    """A policy as `load_policy` has it on a GPU: matrices in bf16, vectors and the head in fp32."""
    model = ImageModel(cfg)
    tensors = model.state_dict()
    for name, tensor in tensors.items():
        if tensor.dim() > 1 and not name.startswith("gen_head"):
            tensors[name] = tensor.bfloat16()
    model.load_state_dict(tensors, assign=True)
    model.bf16 = True
    model.running = running
    return model


def trained_policy(cfg, running, lora, mesh):
    """A policy in training and its optimizer: fp32 weights and Adam's moments, bf16 compute. lora:
    the rank of an adapter, which is trained in their place on weights as they are stored."""
    model = with_adapter(stored_policy(cfg, running), lora) if lora else ImageModel(cfg)
    model.bf16 = model.recompute = True
    model.running = running
    if mesh:
        split_model(model, mesh)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, fused=True)
    for p in weights:
        p.grad = torch.zeros_like(p)
    optimizer.step()  # makes the moments
    optimizer.zero_grad()
    return model, optimizer


@contextmanager
def fake_mesh(processes):
    """torch's list of processes, of which the others are not there and answer nothing; None for
    one process."""
    if processes == 1:
        yield None
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
    try:
        yield new_mesh(torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def without_adapter(model):
    """The reference of a policy with an adapter."""
    base = ImageModel(model.cfg)
    base.load_state_dict({name: model.state_dict()[name] for name in base.state_dict()},
                         assign=True)
    base.bf16, base.running = model.bf16, model.running
    return base


def some_ids(rows, length):
    """No padding, which is 0: a prompt of nothing else would have no last token."""
    return torch.ones(rows, length, dtype=torch.long)


@torch.no_grad()
def encode_images(vq, n):
    """As many of n images as the tokenizer takes at once."""
    n = min(vq_batch_size(vq.cfg), n)
    vq.encode(torch.empty(n, 3, vq.cfg.image_size, vq.cfg.image_size))


@torch.no_grad()
def decode_images(vq, model, alive, n):
    vq.decode(some_ids(min(vq_batch_size(vq.cfg), n), model.cfg.n_image))
    alive.phase("decode images")


def score_some(model, n, guidance):
    """Log-probs (n, N) of n sequences."""
    return score(model, some_ids(n, PROMPT), some_ids(n, model.cfg.n_image), None, guidance)[0]


def update(model, optimizer, alive, task, sequences):
    """Two backwards of so many sequences each, and an optimizer step."""
    guidance = GUIDANCE if task == "ppo" else 1.0
    for _ in range(2):  # the second finds the gradients of the first
        logprobs = score_some(model, sequences, guidance)
        old = torch.zeros_like(logprobs)
        if task == "ppo":
            loss, _ = ppo_loss(logprobs, old, old, old, 0.2, 0.01)
        else:
            loss = -logprobs.mean()
        loss.backward()
        del logprobs, loss, old
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    alive.phase("forward and backward")
    optimizer.step()
    alive.phase("update")


def rollout(model, reference, vq, alive, prompts, images, tested, pairs):
    """What PPO does before its update; prompts, images, tested, pairs as in `trace`."""
    sample_start(model, some_ids(tested, PROMPT), IMAGES_PER_PROMPT)
    alive.phase("test")
    sample_start(model, some_ids(prompts, PROMPT), images)
    alive.phase("sample")
    decode_images(vq, model, alive, prompts * images)
    truth = 4 * pairs  # each image and its twin's replace a sample
    with torch.no_grad():
        encode_images(vq, 2 * pairs)
        score_some(model, truth, GUIDANCE)
        alive.phase("score ground truth")
        score_some(reference, 2 * pairs * images, GUIDANCE)
        alive.phase("score by the reference")


def trace(cfg, vq_cfg, task, sequences=1, prompts=1, images=1, tested=1, pairs=1, graph=True,
          lora=0, processes=1, measure=False):
    """A task -> {phase: GiB alive at its peak}.

    task: "sampling" of a policy in bf16; "pretrain" or "ppo" as `--preset janus` has them, with
    fp32 master weights, bf16 compute and activations made again in the backward. sequences: of a
    backward; prompts: sampled at once; images: of a prompt; tested: prompts sampled at once in the
    tests of PPO; pairs: of its rollout, all with ground truth; graph: decoding is a CUDA graph,
    which keeps its caches, and bf16 weights of its own, from one rollout to the next; lora: the
    rank of an adapter; processes: among which both models are split (--shard 1), this is what one
    has. measure: on a GPU, with real tensors, by its allocator."""
    running = "graph" if graph else "eager"
    where = torch.device("cuda") if measure else FakeTensorMode()
    capture = nullcontext() if measure else mock.patch("extras.cuda_graph.capture", take_step)
    counter = Measured() if measure else Alive()
    with fake_mesh(processes) as mesh, where, capture, counter as alive:
        if task == "sampling":
            model = stored_policy(cfg, running)
        else:
            model, optimizer = trained_policy(cfg, running, lora, mesh)
        reference = None
        if task == "ppo":               # with an adapter: the same weights without it
            reference = without_adapter(model) if lora else stored_policy(cfg, running)
            if mesh:
                split_model(reference.requires_grad_(False), mesh)
        vq = VQModel(vq_cfg).requires_grad_(False)
        alive.rest()
        alive.phase("at rest")
        if task == "sampling":
            sample_start(model, some_ids(prompts, PROMPT), images)
            alive.phase("sample")
            decode_images(vq, model, alive, prompts * images)
        elif task == "pretrain":
            encode_images(vq, sequences)
            alive.phase("encode images")
        else:
            rollout(model, reference, vq, alive, prompts, images, tested, pairs)
        if task != "sampling":
            update(model, optimizer, alive, task, sequences)
    return {name: peak / 2**30 for name, peak in alive.phases.items()}


def disk(cfg, vq_cfg):
    """What a run folder of PPO needs, in GB: (its state, all of it at the end, at most).

    Weights are the tokenizer in fp32, base model and policy as a checkpoint stores them. The state
    has fp32 weights, those of the state that is kept and Adam's moments. The next state is written
    beside the last one, so that a kill or a full disk leaves the last one whole; that is when a
    folder has the most. At the end there is one state, and the policy beside it."""
    with torch.device("meta"):
        tensors = ImageModel(cfg).state_dict().values()
        tokenizer = 4 * sum(t.numel() for t in VQModel(vq_cfg).state_dict().values())
    policy = sum(t.numel() * (2 if t.dim() > 1 else 4) for t in tensors)
    state = 16 * sum(t.numel() for t in tensors)
    end = tokenizer + 2 * policy + state
    most = tokenizer + policy + 2 * state
    return tuple(n / 1e9 for n in (state, end, most))


def tasks_of(args):
    """{what a row of the table is called: keyword arguments of `trace`}."""
    batch = PRESETS["janus"]["pretrain"]["microbatch"]
    minibatch = 2 * args.pairs * args.samples // PPO.minibatches
    sequences = min(args.microbatch, minibatch)
    # Sampling takes 8 * microbatch sequences at most, and whole prompts.
    prompts = min(2 * args.pairs, max(1, 8 * args.microbatch // args.samples))
    ppo = f"PPO, {sequences} images a backward, {prompts * args.samples} sampled at once"
    tasks = {
        "sample 4 images": dict(task="sampling", prompts=1, images=4),
        "sample 64 images": dict(task="sampling", prompts=32, images=2),
        f"fine-tune, {batch} images a backward": dict(task="pretrain", sequences=batch),
        ppo: dict(
            task="ppo",
            sequences=sequences,
            prompts=prompts,
            images=args.samples,
            tested=max(1, 8 * args.microbatch // IMAGES_PER_PROMPT),
            pairs=args.pairs,
        ),
    }
    tasks[f"{ppo}, `--lora {LORA}`"] = tasks[ppo] | {"lora": LORA}
    for n in PROCESSES:                 # at least a pair a process
        own = {"processes": n, "graph": False, "pairs": max(1, args.pairs // n)}
        own["prompts"] = min(prompts, 2 * own["pairs"])
        tasks[f"{ppo}, `--shard 1`, each of {n} GPUs"] = tasks[ppo] | own
    return tasks


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m extras.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    preset = PRESETS["janus"]["ppo"]
    for name in ("pairs", "samples", "microbatch"):
        help_text = f"of --stage ppo ({preset[name]})"
        parser.add_argument("--" + name, type=int, default=preset[name], help=help_text)
    parser.add_argument("--compile", choices=["auto", "off"], default="auto",
                        help="of --stage ppo (auto: a CUDA graph)")
    parser.add_argument("--measure", action="store_true", help="measure on a GPU, too")
    args = parser.parse_args(argv)
    if args.measure:
        pick_device("cuda")
    if min(args.pairs, args.samples, args.microbatch) < 1:
        raise UserError("--pairs, --samples and --microbatch: should be positive")
    print("| Janus-Pro | task | GiB | fits | the most is alive in |\n|---|---|---|---|---|")
    for size, cfg in JANUS.items():
        for name, settings in tasks_of(args).items():
            graph = args.compile == "auto"
            phases = trace(cfg, VQConfig.janus(), **{"graph": graph} | settings)
            most = max(phases, key=phases.get)
            total = phases[most] + SPARE
            fits = ", ".join(str(gpu) for gpu in GPUS if total <= gpu) or "none"
            rest = phases["at rest"]
            print(f"| {size} | {name} | {total:.1f} | {fits} GB | {most}; at rest {rest:.1f} |",
                  flush=True)
            alone = settings.get("processes", 1) == 1
            if args.measure and alone and total <= torch.cuda.mem_get_info()[1] / 2**30:
                measured = trace(cfg, VQConfig.janus(), graph=graph, measure=True, **settings)
                shown = ", ".join(f"{phase} {phases[phase]:.2f} / {gib:.2f}"
                                  for phase, gib in measured.items())
                reserved = torch.cuda.max_memory_reserved() / 2**30
                print(f"counted / measured: {shown}; reserved {reserved:.2f}", flush=True)
                torch.cuda.empty_cache()
    print(f"\nAlive tensors, counted on fake ones, and {SPARE} GiB for what a GPU adds. A judge in "
          "the same memory is not in it.\n")
    print("Disk of a run folder of PPO, in GB (10^9 bytes):")
    for size, cfg in JANUS.items():
        state, end, most = disk(cfg, VQConfig.janus())
        print(f"{size}: {end:.0f} at its end, {state:.0f} of them the state, and {most:.0f} while "
              "the next state is written beside the last one")


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
