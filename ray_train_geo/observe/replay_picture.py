"""The picture of a replay: devices over time, and what each policy got done (level 0)."""

from __future__ import annotations

from itertools import chain

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ray_train_geo.observe.rendering import BLUE, GRID, INK, MUTED, ORANGE, RED
from ray_train_geo.replay.outcome import Outcome
from ray_train_geo.replay.run import Replay

__all__ = ["replay_picture"]

_WIDTH, _TOP, _ROW, _FOOT = 11.2, 1.5, 1.05, 0.6  # inches
_HOUR = 3600


def replay_picture(replay: Replay) -> Figure:
    """A row for the devices that are there, and one for each policy, over hours.

    A policy's row shows samples per second that were committed for good, on one scale for all; it
    is empty where training was stopped.  A red mark is work that was lost: the larger, the more
    device-seconds.
    """
    rows = len(replay.outcomes)
    height = _TOP + _ROW * rows + _FOOT
    figure = Figure(figsize=(_WIDTH, height))
    heights = [_TOP, *[_ROW] * rows]
    found = figure.subplots(
        rows + 1, 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    figure.subplots_adjust(0.06, _FOOT / height, 0.985, 1 - 0.32 / height, hspace=0.5)
    panels: list[Axes] = found[:, 0].tolist()
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GRID)
        axes.tick_params(colors=MUTED, labelsize=8)
    _devices(panels[0], replay)
    top = max((rate for o in replay.outcomes for *_, rate in o.rates()), default=0.0)
    worst = max((lost for o in replay.outcomes for _, lost in o.losses()), default=1.0)
    for axes, outcome in zip(panels[1:], replay.outcomes, strict=True):
        _policy(axes, outcome, top or 1.0, worst)
    panels[-1].set_xlim(0, replay.fleet.end_s / _HOUR)
    panels[-1].set_xlabel("hours", color=INK, fontsize=9)
    return figure


def _devices(axes: Axes, replay: Replay) -> None:
    fleet = replay.fleet
    stretches = [(a, b, float(len(fleet.devices(nodes)))) for a, b, nodes in fleet.phases]
    _steps(axes, stretches, MUTED)
    axes.set_ylim(0, 1.1 * max((n for *_, n in stretches), default=1.0) or 1.0)
    _title(axes, f"{replay.trace}: devices", f"{fleet.mean_devices:.3g} on average")


def _policy(axes: Axes, outcome: Outcome, top: float, worst: float) -> None:
    colour = BLUE if outcome.policy == "ours" else ORANGE
    _steps(axes, outcome.rates(), colour)
    axes.set_ylim(0, 1.2 * top)
    axes.set_ylabel("samples/s", color=MUTED, fontsize=8)
    losses = outcome.losses()
    if losses:
        axes.scatter(
            [time_s / _HOUR for time_s, _ in losses],
            [1.12 * top] * len(losses),
            s=[4 + 40 * lost / worst for _, lost in losses],
            color=RED,
            marker="v",
            linewidths=0,
        )
    price = outcome.usd_per_million_tokens(outcome.market_type)
    dollars = "" if price is None else f", ${price:.3g} per million tokens"
    said = f"goodput {outcome.goodput:.1%}, {outcome.samples_per_s:.3g} samples/s{dollars}"
    _title(axes, outcome.policy, said)


def _steps(axes: Axes, stretches: list[tuple[float, float, float]], colour: str) -> None:
    """A filled curve that jumps."""
    times = list(chain.from_iterable((a / _HOUR, b / _HOUR) for a, b, _ in stretches))
    values = list(chain.from_iterable((value, value) for *_, value in stretches))
    axes.fill_between(times, values, color=colour, alpha=0.75, linewidth=0)


def _title(axes: Axes, name: str, said: str) -> None:
    axes.set_title(name, loc="left", fontsize=9.5, color=INK, fontweight="bold", pad=3)
    axes.set_title(said, loc="right", fontsize=8.5, color=MUTED, pad=3)
