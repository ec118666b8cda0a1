"""Judges: image + prompt -> R = P(yes) / (P(yes) + P(no)) to "Does this image match the description?", in [0, 1].

One interface for all of them:  score(images, prompts) -> tensor (B,), images (B, H, W, 3) uint8, prompts B strings, on the CPU.

Two small networks are embedded. The *training judge* gives the rewards; the *held-out judge*, of another architecture and another
seed, never does, so that it can tell progress from reward hacking (the official release trains and tests with one judge).
`OracleJudge` reads PairWorld pictures without learning and is used to measure, never to train.

Both learn from pairs alone: a picture with its own prompt is a yes, with its twin's prompt a no (FocusDiff's pairs differ in one
detail, so that the judge has to look at details), and a splice of the two pictures is a no unless it shows the same as one of them. How
well R is calibrated is measured (`judge_report`).
"""
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat

from data import UserError
from pairworld import ATTRIBUTES, TextTokens, read_caption, read_scene
from tokenizer import ResBlock, Resample, from_pixels

YES, NO = 0, 1                                                          # the two answers of a judge's head


@dataclass
class JudgeConfig:
    kind: str = "attend"                # attend: patches and a transformer; convolve: convolutions on both sides
    text_vocab: int = TextTokens().vocab_size
    n_text: int = 160
    width: int = 96
    n_layer: int = 2
    n_head: int = 4
    grid: int = 4                       # the picture is looked at as grid x grid patches
    patch: int = 8                      # of patch x patch pixels, PairWorld's cells


class ReadLayer(nn.Module):
    """Words look at each other: a layer of a transformer's encoder."""

    def __init__(self, c, n_head):
        super().__init__()
        self.n_head = n_head
        self.norm1, self.norm2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.qkv, self.out = nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.mlp = nn.Sequential(nn.Linear(c, 2 * c), nn.GELU(), nn.Linear(2 * c, c))

    def forward(self, x, real):
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b l (three h d) -> three b h l d", three=3, h=self.n_head)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None])
        x = x + self.out(rearrange(seen, "b h l d -> b l (h d)"))
        return x + self.mlp(self.norm2(x))


class Judge(nn.Module):
    """What both judges share. They look at a picture once and read a prompt once, whatever they are paired with; then each word, knowing
    its neighbours, looks at the picture and says how well it is borne out."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg, c = cfg, cfg.width
        self.places = nn.Parameter(0.5 * torch.randn(cfg.grid ** 2, c))
        self.words = nn.Embedding(cfg.text_vocab, c, padding_idx=TextTokens.pad)
        self.norm = nn.LayerNorm(c)
        self.attention = nn.MultiheadAttention(c, cfg.n_head, batch_first=True)
        self.support = nn.Sequential(nn.LayerNorm(2 * c), nn.Linear(2 * c, 2 * c), nn.GELU(), nn.Linear(2 * c, 1))
        nn.init.constant_(self.support[-1].bias, 3.0)                   # starts near P(yes) = 1/2 for a dozen tokens
        if cfg.kind == "attend":                        # patches, and a transformer
            self.eye = nn.Sequential(nn.Conv2d(3, c, cfg.patch, stride=cfg.patch), ResBlock(c, c, 8, kernel=1), ResBlock(c, c, 8, kernel=1))
            self.order = nn.Parameter(0.5 * torch.randn(cfg.n_text, c))
            self.layers = nn.ModuleList(ReadLayer(c, cfg.n_head) for _ in range(cfg.n_layer))
        elif cfg.kind == "convolve":                    # convolutions on both sides
            self.eye = nn.Sequential(nn.Conv2d(3, c, cfg.patch // 2, stride=cfg.patch // 2), ResBlock(c, c, 8), Resample(c, down=True),
                                     ResBlock(c, c, 8, kernel=1))
            self.layers = nn.ModuleList(nn.Conv1d(c, c, 5, padding=2) for _ in range(cfg.n_layer))
        else:
            raise UserError(f"a judge of kind {cfg.kind!r}: should be attend or convolve")

    def look(self, picture):
        """(B, 3, H, W) -> features (B, grid*grid, width)."""
        return self.norm(rearrange(self.eye(picture), "b c h w -> b (h w) c") + self.places)

    def read(self, prompts):
        """Prompts (B, T), padded on the left -> words in context (B, T, width). Padding moves nothing."""
        x, real = self.words(prompts), prompts != TextTokens.pad
        if self.cfg.kind == "attend":
            x = x + self.order[-prompts.shape[1]:]                      # counted from the end
        for layer in self.layers:                       # for the convolutions pads stay zero, as what lies beyond the first word is
            x = layer(x, real) if self.cfg.kind == "attend" else (x + F.gelu(layer(x.mT)).mT) * real[..., None]
        return x

    def forward(self, features, told, real):
        """Features of `look`, words of `read`, real (B, T) bool: no padding -> logits (B, 2) of yes and no.

        P(yes) = product over a prompt's tokens of sigmoid(support): one word that the picture does not bear out is enough for a no."""
        seen = self.attention(told, features, features, need_weights=False)[0]
        support = self.support(torch.cat([told, seen], -1))[..., 0]                                     # (B, T)
        log_yes = (F.logsigmoid(support.float()) * real).sum(-1).clamp(max=-1e-6)
        return torch.stack([log_yes, torch.log(-torch.expm1(log_yes))], -1)


class NetworkJudge:
    """A trained network as a judge."""

    def __init__(self, network, device="cpu"):
        self.network, self.device, self.text = network.to(device).eval(), device, TextTokens()

    @torch.no_grad()
    def score(self, images, prompts, batch=256):
        """images (B, H, W, 3) uint8, prompts B strings -> R (B,) fp32 on the CPU."""
        ids = torch.from_numpy(self.text.prompts(prompts, self.network.cfg.n_text))
        network, out = self.network, []
        for x, t in zip(torch.from_numpy(images).split(batch), ids.split(batch)):
            t = t.to(self.device)
            out.append(answer_probability(network(network.look(from_pixels(x.numpy(), self.device)), network.read(t), t != TextTokens.pad)))
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

def splice(pictures, renderings, rng):
    """Pictures that are neither of the twins': each block of them from the one or the other, by chance.

    pictures (P, 2, 3, H, W) -> spliced (P, 1, 3, H, W), and whether it shows the same as the twins (P, 2) bool. Pairs alone never show a
    judge two red circles and a blue one; a policy does, and is paid for it by a judge that has not learned to say no. Whether it
    shows the same is told by the renderings: a decoder spreads one token's change over the picture, by less than anybody sees."""
    grid = int(rng.choice([4, 8]))                                                                      # whole objects or parts of them
    mask = torch.from_numpy(rng.random((len(pictures), 1, grid, grid)) < 0.5).to(pictures.device)
    mask = mask.repeat_interleave(pictures.shape[-2] // grid, -2).repeat_interleave(pictures.shape[-1] // grid, -1)
    spliced, shown = (torch.where(mask, x[:, 0], x[:, 1])[:, None] for x in (pictures, renderings))     # (P, 1, 3, H, W)
    return spliced, (shown == renderings).flatten(2).all(-1)


def judge_loss(network, pictures, prompts, renderings=None, rng=None):
    """Each picture of P pairs with both prompts, and where there are renderings (the pictures, before the tokenizer saw any of them) a
    splice of the two as well. pictures, renderings (P, 2, 3, H, W), prompts (P, 2, T) -> (loss, accuracy).

    The loss is the cross-entropy of the answers, which is what calibrates R, plus that of choosing a picture's own prompt from the
    two: there everything that the twins share cancels, and the one detail that they do not is learned sooner."""
    own = torch.eye(2, dtype=torch.bool, device=pictures.device).expand(len(pictures), 2, 2)            # (P, picture, prompt)
    if renderings is not None:
        spliced, equal = splice(pictures, renderings, rng)
        pictures, own = torch.cat([pictures, spliced], 1), torch.cat([own, equal[:, None]], 1)          # K = 3 pictures a pair
    k, t = pictures.shape[1], prompts.flatten(0, 1)
    features = network.look(pictures.flatten(0, 1)).repeat_interleave(2, 0)                             # (P*K*2, ...)
    told, real = (repeat(x, "(p t) ... -> (p k t) ...", k=k, t=2) for x in (network.read(t), t != TextTokens.pad))
    logits = network(features, told, real).float()                                                      # (P*K*2, 2)
    margin = (logits[:, YES] - logits[:, NO]).view_as(own)
    answers = F.cross_entropy(logits, torch.where(own.flatten(), YES, NO))
    choice = F.cross_entropy(margin[:, :2].flatten(0, 1), torch.arange(2, device=own.device).repeat(len(own)))
    return answers + choice, ((margin > 0) == own).float().mean().detach()


def calibration_error(probability, truth, bins=10):
    """Expected calibration error: over `bins` equal intervals of P(yes), the mean of |mean P(yes) - share of yes|, each interval counted
    by its answers. Two (M,) arrays -> float."""
    place = np.minimum((probability * bins).astype(int), bins - 1)
    gaps = [abs(probability[place == i].mean() - truth[place == i].mean()) * (place == i).sum() for i in np.unique(place)]
    return float(sum(gaps) / len(probability))


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
