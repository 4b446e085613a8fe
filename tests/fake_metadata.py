"""A metadata server of a cloud, on this machine, whose answers a test sets."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

AWS_ACTION = "/latest/meta-data/spot/instance-action"
AWS_REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
AWS_TOKEN = "/latest/api/token"
GCP_PREEMPTED = "/computeMetadata/v1/instance/preempted"
GCP_MAINTENANCE = "/computeMetadata/v1/instance/maintenance-event"
AZURE_NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
AZURE_EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"


@dataclass
class FakeMetadata:
    """``answers`` are bodies of 200s by path; all else is a 404.

    ``aws``, ``gcp`` and ``azure`` ask for what these clouds ask for: a token of IMDSv2, the
    header that a browser can't be led to send.
    """

    cloud: str
    answers: dict[str, str | bytes] = field(default_factory=dict)
    url: str = ""
    status: int = 200
    delay_s: float = 0.0
    token: str = "token-1"
    seen: list[tuple[str, str]] = field(default_factory=list)

    def answer(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
        self.seen.append((method, path))
        if method == "PUT":
            if self.cloud == "aws" and path == AWS_TOKEN:
                ttl = int(headers.get("x-aws-ec2-metadata-token-ttl-seconds", "0"))
                return (200, self.token.encode()) if 1 <= ttl <= 21600 else (400, b"")
            return 405, b""
        wanted = {
            "aws": ("x-aws-ec2-metadata-token", self.token, 401),
            "gcp": ("metadata-flavor", "Google", 403),
            "azure": ("metadata", "true", 400),
        }
        if self.cloud in wanted:
            name, value, refusal = wanted[self.cloud]
            if headers.get(name) != value:
                return refusal, b""
        if path not in self.answers:
            return 404, b"<html>not found</html>"
        body = self.answers[path]
        return self.status, body if isinstance(body, bytes) else body.encode()


def aws() -> FakeMetadata:
    return FakeMetadata("aws")


def gcp() -> FakeMetadata:
    return FakeMetadata("gcp", {GCP_PREEMPTED: "FALSE", GCP_MAINTENANCE: "NONE"})


def azure() -> FakeMetadata:
    no_events = '{"DocumentIncarnation": 1, "Events": []}'
    return FakeMetadata("azure", {AZURE_NAME: "vm-0", AZURE_EVENTS: no_events})


@contextlib.contextmanager
def serving(fake: FakeMetadata) -> Iterator[FakeMetadata]:
    """The server, at ``fake.url``."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        headers = {k.lower(): v for k, v in handler.headers.items()}
        status, body = fake.answer(handler.command, handler.path, headers)
        time.sleep(fake.delay_s)
        with contextlib.suppress(OSError):  # who asked has not waited
            handler.send_response(status)
            if fake.cloud == "gcp":
                handler.send_header("Metadata-Flavor", "Google")
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)

    methods = {"do_GET": answer, "do_PUT": answer, "log_message": lambda *_: None}
    handler = type("Handler", (BaseHTTPRequestHandler,), methods)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
