"""Compile DeepSpeed's ops, or show which are there.

python -m zinfer.machine.native_ops build                    # for offload=none and offload=cpu
python -m zinfer.machine.native_ops build --offload nvme     # and for NVMe
python -m zinfer.machine.native_ops build OP ...             # the ops named
python -m zinfer.machine.native_ops status
"""

from __future__ import annotations

import argparse
import sys

from zinfer.machine.native_ops.building import build, compile_here
from zinfer.machine.native_ops.folder import built, extensions_dir, stale_lock
from zinfer.machine.native_ops.missing import missing_requirements
from zinfer.machine.native_ops.table import OPS, all_ops, ops_needed


def main(arguments: list[str] | None = None) -> int:
    """Run `build`, `status`, or `compile`, which `build` starts for each op. Exit code."""
    given = _parsed(arguments)
    if given.action == "compile":
        for op in given.ops:
            compile_here(op)
        return 0
    if given.action == "status":
        _show_status()
        return 0
    return _build_what_can_be(given.ops or ops_needed(given.offload), bool(given.ops))


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m zinfer.machine.native_ops", description="DeepSpeed's compiled ops"
    )
    parser.add_argument("action", choices=["build", "status", "compile"])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"choose from: {', '.join(OPS)}")
    parser.add_argument(
        "--offload",
        choices=["none", "cpu", "nvme"],
        default="cpu",
        help="build what this target needs; nvme takes minutes (default: cpu)",
    )
    given = parser.parse_args(arguments)
    if unknown := [op for op in given.ops if op not in OPS]:
        parser.error(f"there is no op {', '.join(unknown)}. Choose from: {', '.join(OPS)}")
    return given


def _show_status() -> None:
    """Print each op's state, and what lacks here."""
    print(f"ops in {extensions_dir()}")
    for op, row in OPS.items():
        lock = stale_lock(op)
        note = f"; stale lock {lock}" if lock else ""
        print(f"  {op:20} {'built' if built(op) else 'not built':10} {row.purpose}{note}")
    print("\n".join(missing_requirements(all_ops())))


def _build_what_can_be(ops: list[str], chosen: bool) -> int:
    """Build what can be built here; print what lacks for the rest. Exit code.

    A run that needs what lacks is refused with the same words.
    """
    problems = missing_requirements(ops)
    for problem in problems:
        print(problem)
    if problems and not chosen:
        ops = [op for op in ops if not missing_requirements([op])]
    try:
        seconds = build(ops, echo=lambda line: print(line, flush=True))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    done = f": {', '.join(ops)}" if ops else ": none is needed"
    print(
        f"DeepSpeed's ops are in {extensions_dir()}{done}{'' if seconds else ' (nothing to build)'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
