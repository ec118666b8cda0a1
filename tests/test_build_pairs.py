"""build_pairs.py: what is kept and why not, going on after a stop, and the whole command against a real server process."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import build_pairs as bp
import judges
from data import UserError, read_pairs
from judges import UnreadableAnswer

ROOT = Path(__file__).parents[1]
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
PLAN = [("red", "blue", "make it blue"), ("red", "green", "garble"), ("green", "blue", "ignored"), ("red", "blue", "blind"),
        ("red", "blue", "blind, same"), ("blue", "green", "make it green"), ("green", "red", "make it red")]
KEPT = [0, 5, 6]


def write_edits(folder, plan=PLAN):
    (folder / "pictures").mkdir(exist_ok=True)
    for name, rgb in COLOURS.items():
        Image.new("RGB", (40, 24), rgb).save(folder / "pictures" / f"{name}.png")
    entries = [{"before": f"pictures/{a}.png", "after": f"pictures/{b}.png", "instruction": text, "category": "color"} for a, b, text in plan]
    (folder / "edits.json").write_text(json.dumps(entries))
    return folder / "edits.json"


def colour(image):
    return {rgb: name for name, rgb in COLOURS.items()}[tuple(image[8, 8].tolist())]


class Colours:
    """score and describe without a server, which count what they are asked. `fails` after so many scored edits."""

    def __init__(self, fails=10 ** 9):
        self.described, self.scored, self.fails = [], [], fails

    def describe(self, before, after, instruction):
        assert before.shape == after.shape == (16, 16, 3)
        self.described.append(instruction)
        if instruction == "garble":
            return "no idea"
        one, two = ("green",) * 2 if "same" in instruction else (colour(before), colour(after))
        return json.dumps({"followed": instruction != "ignored", "caption1": f"a {one} field", "caption2": f"a {two} field"})

    def score(self, images, prompts):
        if len(self.scored) >= self.fails:
            raise UserError("the judge is gone")
        self.scored += prompts
        return [0.9 if colour(image) in prompt else 0.2 for image, prompt in zip(images, prompts)]


def build(path, out, who, **settings):
    return bp.build(path, out, who.score, who.describe, **({"judge": "colours", "size": 16, "workers": 1} | settings))


def decisions(out):
    return [json.loads(line) for line in (out / "decisions.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# Decisions

def scored(*values):
    return {"scores": dict(zip(("S(I1,T1)", "S(I2,T2)", "S(I1,T2)", "S(I2,T1)"), values)), "kept": False, "reasons": []}


@pytest.mark.parametrize("values, reasons", [
    ((0.7, 0.7, 0.3, 0.3), []), ((1, 1, 0, 0), []), ((0.69, 1, 0, 0), ["S(I1,T1) is low"]), ((1, 0.1, 0, 0), ["S(I2,T2) is low"]),
    ((1, 1, 0.31, 0), ["S(I1,T2) is high"]), ((1, 1, 0, 0.9), ["S(I2,T1) is high"]),
    ((0, 0, 1, 1), ["S(I1,T1) is low", "S(I2,T2) is low", "S(I1,T2) is high", "S(I2,T1) is high"]),
    ((float("nan"), 1, float("nan"), 0), ["S(I1,T1) is low", "S(I1,T2) is high"]),
])
def test_a_pair_is_kept_if_each_picture_fits_its_own_caption_alone(values, reasons):
    row = bp.decide(scored(*values), 0.7, 0.3)
    assert row["reasons"] == reasons and row["kept"] == (not reasons)


def test_other_thresholds_decide_anew_and_a_row_without_scores_stays():
    row = bp.decide(scored(0.6, 0.9, 0.2, 0.2), 0.7, 0.3)
    assert not row["kept"] and bp.decide(row, 0.5, 0.3)["kept"] and not bp.decide(bp.decide(row, 0.5, 0.3), 0.5, 0.1)["kept"]
    bare = {"scores": None, "kept": False, "reasons": [bp.NO_EDIT]}
    assert bp.decide(bare, 0, 1) == bare


@pytest.mark.parametrize("answer, told", [
    ('{"followed": true, "caption1": "a", "caption2": "b"}', (True, "a", "b")),
    ('Sure:\n```json\n{"followed": false, "caption1": " a\n cat ", "caption2": "b {x}"}\n```', (False, "a cat", "b {x}")),
    ("", None), ("no", None), ("{", None), ("}{", None), ('{"followed": true, "caption1": "a"}', None),
    ('{"followed": "yes", "caption1": "a", "caption2": "b"}', None),
    ('{"followed": true, "caption1": " ", "caption2": "b"}', None), ('{"followed": true, "caption1": ["a"], "caption2": "b"}', None), ("[1]", None),
])
def test_captions_are_read_from_what_a_model_says(answer, told):
    assert bp.read_captions(answer) == (told and dict(zip(("followed", "caption1", "caption2"), told)))


def test_pairs_are_built_and_every_drop_has_its_reason(tmp_path):
    path, out, who = write_edits(tmp_path, [*PLAN, PLAN[0]]), tmp_path / "out", Colours()
    (tmp_path / "pictures" / "broken.png").write_bytes(b"no picture")
    entries = json.loads(path.read_text())
    entries.insert(2, {"before": "pictures/broken.png", "after": "pictures/red.png", "instruction": "mend it"})
    path.write_text(json.dumps(entries))
    summary = build(path, out, who, workers=3)
    rows = decisions(out)
    assert [row["reasons"] for row in rows] == [[], [bp.NO_CAPTIONS], [bp.NO_PICTURE], [bp.NO_EDIT], [], [bp.SAME], [], []]
    assert [row["instruction"] for row in rows] == [e["instruction"] for e in entries[:-1]]             # the one that is there twice counts once
    assert rows[0]["scores"] == {"S(I1,T1)": 0.9, "S(I2,T2)": 0.9, "S(I1,T2)": 0.2, "S(I2,T1)": 0.2} and rows[3]["scores"] is None
    assert "broken.png" in rows[2]["told"] and rows[1]["told"] == "no idea" and rows[3]["prompt1"] == "a green field"
    assert summary == json.loads((out / "summary.json").read_text()) and (summary["edits"], summary["kept"], summary["dropped"]) == (8, 4, 4)
    assert summary["reasons"] == {reason: 1 for reason in (bp.NO_CAPTIONS, bp.NO_PICTURE, bp.NO_EDIT, bp.SAME)}
    text = bp.format_summary(summary)
    assert "4 of 8 edits kept" in text and all(f"1  {reason}" in text for reason in summary["reasons"])
    assert len(who.described) == 7 and len(who.scored) == 4 * 4

    pairs = read_pairs(out / "pairs.json", 16)                          # what train.py reads
    assert pairs.prompts[0] == ("a red field", "a blue field") and pairs.categories == ["color"] * 4
    shown = [[colour(image) for image in two] for two in pairs.load(range(4))]
    assert shown == [["red", "blue"], ["red", "blue"], ["blue", "green"], ["green", "red"]]


def test_nothing_is_asked_twice_whatever_stopped_the_run(tmp_path):
    path, whole, who = write_edits(tmp_path), tmp_path / "whole", Colours()
    build(path, whole, who)
    out, broken = tmp_path / "out", Colours(fails=2 * 4)                # gone at the third pair that comes to be scored
    with pytest.raises(UserError, match=r"the judge is gone; 5 decisions are kept in .*decisions.jsonl; mend it, and the same command goes on"):
        build(path, out, broken)
    assert len(decisions(out)) == 5 and not (out / "pairs.json").exists()
    with open(out / "decisions.jsonl", "a") as file:                    # and killed while it wrote a line
        file.write('{"before": "pictures/bl')
    rest = Colours()
    build(path, out, rest)
    assert rest.described == [text for _, _, text in PLAN[5:]]
    for name in ("decisions.jsonl", "pairs.json", "summary.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    idle = Colours()
    build(path, out, idle)
    assert not idle.described and not idle.scored


def test_other_thresholds_and_another_list_need_no_new_scores(tmp_path):
    path, out, who = write_edits(tmp_path), tmp_path / "out", Colours()
    assert build(path, out, who)["kept"] == 4
    assert build(path, out, Colours(fails=0), high=0.95)["reasons"]["S(I1,T1) is low"] == 4 and json.loads((out / "pairs.json").read_text()) == []
    assert all(not row["kept"] for row in decisions(out))
    write_edits(tmp_path, [PLAN[6], PLAN[0], ("green", "blue", "make it blue")])                      # shorter, in another order, with a new one
    again = Colours()
    assert build(path, out, again)["kept"] == 3 and again.described == ["make it blue"] and len(again.scored) == 4
    assert [e["prompt1"] for e in json.loads((out / "pairs.json").read_text())] == ["a green field", "a red field", "a green field"]


def test_another_judge_does_not_add_to_the_same_decisions(tmp_path):
    path, out = write_edits(tmp_path), tmp_path / "out"
    build(path, out, Colours())
    for other in ({"judge": "somebody else"}, {"size": 8}):
        with pytest.raises(UserError, match="was made with the judge colours and --size 16.*another --out"):
            build(path, out, Colours(), **other)
    lines = (out / "decisions.jsonl").read_text().splitlines(keepends=True)
    for bad in ("nonsense\n", "{}\n", "[]\n"):
        (out / "decisions.jsonl").write_text(lines[0] + bad + lines[1])
        with pytest.raises(UserError, match="decisions.jsonl: line 2 is no decision"):
            build(path, out, Colours())


def test_an_answer_that_cannot_be_read_drops_its_edit_alone(tmp_path):
    """It once stopped the whole run, and did so again each time, since a judge at temperature 0 says the same again."""
    class Odd(Colours):
        def score(self, images, prompts):
            if "green" in prompts[0]:
                raise UnreadableAnswer("judge x: answers neither yes nor no, but 'The' 0.9")
            return super().score(images, prompts)
    summary = build(write_edits(tmp_path), tmp_path / "out", Odd(), workers=3)
    rows = decisions(tmp_path / "out")
    assert rows[6]["reasons"] == [bp.NO_SCORE] and rows[6]["scores"] is None and "'The' 0.9" in rows[6]["told"]
    assert summary["kept"] == 3 and summary["reasons"][bp.NO_SCORE] == 1
    again = Odd()
    assert build(tmp_path / "edits.json", tmp_path / "out", again) == summary and not again.scored


@pytest.mark.parametrize("entries, says", [
    ([], "JSON list of edits"), ({}, "JSON list of edits"), (["x"], "edit 0 has no before and no after and no instruction"),
    ([{"before": "a.png", "after": "b.png", "instruction": " "}], "edit 0 has no instruction"),
    ([{"before": "a.png", "after": f"{i}.png", "instruction": "x"} for i in range(4)], r"edit 0: .*a.png does not exist.*and 3 more"),
])
def test_edits_that_lack_something_are_listed_before_anything_is_asked(tmp_path, entries, says):
    (tmp_path / "edits.json").write_text(json.dumps(entries))
    with pytest.raises(UserError, match=says):
        build(tmp_path / "edits.json", tmp_path / "out", Colours())


@pytest.mark.parametrize("flags", [["--high", "2"], ["--low", "-1"], ["--size", "0"], ["--workers", "0"]])
def test_flags_out_of_range(flags):
    with pytest.raises(UserError, match="should be"):
        bp.main(["--build", "e.json", "--judge", "http://127.0.0.1:1/v1", "--out", "x", *flags])


# ---------------------------------------------------------------------------------------------------------------------
# Against a server process

def serve(*args):
    process = subprocess.Popen([sys.executable, str(ROOT / "tests" / "edit_server.py"), *map(str, args)], stdout=subprocess.PIPE, text=True)
    return process, f"http://127.0.0.1:{int(process.stdout.readline())}/v1"


def end(process):
    """Stop a server -> what it answered, a word a request."""
    process.kill()
    return process.communicate()[0].split()


def test_the_command_builds_pairs_from_a_servers_captions_and_scores(tmp_path):
    """python data.py --build, against a server that says 503 to a third of the requests first."""
    path, out = write_edits(tmp_path), tmp_path / "out"
    process, url = serve()
    try:
        command = [sys.executable, "data.py", "--build", str(path), "--judge", url, "--out", str(out), "--size", "16", "--workers", "4"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    finally:
        answered = end(process)
    assert done.returncode == 0, done.stderr
    assert "3 of 7 edits kept, 4 dropped" in done.stdout
    rows = decisions(out)
    assert [n for n, row in enumerate(rows) if row["kept"]] == KEPT and {row["judge"] for row in rows} == {"colours-1"}
    assert [row["reasons"] for row in rows[1:5]] == [[bp.NO_CAPTIONS], [bp.NO_EDIT], ["S(I1,T1) is low", "S(I1,T2) is high"], [bp.SAME]]
    assert rows[0]["scores"] == pytest.approx({"S(I1,T1)": 0.9, "S(I2,T2)": 0.9, "S(I1,T2)": 0.1, "S(I2,T1)": 0.1}, abs=1e-5)
    # the judge remembers a picture with a prompt, so that 4 scored edits of few pictures need at most 16 questions
    assert answered.count("captions") == 7 and 0 < answered.count("score") <= 16
    assert read_pairs(out / "pairs.json", 16).prompts[0] == ("a red field", "a blue field")

    bad = subprocess.run([sys.executable, "data.py", "--build", str(tmp_path / "nowhere.json"), "--judge", "http://x?y", "--out", "x"], cwd=ROOT,
                         capture_output=True, text=True, timeout=600)
    assert bad.returncode == 1 and bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1


def test_a_server_that_dies_leaves_its_decisions(tmp_path):
    path, out = write_edits(tmp_path), tmp_path / "out"
    process, url = serve(9)
    judge = judges.ServerJudge(url, workers=2, retries=1, timeout=20)
    with pytest.raises(UserError, match="gone.*decisions are kept"):
        bp.build(path, out, judge.score, bp.describe_by(judge), judge.model, size=16, workers=2)
    first = end(process)
    n = len(decisions(out))
    assert 0 < n < 7 and len(first) <= 9
    process, url = serve()                          # another port: the same model
    judge = judges.ServerJudge(url, workers=2)
    summary = bp.build(path, out, judge.score, bp.describe_by(judge), judge.model, size=16, workers=2)
    assert end(process).count("captions") == 7 - n and summary["kept"] == 3


def test_captions_that_are_no_completion_stop_the_run(tmp_path):

    class Server:
        model, url, safe = "m", "http://x", staticmethod(str)

        def request(self, method, path, body):
            assert (method, path, body["model"], body["temperature"]) == ("POST", "/chat/completions", "m", 0) and "logprobs" not in body
            *pictures, text = body["messages"][0]["content"]
            assert len(pictures) == 2 and "{make} it" in text["text"]
            return self.answer
    server, image = Server(), np.zeros((8, 8, 3), np.uint8)
    describe = bp.describe_by(server)
    for answer in ({}, {"choices": []}, {"choices": [{"message": None}]}, []):
        server.answer = answer
        with pytest.raises(judges.JudgeError, match="not a chat completion"):
            describe(image, image, "{make} it")
    server.answer = {"choices": [{"message": {"content": None}}]}
    assert describe(image, image, "{make} it") == ""
