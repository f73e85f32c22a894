"""Find a GGUF file, and say what is wrong with one that cannot be read.

The readers of gguf and transformers name neither the file nor the tensor.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinfer.model.foreign import whole_sentence

if TYPE_CHECKING:
    from zinfer.config import ModelConfig

MAGIC = b"GGUF"


def gguf_path(model: ModelConfig, source: str) -> Path:
    """Return the file in a local folder, or downloaded from the hub.

    Raises:
        OSError: the hub or the file cannot be reached.
    """
    file = str(model.gguf_file)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder / file
    from transformers.utils.hub import cached_file

    return Path(cached_file(source, file))


def gguf_fault(path: Path, error: BaseException) -> str:
    """Return one sentence for a GGUF file that could not be read, with what to do.

    Args:
        error: what the reader said; it is the sentence where nothing better is found.
    """
    if not path.is_file():
        return f"there is no file {path}. Correct model.gguf_file"
    with path.open("rb") as file:
        begin = file.read(64)
    if not begin.startswith(MAGIC):
        return f"{path} is not a GGUF file: it begins with {begin[:16]!r}. Download it again"
    try:
        said = _damage(path)
    except ImportError as missing:
        return f"{path} cannot be read: {whole_sentence(missing)}. Run: pip install gguf"
    except (ValueError, KeyError, IndexError, OverflowError, TypeError, MemoryError) as cut:
        return (
            f"{path} is cut short or damaged: its list of tensors cannot be read "
            f"({whole_sentence(cut)}). Download it again"
        )
    return said or f"{path} cannot be used: {whole_sentence(error)}"


def _damage(path: Path) -> str | None:
    """Say which tensor lies beyond the file's end or has an unknown type; None: none does."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader

    found: list[str] = []

    class Listed(GGUFReader):  # type: ignore[misc, unused-ignore]
        """Looks at the list of tensors, and builds none."""

        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            self.tensors: list[Any] = []
            size = path.stat().st_size
            for field in fields:
                _, raw_name, _, dims, kind, offset = field.parts
                name, number = bytes(raw_name).decode(errors="replace"), int(kind[0])
                if number not in {each.value for each in GGMLQuantizationType}:
                    found.append(
                        f"{path}: tensor {name} has type {number}, which this gguf does not know. "
                        "Run: pip install --upgrade gguf"
                    )
                    continue
                block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(number)]
                numel = 1
                for dim in dims:
                    numel *= int(dim)
                end = start_offs + int(offset[0]) + numel // block * block_bytes
                if end > size:
                    found.append(
                        f"{path} is cut short: tensor {name} ends at byte {end}, the file has "
                        f"{size}. Download it again"
                    )

    Listed(path)
    return found[0] if found else None
