"""An empty Hydra application: what any command that uses Hydra costs at least."""

from __future__ import annotations

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path=None)
def main(_: DictConfig) -> None:
    """Do nothing."""


if __name__ == "__main__":
    main()
