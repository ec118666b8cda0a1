"""What a user would run instead, for bench.py to time: transformers' Janus, and the official loop.

Both run transformers' Janus with random weights, at the size of the model that bench.py times. The
official loop is typed again from what FocusDiff's release does, in our words:

    sampling    conditional and empty rows interleaved in a doubled batch, a key-value cache and a
                mask that grow by concatenation, softmax and torch.multinomial
    scoring     the doubled batch again, gen_head on every position of prompt and image, guided
                logits, log-softmax row by row

Shapes: B sequences, T text tokens, N image tokens, V image codes.
"""
import inspect

import torch

from common import UserError


def transformers_janus(cfg, device):
    """transformers' JanusForConditionalGeneration of our geometry, random. UserError without it."""
    try:
        import transformers
    except ImportError as e:
        raise UserError("no transformers here: pip install transformers") from e
    transformers.logging.set_verbosity_error()
    n_positions = 1024 + cfg.n_image
    text = transformers.LlamaConfig(
        vocab_size=cfg.text_vocab, hidden_size=cfg.n_embd, intermediate_size=cfg.n_ffn,
        num_hidden_layers=cfg.n_layer, num_attention_heads=cfg.n_head,
        num_key_value_heads=cfg.n_head, max_position_embeddings=n_positions,
        rms_norm_eps=cfg.rms_eps, tie_word_embeddings=False)
    # Generation reads the number of image tokens from the vision tower, and nothing else of it.
    vision = transformers.JanusVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16,
        num_image_tokens=cfg.n_image, projection_dim=cfg.n_embd)
    vq = transformers.JanusVQVAEConfig(
        embed_dim=cfg.code_dim, num_embeddings=cfg.image_vocab, latent_channels=32,
        base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1,
        projection_dim=cfg.n_embd, image_token_embed_dim=cfg.n_embd)
    config = transformers.JanusConfig(text_config=text, vision_config=vision, vq_config=vq,
                                      tie_word_embeddings=False)
    with torch.device(device):
        return transformers.JanusForConditionalGeneration(config).eval()


def left_padded(prompts, lengths):
    """Prompts (B, T) padded at the end -> on the left, and where their tokens stand (B, T) bool."""
    t = prompts.shape[1]
    source = torch.arange(t, device=prompts.device) - (t - lengths[:, None])    # (B, T)
    return prompts.gather(1, source % t), source >= 0


def transformers_rollout(net, prompts, mask, guidance):
    """prompts (B, T) padded on the left -> tokens (B, N)."""
    net.generation_config.generation_kwargs = {"boi_token_id": 2}
    return net.generate(
        prompts, attention_mask=mask.long(), generation_mode="image", do_sample=True,
        guidance_scale=guidance, bos_token_id=1, pad_token_id=0, eos_token_id=None,
        max_new_tokens=net.model.vision_model.config.num_image_tokens, use_cache=True)


def doubled(net, prompts, mask, pad):
    """Each prompt and, in the next row, its empty one: embeddings (2B, T, C), mask (2B, T)."""
    empty = prompts.clone()
    for row, attended in zip(empty, mask):              # as the release does: a loop over rows
        first = int(torch.where(attended)[0][0])
        row[first + 1:-1] = pad
    rows = torch.stack([prompts, empty], 1).flatten(0, 1)               # (2B, T)
    return net.get_input_embeddings()(rows), mask.repeat_interleave(2, 0).long()


@torch.no_grad()
def official_rollout(net, prompts, mask, guidance, pad=0):
    """prompts (B, T) padded on the left -> tokens (B, N)."""
    x, mask = doubled(net, prompts, mask, pad)
    language = net.model.language_model
    known = inspect.signature(language.forward).parameters
    name = "cache" if "cache" in known else "past_key_values"           # as transformers calls it
    cache = None
    tokens = []
    for _ in range(net.model.vision_model.config.num_image_tokens):
        out = language(inputs_embeds=x, attention_mask=mask, use_cache=True, **{name: cache})
        cache = out.past_key_values
        logits = net.model.generation_head(out.last_hidden_state[:, -1])
        cond = logits[0::2]
        uncond = logits[1::2]
        p = (uncond + guidance * (cond - uncond)).softmax(-1)
        token = torch.multinomial(p, 1)                                 # (B, 1)
        tokens.append(token)
        both = torch.cat([token, token], 1).view(-1)                    # (2B,)
        x = net.prepare_embeddings_for_image_generation(both)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return torch.cat(tokens, 1)


def official_score(net, prompts, mask, tokens, guidance, pad=0):
    """prompts (B, T) padded on the left, tokens (B, N) -> log-probs (B, N)."""
    x, mask = doubled(net, prompts, mask, pad)
    images = net.prepare_embeddings_for_image_generation(tokens.repeat_interleave(2, 0))
    x = torch.cat([x, images], 1)                                       # (2B, T+N, C)
    mask = torch.cat([mask, mask.new_ones(len(mask), tokens.shape[1])], 1)
    out = net.model.language_model(inputs_embeds=x, attention_mask=mask, use_cache=False)
    logits = net.model.generation_head(out.last_hidden_state)           # (2B, T+N, V)
    n = tokens.shape[1]
    cond = logits[0::2, -n - 1:-1]
    uncond = logits[1::2, -n - 1:-1]
    logits = uncond + guidance * (cond - uncond)                        # (B, N, V)
    rows = [row.log_softmax(-1).gather(1, token[:, None])[:, 0]
            for row, token in zip(logits, tokens)]
    return torch.stack(rows)
