"""The autoregressive image model: a LLaMA-style decoder laid out as the generation path of Janus.

    text ids -> embed_tokens ------------------\\
    image ids -> gen_embed -> gen_aligner -----> layers -> norm -> gen_head -> logits over image codes

`generate` samples image tokens with a static key-value cache and returns the log-probs that it sampled them with; `score`
returns the same log-probs from one batched forward. Both go through `guided_logits`, so that the distribution that is scored is
the one that was sampled (the official release scores its guided logits divided by w, a softmax w times hotter than the sampler's).

Shapes: B sequences, T text tokens (padded on the left), N image tokens, S = T + N, V image codes, C width, H heads, D head width,
R distinct prompts, G samples of each.
"""
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint

from data import UserError
from pairworld import TextTokens


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
    image_positions: bool = True        # a learned embedding of an image token's place; the real weights have none
    pad: int = 0                        # text id that nobody attends to
    rope_theta: float = 10000.0
    rms_eps: float = 1e-6


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.qkv_proj = nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=False)
        self.o_proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)

    def forward(self, x, rope, mask, cache=None, start=0):
        """x (B, L, C) stands at positions start..start+L-1. mask None = causal, else bool, broadcast to (B, 1, L, start+L)."""
        q, k, v = rearrange(self.qkv_proj(x), "b l (three h d) -> three b h l d", three=3, h=self.n_head)
        q, k = rotate(q, rope), rotate(k, rope)
        if cache is not None:
            stop = start + x.shape[1]
            cache[0][:, :, start:stop], cache[1][:, :, start:stop] = k, v
            k, v = cache[0][:, :, :stop], cache[1][:, :, :stop]
        # One new query sees the whole cache: is_causal would line it up with the first key instead of the last.
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and x.shape[1] > 1)
        return self.o_proj(rearrange(out, "b h l d -> b l (h d)"))


class MLP(nn.Module):
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

    def forward(self, x, rope, mask, cache=None, start=0):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache, start)
        return x + self.mlp(self.post_attention_layernorm(x))


class ImageModel(nn.Module):
    """text makes the ids that embed_tokens knows: pairworld.TextTokens, or janus.JanusText for a Janus checkpoint. With recompute a layer's
    activations are made again in the backward instead of being kept (activation checkpointing)."""

    def __init__(self, cfg, text=None):
        super().__init__()
        self.cfg, self.text, self.recompute, self.bf16 = cfg, text or TextTokens(), False, False
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
            if p.dim() > 1 and not name.startswith("gen_embed"):          # gen_embed: unit normal, like the codes it stands for
                # residual projections start smaller, so that the stream's variance does not grow with depth (GPT-2)
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / (2 * cfg.n_layer) ** 0.5 if residual else (c * 5) ** -0.5)

    def embed_text(self, ids):
        """Text ids (B, T) -> (B, T, C). fp32, whatever the weights are stored in: so is the whole residual stream, in the sampler, in the
        scorer, and in a bf16 reference, which then agrees with the fp32 policy that was copied from it."""
        return self.embed_tokens(ids).float()

    def embed_images(self, ids, start=0):
        """Image ids (B, L), the first of them the picture's token number `start` -> (B, L, C) fp32."""
        x = self.gen_aligner(self.gen_embed(ids)).float()
        return x + self.gen_positions.weight[start:start + ids.shape[1]] if self.cfg.image_positions else x

    def hidden(self, x, mask, caches=None, start=0):
        """Embeddings (B, L, C) at positions start.. -> normed hidden states (B, L, C)."""
        rope = rope_table(self.cfg, start, x.shape[1], x.device)
        for i, layer in enumerate(self.layers):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, mask, use_reentrant=False)
            else:
                x = layer(x, rope, mask, None if caches is None else caches[i], start)
        return self.norm(x)


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available() or name == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}: torch {torch.__version__} sees no such device here; try --device auto")
    return torch.device(name)


def rope_table(cfg, start, length, device):
    """cos and sin (L, D) of the rotary embedding for positions start..start+L-1."""
    d = cfg.n_embd // cfg.n_head
    frequency = cfg.rope_theta ** (-torch.arange(0, d, 2, device=device).float() / d)                   # (D/2,)
    angle = torch.arange(start, start + length, device=device).float()[:, None] * frequency
    angle = torch.cat([angle, angle], -1)                                                               # (L, D)
    return angle.cos(), angle.sin()


def rotate(x, rope):
    """Rotary embedding, LLaMA's half-and-half layout. x (B, H, L, D)."""
    cos, sin = rope
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)


def stored_autocast(model):
    """bf16 compute for a model whose weights are stored in bf16 or that asks for it, and nothing for another: use around sampling and
    scoring."""
    weight = model.embed_tokens.weight
    return torch.autocast(weight.device.type, torch.bfloat16) if weight.dtype != torch.float32 or model.bf16 else nullcontext()


def real_tokens(prompts, pad):
    """Prompts (B, T) -> bool (B, T): False for the padding on the left. Padding after the first token is attended to (`padded_empty`)."""
    return (prompts != pad).cumsum(1) > 0


def padded_empty(prompts, pad):
    """Janus' prompt of the second branch: each prompt (B, T) with padding in place of all but its first token (beginning of text) and its
    last (beginning of image) -> (B, T). Official code: generation_inference.py, tokens[i, 1:-1] = pad_id, without an attention mask: the
    padding *is* attended to and the branch is as long as the prompt. That line is right for unpadded rows; here a row begins after
    its left padding, which nobody attends to."""
    real = real_tokens(prompts, pad)
    inner = real & (real.cumsum(1) > 1)
    inner[:, -1] = False
    return prompts.masked_fill(inner, pad)


def empty_ids(model):
    """What `generate` and `score` want as `empty`: the one prompt (1, E) of the second branch, or None where each prompt has its own."""
    empty = model.text.empty
    return None if empty is None else torch.tensor(empty, device=model.embed_tokens.weight.device)


def usual_guidance(model):
    """w that a policy is sampled with unless told otherwise: Janus' 5 (official code), and 1 for PairWorld's, so young that 2 makes it worse."""
    return 5.0 if model.text.empty is None else 1.0


def full_mask(prompts, pad, length):
    """The mask of a forward over left-padded prompts and the image tokens after them. prompts (B, T) -> None where no prompt is
    padded, so that causality alone does and flash attention can run; else bool (B, 1, length, length)."""
    real = real_tokens(prompts, pad)
    if bool(real.all()):
        return None
    real = F.pad(real, (0, length - prompts.shape[1]), value=True)                                      # (B, length)
    causal = torch.ones(length, length, dtype=torch.bool, device=prompts.device).tril()
    itself = torch.eye(length, dtype=torch.bool, device=prompts.device)       # a pad sees itself: an empty row would be NaN
    return ((causal & real[:, None, :]) | itself)[:, None]


def guided_logits(cond, uncond, guidance):
    """Classifier-free guidance g = u + w (c - u); w = 1 is the conditional logits and needs no second branch. fp32."""
    return cond.float() if uncond is None else uncond.float() + guidance * (cond.float() - uncond.float())


def sampling_logits(cond, uncond, guidance, temperature):
    """Logits of the one distribution pi that is sampled, scored, and regularised: softmax(g / temperature)."""
    return guided_logits(cond, uncond, guidance) / temperature


# ---------------------------------------------------------------------------------------------------------------------
# Sampling

@torch.no_grad()
def generate(model, prompts, empty, samples=1, guidance=1.0, temperature=1.0, generator=None):
    """Sample images. prompts (R, T) int64, padded on the left; empty (1, E), E <= T, is the prompt of the second branch, None makes one
    of each prompt (`padded_empty`).

    Returns tokens (R*G, N) int64 and the log-probs (R*G, N) fp32 they were sampled with; sample g of prompt r is row r*G + g.
    Each distinct prompt is prefilled once and its cache expanded to the G samples. Nothing in the loop waits for the device."""
    cfg, (n_prompts, t) = model.cfg, prompts.shape
    rows, branches = n_prompts * samples, 1 if guidance == 1 else 2
    mask_prompts = prompts
    if branches == 2:
        empty = padded_empty(prompts, cfg.pad) if empty is None else F.pad(empty, (t - empty.shape[1], 0), value=cfg.pad)
        mask_prompts = torch.cat([prompts, empty])                                                      # (2R or R+1, T)
    n_empty = len(mask_prompts) - n_prompts
    repeats = torch.tensor([samples] * n_prompts + [rows // max(1, n_empty)] * n_empty, device=prompts.device)

    mask = full_mask(mask_prompts, cfg.pad, t)
    small = new_caches(cfg, len(mask_prompts), t, model)
    h = model.hidden(model.embed_text(mask_prompts), mask, small)[:, -1]                                # (R, R+1 or 2R, C)
    h = h.repeat_interleave(repeats, 0, output_size=rows * branches)
    caches = new_caches(cfg, rows * branches, t + cfg.n_image - 1, model)
    for (big_k, big_v), (k, v) in zip(caches, small):
        big_k[:, :, :t] = k.repeat_interleave(repeats, 0, output_size=rows * branches)
        big_v[:, :, :t] = v.repeat_interleave(repeats, 0, output_size=rows * branches)
    del small
    if mask is not None:
        real = real_tokens(mask_prompts, cfg.pad).repeat_interleave(repeats, 0, output_size=rows * branches)
        mask = F.pad(real, (0, cfg.n_image), value=True)[:, None, None]                                 # (rows, 1, 1, T+N)

    tokens, logprobs = [], []
    for n in range(cfg.n_image):
        cond, *uncond = model.gen_head(h).chunk(branches)                                               # (R*G, V)
        logits = sampling_logits(cond, uncond[0] if uncond else None, guidance, temperature)
        logp = logits.log_softmax(-1)
        # argmax(p / Exp(1)) draws from p without torch.multinomial, which would wait for the device
        noise = torch.empty_like(logp).exponential_(generator=generator)
        token = (logp - noise.log()).argmax(-1)
        tokens.append(token)
        logprobs.append(logp.gather(-1, token[:, None])[:, 0])
        if n + 1 < cfg.n_image:
            x = model.embed_images(token[:, None], n).repeat(branches, 1, 1)                               # (rows, 1, C)
            h = model.hidden(x, None if mask is None else mask[..., :t + n + 1], caches, t + n)[:, 0]
    return torch.stack(tokens, 1), torch.stack(logprobs, 1)


def new_caches(cfg, rows, length, model):
    """A layer's keys and values (rows, H, length, D), preallocated, for each layer, in the dtype attention computes in."""
    p = model.layers[0].self_attn.qkv_proj.weight
    dtype = torch.get_autocast_dtype(p.device.type) if torch.is_autocast_enabled(p.device.type) else p.dtype
    shape = rows, cfg.n_head, length, cfg.n_embd // cfg.n_head
    return [(torch.empty(shape, device=p.device, dtype=dtype), torch.empty(shape, device=p.device, dtype=dtype)) for _ in model.layers]


# ---------------------------------------------------------------------------------------------------------------------
# Re-scoring

def image_hidden(model, prompts, tokens):
    """Hidden states from which each image token is predicted. prompts (B, T), tokens (B, N) -> (B*N, C)."""
    x = torch.cat([model.embed_text(prompts), model.embed_images(tokens[:, :-1])], 1)                   # (B, T+N-1, C)
    h = model.hidden(x, full_mask(prompts, model.cfg.pad, x.shape[1]))
    return h[:, prompts.shape[1] - 1:].flatten(0, 1)


def empty_hidden(model, prompts, tokens, empty):
    """`image_hidden` of the second branch, empty as in `generate`."""
    return image_hidden(model, padded_empty(prompts, model.cfg.pad) if empty is None else empty.expand(len(tokens), -1), tokens)


def by_chunks(function, chunk, *rows):
    """function over chunks of equal rows, results concatenated. With gradients each chunk is checkpointed, so that its logits are
    gone after it and made again in the backward: B*N*V fp32 values never live at once."""
    parts = zip(*(r.split(chunk) for r in rows))
    if len(rows[0]) > chunk and torch.is_grad_enabled():
        out = [checkpoint(function, *part, use_reentrant=False) for part in parts]
    else:
        out = [function(*part) for part in parts]
    return [torch.cat(o) for o in zip(*out)]


def score(model, prompts, tokens, empty=None, guidance=1.0, temperature=1.0, chunk=8192):
    """log pi(o_t | o_<t, T) of given tokens, and the entropy of pi there, as `generate` samples it.

    prompts (B, T), tokens (B, N), empty (1, E) or None as in `generate` -> logprobs (B, N), entropy (B, N), fp32. The entropy carries no
    gradient. chunk is in tokens: at most chunk*V logits are alive."""
    hidden = [image_hidden(model, prompts, tokens)]
    if guidance != 1:
        hidden.append(empty_hidden(model, prompts, tokens, empty))

    def head(token, cond, uncond=None):
        logits = sampling_logits(model.gen_head(cond), None if uncond is None else model.gen_head(uncond), guidance, temperature)
        logp = logits.log_softmax(-1)                                                                   # (chunk, V)
        with torch.no_grad():
            entropy = -(logp.exp() * logp).sum(-1)
        return logp.gather(-1, token[:, None])[:, 0], entropy

    logprobs, entropy = by_chunks(head, chunk, tokens.flatten(), *hidden)
    return logprobs.view_as(tokens), entropy.view_as(tokens)


@torch.no_grad()
def prompt_divergence(model, prompts, twins, tokens, empty=None, guidance=1.0, temperature=1.0, chunk=8192, other=None):
    """D_t = JS( pi(.|o_<t, T) , pi(.|o_<t, T') ): where on the picture the two prompts of a pair tell different things. It
    depends on the prefix alone, not on the sampled token, so a weight made of it leaves the baseline unbiased.

    prompts (B, T), twins (B, T'), tokens (B, N) -> (B, N) fp32 in nats, 0..log 2. Where there is an `other` model, it is the one
    that is shown the twins."""
    models = model, other or model
    hidden = [image_hidden(m, ids, tokens) for m, ids in zip(models, (prompts, twins))]
    if guidance != 1:
        hidden += [empty_hidden(m, ids, tokens, empty) for m, ids in zip(models, (prompts, twins))]

    def head(*h):
        logits = [m.gen_head(x) for m, x in zip(models * 2, h)]                                         # two, and two more with guidance
        p, q = (sampling_logits(*two, guidance, temperature).log_softmax(-1) for two in zip(logits, logits[2:] or (None, None)))
        middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
        return (0.5 * ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1)),)

    return by_chunks(head, chunk, *hidden)[0].clamp(min=0).view_as(tokens)
