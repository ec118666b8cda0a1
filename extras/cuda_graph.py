"""The decoding step as a CUDA graph: its hundreds of kernels start with one call.

A graph replays its kernels on the addresses with which it was captured. So all that a step reads
stays where it is from one rollout to the next: caches, inputs and weights. An optimizer's step and
--resume change weights in place.

Nobody has run this on a GPU yet. tests/test_model.py runs it on a CPU, where a replay is a call.
"""
import torch
from torch import nn

from model import ImageModel, decode_step, new_caches, rope_table


def capture(function, pool):
    """A function without arguments, which may be called more than once -> (graph, what the function
    returned: tensors that each replay fills anew). pool: another graph's memory, or None."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):       # libraries make their workspaces at the first call
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = function()
    return graph, out


def sampling_copy(model):
    """A model whose linear layers are stored in the dtype that they multiply in: autocast would
    cast fp32 weights anew in each replay. All other weights are the model's own tensors.

    It wants no gradients: autocast keeps casts of weights that do until its context ends, and a
    graph would go on reading them."""
    with torch.device("meta"):
        copy = ImageModel(model.cfg, model.text)
    tensors = {name: weight.detach() for name, weight in model.state_dict().items()}
    for name, module in model.named_modules():
        if model.bf16 and isinstance(module, nn.Linear) and not name.startswith("gen_head"):
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"].bfloat16()
    copy.load_state_dict(tensors, assign=True)
    return copy.requires_grad_(False)


class GraphedStep:
    """`model.decode_step` for one model and one shape of the batch: a graph for each number of
    keys, captured when it is first needed."""

    def __init__(self, model, shape):
        self.shape = shape              # rows, slots, guidance, temperature
        self.model = sampling_copy(model)
        self.rope = rope_table(model.cfg, shape[1], model.embed_tokens.weight.device)
        self.caches = new_caches(model, *shape[:2])
        self.inputs = None
        self.graphs = {}                # keys -> (graph, its tokens and log-probs)

    def read_weights(self, model):
        for own, weight in zip(self.model.parameters(), model.parameters()):
            if own.dtype != weight.dtype:       # all others are the same memory
                own.copy_(weight)

    def __call__(self, model, caches, rope, token, slot, lengths, noise, keys, guidance,
                 temperature):
        new = token, slot, lengths, noise
        if self.inputs is None:
            self.inputs = [x.clone() for x in new]
        for buffer, x in zip(self.inputs, new):
            buffer.copy_(x)
        if keys not in self.graphs:
            pool = next((graph.pool() for graph, _ in self.graphs.values()), None)
            arguments = (self.model, self.caches, self.rope, *self.inputs, keys, guidance,
                         temperature)
            self.graphs[keys] = capture(lambda: decode_step(*arguments), pool)
        graph, drawn = self.graphs[keys]
        graph.replay()
        return [x.clone() for x in drawn]


def graphed_step(model, *shape):
    """The model's GraphedStep for (rows, slots, guidance, temperature). It keeps the last one, so
    that memory holds one set of caches."""
    if model.graphed is None or model.graphed.shape != shape:
        model.graphed = None            # frees the old caches first
        model.graphed = GraphedStep(model, shape)
    model.graphed.read_weights(model)
    return model.graphed
