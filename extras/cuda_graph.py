"""The decoding step as a CUDA graph: its hundreds of kernels start with one call.

A graph replays its kernels on the addresses with which it was captured. So all that a step reads
stays where it is from one rollout to the next: caches, inputs and weights. An optimizer's step and
--resume change weights in place.

tests/test_cuda.py runs it on a GPU, tests/test_model.py all but `capture` on a CPU.
"""
from copy import deepcopy

import torch
from torch import nn

from model import decode_step, new_caches, rope_table


def capture(function, pool, stream):
    """A function without arguments, which may be called more than once -> (graph, what the function
    returned: tensors that each replay fills anew).

    pool: another graph's memory, or None. stream: the same for all graphs of a model, because
    libraries make a workspace for each stream, at the first call on it."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        out = function()
    return graph, out


def sampling_copy(model):
    """A model whose linear layers' weights are stored in the dtype that they multiply in: autocast
    would cast fp32 weights anew in each replay. All else are the model's own tensors.

    It wants no gradients: autocast keeps its casts of weights that require them until its context
    ends, and a graph would go on reading what is freed then."""
    shared = {id(p): nn.Parameter(p.detach(), False) for p in model.parameters()}
    copy = deepcopy(model, shared | {id(model.text): model.text, id(model.graphed): None})
    for name, module in copy.named_modules():
        if model.bf16 and isinstance(module, nn.Linear) and not name.startswith("gen_head"):
            module.weight = nn.Parameter(module.weight.bfloat16(), False)
    copy.running = "compile" if "compile" in model.running else "eager"     # what is captured
    return copy


class GraphedStep:
    """`model.decode_step` for one model and one shape of the batch: a graph for each number of
    keys, captured when it is first needed."""

    def __init__(self, model, rows, slots, sampling):
        device = model.embed_tokens.weight.device
        self.rows, self.slots, self.sampling = rows, slots, sampling
        self.model = sampling_copy(model)
        self.rope = rope_table(model.cfg, slots, device)
        self.caches = new_caches(model, rows, slots)
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        self.inputs = None
        self.graphs = {}                # keys -> (graph, its tokens and log-probs)

    def read_weights(self, model):
        """Bring the weights of its own up to date, in place."""
        for own, weight in zip(self.model.parameters(), model.parameters()):
            if own.dtype != weight.dtype:       # all others are the same memory
                own.copy_(weight)

    def __call__(self, model, caches, rope, token, slot, lengths, noise, keys, guidance,
                 temperature):
        """Called as `decode_step` is, but it reads its own model, caches and rope."""
        new = token, slot, lengths, noise
        if self.inputs is None:
            self.inputs = [x.clone() for x in new]
        for buffer, x in zip(self.inputs, new):
            buffer.copy_(x)
        if keys not in self.graphs:
            pool = next((graph.pool() for graph, _ in self.graphs.values()), None)
            arguments = (self.model, self.caches, self.rope, *self.inputs, keys, guidance,
                         temperature)
            self.graphs[keys] = capture(lambda: decode_step(*arguments), pool, self.stream)
        graph, drawn = self.graphs[keys]
        graph.replay()
        return [x.clone() for x in drawn]


def graphed_step(model, rows, slots, *sampling):
    """The model's GraphedStep for so many rows, at least so many slots, and sampling = (guidance,
    temperature). A model keeps its last one alone, so that memory holds one set of caches."""
    step = model.graphed
    if step is None or (step.rows, step.sampling) != (rows, sampling) or step.slots < slots:
        step = model.graphed = None     # frees the old caches first
        model.graphed = GraphedStep(model, rows, slots, sampling)
    model.graphed.read_weights(model)
    for cache in model.graphed.caches:  # as new ones are: a NaN of a diverged step would stay
        cache.zero_()
    return model.graphed
