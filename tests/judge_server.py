"""A judge's server for the tests, a process of its own: /v1/models and /v1/chat/completions as vLLM 0.32 answers them, and every fault that a
test orders. (The real one was run beside it, see README, "Judges"; vllm_completion.json is an answer of it.)

    python tests/judge_server.py [KEY]          # prints its port; with a key it wants it

A request is refused, with status 400 as vLLM does, unless it is what a server of a vision-language model can answer. P(yes) is the mean
of the picture's red values, so that a test knows every score and a policy has something to learn. A prompt orders a fault by its first
words, "fault NAME N": the first N requests with this prompt meet it, and later ones are answered.

GET /seen: every chat request so far as [{prompt, at, key, size, text}], the most that were under way at once, how many had a wrong key."""
import base64
import io
import json
import math
import socket
import struct
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

KEY = sys.argv[1] if len(sys.argv) > 1 else ""
MODEL = "tiny-vlm"
OPENING, CLOSING = ' Does this image match the description "', '", please directly respond with yes or no'
SEEN, LOCK, COUNTS, ACTIVE, REFUSED = [], threading.Lock(), {}, [0, 0], []


def token(text, logprob):
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def completion(listed):
    """A chat completion as vLLM's protocol.py has it; listed: [(token, log-prob)], most probable first, or None without log-probs."""
    content = None if listed is None else {"content": [token(*listed[0]) | {"top_logprobs": [token(*entry) for entry in listed]}]}
    return {"id": "chatcmpl-1", "object": "chat.completion", "created": int(time.time()), "model": MODEL,
            "choices": [{"index": 0, "message": {"role": "assistant", "content": listed[0][0] if listed else "Yes", "refusal": None, "reasoning": None},
                         "logprobs": content, "finish_reason": "length", "stop_reason": None, "token_ids": None}],
            "usage": {"prompt_tokens": 300, "total_tokens": 301, "completion_tokens": 1}, "prompt_logprobs": None}


def answer(yes):
    """P(yes) over four of the six spellings, one of them as a sentencepiece model's, and some others, which may be spelled alike: 20 tokens in
    all, as at top_logprobs=20."""
    spread = [(" Yes", 0.7 * yes), ("yes", 0.25 * yes), ("No", 0.6 * (1 - yes)), ("no", 0.35 * (1 - yes))]
    spread += [(f"word{i}" if i % 4 else "", 0.05 / 16 * 0.9 ** i) for i in range(16)]
    return completion([(word, math.log(p)) for word, p in sorted(spread, key=lambda pair: -pair[1])])


FAULTS = {  # name: (status, headers, body)
    "429": (429, {"Retry-After": "1"}, {"error": {"message": "slow down", "type": "rate_limit", "code": 429}}),
    "500": (500, {}, {"error": {"message": "a worker died", "type": "InternalServerError", "code": 500}}),
    "large": (500, {}, {"error": {"message": "Image size (196000000 pixels) exceeds limit", "type": "InternalServerError", "param": None, "code": 500}}),
    "503": (503, {}, {"error": {"message": "loading", "type": "ServiceUnavailable", "code": 503}}),
    "redirect": (307, {"Location": "http://127.0.0.1:9/v1/chat/completions"}, {}),
    "broken": (200, {}, '{"id": "chatcmpl-1", "choices": [{"ind'),
    "html": (200, {}, "<html>a proxy's login page</html>"),
    "list": (200, {}, [1, 2]),
    "nologprobs": (200, {}, completion(None)),
    "neither": (200, {}, completion([("The", -0.1), ("This", -3.0), ("A", -4.0)])),
    "cut": (200, {}, completion([("The", -0.1), ("Yes", -9999.0), ("no", -9999.0)])),
    "alone": (200, {}, completion([("Yes", -0.1)])),
    "nan": (200, {}, completion([("Yes", float("nan")), ("No", -1.0)])),
    "onlyyes": (200, {}, completion([("Yes", math.log(0.9)), ("Sure", math.log(0.05)), ("OK", math.log(0.01))])),
    "onlyno": (200, {}, completion([("NO", math.log(0.8)), ("Nein", math.log(0.2))])),
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, headers, body):
        raw = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(raw)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def refused(self):
        if KEY and self.headers.get("Authorization") != f"Bearer {KEY}":
            REFUSED.append(self.path)
            self.reply(401, {}, {"error": f"Unauthorized: {self.headers.get('Authorization')}"})
            return True

    def do_GET(self):
        if self.path == "/seen":
            return self.reply(200, {}, {"requests": SEEN, "most_at_once": ACTIVE[1], "refused": len(REFUSED)})
        if self.refused():
            return
        two = [{"id": name, "object": "model", "created": 1, "owned_by": "vllm", "root": name, "parent": None, "max_model_len": 4096}
               for name in (MODEL, "other")]
        known = {"/v1/models": two[:1], "/two/v1/models": two}
        if self.path in known:
            return self.reply(200, {}, {"object": "list", "data": known[self.path]})
        self.reply(404, {}, {"detail": "Not Found"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.refused():
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
        try:
            (message,), = [body["messages"]]
            picture, question = message["content"]
            kind, data = picture["image_url"]["url"].split(",")
            image = np.array(Image.open(io.BytesIO(base64.b64decode(data))))
            text = question["text"]
            fine = (body["max_tokens"] == 1 and body["temperature"] == 0 and body["logprobs"] is True
                    and 1 <= body["top_logprobs"] <= 20 and message["role"] == "user" and kind == "data:image/png;base64"
                    and text.startswith(OPENING) and text.rstrip(".").endswith(CLOSING))
        except (KeyError, ValueError, TypeError) as e:
            return self.reply(400, {}, {"error": {"message": f"bad request: {e!r}", "type": "BadRequestError", "param": None, "code": 400}})
        if not fine:
            return self.reply(400, {}, {"error": {"message": f"bad request: {json.dumps(body)[-300:]}", "type": "BadRequestError", "param": None, "code": 400}})
        if body["model"] != MODEL:
            message = f"The model `{body['model']}` does not exist. Valid aliases: {MODEL}."
            return self.reply(404, {}, {"error": {"message": message, "type": "NotFoundError", "param": "model", "code": 404}})
        prompt = text[len(OPENING):text.rindex(CLOSING)]
        with LOCK:
            SEEN.append({"prompt": prompt, "at": time.time(), "key": self.headers.get("Authorization"), "size": image.shape, "text": text})
            COUNTS[prompt] = COUNTS.get(prompt, 0) + 1
        words = prompt.split()
        if words[:1] == ["fault"] and COUNTS[prompt] <= int(words[2]):
            if words[1] == "reset":                     # no closing handshake: the client sees a connection reset
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                return self.connection.close()
            if words[1] == "short":                     # a body that ends before its length
                self.reply(200, {"Content-Length": "5000"}, "{")
                self.close_connection = True
                return
            if words[1] == "slow":
                time.sleep(3)
            elif words[1] in FAULTS:
                return self.reply(*FAULTS[words[1]])
        if words[:1] == ["wait"]:
            time.sleep(float(words[1]))
        self.reply(200, {}, answer(float(np.clip(image[..., 0].mean() / 255, 0.001, 0.999))))


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # a client that hung up, or the reset above
            super().handle_error(request, client_address)


if __name__ == "__main__":
    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
