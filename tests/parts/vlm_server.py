"""A stand-in for a vision-language model: it decodes the images that it gets, and answers."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image


@dataclass
class Reply:
    """What the server sends: a body, or nothing, perhaps late."""

    body: bytes = b""
    status: int = 200
    late: float = 0
    closes: bool = False
    headers: dict[str, str] = field(default_factory=dict)


def says(text: object) -> Reply:
    """A completion with this content."""
    return Reply(json.dumps({"choices": [{"message": {"content": text}}]}).encode())


@dataclass
class Question:
    """A request, its images decoded."""

    body: dict[str, Any]
    authorization: str | None
    grids: list[Image.Image]


@dataclass
class VlmServer:
    """Address of the server, and the questions that it got."""

    url: str = ""
    questions: list[Question] = field(default_factory=list)


@contextmanager
def vlm_server(reply: Callable[[Question, int], Reply]) -> Iterator[VlmServer]:
    """Serve until the block ends; `reply` gets each question and its number."""
    server = VlmServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            grids = []
            for part in body["messages"][0]["content"]:
                if part["type"] == "image_url":
                    head, data = part["image_url"]["url"].split(",")
                    assert head == "data:image/jpeg;base64"
                    image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
                    image.load()
                    assert image.format == "JPEG"
                    grids.append(image)
            question = Question(body, self.headers["Authorization"], grids)
            server.questions.append(question)
            answer = reply(question, len(server.questions) - 1)
            time.sleep(answer.late)
            if answer.closes:
                self.close_connection = True
                return
            try:
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                self.wfile.write(answer.body)
            except OSError:
                pass

        def log_message(self, *arguments: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
