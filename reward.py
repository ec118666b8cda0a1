"""Judges: image and prompt -> R = P(yes) / (P(yes) + P(no)) to "Does this image match the
description?", in [0, 1].

One interface for all:  score(images, prompts) -> R (B,) fp32 on the CPU, for images (B, H, W, 3)
uint8 and B strings. A judge that answers later also has `submit`.

Two small networks are embedded. The *training judge* gives the rewards. The *held-out judge*, of
another architecture and seed, never does: if its scores rise too, the policy did not merely learn
to please the training judge. `OracleJudge` reads PairWorld without learning. It only measures.

Both networks learn from pairs alone. An image with its own prompt is a yes and with the twin's
prompt a no, and since the prompts of a pair differ in one detail, the judge has to look at details.
A third image, of another pair or a splice, is a no, unless it shows the same as one of the twins.
"""
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat

from common import UserError, first_few, load_strictly, load_weights, save_weights
from pairworld import ATTRIBUTES, TextTokens, read_caption, read_scene
from tokenizer import Downsample, ResBlock, from_pixels

YES, NO = 0, 1                          # the two answers of a judge's head


@dataclass
class JudgeConfig:
    kind: str = "attend"                # attend: patches and a transformer; convolve: convolutions
    text_vocab: int = TextTokens().vocab_size
    n_text: int = 160
    width: int = 96
    n_layer: int = 2
    n_head: int = 4
    grid: int = 4                       # the image is seen as grid x grid patches
    patch: int = 8                      # of patch x patch pixels, PairWorld's cells


# -- The networks ----------------------------------------------------------------------------------
class TextLayer(nn.Module):
    """A layer of a transformer's encoder: each word attends to all words."""

    def __init__(self, c, n_head):
        super().__init__()
        self.n_head = n_head
        self.norm1 = nn.LayerNorm(c)
        self.norm2 = nn.LayerNorm(c)
        self.qkv = nn.Linear(c, 3 * c)
        self.out = nn.Linear(c, c)
        self.mlp = nn.Sequential(nn.Linear(c, 2 * c), nn.GELU(), nn.Linear(2 * c, c))

    def forward(self, x, mask):
        qkv = self.qkv(self.norm1(x))
        q, k, v = rearrange(qkv, "b l (three h d) -> three b h l d", three=3, h=self.n_head)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        x = x + self.out(rearrange(seen, "b h l d -> b l (h d)"))
        return x + self.mlp(self.norm2(x))


class Judge(nn.Module):
    """Images and prompts are encoded once, whatever they are paired with. Then each word, knowing
    its neighbors, attends to the image and says how well the image supports it."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        c = cfg.width
        self.image_positions = nn.Parameter(0.5 * torch.randn(cfg.grid ** 2, c))
        self.token_embedding = nn.Embedding(cfg.text_vocab, c, padding_idx=TextTokens.pad)
        self.norm = nn.LayerNorm(c)
        self.attention = nn.MultiheadAttention(c, cfg.n_head, batch_first=True)
        self.support = nn.Sequential(nn.LayerNorm(2 * c), nn.Linear(2 * c, 2 * c), nn.GELU(),
                                     nn.Linear(2 * c, 1))
        nn.init.constant_(self.support[-1].bias, 3.0)   # P(yes) near 1/2 for a dozen tokens
        if cfg.kind == "attend":
            self.image_encoder = nn.Sequential(nn.Conv2d(3, c, cfg.patch, stride=cfg.patch),
                                               ResBlock(c, c, 8, kernel=1),
                                               ResBlock(c, c, 8, kernel=1))
            self.word_positions = nn.Parameter(0.5 * torch.randn(cfg.n_text, c))
            self.layers = nn.ModuleList(TextLayer(c, cfg.n_head) for _ in range(cfg.n_layer))
        elif cfg.kind == "convolve":
            half = cfg.patch // 2
            self.image_encoder = nn.Sequential(nn.Conv2d(3, c, half, stride=half),
                                               ResBlock(c, c, 8, kernel=1), Downsample(c),
                                               ResBlock(c, c, 8, kernel=1))
            self.layers = nn.ModuleList(nn.Conv1d(c, c, 5, padding=2) for _ in range(cfg.n_layer))
        else:
            raise UserError(f"a judge of kind {cfg.kind!r}: should be attend or convolve")

    def encode_image(self, x):
        """(B, 3, H, W) -> features (B, grid*grid, width)."""
        features = rearrange(self.image_encoder(x), "b c h w -> b (h w) c")
        return self.norm(features + self.image_positions)

    def encode_text(self, ids):
        """Prompts (B, T), padded at the end -> features of their words (B, T, width). Padding
        changes nothing: kind attend masks it, kind convolve keeps it zero."""
        x = self.token_embedding(ids)
        mask = ids != TextTokens.pad
        if self.cfg.kind == "attend":
            x = x + self.word_positions[:ids.shape[1]]
            for layer in self.layers:
                x = layer(x, mask)
        else:
            for layer in self.layers:
                x = (x + F.gelu(layer(x.mT)).mT) * mask[..., None]
        return x

    def forward(self, image_features, text_features, mask):
        """Features of the two encoders, mask (B, T) bool, False for padding -> logits (B, 2).

        P(yes) is the product over a prompt's tokens of sigmoid(support): one word that the image
        does not support is enough for a no."""
        seen, _ = self.attention(text_features, image_features, image_features, need_weights=False)
        support = self.support(torch.cat([text_features, seen], -1))[..., 0]    # (B, T)
        log_yes = (F.logsigmoid(support.float()) * mask).sum(-1).clamp(max=-1e-6)
        log_no = torch.log(-torch.expm1(log_yes))
        return torch.stack([log_yes, log_no], -1)


def answer_probability(logits):
    """Logits (B, 2) -> R = P(yes) / (P(yes) + P(no)) (B,)."""
    return torch.sigmoid((logits[:, YES] - logits[:, NO]).float())


# -- Judges ----------------------------------------------------------------------------------------
class NetworkJudge:
    """A trained network as a judge."""

    def __init__(self, network, device="cpu"):
        self.network = network.to(device).eval()
        self.device = device
        self.text = TextTokens()

    @torch.no_grad()
    def score(self, images, prompts, batch=256):
        network = self.network
        ids = torch.from_numpy(self.text.encode_prompts(prompts, network.cfg.n_text))
        scores = []
        for x, t in zip(torch.from_numpy(images).split(batch), ids.split(batch)):
            t = t.to(self.device)
            image_features = network.encode_image(from_pixels(x.numpy(), self.device))
            logits = network(image_features, network.encode_text(t), t != TextTokens.pad)
            scores.append(answer_probability(logits))
        return torch.cat(scores).cpu()


class OracleJudge:
    """1 where every attribute that a PairWorld prompt names is read right off the image, else 0."""

    def score(self, images, prompts):
        names = list(ATTRIBUTES)
        right = []
        for row, prompt in zip(read_scene(images), prompts):
            asked = read_caption(prompt)
            right.append(all(row[names.index(name)] == value for name, value in asked.items()))
        return torch.tensor(right, dtype=torch.float32)


def submit(judge, images, prompts):
    """Start to score -> a function that waits for the R (B,). A judge without a `submit` of its own
    scores at once."""
    if hasattr(judge, "submit"):
        return judge.submit(images, prompts)
    scores = judge.score(images, prompts)
    return lambda: scores


def save_judges(path, networks):
    """{"train": network, "heldout": network} -> one file."""
    tensors = {f"{name}.{k}": v for name, network in networks.items()
               for k, v in network.state_dict().items()}
    configs = {name: asdict(network.cfg) for name, network in networks.items()}
    save_weights(path, tensors, **configs)


def load_judges(run, device):
    """A run folder -> {"train": judge, "heldout": judge, "oracle": OracleJudge}."""
    path = Path(run) / "reward.safetensors"
    tensors, metadata = load_weights(path)
    judges = {}
    for name in ("train", "heldout"):
        prefix = name + "."
        own = {k.removeprefix(prefix): tensors.pop(k)
               for k in list(tensors) if k.startswith(prefix)}
        cfg = metadata.get(name) or {}
        if set(cfg) != set(asdict(JudgeConfig())):
            raise UserError(f"{path}: its metadata holds no config of the judge {name!r}; not a "
                            "file of the reward stage")
        network = load_strictly(Judge(JudgeConfig(**cfg)), own, path)
        judges[name] = NetworkJudge(network, device)
    if tensors:
        raise UserError(f"{path}: unexpected {first_few(list(tensors))}")
    return judges | {"oracle": OracleJudge()}


# -- Training --------------------------------------------------------------------------------------
def most_alike(prompts):
    """P pairs of prompts -> for each pair that other one which shares most words with it (P,). One
    whose prompts say all that a prompt of the pair says is left out: its image may be right."""
    words = [set(prompt.split()) for pair in prompts for prompt in pair]
    column = {word: n for n, word in enumerate(set.union(*words))}
    has = torch.zeros(len(words), len(column))                          # (2P, W) 1: has this word
    for row, own in zip(has, words):
        row[[column[word] for word in own]] = 1
    says_all = has @ has.T == has.sum(1, keepdim=True)                  # (2P, 2P) row's by column
    may_be_right = rearrange(says_all, "(p i) (q j) -> p q (i j)", i=2, j=2).any(-1)
    of_pair = rearrange(has, "(p i) w -> p i w", i=2).amax(1)           # (P, W)
    shared = torch.where(may_be_right, -1.0, of_pair @ of_pair.T)       # (P, P)
    return shared.fill_diagonal_(-0.5).argmax(1)    # if all others are left out, the pair itself


def splice(images, renderings, strangers, rng):
    """A third image for each pair: a stranger's, that is, of another pair; or a splice, each block
    of which is from one of the pair's images or from a partner, by chance. The partner is the other
    image of the pair or a stranger's. Judges learn to say no to what neither twin shows: two red
    circles and a blue one, or another thing in the right color. A policy draws such images.

    images, renderings (P, 2, 3, H, W), strangers (P,) indices -> third images (P, 1, 3, H, W), and
    whether they show the same as the pair's (P, 2) bool. The renderings decide: a decoder spreads a
    token's change over the image, too faintly to see."""
    grid = int(rng.choice([1, 4, 8]))                   # whole images, objects, or parts of them
    share = 0.5 if grid > 1 else 0.0                    # of own blocks, and of twins as partners
    block = images.shape[-1] // grid
    mask = torch.from_numpy(rng.random((len(images), 1, grid, grid)) < share).to(images.device)
    mask = repeat(mask, "p 1 y x -> p 1 (y h) (x w)", h=block, w=block)         # (P, 1, H, W)
    twin = torch.from_numpy(rng.random((len(images), 1, 1, 1)) < share).to(images.device)
    one = int(rng.integers(2))
    other = 1 - one

    def mix(x):
        partner = torch.where(twin, x[:, other], x[strangers, other])           # (P, 3, H, W)
        return torch.where(mask, x[:, one], partner)[:, None]

    return mix(images), (mix(renderings) == renderings).flatten(2).all(-1)


def judge_loss(network, images, prompts, third=None):
    """images (P, 2, 3, H, W), each with both prompts (P, 2, T) of its pair -> (loss, accuracy).
    third: images, and which prompts they are right for, as from `splice`.

    The loss is the cross-entropy of yes and no, which calibrates R, plus that of choosing the own
    prompt of a twin's image from the two. In the second all that the twins share cancels, so that
    the one detail is learned sooner."""
    own = torch.eye(2, dtype=torch.bool, device=images.device)
    own = own.expand(len(images), 2, 2)                                 # (P, image, prompt)
    if third is not None:
        images = torch.cat([images, third[0]], 1)                       # (P, K=3, 3, H, W)
        own = torch.cat([own, third[1][:, None]], 1)                    # (P, K, 2)
    k = images.shape[1]
    ids = prompts.flatten(0, 1)                                         # (P*2, T)
    image_features = network.encode_image(images.flatten(0, 1)).repeat_interleave(2, 0)
    text_features = repeat(network.encode_text(ids), "(p i) t c -> (p k i) t c", k=k, i=2)
    mask = repeat(ids != TextTokens.pad, "(p i) t -> (p k i) t", k=k, i=2)
    logits = network(image_features, text_features, mask).float()       # (P*K*2, 2)
    margin = (logits[:, YES] - logits[:, NO]).view_as(own)              # (P, K, 2)
    answers = F.cross_entropy(logits, torch.where(own.flatten(), YES, NO))
    right_prompt = torch.arange(2, device=own.device).repeat(len(own))
    choice = F.cross_entropy(margin[:, :2].flatten(0, 1), right_prompt)
    return answers + choice, ((margin > 0) == own).float().mean().detach()


def calibration_error(probability, truth, bins=10):
    """Expected calibration error of two (M,) arrays: over equal intervals of P(yes), |mean P(yes) -
    share of yes|, each interval weighted by its answers."""
    interval = np.minimum((probability * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(interval, probability - truth)).sum() / len(truth))


def judge_report(judge, images, pairs):
    """A judge on pairs: images (P, 2, H, W, 3) uint8, perhaps reconstructions of the pairs' own ->
    {category: accuracy, ..., "accuracy", "ece"}."""
    flat = repeat(images, "p i h w c -> (p i t) h w c", t=2)
    prompts = [prompt for pair in pairs.prompts for prompt in (*pair, *pair)]
    p = judge.score(flat, prompts).numpy().reshape(-1, 4)
    truth = np.broadcast_to([True, False, False, True], p.shape)        # own, twin's, twin's, own
    right = (p > 0.5) == truth
    categories = np.array(pairs.categories)
    report = {c: float(right[categories == c].mean()) for c in dict.fromkeys(categories) if c}
    ece = calibration_error(p.flatten(), truth.flatten())
    return report | {"accuracy": float(right.mean()), "ece": ece}
