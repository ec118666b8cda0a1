"""A random LLaVA of a few thousand parameters in a folder, as transformers saves one: for tests of what loads and asks such a model.

    python tests/tiny_vlm.py DIR        # one that vLLM serves too: vllm serve DIR --dtype float32 --max-model-len 2048 --enforce-eager
"""
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def make_tiny_vlm(folder, seed=0, width=16):
    """-> folder. Its tokenizer knows bytes, the six answers and <image>; it looks at 16x16 pixels as four patches."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast
    vocabulary, merges = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []
    for word in ("yes", "Yes", "YES", "no", "No", "NO"):
        for n in range(2, len(word) + 1):
            if word[:n] not in vocabulary:
                vocabulary[word[:n]] = len(vocabulary)
                merges.append((word[:n - 1], word[n - 1]))
    bpe = Tokenizer(models.BPE(vocabulary, merges))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
                                        additional_special_tokens=["<image>"])
    # newlines in expressions: jinja swallows one that follows a block
    template = ("{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% else %}{{ part['text'] }}"
                "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ '\\nA:' }}{% endif %}")
    processor = LlavaProcessor(CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}), tokenizer, patch_size=8,
                               vision_feature_select_strategy="full", chat_template=template, image_token="<image>", num_additional_image_tokens=1)
    ids = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<{name}>") for name in ("pad", "bos", "eos")}
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=dict(model_type="clip_vision_model", hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=2,
                           image_size=16, patch_size=8),
        text_config=dict(model_type="llama", vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=2048, **ids),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_select_strategy="full", vision_feature_layer=-1))
    for p in model.parameters():                                        # so that pictures and prompts move the answer visibly
        p.data.mul_(320 / width if p.dim() > 1 else 1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_servable(folder):
    """As vLLM wants it: heads of 32, the vision encoder's names as in the checkpoints of old, and the six answers among the 20 most probable
    first tokens, as of a model that has learned to answer; a server lists no more."""
    from safetensors.torch import load_file, save_file
    from transformers import LlavaForConditionalGeneration, LlavaProcessor
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from judges import QUESTION
    make_tiny_vlm(folder, width=64)
    model, processor = LlavaForConditionalGeneration.from_pretrained(folder).eval(), LlavaProcessor.from_pretrained(folder)
    rng, hidden = np.random.default_rng(1), []
    with torch.no_grad():
        for n in range(16):
            picture, question = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)), QUESTION.format(prompt="a cat " * (n + 1))
            inputs = processor(images=picture, text=f"<image>\n{question}\nA:", return_tensors="pt")
            hidden.append(model(**inputs, output_hidden_states=True).hidden_states[-1][0, -1])
        hidden, head = torch.stack(hidden), model.lm_head.weight
        head.div_((hidden @ head.T).std())                              # logits of a standard deviation of 1
        mean = hidden.mean(0)
        for word in ("yes", "Yes", "YES", "no", "No", "NO"):
            answer = processor.tokenizer.convert_tokens_to_ids(word)
            head[answer] += mean / mean.dot(mean) * (6 - mean.dot(head[answer]))
    model.save_pretrained(folder)
    file = Path(folder) / "model.safetensors"
    names = {name: name.replace("vision_tower.", "vision_tower.vision_model.") for name in load_file(file)}
    save_file({names[name]: tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return folder


if __name__ == "__main__":
    print(make_servable(sys.argv[1]))
