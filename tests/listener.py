"""A small HTTP server that keeps what it is sent, and answers as it is told."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Listener:
    "Its `url`, what it `got` as JSON, and how it answers: a status, or `drip` for a byte a second without end"

    def __init__(self, status: int | str = 200, on_post=lambda: None):
        self.got, self.status, self.on_post, self.stopped = [], status, on_post, False
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook/secret"

    def _handler(listener):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                listener.got.append(json.loads(body))
                listener.on_post()
                while listener.status == "drip" and not listener.stopped:
                    self.wfile.write(b"H")
                    time.sleep(0.2)
                self.send_response(listener.status if isinstance(listener.status, int) else 200)
                self.send_header("Location", listener.url)
                self.end_headers()

            def log_message(self, *_):
                pass

        return Handler

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.stopped = True
        self.server.shutdown()
        self.server.server_close()
