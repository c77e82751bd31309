"""Jinja's sandbox with a limit on the work of one rendering: no chat template runs for long or fills the memory.

Work is counted, not timed, so that a template that renders does so on every machine: a unit for each character of a
value that an operator, filter or call makes or reads as text, and for each that is written; a fixed price for each
operation, each turn of a loop and each member of a list. Where the size of a value can be told from its parts, as in
`"a" * 10**10`, it is counted before the value is made. What Python does within one operation, such as sorting a list
or comparing two texts, is not interrupted; its cost is bounded by what was paid for the values.
"""

import math
import re
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, generate_lorem_ipsum
from jinja2.visitor import NodeTransformer

LIMIT = 20_000_000
PER_CHARACTER = 500
_OPERATION = 50
_MEMBER = 20
_CALL = 200
_READING = 64  # characters that are searched or compared in the time in which one is written


_TEXTS = (str, bytes)
_LISTS = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)


class TooMuchWorkError(Exception):
    """A template does more than any conversation needs."""


class _Budget:
    def __init__(self, left: float, source: int) -> None:
        self.left = left
        self.source = source  # length of the template, and so of what it writes between two operations

    def spend(self, work: float) -> None:
        self.left -= work
        if self.left < 0:
            raise TooMuchWorkError("it does more work than any conversation needs")


_budget: ContextVar[_Budget | None] = ContextVar("budget", default=None)


@contextmanager
def limited(characters: int, source: int) -> Iterator[None]:
    """Bound the work of the rendering, or the compilation, that happens within.

    Args:
        characters: in the messages.
        source: characters in the template.

    Raises:
        TooMuchWorkError: the limit is reached.
    """
    token = _budget.set(_Budget(LIMIT + PER_CHARACTER * characters, source))
    try:
        yield
    finally:
        _budget.reset(token)


def size(value: Any, as_text: bool = True) -> int:
    """Price of a value: its characters, and its members with theirs, each as often as it would be written.

    Args:
        value: any.
        as_text: count the characters of members, which a list that only refers to them does not hold.
    """
    if isinstance(value, _TEXTS):
        return len(value)
    budget = _budget.get()
    total, open_values, most = 0, [value], math.inf if budget is None else budget.left
    while open_values and total <= most:
        value = open_values.pop()
        total += _MEMBER
        if isinstance(value, _TEXTS):
            total += len(value) * as_text
        elif isinstance(value, dict):
            open_values += [*value.keys(), *value.values()]
        elif isinstance(value, int):
            total += value.bit_length() // 3
        elif isinstance(value, Namespace):
            open_values += object.__getattribute__(value, "_Namespace__attrs").values()
        elif isinstance(value, _LISTS):
            open_values += value
    return total


def _spend(work: float) -> None:
    budget = _budget.get()
    if budget is not None:
        budget.spend(work)


def _numbers(values: Iterable[Any]) -> int:
    """Sum of the whole numbers among some arguments: widths and counts, of which a value may become as large."""
    return sum(abs(value) for value in values if isinstance(value, int))


def _formatted(template: str | bytes, arguments: Any) -> float:
    """Most characters that a format string makes of its arguments."""
    if isinstance(arguments, dict):
        values = [*arguments.values()]
    else:
        values = [*arguments] if isinstance(arguments, tuple) else [arguments]
    text = template if isinstance(template, str) else template.decode("latin-1")
    widths = sum(float(digits) for digits in re.findall(r"\d+", text))
    by_argument = _numbers(values) if "*" in text or "{" in text else 0
    return len(text) + widths + by_argument + size(values) * (text.count("%") + text.count("{"))


def _before_method(owner: Any, name: str, arguments: list[Any]) -> None:
    """Pay for what a method of a text or number will make of its arguments."""
    if isinstance(owner, str | bytes):
        work: float = len(owner) / _READING
        if name == "replace" and len(arguments) > 1:
            old, new = arguments[:2]
            work += owner.count(old) * len(new)
        elif name == "join" and arguments:
            work += size(arguments[0]) + len(owner) * size(arguments[0], as_text=False) / _MEMBER
        elif name in ("format", "format_map"):
            work += _formatted(owner, tuple(arguments))
        elif name == "translate":
            work += len(owner) * size(arguments)
        elif name == "expandtabs":
            work += len(owner) * (_numbers(arguments) or 8)
        elif name in ("center", "ljust", "rjust", "zfill"):
            work += _numbers(arguments)
        _spend(work)
    elif name == "to_bytes":
        _spend(_numbers(arguments))


# Filters that hand on members of a list without reading them as text: of one, or of each.
_OF_ONE = {"attr", "count", "d", "default", "first", "items", "last", "length", "random"}
_OF_EACH = {
    *("batch", "dictsort", "groupby", "list", "map", "max", "min", "reject", "rejectattr", "reverse", "select"),
    *("selectattr", "slice", "sort", "sum", "unique"),
}


def _before_filter(name: str, value: Any, arguments: list[Any]) -> None:
    """Pay for what a filter will make of a value."""
    if name in _OF_ONE:
        return
    if name in _OF_EACH:
        _spend(_OPERATION * len(value) if hasattr(value, "__len__") else 0)
        if name in ("batch", "slice"):
            _spend(_numbers(arguments))
        return
    _spend(size(value))
    texts = max((size(argument) for argument in arguments if isinstance(argument, str)), default=0)
    if name == "format":
        _spend(_formatted(str(value), tuple(arguments)))
    elif name == "replace" and len(arguments) > 1:
        _spend(str(value).count(str(arguments[0])) * size(arguments[1]))
    elif name == "join":
        _spend(texts * size(value, as_text=False) / _MEMBER)
    elif name in ("indent", "wordwrap"):
        lines = str(value).count("\n") + 1 if name == "indent" else len(str(value))
        _spend(lines * max(texts, _numbers(arguments) if name == "indent" else 0))
    elif name == "tojson":
        _spend(size(value, as_text=False) * max(texts, _numbers(arguments)))
    elif name == "center":
        _spend(_numbers(arguments))


def _counted(name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pays for its work. That it asks for the context keeps Jinja from running it at compile time."""
    passes = getattr(filter, "jinja_pass_arg", None)

    @pass_context
    def call(context: Any, value: Any, *arguments: Any, **options: Any) -> Any:
        if name == "join" and not hasattr(value, "__len__"):
            value = list(value)
        _spend(_OPERATION)
        _before_filter(name, value, [*arguments, *options.values()])
        first = {"context": context, "eval_context": context.eval_ctx, "environment": context.environment}
        front = [first[passes.name]] if passes is not None else []
        result = filter(*front, value, *arguments, **options)
        if isinstance(result, str | list | tuple | dict):
            _spend(size(result, as_text=False))
        return result

    return call


@pass_context
def _each(context: Any, values: Any, written: int) -> Iterator[Any]:
    for value in values:
        _spend(_OPERATION + written)
        yield value


@pass_context
def _made(context: Any, value: Any) -> Any:
    _spend(_OPERATION + size(value, as_text=False))
    return value


@pass_context
def _written(context: Any, value: Any) -> Any:
    _spend(_OPERATION + size(value))
    return value


@pass_context
def _read(context: Any, value: Any) -> Any:
    _spend(_OPERATION + (len(value) / _READING if isinstance(value, str | list | tuple) else 0))
    return value


_INTERNAL = {"*each": _each, "*made": _made, "*written": _written, "*read": _read}  # names that no template can write


class _Counting(NodeTransformer):
    """Puts a filter that pays around what the sandbox has no hook for: loops, literals, slices, comparisons, `~`."""

    def visit(self, node: nodes.Node, *_: Any, **__: Any) -> nodes.Node:
        written = _written_by(node) if isinstance(node, nodes.For) else 0
        self.generic_visit(node)
        if isinstance(node, nodes.For):
            node.iter = _around("*each", node.iter, nodes.Const(written, lineno=node.lineno))
        elif isinstance(node, nodes.Concat):
            node.nodes = [_around("*written", part) for part in node.nodes]
        elif isinstance(node, nodes.Compare):
            for side in (node, *node.ops):
                side.expr = _around("*read", side.expr)
        elif (
            (isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice))
            or isinstance(node, nodes.List | nodes.Dict)
            or (isinstance(node, nodes.Tuple) and node.ctx == "load")
        ):
            return _around("*made", node)
        return node


def _around(name: str, node: Any, *arguments: nodes.Expr) -> nodes.Expr:
    return nodes.Filter(node, name, list(arguments), [], None, None, lineno=node.lineno)


def _written_by(loop: nodes.For) -> int:
    """Characters that a turn of a loop writes as they stand in the template."""
    texts = [data.data for data in loop.find_all(nodes.TemplateData)]
    return sum(map(len, texts + [const.value for const in loop.find_all(nodes.Const) if isinstance(const.value, str)]))


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox; what is compiled and rendered in it within `limited` pays for its work."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=self._pay_for_output, **options)

    def count_filters(self) -> None:
        """Make the filters that the environment has by now pay."""
        self.filters = {name: _counted(name, filter) for name, filter in self.filters.items()} | _INTERNAL

    @staticmethod
    def _pay_for_output(value: Any) -> Any:
        _spend(_OPERATION + size(value))
        return value

    def _generate(self, source: nodes.Template, *arguments: Any, **options: Any) -> str:
        _Counting().visit(source)
        source.set_environment(self)
        return super()._generate(source, *arguments, **options)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        work: float = _OPERATION
        if operator == "*":
            for times, value in ((left, right), (right, left)):
                if isinstance(times, int) and isinstance(value, str | bytes | list | tuple):
                    work += max(times, 0) * max(1, size(value, as_text=False))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            work += left.bit_length() * max(right, 0) / 8
        elif operator == "%" and isinstance(left, str | bytes):
            work += _formatted(left, right)
        _spend(work)
        result = super().call_binop(context, operator, left, right)
        _spend(size(result, as_text=False))
        return result

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 (an argument may be named self)
        _spend(_CALL)
        function = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps `format`
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str | bytes | int):
            _before_method(owner, function.__name__, [*args, *kwargs.values()])
        elif isinstance(__obj, LoopContext) and args:  # a recursive loop
            budget = _budget.get()
            args = (_each(__context, args[0], budget.source if budget else 0), *args[1:])
        elif __obj is generate_lorem_ipsum:
            counts = [abs(value) for value in [*args, *kwargs.values(), 5, 100] if isinstance(value, int)]
            _spend(_OPERATION * math.prod(counts))
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, str | bytes | list | tuple | dict):
            _spend(size(result, as_text=owner is not None))
        return result
