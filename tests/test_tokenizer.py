"""tokenizer.py: shapes, order of the tokens, the code book's three remedies against collapse."""

import pytest
import torch
import torch.nn.functional as F

import tokenizer as tk
from common import UserError
from tokenizer import VQConfig, VQModel

TINY = dict(
    image_size=16,
    patch=2,
    ch=8,
    ch_mult=(1, 2),
    num_res_blocks=1,
    kernel=3,
    attention=True,
    norm_groups=4,
    z_channels=8,
    codebook_size=16,
    codebook_dim=4,
)


@pytest.fixture
def vq():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return VQModel(VQConfig(**TINY)).eval()


def unit(*shape, seed=0, dim=-1):
    return F.normalize(torch.randn(*shape, generator=seeded(seed)), dim=dim)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(n):
    """n images (n, 3, 16, 16) in [-1, 1]."""
    return torch.rand(n, 3, 16, 16) * 2 - 1


# --- the network

SHAPES = [
    ({}, 4),
    ({"patch": 1}, 8),
    ({"ch_mult": (1,)}, 8),
    ({"patch": 4, "ch_mult": (2,), "kernel": 1, "attention": False}, 4),
]


@pytest.mark.parametrize("change, grid", SHAPES)
def test_images_become_a_grid_of_ids_and_come_back(change, grid):
    cfg = VQConfig(**TINY | change)
    vq = VQModel(cfg).eval()
    x = random_images(3)
    ids = vq.encode(x)
    assert cfg.grid == grid
    assert ids.shape == (3, grid**2) and ids.dtype == torch.int64
    assert 0 <= ids.min() and ids.max() < 16
    assert vq.decode(ids).shape == x.shape
    assert vq.latents(x).norm(dim=1).allclose(torch.ones(3, grid, grid), atol=1e-5)


def test_ids_run_row_by_row(vq):
    """Token n is cell (n // grid, n % grid); the transformer and the difference mask rely on it."""
    codes = vq.quantize.codes(torch.arange(16)[None], 4)  # (1, D, 4, 4)
    book = F.normalize(vq.quantize.embedding.weight, dim=-1)
    for n in range(16):
        assert codes[0, :, n // 4, n % 4].allclose(book[n], atol=1e-6)
    assert vq.quantize.ids(codes).tolist() == [list(range(16))]


def test_a_latent_takes_its_nearest_code(vq):
    z = unit(2, 4, 4, 4, dim=1)
    ids = vq.quantize.ids(z)
    book = F.normalize(vq.quantize.embedding.weight, dim=-1)
    for b in range(2):
        for n in range(16):
            distances = (z[b, :, n // 4, n % 4] - book).norm(dim=-1).tolist()
            assert ids[b, n] == min(range(16), key=distances.__getitem__)


def test_batches_change_nothing(vq):
    images = torch.randint(256, (5, 16, 16, 3), dtype=torch.uint8).numpy()
    ids = tk.encode_images(vq, images, "cpu", batch=2)
    assert ids.equal(vq.encode(tk.from_pixels(images)))
    assert (tk.decode_ids(vq, ids, batch=2) == tk.to_pixels(vq.decode(ids))).all()


def test_a_batch_of_the_tokenizer_shrinks_with_the_image():
    """PairWorld's images go through many at once, those of the real weights by the dozen."""
    assert tk.vq_batch_size(VQConfig()) == 64
    assert 1 <= tk.vq_batch_size(VQConfig.janus()) <= 16


def test_pixels_round_trip():
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, 16, 16, 3)
    images = images.contiguous().numpy()
    x = tk.from_pixels(images)
    assert x.min() == -1 and x.max() == 1 and (tk.to_pixels(x) == images).all()
    assert tk.to_pixels(torch.full((1, 3, 2, 2), 7.0)).max() == 255  # clamped, not wrapped around


JANUS_SHAPES = {
    "encoder.conv_in.weight": (128, 3, 3, 3),
    "encoder.conv_blocks.0.res.0.norm1.weight": (128,),
    "encoder.conv_blocks.0.downsample.conv.weight": (128, 128, 3, 3),
    "encoder.conv_blocks.2.res.0.nin_shortcut.weight": (256, 128, 1, 1),
    "encoder.conv_blocks.4.attn.0.q.weight": (512, 512, 1, 1),
    "encoder.conv_blocks.4.attn.1.norm.bias": (512,),
    "encoder.mid.1.proj_out.weight": (512, 512, 1, 1),
    "encoder.norm_out.weight": (512,),
    "encoder.conv_out.weight": (256, 512, 3, 3),
    "quant_conv.weight": (8, 256, 1, 1),
    "quantize.embedding.weight": (16384, 8),
    "post_quant_conv.weight": (256, 8, 1, 1),
    "decoder.conv_in.weight": (512, 256, 3, 3),
    "decoder.mid.0.conv1.weight": (512, 512, 3, 3),
    "decoder.conv_blocks.0.attn.2.k.weight": (512, 512, 1, 1),
    "decoder.conv_blocks.0.upsample.conv.weight": (512, 512, 3, 3),
    "decoder.conv_blocks.4.res.2.conv2.bias": (128,),
    "decoder.conv_out.weight": (3, 128, 3, 3),
}


def test_the_real_tokenizer_has_llamagens_shape_and_names():
    """Built without memory. These names are the ones in the published weights."""
    cfg = VQConfig.janus()
    with torch.device("meta"):
        state = VQModel(cfg).state_dict()
    assert cfg.grid == 24
    assert {k: tuple(state[k].shape) for k in JANUS_SHAPES if k in state} == JANUS_SHAPES
    assert not any("encoder.conv_blocks.4.downsample" in name for name in state)
    assert not any("decoder.conv_blocks.4.upsample" in name for name in state)


def test_halving_pads_right_and_below_as_the_original_does():
    """Symmetric padding has the same shapes and loads the same weights, and shifts every image by
    a pixel."""
    down, x = tk.Downsample(3), torch.randn(1, 3, 6, 6)
    with torch.no_grad():
        halved, weight, bias = down(x)[0], down.conv.weight, down.conv.bias
    assert halved.shape == (3, 3, 3)
    for y in range(3):
        for column in range(3):
            # cut off at the right and below
            window = x[0, :, 2 * y : 2 * y + 3, 2 * column : 2 * column + 3]
            part = weight[:, :, : window.shape[1], : window.shape[2]]
            expected = (part * window).sum((1, 2, 3)) + bias
            assert halved[:, y, column].allclose(expected, atol=1e-5)


def test_doubling_repeats_pixels_before_its_convolution():
    up, x = tk.Upsample(3), torch.randn(1, 3, 4, 4)
    doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert up(x).shape == (1, 3, 8, 8) and up(x).equal(up.conv(doubled))


# --- training


def test_the_straight_through_gradient_reaches_the_encoder_and_not_the_code_book(vq):
    x = random_images(2)
    loss, z, ids, image = tk.vq_loss(vq, x, quantized=True, commitment=0.0)
    loss.backward()
    assert vq.encoder.conv_in.weight.grad.abs().sum() > 0
    assert vq.quantize.embedding.weight.grad is None
    # the forward is the quantized one
    assert ids.equal(vq.encode(x)) and image.allclose(vq.decode(ids), atol=1e-5)


def test_commitment_pulls_latents_to_their_codes(vq):
    x = random_images(2)
    without, z, ids, _ = tk.vq_loss(vq, x, True, 0.0)
    with_it = tk.vq_loss(vq, x, True, 0.25)[0]
    codes = vq.quantize.codes(ids, vq.cfg.grid)
    pull = 0.25 * (2 - 2 * (z * codes).sum(1)).mean()  # |a - b|^2 of unit vectors
    assert (with_it - without).item() == pytest.approx(pull.item(), abs=1e-5)


def test_ids_do_not_depend_on_autocast(vq):
    """Training and encoding have to agree about which code is nearest."""
    codebook, z = unit(256, 8), unit(64, 8, 8, 8, seed=1, dim=1)
    big = tk.VectorQuantizer(VQConfig(**TINY | {"codebook_size": 256, "codebook_dim": 8}))
    big.embedding.weight.data = codebook
    with torch.autocast("cpu", torch.bfloat16):
        ids = big.ids(z)
    assert ids.equal(big.ids(z))


def test_the_warm_up_does_not_quantize(vq):
    x = random_images(2)
    _, z, ids, image = tk.vq_loss(vq, x, quantized=False, commitment=1.0)
    assert ids is None and image.allclose(vq.decode_codes(z), atol=1e-6)


def test_kmeans_finds_clusters_however_rare():
    """k-means++ seeds: a cluster of 3 among 3000 gets its own center."""
    centers, generator = torch.eye(6), seeded()
    clusters = []
    for center, size in zip(centers, [1000, 1000, 600, 300, 97, 3]):
        scattered = center + 0.02 * torch.randn(size, 6, generator=generator)
        clusters.append(F.normalize(scattered, dim=-1))
    vectors = torch.cat(clusters)[torch.randperm(3000, generator=generator)]
    found = tk.kmeans_codes(vectors, 6, generator)
    assert found.norm(dim=-1).allclose(torch.ones(6), atol=1e-5)
    nearest = found @ centers.T
    assert sorted(nearest.argmax(-1).tolist()) == list(range(6))
    assert nearest.amax(-1).min() > 0.999


def test_kmeans_with_too_few_vectors_is_a_user_error():
    with pytest.raises(UserError, match="at least 8"):
        tk.kmeans_codes(unit(5, 4), 8, seeded())


def test_used_codes_move_towards_the_mean_of_their_latents_and_unused_ones_stay():
    codebook, z = unit(8, 4), unit(2, 4, 3, 3, seed=1, dim=1)
    ids = torch.arange(18).view(2, 9) % 3  # codes 0, 1, 2 are chosen
    before, usage = codebook.clone(), torch.ones(8)
    restarted = tk.update_codebook(codebook, usage, z, ids, seeded(), decay=0.9, dead=0.0)
    assert restarted == 0
    latents = z.permute(0, 2, 3, 1).reshape(-1, 4)
    for code in range(8):
        if code > 2:
            assert codebook[code].equal(before[code])
            assert usage[code].item() == pytest.approx(0.9)
            continue
        mean = latents[ids.flatten() == code].mean(0)
        moved = F.normalize(0.9 * before[code] + 0.1 * mean, dim=0)
        assert codebook[code].allclose(moved, atol=1e-6)
        was_near = F.cosine_similarity(before[code], mean, dim=0)
        assert F.cosine_similarity(codebook[code], mean, dim=0) > was_near
        # a third of the choices is 8/3 fair shares
        assert usage[code].item() == pytest.approx(0.9 + 0.1 * 8 / 3, rel=1e-5)


def test_dead_codes_restart_at_badly_served_latents():
    codebook, usage = unit(8, 4), torch.ones(8)
    usage[5:] = 0.0
    # nine latents sit on code 0, one as far away as can be
    z = codebook[:1].T[None, :, :, None].expand(1, 4, 10, 1).clone()
    z[0, :, 9, 0] = -codebook[0]
    ids = torch.zeros(1, 10, dtype=torch.int64)
    assert tk.update_codebook(codebook, usage, z, ids, seeded()) == 3
    assert usage[5:].tolist() == [1, 1, 1]
    assert codebook[5:].allclose(z[0, :, 9, 0].expand(3, 4), atol=1e-6)


def test_a_collapsed_code_book_recovers():
    """All 16 codes in one spot, latents everywhere: restarts spread them until most are in use."""
    torch.manual_seed(0)
    codebook = F.normalize(torch.ones(16, 4) + 1e-3 * torch.randn(16, 4), dim=-1)
    usage, generator = torch.ones(16), seeded()

    def used():
        nearest = (unit(4000, 4, seed=9) @ codebook.T).argmax(-1)
        return tk.code_statistics(nearest, 16)[0]

    for step in range(120):
        z = unit(4, 4, 8, 8, seed=step, dim=1)
        ids = (z.permute(0, 2, 3, 1).reshape(4, 64, 4) @ codebook.T).argmax(-1)
        tk.update_codebook(codebook, usage, z, ids, generator)
    assert used() >= 0.9


STATISTICS = [
    ([3] * 10, 8, 1 / 8, 1.0),
    (list(range(8)), 8, 1.0, 8.0),
    ([0, 0, 1, 1], 4, 0.5, 2.0),
    ([0, 0, 0, 1], 4, 0.5, 4 / 3**0.75),
]


@pytest.mark.parametrize("ids, size, usage, perplexity", STATISTICS)
def test_collapse_is_measured(ids, size, usage, perplexity):
    used, measured = tk.code_statistics(torch.tensor(ids).view(2, -1), size)
    assert used == pytest.approx(usage) and measured == pytest.approx(perplexity, rel=1e-5)
