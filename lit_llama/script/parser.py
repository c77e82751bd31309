"""From a script's function to its command line: options that are its keywords, and a help that people can read.

Each keyword of `main` is an option, and its description in the docstring is the option's help. In addition to what the
parser of jsonargparse takes, these are understood:

    --resume                  a keyword that is true or false needs no value; --resume true and --no_resume work, too
    --prompt A --prompt B     a keyword that is a list may be given again and again
    --scale_range 0 1.5       a keyword that is a pair takes both numbers
    --aligner_path A          another name of --adapter_path, as --lora_path is; and so for --adapter_scale
    --quantize int8-weights   the former name of int8-fast, and int4-weights that of int4-fast

Other and former names are also understood in the file of --config.
"""

import argparse
import inspect
import re
import sys
from collections import deque
from collections.abc import Callable, Collection
from typing import Any, Literal, NoReturn, get_args, get_origin

import jsonargparse
import yaml
from jsonargparse import ActionConfigFile  # type: ignore[reportPrivateImportUsage]

# Options that say where and how a script runs, not what comes of it, and those that say what becomes of files. Options
# whose names end in one of _ENDINGS are files, too; all others are the experiment's.
_MACHINE = {"activation_checkpointing", "compile", "devices", "dtype", "host", "num_nodes", "port", "precision"}
_MACHINE |= {"logger", "quantize", "resume", "save_interval", "shard_base", "threads", "workers"}
_FILES = {"overwrite", "verify"}
_GENERAL = {"help", "config", "print_config", "debug"}
_ENDINGS = {"_dir": "FOLDER", "_file": "FILE", "_path": "PATH", "_adapter": "PATH", "_data": "FILE"}


def parse(main: Callable[..., Any], args: list[str]) -> dict[str, Any]:
    """The values of the options on a command line; what cannot be one ends the process with one line on stderr.

    Args:
        main: the script's function.
        args: the command line, without the script's name.

    Returns:
        The keywords of `main`, and `threads`, `debug` and, where `main` opens a base model, `verify`.
    """
    parser = _parser(main)
    options = parser.parse_args(_plain_options(parser, args)).as_dict()
    del options["config"]
    return options


def _parser(main: Callable[..., Any]) -> "_Parser":
    """A parser of the keywords of `main`, whose help shows them in groups."""
    parser = _Parser(description=inspect.getdoc(sys.modules[main.__module__]), formatter_class=_HelpFormatter)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of options")
    parser.add_function_arguments(main, as_group=False)
    _add_common_options(parser)
    groups = {title: parser.add_argument_group(title) for title in ("experiment", "machine", "files")}
    general = parser._optionals._group_actions
    options = [action for action in parser._actions if action.dest not in _GENERAL]
    general[:] = [action for action in general if action not in options]
    for action in options:
        file = action.dest in _FILES or any(action.dest.endswith(ending) for ending in _ENDINGS)
        title = "machine" if action.dest in _MACHINE else "files" if file else "experiment"
        groups[title]._group_actions.append(action)
        action.metavar = _type_in_words(action.dest, _annotation(action))
    for action in general:
        action.metavar = "FILE"  # of --config
        if action.dest == "print_config":
            action.help = "show all options with their values as such a file and exit"
    required = "".join(f" {action.option_strings[0]} {action.metavar}" for action in options if action.required)
    parser.usage = f"%(prog)s{required} [--option VALUE ...]"
    return parser


def _add_common_options(parser: "_Parser") -> None:
    """The options of every script, and of every script that opens a base model."""
    parser.add_argument(
        "--debug",
        type=bool,
        default=False,
        help="show the whole traceback of an error, as the environment variable ALIGNER_DEBUG=1 does",
    )
    parser.add_argument(
        "--threads",
        type=int | None,
        help="number of CPU threads of each process; if there are more processes than cores, give a small one",
    )
    if any(action.dest == "checkpoint_dir" and not action.required for action in parser._actions):  # a converted base
        parser.add_argument(
            "--verify",
            type=bool,
            default=False,
            help="first compare every byte of the base model with the hashes that its conversion wrote",
        )


def _annotation(action: argparse.Action) -> Any:
    return getattr(action, "_typehint", action.type)


def _is_flag(action: argparse.Action | None) -> bool:
    return action is not None and _annotation(action) is bool


def _type_in_words(name: str, annotation: Any) -> str:
    """What stands behind an option in the help: NUMBER, FOLDER, {none,linear}, ..."""
    for ending, word in _ENDINGS.items():
        if name.endswith(ending):
            return word
    if annotation is bool:
        return ""
    if get_origin(annotation) is Literal:
        return "{" + ",".join(map(str, get_args(annotation))) + "}"
    if annotation in (int, float):
        return "NUMBER"
    if annotation == tuple[float, float]:
        return "NUMBER NUMBER"
    parts = [_type_in_words(name, part) for part in get_args(annotation) if part is not type(None)]
    return "{" + ",".join(part.strip("{}") for part in parts) + "}" if len(parts) > 1 else "".join(parts) or "TEXT"


class _Parser(jsonargparse.ArgumentParser):
    """Says in one line what is wrong with an option, and knows former names in files of options."""

    def error(self, message: str, *_: Any, **__: Any) -> NoReturn:
        message = " ".join(message.split())
        wrong = re.search(r'key "(\w+)": .*(?:Given|Got) value: (.*)', message)
        kinds = {action.dest: action.metavar or "{true,false}" for action in self._actions}
        if wrong and wrong[1] in kinds:
            kind = str(kinds[wrong[1]])
            words = kind.strip("{}").split(",")
            choices = ", ".join(word if word.isupper() else repr(word) for word in words)  # not NUMBER
            message = f"--{wrong[1]} {wrong[2]}: " + (f"there are {choices}" if kind[0] == "{" else f"expected {kind}")
        required = re.fullmatch(r"the following arguments are required: (.*)", message)
        if required:
            message = "these options are required: " + ", ".join(f"--{name}" for name in required[1].split(", "))
        lost = re.fullmatch(r'Parser key "config": File does not exist: \'(.*)\'', message)
        if lost:
            message = f"--config: {lost[1]}: no such file"
        print(f"error: {message} (--help lists the options)", file=sys.stderr)
        sys.exit(2)

    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> jsonargparse.Namespace:
        """Parse the content of a file of options, in which names are translated like those on the command line."""
        try:
            options = yaml.safe_load(content)
        except yaml.YAMLError:
            options = None  # the error that the caller expects is raised below
        if isinstance(options, dict):
            known = {f"--{action.dest}" for action in self._actions}
            renamed = {_current_name(f"--{key}", known)[2:]: value for key, value in options.items()}
            content = yaml.safe_dump({key: _current_value(f"--{key}", value) for key, value in renamed.items()})
        return super().parse_string(content, *args, **kwargs)


class _HelpFormatter(jsonargparse.DefaultHelpFormatter):
    """Keeps the line breaks of the script's docstring, and shows each option once, with its default in words."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = ", ".join(name for name in action.option_strings if not name.endswith("+"))
        if action.nargs == 0 or action.dest == "print_config" or _is_flag(action):
            return names
        return f"{names} {action.metavar}"

    def _expand_help(self, action: argparse.Action) -> str:
        default = action.default
        if isinstance(default, list | tuple):
            default = " ".join(map(str, default))
        if action.required:
            note = " (required)"
        elif _is_flag(action):
            note = f" (on; --no_{action.dest} turns it off)" if default else ""
        elif default in (None, argparse.SUPPRESS) or action.nargs == 0 or action.dest == "print_config":
            note = ""
        else:
            note = f" (default: {default})"
        return (action.help or "") + note


def _current_name(option: str, known: Collection[str]) -> str:
    """`--adapter_path` for `--aligner_path`, `--lora_path`, ..., and so for scales, where a script has it."""
    current = re.sub(r"^--(?:aligner|llama_adapter|lora)_(path|scale|dir)$", r"--adapter_\1", option)
    return current if current in known and option not in known else option


def _current_value(option: str, value: Any) -> Any:
    """The name that a quantisation for speed has now."""
    is_name = option == "--quantize" and isinstance(value, str)
    return re.sub("^(int[48])-weights$", r"\1-fast", value) if is_name else value


def _plain_options(parser: _Parser, args: list[str]) -> list[str]:
    """The command line as the parser takes it: current names, a value for each flag, each list option once."""
    actions = {name: action for action in parser._actions for name in action.option_strings}
    plain: list[str] = []
    lists: dict[str, list[str]] = {}
    remaining = deque(args)
    while remaining:
        arg = remaining.popleft()
        option, equals, value = arg.partition("=")
        option = _current_name(option, actions)
        negated = re.sub("^--no_", "--", option)
        if option not in actions and _is_flag(actions.get(negated)) and not equals:
            plain.append(f"{negated}=false")
        elif _is_flag(actions.get(option)) and not equals and (not remaining or remaining[0].startswith("-")):
            plain.append(f"{option}=true")
        elif option in actions and "list[" in str(_annotation(actions[option])):
            lists.setdefault(option, []).append(value if equals or not remaining else remaining.popleft())
        elif option in actions and "tuple[float, float]" in str(_annotation(actions[option])) and not equals:
            pair = [remaining.popleft() for _ in range(min(2, len(remaining)))]
            plain.append(f"{option}=[{', '.join(pair)}]")
        elif option == "--quantize" and (equals or remaining):
            plain.append(f"{option}={_current_value(option, value if equals else remaining.popleft())}")
        else:
            plain.append(option + equals + value)
    return plain + [f"{option}=[{', '.join(map(_quoted, values))}]" for option, values in lists.items()]


def _quoted(text: str) -> str:
    """A text in YAML, which the parser reads lists as, and in whose quotes a character may be written by its number."""
    return '"' + "".join(c if c.isascii() and c.isalnum() else f"\\U{ord(c):08X}" for c in text) + '"'
