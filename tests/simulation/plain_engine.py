"""The same model as the engine's, in the plainest way: a reference to compare with.

No classes, no groups, no heap: at every event all flows are looked at, and all rates are found
by filling up in small steps from one flow's or resource's end to the next.
"""

from __future__ import annotations

import math

from ray_train_geo.simulation.work import Flow, PipelineWork


def plain_rates(flows: list[Flow], seconds_per_byte: list[float]) -> list[float]:
    rates = [0.0] * len(flows)
    growing = set(range(len(flows)))
    while growing:
        step = min(1 / flows[i].seconds_per_byte - rates[i] for i in growing)
        for r, per_byte in enumerate(seconds_per_byte):
            here = [i for i, flow in enumerate(flows) if r in flow.resources]
            if growing & set(here):
                free = 1 / per_byte - sum(rates[i] for i in here)
                step = min(step, free / len(growing & set(here)))
        for i in growing:
            rates[i] += max(step, 0.0)
        for r, per_byte in enumerate(seconds_per_byte):
            here = {i for i, flow in enumerate(flows) if r in flow.resources}
            if sum(rates[i] for i in here) >= (1 - 1e-12) / per_byte:
                growing -= here
        growing -= {i for i in growing if rates[i] >= (1 - 1e-12) / flows[i].seconds_per_byte}
    return rates


def plain_makespans(pipelines: list[PipelineWork], seconds_per_byte: list[float]) -> list[float]:
    """When each pipeline's last action ends.  Every flow needs a seconds_per_byte above 0."""
    arrivals = {
        (p, 0, "F", action.microbatch): 0.0
        for p, work in enumerate(pipelines)
        for action in work.actions[0]
        if action.kind == "F"
    }
    flows = [(p, s, "F", f) for p, work in enumerate(pipelines) for s, f in enumerate(work.down, 1)]
    flows += [(p, s, "B", f) for p, work in enumerate(pipelines) for s, f in enumerate(work.up)]
    of_target = {(p, s, kind): i for i, (p, s, kind, _) in enumerate(flows)}
    waiting: list[list[tuple[float, int]]] = [[] for _ in flows]  # (ready, microbatch)
    left = [0.0] * len(flows)
    on_wire: dict[int, int] = {}  # flow -> microbatch
    position = {(p, s): 0 for p, work in enumerate(pipelines) for s in range(len(work.actions))}
    free_s = dict.fromkeys(position, 0.0)
    cold_s = [flow.cold_s for *_, flow in flows]
    not_before_s = [0.0] * len(flows)
    now = 0.0
    while True:
        progress = True
        while progress:
            progress = False
            for (p, s), i in position.items():
                work = pipelines[p]
                if i == len(work.actions[s]):
                    continue
                action = work.actions[s][i]
                arrival = arrivals.get((p, s, action.kind, action.microbatch))
                if action.kind == "W":
                    arrival = 0.0  # its own B is before it
                if arrival is None or free_s[p, s] == math.inf:
                    continue
                progress = True
                each_s = {"F": work.forward_s, "B": work.backward_s, "W": work.weight_s or ()}
                seconds = each_s[action.kind][s]
                seconds *= work.pace[s][i] if work.pace else 1.0
                end = max(arrival, free_s[p, s]) + seconds
                free_s[p, s], position[p, s] = end, i + 1
                if action.kind == "F" and s == len(work.actions) - 1:
                    arrivals[p, s, "B", action.microbatch] = end
                elif action.kind == "F" or (action.kind == "B" and s > 0):
                    target = s + 1 if action.kind == "F" else s - 1
                    number = of_target[p, target, action.kind]
                    waiting[number].append((end, action.microbatch))
                    if work.blocking_sends:
                        free_s[p, s] = math.inf
            for i, queue in enumerate(waiting):
                if i not in on_wire and queue and max(queue[0][0], not_before_s[i]) <= now:
                    on_wire[i] = queue.pop(0)[1]
                    left[i] = flows[i][3].size_bytes
        active = sorted(on_wire)
        rates = plain_rates([flows[i][3] for i in active], seconds_per_byte)
        events = [now + left[i] / rate for i, rate in zip(active, rates, strict=True)]
        events += [
            max(q[0][0], not_before_s[i]) for i, q in enumerate(waiting) if q and i not in on_wire
        ]
        after = min(events, default=math.inf)
        if after == math.inf:
            assert all(i == len(pipelines[p].actions[s]) for (p, s), i in position.items())
            stages = [range(len(work.actions)) for work in pipelines]
            return [max(free_s[p, s] for s in own) for p, own in enumerate(stages)]
        for i, rate in zip(active, rates, strict=True):
            left[i] -= rate * (after - now)
            p, s, kind, flow = flows[i]
            if left[i] <= 1e-9 * flow.size_bytes:
                not_before_s[i] = after + cold_s[i]
                cold_s[i] = 0.0
                arrivals[p, s, kind, on_wire.pop(i)] = not_before_s[i] + flow.latency_s
                if pipelines[p].blocking_sends:
                    free_s[p, s - 1 if kind == "F" else s + 1] = not_before_s[i]
        now = after
