"""What to say of a flag that train.py does not have: what is near it, which stage has it, or what
does the work of an earlier version's flag now."""
import difflib

ARM = "an arm of python -m extras.ablation"
TRUTH = "--ground-truth FULL LOW ZERO"
UNPAIRED = "--data, with pairs whose prompt1 is their prompt2"
CONSTANT = "a constant of its class in train.py"
NOTHING = "nothing today; commit 95ba9cb has it"
MOVED = {
    "--janus": "python -m extras.janus --import DIR --out RUN, then train.py --out RUN",
    "--curves": "python -m extras.plots RUN",
    "--base": "a copy of that folder's tokenizer, pretrain and reward.safetensors in --out",
    "--accumulate": "--microbatch",
    "--rollout-pairs": "--microbatch",
    "--recompute": "--microbatch, which brings it",
    "--extra": "LONG and SHORT of pairworld.py",
    "--warmup": CONSTANT,
    "--prompts": UNPAIRED,
    "--prompts-share": UNPAIRED,
    "--epochs": "--minibatches: a rollout is passed over once",
    "--no-compile": "--compile off of stage ppo",
    "--no-recompute": "--microbatch 0",
    "--truth-kl": NOTHING,
    "--truth-counted": ARM,
    "--save-every": "SAVE_SECONDS of common.py",
    "--grad-clip": "GRAD_CLIP of common.py",
    "--std-floor": "STD_FLOOR of ppo.py",
    "--difference-cap": "WEIGHT_CAP of ppo.py",
    "--quick-pairs": "VALIDATION_PAIRS of eval_paircomp.py",
    "--judge-workers": "WORKERS of extras/judges.py",
    "--judge-timeout": "TIMEOUT of extras/judges.py",
    "--judge-retries": "RETRIES of extras/judges.py",
    "--judge-full-stop": "a full stop in QUESTION of extras/judges.py",
    "--truth-full-until": TRUTH,
    "--truth-low-at": TRUTH,
    "--truth-zero-at": TRUTH,
    "--decay": CONSTANT,
    "--weight-decay": CONSTANT,
    "--commitment": CONSTANT,
    "--rate": CONSTANT,
    "--choice": ARM,
    "--mine": NOTHING,
    "--difference-spread": ARM,
    "--difference-on": ARM,
    "--difference-from": ARM,
    "--truth-start": ARM,
    "--truth-twin": ARM,
    "--no-truth-twin": ARM,
    "--truth-floor": NOTHING,
    "--truth-shape": ARM,
    "--no-truth-kl": NOTHING,
    "--no-truth-counted": ARM,
}


def explain(word, stage, flags, stages):
    """A word of the command line, the stage ("" if none is given), the flags of the stage and
    {name of a stage: its settings} -> one line."""
    name = word.split("=")[0]
    setting = name.removeprefix("--").replace("-", "_")
    owner = [s for s, settings in stages.items() if setting in settings.__dataclass_fields__]
    near = difflib.get_close_matches(name, flags, 1, 0.5)
    if name in MOVED:
        return f"{name} is gone: use {MOVED[name]}"
    if not stage:
        return f"{word}: say which stage it is for: --stage {'|'.join(stages)}"
    if not name.startswith("-"):
        return f"{word}: is no flag, and belongs to none"
    if owner:
        return f"unknown flag {name} for stage {stage}; stage {owner[0]} has it"
    hint = f"did you mean {near[0]}?" if near else "see --help"
    return f"unknown flag {name} for stage {stage}; {hint}"
