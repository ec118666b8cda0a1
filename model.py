"""The autoregressive image model: a LLaMA-style decoder, laid out as the generation path of Janus.

    text ids -> embed_tokens ------------------\\
    image ids -> gen_embed -> gen_aligner -----> layers -> norm -> gen_head -> logits over codes

`generate` samples image tokens with a key-value cache and returns the log-probs that it sampled
them with. `score` returns the log-probs of given tokens from one batched forward. Both make their
logits in `policy_logits`, so that what is scored is the distribution that was sampled. (The
official release scores guided logits divided by w: a softmax w times hotter than the sampler's.)

Shapes: B sequences, T text tokens (padded on the left), N image tokens, S = T + N, V image codes,
C width, H heads, D head width, R distinct prompts, G samples of each.
"""
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch.utils.checkpoint import checkpoint

from common import UserError, load_module, read_json, save_weights, uses_bf16
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
    pad: int = 0                        # text id to which nobody attends
    rope_theta: float = 10000.0
    rms_eps: float = 1e-6


# -- The network -----------------------------------------------------------------------------------
class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.qkv_proj = nn.Linear(cfg.n_embd, 3 * cfg.n_embd, bias=False)
        self.o_proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=False)

    def forward(self, x, rope, mask, cache=None, start=0):
        """x (B, L, C) stands at positions start..start+L-1. mask: None for causal, else bool that
        broadcasts to (B, 1, L, start+L)."""
        qkv = self.qkv_proj(x)
        q, k, v = rearrange(qkv, "b l (three h d) -> three b h l d", three=3, h=self.n_head)
        q = rotate(q, rope)
        k = rotate(k, rope)
        if cache is not None:
            stop = start + x.shape[1]
            cache[0][:, :, start:stop] = k
            cache[1][:, :, start:stop] = v
            k = cache[0][:, :, :stop]
            v = cache[1][:, :, :stop]
        # A single query sees the whole cache; is_causal would show it the first key alone.
        causal = mask is None and x.shape[1] > 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.o_proj(rearrange(out, "b h l d -> b l (h d)"))


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

    def forward(self, x, rope, mask, cache=None, start=0):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache, start)
        return x + self.mlp(self.post_attention_layernorm(x))


class ImageModel(nn.Module):
    """text: what makes prompt ids, pairworld.TextTokens or a checkpoint's own (extras/janus.py).

    recompute: a layer's activations are made again in the backward instead of being kept.
    bf16: matrices multiply in bf16, in sampling and scoring alike."""

    def __init__(self, cfg, text=None):
        super().__init__()
        self.cfg = cfg
        self.text = text or TextTokens()
        self.recompute = False
        self.bf16 = False
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

    def embed_images(self, ids, start=0):
        """Image ids (B, L), the first of them the image's token number `start` -> (B, L, C)."""
        x = self.gen_aligner(self.gen_embed(ids)).float()
        if self.cfg.image_positions:
            x = x + self.gen_positions.weight[start:start + ids.shape[1]]
        return x

    def hidden(self, x, mask, caches=None, start=0):
        """Embeddings (B, L, C) at positions start.. -> normed hidden states (B, L, C)."""
        rope = rope_table(self.cfg, start, x.shape[1], x.device)
        for i, layer in enumerate(self.layers):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, mask, use_reentrant=False)
            else:
                x = layer(x, rope, mask, caches[i] if caches else None, start)
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


def rope_table(cfg, start, length, device):
    """cos and sin (L, D) of the rotary embedding for positions start..start+L-1."""
    d = cfg.n_embd // cfg.n_head
    frequency = cfg.rope_theta ** (-torch.arange(0, d, 2, device=device).float() / d)   # (D/2,)
    position = torch.arange(start, start + length, device=device).float()
    angle = position[:, None] * frequency                               # (L, D/2)
    angle = torch.cat([angle, angle], -1)                               # (L, D)
    return angle.cos(), angle.sin()


def rotate(x, rope):
    """Rotary embedding, LLaMA's half-and-half layout. x (B, H, L, D)."""
    cos, sin = rope
    a, b = x.chunk(2, -1)
    return (x * cos + torch.cat([-b, a], -1) * sin).to(x.dtype)


# -- Prompts: padding, and the empty prompt of guidance --------------------------------------------
def prompt_mask(prompts, pad):
    """Prompts (B, T) -> bool (B, T), False for the padding on the left. Padding after the first
    token counts as a token (`empty_like`)."""
    return (prompts != pad).cumsum(1) > 0


def empty_like(prompts, pad):
    """Janus' empty prompt: each prompt (B, T) with padding in place of all but its first token
    (beginning of text) and its last (beginning of image) -> (B, T).

    The official code (generation_inference.py) sets tokens[i, 1:-1] = pad_id and has no mask: that
    padding *is* attended to, and the empty prompt is as long as the prompt. Here a row begins after
    its left padding, to which nobody attends."""
    mask = prompt_mask(prompts, pad)
    inner = mask & (mask.cumsum(1) > 1)
    inner[:, -1] = False
    return prompts.masked_fill(inner, pad)


def empty_ids(model):
    """What `generate` and `score` want as `empty`: the ids (1, E) of the one empty prompt, or None
    where each prompt has an empty prompt of its own length."""
    empty = model.text.empty
    return None if empty is None else torch.tensor(empty, device=model.embed_tokens.weight.device)


def usual_guidance(model):
    """The w that a policy is sampled with unless asked otherwise: Janus' 5, and 1 for PairWorld."""
    return 5.0 if model.text.empty is None else 1.0


def full_mask(prompts, pad, length):
    """The mask of a forward over left-padded prompts and the image tokens after them.

    prompts (B, T) -> None where no prompt is padded (causality is enough, and flash attention can
    run), else bool (B, 1, length, length)."""
    mask = prompt_mask(prompts, pad)
    if bool(mask.all()):
        return None
    mask = F.pad(mask, (0, length - prompts.shape[1]), value=True)      # (B, length)
    causal = torch.ones(length, length, dtype=torch.bool, device=prompts.device).tril()
    # A pad sees itself: a row that sees nothing would be NaN.
    diagonal = torch.eye(length, dtype=torch.bool, device=prompts.device)
    return ((causal & mask[:, None, :]) | diagonal)[:, None]


def policy_logits(cond, uncond, guidance, temperature):
    """The logits of pi, the one distribution that is sampled, scored, and held to the base model:

        g = u + w (c - u),    pi = softmax(g / tau)

    cond c, given the prompt, and uncond u, given the empty prompt (None for w = 1) -> fp32."""
    if uncond is None:
        return cond.float() / temperature
    return (uncond.float() + guidance * (cond.float() - uncond.float())) / temperature


# -- Sampling --------------------------------------------------------------------------------------
@torch.no_grad()
def generate(model, prompts, empty, samples=1, guidance=1.0, temperature=1.0, generator=None,
             batch=0):
    """Sample images. prompts (R, T) int64, padded on the left; empty (1, E) or None as from
    `empty_ids`; batch: most sequences at once, to fit their cache, 0 for all.

    Returns tokens (R*G, N) int64 and the log-probs (R*G, N) fp32 that they were sampled with.
    Sample g of prompt r is row r*G + g."""
    at_once = max(1, batch // samples) if batch else len(prompts)
    tokens, logprobs = [], []
    with model.autocast():
        for part in prompts.split(at_once):
            h, mask, caches = prefill(model, part, empty, samples, guidance)
            drawn = decode(model, h, mask, caches, part.shape[1], guidance, temperature, generator)
            tokens.append(drawn[0])
            logprobs.append(drawn[1])
    return torch.cat(tokens), torch.cat(logprobs)


def prefill(model, prompts, empty, samples, guidance):
    """Read each distinct prompt once, and copy its keys and values to its G samples.

    prompts (R, T) -> hidden states (rows, C) that predict the first image token, a mask
    (rows, 1, 1, T+N) or None, and the caches. rows = R*G, and twice as many with guidance: the
    second half is the branch of the empty prompt."""
    cfg = model.cfg
    n_prompts, t = prompts.shape
    rows = n_prompts * samples
    repeats = [samples] * n_prompts
    if guidance != 1:
        if empty is None:
            empty = empty_like(prompts, cfg.pad)
        else:
            empty = F.pad(empty, (t - empty.shape[1], 0), value=cfg.pad)
        prompts = torch.cat([prompts, empty])                           # (R+1 or 2R, T)
        repeats += [rows // len(empty)] * len(empty)
        rows *= 2
    repeats = torch.tensor(repeats, device=prompts.device)

    mask = full_mask(prompts, cfg.pad, t)
    small = new_caches(model, len(prompts), t)
    h = model.hidden(model.embed_text(prompts), mask, small)[:, -1]
    h = h.repeat_interleave(repeats, 0, output_size=rows)               # (rows, C)
    caches = new_caches(model, rows, t + cfg.n_image - 1)
    for one, copies in zip(small, caches):
        copies[0][:, :, :t] = one[0].repeat_interleave(repeats, 0, output_size=rows)
        copies[1][:, :, :t] = one[1].repeat_interleave(repeats, 0, output_size=rows)
    if mask is not None:
        mask = prompt_mask(prompts, cfg.pad).repeat_interleave(repeats, 0, output_size=rows)
        mask = F.pad(mask, (0, cfg.n_image), value=True)[:, None, None] # (rows, 1, 1, T+N)
    return h, mask, caches


def decode(model, h, mask, caches, t, guidance, temperature, generator):
    """Draw N tokens, one after the other. Nothing in the loop waits for the device.

    h, mask, caches of `prefill`, t = T -> tokens (R*G, N), log-probs (R*G, N)."""
    branches = 1 if guidance == 1 else 2
    tokens, logprobs = [], []
    for n in range(model.cfg.n_image):
        cond, *uncond = model.logits(h).chunk(branches)               # (R*G, V)
        uncond = uncond[0] if uncond else None
        logp = policy_logits(cond, uncond, guidance, temperature).log_softmax(-1)
        # argmax(p / Exp(1)) draws from p. torch.multinomial would wait for the device.
        noise = torch.empty_like(logp).exponential_(generator=generator)
        # MPS draws exact zeros, 3.3e-8 an element (pytorch#192577), and -log 0 would always win.
        noise.masked_fill_(noise == 0, 3e-8)
        token = (logp - noise.log()).argmax(-1)
        tokens.append(token)
        logprobs.append(logp.gather(-1, token[:, None])[:, 0])
        if n + 1 < model.cfg.n_image:
            x = model.embed_images(token[:, None], n).repeat(branches, 1, 1)    # (rows, 1, C)
            seen = None if mask is None else mask[..., :t + n + 1]
            h = model.hidden(x, seen, caches, t + n)[:, 0]
    return torch.stack(tokens, 1), torch.stack(logprobs, 1)


def new_caches(model, rows, length):
    """For each layer keys and values (rows, H, length, D), in the dtype that attention computes
    in."""
    weight = model.layers[0].self_attn.qkv_proj.weight
    kind = weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    shape = rows, model.cfg.n_head, length, model.cfg.n_embd // model.cfg.n_head

    def new():
        return torch.empty(shape, device=weight.device, dtype=dtype)
    return [(new(), new()) for _ in model.layers]


# -- Scoring ---------------------------------------------------------------------------------------
def image_hidden(model, prompts, tokens):
    """The hidden state from which each image token is predicted. prompts (B, T), tokens (B, N) ->
    (B*N, C)."""
    x = [model.embed_text(prompts), model.embed_images(tokens[:, :-1])]
    x = torch.cat(x, 1)                                                 # (B, T+N-1, C)
    h = model.hidden(x, full_mask(prompts, model.cfg.pad, x.shape[1]))
    return h[:, prompts.shape[1] - 1:].flatten(0, 1)


def empty_hidden(model, prompts, tokens, empty):
    """`image_hidden` of the branch of the empty prompt."""
    if empty is None:
        return image_hidden(model, empty_like(prompts, model.cfg.pad), tokens)
    return image_hidden(model, empty.expand(len(tokens), -1), tokens)


def by_chunks(function, chunk, *rows):
    """function over chunks of equal rows, results concatenated. With gradients each chunk is
    checkpointed: its logits are freed after it and made again in the backward, so that B*N*V fp32
    values never exist at once."""
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
    def head(token, cond, uncond=None):
        uncond = None if uncond is None else model.logits(uncond)
        logits = policy_logits(model.logits(cond), uncond, guidance, temperature)
        logp = logits.log_softmax(-1)                                   # (chunk, V)
        with torch.no_grad():
            entropy = -(logp.exp() * logp).sum(-1)
        return logp.gather(-1, token[:, None])[:, 0], entropy

    with model.autocast():
        hidden = [image_hidden(model, prompts, tokens)]
        if guidance != 1:
            hidden.append(empty_hidden(model, prompts, tokens, empty))
        logprobs, entropy = by_chunks(head, chunk, tokens.flatten(), *hidden)
    return logprobs.view_as(tokens), entropy.view_as(tokens)


@torch.no_grad()
def prompt_divergence(model, prompts, twins, tokens, empty=None, guidance=1.0, temperature=1.0,
                      chunk=8192, other=None):
    """D_t = JS( pi(.|o_<t, T), pi(.|o_<t, T') ): where in the image the two prompts of a pair ask
    for different things. It depends on the prefix alone, not on the token that is drawn there.

    prompts (B, T), twins (B, T'), tokens (B, N) -> (B, N) fp32 in nats, 0..log 2. With an `other`
    model, that one reads the twins."""
    models = model, other or model
    branches = [(models[0], prompts), (models[1], twins)]

    def head(*h):
        logits = [m.logits(x) for m, x in zip(models * 2, h)]         # two, or four if guided
        uncond = logits[2:] or [None, None]
        p = policy_logits(logits[0], uncond[0], guidance, temperature).log_softmax(-1)
        q = policy_logits(logits[1], uncond[1], guidance, temperature).log_softmax(-1)
        middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0))
        from_p = (p.exp() * (p - middle)).sum(-1)
        from_q = (q.exp() * (q - middle)).sum(-1)
        return (0.5 * (from_p + from_q),)

    with model.autocast():
        hidden = [image_hidden(m, ids, tokens) for m, ids in branches]
        if guidance != 1:
            hidden += [empty_hidden(m, ids, tokens, empty) for m, ids in branches]
        divergence = by_chunks(head, chunk, *hidden)[0]
    return divergence.clamp(min=0).view_as(tokens)


# -- Run folders -----------------------------------------------------------------------------------
def run_settings(run, stage):
    """The settings of a stage of a run folder, {} if it was not trained there."""
    path = Path(run) / "config.json"
    return read_json(path, "config of the run").get(stage, {}) if path.is_file() else {}


def load_policy(run, policy, device, dtype=None):
    """A run folder, "pretrain" or "ppo" -> (tokenizer, model), in eval mode. UserError if they do
    not fit each other.

    dtype: fp32, bf16, or auto (bf16 on CUDA); None is what the run was trained in."""
    run = Path(run)
    device = torch.device(device)
    vq = load_module(run / "tokenizer.safetensors", VQModel, VQConfig, device)
    model = load_module(run / f"{policy}.safetensors", ImageModel, ModelConfig, device)
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
    trained = run_settings(run, "ppo") or run_settings(run, "pretrain")
    model.bf16 = uses_bf16(dtype or trained.get("dtype", "auto"), device)
    model.gen_head.float()
    return vq, model if model.bf16 else model.float()


def save_policy(run, policy, model):
    """A model -> RUN/POLICY.safetensors, each weight in the dtype in which it was loaded."""
    tensors = {k: v.to(model.stored.get(k, v.dtype)) for k, v in model.state_dict().items()}
    save_weights(Path(run) / f"{policy}.safetensors", tensors, config=asdict(model.cfg))
