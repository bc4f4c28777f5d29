"""Packages read as text: what a name stands for, what a class has, what a call may pass.

    tree = Tree({"vllm": folder / "vllm"})
    cls = tree.find("vllm.v1.attention.backend.AttentionBackend")
    signature(tree.member(cls, "validate_configuration")).parameters

Nothing is imported, so packages can be read that cannot run here, and two versions of one.
"""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

P = inspect.Parameter
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
KINDS = {"staticmethod", "classmethod", "property"}


class Definition(NamedTuple):
    """A statement that defines a name, or (`node` is None) the dotted name of something outside."""

    module: str
    node: ast.AST | None


class Tree:
    """Modules by dotted name. roots: the folder of each package; the longest matching name counts."""

    def __init__(self, roots: dict[str, Path]):
        self.roots, self._modules = roots, {}

    def path(self, name: str) -> Path | None:
        for package in sorted(self.roots, key=len, reverse=True):
            if name == package or name.startswith(package + "."):
                base = self.roots[package].joinpath(*name[len(package) + 1 :].split("."))
                return next((p for p in (base / "__init__.py", base.with_suffix(".py")) if p.is_file()), None)
        return None

    def module(self, name: str) -> ast.Module | None:
        if name not in self._modules:
            path = self.path(name)
            self._modules[name] = path and ast.parse(path.read_text(encoding="utf-8"))
        return self._modules[name]

    def find(self, dotted: str) -> Definition:
        """What `module.name` stands for. Raises LookupError where the module has no such name."""
        module, _, name = dotted.rpartition(".")
        found = self.lookup(module, name)
        if found is None:
            raise LookupError(f"no {dotted}")
        return found

    def lookup(self, module: str, name: str) -> Definition | None:
        """The same for one name, re-exports followed; None where there is no such name."""
        tree = self.module(module)
        if tree is None:
            return None
        found = None
        for node in statements(tree.body):
            if isinstance(node, (ast.ClassDef, *FUNCTIONS)) and node.name == name:
                found = Definition(module, node)  # the last one: others before it are overloads
            elif found is None and name in assigned(node):
                found = Definition(module, node)
            elif found is None and isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if name == (alias.asname or alias.name):
                        source = self._source(module, node)
                        outside = source.partition(".")[0] not in self.roots
                        whole = Definition(f"{source}.{alias.name}", None)
                        found = whole if outside else self.lookup(source, alias.name)
        return found

    def _source(self, module: str, node: ast.ImportFrom) -> str:
        """The absolute name of the module that `from ... import` names."""
        if not node.level:
            return node.module
        up = node.level - (self.path(module).name == "__init__.py")
        return ".".join(module.split(".")[: len(module.split(".")) - up] + [node.module] * bool(node.module))

    def bases(self, cls: Definition) -> list[Definition]:
        """The bases of a class, nearest first, its bases' bases included."""
        order = []
        for base in cls.node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base  # Generic[T]
            name = ast.unparse(base)
            found = self.lookup(cls.module, name) if isinstance(base, ast.Name) else None
            found = found or Definition(name, None)
            order += [found, *(self.bases(found) if isinstance(found.node, ast.ClassDef) else [])]
        return list(dict.fromkeys(order))

    def member(self, cls: Definition, name: str) -> ast.AST | None:
        """The statement that defines an attribute in the class or the nearest base; None without one."""
        for definition in (cls, *self.bases(cls)):
            if isinstance(definition.node, ast.ClassDef):
                found = next((node for known, node in members(definition.node) if known == name), None)
                if found is not None:
                    return found
        return None

    def classes(self, module: str) -> list[Definition]:
        nodes = statements(self.module(module).body)
        return [Definition(module, node) for node in nodes if isinstance(node, ast.ClassDef)]


def statements(body: list) -> Iterator[ast.stmt]:
    """The statements of a module or class, those within `if`, `try` and `with` included."""
    for node in body:
        yield node
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            for field in ("body", "orelse", "finalbody", "handlers"):
                for inner in getattr(node, field, ()):
                    yield from statements(inner.body if isinstance(inner, ast.ExceptHandler) else [inner])


def assigned(node: ast.AST) -> list[str]:
    """The plain names that a statement assigns to."""
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def members(cls: ast.ClassDef) -> Iterator[tuple[str, ast.AST]]:
    """What a class itself defines: its methods, fields, and what they set on `self`."""
    for node in statements(cls.body):
        if isinstance(node, (ast.ClassDef, *FUNCTIONS)):
            yield node.name, node
        for name in assigned(node):
            yield name, node
    for node in ast.walk(cls):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            if isinstance(target, ast.Attribute) and getattr(target.value, "id", None) == "self":
                yield target.attr, node
        registers = isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "register_buffer"
        if registers and isinstance(node.args[0], ast.Constant):
            yield node.args[0].value, node


def fields(cls: ast.ClassDef) -> list[str]:
    """The annotated names of a class: the fields of a dataclass or named tuple."""
    return [node.target.id for node in cls.body if isinstance(node, ast.AnnAssign)]


def kinds(function) -> set[str]:
    return KINDS & {ast.unparse(decorator) for decorator in function.decorator_list}


def signature(function, bound: bool = True) -> inspect.Signature:
    """The parameters of a function as called; of a method without the first one."""
    a = function.args
    plain = [*a.posonlyargs, *a.args]
    kind = [P.POSITIONAL_ONLY] * len(a.posonlyargs) + [P.POSITIONAL_OR_KEYWORD] * len(a.args)
    default = [P.empty] * (len(plain) - len(a.defaults)) + [None] * len(a.defaults)
    parameters = [P(x.arg, k, default=d) for x, k, d in zip(plain, kind, default, strict=True)]
    parameters = parameters[bound and "staticmethod" not in kinds(function) :]
    parameters += [P(a.vararg.arg, P.VAR_POSITIONAL)] if a.vararg else []
    parameters += [
        P(x.arg, P.KEYWORD_ONLY, default=P.empty if d is None else None)
        for x, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)
    ]
    parameters += [P(a.kwarg.arg, P.VAR_KEYWORD)] if a.kwarg else []
    return inspect.Signature(parameters)


def misfit(call: ast.Call, function) -> str | None:
    """Why a method does not take a call; None when it does. What `*` and `**` pass is not known."""
    positional = [x for x in call.args if not isinstance(x, ast.Starred)]
    keywords = {k.arg: None for k in call.keywords if k.arg}
    whole = len(positional) + len(keywords) == len(call.args) + len(call.keywords)
    taken = signature(function)
    try:
        (taken.bind if whole else taken.bind_partial)(*positional, **keywords)
    except TypeError as error:
        return f"{ast.unparse(call)}: {error}"
    return None


def disagreement(base, ours) -> str | None:
    """Why `ours` cannot stand in for the method `base`; None when it can. Types do not count."""
    if kinds(base) != kinds(ours):
        return f"the base is {', '.join(kinds(base)) or 'a plain method'}"
    theirs, own = signature(base).parameters, signature(ours).parameters
    star, stars = (any(p.kind == kind for p in own.values()) for kind in (P.VAR_POSITIONAL, P.VAR_KEYWORD))
    for place, p in enumerate(theirs.values()):
        if p.kind in (P.VAR_POSITIONAL, P.VAR_KEYWORD):
            continue
        if p.name not in own:
            if stars and (star or p.kind == P.KEYWORD_ONLY):
                continue
            return f"the base also takes {p.name}"
        if p.kind != P.KEYWORD_ONLY and list(own).index(p.name) != place:
            return f"the base takes {p.name} as parameter {place}"
        if p.default is not P.empty and own[p.name].default is P.empty:
            return f"{p.name} has a default in the base"
    extra = [p.name for p in own.values() if p.default is P.empty and p.kind not in (P.VAR_POSITIONAL, P.VAR_KEYWORD)]
    extra = [name for name in extra if name not in theirs]
    return f"the base does not give {', '.join(extra)}" if extra else None
