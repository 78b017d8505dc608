"""Finds code that changes attributes or containers of vLLM, transformers, torch or sys."""

import ast

FOREIGN = {"vllm", "transformers", "torch", "sys"}
CHANGING = {
    *("append", "insert", "extend", "remove", "pop", "clear", "sort", "reverse"),
    *("update", "setdefault", "popitem", "add", "discard", "__setattr__", "__setitem__"),
}


def foreign_writes(code: str) -> list[str]:
    """Return "line: code" of each such change.

    Imported names are foreign, and so are attributes and items of foreign values, their types and
    `vars`, and names that are bound to any of these. The result of any other call is not: an object
    that was made here is ours.
    """
    tree = ast.parse(code)
    names: set[str] = set()
    while True:  # until a pass over the file binds no further name
        found = names | _bound(tree, names)
        if found == names:
            break
        names = found
    return [
        f"{node.lineno}: {ast.unparse(node).partition(chr(10))[0]}"
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt | ast.expr) and _changes(node, names)
    ]


def _bound(tree: ast.AST, names: set[str]) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                for alias in node.names:
                    if alias.name.partition(".")[0] in FOREIGN:
                        found.add(alias.asname or alias.name.partition(".")[0])
            case ast.ImportFrom(module=str(module), level=0):
                if module.partition(".")[0] in FOREIGN:
                    found |= {alias.asname or alias.name for alias in node.names}
            case ast.Assign(targets=targets, value=value) if _is_foreign(value, names):
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value) if _is_foreign(
                value, names
            ):
                found.add(name)
    return found


def _is_foreign(node: ast.expr, names: set[str]) -> bool:
    match node:
        case ast.Name(id=name):
            return name in names
        case ast.Attribute(value=value) | ast.Subscript(value=value):
            return _is_foreign(value, names)
        case ast.Call(func=ast.Name(id="type" | "vars" | "getattr"), args=[value, *_]):
            return _is_foreign(value, names)
        case ast.Call(func=function, args=[ast.Constant(value=str(module)), *_]):
            called = ast.unparse(function).rpartition(".")[2]
            return called == "import_module" and module.partition(".")[0] in FOREIGN
    return False


def _changes(node: ast.AST, names: set[str]) -> bool:
    match node:
        case ast.Assign(targets=targets) | ast.Delete(targets=targets):
            return any(_is_part(target, names) for target in targets)
        case ast.AugAssign(target=target):
            return _is_part(target, names) or _is_foreign(target, names)
        case ast.AnnAssign(target=target):
            return _is_part(target, names)
        case ast.Call(func=ast.Name(id="setattr" | "delattr"), args=[owner, *_]):
            return _is_foreign(owner, names)
        case ast.Call(func=ast.Attribute(value=ast.Name(id=name))) if name in FOREIGN:
            return False  # a function: torch.add
        case ast.Call(func=ast.Attribute(value=value, attr=name)) if name in CHANGING:
            return _is_foreign(value, names)
    return False


def _is_part(target: ast.expr, names: set[str]) -> bool:
    """Whether the target is an attribute or an item of something foreign."""
    if isinstance(target, ast.Tuple | ast.List):
        return any(_is_part(part, names) for part in target.elts)
    return isinstance(target, ast.Attribute | ast.Subscript) and _is_foreign(target.value, names)
