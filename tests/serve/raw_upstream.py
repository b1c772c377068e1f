"""A server that answers as a test tells it to, byte by byte, and remembers what it was asked."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class RawUpstream:
    """``answer(send)`` writes the raw answer to a POST; ``send`` takes bytes and raises OSError once nobody listens.

    ``requests``: (path, headers, body) of each POST; ``gone``: set when the client of a `silent` answer hung up.
    """

    def __init__(self):
        self.requests = []
        self.answer = reply({"object": "chat.completion", "model": "model", "choices": []})
        self.models = [{"id": "model", "object": "model", "root": "/secret/path", "max_model_len": 77}]
        self.models_status = self.health = 200
        self.gone = threading.Event()
        self.url = ""

    def silent(self, send, connection):
        """Never answers; notices the hang-up."""
        assert connection.recv(1) == b""
        self.gone.set()


def reply(body, status=200, headers=""):
    """An answer of a JSON object, or of text as it stands."""
    data = body.encode() if isinstance(body, str) else json.dumps(body).encode()

    def answer(send, connection):
        send(f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{headers}".encode())
        send(f"Content-Length: {len(data)}\r\n\r\n".encode() + data)

    return answer


def stream(*pieces, end=True):
    """A chunked stream of events in these pieces; without ``end`` the connection just closes."""

    def answer(send, connection):
        send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for piece in pieces:
            send(b"%x\r\n%s\r\n" % (len(piece), piece))
        if end:
            send(b"0\r\n\r\n")

    return answer


@contextmanager
def raw_upstream():
    upstream = RawUpstream()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            found, status = ({}, upstream.health) if self.path == "/health" else (None, upstream.models_status)
            reply({"object": "list", "data": upstream.models} if found is None else found, status)(
                self.wfile.write, self.connection
            )

        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            upstream.requests.append((self.path, dict(self.headers), json.loads(body)))
            self.close_connection = True
            upstream.answer(self.wfile.write, self.connection)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    upstream.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield upstream
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
