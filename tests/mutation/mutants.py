"""Small changes of a source file, each as a person might forget or mistake one thing: what tests of a check have to notice.

Only what functions do is changed. Not changed, because no check is in it: what stands in a `raise` beside the keyword and in texts of
any kind (messages and hints), docstrings, annotations, `assert` (an invariant of ours, bad input never reaches one), default
arguments, and statements outside of functions, that is tables and named limits.
"""

import ast
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

_COMPARISONS: Final[dict[type[ast.cmpop], str]] = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.In: "not in",
    ast.NotIn: "in",
    ast.Is: "is not",
    ast.IsNot: "is",
}
"""A boundary moved by one; what has no boundary is turned around."""

_COMPARISON_TEXTS: Final[dict[type[ast.cmpop], str]] = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.In: "in",
    ast.NotIn: "not in",
    ast.Is: "is",
    ast.IsNot: "is not",
}

_ARITHMETIC: Final[dict[type[ast.operator], tuple[str, str]]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "//"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.BitXor: ("^", "&"),
}

_CALLS: Final = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change.

    Attributes:
        module: Path of the file, relative to the repository.
        function: Qualified name of the outermost function that holds the change.
        function_line: Where that begins, decorators included.
        operator: What kind of change it is.
        span: Line, column, end line, end column of what is replaced; lines from 1, columns in bytes.
        lines: First and last line of the statement, without its body.
        before: What stood there, on one line.
        after: What takes its place.
        text: The first of `lines`, without indentation.
        ordinal: Tells mutants apart that agree in everything but the position.
    """

    module: str
    function: str
    function_line: int
    operator: str
    span: tuple[int, int, int, int]
    lines: tuple[int, int]
    before: str
    after: str
    text: str
    ordinal: int = 0

    @property
    def change(self) -> str:
        """Before and after, as people write it."""
        return f"{self.before} → {self.after}"

    @property
    def key(self) -> str:
        """16 digits that stay the same as long as the function, the line and the change do, wherever they stand."""
        parts = (self.module, self.function, self.operator, self.text, self.change, str(self.ordinal))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def apply(self, source: str) -> str:
        """The changed source file."""
        line, column, end_line, end_column = self.span
        lines = source.encode().splitlines(keepends=True)
        head, tail = lines[line - 1][:column], lines[end_line - 1][end_column:]
        return b"".join([*lines[: line - 1], head + self.after.encode() + tail, *lines[end_line:]]).decode()


def mutants_of(module: str, source: str) -> list[Mutant]:
    """All mutants of a source file, in order.

    Args:
        module: Path of the file, relative to the repository.
        source: Its text.
    """
    found: list[Mutant] = []
    counts: Counter[str] = Counter()
    for mutant in _Finder(module, source).find():
        found.append(replace(mutant, ordinal=counts[mutant.key]))
        counts[mutant.key] += 1
    assert len({mutant.key for mutant in found}) == len(found)
    return found


def functions_of(source: str) -> dict[str, range]:
    """The lines of each outermost function, by its qualified name."""

    def found(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, range]]:
        for node in body:
            if isinstance(node, ast.ClassDef):
                yield from found(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                yield prefix + node.name, range(node.lineno, (node.end_lineno or 0) + 1)

    return dict(found(ast.parse(source).body, ""))


class _Finder:
    """Walks the functions of one file."""

    def __init__(self, module: str, source: str) -> None:
        self._module = module
        self._source = source
        self._lines = source.encode().splitlines(keepends=True)
        self._function = ("", 0)
        self._statement = (0, 0)

    def find(self) -> Iterator[Mutant]:
        yield from self._definitions(ast.parse(self._source).body, "")

    def _definitions(self, body: list[ast.stmt], prefix: str) -> Iterator[Mutant]:
        for node in body:
            if isinstance(node, ast.ClassDef):
                yield from self._definitions(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                self._function = (prefix + node.name, first)
                yield from self._body(node.body, is_function=True)

    def _mutant(self, operator: str, node: ast.AST, after: str) -> Mutant:
        assert isinstance(node, ast.expr | ast.stmt | ast.excepthandler)
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        span = (node.lineno, node.col_offset, node.end_lineno, node.end_col_offset)
        return self._at(operator, span, " ".join(self._text(node).split()), after)

    def _at(self, operator: str, span: tuple[int, int, int, int], before: str, after: str) -> Mutant:
        text = self._lines[self._statement[0] - 1].decode().strip()
        name, line = self._function
        return Mutant(self._module, name, line, operator, span, self._statement, before, after, text)

    def _text(self, node: ast.expr | ast.stmt | ast.excepthandler) -> str:
        assert node.end_lineno is not None
        lines = self._lines[node.lineno - 1 : node.end_lineno]
        lines[-1] = lines[-1][: node.end_col_offset]
        lines[0] = lines[0][node.col_offset :]
        return b"".join(lines).decode()

    # --- statements

    def _body(self, body: list[ast.stmt], *, is_function: bool = False) -> Iterator[Mutant]:
        for node in body:
            self._statement = _header(node)
            is_last = is_function and node is body[-1]
            yield from self._removals(node, is_last=is_last)
            yield from self._parts(node)

    def _removals(self, node: ast.stmt, *, is_last: bool) -> Iterator[Mutant]:
        match node:
            case ast.Expr(value=ast.Constant()):
                return
            case ast.Expr() | ast.Raise() | ast.AugAssign() | ast.Delete() | ast.Continue() | ast.Break():
                yield self._mutant("statement", node, "pass")
            case ast.Assign(targets=[target]) if isinstance(target, ast.Attribute | ast.Subscript):
                yield self._mutant("statement", node, "pass")
            case ast.Return() if not is_last:
                yield self._mutant("statement", node, "pass")

    def _parts(self, node: ast.stmt) -> Iterator[Mutant]:
        match node:
            case ast.Raise() | ast.Assert():
                return
            case ast.FunctionDef():
                yield from self._body(node.body)
            case ast.If() | ast.While():
                yield from self._condition(node.test, may_be_true=isinstance(node, ast.If))
                yield from self._body(node.body)
                yield from self._body(node.orelse)
            case ast.For():
                yield from self._loop(node.iter)
                yield from self._body(node.body)
                yield from self._body(node.orelse)
            case ast.With():
                for item in node.items:
                    yield from self._expression(item.context_expr)
                yield from self._body(node.body)
            case ast.Try():
                yield from self._try(node)
            case ast.AnnAssign():
                yield from self._expression(node.value)
            case _:
                for child in ast.iter_child_nodes(node):
                    yield from self._expression(child)

    def _try(self, node: ast.Try) -> Iterator[Mutant]:
        yield from self._body(node.body)
        for handler in node.handlers:
            self._statement = (handler.lineno, handler.lineno)
            kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
            for kind in kinds:
                if kind is not None:
                    yield self._mutant("handler", kind, "()")
            yield from self._body(handler.body)
        yield from self._body(node.orelse)
        yield from self._body(node.finalbody)

    # --- expressions

    def _condition(self, test: ast.expr, *, may_be_true: bool = True) -> Iterator[Mutant]:
        if isinstance(test, ast.Constant):
            return
        if may_be_true:
            yield self._mutant("condition", test, "True")
        yield self._mutant("condition", test, "False")
        match test:
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                # Without its `not` a condition says the opposite, which one of these two does as well.
                yield from self._expression(operand)
            case _:
                yield from self._expression(test)

    def _loop(self, source: ast.expr) -> Iterator[Mutant]:
        yield self._mutant("loop", source, "()")
        yield from self._expression(source)

    def _expression(self, node: ast.AST | None) -> Iterator[Mutant]:
        match node:
            case None | ast.JoinedStr() | ast.Constant(value=None | str() | bytes()):
                return
            case ast.Constant(value=bool(value)):
                yield self._mutant("constant", node, str(not value))
            case ast.Constant(value=int() | float() as number):
                yield self._mutant("constant", node, str(number + 1))
            case ast.IfExp():
                yield from self._condition(node.test)
                yield from self._expression(node.body)
                yield from self._expression(node.orelse)
                return
            case ast.comprehension():
                yield from self._loop(node.iter)
                for test in node.ifs:
                    yield from self._condition(test)
                return
            case ast.BoolOp():
                yield from self._operands(node)
            case ast.Compare():
                yield from self._comparisons(node)
            case ast.BinOp() if type(node.op) in _ARITHMETIC:
                yield self._between("arithmetic", node.left, node.right, *_ARITHMETIC[type(node.op)])
            case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert()):
                yield self._mutant("sign", node, self._text(node.operand))
            case ast.Call(func=ast.Name(id=name)) if name in _CALLS:
                yield self._mutant("call", node.func, _CALLS[name])
            case ast.Slice():
                for bound in (node.lower, node.upper):
                    if bound is not None:
                        yield self._mutant("bound", bound, "None")
        assert node is not None
        for child in ast.iter_child_nodes(node):
            yield from self._expression(child)

    def _operands(self, node: ast.BoolOp) -> Iterator[Mutant]:
        word = " and " if isinstance(node.op, ast.And) else " or "
        for dropped in node.values:
            others = [value for value in node.values if value is not dropped]
            # In one pair of brackets for all, since a text on several lines has lost those that held it together.
            after = "(" + word.join(f"({self._text(value)})" for value in others) + ")"
            yield replace(self._mutant("operand", node, after), before=" ".join(self._text(dropped).split()))

    def _comparisons(self, node: ast.Compare) -> Iterator[Mutant]:
        terms = [node.left, *node.comparators]
        for left, right, operator in zip(terms, terms[1:], node.ops, strict=False):
            before, after = _COMPARISON_TEXTS[type(operator)], _COMPARISONS[type(operator)]
            yield self._between("comparison", left, right, before, after)

    def _between(self, kind: str, left: ast.expr, right: ast.expr, before: str, after: str) -> Mutant:
        """Replace an operator: it stands between its operands, beside brackets and line breaks."""
        assert left.end_lineno is not None
        assert left.end_col_offset is not None
        for line in range(left.end_lineno, right.lineno + 1):
            start = left.end_col_offset if line == left.end_lineno else 0
            end = right.col_offset if line == right.lineno else len(self._lines[line - 1])
            found = self._lines[line - 1].find(before.encode(), start, end)
            if found >= 0:
                shown = " ".join(self._text(left).split()), " ".join(self._text(right).split())
                mutant = self._at(kind, (line, found, line, found + len(before)), before, after)
                return replace(mutant, before=f"{shown[0]} {before} {shown[1]}")
        raise AssertionError(f"{self._module}:{left.end_lineno}: no {before}")


def _header(node: ast.stmt) -> tuple[int, int]:
    """First and last line of a statement without the statements in it."""
    body = getattr(node, "body", None)
    end = node.end_lineno or node.lineno
    return node.lineno, max(node.lineno, body[0].lineno - 1) if body else end
