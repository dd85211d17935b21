"""Reading values out of somebody else's config.json: typed, and refused with the key and the value."""

import json
from collections.abc import Mapping
from typing import Any

from modicum.errors import CheckpointError


class UnknownFamilyError(CheckpointError):
    """A `model_type` that has no native code; `modicum[hf]` may still run it."""


def shown(value: Any) -> str:
    """A value as config.json spells it, short enough for one line."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def refuse(key: str, value: Any, required: str) -> CheckpointError:
    return CheckpointError(f"config.json has `{key}` = {shown(value)}, where modicum needs {required}")


def integer(config: Mapping[str, Any], key: str, default: int) -> int:
    """The value of `key`; `default` where it is absent or null."""
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise refuse(key, value, "a whole number")
    return value


def number(config: Mapping[str, Any], key: str, default: float) -> float:
    """The value of `key` as a float; `default` where it is absent or null."""
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refuse(key, value, "a number")
    return float(value)


def flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """The value of `key`; `default` where it is absent or null."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise refuse(key, value, "true or false")
    return value
