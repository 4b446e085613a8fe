"""What clouds say to a machine, each as its documentation has it, and what else may come back."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import threading
import time
from collections.abc import Iterator

import fake_metadata as fake
import pytest
from fake_metadata import FakeMetadata, serving
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_train_geo.cluster.notices import (
    MetadataError,
    Notice,
    NoticeSource,
    detect_cloud,
    notice_source,
)

CLOUDS = {"aws": fake.aws, "gcp": fake.gcp, "azure": fake.azure}

each_cloud = pytest.mark.parametrize("cloud", sorted(CLOUDS))


@contextlib.contextmanager
def cloud_of(server: FakeMetadata, timeout_s: float = 2.0) -> Iterator[NoticeSource]:
    with serving(server):
        yield notice_source(server.cloud, server.url, timeout_s)


def event(kind: str, not_before: str, *machines: str) -> str:
    return json.dumps(
        {
            "DocumentIncarnation": 7,
            "Events": [
                {
                    "EventId": "f020ba2e-3bc0-4c40-a10b-86575a9eabd5",
                    "EventType": kind,
                    "ResourceType": "VirtualMachine",
                    "Resources": list(machines),
                    "EventStatus": "Scheduled" if not_before else "Started",
                    "NotBefore": not_before,
                }
            ],
        }
    )


@each_cloud
def test_a_machine_without_notice(cloud: str) -> None:
    with cloud_of(CLOUDS[cloud]()) as source:
        assert source.poll() is None
        assert source.cloud == cloud


def test_aws_spot_interruption() -> None:
    server = fake.aws()
    server.answers[fake.AWS_ACTION] = '{"action": "terminate", "time": "2017-09-18T08:22:00Z"}'
    server.answers[fake.AWS_REBALANCE] = '{"noticeTime": "2017-09-18T08:20:00Z"}'
    with cloud_of(server) as source:
        said = "spot instance-action terminate at 2017-09-18T08:22:00Z"
        assert source.poll() == Notice("preemption", 1505722920.0, "aws", said)


def test_aws_interruption_without_a_usable_time_is_in_two_minutes() -> None:
    server = fake.aws()
    server.answers[fake.AWS_ACTION] = '{"action": "stop", "time": "soon"}'
    with cloud_of(server) as source:
        notice = source.poll()
    assert notice.kind == "preemption"
    assert notice.deadline_unix_s == pytest.approx(time.time() + 120, abs=5)


def test_aws_rebalance_recommendation_has_no_deadline() -> None:
    server = fake.aws()
    server.answers[fake.AWS_REBALANCE] = '{"noticeTime": "2020-10-27T08:22:00Z"}'
    with cloud_of(server) as source:
        notice = source.poll()
    assert (notice.kind, notice.deadline_unix_s) == ("rebalance", math.inf)


def test_aws_token_is_kept_until_it_is_refused() -> None:
    server = fake.aws()
    with cloud_of(server) as source:
        for _ in range(3):
            source.poll()
        assert server.seen.count(("PUT", fake.AWS_TOKEN)) == 1
        server.token = "token-2"
        server.answers[fake.AWS_ACTION] = '{"action": "terminate", "time": "2017-09-18T08:22:00Z"}'
        assert source.poll().kind == "preemption"
        assert server.seen.count(("PUT", fake.AWS_TOKEN)) == 2


def test_aws_token_is_renewed_before_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    server = fake.aws()
    with cloud_of(server) as source:
        source.poll()
        late = time.monotonic() + 4 * 3600
        monkeypatch.setattr(time, "monotonic", lambda: late)
        source.poll()
        assert server.seen.count(("PUT", fake.AWS_TOKEN)) == 2


def test_gcp_preemption_is_in_half_a_minute() -> None:
    server = fake.gcp()
    server.answers[fake.GCP_PREEMPTED] = "TRUE"
    with cloud_of(server) as source:
        notice = source.poll()
    assert (notice.kind, notice.source) == ("preemption", "gcp")
    assert notice.deadline_unix_s == pytest.approx(time.time() + 30, abs=5)


@pytest.mark.parametrize(
    ("event", "kind"),
    [("TERMINATE_ON_HOST_MAINTENANCE", "maintenance"), ("MIGRATE_ON_HOST_MAINTENANCE", None)],
)
def test_gcp_maintenance_counts_if_it_ends_the_machine(event: str, kind: str | None) -> None:
    server = fake.gcp()
    server.answers[fake.GCP_MAINTENANCE] = event
    with cloud_of(server) as source:
        notice = source.poll()
    assert (notice.kind if notice else None) == kind
    if notice:
        assert notice.deadline_unix_s == pytest.approx(time.time() + 60, abs=5)


@pytest.mark.parametrize(
    ("event_type", "kind"),
    [
        ("Preempt", "preemption"),
        ("Terminate", "preemption"),
        ("Reboot", "maintenance"),
        ("Redeploy", "maintenance"),
        ("Freeze", None),
        ("Somersault", None),
    ],
)
def test_azure_scheduled_events(event_type: str, kind: str | None) -> None:
    server = fake.azure()
    server.answers[fake.AZURE_EVENTS] = event(event_type, "Mon, 19 Sep 2016 18:29:47 GMT", "vm-0")
    with cloud_of(server) as source:
        notice = source.poll()
    assert (notice.kind if notice else None) == kind
    if notice:
        assert notice.deadline_unix_s == 1474309787.0
        assert notice.text == f"{event_type} not before Mon, 19 Sep 2016 18:29:47 GMT"


def test_azure_event_that_has_started_ends_the_machine_now() -> None:
    server = fake.azure()
    server.answers[fake.AZURE_EVENTS] = event("Preempt", "", "vm-0")
    with cloud_of(server) as source:
        assert source.poll().deadline_unix_s == pytest.approx(time.time(), abs=5)


def test_azure_tells_all_machines_of_a_scale_set_of_each_others_events() -> None:
    server = fake.azure()
    when = "Mon, 19 Sep 2016 18:29:47 GMT"
    with cloud_of(server) as source:
        server.answers[fake.AZURE_EVENTS] = event("Preempt", when, "vm-1", "vm-2")
        assert source.poll() is None
        server.answers[fake.AZURE_EVENTS] = event("Preempt", when, "vm-1", "vm-0")
        assert source.poll().kind == "preemption"


def test_azure_most_urgent_event_counts() -> None:
    server = fake.azure()
    events = [
        *json.loads(event("Reboot", "Mon, 19 Sep 2016 18:44:47 GMT", "vm-0"))["Events"],
        *json.loads(event("Preempt", "Mon, 19 Sep 2016 18:29:47 GMT", "vm-0"))["Events"],
    ]
    server.answers[fake.AZURE_EVENTS] = json.dumps({"Events": events})
    with cloud_of(server) as source:
        assert source.poll().kind == "preemption"


@each_cloud
def test_the_cloud_is_found_out(cloud: str) -> None:
    with serving(CLOUDS[cloud]()) as server:
        assert detect_cloud(server.url, timeout_s=2.0).cloud == cloud


def test_no_cloud() -> None:
    with serving(FakeMetadata("router", {})) as server:
        assert detect_cloud(server.url) is None
    assert detect_cloud(server.url) is None  # and nobody listens there any more


def test_a_server_that_says_yes_to_everything_is_no_google() -> None:
    portal = FakeMetadata("portal", {fake.GCP_PREEMPTED: "TRUE"})
    with serving(portal), pytest.raises(MetadataError, match="not what this cloud would say"):
        notice_source("gcp", portal.url).poll()


WATCHED = {"aws": fake.AWS_ACTION, "gcp": fake.GCP_PREEMPTED, "azure": fake.AZURE_EVENTS}
GARBAGE = [b"", b"\xff\xfe\x00", b"<html>", b"null", b"[]", b"{}", b'{"Events": 3}', b"[" * 9999]


@pytest.mark.parametrize("cloud", ["aws", "azure"])
@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda g: repr(g[:12]))
def test_garbage_is_no_notice_and_is_told(cloud: str, garbage: bytes) -> None:
    server = CLOUDS[cloud]()
    server.answers[WATCHED[cloud]] = garbage
    with cloud_of(server) as source, pytest.raises(MetadataError, match=r"http://127.0.0.1"):
        source.poll()


def test_garbage_among_azure_events_hides_none() -> None:
    server = fake.azure()
    good = json.loads(event("Preempt", "Mon, 19 Sep 2016 18:29:47 GMT", "vm-0"))["Events"]
    bad = [None, 3, "Preempt", {}, {"EventType": "Preempt"}, {"EventType": [], "Resources": "vm-0"}]
    server.answers[fake.AZURE_EVENTS] = json.dumps({"Events": [*bad, *good]})
    with cloud_of(server) as source:
        assert source.poll().deadline_unix_s == 1474309787.0


@each_cloud
def test_errors_of_the_server_are_told_and_pass(cloud: str) -> None:
    server = CLOUDS[cloud]()
    server.answers.setdefault(WATCHED[cloud], "{}")
    with cloud_of(server) as source:
        server.status = 500
        with pytest.raises(MetadataError, match="500"):
            source.poll()
        server.status = 200
        if cloud == "aws":
            del server.answers[fake.AWS_ACTION]
        assert source.poll() is None


@each_cloud
def test_a_slow_server_does_not_hold_the_watcher(cloud: str) -> None:
    server = CLOUDS[cloud]()
    server.delay_s = 5.0
    with cloud_of(server, timeout_s=0.1) as source:
        began = time.monotonic()
        with pytest.raises(MetadataError, match="timed out"):
            source.poll()
        assert time.monotonic() - began < 2.0


@contextlib.contextmanager
def talking(reply: bytes, pause_s: float = 0.0) -> Iterator[str]:
    """A server of one connection that sends ``reply`` byte by byte: its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def talk() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                head, body = reply[:-40], reply[-40:]
                connection.sendall(head)
                for byte in body:
                    connection.sendall(bytes([byte]))
                    time.sleep(pause_s)

        thread = threading.Thread(target=talk)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            thread.join()


def test_a_body_that_drips_is_given_up() -> None:
    head = b"HTTP/1.1 200 OK\r\nMetadata-Flavor: Google\r\nContent-Length: 40\r\n\r\n"
    with talking(head + b" " * 40, pause_s=0.05) as url:
        began = time.monotonic()
        with pytest.raises(MetadataError, match="timed out"):
            notice_source("gcp", url, timeout_s=0.2).poll()
        assert time.monotonic() - began < 1.5


def test_what_is_not_http_is_told() -> None:
    with (
        talking(b"SSH-2.0-OpenSSH_9.6" + b"\r\n" * 30) as url,
        pytest.raises(MetadataError, match="does not answer"),
    ):
        notice_source("gcp", url).poll()


def test_what_gke_hides_from_pods_is_told_and_not_taken_for_peace() -> None:
    with serving(FakeMetadata("gcp", {})) as server:
        with pytest.raises(MetadataError, match="404"):
            notice_source("gcp", server.url).poll()
        assert detect_cloud(server.url) is None


def test_a_proxy_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "")
    with cloud_of(fake.gcp()) as source:
        assert source.poll() is None


@settings(max_examples=40, deadline=None)
@given(st.text() | st.none() | st.integers() | st.just("9999-12-31T23:59:59Z"))
def test_any_time_gives_a_deadline(server: FakeMetadata, written: object) -> None:
    server.answers[fake.AWS_ACTION] = json.dumps({"action": "terminate", "time": written})
    assert math.isfinite(notice_source("aws", server.url).poll().deadline_unix_s)


@pytest.fixture(scope="module")
def server() -> Iterator[FakeMetadata]:
    with serving(fake.aws()) as running:
        yield running
