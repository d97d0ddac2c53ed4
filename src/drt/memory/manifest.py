"""What a memory folder says of itself: `manifest.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from drt.memory.files import MemoryFormatError, write_whole
from drt.memory.records import STORAGE_DTYPES, RecordFormat
from drt.memory.slabs import Layout, Scan

FORMAT = "drt-memory"
VERSION = 1

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*STORAGE_DTYPES, torch.float64)}


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says: never changed once written."""

    chunk_size: int
    """Token places of a chunk S."""
    kv_heads: int
    """Heads of keys and values G."""
    head_dim: int
    """Their width D."""
    landmark_size: int
    """Width of a landmark L."""
    dtype: str
    """Storage dtype of keys and values."""
    compute_dtype: str
    """Dtype of the keys and values that were appended first."""
    landmark_dtype: str
    """float32 or bfloat16."""
    record_bytes: int
    """Bytes of a record R."""
    slab_size: int
    """Chunks of a pair of files."""
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    """What made the memory: model, tokenizer, and whatever else must be the same."""

    @staticmethod
    def of(layout: Layout, *, slab_size: int, fingerprint: Mapping[str, str]) -> Manifest:
        """The manifest of a memory with this layout."""
        form = layout.records
        return Manifest(
            chunk_size=form.chunk_size,
            kv_heads=form.kv_heads,
            head_dim=form.head_dim,
            landmark_size=layout.landmark_size,
            dtype=_name(form.dtype),
            compute_dtype=_name(layout.compute_dtype),
            landmark_dtype=_name(layout.landmark_dtype),
            record_bytes=form.record_bytes,
            slab_size=slab_size,
            fingerprint=dict(fingerprint),
        )

    def layout(
        self,
        device: torch.device,
        *,
        compute_dtype: torch.dtype | None = None,
        scan: Scan = "float32",
    ) -> Layout:
        """The layout of a memory with this manifest; `compute_dtype` None = as first appended."""
        sizes = (self.chunk_size, self.kv_heads, self.head_dim)
        return Layout(
            records=RecordFormat(*sizes, _DTYPES[self.dtype]),
            landmark_size=self.landmark_size,
            landmark_dtype=_DTYPES[self.landmark_dtype],
            compute_dtype=compute_dtype or _DTYPES[self.compute_dtype],
            device=device,
            scan=scan,
        )

    def content(self) -> dict[str, Any]:
        """All fields and the format, as JSON has them."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    def check_fingerprint(self, path: Path, wanted: Mapping[str, str]) -> None:
        """Raise MemoryFormatError where the fingerprint differs from what is wanted."""
        for name, value in wanted.items():
            if (found := self.fingerprint.get(name)) != value:
                raise MemoryFormatError(
                    f"{path}: the memory was made with {name} {found!r}, not {value!r}"
                )

    def write(self, folder: Path) -> None:
        """Write the manifest: it is there in full or not at all."""
        write_whole(folder / "manifest.json", json.dumps(self.content(), indent=1) + "\n")

    @staticmethod
    def read(folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            MemoryFormatError: there is none, or one that this version cannot read.
        """
        path = folder / "manifest.json"
        if not path.is_file():
            raise MemoryFormatError(f"{folder} is not a memory folder: it has no manifest.json")
        return parse_manifest(path, path.read_bytes())


def parse_manifest(path: Path, text: str | bytes) -> Manifest:
    """The manifest that a file holds as JSON; MemoryFormatError if that is not one."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise MemoryFormatError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise MemoryFormatError(f"{path} is not of a memory: format is not {FORMAT!r}")
    version = content.pop("version", None)
    if version != VERSION:
        raise MemoryFormatError(f"{path}: format version {version!r}, only {VERSION} is known")
    try:
        manifest = Manifest(**content)
        expected = manifest.layout(torch.device("cpu")).records.record_bytes
        valid = min(manifest.slab_size, manifest.landmark_size) >= 1
        valid = valid and isinstance(manifest.fingerprint, dict)
    except (TypeError, ValueError, KeyError) as error:
        raise MemoryFormatError(f"{path}: {error}") from error
    if not valid or manifest.record_bytes != expected:
        raise MemoryFormatError(f"{path}: sizes disagree; records should have {expected} bytes")
    return manifest


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
