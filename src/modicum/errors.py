"""Refusals: each message is one sentence that says what was given, what is required and what to do about it."""


class ModicumError(Exception):
    """Base of every error that modicum raises on purpose. `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(ModicumError, ValueError):
    """An argument that cannot be honoured; the call itself has to change."""

    exit_code = 2


class CheckpointError(ModicumError):
    """Files on disk that are missing, damaged or of a kind that is not supported."""


class GenerationError(ModicumError):
    """A model that produced something no text can be drawn from, such as NaN logits."""


class MissingExtraError(ModicumError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs `{package}`, which is not installed: run `pip install 'modicum[{extra}]'`")
