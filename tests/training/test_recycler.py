from __future__ import annotations

import gc
import threading

import torch

from ray_train_geo.training.memory import Memory, Snapshot
from ray_train_geo.training.precision import LossScale
from ray_train_geo.training.recycler import Recycler
from ray_train_geo.training.residuals import RESIDUAL, SPARE


def test_what_was_handed_out_is_used_again_for_the_same_shape_and_type():
    recycler = Recycler()
    a, b = recycler.empty((2, 3), torch.float32), recycler.empty((2, 3), torch.float32)
    assert a is not b
    recycler.take_back([a])
    assert recycler.empty((3, 2), torch.float32) is not a
    assert recycler.empty((2, 3), torch.float64) is not a
    assert recycler.empty((2, 3), torch.float32) is a
    recycler.take_back([a, b])
    recycler.clear()
    fresh = recycler.empty((2, 3), torch.float32)
    assert fresh is not a
    assert fresh is not b


def test_what_is_not_its_own_or_has_been_taken_back_is_left_alone():
    recycler = Recycler()
    mine, foreign = recycler.empty((2,), torch.float32), torch.zeros(2)
    recycler.take_back([foreign, mine, mine])
    assert recycler.empty((2,), torch.float32) is mine
    assert recycler.empty((2,), torch.float32) is not foreign
    # A tensor that died is forgotten, whoever has its number now.
    number = id(mine)
    del mine
    gc.collect()
    assert number not in recycler._lent


def test_a_copy_does_not_follow_its_original():
    recycler, original = Recycler(), torch.arange(6.0).view(2, 3).T
    copy = recycler.copy(original)
    assert copy.is_contiguous()
    original += 1
    assert copy.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_threads_never_get_the_same_memory():
    recycler, seen = Recycler(), []

    def use(number):
        for _ in range(300):
            tensor = recycler.empty((64,), torch.float32).fill_(number)
            seen.append(bool((tensor == number).all()))
            recycler.take_back([tensor])

    threads = [threading.Thread(target=use, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 1200
    assert all(seen)


def snapshot(step, **tensors):
    return Snapshot(step, step, LossScale(1.0, 0), tensors)


def test_memory_of_old_copies_serves_the_next():
    memory, live = Memory(), {"model.w": torch.zeros(4), f"{RESIDUAL}w": torch.zeros(4)}
    places = []
    for step in range(1, 6):
        live["model.w"].fill_(step)
        copy = memory.copied(snapshot(step, **live))
        memory.forget_before(step - 1)
        memory.keep(copy)
        assert [h.step for h in memory.holdings()] == ([step - 1, step] if step > 1 else [1])
        assert memory.copies_at(step)["model.w"].tolist() == [step] * 4
        places.append(copy.tensors["model.w"].data_ptr())
    assert len(set(places)) == 3, "two are held while the next is made"


def test_what_a_peer_left_is_used_again_but_residuals_and_what_is_live_never():
    memory = Memory()
    memory.enter(1)
    pushed = {name: memory.room((3,), torch.float32) for name in ("model.w", f"{SPARE}w@d")}
    memory.take(1, 1, {"updates": 1, "loss_scale": 1.0, "good_steps": 0}, pushed)
    own = torch.zeros(3)
    memory.keep(snapshot(1, **{"exp_avg.w": own}))
    memory.go_back(0)
    assert memory.holdings() == ()
    found = [memory.room((3,), torch.float32) for _ in range(3)]
    assert found[0] is pushed["model.w"]
    for other in (pushed[f"{SPARE}w@d"], own):
        assert all(tensor is not other for tensor in found)


def test_another_generation_begins_with_memory_of_its_own():
    memory = Memory()
    memory.keep(memory.copied(snapshot(1, w=torch.zeros(3))))
    memory.go_back(0)
    memory.enter(2)
    assert memory._recycler._free == {}
