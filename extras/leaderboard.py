"""The published PairComp results, and a row of one's own among them.

Source: table 1 of the FocusDiff paper (arXiv 2506.05501), read off the authors' image of it
(focusdiff.github.io, static/images/res1.png). The averages agree with the leaderboard in the
official repository's README, and the tests recompute every average from its six columns.
All were scored by InternVL2.5-26B. The paper has 924 pairs, the released PairComp.json 550.
"""

COLUMNS = {
    "overall": "Overall Appear.",
    "color": "Color",
    "counting": "Counting",
    "position": "Position",
    "style": "Style&Tone",
    "text": "Text",
    "average": "Average",
}
# Of each column s_a and s_g, times 100 as printed.
PUBLISHED = """
PixArt-alpha        75.9 68.7  88.8 86.2  62.8 58.4  54.2 49.3  87.8 84.5  35.4 28.8  67.5 62.7
SD3                 82.5 77.0  95.4 94.6  74.0 70.3  71.9 68.5  89.4 86.2  93.1 92.0  84.4 81.4
FLUX.1-dev          78.7 71.1  94.3 92.0  63.9 60.0  70.4 66.1  84.4 79.7  90.1 85.4  80.3 75.7
Sana-1.5            83.8 79.5  97.3 96.8  74.1 71.5  69.1 64.0  92.7 90.1  82.4 77.9  83.2 80.0
Janus-Flow          62.1 54.0  74.1 67.5  45.0 40.2  45.7 36.8  84.4 80.3  21.7 15.2  55.5 49.0
LLamaGen            53.5 45.4  67.0 61.2  45.3 39.5  42.1 35.4  68.8 60.1  18.0 12.0  49.1 42.3
VILA-U              70.5 65.0  82.9 79.5  53.3 48.6  53.4 46.0  86.6 83.2  30.9 25.7  62.9 58.0
Show-o              68.5 62.2  87.2 85.0  58.2 55.2  45.2 40.6  87.8 84.7  34.9 26.8  63.6 59.1
SEED-X              83.2 79.7  95.5 94.5  64.9 62.3  63.0 59.9  90.0 87.3  52.2 45.1  74.8 71.5
Emu3                73.8 66.1  87.3 85.0  60.4 57.2  55.1 49.8  85.9 82.2  48.5 39.1  68.5 63.2
VARGPTv1.1          59.5 51.6  80.5 77.6  37.2 32.6  42.2 35.2  82.5 79.1  19.4 13.6  53.6 48.3
Infinity            79.5 73.2  93.7 92.1  65.5 62.1  62.7 57.5  87.1 83.0  73.5 68.2  77.0 72.7
BLIP3-o             83.4 78.7  95.8 94.2  68.2 65.7  72.5 69.2  93.4 91.4  62.2 53.6  79.3 75.5
Janus-Pro-1B        75.6 69.5  89.7 87.7  36.1 29.5  56.2 50.2  92.3 90.4  37.6 28.0  64.6 59.2
Janus-Pro-7B        82.3 75.6  95.7 94.0  52.7 47.1  69.4 63.9  92.0 88.7  60.8 53.2  75.5 70.4
T2I-R1              84.6 80.3  96.5 95.9  68.1 65.2  71.3 67.5  91.2 89.2  82.5 77.5  82.4 79.3
Janus-Pro-R1        84.1 79.9  96.7 95.9  68.6 65.8  71.9 70.0  93.3 91.8  77.1 71.6  82.0 79.2
Janus-FocusDiff-1B  78.4 75.0  91.7 90.0  49.5 44.4  64.7 61.8  91.9 90.8  49.8 46.3  71.0 68.1
Janus-FocusDiff-7B  85.4 82.4  97.8 97.7  71.0 69.0  75.9 74.0  94.3 93.9  85.3 83.8  85.0 83.5
"""


def published():
    """{model: {category: (s_a, s_g)}}, x100 as printed in the paper."""
    table = {}
    for line in PUBLISHED.strip().splitlines():
        name, *values = line.split()
        values = list(map(float, values))
        table[name] = dict(zip(COLUMNS, zip(values[::2], values[1::2])))
    return table


def format_leaderboard(summary, name, n_pairs):
    """The paper's table, x100, sorted by the average s_g, with one's own row, marked by an arrow.

    summary: what `summarize` returns, 0..1; name: the label of that row."""
    own = {c: (100 * v["s_a"], 100 * v["s_g"]) for c, v in summary.items() if c in COLUMNS}
    rows = [("   " + model, values) for model, values in published().items()]
    rows.append(("-> " + name, own))
    rows.sort(key=lambda row: -row[1]["average"][1])
    width = max(len(label) for label, _ in rows)
    lines = [
        " " * width + "".join(f"{title:>17}" for title in COLUMNS.values()),
        " " * width + f"{'s_a':>11}{'s_g':>6}" * len(COLUMNS),
    ]
    for label, values in rows:
        line = label.ljust(width)
        for category in COLUMNS:
            if category in values:
                s_a, s_g = values[category]
                line += f"{s_a:>11.1f}{s_g:>6.1f}"
            else:
                line += f"{'-':>11}{'-':>6}"
        lines.append(line)
    lines.append(f"-> {n_pairs} pairs, your judge. Others: table 1 of arXiv 2506.05501, scored by "
                 "InternVL2.5-26B; compare only with that judge.")
    lacking = [category for category in COLUMNS if category not in own]
    if lacking or n_pairs != 550:
        without = ", here without " + ", ".join(lacking) if lacking else ""
        lines.append("-> This row is not comparable: the released benchmark has 550 pairs in six "
                     f"categories{without}.")
    return "\n".join(lines)
