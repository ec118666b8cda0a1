"""Pictures of numbers, drawn with matplotlib where it is installed."""
import json

import numpy as np

from data import UserError


def draw_curves(out):
    """log.jsonl -> curves.png, with matplotlib where it is installed. -> where they are, or how to get them."""
    try:
        import matplotlib
    except ImportError:
        return f"not drawn; pip install matplotlib, then python train.py --curves {out}"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    panels = [("tokenizer", "psnr", "tokenizer: PSNR (dB)"), ("pretrain", "loss", "pretrain: loss (nats/token)"),
              ("reward", ("loss_train", "loss_heldout"), "judges: loss"), ("ppo", "reward", "ppo: reward of the samples"),
              ("ppo", "kl", "ppo: KL to the base model"), ("ppo", "entropy", "ppo: entropy (nats)"), ("ppo", "clipfrac", "ppo: share of clipped ratios"),
              ("ppo", "pg_loss", "ppo: loss (no progress signal)"), ("ppo", "test", "ppo: s_g on held-out pairs")]
    figure, axes = plt.subplots(3, 3, figsize=(13, 9))
    for ax, (stage, keys, title) in zip(axes.flat, panels):
        rows = [e for e in log if e["stage"] == stage and "step" in e]
        if keys == "test":
            rows = [e for e in rows if "test" in e]
            for judge in [j for j in ("train", "heldout", "oracle") if rows and j in rows[0]["test"]]:
                ax.plot([e["step"] for e in rows], [e["test"][judge]["s_g"] for e in rows], label=judge)
            if rows and "pair_accuracy" in rows[0]["test"]:
                ax.plot([e["step"] for e in rows], [e["test"]["pair_accuracy"] for e in rows], label="pair accuracy", linestyle="--")
            ax.legend()
        else:
            for key in [keys] if isinstance(keys, str) else keys:
                ax.plot([e["step"] for e in rows if key in e], [e[key] for e in rows if key in e], linewidth=0.8, label=key)
            if not isinstance(keys, str):
                ax.legend()
        ax.set_title(title, fontsize=10)
        ax.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=90)
    plt.close(figure)
    return out / "curves.png"


def draw_comparison(arms, path):
    """{arm: {seed: result}} of compare.read_arms -> a picture: learning curves with a band from the worst seed to the best, and bars
    of the categories. UserError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(f"--out {path}: the picture needs matplotlib; pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (curves, bars) = plt.subplots(1, 2, figsize=(15, 5.5), width_ratios=(1, 1.4))
    categories = list(next(iter(next(iter(arms.values())).values()))["ppo"]["heldout"])
    colours = plt.get_cmap("tab20").colors
    for n, (name, runs) in enumerate(arms.items()):
        common = min(len(r["curve"]) for r in runs.values())
        steps = [e["step"] for e in next(iter(runs.values()))["curve"][:common]]
        s_g = np.array([[100 * e["heldout"]["s_g"] for e in r["curve"][:common]] for r in runs.values()])    # (S, tests)
        curves.plot(steps, s_g.mean(0), color=colours[n % 20], label=f"{name} ({len(runs)} seeds)")
        curves.fill_between(steps, s_g.min(0), s_g.max(0), color=colours[n % 20], alpha=0.12)
        final = np.array([[100 * r["ppo"]["heldout"][c]["s_g"] for c in categories] for r in runs.values()])  # (S, categories)
        x = np.arange(len(categories)) + (n - (len(arms) - 1) / 2) * 0.8 / len(arms)
        bars.bar(x, final.mean(0), 0.8 / len(arms), color=colours[n % 20], label=name,
                 yerr=[final.mean(0) - final.min(0), final.max(0) - final.mean(0)], error_kw={"linewidth": 0.6})
    curves.set(xlabel="rollouts", title="held-out judge, s_g of the quick tests (band: worst to best seed)")
    curves.legend(fontsize=8)
    bars.set_xticks(np.arange(len(categories)), categories)
    bars.set_title("held-out judge, s_g at the end")
    for ax in (curves, bars):
        ax.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)
