"""The class of every command: an option that holds one value is refused when it is given twice."""

from __future__ import annotations

from collections import Counter
from typing import Any

from typer.core import TyperCommand, TyperOption

from qlora_kit.errors import ConfigError


class Verb(TyperCommand):
    """A command that takes each option once, where Typer would forget all but the last value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line.

        Raises:
            ConfigError: An option that holds one value was given more than once.
        """
        if args or not self.no_args_is_help:
            _, _, given = self.make_parser(ctx).parse_args(args=list(args))
            times = Counter(
                max(option.opts, key=len)
                for option in given
                if isinstance(option, TyperOption) and not (option.multiple or option.is_flag)
            )
            repeated = [name for name, count in times.items() if count > 1]
            if repeated:
                raise ConfigError(
                    f"{ctx.command_path}: {', '.join(repeated)} was given more than once",
                    expected="one value: only the last one would count",
                    fix="leave out the others, or run the command once for each",
                )
        rest: list[str] = super().parse_args(ctx, args)
        return rest
