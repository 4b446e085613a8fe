"""Calling many workers at once, and finding out which failure the others follow from."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from ray_train_geo.actors.recorder import Recorder
from ray_train_geo.errors import GeoError, TransportError, WorkerError

__all__ = ["POLL_S", "Calls", "LostWorkerError", "cause_of"]

POLL_S = 0.1
_WITNESS_S = 3.0


class LostWorkerError(Exception):
    """A worker or a link was lost: what was computed is sound, and may go on without it."""

    def __init__(self, error: GeoError) -> None:
        super().__init__(str(error))
        self.error = error


def cause_of(error: RayError) -> BaseException:
    """What a worker raised, out of Ray's wrapping."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    return cause if isinstance(cause, BaseException) else error


class Calls:
    """How a crew's workers are called; calls and results are by device id.

    Args:
        name: of the device's worker, for messages.
        lost: devices whose workers have stopped answering, and how that showed.
        abort: releases the workers that wait for one that has failed.
    """

    def __init__(
        self,
        recorder: Recorder,
        name: Callable[[str], str],
        lost: Callable[[], Mapping[str, str]],
        abort: Callable[[], None],
    ) -> None:
        self._recorder = recorder
        self._name = name
        self._lost = lost
        self._abort = abort

    def all(
        self,
        calls: Mapping[str, Any],
        within_s: float | None,
        watch: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        """Results of ``calls``; the first failure aborts the other workers' calls.

        Args:
            watch: called all the while; may raise.

        Raises:
            GeoError: what the first worker to fail raised.
            LostWorkerError: a worker or link was lost.
            GetTimeoutError: it took longer than ``within_s``.
        """
        deadline = None if within_s is None else time.monotonic() + within_s
        devices, results = {call: d for d, call in calls.items()}, dict[str, Any]()
        while len(results) < len(calls):
            waiting = [c for c, device in devices.items() if device not in results]
            done, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
            if not done:
                done, _ = ray.wait(waiting, num_returns=1, timeout=POLL_S)
            try:
                for call in done:
                    device = devices[call]
                    results[device] = ray.get(call)
                if watch is not None:
                    watch()
            except RayError as e:
                self._abort()
                raise self._root_cause(devices, device, e) from None
            except BaseException:
                self._abort()
                raise
            if deadline is not None and time.monotonic() > deadline:
                self._abort()
                raise GetTimeoutError
        return results

    def survivors(
        self, calls: Mapping[str, Any], within_s: float
    ) -> tuple[dict[str, Any], set[str]]:
        """Results of the calls that are answered, and the devices whose workers don't answer.

        Raises:
            GeoError: what a worker raised.
        """
        answers, gone = dict[str, Any](), set[str]()
        waiting = {call: device for device, call in calls.items()}
        until = time.monotonic() + within_s
        while waiting and time.monotonic() < until:
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=POLL_S)
            for call in done:
                device = waiting.pop(call)
                try:
                    answers[device] = ray.get(call)
                except RayActorError:
                    gone.add(device)
                except RayTaskError as e:
                    cause = cause_of(e)
                    if isinstance(cause, GeoError):
                        raise cause from None
                    raise self.own_error(device, e) from None
            gone |= set(self._lost())
            waiting = {call: d for call, d in waiting.items() if d not in gone}
        return answers, gone | set(waiting.values())

    def _root_cause(self, devices: Mapping[Any, str], first: str, error: RayError) -> Exception:
        """The error that the others follow from.

        A worker that dies breaks its neighbours' links, and their error may come first: so all
        are heard, and an error of one's own beats a death, which beats a broken link.
        """
        errors = {first: error, **self._heard(devices, first)}
        for device, heard in errors.items():
            cause = cause_of(heard)
            if isinstance(cause, GeoError) and not isinstance(cause, TransportError):
                return cause
            if isinstance(heard, RayTaskError) and not isinstance(cause, GeoError):
                return self.own_error(device, heard)
        for device, heard in errors.items():
            if isinstance(heard, RayActorError):
                return self.loss(device, _death(heard))
        for device, why in self._lost().items():
            return self.loss(device, why)
        cause = cause_of(error)
        kind = type(cause) if isinstance(cause, GeoError) else WorkerError
        return LostWorkerError(kind(f"{self._name(first)}: {cause}"))

    def _heard(self, devices: Mapping[Any, str], first: str) -> dict[str, RayError]:
        """What else went wrong; whoever is gone with its node would say so only much later."""
        until = time.monotonic() + _WITNESS_S
        while time.monotonic() < until:
            gone = self._lost()
            waiting = [call for call, device in devices.items() if device not in gone]
            if not waiting:
                break
            done, _ = ray.wait(waiting, num_returns=len(waiting), timeout=POLL_S)
            if len(done) == len(waiting):
                break
        errors: dict[str, RayError] = {}
        finished, _ = ray.wait(list(devices), num_returns=len(devices), timeout=0)
        for call in finished:
            if (error := _error_of(call)) is not None:
                errors[devices[call]] = error
        errors.pop(first, None)
        return errors

    def loss(self, device: str, why: str) -> LostWorkerError:
        """The worker of ``device`` was lost."""
        return LostWorkerError(WorkerError(f"{self._name(device)} was lost: {why}"))

    def own_error(self, device: str, error: RayTaskError) -> WorkerError:
        """A worker raised something that is none of our errors: a bug, here or in the job."""
        name, cause = self._name(device), cause_of(error)
        path = self._recorder.traceback("worker", {"worker": name}, str(error))
        text = str(cause).strip().splitlines()
        return WorkerError(
            f"{name} failed: {type(cause).__name__}: {text[0] if text else ''} "
            f"(full traceback: {path})"
        )


def _error_of(call: Any) -> RayError | None:
    try:
        ray.get(call)
    except RayError as e:
        return e
    return None


def _death(error: RayActorError) -> str:
    lines = str(error).strip().splitlines()
    text = next((line for line in lines[1:] if "died" in line), lines[0])
    return text.partition(" Some common causes")[0].strip()  # which are those of any death
