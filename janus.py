"""Janus-Pro: foreign checkpoint layouts in and out, and Janus' text.

    python janus.py --check DIR                                  # does the folder load, whole; what it holds
    python janus.py --export OUT --run RUN --janus DIR           # RUN/ppo.safetensors back in the layout of DIR, for everybody's tools
    python janus.py --vq vq_ds16_t2i.pt --out tokenizer.safetensors      # LlamaGen's tokenizer (or a Janus folder's) in our format

DIR is a local folder in one of two layouts:
    official        deepseek-ai/Janus-Pro-*: pytorch_model*.bin (or safetensors), config.json of type multi_modality
    transformers    deepseek-community/Janus-Pro-*: safetensors, config.json of type janus
Names are from janus/models/modeling_vlm.py and vq_model.py (deepseek-ai/Janus) and from transformers' convert_janus_weights_to_hf.py.

Loading is strict: whatever is missing, misshapen or unknown ends it before a byte of weights is read, and what generation has no
use for may be left out by its prefix alone (`LAYOUTS`). It goes tensor by tensor, so that the peak is the weights and one tensor.
Nothing is unpickled: `torch.load(weights_only=True)` for .bin, safetensors, JSON.
"""
import argparse
import json
import pickle
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from data import UserError, left_padded, read_json, some
from model import ImageModel, ModelConfig, pick_device
from pairworld import TextTokens
from tokenizer import VQConfig, VQModel, load_weights, save_weights, tensor_bytes, write_atomically

# Looked up in tokenizer.json; PAD's id is not the same in 1B and 7B.
BOS, PAD, BOI = "<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>", "<begin_of_image>"
IMAGE_SIZE = 384                                                        # where config.json tells none, as in the official code
LLAMA = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
         "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "hidden_act": "silu"}     # LlamaConfig's: a config.json tells what differs

# Our names -> theirs, by prefix. "left_out": parts of the file that generating pictures does not use.
LAYOUTS = {
    "official": {
        "config": "language_config",
        "policy": {"embed_tokens.": "language_model.model.embed_tokens.", "layers.": "language_model.model.layers.",
                   "norm.": "language_model.model.norm.", "gen_embed.": "gen_embed.", "gen_aligner.": "gen_aligner.layers.",
                   "gen_head.0.": "gen_head.output_mlp_projector.", "gen_head.2.": "gen_head.vision_head."},
        "vq": "gen_vision_model.",
        "left_out": ("vision_model.", "aligner.", "language_model.lm_head.", "gen_vision_model.quantize.codebook_used"),
    },
    "transformers": {
        "config": "text_config",
        "policy": {"embed_tokens.": "model.language_model.embed_tokens.", "layers.": "model.language_model.layers.",
                   "norm.": "model.language_model.norm.", "gen_embed.": "model.generation_embeddings.",
                   "gen_aligner.0.": "model.generation_aligner.fc1.", "gen_aligner.2.": "model.generation_aligner.hidden_layers.0.",
                   "gen_head.0.": "model.generation_head.proj_out.", "gen_head.2.": "model.generation_head.vision_head."},
        "vq": "model.vqmodel.",
        "left_out": ("model.vision_model.", "model.aligner.", "lm_head."),
    },
    "llamagen": {"policy": {}, "vq": "", "left_out": ("quantize.codebook_used",)},
}
INDEX_OF = {".bin": "pytorch_model.bin.index", ".safetensors": "model.safetensors.index"}
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}          # one matrix of ours, several of theirs


# ---------------------------------------------------------------------------------------------------------------------
# Text

class JanusText:
    """Janus' prompts, by the checkpoint's own tokenizer.json. The same interface as pairworld.TextTokens.

    Template of the official code for Janus-Pro (README, demo/app_januspro.py; conversation "deepseek", no system prompt):
    BOS <|User|>: {text}\\n\\n<|Assistant|>:<begin_of_image>, without a blank before or after the text."""
    empty = None                        # each prompt has an empty prompt of its own length, see model.padded_empty

    def __init__(self, path):
        try:
            from tokenizers import Tokenizer
        except ImportError as e:
            raise UserError("Janus' text needs the package tokenizers: pip install tokenizers") from e
        read_json(path, "the checkpoint's text tokenizer")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as e:                          # tokenizers raises no other class
            raise UserError(f"{path}: not a tokenizer.json ({e})") from e
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        ids = {name: self.tokenizer.token_to_id(name) for name in (BOS, PAD, BOI)}
        if None in ids.values():
            raise UserError(f"{path}: has no token {', '.join(k for k, v in ids.items() if v is None)}; not the tokenizer of a Janus checkpoint")
        self.bos, self.pad, self.boi = ids.values()
        self.vocab_size = 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())
        if self.encode("")[-1] != self.boi:
            raise UserError(f"{path}: {BOI} is in its vocabulary but not one of its added tokens, so a prompt would not end in it")

    def encode(self, text):
        """A prompt -> ids, from BOS to begin-of-image."""
        text = text.encode("utf-8", "replace").decode().strip()         # lone surrogates are legal in a Python string, not in a token
        user = f"<|User|>: {text}\n\n" if text else "<|User|>:"         # an empty message has no separator, in the official code
        return [self.bos] + self.tokenizer.encode(f"{user}<|Assistant|>:{BOI}", add_special_tokens=False).ids

    def prompts(self, texts, max_len, dropped=None):
        """B strings -> (B, T) int64, padded on the left. UserError if one is longer than max_len. Those that dropped (B,) bool marks, for
        guidance, keep BOS and begin-of-image and have padding between them."""
        rows = [self.encode(t) for t in texts]
        for row, drop in zip(rows, dropped if dropped is not None else []):
            if drop:
                row[1:-1] = [self.pad] * (len(row) - 2)
        return left_padded(rows, texts, self.pad, max_len)


def load_text(run):
    """A run folder -> what makes its prompts: Janus' tokenizer where it has one, else PairWorld's words."""
    path = Path(run) / "text.json"
    return JanusText(path) if path.exists() else TextTokens()


# ---------------------------------------------------------------------------------------------------------------------
# Names

def their_policy_names(own, layout):
    """One of ImageModel's names -> the names of the checkpoint's tensors that it is made of, one above the other."""
    (ours, theirs), = [(a, b) for a, b in LAYOUTS[layout]["policy"].items() if own.startswith(a)]
    name = theirs + own.removeprefix(ours)
    for fused, parts in FUSED.items():
        if f".{fused}." in name:
            return [name.replace(fused, part) for part in parts]
    return [name]


def their_vq_name(own, layout):
    """One of VQModel's names, which are LlamaGen's -> the checkpoint's."""
    if layout == "transformers":
        for side, blocks in (("encoder", "down"), ("decoder", "up")):
            own = own.replace(f"{side}.conv_blocks.", f"{side}.{blocks}.")
        for ours, theirs in ((".res.", ".block."), (".mid.0.", ".mid.block_1."), (".mid.1.", ".mid.attn_1."), (".mid.2.", ".mid.block_2.")):
            own = own.replace(ours, theirs)
    return LAYOUTS[layout]["vq"] + own


# ---------------------------------------------------------------------------------------------------------------------
# Files

def weight_files(path):
    """A checkpoint's folder, or one file -> its weight files. safetensors come first, as in transformers."""
    path = Path(path)
    if path.is_file():
        return [path]
    for index in (path / "model.safetensors.index.json", path / "pytorch_model.bin.index.json"):
        single = path / index.name.removesuffix(".index.json")
        if index.is_file():
            table = read_json(index, "index of the weight files")
            named = table.get("weight_map") if isinstance(table, dict) else None
            if not isinstance(named, dict) or not named:
                raise UserError(f"{index}: has no weight_map; download it again")
            files = [path / name for name in sorted(set(named.values()))]
            missing = [f.name for f in files if not f.is_file()]
            if missing:
                raise UserError(f"{path}: its index names files that are not there: {', '.join(missing)}; finish the download")
            return files
        if single.is_file():
            return [single]
    raise UserError(f"{path}: holds no model.safetensors and no pytorch_model.bin (nor their index); --janus wants a downloaded Janus-Pro folder")


def mapped(path):
    """A .bin or .pt -> {name: tensor}, mapped: nothing is read before it is used. LlamaGen keeps its state dict under a key (vq_demo.py)."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):    # LlamaGen's training states carry their flags in one, which does nothing
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read as a file of tensors ({str(e).splitlines()[0]}); download it again, or take safetensors") from e
    for key in ("ema", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise UserError(f"{path}: should hold a state dict, found {type(content).__name__}")
    return content


def shapes_of(files):
    """{name: (file, shape)} of everything in the files; nothing of the tensors is read."""
    found = {}
    for path in files:
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt", device="cpu") as f:
                    shapes = {k: tuple(f.get_slice(k).get_shape()) for k in f.keys()}
            except (SafetensorError, OSError) as e:
                raise UserError(f"{path}: not a whole safetensors file ({e}); download it again") from e
        else:
            shapes = {k: tuple(t.shape) for k, t in mapped(path).items()}
        double = [k for k in shapes if k in found]
        if double:
            raise UserError(f"{path}: {double[0]} is in {found[double[0]][0].name} too; remove the file that does not belong here")
        found |= {k: (path, shape) for k, shape in shapes.items()}
    return found


def read_tensors(path, names):
    """Yields (name, tensor) one after the other. A mapping of a .bin is renewed for every twentieth of the file, because pages that were
    read count as memory until it is gone."""
    if path.suffix == ".safetensors":
        for name in names:
            with safe_open(path, "pt", device="cpu") as f:              # opened anew, as below; whoever asks makes the one copy
                yield name, f.get_tensor(name)
        return
    content, used = mapped(path), 0
    for name in names:
        if used > path.stat().st_size / 20:
            content, used = mapped(path), 0
        used += content[name].nbytes
        yield name, content[name]


def layout_of(names, path):
    signs = {"official": "gen_embed.weight", "transformers": "model.generation_embeddings.weight", "llamagen": "quantize.embedding.weight"}
    for layout, sign in signs.items():
        if sign in names:
            return layout
    raise UserError(f"{path}: its tensors are not named as in Janus' or LlamaGen's checkpoints: {', '.join(sorted(names)[:4])} ...")


# ---------------------------------------------------------------------------------------------------------------------
# Loading

def policy_config(folder, layout, text, vq_cfg):
    """config.json -> ModelConfig. UserError for a geometry that ImageModel does not have."""
    path = Path(folder) / "config.json"
    config = read_json(path, "config of the checkpoint")
    language = config.get(LAYOUTS[layout]["config"]) if isinstance(config, dict) else None
    if not isinstance(language, dict):
        raise UserError(f"{path}: has no {LAYOUTS[layout]['config']!r}, as the weights' layout ({layout}) wants; take it from the same download")
    given = LLAMA | {k: v for k, v in language.items() if v is not None}
    heads, width, rope = given["num_attention_heads"], given["hidden_size"], given.get("rope_parameters") or given.get("rope_scaling") or {}
    knows = {"num_key_value_heads": heads, "head_dim": width // heads, "hidden_act": "silu", "rope_type": "default"}
    has = knows | {k: given[k] for k in knows if k in given} | {"rope_type": rope.get("rope_type", rope.get("type", "default"))}
    for name, wanted in knows.items():
        value = has[name]
        if value != wanted:
            raise UserError(f"{path}: {name} is {value}; this model knows {wanted} alone, as in Janus-Pro")
    n_image, theta = vq_cfg.grid ** 2, rope.get("rope_theta", given.get("rope_theta", 10000.0))
    cfg = ModelConfig(text_vocab=given["vocab_size"], image_vocab=vq_cfg.codebook_size, n_text=given["max_position_embeddings"] - n_image,
                      n_image=n_image, n_layer=given["num_hidden_layers"], n_head=heads, n_embd=width, n_ffn=given["intermediate_size"],
                      code_dim=vq_cfg.codebook_dim, image_positions=False, pad=text.pad, rope_theta=theta, rms_eps=given["rms_norm_eps"])
    if text.vocab_size > cfg.text_vocab:
        raise UserError(f"{folder}: tokenizer.json knows {text.vocab_size} tokens, config.json {cfg.text_vocab}; they are of different checkpoints")
    return cfg


def image_size(folder, layout):
    """The pictures' size that config.json tells; a part of the vision encoder's settings in both layouts."""
    if layout == "llamagen":
        return IMAGE_SIZE
    vision = read_json(Path(folder) / "config.json", "config of the checkpoint").get("vision_config") or {}
    return (vision.get("params") or {} if layout == "official" else vision).get("image_size") or IMAGE_SIZE


def vq_config(found, layout, size):
    """The tokenizer's geometry, read off its tensors' shapes: the official class VQ-16 has no settings in config.json."""
    def shape(own):
        name = their_vq_name(own, layout)
        if name not in found:
            raise UserError(f"the checkpoint lacks {name}: no VQ tokenizer in it")
        return found[name][1]

    def has(own):
        return their_vq_name(own, layout) in found

    levels = res = 0
    while has(f"encoder.conv_blocks.{levels}.res.0.conv1.weight"):
        levels += 1
    while has(f"encoder.conv_blocks.0.res.{res}.conv1.weight"):
        res += 1
    ch = shape("encoder.conv_in.weight")[0]
    mult = tuple(shape(f"encoder.conv_blocks.{i}.res.0.conv1.weight")[0] // ch for i in range(levels))
    codes, dim = shape("quantize.embedding.weight")
    if not levels or size % 2 ** (levels - 1):
        raise UserError(f"pictures of {size} pixels do not fit a tokenizer of {levels} levels; take config.json from the same download")
    return VQConfig(size, 1, ch, mult, res, 3, True, 32, shape("quant_conv.weight")[1], codes, dim)


def parts_of(module, their_names, found):
    """{their name: (our name, which of how many parts)}, and what is wrong: missing or misshapen."""
    parts, bad = {}, []
    for own, tensor in module.state_dict().items():
        names = their_names(own)
        want = (tensor.shape[0] // len(names), *tensor.shape[1:])
        for i, name in enumerate(names):
            parts[name] = own, i, len(names)
            if name not in found:
                bad.append(f"missing {name}")
            elif found[name][1] != want:
                bad.append(f"{name} is {found[name][1]}, should be {want}")
    return parts, bad


def complain(path, bad):
    if bad:
        raise UserError(f"{path}: does not fit: {some(bad, 8)}")


def fill(module, parts, found, device, dtype=None):
    """A module on the device "meta" gets its tensors, one of the checkpoint's at a time, on the device. dtype None keeps the file's, but
    vectors (norms, biases) in fp32: they are nothing beside the matrices, and norms compute in fp32."""
    own = {k: v.shape for k, v in module.state_dict().items()}
    tensors, files = {}, {}
    for name in parts:
        files.setdefault(found[name][0], []).append(name)
    for path, names in files.items():
        for name, tensor in read_tensors(path, names):
            target, i, n = parts[name]
            if target not in tensors:
                kind = dtype or (torch.float32 if tensor.dim() < 2 else tensor.dtype)
                tensors[target] = torch.empty(own[target], dtype=kind, device=device)
            rows = own[target][0] // n
            tensors[target][i * rows:(i + 1) * rows].copy_(tensor)
            del tensor
    module.load_state_dict(tensors, assign=True)
    return module.eval()


def load_janus(folder, device="cpu"):
    """A Janus checkpoint's folder -> (tokenizer in fp32, policy as stored, in eval mode). UserError lists what does not fit."""
    (vq, vq_parts), (model, model_parts), found = plan(folder)
    return fill(vq, vq_parts, found, device, torch.float32), fill(model, model_parts, found, device)


def plan(folder):
    """A folder -> (VQModel, its parts), (ImageModel, its parts), {name: (file, shape)}: the modules on "meta", all checked, nothing read."""
    found = shapes_of(weight_files(folder))
    layout = layout_of(found, folder)
    if layout == "llamagen":
        raise UserError(f"{folder}: holds a tokenizer alone; --janus wants a whole Janus checkpoint (python janus.py --vq reads this one)")
    text = JanusText(Path(folder) / "tokenizer.json")
    vq_cfg = vq_config(found, layout, image_size(folder, layout))
    with torch.device("meta"):
        vq, model = VQModel(vq_cfg), ImageModel(policy_config(folder, layout, text, vq_cfg), text)
    vq_parts, bad = parts_of(vq, lambda own: [their_vq_name(own, layout)], found)
    model_parts, worse = parts_of(model, lambda own: their_policy_names(own, layout), found)
    known = {**vq_parts, **model_parts}
    unknown = [f"unexpected {k}" for k in found if k not in known and not k.startswith(LAYOUTS[layout]["left_out"])]
    complain(folder, bad + worse + unknown)
    return (vq, vq_parts), (model, model_parts), found


def load_vq(path, device="cpu", size=None):
    """LlamaGen's vq_ds16_t2i.pt, or the tokenizer of a Janus folder -> VQModel in fp32. size: the pictures', for a file that tells none."""
    found = shapes_of(weight_files(path))
    layout = layout_of(found, path)
    with torch.device("meta"):
        vq = VQModel(vq_config(found, layout, size or image_size(path, layout)))
    parts, bad = parts_of(vq, lambda own: [their_vq_name(own, layout)], found)
    prefix = LAYOUTS[layout]["vq"]
    unknown = [f"unexpected {k}" for k in found if k.startswith(prefix) and k not in parts and not k.startswith(LAYOUTS[layout]["left_out"])]
    complain(path, bad + unknown)
    return fill(vq, parts, found, device, torch.float32)


def import_janus(folder, out, policy):
    """Make a run folder of a checkpoint: its text and image tokenizer and, with `policy`, its model as the base, where they are not there
    yet. UserError if the run folder is of another tokenizer."""
    folder, out = Path(folder), Path(out)
    text, ours = folder / "tokenizer.json", out / "text.json"
    if not text.is_file():
        raise UserError(f"{text}: no such file (the checkpoint's text tokenizer); --janus wants a downloaded Janus-Pro folder")
    if ours.exists() and ours.read_bytes() != text.read_bytes() or (out / "tokenizer.safetensors").exists() and not ours.exists():
        raise UserError(f"--janus {folder}: {out} was begun with another tokenizer; choose another --out")
    write_atomically(ours, text.read_bytes())
    if not (out / "tokenizer.safetensors").exists():
        vq = load_vq(folder)
        save_weights(out / "tokenizer.safetensors", vq.state_dict(), config=asdict(vq.cfg))
    if policy and not (out / "pretrain.safetensors").exists():
        model = load_janus(folder)[1]
        save_weights(out / "pretrain.safetensors", model.state_dict(), config=asdict(model.cfg))


# ---------------------------------------------------------------------------------------------------------------------
# Export

def export(out, run, folder, policy="ppo"):
    """A run's policy in the layout of the checkpoint that it came from: a copy of the folder, in which the trained tensors are new, each in
    the dtype that it had there. Nothing else changes, not the tokenizer, not the understanding encoder, not the files' names."""
    out, folder, source = Path(out), Path(folder), Path(run) / f"{policy}.safetensors"
    if out.exists():
        raise UserError(f"--export {out}: is there already; choose a folder that is not")
    _, (model, parts), found = plan(folder)
    weights, metadata = load_weights(source)
    trained, own = metadata.get("config", {}), asdict(model.cfg)
    different = [f"{k} {trained.get(k)} instead of {v}" for k, v in own.items() if trained.get(k) != v]
    if different:
        raise UserError(f"{source}: is not of {folder}: {', '.join(different)}")

    def new(name, old_dtype):
        ours, i, n = parts[name]
        return weights[ours].chunk(n)[i].to(old_dtype).contiguous()

    files = weight_files(folder)
    part = out.with_name(out.name + ".tmp")
    try:
        if part.exists():                               # of an export that was killed
            shutil.rmtree(part)
        part.mkdir(parents=True)
        for path in folder.iterdir():
            unused = path.suffix in (".bin", ".safetensors") or path.name.endswith((".bin.index.json", ".safetensors.index.json"))
            if path.is_file() and (path in files or not unused or path.name.startswith(INDEX_OF[files[0].suffix])):
                if path.suffix == ".bin":
                    content = mapped(path)
                    torch.save({k: new(k, t.dtype) if k in parts else t for k, t in content.items()}, part / path.name)
                else:
                    shutil.copyfile(path, part / path.name)
                if path.suffix == ".safetensors":
                    overwrite(part / path.name, {k: new for k in parts if found[k][0] == path})
        part.rename(out)
    except OSError as e:
        raise UserError(f"--export {out}: cannot be written ({e.strerror})") from e
    return out


def overwrite(path, new):
    """Write tensors over those of the same name, dtype and shape in a safetensors file. new {name: function(name, dtype) -> tensor}."""
    with open(path, "r+b") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
        with safe_open(path, "pt", device="cpu") as old:
            dtypes = {k: old.get_tensor(k).dtype for k in new}
        for name, make in new.items():
            begin, end = header[name]["data_offsets"]
            data = tensor_bytes(make(name, dtypes[name]))
            if len(data) != end - begin:
                raise UserError(f"{path}: {name} has {end - begin} bytes, its successor {len(data)}; the run is not of this checkpoint")
            f.seek(8 + length + begin)
            f.write(data)


# ---------------------------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(prog="janus.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", metavar="DIR", help="load a checkpoint and say what it holds")
    what.add_argument("--export", metavar="OUT", help="folder to write; wants --run and --janus")
    what.add_argument("--vq", metavar="FILE", help="LlamaGen's tokenizer, or a Janus folder; wants --out")
    parser.add_argument("--run", metavar="DIR", help="run folder of train.py")
    parser.add_argument("--janus", metavar="DIR", help="the checkpoint that the run came from")
    parser.add_argument("--policy", choices=["ppo", "pretrain"], default="ppo", help="whose weights (ppo)")
    parser.add_argument("--out", metavar="FILE", help="safetensors to write")
    parser.add_argument("--image-size", type=int, help="pixels, for a tokenizer file that tells none (384)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where --check loads it (auto)")
    args = parser.parse_args(argv)
    if args.export and not (args.run and args.janus) or args.vq and not args.out:
        raise UserError("--export OUT wants --run RUN and --janus DIR" if args.export else "--vq FILE wants --out FILE")
    if args.export:
        print(f"{export(args.export, args.run, args.janus, args.policy)}: the {args.policy} policy of {args.run} in the layout of {args.janus}")
    elif args.vq:
        vq = load_vq(args.vq, size=args.image_size)
        save_weights(args.out, vq.state_dict(), config=asdict(vq.cfg))
        print(f"{args.out}: {vq.cfg}")
    else:
        vq, model = load_janus(args.check, pick_device(args.device))
        sizes = [sum(p.numel() for p in m.parameters()) for m in (model, vq)]
        layout = layout_of(shapes_of(weight_files(args.check)), args.check)
        print(f"{args.check}: policy of {sizes[0] / 1e6:,.1f} million parameters in {model.embed_tokens.weight.dtype}, "
              f"tokenizer of {sizes[1] / 1e6:.1f} million", model.cfg, vq.cfg,
              f"whole, in the layout {layout}; left out if it is there: {', '.join(LAYOUTS[layout]['left_out'])}", sep="\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
