"""Calls that run at the same time, as the ranks of a group do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def each(calls: Sequence[Callable[[], T]]) -> list[T]:
    """Run all calls at once: their results; the first error is raised."""
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            results[index] = calls[index]()
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[i] for i in range(len(calls))]
