"""model.py: the fast paths (cache, expanded prompts, chunks, padding) against slow ones that share
as little as possible."""

import json
import math
from dataclasses import asdict, replace
from functools import cache

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as m
from common import UserError, load_weights, save_weights
from tokenizer import VQConfig, VQModel

CFG = m.ModelConfig(
    text_vocab=20,
    image_vocab=37,
    n_text=8,
    n_image=9,
    n_layer=2,
    n_head=2,
    n_embd=32,
    n_ffn=48,
    code_dim=4,
    image_positions=True,
    pad=0,
)
EMPTY = torch.tensor([[1, 2]])
EQUAL = torch.tensor([[1, 5, 6, 7, 2], [1, 9, 6, 4, 2]])
PADDED = torch.tensor([[1, 5, 6, 7, 2], [1, 9, 2, 0, 0], [1, 5, 8, 2, 0]])
PROMPTS = pytest.mark.parametrize("prompts", [EQUAL, PADDED], ids=["equal", "padded"])
GUIDANCE = pytest.mark.parametrize("guidance", [1.0, 3.0])
# mean |re-scored - sampled| in nats and per unit of guidance, under bf16 autocast; see the test
BF16_BOUND = 0.02


@pytest.fixture(scope="module", params=[True, False], ids=["positions", "rope_only"])
def net(request):
    """A random model, sharpened so that tokens, prompts and positions matter, with and without
    learned positions."""
    return sharp(replace(CFG, image_positions=request.param))


def sharp(cfg, carried=15.0, head=3.0):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = m.ImageModel(cfg).eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.dim() > 1:
                # o_proj and down_proj start tiny, and carry the prompt
                p.mul_(carried if "o_proj" in name or "down_proj" in name else 2.0)
        net.gen_head[2].weight.mul_(head)
    return net


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_tokens(n, seed):
    """Image tokens (n, N)."""
    return torch.randint(CFG.image_vocab, (n, CFG.n_image), generator=seeded(seed))


def changed_at_4(tokens):
    """The same with another token number 4."""
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % CFG.image_vocab
    return changed


def last_logits(net, prompt, tokens):
    """Logits after one unpadded prompt and its tokens so far: the whole sequence again, no cache,
    no mask, batch of one."""
    x = net.embed_tokens(prompt[prompt != CFG.pad][None])
    if len(tokens):
        number = torch.arange(len(tokens))
        x = torch.cat([x, net.embed_images(torch.tensor(tokens)[None], number)], 1)
    rope = m.rope_table(net.cfg, x.shape[1], x.device)
    return net.gen_head(net.hidden(x, rope)[0, -1])


def slow_policy(net, prompt, tokens, guidance, temperature):
    """The distribution (V,) of the next token, by `last_logits` of both branches."""
    logits = last_logits(net, prompt, tokens)
    if guidance != 1:
        uncond = last_logits(net, EMPTY[0], tokens)
        logits = (1 - guidance) * uncond + guidance * logits
    return (logits / temperature).softmax(-1)


@torch.no_grad()
def slow_generate(net, prompts, samples, guidance, temperature, generator):
    rows = [p for p in prompts for _ in range(samples)]
    tokens, logprobs = [[] for _ in rows], [[] for _ in rows]
    for _ in range(CFG.n_image):
        noise = torch.rand(len(rows), generator=generator)
        for i, prompt in enumerate(rows):
            p = slow_policy(net, prompt, tokens[i], guidance, temperature)
            token = torch.searchsorted(p.double().cumsum(0), noise[i].double(), right=True).item()
            tokens[i].append(token)
            logprobs[i].append(p[token].log().item())
    return torch.tensor(tokens), torch.tensor(logprobs)


def test_the_test_model_is_sharp_enough_to_tell_mistakes(net):
    tokens, logprobs = m.generate(net, PADDED, EMPTY, 8, generator=seeded())
    assert logprobs.std() > 0.5
    prompts, twins = PADDED[:1].expand(8, -1), PADDED[2:].expand(8, -1)
    assert m.prompt_divergence(net, prompts, twins, tokens[:8]).mean() > 0.01


# --- sampling


@GUIDANCE
@PROMPTS
def test_cached_decoding_samples_what_the_full_forward_samples(net, prompts, guidance):
    """Same noise, same tokens: cache, positions, masks, the two branches and the expansion to G
    samples are all in this."""
    fast, logprobs = m.generate(net, prompts, EMPTY, 3, guidance, 0.7, seeded(1))
    slow, slow_logprobs = slow_generate(net, prompts, 3, guidance, 0.7, seeded(1))
    assert fast.equal(slow)
    assert (logprobs - slow_logprobs).abs().max() < 1e-4
    assert len(fast.unique(dim=0)) > len(prompts)  # the samples of a prompt do differ


def test_noise_of_exactly_zero_or_one_does_not_draw_an_impossible_token(net):
    """On MPS exponential_ returned exact zeros, 3.3e-8 an element, which won every argmax of the
    former sampler, whatever the token's probability: 27 % of Janus' images had such a token. The
    smallest noise must draw the first possible token, and the largest, though torch.rand promises
    to stay below 1, a token that exists."""
    model = m.ImageModel(net.cfg)
    model.gen_head[2].bias.data[:3] = -200.0                # their probability is 0 in fp32
    for value, expected in ((0.0, 3), (1.0, CFG.image_vocab - 1)):
        noise = torch.full((CFG.n_image, 4), value)
        tokens, logprobs = m.generate(model, torch.tensor([[1, 5, 2]]), EMPTY, 4, noise=noise)
        assert (tokens == expected).all() and logprobs.isfinite().all()


def test_sampling_follows_the_distribution_that_it_reports(net):
    """Inverse sampling draws from softmax: the frequencies of the first token against its
    probabilities, 4 sigma."""
    n = 4000
    prompt, p = EQUAL[:1], last_logits(net, EQUAL[0], []).softmax(-1)
    short = m.ImageModel(replace(CFG, n_image=1, image_positions=False))
    state = {k: v for k, v in net.state_dict().items() if not k.startswith("gen_positions")}
    short.load_state_dict(state)
    tokens, logprobs = m.generate(short, prompt, EMPTY, n, generator=seeded(2))
    frequency = torch.bincount(tokens[:, 0], minlength=CFG.image_vocab) / n
    assert ((frequency - p).abs() <= 4 * (p * (1 - p) / n).sqrt() + 1 / n).all()
    assert logprobs[:, 0].allclose(p.log()[tokens[:, 0]], atol=1e-5)


def test_sample_g_of_prompt_r_is_row_rG_plus_g(net):
    """Every row must be likeliest, on the whole, under its own prompt: the reported log-probs fit
    no other assignment."""
    g = 4
    tokens, logprobs = m.generate(net, PADDED, EMPTY, g, generator=seeded(3))
    assert tokens.shape == logprobs.shape == (len(PADDED) * g, CFG.n_image)
    own = m.score(net, PADDED.repeat_interleave(g, 0), tokens)[0]
    shuffled = m.score(net, PADDED.repeat(g, 1), tokens)[0]
    assert (own - logprobs).abs().max() < 1e-4 < (shuffled - logprobs).abs().max()


def test_generate_gives_the_same_with_the_same_seed_and_leaves_no_gradient(net):
    first, same, other = (m.generate(net, EQUAL, EMPTY, 2, generator=seeded(s)) for s in (5, 5, 6))
    assert first[0].equal(same[0]) and first[1].equal(same[1])
    assert not first[0].equal(other[0])
    assert not first[1].requires_grad


@GUIDANCE
@PROMPTS
def test_sampling_in_parts_is_bounded_and_reports_the_logprobs_that_it_sampled(
    net, prompts, guidance, monkeypatch
):
    """batch bounds the sequences, and so the key-value caches, that live at once."""
    rows_of_caches, original = [], m.new_caches

    def new_caches(model, rows, slots):
        rows_of_caches.append(rows)
        return original(model, rows, slots)

    monkeypatch.setattr(m, "new_caches", new_caches)
    tokens, logprobs = m.generate(net, prompts, EMPTY, 4, guidance, 0.7, seeded(7), batch=4)
    branches = 1 if guidance == 1 else 2
    assert max(rows_of_caches) <= 4 * branches
    assert tokens.shape == logprobs.shape == (len(prompts) * 4, CFG.n_image)
    rows = prompts.repeat_interleave(4, 0)
    scored, _ = m.score(net, rows, tokens, EMPTY, guidance, 0.7)
    assert (scored - logprobs).abs().max() < 1e-4


# --- re-scoring


@GUIDANCE
@PROMPTS
def test_score_gives_the_logprobs_that_were_sampled(net, prompts, guidance):
    """The one property that PPO's ratio rests on."""
    tokens, logprobs = m.generate(net, prompts, EMPTY, 4, guidance, 0.7, seeded(7))
    rows = prompts.repeat_interleave(4, 0)
    scored, _ = m.score(net, rows, tokens, EMPTY, guidance, 0.7)
    assert scored.dtype == logprobs.dtype == torch.float32
    assert (scored - logprobs).abs().max() < 1e-4


@GUIDANCE
@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # rope_only decodes on bf16 embeddings
def test_score_gives_the_sampled_logprobs_in_bf16_within_the_stated_bound(net, guidance):
    """Measured at width 192 and 4 layers (pytest -rP shows it): a mean of 0.010 nats at w = 1 and
    0.025 at w = 3 with learned positions, 0.012 and 0.032 without; at worst 0.18. There is no bias,
    so the ratios of an unchanged policy scatter around 1, hardly one beyond 0.2."""
    larger = replace(net.cfg, n_head=6, n_embd=192, n_ffn=512, n_layer=4, n_image=16)
    net = sharp(larger)
    net.bf16 = True
    tokens, logprobs = m.generate(net, PADDED, EMPTY, 8, guidance, 1.0, seeded(8))
    scored, _ = m.score(net, PADDED.repeat_interleave(8, 0), tokens, EMPTY, guidance, 1.0)
    assert scored.dtype == logprobs.dtype == torch.float32
    difference = scored - logprobs
    mean, bias = difference.abs().mean(), difference.mean()
    print(
        f"bf16, w = {guidance}: mean |re-scored - sampled| = {mean:.5f} nats, "
        f"worst {difference.abs().max():.5f}, bias {bias:.5f}, "
        f"spread of log-probs {logprobs.std():.2f}"
    )
    assert 0 < mean < BF16_BOUND * guidance  # 0 would be fp32
    assert bias.abs() < 0.25 * BF16_BOUND * guidance


def test_guidance_does_not_multiply_the_rounding_of_the_head(net):
    """At w = 5 in bf16 the head's rounding alone clipped 2 % of the ratios of a policy that had not
    changed. The head is taken outside of autocast, in sampling and scoring alike."""
    h = m.image_hidden(net, EQUAL, random_tokens(2, 3))
    u = m.image_hidden(net, torch.tensor([[1, 2], [1, 2]]), random_tokens(2, 3))
    net.bf16 = True
    try:
        with net.autocast():
            ours = m.policy_logits(net.logits(h), net.logits(u), 5.0, 1.0).log_softmax(-1)
            rounded = m.policy_logits(net.gen_head(h), net.gen_head(u), 5.0, 1.0).log_softmax(-1)
    finally:
        net.bf16 = False
    exact = m.policy_logits(net.gen_head(h), net.gen_head(u), 5.0, 1.0).log_softmax(-1)
    assert ours.equal(exact)
    assert (rounded - exact).abs().max() > 0.05  # nats, of which a ratio of 1 +- 0.2 allows 0.2


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_the_model_itself_says_in_which_precision_it_computes(net):
    """One switch for sampling, scoring and D_t: a policy and its reference, or a run and its later
    test, cannot end up in different precisions by a forgotten context."""
    tokens = random_tokens(2, 21)

    def computed():
        _, sampled = m.generate(net, EQUAL, EMPTY, 1, 3.0, 1.0, seeded(1))
        logprobs, _ = m.score(net, EQUAL, tokens, EMPTY, 3.0)
        return sampled, logprobs, m.prompt_divergence(net, EQUAL, EQUAL.flip(0), tokens)

    fp32 = computed()
    try:
        net.bf16 = True
        bf16 = computed()
    finally:
        net.bf16 = False
    assert all(a.equal(b) for a, b in zip(fp32, computed()))
    assert not any(a.equal(b) for a, b in zip(fp32, bf16))


@GUIDANCE
def test_padding_changes_nothing(net, guidance):
    tokens = random_tokens(3, 9)
    batched = m.score(net, PADDED, tokens, EMPTY, guidance)
    for i, prompt in enumerate(PADDED):
        unpadded = prompt[prompt != CFG.pad][None]
        single = m.score(net, unpadded, tokens[i : i + 1], EMPTY, guidance)
        for a, b in zip(batched, single):
            # guidance magnifies rounding by w + |1 - w|
            assert (a[i] - b[0]).abs().max() < 1e-5 * (2 * guidance - 1)


def test_score_is_causal(net):
    """Changing token t leaves log-probs before t as they are, and changes later ones."""
    tokens = random_tokens(3, 10)
    before = m.score(net, PADDED, tokens)[0]
    after = m.score(net, PADDED, changed_at_4(tokens))[0]
    assert (before - after)[:, :4].abs().max() < 1e-6
    assert ((before - after)[:, 5:].abs().amax(0) > 1e-4).all()


def test_entropy_is_that_of_the_distribution(net):
    tokens = random_tokens(2, 11)
    logprobs, entropy = m.score(net, EQUAL, tokens, EMPTY, 3.0, 0.7)
    for i in range(2):
        for t in range(CFG.n_image):
            so_far = tokens[i, :t].tolist()
            cond = last_logits(net, EQUAL[i], so_far)
            uncond = last_logits(net, EMPTY[0], so_far)
            logits = (uncond + 3.0 * (cond - uncond)) / 0.7
            policy = torch.distributions.Categorical(logits=logits)
            logprob = policy.log_prob(tokens[i, t])
            assert entropy[i, t].item() == pytest.approx(policy.entropy().item(), abs=1e-4)
            assert logprobs[i, t].item() == pytest.approx(logprob.item(), abs=1e-4)
    assert not entropy.requires_grad and logprobs.requires_grad


@GUIDANCE
def test_chunks_change_neither_values_nor_gradients(net, guidance):
    tokens = random_tokens(3, 12)
    direction = torch.randn(3, CFG.n_image, generator=seeded(13))
    results = []
    for chunk in (7, 10**6):
        net.zero_grad()
        logprobs, entropy = m.score(net, PADDED, tokens, EMPTY, guidance, 0.7, chunk)
        (logprobs * direction).sum().backward()
        gradients = {name: p.grad.clone() for name, p in net.named_parameters()}
        results.append((logprobs, entropy, gradients))
    net.zero_grad()
    (logprobs, entropy, chunked), (whole_logprobs, whole_entropy, whole) = results
    assert logprobs.allclose(whole_logprobs, atol=1e-5)
    assert entropy.allclose(whole_entropy, atol=1e-5)
    assert all(chunked[name].allclose(whole[name], atol=1e-4, rtol=1e-4) for name in chunked)
    assert chunked["embed_tokens.weight"].abs().sum() > 0


def test_recomputed_activations_change_neither_values_nor_gradients(net):
    """What --microbatch does to fit the memory must not change what is learned."""
    tokens = random_tokens(3, 22)
    results = []
    for recompute in (False, True):
        net.zero_grad()
        net.recompute = recompute
        logprobs, _ = m.score(net, PADDED, tokens, EMPTY, 3.0)
        logprobs.sum().backward()
        results.append((logprobs, {name: p.grad.clone() for name, p in net.named_parameters()}))
    net.recompute = False
    net.zero_grad()
    (kept_logprobs, kept), (logprobs, recomputed) = results
    assert logprobs.equal(kept_logprobs)
    assert all(recomputed[name].equal(kept[name]) for name in kept)


class LargestLogits(TorchDispatchMode):
    """Remembers the largest fp32 tensor (in elements) with a last dimension of V that any operation
    makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if is_logits(t):
                self.largest = max(self.largest, t.numel())
        return out


def is_logits(t):
    if not isinstance(t, torch.Tensor) or t.dtype != torch.float32:
        return False
    return t.dim() > 0 and t.shape[-1] == CFG.image_vocab


def test_logits_of_all_tokens_never_live_at_once(net):
    """The claim that lets Janus' 16384 codes fit: not in the forward, not in the backward, not for
    D_t."""
    tokens, prompts, chunk = random_tokens(6, 14), EQUAL.repeat(3, 1), 7
    all_logits = 6 * CFG.n_image * CFG.image_vocab
    with LargestLogits() as seen:
        m.score(net, prompts, tokens, EMPTY, 3.0, chunk=chunk)[0].sum().backward()
        m.prompt_divergence(net, prompts, prompts.roll(1, 0), tokens, EMPTY, 3.0, chunk=chunk)
    net.zero_grad()
    # n_embd: the head's weight, transposed
    assert 0 < seen.largest <= max(chunk, CFG.n_embd) * CFG.image_vocab < all_logits
    with LargestLogits() as seen:
        m.score(net, prompts, tokens, chunk=10**6)
    assert seen.largest == all_logits  # the watcher does see them


def saved_logits(net, chunk):
    """How many fp32 elements with a last dimension of V a forward of `score` keeps for its
    backward."""
    kept = []

    def pack(t):
        if is_logits(t):
            kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        m.score(net, EQUAL.repeat(3, 1), random_tokens(6, 14), EMPTY, 3.0, chunk=chunk)
    return sum(kept)


def test_chunks_keep_no_logits_for_the_backward(net):
    """Small chunks alone are not enough: autograd would keep the logits of all of them."""
    assert saved_logits(net, 7) < 7 * CFG.image_vocab
    assert saved_logits(net, 10**6) >= 6 * CFG.n_image * CFG.image_vocab


# --- where the prompts of a pair differ


def jensen_shannon(p, q):
    """Of two distributions (V,) in float64, from its definition with two KLs."""
    p, q = p.double(), q.double()
    middle = (p + q) / 2
    return 0.5 * (p * (p / middle).log()).sum() + 0.5 * (q * (q / middle).log()).sum()


def slow_divergence(net, prompts, twins, tokens):
    out = torch.zeros(tokens.shape)
    for i in range(len(tokens)):
        for t in range(tokens.shape[1]):
            so_far = tokens[i, :t].tolist()
            p = last_logits(net, prompts[i], so_far).double().softmax(-1)
            q = last_logits(net, twins[i], so_far).double().softmax(-1)
            out[i, t] = jensen_shannon(p, q)
    return out


def test_prompt_divergence_is_jensen_shannon_symmetric_and_bounded(net):
    tokens = random_tokens(2, 15)
    prompts, twins = PADDED[:2], PADDED[1:]
    d = m.prompt_divergence(net, prompts, twins, tokens, chunk=5)
    assert d.shape == tokens.shape and d.dtype == torch.float32
    assert d.allclose(slow_divergence(net, prompts, twins, tokens).float(), atol=1e-5)
    assert d.allclose(m.prompt_divergence(net, twins, prompts, tokens), atol=1e-6)
    assert (d >= 0).all() and (d <= math.log(2) + 1e-6).all() and d.max() > 0.01
    # twins may be padded to another length
    assert d.allclose(m.prompt_divergence(net, prompts, twins[:, :-1], tokens), atol=1e-5)


def test_prompt_divergence_of_a_prompt_with_itself_is_zero(net):
    tokens = random_tokens(3, 16)
    d = m.prompt_divergence(net, PADDED, PADDED, tokens, EMPTY, 3.0)
    assert d.abs().max() < 1e-6


@GUIDANCE
def test_the_divergence_of_two_models(net, guidance):
    """With the same prompt for both it is what the one does otherwise than the other: nothing, or
    Jensen-Shannon again."""
    tokens = random_tokens(2, 19)
    torch.manual_seed(1)
    other = m.ImageModel(net.cfg).eval()
    state = net.state_dict()
    for name, weight in state.items():
        if weight.dim() > 1:
            state[name] = weight + 0.3 * weight.std() * torch.randn_like(weight)
    other.load_state_dict(state)
    how = dict(empty=EMPTY, guidance=guidance, temperature=0.7)

    same = m.prompt_divergence(net, EQUAL, EQUAL, tokens, **how, other=net)
    assert same.abs().max() < 1e-6
    with_itself = m.prompt_divergence(net, EQUAL, EQUAL.flip(0), tokens, **how, other=net)
    assert with_itself.equal(m.prompt_divergence(net, EQUAL, EQUAL.flip(0), tokens, **how))

    d = m.prompt_divergence(net, EQUAL, EQUAL, tokens, **how, other=other)
    swapped = m.prompt_divergence(other, EQUAL, EQUAL, tokens, **how, other=net)
    chunked = m.prompt_divergence(net, EQUAL, EQUAL, tokens, **how, other=other, chunk=5)
    assert (d > 0).all() and d.max() <= math.log(2) + 1e-6
    assert d.allclose(swapped, atol=1e-5) and d.allclose(chunked, atol=1e-5)
    for i, t in ((0, 0), (1, 5)):  # by hand: each model with its own two branches
        so_far = tokens[i, :t].tolist()
        p, q = (slow_policy(n, EQUAL[i], so_far, guidance, 0.7) for n in (net, other))
        assert d[i, t].item() == pytest.approx(jensen_shannon(p, q).item(), abs=1e-4)


def test_the_other_model_is_the_one_that_is_shown_the_twins(net):
    """A model that is deaf to prompts makes the order tell."""
    tokens = random_tokens(2, 20)
    deaf = m.ImageModel(net.cfg).eval()
    deaf.load_state_dict(net.state_dict())
    torch.nn.init.ones_(deaf.embed_tokens.weight)
    twin, own = EQUAL.flip(0), EQUAL
    deaf_to_own = m.prompt_divergence(net, own, own, tokens, other=deaf)
    deaf_to_twin = m.prompt_divergence(net, own, twin, tokens, other=deaf)
    assert deaf_to_own.allclose(deaf_to_twin, atol=1e-6)
    of_twin = m.prompt_divergence(net, twin, own, tokens, other=deaf)
    assert not deaf_to_own.allclose(of_twin, atol=1e-3)


def test_prompt_divergence_stays_below_log_two_for_disjoint_distributions(net):
    tokens = random_tokens(1, 17)
    d = m.prompt_divergence(net, EQUAL[:1], EQUAL[1:], tokens, temperature=1e-3)
    assert d.isfinite().all() and d.max() > 0.6 and d.max() <= math.log(2) + 1e-5


def test_prompt_divergence_depends_on_the_prefix_alone(net):
    """D_t must not know token t, or weights made of it would bias the baseline."""
    tokens = random_tokens(2, 18)
    before = m.prompt_divergence(net, EQUAL, EQUAL.flip(0), tokens)
    after = m.prompt_divergence(net, EQUAL, EQUAL.flip(0), changed_at_4(tokens))
    assert (after - before)[:, :5].abs().max() < 1e-6
    assert (after - before)[:, 5:].abs().max() > 1e-4


# --- prompts, padding, attention


def test_the_length_of_a_prompt_ends_at_its_last_token():
    """Padding before it is Janus' empty prompt, which is attended to."""
    prompts = torch.tensor([[1, 9, 2, 0, 0], [1, 0, 0, 2, 0], [1, 2, 0, 0, 0], [1, 5, 6, 7, 2]])
    assert m.prompt_lengths(prompts, CFG.pad).tolist() == [3, 4, 2, 5]


def test_the_empty_prompt_of_janus_keeps_first_and_last_token_and_length():
    """Official code: generation_inference.py, tokens[i, 1:-1] = pad_id."""
    expected = [[1, 0, 0, 0, 2], [1, 0, 2, 0, 0], [1, 0, 0, 2, 0]]
    assert m.empty_like(PADDED, CFG.pad).tolist() == expected


def calls_of_attention(monkeypatch, net, work):
    """What `work` gives to SDPA: (number of queries, whether there is a mask, is_causal)."""
    calls = []
    original = m.F.scaled_dot_product_attention

    def record(q, k, v, attn_mask=None, is_causal=False):
        calls.append((q.shape[2], attn_mask is not None, is_causal))
        return original(q, k, v, attn_mask=attn_mask, is_causal=is_causal)

    monkeypatch.setattr(m.F, "scaled_dot_product_attention", record)
    work(net)
    monkeypatch.undo()
    return calls


@GUIDANCE
@pytest.mark.parametrize("empty", [EMPTY, None], ids=["PairWorld", "Janus"])
def test_no_forward_over_whole_sequences_has_a_mask(net, guidance, empty, monkeypatch):
    """A mask keeps flash attention from running. With padding on the left all of these had one, and
    0 of 3000 rollouts were without."""
    tokens = random_tokens(3, 22)
    how = dict(empty=empty, guidance=guidance)
    layers, whole = CFG.n_layer, PADDED.shape[1] + CFG.n_image - 1

    def update(model):
        m.score(model, PADDED, tokens, **how)[0].sum().backward()
        model.zero_grad()

    def reference(model):
        with torch.no_grad():
            m.score(model, PADDED, tokens, **how)

    def divergence(model):
        m.prompt_divergence(model, PADDED, PADDED.flip(0), tokens, **how)

    # One forward has both branches.
    for work, forwards in ((update, 1), (reference, 1), (divergence, 2)):
        calls = calls_of_attention(monkeypatch, net, work)
        assert len(calls) == forwards * layers
        assert all(not mask and causal for _, mask, causal in calls)
        assert calls[0][0] == whole
    # In sampling the prompts alone are whole sequences; in fp32 a step does without SDPA.
    calls = calls_of_attention(monkeypatch, net, lambda model: m.generate(model, PADDED, samples=2,
                                                                          **how))
    assert calls == [(PADDED.shape[1], False, True)] * layers


# --- one step for all tokens


@pytest.fixture
def running(net):
    """Sets how the module's model decodes, and takes it back."""
    yield lambda how: setattr(net, "running", how)
    net.running, net.graphed = "eager", None


class ReplayedCall:
    """In place of a CUDA graph: a replay calls the captured function again, and writes what it
    returns into the tensors that the capture returned, as a graph does."""

    def __init__(self, function, pool, stream):
        self.function, self.given_pool = function, pool
        self.out = function()

    def pool(self):
        return "pool"

    def replay(self):
        for old, new in zip(self.out, self.function()):
            old.copy_(new)


def graphs_without_gpu(monkeypatch):
    """-> a list that gets each `ReplayedCall`."""
    from extras import cuda_graph

    captured = []

    def capture(function, pool, stream):
        captured.append(ReplayedCall(function, pool, stream))
        return captured[-1], captured[-1].out

    monkeypatch.setattr(cuda_graph, "capture", capture)
    return captured


@GUIDANCE
def test_a_graph_replays_the_step_on_tensors_that_stay_where_they_are(
    net, running, guidance, monkeypatch
):
    captured = graphs_without_gpu(monkeypatch)
    monkeypatch.setattr(m, "KEYS", 4)  # 5 + 8 slots: a step looks at 8, 12 or 16 of them
    how = dict(empty=EMPTY, samples=2, guidance=guidance, batch=4)
    eager = [m.generate(net, PADDED, generator=seeded(s), **how) for s in (1, 2)]
    running("graph")
    first = m.generate(net, PADDED, generator=seeded(1), **how)
    graphs = len(captured)
    second = m.generate(net, PADDED, generator=seeded(2), **how)
    for (tokens, logprobs), (expected, expected_logprobs) in zip((first, second), eager):
        assert tokens.equal(expected) and logprobs.allclose(expected_logprobs, atol=1e-5)
    # The short last batch and the second call need no new ones, and all share one pool of memory.
    assert graphs == len(captured) == 3
    assert [graph.given_pool for graph in captured] == [None, "pool", "pool"]

    # Shorter prompts fit into the caches that are there, and add a graph for their first keys.
    kept, shorter = net.graphed, PADDED[:, :3].clamp(min=1)
    tokens, _ = m.generate(net, shorter, generator=seeded(2), **how)
    running("eager")
    assert tokens.equal(m.generate(net, shorter, generator=seeded(2), **how)[0])
    running("graph")
    assert net.graphed is kept and len(captured) == 4

    # The weights of an optimizer's step are read, in place.
    with torch.no_grad():
        net.gen_aligner[2].bias.add_(0.5)
        third = m.generate(net, PADDED, generator=seeded(1), **how)
        running("eager")
        expected = m.generate(net, PADDED, generator=seeded(1), **how)
        net.gen_aligner[2].bias.sub_(0.5)
    assert third[0].equal(expected[0]) and not third[0].equal(first[0])
    assert len(captured) == 4


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_a_graph_in_bf16_has_weights_of_its_own_that_follow_the_policy(net, running, monkeypatch):
    graphs_without_gpu(monkeypatch)
    net.bf16 = True
    try:
        running("graph")
        m.generate(net, PADDED, EMPTY, 2, generator=seeded(1))
        copy = net.graphed.model
        assert not any(p.requires_grad for p in copy.parameters())
        assert all(p.requires_grad for p in net.parameters())
        weight = net.layers[0].mlp.down_proj.weight
        assert copy.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16
        assert copy.gen_head[2].weight.dtype == torch.float32
        assert copy.norm.weight.data_ptr() == net.norm.weight.data_ptr()
        with torch.no_grad():
            weight.mul_(1.5)
            m.generate(net, PADDED, EMPTY, 2, generator=seeded(1))
            assert net.graphed.model is copy
            assert copy.layers[0].mlp.down_proj.weight.equal(weight.bfloat16())
            weight.div_(1.5)
    finally:
        net.bf16 = False


@GUIDANCE
def test_compiled_once_for_all_steps_prompts_and_models(guidance, monkeypatch):
    """One graph for decoding and two for scoring, with gradients and without, for two batches, two
    lengths of prompts, a policy and its reference. Python integers in the step, or masks by length,
    made dynamo compile anew until it gave up. So did two things in a whole run that a short test
    did not show: the last keys, which were all slots of the cache, and einops, whose table of
    libraries grows when it is first given a numpy array."""
    torch._dynamo.reset()
    monkeypatch.setattr(m, "KEYS", 4)
    counted = []

    def backend(graph, inputs):
        counted.append(graph)
        return graph.forward

    monkeypatch.setattr(m, "compiled_layer", cache(lambda: torch.compile(
        m.Layer.forward, fullgraph=True, dynamic=True, backend=backend)))
    policy, reference = sharp(CFG), sharp(CFG)
    for n_prompts, length in ((3, 5), (2, 4)):
        prompts = PADDED[:n_prompts, :length].clone()
        rows = prompts.repeat_interleave(2, 0)
        how = dict(empty=EMPTY, guidance=guidance)
        eager = m.generate(policy, prompts, samples=2, generator=seeded(4), **how)
        expected = m.score(policy, rows, eager[0], **how)[0]
        policy.running = reference.running = "compile"
        for model in (policy, reference):
            tokens, logprobs = m.generate(model, prompts, samples=2, generator=seeded(4), **how)
            assert tokens.equal(eager[0]) and logprobs.allclose(eager[1], atol=1e-5)
            with torch.no_grad():
                assert m.score(model, rows, tokens, **how)[0].allclose(expected, atol=1e-5)
        scored = m.score(policy, rows, tokens, **how)[0]
        scored.sum().backward()
        assert scored.allclose(expected, atol=1e-5)
        policy.running = reference.running = "eager"
    assert len(counted) == 3
    torch._dynamo.reset()


def test_guidance_of_one_is_the_conditional_branch():
    c, u = torch.randn(2, 5), torch.randn(2, 5)
    assert m.policy_logits(c, None, 1.0, 1.0).equal(c)
    assert m.policy_logits(c, u, 1.0, 1.0).allclose(c, atol=1e-6)
    assert m.policy_logits(c, u, 0.0, 1.0).equal(u)
    assert m.policy_logits(c.bfloat16(), u.bfloat16(), 3.0, 1.0).dtype == torch.float32


def test_temperature_divides_the_guided_logits():
    """The official release divides its scored logits by w, not the sampler's: not here."""
    c, u = torch.randn(2, 5), torch.randn(2, 5)
    guided = u + 5.0 * (c - u)
    assert m.policy_logits(c, u, 5.0, 0.5).allclose(guided / 0.5, atol=1e-5)


# --- run folders


def run_folder(path, dtype, **changes):
    """A tokenizer and a policy whose weights, norms apart, are stored in dtype."""
    torch.manual_seed(0)
    vq_cfg = VQConfig(ch=8, norm_groups=4, z_channels=8, codebook_size=32, codebook_dim=4)
    vq = VQModel(vq_cfg)
    save_weights(path / "tokenizer.safetensors", vq.state_dict(), config=asdict(vq_cfg))
    small = dict(n_layer=1, n_head=2, n_embd=16, n_ffn=32, image_vocab=32, code_dim=4)
    model = m.ImageModel(m.ModelConfig(**small | changes))
    tensors = {}
    for name, weight in model.state_dict().items():
        tensors[name] = weight if "norm" in name else weight.to(dtype)
    save_weights(path / "pretrain.safetensors", tensors, config=asdict(model.cfg))
    return path


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_policy_trains_in_fp32_and_is_saved_as_it_was_stored(tmp_path, stored):
    """Real weights come in bf16. A step of 1e-5 would be lost in them, so that training holds fp32
    weights; the file keeps its dtypes, and with an unchanged policy its bits."""
    run = run_folder(tmp_path, stored)
    vq, model = m.load_policy(run, "pretrain", "cpu", dtype="fp32")
    assert not model.training and not vq.training and not model.bf16
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    m.save_policy(run, "ppo", model)
    before, after = (load_weights(run / f"{name}.safetensors") for name in ("pretrain", "ppo"))
    assert before[1] == after[1]
    assert all(after[0][name].equal(weight) for name, weight in before[0].items())
    assert {weight.dtype for weight in after[0].values()} == {stored, torch.float32}


def test_a_policy_computes_in_the_precision_that_it_was_trained_in(tmp_path):
    """Found in review: on CUDA a table once compared an fp32 base with a bf16 policy, and an
    unchanged policy "gained" -33 %. The run itself says what it was trained in."""
    run = run_folder(tmp_path, torch.float32)
    (run / "config.json").write_text(json.dumps({"pretrain": {"dtype": "bf16"}}))
    for dtype, bf16 in ((None, True), ("bf16", True), ("fp32", False), ("auto", False)):
        assert m.load_policy(run, "pretrain", "cpu", dtype)[1].bf16 == bf16
    (run / "config.json").unlink()
    assert not m.load_policy(run, "pretrain", "cpu")[1].bf16


def test_a_policy_of_another_text_tokenizer_is_refused(tmp_path):
    run = run_folder(tmp_path, torch.float32, pad=7)
    with pytest.raises(UserError, match="another text tokenizer; a Janus run has its own in"):
        m.load_policy(run, "pretrain", "cpu")
