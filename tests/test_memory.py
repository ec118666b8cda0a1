"""memory.py counts on fake tensors what the same code would have alive on real ones."""
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import memory
from data import UserError
from memory import JANUS, Alive, trace
from model import ImageModel, ModelConfig, score
from tokenizer import VQConfig, VQModel

TINY = ModelConfig(50, 40, 100, 16, 2, 2, 32, 64, 8, False)
TINY_VQ = VQConfig(32, 4, 32, (1, 1), 1, 1, False, 32, 32, 40, 8)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_alive_counts_a_storage_once_and_until_it_is_gone():
    with Alive() as alive:
        x = torch.zeros(1000)                           # 4000 bytes
        view = x[5:].view(5, 199)
        y = x + 1
        assert (alive.bytes, alive.peak) == (8000, 8000)
        del x
        assert alive.bytes == 8000                      # the view holds it
        del view, y
        alive.phase("before")
        z = torch.zeros(10, dtype=torch.bfloat16)
        alive.phase("after")
        assert alive.bytes == 20 and alive.phases == {"before": 8000, "after": 20} and len(z) == 10


def test_fake_tensors_count_as_real_ones():
    """A forward with guidance under autocast and checkpointing, and its backward: the same peak, to the byte."""
    peaks = []
    for mode in (FakeTensorMode, nullcontext):
        with mode(), Alive() as alive, pytest.MonkeyPatch.context() as patch:
            patch.setattr("model.full_mask", lambda *_: None)
            model = ImageModel(TINY)
            model.recompute = True
            with torch.autocast("cpu", torch.bfloat16):
                logprobs = score(model, torch.ones(3, 7, dtype=torch.long), torch.zeros(3, 16, dtype=torch.long), None, 3.0, chunk=10)[0]
            logprobs.mean().backward()
            peaks.append(alive.peak)
    assert peaks[0] == peaks[1] > 8 * parameters(model)


def test_what_rests_and_what_moves():
    """At rest: fp32 weights and Adam's two moments, the reference's matrices in bf16 and its vectors in fp32, the tokenizer."""
    phases = trace(TINY, TINY_VQ, "ppo", 2, 2, 3, 4)
    assert list(phases) == ["at rest", "draw", "decode pictures", "score by the reference", "forward and backward", "update"]
    with torch.device("meta"):
        model, vq = ImageModel(TINY), VQModel(TINY_VQ)
    vectors = sum(p.numel() for p in model.parameters() if p.dim() < 2)
    n, rest = parameters(model), phases["at rest"] * 2 ** 30
    assert rest == pytest.approx(12 * n + 2 * n + 2 * vectors + 4 * parameters(vq), rel=1e-2)            # and Adam's step counts
    assert phases["update"] * 2 ** 30 == pytest.approx(rest + 4 * n, rel=1e-2)                          # the gradients
    assert phases["forward and backward"] > phases["update"]
    cache = 2 * 6 * (memory.PROMPT + TINY.n_image - 1) * 2 * TINY.n_layer * TINY.n_embd * 2             # two branches of six pictures, bf16
    assert phases["draw"] * 2 ** 30 > rest + cache


def test_more_at_once_needs_more():
    peak = lambda **settings: trace(TINY, TINY_VQ, "ppo", **settings)["forward and backward"]
    assert peak(sequences=8) > peak(sequences=2)
    draw = lambda rollout: trace(TINY, TINY_VQ, "sampling", rollout=rollout, pictures=4)["draw"]
    assert draw(8) > draw(2)


def test_the_real_geometry():
    with torch.device("meta"):
        vq = parameters(VQModel(VQConfig.janus()))
    phases = trace(JANUS["1B"], VQConfig.janus(), "sampling", pictures=4)
    assert phases["at rest"] == pytest.approx((2 * 1_485_053_952 + 4 * vq) / 2 ** 30, rel=1e-3)
    assert 3.5 < max(phases.values()) < 6


def test_the_table(capsys, monkeypatch):
    monkeypatch.setattr(memory, "JANUS", {"tiny": TINY})
    monkeypatch.setattr(memory.VQConfig, "janus", lambda: TINY_VQ)
    memory.main(["--accumulate", "28"])
    out = capsys.readouterr().out
    assert "| tiny | PPO, 1 pictures a backward, 28 sampled at once | 1.5 | 24, 80, 141 GB |" in out and "not measured on a GPU" in out
    with pytest.raises(UserError, match="should be positive"):
        memory.main(["--samples", "0"])
