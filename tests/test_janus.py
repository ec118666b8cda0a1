"""extras/janus.py against transformers' Janus, built small and random from a config: names, text,
every number on the way, import, training, export.

No weights can be downloaded here. What is proved: that the same tensors give the same numbers as
other people's code. Where transformers departs from the original, deepseek-ai/Janus, the original
counts and the test says so."""

import argparse
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

import common
import eval_paircomp
import model as m
import sample
import train
from common import UserError, load_weights, save_weights
from extras import janus, judges, memory, peers, plots
from extras.draw_world import write_pairs
from extras.janus import BOI, BOS, PAD, JanusText
from extras.lora import with_adapter
from pairworld import pairworld
from reward import Judge, JudgeConfig, save_judges
from test_judges import end, nobody, serve
from tokenizer import VQConfig, VQModel, from_pixels

ROOT = Path(__file__).parents[1]
PROMPTS = [
    "three red circles left of a blue square",
    "a cat",
    "the letter K on a plain background, and a dog",
]
CLOSE = dict(rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# Small random checkpoints, in both layouts


def write_tokenizer(folder, first="<unused>"):
    """A byte-level BPE with Janus' special tokens; `first` moves their ids."""
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, show_progress=False
    )
    corpus = [*pairworld(20, "train", 0).flat_prompts(), "User: Assistant:\n\n"]
    tok.train_from_iterator(corpus, trainer)
    eos, end_of_image = "<｜end▁of▁sentence｜>", "<end_of_image>"
    user, assistant, image = "<|User|>", "<|Assistant|>", "<image_placeholder>"
    tok.add_special_tokens([first, BOS, eos, user, assistant, PAD, BOI, end_of_image, image])
    # A tokenizer.json may carry padding and truncation; a prompt must not follow them.
    tok.enable_padding(length=99)
    tok.enable_truncation(5)
    tok.save(str(folder / "tokenizer.json"))
    return tok


def small():
    text = transformers.LlamaConfig(
        vocab_size=360,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    vision = transformers.JanusVisionConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=4,
        num_image_tokens=64,
        projection_dim=64,
    )
    vq = transformers.JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=128,
        latent_channels=32,
        base_channels=32,
        channel_multiplier=[1, 1, 2],
        num_res_blocks=1,
        projection_dim=64,
        image_token_embed_dim=64,
    )
    config = transformers.JanusConfig(
        text_config=text, vision_config=vision, vq_config=vq, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    net = transformers.JanusForConditionalGeneration(config).eval()
    with torch.no_grad():  # far enough from zero that every part shows in the numbers
        for name, p in net.named_parameters():
            if "vision_model" not in name:
                p.add_(torch.randn_like(p), alpha=0.1 if "norm" in name or p.dim() < 2 else 0.05)
        net.model.generation_embeddings.weight.copy_(torch.randn(128, 8))
        codes = torch.randn(128, 8) * torch.rand(128, 1) * 3
        net.model.vqmodel.quantize.embedding.weight.copy_(codes)
    return net


OFFICIAL = [  # transformers' names -> the official ones, written down apart from extras/janus.py
    (r"^model\.language_model\.", "language_model.model."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.generation_embeddings\.", "gen_embed."),
    (r"^model\.generation_aligner\.fc1\.", "gen_aligner.layers.0."),
    (r"^model\.generation_aligner\.hidden_layers\.0\.", "gen_aligner.layers.2."),
    (r"^model\.generation_head\.proj_out\.", "gen_head.output_mlp_projector."),
    (r"^model\.generation_head\.", "gen_head."),
    (r"^model\.aligner\.fc1\.", "aligner.layers.0."),
    (r"^model\.aligner\.hidden_layers\.0\.", "aligner.layers.2."),
    (r"^model\.vision_model\.", "vision_model.vision_tower."),
    (r"^model\.vqmodel\.", "gen_vision_model."),
    (r"\.(down|up)\.(\d)", r".conv_blocks.\2"),
    (r"\.block\.", ".res."),
    (r"\.mid\.block_1\.", ".mid.0."),
    (r"\.mid\.attn_1\.", ".mid.1."),
    (r"\.mid\.block_2\.", ".mid.2."),
]


def official_name(name):
    for pattern, new in OFFICIAL:
        if not pattern.startswith(r"\.") or "gen_vision_model" in name:
            name = re.sub(pattern, new, name)
    return name


def official_config(text, image_size):
    """The config.json of deepseek-ai for a LlamaConfig."""
    keys = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads max_position_embeddings"
    ).split()
    return {
        "model_type": "multi_modality",
        "language_config": {"model_type": "llama", **{key: getattr(text, key) for key in keys}},
        "vision_config": {
            "cls": "CLIPVisionTower",
            "model_type": "vision",
            "params": {"image_size": image_size},
        },
        "gen_vision_config": {
            "cls": "VQ-16",
            "model_type": "gen_vision",
            "params": {"image_token_size": 128, "n_embed": 8},
        },
    }


def write_official(net, folder, kind="bin"):
    """The same weights as deepseek-ai publishes them: two shards of .bin with an index, or one
    safetensors."""
    folder.mkdir()
    write_tokenizer(folder)
    tensors = {official_name(k): v.detach().clone() for k, v in net.state_dict().items()}
    tensors["gen_vision_model.quantize.codebook_used"] = torch.zeros(65536)
    config = official_config(net.config.text_config, net.config.vision_config.image_size)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "processor_config.json").write_text("{}")
    if kind == "safetensors":
        safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    index = {}
    for i in range(2):
        file = f"pytorch_model-0000{i + 1}-of-00002.bin"
        names = list(tensors)[i::2]
        torch.save({name: tensors[name] for name in names}, folder / file)
        index |= dict.fromkeys(names, file)
    index = {name: index[name] for name in tensors}
    text = json.dumps({"weight_map": index})
    (folder / "pytorch_model.bin.index.json").write_text(text)
    return folder


def write_transformers(net, folder):
    net.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def net():
    torch.set_num_threads(1)
    return small()


@pytest.fixture(scope="session")
def folders(net, tmp_path_factory):
    """The same weights in every layout."""
    folder = tmp_path_factory.mktemp("janus")
    return {
        "official bin": write_official(net, folder / "bin"),
        "official safetensors": write_official(net, folder / "st", "safetensors"),
        "transformers": write_transformers(net, folder / "hf"),
    }


@pytest.fixture(scope="session")
def ours(folders):
    return janus.load_janus(folders["official bin"])


def prompt_ids(text, prompts=PROMPTS):
    return torch.from_numpy(text.encode_prompts(prompts, 99))


def attended(ids, pad):
    """Prompts (B, T) -> bool (B, T), False for the padding at the end."""
    slot = torch.arange(ids.shape[1], device=ids.device)
    return slot < m.prompt_lengths(ids, pad)[:, None]


def random_codes(rows, seed=1):
    return torch.randint(128, (rows, 64), generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------
# Text


def test_the_template_and_the_special_tokens(folders):
    path = folders["transformers"] / "tokenizer.json"
    text = JanusText(path)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    for prompt, message in (
        (" a red  circle\n", "<|User|>: a red  circle\n\n<|Assistant|>:"),
        ("", "<|User|>:<|Assistant|>:"),
        ("ein 龍 \ud800", "<|User|>: ein 龍 ?\n\n<|Assistant|>:"),
    ):
        ids = text.encode(prompt)
        theirs = fast(BOS + message + BOI, add_special_tokens=False, truncation=False)
        assert ids == theirs.input_ids
        assert ids[0] == text.bos and ids[-1] == text.boi and PAD not in fast.decode(ids)


def test_ids_are_looked_up_by_name(tmp_path):
    """The pad token is 100002 in Janus-Pro-1B and 100015 in 7B."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write_tokenizer(tmp_path / "a")
    tok = write_tokenizer(tmp_path / "b", PAD)
    a, b = (JanusText(tmp_path / x / "tokenizer.json") for x in "ab")
    assert a.pad != b.pad == tok.token_to_id(PAD)


def test_prompts_are_padded_at_the_end_and_dropped_ones_between_the_ends(folders):
    text = JanusText(folders["transformers"] / "tokenizer.json")
    plain = text.encode_prompts(PROMPTS, 99)
    dropped = text.encode_prompts(PROMPTS, 99, [False, True, True])
    for prompt, row in zip(PROMPTS, plain):
        ids = text.encode(prompt)
        assert row.tolist() == ids + [text.pad] * (len(row) - len(ids))
    assert (plain[0] == dropped[0]).all()
    empty = m.empty_like(torch.from_numpy(plain), text.pad)
    assert torch.from_numpy(dropped)[1:].equal(empty[1:])
    with pytest.raises(UserError, match="longer than the context of 9"):
        text.encode_prompts(PROMPTS, 9)


def test_the_empty_prompt_is_the_official_one_also_in_a_padded_batch(folders):
    """generation_inference.py: tokens[i, 1:-1] = pad_id, for one prompt without padding. In a
    padded row that line would wipe out BOS. Each row must be as it is alone."""
    text = JanusText(folders["transformers"] / "tokenizer.json")
    batch = prompt_ids(text)
    empty = m.empty_like(batch, text.pad)
    lengths = m.prompt_lengths(batch, text.pad)
    for prompt, row, length in zip(PROMPTS, empty, lengths):
        official = torch.tensor(text.encode(prompt))
        official[1:-1] = text.pad
        assert length == len(official)
        assert row[:length].equal(official) and (row[length:] == text.pad).all()
    # The padding inside is attended to, as in the official code.
    assert m.prompt_lengths(empty, text.pad).equal(lengths)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda s: s.replace(PAD, "<pad>"), "has no token <｜▁pad▁｜>"),
        (lambda s: s[:50], "broken JSON"),
        (lambda s: "{}", "not a tokenizer.json"),
    ],
)
def test_a_wrong_tokenizer_is_refused(folders, tmp_path, change, says):
    original = (folders["transformers"] / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(change(original))
    with pytest.raises(UserError, match=says):
        JanusText(tmp_path / "tokenizer.json")


# --------------------------------------------------------------------------------------------------
# Parity


@torch.no_grad()
def official_logits(net, ids, tokens, pad, guidance):
    """Image logits of one prompt as generation_inference.py makes them, through transformers'
    modules but without cache, padding and mask: ids (T,), tokens (N,) -> (N, V)."""
    empty = ids.clone()
    empty[1:-1] = pad
    both = net.get_input_embeddings()(torch.stack([ids, empty]))  # (2, T, C)
    images = net.prepare_embeddings_for_image_generation(tokens[:-1])  # (1, N-1, C)
    x = torch.cat([both, images.expand(2, -1, -1)], 1)
    h = net.model.language_model(inputs_embeds=x, use_cache=False).last_hidden_state
    cond, uncond = net.model.generation_head(h[:, len(ids) - 1 :])  # (N, V) each
    return uncond + guidance * (cond - uncond)


@torch.no_grad()
def test_text_embeddings_and_hidden_states(net, ours):
    vq, model = ours
    ids = prompt_ids(model.text)
    mask = attended(ids, model.cfg.pad)
    embedded = model.embed_text(ids)
    assert embedded.equal(net.get_input_embeddings()(ids))
    theirs = net.model.language_model(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=torch.arange(ids.shape[1])[None],
        use_cache=False,
    ).last_hidden_state
    hidden = model.hidden(embedded, m.rope_table(model.cfg, ids.shape[1], ids.device))
    torch.testing.assert_close(hidden[mask], theirs[mask], **CLOSE)
    codes = torch.arange(128)[None]
    expected = net.prepare_embeddings_for_image_generation(codes)
    torch.testing.assert_close(model.embed_images(codes, torch.arange(128)), expected, **CLOSE)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@torch.no_grad()
def test_image_logits_with_and_without_guidance(net, ours, guidance):
    """Of a padded batch, against each prompt alone."""
    _, model = ours
    ids = prompt_ids(model.text)
    tokens = random_codes(3)
    cond, *uncond = (model.gen_head(h).view(3, 64, 128)
                     for h in m.both_hidden(model, ids, tokens, None, guidance))
    logits = m.policy_logits(cond, *(uncond or [None]), guidance, 1.0)
    scored = m.score(model, ids, tokens, None, guidance)[0]
    for i, prompt in enumerate(PROMPTS):
        alone = torch.tensor(model.text.encode(prompt))
        theirs = official_logits(net, alone, tokens[i], model.cfg.pad, guidance)
        torch.testing.assert_close(logits[i], theirs, **CLOSE)
        logprobs = theirs.log_softmax(-1).gather(1, tokens[i][:, None])[:, 0]
        torch.testing.assert_close(scored[i], logprobs, **CLOSE)


@torch.no_grad()
def test_the_official_loop_that_bench_times_is_the_same_policy(net, ours):
    """A peer that computed something else, or less, would make the comparison worthless."""
    _, model = ours
    ids = prompt_ids(model.text)
    tokens = random_codes(3)
    padded = peers.left_padded(ids, m.prompt_lengths(ids, model.text.pad))
    theirs = peers.official_score(net, *padded, tokens, 5.0, model.text.pad)
    scored = m.score(model, ids, tokens, None, 5.0)[0]
    torch.testing.assert_close(scored, theirs, rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    drawn = peers.official_rollout(net, *padded, 5.0, model.text.pad)
    assert drawn.shape == (3, 64) and drawn.unique().numel() > 20
    # It draws likely tokens: far likelier than random ones.
    assert m.score(model, ids, drawn, None, 5.0)[0].mean() > scored.mean() + 0.1


@torch.no_grad()
def greedy(model, prompts):
    ids = prompt_ids(model.text, prompts)
    return m.generate(model, ids, None, 1, 5.0, 1e-6, torch.Generator().manual_seed(0))[0]


def greedy_of_transformers(net, text, prompts):
    ids = prompt_ids(text, prompts)
    ids, mask = peers.left_padded(ids, m.prompt_lengths(ids, text.pad))
    net.generation_config.generation_kwargs = {"boi_token_id": text.boi}
    return net.generate(
        ids,
        attention_mask=mask.long(),
        generation_mode="image",
        do_sample=False,
        guidance_scale=5.0,
        max_new_tokens=64,
        bos_token_id=text.bos,
        pad_token_id=text.pad,
        eos_token_id=None,
        use_cache=True,
        output_scores=True,
        return_dict_in_generate=True,
    )


def test_greedy_tokens_of_a_padded_batch(net, ours):
    _, model = ours
    theirs = greedy_of_transformers(net, model.text, PROMPTS)
    assert greedy(model, PROMPTS).equal(theirs.sequences)
    # A trap: transformers returns the scores of the last step alone, so that log-probs cannot be
    # had from its sampler and need a replay.
    assert len(theirs.scores) == 2 * len(PROMPTS)
    assert theirs.scores.shape == (2 * len(PROMPTS), 128)


@torch.no_grad()
def test_sampling_with_guidance_is_scored_as_it_was_sampled(ours):
    _, model = ours
    ids = prompt_ids(model.text)
    generator = torch.Generator().manual_seed(3)
    tokens, logprobs = m.generate(model, ids, None, 2, 5.0, 0.9, generator)
    scored, _ = m.score(model, ids.repeat_interleave(2, 0), tokens, None, 5.0, 0.9)
    torch.testing.assert_close(scored, logprobs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_divergence_of_a_pair_gives_each_prompt_an_empty_one_of_its_own(net, ours):
    _, model = ours
    ids = prompt_ids(model.text, PROMPTS[:2])
    tokens = random_codes(1)
    p, q = (
        official_logits(net, torch.tensor(model.text.encode(t)), tokens[0], model.cfg.pad, 3.0)
        for t in PROMPTS[:2]
    )
    p, q = p.softmax(-1), q.softmax(-1)
    mean = (p + q) / 2
    js = 0.5 * (p * (p / mean).log()).sum(-1) + 0.5 * (q * (q / mean).log()).sum(-1)
    divergence = m.prompt_divergence(model, ids[:1], ids[1:], tokens, None, 3.0)
    torch.testing.assert_close(divergence[0], js, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_vq_decode_and_encode(net, ours):
    """A trap: transformers' quantizer takes the nearest code by plain distance, where the original
    (vq_model.py, l2_norm) normalizes latents and codes first. The original counts, so that our ids
    are compared with those of transformers' own quantizer on normalized inputs."""
    (vq, _), theirs = ours, net.model.vqmodel
    ids = random_codes(2, seed=2)
    torch.testing.assert_close(vq.decode(ids), theirs.decode(ids), **CLOSE)
    x = from_pixels(pairworld(2, "train", 0).images.reshape(-1, 32, 32, 3))
    z = theirs.quant_conv(theirs.encoder(x))  # (4, 8, 8, 8)
    torch.testing.assert_close(vq.latents(x), F.normalize(z, dim=1), **CLOSE)
    codes = theirs.quantize.embedding.weight.clone()
    theirs.quantize.embedding.weight.copy_(F.normalize(codes, dim=-1))
    normalized = theirs.quantize(F.normalize(z, dim=1))[2].view(4, 64)
    theirs.quantize.embedding.weight.copy_(codes)
    assert vq.encode(x).equal(normalized)
    assert not theirs.encode(x).image_tokens.view(4, 64).equal(normalized)


# --------------------------------------------------------------------------------------------------
# Loading


def state(modules):
    tensors = {}
    for i, module in enumerate(modules):
        tensors |= {f"{i}.{k}": v for k, v in module.state_dict().items()}
    return tensors


def same_bits(a, b):
    if a.keys() != b.keys():
        return False
    return all(a[k].dtype == b[k].dtype and a[k].equal(b[k]) for k in a)


def test_every_layout_loads_the_same_bits(net, folders, ours):
    for folder in folders.values():
        vq, model = janus.load_janus(folder)
        assert same_bits(state((vq, model)), state(ours))
        geometry = dict(n_layer=2, n_head=4, n_image=64, n_text=512 - 64, image_positions=False)
        assert model.cfg == replace(model.cfg, pad=model.text.pad, **geometry)
        assert not vq.quantize.embedding.weight.requires_grad
        assert model.embed_tokens.weight.requires_grad and not model.training
        assert not model.bf16 and set(model.stored.values()) == {torch.float32}
    attention = net.model.language_model.layers[1].self_attn
    qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    assert ours[1].layers[1].self_attn.qkv_proj.weight.equal(qkv)


def test_the_geometries_of_the_real_ones():
    """FACTS: 1B and 7B. VQ-16 as the official class has it."""
    sizes = {}
    with torch.device("meta"):
        for name, cfg in memory.JANUS.items():
            sizes[name] = sum(p.numel() for p in m.ImageModel(cfg).parameters())
        vq = VQModel(VQConfig.janus())
    # 1B by hand: 102400*2048 + 16384*8 + (8*2048+2048 + 2048*2048+2048)
    # + 24*(4*2048*2048 + 3*2048*5632 + 2*2048) + 2048 + (2048*2048+2048 + 2048*16384+16384)
    assert sizes == {"1B": 1_485_053_952, "7B": 6_591_791_104}
    found = {}
    for name, tensor in vq.state_dict().items():
        found[janus.their_vq_name(name, "official")] = None, tuple(tensor.shape)
    assert janus.vq_config(found, "official", 384) == VQConfig.janus()
    assert VQConfig.janus().grid == 24


def broken(folder, to, change):
    """A copy of an official safetensors folder with another set of tensors."""
    shutil.copytree(folder, to)
    tensors = safetensors.torch.load_file(to / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, to / "model.safetensors")
    return to


LAYER = "language_model.model.layers."


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t: t.pop("gen_head.vision_head.bias"), "missing gen_head.vision_head.bias"),
        (
            lambda t: t.pop(LAYER + "1.self_attn.k_proj.weight"),
            f"missing {LAYER}1.self_attn.k_proj.weight",
        ),
        (
            lambda t: t.pop("gen_vision_model.decoder.norm_out.weight"),
            "missing gen_vision_model.decoder.norm_out.weight",
        ),
        (lambda t: t.update({"gen_x.weight": torch.zeros(1)}), "unexpected gen_x.weight"),
        (
            lambda t: t.update({LAYER + "2.mlp.up_proj.weight": torch.zeros(96, 64)}),
            f"unexpected {LAYER}2",
        ),
        (
            lambda t: t.update({"gen_embed.weight": torch.zeros(127, 8)}),
            r"gen_embed.weight is \(127, 8\), should be \(128, 8\)",
        ),
    ],
)
def test_loading_is_strict(folders, tmp_path, change, says):
    with pytest.raises(UserError, match=says):
        janus.load_janus(broken(folders["official safetensors"], tmp_path / "x", change))


def test_what_generation_does_not_use_may_be_missing(folders, ours, tmp_path):
    unused = ("vision_model.", "aligner.", "language_model.lm_head.")

    def strip(tensors):
        for name in [name for name in tensors if name.startswith(unused)]:
            del tensors[name]

    folder = broken(folders["official safetensors"], tmp_path / "x", strip)
    assert same_bits(state(janus.load_janus(folder)), state(ours))


@pytest.mark.parametrize(
    "change, says",
    [
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type is linear"),
        ({"hidden_act": "gelu"}, "hidden_act is gelu"),
        ({"vocab_size": 200}, "knows 3.. tokens, config.json 200"),
        ({"num_hidden_layers": 3}, "missing language_model.model.layers.2"),
        ({"head_dim": 32}, "head_dim is 32"),
    ],
)
def test_a_geometry_that_is_not_januss_is_refused(folders, tmp_path, change, says):
    folder = tmp_path / "x"
    shutil.copytree(folders["official bin"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["language_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=says):
        janus.load_janus(folder)


class Evil:
    def __reduce__(self):
        return print, ("pwned",)


SHARDS = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]


@pytest.mark.parametrize(
    "harm, says",
    [
        (lambda f: (f / SHARDS[1]).unlink(), f"{SHARDS[1]}; finish the download"),
        (
            lambda f: (f / SHARDS[0]).write_bytes((f / SHARDS[0]).read_bytes()[:9999]),
            "cannot be read as a file of tensors",
        ),
        (
            lambda f: torch.save({"x": Evil()}, f / SHARDS[0]),
            "cannot be read as a file of tensors",
        ),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: no such file"),
        (
            lambda f: [p.unlink() for p in f.glob("pytorch_model*")],
            "holds no model.safetensors and no pytorch_model.bin",
        ),
    ],
)
def test_a_broken_folder_is_one_line(folders, tmp_path, harm, says, capsys):
    shutil.copytree(folders["official bin"], tmp_path / "x")
    harm(tmp_path / "x")
    with pytest.raises(UserError, match=says) as error:
        janus.load_janus(tmp_path / "x")
    assert "\n" not in str(error.value) and "pwned" not in capsys.readouterr().out


@pytest.mark.parametrize("key", ["ema", "model", "state_dict", None])
def test_llamagens_tokenizer_loads(net, ours, tmp_path, key):
    tensors = {"quantize.codebook_used": torch.zeros(65536)}
    for name, tensor in net.state_dict().items():
        if name.startswith("model.vqmodel."):
            tensors[official_name(name).removeprefix("gen_vision_model.")] = tensor
    content = {key: tensors} if key else tensors
    if key == "ema":  # a training state of LlamaGen
        zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        content |= {"model": zeros, "args": argparse.Namespace(lr=1e-4), "steps": 7}
    path = tmp_path / "vq_ds16_t2i.pt"
    torch.save(content, path)
    vq = janus.load_vq(path, size=32)
    assert same_bits(vq.state_dict(), ours[0].state_dict()) and vq.cfg == ours[0].cfg
    out = tmp_path / "tokenizer.safetensors"
    janus.main(["--vq", str(path), "--image-size", "32", "--out", str(out)])
    assert same_bits(load_weights(out)[0], ours[0].state_dict())


PEAK = """
import sys
from pathlib import Path
import torch, tokenizers
from extras import janus
from model import ImageModel

def status(key):
    return int(Path("/proc/self/status").read_text().split(key)[1].split()[0]) * 1024

# A tiny one first, for what the libraries take at their first use: 85 MB whatever the weights.
janus.load_janus(sys.argv[2])
before = status("VmRSS:")
if sys.argv[3] == "all at once":
    # The control: a loader that holds all of the file's tensors while it copies them.
    one_by_one = janus.read_tensors
    def all_at_once(path, names):
        return [(name, tensor.clone()) for name, tensor in one_by_one(path, names)]
    janus.read_tensors = all_at_once
modules = janus.load_janus(sys.argv[1])
weights = sum(p.nbytes for module in modules for p in module.state_dict().values())
# VmHWM is of this program alone. ru_maxrss survives exec, so that it would begin at the peak of the
# tests that start this one.
print((status("VmHWM:") - before) / weights)
"""


def peak_of_loading(folder, small_folder, how):
    """Peak of the process over the weights that it loads, or the end of the error."""
    argv = [sys.executable, "-c", PEAK, str(folder), str(small_folder), how]
    out = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
    return float(out.stdout) if out.returncode == 0 else out.stderr[-300:]


def write_large(folder, kind):
    """150 MB in bf16, in the official layout: every tensor ones, since the numbers do not count."""
    write_official(small(), folder, kind)
    config = json.loads((folder / "config.json").read_text())
    config["language_config"] |= dict(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=12,
        num_key_value_heads=12,
        vocab_size=20000,
    )
    (folder / "config.json").write_text(json.dumps(config))
    vq = janus.load_vq(folder)
    with torch.device("meta"):
        model = m.ImageModel(m.ModelConfig(20000, 128, 448, 64, 8, 12, 768, 2048, 8, False))
    tensors = {}
    for name, tensor in vq.state_dict().items():
        tensors[janus.their_vq_name(name, "official")] = tensor.bfloat16()
    for own, tensor in model.state_dict().items():
        names = janus.their_policy_names(own, "official")
        shape = tensor.shape[0] // len(names), *tensor.shape[1:]
        for name in names:
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
    if kind == "safetensors":
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
    else:
        (folder / "pytorch_model.bin.index.json").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc")
@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_peak_memory_of_loading(folders, tmp_path, kind):
    """What 143 MB of weights add to the process at its peak: at most 1.2 times the weights, and
    that includes what the file's mapping holds. A loader that is not careful is seen by the same
    measurement."""
    folder = write_large(tmp_path / "big", kind)
    ratios = {}
    for how in ("one by one", "all at once"):
        ratios[how] = peak_of_loading(folder, folders[f"official {kind}"], how)
    print(f"peak / weights, {kind}: {ratios}")
    assert 0.9 < ratios["one by one"] < 1.2 and ratios["all at once"] > 1.5


def test_check_says_what_a_folder_holds(folders, capsys):
    janus.main(["--check", str(folders["official bin"]), "--device", "cpu"])
    out = capsys.readouterr().out
    assert "n_layer=2" in out
    assert "in the layout official; left out if it is there: vision_model., aligner." in out


# --------------------------------------------------------------------------------------------------
# Import


def import_run(folder, run):
    janus.main(["--import", str(folder), "--out", str(run)])
    return run


def test_a_checkpoint_becomes_a_run_folder(folders, ours, tmp_path, capsys):
    """train.py knows nothing of Janus: the folder brings text, both models and the preset along."""
    folder = folders["transformers"]
    run = import_run(folder, tmp_path / "run")
    files = ["config.json", "pretrain.safetensors", "text.json", "tokenizer.safetensors"]
    assert sorted(path.name for path in run.iterdir()) == files
    assert (run / "text.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert json.loads((run / "config.json").read_text())["preset"] == "janus"
    vq, model = m.load_policy(run, "pretrain", "cpu")
    assert same_bits(state((vq, model)), state(ours)) and model.cfg == ours[1].cfg
    assert isinstance(model.text, JanusText)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"python train.py --stage ppo --out {run} --data pairs.json --judge URL"


def test_an_import_that_was_killed_goes_on_and_a_whole_one_is_kept(folders, tmp_path):
    """The base model comes last, so that a run folder that has one is whole."""
    folder = folders["transformers"]
    run = import_run(folder, tmp_path / "run")
    whole = (run / "pretrain.safetensors").read_bytes()
    (run / "pretrain.safetensors").unlink()
    import_run(folder, run)
    assert (run / "pretrain.safetensors").read_bytes() == whole
    with pytest.raises(UserError, match="has a base model already"):
        import_run(folder, run)


def test_a_broken_checkpoint_leaves_no_run_folder(folders, tmp_path):
    def harm(tensors):
        del tensors["gen_head.vision_head.bias"]

    bad = broken(folders["official safetensors"], tmp_path / "x", harm)
    with pytest.raises(UserError, match="missing gen_head.vision_head.bias"):
        import_run(bad, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_folder_of_another_tokenizer_is_refused(folders, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="begun with another tokenizer"):
        import_run(folders["transformers"], tmp_path / "run")


def test_a_run_folder_without_its_text_is_refused(folders, tmp_path):
    run = import_run(folders["transformers"], tmp_path / "run")
    (run / "text.json").unlink()
    with pytest.raises(UserError, match="made for another text tokenizer"):
        m.load_policy(run, "pretrain", "cpu")


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--import", "x"], "--import DIR wants --out RUN"),
        (["--export", "x", "--run", "y"], "--export OUT wants --run RUN and --janus DIR"),
        (["--vq", "x"], "--vq FILE wants --out FILE"),
        (["--import", "nowhere", "--out", "x"], "tokenizer.json: no such file"),
    ],
)
def test_what_a_command_line_lacks(argv, says):
    with pytest.raises(UserError, match=says):
        janus.main(argv)


# --------------------------------------------------------------------------------------------------
# Export


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["official bin", "official safetensors", "transformers"])
def test_a_round_trip_is_bitwise(tmp_path, layout, dtype):
    net = small().to(dtype)
    if layout == "transformers":
        folder = write_transformers(net, tmp_path / "in")
    else:
        folder = write_official(net, tmp_path / "in", layout.split()[-1])
    run = import_run(folder, tmp_path / "run")
    out = janus.export(tmp_path / "out", run, folder, "pretrain")
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in folder.iterdir())
    for path in folder.iterdir():
        if path.suffix == ".bin":  # a zip carries dates; what is in it counts
            before = torch.load(path, weights_only=True)
            after = torch.load(out / path.name, weights_only=True)
            assert list(before) == list(after) and same_bits(before, after)
        else:
            assert (out / path.name).read_bytes() == path.read_bytes()


def all_tensors(folder):
    tensors = {}
    for file in janus.weight_files(folder):
        tensors |= dict(janus.read_tensors(file, list(janus.read_shapes([file]))))
    return tensors


@pytest.mark.parametrize("layout", ["official bin", "official safetensors", "transformers"])
def test_trained_weights_come_out_in_their_places(folders, tmp_path, layout):
    folder = folders[layout]
    run = import_run(folder, tmp_path / "run")
    tensors, meta = load_weights(run / "pretrain.safetensors")
    trained = {name: tensor + 1 for name, tensor in tensors.items()}
    save_weights(run / "ppo.safetensors", trained, **meta)
    out = janus.export(tmp_path / "out", run, folder)
    vq, model = janus.load_janus(out)
    assert same_bits(model.state_dict(), trained)
    assert same_bits(vq.state_dict(), load_weights(run / "tokenizer.safetensors")[0])
    before, after = all_tensors(folder), all_tensors(out)
    prefixes = janus.LAYOUTS[layout.split()[0]]["left_out"]
    left_out = [name for name in before if name.startswith(prefixes)]
    assert len(left_out) > 5
    assert all(before[name].equal(after[name]) for name in left_out)


@torch.no_grad()
def test_an_adapter_is_exported_merged_and_transformers_draws_its_tokens(folders, tmp_path):
    """PPO with --lora leaves an adapter. Whoever loads the export knows nothing of it."""
    folder = folders["transformers"]
    run = import_run(folder, tmp_path / "run")
    _, base = m.load_policy(run, "pretrain", "cpu")
    policy = with_adapter(base, 4)
    for name, p in policy.named_parameters():
        if name.endswith(".up"):
            p.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    m.save_policy(run, "ppo", policy)
    out = janus.export(tmp_path / "out", run, folder)
    exported = janus.load_janus(out)[1]
    ids = prompt_ids(policy.text)
    ours, theirs = (m.score(model, ids, random_codes(3), None, 5.0)[0]
                    for model in (policy, exported))
    assert (ours - theirs).abs().max() < 1e-5
    net = transformers.JanusForConditionalGeneration.from_pretrained(out).eval()
    drawn = greedy_of_transformers(net, policy.text, PROMPTS).sequences
    assert greedy(policy, PROMPTS).equal(drawn) and not greedy(base, PROMPTS).equal(drawn)


def test_an_export_that_cannot_be(folders, tmp_path):
    folder = folders["transformers"]
    run = import_run(folder, tmp_path / "run")
    with pytest.raises(UserError, match="ppo.safetensors: no such checkpoint"):
        janus.export(tmp_path / "out", run, folder)
    tensors, meta = load_weights(run / "pretrain.safetensors")
    save_weights(run / "ppo.safetensors", tensors, config=meta["config"] | {"n_layer": 3})
    with pytest.raises(UserError, match="n_layer 3 instead of 2"):
        janus.export(tmp_path / "out", run, folder)
    with pytest.raises(UserError, match="is there already"):
        janus.export(run, run, folder)
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------
# Training


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(pairworld(32, "train", 0), folder)
    return str(folder / "pairs.json")


def add_judges(run):
    torch.manual_seed(0)
    judges = {
        "train": Judge(JudgeConfig(kind="attend", width=32)),
        "heldout": Judge(JudgeConfig(kind="convolve", width=32)),
    }
    save_judges(run / "reward.safetensors", judges)


@pytest.fixture(scope="module")
def server():
    """A judge's server process -> its URL."""
    process, url = serve()
    yield url
    end(process)


@pytest.fixture
def no_curves(monkeypatch):
    monkeypatch.setattr(plots, "draw_curves", lambda run: run)


def test_the_whole_way(folders, pairs, server, tmp_path, no_curves, capsys, monkeypatch):
    """Import, fine-tune, align by a judge on a server, sample, write PairComp's images, score,
    summarize, export; transformers loads the export and samples the same tokens."""
    # The last state, were it worse than the base.
    monkeypatch.setattr(train.BestState, "finish", lambda self, step, base: (1.0, 1.0))
    quick = train.BestState.test
    monkeypatch.setattr(train.BestState, "test", lambda self, step: (
        quick(self, step) if step == 0 else {"test": self.before_after.quick(self.policy)[1]}))
    folder, base, run = folders["transformers"], tmp_path / "base", tmp_path / "run"
    benchmark = str(tmp_path / "prompts.json")
    pair = {"category": "Color difference", "caption1": PROMPTS[0], "caption2": PROMPTS[1]}
    Path(benchmark).write_text(json.dumps([pair]))
    import_run(folder, base)
    settings = ["--data", pairs, "--out", str(run), "--device", "cpu", "--lr", "1e-3"]
    pretrain = ["--init", str(base), "--steps", "3", "--batch", "4", "--microbatch", "2"]
    train.main(["--stage", "pretrain", *settings, *pretrain])
    ppo = ["--steps", "2", "--pairs", "2", "--samples", "3", "--microbatch", "3"]
    ppo += ["--difference", "0.5", "--ground-truth", "1", "1", "1", "--eval-every", "1"]
    ppo += ["--judge", server, "--heldout-judge", server, "--test", benchmark]
    train.main(["--stage", "ppo", *settings, *ppo])

    config = json.loads((run / "config.json").read_text())
    assert config["preset"] == "janus" and config["ppo"]["guidance"] == 5.0
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [entry["stage"] for entry in log] == ["pretrain"] * 3 + ["ppo"] * 2
    assert all(0 < entry["test"]["heldout"]["s_g"] < 1 for entry in log[3:])
    report = json.loads((run / "paircomp.json").read_text())
    assert set(report["ppo"]) == {"train", "heldout", "pairs"}
    assert list(report["base"]["heldout"]) == ["color", "average"]
    assert (run / "samples" / "before_after.png").exists()
    weights = [janus.load_janus(folder)[1].state_dict()]
    weights += [load_weights(run / f"{stage}.safetensors")[0] for stage in ("pretrain", "ppo")]
    for before, after in zip(weights, weights[1:]):
        for name in ("gen_head.2.weight", "layers.0.self_attn.qkv_proj.weight", "gen_embed.weight"):
            assert not before[name].equal(after[name])

    out = str(tmp_path / "a.png")
    two_prompts = ["--prompt", PROMPTS[0], "--prompt", PROMPTS[1]]
    sample.main(["--run", str(run), *two_prompts, "--n", "2", "--out", out, "--device", "cpu"])
    images = tmp_path / "images"
    argv = ["--images", str(images), "--prompts", benchmark]
    policy = ["--run", str(run), "--batch", "2", "--device", "cpu"]
    eval_paircomp.main(["generate", *argv, *policy])
    names = [f"0_{i}_{k}.png" for i in range(2) for k in range(2)]
    assert sorted(path.name for path in images.iterdir()) == names
    assert Image.open(images / "0_0_0.png").size == (32, 32)
    score_file = tmp_path / "scores.json"
    eval_paircomp.main(["score", *argv, "--judge", server, "--out", str(score_file)])
    scores = [entry["score"] for entry in json.loads(score_file.read_text())["0"]]
    # What this judge answers: how red an image is.
    red = [np.asarray(Image.open(images / name))[..., 0].mean() / 255 for name in names]
    assert scores == pytest.approx(red, abs=1e-3) and len(set(scores)) > 1
    capsys.readouterr()
    eval_paircomp.main(["summarize", str(score_file), "--prompts", benchmark])
    assert f"{100 * np.mean(scores):.1f}" in capsys.readouterr().out

    export = tmp_path / "export"
    janus.main(["--export", str(export), "--run", str(run), "--janus", str(folder)])
    load = transformers.JanusForConditionalGeneration.from_pretrained
    net = load(export, dtype=torch.float32).eval()
    model = m.load_policy(run, "ppo", "cpu")[1]
    assert same_bits(model.state_dict(), janus.load_janus(export)[1].state_dict())
    tokens = greedy(model, PROMPTS)
    assert tokens.equal(greedy_of_transformers(net, model.text, PROMPTS).sequences)
    assert not tokens.equal(greedy(janus.load_janus(folder)[1], PROMPTS))


def test_the_base_model_is_sampled_before_any_training(folders, tmp_path):
    run = import_run(folders["transformers"], tmp_path / "run")
    out = tmp_path / "a.png"
    argv = ["--run", str(run), "--policy", "pretrain", "--prompt", PROMPTS[0], "--n", "1"]
    sample.main([*argv, "--out", str(out), "--device", "cpu"])
    assert out.exists()


def test_stopped_and_resumed_ends_bitwise_equal(folders, pairs, tmp_path, monkeypatch, no_curves):
    """Stopped hard in the second rollout, with the state of the first on disk."""
    monkeypatch.setattr(common, "SAVE_SECONDS", 0)
    argv = ["--stage", "ppo", "--data", pairs, "--device", "cpu", "--steps", "2", "--pairs", "2"]
    argv += ["--samples", "2", "--minibatches", "1", "--microbatch", "4", "--lr", "1e-3"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for run in (whole, stopped):
        import_run(folders["official bin"], run)
        add_judges(run)
    train.main([*argv, "--out", str(whole)])
    generate, calls = train.generate, []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:  # one call a rollout
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(train, "generate", fail)
    with pytest.raises(KeyboardInterrupt):
        train.main([*argv, "--out", str(stopped)])
    assert load_weights(stopped / "ppo.state")[1]["step"] == 1
    monkeypatch.setattr(train, "generate", generate)
    train.main([*argv, "--resume", "--out", str(stopped)])
    ends = [(run / "ppo.safetensors").read_bytes() for run in (whole, stopped)]
    assert ends[0] == ends[1]


def gradients(model, ids, tokens, microbatch):
    model.zero_grad()
    for rows in torch.arange(len(ids)).split(microbatch):
        logprobs, _ = m.score(model, ids[rows], tokens[rows], None, 3.0)
        (-logprobs.mean() * len(rows) / len(ids)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_recompute_and_microbatches_change_no_gradient(folders):
    model = janus.load_janus(folders["transformers"])[1]
    ids = prompt_ids(model.text)
    tokens = random_codes(3)
    plain = gradients(model, ids, tokens, 3)
    model.recompute = True
    for microbatch in (3, 2, 1):
        for name, gradient in gradients(model, ids, tokens, microbatch).items():
            atol = 1e-6 + 1e-5 * plain[name].abs().max().item()
            torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=atol)


@torch.no_grad()
def test_an_fp32_policy_and_its_bf16_reference_agree_to_the_bit(tmp_path):
    """Master weights in fp32, the reference as stored in bf16, both computing in bf16: the KL
    starts at exactly zero. A policy is tested as it is sampled, not in fp32 at twice the memory."""
    folder = write_official(small().bfloat16(), tmp_path / "bf16")
    policy, reference = (janus.load_janus(folder)[1] for _ in range(2))
    assert reference.embed_tokens.weight.dtype == torch.bfloat16
    assert reference.norm.weight.dtype == torch.float32
    policy.float()
    assert policy.bf16 and reference.bf16
    ids = prompt_ids(policy.text)
    tokens = random_codes(3)
    scored = m.score(policy, ids, tokens, None, 5.0)[0]
    by_reference = m.score(reference, ids, tokens, None, 5.0)[0]
    assert scored.equal(by_reference) and scored.dtype == torch.float32
    sampled = []
    for model in (policy, reference):
        generator = torch.Generator().manual_seed(0)
        sampled.append(m.generate(model, ids, None, 1, 5.0, generator=generator))
    assert sampled[0][0].shape == (3, 64) and sampled[0][0].equal(sampled[1][0])
    assert sampled[0][1].equal(sampled[1][1])


def test_bf16_weights_leave_training_as_they_came(pairs, tmp_path, no_curves, monkeypatch):
    folder = write_official(small().bfloat16(), tmp_path / "bf16")
    run = import_run(folder, tmp_path / "run")
    add_judges(run)
    argv = ["--stage", "ppo", "--data", pairs, "--device", "cpu", "--dtype", "bf16", "--steps", "1"]
    argv += ["--pairs", "2", "--samples", "2", "--minibatches", "1", "--microbatch", "8"]
    # The last state, were it worse than the base.
    monkeypatch.setattr(train.BestState, "finish", lambda self, step, base: (1.0, 1.0))
    train.main([*argv, "--lr", "0.01", "--out", str(run)])
    before, after = (load_weights(run / f"{s}.safetensors")[0] for s in ("pretrain", "ppo"))
    assert {k: v.dtype for k, v in before.items()} == {k: v.dtype for k, v in after.items()}
    assert after["embed_tokens.weight"].dtype == torch.bfloat16
    assert not before["gen_head.2.weight"].equal(after["gen_head.2.weight"])


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--stage", "tokenizer"], "tokenizer.safetensors is there already"),
        (["--stage", "pretrain", "--data", "x"], "pretrain.safetensors is there already"),
        (["--stage", "ppo"], "--data"),
        (["--stage", "ppo", "--data", "x", "--microbatch", "-1"], "should be at least 0"),
        (["--stage", "ppo", "--janus", "x"], "python -m extras.janus --import DIR --out RUN"),
    ],
)
def test_what_a_janus_run_refuses(folders, tmp_path, argv, says):
    run = import_run(folders["transformers"], tmp_path / "run")
    with pytest.raises(UserError, match=says):
        train.main([*argv, "--out", str(run)])


def test_a_janus_run_wants_a_judge_and_leaves_nothing_behind(folders, pairs, tmp_path, monkeypatch):
    """Without --judge it once began to train PairWorld's small judges; with one that is not there
    it left a base model, which the next command took for a trained one."""
    run = import_run(folders["transformers"], tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    argv = ["--stage", "ppo", "--data", pairs, "--out", str(run)]
    with pytest.raises(UserError, match="say who judges: --judge URL"):
        train.main(argv)
    # One request and no repetitions.
    monkeypatch.setattr(judges.ServerJudge.__init__, "__defaults__", (1, 5.0, 0))
    with pytest.raises(UserError, match="the judge is gone .*asked 1 times"):
        train.main([*argv, "--judge", nobody()])
    after = {path.name: path.read_bytes() for path in run.iterdir() if path.name != ".lock"}
    assert after == before
    empty = ["--stage", "ppo", "--preset", "janus", "--data", pairs, "--out", str(tmp_path / "new")]
    with pytest.raises(UserError, match="holds no checkpoint; docs/janus.md says how"):
        train.main(empty)


def test_the_janus_preset_comes_with_the_folder(folders, tmp_path):
    """A real model fine-tuned with the small one's learning rate, or sampled without guidance, is
    spoiled: whoever starts from a checkpoint has the janus preset, in a folder of --init too."""
    run = import_run(folders["transformers"], tmp_path / "run")
    more = ["--data", "x"]
    assert train.parse(["--stage", "ppo", "--out", str(run), *more])[2].guidance == 5.0
    tuned = ["--stage", "pretrain", "--init", str(run), "--out", str(tmp_path / "tuned"), *more]
    assert train.parse(tuned)[2].muon_lr == 0.0
    tiny = ["--stage", "ppo", "--preset", "tiny", "--out", str(run), *more]
    assert train.parse(tiny)[2].guidance == 1.0
    assert train.parse(["--stage", "ppo"])[2] == train.PPO()
