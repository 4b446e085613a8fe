"""How a job's gradients are summed: as they are, or by the codec that it names."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ray_train_geo.codecs.base import Codec
from ray_train_geo.codecs.make import make_codec
from ray_train_geo.codecs.sparse import SparseCodec
from ray_train_geo.codecs.workspace import Workspace
from ray_train_geo.planning.plan import Plan
from ray_train_geo.planning.sync_routes import Route, plan_route
from ray_train_geo.spec import JobSpec
from ray_train_geo.training.coded_sums import CodedSums
from ray_train_geo.training.exact_sums import ExactSums
from ray_train_geo.training.gradient_sync import Sums
from ray_train_geo.training.low_rank_sums import LowRankSums
from ray_train_geo.training.state import StageState
from ray_train_geo.transport.base import Transport

__all__ = ["gradient_sums"]


def gradient_sums(
    job: JobSpec,
    plan: Plan,
    state: StageState,
    transports: Mapping[tuple[int, ...], Transport],
    workspace: Workspace,
) -> Sums:
    """The sums of the plan's gradient-sync mode, and of ``codecs.gradients``.

    Args:
        plan: not by a ring, if there is a codec.
        transports: the group of each set of holders with more than one rank.
    """
    codecs, seed, mode = job.codecs, job.training.seed, plan.gradient_sync
    routes: dict[tuple[int, ...], Route] = {}
    if mode != "allreduce":
        routes = {holders: plan_route(plan, holders) for holders in transports}
    if codecs.gradients == "none":
        return ExactSums(state.buckets, state.buffers, transports, mode, routes)
    if codecs.gradients == "powersgd":
        assert state.residuals is not None

        def moment(name: str) -> torch.Tensor:
            return state.optimizer.moments["exp_avg"][name]

        return LowRankSums(
            state.buckets,
            state.buffers,
            transports,
            state.weights,
            moment,
            mode == "central_ps",
            codecs.powersgd_rank,
            seed,
            state.residuals,
        )

    def make(elements: int) -> Codec:
        if codecs.gradients == "topk":
            return SparseCodec(elements, workspace, codecs.topk_stride, codecs.topk_fraction)
        return make_codec(codecs.gradients, elements, workspace)

    return CodedSums(
        state.buckets,
        state.buffers,
        transports,
        routes,
        make,
        seed,
        state.residuals,
    )
