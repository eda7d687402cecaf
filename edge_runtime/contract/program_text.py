"""The texts inside a ``torch.export`` program that torch runs or resolves when it loads it.

torch evaluates shape expressions and guards as Python, writes names into source code that it
compiles, and imports what a tree of containers names. Each function here says whether a text
is of the small language that a real export writes; everything else could be a program.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any, Final

__all__ = ["is_expression", "is_guard", "is_name", "is_operator", "is_path", "is_tree", "is_word"]

_MAX_EXPRESSION_CHARS: Final = 10_000
_MAX_TREE_CHARS: Final = 1_000_000
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,500}")
_WORD: Final = re.compile(r"[A-Za-z0-9_.+]{0,500}|-Infinity")
_PATH: Final = re.compile(r"[A-Za-z0-9_.:/<>+\- ]{0,1000}")
_SYMBOL: Final = re.compile(r"[suz]\d+|z?u?f\d+|[ijk]\d*")
_OPERATOR: Final = re.compile(
    r"torch\.ops\.(?:aten|torchvision)\.((?!__)[a-z0-9_]+|__i?(?:and|or|xor|lshift|rshift)__)"
    r"\.(?!__)[A-Za-z0-9_]+"
)
_SCALAR: Final = re.compile(
    r"_operator\.(?:getitem|add|sub|mul|floordiv|truediv|mod|neg|eq|ne|lt|le|gt|ge|and_|or_|pow)"
    r"|math\.(?:ceil|floor|trunc|sqrt)|torch\.sym_[a-z]+"
    r"|torch\._sym_[a-z]+|torch\.ops\.higher_order\.wrap_with_set_grad_enabled"
)
# Files; raw memory that another tensor's shape is laid over without a check.
_REFUSED_OPERATORS: Final = frozenset({"from_file", "load", "save", "set", "set_"})
_REFUSED_PREFIXES: Final = ("_nested", "_sparse", "sparse_")
_FUNCTIONS: Final = frozenset(
    {"Symbol", "Integer", "Float", "Rational", "Max", "Min", "Mod", "PythonMod", "FloorDiv",
     "ModularIndexing", "CleanDiv", "CeilDiv", "CeilToInt", "FloorToInt", "TruncToInt",
     "TruncToFloat", "RoundToInt", "IntTrueDiv", "FloatTrueDiv", "PowByNatural", "ToFloat",
     "Identity", "Add", "Mul", "Pow", "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not",
     "Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan",
     "Piecewise", "ExprCondPair", "Where"}
)  # fmt: skip
_CONSTANTS: Final = frozenset(
    {"True", "False", "true", "false", "oo", "int_oo", "IntInfinity", "NegativeIntInfinity"}
)
_KEYWORDS: Final = frozenset(
    {"positive", "integer", "nonnegative", "zero", "nonzero", "negative", "real", "evaluate"}
)
_METHODS: Final = frozenset({"dim", "size", "storage_offset", "stride"})
_ARITHMETIC: Final = (
    ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Tuple, ast.operator,
    ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context,
)  # fmt: skip
_CONTAINERS: Final = frozenset(
    {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}
)


def is_name(text: str) -> bool:
    """A plain identifier: of a value of the graph, or of an argument."""
    return _NAME.fullmatch(text) is not None


def is_word(text: str) -> bool:
    """Letters, digits, ``_``, ``.`` and ``+``, nothing, or ``-Infinity``: JSON has no number."""
    return _WORD.fullmatch(text) is not None


def is_path(text: str) -> bool:
    """The name of a submodule or tensor: nothing that could end a string in source code."""
    return _PATH.fullmatch(text) is not None


def is_operator(text: str) -> bool:
    """An operator of ATen or torchvision that touches no files, or scalar arithmetic."""
    if _SCALAR.fullmatch(text):
        return True
    found = _OPERATOR.fullmatch(text)
    if found is None:
        return False
    name = found.group(1)
    return name not in _REFUSED_OPERATORS and not name.startswith(_REFUSED_PREFIXES)


def is_expression(text: str) -> bool:
    """Arithmetic on symbols such as ``s34``, as sympy writes it."""
    return _only(text, guard=False)


def is_guard(text: str) -> bool:
    """A comparison of sizes such as ``L['x'].size()[0] >= 2``."""
    return _only(text, guard=True)


def _only(text: str, *, guard: bool) -> bool:
    if len(text) > _MAX_EXPRESSION_CHARS or not text.isascii():
        return False
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    named: set[int] = set()  # names that stand where a function is called
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if not _plain_call(node, guard=guard):
                return False
            named.add(id(node.func))
        elif isinstance(node, ast.keyword):
            if node.arg not in _KEYWORDS:
                return False
        elif isinstance(node, ast.Constant):
            if not _plain_constant(node.value, guard=guard):
                return False
        elif isinstance(node, ast.Name):
            known = node.id in _CONSTANTS or _SYMBOL.fullmatch(node.id) is not None
            if not known and id(node) not in named and not (guard and node.id == "L"):
                return False
        elif isinstance(node, ast.Attribute):
            if id(node) not in named:
                return False
        elif isinstance(node, ast.Subscript):
            if not guard:
                return False
        elif not isinstance(node, _ARITHMETIC):
            return False
    return True


def _plain_call(node: ast.Call, *, guard: bool) -> bool:
    """A function of sympy's, or in a guard a tensor's size."""
    if isinstance(node.func, ast.Name):
        return node.func.id in _FUNCTIONS
    return (
        guard
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in _METHODS
        and not node.args
        and not node.keywords
    )


def _plain_constant(value: object, *, guard: bool) -> bool:
    """A number, or the name of a symbol (in a guard: of an argument)."""
    if isinstance(value, str):
        return is_name(value) if guard else _SYMBOL.fullmatch(value) is not None
    return isinstance(value, bool | int | float)


def is_tree(text: str) -> bool:
    """Tuples, lists and dicts with plain keys, as torch stores what goes in and out."""
    if len(text) > _MAX_TREE_CHARS:
        return False
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return False
    if not isinstance(document, list) or len(document) != 2 or document[0] != 1:
        return False
    stack: list[Any] = [document[1]]
    while stack:
        node = stack.pop()
        if not isinstance(node, dict) or set(node) != {"type", "context", "children_spec"}:
            return False
        if not isinstance(node["children_spec"], list):
            return False
        stack.extend(node["children_spec"])
        if node["type"] is None:
            if node["context"] is not None or node["children_spec"]:
                return False
        elif node["type"] not in _CONTAINERS or not _plain_context(node["context"]):
            return False
    return True


def _plain_context(text: object) -> bool:
    """The keys of a dict as JSON, or ``null``."""
    if not isinstance(text, str):
        return False
    try:
        keys = json.loads(text)
    except (ValueError, RecursionError):
        return False
    if keys is None:
        return True
    return isinstance(keys, list) and all(
        is_path(key) if isinstance(key, str) else type(key) is int for key in keys
    )
