"""The error tree: every error that a user can meet is one of these.

    GeoError
    ├── InputError            wrong input, refused before anything starts (exit code 2)
    │   ├── SpecError         the job spec itself
    │   ├── DataError         data path, tokenizer, token files
    │   ├── PlanError         the plan can't fit: memory, layers, batch, devices
    │   ├── StorageError      run directory or checkpoint storage can't be used
    │   ├── CheckpointError   a checkpoint that can't be resumed from
    │   └── ClusterError      Ray can't be reached, or has no free devices
    └── RunError              went wrong while running (exit code 1)
        ├── WorkerError       a stage worker raised; its traceback is in a file
        ├── DivergedError     loss or gradients stopped being finite
        └── TransportError    a link failed
            ├── DeadlineError         nothing came within the deadline
            └── AbortedError          the generation was ended, by us or by a peer

A message says what was wrong, where, and what to do about it.  The same class may be raised
while running (a disk that fills up is a StorageError too); the exit code follows the class.
"""

from __future__ import annotations

__all__ = [
    "AbortedError",
    "CheckpointError",
    "ClusterError",
    "DataError",
    "DeadlineError",
    "DivergedError",
    "GeoError",
    "InputError",
    "PlanError",
    "RunError",
    "SpecError",
    "StorageError",
    "TransportError",
    "WorkerError",
]


class GeoError(Exception):
    """Base of all errors raised on purpose by ray_train_geo."""

    exit_code = 1


class InputError(GeoError):
    """The user's input can't be used as it is; nothing was started."""

    exit_code = 2


class SpecError(InputError):
    """The job spec is wrong: a misspelt field, a value out of range, an impossible batch."""


class DataError(InputError):
    """The data or the tokenizer can't be read, is empty, or does not fit the model."""


class PlanError(InputError):
    """No plan (or not the plan that was asked for) fits the devices."""


class StorageError(InputError):
    """The run directory or checkpoint storage can't be written or read."""


class CheckpointError(InputError):
    """A checkpoint is missing, incomplete, corrupt, or of another job."""


class ClusterError(InputError):
    """Ray can't be reached, or it has no devices for this job."""


class RunError(GeoError):
    """Training failed after it had started."""


class WorkerError(RunError):
    """A stage worker raised an exception of its own; the message names the traceback's file."""


class DivergedError(RunError):
    """Loss or gradients are no longer finite, at a precision that does not scale its loss."""


class TransportError(RunError):
    """A message could not be sent or received; it ends the generation for all its members."""


class DeadlineError(TransportError):
    """Nothing came from a peer within the deadline."""


class AbortedError(TransportError):
    """The transport was aborted while (or before) the operation ran."""
