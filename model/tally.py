"""Counts of what was read, and of what was lost or changed on the way: reasons and first places."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

EXAMPLES = 3  # places remembered for each reason


class Place(NamedTuple):
    """A line of a file, counted from 1; in a JSON array also which element (0: not one)."""

    path: str
    line: int
    element: int = 0

    def __str__(self) -> str:
        return self.path + self.position

    @property
    def position(self) -> str:
        """What follows the file's name."""
        return f":{self.line} #{self.element}" if self.element else f":{self.line}"


class BadRecord(Exception):
    """A record that gives no row: ``reason`` from a fixed list, ``detail`` what stood there."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass
class Cases:
    """How often something happened, and where first: places with what stood there."""

    count: int = 0
    examples: list[tuple[Place, str]] = field(default_factory=list)

    @property
    def first(self) -> str:
        """The first place."""
        place, detail = self.examples[0]
        return f"{place} ({detail})" if detail else str(place)

    def __str__(self) -> str:
        places = []
        path = ""
        for place, detail in self.examples:
            name = place.position if place.path == path else str(place)
            places.append(f"{name} ({detail})" if detail else name)
            path = place.path
        return ", ".join(places) + (", …" if self.count > len(self.examples) else "")


@dataclass
class Tally:
    """Counts of what was read and of what was skipped, filtered out or changed, by reason.

    ``forms`` counts what the good records were read as. ``skipped`` records could not be used,
    ``filtered`` rows were good but not wanted, ``changed`` rows were kept in another form.
    ``extra`` counts rows beyond one per record (ranked answers give several pairs).
    """

    read: int = 0
    extra: int = 0
    forms: Counter[str] = field(default_factory=Counter)
    skipped: dict[str, Cases] = field(default_factory=dict)
    filtered: dict[str, Cases] = field(default_factory=dict)
    changed: dict[str, Cases] = field(default_factory=dict)

    @property
    def usable(self) -> int:
        """Rows that the records gave, before filters."""
        return self.read + self.extra - self.n_skipped

    @property
    def kept(self) -> int:
        """Rows that the records gave and the filters let through."""
        return self.usable - sum(cases.count for cases in self.filtered.values())

    @property
    def n_skipped(self) -> int:
        """Records that gave nothing."""
        return sum(cases.count for cases in self.skipped.values())

    def skip(self, reason: str, place: Place, detail: str = "") -> None:
        """Count a record that gives no row."""
        _count(self.skipped, reason, place, detail)

    def filter(self, reason: str, place: Place, detail: str = "") -> None:
        """Count a good row that the user's filters leave out."""
        _count(self.filtered, reason, place, detail)

    def change(self, reason: str, place: Place, detail: str = "") -> None:
        """Count a row that is kept, but not as it stood."""
        _count(self.changed, reason, place, detail)

    def merge(self, other: "Tally") -> None:
        """Add the counts of ``other``, which came later in the file."""
        self.read += other.read
        self.extra += other.extra
        self.forms += other.forms
        for name in ("skipped", "filtered", "changed"):
            mine: dict[str, Cases] = getattr(self, name)
            for reason, cases in getattr(other, name).items():
                known = mine.setdefault(reason, Cases())
                known.count += cases.count
                known.examples += cases.examples[: EXAMPLES - len(known.examples)]

    def report(self) -> str:
        """Return the counts as lines to print, most frequent reason first."""
        head = f"read {self.read:,} records"
        if self.extra:
            head += f", which gave {self.usable:,} rows"
        lines = [f"{head}; kept {self.kept:,}"]
        if self.forms:
            forms = ", ".join(f"{form} ({n:,})" for form, n in self.forms.most_common())
            lines.append(f"  read as {forms}")
        for title in ("skipped", "filtered", "changed"):
            reasons: dict[str, Cases] = getattr(self, title)
            if not reasons:
                continue
            lines.append(f"  {title} {sum(cases.count for cases in reasons.values()):,}:")
            for reason, cases in sorted(reasons.items(), key=lambda item: -item[1].count):
                lines.append(f"    {cases.count:>9,}  {reason}: {cases}")
        return "\n".join(lines)


def _count(reasons: dict[str, Cases], reason: str, place: Place, detail: str) -> None:
    cases = reasons.setdefault(reason, Cases())
    cases.count += 1
    if len(cases.examples) < EXAMPLES:
        cases.examples.append((place, detail))
