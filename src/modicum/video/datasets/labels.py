"""Label maps: from the names that annotations use to the numbers of classes."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from modicum.errors import UsageError

# Names in the order of their numbers, names with numbers, or a file of either.
Labels = Sequence[str] | Mapping[str, int] | str | PathLike[str]


def read_labels(path: str | PathLike[str]) -> list[str]:
    """Names in the order of their numbers, out of a file as data sets publish them.

    json: `{"name": number}` (numbers may be strings) or `["name", ...]`. csv with the columns `id,key` (EPIC). Otherwise
    lines: `name,number` where every line ends so (Moments in Time), `number name`, or a name on each.

    Raises:
        UsageError: a file that cannot be read, or whose numbers are not 0, 1, 2 ... each once.
    """
    path = Path(path)
    content = text_of(path)
    if path.suffix.lower() == ".json":
        return in_order(parsed_json(path, content), path)
    lines = [line.strip() for line in content.splitlines() if line.strip()]
    if lines and lines[0].lower().startswith("id,key"):
        return in_order({row["key"]: row["id"] for row in csv.DictReader(io.StringIO(content))}, path)
    for separator, name_at, number_at in ((",", 0, 1), ("\t", 0, 1), (" ", 1, 0), ("\t", 1, 0), (",", 1, 0)):
        cut = [line.rsplit(separator, 1) if number_at else line.split(separator, 1) for line in lines]
        if all(len(parts) == 2 and parts[number_at].strip().isdecimal() for parts in cut):
            return in_order({parts[name_at].strip(): parts[number_at] for parts in cut}, path)
    return in_order([line.strip('"') for line in lines], path)


def write_labels(path: str | PathLike[str], labels: Sequence[str]) -> None:
    """A json file that `read_labels` reads."""
    Path(path).write_text(json.dumps(list(labels), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def in_order(names: Any, origin: object) -> list[str]:
    """Names in the order of their numbers, each number once."""
    if isinstance(names, Mapping):
        numbers = {str(name): int(number) for name, number in names.items()}
        if sorted(numbers.values()) != list(range(len(numbers))):
            raise UsageError(
                f"{origin} numbers {len(numbers)} labels otherwise than 0 to {len(numbers) - 1}, each once"
            )
        return sorted(numbers, key=numbers.__getitem__)
    labels = [str(name) for name in names]
    if len(set(labels)) != len(labels) or not labels:
        twice = next((f"{name!r} twice" for name in labels if labels.count(name) > 1), "no label")
        raise UsageError(f"{origin} holds {twice}: name every class once")
    return labels


class LabelMap:
    """Numbers of names: of `given` labels, or, without, of those met, sorted."""

    def __init__(self, given: Labels | None, met: Iterable[str], origin: object) -> None:
        if isinstance(given, str | PathLike):
            self.names = read_labels(given)
        elif given is not None:
            self.names = in_order(given, "`labels`")
        else:
            self.names = in_order(sorted(set(met)), origin)
        self._origin = origin
        self._numbers = {name: number for number, name in enumerate(self.names)}
        # Folders and files often write a label with underscores, or without the commas that a csv would trip over.
        self._plain = {plain(name): number for number, name in enumerate(self.names)}

    def number(self, name: str) -> int:
        """
        Raises:
            UsageError: a label that is not among them.
        """
        number = self._numbers.get(name, self._plain.get(plain(name)))
        if number is None:
            raise UsageError(
                f"{self._origin} has the label {name!r}, which is none of the {len(self.names)} given: give the labels "
                "that belong to it"
            )
        return number


def plain(name: str) -> str:
    """A label as folders may spell it."""
    return " ".join(name.replace("_", " ").replace(",", " ").split()).casefold()


def text_of(path: str | PathLike[str]) -> str:
    """A file's text, without the mark that some editors put before it.

    Raises:
        UsageError: it cannot be read, or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not text in UTF-8 ({error.reason} at byte {error.start}): convert it") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}): give an annotation file") from error


def parsed_json(path: str | PathLike[str], content: str) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is not json (line {error.lineno}: {error.msg}): download it again") from error


def read_json(path: str | PathLike[str]) -> Any:
    return parsed_json(path, text_of(path))


def read_rows(path: str | PathLike[str], columns: Sequence[str], needed: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a csv, by column, values stripped. A first line that names `needed` columns is the header; without
    one the columns are taken to be `columns`, in this order.

    Raises:
        UsageError: a row is too short to have what is needed.
    """
    rows = [row for row in csv.reader(io.StringIO(text_of(path)), skipinitialspace=True) if any(map(str.strip, row))]
    names, needed = list(columns), list(needed)
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    if set(needed) <= set(header):
        names, rows = header, rows[1:]
    result = []
    for row in rows:
        # More columns than names are others' additions; fewer are harmless where they are not needed.
        found = {name: cell.strip() for name, cell in zip(names, row, strict=False)}
        if not all(found.get(name) for name in needed):
            raise UsageError(
                f"{path} has a row without {' or '.join(n for n in needed if not found.get(n))}: {','.join(row)[:80]!r}; "
                f"columns {','.join(columns)} are expected"
            )
        result.append(found)
    return result
