"""Judges that live elsewhere: a vision-language model behind an OpenAI-compatible server (vLLM, say), or in a local folder.

    --judge http://localhost:8000/v1             the one model that the server names
    --judge http://localhost:8000/v1#NAME        one of several
    --judge transformers:DIR                     a folder for transformers' AutoModelForImageTextToText

    python judges.py --judge http://localhost:8000/v1 --image a.png --image b.png --prompt "a red cup"       # what it says of every picture
    python judges.py --judge http://localhost:8000/v1 --judge transformers:DIR --image a.png --prompt "a red cup"    # and how far two are apart

They answer QUESTION with one token, and R = P(yes) / (P(yes) + P(no)), P(yes) the sum over yes, Yes, YES and P(no) over no, No, NO
(official code: internvl_img.py, evaluate_images.py). The official code reads probabilities after the sampler's filters; here they are the
model's own. A word with a space before it counts too: of a sentencepiece model it is the first word of an answer, "▁Yes", and of others
next to impossible there. A score that nobody gave is never made up: an answer that cannot be read ends in a JudgeError.

A server's key is read from the environment: JUDGE_API_KEY_HOST_PORT for one server (JUDGE_API_KEY_LOCALHOST_8000, in capitals, with _ for
what is no letter or digit), or JUDGE_API_KEY for all that have none of their own. It is sent to those servers and written nowhere.
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
from pathlib import Path
from urllib.parse import urlsplit

import torch
from PIL import Image
from safetensors import SafetensorError
from tqdm import tqdm

from data import UserError, load_image
from model import pick_device
from tokenizer import write_atomically

# One constant for training and evaluation. It begins with a space since the official one is '<image>\n Does this ...' and a
# server puts image and newline before it. The official code ends it in a full stop in training and not in evaluation.
QUESTION = ' Does this image match the description "{prompt}", please directly respond with yes or no'
YES, NO = ("yes", "Yes", "YES"), ("no", "No", "NO")
SPACES = (" ", "▁", "Ġ")                # before a word: as servers write it, sentencepiece, byte-level BPE
TOP_LOGPROBS = 20                       # the most that vLLM lists unless told otherwise (--max-logprobs)
PASSING = (429, 500, 502, 503, 504)     # statuses that may pass
PATIENCE = 30                           # seconds without an answer before a run says so
CUT = -9999.0                           # vLLM's stand-in for a log-prob of minus infinity: a token that a filter took out


class JudgeError(UserError):
    """A judge that cannot be reached, or whose answer cannot be read."""


class UnreadableAnswer(JudgeError):
    """A judge that answers as it should, but neither yes nor no: of this picture and prompt there is no score."""


class Panel:
    """One judge or several, asked at once; R is the mean of theirs. Each picture and prompt is asked once: answers are kept, about
    100 bytes each, by a digest of the picture's pixels and the prompt."""

    def __init__(self, judges):
        self.judges, self.known, self.path = judges, {}, None
        self.names, self.who = ([getattr(judge, kind) for judge in judges] for kind in ("name", "who"))
        self.remote = any(isinstance(judge, ServerJudge) for judge in judges)

    def score(self, images, prompts):
        """B images (H, W, 3) uint8, an array or a list of any sizes, B strings -> R (B,) fp32 on the CPU. JudgeError."""
        return self.submit(images, prompts)()

    def submit(self, images, prompts):
        """Start to score -> a function that waits for the R (B,)."""
        keys = [hashlib.sha256(f"{image.shape} {prompt} ".encode("utf-8", "surrogatepass") + image.tobytes()).digest()
                for image, prompt in zip(images, prompts)]
        new = {key: i for i, key in enumerate(keys) if key not in self.known}
        waiting = [judge.submit([images[i] for i in new.values()], [prompts[i] for i in new.values()]) for judge in self.judges if new]

        def answers():
            if new:
                learned = dict(zip(new, torch.stack([ready() for ready in waiting]).mean(0).tolist()))
                self.known.update(learned)
                if self.path:
                    with open(self.path, "a", encoding="utf-8") as file:
                        file.writelines(f'["{key.hex()}", {score!r}]\n' for key, score in learned.items())
            return torch.tensor([self.known[key] for key in keys])
        return answers

    def remember(self, path):
        """Keep every answer in a file as it comes, a line of JSON each, and do not ask again for what it holds already. UserError if it is
        of other judges. A last line that a kill cut short is left out."""
        whole = Path(path).read_bytes().rpartition(b"\n")[0].splitlines() if Path(path).exists() else []
        try:
            lines = [json.loads(line) for line in whole]
            if lines and lines[0] != self.who:
                raise UserError(f"{path}: holds the answers of {', '.join(map(str, lines[0]))}, not of {', '.join(self.who)}; remove it or give another --out")
            self.known.update((bytes.fromhex(key), float(score)) for key, score in lines[1:])
        except (ValueError, TypeError) as e:
            raise UserError(f"{path}: does not hold a judge's answers ({e}); remove it") from e
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines or [self.who]).encode())
        self.path = path


def submit(judge, images, prompts):
    """Start to score -> a function that waits for the R (B,). The small judges of reward.py score at once."""
    if isinstance(judge, Panel):
        return judge.submit(images, prompts)
    scores = judge.score(images, prompts)
    return lambda: scores


def open_judges(specs, device="cpu", full_stop=False, **server):
    """Specs as on the command line -> Panel. server: workers, timeout, retries of `ServerJudge`. UserError if one cannot be opened."""
    question = QUESTION + "." * full_stop
    return Panel([TransformersJudge(spec.removeprefix("transformers:"), device, question) if spec.startswith("transformers:")
                  else ServerJudge(spec, question, **server) for spec in specs])


def check_spec(spec):
    """UserError for a --judge that can be none of this file's, or that has a secret in it, before anything is printed or asked."""
    try:
        parts = urlsplit(spec)
        secret, host = "@" in parts.netloc or bool(parts.query), parts.hostname if parts.port is None else f"{parts.hostname}:{parts.port}"
    except ValueError:                                  # a port that is no number, a bracket left open
        secret, host = False, None
    if secret:
        raise UserError("--judge: has a password or a query in its URL, where logs would show it; put the key into the environment variable "
                        "JUDGE_API_KEY")
    if not spec.startswith("transformers:") and (not is_elsewhere(spec) or not host):
        raise UserError(f"--judge {spec}: should be http://HOST:PORT/v1, with #MODEL for one of several, or transformers:DIR")


def is_elsewhere(spec):
    """Whether a --judge names one of this file's judges, and not one of a run folder."""
    return spec.startswith(("transformers:", "http://", "https://"))


# ---------------------------------------------------------------------------------------------------------------------
# A server

class ServerJudge:
    """An OpenAI-compatible server: POST /v1/chat/completions with the picture as a data URL, one token, its log-prob and its rivals'.

    At most `workers` requests are under way. One that fails to connect, is cut off, takes more than `timeout` seconds or is
    answered by 429 or 5xx is repeated up to `retries` times, after 0, 1, 2, 4... seconds (at most 30), with jitter, or when the server
    says (Retry-After). After that, and after an answer that repeating would not mend, JudgeError; what waits is dropped."""

    def __init__(self, url, question=QUESTION, workers=16, timeout=60.0, retries=8):
        try:
            import urllib3
        except ImportError:
            raise UserError(f"--judge {url}: pip install urllib3, which asks it") from None
        check_spec(url)
        self.url, _, model = url.partition("#")
        self.url = self.url.rstrip("/") + ("" if urlsplit(self.url).path.strip("/") else "/v1")
        self.own_variable = "JUDGE_API_KEY_" + re.sub("[^A-Z0-9]", "_", urlsplit(self.url).netloc.upper())
        variable = self.own_variable if self.own_variable in os.environ else "JUDGE_API_KEY"
        self.key, self.question, self.failed = os.environ.get(variable, ""), question, None
        if not self.key.isprintable() or not self.key.isascii():
            raise UserError(f"{variable}: holds characters that no HTTP header can carry; set it again, without a line break")
        self.again = urllib3.Retry(retries, allowed_methods=None, status_forcelist=PASSING, backoff_factor=0.5, backoff_max=30, backoff_jitter=0.5,
                                   retry_after_max=120, raise_on_status=False)
        self.http = urllib3.PoolManager(maxsize=workers, block=True, retries=self.again,
                                        timeout=urllib3.Timeout(connect=min(10.0, timeout), read=timeout))
        self.errors = urllib3.exceptions.HTTPError
        self.workers = ThreadPoolExecutor(workers, thread_name_prefix="judge")
        self.model = model or self.only_model()
        self.name, self.who = f"{self.url}#{self.model}", self.model            # who it is does not depend on where it is

    def request(self, method, path, body=None, retries=None):
        """-> the answer's JSON. JudgeError says what is wrong, for a reader who can mend it."""
        headers, again = {"Authorization": f"Bearer {self.key}"} if self.key else {}, self.again if retries is None else self.again.new(total=retries)
        try:
            response = self.http.request(method, self.url + path, json=body, headers=headers, redirect=False, retries=again)
        except self.errors as e:
            reason = getattr(e, "reason", None) or e
            raise JudgeError(f"{self.url}: the judge is gone ({self.safe(reason)}; asked {again.total + 1} times); see that it runs") from e
        if response.status in (401, 403):
            raise JudgeError(f"{self.url}: the judge {'refuses the key' if self.key else 'wants a key'} (status {response.status}); set the environment "
                             f"variable JUDGE_API_KEY, or {self.own_variable} for this server alone")
        said = response.data.decode(errors="replace")
        if response.status != 200:
            said = message_of(said)
        if response.status in PASSING:                  # of some a server never thinks better: vLLM says 500 to a picture that is too large
            raise JudgeError(f"{self.url}{path}: the judge is gone, or cannot do this: status {response.status}, asked {again.total + 1} times: {self.safe(said)}")
        if response.status != 200:
            raise JudgeError(f"{self.url}{path}: status {response.status}: {self.safe(said)}")
        try:
            return json.loads(said)
        except ValueError as e:
            raise JudgeError(f"{self.url}{path}: no JSON: {self.safe(said)!r} ({e}); is it an OpenAI-compatible server?") from e

    def safe(self, text, most=300):
        """What a server said, short, on one line, and without the key should it quote it."""
        text = " ".join(str(text).split())
        return (text.replace(self.key, "(key)") if self.key else text)[:most]

    def only_model(self):
        answer = self.request("GET", "/models", retries=min(3, self.again.total))           # who opens a judge need not wait long
        try:
            names = [str(entry["id"]) for entry in answer["data"]]
        except (KeyError, TypeError) as e:
            raise JudgeError(f"{self.url}/models: names no models: {self.safe(answer)}; give the name: --judge {self.url}#NAME") from e
        if len(names) != 1:
            raise JudgeError(f"{self.url}: has {len(names)} models ({', '.join(names)}); choose one: --judge {self.url}#NAME")
        return names[0]

    def ask(self, image, prompt):
        """image (H, W, 3) uint8, a string -> R."""
        if self.failed:                                 # another request found the judge gone: this one need not wait for it too
            raise self.failed
        content = [{"type": "image_url", "image_url": {"url": data_url(image)}}, {"type": "text", "text": asked(self.question, prompt)}]
        try:
            answer = self.request("POST", "/chat/completions", {
                "model": self.model, "messages": [{"role": "user", "content": content}], "max_tokens": 1, "temperature": 0,
                "logprobs": True, "top_logprobs": TOP_LOGPROBS})
            return answer_probability(listed_tokens(answer))
        except JudgeError as e:
            told = type(e)(f"judge {self.safe(e, 1000)}" if isinstance(e.__cause__, self.errors)
                           else f"judge {self.name}, prompt {prompt[:60]!r}: {self.safe(e, 1000)}")
            if not isinstance(e, UnreadableAnswer):     # which says nothing of the next one
                self.failed = self.failed or told
            raise told from e

    def submit(self, images, prompts):
        """Start to ask -> a function that waits for the R (B,) fp32. Answers come in any order; R does not."""
        futures = [self.workers.submit(self.ask, image, prompt) for image, prompt in zip(images, prompts)]

        def answers():
            waiting, known = futures, 0
            while waiting:
                done, waiting = wait(futures, timeout=PATIENCE, return_when=FIRST_EXCEPTION)
                if any(future.exception() for future in done):
                    break
                if waiting and len(done) == known:
                    tqdm.write(f"judge {self.name}: no answer for {PATIENCE} s, {len(waiting)} to come; it is asked again until it has to be gone",
                               file=sys.stderr)
                known = len(done)
            for future in waiting:
                future.cancel()
            for future in done:
                future.result()
            return torch.tensor([future.result() for future in futures])
        return answers

    def score(self, images, prompts):
        return self.submit(images, prompts)()


def message_of(body):
    """What is told in an error's body, in OpenAI's schema or not."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body


def asked(question, prompt):
    """A question about a prompt. Lone surrogates are legal in a Python string, but not in what is sent."""
    return question.format(prompt=prompt.encode("utf-8", "replace").decode())


def data_url(image):
    """image (H, W, 3) uint8 -> a PNG, which changes no pixel, as a data URL."""
    png = io.BytesIO()
    Image.fromarray(image).save(png, "png")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def listed_tokens(answer):
    """A chat completion in OpenAI's schema -> [(token, log-prob)] of the first token's most probable rivals and the token itself."""
    try:
        logprobs = answer["choices"][0]["logprobs"]
        first = logprobs["content"][0] if logprobs else None
        listed = [(e["token"], e["logprob"]) for e in first["top_logprobs"]] if first else []
        if first and first["token"] not in dict(listed):
            listed.append((first["token"], first["logprob"]))
    except (KeyError, IndexError, TypeError) as e:
        raise JudgeError(f"not a chat completion with log-probs: {json.dumps(answer)}") from e
    if not listed:
        raise JudgeError("answers without log-probs, of which the score is made; this server does not give them, or has them switched off")
    for token, logprob in listed:
        if not isinstance(token, str) or type(logprob) not in (int, float) or not logprob <= 1e-3:        # NaN fails the comparison
            raise JudgeError(f"token {token!r} has log-prob {logprob!r}")
    return listed


def answer_probability(listed):
    """[(token, log-prob)] of the answer's most probable tokens -> R = P(yes) / (P(yes) + P(no)).

    If one of the two answers is not listed, all of its spellings are below the least probable one that is: that one's probability
    stands for it, an upper bound, which keeps R from 0 and 1. If neither is, there is nothing to compare: JudgeError."""
    listed = [(token, math.exp(min(logprob, 0.0))) for token, logprob in listed if logprob > CUT]
    yes, no = (sum(p for token, p in listed if token[token.startswith(SPACES):] in words) for words in (YES, NO))
    told = ", ".join(f"{token!r} {p:.3g}" for token, p in listed[:5])
    if not yes and not no:
        raise UnreadableAnswer(f"answers neither yes nor no, but {told}; this model does not answer such a question with its first token (one "
                               "that thinks first needs that switched off)")
    if len(listed) < 2:
        raise JudgeError(f"lists {told} alone with a probability, which says nothing of the other answer; the server should list {TOP_LOGPROBS} "
                         "(top_logprobs), before any filter")
    least = min(p for _, p in listed)
    yes, no = yes or least, no or least
    return yes / (yes + no)


# ---------------------------------------------------------------------------------------------------------------------
# A local model

class TransformersJudge:
    """A folder with a vision-language model and its processor, in safetensors, through transformers. R of the raw logits of the first
    answer token, `batch` pictures at a time."""

    def __init__(self, folder, device="cpu", question=QUESTION, batch=8):
        try:
            from transformers import AutoModelForImageTextToText, AutoProcessor
        except ImportError:
            raise UserError(f"--judge transformers:{folder}: pip install transformers (Qwen2.5-VL wants torchvision too), which loads it") from None
        if not (Path(folder) / "config.json").is_file():
            raise UserError(f"--judge transformers:{folder}: has no config.json; should be a local folder of a vision-language model")
        try:
            self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
            model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, use_safetensors=True, dtype="auto")
        except (OSError, ValueError, ImportError, KeyError, SafetensorError) as e:      # what transformers raises for a folder that it cannot load
            raise UserError(f"--judge transformers:{folder}: cannot be loaded ({' '.join(str(e).split())[:300]})") from e
        self.model, self.device, self.question, self.batch = model.to(device).eval(), device, question, batch
        self.name = self.who = f"transformers:{folder}"
        self.one_at_a_time = threading.Lock()
        self.processor.tokenizer.padding_side = "left"                  # the answer then starts at the same place in every row
        vocabulary = self.processor.tokenizer.get_vocab()
        self.yes, self.no = ([vocabulary[mark + word] for word in words for mark in ("", *SPACES) if mark + word in vocabulary] for words in (YES, NO))
        if not self.yes or not self.no or not self.processor.chat_template:
            raise UserError(f"--judge {self.name}: its tokenizer has no token yes or no, or there is no chat template; it cannot answer in a word")

    @torch.no_grad()
    def submit(self, images, prompts):
        """Scores at once: images B (H, W, 3) uint8, B strings -> a function that returns the R (B,) fp32."""
        starts = range(0, len(prompts), self.batch)
        with self.one_at_a_time:                        # several threads may ask
            scores = torch.cat([self.ask(images[i:i + self.batch], prompts[i:i + self.batch]) for i in starts])
        if not scores.isfinite().all():
            raise JudgeError(f"{self.name}: logits that are not finite; load it in another dtype")
        return lambda: scores

    def ask(self, images, prompts):
        """A batch of b images (H, W, 3) uint8, b strings -> R (b,) fp32 on the CPU."""
        talks = [[{"role": "user", "content": [{"type": "image", "image": Image.fromarray(image)},
                                               {"type": "text", "text": asked(self.question, prompt)}]}] for image, prompt in zip(images, prompts)]
        try:
            inputs = self.processor.apply_chat_template(talks, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
                                                         processor_kwargs={"padding": True})
        except ValueError as e:                         # a prompt that holds the model's own mark for a picture, for one
            raise JudgeError(f"{self.name}: cannot be asked about one of {', '.join(repr(prompt[:60]) for prompt in prompts)} ({e})") from e
        # generate knows each model's own positions under padding; output_logits are those that no filter has touched
        answer = self.model.generate(**inputs.to(self.device, self.model.dtype), max_new_tokens=1, do_sample=False, output_logits=True,
                                     return_dict_in_generate=True)
        logits = answer.logits[0].float()                                                               # (b, V)
        return torch.sigmoid(logits[:, self.yes].logsumexp(-1) - logits[:, self.no].logsumexp(-1)).cpu()

    def score(self, images, prompts):
        return self.submit(images, prompts)()


# ---------------------------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(prog="judges.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--judge", action="append", required=True, help="http://HOST:PORT/v1, with #MODEL for one of several, or transformers:DIR")
    parser.add_argument("--image", action="append", required=True, metavar="FILE", help="a picture; may be given often")
    parser.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="asked of every picture; may be given often")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where a local judge computes (auto)")
    args = parser.parse_args(argv)
    for spec in args.judge:
        check_spec(spec)
    asked_of = [(file, prompt) for file in args.image for prompt in args.prompt]
    images, prompts = [load_image(file, None) for file, _ in asked_of], [prompt for _, prompt in asked_of]
    judges = [open_judges([spec], pick_device(args.device)) for spec in args.judge]
    scores = torch.stack([judge.score(images, prompts) for judge in judges])                            # (judges, B)
    print(*(f"R {n}: {judge.names[0]}" for n, judge in enumerate(judges, 1)), sep="\n")
    for (file, prompt), row in zip(asked_of, scores.T.tolist()):
        print("".join(f"{r:10.6f}" for r in row), f" {file}  {prompt}")
    if len(judges) > 1:
        print(f"largest difference {(scores.max(0).values - scores.min(0).values).max():.2g}")


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"error: {e}")
