"""Against the original code, deepseek-ai/Janus, which wants older libraries than ours: two steps,
in two environments.

    git clone https://github.com/deepseek-ai/Janus
    OLD/bin/python tests/original_janus.py --write DIR --clone Janus
    python tests/original_janus.py --compare DIR

OLD has transformers==4.48.3 attrdict timm einops (torchvision is not needed); the second step runs
with requirements-dev.txt. Not collected by pytest.

The first step builds a small random checkpoint of the official classes (VQ-16 at its real size;
three layers), saves it as theirs are saved, and writes what the original makes of it: the prompts'
ids, image codes and images, logits of both branches, greedy tokens with guidance, every prompt
alone, without padding and mask, as generation_inference.py has it. The second step loads the folder
with extras/janus.py and compares, with the prompts in one padded batch. It takes a minute on
two cores and prints JSON."""

import argparse
import importlib.abc
import importlib.machinery
import json
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import torch
from safetensors.torch import load_file, save_file

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
PAD, BOI = "<｜▁pad▁｜>", "<begin_of_image>"
PROMPTS = [
    "three red circles left of a blue square",
    "a cat",
    "the letter K on a plain background, and a dog",
    "",
    'ein 龍 and "quotes"',
]
WIDTH, GUIDANCE, N = 128, 5.0, 576


# --------------------------------------------------------------------------------------------------
# In the environment of the original


class NoTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands for torchvision, which the original imports for images that it is shown; none are."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = self.anything
        return module

    def anything(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()

    def exec_module(self, module):
        """Nothing to run."""


def write_tokenizer(folder):
    """Bytes and Janus' special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    user, assistant, image = "<|User|>", "<|Assistant|>", "<image_placeholder>"
    tokenizer.add_special_tokens([BOS, EOS, user, assistant, PAD, BOI, "<end_of_image>", image])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "add_bos_token": True,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "legacy": True,
        "tokenizer_class": "LlamaTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def projector(kind, width):
    params = {"depth": 2, "input_dim": width, "n_embed": WIDTH, "projector_type": "mlp_gelu"}
    return {"cls": "MlpProjector", "model_type": kind, "params": params}


CONFIG = {
    "model_type": "multi_modality",
    "architectures": ["MultiModalityCausalLM"],
    "torch_dtype": "float32",
    "language_config": {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": WIDTH,
        "intermediate_size": 352,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 16384,
    },
    "vision_config": {
        "cls": "CLIPVisionTower",
        "model_type": "vision",
        "params": {
            "image_size": 384,
            "model_name": "siglip_large_patch16_384",
            "select_feature": "same",
            "select_layer": 1,
        },
    },
    "aligner_config": projector("aligner", 1024),
    "gen_aligner_config": projector("gen_aligner", 8),
    "gen_head_config": {
        "cls": "vision_head",
        "model_type": "gen_head",
        "params": {"image_token_embed": WIDTH, "image_token_size": 16384, "n_embed": WIDTH},
    },
    "gen_vision_config": {
        "cls": "VQ-16",
        "model_type": "gen_vision",
        "params": {"image_token_size": 16384, "n_embed": 8},
    },
}


def randomize(net):
    """Weights such that every part shows in the numbers."""
    for name, p in net.named_parameters():
        if p.dim() < 2:
            center = 1 if "norm" in name and name.endswith("weight") else 0
            p.copy_(center + 0.2 * torch.randn_like(p))
        elif "embed" in name and "gen_head" not in name:
            lengths = torch.rand(len(p), *[1] * (p.dim() - 1)) * 2 + 0.2
            p.copy_(torch.randn_like(p) * lengths)
        else:
            p.copy_(torch.randn_like(p) * p[0].numel() ** -0.5)


def greedy_of_original(net, ids, pad):
    """One prompt, ids (T,), as generation_inference.py samples it, with the largest logit each time
    -> tokens (N,), logits of both branches (2, N, V)."""
    second = ids.clone()
    second[1:-1] = pad
    x = net.language_model.get_input_embeddings()(torch.stack([ids, second]))
    cache, tokens, logits = None, [], []
    for _ in range(N):
        answer = net.language_model.model(inputs_embeds=x, use_cache=True, past_key_values=cache)
        cache = answer.past_key_values
        cond, uncond = net.gen_head(answer.last_hidden_state[:, -1])  # (V,) each
        logits.append(torch.stack([cond, uncond]))
        tokens.append((uncond + GUIDANCE * (cond - uncond)).argmax())
        x = net.prepare_gen_img_embeds(tokens[-1].repeat(2))[:, None]
    return torch.stack(tokens), torch.stack(logits, 1)


@torch.no_grad()
def write(folder, clone):
    folder.mkdir(parents=True)
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    import transformers  # before torchvision's stand-in, so that it sees that it is not there

    sys.path.insert(0, str(clone))
    sys.meta_path.append(NoTorchvision())
    from janus.models.modeling_vlm import MultiModalityCausalLM, MultiModalityConfig
    from janus.models.processing_vlm import VLChatProcessor

    torch.manual_seed(0)
    net = MultiModalityCausalLM(MultiModalityConfig(**CONFIG)).eval()
    randomize(net)
    torch.save(net.state_dict(), folder / "pytorch_model.bin")
    tokenizer = transformers.LlamaTokenizerFast.from_pretrained(folder)
    processor = types.SimpleNamespace(sft_format="deepseek", system_prompt="")

    def template(prompt):
        user = {"role": "<|User|>", "content": prompt}
        messages = [user, {"role": "<|Assistant|>", "content": ""}]
        apply = VLChatProcessor.apply_sft_template_for_multi_turn_prompts
        return apply(processor, messages, sft_format="deepseek", system_prompt="") + BOI

    x = torch.rand(2, 3, 24, 24) * 2 - 1
    x = torch.nn.functional.interpolate(x, 384, mode="bilinear")
    codes = net.gen_vision_model.encode(x)[2][2].view(2, N)
    decoded = net.gen_vision_model.decode_code(codes, [2, 8, 24, 24])
    out = {"images": x, "codes": codes, "decoded": decoded}
    pad = tokenizer.convert_tokens_to_ids(PAD)
    for i, prompt in enumerate(PROMPTS):
        ids = torch.tensor(tokenizer.encode(template(prompt)))
        tokens, logits = greedy_of_original(net, ids, pad)
        out |= {f"ids {i}": ids, f"tokens {i}": tokens, f"logits {i}": logits}
    tensors = {name: value.contiguous() for name, value in out.items()}
    save_file(tensors, folder / "original.numbers")


# --------------------------------------------------------------------------------------------------
# In ours


def gap(a, b):
    return (a - b).abs().max().item()


@torch.no_grad()
def compare(folder):
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import model as m
    from extras import janus

    theirs = load_file(folder / "original.numbers")
    vq, model = janus.load_janus(folder)
    rows = range(len(PROMPTS))
    wrong_prompts = 0
    for i, prompt in enumerate(PROMPTS):
        wrong_prompts += model.text.encode(prompt) != theirs[f"ids {i}"].tolist()
    report = {
        "prompts that differ": wrong_prompts,
        "image codes that differ": (vq.encode(theirs["images"]) != theirs["codes"]).sum().item(),
        "of codes": theirs["codes"].numel(),
        "images": gap(vq.decode(theirs["codes"]), theirs["decoded"]),
    }
    ids = torch.from_numpy(model.text.encode_prompts(PROMPTS, 9999))
    tokens = torch.stack([theirs[f"tokens {i}"] for i in rows])
    generator = torch.Generator().manual_seed(0)
    ours = m.generate(model, ids, None, 1, GUIDANCE, 1e-6, generator)[0]
    cond, uncond = (model.gen_head(h).view(*tokens.shape, -1)                   # (B, N, V) each
                    for h in m.both_hidden(model, ids, tokens, None, GUIDANCE))
    report |= {
        "padding in the batch": (ids.shape[1] - m.prompt_lengths(ids, model.cfg.pad)).tolist(),
        "greedy tokens that differ": (ours != tokens).sum().item(),
        "of tokens": tokens.numel(),
        "distinct tokens": tokens.unique().numel(),
        "logits, cond": max(gap(cond[i], theirs[f"logits {i}"][0]) for i in rows),
        "logits, uncond": max(gap(uncond[i], theirs[f"logits {i}"][1]) for i in rows),
        "standard deviation of logits": theirs["logits 0"].std().item(),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--write", type=Path, metavar="DIR")
    parser.add_argument("--clone", type=Path, metavar="JANUS")
    parser.add_argument("--compare", type=Path, metavar="DIR")
    args = parser.parse_args()
    if args.compare:
        compare(args.compare)
    else:
        write(args.write, args.clone)
