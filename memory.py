"""How much GPU memory Janus-Pro needs, for sampling, fine-tuning and PPO, without a GPU and without weights.

    python memory.py                                        # Janus-Pro-1B and 7B with the settings of `--preset janus`; a minute
    python memory.py --accumulate 28 --rollout-pairs 1      # PPO with others, as flags of train.py

Not a formula: the functions that train.py calls run here on fake tensors, which have shapes but no memory, and every tensor that is alive is
counted. What is counted is therefore what the code asks for. What a GPU adds to it is not: CUDA itself, workspaces of the libraries and
the allocator's gaps, for which SPARE stands. A judge in the same memory is not in it either.
"""
import argparse
import sys
import weakref
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from config import PPO, PRESETS, Pretrain
from data import UserError
from model import ImageModel, ModelConfig, generate, score
from ppo import ppo_loss
from tokenizer import VQConfig, VQModel, vq_batch

JANUS = {  # deepseek-ai/Janus-Pro-*, config.json: language_config
    "1B": ModelConfig(102400, 16384, 16384, 576, 24, 16, 2048, 5632, 8, False),
    "7B": ModelConfig(102400, 16384, 16384, 576, 30, 32, 4096, 11008, 8, False),
}
GPUS = (24, 80, 141)                                                    # their makers' GB, which are GiB
PROMPT, SPARE = 64, 1.5                                                 # tokens a prompt; GiB


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it: those alive now, and the most there were in each phase."""

    def __init__(self):
        super().__init__()
        self.sizes, self.bytes, self.peak, self.phases = {}, 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()      # views share one
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.bytes += storage.nbytes()
                    self.peak = max(self.peak, self.bytes)
                    weakref.finalize(storage, self.gone, storage._cdata)
        return out

    def gone(self, key):
        self.bytes -= self.sizes.pop(key)

    def phase(self, name):
        """What came since the last phase is called so."""
        self.phases[name] = max(self.peak, self.phases.get(name, 0))
        self.peak = self.bytes


class Enough(Exception):
    """Raised inside `generate`, whose memory is all there after a few of its 576 steps."""


def after(calls):
    """A hook that ends what it is called in."""
    left = iter(range(calls))

    def hook(*_):
        if next(left, None) is None:
            raise Enough
    return hook


def draw(model, prompts, samples):
    """The prompts' prefill and the first steps of sampling, with guidance."""
    handle = model.gen_head.register_forward_pre_hook(after(3))
    try:
        with torch.autocast("cpu", torch.bfloat16):
            generate(model, prompts, None, samples, guidance=5.0)
    except Enough:
        handle.remove()


def stored(cfg):
    """A model as a checkpoint stores it: matrices in bf16 (`janus.fill`)."""
    model = ImageModel(cfg)
    model.load_state_dict({k: v.bfloat16() if v.dim() > 1 else v for k, v in model.state_dict().items()}, assign=True)
    return model.requires_grad_(False)


def trace(cfg, vq_cfg, task, sequences=1, rollout=1, pictures=1, prompts=1):
    """{phase: GiB alive at its peak} of a task: "sampling" in bf16, "pretrain" or "ppo" as `--preset janus` has them (fp32 master weights, bf16
    compute, recompute; guidance 5, in pretrain none).

    sequences: pictures a backward; rollout: prompts sampled at once; pictures: a prompt's; prompts: of a step of ppo."""
    ids = lambda n, length: torch.zeros(n, length, dtype=torch.long)
    fp32 = task != "sampling"
    # fake tensors have no values to find padding in
    with FakeTensorMode(), Alive() as alive, mock.patch("model.full_mask", lambda prompts, pad, length: None):
        model, vq = ImageModel(cfg) if fp32 else stored(cfg), VQModel(vq_cfg).requires_grad_(False)
        model.recompute, reference = True, stored(cfg) if task == "ppo" else None
        if fp32:
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()                            # the moments are there from now on
            optimizer.zero_grad()
        alive.peak = alive.bytes
        alive.phase("at rest")

        if task != "pretrain":
            with torch.no_grad():
                draw(model, ids(rollout, PROMPT), pictures)
                alive.phase("draw")
        with torch.no_grad():
            n = min(vq_batch(vq_cfg), rollout * pictures)
            if task == "pretrain":
                vq.encode(torch.empty(min(vq_batch(vq_cfg), sequences), 3, vq_cfg.image_size, vq_cfg.image_size))
                alive.phase("encode pictures")
            else:
                vq.decode(ids(n, cfg.n_image))
                alive.phase("decode pictures")
        if task == "ppo":
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                score(reference, ids(prompts * pictures, PROMPT), ids(prompts * pictures, cfg.n_image), None, 5.0)
            alive.phase("score by the reference")
        if fp32:
            for _ in range(2):                          # the second finds the gradients of the first
                with torch.autocast("cpu", torch.bfloat16):
                    logprobs, _ = score(model, ids(sequences, PROMPT), ids(sequences, cfg.n_image), None, 5.0 if task == "ppo" else 1.0)
                old = torch.empty_like(logprobs)
                loss = ppo_loss(logprobs, old, old, old, 0.2, 0.01)[0] if task == "ppo" else -logprobs.mean()
                loss.backward()
                del logprobs, loss, old
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            alive.phase("forward and backward")
            optimizer.step()
            alive.phase("update")
    return {name: peak / 2 ** 30 for name, peak in alive.phases.items()}


def main(argv=None):
    ppo, pre = PRESETS["janus"]["ppo"], PRESETS["janus"]["pretrain"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for name in ("pairs", "samples", "accumulate", "rollout_pairs"):
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=ppo[name], help=f"of --stage ppo ({ppo[name]})")
    args = parser.parse_args(argv)
    if min(vars(args).values()) < 1:
        raise UserError("--pairs, --samples, --accumulate and --rollout-pairs: should be positive")
    batch, minibatch = Pretrain.batch // pre["accumulate"], args.pairs * 2 * args.samples // PPO.minibatches
    sequences = -(-minibatch // args.accumulate)
    tasks = {
        "sample 4 pictures": dict(task="sampling", rollout=1, pictures=4),
        "sample 64 pictures": dict(task="sampling", rollout=32, pictures=2),
        f"fine-tune, {batch} pictures a backward": dict(task="pretrain", sequences=batch),
        f"PPO, {sequences} pictures a backward, {2 * args.rollout_pairs * args.samples} sampled at once": dict(
            task="ppo", sequences=sequences, rollout=2 * args.rollout_pairs, pictures=args.samples, prompts=2 * args.pairs)}
    print(f"| Janus-Pro | task | GiB | fits | the most is alive in |{chr(10)}|---|---|---|---|---|")
    for size, cfg in JANUS.items():
        for name, settings in tasks.items():
            phases = trace(cfg, VQConfig.janus(), **settings)
            most, total = max(phases, key=phases.get), max(phases.values()) + SPARE
            fits = ", ".join(f"{g}" for g in GPUS if total <= g) or "none"
            print(f"| {size} | {name} | {total:.1f} | {fits} GB | {most}; at rest {phases['at rest']:.1f} |", flush=True)
    print(f"{chr(10)}Alive tensors, counted on fake ones, and {SPARE} GiB for what a GPU adds; not measured on a GPU. A judge in the same memory is not in it.")


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
