"""The autoregressive image model: a LLaMA-style decoder, laid out as the generation path of Janus.

    text ids -> embed_tokens ------------------\\
    image ids -> gen_embed -> gen_aligner -----> layers -> norm -> gen_head -> logits over codes

`generate` samples image tokens with a key-value cache and returns the log-probs that it sampled
them with. `score` returns the log-probs of given tokens from one batched forward. Both make their
logits in `policy_logits`, so that what is scored is the distribution that was sampled. (The
official release scores guided logits divided by w: a softmax w times hotter than the sampler's.)

A sequence is its prompt, right behind it its image tokens, and padding at the end: image token t of
a prompt of L tokens stands in slot L + t. Causal attention never looks ahead, so nobody sees the
padding: whole sequences need no mask, whatever the prompts' lengths, and flash attention can run.

Shapes: B sequences, T text tokens of the longest prompt, N image tokens, S slots of a sequence,
K of them in sight, V image codes, C width, H heads, D head width, R distinct prompts, G samples of
each, rows = R*G, and twice as many with guidance.
"""
import functools
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common import UserError, load_module, read_json, save_weights, several, trained, uses_bf16
from pairworld import TextTokens
from tokenizer import VQConfig, VQModel


@dataclass
class ModelConfig:
    text_vocab: int = TextTokens().vocab_size
    image_vocab: int = 320              # V
    n_text: int = 160                   # longest prompt, in tokens
    n_image: int = 64                   # N
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128                   # C
    n_ffn: int = 384
    code_dim: int = 16                  # width of gen_embed, the tokenizer's code dimension
    image_positions: bool = True        # learned positions of image tokens; the real weights: none
    pad: int = 0                        # text id behind a prompt; inside Janus' empty prompt, too
    rope_theta: float = 10000.0
    rms_eps: float = 1e-6


# -- The network -----------------------------------------------------------------------------------
class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.qkv_proj = nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=False)
        self.o_proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)

    def forward(self, x, rope, cache=None, slot=None, mask=None):
        """x (B, L, C): whole sequences, whose keys and values go into the cache (2, B, H, S, D) if
        there is one. Or L = 1, a decoding step: the token goes into slot (B,) of the cache, and
        looks at the cache's first K slots where the mask (B, 1, 1, K) is 0, elsewhere -inf."""
        qkv = self.qkv_proj(x).unflatten(-1, (3, self.n_head, -1))      # (B, L, 3, H, D)
        q, k = rotate(qkv[:, :, :2], rope).unbind(2)                    # (B, L, H, D) each
        q, k, v = (y.transpose(1, 2) for y in (q, k, qkv[:, :, 2]))     # (B, H, L, D) each
        if slot is None:
            if cache is not None:
                cache[:, :, :, :x.shape[1]] = torch.stack([k, v])
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            row = torch.arange(len(x), device=x.device)
            cache[:, row, :, slot] = torch.stack([k, v], 1)[:, :, :, 0] # (B, 2, H, D)
            k, v = cache[:, :, :, :mask.shape[-1]]                      # (B, H, K, D) each
            out = attend(q, k, v, mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))              # (B, L, C)


def attend(q, k, v, mask):
    """Attention of single queries (B, H, 1, D) to keys and values (B, H, K, D); mask is added to
    the scores. In fp32 by its formula: for one query SDPA's kernel takes 1.7 times as long on a
    CPU. In bf16 by SDPA, which keeps the scores in fp32."""
    if q.dtype != torch.float32:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT                           # (B, H, 1, K)
    return (scores + mask).softmax(-1) @ v


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, cfg):
        super().__init__()
        self.gate_up_proj = nn.Linear(cfg.n_embd, 2 * cfg.n_ffn, bias=False)
        self.down_proj = nn.Linear(cfg.n_ffn, cfg.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(cfg.n_embd, cfg.rms_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = nn.RMSNorm(cfg.n_embd, cfg.rms_eps)
        self.mlp = MLP(cfg)

    def forward(self, x, rope, cache=None, slot=None, mask=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, slot, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


@functools.cache
def compiled_layer():
    """`Layer.forward` by torch.compile, once for all layers, models, batches and lengths."""
    return torch.compile(Layer.forward, fullgraph=True, dynamic=True)


class ImageModel(nn.Module):
    """text: what makes prompt ids, pairworld.TextTokens or a checkpoint's own (extras/janus.py).

    recompute: a layer's activations are made again in the backward instead of being kept.
    bf16: matrices multiply in bf16, in sampling and scoring alike.
    running: "eager"; "graph", a decoding step is a CUDA graph; "compile", layers run by
    torch.compile, in decoding and in scoring; "compile, graph"; "sharded", see extras/several.py.
    lora: the rank of its adapter, see extras/lora.py."""

    def __init__(self, cfg, text=None):
        super().__init__()
        self.cfg = cfg
        self.text = text or TextTokens()
        self.recompute = False
        self.bf16 = False
        self.running = "eager"
        self.lora = 0
        self.graphed = None             # extras.cuda_graph.GraphedStep of the last batch
        self.stored = {}                # {name: dtype} of the file; see `save_policy`
        c = cfg.n_embd
        self.embed_tokens = nn.Embedding(cfg.text_vocab, c)
        self.gen_embed = nn.Embedding(cfg.image_vocab, cfg.code_dim)
        self.gen_aligner = nn.Sequential(nn.Linear(cfg.code_dim, c), nn.GELU(), nn.Linear(c, c))
        if cfg.image_positions:
            self.gen_positions = nn.Embedding(cfg.n_image, c)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.n_layer))
        self.norm = nn.RMSNorm(c, cfg.rms_eps)
        self.gen_head = nn.Sequential(nn.Linear(c, c), nn.GELU(), nn.Linear(c, cfg.image_vocab))
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                # GPT-2: the residual stream's variance must not grow with depth
                nn.init.normal_(p, std=0.02 / (2 * cfg.n_layer) ** 0.5)
            elif p.dim() > 1 and not name.startswith("gen_embed"):      # unit normal, as codes are
                nn.init.normal_(p, std=(c * 5) ** -0.5)

    def prompt_ids(self, prompts, dropped=None):
        """B strings -> ids (B, T) on the model's device. UserError if one is too long. dropped (B,)
        bool marks prompts to be replaced by the empty one."""
        ids = torch.from_numpy(self.text.encode_prompts(prompts, self.cfg.n_text, dropped))
        return ids.to(self.embed_tokens.weight.device)

    def embed_text(self, ids):
        """Text ids (B, T) -> (B, T, C) in fp32, whatever the weights are stored in. So is the whole
        residual stream, and a bf16 reference agrees with the fp32 policy copied from it."""
        return self.embed_tokens(ids).float()

    def embed_images(self, ids, number):
        """Image ids (B, L), their places in the image, number (L,) or (B, L) -> (B, L, C)."""
        x = self.gen_aligner(self.gen_embed(ids)).float()
        return x + self.gen_positions(number) if self.cfg.image_positions else x

    def hidden(self, x, rope, caches=None, slot=None, mask=None):
        """Embeddings (B, L, C), rope of their positions -> normed hidden states (B, L, C). caches
        (one a layer), slot and mask as in `Attention`."""
        # Prompts are read once a rollout, which is not worth a compilation.
        compiled = "compile" in self.running and (caches is None or slot is not None)
        forward = compiled_layer() if compiled else Layer.__call__
        x = x.clone() if compiled else x        # for a view dynamo would compile again
        for i, layer in enumerate(self.layers):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(forward, layer, x, rope, use_reentrant=False)
            else:
                x = forward(layer, x, rope, caches[i] if caches else None, slot, mask)
        return self.norm(x)

    def logits(self, h):
        """Hidden states (..., C) -> logits (..., V). In fp32 even under autocast: guidance
        multiplies the head's rounding by w, and PPO's ratios would clip without a change of the
        policy. Whoever loads a model keeps its head in fp32."""
        with torch.autocast(h.device.type, enabled=False):
            return self.gen_head(h.float())

    def autocast(self):
        device = self.embed_tokens.weight.device
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)


def rope_table(cfg, length, device):
    """cos and sin (S, 1, 1, D) of the rotary embedding for positions 0..S-1."""
    d = cfg.n_embd // cfg.n_head
    frequency = cfg.rope_theta ** (-torch.arange(0, d, 2, device=device).float() / d)   # (D/2,)
    angle = torch.arange(length, device=device)[:, None] * frequency    # (S, D/2)
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rotate(x, rope):
    """Rotary embedding, LLaMA's half-and-half layout: with the halves a and b of a head's vector,
    (a, b) -> (a cos - b sin, b cos + a sin). x (B, L, 2, H, D), rope (L, 1, 1, D) or
    (B, 1, 1, 1, D)."""
    cos, sin = rope
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


# -- Prompts: padding, and the empty prompt of guidance --------------------------------------------
def prompt_lengths(prompts, pad):
    """Prompts (B, T), padded at the end -> their lengths (B,). A prompt may hold padding
    (`empty_like`), but never ends on it."""
    number = torch.arange(1, prompts.shape[1] + 1, device=prompts.device)
    return ((prompts != pad) * number).amax(1)


def empty_like(prompts, pad):
    """Janus' empty prompt: each prompt (B, T) with padding in place of all but its first token
    (beginning of text) and its last (beginning of image) -> (B, T).

    The official code (generation_inference.py) sets tokens[i, 1:-1] = pad_id and has no mask: that
    padding *is* attended to, and the empty prompt is as long as the prompt."""
    slot = torch.arange(prompts.shape[1], device=prompts.device)
    inner = (slot > 0) & (slot < prompt_lengths(prompts, pad)[:, None] - 1)
    return prompts.masked_fill(inner, pad)


def empty_prompts(prompts, empty, pad):
    """The empty prompts that guide prompts (R, T): (R, T), or (1, T) of the one (1, E) for all."""
    if empty is None:
        return empty_like(prompts, pad)
    return F.pad(empty, (0, prompts.shape[1] - empty.shape[1]), value=pad)


def empty_ids(model):
    """What `generate` and `score` want as `empty`: the ids (1, E) of the one empty prompt, or None
    where each prompt has an empty prompt of its own length."""
    empty = model.text.empty
    return None if empty is None else torch.tensor(empty, device=model.embed_tokens.weight.device)


def usual_guidance(model):
    """The w that a policy is sampled with unless asked otherwise: Janus' 5, and 1 for PairWorld."""
    return 5.0 if model.text.empty is None else 1.0


def policy_logits(cond, uncond, guidance, temperature):
    """The logits of pi, the one distribution that is sampled, scored, and held to the base model:

        g = u + w (c - u),    pi = softmax(g / tau)

    cond c, given the prompt, and uncond u, given the empty prompt (None for w = 1) -> fp32."""
    if uncond is None:
        return cond.float() / temperature
    return (uncond.float() + guidance * (cond.float() - uncond.float())) / temperature


def log_policy(model, h, guidance, temperature):
    """log pi (n, V) from hidden states (n, C); with guidance (2n, C), the empty prompt's below."""
    cond, *uncond = model.logits(h).chunk(1 if guidance == 1 else 2)
    return policy_logits(cond, *(uncond or [None]), guidance, temperature).log_softmax(-1)


# -- Sampling --------------------------------------------------------------------------------------
KEYS = 16       # in sight of a decoding step: the slots so far, rounded up to a multiple of this


def generate(model, prompts, empty, samples=1, guidance=1.0, temperature=1.0, generator=None,
             batch=0, noise=None):
    """Sample images. prompts (R, T) int64, padded at the end; empty (1, E) or None as from
    `empty_ids`; batch: most sequences at once, to fit their cache, 0 for all; noise (N, R*G)
    uniform in [0, 1): what decides each token, whatever the batch; None draws it.

    Returns tokens (R*G, N) int64 and the log-probs (R*G, N) fp32 that they were sampled with.
    Sample g of prompt r is row r*G + g."""
    if noise is None:
        shape = model.cfg.n_image, len(prompts) * samples
        noise = torch.rand(shape, generator=generator, device=prompts.device)
    at_once = max(1, batch // samples) if batch else len(prompts)
    sharded, drawn = model.running == "sharded", []
    with several().gathered(model) if sharded else torch.inference_mode(), model.autocast():
        for part, columns in zip(prompts.split(at_once), noise.split(at_once * samples, 1)):
            n = columns.shape[1]
            if "graph" in model.running and batch:      # a shorter batch would be another graph
                missing = at_once - len(part)
                part = torch.cat([part, part[-1:].expand(missing, -1)])
                columns = F.pad(columns, (0, missing * samples))        # (N, at_once*G)
            tokens, logprobs = decode(model, part, empty, samples, guidance, temperature, columns)
            drawn.append((tokens[:n], logprobs[:n]))
    # Outside of inference mode: training may use them.
    return tuple(torch.cat(column) for column in zip(*drawn))


def prefill(model, prompts, empty, samples, guidance, rope, caches):
    """Read each distinct prompt once, and copy its keys and values to its G samples.

    prompts (R, T) -> hidden states (rows, C) that predict the first image token, and the prompts'
    lengths (rows,). With guidance the second half of the rows is the branch of the empty prompt.
    caches (2, rows, H, S, D), one a layer, have their first T slots filled."""
    n, t = prompts.shape
    source = torch.arange(n, device=prompts.device).repeat_interleave(samples)          # (R*G,)
    if guidance != 1:
        empty = empty_prompts(prompts, empty, model.cfg.pad)
        prompts = torch.cat([prompts, empty])
        source = torch.cat([source, n + source % len(empty)])           # (rows,)
    lengths = prompt_lengths(prompts, model.cfg.pad)
    small = new_caches(model, len(prompts), t)
    h = model.hidden(model.embed_text(prompts), [table[:t] for table in rope], small)
    h = take(h, lengths[:, None] - 1)[:, 0]                             # (prompts, C)
    for cache, read in zip(caches, small):
        cache[:, :, :, :t] = read[:, source]
    return h[source], lengths[source]


def draw(model, h, noise, guidance, temperature):
    """Hidden states (rows, C), noise (B,) uniform in [0, 1) -> tokens (B,), their log-probs (B,).

    The token is the first one at which the cumulated probabilities exceed the noise, times their
    sum, which rounding leaves near 1; the last token if none does. Nothing waits for the device,
    as torch.multinomial would."""
    logprobs = log_policy(model, h, guidance, temperature)              # (B, V)
    cumulated = logprobs.exp().cumsum(-1)
    token = (cumulated[:, :-1] <= noise[:, None] * cumulated[:, -1:]).sum(-1)
    return token, logprobs.gather(-1, token[:, None])[:, 0]


def decode_step(model, caches, rope, token, slot, lengths, noise, keys, guidance, temperature):
    """Read the last token of each sequence and draw the next one. All tensors keep their shapes
    from one token to the next, and `keys` grows in steps of KEYS, so that it is captured as a few
    CUDA graphs.

    token (B,) goes into slot (rows,) of the caches; lengths (rows,) of the prompts; noise (B,);
    keys: K, how many slots are in sight -> tokens (B,), log-probs (B,)."""
    number = slot - lengths                             # the token's place in its image
    x = model.embed_images(token[:, None], number[:len(token), None])   # (B, 1, C)
    x = x.repeat(1 if guidance == 1 else 2, 1, 1)                       # (rows, 1, C)
    ahead = torch.arange(keys, device=slot.device) > slot[:, None]      # (rows, K)
    mask = torch.zeros_like(ahead, dtype=caches[0].dtype).masked_fill(ahead, -torch.inf)
    rope = [table[slot][:, None] for table in rope]                     # (rows, 1, 1, 1, D)
    h = model.hidden(x, rope, caches, slot, mask[:, None, None])
    return draw(model, h[:, 0], noise, guidance, temperature)


def decode(model, prompts, empty, samples, guidance, temperature, noise):
    """Draw N tokens, one after the other: `generate` for the prompts that go at once.

    noise (N, B) -> tokens (B, N), log-probs (B, N)."""
    n, t = model.cfg.n_image, prompts.shape[1]
    rows = noise.shape[1] * (1 if guidance == 1 else 2)
    # One more than is ever in sight: for a slice of all slots dynamo would compile again.
    slots = round_up(t + n - 1, KEYS) + 1
    if "graph" in model.running:
        from extras.cuda_graph import graphed_step
        step = graphed_step(model, rows, slots, guidance, temperature)
        model, caches, rope = step.model, step.caches, step.rope
    else:
        step = decode_step
        rope = rope_table(model.cfg, slots, prompts.device)
        caches = new_caches(model, rows, slots)
    h, lengths = prefill(model, prompts, empty, samples, guidance, rope, caches)
    drawn = [draw(model, h, noise[0], guidance, temperature)]
    for i in range(1, n):
        drawn.append(step(model, caches, rope, drawn[-1][0], lengths + i - 1, lengths, noise[i],
                          round_up(t + i, KEYS), guidance, temperature))
    return [torch.stack(column, 1) for column in zip(*drawn)]           # (B, N) each


def round_up(n, unit):
    return -(-n // unit) * unit


def new_caches(model, rows, slots):
    """For each layer keys and values (2, rows, H, S, D), in the dtype that attention computes in.
    A decoding step adds -inf to the scores of unused slots and multiplies their values by 0, so
    keys and values there must be finite."""
    weight = model.layers[0].self_attn.qkv_proj.weight
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    shape = 2, rows, model.cfg.n_head, slots, model.cfg.n_embd // model.cfg.n_head
    return [torch.zeros(shape, device=weight.device, dtype=dtype) for _ in model.layers]


# -- Scoring ---------------------------------------------------------------------------------------
def take(x, index):
    """Vectors (B, S, C), index (B, L) -> x[b, index[b, l]] (B, L, C)."""
    first = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (first + index).flatten()).view(*index.shape, -1)


def image_hidden(model, prompts, tokens):
    """The hidden state from which each image token is predicted. prompts (B, T), tokens (B, N) ->
    (B*N, C)."""
    t, n = prompts.shape[1], tokens.shape[1]
    number = torch.arange(n, device=tokens.device)                      # (N,)
    x = [model.embed_text(prompts), model.embed_images(tokens[:, :-1], number[:-1])]
    x = torch.cat(x, 1)                                                 # (B, S, C), S = T+N-1
    lengths = prompt_lengths(prompts, model.cfg.pad)[:, None]           # (B, 1)
    slot = torch.arange(t + n - 1, device=tokens.device)                # (S,)
    # The image moves up to its prompt. At the end stands something that nobody sees.
    source = torch.where(slot < lengths, slot, (slot + t - lengths).clamp(max=t + n - 2))
    h = model.hidden(take(x, source), rope_table(model.cfg, t + n - 1, tokens.device))
    return take(h, lengths - 1 + number).flatten(0, 1)


def both_hidden(model, prompts, tokens, empty, guidance):
    """[`image_hidden`], and with guidance that of the empty prompt, too. One forward does both: of
    two, autograd would hold a gradient of all weights until it has the other."""
    if guidance == 1:
        return [image_hidden(model, prompts, tokens)]
    empty = empty_prompts(prompts, empty, model.cfg.pad).expand(len(prompts), -1)
    return image_hidden(model, torch.cat([prompts, empty]), tokens.repeat(2, 1)).chunk(2)


def by_chunks(function, chunk, *rows):
    """function over chunks of equal rows, results concatenated. If there are several, each is
    checkpointed when gradients are wanted: its logits are freed after it and made again in the
    backward, so that B*N*V fp32 values never exist at once."""
    parts = zip(*(r.split(chunk) for r in rows))
    if len(rows[0]) > chunk and torch.is_grad_enabled():
        out = [checkpoint(function, *part, use_reentrant=False) for part in parts]
    else:
        out = [function(*part) for part in parts]
    return [torch.cat(o) for o in zip(*out)]


def score(model, prompts, tokens, empty=None, guidance=1.0, temperature=1.0, chunk=8192):
    """log pi(o_t | o_<t, T) of given tokens, and the entropy of pi there, as `generate` samples.

    prompts (B, T), tokens (B, N), empty as in `generate` -> logprobs (B, N) and entropy (B, N) in
    nats, fp32. The entropy carries no gradient. At most chunk*V logits exist at once."""
    def head(token, *hidden):
        logp = log_policy(model, torch.cat(hidden), guidance, temperature)          # (chunk, V)
        with torch.no_grad():
            entropy = -(logp.exp() * logp).sum(-1)
        return logp.gather(-1, token[:, None])[:, 0], entropy

    with model.autocast():
        hidden = both_hidden(model, prompts, tokens, empty, guidance)
        logprobs, entropy = by_chunks(head, chunk, tokens.flatten(), *hidden)
    return logprobs.view_as(tokens), entropy.view_as(tokens)


@torch.no_grad()
def prompt_divergence(model, prompts, twins, tokens, empty=None, guidance=1.0, temperature=1.0,
                      chunk=8192, other=None):
    """D_t = JS( pi(.|o_<t, T), pi(.|o_<t, T') ): where in the image the two prompts of a pair ask
    for different things. It depends on the prefix alone, not on the token that is drawn there.

    prompts (B, T), twins (B, T'), tokens (B, N) -> (B, N) fp32 in nats, 0..log 2. With an `other`
    model, that one reads the twins."""
    def head(*hidden):
        half = len(hidden) // 2
        p, q = (log_policy(m, torch.cat(h), guidance, temperature)      # (chunk, V) each
                for m, h in ((model, hidden[:half]), (other or model, hidden[half:])))
        middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
        from_p = (p.exp() * (p - middle)).sum(-1)
        from_q = (q.exp() * (q - middle)).sum(-1)
        return (0.5 * (from_p + from_q),)

    with model.autocast():
        hidden = [*both_hidden(model, prompts, tokens, empty, guidance),
                  *both_hidden(other or model, twins, tokens, empty, guidance)]
        divergence = by_chunks(head, chunk, *hidden)[0]
    return divergence.clamp(min=0).view_as(tokens)


# -- Run folders -----------------------------------------------------------------------------------
def run_settings(run, *stages):
    """The settings of the first of these stages that was trained in a run folder, or {}."""
    path = Path(run) / "config.json"
    config = read_json(path, "config of the run") if path.is_file() else {}
    return next((config[stage] for stage in stages if config.get(stage)), {})


def how_to_run(compile, device):
    """--compile -> ImageModel.running."""
    gpu = device.type == "cuda"
    return {"auto": "graph" if gpu else "eager", "off": "eager",
            "on": "compile, graph" if gpu else "compile"}[compile]


def load_policy(run, policy, device, dtype=None, compile=None):
    """A run folder, "pretrain" or "ppo" -> (tokenizer, model), in eval mode. UserError if they do
    not fit each other.

    dtype: fp32, bf16, or auto (bf16 on CUDA). compile: as the flag of stage ppo. None is what the
    run was trained with."""
    run = Path(run)
    device = torch.device(device)
    vq = load_module(run / "tokenizer.safetensors", VQModel, VQConfig, device)
    adapter = policy == "ppo" and run_settings(run, "ppo").get("lora")
    name = "pretrain" if adapter else policy
    model = load_module(run / f"{name}.safetensors", ImageModel, ModelConfig, device)
    if (run / "text.json").exists():
        from extras.janus import JanusText
        model.text = JanusText(run / "text.json")
    if model.text.pad != model.cfg.pad or model.text.vocab_size > model.cfg.text_vocab:
        raise UserError(f"{run}: {policy}.safetensors was made for another text tokenizer; a Janus "
                        f"run has its own in {run / 'text.json'}")
    ours = vq.cfg.codebook_size, vq.cfg.grid ** 2
    models = model.cfg.image_vocab, model.cfg.n_image
    if ours != models:
        raise UserError(f"{run}: {policy}.safetensors knows {models[0]} codes and {models[1]} "
                        f"tokens, tokenizer.safetensors {ours[0]} and {ours[1]}; train one of them "
                        "again")
    model.stored = {k: v.dtype for k, v in model.state_dict().items()}
    trained = run_settings(run, "ppo", "pretrain")
    model.bf16 = uses_bf16(dtype or trained.get("dtype", "auto"), device)
    model.running = how_to_run(compile or trained.get("compile", "auto"), device)
    model.gen_head.float()
    model = model if model.bf16 else model.float()
    if adapter:
        from extras.lora import load_adapter
        model = load_adapter(model, run / "ppo.safetensors")
    return vq, model


def save_policy(run, policy, model):
    """A model -> RUN/POLICY.safetensors, each weight in the dtype in which it was loaded. Of one
    with an adapter that alone."""
    tensors = {k: v.to(model.stored.get(k, v.dtype)) for k, v in trained(model).items()}
    adapter = {"lora": model.lora} if model.lora else {}
    save_weights(Path(run) / f"{policy}.safetensors", tensors, config=asdict(model.cfg), **adapter)
