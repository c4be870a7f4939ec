"""What a chat template can do and see: jinja2's immutable sandbox, the functions that templates expect, plain JSON.

Templates and messages are downloaded, so both are untrusted: a template gets no object with methods beyond those of
JSON's types, and a forbidden attribute is an error.
"""

import json
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import jinja2.utils

GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
TRACE_KEY = "_generation_trace"
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field, in order of preference


class Trace:
    """What was rendered so far, and the spans of generation tags: (start, end, text inside)."""

    def __init__(self):
        self.blocks: list[str] = []
        self.length = 0
        self.spans: list[tuple[int, int, str]] = []


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: renders its body; a trace, if there is one, notes where."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_body", [jinja2.nodes.ContextReference()])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _body(self, context, caller) -> str:
        text = caller()
        trace = context.get(TRACE_KEY)
        if trace is not None:
            trace.spans.append((trace.length, trace.length + len(text), text))
        return text


class _Namespace(jinja2.utils.Namespace):
    """jinja2's namespace object, which would let a template store attributes such as `__class__`."""

    def __init__(*args, **kwargs):  # no named self: `namespace(self=...)` must work
        jinja2.utils.Namespace.__init__(*args, **kwargs)
        for name in dict(*args[1:], **kwargs):
            _refuse_underscore(name)

    def __setitem__(self, name, value):
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a template may not store the attribute {name!r}")


class _Dict:
    """The global `dict` of a template: the calls, without the type."""

    def __call__(self, *args, **kwargs):
        return dict(*args, **kwargs)

    def fromkeys(self, *args):
        return dict.fromkeys(*args)


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _strftime_now(format):
    return datetime.now().strftime(format)


def _tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # jinja's own filter escapes <, >, & and ', which no model was trained on.
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2's sandbox, except that a forbidden attribute is an error and not an undefined value, which prints
    as nothing."""

    def unsafe_undefined(self, obj, attribute):
        raise jinja2.exceptions.SecurityError(f"a template may not use {attribute!r} of a {type(obj).__name__}")


def environment() -> jinja2.Environment:
    """Where templates are compiled and rendered."""
    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols])
    sandbox.filters["tojson"] = _tojson
    sandbox.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace, dict=_Dict()
    )
    return sandbox


def as_message(message: Any, index: int) -> dict[str, Any]:
    """A message as the template sees it: no None values, reasoning under both names in use.

    Raises ValueError for what is no object of JSON."""
    if not isinstance(message, Mapping):
        raise ValueError(f"messages[{index}]: expected a dict, got {type(message).__name__}")
    fields = plain({k: v for k, v in message.items() if v is not None}, f"messages[{index}]")
    reasoning = next((fields[key] for key in _REASONING if fields.get(key) is not None), None)
    if reasoning is not None:
        fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
    return fields


def plain(value: Any, where: str) -> Any:
    """A copy of `value` out of exact JSON types: a template must not get at methods of richer objects.

    Raises ValueError, with ``where``, for anything that is not JSON."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {plain(k, where): plain(v, where) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, where) for v in value]
    raise ValueError(f"{where}: expected JSON values (str, number, bool, None, list, dict), got {type(value)}")
