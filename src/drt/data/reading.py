"""Reading named texts from files, folders, JSON lines and the running Python's own library."""

import codecs
import hashlib
import importlib
import json
import lzma
import os
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

XZ_SUFFIX = ".xz"
ROWS_SUFFIX = ".jsonl"
JSON_SUFFIX = ".json"
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".py", ".c", ".h", ".cpp", ".js", ".rs", ".go")
READABLE = f"read are {' '.join((*TEXT_SUFFIXES, ROWS_SUFFIX))}, each also with {XZ_SUFFIX}"

# Few large files share a budget evenly; of many files the first are read whole instead.
MIN_FILE_SHARE = 2**20

# Third-party packages, tests, generated tables and programs that are no reading matter.
SKIPPED_LIBRARY_FOLDERS = frozenset(
    (
        *("site-packages", "dist-packages", "lib-dynload", "__pycache__", "__phello__"),
        *("test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data", "encodings"),
    )
)
SKIPPED_LIBRARY_PREFIXES = ("config-", "_sysconfigdata", "sitecustomize", "usercustomize")


class TextDocument(NamedTuple):
    """A text and what it is called."""

    name: str
    text: str


def read_path(path: Path, *, max_bytes: int) -> list[TextDocument]:
    """Return the texts of a file, or of all text files below a folder, up to ``max_bytes``.

    A text that does not fit is cut. The files of a folder (but for hidden ones) and of the folders
    in it, linked ones too, are taken in the order of the sha256 of their names until ``max_bytes``
    are had, and none takes more than its even share, or 1 MiB if that is more.

    Raises:
        ValueError: nothing is at ``path``, a file is not UTF-8 or not of the format of its suffix,
            or JSON that is not a row a line, a row has no text, or there is no text at all.
    """
    if path.is_dir():
        texts = _read_files(path, _text_files(path), max_bytes=max_bytes)
    elif path.exists():
        check_is_text(path)
        texts = list(_read_file(path, name=path.name, max_bytes=max_bytes))
    else:
        raise ValueError(f"no corpus at {path}: there is no such file or folder")
    if not texts:
        raise ValueError(f"no text in {path}: it is empty")
    return _with_distinct_names(texts)


def check_path(path: Path) -> None:
    """Raise the ValueError of `read_path` if there is nothing to read, having read a character."""
    # No character of UTF-8 takes more.
    read_path(path, max_bytes=4)


def list_text_files(path: Path) -> list[Path]:
    """Return the text files below a folder by name, or a file itself.

    Raises:
        ValueError: the folder has none, or the file is as `check_is_text` says.
    """
    if path.is_dir():
        return [path / name for name in sorted(_text_files(path))]
    check_is_text(path)
    return [path]


def check_distinct(paths: Iterable[Path]) -> None:
    """Raise ValueError if a file is among the paths twice, by one name or by a link."""
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise ValueError(f"{path} is given twice")
        seen.add(path.resolve())


def left_out(paths: Iterable[Path]) -> str:
    """Which files of folders `list_text_files` leaves out, as a sentence; "" where there are none.

    Hidden files are not among them.
    """
    names = (name for path in paths if path.is_dir() for name in _visible_files(path))
    counts = _by_suffix(name for name in names if not _is_readable(name))
    return f"left out are {counts}: {READABLE}" if counts else ""


def is_rows(path: Path) -> bool:
    """Whether the name is that of JSON lines, packed or not."""
    return _unpacked_name(path).endswith(ROWS_SUFFIX)


def is_packed(path: Path) -> bool:
    """Whether the name is that of a file packed with xz."""
    return path.suffix.lower() == XZ_SUFFIX


def check_is_text(path: Path) -> None:
    """Refuse a file, given by its own name, that would be taken for one text and is not.

    Raises:
        ValueError: it is called .json.
    """
    if _unpacked_name(path).endswith(JSON_SUFFIX):
        raise ValueError(
            f"{path} is neither text nor rows: rows are read from {ROWS_SUFFIX}, an object a line"
        )


def read_installed_text(*, max_bytes: int) -> list[TextDocument]:
    """Return texts that Python comes with: its documentation topics and its library's sources.

    Raises:
        ValueError: this installation has neither.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = _documentation_topics(max_bytes=max_bytes)
    left = max_bytes - sum(len(text.text.encode()) for text in texts)
    if left:
        texts += _read_files(library, _library_files(library), max_bytes=left)
    if not texts:
        raise ValueError(
            f"this Python has neither pydoc_data.topics nor sources in {library}; "
            "give the path of a corpus"
        )
    return texts


def _documentation_topics(*, max_bytes: int) -> list[TextDocument]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError:
        # Some distributions package the topics with the documentation, which need not be installed.
        return []
    texts = []
    for name in sorted(topics):
        text = _cut(topics[name].encode(), max_bytes)
        max_bytes -= len(text.encode())
        if text:
            texts.append(TextDocument(name=f"topics/{name}", text=text))
    return texts


def _library_files(library: Path) -> list[str]:
    names = []
    for folder, subfolders, files in os.walk(library):
        # Pruned in place, so that the thousands of files of installed packages are never listed.
        subfolders[:] = [name for name in subfolders if not _is_skipped(name)]
        sources = [name for name in files if name.endswith(".py") and not _is_skipped(name)]
        names += [Path(folder, name).relative_to(library).as_posix() for name in sources]
    return names


def _is_skipped(name: str) -> bool:
    return name in SKIPPED_LIBRARY_FOLDERS or name.startswith(SKIPPED_LIBRARY_PREFIXES)


def _text_files(folder: Path) -> list[str]:
    found = [name.as_posix() for name in _visible_files(folder) if _is_readable(name)]
    if not found:
        raise ValueError(_nothing_readable(folder))
    return found


def _visible_files(folder: Path) -> list[Path]:
    names = [path.relative_to(folder) for path in _files_below(folder)]
    return [name for name in names if not any(part.startswith(".") for part in name.parts)]


def _is_readable(name: Path) -> bool:
    return _unpacked_name(name).endswith((*TEXT_SUFFIXES, ROWS_SUFFIX))


def _unpacked_name(path: Path) -> str:
    """The name in lower case, without what says that the file is packed."""
    return path.name.lower().removesuffix(XZ_SUFFIX)


def _files_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """The files of a folder and of those in it, linked ones too; none is gone through in itself.

    What DRT has written itself is left out: its rows are no text.
    """
    if is_own(folder):
        return
    inside = (*above, folder.resolve())
    for path in folder.iterdir():
        if path.is_file():
            yield path
        elif path.is_dir() and path.resolve() not in inside:
            yield from _files_below(path, inside)


def is_own(folder: Path) -> bool:
    """Whether a folder holds a split of prepared tokens, or a memory."""
    # A memory has no manifest before its first chunk.
    return (folder / "state.safetensors").is_file() or written_format(folder).startswith("drt-")


def written_format(folder: Path) -> str:
    """What a folder holds by its manifest.json, as drt writes one; "" without a readable one."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError):
        return ""
    return str(manifest.get("format", "")) if isinstance(manifest, dict) else ""


def _nothing_readable(folder: Path) -> str:
    if is_own(folder) or any(is_own(path) for path in folder.iterdir() if path.is_dir()):
        return (
            f"no text in {folder}: it holds what drt has made of text, prepared tokens or a "
            "memory; give the text itself"
        )
    found = _by_suffix(_files_below(folder)) or "no files"
    return f"no text in {folder}: found {found}; {READABLE}"


def _by_suffix(files: Iterable[Path]) -> str:
    """How many files of which kinds: "3 .pdf, 1 .doc", the most frequent ones."""
    counts = Counter(path.suffix or path.name for path in files).most_common()
    shown = ", ".join(f"{count:,} {suffix}" for suffix, count in counts[:5])
    others = sum(count for _, count in counts[5:])
    return f"{shown} and {others:,} others" if others else shown


def _read_files(folder: Path, names: list[str], *, max_bytes: int) -> list[TextDocument]:
    texts = []
    share = max(max_bytes // max(len(names), 1), MIN_FILE_SHARE)
    for name in sorted(
        names, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    ):
        for text in _read_file(folder / name, name=name, max_bytes=min(share, max_bytes)):
            texts.append(text)
            max_bytes -= len(text.text.encode())
        if not max_bytes:
            break
    return texts


def _read_file(path: Path, *, name: str, max_bytes: int) -> Iterator[TextDocument]:
    """Yield the texts of a file: one, or one a row. ``.xz`` is unpacked no further than needed."""
    with _opened(path) as stream:
        if is_rows(path):
            yield from _read_rows(stream, path=path, name=name, max_bytes=max_bytes)
        else:
            yield from _read_text(stream, path=path, name=name, max_bytes=max_bytes)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with path.open("rb") as raw, unpacked(raw, path) as stream:
        yield stream


@contextmanager
def unpacked(raw: BinaryIO, path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file that is open, unpacked where its name says that they are packed.

    Raises:
        ValueError: what is packed is damaged or cut.
    """
    try:
        yield cast(BinaryIO, lzma.LZMAFile(raw)) if is_packed(path) else raw  # noqa: SIM115
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path} is not a whole xz file: {error}") from error


def _read_text(
    stream: BinaryIO, *, path: Path, name: str, max_bytes: int
) -> Iterator[TextDocument]:
    data = stream.read(max_bytes)
    try:
        # A last character that the limit cuts through is dropped; other wrong bytes are errors.
        text = codecs.getincrementaldecoder("utf-8")().decode(data, final=len(data) < max_bytes)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error
    if text:
        yield TextDocument(name=name, text=text)


def _read_rows(
    stream: BinaryIO, *, path: Path, name: str, max_bytes: int
) -> Iterator[TextDocument]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        row, whole = parse_row(line, path, number)
        data = whole.encode()
        text = _cut(data, max_bytes)
        max_bytes -= len(text.encode())
        if text:
            called = row.get("id")
            yield TextDocument(name=f"{name}:{number if called is None else called}", text=text)
        if len(text.encode()) < len(data) or not max_bytes:
            return


def json_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the lines of a ``.jsonl`` file, or of a ``.jsonl.xz``: number, from 1, and value.

    Blank lines are left out.

    Raises:
        ValueError: a line that is not JSON in UTF-8, or an xz file that is not whole.
    """
    with _opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _parsed(line, path, number)


def _parsed(line: bytes, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        message = f"{path} does not hold a JSON object a line: line {number}: {error}"
        raise ValueError(message) from error


def parse_row(line: bytes, path: Path, number: int, text_field: str = "text") -> tuple[Any, str]:
    """Return the row of a line, and its text.

    Raises:
        ValueError: no JSON, or as `text_of`; the file and the line are named.
    """
    try:
        row = json.loads(line)
        return row, text_of(row, text_field)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from error


def text_of(row: Any, text_field: str = "text") -> str:
    """Return the text of a row; raise ValueError without one, or where UTF-8 cannot hold it."""
    if not isinstance(row, dict):
        raise ValueError(f"the row is a {type(row).__name__}, not an object")
    text = row.get(text_field)
    if not isinstance(text, str):
        raise ValueError(f"the row has no string {text_field!r}; its fields are {sorted(row)}")
    text.encode()
    return text


def _cut(data: bytes, max_bytes: int) -> str:
    """Return the text of the first ``max_bytes`` bytes, without a character cut in two."""
    return data[:max_bytes].decode(errors="ignore")


def _with_distinct_names(texts: list[TextDocument]) -> list[TextDocument]:
    """Append a number to a name that occurred before (rows of a file may share an ``id``)."""
    seen: Counter[str] = Counter()
    distinct = []
    for name, text in texts:
        seen[name] += 1
        distinct.append(TextDocument(name if seen[name] == 1 else f"{name}#{seen[name]}", text))
    return distinct
