"""Judges that run elsewhere: a vision-language model behind an OpenAI-compatible server, such as
vLLM, or in a local folder.

    --judge http://localhost:8000/v1         the one model that the server lists
    --judge http://localhost:8000/v1#NAME    one of several
    --judge transformers:DIR                 a folder for AutoModelForImageTextToText

    python -m extras.judges --judge http://localhost:8000/v1 --image a.png --prompt "a red cup"

prints R of every image and prompt. --judge, --image and --prompt may be given more than once; with
more than one judge it also prints how far they are apart.

A judge answers QUESTION with one token. R = P(yes) / (P(yes) + P(no)), where P(yes) is the sum over
yes, Yes, YES and P(no) the sum over no, No, NO (official: internvl_img.py, evaluate_images.py). The
official code reads probabilities after the filters of the sampler; here they are those of the
model. A word with a space before it counts too: a sentencepiece model begins its answer with
"▁Yes", and for other models such a token is next to impossible. A score is never made up: where
the answer is neither yes nor no, R is NaN, and a warning says what was answered. If that is so of
most answers, or if an answer is none of a judge at all, JudgeError.

The key of a server is read from the environment: JUDGE_API_KEY_HOST_PORT for one server
(JUDGE_API_KEY_LOCALHOST_8000: capitals, and _ for what is no letter or digit), or JUDGE_API_KEY for
every server that has none of its own. It is sent to these servers and written nowhere.
"""
import argparse
import base64
import hashlib
import io
import json
import math
import os
import re
import sys
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import torch
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm

from common import UserError, pick_device, write_atomically
from data import load_image

# One question for training and evaluation. It begins with a space because the official one is
# '<image>\n Does this ...' and a server puts image and newline before it. The official code ends it
# in a full stop in training and not in evaluation.
QUESTION = (
    ' Does this image match the description "{prompt}", please directly respond with yes or no'
)
YES = ("yes", "Yes", "YES")
NO = ("no", "No", "NO")
SPACES = (" ", "▁", "Ġ")  # before a word: as servers write it, sentencepiece, byte-level BPE
TOP_LOGPROBS = 20  # the most that vLLM lists by default (--max-logprobs)
CUT = -9999.0  # vLLM writes this for a log-prob of minus infinity: a token that a filter took out

WORKERS = 16  # requests under way at the same time
TIMEOUT = 60.0  # seconds that one request may take
RETRIES = 8  # how often a request is repeated
PATIENCE = 30  # seconds without an answer until a run says so
SHOWN = 3  # unreadable answers of one call that are shown; of more only the number
PASSING = (429, 500, 502, 503, 504)  # statuses that may pass

MODEL_NAME = re.compile("[A-Za-z0-9._:/-]+")
# Monkey and Keye are vision-language models
LIKE_A_KEY = re.compile("^(sk|pk|xai)-|^(gsk|hf)_|(?<!mon)key(?!e)", re.IGNORECASE)
LISTED = set()  # URL#MODEL of every model that a server has listed: no key, whatever it looks like


class JudgeError(UserError):
    """A judge that cannot be reached, or whose answer cannot be read."""


class WrongAnswer(JudgeError):
    """A server that answers, but not what an OpenAI-compatible server would."""


class UnreadableAnswer(JudgeError):
    """A judge that works, but answers neither yes nor no: this image and prompt have no score. It
    ends a run only if most answers are like this."""


class Panel:
    """One judge or several that are asked at the same time; R is the mean of theirs, and NaN where
    one of them has no score.

    Each judge is asked about an image and a prompt once. Its answer is kept as soon as it arrives,
    about 100 bytes each, under a digest of the pixels and the prompt."""

    def __init__(self, judges):
        self.judges = judges
        self.names = [judge.name for judge in judges]
        self.who = [judge.who for judge in judges]
        self.known = [{} for _ in judges]  # {digest: R} of each judge
        self.path = None
        self.lock = threading.Lock()

    def score(self, images, prompts):
        """Images (H, W, 3) uint8, an array or a list of any sizes, and B strings -> R (B,) fp32 on
        the CPU, NaN where the answer is neither yes nor no. JudgeError."""
        return self.submit(images, prompts)()

    def submit(self, images, prompts):
        """Start to score -> a function that waits for R (B,)."""
        keys = [digest(image, prompt) for image, prompt in zip(images, prompts)]
        results = [self.ask(n, keys, images, prompts) for n in range(len(self.judges))]

        def result():
            return torch.stack([result_of_judge() for result_of_judge in results]).mean(0)

        return result

    def ask(self, n, keys, images, prompts):
        """Start to ask judge n for what it has not answered yet -> a function that waits for its R
        (B,)."""
        known = self.known[n]
        new = {key: i for i, key in enumerate(keys) if key not in known}
        new_keys = list(new)
        new_images = [images[i] for i in new.values()]
        new_prompts = [prompts[i] for i in new.values()]

        def keep(i, score):
            self.keep(n, new_keys[i], score)

        finish = self.judges[n].submit(new_images, new_prompts, keep) if new else None

        def result():
            if finish:
                finish()
            return torch.tensor([known.get(key, math.nan) for key in keys])

        return result

    def keep(self, n, key, score):
        """Keep R of judge n for a digest, in the file too if there is one. Judges call this from
        more than one thread, and not for NaN: who asks again may have mended the judge."""
        with self.lock:
            self.known[n][key] = score
            if not self.path:
                return
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps([key.hex(), n, score]) + "\n")
            except OSError as e:
                raise UserError(f"{self.path}: cannot be written ({e.strerror})") from e

    def remember(self, path):
        """Keep every answer in a file as it arrives, one line of JSON each, and do not ask again
        for those that it holds already. The first line names the judges; UserError if they are
        others. A last line that a kill cut short is left out."""
        path = Path(path)
        complete = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
        try:
            lines = [json.loads(line) for line in complete.splitlines()]
            if lines and lines[0] != self.who:
                raise UserError(f"{path}: holds the answers of {', '.join(map(str, lines[0]))}, "
                                f"not of {', '.join(self.who)}; remove it or give another --out")
            for key, n, score in lines[1:]:
                self.known[n][bytes.fromhex(key)] = float(score)
        except (ValueError, TypeError, IndexError) as e:
            raise UserError(f"{path}: does not hold a judge's answers ({e}); remove it") from e
        text = "".join(json.dumps(line) + "\n" for line in lines or [self.who])
        write_atomically(path, text.encode())
        self.path = path


def digest(image, prompt):
    """An image (H, W, 3) uint8 and a prompt -> 32 bytes that stand for them."""
    text = f"{image.shape} {prompt} ".encode("utf-8", "surrogatepass")
    return hashlib.sha256(text + image.tobytes()).digest()


def open_judges(specs, device="cpu", **settings):
    """Specs as on the command line -> Panel. settings: workers, timeout, retries of `ServerJudge`.
    UserError if one of them cannot be opened."""
    judges = []
    for spec in specs:
        if spec.startswith("transformers:"):
            judges.append(TransformersJudge(spec.removeprefix("transformers:"), device))
        else:
            judges.append(ServerJudge(spec, **settings))
    return Panel(judges)


def is_elsewhere(spec):
    """Whether a --judge names a server or a local folder, and no judge of a run folder."""
    return spec.startswith(("http://", "https://", "transformers:"))


def name_judges(cfg):
    """Settings of PPO -> the same, with every server's model in the judges' names. A judge that is
    not there is an error before anything is trained."""
    def named(spec):
        folder = Path(spec.removeprefix("transformers:"))
        try:
            if not spec.startswith("transformers:"):
                return open_judges([spec]).names[0]
            if not (folder / "config.json").is_file():  # it is opened when it is needed
                raise UserError(f"--judge {spec}: has no config.json; should be a local folder of "
                                "a vision-language model")
            return spec
        except UserError as e:
            state = Path(cfg.out) / "ppo.state"
            intact = f". {state} is intact: mend it, then the same command with --resume"
            raise UserError(f"ppo: {e}{intact if state.exists() else ''}") from e
    heldout = named(cfg.heldout_judge) if cfg.heldout_judge else ""
    return replace(cfg, judge=[named(spec) for spec in cfg.judge], heldout_judge=heldout)


def check_spec(spec):
    """UserError for a --judge that none of this file can be, or that may have a secret in it.
    Called before anything is printed or asked.

    Of a spec that is refused nothing behind its # is printed. What passes here may still be a key:
    `ServerJudge.find_model` prints and sends it only if the server has a model of this name."""
    if spec.startswith("transformers:") or spec in LISTED:
        return
    address, mark, model = spec.partition("#")
    if "@" in spec or "?" in spec:
        raise UserError("--judge: has a password or a query in its URL, where logs would show it; "
                        "put the key into the environment variable JUDGE_API_KEY")
    try:
        parts = urlsplit(address)
        parts.port  # ValueError if it is no number
        right = is_elsewhere(spec) and parts.hostname
    except ValueError:
        right = False
    if not right:  # with a # in it, what stands before may be half of a password
        shown = "" if mark else f" {spec}"
        raise UserError(f"--judge{shown}: should be http://HOST:PORT/v1, with #MODEL for one of "
                        "several, or transformers:DIR")
    if model and (not MODEL_NAME.fullmatch(model) or LIKE_A_KEY.search(model)):
        raise UserError(f"--judge {address}: what stands behind its # is no name of a model, and "
                        "is not shown since it may be a key; a key belongs in the environment "
                        "variable JUDGE_API_KEY")


# --------------------------------------------------------------------------------------------------
# A server

class ServerJudge:
    """An OpenAI-compatible server: POST /v1/chat/completions with the image as a data URL, for one
    token, its log-prob and those of its rivals.

    At most `workers` requests are under way. A request is repeated up to `retries` times if it
    fails to connect, is cut off, takes more than `timeout` seconds, or is answered by 429 or 5xx:
    after 0, 1, 2, 4... seconds with jitter, at most 30, or when the server says (Retry-After).
    After that, and after an answer that repeating would not mend, JudgeError; requests that have
    not begun are dropped."""

    def __init__(self, url, workers=WORKERS, timeout=TIMEOUT, retries=RETRIES):
        check_spec(url)
        address, _, model = url.partition("#")
        try:
            import urllib3
        except ImportError:
            raise UserError(f"--judge {address}: pip install urllib3, which asks it") from None
        self.url = address.rstrip("/")
        if not urlsplit(self.url).path:
            self.url += "/v1"
        self.key = self.read_key()
        self.failed = None  # the first error that no other request can escape
        self.http_errors = urllib3.exceptions.HTTPError
        self.retry = urllib3.Retry(
            retries, allowed_methods=None, status_forcelist=PASSING, raise_on_status=False,
            backoff_factor=0.5, backoff_max=30, backoff_jitter=0.5, retry_after_max=120,
        )
        limits = urllib3.Timeout(connect=min(10.0, timeout), read=timeout)
        self.http = urllib3.PoolManager(
            maxsize=workers, block=True, retries=self.retry, timeout=limits
        )
        self.workers = ThreadPoolExecutor(workers, thread_name_prefix="judge")
        self.model = self.find_model(model)
        self.name = f"{self.url}#{self.model}"
        self.who = self.model  # the same model at another address is the same judge

    def read_key(self):
        """The key of this server out of the environment, "" if there is none."""
        host = re.sub("[^A-Z0-9]", "_", urlsplit(self.url).netloc.upper())
        self.own_variable = f"JUDGE_API_KEY_{host}"
        variable = self.own_variable if self.own_variable in os.environ else "JUDGE_API_KEY"
        key = os.environ.get(variable, "")
        if not key.isprintable() or not key.isascii():
            raise UserError(f"{variable}: holds characters that no HTTP header can carry; set it "
                            "again, without a line break")
        return key

    def request(self, method, path, body=None, retries=None):
        """-> the JSON of the answer. JudgeError says what is wrong and what would mend it."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        retry = self.retry if retries is None else self.retry.new(total=retries)
        url = self.url + path
        try:
            response = self.http.request(
                method, url, json=body, headers=headers, redirect=False, retries=retry
            )
        except self.http_errors as e:
            reason = self.safe(getattr(e, "reason", None) or e)
            raise JudgeError(f"{self.url}: the judge is gone ({reason}; asked {retry.total + 1} "
                             "times); see that it runs") from e
        text = response.data.decode(errors="replace")
        if response.status in (401, 403):
            what = "refuses the key" if self.key else "wants a key"
            raise JudgeError(f"{self.url}: the judge {what} (status {response.status}); set the "
                             f"environment variable JUDGE_API_KEY, or {self.own_variable} for this "
                             "server alone")
        if response.status in PASSING:
            # it may never pass: vLLM answers 500 to an image that is too large
            raise JudgeError(f"{url}: the judge is gone, or cannot do this: status "
                             f"{response.status}, asked {retry.total + 1} times: "
                             f"{self.safe(message_of(text))}")
        if response.status != 200:
            raise WrongAnswer(f"{url}: status {response.status}: {self.safe(message_of(text))}")
        try:
            return json.loads(text)
        except ValueError as e:
            raise WrongAnswer(f"{url}: no JSON: {self.safe(text)!r} ({e}); is it an "
                              "OpenAI-compatible server?") from e

    def safe(self, text, most=300):
        """What a server said: short, on one line, and without the key if it quotes the key."""
        text = " ".join(str(text).split())
        if self.key:
            text = text.replace(self.key, "(key)")
        return text[:most]

    def find_model(self, name):
        """A name, or "" -> the model of this name, or the only one. JudgeError if the server has
        no such model. A name that it does not list may be a key: it is neither sent nor printed."""
        try:
            names = self.list_models()
        except WrongAnswer:
            if not name:
                raise
            return name  # a server that lists no models
        LISTED.update(f"{self.url}#{listed}" for listed in names)
        if not name and len(names) == 1:
            return names[0]
        if name in names:
            return name
        shown = self.safe(", ".join(names), 1000)
        if name:
            raise JudgeError(f"{self.url}: has no model of the name that stands behind the #, "
                             f"which is not shown since it may be a key; it has {shown}")
        raise JudgeError(f"{self.url}: has {len(names)} models ({shown}); choose one: --judge "
                         f"{self.url}#NAME")

    def list_models(self):
        """The names of the models of the server. WrongAnswer if it does not list any."""
        # who opens a judge should not wait as long as who has begun to train with it
        answer = self.request("GET", "/models", retries=min(3, self.retry.total))
        try:
            names = [str(entry["id"]) for entry in answer["data"]]
        except (KeyError, TypeError):
            names = []
        if not names:
            raise WrongAnswer(f"{self.url}/models: names no models: {self.safe(answer)}; give the "
                              f"name: --judge {self.url}#NAME")
        return names

    def ask(self, image, prompt):
        """An image (H, W, 3) uint8 and a string -> R, a float."""
        if self.failed:  # another request found that the judge is gone; do not find it once more
            raise self.failed
        content = [image_part(image), {"type": "text", "text": question_about(prompt)}]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": TOP_LOGPROBS,
        }
        try:
            answer = self.request("POST", "/chat/completions", body)
            return answer_probability(listed_tokens(answer))
        except JudgeError as e:
            if isinstance(e.__cause__, self.http_errors):
                error = type(e)(f"judge {self.safe(e, 1000)}")
            else:
                where = f"judge {self.name}, prompt {prompt[:60]!r}"
                error = type(e)(f"{where}: {self.safe(e, 1000)}")
            if not isinstance(e, UnreadableAnswer):  # which says nothing about the next answer
                self.failed = self.failed or error
            raise error from e

    def submit(self, images, prompts, keep=None):
        """Start to ask -> a function that waits for R (B,) fp32. Answers come in any order; R is
        in the order of the images, NaN where the answer is neither yes nor no. keep(i, R) is called
        with each answer as it arrives, whether anybody waits for it or not."""
        unreadable = []

        def ask(i):
            try:
                score = self.ask(images[i], prompts[i])
            except UnreadableAnswer as e:
                unreadable.append(str(e))
                return math.nan
            if keep:
                keep(i, score)
            return score

        futures = [self.workers.submit(ask, i) for i in range(len(prompts))]

        def result():
            self.wait_for(futures)
            self.report(unreadable, len(futures))
            return torch.tensor([future.result() for future in futures])

        return result

    def wait_for(self, futures):
        """Wait until all are done. If one fails, drop those that have not begun: JudgeError."""
        waiting = futures
        answered = 0
        while waiting:
            done, waiting = wait(futures, timeout=PATIENCE, return_when=FIRST_EXCEPTION)
            if any(future.exception() for future in done):
                break
            if waiting and len(done) == answered:
                warn(f"judge {self.name}: no answer for {PATIENCE} s, {len(waiting)} to come; it "
                     "is asked again until it must be gone")
            answered = len(done)
        for future in waiting:
            future.cancel()
        for future in futures:
            if future in done:
                future.result()  # raises the error of the first that has one

    def report(self, unreadable, n):
        """Say which of the n answers of a call are unreadable. UnreadableAnswer if most are: a
        judge that cannot answer would otherwise go on without a score for anything."""
        if n >= 4 and len(unreadable) > n / 2:
            raise UnreadableAnswer(f"{unreadable[0]}; so are {len(unreadable)} of {n} answers")
        for line in unreadable[:SHOWN]:
            warn(f"no score: {line}")
        if len(unreadable) > SHOWN:
            warn(f"judge {self.name}: no score for {len(unreadable)} of {n} images and prompts")

    def score(self, images, prompts):
        """Images (H, W, 3) uint8 and B strings -> R (B,) fp32, NaN where the answer is neither yes
        nor no. JudgeError."""
        return self.submit(images, prompts)()


def warn(line):
    """A line on stderr that leaves a bar whole."""
    tqdm.write(line, file=sys.stderr)


def message_of(body):
    """The message in the body of an error, in OpenAI's schema or not."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body


def question_about(prompt):
    """QUESTION with a prompt in it. A Python string may hold unpaired surrogates, a request not."""
    return QUESTION.format(prompt=prompt.encode("utf-8", "replace").decode())


def image_part(image):
    """An image (H, W, 3) uint8 -> a part of a message: a PNG, which changes no pixel, as a data
    URL."""
    png = io.BytesIO()
    Image.fromarray(image).save(png, "png")
    url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def listed_tokens(answer):
    """A chat completion in OpenAI's schema -> [(token, log-prob)] for its first token: the most
    probable ones and the one that was sampled. JudgeError if they are not there."""
    try:
        logprobs = answer["choices"][0]["logprobs"]
        first = logprobs["content"][0] if logprobs else None
        listed = []
        if first:
            listed = [(entry["token"], entry["logprob"]) for entry in first["top_logprobs"]]
            if first["token"] not in dict(listed):
                listed.append((first["token"], first["logprob"]))
    except (KeyError, IndexError, TypeError) as e:
        raise JudgeError(f"not a chat completion with log-probs: {json.dumps(answer)}") from e
    if not listed:
        raise JudgeError("answers without log-probs, of which the score is made; this server does "
                         "not give them, or has them switched off")
    for token, logprob in listed:
        number = type(logprob) in (int, float) and logprob <= 1e-3  # NaN fails the comparison
        if not isinstance(token, str) or not number:
            raise JudgeError(f"token {token!r} has log-prob {logprob!r}")
    return listed


def answer_probability(listed):
    """[(token, log-prob)] of the most probable first tokens -> R = P(yes) / (P(yes) + P(no)).

    If yes or no is not listed, each of its spellings is less probable than the last token that is.
    The probability of that one stands for it: an upper bound, which keeps R from 0 and 1. If
    neither is listed, there is nothing to compare: UnreadableAnswer."""
    listed = [(token, math.exp(min(logprob, 0.0))) for token, logprob in listed if logprob > CUT]
    yes = probability_of(YES, listed)
    no = probability_of(NO, listed)
    top = ", ".join(f"{token!r} {p:.3g}" for token, p in listed[:5])
    if not yes and not no:
        raise UnreadableAnswer(f"answers neither yes nor no, but {top}; this model does not answer "
                               "such a question with its first token (one that thinks first needs "
                               "that switched off)")
    if len(listed) < 2:
        raise JudgeError(f"lists {top} alone with a probability, which says nothing about the "
                         f"other answer; the server should list {TOP_LOGPROBS} (top_logprobs), "
                         "before any filter")
    least = min(p for _, p in listed)
    yes = yes or least
    no = no or least
    return yes / (yes + no)


def probability_of(words, listed):
    """Words, [(token, probability)] -> the sum over the words, bare or after one space."""
    total = 0.0
    for token, p in listed:
        bare = token[1:] if token.startswith(SPACES) else token
        if bare in words:
            total += p
    return total


# --------------------------------------------------------------------------------------------------
# A local model

class TransformersJudge:
    """A folder with a vision-language model and its processor, in safetensors, opened by
    transformers. R is made of the raw logits of the first token of the answer, `batch` images at
    a time."""

    def __init__(self, folder, device="cpu", batch=8):
        self.name = self.who = f"transformers:{folder}"
        self.device = device
        self.batch = batch
        try:
            from transformers import AutoModelForImageTextToText, AutoProcessor
        except ImportError:
            raise UserError(f"--judge {self.name}: pip install transformers, which loads it "
                            "(Qwen2.5-VL wants torchvision too)") from None
        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"--judge {self.name}: has no config.json; should be a local folder of "
                            "a vision-language model")
        try:
            self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            model = AutoModelForImageTextToText.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype="auto"
            )
        except (OSError, ValueError, ImportError, KeyError, SafetensorError) as e:
            # all of these are raised by transformers for a folder that it cannot load
            reason = " ".join(str(e).split())[:300]
            raise UserError(f"--judge {self.name}: cannot be loaded ({reason})") from e
        self.model = model.to(device).eval()
        self.lock = threading.Lock()  # more than one thread may ask
        self.processor.tokenizer.padding_side = "left"  # answers then start in the same column
        self.yes = self.ids_of(YES)
        self.no = self.ids_of(NO)
        if not self.yes or not self.no or not self.processor.chat_template:
            raise UserError(f"--judge {self.name}: its tokenizer has no token yes or no, or there "
                            "is no chat template; it cannot answer in a word")

    def ids_of(self, words):
        """Token ids of words, bare or after one space, as far as the tokenizer has them."""
        vocabulary = self.processor.tokenizer.get_vocab()
        spelled = [mark + word for word in words for mark in ("", *SPACES)]
        return [vocabulary[word] for word in spelled if word in vocabulary]

    @torch.no_grad()
    def submit(self, images, prompts, keep=None):
        """Score at once -> a function that returns R (B,) fp32. keep(i, R) is called with the
        answers of a batch when they are there. JudgeError."""
        scores = []
        with self.lock:
            for start in range(0, len(prompts), self.batch):
                rows = slice(start, start + self.batch)
                for score in self.ask(images[rows], prompts[rows]).tolist():
                    if keep:
                        keep(len(scores), score)
                    scores.append(score)
        scores = torch.tensor(scores)
        return lambda: scores

    def ask(self, images, prompts):
        """A batch of b images (H, W, 3) uint8 and b strings -> R (b,) fp32 on the CPU."""
        chats = []
        for image, prompt in zip(images, prompts):
            content = [
                {"type": "image", "image": Image.fromarray(image)},
                {"type": "text", "text": question_about(prompt)},
            ]
            chats.append([{"role": "user", "content": content}])
        try:
            inputs = self.processor.apply_chat_template(
                chats, add_generation_prompt=True, tokenize=True, return_dict=True,
                return_tensors="pt", processor_kwargs={"padding": True},
            )
        except ValueError as e:  # for one, a prompt that holds the model's own mark for an image
            shown = ", ".join(repr(prompt[:60]) for prompt in prompts)
            raise JudgeError(f"{self.name}: cannot be asked about one of {shown} ({e})") from e
        # generate() knows the positions of each model under padding, and output_logits are those
        # that no filter has touched
        answer = self.model.generate(
            **inputs.to(self.device, self.model.dtype), max_new_tokens=1, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )
        logits = answer.logits[0].float()  # (b, V)
        yes = logits[:, self.yes].logsumexp(-1)
        no = logits[:, self.no].logsumexp(-1)
        scores = torch.sigmoid(yes - no).cpu()  # = e^yes / (e^yes + e^no)
        if not scores.isfinite().all():
            raise JudgeError(f"{self.name}: logits that are not finite; load it in another dtype")
        return scores

    def score(self, images, prompts):
        """Images (H, W, 3) uint8 and B strings -> R (B,) fp32 on the CPU. JudgeError."""
        return self.submit(images, prompts)()


# --------------------------------------------------------------------------------------------------


def main(argv=None):
    """The command line: R of every judge for every image and prompt."""
    parser = argparse.ArgumentParser(
        prog="python -m extras.judges", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--judge", action="append", required=True, metavar="SPEC",
        help="http://HOST:PORT/v1, #MODEL for one of several, or transformers:DIR")
    add("--image", action="append", required=True, metavar="FILE", help="an image")
    add("--prompt", action="append", required=True, metavar="TEXT", help="asked of every image")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
        help="where a local judge computes (auto)")
    args = parser.parse_args(argv)
    for spec in args.judge:
        check_spec(spec)
    cases = [(file, prompt) for file in args.image for prompt in args.prompt]
    images = [load_image(file, None) for file, _ in cases]
    prompts = [prompt for _, prompt in cases]
    device = pick_device(args.device)
    judges = [open_judges([spec], device) for spec in args.judge]
    scores = torch.stack([judge.score(images, prompts) for judge in judges])  # (judges, B)
    for n, judge in enumerate(judges, 1):
        print(f"R {n}: {judge.names[0]}")
    for (file, prompt), row in zip(cases, scores.T.tolist()):
        print("".join(f"{r:10.6f}" for r in row), f" {file}  {prompt}")
    differences = scores.amax(0) - scores.amin(0)  # (B,), NaN where one has no score
    if len(judges) > 1 and not differences.isnan().all():
        print(f"largest difference {differences.nan_to_num(0).max():.2g}")


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
