"""Run folders: the policies and judges in them, and pictures of a policy, in memory or as files.

Shapes: R prompts, K pictures a prompt, N tokens, H W picture.
"""
import hashlib
import io
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from einops import rearrange
from tqdm import tqdm

from data import UserError, read_json, some
from janus import load_janus, load_text
from model import ImageModel, ModelConfig, empty_ids, generate, pick_device, stored_autocast, usual_guidance
from reward import Judge, JudgeConfig, NetworkJudge, OracleJudge
from tokenizer import VQConfig, VQModel, decode_ids, load_module, load_strictly, load_weights, save_weights, tensor_bytes, write_atomically


def write_json(path, value):
    write_atomically(path, json.dumps(value, indent=1).encode())


def make_folder(path):
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{path}: cannot be made a folder ({e.strerror})") from e


# ---------------------------------------------------------------------------------------------------------------------
# What is in a run folder

def load_policy(run, policy, device):
    """A run folder, "pretrain" or "ppo" -> (tokenizer, model). UserError if the two were not made for each other."""
    vq = load_module(Path(run) / "tokenizer.safetensors", VQModel, VQConfig, device)
    model = load_module(Path(run) / f"{policy}.safetensors", ImageModel, ModelConfig, device)
    model.text = load_text(run)
    if model.text.pad != model.cfg.pad or model.text.vocab_size > model.cfg.text_vocab:
        raise UserError(f"{run}: {policy}.safetensors was made for another text tokenizer; a Janus run has its own in {Path(run) / 'text.json'}")
    ours, its = (vq.cfg.codebook_size, vq.cfg.grid ** 2), (model.cfg.image_vocab, model.cfg.n_image)
    if ours != its:
        raise UserError(f"{run}: {policy}.safetensors knows {its[0]} codes and {its[1]} tokens, tokenizer.safetensors "
                        f"{ours[0]} and {ours[1]}; train one of them again")
    return vq, model


def chosen_policy(args):
    """(tokenizer, model) of --run, or of the Janus checkpoint --janus as it was downloaded."""
    if bool(args.run) == bool(args.janus):
        raise UserError("say either --run DIR, a run folder of train.py, or --janus DIR, a Janus checkpoint")
    device = pick_device(args.device)
    return load_janus(args.janus, device) if args.janus else load_policy(args.run, args.policy, device)


def guidance_of(args, model):
    """--guidance, else what the run's policy was trained with, else what a policy of its kind is usually sampled with."""
    if args.guidance is not None:
        return args.guidance
    path = Path(args.run or "") / "config.json"
    trained = read_json(path, "config of the run").get("ppo", {}) if args.run and args.policy == "ppo" and path.is_file() else {}
    return trained.get("guidance", usual_guidance(model))


def save_judges(path, networks):
    """{"train": network, "heldout": network} -> one file."""
    save_weights(path, {f"{name}.{k}": v for name, network in networks.items() for k, v in network.state_dict().items()},
                 **{name: asdict(network.cfg) for name, network in networks.items()})


def load_judges(run, device):
    """A run folder -> {"train": the judge that gave the rewards, "heldout": the one that never did, "oracle": OracleJudge}."""
    path, judges = Path(run) / "reward.safetensors", {}
    tensors, metadata = load_weights(path)
    for name in ("train", "heldout"):
        own = {k: tensors.pop(k) for k in list(tensors) if k.startswith(name + ".")}
        cfg = metadata.get(name) or {}
        if set(cfg) != set(asdict(JudgeConfig())):
            raise UserError(f"{path}: its metadata holds no config of the judge {name!r}; not a file of the reward stage")
        network = load_strictly(Judge(JudgeConfig(**cfg)), {k.removeprefix(name + "."): v for k, v in own.items()}, path)
        judges[name] = NetworkJudge(network, device)
    if tensors:
        raise UserError(f"{path}: unexpected {some(list(tensors))}")
    return judges | {"oracle": OracleJudge()}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def image_chunks(model, vq, prompts, per_prompt, guidance, temperature, seed, batch=64, wanted=None):
    """Pictures of the prompts, about `batch` at a time: yields (indices of the prompts, images (R, K, H, W, 3) uint8).

    A chunk's generator is seeded by (seed, number of the chunk) alone, so that a chunk can be left out (wanted(indices) is False)
    without a change in the others."""
    device, text, empty = model.embed_tokens.weight.device, model.text, empty_ids(model)
    text.prompts(prompts, model.cfg.n_text)                             # one that is too long is told now, not half way
    step = max(1, batch // per_prompt)
    for chunk, start in enumerate(range(0, len(prompts), step)):
        indices = range(start, min(start + step, len(prompts)))
        if wanted and not wanted(indices):
            continue
        state = np.random.SeedSequence([seed, chunk]).generate_state(1, np.uint64)[0]
        generator = torch.Generator(device).manual_seed(int(state >> 1))
        ids = torch.from_numpy(text.prompts([prompts[i] for i in indices], model.cfg.n_text)).to(device)
        with stored_autocast(model):
            tokens, _ = generate(model, ids, empty, per_prompt, guidance, temperature, generator)       # (R*K, N)
        yield indices, rearrange(decode_ids(vq, tokens), "(r k) h w c -> r k h w c", k=per_prompt)


@torch.no_grad()
def generate_images(model, vq, prompts, per_prompt, guidance, temperature, seed, batch=64, progress=None):
    """R prompts -> (R, per_prompt, H, W, 3) uint8. `progress` is called with the number of prompts just drawn (tqdm's update)."""
    out = []
    for indices, images in image_chunks(model, vq, prompts, per_prompt, guidance, temperature, seed, batch):
        out.append(images)
        if progress:
            progress(len(indices))
    return np.concatenate(out)


def save_png(path, image):
    """(H, W, 3) uint8 -> a PNG that is there whole or not at all."""
    png = io.BytesIO()
    Image.fromarray(image).save(png, "png")
    write_atomically(path, png.getvalue())


def generate_files(model, vq, prompts, files, per_prompt, guidance, temperature, seed, batch, combine=list):
    """Pictures of R prompts as PNG files, R lists of paths; what is there is left alone. combine: (K, H, W, 3) -> one picture a path.
    Returns how many files were made. A file depends on the seed, the batch and its place alone, so a run that was killed goes on."""
    total = sum(map(len, files))
    missing = [[file for file in own if not file.is_file()] for own in files]
    for folder in {file.parent for own in files for file in own}:
        make_folder(folder)
    chunks = image_chunks(model, vq, prompts, per_prompt, guidance, temperature, seed, batch, lambda indices: any(missing[i] for i in indices))
    made = sum(map(len, missing))
    with tqdm(total=total, initial=total - made, desc="generate", unit="file") as bar:
        for indices, images in chunks:
            for i, pictures in zip(indices, images):
                for file, picture in zip(files[i], combine(pictures)):
                    if file in missing[i]:
                        save_png(file, picture)
                        bar.update()
    return made


def same_settings(folder, args, model, prompts):
    """UserError if a folder's pictures were made by another policy, for other prompts or with other settings: what is there is skipped, and
    a folder of two models' pictures would look like a result. FOLDER.settings.json, beside it, tells."""
    folder, moved = Path(folder), (model.norm.weight, model.gen_head[-1].bias)                          # by every training
    digest = lambda parts: hashlib.sha256(b"".join(parts)).hexdigest()
    settings = {"weights": digest(map(tensor_bytes, moved)), "prompts": digest([json.dumps(prompts).encode()]), "guidance": args.guidance,
                "temperature": args.temperature, "seed": args.seed}
    path = folder.with_name(folder.name + ".settings.json")
    if path.is_file():
        known = read_json(path, "settings of the pictures")
        changed = [name if name in ("weights", "prompts") else f"{name} {known.get(name)} -> {value}" for name, value in settings.items() if known.get(name) != value]
        if changed:
            raise UserError(f"{folder}: its pictures were made with other {'; '.join(changed)}; choose another folder, or remove it and {path.name}")
    elif any(folder.rglob("*.png")):
        raise UserError(f"{folder}: holds pictures that were not made here; choose another folder")
    make_folder(folder)
    write_json(path, settings)
