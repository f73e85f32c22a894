"""Count every model of the catalogue into zinfer/model/catalogue_specs.zip.

Run `make catalogue-specs` after a change to the code that counts.
"""

from __future__ import annotations

from pathlib import Path

from hydra import compose, initialize_config_dir

from zinfer.config import ModelConfig, parse_config
from zinfer.model.spec import count
from zinfer.model.spec_cache import CATALOGUE, cache_key, write_catalogue

CONF = Path(__file__).parent.parent / "conf"
NEEDS_A_SOURCE = "custom"


def catalogue() -> list[ModelConfig]:
    """Return every model of conf/model as a run composes it, custom apart."""
    names = sorted(
        path.stem for path in (CONF / "model").glob("*.yaml") if path.stem != NEEDS_A_SOURCE
    )
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return [
            parse_config(compose("config", overrides=[f"model={name}"])).model for name in names
        ]


if __name__ == "__main__":
    models = catalogue()
    counted = []
    for done, model in enumerate(models, 1):
        print(f"{done}/{len(models)} {model.name}", flush=True)
        key, is_stored = cache_key(model)
        if is_stored:
            counted.append((key, count(model)))
    write_catalogue(counted)
    print(f"{CATALOGUE.name}: {len(counted)} models, {CATALOGUE.stat().st_size / 1e3:.0f} kB")
