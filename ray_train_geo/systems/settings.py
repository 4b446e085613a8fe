"""Settings of a system: names, defaults, and reading what a user gives."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from ray_train_geo.errors import SpecError

__all__ = ["Setting", "Values", "read"]


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting.

    Args:
        default: as a user would write it; empty: chosen by the system.
        choices: all that it can be; empty: a whole number of at least 1.
        without: what an empty default means, in words.
    """

    help: str
    default: str = ""
    choices: tuple[str, ...] = ()
    without: str = "none"


@dataclass(frozen=True, slots=True)
class Values:
    """All settings of a system, as checked text; empty where the system chooses."""

    given: Mapping[str, str]

    def text(self, name: str) -> str:
        return self.given[name]

    def flag(self, name: str) -> bool:
        return self.given[name] == "yes"

    def number(self, name: str) -> int | None:
        return int(self.given[name]) if self.given.get(name) else None

    def whole(self, name: str) -> int:
        return int(self.given[name])


def read(system: str, settings: Mapping[str, Setting], given: Mapping[str, str]) -> Values:
    """The values of a system's settings.

    Raises:
        SpecError: an unknown setting or a value that it cannot have.
    """
    values = {name: setting.default for name, setting in settings.items()}
    for name, raw in given.items():
        if name not in settings:
            close = difflib.get_close_matches(name, settings, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            known = ", ".join(settings) or "none"
            raise SpecError(f"{system} has no setting {name!r}: {hint}its settings are {known}")
        values[name] = _checked(system, name, settings[name], raw.strip())
    return Values(values)


def _checked(system: str, name: str, setting: Setting, raw: str) -> str:
    if setting.choices:
        if raw not in setting.choices:
            raise SpecError(f"{system}: {name} is one of {', '.join(setting.choices)}, not {raw!r}")
        return raw
    if not raw.isdecimal() or int(raw) < 1:
        raise SpecError(f"{system}: {name} is a whole number of at least 1, not {raw!r}")
    return str(int(raw))
