"""LoRA (arXiv 2106.09685): train a small adapter of each linear layer and leave its weight alone.

    y = W x + B A x,    A (r, in) random, B (out, r) zero at first

    python train.py --stage ppo --lora 8 --lr 2e-3

Without its adapter the policy is the base model. So the reference is the same weights without one,
held once, in bf16 where they came so, and only A, B and their moments are trained and saved. The
usual scale alpha / r is 1 here: --lr does its work.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UserError, load_strictly, load_weights
from model import ImageModel


class Adapted(nn.Linear):
    """A linear layer on another one's weight, with an adapter (fp32) of its own."""

    def __init__(self, linear, rank, generator):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        device = linear.weight.device
        bound = linear.in_features ** -0.5
        down = torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator)
        self.weight = linear.weight
        self.down = nn.Parameter(down.to(device))                               # A (r, in)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))   # B (out, r)

    def forward(self, x):
        return F.linear(x, self.weight) + F.linear(F.linear(x, self.down), self.up)


def with_adapter(base, rank, seed=0):
    """A model on the weights of `base`, whose layers' linear layers have adapters that are trained.
    Nothing else is."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = ImageModel(base.cfg, base.text)
    model.load_state_dict(base.state_dict(), assign=True)       # the same memory
    model.requires_grad_(False).eval()
    model.bf16, model.running, model.lora = base.bf16, base.running, rank
    for layer in model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                setattr(block, name, Adapted(linear, rank, generator))
    return model


def load_adapter(base, path):
    """A base model and a file of its adapter -> the model with it."""
    tensors, metadata = load_weights(path)
    if "lora" not in metadata:
        raise UserError(f"{path}: holds no adapter, though the run's config.json has --lora")
    model = with_adapter(base, metadata["lora"])
    return load_strictly(model, tensors, path)


def merged(weights, adapter):
    """{name: weight} of the base model, and of its adapter -> those of one model: W + B A in fp32
    (in bf16 rounding would change half of the weights each time)."""
    out = dict(weights)
    for name in weights:
        down, up = (adapter.get(name.replace(".weight", part)) for part in (".down", ".up"))
        if down is not None:
            out[name] = weights[name].float() + up.float() @ down.float()
    return out
