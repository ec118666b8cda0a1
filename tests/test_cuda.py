"""What only a GPU can show: it computes what a CPU does, a CUDA graph of a decoding step is the
step, and which kernels run. Skipped without one."""

import pytest
import torch

import model as m
from test_model import EMPTY, GUIDANCE, seeded, sharp

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
CFG = m.ModelConfig(text_vocab=60, image_vocab=300, n_text=40, n_image=48, n_layer=3, n_head=2,
                    n_embd=256, n_ffn=512, code_dim=8)


def sharp_model(**how):
    model = sharp(CFG, carried=10.0, head=1.0)
    for name, value in how.items():
        setattr(model, name, value)
    return model


def prompts(*lengths):
    """One prompt of each length, padded at the end."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in zip(ids, lengths):
        row[:length] = torch.randint(3, 60, (length,), generator=seeded(length))
    return ids


@torch.inference_mode()
def decoded(model, ids, guidance, noise, device):
    with model.autocast():
        return m.decode(model, ids.to(device), EMPTY.to(device), 2, guidance, 0.8, noise.to(device))


def noise_for(ids):
    return torch.rand(CFG.n_image, 2 * len(ids), generator=seeded(7))


@GUIDANCE
def test_a_graph_in_fp32_draws_what_a_cpu_draws(guidance):
    ids = prompts(5, 12, 31)
    noise = noise_for(ids)
    expected = decoded(sharp_model(), ids, guidance, noise, "cpu")
    for running in ("eager", "graph"):
        model = sharp_model(running=running).cuda()
        tokens, logprobs = decoded(model, ids, guidance, noise, "cuda")
        assert tokens.cpu().equal(expected[0]), running
        torch.testing.assert_close(logprobs.cpu(), expected[1], atol=2e-4, rtol=2e-4)


@GUIDANCE
def test_scores_and_gradients_of_gpu_and_cpu_agree(guidance):
    ids = prompts(5, 12, 31)
    tokens = torch.randint(300, (3, CFG.n_image), generator=seeded(1))
    found = []
    for device in ("cpu", "cuda"):
        model = sharp_model().to(device)
        how = dict(empty=EMPTY.to(device), guidance=guidance)
        logprobs, entropy = m.score(model, ids.to(device), tokens.to(device), **how)
        logprobs.mean().backward()
        gradients = {name: p.grad.cpu() for name, p in model.named_parameters()}
        found.append((logprobs.detach().cpu(), entropy.cpu(), gradients))
    torch.testing.assert_close(found[1][:2], found[0][:2], atol=2e-4, rtol=2e-4)
    for name, gradient in found[0][2].items():
        gap = (found[1][2][name] - gradient).norm()
        assert gap <= 1e-3 * gradient.norm() + 1e-7, name


@GUIDANCE
def test_graphs_serve_all_rollouts_and_follow_the_weights(guidance):
    """In bf16, as training samples: prompts of other lengths, a short last batch and the weights of
    an optimizer's step. What was sampled is what `score` says."""
    model = sharp_model(running="graph", bf16=True).cuda()
    how = dict(guidance=guidance, temperature=0.8)
    empty = EMPTY.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    kept = None
    for lengths in ((31, 7, 9), (30, 5, 6), (8, 31, 20)):
        ids = prompts(*lengths).cuda()
        tokens, logprobs = m.generate(model, ids, empty, 2, batch=4, **how)
        rows = ids.repeat_interleave(2, 0)
        scored, _ = m.score(model, rows, tokens, empty, **how)
        gap = (scored - logprobs).abs()
        assert gap.mean() < 0.02 * guidance and gap.max() < 1.0, lengths
        if kept is not None:
            assert model.graphed is kept
        kept = model.graphed
        (scored * torch.randn_like(scored)).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert len(kept.graphs) <= -(-(31 + CFG.n_image) // m.KEYS)
    assert not m.score(model, rows, tokens, empty, **how)[0].allclose(scored, atol=1e-2)


def kernels(function):
    """The names of the GPU's kernels that ran in a call."""
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    return {event.key for event in profile.key_averages()}


def test_whole_sequences_run_flash_attention():
    """Without a mask, prompts of all lengths together, with and without gradients."""
    model = sharp_model(bf16=True).cuda()
    ids = prompts(5, 12, 31).cuda()
    tokens = torch.zeros(3, CFG.n_image, dtype=torch.long, device="cuda")
    with torch.no_grad():
        names = kernels(lambda: m.score(model, ids, tokens))
    # PyTorch's flash attention, or cuDNN's
    assert any("flash" in name and ("fwd" in name or "fprop" in name) for name in names), names
    names = kernels(lambda: m.score(model, ids, tokens)[0].mean().backward())
    assert any("flash" in name and ("bwd" in name or "bprop" in name) for name in names), names
