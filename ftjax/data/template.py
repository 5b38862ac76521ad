"""Chat templates: a stranger's Jinja, rendered in a sandbox with a budget of work and a deadline.

A template comes with a model and is data, so it may be hostile. Jinja's sandbox keeps it from Python's objects; it does not keep it
from looping for ever or filling the memory. Here each turn of a loop, each call of a macro and each character made is charged
to a budget: the syntax tree is rewritten before it is compiled, so that loops, `~` and literal containers report to the environment.
"""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes as nodes
import jinja2.sandbox
import jinja2.visitor

from ftjax import tree

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The built-in template, for a model that has none."""

GIVEN = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "unk_token", "pad_token")
"""What every template is given: not to be set by a config."""

MAX_TEMPLATE_CHARS = 2**18
MAX_WORK = 2**24
"""Characters made plus turns of loops in one rendering."""
MAX_SECONDS = 5.0

# Methods of strings, lists and dicts that templates use and that make at most as much text as they are given.
_METHODS = frozenset(
    "capitalize count endswith find get index isalnum isalpha isdigit islower isspace isupper items keys lower lstrip partition "
    "removeprefix removesuffix rfind rpartition rsplit rstrip split splitlines startswith strip swapcase title upper values".split()
)
_FILTERS = frozenset(
    "abs capitalize count d default dictsort e escape first float int items last length list lower map max min reject rejectattr "
    "reverse round safe select selectattr sort sum title trim unique upper wordcount".split()
)


class TemplateError(ValueError):
    """A chat template that could not be used, or a conversation that it refused."""


class ChatTemplate:
    """A compiled chat template.

    Args:
      source: the Jinja text.
      variables: names that the template reads beside the messages: `bos_token`, `eos_token`, `enable_thinking` …
      today: what `strftime_now` says. Fixed, so that a resumed run trains on the tokens that it would have seen without the stop.
      max_work: the budget of one rendering, in characters and turns of loops.
      max_seconds: the deadline of one rendering.

    Raises:
      TemplateError: the text is too long or is not a template.
    """

    def __init__(
        self,
        source: str,
        *,
        variables: Mapping[str, Any] | None = None,
        today: datetime.datetime = datetime.datetime(2024, 7, 26),
        max_work: int = MAX_WORK,
        max_seconds: float = MAX_SECONDS,
    ):
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TemplateError(f"chat template: {len(source):,} characters, more than the limit of {MAX_TEMPLATE_CHARS:,}")
        self.source, self.variables = source, dict(variables or {})
        self._limits = max_work, max_seconds
        self._environment = _Environment(today)
        try:
            tree = _Metered().visit(self._environment.parse(source))
            self._template = self._environment.from_string(tree)
        except (jinja2.TemplateError, RecursionError, SyntaxError, MemoryError, OverflowError, ValueError, TypeError) as error:
            raise TemplateError(f"chat template: {getattr(error, 'message', None) or error!r}") from error

    def reads(self) -> set[str]:
        """Return the names that the template reads and does not make itself, `messages` among them."""
        return jinja2.meta.find_undeclared_variables(self._environment.parse(self.source)) - set(self._environment.globals)

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False, tools: Sequence[Any] | None = None
    ) -> str:
        """Return the conversation as the model reads it.

        Raises:
          TemplateError: the template raised, or went over its budget.
        """
        budget = self._environment.budget = _Budget(*self._limits)
        variables = {**self.variables, "messages": list(messages), "tools": list(tools) if tools else None}
        pieces = []
        try:
            for piece in self._template.generate(variables, add_generation_prompt=add_generation_prompt):
                budget.charge(len(piece))
                pieces.append(piece)
        except TemplateError:
            raise
        except jinja2.TemplateError as error:
            raise TemplateError(f"chat template: {error.message}") from error
        except RecursionError as error:
            raise TemplateError("chat template: recursion is too deep") from error
        except Exception as error:  # whatever the template's own arithmetic or indexing raises
            raise TemplateError(f"chat template: {type(error).__name__}: {error}") from error
        return "".join(pieces)


def with_variables(source: str, variables: Mapping[str, Any]) -> str:
    """Return the template with values for names that it reads, such as `{"enable_thinking": False}`.

    They stand in its text, so that whoever gets it renders as it was trained; a caller that gives a name itself is still heard.

    Raises:
      TemplateError: `variables` is no dict of plain data, or the template reads no such name.
    """
    if not isinstance(variables, Mapping):
        raise TemplateError(f"template_variables: a dict is expected, such as {{'enable_thinking': False}}, not {variables!r}")
    known = sorted(ChatTemplate(source).reads() - set(GIVEN))
    for name in variables:
        if name not in known:
            raise TemplateError(f"template_variables: the chat template reads no {name!r}; nearest: {tree.nearest(str(name), known)}")
    try:
        plain = json.loads(json.dumps(dict(variables), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TemplateError(f"template_variables: {error}; plain data is expected, not {dict(variables)!r}") from error
    sets = [f"{{% if {name} is not defined %}}{{% set {name} = {value!r} %}}{{% endif %}}" for name, value in plain.items()]
    head = "".join(sets) + "\n"  # the newline after a block is not rendered, and the template begins a line as before
    return head + source.removeprefix(head)


class _Budget:
    def __init__(self, work: int, seconds: float):
        self.work, self.limit, self.deadline, self.seconds = work, work, time.monotonic() + seconds, seconds

    def charge(self, amount: int) -> None:
        self.work -= amount + 1
        if self.work < 0:
            raise TemplateError(f"chat template: more than {self.limit:,} characters and loop turns in one rendering")
        if time.monotonic() > self.deadline:
            raise TemplateError(f"chat template: one rendering took more than {self.seconds:g} seconds")


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, today: datetime.datetime):
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, finalize=self.text, extensions=[jinja2.ext.loopcontrols, _Generation], cache_size=0
        )
        self.budget = _Budget(MAX_WORK, MAX_SECONDS)
        charged = {"join": self._join, "replace": self._replace, "string": self.text, "tojson": self._tojson, "indent": self._indent}
        self.filters = {name: self.filters[name] for name in _FILTERS} | charged
        self.globals = {
            "range": jinja2.sandbox.safe_range,
            "namespace": self.globals["namespace"],
            "dict": lambda **items: self.measured(items),
            "raise_exception": _raise_exception,
            "strftime_now": lambda format: _strftime(today, format),
        }

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if callable(value) and not isinstance(obj, (dict, jinja2.runtime.LoopContext, jinja2.runtime.Macro)):
            return attr in _METHODS or (isinstance(obj, str) and attr in ("join", "replace"))
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Any:
        if callable(value) and getattr(value, "__name__", "") in ("format", "format_map") and isinstance(value.__self__, str):
            raise TemplateError("chat template: str.format is not supported")
        return None

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str) and function.__name__ == "join":
            return self._join(*args, owner)
        if isinstance(owner, str) and function.__name__ == "replace":
            return self._replace(owner, *args)
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            raise TemplateError("chat template: '%' on a string is not supported")
        if operator == "**" and (abs(left) > 2**32 or abs(right) > 64):
            raise TemplateError("chat template: the power is too large")
        if operator == "*":
            times = [value for value in (left, right) if isinstance(value, int)]
            sized = [value for value in (left, right) if not isinstance(value, (int, float))]
            self.budget.charge(sum(map(self._size, sized)) * max([abs(value) for value in times], default=1))
        elif operator == "+" and not isinstance(left, (int, float)):
            self.budget.charge(self._size(left) + self._size(right))
        return super().call_binop(context, operator, left, right)

    def turn(self, chars: int) -> str:
        """Charge one turn of a loop whose body holds so many characters."""
        self.budget.charge(chars)
        return ""

    def concat_metered(self, *values: Any) -> str:
        """The `~` operator."""
        return "".join(map(self.text, values))

    def measured(self, value: Any) -> Any:
        """Charge a container by all that it holds, so that containers of containers cannot double for ever."""
        self._size(value)
        return value

    def text(self, value: Any) -> str:
        """Return the value as text, charged."""
        if not isinstance(value, str):
            self._size(value)
            value = str(value)
        self.budget.charge(len(value))
        return value

    def _size(self, value: Any) -> int:
        """Return the number of characters and items in a value, and charge the walk."""
        self.budget.charge(0)
        if isinstance(value, str):
            return len(value)
        if isinstance(value, Mapping):
            return sum(self._size(key) + self._size(item) + 1 for key, item in value.items())
        if isinstance(value, (list, tuple, set)):
            return sum(self._size(item) + 1 for item in value)
        return 1

    def _join(self, values: Any, separator: str = "", attribute: str | None = None) -> str:
        if attribute is not None:
            values = [self.getitem(value, attribute) for value in values]
        values = [self.text(value) for value in values]
        self.budget.charge(len(values) * len(separator))
        return separator.join(values)

    def _replace(self, value: Any, old: str, new: str, count: int = -1) -> str:
        value = self.text(value)
        times = value.count(old) if count is None or count < 0 else min(count, value.count(old))
        self.budget.charge(times * len(new))
        return value.replace(old, new, times)

    def _indent(self, value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        margin = width if isinstance(width, str) else " " * min(width, 64)
        lines = self.text(value).split("\n")
        self.budget.charge(len(lines) * len(margin))
        return "\n".join(margin + line if (at or first) and (line or blank) else line for at, line in enumerate(lines))

    def _tojson(
        self, value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        # As transformers renders it: Jinja's own filter escapes HTML. Piece by piece, so that the budget sees it grow.
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent and min(indent, 16), separators=separators, sort_keys=sort_keys)
        return "".join(map(self.text, encoder.iterencode(self.measured(value))))


def _strftime(today: datetime.datetime, format: str) -> str:
    if len(format) > 100 or not re.fullmatch(r"([^%]|%-?[A-Za-z%])*", format):  # a width could make gigabytes
        raise TemplateError(f"chat template: {format[:40]!r} is not a date format of at most 100 characters without widths")
    return today.strftime(format)


def _raise_exception(message: str) -> None:
    raise TemplateError(f"the chat template refused this conversation: {message}")


class _Generation(jinja2.ext.Extension):
    """Accept `{% generation %}…{% endgeneration %}`; the mask is found without it."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Metered(jinja2.visitor.NodeTransformer):
    """Rewrite a template so that loops, macros, `~` and literal containers report to the environment."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._with_turn(node)

    visit_Macro = visit_CallBlock = visit_For

    def _with_turn(self, node: Any) -> nodes.Node:
        chars = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_report("turn", [nodes.Const(chars)], node)).set_lineno(node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _report("concat_metered", node.nodes, node)

    def visit_List(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return node if getattr(node, "ctx", "load") == "store" else _report("measured", [node], node)

    visit_Tuple = visit_Dict = visit_List


def _report(method: str, arguments: list[Any], node: nodes.Node) -> nodes.Node:
    call = nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)
    call.set_lineno(node.lineno)
    return call.set_environment(node.environment) if node.environment is not None else call
