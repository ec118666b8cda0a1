"""Judges: image + prompt -> R = P(yes) / (P(yes) + P(no)) to "Does this image match the description?", in [0, 1].

One interface for all of them:  score(images, prompts) -> tensor (B,), images (B, H, W, 3) uint8, prompts B strings, on the CPU.

Two small networks are embedded. The *training judge* gives the rewards; the *held-out judge*, of another architecture and another
seed, never does, so that it can tell progress from reward hacking (the official release trains and tests with one judge).
`OracleJudge` reads PairWorld pictures without learning and is used to measure, never to train.

Both learn from pairs alone: a picture with its own prompt is a yes, with its twin's prompt a no (FocusDiff's pairs differ in one
detail, so that the judge has to look at details). The loss is a proper scoring rule over as many yes as no, so R is a probability.
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat

from data import ATTRIBUTES, TextTokens, read_caption, read_scene
from tokenizer import ResBlock, Resample, from_pixels

YES, NO = 0, 1                                                          # the two answers of a judge's head


@dataclass
class JudgeConfig:
    kind: str = "attend"                # attend: words look at the picture; reader: convolutions
    text_vocab: int = TextTokens().vocab_size
    n_text: int = 160
    width: int = 96
    n_layer: int = 2
    n_head: int = 4
    grid: int = 8                       # the picture is looked at as grid x grid patches
    patch: int = 4                      # of patch x patch pixels


class AttendLayer(nn.Module):
    """Words look at each other, then at the picture."""

    def __init__(self, cfg):
        super().__init__()
        c, self.n_head = cfg.width, cfg.n_head
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(c) for _ in range(3))
        self.qkv, self.out1 = nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.q, self.kv, self.out2 = nn.Linear(c, c), nn.Linear(c, 2 * c), nn.Linear(c, c)
        self.mlp = nn.Sequential(nn.Linear(c, 2 * c), nn.GELU(), nn.Linear(2 * c, c))

    def attend(self, q, k, v, mask=None):
        q, k, v = (rearrange(t, "b l (h d) -> b h l d", h=self.n_head) for t in (q, k, v))
        return rearrange(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), "b h l d -> b l (h d)")

    def forward(self, x, picture, mask):
        x = x + self.out1(self.attend(*self.qkv(self.norm1(x)).chunk(3, -1), mask))
        x = x + self.out2(self.attend(self.q(self.norm2(x)), *self.kv(picture).chunk(2, -1)))
        return x + self.mlp(self.norm3(x))


class AttendJudge(nn.Module):
    """Cross-attention from the prompt's tokens to the picture's 8x8 features. Each token says how well the picture bears it out."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.patches = nn.Conv2d(3, cfg.width, cfg.patch, stride=cfg.patch)
        self.mix, self.words = ResBlock(cfg.width, cfg.width, 8), nn.Embedding(cfg.text_vocab, cfg.width)
        self.places = nn.Parameter(0.5 * torch.randn(cfg.grid ** 2, cfg.width))
        self.order = nn.Parameter(0.5 * torch.randn(cfg.n_text, cfg.width))
        self.norm = nn.LayerNorm(cfg.width)
        self.layers = nn.ModuleList(AttendLayer(cfg) for _ in range(cfg.n_layer))
        self.support = nn.Sequential(nn.LayerNorm(cfg.width), nn.Linear(cfg.width, 1))
        nn.init.constant_(self.support[1].bias, 3.0)                    # starts near P(yes) = 1/2 for a dozen tokens

    def look(self, picture):
        """(B, 3, H, W) -> features (B, grid*grid, width)."""
        return self.norm(rearrange(self.mix(self.patches(picture)), "b c h w -> b (h w) c") + self.places)

    def forward(self, features, prompts):
        """Features of `look`, prompts (B, T) padded on the left -> logits (B, 2) of yes and no."""
        x = self.words(prompts) + self.order[-prompts.shape[1]:]        # counted from the end, so that padding moves nothing
        real = prompts != TextTokens.pad
        for layer in self.layers:
            x = layer(x, features, real[:, None, None])
        return all_supported(self.support(x)[..., 0], real)


class ReaderJudge(nn.Module):
    """A convolutional pyramid looks at the picture, convolutions read the prompt; each word, knowing its neighbours, then looks once."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, c = cfg, cfg.width
        self.stem = nn.Sequential(nn.Conv2d(3, c // 2, 4, stride=2, padding=1), nn.SiLU(), Resample(c // 2, down=True), nn.SiLU(),
                                  ResBlock(c // 2, c, 8))
        self.places = nn.Parameter(0.5 * torch.randn(c, cfg.grid, cfg.grid))
        self.words = nn.Embedding(cfg.text_vocab, c, padding_idx=TextTokens.pad)
        self.reader = nn.ModuleList(nn.Conv1d(c, c, 5, padding=2) for _ in range(cfg.n_layer))
        self.norm = nn.LayerNorm(c)
        self.attention = nn.MultiheadAttention(c, cfg.n_head, batch_first=True)
        self.support = nn.Sequential(nn.LayerNorm(2 * c), nn.Linear(2 * c, 2 * c), nn.GELU(), nn.Linear(2 * c, 1))
        nn.init.constant_(self.support[-1].bias, 3.0)

    def look(self, picture):
        """(B, 3, H, W) -> features (B, grid*grid, width)."""
        return self.norm(rearrange(self.stem(picture) + self.places, "b c h w -> b (h w) c"))

    def forward(self, features, prompts):
        """Features of `look`, prompts (B, T) padded on the left -> logits (B, 2) of yes and no."""
        real = prompts != TextTokens.pad
        told = self.words(prompts)                                                                      # (B, T, C)
        for conv in self.reader:                        # pads stay zero, as what lies beyond the first word is
            told = (told + F.gelu(conv(told.mT)).mT) * real[..., None]
        seen = self.attention(told, features, features, need_weights=False)[0]
        return all_supported(self.support(torch.cat([told, seen], -1))[..., 0], real)


def all_supported(support, real):
    """P(yes) = product over a prompt's tokens of sigmoid(support): one word that the picture does not bear out is enough for a no.
    support (B, T), real (B, T) bool -> logits (B, 2) of yes and no."""
    log_yes = (F.logsigmoid(support.float()) * real).sum(-1).clamp(max=-1e-6)
    return torch.stack([log_yes, torch.log(-torch.expm1(log_yes))], -1)


def build_judge(cfg):
    return {"attend": AttendJudge, "reader": ReaderJudge}[cfg.kind](cfg)


class NetworkJudge:
    """A trained network as a judge."""

    def __init__(self, network, device="cpu"):
        self.network, self.device, self.text = network.to(device).eval(), device, TextTokens()

    @torch.no_grad()
    def score(self, images, prompts, batch=256):
        """images (B, H, W, 3) uint8, prompts B strings -> R (B,) fp32 on the CPU."""
        ids = torch.from_numpy(self.text.prompts(prompts, self.network.cfg.n_text))
        out = [answer_probability(self.network(self.network.look(from_pixels(images[i:i + batch], self.device)), ids[i:i + batch].to(self.device)))
               for i in range(0, len(images), batch)]
        return torch.cat(out).cpu()


class OracleJudge:
    """1 where every attribute that a PairWorld prompt names is read right off the picture, else 0."""

    def score(self, images, prompts):
        found, names = read_scene(images), list(ATTRIBUTES)
        right = [all(row[names.index(name)] == value for name, value in read_caption(prompt).items()) for row, prompt in zip(found, prompts)]
        return torch.tensor(right, dtype=torch.float32)


def answer_probability(logits):
    """Logits (B, 2) -> R = P(yes) / (P(yes) + P(no)) (B,)."""
    return torch.sigmoid((logits[:, YES] - logits[:, NO]).float())


# ---------------------------------------------------------------------------------------------------------------------
# Training

def judge_loss(network, pictures, prompts):
    """Each picture of P pairs with its own and with its twin's prompt. pictures (P, 2, 3, H, W), prompts (P, 2, T) -> (loss, accuracy).

    The loss is the cross-entropy of the four answers, which is what calibrates R, plus that of choosing a picture's own prompt from
    the two: there everything that the twins share cancels, and the one detail that they do not is learned sooner."""
    features = network.look(pictures.flatten(0, 1)).repeat_interleave(2, 0)                             # (4P, ...): each looked at once
    logits = network(features, repeat(prompts, "p t l -> (p i t) l", i=2)).float()                      # (4P, 2)
    margin = (logits[:, YES] - logits[:, NO]).view(-1, 2, 2)                                            # (P, picture, prompt)
    own = torch.eye(2, dtype=torch.bool, device=margin.device).expand_as(margin)                        # yes on the diagonal
    answers = F.cross_entropy(logits, torch.where(own.flatten(), YES, NO))
    choice = F.cross_entropy(margin.flatten(0, 1), torch.arange(2, device=margin.device).repeat(len(margin)))
    return answers + choice, ((margin > 0) == own).float().mean().detach()


def calibration_error(probability, truth, bins=10):
    """Expected calibration error: the mean over equally filled bins of |mean P(yes) - share of yes|. Two (M,) arrays -> float."""
    order = np.argsort(probability, kind="stable")
    return float(sum(abs(probability[i].mean() - truth[i].mean()) * len(i) for i in np.array_split(order, bins)) / len(order))


def judge_report(judge, images, pairs):
    """Accuracy per category and calibration of a judge on held-out pairs. images (P, 2, H, W, 3) uint8 (they may be reconstructions
    of the pairs' own) -> {category: accuracy, ..., "accuracy": ..., "ece": ...}."""
    pictures = repeat(images, "p i h w c -> (p i t) h w c", t=2)
    prompts = [text for two in pairs.prompts for _ in range(2) for text in two]
    p = judge.score(pictures, prompts).numpy().reshape(-1, 4)                                           # own, twin's, twin's, own
    truth = np.broadcast_to([True, False, False, True], p.shape)
    right = (p > 0.5) == truth
    report = {c: float(right[[k == c for k in pairs.categories]].mean()) for c in dict.fromkeys(pairs.categories)}
    return report | {"accuracy": float(right.mean()), "ece": calibration_error(p.flatten(), truth.flatten())}
