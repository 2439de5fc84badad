"""The floors: imports point downward only, and within a floor leftward in the listed order.

The house is drawn in docs/architecture.md; this test holds it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "impasto"

#: from the ground up; within a floor from left to right
FLOORS = [
    ["core"],
    ["diffusion", "deltas", "mini"],
    ["formats", "families"],
    ["objectives", "methods", "data", "toolbox"],
    ["training", "evaluation"],
    ["planning"],
    ["cli"],
]
PLACE = {room: (floor, door) for floor, rooms in enumerate(FLOORS) for door, room in enumerate(rooms)}
FILES = sorted(PACKAGE.rglob("*.py"))
NETWORKS = PACKAGE / "families" / "networks.py"


def imports(path: Path) -> list[str]:
    """Dotted names that a file imports anywhere, lazily ones included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_point_downward(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0]
    if room.endswith(".py"):
        return  # the lobby: impasto/__init__.py and __main__.py
    for name in imports(path):
        other = name.split(".")[1] if name.startswith("impasto.") else None
        if other in PLACE and other != room:
            same_floor = PLACE[other][0] == PLACE[room][0]
            assert PLACE[other] < PLACE[room], (
                f"{room} imports {name}, which is {'to its right' if same_floor else 'upstairs'}")


def test_every_room_has_its_place() -> None:
    rooms = {p.name for p in PACKAGE.iterdir() if p.is_dir() and any(p.glob("*.py"))}
    assert rooms == set(PLACE)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_one_module_knows_the_networks(path: Path) -> None:
    """diffusers' models and transformers are imported in one place (schedulers are not networks)."""
    if path == NETWORKS:
        return
    for name in imports(path):
        assert not name.startswith(("diffusers.models", "diffusers.UNet", "diffusers.Autoencoder")), name
        assert not (name.startswith("transformers.") and "Model" in name), name


def test_no_family_is_asked_for_by_name_outside_families() -> None:
    for path in FILES:
        if path.relative_to(PACKAGE).parts[0] not in ("families", "formats"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Compare):
                    assert not any(isinstance(c, ast.Constant) and c.value in ("sd1", "sd2", "sdxl", "sd3")
                                   for c in [node.left, *node.comparators]), f"{path}:{node.lineno}"


@pytest.mark.parametrize("command", ["import impasto", "import impasto.cli"])
def test_the_lobby_is_free_of_torch(command: str) -> None:
    code = f"{command}; import sys; print(sorted({{'torch', 'diffusers', 'transformers'}} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
