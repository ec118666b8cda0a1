"""Curves of a run, drawn with matplotlib.

    python -m extras.plots runs/tiny               # draw RUN/curves.png again from RUN/log.jsonl

train.py draws curves.png at the end of the ppo stage if matplotlib is installed.
"""
import json
import sys
from pathlib import Path

from common import UserError

JUDGES = ("train", "heldout", "oracle")
PANELS = [  # stage, its keys in log.jsonl, title
    ("tokenizer", ["psnr"], "tokenizer: PSNR (dB)"),
    ("pretrain", ["loss"], "pretrain: loss (nats/token)"),
    ("reward", ["loss_train", "loss_heldout"], "judges: loss"),
    ("ppo", ["reward"], "ppo: reward of the samples"),
    ("ppo", ["kl"], "ppo: KL to the base model"),
    ("ppo", ["entropy"], "ppo: entropy (nats)"),
    ("ppo", ["clipfrac"], "ppo: share of clipped ratios"),
    ("ppo", ["pg_loss"], "ppo: loss (no progress signal)"),
]


def load_pyplot():
    """matplotlib.pyplot, which draws into files and needs no display. ImportError without it."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def save_figure(plt, figure, axes, path):
    for ax in axes:
        ax.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_curves(out):
    """Run folder -> curves.png in it, from its log.jsonl. Returns the path, or how to get it."""
    try:
        plt = load_pyplot()
    except ImportError:
        return f"not drawn; pip install matplotlib, then python -m extras.plots {out}"
    out = Path(out)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if "step" in entry]
    figure, axes = plt.subplots(3, 3, figsize=(13, 9))
    for ax, (stage, keys, title) in zip(axes.flat, PANELS):
        for key in keys:
            entries = [e for e in steps if e["stage"] == stage and key in e]
            if entries:                 # a run need not have every stage
                x = [e["step"] for e in entries]
                ax.plot(x, [e[key] for e in entries], linewidth=0.8, label=key)
        if len(keys) > 1 and ax.lines:
            ax.legend()
        ax.set_title(title, fontsize=10)
    draw_tests(axes.flat[-1], [e for e in steps if e["stage"] == "ppo" and "test" in e])
    save_figure(plt, figure, axes.flat, out / "curves.png")
    return out / "curves.png"


def draw_tests(ax, entries):
    """The last panel: what the quick tests say, if there are any. entries: log lines of ppo."""
    x = [e["step"] for e in entries]
    tests = [e["test"] for e in entries]
    for judge in JUDGES:
        if tests and judge in tests[0]:
            ax.plot(x, [test[judge]["s_g"] for test in tests], label=judge)
    if tests and "pair_accuracy" in tests[0]:
        accuracy = [test["pair_accuracy"] for test in tests]
        ax.plot(x, accuracy, label="pair accuracy", linestyle="--")
    if ax.lines:
        ax.legend()
    ax.set_title("ppo: s_g on held-out pairs" + ("" if tests else ": not tested"), fontsize=10)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1 or not (Path(argv[0]) / "log.jsonl").is_file():
        raise UserError("python -m extras.plots RUN: wants one run folder, with a log.jsonl in it")
    print(f"curves: {draw_curves(argv[0])}")


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
