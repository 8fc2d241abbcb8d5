"""The parser of every script: its help is the module's docstring, and each flag can also be set in
the environment: ``MINIMIND_MAX_STEPS=20 python 1-pretrain.py`` is ``--max_steps 20``.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

PREFIX = "MINIMIND_"
SECRET = "--api_key"  # scripts say themselves where they take it from, and whom they give it to
HINT = f"Each flag can also be set in the environment, as {PREFIX}<FLAG> in capital letters."


class ScriptParser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that takes a flag that is not given from ``MINIMIND_<FLAG>``.

    Its value is checked as on the command line. A variable that is empty or whose flag the script
    does not have is left alone: one setting serves scripts that differ. So is one of a flag that
    excludes another one that is given. A switch takes ``true`` or ``false``, a list is split as a
    shell would.
    """

    def __init__(self, description: str | None, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(description=description, epilog=HINT, **kwargs)

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse the command line, then fill in from the environment what it does not say."""
        found = {action: from_environment(action) for action in self._actions}
        found = {action: (name, text) for action, (name, text) in found.items() if name}
        usual = {action: action.default for action in found}
        usual_of_all = self._defaults
        names = {action.dest for action in found}
        for action in found:  # what is not given stays away from the namespace
            action.default = argparse.SUPPRESS
        self._defaults = {k: v for k, v in usual_of_all.items() if k not in names}
        try:
            parsed, rest = super().parse_known_args(args, namespace)
        finally:
            for action in found:
                action.default = usual[action]
            self._defaults = usual_of_all
        given = {action for action in found if hasattr(parsed, action.dest)}
        excluded = self._excluded_by(parsed)
        used = []
        for action, (name, text) in found.items():
            if action in given:
                continue
            is_used = action not in excluded
            value = self._value(action, name, text) if is_used else action.default
            setattr(parsed, action.dest, value)
            used += [name] * is_used
        if args is None and used:
            print(f"from the environment: {', '.join(used)}", file=sys.stderr)
        return parsed, rest

    def _excluded_by(self, parsed: argparse.Namespace) -> set[argparse.Action]:
        """Return the flags that exclude one that the command line gives."""
        excluded: set[argparse.Action] = set()
        for group in self._mutually_exclusive_groups:
            members = group._group_actions
            if any(getattr(parsed, m.dest, m.default) != m.default for m in members):
                excluded.update(members)
        return excluded

    def _value(self, action: argparse.Action, name: str, text: str) -> Any:
        """Return what the flag gives with the ``text`` of variable ``name``; a bad one ends the
        script.
        """
        flag = action.option_strings[-1]
        one = argparse.ArgumentParser(prog=self.prog, add_help=False, usage=argparse.SUPPRESS)
        one.error = lambda message: self.error(f"{message} (set in the environment: {name})")
        one._add_action(action)
        is_true = False
        try:
            is_true = boolean(text)
        except argparse.ArgumentTypeError as error:
            if action.nargs == 0:
                one.error(str(error))
        if action.nargs in (0, "?") and is_true:
            words = [flag]
        elif action.nargs == 0:
            words = []
        elif action.nargs in (None, "?"):
            words = [f"{flag}={text}"]
        else:
            try:  # a backslash is part of a path on Windows
                words = [flag, *shlex.split(text, posix=os.name != "nt")]
            except ValueError as error:
                one.error(f"{name} is {text!r}: {error}")
        return getattr(one.parse_args(words), action.dest)


def boolean(text: str) -> bool:
    """Parse ``true`` or ``false``, as v1's launch commands spell them."""
    if text.lower() in ("true", "1", "yes"):
        return True
    if text.lower() in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def names_of(action: argparse.Action) -> list[str]:
    """Return the environment's names of a flag; none for what cannot be set there."""
    long = [flag for flag in action.option_strings if flag.startswith("--")]
    names = [PREFIX + flag.removeprefix("--").upper() for flag in long]
    return [] if "--help" in long or SECRET in long else names


def from_environment(action: argparse.Action) -> tuple[str, str]:
    """Return the variable that sets a flag, and what it says; "" where none does."""
    for name in names_of(action):
        text = os.environ.get(name, "")
        # Kubernetes describes a service that is called minimind so, MINIMIND_PORT among it
        if text and not text.startswith("tcp://"):
            return name, text
    return "", ""
