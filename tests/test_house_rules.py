"""The house rules that a reader of one file cannot see, read off the source text: nothing is run here.

A rule is a function from a source file to its complaints. `test_rule` applies each rule to the whole library;
`test_rule_can_fail` shows for each rule a snippet that breaks it and one beside it that does not.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# ops/ files that are not an op: no reference, no test of their own, no forward and backward.
NOT_OPS = {
    "__init__": "lists the ops",
    "attention_hopper": "attention's forward for Hopper, which attention calls; it has a test of its own",
    "attention_hopper_bwd": "the same of its backward",
    "attention_tiles": "functions that attention's kernels share; they are tested through every one of them",
    "checks": "demands on tensors that ops share; they are tested through every op",
    "dynamic_map": "an 8-bit number format that nf4 and the optimizer share",
    "gluon": "names of Triton's other language; they are tested through the kernels written in it",
    "language": "functions that kernels share; they are tested through every op",
    "logits_row": "what the kernels of the losses are made of; tested through every one of them",
    "low_rank": "the thin passes of linear's adapters; tested through linear",
    "low_rank_dropout": "the same with dropout; tested through linear",
    "product": "one matrix product, which linear and its likes are made of; tested with linear",
}
# ops/ files whose op has no gradient: of the contract's names only `cost`; the rest holds.
NOT_DIFFERENTIABLE = {
    "nf4": "4-bit codes are integers; the base weight they encode is always frozen",
    "nf4_matvec": "for cached generation; linear takes its other path when x needs a gradient",
}
# models/ files that all families share.
NOT_FAMILIES = ("__init__", "config", "decoder")
TRITON_ALLOWED = ("unsloth_core/ops/", "unsloth_core/optim/multi_tensor.py", "unsloth_core/device.py")
PEERS = {
    "accelerate",
    "bitsandbytes",
    "liger_kernel",
    "peft",
    "transformers",
    "trl",
    "unsloth",
    "unsloth_zoo",
}
CODE_IN_DATA = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
FAMILY_LINES = 220


@dataclass(frozen=True)
class Source:
    """One file: its path from the root of the project, its text, and every path in the project."""

    path: str
    text: str
    project: frozenset[str] = frozenset()

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed text."""
        return ast.parse(self.text, self.path)

    @property
    def name(self) -> str:
        """File name without `.py`."""
        return self.path.rpartition("/")[2].removesuffix(".py")

    def under(self, *folders: str) -> bool:
        """Whether the path starts with one of these."""
        return self.path.startswith(folders)


# ---- reading Python ----------------------------------------------------------------------------------------


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or attribute; the part behind the last call or index for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def imports(source: Source) -> Iterator[tuple[int, str]]:
    """(line, absolute module or module.name) of every import, also of importlib.import_module("...")."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and dotted(node.func).rpartition(".")[2] in (
            "import_module",
            "__import__",
        ):
            yield from ((node.lineno, a.value) for a in node.args[:1] if isinstance(a, ast.Constant))


def attributes(source: Source) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every attribute access."""
    return ((n.lineno, dotted(n)) for n in ast.walk(source.tree) if isinstance(n, ast.Attribute))


def calls(source: Source) -> Iterator[ast.Call]:
    """Every call."""
    return (n for n in ast.walk(source.tree) if isinstance(n, ast.Call))


def jitted(source: Source) -> Iterator[ast.FunctionDef]:
    """Functions decorated with `triton.jit`, `gluon.jit` or either of them with options."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef):
            decorators = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
            if any(dotted(d).rpartition(".")[2] == "jit" for d in decorators):
                yield node


def static_names(kernel: ast.FunctionDef) -> set[str]:
    """Compile-time names of a kernel: constexpr parameters, and locals made of nothing else."""
    arguments = kernel.args.posonlyargs + kernel.args.args + kernel.args.kwonlyargs
    names = {a.arg for a in arguments if a.annotation and dotted(a.annotation).endswith("constexpr")}
    bound: dict[str, list[ast.expr | None]] = {}
    for node in ast.walk(kernel):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            bound.setdefault(node.targets[0].id, []).append(node.value)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            declared = dotted(node.annotation).endswith("constexpr")
            bound.setdefault(node.target.id, []).append(ast.Constant(0) if declared else node.value)
        elif isinstance(node, ast.For) and isinstance(node.target, ast.Name):
            unrolled = isinstance(node.iter, ast.Call) and dotted(node.iter.func).endswith("static_range")
            bound.setdefault(node.target.id, []).append(ast.Constant(0) if unrolled else None)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.setdefault(node.id, [])
    single = {n: v[0] for n, v in bound.items() if len(v) == 1 and v[0] is not None}
    while new := {n for n, v in single.items() if n not in names and static(v, names)}:
        names |= new
    return names


def static(node: ast.expr, names: set[str]) -> bool:
    """Whether an expression in a kernel is known when it compiles."""
    match node:
        case ast.Constant():
            return True
        case ast.Name(id=name):
            return name in names or name.isupper()
        case ast.Attribute(attr="dtype" | "shape" | "element_ty" | "value"):
            return True
        case ast.Attribute():
            return dotted(node).startswith("tl.") or static(node.value, names)
        case ast.Compare(ops=[ast.Is() | ast.IsNot()]):
            return True
        case ast.Call(
            func=ast.Attribute(value=value, attr="is_fp16" | "is_bf16" | "is_fp32" | "is_floating")
        ):
            return static(value, names)
        case ast.Call(func=function, args=args) if dotted(function).endswith("constexpr"):
            return all(static(a, names) for a in args)
        case (
            ast.Compare()
            | ast.BinOp()
            | ast.UnaryOp()
            | ast.BoolOp()
            | ast.IfExp()
            | ast.Subscript()
            | ast.Tuple()
        ):
            return all(static(n, names) for n in ast.iter_child_nodes(node) if isinstance(n, ast.expr))
    return False


# ---- the rules ---------------------------------------------------------------------------------------------


def autograd_function_only_in_autodiff(source: Source) -> Iterator[str]:
    """autodiff.py and its schedules, remat.py, are the only files that know torch.autograd.Function."""
    if source.path not in ("unsloth_core/autodiff.py", "unsloth_core/remat.py"):
        uses = [*attributes(source), *imports(source)]
        banned = ("autograd.Function", "autograd.function.Function")
        yield from (f"line {line}: {name}" for line, name in uses if name.endswith(banned))


def triton_only_in_kernels(source: Source) -> Iterator[str]:
    """Triton is imported under ops/, in optim/multi_tensor.py and in device.py."""
    if not source.under(*TRITON_ALLOWED):
        yield from (
            f"line {line}: import {name}" for line, name in imports(source) if name.split(".")[0] == "triton"
        )


def no_peer_library(source: Source) -> Iterator[str]:
    """The library stands alone; peers are oracles in tests and opponents in perf/."""
    yield from (
        f"line {line}: import {name}" for line, name in imports(source) if name.split(".")[0] in PEERS
    )


def no_code_in_data(source: Source) -> Iterator[str]:
    """Files from outside never execute: no pickle, no torch.load, no remote code, no eval.

    prepared.py alone executes what it has written itself, of numbers and names of its own."""
    yield from (
        f"line {n}: import {name}" for n, name in imports(source) if name.split(".")[0] in CODE_IN_DATA
    )
    yield from (f"line {line}: {name}" for line, name in attributes(source) if name == "torch.load")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.keyword | ast.arg) and node.arg == "trust_remote_code":
            yield f"line {node.lineno}: trust_remote_code"
        elif isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            yield f"line {node.lineno}: 'trust_remote_code'"
        elif (
            isinstance(node, ast.Call)
            and dotted(node.func) in ("eval", "exec")
            and source.path != "unsloth_core/prepared.py"
        ):
            yield f"line {node.lineno}: {dotted(node.func)}()"


def portable_triton(source: Source) -> Iterator[str]:
    """One source runs compiled and interpreted, on Triton 3.6 to 3.9: block pointers and libdevice do not."""
    for line, name in [*attributes(source), *imports(source)]:
        if name.endswith("make_block_ptr") or "libdevice" in name.split("."):
            yield f"line {line}: {name}"


def no_float_atomics(source: Source) -> Iterator[str]:
    """Floats added in whatever order programs finish give other bits in every run; integers do not."""
    for call in calls(source):
        if dotted(call.func).endswith("atomic_add"):
            value = next(
                (k.value for k in call.keywords if k.arg == "val"), call.args[1] if call.args[1:] else None
            )
            literal = isinstance(value, ast.Constant) and isinstance(value.value, int)
            cast = isinstance(value, ast.Call) and dotted(value.func).endswith(".to") and value.args
            if not literal and not (cast and dotted(value.args[0]) in ("tl.int32", "tl.int64")):
                yield f"line {call.lineno}: atomic_add, not of an integer literal or .to(tl.int32)"


def no_device_sync(source: Source) -> Iterator[str]:
    """Ops, references and families never wait for the device: a step has to be capturable as a CUDA graph."""
    if source.under("unsloth_core/ops/", "unsloth_core/reference/", "models/"):
        for call in calls(source):
            method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
            if method in ("item", "tolist", "cpu", "numpy", "synchronize"):
                yield f"line {call.lineno}: .{method}()"


def no_truth_value_of_tensors(source: Source) -> Iterator[str]:
    """`and`, `or`, `not` on tensors go silently wrong when interpreted; chained compares do not compile."""
    for kernel in jitted(source):
        names = static_names(kernel)
        for node in ast.walk(kernel):
            if isinstance(node, ast.BoolOp) and not static(node, names):
                yield f"line {node.lineno}: {type(node.op).__name__.lower()} on tensors in {kernel.name}"
            elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not) and not static(node, names):
                yield f"line {node.lineno}: not on a tensor in {kernel.name}"
            elif isinstance(node, ast.Compare) and len(node.ops) > 1 and not static(node, names):
                yield f"line {node.lineno}: chained compare in {kernel.name}"


def names_say_what_is_inside(source: Source) -> Iterator[str]:
    """A file is called after its one idea."""
    if source.name.strip("_") in ("common", "helper", "helpers", "misc", "util", "utils"):
        yield f"called {source.name}"


def families_stay_readable(source: Source) -> Iterator[str]:
    """A family is one file that is read in one sitting."""
    lines = source.text.count("\n")
    if source.under("models/") and source.name not in NOT_FAMILIES and lines > FAMILY_LINES:
        yield f"{lines} lines, at most {FAMILY_LINES} for a family"


def ops_follow_the_contract(source: Source) -> Iterator[str]:
    """ops/<op>.py: <op>_fwd, <op>_bwd, <op>, cost, in this order; its oracle and its test exist."""
    op = source.name
    if source.path != f"unsloth_core/ops/{op}.py" or op in NOT_OPS:
        return
    for path in (f"unsloth_core/reference/{op}.py", f"tests/ops/test_{op}.py"):
        if path not in source.project:
            yield f"{path} is missing"
    bound: dict[str, int] = {}
    for node in source.tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node]
        for name in (getattr(t, "id", None) or getattr(t, "name", None) for t in targets):
            if name:
                bound.setdefault(name, node.lineno)
    expected = ["cost"] if op in NOT_DIFFERENTIABLE else [f"{op}_fwd", f"{op}_bwd", op, "cost"]
    if missing := [name for name in expected if name not in bound]:
        yield f"{', '.join(missing)} not defined"
    elif sorted(expected, key=bound.__getitem__) != expected:
        yield f"expected in this order: {', '.join(expected)}"


def everything_public_is_explained(source: Source) -> Iterator[str]:
    """Files, and public functions, classes and methods, have docstrings."""
    if not ast.get_docstring(source.tree) and source.text.strip():
        yield "no docstring of the file"

    def undocumented(body: list[ast.stmt], owner: str) -> Iterator[str]:
        for node in body:
            if (
                isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
                and node.name[0] != "_"
            ):
                if not ast.get_docstring(node):
                    yield f"line {node.lineno}: no docstring of {owner}{node.name}"
                if isinstance(node, ast.ClassDef):
                    yield from undocumented(node.body, f"{owner}{node.name}.")

    yield from undocumented(source.tree.body, "")


def nothing_left_for_later(source: Source) -> Iterator[str]:
    """What is not done is an issue, not a comment."""
    for number, line in enumerate(source.text.splitlines(), 1):
        if re.search(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX)\b", line):
            yield f"line {number}: {line.strip()}"


def no_place_of_one_machine(source: Source) -> Iterator[str]:
    """A path that exists on one machine means nothing to a reader of another."""
    for number, line in enumerate(source.text.splitlines(), 1):
        if re.search(r"(?<![\w.}])/(" + r"root|work|home|Users|tmp" + r")/\w", line):
            yield f"line {number}: {line.strip()[:80]}"


# ---- the files ---------------------------------------------------------------------------------------------

LIBRARY_RULES = [
    autograd_function_only_in_autodiff,
    triton_only_in_kernels,
    no_peer_library,
    no_code_in_data,
    portable_triton,
    no_float_atomics,
    no_device_sync,
    no_truth_value_of_tensors,
    names_say_what_is_inside,
    families_stay_readable,
    ops_follow_the_contract,
    everything_public_is_explained,
    nothing_left_for_later,
]
FOLDERS = ("unsloth_core", "models", "tests", "examples", "perf", "notebooks", ".ci")
TEXT = {".cfg", ".ipynb", ".json", ".jsonl", ".md", ".py", ".toml", ".txt", ".yaml", ".yml", ""}


@cache
def project() -> tuple[Source, ...]:
    """Every text file of the project; families under models/, not a second time through the symlink."""
    paths = [p for p in ROOT.iterdir() if p.is_file() and not p.name.startswith(".git")]
    for folder in FOLDERS:
        paths += [p for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    kept = {p.relative_to(ROOT).as_posix(): p for p in paths if p.suffix in TEXT}
    kept = {path: p for path, p in kept.items() if not path.startswith("unsloth_core/models/")}
    names = frozenset(kept)
    return tuple(Source(path, p.read_text("utf-8"), names) for path, p in sorted(kept.items()))


def library() -> list[Source]:
    """The Python files that are installed."""
    return [s for s in project() if s.path.endswith(".py") and s.under("unsloth_core/", "models/")]


def report(rule, sources: list[Source]) -> str:
    """All complaints, one a line."""
    return "\n".join(f"{s.path}: {complaint}" for s in sources for complaint in rule(s))


def test_the_library_is_found():
    paths = {s.path for s in library()}
    assert {"unsloth_core/autodiff.py", "unsloth_core/ops/language.py", "models/__init__.py"} <= paths


@pytest.mark.parametrize("rule", LIBRARY_RULES, ids=lambda r: r.__name__)
def test_rule(rule):
    complaints = report(rule, library())
    assert not complaints, f"{rule.__doc__}\n{complaints}"


def test_no_place_of_one_machine():
    complaints = report(no_place_of_one_machine, list(project()))
    assert not complaints, f"{no_place_of_one_machine.__doc__}\n{complaints}"


# ---- every rule can fail -----------------------------------------------------------------------------------


def kernel(body: str) -> str:
    """A kernel around one line."""
    return f"@triton.jit\ndef _kernel(p, n, flag, BLOCK: tl.constexpr, CAUSAL: tl.constexpr):\n    {body}\n"


ANY, OP, FAMILY = "unsloth_core/train.py", "unsloth_core/ops/f.py", "models/llama.py"
GOOD_OP = "def f_fwd(x): ...\ndef f_bwd(r, dy): ...\nf = custom_vjp(f_fwd, f_bwd)\ndef cost(): ...\n"
OP_FILES = frozenset({"unsloth_core/reference/f.py", "tests/ops/test_f.py"})

# fmt: off
CASES = [  # rule, path, a text that breaks it, a text that does not
    (autograd_function_only_in_autodiff, ANY, "F = autograd.Function", "y = autograd.grad(f, x)"),
    (autograd_function_only_in_autodiff, OP, "from torch.autograd import Function", "import torch.autograd"),
    (triton_only_in_kernels, ANY, "import triton.language as tl", "from .ops import linear"),
    (triton_only_in_kernels, "unsloth_core/optim/adamw.py", "from triton import jit", "import tritonclient"),
    (triton_only_in_kernels, FAMILY, "importlib.import_module('triton')", "importlib.import_module('json')"),
    (no_peer_library, ANY, "from transformers import AutoModel", "from tokenizers import Tokenizer"),
    (no_peer_library, ANY, "import unsloth", "import unsloth_core"),
    (no_peer_library, ANY, "def f():\n    import bitsandbytes.functional", "from . import transformers"),
    (no_code_in_data, ANY, "import pickle", "'never pickle'"),
    (no_code_in_data, ANY, "w = torch.load(path)", "w = load(path)"),
    (no_code_in_data, ANY, "load(path, trust_remote_code=False)", "'without trust_remote_code'"),
    (no_code_in_data, ANY, "options['trust_remote_code'] = 1", "options['revision'] = 1"),
    (no_code_in_data, ANY, "eval(template)", "model.eval()"),
    (portable_triton, OP, kernel("q = tl.make_block_ptr(p)"), kernel("q = tl.make_tensor_descriptor(p)")),
    (portable_triton, OP, "from triton.language.extra import libdevice", "import triton.language as tl"),
    (portable_triton, OP, kernel("y = tl.extra.cuda.libdevice.tanh(n)"), kernel("y = tl.exp2(n)")),
    (no_float_atomics, OP, kernel("tl.atomic_add(p, n * 0.5)"), kernel("tl.atomic_add(p, 1, sem='release')")),
    (no_float_atomics, OP, kernel("tl.atomic_add(p, 1.0)"), kernel("tl.atomic_add(p, flag.to(tl.int32))")),
    (no_device_sync, OP, "n = lengths.max().item()", "n = next(items)"),
    (no_device_sync, FAMILY, "x = x.cpu()", "x = cpu(x)"),
    (no_device_sync, "unsloth_core/reference/f.py", "s = starts.tolist()", "s = starts.unbind()"),
    (no_truth_value_of_tensors, OP, kernel("m = (n > 0) and (n < 3)"), kernel("m = (n > 0) & (n < 3)")),
    (no_truth_value_of_tensors, OP, kernel("m = CAUSAL or flag"), kernel("m = CAUSAL or BLOCK > 3")),
    (no_truth_value_of_tensors, OP, kernel("m = not flag"), kernel("m = not CAUSAL")),
    (no_truth_value_of_tensors, OP, kernel("m = 0 <= n < 3"), kernel("m = 0 < BLOCK <= 64")),
    (no_truth_value_of_tensors, OP, kernel("e = n * 2; m = not e"), kernel("e = BLOCK * 2; m = not e == 4")),
    (families_stay_readable, FAMILY, "x\n" * (FAMILY_LINES + 1), "x\n" * FAMILY_LINES),
    (ops_follow_the_contract, OP, GOOD_OP.replace("f_bwd", "g_bwd"), GOOD_OP),
    (ops_follow_the_contract, OP, GOOD_OP.replace("def cost(): ...\n", ""), GOOD_OP),
    (ops_follow_the_contract, OP, "def cost(): ...\n" + GOOD_OP.replace("def cost", "def also"), GOOD_OP),
    (everything_public_is_explained, ANY, "def f(): ...", '"""File."""\ndef _f(): ...'),
    (everything_public_is_explained, ANY, '"""F."""\ndef f(): ...', '"""F."""\ndef f():\n    """Does."""'),
    (everything_public_is_explained, ANY, '"""F."""\nclass A:\n    """A."""\n    def f(): ...', '"""F."""'),
    (nothing_left_for_later, ANY, "x = 1  # TO" + "DO: faster", "x = 1  # faster than y"),
    (no_place_of_one_machine, ANY, "open('/" + "root/x')", "open('x/root/y')"),
    (no_place_of_one_machine, "README.md", "run /" + "home/me/x.py", "run ./home/x.py, or /v1/work"),
]


BY_NAME = [  # rule, a text, a path where it breaks the rule, a path where it does not
    (names_say_what_is_inside, "", "unsloth_core/utils.py", "unsloth_core/tree.py"),
    (names_say_what_is_inside, "", "unsloth_core/ops/_common.py", "unsloth_core/ops/common_divisor.py"),
    (autograd_function_only_in_autodiff, "F = torch.autograd.Function", ANY, "unsloth_core/autodiff.py"),
    (triton_only_in_kernels, "import triton", "unsloth_core/reference/f.py", OP),
    (triton_only_in_kernels, "import triton", "unsloth_core/optim/adamw.py", TRITON_ALLOWED[1]),
    (no_device_sync, "x.item()", OP, ANY),
    (families_stay_readable, "x\n" * 999, FAMILY, "models/decoder.py"),
    (ops_follow_the_contract, GOOD_OP, "unsloth_core/ops/g.py", OP),
    (ops_follow_the_contract, '"""Shared."""', OP, "unsloth_core/ops/language.py"),
]
# fmt: on


@pytest.mark.parametrize("rule, path, bad, good", CASES)
def test_rule_can_fail(rule, path, bad, good):
    assert list(rule(Source(path, bad, OP_FILES)))
    assert not list(rule(Source(path, good, OP_FILES)))


@pytest.mark.parametrize("rule, text, bad, good", BY_NAME)
def test_rule_knows_where_it_holds(rule, text, bad, good):
    assert list(rule(Source(bad, text, OP_FILES)))
    assert not list(rule(Source(good, text, OP_FILES)))


def test_an_op_needs_its_oracle_and_its_test():
    missing = list(ops_follow_the_contract(Source(OP, GOOD_OP)))
    assert missing == ["unsloth_core/reference/f.py is missing", "tests/ops/test_f.py is missing"]


def test_every_rule_is_shown_to_fail():
    assert {case[0] for case in CASES + BY_NAME} == {*LIBRARY_RULES, no_place_of_one_machine}
