"""The parser of every script: its help is the module's docstring, and each flag can also be set in
the environment: ``MINIMIND_MAX_STEPS=20 python 1-pretrain.py`` is ``--max_steps 20``.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

PREFIX = "MINIMIND_"
SECRET = "--api_key"  # scripts say themselves where they take it from, and whom they give it to


class ScriptParser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that reads ``MINIMIND_<FLAG>`` for each flag that is not given.

    Both are checked alike. A variable that is empty or whose flag the script does not have is left
    alone: one setting serves scripts that differ. A switch takes ``true`` or ``false``, a list is
    split as a shell would.
    """

    def __init__(self, description: str | None, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(description=description, **kwargs)
        self._variables: list[str] = []

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse what is given, and of the environment what is not."""
        given = sys.argv[1:] if args is None else list(args)
        more = self._from_environment({word.split("=")[0] for word in given})
        if args is None and self._variables:
            print(f"from the environment: {', '.join(self._variables)}", file=sys.stderr)
        return super().parse_known_args([*given, *more], namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 and the message, which says what the environment had a part in."""
        if self._variables:
            message += f" (set in the environment: {', '.join(self._variables)})"
        super().error(message)

    def _from_environment(self, given: set[str]) -> list[str]:
        words: list[str] = []
        self._variables = []
        for action in self._actions:
            flag = next((name for name in action.option_strings if name.startswith("--")), None)
            variable = PREFIX + (flag or "").removeprefix("--").upper()
            value = os.environ.get(variable)
            if flag in (None, "--help", SECRET, *given) or not value:
                continue
            self._variables.append(variable)
            if action.nargs == 0:
                words += [flag] * self._truth(variable, value)
            elif action.nargs == "+":
                words += [flag, *shlex.split(value)]
            else:
                words.append(f"{flag}={value}")
        return words

    def _truth(self, variable: str, value: str) -> bool:
        if value.lower() in ("true", "1", "yes"):
            return True
        if value.lower() not in ("false", "0", "no"):
            self.error(f"{variable} is {value!r}: expected true or false")
        return False
