"""Links of a generation, made while the one before trains."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from generations import VOCAB, Generations
from local_jobs import make_job, plan_for, worst_difference

from ray_train_geo.errors import AbortedError
from ray_train_geo.planning.plan import Plan
from ray_train_geo.training.links import Links
from ray_train_geo.training.reference import run_reference
from ray_train_geo.training.runtime import StageRuntime

STEPS = 12


@pytest.fixture
def generations(tmp_path: Path) -> Iterator[Generations]:
    sets = (f"training.steps={STEPS}", "parallelism.pipelines=2", "parallelism.stages=2")
    made = Generations(make_job(tmp_path, *sets))
    yield made
    made.close()


@pytest.fixture
def plan(generations: Generations) -> Plan:
    return plan_for(generations.job, 4)


def joining(links: Mapping[int, Links], pool: ThreadPoolExecutor) -> list[Future[None]]:
    return [pool.submit(one.join) for one in links.values()]


def test_the_next_generation_begins_with_links_that_were_made_beside_the_last(
    generations: Generations, plan: Plan
) -> None:
    made: list[Mapping[int, Links]] = []
    steps_meanwhile = []

    def beside(runtimes: dict[int, StageRuntime]) -> None:
        def make() -> None:
            while runtimes[0].step < 2:
                time.sleep(0.001)
            links = generations.links(plan)
            with ThreadPoolExecutor(4) as pool:
                for joined in joining(links, pool):
                    joined.result(20)
            made.append(links)
            steps_meanwhile.append(runtimes[0].step)
            runtimes[1].interrupt(pause=True)

        threading.Thread(target=make, daemon=True).start()

    first = generations.run(plan, STEPS, before=beside)
    common = generations.settle()
    assert common is not None
    transports = {rank: dict(links.transports) for rank, links in made[0].items()}
    used = {}

    def look(runtimes: dict[int, StageRuntime]) -> None:
        used.update({rank: dict(one._links.transports) for rank, one in runtimes.items()})

    generations.run(plan, STEPS, common, before=look, ahead=made[0])

    assert 2 <= steps_meanwhile[0] <= common.step, (first, "steps went on all the while")
    assert used == transports, "nothing was joined anew"
    reference = run_reference(generations.job, generations.job.dims(VOCAB))
    records = [generations.records[step] for step in sorted(generations.records)]
    assert [record.step for record in records] == list(range(1, STEPS + 1))
    assert worst_difference(records, reference) < 1e-4


def test_an_abort_releases_those_that_wait_for_a_member(
    generations: Generations, plan: Plan
) -> None:
    links = generations.links(plan)
    missing = links.pop(3)
    with ThreadPoolExecutor(3) as pool:
        joined = joining(links, pool)
        time.sleep(0.2)
        assert not any(one.done() for one in joined)
        for one in links.values():
            one.abort()
        for waiting in joined:
            with pytest.raises(AbortedError):
                waiting.result(5)
    missing.abort()
