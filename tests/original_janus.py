"""Against the original code, deepseek-ai/Janus, which wants older libraries than ours: two steps, in two environments.

    git clone https://github.com/deepseek-ai/Janus
    OLD/bin/python tests/original_janus.py --write DIR --clone Janus      # transformers==4.48.3 attrdict timm einops, and torchvision if it is there
    python tests/original_janus.py --compare DIR                          # what requirements-dev.txt installs

Not collected by pytest. The first step builds a small random checkpoint of the official classes (VQ-16 at its real size; three layers), saves it as
theirs are saved, and writes what the original makes of it: prompts' ids, image codes and pictures, logits of both branches, greedy tokens with guidance,
every prompt alone, without padding and mask, as generation_inference.py has it. The second loads the folder with janus.py and compares, with the
prompts in one left-padded batch. A minute on two cores; prints JSON."""
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

BOS, EOS, PAD, BOI = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<begin_of_image>"
PROMPTS = ["three red circles left of a blue square", "a cat", "the letter K on a plain background, and a dog", "", 'ein 龍 and "quotes"']
WIDTH, GUIDANCE, N = 128, 5.0, 576


# ---------------------------------------------------------------------------------------------------------------------
# In the environment of the original

class NoTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands for torchvision, which the original imports for the pictures that it is shown; none are."""

    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__, module.__getattr__ = [], self.anything
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
    bytes_of = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(bytes_of)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS, "<|User|>", "<|Assistant|>", PAD, BOI, "<end_of_image>", "<image_placeholder>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "legacy": True,
                                                              "tokenizer_class": "LlamaTokenizerFast"}))


def projector(kind, width):
    return {"cls": "MlpProjector", "model_type": kind, "params": {"depth": 2, "input_dim": width, "n_embed": WIDTH, "projector_type": "mlp_gelu"}}


CONFIG = {
    "model_type": "multi_modality", "architectures": ["MultiModalityCausalLM"], "torch_dtype": "float32",
    "language_config": {"model_type": "llama", "vocab_size": 300, "hidden_size": WIDTH, "intermediate_size": 352, "num_hidden_layers": 3,
                        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 16384},
    "vision_config": {"cls": "CLIPVisionTower", "model_type": "vision",
                      "params": {"image_size": 384, "model_name": "siglip_large_patch16_384", "select_feature": "same", "select_layer": 1}},
    "aligner_config": projector("aligner", 1024), "gen_aligner_config": projector("gen_aligner", 8),
    "gen_head_config": {"cls": "vision_head", "model_type": "gen_head", "params": {"image_token_embed": WIDTH, "image_token_size": 16384, "n_embed": WIDTH}},
    "gen_vision_config": {"cls": "VQ-16", "model_type": "gen_vision", "params": {"image_token_size": 16384, "n_embed": 8}},
}


@torch.no_grad()
def write(folder, clone):
    folder.mkdir(parents=True)
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    import transformers                                 # before torchvision's stand-in, so that it sees that it is not there
    sys.path.insert(0, str(clone))
    sys.meta_path.append(NoTorchvision())
    from janus.models.modeling_vlm import MultiModalityCausalLM, MultiModalityConfig
    from janus.models.processing_vlm import VLChatProcessor
    torch.manual_seed(0)
    net = MultiModalityCausalLM(MultiModalityConfig(**CONFIG)).eval()
    for name, p in net.named_parameters():              # so that every part shows in the numbers
        if p.dim() < 2:
            p.copy_((1 if "norm" in name and name.endswith("weight") else 0) + 0.2 * torch.randn_like(p))
        elif "embed" in name and "gen_head" not in name:
            p.copy_(torch.randn_like(p) * (torch.rand(len(p), *[1] * (p.dim() - 1)) * 2 + 0.2))
        else:
            p.copy_(torch.randn_like(p) * p[0].numel() ** -0.5)
    torch.save(net.state_dict(), folder / "pytorch_model.bin")
    tokenizer = transformers.LlamaTokenizerFast.from_pretrained(folder)
    template = lambda text: VLChatProcessor.apply_sft_template_for_multi_turn_prompts(
        types.SimpleNamespace(sft_format="deepseek", system_prompt=""), [{"role": "<|User|>", "content": text}, {"role": "<|Assistant|>", "content": ""}],
        sft_format="deepseek", system_prompt="") + BOI
    x = torch.nn.functional.interpolate(torch.rand(2, 3, 24, 24) * 2 - 1, 384, mode="bilinear")
    codes = net.gen_vision_model.encode(x)[2][2].view(2, N)
    out = {"pictures": x, "codes": codes, "decoded": net.gen_vision_model.decode_code(codes, [2, 8, 24, 24])}
    pad = tokenizer.convert_tokens_to_ids(PAD)
    for i, text in enumerate(PROMPTS):
        ids = torch.tensor(tokenizer.encode(template(text)))
        second = ids.clone()
        second[1:-1] = pad                              # generation_inference.py
        x, cache, tokens, logits = net.language_model.get_input_embeddings()(torch.stack([ids, second])), None, [], []
        for _ in range(N):
            answer = net.language_model.model(inputs_embeds=x, use_cache=True, past_key_values=cache)
            cache = answer.past_key_values
            logits.append(net.gen_head(answer.last_hidden_state[:, -1]))                                # (2, V)
            tokens.append((logits[-1][1] + GUIDANCE * (logits[-1][0] - logits[-1][1])).argmax())
            x = net.prepare_gen_img_embeds(tokens[-1].repeat(2))[:, None]
        out |= {f"ids {i}": ids, f"tokens {i}": torch.stack(tokens), f"logits {i}": torch.stack(logits, 1)}     # (2, N, V)
    save_file({name: value.contiguous() for name, value in out.items()}, folder / "original.numbers")


# ---------------------------------------------------------------------------------------------------------------------
# In ours

@torch.no_grad()
def compare(folder):
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import janus
    import model as m
    theirs, (vq, model) = load_file(folder / "original.numbers"), janus.load_janus(folder)
    rows, gap = range(len(PROMPTS)), lambda a, b: (a - b).abs().max().item()
    report = {"prompts that differ": sum(model.text.encode(text) != theirs[f"ids {i}"].tolist() for i, text in enumerate(PROMPTS)),
              "image codes that differ": (vq.encode(theirs["pictures"]) != theirs["codes"]).sum().item(), "of codes": theirs["codes"].numel(),
              "pictures": gap(vq.decode(theirs["codes"]), theirs["decoded"])}
    ids, tokens = torch.from_numpy(model.text.prompts(PROMPTS, 9999)), torch.stack([theirs[f"tokens {i}"] for i in rows])
    mine = m.generate(model, ids, None, 1, GUIDANCE, 1e-6, torch.Generator().manual_seed(0))[0]
    hidden = m.image_hidden(model, ids, tokens), m.empty_hidden(model, ids, tokens, None)
    logits = [model.gen_head(h).view(*tokens.shape, -1) for h in hidden]                                # cond and uncond (B, N, V)
    report |= {"padding in the batch": (~m.real_tokens(ids, model.cfg.pad)).sum(1).tolist(), "greedy tokens that differ": (mine != tokens).sum().item(),
               "of tokens": tokens.numel(), "distinct tokens": tokens.unique().numel(),
               "logits, cond": max(gap(logits[0][i], theirs[f"logits {i}"][0]) for i in rows),
               "logits, uncond": max(gap(logits[1][i], theirs[f"logits {i}"][1]) for i in rows),
               "standard deviation of logits": theirs["logits 0"].std().item()}
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--write", type=Path, metavar="DIR")
    parser.add_argument("--clone", type=Path, metavar="JANUS")
    parser.add_argument("--compare", type=Path, metavar="DIR")
    args = parser.parse_args()
    if args.compare:
        compare(args.compare)
    else:
        write(args.write, args.clone)
