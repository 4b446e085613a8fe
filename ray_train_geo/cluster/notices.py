"""Notices that a cloud gives before it takes a machine away: AWS, Google Cloud, Azure.

Each cloud tells the machine itself, through a metadata server on a link-local address:

    AWS     PUT /latest/api/token, then GET /latest/meta-data/...      404: no notice
              spot/instance-action                 {"action": "terminate", "time": "...Z"}
              events/recommendations/rebalance     {"noticeTime": "...Z"}
    Google  GET /computeMetadata/v1/instance/...   Metadata-Flavor: Google
              preempted                            TRUE or FALSE
              maintenance-event                    NONE, MIGRATE_..., TERMINATE_ON_HOST_MAINTENANCE
    Azure   GET /metadata/scheduledevents          Metadata: true
              {"Events": [{"EventType": "Preempt", "Resources": ["vm"], "NotBefore": "... GMT"}]}

A source is asked every second or so; it answers from memory of the cloud, within milliseconds.

Sources: the EC2 user guide ("Spot Instance interruption notices", "EC2 instance rebalance
recommendations"), the Compute Engine documentation ("Spot VMs", "Get live migration notices") and
the Azure documentation ("Scheduled Events for Linux VMs", version 2020-07-01).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import Any, Literal, Protocol

from ray_train_geo.errors import RunError

__all__ = [
    "METADATA_URL",
    "Cloud",
    "MetadataError",
    "Notice",
    "NoticeKind",
    "NoticeSource",
    "detect_cloud",
    "notice_source",
]

NoticeKind = Literal["preemption", "rebalance", "maintenance"]
Cloud = Literal["aws", "gcp", "azure"]

METADATA_URL = "http://169.254.169.254"
"""Of all three clouds.  A number, as the search for a name is under no timeout of ours."""

_TIMEOUT_S = 2.0
_MOST_BYTES = 1 << 20

# What the clouds promise at least, for a notice that does not say when.
_AWS_WARNING_S = 120.0
_GCP_PREEMPTION_WARNING_S = 30.0
_GCP_MAINTENANCE_WARNING_S = 60.0

_AWS_TOKEN_TTL_S = 21600


class MetadataError(RunError):
    """The metadata server can't be reached, or its answer is not what this cloud would say."""


@dataclass(frozen=True, slots=True)
class Notice:
    """What a cloud says it will do to this machine.

    ``preemption`` ends the machine; ``maintenance`` restarts it elsewhere, its memory is lost;
    ``rebalance`` warns of a likely preemption.
    """

    kind: NoticeKind
    deadline_unix_s: float
    """The machine may end from then on; infinite if the cloud names no time."""
    source: str
    """``aws``, ``gcp`` or ``azure``, or who else gave notice."""
    text: str
    """What was said, for the log."""


class NoticeSource(Protocol):
    """A cloud's notices for this machine."""

    @property
    def cloud(self) -> Cloud: ...

    def probe(self) -> None:
        """Return if this is a machine of that cloud.

        Raises:
            MetadataError: it is not, or its metadata server does not answer.
        """

    def poll(self) -> Notice | None:
        """The most urgent notice in force; None if there is none.

        Raises:
            MetadataError: no usable answer; ask again later.
        """


def notice_source(
    cloud: Cloud, url: str = METADATA_URL, timeout_s: float = _TIMEOUT_S
) -> NoticeSource:
    """The source of a cloud's notices.

    Args:
        url: of the metadata server, without a path.
        timeout_s: for each request.
    """
    server = _MetadataServer(url, timeout_s)
    if cloud == "aws":
        return _AwsNotices(server)
    return _GcpNotices(server) if cloud == "gcp" else _AzureNotices(server)


def detect_cloud(url: str = METADATA_URL, timeout_s: float = _TIMEOUT_S) -> NoticeSource | None:
    """The source of this machine's notices; None on a machine of none of the three clouds.

    Takes up to three times ``timeout_s`` where nothing answers.
    """
    clouds: tuple[Cloud, ...] = ("aws", "gcp", "azure")
    for cloud in clouds:
        source = notice_source(cloud, url, timeout_s)
        try:
            source.probe()
        except MetadataError:
            continue
        return source
    return None


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    headers: Message
    text: str


class _MetadataServer:
    """HTTP to a metadata server: no proxy, and never longer than ``timeout_s`` for a body."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def request(self, path: str, headers: Mapping[str, str], method: str = "GET") -> _Answer:
        """The answer, whatever its status.

        Raises:
            MetadataError: there is none.
        """
        where = self.url + path
        ends = time.monotonic() + self._timeout_s
        try:
            request = urllib.request.Request(where, headers=dict(headers), method=method)
            with self._opener.open(request, timeout=self._timeout_s) as response:
                body = b""
                while chunk := response.read1(_MOST_BYTES):
                    body += chunk
                    if len(body) > _MOST_BYTES:
                        raise MetadataError(f"{where} answers with more than {_MOST_BYTES} bytes")
                    if time.monotonic() > ends:
                        raise TimeoutError("timed out")
                return _Answer(response.status, response.headers, body.decode("utf-8", "replace"))
        except urllib.error.HTTPError as e:
            with e:
                return _Answer(e.code, e.headers, "")
        except (OSError, http.client.HTTPException, ValueError) as e:
            raise MetadataError(f"{where} does not answer: {e or type(e).__name__}") from None

    def unusable(self, path: str, answer: _Answer) -> MetadataError:
        said = f"{answer.status} {answer.text[:80]!r}"
        return MetadataError(f"{self.url}{path} answers {said}: not what this cloud would say")


class _AwsNotices:
    """EC2's instance metadata service, version 2 only: version 1 may be switched off."""

    cloud: Cloud = "aws"

    def __init__(self, server: _MetadataServer) -> None:
        self._server = server
        self._token = ""
        self._refresh_at = -math.inf

    def probe(self) -> None:
        self._renew_token()

    def poll(self) -> Notice | None:
        action = self._get("/latest/meta-data/spot/instance-action", "action")
        if action is not None:
            deadline = _unix_s(action.get("time"))
            if deadline is None:
                deadline = time.time() + _AWS_WARNING_S
            text = f"spot instance-action {action['action']} at {action.get('time')}"
            return Notice("preemption", deadline, self.cloud, text)
        advice = self._get("/latest/meta-data/events/recommendations/rebalance", "noticeTime")
        if advice is not None:
            text = f"rebalance recommendation of {advice['noticeTime']}"
            return Notice("rebalance", math.inf, self.cloud, text)
        return None

    def _get(self, path: str, key: str) -> dict[str, Any] | None:
        """The JSON object at ``path``, which has ``key``; None where there is nothing."""
        if time.monotonic() >= self._refresh_at:
            self._renew_token()
        answer = self._ask(path)
        if answer.status == 401:  # the token is of before a restart or a clone
            self._renew_token()
            answer = self._ask(path)
        if answer.status == 404:
            return None
        found = _json_object(answer)
        if found is None or key not in found:
            raise self._server.unusable(path, answer)
        return found

    def _ask(self, path: str) -> _Answer:
        return self._server.request(path, {"X-aws-ec2-metadata-token": self._token})

    def _renew_token(self) -> None:
        path = "/latest/api/token"
        lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": str(_AWS_TOKEN_TTL_S)}
        answer = self._server.request(path, lifetime, method="PUT")
        if answer.status != 200 or not answer.text:
            raise self._server.unusable(path, answer)
        self._token = answer.text
        self._refresh_at = time.monotonic() + _AWS_TOKEN_TTL_S / 2


class _GcpNotices:
    """Compute Engine's metadata server."""

    cloud: Cloud = "gcp"

    def __init__(self, server: _MetadataServer) -> None:
        self._server = server

    def probe(self) -> None:
        self._get("preempted")

    def poll(self) -> Notice | None:
        if self._get("preempted") == "TRUE":
            deadline = time.time() + _GCP_PREEMPTION_WARNING_S
            return Notice("preemption", deadline, self.cloud, "preempted TRUE")
        event = self._get("maintenance-event")
        # A live migration (MIGRATE_ON_HOST_MAINTENANCE) is a pause of about a second: no notice.
        if event == "TERMINATE_ON_HOST_MAINTENANCE":
            # An hour for machines with GPUs, a minute for others; it is not told which.
            deadline = time.time() + _GCP_MAINTENANCE_WARNING_S
            return Notice("maintenance", deadline, self.cloud, f"maintenance-event {event}")
        return None

    def _get(self, key: str) -> str:
        """The value of a key that every instance has (but GKE hides these from pods)."""
        path = f"/computeMetadata/v1/instance/{key}"
        answer = self._server.request(path, {"Metadata-Flavor": "Google"})
        if answer.status != 200 or answer.headers.get("Metadata-Flavor") != "Google":
            raise self._server.unusable(path, answer)
        return answer.text.strip()


class _AzureNotices:
    """Azure's scheduled events.

    The first request of a machine's life switches them on and may take two minutes; until then
    :meth:`poll` raises.
    """

    cloud: Cloud = "azure"
    # A Freeze is a pause of seconds: no notice.
    _kinds: Mapping[str, NoticeKind] = {
        "Preempt": "preemption",
        "Terminate": "preemption",
        "Reboot": "maintenance",
        "Redeploy": "maintenance",
    }

    def __init__(self, server: _MetadataServer) -> None:
        self._server = server
        self._name = ""

    def probe(self) -> None:
        path = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
        answer = self._server.request(path, {"Metadata": "true"})
        if answer.status != 200 or not answer.text:
            raise self._server.unusable(path, answer)
        self._name = answer.text.strip()

    def poll(self) -> Notice | None:
        if not self._name:
            self.probe()
        path = "/metadata/scheduledevents?api-version=2020-07-01"
        answer = self._server.request(path, {"Metadata": "true"})
        found = _json_object(answer)
        events = None if found is None else found.get("Events")
        if not isinstance(events, list):
            raise self._server.unusable(path, answer)
        notices = [n for n in map(self._notice, events) if n is not None]
        return min(notices, key=lambda n: n.deadline_unix_s, default=None)

    def _notice(self, event: Any) -> Notice | None:
        """The notice in an event, if it concerns this machine: a scale set hears of all its own."""
        if not isinstance(event, dict):
            return None
        kind = self._kinds.get(str(event.get("EventType")))
        machines = event.get("Resources")
        if kind is None or not isinstance(machines, list) or self._name not in machines:
            return None
        # NotBefore is blank once the event has started.
        deadline = _unix_s(event.get("NotBefore"))
        text = f"{event['EventType']} not before {event.get('NotBefore') or 'now'}"
        return Notice(kind, time.time() if deadline is None else deadline, self.cloud, text)


def _json_object(answer: _Answer) -> dict[str, Any] | None:
    if answer.status != 200:
        return None
    try:
        found = json.loads(answer.text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _unix_s(text: Any) -> float | None:
    """Unix seconds of a time as clouds write it, ISO 8601 or RFC 5322, in UTC unless it says so."""
    if not isinstance(text, str):
        return None
    # Python 3.10 does not read the Z of ISO 8601.
    iso = f"{text[:-1]}+00:00" if text.endswith("Z") else text
    for parse, written in ((datetime.fromisoformat, iso), (parsedate_to_datetime, text)):
        with contextlib.suppress(ValueError, TypeError, IndexError, OverflowError):
            moment = parse(written)
            return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    return None
