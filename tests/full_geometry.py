"""Janus-Pro at its real size with random weights, against transformers: what the tests prove on
tiny models, proved once on large ones.

    python tests/full_geometry.py --size 1B                # 9 GB of memory and 12 GB of disk
    python tests/full_geometry.py --size 7B --layers 4     # 7B's widths, four of its thirty layers
    python tests/full_geometry.py --size 7B --load-only    # 16 GB of memory and 15 GB of disk

Not collected by pytest. A checkpoint is written under the official names, in bf16, and then: does
its size agree with that of the published file; what is the peak of loading it; how far are our
numbers from transformers' in fp32 (text embedding, hidden states, image logits with and without
guidance, greedy tokens, the image tokenizer); does an export give the same bits; how far are the
log-probs of bf16. The last line of the output is JSON; docs/full_geometry holds such lines."""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import model as m
from common import pick_device
from extras import janus, memory
from extras.janus import tensor_bytes
from pairworld import pairworld
from test_janus import (
    attended,
    official_config,
    official_logits,
    official_name,
    peak_of_loading,
    small,
    write_official,
    write_tokenizer,
)
from tokenizer import from_pixels

PUBLISHED = {"1B": (4.18,), "7B": (9.99, 4.85)}  # GB of the official files, as the hub lists them
PROMPTS = ["three red circles left of a blue square", "a cat"]
WEIGHTS = (1.0, 5.0)  # w of guidance


def config(size, layers):
    """Janus-Pro's config.json in transformers' words. Its vision encoder, which generation leaves
    out, is SigLIP-L."""
    cfg = memory.JANUS[size]
    text = transformers.LlamaConfig(
        vocab_size=cfg.text_vocab,
        hidden_size=cfg.n_embd,
        intermediate_size=cfg.n_ffn,
        num_attention_heads=cfg.n_head,
        num_hidden_layers=layers or cfg.n_layer,
        num_key_value_heads=cfg.n_head,
        max_position_embeddings=16384,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    vision = transformers.JanusVisionConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=384,
        patch_size=16,
        num_image_tokens=576,
        projection_dim=cfg.n_embd,
    )
    vq = transformers.JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=16384,
        latent_channels=256,
        base_channels=128,
        projection_dim=cfg.n_embd,
        channel_multiplier=[1, 1, 2, 2, 4],
        num_res_blocks=2,
        image_token_embed_dim=cfg.n_embd,
    )
    return transformers.JanusConfig(
        text_config=text, vision_config=vision, vq_config=vq, tie_word_embeddings=False
    )


def random_tensor(name, shape, generator):
    """A tensor such as a trained one might be: norms near one, matrices that keep the size of what
    they are given."""
    x = torch.randn(shape, generator=generator)
    if len(shape) < 2:
        return 0.1 * x + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return x if "embed" in name else x * (1.0 / shape[1:].numel()) ** 0.5


def write(size, layers, folder):
    """Random weights under the official names, in bf16, in as many files as officially. -> bytes of
    the files."""
    with torch.device("meta"):
        net = transformers.JanusForConditionalGeneration(config(size, layers))
    shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(official_config(net.config.text_config, 384)))
    generator = torch.Generator().manual_seed(0)
    total = sum(shape.numel() for shape in shapes.values())
    shards = [{} for _ in PUBLISHED[size]]
    before = 0
    for name, shape in shapes.items():
        # Of two files the first has 9.99 of 14.84 GB.
        shards[min(int(before / total * 1.49), len(shards) - 1)][name] = shape
        before += shape.numel()
    index = {}
    for i, shard in enumerate(shards):
        file = folder / "pytorch_model.bin"
        if len(shards) > 1:
            file = folder / f"pytorch_model-{i + 1:05d}-of-{len(shards):05d}.bin"
        tensors = {}
        for name, shape in shard.items():
            tensors[official_name(name)] = random_tensor(name, shape, generator).bfloat16()
        index |= dict.fromkeys(tensors, file.name)
        torch.save(tensors, file)
        del tensors
    if len(shards) > 1:
        text = json.dumps({"weight_map": index})
        (folder / "pytorch_model.bin.index.json").write_text(text)
    return sum(file.stat().st_size for file in folder.glob("*.bin"))


def load_theirs(size, layers, folder):
    """The same checkpoint in transformers' model, fp32. Its vision encoder, which no number here
    comes from, has one layer."""
    theirs = config(size, layers)
    theirs.vision_config.num_hidden_layers = 1
    net = transformers.JanusForConditionalGeneration(theirs).eval()
    found = {}
    for file in janus.weight_files(folder):
        found |= janus.map_bin(file)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            tensor.copy_(found[official_name(name)])
    return net


def inputs(text, n_image, n_codes, device):
    """Padded prompts (2, T), image tokens (2, N), images (2, 3, 384, 384)."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(n_codes, (len(PROMPTS), n_image), generator=generator)
    x = from_pixels(pairworld(1, "train", 0).images[0].repeat(12, 1).repeat(12, 2))
    ids = torch.from_numpy(text.encode_prompts(PROMPTS, 99))
    return ids.to(device), tokens.to(device), x.to(device)


@torch.no_grad()
def our_numbers(vq, model, device, greedy):
    """What is compared, by us: {name: tensor on the CPU}."""
    ids, tokens, x = inputs(model.text, model.cfg.n_image, model.cfg.image_vocab, device)
    embedded = model.embed_text(ids)
    hidden = model.hidden(embedded, m.rope_table(model.cfg, ids.shape[1], device))
    out = {"text embedding": embedded, "hidden states": hidden[attended(ids, model.cfg.pad)]}
    cond, uncond = (model.gen_head(h).view(*tokens.shape, -1)
                    for h in m.both_hidden(model, ids, tokens, None, max(WEIGHTS)))
    for w in WEIGHTS:
        out[f"image logits, w {w:g}"] = m.policy_logits(cond, uncond, w, 1.0)
    out |= {"VQ latents": vq.latents(x), "VQ ids": vq.encode(x), "VQ images": vq.decode(tokens)}
    n_image = model.cfg.n_image
    model.cfg.n_image = greedy
    first = torch.from_numpy(model.text.encode_prompts(PROMPTS[:1], 99)).to(device)
    generator = torch.Generator(device).manual_seed(0)
    out["greedy tokens, w 5"] = m.generate(model, first, None, 1, 5.0, 1e-6, generator)[0]
    model.cfg.n_image = n_image
    return {name: value.cpu() for name, value in out.items()}


@torch.no_grad()
def their_numbers(net, text, device, greedy):
    """The same by transformers. Each prompt alone, without padding; codes looked up on the unit
    sphere, as in the original."""
    ids, tokens, x = inputs(text, 576, 16384, device)
    mask = attended(ids, text.pad)
    hidden = net.model.language_model(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=torch.arange(ids.shape[1], device=device)[None],
        use_cache=False,
    ).last_hidden_state
    out = {"text embedding": net.get_input_embeddings()(ids), "hidden states": hidden[mask]}
    alone = [torch.tensor(text.encode(prompt), device=device) for prompt in PROMPTS]
    for w in WEIGHTS:
        logits = [official_logits(net, t, row, text.pad, w) for t, row in zip(alone, tokens)]
        out[f"image logits, w {w:g}"] = torch.stack(logits)
    vq, normalize = net.model.vqmodel, torch.nn.functional.normalize
    z = normalize(vq.quant_conv(vq.encoder(x)), dim=1)
    codes = normalize(vq.quantize.embedding.weight, dim=-1)
    out["VQ latents"] = z
    out["VQ ids"] = (z.flatten(2).mT @ codes.T).argmax(-1)
    out["VQ images"] = vq.decode(tokens).view(2, 3, 384, 384)
    net.generation_config.generation_kwargs = {"boi_token_id": text.boi}
    net.model.vision_model.config.num_image_tokens = greedy
    out["greedy tokens, w 5"] = net.generate(
        alone[0][None],
        attention_mask=torch.ones_like(alone[0])[None],
        generation_mode="image",
        do_sample=False,
        guidance_scale=5.0,
        use_cache=True,
        max_new_tokens=greedy,
        bos_token_id=text.bos,
        pad_token_id=text.pad,
        eos_token_id=None,
    )
    return {name: value.cpu() for name, value in out.items()}


def distance(a, b):
    """Ids: how many agree. Else the largest difference over the largest value, and the share of
    differences over 1e-4 of their value plus 1e-5 of the largest."""
    if not a.is_floating_point():
        return {"agree": (a == b).sum().item(), "of": b.numel()}
    gap = (a - b).abs()
    largest = b.abs().max()
    share = (gap > 1e-4 * b.abs() + 1e-5 * largest).float().mean()
    return {"relative": (gap.max() / largest).item(), "share over 1e-4": share.item()}


@torch.no_grad()
def bf16_error(folder, model, device):
    """As stored, in bf16, against fp32: log-probs with guidance, nats a token."""
    stored = janus.load_janus(folder, device)[1]
    ids, tokens, _ = inputs(model.text, 64, model.cfg.image_vocab, device)
    stored.cfg.n_image = 64
    exact = m.score(model, ids, tokens, None, 5.0)[0]
    generator = torch.Generator(device).manual_seed(0)
    drawn, sampled = m.generate(stored, ids, None, 1, 5.0, generator=generator)
    of_exact = (m.score(stored, ids, tokens, None, 5.0)[0] - exact).abs()
    of_sampled = (m.score(stored, ids, drawn, None, 5.0)[0] - sampled).abs()
    gaps = {"bf16 scored against fp32": of_exact, "bf16 scored against bf16 sampled": of_sampled}
    return {k: {"mean": v.mean().item(), "largest": v.max().item()} for k, v in gaps.items()}


def export(folder, work):
    """A run folder from the checkpoint and back: are the bits the same?"""
    janus.import_checkpoint(folder, work / "run")
    start = time.time()
    out = janus.export(work / "out", work / "run", folder, "pretrain")
    old, new = {}, {}
    for tensors, path in ((old, folder), (new, out)):
        for file in janus.weight_files(path):
            tensors |= janus.map_bin(file)
    same = list(old) == list(new)
    for name in old:
        same = same and bytes(tensor_bytes(old[name])) == bytes(tensor_bytes(new[name]))
    return {"bitwise the same": same, "tensors": len(old), "seconds": round(time.time() - start, 1)}


def compare(args, folder, work, device, tell):
    tell("export", export(folder, work))
    vq, model = janus.load_janus(folder, device)
    text, greedy = model.text, min(args.greedy, model.cfg.n_image)
    model.float().bf16 = False
    ours = our_numbers(vq, model, device, greedy)
    tell("bf16", bf16_error(folder, model, device))
    del vq, model  # one of the two models at a time
    net = load_theirs(args.size, args.layers, folder).to(device)
    for name, value in their_numbers(net, text, device, greedy).items():
        tell(name, distance(ours[name], value))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--size", choices=list(PUBLISHED), default="1B")
    add("--layers", type=int, help="fewer layers than it has")
    add("--load-only", action="store_true", help="write and load, no more")
    greedy = "greedy tokens to compare; a processor takes a second or more for each (576)"
    add("--greedy", type=int, default=576, help=greedy)
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--work", help="folder for the checkpoint and the export (a temporary one)")
    args = parser.parse_args()
    device = pick_device(args.device)
    report = {
        "size": args.size,
        "layers": args.layers or memory.JANUS[args.size].n_layer,
        "device": str(device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }

    def tell(name, value):
        report[name] = value
        print(f"{name}: {json.dumps(value)}", flush=True)

    with tempfile.TemporaryDirectory(dir=args.work) as work:
        work = Path(work)
        folder = work / "checkpoint"
        folder.mkdir()
        tell("GB of the files", round(write(args.size, args.layers, folder) / 1e9, 3))
        published = None if args.layers else sum(PUBLISHED[args.size])
        tell("GB of the published files", published)
        tiny = write_official(small(), work / "tiny")
        peak = peak_of_loading(folder, tiny, "one by one")
        tell("peak of loading, over the weights", peak if isinstance(peak, str) else round(peak, 3))
        if not args.load_only:
            compare(args, folder, work, device, tell)
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
            tell("GiB of GPU memory at the peak", round(peak, 2))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
