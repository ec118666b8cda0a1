"""extras/build_pairs.py: what is kept and why not, going on after a stop, and the whole command
against a real server process."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import UserError
from data import read_pairs
from extras import build_pairs as bp
from extras.judges import JudgeError, ServerJudge, UnreadableAnswer

ROOT = Path(__file__).parents[1]
COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
NAMES = {rgb: name for name, rgb in COLORS.items()}
PLAN = [
    ("red", "blue", "make it blue"),
    ("red", "green", "garble"),
    ("green", "blue", "ignored"),
    ("red", "blue", "blind"),
    ("red", "blue", "blind, same"),
    ("blue", "green", "make it green"),
    ("green", "red", "make it red"),
]
KEPT = [0, 5, 6]


def write_edits(folder, plan=PLAN):
    (folder / "images").mkdir(exist_ok=True)
    for name, rgb in COLORS.items():
        Image.new("RGB", (40, 24), rgb).save(folder / "images" / f"{name}.png")
    entries = []
    for before, after, instruction in plan:
        entries.append({"before": f"images/{before}.png", "after": f"images/{after}.png",
                        "instruction": instruction, "category": "color"})
    (folder / "edits.json").write_text(json.dumps(entries))
    return folder / "edits.json"


def color_of(image):
    return NAMES[tuple(image[8, 8].tolist())]


class Colors:
    """score and describe without a server, which keep what they are asked. `fails` after so many
    scored captions."""

    def __init__(self, fails=10**9):
        self.described = []
        self.scored = []
        self.fails = fails

    def describe(self, before, after, instruction):
        assert before.shape == after.shape == (16, 16, 3)
        self.described.append(instruction)
        if instruction == "garble":
            return "no idea"
        same = "same" in instruction
        colors = ("green", "green") if same else (color_of(before), color_of(after))
        answer = {"followed": instruction != "ignored"}
        answer |= {"caption1": f"a {colors[0]} field", "caption2": f"a {colors[1]} field"}
        return json.dumps(answer)

    def score(self, images, prompts):
        if len(self.scored) >= self.fails:
            raise UserError("the judge is gone")
        self.scored += prompts
        return [0.9 if color_of(image) in prompt else 0.2 for image, prompt in zip(images, prompts)]


def build(path, out, colors, **settings):
    settings = {"judge": "colors", "size": 16, "workers": 1} | settings
    return bp.build(path, out, colors.score, colors.describe, **settings)


def decisions(out):
    return [json.loads(line) for line in (out / "decisions.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------------------
# Decisions

def scored(*values):
    names = ("S(I1,T1)", "S(I2,T2)", "S(I1,T2)", "S(I2,T1)")
    return {"scores": dict(zip(names, values)), "kept": False, "reasons": []}


ALL = ["S(I1,T1) is low", "S(I2,T2) is low", "S(I1,T2) is high", "S(I2,T1) is high"]
NAN = float("nan")


@pytest.mark.parametrize("values, reasons", [
    ((0.7, 0.7, 0.3, 0.3), []),
    ((1, 1, 0, 0), []),
    ((0.69, 1, 0, 0), [ALL[0]]),
    ((1, 0.1, 0, 0), [ALL[1]]),
    ((1, 1, 0.31, 0), [ALL[2]]),
    ((1, 1, 0, 0.9), [ALL[3]]),
    ((0, 0, 1, 1), ALL),
    ((NAN, 1, NAN, 0), [ALL[0], ALL[2]]),
])
def test_a_pair_is_kept_if_each_image_fits_its_own_caption_alone(values, reasons):
    row = bp.decide(scored(*values), 0.7, 0.3)
    assert row["reasons"] == reasons and row["kept"] == (not reasons)


def test_other_thresholds_decide_anew_and_a_row_without_scores_stays():
    row = bp.decide(scored(0.6, 0.9, 0.2, 0.2), 0.7, 0.3)
    kept = bp.decide(row, 0.5, 0.3)
    assert not row["kept"] and kept["kept"] and not bp.decide(kept, 0.5, 0.1)["kept"]
    bare = {"scores": None, "kept": False, "reasons": [bp.NO_EDIT]}
    assert bp.decide(bare, 0, 1) == bare


FENCED = 'Sure:\n```json\n{"followed": false, "caption1": " a\n cat ", "caption2": "b {x}"}\n```'


@pytest.mark.parametrize("answer, captions", [
    ('{"followed": true, "caption1": "a", "caption2": "b"}', (True, "a", "b")),
    (FENCED, (False, "a cat", "b {x}")),
    ("", None),
    ("no", None),
    ("{", None),
    ("}{", None),
    ("[1]", None),
    ('{"followed": true, "caption1": "a"}', None),
    ('{"followed": "yes", "caption1": "a", "caption2": "b"}', None),
    ('{"followed": true, "caption1": " ", "caption2": "b"}', None),
    ('{"followed": true, "caption1": ["a"], "caption2": "b"}', None),
])
def test_captions_are_read_from_what_a_model_says(answer, captions):
    expected = dict(zip(("followed", "caption1", "caption2"), captions)) if captions else None
    assert bp.read_captions(answer) == expected


def test_pairs_are_built_and_every_drop_has_its_reason(tmp_path):
    path = write_edits(tmp_path, [*PLAN, PLAN[0]])
    out = tmp_path / "out"
    judge = Colors()
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    entries = json.loads(path.read_text())
    broken = {"before": "images/broken.png", "after": "images/red.png", "instruction": "mend it"}
    entries.insert(2, broken)
    path.write_text(json.dumps(entries))
    summary = build(path, out, judge, workers=3)
    rows = decisions(out)
    dropped = [[bp.NO_CAPTIONS], [bp.NO_IMAGE], [bp.NO_EDIT], [], [bp.SAME]]
    assert [row["reasons"] for row in rows] == [[], *dropped, [], []]
    # the edit that is there twice counts once
    assert [row["instruction"] for row in rows] == [e["instruction"] for e in entries[:-1]]
    scores = {"S(I1,T1)": 0.9, "S(I2,T2)": 0.9, "S(I1,T2)": 0.2, "S(I2,T1)": 0.2}
    assert rows[0]["scores"] == scores and rows[3]["scores"] is None
    assert "broken.png" in rows[2]["detail"] and rows[1]["detail"] == "no idea"
    assert rows[3]["prompt1"] == "a green field"
    assert summary == json.loads((out / "summary.json").read_text())
    assert (summary["edits"], summary["kept"], summary["dropped"]) == (8, 4, 4)
    assert summary["reasons"] == {reason[0]: 1 for reason in dropped if reason}
    text = bp.format_summary(summary)
    assert "4 of 8 edits kept" in text and all(f"1  {r}" in text for r in summary["reasons"])
    assert len(judge.described) == 7 and len(judge.scored) == 4 * 4

    pairs = read_pairs(out / "pairs.json", 16)  # what train.py reads
    assert pairs.prompts[0] == ("a red field", "a blue field")
    assert pairs.categories == ["color"] * 4
    shown = [[color_of(image) for image in pair] for pair in pairs.load(range(4))]
    assert shown == [["red", "blue"], ["red", "blue"], ["blue", "green"], ["green", "red"]]


def test_nothing_is_asked_twice_whatever_stopped_the_run(tmp_path):
    path = write_edits(tmp_path)
    whole = tmp_path / "whole"
    out = tmp_path / "out"
    build(path, whole, Colors())
    broken = Colors(fails=2 * 4)  # gone at the third pair that comes to be scored
    says = (r"the judge is gone; 5 decisions are kept in .*decisions.jsonl; mend it, and the same "
            "command goes on")
    with pytest.raises(UserError, match=says):
        build(path, out, broken)
    assert len(decisions(out)) == 5 and not (out / "pairs.json").exists()
    with open(out / "decisions.jsonl", "a") as file:  # and killed while it wrote a line
        file.write('{"before": "images/bl')
    rest = Colors()
    build(path, out, rest)
    assert rest.described == [text for _, _, text in PLAN[5:]]
    for name in ("decisions.jsonl", "pairs.json", "summary.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    idle = Colors()
    build(path, out, idle)
    assert not idle.described and not idle.scored


def test_other_thresholds_and_another_list_need_no_new_scores(tmp_path):
    path = write_edits(tmp_path)
    out = tmp_path / "out"
    assert build(path, out, Colors())["kept"] == 4
    assert build(path, out, Colors(fails=0), high=0.95)["reasons"]["S(I1,T1) is low"] == 4
    assert json.loads((out / "pairs.json").read_text()) == []
    assert all(not row["kept"] for row in decisions(out))
    # shorter, in another order, with a new one
    write_edits(tmp_path, [PLAN[6], PLAN[0], ("green", "blue", "make it blue")])
    again = Colors()
    assert build(path, out, again)["kept"] == 3
    assert again.described == ["make it blue"] and len(again.scored) == 4
    prompts = [entry["prompt1"] for entry in json.loads((out / "pairs.json").read_text())]
    assert prompts == ["a green field", "a red field", "a green field"]


def test_another_judge_does_not_add_to_the_same_decisions(tmp_path):
    path = write_edits(tmp_path)
    out = tmp_path / "out"
    build(path, out, Colors())
    for other in ({"judge": "somebody else"}, {"size": 8}):
        says = "was made with the judge colors and --size 16.*another --out"
        with pytest.raises(UserError, match=says):
            build(path, out, Colors(), **other)
    lines = (out / "decisions.jsonl").read_text().splitlines(keepends=True)
    for bad in ("nonsense\n", "{}\n", "[]\n"):
        (out / "decisions.jsonl").write_text(lines[0] + bad + lines[1])
        with pytest.raises(UserError, match="decisions.jsonl: line 2 is no decision"):
            build(path, out, Colors())


def test_an_answer_that_cannot_be_read_drops_its_edit_alone(tmp_path):
    """It once stopped the whole run, and did so again each time, since a judge at temperature 0
    says the same again. If most of an edit's answers are like this the judge raises an error; for
    an edit whose captions are odd that is no reason to stop either."""

    class Odd(Colors):
        def score(self, images, prompts):
            if prompts[0] == "a green field":  # the seventh edit
                raise UnreadableAnswer("judge x: answers neither yes nor no, but 'The' 0.9")
            scores = super().score(images, prompts)
            if prompts[0] == "a blue field":  # the sixth
                scores[1] = scores[2] = NAN
            return scores

    path = write_edits(tmp_path)
    out = tmp_path / "out"
    summary = build(path, out, Odd(), workers=3)
    rows = decisions(out)
    for row in rows[5:]:
        assert row["reasons"] == [bp.NO_SCORE] and row["scores"] is None
    assert rows[5]["detail"] == "no S(I2,T2) and no S(I1,T2)" and "'The' 0.9" in rows[6]["detail"]
    assert "NaN" not in (out / "decisions.jsonl").read_text()
    assert summary["kept"] == 2 and summary["reasons"][bp.NO_SCORE] == 2
    again = Odd()
    assert build(path, out, again) == summary and not again.scored


LOST = [{"before": "a.png", "after": f"{i}.png", "instruction": "x"} for i in range(4)]


@pytest.mark.parametrize("entries, says", [
    ([], "JSON list of edits"),
    ({}, "JSON list of edits"),
    (["x"], "edit 0 has no before and no after and no instruction"),
    ([{**LOST[0], "instruction": " "}], "edit 0 has no instruction"),
    (LOST, r"edit 0: .*a.png does not exist.*and 3 more"),
])
def test_edits_that_lack_something_are_listed_before_anything_is_asked(tmp_path, entries, says):
    (tmp_path / "edits.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match=says):
        build(tmp_path / "edits.json", tmp_path / "out", Colors())


NOBODY = ["--judge", "http://127.0.0.1:1/v1", "--out", "x"]


@pytest.mark.parametrize("flags", [
    ["--high", "2"], ["--low", "-1"], ["--size", "0"], ["--workers", "0"],
])
def test_flags_out_of_range(flags):
    with pytest.raises(UserError, match="should be"):
        bp.main(["e.json", *NOBODY, *flags])


def test_edits_are_given_once(capsys):
    """`build_pairs EDITS` and `build_pairs --build EDITS` are the same command."""
    for flags in (["e.json", *NOBODY], ["--build", "e.json", *NOBODY]):
        assert bp.parse(flags).edits == "e.json"
    for wrong in (NOBODY, ["e.json", "--build", "f.json", *NOBODY]):
        with pytest.raises(SystemExit):
            bp.parse(wrong)
        assert "give EDITS or --build EDITS" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Against a server process

def serve(*args):
    command = [sys.executable, str(ROOT / "tests" / "edit_server.py"), *map(str, args)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return process, f"http://127.0.0.1:{int(process.stdout.readline())}/v1"


def end(process):
    """Stop a server -> what it answered, a word a request."""
    process.kill()
    return process.communicate()[0].split()


def run_command(*args):
    command = [sys.executable, "-m", "extras.build_pairs", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_the_command_builds_pairs_from_the_captions_and_scores_of_a_server(tmp_path):
    """python -m extras.build_pairs, against a server that says 503 to a third of the requests
    first."""
    path = write_edits(tmp_path)
    out = tmp_path / "out"
    process, url = serve()
    try:
        done = run_command(path, "--judge", url, "--out", out, "--size", "16", "--workers", "4")
    finally:
        answered = end(process)
    assert done.returncode == 0, done.stderr
    assert "3 of 7 edits kept, 4 dropped" in done.stdout
    rows = decisions(out)
    assert [n for n, row in enumerate(rows) if row["kept"]] == KEPT
    assert {row["judge"] for row in rows} == {"colors-1"}
    blind = ["S(I1,T1) is low", "S(I1,T2) is high"]
    reasons = [row["reasons"] for row in rows[1:5]]
    assert reasons == [[bp.NO_CAPTIONS], [bp.NO_EDIT], blind, [bp.SAME]]
    scores = {"S(I1,T1)": 0.9, "S(I2,T2)": 0.9, "S(I1,T2)": 0.1, "S(I2,T1)": 0.1}
    assert rows[0]["scores"] == pytest.approx(scores, abs=1e-5)
    # the judge remembers an image with a prompt, so that 4 scored edits of few images need at
    # most 16 questions
    assert answered.count("captions") == 7 and 0 < answered.count("score") <= 16
    assert read_pairs(out / "pairs.json", 16).prompts[0] == ("a red field", "a blue field")

    bad = run_command("--build", tmp_path / "nowhere.json", "--judge", "http://x?y", "--out", "x")
    assert bad.returncode == 1 and bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1


def test_a_server_that_dies_leaves_its_decisions(tmp_path):
    path = write_edits(tmp_path)
    out = tmp_path / "out"

    def build_with(url, **settings):
        judge = ServerJudge(url, workers=2, **settings)
        describe = bp.describe_by(judge)
        return bp.build(path, out, judge.score, describe, judge.model, size=16, workers=2)

    process, url = serve(9)
    with pytest.raises(UserError, match="gone.*decisions are kept"):
        build_with(url, retries=1, timeout=20)
    answered = end(process)
    n = len(decisions(out))
    assert 0 < n < 7 and len(answered) <= 9
    process, url = serve()  # at another port: the same model
    summary = build_with(url)
    assert end(process).count("captions") == 7 - n and summary["kept"] == 3


def test_captions_that_are_no_completion_stop_the_run(tmp_path):
    class Server:
        model = "m"
        url = "http://x"
        safe = staticmethod(str)

        def request(self, method, path, body):
            assert (method, path) == ("POST", "/chat/completions")
            assert (body["model"], body["temperature"]) == ("m", 0) and "logprobs" not in body
            *images, text = body["messages"][0]["content"]
            assert len(images) == 2 and "{make} it" in text["text"]
            return self.answer

    server = Server()
    image = np.zeros((8, 8, 3), np.uint8)
    describe = bp.describe_by(server)
    for answer in ({}, {"choices": []}, {"choices": [{"message": None}]}, []):
        server.answer = answer
        with pytest.raises(JudgeError, match="not a chat completion"):
            describe(image, image, "{make} it")
    server.answer = {"choices": [{"message": {"content": None}}]}
    assert describe(image, image, "{make} it") == ""
