"""A small OpenAI-compatible server for test_build_pairs.py, a process of its own.

    python tests/edit_server.py [N]         # answers N requests and dies

It sees what color an image has, in the middle, and speaks of nothing else. As a captioner it does
what the instruction hints; as a judge it answers yes to a description that names the color of the
image. Its first line of output is its port, and each request that it answers is one more line.
"""
import base64
import io
import json
import math
import os
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

COLORS = {(255, 0, 0): "red", (0, 255, 0): "green", (0, 0, 255): "blue"}
left = int(sys.argv[1]) if len(sys.argv) > 1 else 10**9
busy = set()  # requests that have been answered once with 503
lock = threading.Lock()


def color_of(part):
    kind, data = part["image_url"]["url"].split(",", 1)
    assert part["type"] == "image_url" and kind == "data:image/png;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
    return COLORS[image.getpixel((image.width // 2, image.height // 2))]


def captions(before, after, instruction):
    if "garble" in instruction:
        return "I would rather talk about the weather { today }."
    caption1 = f"a {before} field"
    caption2 = f"a {after} field"
    if "blind" in instruction:
        caption1 = "a green field"
        same = "same" in instruction
        caption2 = "a  green \n field" if same else "a red or blue field"
    followed = "ignored" not in instruction
    answer = {"followed": followed, "caption1": caption1, "caption2": caption2}
    return "Here you are:\n```json\n" + json.dumps(answer) + "\n```"


def answer(body):
    *images, text = body["messages"][0]["content"]
    colors = [color_of(part) for part in images]
    quoted = text["text"].split('"')[1]
    choice = {"index": 0, "finish_reason": "stop"}
    if body["max_tokens"] == 1:
        assert body["logprobs"] and len(colors) == 1
        yes = 0.9 if colors[0] in quoted else 0.1
        top = []
        for token, p in (("Yes", yes), ("No", 1 - yes)):
            top.append({"token": token, "logprob": math.log(p), "bytes": None})
        logprobs = {"content": [top[0] | {"top_logprobs": top}]}
        message = {"role": "assistant", "content": "Yes"}
        return "score", choice | {"message": message, "logprobs": logprobs}
    assert len(colors) == 2
    message = {"role": "assistant", "content": captions(*colors, quoted)}
    return "captions", choice | {"message": message, "logprobs": None}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.reply(200, {"data": [{"id": "colors-1"}]})

    def do_POST(self):
        global left
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        with lock:
            again = zlib.crc32(raw) % 3 == 0 and raw not in busy
            busy.add(raw)
            if left <= 0:
                os._exit(1)
            if not again:
                left -= 1
                kind, choice = answer(json.loads(raw))
                print(kind, flush=True)
        if again:
            return self.reply(503, {"error": "busy"})
        completion = {"id": "1", "object": "chat.completion", "model": "colors-1"}
        self.reply(200, completion | {"choices": [choice]})


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
