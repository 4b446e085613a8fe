from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

from ray_train_geo.actors.offers import Change, Offers

NOW: Any = SimpleNamespace()
CHANGE: Any = SimpleNamespace()


def test_one_change_at_a_time() -> None:
    taken: list[Change] = []
    offers = Offers(lambda: NOW, taken.append)
    assert offers.propose(lambda now: CHANGE)
    second = threading.Thread(target=offers.propose, args=(lambda now: CHANGE,))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert len(taken) == 1
    offers.resume()
    second.join(10)
    assert len(taken) == 2


def test_a_change_is_made_for_what_is_there_by_then() -> None:
    situations: list[Any] = [None, None, NOW]
    seen: list[Any] = []
    offers = Offers(lambda: situations.pop(0), lambda change: None)
    assert not offers.propose(seen.append)
    assert seen == [NOW]


def test_the_end_releases_whoever_has_something_to_offer() -> None:
    offers = Offers(lambda: NOW, lambda change: None)
    assert offers.propose(lambda now: CHANGE)
    answers: list[bool] = []
    waiting = threading.Thread(target=lambda: answers.append(offers.propose(lambda now: CHANGE)))
    waiting.start()
    offers.close()
    waiting.join(10)
    assert answers == [False]
