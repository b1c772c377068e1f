#!/usr/bin/env python3
"""What `vllm serve` looks like from outside: takes its options, asks for its key, answers with what it was given.

A chat that says "die" ends it like a crash. With FAKE_VLLM=fail it ends before it serves.
"""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

assert sys.argv[1] == "serve"
options = dict(zip(sys.argv[3::2], sys.argv[4::2], strict=True))
if os.environ.get("FAKE_VLLM") == "fail":
    sys.exit("no accelerator here")
worker = subprocess.Popen(["sleep", "600"])  # vLLM too has worker processes


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        card = {"id": options["--served-model-name"], "object": "model", "root": sys.argv[2]}
        self.reply({"object": "list", "data": [card]} if self.path == "/v1/models" else {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        said = body["messages"][0]["content"]
        if said == "die":
            os._exit(9)
        facts = {"pid": os.getpid(), "worker": worker.pid, "options": options, "artifact": sys.argv[2]}
        message = {"role": "assistant", "content": json.dumps(facts)}
        self.reply({"object": "chat.completion", "model": body["model"], "choices": [{"index": 0, "message": message}]})

    def reply(self, data):
        if self.path != "/health" and self.headers.get("Authorization") != f"Bearer {os.environ['VLLM_API_KEY']}":
            self.send_error(401)
            return
        text = json.dumps(data).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments):
        pass


ThreadingHTTPServer((options["--host"], int(options["--port"])), Handler).serve_forever()
