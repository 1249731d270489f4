"""The rooms of the package: imports go one way, from what a user calls down to the operators."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import flatmin

PACKAGE = Path(flatmin.__file__).parent

#: What each room may import from. The ground floor is every module that lies beside the rooms.
GROUND = "ground"
ROOMS = {
    GROUND: set(),
    "reference": {GROUND},
    "ops": {GROUND, "reference"},
    "curvature": {GROUND, "reference", "ops"},
    "optim": {GROUND, "reference", "ops", "curvature"},
    "sharpness": {GROUND, "ops", "curvature"},
    "label_noise": {GROUND, "reference", "ops", "curvature"},
}

#: Modules beside the rooms that are no ground: they show the rooms to a user.
TOP = {"__init__", "__main__", "_installation", "_selftest", "sam", "noise"}


def modules() -> Iterator[Path]:
    yield from sorted(PACKAGE.rglob("*.py"))


def parts_of(module: Path) -> tuple[str, ...]:
    return module.relative_to(PACKAGE).with_suffix("").parts


def imported(module: Path) -> Iterator[tuple[str, ...]]:
    """Modules of flatmin that a module imports, whether at its top or within a function."""
    package = parts_of(module)[:-1]
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "flatmin"):
            base = package[: len(package) - node.level + 1] if node.level else ()
            named = tuple((node.module or "").split(".")) if node.module else ()
            named = named[1:] if not node.level else named
            for alias in node.names:
                yield resolved((*base, *named), alias.name)
        elif isinstance(node, ast.Import):
            yield from (tuple(a.name.split(".")[1:]) for a in node.names if a.name.split(".")[0] == "flatmin")


def resolved(path: tuple[str, ...], name: str) -> tuple[str, ...]:
    """The module that ``from path import name`` reads: a submodule of that name, or the package itself."""
    deeper = PACKAGE.joinpath(*path, name)
    return (*path, name) if deeper.with_suffix(".py").exists() or deeper.is_dir() else path


def room_of(parts: tuple[str, ...]) -> str | None:
    if len(parts) > 1 or (PACKAGE / parts[0]).is_dir():
        return parts[0]
    return None if parts[0] in TOP else GROUND


def edges() -> dict[tuple[str, ...], set[tuple[str, ...]]]:
    return {parts_of(m): {target for target in imported(m) if target} for m in modules()}


def test_every_room_is_known() -> None:
    found = {p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert found <= set(ROOMS)


@pytest.mark.parametrize("module", list(modules()), ids=lambda m: "/".join(parts_of(m)))
def test_imports_go_down(module: Path) -> None:
    room = room_of(parts_of(module))
    if room is None:  # the top imports what it likes
        return
    for target in imported(module):
        above = room_of(target) if target else "flatmin itself"
        assert above == room or above in ROOMS[room], f"{'.'.join(parts_of(module))} imports {'.'.join(target)}"


def test_no_modules_import_each_other() -> None:
    """A package and its modules count as one where the package only gathers names."""
    graph = {
        module: {target for target in targets if (*target, "__init__") != module and target != module[:-1]}
        for module, targets in edges().items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(".".join(parts) for parts in error.args[1]))


def test_an_arrow_back_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself: a package of two rooms that import each other."""
    for name, text in (("ops", "from ..optim import x\n"), ("optim", "from ..ops import y\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
        (tmp_path / name / "_m.py").write_text(text)
    monkeypatch.setattr("test_imports.PACKAGE", tmp_path)
    with pytest.raises(AssertionError, match=r"ops\._m imports optim"):
        test_imports_go_down(tmp_path / "ops" / "_m.py")
    test_imports_go_down(tmp_path / "optim" / "_m.py")
