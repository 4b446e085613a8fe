"""Runs one stage's actions for one step: forward, backward, and the messages between stages.

    receive F ──▶ forward ──▶ send F        receive B ──▶ backward ──▶ send B        W: weights

Where the schedule has actions W, a B computes the gradient that is sent, and W those of weights.
Sends and receives go on while the stage computes: receives are posted ahead, sends are only waited
for at the end of the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch

from ray_train_geo.errors import DeadlineError
from ray_train_geo.model.dropout import dropout_key
from ray_train_geo.model.split_backward import LeftForW
from ray_train_geo.model.stage import StageModule, next_token_loss
from ray_train_geo.observe.trace import Tracer
from ray_train_geo.schedule.actions import Action, Kind
from ray_train_geo.training.channel import Receiver, Sender

__all__ = ["Batches", "Edges", "StageExecutor", "at_full_speed"]

_POLL_S = 1e-4


class Batches(Protocol):
    """Where a first stage gets its tokens and a last stage its targets."""

    def __call__(self, step: int, microbatch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``(inputs, targets)``, int64 ``[microbatch, seq_len]``; ``microbatch`` is global."""


class Edges(NamedTuple):
    """The stage's channels; the first stage has none upstream, the last none downstream."""

    activation_in: Receiver | None
    activation_out: Sender | None
    gradient_in: Receiver | None
    gradient_out: Sender | None


def at_full_speed(kind: Kind) -> AbstractContextManager[None]:
    """The pace of a stage that takes the time that it takes."""
    return nullcontext()


class _Held(NamedTuple):
    """What a microbatch's forward leaves for its backward."""

    input: torch.Tensor
    output: torch.Tensor


class StageExecutor:
    """One stage's part of a step.

    Args:
        actions: this stage's schedule; microbatches counted within the pipeline.
        first_microbatch: global index of the pipeline's first microbatch.
        before_last_gradients: called when the next action (a W, or a whole backward) completes
            the step's gradients.
        pace: what each computation runs inside of; an emulation makes it last longer.
    """

    def __init__(
        self,
        module: StageModule,
        actions: Sequence[Action],
        first_microbatch: int,
        batches: Batches,
        edges: Edges,
        seed: int,
        tracer: Tracer,
        before_last_gradients: Callable[[], None],
        pace: Callable[[Kind], AbstractContextManager[None]] = at_full_speed,
    ) -> None:
        self._module = module
        self._actions = actions
        self._first = first_microbatch
        self._batches = batches
        self._edges = edges
        self._seed = seed
        self._tracer = tracer
        self._before_last_gradients = before_last_gradients
        self._pace = pace
        self._microbatches = sum(a.kind == "F" for a in actions)
        self._split = module.split_backward() if any(a.kind == "W" for a in actions) else None
        completes = "B" if self._split is None else "W"
        self._last_gradients = max(i for i, a in enumerate(actions) if a.kind == completes)

    def run(self, step: int, loss_factor: float, deadline_s: float) -> torch.Tensor | None:
        """Run ``step``; gradients of (mean loss of a microbatch) x ``loss_factor`` add up.

        Returns:
            The sum of the loss over all tokens of this pipeline (a last stage), or None.

        Raises:
            TransportError: a neighbour is gone or too slow.
        """
        edges, held, losses = self._edges, dict[int, _Held](), list[torch.Tensor]()
        left = dict[int, LeftForW]()
        for receiver in (edges.activation_in, edges.gradient_in):
            if receiver is not None:
                receiver.begin(step, self._microbatches)
        for sender in (edges.activation_out, edges.gradient_out):
            if sender is not None:
                sender.begin(step)
        for position, action in enumerate(self._actions):
            index = action.microbatch
            if position == self._last_gradients:
                self._before_last_gradients()
            match action.kind:
                case "F":
                    held[index] = self._forward(step, index, loss_factor, deadline_s, losses)
                case "B":
                    for_w = self._backward(step, index, held.pop(index), deadline_s)
                    if for_w is not None:
                        left[index] = for_w
                case "W":
                    self._weights(step, index, left.pop(index), deadline_s)
        for sender in (edges.activation_out, edges.gradient_out):
            if sender is not None:
                sender.finish(deadline_s)
        return torch.stack(losses).double().sum() if losses else None

    def _forward(
        self,
        step: int,
        index: int,
        loss_factor: float,
        deadline_s: float,
        losses: list[torch.Tensor],
    ) -> _Held:
        edges, microbatch, name = self._edges, self._first + index, f"F{index}"
        inputs = targets = None
        if edges.activation_in is None or edges.activation_out is None:
            inputs, targets = self._batches(step, microbatch)
        if edges.activation_in is not None:
            inputs = edges.activation_in.receive(name, index, deadline_s).requires_grad_()
        assert inputs is not None
        with self._tracer.span("forward", name, step, index), self._pace("F"):
            output = self._module(inputs, dropout_key(self._seed, step, microbatch))
            if edges.activation_out is None:
                assert targets is not None
                loss = next_token_loss(output, targets)
                losses.append(loss.detach())
                output = loss * (loss_factor / targets.numel())
            self._settle(output, deadline_s)
        if edges.activation_out is not None:
            edges.activation_out.send(output.detach(), name, index, deadline_s)
        return _Held(inputs, output)

    def _settle(self, computed: torch.Tensor, deadline_s: float) -> None:
        """In a traced step on a GPU, wait until it is done: a span is to show work, not a launch.

        The wait polls, as what is computed may wait for a peer's message.
        """
        if not self._tracer.enabled or not computed.is_cuda:
            return
        done, until = torch.cuda.Event(), time.monotonic() + deadline_s
        done.record()
        while not done.query():
            if time.monotonic() > until:
                raise DeadlineError(f"a stage's computation took longer than {deadline_s:.1f} s")
            time.sleep(_POLL_S)

    def _backward(self, step: int, index: int, held: _Held, deadline_s: float) -> LeftForW | None:
        """The whole of it, or what it leaves for W."""
        edges, name, gradient, left = self._edges, f"B{index}", None, None
        if edges.gradient_in is not None:
            gradient = edges.gradient_in.receive(name, index, deadline_s)
        with self._tracer.span("backward", name, step, index), self._pace("B"):
            if self._split is None:
                torch.autograd.backward(held.output, gradient)
                upstream = held.input.grad
            else:
                upstream, left = self._split.activations(held.input, held.output, gradient)
            self._settle(held.output, deadline_s)
        if edges.gradient_out is not None:
            assert upstream is not None
            edges.gradient_out.send(upstream, name, index, deadline_s)
        return left

    def _weights(self, step: int, index: int, left: LeftForW, deadline_s: float) -> None:
        assert self._split is not None
        with self._tracer.span("weights", f"W{index}", step, index), self._pace("W"):
            self._split.weights(left)
            self._settle(left.products[0].x, deadline_s)
