"""A random LLaVA of a few thousand parameters in a folder, as transformers saves one: for tests of
what opens and asks such a model.

    python tests/tiny_vlm.py DIR        # one that vLLM serves too, see docs/janus.md
"""
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ANSWERS = ("yes", "Yes", "YES", "no", "No", "NO")

# newlines are inside expressions because jinja swallows one that follows a block
CHAT_TEMPLATE = (
    "{% for m in messages %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\nA:' }}{% endif %}"
)


def make_tokenizer():
    """A tokenizer that knows bytes, the six answers, <image>, and three marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    merges = []
    for word in ANSWERS:
        for n in range(2, len(word) + 1):
            if word[:n] not in vocabulary:
                vocabulary[word[:n]] = len(vocabulary)
                merges.append((word[:n - 1], word[n - 1]))
    bpe = Tokenizer(models.BPE(vocabulary, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>",
                                   eos_token="<eos>", additional_special_tokens=["<image>"])


def make_tiny_vlm(folder, seed=0, width=16):
    """-> folder. The model sees 16x16 pixels as four patches."""
    from transformers import (CLIPImageProcessorPil, LlavaConfig, LlavaForConditionalGeneration,
                              LlavaProcessor)

    tokenizer = make_tokenizer()
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 16},
                                            crop_size={"height": 16, "width": 16})
    processor = LlavaProcessor(image_processor, tokenizer, patch_size=8,
                               vision_feature_select_strategy="full", image_token="<image>",
                               chat_template=CHAT_TEMPLATE, num_additional_image_tokens=1)
    shape = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
                 num_attention_heads=2)
    ids = {}
    for name in ("pad", "bos", "eos"):
        ids[f"{name}_token_id"] = tokenizer.convert_tokens_to_ids(f"<{name}>")
    vision = dict(model_type="clip_vision_model", image_size=16, patch_size=8, **shape)
    text = dict(model_type="llama", vocab_size=len(tokenizer), num_key_value_heads=2,
                max_position_embeddings=2048, **shape, **ids)
    torch.manual_seed(seed)
    config = LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=-1,
                         image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
                         vision_feature_select_strategy="full")
    model = LlavaForConditionalGeneration(config)
    for p in model.parameters():  # so that images and prompts move the answer visibly
        p.data.mul_(320 / width if p.dim() > 1 else 1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_servable(folder):
    """-> folder, as vLLM wants it: heads of 32, the names of the vision encoder as in older
    checkpoints, and the six answers among the 20 most probable first tokens, as in a model that
    has learned to answer; a server lists no more."""
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    make_tiny_vlm(folder, width=64)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = LlavaProcessor.from_pretrained(folder)
    raise_answers(model, processor)
    model.save_pretrained(folder)
    rename_vision_encoder(Path(folder) / "model.safetensors")
    return folder


@torch.no_grad()
def raise_answers(model, processor):
    """Change the head so that the six answers have a logit of about 6 and others about 1."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from extras.judges import QUESTION

    rng = np.random.default_rng(1)
    hidden = []
    for n in range(16):
        image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        text = f"<image>\n{QUESTION.format(prompt='a cat ' * (n + 1))}\nA:"
        inputs = processor(images=image, text=text, return_tensors="pt")
        output = model(**inputs, output_hidden_states=True)
        hidden.append(output.hidden_states[-1][0, -1])
    hidden = torch.stack(hidden)
    head = model.lm_head.weight
    head.div_((hidden @ head.T).std())  # logits of a standard deviation of 1
    mean = hidden.mean(0)
    for word in ANSWERS:
        answer = processor.tokenizer.convert_tokens_to_ids(word)
        head[answer] += mean / mean.dot(mean) * (6 - mean.dot(head[answer]))


def rename_vision_encoder(file):
    from safetensors.torch import load_file, save_file

    tensors = {}
    for name, tensor in load_file(file).items():
        tensors[name.replace("vision_tower.", "vision_tower.vision_model.")] = tensor
    save_file(tensors, file, {"format": "pt"})


if __name__ == "__main__":
    print(make_servable(sys.argv[1]))
