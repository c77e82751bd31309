"""What every script does around its `main`: options from the signature, one line for an error, a clean Ctrl-C."""

import inspect
import json
import sys
from collections.abc import Callable
from typing import Any

import jsonargparse


def run(main: Callable[..., Any]) -> None:
    """Call `main` with each of its keywords as a command-line option, and exit.

    A user's error (`ValueError`, `OSError`, ...) becomes one line on stderr and exit status 1. An option whose type is
    a list may be repeated: `--prompt A --prompt B`.

    Args:
        main: the script's function; its module's docstring becomes the help's description.
    """
    description = inspect.getdoc(sys.modules[main.__module__])
    try:
        jsonargparse.auto_cli(
            main,
            args=_join_repeated(main, sys.argv[1:]),
            as_positional=False,
            description=description,
            formatter_class=_HelpFormatter,
        )
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        sys.exit(0)
    except (ValueError, OSError, ArithmeticError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


class _HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """Keeps the line breaks of the script's docstring."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))


def _join_repeated(main: Callable[..., Any], args: list[str]) -> list[str]:
    """Turn every `--name A --name B` of a list option into the one `--name=["A", "B"]` that the parser takes."""
    values: dict[str, list[str]] = {
        f"--{name}": []
        for name, parameter in inspect.signature(main).parameters.items()
        if "list[" in str(parameter.annotation)
    }
    rest: list[str] = []
    remaining = iter(args)
    for arg in remaining:
        option, equals, value = arg.partition("=")
        if option not in values:
            rest.append(arg)
            continue
        value = value if equals else next(remaining, None)
        if value is None:
            raise ValueError(f"{option} needs a value")
        values[option].append(value)
    return rest + [f"{option}={json.dumps(given)}" for option, given in values.items() if given]
