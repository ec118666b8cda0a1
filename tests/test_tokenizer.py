"""tokenizer.py: shapes, the code book's three remedies against collapse, and checkpoints that survive anything."""
import os
import re

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import tokenizer as tk
from data import UserError
from tokenizer import VQConfig, VQModel

TINY = dict(image_size=16, patch=2, ch=8, ch_mult=(1, 2), num_res_blocks=1, kernel=3, attention=True, norm_groups=4, z_channels=8,
            codebook_size=16, codebook_dim=4)


@pytest.fixture
def vq():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return VQModel(VQConfig(**TINY)).eval()


def unit(*shape, seed=0, dim=-1):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=dim)


# --- the network

@pytest.mark.parametrize("change, grid", [({}, 4), ({"patch": 1}, 8), ({"ch_mult": (1,)}, 8), ({"patch": 4, "ch_mult": (2,), "kernel": 1, "attention": False}, 4)])
def test_pictures_become_a_grid_of_ids_and_come_back(change, grid):
    cfg = VQConfig(**TINY | change)
    vq = VQModel(cfg).eval()
    x = torch.rand(3, 3, 16, 16) * 2 - 1
    ids = vq.encode(x)
    assert cfg.grid == grid and ids.shape == (3, grid ** 2) and ids.dtype == torch.int64 and 0 <= ids.min() and ids.max() < 16
    assert vq.decode(ids).shape == x.shape and vq.latents(x).norm(dim=1).allclose(torch.ones(3, grid, grid), atol=1e-5)


def test_ids_are_in_reading_order(vq):
    """Token n is cell (n // grid, n % grid); the transformer and the difference mask rely on it."""
    codes = vq.quantize.codes(torch.arange(16)[None], 4)                                          # (1, D, 4, 4)
    for n in range(16):
        assert codes[0, :, n // 4, n % 4].allclose(F.normalize(vq.quantize.embedding.weight[n], dim=-1), atol=1e-6)
    assert vq.quantize.ids(codes).tolist() == [list(range(16))]


def test_a_latent_takes_its_nearest_code(vq):
    z = unit(2, 4, 4, 4, dim=1)
    ids = vq.quantize.ids(z)
    for b in range(2):
        for n in range(16):
            distances = [(z[b, :, n // 4, n % 4] - code).norm().item() for code in F.normalize(vq.quantize.embedding.weight, dim=-1)]
            assert ids[b, n] == min(range(16), key=distances.__getitem__)


def test_batches_change_nothing(vq):
    images = torch.randint(256, (5, 16, 16, 3), dtype=torch.uint8).numpy()
    ids = tk.encode_images(vq, images, "cpu", batch=2)
    assert ids.equal(vq.encode(tk.from_pixels(images)))
    assert (tk.decode_ids(vq, ids, batch=2) == tk.to_pixels(vq.decode(ids))).all()


def test_pixels_round_trip():
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, 16, 16, 3).contiguous().numpy()
    x = tk.from_pixels(images)
    assert x.min() == -1 and x.max() == 1 and (tk.to_pixels(x) == images).all()
    assert tk.to_pixels(torch.full((1, 3, 2, 2), 7.0)).max() == 255                                # clamped, not wrapped around


def test_the_real_tokenizer_has_llamagens_shape_and_names():
    """Built without memory. These names are the ones in the published weights."""
    cfg = VQConfig.janus()
    with torch.device("meta"):
        state = VQModel(cfg).state_dict()
    assert cfg.grid == 24
    shapes = {
        "encoder.conv_in.weight": (128, 3, 3, 3), "encoder.conv_blocks.0.res.0.norm1.weight": (128,),
        "encoder.conv_blocks.0.downsample.conv.weight": (128, 128, 3, 3), "encoder.conv_blocks.2.res.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.conv_blocks.4.attn.0.q.weight": (512, 512, 1, 1), "encoder.conv_blocks.4.attn.1.norm.bias": (512,),
        "encoder.mid.1.proj_out.weight": (512, 512, 1, 1), "encoder.norm_out.weight": (512,), "encoder.conv_out.weight": (256, 512, 3, 3),
        "quant_conv.weight": (8, 256, 1, 1), "quantize.embedding.weight": (16384, 8), "post_quant_conv.weight": (256, 8, 1, 1),
        "decoder.conv_in.weight": (512, 256, 3, 3), "decoder.mid.0.conv1.weight": (512, 512, 3, 3), "decoder.conv_blocks.0.attn.2.k.weight": (512, 512, 1, 1),
        "decoder.conv_blocks.0.upsample.conv.weight": (512, 512, 3, 3), "decoder.conv_blocks.4.res.2.conv2.bias": (128,),
        "decoder.conv_out.weight": (3, 128, 3, 3)}
    assert {k: tuple(state[k].shape) for k in shapes if k in state} == shapes
    assert not any(f"{part}.conv_blocks.{end}" in k for k in state for part, end in (("encoder", "4.downsample"), ("decoder", "4.upsample")))


def test_halving_pads_right_and_below_as_the_original_does():
    """Symmetric padding has the same shapes and loads the same weights, and shifts every picture by a pixel."""
    down, x = tk.Resample(3, down=True), torch.randn(1, 3, 6, 6)
    with torch.no_grad():
        got, weight, bias = down(x)[0], down.conv.weight, down.conv.bias
    assert got.shape == (3, 3, 3)
    for y in range(3):
        for column in range(3):
            window = x[0, :, 2 * y:2 * y + 3, 2 * column:2 * column + 3]                          # cut off at the right and below
            part = weight[:, :, :window.shape[1], :window.shape[2]]
            assert got[:, y, column].allclose((part * window).sum((1, 2, 3)) + bias, atol=1e-5)


# --- training

def test_the_straight_through_gradient_reaches_the_encoder_and_not_the_code_book(vq):
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    loss, z, ids, picture = tk.vq_loss(vq, x, quantized=True, commitment=0.0)
    loss.backward()
    assert vq.encoder.conv_in.weight.grad.abs().sum() > 0 and vq.quantize.embedding.weight.grad is None
    assert ids.equal(vq.encode(x)) and picture.allclose(vq.decode(ids), atol=1e-5)                 # the forward is the quantized one


def test_commitment_pulls_latents_to_their_codes(vq):
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    without, z, ids, _ = tk.vq_loss(vq, x, True, 0.0)
    with_it = tk.vq_loss(vq, x, True, 0.25)[0]
    codes = vq.quantize.codes(ids, vq.cfg.grid)
    assert (with_it - without).item() == pytest.approx(0.25 * (2 - 2 * (z * codes).sum(1)).mean().item(), abs=1e-5)   # |a-b|^2 of unit vectors


def test_ids_do_not_depend_on_autocast(vq):
    """Training and encoding have to agree about which code is nearest."""
    codebook, z = unit(256, 8), unit(64, 8, 8, 8, seed=1, dim=1)
    big = tk.VectorQuantizer(VQConfig(**TINY | {"codebook_size": 256, "codebook_dim": 8}))
    big.embedding.weight.data = codebook
    with torch.autocast("cpu", torch.bfloat16):
        ids = big.ids(z)
    assert ids.equal(big.ids(z))


def test_the_warm_up_does_not_quantize(vq):
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    _, z, ids, picture = tk.vq_loss(vq, x, quantized=False, commitment=1.0)
    assert ids is None and picture.allclose(vq.decode_codes(z), atol=1e-6)


def test_kmeans_finds_clusters_however_rare():
    """k-means++ seeds: a cluster of 3 among 3000 gets its own centre."""
    centres, generator = torch.eye(6), torch.Generator().manual_seed(0)
    sizes = [1000, 1000, 600, 300, 97, 3]
    vectors = torch.cat([F.normalize(c + 0.02 * torch.randn(n, 6, generator=generator), dim=-1) for c, n in zip(centres, sizes)])
    found = tk.kmeans_codes(vectors[torch.randperm(3000, generator=generator)], 6, generator)
    assert found.norm(dim=-1).allclose(torch.ones(6), atol=1e-5)
    nearest = found @ centres.T
    assert sorted(nearest.argmax(-1).tolist()) == list(range(6)) and nearest.amax(-1).min() > 0.999


def test_kmeans_with_too_few_vectors_is_a_user_error():
    with pytest.raises(UserError, match="at least 8"):
        tk.kmeans_codes(unit(5, 4), 8, torch.Generator().manual_seed(0))


def test_used_codes_move_towards_the_mean_of_their_latents_and_unused_ones_stay():
    codebook, z = unit(8, 4), unit(2, 4, 3, 3, seed=1, dim=1)
    ids = torch.arange(18).view(2, 9) % 3                                                          # codes 0, 1, 2 are chosen
    before, usage = codebook.clone(), torch.ones(8)
    assert tk.update_codebook(codebook, usage, z, ids, torch.Generator().manual_seed(0), decay=0.9, dead=0.0) == 0
    latents = z.permute(0, 2, 3, 1).reshape(-1, 4)
    for code in range(8):
        if code > 2:
            assert codebook[code].equal(before[code]) and usage[code].item() == pytest.approx(0.9)
            continue
        mean = torch.stack([v for v, i in zip(latents, ids.flatten()) if i == code]).mean(0)
        assert codebook[code].allclose(F.normalize(0.9 * before[code] + 0.1 * mean, dim=0), atol=1e-6)
        assert F.cosine_similarity(codebook[code], mean, dim=0) > F.cosine_similarity(before[code], mean, dim=0)
        assert usage[code].item() == pytest.approx(0.9 + 0.1 * 8 / 3, rel=1e-5)                    # a third of the choices is 8/3 fair shares


def test_dead_codes_restart_at_badly_served_latents():
    codebook, usage = unit(8, 4), torch.ones(8)
    usage[5:] = 0.0
    z = codebook[:1].T[None, :, :, None].expand(1, 4, 10, 1).clone()                               # nine latents sit on code 0,
    z[0, :, 9, 0] = -codebook[0]                                                                   # one as far away as can be
    restarted = tk.update_codebook(codebook, usage, z, torch.zeros(1, 10, dtype=torch.int64), torch.Generator().manual_seed(0))
    assert restarted == 3 and usage[5:].tolist() == [1, 1, 1]
    assert codebook[5:].allclose(z[0, :, 9, 0].expand(3, 4), atol=1e-6)


def test_a_collapsed_code_book_recovers():
    """All 16 codes in one spot, latents everywhere: restarts spread them until most are in use."""
    codebook, usage, generator = F.normalize(torch.ones(16, 4) + 1e-3 * torch.randn(16, 4), dim=-1), torch.ones(16), torch.Generator().manual_seed(0)
    def used():
        return tk.code_statistics((unit(4000, 4, seed=9) @ codebook.T).argmax(-1), 16)[0]
    for step in range(120):
        z = unit(4, 4, 8, 8, seed=step, dim=1)
        ids = (z.permute(0, 2, 3, 1).reshape(4, 64, 4) @ codebook.T).argmax(-1)
        tk.update_codebook(codebook, usage, z, ids, generator)
    assert used() >= 0.9


@pytest.mark.parametrize("ids, size, usage, perplexity", [
    ([3] * 10, 8, 1 / 8, 1.0), (list(range(8)), 8, 1.0, 8.0), ([0, 0, 1, 1], 4, 0.5, 2.0), ([0, 0, 0, 1], 4, 0.5, 4 / 3 ** 0.75)])
def test_collapse_is_measured(ids, size, usage, perplexity):
    share, found = tk.code_statistics(torch.tensor(ids).view(2, -1), size)
    assert share == pytest.approx(usage) and found == pytest.approx(perplexity, rel=1e-5)


# --- checkpoints

def saved(vq, path, **changes):
    tk.save_weights(path, vq.state_dict(), config=vars(vq.cfg) | changes)
    return path


def test_a_checkpoint_comes_back_bit_for_bit(vq, tmp_path):
    again = tk.load_module(saved(vq, tmp_path / "t.safetensors"), VQModel, VQConfig)
    assert again.cfg == vq.cfg and not again.training
    assert all(a.equal(b) and a.dtype == b.dtype for a, b in zip(vq.state_dict().values(), again.state_dict().values(), strict=True))
    assert list(vq.state_dict()) == list(again.state_dict())


def test_metadata_comes_back(tmp_path):
    tk.save_weights(tmp_path / "x.safetensors", {"a": torch.ones(2)}, step=7, note={"ä": [1, None]})
    assert tk.load_weights(tmp_path / "x.safetensors")[1] == {"step": 7, "note": {"ä": [1, None]}}


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.safetensors: no such checkpoint"):
        tk.load_module(tmp_path / "nowhere.safetensors", VQModel, VQConfig)


def test_weights_that_others_have_saved_can_be_read(tmp_path):
    """Every safetensors file of Hugging Face says {"format": "pt"}, the real weights too."""
    (tmp_path / "t.safetensors").write_bytes(safetensors.torch.save({"a": torch.ones(2)}, {"format": "pt"}))
    assert tk.load_weights(tmp_path / "t.safetensors")[0]["a"].tolist() == [1, 1]


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_a_truncated_checkpoint_is_a_user_error(vq, tmp_path, keep):
    path = saved(vq, tmp_path / "t.safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:int(len(whole) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match="t.safetensors: not a whole checkpoint"):
        tk.load_module(path, VQModel, VQConfig)


def test_a_pickle_is_never_opened(vq, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)
    torch.save({"weights": vq.state_dict(), "trap": Trap()}, tmp_path / "t.safetensors")
    with pytest.raises(UserError, match="not a whole checkpoint"):
        tk.load_weights(tmp_path / "t.safetensors")
    assert not (tmp_path / "sprung").exists()


def test_weights_that_do_not_fit_are_all_listed(vq):
    tensors = vq.state_dict()
    del tensors["quant_conv.bias"], tensors["encoder.conv_in.weight"]
    tensors |= {"extra.weight": torch.ones(1), "post_quant_conv.bias": torch.ones(3)}
    before = {k: v.clone() for k, v in vq.state_dict().items()}
    with pytest.raises(UserError) as error:
        tk.load_strictly(vq, tensors, "some.safetensors")
    for part in ("some.safetensors", "missing quant_conv.bias", "missing encoder.conv_in.weight", "unexpected extra.weight",
                 "post_quant_conv.bias is (3,), should be (8,)"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert all(before[k].equal(v) for k, v in vq.state_dict().items())                             # nothing was half loaded


def test_a_checkpoint_of_another_size_is_a_user_error(vq, tmp_path):
    """The weights of one size under the config of another."""
    path = saved(vq, tmp_path / "t.safetensors", codebook_size=32)
    with pytest.raises(UserError, match=re.escape("quantize.embedding.weight is (16, 4), should be (32, 4)")):
        tk.load_module(path, VQModel, VQConfig)


def test_a_checkpoint_of_another_kind_is_a_user_error(tmp_path):
    tk.save_weights(tmp_path / "t.safetensors", {"a": torch.ones(1)}, config={"n_embd": 3})
    with pytest.raises(UserError, match="metadata lacks .*image_size"):
        tk.load_module(tmp_path / "t.safetensors", VQModel, VQConfig)


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch, broken):
    path = tmp_path / "t.safetensors"
    tk.write_atomically(path, b"old")
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, broken, full)
    with pytest.raises(UserError, match="t.safetensors.*No space left on device"):
        tk.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [f.name for f in tmp_path.iterdir()] == ["t.safetensors"]


def test_a_save_replaces_the_old_file_and_leaves_nothing_beside_it(tmp_path):
    tk.write_atomically(tmp_path / "x", b"old")
    tk.write_atomically(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_is_not_there_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot be saved"):
        tk.write_atomically(tmp_path / "nowhere" / "x", b"new")
