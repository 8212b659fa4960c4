"""The errors a user can meet, as one tree.

::

    DrafttrainError                 what was asked for did not happen  (exit status 1)
    ├── InputError                  what the user gave is wrong        (exit status 2)
    │   ├── ConfigError             the configuration file
    │   ├── CheckpointError         a policy or drafter folder, or a registry
    │   │   └── OvertakenError      a registry's latest version is another by now
    │   └── RolloutError            saved rollouts, or a spool segment
    ├── SpoolError                  the spool cannot be written (full disk, permissions)
    └── EngineError                 an engine has no plugin, or refused
        └── EngineUnreachable       it does not answer; it may come back

Every message names the file and the field and says what was expected.
"""

from __future__ import annotations

from pathlib import Path


class DrafttrainError(Exception):
    """Base of every error that is reported to the user as one line."""

    exit_status = 1


class InputError(DrafttrainError):
    """What the user gave is wrong.

    Args:
        where: the file or folder at fault.
        field: the key, tensor or part of it at fault.
        problem: what was found and what was expected.
    """

    exit_status = 2

    def __init__(self, where: str | Path, field: str, problem: str) -> None:
        super().__init__(f"{where}: {field}: {problem}")
        self.where = str(where)
        self.field = field
        self.problem = problem

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str, str]]:
        # Errors cross process boundaries; the default protocol would lose the fields.
        return type(self), (self.where, self.field, self.problem)


class ConfigError(InputError):
    """The configuration cannot be read, or a key or value in it is wrong."""


class CheckpointError(InputError):
    """A policy folder, a drafter folder or a registry is missing, damaged or does not fit."""


class OvertakenError(CheckpointError):
    """A registry's latest version is no longer the one that a new one was to follow."""


class RolloutError(InputError):
    """Saved rollouts or a spool segment are missing, damaged or do not fit."""


class SpoolError(DrafttrainError):
    """The spool cannot be written: disk full, missing permissions."""


class EngineError(DrafttrainError):
    """An engine runs without the plugin, or refused what it was asked."""


class EngineUnreachable(EngineError):
    """An engine does not answer (not started, dead, network); it may come back."""
