"""A server of a judge for the tests, a process of its own: /v1/models and /v1/chat/completions as
vLLM 0.32 answers them, and every fault that a test orders. vllm_completion.json is an answer of
the real one.

    python tests/judge_server.py [KEY [N]]      # prints its port; with a key it wants that key,
                                                # with N it answers N chat requests and dies

A request is refused, with status 400 as vLLM does, unless it is what a server of a vision-language
model can answer. P(yes) is the mean of the red values of the image, so that a test knows every
score and a policy has something to learn. A prompt orders a fault by its first words, "fault NAME
N": the first N requests with this prompt meet it, and later ones are answered.

GET /seen: every chat request so far as [{prompt, at, key, size, text}], the models that were asked
for, the most requests under way at the same time, and how many had a wrong key.
"""
import base64
import io
import json
import math
import os
import socket
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

KEY = sys.argv[1] if len(sys.argv) > 1 else ""
MORTAL = int(sys.argv[2]) if len(sys.argv) > 2 else 10**9
MODEL = "tiny-vlm"
OPENING = ' Does this image match the description "'
CLOSING = '", please directly respond with yes or no'

LOCK = threading.Lock()
SEEN = []  # every chat request
COUNTS = {}  # prompt -> requests with it
ACTIVE = [0, 0]  # under way now, and the most so far
REFUSED = []  # paths of requests with a wrong key
MODELS = []  # that a chat request has asked for


def error(status, message, kind, **fields):
    """A status, no headers, and the body of an error in OpenAI's schema."""
    return status, {}, {"error": {"message": message, "type": kind, **fields, "code": status}}


def token(text, logprob):
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def completion(listed):
    """A chat completion as vLLM's protocol.py has it. listed: [(token, log-prob)], most probable
    first, or None without log-probs."""
    logprobs = None
    if listed is not None:
        top = [token(*entry) for entry in listed]
        logprobs = {"content": [token(*listed[0]) | {"top_logprobs": top}]}
    content = listed[0][0] if listed else "Yes"
    message = {"role": "assistant", "content": content, "refusal": None, "reasoning": None}
    choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": "length",
              "stop_reason": None, "token_ids": None}
    usage = {"prompt_tokens": 300, "total_tokens": 301, "completion_tokens": 1}
    return {"id": "chatcmpl-1", "object": "chat.completion", "created": int(time.time()),
            "model": MODEL, "choices": [choice], "usage": usage, "prompt_logprobs": None}


def answer(yes):
    """P(yes) over four of the six spellings, one of them as a sentencepiece model's, and others,
    which may be spelled alike: 20 tokens in all, as with top_logprobs=20."""
    no = 1 - yes
    spread = [(" Yes", 0.7 * yes), ("yes", 0.25 * yes), ("No", 0.6 * no), ("no", 0.35 * no)]
    for i in range(16):
        spread.append((f"word{i}" if i % 4 else "", 0.05 / 16 * 0.9**i))
    spread.sort(key=lambda entry: -entry[1])
    return completion([(word, math.log(p)) for word, p in spread])


def spoken(*listed):
    """A completion with these tokens and log-probs, and its status."""
    return 200, {}, completion(listed)


TOO_LARGE = "Image size (196000000 pixels) exceeds limit"
FAULTS = {  # name: (status, headers, body)
    "429": (429, {"Retry-After": "1"}, error(429, "slow down", "rate_limit")[2]),
    "500": error(500, "a worker died", "InternalServerError"),
    "large": error(500, TOO_LARGE, "InternalServerError", param=None),
    "503": error(503, "loading", "ServiceUnavailable"),
    "redirect": (307, {"Location": "http://127.0.0.1:9/v1/chat/completions"}, {}),
    "broken": (200, {}, '{"id": "chatcmpl-1", "choices": [{"ind'),
    "html": (200, {}, "<html>a proxy's login page</html>"),
    "list": (200, {}, [1, 2]),
    "nologprobs": (200, {}, completion(None)),
    "neither": spoken(("The", -0.1), ("This", -3.0), ("A", -4.0)),
    "cut": spoken(("The", -0.1), ("Yes", -9999.0), ("no", -9999.0)),
    "alone": spoken(("Yes", -0.1)),
    "nan": spoken(("Yes", float("nan")), ("No", -1.0)),
    "onlyyes": spoken(("Yes", math.log(0.9)), ("Sure", math.log(0.05)), ("OK", math.log(0.01))),
    "onlyno": spoken(("NO", math.log(0.8)), ("Nein", math.log(0.2))),
}


def read_request(body):
    """The body of a chat request -> its image (H, W, 3), its text, and whether it is right."""
    (message,) = body["messages"]
    image_part, question = message["content"]
    kind, data = image_part["image_url"]["url"].split(",")
    image = np.array(Image.open(io.BytesIO(base64.b64decode(data))))
    text = question["text"]
    right = (body["max_tokens"] == 1 and body["temperature"] == 0 and body["logprobs"] is True
             and 1 <= body["top_logprobs"] <= 20 and message["role"] == "user"
             and kind == "data:image/png;base64"
             and text.startswith(OPENING) and text.endswith(CLOSING))
    return image, text, right


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, headers, body):
        raw = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        usual = {"Content-Type": "application/json", "Content-Length": str(len(raw))}
        for name, value in (usual | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def is_refused(self):
        given = self.headers.get("Authorization")
        if KEY and given != f"Bearer {KEY}":
            REFUSED.append(self.path)
            self.reply(401, {}, {"error": f"Unauthorized: {given}"})
            return True

    def do_GET(self):
        if self.path == "/seen":
            seen = {"requests": SEEN, "models": MODELS, "most_at_once": ACTIVE[1],
                    "refused": len(REFUSED)}
            return self.reply(200, {}, seen)
        if self.is_refused():
            return
        models = []
        for name in (MODEL, "other"):
            models.append({"id": name, "object": "model", "created": 1, "owned_by": "vllm",
                           "root": name, "parent": None, "max_model_len": 4096})
        known = {"/v1/models": models[:1], "/two/v1/models": models}
        if self.path in known:
            return self.reply(200, {}, {"object": "list", "data": known[self.path]})
        self.reply(404, {}, {"detail": "Not Found"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.is_refused():
            return
        if not self.path.endswith("/v1/chat/completions"):
            return self.reply(404, {}, {"detail": "Not Found"})
        with LOCK:
            ACTIVE[0] += 1
            ACTIVE[1] = max(ACTIVE)
        try:
            self.chat(body)
        finally:
            with LOCK:
                ACTIVE[0] -= 1

    def chat(self, body):
        MODELS.append(body["model"])
        try:
            image, text, right = read_request(body)
        except (KeyError, ValueError, TypeError) as e:
            return self.reply(*error(400, f"bad request: {e!r}", "BadRequestError", param=None))
        if not right:
            message = f"bad request: {json.dumps(body)[-300:]}"
            return self.reply(*error(400, message, "BadRequestError", param=None))
        if body["model"] != MODEL:
            message = f"The model `{body['model']}` does not exist. Valid aliases: {MODEL}."
            return self.reply(*error(404, message, "NotFoundError", param="model"))
        prompt = text[len(OPENING):-len(CLOSING)]
        with LOCK:
            SEEN.append({"prompt": prompt, "at": time.time(), "size": image.shape, "text": text,
                         "key": self.headers.get("Authorization")})
            COUNTS[prompt] = COUNTS.get(prompt, 0) + 1
            count = COUNTS[prompt]
            if len(SEEN) > MORTAL:
                os._exit(1)
        words = prompt.split()
        if words[:1] == ["fault"] and count <= int(words[2]) and self.meet_fault(words[1]):
            return
        if words[:1] == ["wait"]:
            time.sleep(float(words[1]))
        red = image[..., 0].mean() / 255
        self.reply(200, {}, answer(float(np.clip(red, 0.001, 0.999))))

    def meet_fault(self, fault):
        """Whether the fault ends the request."""
        if fault == "reset":  # no closing handshake: the client sees a connection reset
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
            self.connection.close()
        elif fault == "short":  # a body that ends before its length
            self.reply(200, {"Content-Length": "5000"}, "{")
            self.close_connection = True
        elif fault == "slow":
            time.sleep(3)
            return False
        else:
            self.reply(*FAULTS[fault])
        return True


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        # an OSError is a client that hung up, or the reset above
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


if __name__ == "__main__":
    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
