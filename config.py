"""What can be set: a dataclass a stage, whose fields are the flags of train.py."""
import argparse
import difflib
import math
from dataclasses import dataclass, field, fields, replace

from data import UserError
from judges import check_spec
from pairworld import LONG, SHORT
from tokenizer import VQConfig


def flag(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Common:
    out: str = flag("runs/tiny", "run folder")
    seed: int = flag(0, "every random choice follows from it")
    device: str = flag("auto", "auto, cpu, cuda or mps")
    dtype: str = flag("auto", "fp32, bf16 (autocast), or auto: bf16 on cuda, fp32 elsewhere")
    compile: bool = flag(False, "torch.compile the transformer")
    data: str = flag("", "pairs.json in the FocusDiff-Data layout; empty is PairWorld")
    janus: str = flag("", "folder of a Janus-Pro checkpoint, to fine-tune or align instead of the small model; wants --data")
    n_pairs: int = flag(12000, "how many PairWorld pairs to train on")
    extra: float = flag(LONG, "chance that a PairWorld caption names a part that is not the pair's difference")
    save_every: int = flag(100, "steps between saved states")


@dataclass
class Tokenizer(Common):
    steps: int = flag(1400, "optimizer steps")
    batch: int = flag(16, "pictures a step")
    lr: float = flag(3e-3, "peak learning rate")
    warmup: int = flag(20, "steps of rising learning rate")
    decay: float = flag(0.5, "last share of the steps, over which the learning rate falls")
    unquantized: int = flag(400, "steps before the code book is made, by k-means")
    commitment: float = flag(0.25, "weight of the pull of latents to their codes")
    rate: float = flag(0.003, "preference for codes in use, see vq_loss")
    ch: int = flag(128, "channels")
    codebook_size: int = flag(320, "V")
    codebook_dim: int = flag(16, "D")


@dataclass
class Pretrain(Common):
    extra: float = flag(0.45, Common.__dataclass_fields__["extra"].metadata["help"] + "; details are told less often than a judge needs")
    steps: int = flag(650, "optimizer steps")
    batch: int = flag(32, "pictures a step")
    lr: float = flag(1e-3, "peak learning rate of AdamW, for embeddings, norms and the head")
    muon_lr: float = flag(0.007, "peak learning rate of Muon, for the layers' matrices; 0 leaves them to AdamW")
    warmup: int = flag(50, "steps of rising learning rate")
    decay: float = flag(0.5, "last share of the steps, over which the learning rate falls")
    weight_decay: float = flag(0.01, "of both")
    accumulate: int = flag(1, "parts that a batch is taken in, one after the other, to fit the memory")
    recompute: bool = flag(False, "make a layer's activations again in the backward instead of keeping them")
    caption_dropout: float = flag(0.05, "share of the pictures shown with the empty prompt, for guidance")
    n_layer: int = flag(4, "layers")
    n_head: int = flag(4, "attention heads")
    n_embd: int = flag(128, "width C")
    n_ffn: int = flag(384, "width of the SwiGLU")
    n_text: int = flag(160, "longest prompt, in tokens; a word that PairWorld does not know takes one a byte")


@dataclass
class Reward(Common):
    steps: int = flag(1000, "optimizer steps")
    batch: int = flag(32, "pairs a step; each makes two yes and two no")
    lr: float = flag(7e-4, "peak learning rate of AdamW")
    muon_lr: float = flag(0.005, "peak learning rate of Muon; 0 leaves its matrices to AdamW")
    warmup: int = flag(50, "steps of rising learning rate")
    decay: float = flag(0.5, "last share of the steps, over which the learning rate falls")
    weight_decay: float = flag(0.01, "of both")
    splices_from: int = flag(500, "step from which splices of a pair's pictures are shown too, see reward.splice")
    width: int = flag(96, "width of the judges")


@dataclass
class PPO(Common):
    base: str = flag("", "run folder to copy the tokenizer, base model and judges from")
    extra: float = flag(SHORT, Common.__dataclass_fields__["extra"].metadata["help"] + "; prompts are shorter than captions")
    prompts: str = flag("", "a text file of unpaired prompts to mix in, a prompt a line")
    prompts_share: float = flag(0.25, "share of the step's pairs that are unpaired prompts, with --prompts")
    steps: int = flag(300, "rollouts")
    pairs: int = flag(8, "pairs of prompts a rollout (P)")
    mine: int = flag(1, "candidates a pair: those that the policy tells apart least are sampled; needs pictures of the pairs")
    samples: int = flag(6, "pictures a prompt (G)")
    minibatches: int = flag(2, "optimizer steps an epoch; pairs are kept whole")
    accumulate: int = flag(1, "parts that a minibatch is taken in, one after the other, to fit the memory")
    recompute: bool = flag(False, "make a layer's activations again in the backward instead of keeping them")
    rollout_pairs: int = flag(0, "pairs whose pictures are sampled at once, to fit their key-value caches; 0 is all, and with a judge on a server a quarter")
    epochs: int = flag(1, "passes over a rollout")
    lr: float = flag(2e-4, "peak learning rate")
    warmup: int = flag(10, "rollouts of rising learning rate")
    decay: float = flag(0.3, "last share of the rollouts, over which the learning rate falls")
    grad_clip: float = flag(1.0, "largest gradient norm")
    advantage: str = flag("pair", "mean and std over the pair (Pair-GRPO) or over a prompt's own group (vanilla); scaled, joint: see ppo.group_advantages")
    std_floor: float = flag(0.05, "added to the pool's standard deviation")
    clip: float = flag(0.2, "PPO's epsilon")
    beta: float = flag(0.01, "weight of the KL to the base model")
    reward: str = flag("own", "own: S(I,T), the paper; root: its 4th root; product: S(I,T) (1 - S(I,T')); margin: S(I,T) - S(I,T'); shared: S(I,T) + S(I,T')")
    choice: float = flag(0.0, "weight of the advantage for being told from the twin, S(I,T) / (S(I,T) + S(I,T')); 0 is the paper")
    difference: float = flag(0.0, "lambda of the difference-aware token weights; 0 is the paper")
    difference_cap: float = flag(5.0, "cap of such a weight, before they are scaled to mean 1")
    difference_spread: int = flag(0, "radius in tokens over which D_t is spread to what is drawn after it, see ppo.spread_difference")
    difference_on: str = flag("all", "what the weights act on: all, the choice's advantage, or the ground truth")
    difference_from: str = flag("model", "D_t of the model, or a control: shuffled (D_t over the tokens), mask (the oracle's), random (30 %% of the tokens)")
    guidance: float = flag(1.0, "w of classifier-free guidance; 1 has no second branch")
    temperature: float = flag(1.0, "tau")
    truth_full_until: int = flag(0, "ground truth: with probability 1 until this rollout (official code: 50)")
    truth_low_at: int = flag(0, "falling to 0.25 at this one (official code: 450)")
    truth_zero_at: int = flag(0, "and to 0 at this one (official code: 1200); 0 switches ground truth off")
    truth_start: int = flag(0, "no ground truth before this rollout")
    truth_twin: bool = flag(True, "the twin's picture too, as a hard negative")
    truth_floor: float = flag(-math.inf, "least advantage of a ground-truth picture; 0 has no negatives")
    truth_shape: float = flag(0.0, "gamma of f(pi) = pi / (pi + gamma) in place of its ratio (LUFFY: 0.1); 0 keeps the ratio")
    truth_kl: bool = flag(True, "ground truth is held to the base model by the KL, as samples are")
    truth_counted: bool = flag(True, "ground truth counts in the mean and std of its pool")
    judge: list = field(default_factory=list, metadata={"help": "who gives the rewards in place of the run's own judge: an OpenAI-compatible server, "
                        "http://HOST:PORT/v1 or .../v1#MODEL, or transformers:DIR; may be given twice: the mean"})
    heldout_judge: str = flag("", "who tests in place of the run's own held-out judge: as --judge; with --data it wants --test")
    test: str = flag("", "PairComp.json to test on, during the run and before/after, in place of PairWorld's held-out pairs")
    judge_full_stop: bool = flag(False, "the training judge's question ends in a full stop, as in the official code; the test's never does")
    judge_workers: int = flag(16, "most requests to a judge's server at once")
    judge_timeout: float = flag(60.0, "seconds to wait for its answer")
    judge_retries: int = flag(8, "times a request that failed is repeated, after 0, 1, 2, 4... seconds, at most 30")
    eval_every: int = flag(25, "rollouts between quick tests on the held-out pairs")
    quick_pairs: int = flag(4, "test pairs a category in a quick test")
    eval_pairs: int = flag(20, "test pairs a category in the final table")


STAGES = {"tokenizer": Tokenizer, "pretrain": Pretrain, "reward": Reward, "ppo": PPO}
NEEDS = {"tokenizer": [], "pretrain": ["tokenizer"], "reward": ["tokenizer"], "ppo": ["tokenizer", "pretrain", "reward"]}
PRESETS = {
    "tiny": {stage: {} for stage in STAGES},
    "smoke": {"tokenizer": dict(out="runs/smoke", n_pairs=600, steps=60, unquantized=20, ch=32, codebook_size=64),
              "pretrain": dict(out="runs/smoke", n_pairs=600, steps=40, n_layer=2, n_embd=64, n_ffn=128),
              "reward": dict(out="runs/smoke", n_pairs=600, steps=25, splices_from=10, width=32),
              "ppo": dict(out="runs/smoke", n_pairs=600, steps=6, pairs=4, samples=4, eval_every=3, eval_pairs=2)},
    # Real weights: lr, warmup, samples and guidance are the official recipe's; the rest is ours, and nobody has run it yet.
    "janus": {"tokenizer": {}, "reward": dict(out="runs/janus"),
              "pretrain": dict(out="runs/janus", lr=1e-5, muon_lr=0.0, caption_dropout=0.1, accumulate=8, recompute=True),
              "ppo": dict(out="runs/janus", lr=1e-5, warmup=100, steps=1600, pairs=4, samples=7, guidance=5.0, accumulate=7, recompute=True,
                          rollout_pairs=2)},
}
MINUTES = {"tokenizer": 1, "pretrain": 2, "reward": 2.5, "ppo": 6}   # of preset tiny on two CPU cores


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def parse(argv, description):
    """Command line -> (stage or None, resume, config of the stage, its preset's name). description heads --help."""
    first = Parser(add_help=False, allow_abbrev=False)
    first.add_argument("--stage", choices=list(STAGES))
    first.add_argument("--preset", choices=list(PRESETS))
    first.add_argument("--resume", action="store_true")
    known, rest = first.parse_known_args(argv)
    preset = known.preset or ("janus" if any(word.split("=")[0] == "--janus" for word in rest) else "tiny")
    if known.stage is None and not {"-h", "--help"} & set(rest):
        if rest:
            raise UserError(f"{rest[0]}: say which stage it is for: --stage {'|'.join(STAGES)}")
        return None, False, None, preset
    parser = Parser(prog="train.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--stage", choices=list(STAGES), help="which stage to train; its flags follow, all of them: --stage STAGE --help")
    parser.add_argument("--preset", choices=list(PRESETS), help="tiny (default), smoke, or janus (default with --janus)")
    parser.add_argument("--resume", action="store_true", help="go on with an unfinished stage")
    defaults = replace(STAGES[known.stage or "ppo"](), **PRESETS[preset][known.stage or "ppo"])
    for f in fields(defaults):
        value = getattr(defaults, f.name)
        kind = {"action": argparse.BooleanOptionalAction} if isinstance(value, bool) else {"type": type(value), "metavar": type(value).__name__}
        kind = {"action": "append", "metavar": "JUDGE"} if isinstance(value, list) else kind
        parser.add_argument("--" + f.name.replace("_", "-"), dest=f.name, default=value, help=f"{f.metadata['help']} ({value})", **kind)
    flags = [option for action in parser._actions for option in action.option_strings]
    for word in rest:
        name = word.split("=")[0]
        if name.startswith("--") and name not in flags:
            near = difflib.get_close_matches(name, flags, 1, 0.5)
            raise UserError(f"unknown flag {name} for stage {known.stage}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
    args = vars(parser.parse_args(argv))
    cfg = STAGES[known.stage](**{f.name: args[f.name] for f in fields(defaults)})
    check(cfg)
    return known.stage, known.resume, cfg, preset


def check(cfg):
    """UserError for a value that no stage can use."""
    allowed = {"device": ("auto", "cpu", "cuda", "mps"), "dtype": ("auto", "fp32", "bf16"), "advantage": ("pair", "group", "scaled", "joint"),
               "reward": ("own", "root", "product", "margin", "shared"), "difference_on": ("all", "choice", "truth"), "difference_from": ("model", "shuffled", "mask", "random")}
    for name, values in allowed.items():
        if getattr(cfg, name, values[0]) not in values:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: should be one of {', '.join(values)}")
    for name in ("steps", "batch", "pairs", "samples", "n_pairs", "epochs", "minibatches", "mine", "quick_pairs", "save_every", "eval_every", "accumulate",
                 "temperature", "judge_workers", "judge_timeout"):
        if getattr(cfg, name, 1) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: should be positive")
    for name, least in (("seed", 0), ("lr", 0), ("samples", 2), ("eval_pairs", 1), ("rollout_pairs", 0), ("std_floor", 1e-6), ("judge_retries", 0)):
        if getattr(cfg, name, least) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: should be at least {least}")
    for name, unit in (("n_embd", 2 * getattr(cfg, "n_head", 1)), ("ch", VQConfig.norm_groups), ("width", 8)):
        if getattr(cfg, name, 0) % unit:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name)}: should be a multiple of {unit}")
    if isinstance(cfg, PPO) and not cfg.truth_full_until <= cfg.truth_low_at <= cfg.truth_zero_at:
        raise UserError("--truth-full-until, --truth-low-at and --truth-zero-at: should rise in this order; 0 0 0 switches ground truth off")
    if isinstance(cfg, PPO) and cfg.truth_zero_at and cfg.samples < 2 + cfg.truth_twin:
        raise UserError(f"--samples {cfg.samples}: should be at least {2 + cfg.truth_twin}, since ground truth replaces {1 + cfg.truth_twin} of them")
    if cfg.janus and isinstance(cfg, Tokenizer):
        raise UserError("--janus: the tokenizer comes with the checkpoint, there is nothing to train; go on with --stage pretrain or ppo")
    if cfg.janus and not cfg.data:
        raise UserError("--janus: wants --data pairs.json, pairs in the FocusDiff-Data layout (python data.py --write DIR makes small ones)")
    if isinstance(cfg, PPO) and cfg.advantage == "joint" and cfg.reward == "margin":
        raise UserError("--advantage joint: weighs rewards by the twin's mean reward, and --reward margin may be negative; choose another")
    for spec in [*getattr(cfg, "judge", []), *filter(None, [getattr(cfg, "heldout_judge", "")])]:
        check_spec(spec)
    if getattr(cfg, "heldout_judge", "") and cfg.data and not cfg.test:
        raise UserError("--heldout-judge: has nothing to test on with --data; give --test PairComp.json too, or score pictures after training")
    if getattr(cfg, "pairs", 1) % getattr(cfg, "minibatches", 1):
        raise UserError(f"--minibatches {cfg.minibatches}: should divide --pairs {cfg.pairs}")
