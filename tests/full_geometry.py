"""Janus-Pro at its real size with random weights, against transformers: what the tests prove on tiny models, proved once on large ones.

    python tests/full_geometry.py --size 1B                       # the whole of it; 9 GB of memory and 12 GB of disk
    python tests/full_geometry.py --size 7B --layers 4            # 7B's widths, four of its thirty layers
    python tests/full_geometry.py --size 7B --load-only           # 15 GB of disk, 16 GB of memory

Not collected by pytest. A checkpoint is written under the official names, in bf16, and then: does its size agree with the published file's; what
is the peak of loading it; how far are our numbers from transformers' in fp32, text embedding, hidden states, image logits with and without
guidance, greedy tokens, the image tokenizer; does an export give the same bits; how far are bf16's logits. The last line is JSON."""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import janus
import memory
import model as m
from pairworld import pairworld
from test_janus import PEAK, official_logits, official_name, small, write_official, write_tokenizer
from tokenizer import from_pixels, tensor_bytes

PUBLISHED = {"1B": (4.18,), "7B": (9.99, 4.85)}                         # GB of the official files, as the hub lists them
PROMPTS, WEIGHTS = ["three red circles left of a blue square", "a cat"], (1.0, 5.0)


def config(size, layers):
    """Janus-Pro's config.json in transformers' words; its vision encoder, which generation leaves out, is SigLIP-L."""
    cfg = memory.JANUS[size]
    text = transformers.LlamaConfig(vocab_size=cfg.text_vocab, hidden_size=cfg.n_embd, intermediate_size=cfg.n_ffn, num_attention_heads=cfg.n_head,
                                    num_hidden_layers=layers or cfg.n_layer, num_key_value_heads=cfg.n_head, max_position_embeddings=16384,
                                    rms_norm_eps=1e-6, tie_word_embeddings=False)
    vision = transformers.JanusVisionConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=384, patch_size=16,
                                            num_image_tokens=576, projection_dim=cfg.n_embd)
    vq = transformers.JanusVQVAEConfig(embed_dim=8, num_embeddings=16384, latent_channels=256, base_channels=128, projection_dim=cfg.n_embd,
                                       channel_multiplier=[1, 1, 2, 2, 4], num_res_blocks=2, image_token_embed_dim=cfg.n_embd)
    return transformers.JanusConfig(text_config=text, vision_config=vision, vq_config=vq, tie_word_embeddings=False)


def fill(name, shape, generator):
    """A random tensor such as a trained one might be: norms near one, matrices that keep the size of what they are given."""
    x = torch.randn(shape, generator=generator)
    if len(shape) < 2:
        return 0.1 * x + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return x if "embed" in name else x * (1.0 / shape[1:].numel()) ** 0.5


def write(size, layers, folder):
    """Random weights under the official names, in bf16, in as many files as officially. -> bytes of the files."""
    with torch.device("meta"):
        net = transformers.JanusForConditionalGeneration(config(size, layers))
    shapes = {k: v.shape for k, v in net.state_dict().items()}
    write_tokenizer(folder)
    text = net.config.text_config
    keys = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads max_position_embeddings".split()
    (folder / "config.json").write_text(json.dumps({
        "model_type": "multi_modality", "language_config": {"model_type": "llama", **{k: getattr(text, k) for k in keys}},
        "vision_config": {"cls": "CLIPVisionTower", "params": {"image_size": 384}}}))
    generator, total = torch.Generator().manual_seed(0), sum(s.numel() for s in shapes.values())
    shards, at, index = [{} for _ in PUBLISHED[size]], 0, {}
    for name, shape in shapes.items():
        shards[min(int(at / total * 1.49), len(shards) - 1)][name] = shape                              # 9.99 of 14.84 GB in the first of two
        at += shape.numel()
    for i, names in enumerate(shards):
        file = folder / ("pytorch_model.bin" if len(shards) == 1 else f"pytorch_model-{i + 1:05d}-of-{len(shards):05d}.bin")
        tensors = {official_name(k): fill(k, s, generator).bfloat16() for k, s in names.items()}
        index |= dict.fromkeys(tensors, file.name)
        torch.save(tensors, file)
        del tensors
    if len(shards) > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return sum(file.stat().st_size for file in folder.glob("*.bin"))


def theirs(size, layers, folder):
    """The same checkpoint in transformers' model, fp32. Its vision encoder, which no number here comes from, has one layer."""
    small = config(size, layers)
    small.vision_config.num_hidden_layers = 1
    net = transformers.JanusForConditionalGeneration(small).eval()
    found = {name: tensor for file in janus.weight_files(folder) for name, tensor in janus.mapped(file).items()}
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            tensor.copy_(found[official_name(name)])
    return net


def inputs(text, n_image, n_codes, device):
    """Left-padded prompts (2, T), image tokens (2, N), pictures (2, 3, 384, 384)."""
    tokens = torch.randint(n_codes, (len(PROMPTS), n_image), generator=torch.Generator().manual_seed(1))
    x = from_pixels(pairworld(1, "train", 0).images[0].repeat(12, 1).repeat(12, 2))
    return torch.from_numpy(text.prompts(PROMPTS, 99)).to(device), tokens.to(device), x.to(device)


@torch.no_grad()
def our_numbers(vq, model, device, greedy):
    """What is compared, by us: {name: tensor on the CPU}."""
    ids, tokens, x = inputs(model.text, model.cfg.n_image, model.cfg.image_vocab, device)
    embedded, pad = model.embed_text(ids), model.cfg.pad
    out = {"text embedding": embedded, "hidden states": model.hidden(embedded, m.full_mask(ids, pad, ids.shape[1]))[m.real_tokens(ids, pad)]}
    cond, uncond = (model.gen_head(h).view(*tokens.shape, -1) for h in (m.image_hidden(model, ids, tokens), m.empty_hidden(model, ids, tokens, None)))
    out |= {f"image logits, w {w:g}": m.guided_logits(cond, uncond, w) for w in WEIGHTS}
    out |= {"VQ latents": vq.latents(x), "VQ ids": vq.encode(x), "VQ pictures": vq.decode(tokens)}
    model.cfg.n_image, all_of_them = greedy, model.cfg.n_image
    first = torch.from_numpy(model.text.prompts(PROMPTS[:1], 99)).to(device)
    out["greedy tokens, w 5"] = m.generate(model, first, None, 1, 5.0, 1e-6, torch.Generator(device).manual_seed(0))[0]
    model.cfg.n_image = all_of_them
    return {name: value.cpu() for name, value in out.items()}


@torch.no_grad()
def their_numbers(net, text, device, greedy):
    """The same by transformers. Each prompt alone, without padding; codes looked up on the unit sphere, as in the original."""
    ids, tokens, x = inputs(text, 576, 16384, device)
    real, normalize = m.real_tokens(ids, text.pad), torch.nn.functional.normalize
    hidden = net.model.language_model(input_ids=ids, attention_mask=real.long(), position_ids=torch.arange(ids.shape[1], device=device)[None],
                                      use_cache=False).last_hidden_state
    out = {"text embedding": net.get_input_embeddings()(ids), "hidden states": hidden[real]}
    alone = [torch.tensor(text.encode(t), device=device) for t in PROMPTS]
    out |= {f"image logits, w {w:g}": torch.stack([official_logits(net, t, row, text.pad, w) for t, row in zip(alone, tokens)]) for w in WEIGHTS}
    z = normalize(net.model.vqmodel.quant_conv(net.model.vqmodel.encoder(x)), dim=1)
    codes = normalize(net.model.vqmodel.quantize.embedding.weight, dim=-1)
    out |= {"VQ latents": z, "VQ ids": (z.flatten(2).mT @ codes.T).argmax(-1), "VQ pictures": net.model.vqmodel.decode(tokens).view(2, 3, 384, 384)}
    net.generation_config.generation_kwargs, net.model.vision_model.config.num_image_tokens = {"boi_token_id": text.boi}, greedy
    out["greedy tokens, w 5"] = net.generate(
        alone[0][None], attention_mask=torch.ones_like(alone[0])[None], generation_mode="image", do_sample=False, guidance_scale=5.0, use_cache=True,
        max_new_tokens=greedy, bos_token_id=text.bos, pad_token_id=text.pad, eos_token_id=None)
    return {name: value.cpu() for name, value in out.items()}


def distance(a, b):
    """Ids: how many agree. Else the largest difference over the largest value, and the share of differences over 1e-4 of their value
    plus 1e-5 of the largest."""
    if not a.is_floating_point():
        return {"agree": (a == b).sum().item(), "of": b.numel()}
    gap, largest = (a - b).abs(), b.abs().max()
    return {"relative": (gap.max() / largest).item(), "share over 1e-4": (gap > 1e-4 * b.abs() + 1e-5 * largest).float().mean().item()}


@torch.no_grad()
def bf16_error(folder, model, device):
    """As stored, in bf16, against fp32: log-probs with guidance, nats a token."""
    stored = janus.load_janus(folder, device)[1]
    ids, tokens, _ = inputs(model.text, 64, model.cfg.image_vocab, device)
    stored.cfg.n_image, exact = 64, m.score(model, ids, tokens, None, 5.0)[0]
    with m.stored_autocast(stored):
        drawn, sampled = m.generate(stored, ids, None, 1, 5.0, generator=torch.Generator(device).manual_seed(0))
        gaps = {"bf16 scored against fp32": (m.score(stored, ids, tokens, None, 5.0)[0] - exact).abs(),
                "bf16 scored against bf16 sampled": (m.score(stored, ids, drawn, None, 5.0)[0] - sampled).abs()}
    return {k: {"mean": v.mean().item(), "largest": v.max().item()} for k, v in gaps.items()}


def export(folder, work):
    """A run folder from the checkpoint and back: are the bits the same?"""
    janus.import_janus(folder, work / "run", policy=True)
    start = time.time()
    out = janus.export(work / "out", work / "run", folder, "pretrain")
    old, new = ({k: t for file in janus.weight_files(p) for k, t in janus.mapped(file).items()} for p in (folder, out))
    same = list(old) == list(new) and all(bytes(tensor_bytes(old[k])) == bytes(tensor_bytes(new[k])) for k in old)
    return {"bitwise the same": same, "tensors": len(old), "seconds": round(time.time() - start, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--size", choices=list(PUBLISHED), default="1B")
    parser.add_argument("--layers", type=int, help="fewer layers than it has")
    parser.add_argument("--load-only", action="store_true", help="write and load, no more")
    parser.add_argument("--greedy", type=int, default=576, help="greedy tokens to compare; a processor takes a second or more for each (576)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--work", help="folder for the checkpoint and the export (a temporary one)")
    args = parser.parse_args()
    device = m.pick_device(args.device)
    report = {"size": args.size, "layers": args.layers or memory.JANUS[args.size].n_layer, "device": str(device), "torch": torch.__version__,
              "transformers": transformers.__version__}

    def tell(name, value):
        report[name] = value
        print(f"{name}: {json.dumps(value)}", flush=True)

    with tempfile.TemporaryDirectory(dir=args.work) as work:
        work = Path(work)
        folder, tiny = work / "checkpoint", work / "tiny"
        folder.mkdir()
        tell("GB of the files", round(write(args.size, args.layers, folder) / 1e9, 3))
        tell("GB of the published files", None if args.layers else sum(PUBLISHED[args.size]))
        write_official(small(), tiny)
        out = subprocess.run([sys.executable, "-c", PEAK, str(folder), str(tiny), "one by one"], capture_output=True, text=True, cwd=ROOT)
        tell("peak of loading, over the weights", round(float(out.stdout), 3) if out.returncode == 0 else out.stderr[-300:])
        if not args.load_only:
            (work / "run").mkdir()
            tell("export", export(folder, work))
            vq, model = janus.load_janus(folder, device)
            text, greedy = model.text, min(args.greedy, model.cfg.n_image)
            ours = our_numbers(vq, model.float(), device, greedy)
            tell("bf16", bf16_error(folder, model, device))
            del vq, model                               # one of the two models at a time
            for name, value in their_numbers(theirs(args.size, args.layers, folder).to(device), text, device, greedy).items():
                tell(name, distance(ours[name], value))
        if device.type == "cuda":
            tell("GiB of GPU memory at the peak", round(torch.cuda.max_memory_allocated() / 2 ** 30, 2))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
