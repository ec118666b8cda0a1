"""Image <-> discrete tokens: the VQ-16 family of LlamaGen and Janus, at any size.

    image -> encoder -> 1x1 conv to few dimensions -> the nearest code of a codebook -> its number
    number -> its code -> 1x1 conv -> decoder -> image

`VQConfig.janus()` is the tokenizer of Janus-Pro (384x384 pixels, 24x24 tokens), `VQConfig()` the
small one of PairWorld (32x32 pixels, 8x8 tokens). Module names are LlamaGen's, so that one class
serves both (tokenizer/tokenizer_image/vq_model.py).

Two things are hard about a codebook, and docs/plain_words.md explains both. The choice of a code
has no gradient, so the decoder's gradient is copied straight through to the encoder. And codebooks
collapse: a few codes get all the latents, the others get no latent and never move. Here codes learn
by a moving average and three things prevent the collapse: k-means++ makes the codes, after a
warm-up without quantization; latents and codes have length 1, so that no code wins by being long;
codes that nobody uses restart at latents that are served badly.

Shapes: B batch, H W image, h w token grid, N = h*w tokens, D code dimension, V codes.
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from common import UserError


@dataclass
class VQConfig:
    image_size: int = 32
    patch: int = 4                      # pixels folded into channels first; 1 in the real weights
    ch: int = 128                       # channels of the first level
    ch_mult: tuple = (1,)               # channels of each level; the image is halved between levels
    num_res_blocks: int = 1
    kernel: int = 1                     # of the convolutions; 3 in the real weights
    attention: bool = False             # at the coarsest level; True in the real weights
    norm_groups: int = 32
    z_channels: int = 64
    codebook_size: int = 320            # V
    codebook_dim: int = 16              # D

    @classmethod
    def janus(cls):
        """The tokenizer of Janus-Pro and LlamaGen's vq_ds16: 16384 codes of 8 dimensions."""
        return cls(384, 1, 128, (1, 1, 2, 2, 4), 2, 3, True, 32, 256, 16384, 8)

    @property
    def grid(self):
        """Tokens along a side: h = w."""
        return self.image_size // self.patch // 2 ** (len(self.ch_mult) - 1)


# -- The network -----------------------------------------------------------------------------------
class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, groups, kernel=3):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, kernel, padding=kernel // 2)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttnBlock(nn.Module):
    """One head of self-attention over the positions of the coarsest level."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x):
        n = self.norm(x)
        q, k, v = (rearrange(f(n), "b c h w -> b 1 (h w) c") for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)                   # (B, 1, h*w, C)
        return x + self.proj_out(rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))        # right and below only, as in the original


class Upsample(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def middle_blocks(c, cfg):
    attention = AttnBlock(c, cfg.norm_groups) if cfg.attention else nn.Identity()
    first = ResBlock(c, c, cfg.norm_groups, cfg.kernel)
    last = ResBlock(c, c, cfg.norm_groups, cfg.kernel)
    return nn.ModuleList([first, attention, last])


class Level(nn.Module):
    """Residual blocks of one resolution, each followed by attention if it is the coarsest, and
    perhaps a change of resolution, under the name that the real weights have for it."""

    def __init__(self, c_in, c_out, n_blocks, attention, cfg, **resample):
        super().__init__()
        self.res = nn.ModuleList()
        self.attn = nn.ModuleList()
        for i in range(n_blocks):
            self.res.append(ResBlock(c_in if i == 0 else c_out, c_out, cfg.norm_groups, cfg.kernel))
            if attention:
                self.attn.append(AttnBlock(c_out, cfg.norm_groups))
        for name, kind in resample.items():             # downsample=Downsample or upsample=Upsample
            self.add_module(name, kind(c_out))
        self.resample = list(resample)

    def forward(self, x):
        for i, res in enumerate(self.res):
            x = res(x)
            if len(self.attn):
                x = self.attn[i](x)
        for name in self.resample:
            x = getattr(self, name)(x)
        return x


class Encoder(nn.Module):
    """(B, 3*patch^2, H/patch, W/patch) -> (B, z_channels, h, w)."""

    def __init__(self, cfg):
        super().__init__()
        widths = [cfg.ch * m for m in cfg.ch_mult]
        self.conv_in = nn.Conv2d(3 * cfg.patch ** 2, cfg.ch, cfg.kernel, padding=cfg.kernel // 2)
        self.conv_blocks = nn.ModuleList()
        c = cfg.ch
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            resample = {} if last else {"downsample": Downsample}
            attention = cfg.attention and last
            self.conv_blocks.append(Level(c, width, cfg.num_res_blocks, attention, cfg, **resample))
            c = width
        self.mid = middle_blocks(c, cfg)
        self.norm_out = nn.GroupNorm(cfg.norm_groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, cfg.z_channels, cfg.kernel, padding=cfg.kernel // 2)

    def forward(self, x):
        x = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """(B, z_channels, h, w) -> (B, 3*patch^2, H/patch, W/patch). From the coarsest level up, with
    one residual block more a level than the encoder."""

    def __init__(self, cfg):
        super().__init__()
        widths = [cfg.ch * m for m in cfg.ch_mult][::-1]
        c = widths[0]
        self.conv_in = nn.Conv2d(cfg.z_channels, c, cfg.kernel, padding=cfg.kernel // 2)
        mid = middle_blocks(c, cfg)
        self.conv_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            last = i == len(widths) - 1
            resample = {} if last else {"upsample": Upsample}
            attention = cfg.attention and i == 0
            n_blocks = cfg.num_res_blocks + 1
            self.conv_blocks.append(Level(c, width, n_blocks, attention, cfg, **resample))
            c = width
        self.mid = mid
        self.norm_out = nn.GroupNorm(cfg.norm_groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, 3 * cfg.patch ** 2, cfg.kernel, padding=cfg.kernel // 2)

    def forward(self, x):
        x = self.conv_in(x)
        for block in (*self.mid, *self.conv_blocks):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VectorQuantizer(nn.Module):
    """The codebook. Latents and codes have length 1, so the nearest code has the largest cosine."""

    def __init__(self, cfg):
        super().__init__()
        self.embedding = nn.Embedding(cfg.codebook_size, cfg.codebook_dim)
        self.embedding.weight.requires_grad_(False)     # moved by `update_codebook`
        self.embedding.weight.data = F.normalize(self.embedding.weight.data, dim=-1)

    def ids(self, z, preference=0.0):
        """Unit latents (B, D, h, w) -> ids (B, N) int64 of the codes of largest cosine plus
        preference, a number or (V,)."""
        flat = rearrange(z, "b d h w -> b (h w) d").float()
        with torch.autocast(z.device.type, enabled=False):      # bf16 would make ties
            codes = F.normalize(self.embedding.weight, dim=-1)
            return (flat @ codes.T + preference).argmax(-1)

    def codes(self, ids, grid):
        """ids (B, N) -> unit codes (B, D, h, w)."""
        return rearrange(F.normalize(self.embedding(ids), dim=-1), "b (h w) d -> b d h w", h=grid)


class VQModel(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] <-> ids (B, N) in [0, V)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quantize = VectorQuantizer(cfg)
        self.quant_conv = nn.Conv2d(cfg.z_channels, cfg.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(cfg.codebook_dim, cfg.z_channels, 1)

    def latents(self, x):
        """(B, 3, H, W) -> unit latents (B, D, h, w) in fp32."""
        z = self.quant_conv(self.encoder(F.pixel_unshuffle(x, self.cfg.patch)))
        return F.normalize(z.float(), dim=1)

    def encode(self, x):
        return self.quantize.ids(self.latents(x))

    def decode_codes(self, z):
        """Unit codes (B, D, h, w) -> (B, 3, H, W)."""
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(z)), self.cfg.patch).float()

    def decode(self, ids):
        return self.decode_codes(self.quantize.codes(ids, self.cfg.grid))


def to_pixels(x):
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8 array."""
    values = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    return rearrange(values, "b c h w -> b h w c").numpy()


def from_pixels(images, device="cpu"):
    """(..., H, W, 3) uint8 array -> (..., 3, H, W) in [-1, 1]."""
    values = torch.from_numpy(images).to(device)
    return rearrange(values, "... h w c -> ... c h w").float() / 127.5 - 1


def vq_batch_size(cfg):
    """Images at once: about 1 GB an activation, and at most 64: more leave a CPU's cache."""
    return min(64, max(1, 2 ** 28 // ((cfg.image_size // cfg.patch) ** 2 * cfg.ch)))


@torch.no_grad()
def encode_images(vq, images, device, batch=None):
    """(B, H, W, 3) uint8 array -> ids (B, N) on the device."""
    batch = batch or vq_batch_size(vq.cfg)
    chunks = [images[i:i + batch] for i in range(0, len(images), batch)]
    return torch.cat([vq.encode(from_pixels(chunk, device)) for chunk in chunks])


@torch.no_grad()
def decode_ids(vq, ids, batch=None):
    """ids (B, N) -> (B, H, W, 3) uint8 array."""
    chunks = ids.split(batch or vq_batch_size(vq.cfg))
    return np.concatenate([to_pixels(vq.decode(chunk)) for chunk in chunks])


# -- Training --------------------------------------------------------------------------------------
def vq_loss(vq, x, quantized, commitment, preference=0.0):
    """One training forward. x (B, 3, H, W) -> (loss, latents (B, D, h, w), ids (B, N) or None,
    reconstruction (B, 3, H, W)).

        loss = mean (x - x')^2 + commitment * mean |z - sg[code]|^2

    sg stops the gradient: the second term pulls a latent to its code, not the code to the latent.
    quantized False is the warm-up, in which the decoder sees the latents. preference (V,), made of
    the codes' usage, is added to the cosines: of two codes that serve about equally well the more
    used one is taken (entropy-constrained quantization, Chou et al. 1989). Otherwise one detail
    scatters over many codes and the transformer has to guess which."""
    z = vq.latents(x)
    if not quantized:
        reconstruction = vq.decode_codes(z)
        return (reconstruction - x).square().mean(), z, None, reconstruction
    ids = vq.quantize.ids(z, preference)
    codes = vq.quantize.codes(ids, vq.cfg.grid)
    # Straight through: forward the code, backward as if it were the latent itself.
    reconstruction = vq.decode_codes(z + (codes - z).detach())
    commit = (z - codes.detach()).square().sum(1).mean()
    loss = (reconstruction - x).square().mean() + commitment * commit
    return loss, z, ids, reconstruction


@torch.no_grad()
def kmeans_codes(vectors, k, generator, iterations=5):
    """Unit vectors (M, D) -> k unit centers (k, D): spherical k-means from k-means++ seeds.

    A seed is drawn in proportion to its distance from the seeds before it, so that a detail in one
    token of a thousand gets a code of its own."""
    if len(vectors) < k:
        raise UserError(f"k-means needs at least {k} latent vectors for {k} codes, got "
                        f"{len(vectors)}; give more images")
    centers = vectors[:k].clone()
    distance = torch.ones(len(vectors))
    for i in range(k):
        centers[i] = vectors[torch.multinomial(distance, 1, generator=generator)[0]]
        distance = torch.minimum(distance, (1 - vectors @ centers[i]).clamp(min=1e-9).cpu())
    for _ in range(iterations):
        ids = (vectors @ centers.T).argmax(-1)
        total = torch.zeros_like(centers).index_add_(0, ids, vectors)
        used = total.square().sum(-1, keepdim=True) > 0
        centers = torch.where(used, F.normalize(total, dim=-1), centers)
    return centers


@torch.no_grad()
def update_codebook(codebook, usage, z, ids, generator, decay=0.95, dead=0.02):
    """Move each used code towards the mean of the latents that chose it, and restart dead codes at
    badly served latents. In place. Returns how many were restarted.

    codebook (V, D) unit vectors; usage (V,) moving average of how often a batch chooses a code, in
    fair shares (1: as often as if all were chosen equally often); z (B, D, h, w) unit latents;
    ids (B, N)."""
    flat = rearrange(z, "b d h w -> (b h w) d")
    ids = ids.flatten()
    count = torch.bincount(ids, minlength=len(codebook)).float()        # (V,)
    total = torch.zeros_like(codebook).index_add_(0, ids, flat)         # (V, D)
    mean = total / count.clamp(min=1)[:, None]
    moved = F.normalize(decay * codebook + (1 - decay) * mean, dim=-1)
    codebook.copy_(torch.where(count[:, None] > 0, moved, codebook))
    usage.mul_(decay).add_(count * len(codebook) / len(ids), alpha=1 - decay)
    restart = usage < dead
    # A latent is drawn in proportion to its distance from its code: rare details get new codes.
    error = (1 - (flat * codebook[ids]).sum(-1)).clamp(min=1e-6).cpu()
    drawn = torch.multinomial(error, len(codebook), replacement=True, generator=generator)
    codebook.copy_(torch.where(restart[:, None], flat[drawn.to(flat.device)], codebook))
    usage.copy_(torch.where(restart, torch.ones_like(usage), usage))
    return int(restart.sum())


def code_statistics(ids, codebook_size):
    """ids, any shape -> (share of the codes in use, perplexity of their distribution)."""
    p = torch.bincount(ids.flatten(), minlength=codebook_size).float() / ids.numel()
    entropy = -torch.special.xlogy(p, p).sum()
    return (p > 0).float().mean().item(), math.exp(entropy.item())
