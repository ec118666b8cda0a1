"""Janus-Pro: a downloaded checkpoint becomes a run folder, a trained policy becomes a checkpoint.

    python -m extras.janus --check DIR                           # does it load; what it holds
    python -m extras.janus --import DIR --out RUN                # a run folder for train.py
    python -m extras.janus --export OUT --run RUN --janus DIR    # the policy in DIR's layout
    python -m extras.janus --vq vq_ds16_t2i.pt --out tokenizer.safetensors    # LlamaGen's tokenizer

DIR is a local folder in one of two layouts:
    official        deepseek-ai/Janus-Pro-*: pytorch_model*.bin (or safetensors),
                    config.json of type multi_modality
    transformers    deepseek-community/Janus-Pro-*: safetensors, config.json of type janus
The names are those of janus/models/modeling_vlm.py and vq_model.py (deepseek-ai/Janus) and of
transformers' convert_janus_weights_to_hf.py.

Loading is strict. A tensor that is missing, misshapen or unknown ends it before any weight is
read; only what generation never uses may be absent, by its prefix (`LAYOUTS`). Tensors are read
one by one, so that the peak of memory is the weights and one tensor. Nothing is unpickled: .bin
goes through `torch.load(weights_only=True)`, the rest is safetensors and JSON.
"""

import argparse
import json
import pickle
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from common import (UserError, first_few, load_weights, make_folder, pick_device, read_json,
                    save_weights, write_atomically, write_json)
from data import pad_prompts
from extras.lora import merged
from model import ImageModel, ModelConfig, save_policy
from tokenizer import VQConfig, VQModel

# Looked up in tokenizer.json, because PAD's id is not the same in 1B and 7B.
BOS, PAD, BOI = "<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>", "<begin_of_image>"
IMAGE_SIZE = 384  # where config.json has none, as in the official code
LLAMA = {  # LlamaConfig's defaults: a checkpoint's config.json holds what differs from them
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}

# "policy": prefixes of our names -> theirs. "left_out": what generation does not use.
# "sign": the tensor that a layout is known by.
LAYOUTS = {
    "official": {
        "sign": "gen_embed.weight",
        "config": "language_config",
        "policy": {
            "embed_tokens.": "language_model.model.embed_tokens.",
            "layers.": "language_model.model.layers.",
            "norm.": "language_model.model.norm.",
            "gen_embed.": "gen_embed.",
            "gen_aligner.": "gen_aligner.layers.",
            "gen_head.0.": "gen_head.output_mlp_projector.",
            "gen_head.2.": "gen_head.vision_head.",
        },
        "vq": "gen_vision_model.",
        "left_out": (
            "vision_model.",
            "aligner.",
            "language_model.lm_head.",
            "gen_vision_model.quantize.codebook_used",
        ),
    },
    "transformers": {
        "sign": "model.generation_embeddings.weight",
        "config": "text_config",
        "policy": {
            "embed_tokens.": "model.language_model.embed_tokens.",
            "layers.": "model.language_model.layers.",
            "norm.": "model.language_model.norm.",
            "gen_embed.": "model.generation_embeddings.",
            "gen_aligner.0.": "model.generation_aligner.fc1.",
            "gen_aligner.2.": "model.generation_aligner.hidden_layers.0.",
            "gen_head.0.": "model.generation_head.proj_out.",
            "gen_head.2.": "model.generation_head.vision_head.",
        },
        "vq": "model.vqmodel.",
        "left_out": ("model.vision_model.", "model.aligner.", "lm_head."),
    },
    "llamagen": {
        "sign": "quantize.embedding.weight",
        "policy": {},
        "vq": "",
        "left_out": ("quantize.codebook_used",),
    },
}
INDEX_OF = {".bin": "pytorch_model.bin.index", ".safetensors": "model.safetensors.index"}
FUSED = {  # one matrix of ours holds several of theirs, one above the other
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


# --------------------------------------------------------------------------------------------------
# Text


class JanusText:
    """Janus' prompts, by the checkpoint's own tokenizer.json. The interface of TextTokens.

    The template is the official one for Janus-Pro (README, demo/app_januspro.py; conversation
    "deepseek", no system prompt): BOS <|User|>: {prompt}\\n\\n<|Assistant|>:<begin_of_image>,
    without a blank before or after the prompt."""

    empty = None  # each prompt has an empty prompt of its own length, see model.empty_like

    def __init__(self, path):
        try:
            from tokenizers import Tokenizer
        except ImportError as e:
            raise UserError("Janus' text needs a package: pip install tokenizers") from e
        read_json(path, "the checkpoint's text tokenizer")
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as e:  # tokenizers raises no other class
            raise UserError(f"{path}: not a tokenizer.json ({e})") from e
        # A tokenizer.json may ask for both, and a prompt must be neither padded nor cut here.
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        ids = {name: self.tokenizer.token_to_id(name) for name in (BOS, PAD, BOI)}
        missing = [name for name, number in ids.items() if number is None]
        if missing:
            raise UserError(f"{path}: has no token {', '.join(missing)}; "
                            "not the tokenizer of a Janus checkpoint")
        self.bos, self.pad, self.boi = ids.values()
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values())
        if self.encode("")[-1] != self.boi:
            raise UserError(f"{path}: {BOI} is in its vocabulary but not one of its added "
                            "tokens, so that a prompt would not end in it")

    def encode(self, prompt):
        """A prompt -> its ids, a list from BOS to begin-of-image."""
        # A Python string may hold half a surrogate pair, a token may not.
        prompt = prompt.encode("utf-8", "replace").decode().strip()
        # The official code puts no separator after an empty message.
        user = f"<|User|>: {prompt}\n\n" if prompt else "<|User|>:"
        message = f"{user}<|Assistant|>:{BOI}"
        return [self.bos] + self.tokenizer.encode(message, add_special_tokens=False).ids

    def encode_prompts(self, prompts, max_len, dropped=None):
        """B strings -> (B, T) int64, padded at the end. UserError if one exceeds max_len.

        A prompt that dropped (B,) bool marks becomes the empty prompt that guidance needs: it
        keeps BOS and begin-of-image and has padding between them."""
        rows = [self.encode(prompt) for prompt in prompts]
        for row, drop in zip(rows, [] if dropped is None else dropped):
            if drop:
                row[1:-1] = [self.pad] * (len(row) - 2)
        return pad_prompts(rows, prompts, self.pad, max_len)


# --------------------------------------------------------------------------------------------------
# Names


def their_policy_names(own, layout):
    """A name of ImageModel -> the checkpoint's tensors that it holds, one above the other."""
    prefix = next(p for p in LAYOUTS[layout]["policy"] if own.startswith(p))
    name = LAYOUTS[layout]["policy"][prefix] + own.removeprefix(prefix)
    for fused, parts in FUSED.items():
        if f".{fused}." in name:
            return [name.replace(fused, part) for part in parts]
    return [name]


def their_vq_name(own, layout):
    """A name of VQModel, which has LlamaGen's names -> the checkpoint's name."""
    if layout == "transformers":
        for ours, theirs in (
            ("encoder.conv_blocks.", "encoder.down."),
            ("decoder.conv_blocks.", "decoder.up."),
            (".res.", ".block."),
            (".mid.0.", ".mid.block_1."),
            (".mid.1.", ".mid.attn_1."),
            (".mid.2.", ".mid.block_2."),
        ):
            own = own.replace(ours, theirs)
    return LAYOUTS[layout]["vq"] + own


def layout_of(names, path):
    """The layout that tensors of these names are in; path is for the error message."""
    for layout, table in LAYOUTS.items():
        if table["sign"] in names:
            return layout
    raise UserError(f"{path}: its tensors are not named as in a checkpoint of Janus or LlamaGen: "
                    f"{', '.join(sorted(names)[:4])} ...")


# --------------------------------------------------------------------------------------------------
# Files


def weight_files(path):
    """A checkpoint's folder, or one file -> its weight files.

    safetensors are preferred over .bin, as in transformers."""
    path = Path(path)
    if path.is_file():
        return [path]
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (path / index).is_file():
            return indexed_files(path / index)
        single = path / index.removesuffix(".index.json")
        if single.is_file():
            return [single]
    raise UserError(f"{path}: holds no model.safetensors and no pytorch_model.bin (nor their "
                    "index); give a downloaded Janus-Pro folder")


def indexed_files(index):
    """The files that a checkpoint's index names. UserError if one of them is not there."""
    table = read_json(index, "index of the weight files")
    names = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index}: has no weight_map; download it again")
    files = [index.parent / name for name in sorted(set(names.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{index.parent}: its index names files that are not there: "
                        f"{', '.join(missing)}; finish the download")
    return files


def map_bin(path):
    """A .bin or .pt -> {name: tensor}, memory-mapped: nothing is read before it is used.

    LlamaGen keeps its state dict under a key (its vq_demo.py), and its training states carry
    their flags in a Namespace, which does nothing when it is loaded."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read as a file of tensors ({str(e).splitlines()[0]}); "
                        "download it again, or take safetensors") from e
    for key in ("ema", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    tensors = list(content.values()) if isinstance(content, dict) else [None]
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        raise UserError(f"{path}: should hold a state dict, found {type(content).__name__}")
    return content


def read_shapes(files):
    """{name: (file, shape)} of every tensor in the files, without reading a tensor."""
    found = {}
    for path in files:
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt", device="cpu") as f:
                    shapes = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}
            except (SafetensorError, OSError) as e:
                raise UserError(f"{path}: not a whole safetensors file ({e}); "
                                "download it again") from e
        else:
            shapes = {name: tuple(tensor.shape) for name, tensor in map_bin(path).items()}
        for name, shape in shapes.items():
            if name in found:
                raise UserError(f"{path}: {name} is in {found[name][0].name} too; remove the "
                                "file that does not belong here")
            found[name] = path, shape
    return found


def read_tensors(path, names):
    """Yield (name, tensor) of a weight file, one after the other. The caller makes the copy.

    Pages read through a mapping count as memory until the mapping is gone. It is therefore
    renewed: for each tensor of a safetensors file, for each twentieth of a .bin."""
    if path.suffix == ".safetensors":
        for name in names:
            with safe_open(path, "pt", device="cpu") as f:
                yield name, f.get_tensor(name)
        return
    content = map_bin(path)
    bytes_read = 0
    for name in names:
        if bytes_read > path.stat().st_size / 20:
            content = map_bin(path)
            bytes_read = 0
        bytes_read += content[name].nbytes
        yield name, content[name]


# --------------------------------------------------------------------------------------------------
# Loading


def policy_config(folder, layout, text, vq_cfg):
    """config.json -> ModelConfig. UserError for a geometry that ImageModel does not have."""
    path = Path(folder) / "config.json"
    key = LAYOUTS[layout]["config"]
    config = read_json(path, "config of the checkpoint")
    language = config.get(key) if isinstance(config, dict) else None
    if not isinstance(language, dict):
        raise UserError(f"{path}: has no {key!r}, as the weights' layout ({layout}) wants; "
                        "take it from the same download")
    given = LLAMA | {name: value for name, value in language.items() if value is not None}
    heads = given["num_attention_heads"]
    rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
    given["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    only = {
        "num_key_value_heads": heads,
        "head_dim": given["hidden_size"] // heads,
        "hidden_act": "silu",
        "rope_type": "default",
    }
    for name, wanted in only.items():
        if given.get(name, wanted) != wanted:
            raise UserError(f"{path}: {name} is {given[name]}; this model knows {wanted} alone, "
                            "as in Janus-Pro")
    if text.vocab_size > given["vocab_size"]:
        raise UserError(f"{folder}: tokenizer.json knows {text.vocab_size} tokens, config.json "
                        f"{given['vocab_size']}; they are of different checkpoints")
    n_image = vq_cfg.grid**2
    return ModelConfig(
        text_vocab=given["vocab_size"],
        image_vocab=vq_cfg.codebook_size,
        n_text=given["max_position_embeddings"] - n_image,
        n_image=n_image,
        n_layer=given["num_hidden_layers"],
        n_head=heads,
        n_embd=given["hidden_size"],
        n_ffn=given["intermediate_size"],
        code_dim=vq_cfg.codebook_dim,
        image_positions=False,
        pad=text.pad,
        rope_theta=rope.get("rope_theta", given.get("rope_theta", 10000.0)),
        rms_eps=given["rms_norm_eps"],
    )


def image_size(folder, layout):
    """Pixels a side, which config.json keeps among the vision encoder's settings."""
    if layout == "llamagen":
        return IMAGE_SIZE
    config = read_json(Path(folder) / "config.json", "config of the checkpoint")
    vision = config.get("vision_config") or {}
    if layout == "official":
        vision = vision.get("params") or {}
    return vision.get("image_size") or IMAGE_SIZE


def vq_config(found, layout, size):
    """The image tokenizer's geometry, read off the shapes of its tensors.

    config.json has nothing of it: the official class VQ-16 takes no settings. size: pixels."""

    def shape(own):
        name = their_vq_name(own, layout)
        if name not in found:
            raise UserError(f"the checkpoint lacks {name}: no VQ tokenizer in it")
        return found[name][1]

    def block(level, number):
        return f"encoder.conv_blocks.{level}.res.{number}.conv1.weight"

    levels = 0
    while their_vq_name(block(levels, 0), layout) in found:
        levels += 1
    blocks = 0
    while their_vq_name(block(0, blocks), layout) in found:
        blocks += 1
    ch = shape("encoder.conv_in.weight")[0]
    codes, dim = shape("quantize.embedding.weight")
    if not levels or size % 2 ** (levels - 1):
        raise UserError(f"images of {size} pixels do not fit a tokenizer of {levels} levels; "
                        "take config.json from the same download")
    return VQConfig(
        image_size=size,
        patch=1,
        ch=ch,
        ch_mult=tuple(shape(block(level, 0))[0] // ch for level in range(levels)),
        num_res_blocks=blocks,
        kernel=3,
        attention=True,
        norm_groups=32,
        z_channels=shape("quant_conv.weight")[1],
        codebook_size=codes,
        codebook_dim=dim,
    )


def match(module, their_names, found):
    """Where each tensor of a module is found. their_names: our name -> list of theirs.

    Returns {their name: (our name, number of the part, how many parts)} and the problems, a list
    of strings: what is missing or misshapen."""
    parts, problems = {}, []
    for own, tensor in module.state_dict().items():
        names = their_names(own)
        wanted = (tensor.shape[0] // len(names), *tensor.shape[1:])
        for i, name in enumerate(names):
            parts[name] = own, i, len(names)
            if name not in found:
                problems.append(f"missing {name}")
            elif found[name][1] != wanted:
                problems.append(f"{name} is {found[name][1]}, should be {wanted}")
    return parts, problems


def unexpected(found, layout, known, prefix=""):
    """Problems: the tensors below the prefix that are neither known nor may be left out."""
    left_out = LAYOUTS[layout]["left_out"]
    unknown = [name for name in found if name.startswith(prefix) and name not in known]
    return [f"unexpected {name}" for name in unknown if not name.startswith(left_out)]


def complain(path, problems):
    if problems:
        raise UserError(f"{path}: does not fit: {first_few(problems, 8)}")


class Checkpoint(NamedTuple):
    """A checked folder: modules on the device "meta", and where their tensors are."""

    vq: VQModel
    vq_parts: dict  # as `match` returns them
    model: ImageModel
    model_parts: dict
    found: dict  # {their name: (file, shape)}


def open_checkpoint(folder):
    """A folder -> Checkpoint. UserError lists what does not fit; no weight is read."""
    found = read_shapes(weight_files(folder))
    layout = layout_of(found, folder)
    if layout == "llamagen":
        raise UserError(f"{folder}: holds an image tokenizer alone, not a whole Janus checkpoint; "
                        "python -m extras.janus --vq reads this one")
    text = JanusText(Path(folder) / "tokenizer.json")
    vq_cfg = vq_config(found, layout, image_size(folder, layout))
    with torch.device("meta"):
        vq = VQModel(vq_cfg)
        model = ImageModel(policy_config(folder, layout, text, vq_cfg), text)
    vq_parts, problems = match(vq, lambda own: [their_vq_name(own, layout)], found)
    model_parts, more = match(model, lambda own: their_policy_names(own, layout), found)
    known = vq_parts.keys() | model_parts.keys()
    complain(folder, problems + more + unexpected(found, layout, known))
    return Checkpoint(vq, vq_parts, model, model_parts, found)


def fill(module, parts, found, device, dtype=None):
    """A module on the device "meta" -> the same with the checkpoint's tensors on the device.

    dtype None keeps that of the file, but makes vectors (norms, biases) fp32: norms compute in
    fp32, and vectors are nothing beside the matrices. The module is in eval mode."""
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    names_in = {}
    for name in parts:
        names_in.setdefault(found[name][0], []).append(name)
    tensors = {}
    for path, names in names_in.items():
        for name, tensor in read_tensors(path, names):
            own, i, n = parts[name]
            if own not in tensors:
                kind = dtype or (torch.float32 if tensor.dim() < 2 else tensor.dtype)
                tensors[own] = torch.empty(shapes[own], dtype=kind, device=device)
            rows = shapes[own][0] // n
            tensors[own][i * rows : (i + 1) * rows].copy_(tensor)
            del tensor  # before the next one is read
    module.load_state_dict(tensors, assign=True)
    return module.eval()


def load_janus(folder, device="cpu"):
    """A checkpoint's folder -> (tokenizer in fp32, policy as stored with its head in fp32), both
    in eval mode.

    A policy that is not stored in fp32 computes under bf16 autocast. UserError lists what does
    not fit."""
    checkpoint = open_checkpoint(folder)
    vq = fill(checkpoint.vq, checkpoint.vq_parts, checkpoint.found, device, torch.float32)
    model = fill(checkpoint.model, checkpoint.model_parts, checkpoint.found, device)
    model.stored = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    model.bf16 = model.embed_tokens.weight.dtype != torch.float32
    model.gen_head.float()                                              # see ImageModel.logits
    return vq, model


def load_vq(path, device="cpu", size=None):
    """LlamaGen's vq_ds16_t2i.pt, or the tokenizer of a Janus folder -> VQModel in fp32.

    size: pixels of an image, for a file that does not say."""
    found = read_shapes(weight_files(path))
    layout = layout_of(found, path)
    with torch.device("meta"):
        vq = VQModel(vq_config(found, layout, size or image_size(path, layout)))
    parts, problems = match(vq, lambda own: [their_vq_name(own, layout)], found)
    complain(path, problems + unexpected(found, layout, parts, LAYOUTS[layout]["vq"]))
    return fill(vq, parts, found, device, torch.float32)


# --------------------------------------------------------------------------------------------------
# Import and export


def import_checkpoint(folder, run):
    """A checkpoint becomes a run folder: text.json, the image tokenizer, the base model.

    "preset": "janus" in config.json tells train.py which defaults such a run has. The base model
    is written last, so that a run folder that has one is whole. UserError if it is there
    already, or if the run folder has another tokenizer."""
    folder, run = Path(folder), Path(run)
    text = folder / "tokenizer.json"
    if not text.is_file():
        raise UserError(f"{text}: no such file (the checkpoint's text tokenizer); give a "
                        "downloaded Janus-Pro folder")
    ours = run / "text.json"
    other_text = ours.exists() and ours.read_bytes() != text.read_bytes()
    if other_text or (run / "tokenizer.safetensors").exists() and not ours.exists():
        raise UserError(f"--out {run}: was begun with another tokenizer; choose another")
    if (run / "pretrain.safetensors").exists():
        raise UserError(f"--out {run}: has a base model already; choose another")
    vq, model = load_janus(folder)
    make_folder(run)
    write_atomically(ours, text.read_bytes())
    path = run / "config.json"
    config = read_json(path, "config of the run") if path.exists() else {}
    write_json(path, config | {"preset": "janus"})
    save_weights(run / "tokenizer.safetensors", vq.state_dict(), config=asdict(vq.cfg))
    save_policy(run, "pretrain", model)


def tensor_bytes(tensor):
    """A tensor of any dtype, on any device -> the bytes of its rows (numpy has no bf16)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def export(out, run, folder, policy="ppo"):
    """A run's policy in the layout of the checkpoint that it came from.

    out becomes a copy of the checkpoint's folder in which the trained tensors are new, each in
    the dtype that it had there. Nothing else changes: not the tokenizer, not the understanding
    encoder, not the names of the files. Returns out."""
    out, folder = Path(out), Path(folder)
    source = Path(run) / f"{policy}.safetensors"
    if out.exists():
        raise UserError(f"--export {out}: is there already; choose a folder that is not")
    checkpoint = open_checkpoint(folder)
    weights, metadata = load_weights(source)
    if "lora" in metadata:
        weights = merged(load_weights(Path(run) / "pretrain.safetensors")[0], weights)
    trained = metadata.get("config", {})
    wanted = asdict(checkpoint.model.cfg)
    different = [k for k, value in wanted.items() if trained.get(k) != value]
    if different:
        listed = ", ".join(f"{k} {trained.get(k)} instead of {wanted[k]}" for k in different)
        raise UserError(f"{source}: is not of {folder}: {listed}")

    def new(name, dtype):
        own, i, n = checkpoint.model_parts[name]
        return weights[own].chunk(n)[i].to(dtype).contiguous()

    temporary = out.with_name(out.name + ".tmp")
    try:
        if temporary.exists():  # of an export that was killed
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        for path in exported_files(folder):
            names = [k for k in checkpoint.model_parts if checkpoint.found[k][0] == path]
            if path.suffix == ".bin":
                content = map_bin(path)
                content |= {name: new(name, content[name].dtype) for name in names}
                torch.save(content, temporary / path.name)
            else:
                shutil.copyfile(path, temporary / path.name)
                if names:
                    overwrite(temporary / path.name, names, new)
        temporary.rename(out)
    except OSError as e:
        raise UserError(f"--export {out}: cannot be written ({e.strerror})") from e
    return out


def exported_files(folder):
    """The files of a checkpoint's folder, without weights in another format than is loaded."""
    used = weight_files(folder)
    kept = []
    for path in filter(Path.is_file, folder.iterdir()):
        is_index = path.name.endswith((".bin.index.json", ".safetensors.index.json"))
        is_weights = path.suffix in (".bin", ".safetensors")
        own_index = path.name.startswith(INDEX_OF[used[0].suffix])
        if path in used or own_index or not (is_weights or is_index):
            kept.append(path)
    return kept


def overwrite(path, names, new):
    """Write tensors over those of the same name, dtype and shape in a safetensors file.

    new(name, dtype) -> tensor. The file's header, and with it every other byte, stays."""
    with open(path, "r+b") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
        with safe_open(path, "pt", device="cpu") as old:
            dtypes = {name: old.get_tensor(name).dtype for name in names}
        for name in names:
            begin, end = header[name]["data_offsets"]
            data = tensor_bytes(new(name, dtypes[name]))
            if len(data) != end - begin:
                raise UserError(f"{path}: {name} has {end - begin} bytes, its successor "
                                f"{len(data)}; the run is not of this checkpoint")
            f.seek(8 + length + begin)
            f.write(data)


# --------------------------------------------------------------------------------------------------


def check(folder, device):
    """Load a checkpoint and print what it holds."""
    vq, model = load_janus(folder, device)
    layout = layout_of(read_shapes(weight_files(folder)), folder)
    n_model, n_vq = (sum(p.numel() for p in module.parameters()) for module in (model, vq))
    print(f"{folder}: policy of {n_model / 1e6:,.1f} million parameters in "
          f"{model.embed_tokens.weight.dtype}, tokenizer of {n_vq / 1e6:.1f} million")
    print(model.cfg)
    print(vq.cfg)
    print(f"whole, in the layout {layout}; left out if it is there: "
          f"{', '.join(LAYOUTS[layout]['left_out'])}")


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m extras.janus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", metavar="DIR", help="load a checkpoint and say what it holds")
    what.add_argument("--import", metavar="DIR", dest="source", help="make a run folder: --out")
    what.add_argument("--export", metavar="OUT", help="folder to write; wants --run and --janus")
    what.add_argument("--vq", metavar="FILE", help="LlamaGen's tokenizer, or a Janus folder: --out")
    add("--run", metavar="DIR", help="run folder of train.py")
    add("--janus", metavar="DIR", help="the checkpoint that the run came from")
    add("--policy", choices=["ppo", "pretrain"], default="ppo", help="whose weights (ppo)")
    add("--out", metavar="PATH", help="run folder, or safetensors, to write")
    add("--image-size", type=int, help="pixels, for a tokenizer file that does not say (384)")
    devices = ["auto", "cpu", "cuda", "mps"]
    add("--device", choices=devices, default="auto", help="where --check loads it (auto)")
    args = parser.parse_args(argv)
    if args.export and not (args.run and args.janus):
        raise UserError("--export OUT wants --run RUN and --janus DIR")
    if args.source and not args.out:
        raise UserError("--import DIR wants --out RUN, the run folder to make")
    if args.vq and not args.out:
        raise UserError("--vq FILE wants --out FILE")
    return args


def main(argv=None):
    args = parse(argv)
    if args.check:
        check(args.check, pick_device(args.device))
    elif args.source:
        import_checkpoint(args.source, args.out)
        print(f"{args.out}: a run folder of {args.source}. Next:")
        print(f"python train.py --stage ppo --out {args.out} --data pairs.json --judge URL")
    elif args.export:
        out = export(args.export, args.run, args.janus, args.policy)
        print(f"{out}: the {args.policy} policy of {args.run} in the layout of {args.janus}")
    else:
        vq = load_vq(args.vq, size=args.image_size)
        save_weights(args.out, vq.state_dict(), config=asdict(vq.cfg))
        print(f"{args.out}: {vq.cfg}")


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
