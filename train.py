"""Train nanoFocusDiff. Four stages, each a function below, in the order they run:

    tokenizer   a VQ model turns pictures into tokens and back
    pretrain    a transformer learns to write a prompt's tokens: the base model, coarse right and fine wrong
    reward      two judges learn to answer "Does this image match the description?"
    ppo         the base model samples pictures for pairs of prompts, the training judge scores them, PPO learns from it

    python train.py --stage ppo                      # trains what is missing first; ends on a before/after PairComp table
    python train.py --stage pretrain --lr 5e-4       # every field of a stage's config is a flag; --help lists them
    python train.py --stage ppo --preset smoke --out runs/smoke      # the whole way in under a minute, to see that it works
    python train.py --stage ppo --resume             # go on where a run was stopped
    python train.py --curves runs/tiny               # draw curves.png again from log.jsonl

A run folder holds the weights (*.safetensors), `<stage>.state` while a stage is unfinished (everything to resume), config.json,
log.jsonl (one object a step), paircomp.json, samples/*.png and curves.png.

Every random choice of step n is drawn from generators seeded by (seed, stage, n). There is no generator state to save, and a run
that was killed ends, on CPU, with the same bits as one that was not.
"""
import math
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, repeat

from before_after import finish_benchmark, tested, tested_pairs
from config import MINUTES, NEEDS, PRESETS, STAGES, Common, parse
from data import PairSet, UserError, read_prompts
from eval_paircomp import benchmark_pairs
from janus import import_janus, load_janus
from judges import JudgeError, open_judges, submit
from loop import (Loop, adamw, append_log, autocast, bf16, encode_pairs, muon_and_adamw, save_picture, show, step_random, tokens_of, training_pairs,
                  training_texts)
from model import ImageModel, ModelConfig, empty_ids, generate, pick_device, prompt_divergence, score, usual_guidance
from pairworld import ATTRIBUTES, TextTokens, pairworld, read_scene, shown_in
from plots import draw_curves
from ppo import (ORIGINS, SAMPLED, choice_reward, difference_weights, ground_truth_probability, mix_ground_truth, pair_reward, ppo_loss,
                 spread_difference, token_advantages)
from reward import Judge, JudgeConfig, NetworkJudge, OracleJudge, judge_loss, judge_report
from runs import generate_images, load_judges, load_policy, save_judges
from tokenizer import (VQConfig, VQModel, code_statistics, decode_ids, encode_images, from_pixels, kmeans_codes, load_module, save_weights,
                       update_codebook, vq_loss, write_atomically)


def stored_as(tensors, dtypes):
    """A state dict, trained in fp32, in the dtypes of the one that it was trained from."""
    return {k: v.to(dtypes[k]) for k, v in tensors.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1

def train_tokenizer(cfg, resume):
    device = pick_device(cfg.device)
    pairs = training_pairs(cfg, VQConfig.image_size)
    torch.manual_seed(cfg.seed)
    vq = VQModel(VQConfig(ch=cfg.ch, codebook_size=cfg.codebook_size, codebook_dim=cfg.codebook_dim)).to(device)
    codebook, usage = vq.quantize.embedding.weight.data, torch.ones(cfg.codebook_size, device=device)
    loop = Loop("tokenizer", cfg, resume, {"model": vq}, [adamw(vq.parameters(), cfg.lr, 0.0)], {"usage": usage})
    for step in loop:
        rng, generator = step_random(cfg, "tokenizer", step)
        if step == cfg.unquantized:
            with torch.no_grad():
                z = [vq.latents(from_pixels(draw(pairs, rng, 128), device)) for _ in range(8)]
            codebook.copy_(kmeans_codes(rearrange(torch.cat(z), "b d h w -> (b h w) d"), cfg.codebook_size, generator))
        x = from_pixels(loop.guarded(step, lambda: draw(pairs, rng, cfg.batch)), device)
        with autocast(cfg, device):
            loss, z, ids, picture = vq_loss(vq, x, step >= cfg.unquantized, cfg.commitment, cfg.rate * usage.log())
        norm = loop.update(step, loss)
        restarts = update_codebook(codebook, usage, z.detach(), ids, generator) if ids is not None and step < 0.8 * cfg.steps else 0
        used, perplexity = code_statistics(ids, cfg.codebook_size) if ids is not None else (0.0, 0.0)
        psnr = 10 * math.log10(4 / (picture - x).square().mean().item())
        loop.log(step, ("loss", "psnr", "perplexity"), loss=loss, psnr=psnr, perplexity=perplexity, batch_usage=used, restarts=restarts, grad_norm=norm)
    vq.eval()
    test = pairs if cfg.data else pairworld(300, "test", 1)
    test = test.load(np.arange(min(300, len(test))))
    test = rearrange(test, "p i h w c -> (p i) h w c")
    ids = encode_images(vq, test, device)
    seen = decode_ids(vq, ids)
    used, perplexity = code_statistics(ids, cfg.codebook_size)
    report = {"psnr": float(-10 * np.log10(((seen / 255.0 - test / 255.0) ** 2).mean())), "usage": used, "perplexity": perplexity}
    if not cfg.data:                                    # the oracle reads the same attribute off the picture and its reconstruction
        report["legibility"] = dict(zip(ATTRIBUTES, (read_scene(test) == read_scene(seen)).mean(0).tolist()))
    append_log(cfg, {"stage": "tokenizer", "report": report})
    print(f"tokenizer, {'training' if cfg.data else 'held-out'} pictures: {show(report)}")
    save_picture(cfg, "tokenizer.png", np.stack([test[:16], seen[:16]], 1).reshape(-1, *test.shape[1:]))
    save_weights(Path(cfg.out) / "tokenizer.safetensors", vq.state_dict(), config=asdict(vq.cfg))
    loop.finish()


def draw(pairs, rng, n):
    """n pictures, both sides of n/2 random pairs. -> (n, H, W, 3) uint8"""
    return rearrange(pairs.load(rng.integers(len(pairs), size=max(1, n // 2))), "p i h w c -> (p i) h w c")


# ---------------------------------------------------------------------------------------------------------------------
# Stage 2

def train_pretrain(cfg, resume):
    device = pick_device(cfg.device)
    vq = load_module(Path(cfg.out) / "tokenizer.safetensors", VQModel, VQConfig, device)
    pairs = training_pairs(cfg, vq.cfg.image_size)
    # PairWorld's pictures are encoded once; a folder's, which may be hundreds of thousands, when a batch has them
    codes = None if cfg.data else encode_pairs(vq, pairs, device).flatten(0, 1)                         # (2P, N)
    torch.manual_seed(cfg.seed)
    if cfg.janus:
        model = load_janus(cfg.janus, device)[1]
    else:
        model = ImageModel(ModelConfig(TextTokens().vocab_size, vq.cfg.codebook_size, cfg.n_text, vq.cfg.grid ** 2, cfg.n_layer, cfg.n_head, cfg.n_embd,
                                       cfg.n_ffn, vq.cfg.codebook_dim)).to(device)
        # what the tokenizer knows of which codes are alike
        model.gen_embed.weight.data.copy_(vq.quantize.embedding.weight * vq.cfg.codebook_dim ** 0.5)
    dtypes = {k: v.dtype for k, v in model.state_dict().items()}
    model.float().recompute = cfg.recompute             # fp32 master weights, whatever the checkpoint has
    texts = training_texts(pairs, model.cfg.n_text, model.text)
    maybe_compile(model, cfg)
    loop = Loop("pretrain", cfg, resume, {"model": model}, muon_and_adamw([model], cfg))
    for step in loop:
        rng, _ = step_random(cfg, "pretrain", step)
        chosen = rng.integers(len(texts), size=cfg.batch)
        dropped = rng.random(cfg.batch) < cfg.caption_dropout
        prompts = tokens_of([texts[i] for i in chosen], model.cfg.n_text, device, model.text, dropped)
        tokens = codes[chosen].to(device) if codes is not None else encode_images(vq, loop.guarded(step, lambda: pairs.load_rows(chosen)), device)
        parts = []

        def losses():
            for rows in torch.arange(cfg.batch).chunk(cfg.accumulate):
                with autocast(cfg, device):
                    logprobs, entropy = score(model, prompts[rows], tokens[rows])
                loss, share = -logprobs.mean(), len(rows) / cfg.batch
                parts.append((loss.detach() * share, entropy.mean() * share))
                yield loss * share
        norm = loop.update(step, losses())
        loss, entropy = (sum(part) for part in zip(*parts))
        loop.log(step, ("loss",), loss=loss, entropy=entropy, grad_norm=norm)
    test = benchmark_pairs(4) if not cfg.data else pairs
    prompts = test.texts()[:32]
    model.bf16, at_once = bf16(cfg, device), min(64, 2 * -(-cfg.batch // cfg.accumulate))               # sampling needs less than training did
    images = generate_images(model.eval(), vq, prompts, 1, usual_guidance(model), 1.0, cfg.seed, at_once)[:, 0]
    save_picture(cfg, "pretrain.png", images, prompts, scale=5)
    save_weights(Path(cfg.out) / "pretrain.safetensors", stored_as(model.state_dict(), dtypes), config=asdict(model.cfg))
    loop.finish()


def maybe_compile(model, cfg):
    if cfg.compile:
        model.hidden = torch.compile(model.hidden, dynamic=True)


# ---------------------------------------------------------------------------------------------------------------------
# Stage 3

def train_reward(cfg, resume):
    device = pick_device(cfg.device)
    vq = load_module(Path(cfg.out) / "tokenizer.safetensors", VQModel, VQConfig, device)
    pairs = training_pairs(cfg, vq.cfg.image_size)
    codes = encode_pairs(vq, pairs, device)
    training_texts(pairs, JudgeConfig.n_text)
    torch.manual_seed(cfg.seed)
    shape = dict(width=cfg.width, grid=vq.cfg.image_size // JudgeConfig.patch)
    judges = {name: Judge(JudgeConfig(kind=kind, **shape)).to(device) for name, kind in (("train", "attend"), ("heldout", "convolve"))}
    loop = Loop("reward", cfg, resume, judges, muon_and_adamw(judges.values(), cfg))
    for step in loop:
        losses, rights = {}, {}
        for n, (name, judge) in enumerate(judges.items()):
            rng, _ = step_random(replace(cfg, seed=cfg.seed + 1000 * n), "reward", step)                # each judge sees pairs of its own
            chosen = rng.integers(len(pairs), size=cfg.batch)
            images = loop.guarded(step, lambda: pairs.load(chosen))                                      # (P, 2, H, W, 3)
            x = rearrange(from_pixels(images.reshape(-1, *images.shape[2:]), device), "(p i) c h w -> p i c h w", i=2)
            renderings = x.clone()
            with torch.no_grad():                       # half the pairs as the policy would draw them: through the tokenizer
                half = cfg.batch // 2
                x[:half] = vq.decode(codes[chosen[:half]].to(device).flatten(0, 1)).clamp(-1, 1).view_as(x[:half])
            prompts = tokens_of([text for i in chosen for text in pairs.prompts[i]], judge.cfg.n_text, device)
            with autocast(cfg, device):
                losses[name], rights[name] = judge_loss(judge, x, rearrange(prompts, "(p i) t -> p i t", i=2),
                                                        renderings if step >= cfg.splices_from else None, rng)
        norm = loop.update(step, sum(losses.values()))
        loop.log(step, ("loss_train", "loss_heldout"), grad_norm=norm, **{f"loss_{k}": v for k, v in losses.items()}, **{f"accuracy_{k}": v for k, v in rights.items()})
    test = pairworld(300, "test", 2) if not cfg.data else pairs
    images = test.load(np.arange(min(300, len(test))))
    seen = decode_ids(vq, encode_images(vq, images.reshape(-1, *images.shape[2:]), device)).reshape(images.shape)
    test = PairSet(test.prompts[:300], images, test.categories[:300])
    for name, judge in judges.items():
        for kind, shown in (("renderings", images), ("reconstructions", seen)):
            report = judge_report(NetworkJudge(judge, device), shown, test)
            append_log(cfg, {"stage": "reward", "judge": name, "on": kind, "report": report})
            print(f"{name} judge, {'training' if cfg.data else 'held-out'} {kind}: {show(report)}")
    save_judges(Path(cfg.out) / "reward.safetensors", judges)
    loop.finish()


# ---------------------------------------------------------------------------------------------------------------------
# Stage 4

def train_ppo(cfg, resume):
    device, out = pick_device(cfg.device), Path(cfg.out)
    vq, policy = load_policy(out, "pretrain", device)
    policy.float().recompute = cfg.recompute            # fp32 master weights; the reference stays as it is stored
    policy.bf16 = bf16(cfg, device)
    reference = load_policy(out, "pretrain", device)[1].requires_grad_(False)
    dtypes = {k: v.dtype for k, v in reference.state_dict().items()}
    if not bf16(cfg, device):
        reference.float()
    cfg, judges = judges_of(cfg, device)
    pairs = training_pairs(cfg, vq.cfg.image_size, bare=cfg.mine == 1)      # `told_apart` looks at every pair's pictures
    lone = read_prompts(cfg.prompts) if cfg.prompts else None
    test, quick_test = (tested_pairs(cfg, n) for n in (cfg.eval_pairs, cfg.quick_pairs))
    for told in filter(None, (pairs, lone, test)):
        training_texts(told, policy.cfg.n_text, policy.text)
        if not cfg.judge:
            training_texts(told, JudgeConfig.n_text)
    for model in (policy, reference):
        maybe_compile(model, cfg)
    together = cfg.rollout_pairs or (-(-cfg.pairs // 4) if cfg.judge and judges["train"].remote else cfg.pairs)
    empty, pi = empty_ids(policy), dict(guidance=cfg.guidance, temperature=cfg.temperature)
    loop = Loop("ppo", cfg, resume, {"model": policy}, [adamw(policy.parameters(), cfg.lr, 0.0, eps=1e-5)])
    before = None if test is None else tested(reference, vq, judges, test, cfg)
    for step in loop:
        extra = {}
        if test is not None and step % cfg.eval_every == 0:                                             # at step 0: the base model
            quick = loop.guarded(step, lambda: tested(policy, vq, judges, quick_test, cfg)[0])
            extra["test"] = {name: quick[name]["average"] for name in (*judges, "pair_accuracy") if name in quick}

        # The step's prompts, and which of them are shown ground truth
        rng, generator = step_random(cfg, "ppo", step, device)
        chosen = rng.integers(len(pairs), size=cfg.mine * cfg.pairs)
        if cfg.mine > 1:                                # keep the pairs that the policy confuses most
            images = loop.guarded(step, lambda: pairs.load(chosen))
            with autocast(cfg, device):
                margins = told_apart(policy, vq, images, [text for i in chosen for text in pairs.prompts[i]], empty, pi)
            chosen = chosen[margins.argsort(stable=True)[:cfg.pairs].numpy()]
        prompts, has_truth = [pairs.prompts[i] for i in chosen], pairs.has_images(chosen)
        if lone:
            for p in np.flatnonzero(rng.random(cfg.pairs) < cfg.prompts_share):
                prompts[p], has_truth[p] = lone.prompts[rng.integers(len(lone))], False
        texts, twins = [text for two in prompts for text in two], [text for two in prompts for text in two[::-1]]
        truth_p = ground_truth_probability(step, cfg.truth_full_until, cfg.truth_low_at, cfg.truth_zero_at) if step >= cfg.truth_start else 0.0
        use_truth = torch.from_numpy((rng.random((cfg.pairs, 2)) < truth_p) & has_truth[:, None]).to(device)

        with torch.no_grad():
            # Rollout: sample G pictures for each of 2P prompts, mix the ground truth in and have them judged, each by its own prompt and, if
            # asked, by its twin's. A judge on a server answers for some of the pairs while the next are drawn
            ids = rearrange(tokens_of(texts, policy.cfg.n_text, device, policy.text), "(p i) t -> p i t", i=2)     # (P, 2, T)
            ids, rollout, answers = repeat(ids, "p i t -> p i g t", g=cfg.samples), [], []
            asked = (texts, twins) if cfg.reward in ("product", "margin", "shared") or cfg.choice else (texts,)
            if use_truth.any():
                images = loop.guarded(step, lambda: pairs.load(chosen))
                with autocast(cfg, device):                                                             # in bf16 on cuda
                    truth = rearrange(encode_images(vq, images.reshape(-1, *images.shape[2:]), device), "(p i) n -> p i n", i=2)
            for part in torch.arange(cfg.pairs).split(together):
                with autocast(cfg, device):
                    drawn = generate(policy, ids[part, :, 0].flatten(0, 1), empty, cfg.samples, generator=generator, **pi)
                tokens, old_logprobs = (rearrange(t, "(p i g) n -> p i g n", i=2, g=cfg.samples) for t in drawn)
                origin = torch.full(tokens.shape[:3], SAMPLED, device=device)                           # (P of the part, 2, G)
                if use_truth.any():
                    tokens, origin = mix_ground_truth(tokens, truth[part], use_truth[part], cfg.truth_twin)
                pictures = decode_ids(vq, tokens.flatten(0, 2))                                         # (P*2*G, H, W, 3)
                rollout.append((tokens, old_logprobs, origin, torch.from_numpy(pictures)))
                rows = [2 * p + i for p in part.tolist() for i in range(2) for _ in range(cfg.samples)]     # of the 2P prompts
                answers.append(loop.guarded(step, lambda: [submit(judges["train"], pictures, [told[row] for row in rows]) for told in asked]))
            tokens, old_logprobs, origin, pictures = map(torch.cat, zip(*rollout))                      # (P, 2, G, ...), pictures (2PG, H, W, 3)
            pictures = pictures.numpy()
            with autocast(cfg, device):                 # while the last part is judged
                if use_truth.any():
                    rows = origin != SAMPLED            # nobody sampled these; the policy of the rollout stands in for pi_old
                    old_logprobs[rows] = score(policy, ids[rows], tokens[rows], empty, **pi)[0]
                ref_logprobs = score(reference, ids.flatten(0, 2), tokens.flatten(0, 2), empty, **pi)[0].view_as(old_logprobs) if cfg.beta else None
            answers = loop.guarded(step, lambda: [torch.cat([ready() for ready in told]).to(device).view_as(origin) for told in zip(*answers)])
            own, twin = answers[0], answers[-1]         # (P, 2, G)
            if lone:                                    # a prompt without a twin has nothing to be told from
                twin = torch.where(torch.tensor([a == b for a, b in prompts], device=device)[:, None, None], 0.0, twin)
            rewards = pair_reward(own, twin, cfg.reward)                                                # (P, 2, G)

            weights = 1.0
            if cfg.difference:
                with autocast(cfg, device):
                    divergence = difference_of(cfg, policy, empty, ids, tokens, pictures, prompts, generator)
                weights = difference_weights(divergence, cfg.difference, cfg.difference_cap).view_as(old_logprobs)
            advantages = token_advantages(rewards, choice_reward(own, twin), origin, weights, cfg).expand_as(old_logprobs)

        def loss_of(rows):
            """The loss over some of the rollout's sequences, rows of the flattened (P, 2, G)."""
            at = lambda t: None if t is None else t.flatten(0, 2)[rows]
            with autocast(cfg, device):
                newlogprobs, entropy = score(policy, at(ids), at(tokens), empty, **pi)
            shaped, held = at(origin) != SAMPLED if cfg.truth_shape else None, None if cfg.truth_kl else at(origin) == SAMPLED
            return *ppo_loss(newlogprobs, at(old_logprobs), at(ref_logprobs), at(advantages), cfg.clip, cfg.beta, shaped, cfg.truth_shape, held), entropy

        if use_truth.any() and step % cfg.eval_every == 0:
            extra["grad_norm_of"] = gradient_norms(policy, lambda rows: loss_of(rows)[0], origin.flatten())

        # Update: minibatches of whole pairs
        stats, kl_rows, whole = [], torch.zeros(origin.numel(), device=device), torch.arange(origin.numel(), device=device).view(cfg.pairs, -1)
        for _ in range(cfg.epochs):
            for mb in torch.from_numpy(rng.permutation(cfg.pairs)).split(cfg.pairs // cfg.minibatches):
                rows, parts = whole[mb].flatten(), []

                def losses():
                    for some in rows.chunk(cfg.accumulate):
                        loss, values, kl_rows[some], entropy = loss_of(some)
                        share = len(some) / len(rows)
                        parts.append((share, values | {"entropy": entropy.mean()}))
                        yield loss * share
                norm = loop.update(step, losses(), cfg.grad_clip)
                values = {k: sum(share * v[k] for share, v in parts) for k in parts[0][1]}
                stats.append(values | {"ratio_max": max(v["ratio_max"] for _, v in parts), "grad_norm": norm})
        mean = {k: torch.stack([s[k] for s in stats]).mean() for k in stats[0]}
        sampled = origin == SAMPLED
        if not sampled.all():
            extra["kl_of"] = {name: kl_rows[(origin == kind).flatten()].mean().item() for name, kind in ORIGINS.items() if (origin == kind).any()}
        if (step + 1) % cfg.eval_every == 0:
            save_picture(cfg, f"ppo_{step + 1:04d}.png", pictures[cfg.samples - 1::cfg.samples][:16], texts[:16], scale=5)
        flat_groups = rewards.std(2, correction=0) < 1e-3
        loop.log(step, ("reward", "kl", "entropy", "clipfrac"), reward=own[sampled].mean(), reward_std=own[sampled].std(correction=0), truth_probability=truth_p,
                 frac_zero_std=flat_groups.float().mean(), **mean, **extra)
    if test is not None:
        finish_benchmark(cfg, policy, reference, vq, judges, test, before)
    save_weights(out / "ppo.safetensors", stored_as(policy.state_dict(), dtypes), config=asdict(policy.cfg))
    loop.finish()
    print(f"curves: {draw_curves(out)}")


@torch.no_grad()
def told_apart(policy, vq, images, texts, empty, pi):
    """How well the policy tells n pairs' two pictures apart by their prompts: the mean over both of log pi(I | T) - log pi(I | T'), T' the
    twin's prompt. Low where it confuses them. images (n, 2, H, W, 3) uint8, 2n strings -> (n,) nats a picture, on the CPU. Nothing is
    sampled and no judge is asked."""
    device = policy.embed_tokens.weight.device
    tokens = encode_images(vq, images.reshape(-1, *images.shape[2:]), device)                           # (2n, N)
    own = tokens_of(texts, policy.cfg.n_text, device, policy.text)
    twin = rearrange(own, "(p i) t -> p i t", i=2).flip(1).flatten(0, 1)
    right, wrong = (score(policy, ids, tokens, empty, **pi)[0].sum(-1) for ids in (own, twin))          # (2n,)
    return (right - wrong).view(-1, 2).mean(1).cpu()


def judges_of(cfg, device):
    """The settings, with every judge's model in its name, and {"train", "heldout", "oracle": judge}: the run's own, or in their place
    those of --judge and --heldout-judge. With --judge alone nobody is held out."""
    server = dict(workers=cfg.judge_workers, timeout=cfg.judge_timeout, retries=cfg.judge_retries)
    judges = {"oracle": OracleJudge()} if cfg.judge else load_judges(Path(cfg.out), device)
    if cfg.judge:
        judges["train"] = open_judges(cfg.judge, device, cfg.judge_full_stop, **server)
        cfg = replace(cfg, judge=judges["train"].names)
    if cfg.heldout_judge:
        judges["heldout"] = open_judges([cfg.heldout_judge], device, **server)
        cfg = replace(cfg, heldout_judge=judges["heldout"].names[0])
    told = ("train", "heldout") if cfg.test else ("train", "heldout", "oracle")      # the oracle reads PairWorld alone
    return cfg, {name: judges[name] for name in told if name in judges}


def difference_of(cfg, policy, empty, ids, tokens, pictures, prompts, generator):
    """What the difference-aware weights are made of: D_t, or one of its controls. ids (P, 2, G, T), tokens (P, 2, G, N) -> (P*2*G, N)."""
    flat = tokens.flatten(0, 2)
    if cfg.difference_from == "random":
        return (torch.rand(flat.shape, generator=generator, device=flat.device) < 0.3).float()
    if cfg.difference_from == "mask":
        told = [two for two in prompts for _ in range(2 * cfg.samples)]
        return torch.from_numpy(shown_in(pictures, told, math.isqrt(flat.shape[1]))).flatten(1).float().to(flat.device)
    divergence = prompt_divergence(policy, ids.flatten(0, 2), ids.flip(1).flatten(0, 2), flat, empty, cfg.guidance, cfg.temperature)
    if cfg.difference_spread:
        divergence = spread_difference(divergence, math.isqrt(flat.shape[1]), cfg.difference_spread)
    if cfg.difference_from == "shuffled":
        return divergence.gather(1, torch.rand(flat.shape, generator=generator, device=flat.device).argsort(1))
    return divergence


def gradient_norms(policy, loss_of, origin):
    """Norm of what the sequences of each origin add to the gradient of a rollout. loss_of: rows -> their mean loss; origin (B,)."""
    norms = {}
    for name, kind in ORIGINS.items():
        rows = (origin == kind).nonzero()[:, 0]
        if len(rows):
            gradients = torch.autograd.grad(loss_of(rows) * len(rows) / len(origin), list(policy.parameters()))
            norms[name] = torch.stack([g.norm() for g in gradients]).norm().item()
    return norms


# ---------------------------------------------------------------------------------------------------------------------

TRAIN = {"tokenizer": train_tokenizer, "pretrain": train_pretrain, "reward": train_reward, "ppo": train_ppo}


def overview():
    lines = ["python train.py --stage STAGE trains one of (minutes on two CPU cores, preset tiny):"]
    for stage in STAGES:
        needs = f"needs {', '.join(NEEDS[stage])}" if NEEDS[stage] else "needs nothing"
        lines.append(f"  {stage:10} about {MINUTES[stage]:g} min, {needs}")
    lines.append("A missing earlier stage is trained first: `python train.py --stage ppo` is the whole way. --stage STAGE --help lists the flags.")
    return "\n".join(lines)


def needed(stage, cfg):
    """The stages that this one builds on; with a judge from elsewhere PPO trains none."""
    return [s for s in NEEDS[stage] if s != "reward" or not getattr(cfg, "judge", [])]


def copy_base(base, out, stages):
    """The earlier stages' weights of another run; those that are in `out` already must be the same."""
    for name in [*(f"{stage}.safetensors" for stage in stages), *(["text.json"] if (base / "text.json").exists() else [])]:
        if not (base / name).is_file():
            raise UserError(f"--base {base}: has no {name}")
        if (out / name).exists() and (out / name).read_bytes() != (base / name).read_bytes():
            raise UserError(f"--base {base}: {out / name} is there already and another; choose another --out")
        write_atomically(out / name, (base / name).read_bytes())


def peak_memory():
    """The process' largest resident size so far, where the system tells it."""
    try:
        import resource
    except ImportError:                                 # Windows
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    return f", peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30:.2f} GB"


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--curves"]:
        if len(argv) != 2 or not (Path(argv[1]) / "log.jsonl").is_file():
            raise UserError("--curves RUN: wants one run folder, with a log.jsonl in it")
        print(f"curves: {draw_curves(Path(argv[1]))}")
        return
    stage, resume, cfg, preset = parse(argv, __doc__)
    if stage is None:
        print(overview())
        return
    out = Path(cfg.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--out {out}: cannot be made ({e.strerror})") from e
    if (out / f"{stage}.safetensors").exists() and not (out / f"{stage}.state").exists():
        raise UserError(f"{out / stage}.safetensors is there already; choose another --out, or delete it to train {stage} again")
    if stage == "ppo" and not (out / "ppo.state").exists():              # a judge that is not there is told before anything is made
        open_judges([spec for spec in [*cfg.judge, cfg.heldout_judge] if spec and not spec.startswith("transformers:")], retries=cfg.judge_retries)
    if stage == "ppo" and cfg.base:
        copy_base(Path(cfg.base), out, needed(stage, cfg))
    if preset == "janus" and "reward" in needed(stage, cfg) and not (out / "reward.safetensors").exists():
        raise UserError("--janus: say who judges, --judge URL or transformers:DIR (PairWorld's small judges can be trained first, by --stage reward)")
    if cfg.janus:                                       # tokenizer and base model come with the checkpoint
        import_janus(cfg.janus, out, policy=stage == "ppo")
    missing = [s for s in needed(stage, cfg) if not (out / f"{s}.safetensors").exists()]
    if preset == "janus" and "tokenizer" in missing:
        raise UserError("--preset janus: give --janus DIR, a Janus checkpoint")
    if missing and preset == "tiny":
        print(f"{', '.join(missing)}: missing in {out}, trained first. About {sum(MINUTES[s] for s in [*missing, stage]):g} minutes in all on two CPU cores.")
    elif missing:
        print(f"{', '.join(missing)}: missing in {out}, trained first.")
    for name in [*missing, stage]:
        shared = {f.name: getattr(cfg, f.name) for f in fields(Common) if f.name != "extra"}            # which belongs to a stage
        own = cfg if name == stage else replace(STAGES[name](), **{**PRESETS[preset][name], **shared})
        print(f"{name}: {own}")
        began = time.time()
        try:
            TRAIN[name](own, resume)
        except JudgeError as e:                         # before the first step or after the last; between them see `Loop.guarded`
            resumable = (out / f"{name}.state").exists()
            raise UserError(f"{name}: {e}. " + (f"{out / name}.state is intact: mend it, then the same command with --resume" if resumable
                                                else "Nothing was trained yet: mend it, then the same command again")) from e
        print(f"{name}: done in {(time.time() - began) / 60:.1f} min{peak_memory()}")


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
    except OSError as e:                                # a full disk, most likely, under a log or a picture
        sys.exit(f"error: {e}; what was saved before is intact, make room and go on with --resume")
    except KeyboardInterrupt:
        sys.exit("stopped at once; what was saved before is intact, go on with the same command (and --resume, if a .state is there)")
