"""Several processes, as torchrun starts them, with a run folder that all of them see:

    torchrun --nproc-per-node 8 train.py --stage ppo --out runs/janus ...

Each samples and judges its share of a rollout's pairs and takes its share of each minibatch. All
see all results, take the same decisions, and step with the sum of their gradients. Which numbers
are drawn follows from (seed, stage, step) and the row, so that 1, 2 and 4 processes train the same
run up to rounding, and a state that N have saved is resumed by any number.

Each holds a replica. With --shard 1 the layers are split (torch's FSDP2): weights, gradients and
moments. They are gathered once for a rollout, and one layer at a time for scoring and the update.
"""
import os
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import distribute_tensor

from common import UserError, pick_device

MINUTES = 60            # that a process waits for the others, e.g. for a slow judge, before it ends


# -- Beginning and end -----------------------------------------------------------------------------
@contextmanager
def joined(device):
    """This process takes part until the context ends. Only the first one prints. If one fails, all
    end: whoever fails first says why, and the others, which then wait for it in vain, say nothing.
    """
    on_cuda = pick_device(device).type == "cuda"
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, size = next(rendezvous("env://"))
    dist.init_process_group("nccl" if on_cuda else "gloo", store=dist.PrefixStore("run", store),
                            rank=rank, world_size=size, timeout=timedelta(minutes=MINUTES))
    try:
        with open(os.devnull, "w") as nowhere:
            out, err = (sys.stdout, sys.stderr) if rank == 0 else (nowhere, nowhere)
            with redirect_stdout(out), redirect_stderr(err):
                yield
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            error = "stopped at once; what was saved before is intact, go on with --resume"
        elif is_lost(error):
            error = "another process of this run has ended"
        elif not isinstance(error, (UserError, OSError)):
            raise
        if is_first(store):
            print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)             # without waiting for processes that are gone
    dist.destroy_process_group()


def is_lost(error):
    """Whether an error says that another process cannot be reached."""
    words = ("gloo", "NCCL", "Connection", "peer")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def is_first(store):
    """Whether no other process said why it ends. torchrun keeps the store."""
    try:
        return store.add("said", 1) == 1
    except RuntimeError:        # torchrun is gone, too
        return True


# -- What processes say to each other --------------------------------------------------------------
def reach(collective, *args):
    """A collective of torch.distributed; UserError if a process is gone."""
    try:
        collective(*args)
    except RuntimeError as e:
        reason = str(e).splitlines()[0][:100]
        raise UserError(f"another process of this run has ended ({reason})") from e


def on_device(x):
    """NCCL moves tensors of a GPU alone."""
    return x.cuda() if dist.get_backend() == "nccl" else x.contiguous()


def gather_rows(n, own):
    """Rows of each process' `common.share(n)` -> all n rows."""
    size = dist.get_world_size()
    rows = on_device(own.new_empty(n, *own.shape[1:]))
    for rank in range(size):
        part = rows[n * rank // size:n * (rank + 1) // size]
        if rank == dist.get_rank():
            part.copy_(own)
        reach(dist.broadcast, part, rank)
    return rows.to(own.device)


def add_up(x):
    """The sum of a tensor over the processes."""
    moved = on_device(x)
    reach(dist.all_reduce, moved)
    return moved.to(x.device)


def add_up_and_clip(parameters, most):
    """What torch's clip_grad_norm_ does, with the sum of the processes' gradients. Of weights that
    are split FSDP has made the mean already."""
    squares = torch.zeros(2)                            # of what is split, and of what is whole
    parameters = [p for p in parameters if p.requires_grad]
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        split = hasattr(p.grad, "to_local")
        p.grad = p.grad * dist.get_world_size() if split else add_up(p.grad)
        own = p.grad.to_local() if split else p.grad
        squares[0 if split else 1] += own.square().sum().cpu()
    norm = (add_up(squares[:1]) + squares[1:]).sqrt().squeeze()
    scale = min(1.0, most / (norm.item() + 1e-6))
    for p in parameters:
        p.grad *= scale
    return norm


# -- Split models ----------------------------------------------------------------------------------
def split_model(model, mesh=None):
    """Split an ImageModel among the processes, in place: each layer, and what is called outside of
    the layers. One that is trained must be in fp32. mesh: torch's list of the processes."""
    mesh = mesh or new_mesh(model.embed_tokens.weight.device)
    dtype = torch.bfloat16 if model.bf16 else None
    precision = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    for name, module in model.named_children():
        if name == "layers":
            for layer in module:
                for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                    fully_shard(norm, mesh=mesh, reshard_after_forward=True)        # in fp32
                fully_shard(layer, mesh=mesh, mp_policy=precision, reshard_after_forward=True)
        else:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)       # the root: it frees what one backward needed
    for name in ("embed_text", "embed_images", "hidden", "logits"):
        register_fsdp_forward_method(model, name)
    model.running = "sharded"


def new_mesh(device):
    return init_device_mesh(device.type, (dist.get_world_size(),))


@contextmanager
def gathered(model):
    """The model is whole in here, for many short forwards without gradients. No inference mode:
    weights gathered in it could not be trained."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False)
    try:
        with torch.no_grad():
            yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True)
            part.reshard()


def split_like(x, own):
    """A whole tensor, which all processes have -> split as `own` is."""
    mesh = own.device_mesh
    return distribute_tensor(x.to(mesh.device_type), mesh, own.placements)


def joined_parts(x):
    """What `split_like` splits, put together. NCCL joins tensors of a GPU alone."""
    return x.to(x.device_mesh.device_type).full_tensor()
