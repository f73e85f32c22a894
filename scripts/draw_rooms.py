"""Draw the rooms and their imports into docs/architecture.md, from the code.

    python scripts/draw_rooms.py            # rewrite the diagram
    python scripts/draw_rooms.py --check    # exit code 1 if it is not current

An arrow says "imports from". Arrows that follow from others are left out. The way of a run
through the rooms is drawn with dotted arrows; it is written in WAY below.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- rooms: made by scripts/draw_rooms.py -->", "<!-- end of rooms -->"
WAY = (  # from, to, what is handed over
    ("config", "driver", "RunConfig"),
    ("driver", "worker", "job.json"),
    ("worker", "driver", "events.jsonl"),
    ("driver", "tracking", "Outcome"),
)


def rooms() -> list[str]:
    """Name the rooms and modules of the layers contract, highest first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    contract = next(found for found in settings["contracts"] if found["id"] == "rooms")
    return [name.strip("() ") for layer in contract["layers"] for name in layer.split("|")]


def imports(names: list[str]) -> dict[str, set[str]]:
    """Return for each room the rooms that its modules import from."""
    graph = grimp.build_graph("zinfer", exclude_type_checking_imports=True, cache_dir=None)
    found: dict[str, set[str]] = {name: set() for name in names}
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            source, target = module.split(".")[1:2], imported.split(".")[1:2]
            if source and target and source != target:
                found[source[0]].add(target[0])
    return found


def without_implied(found: dict[str, set[str]]) -> dict[str, set[str]]:
    """Leave out an arrow where a longer way leads to the same room."""

    def reached(room: str) -> set[str]:
        return set().union(*({target} | reached(target) for target in found[room]))

    return {
        room: {
            target
            for target in targets
            if not any(target in reached(other) for other in targets - {target})
        }
        for room, targets in found.items()
    }


def diagram() -> str:
    """Draw the rooms as Mermaid text."""
    names = rooms()
    folders = [name for name in names if (ROOT / "zinfer" / name).is_dir()]
    found = {
        room: targets & set(folders) for room, targets in imports(names).items() if room in folders
    }
    lines = ["```mermaid", "flowchart TD"]
    lines += [f"    {name}" for name in folders]
    lines += [
        f"    {room} --> {target}"
        for room, targets in without_implied(found).items()
        for target in sorted(targets)
    ]
    lines += [f"    {source} -.->|{what}| {target}" for source, target, what in WAY]
    return "\n".join([*lines, "```"])


def redrawn(page: str) -> str:
    """Put the current diagram into the text of the page."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{diagram()}\n{END}{after}"


def main(arguments: list[str]) -> int:
    page = PAGE.read_text()
    current = redrawn(page)
    if "--check" in arguments:
        if page != current:
            print("docs/architecture.md is not current. Run: python scripts/draw_rooms.py")
        return int(page != current)
    PAGE.write_text(current)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
