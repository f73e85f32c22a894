"""Find the control groups (v1 and v2) that this process is in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from zinfer.machine.disk import mounts
from zinfer.machine.reading import ROOT, read_text


def cgroup_folders(controller: str, root: Path = ROOT) -> Iterator[Path]:
    """List the cgroup folders of this process, innermost first: the v1 controller's and v2's.

    A container may see its own cgroup as the root of the tree. The process's path is then not below
    the mount, and the mount is the group.
    """
    paths = dict(_process_cgroups(root))
    for mount in mounts(root):
        v1 = mount.filesystem == "cgroup" and controller in mount.super_options.split(",")
        if not v1 and mount.filesystem != "cgroup2":
            continue
        path = paths.get(controller if v1 else "")
        if path is None:
            continue
        top = root / mount.mount_point.lstrip("/")
        inside = os.path.relpath(path, mount.mounted_folder)
        here = top if inside.startswith("..") or not (top / inside).is_dir() else top / inside
        while True:
            yield here
            if here == top or top not in here.parents:
                break
            here = here.parent


def _process_cgroups(root: Path) -> Iterator[tuple[str, str]]:
    """Parse /proc/self/cgroup: controller ('' for v2) and path of each line.

    Lines look like `4:memory:/docker/1f` and `0::/user.slice`.
    """
    for line in read_text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in controllers.split(",") if number != "0" else [""]:
            yield controller, path
