"""`drt data prepare|info|verify|tokenizer`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from drt.tables import aligned

NAME = "data"
HELP = "Turn text into token files, look at them, check every byte, or train a tokenizer."
EPILOG = "Example: drt data prepare pg19 --from books/ --tokenizer gpt2 --out data/pg19"

COLUMNS = ("split", "documents", "tokens", "bytes", "words", "shards", "dtype")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_prepare(actions)
    for name, text in (
        ("info", "counts of each split"),
        ("verify", "read everything and compare checksums, offsets and ids"),
    ):
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("path", type=Path, help="folder of a corpus or of one split")
        if name == "info":
            action.add_argument("--json", action="store_true", help="the manifests' contents")
    text = "train a byte-level BPE on text"
    action = actions.add_parser("tokenizer", help=text, description=text)
    action.add_argument(
        "paths",
        nargs="*",
        type=Path,
        metavar="PATH",
        help="as for prepare --from; of several splits that of training is read",
    )
    action.add_argument(
        "--preset", default="text", help="a YAML file or a shipped preset, say pg19-hub [text]"
    )
    _add_source_fields(action)
    action.add_argument("--vocab-size", type=int, required=True, help="entries, 257 or more")
    action.add_argument("--out", type=Path, required=True, help="new folder of the tokenizer")


def _add_prepare(actions: Any) -> None:
    text = "tokenize a corpus; a preparation that was stopped goes on"
    action = actions.add_parser("prepare", help=text, description=text, epilog=EPILOG)
    action.add_argument(
        "preset", nargs="?", default="text", help="a YAML file or a shipped preset [text]"
    )
    action.add_argument(
        "--from",
        dest="paths",
        nargs="+",
        type=Path,
        default=[],
        metavar="PATH",
        help='text file, folder, .jsonl with a "text" field, each also .xz',
    )
    action.add_argument("--out", type=Path, required=True, help="folder of the corpus")
    action.add_argument("--processes", type=int, help="that tokenize [one a core, 1 for bytes]")
    # Each changes the preset's field of its name, and only where it is given.
    unset: dict[str, Any] = {"default": argparse.SUPPRESS}
    action.add_argument("--tokenizer", help='"bytes", a folder, or a name on the hub', **unset)
    _add_source_fields(action)
    action.add_argument("--name-field", help="field of a row that names the document", **unset)
    action.add_argument(
        "--end-of-text", action="store_true", help="end each document with the end token", **unset
    )
    action.add_argument("--shard-tokens", type=int, help="tokens of a shard", **unset)
    action.add_argument("--split", help="read all text as one split of this name", **unset)
    action.add_argument(
        "--hold-out-one-in", type=int, metavar="N", help="validation from one in N", **unset
    )


def _add_source_fields(action: Any) -> None:
    """What says where texts come from; each changes the preset's field of its name."""
    unset: dict[str, Any] = {"default": argparse.SUPPRESS}
    action.add_argument("--text-field", help="field of a row that holds the text", **unset)
    action.add_argument("--hub", metavar="NAME", help="a dataset of the Hugging Face hub", **unset)
    action.add_argument("--hub-subset", help="its configuration", **unset)
    action.add_argument("--hub-revision", help="its commit, tag or branch", **unset)


def run(options: argparse.Namespace) -> None:
    """Do it."""
    {"prepare": _prepare, "info": _info, "verify": _verify, "tokenizer": _tokenizer}[
        options.action
    ](options)


def _prepare(options: argparse.Namespace) -> None:
    from drt.data.prepared import find_sources, prepare
    from drt.data.reading import left_out
    from drt.data.tokenization import is_byte_tokenizer, load_tokenizer
    from drt.hardware import usable_cores

    config = _config(options)
    # What is quick to fail comes before what is downloaded.
    sources = None if config.hub else find_sources(config, options.paths)
    if note := left_out(options.paths):
        print(note)
    tokenizer = load_tokenizer(config.tokenizer)
    sources = sources or find_sources(config, options.paths)
    # Bytes are copied sooner than they are sent to another process.
    cores = 1 if is_byte_tokenizer(tokenizer) else usable_cores()
    with _Bars() as bars:
        prepare(
            config,
            tokenizer,
            sources,
            options.out,
            num_processes=cores if options.processes is None else options.processes,
            on_progress=bars.show,
        )
    _print_table(options.out)


def _config(options: argparse.Namespace) -> Any:
    from drt.data.prepared import CorpusConfig
    from drt.run_config import build, read_mapping
    from drt.shipped import find_config

    fields = read_mapping(find_config(options.preset, folder="data"))
    known = CorpusConfig.__dataclass_fields__
    given = {name: value for name, value in vars(options).items() if name in known}
    return build(CorpusConfig, {**fields, **given})


class _Bars:
    """A progress bar for the split that is being written."""

    def __init__(self) -> None:
        self._split, self._bar = "", None

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def show(self, source: Any, progress: Any) -> None:
        """How far a split is."""
        from tqdm import tqdm

        if progress.split != self._split:
            self._close()
            self._split = progress.split
            self._bar = tqdm(
                total=source.size,
                unit=source.unit,
                unit_scale=True,
                desc=progress.split,
                initial=source.done,
                mininterval=1.0,
            )
        assert self._bar is not None
        self._bar.set_postfix(
            documents=f"{progress.documents:,}", tokens=f"{progress.tokens:,}", refresh=False
        )
        self._bar.update(source.done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _info(options: argparse.Namespace) -> None:
    import json

    from drt.data.prepared import Manifest, split_folders

    if not options.json:
        _print_table(options.path)
        return
    folders = split_folders(options.path)
    print(json.dumps({str(each): Manifest.read(each).content() for each in folders}, indent=2))


def _print_table(path: Path) -> None:
    from drt.data.prepared import Manifest, split_folders

    rows: list[tuple[str, ...]] = [COLUMNS]
    notes = []
    for folder in split_folders(path):
        manifest = Manifest.read(folder)
        counts = [f"{manifest.total(name):,}" for name in COLUMNS[1:5]]
        rows.append(
            (manifest.plan.split, *counts, str(len(manifest.shards)), manifest.plan.dtype.name)
        )
        if empty := manifest.total("empty_documents"):
            notes.append(f"{folder}: {empty:,} documents without text are left out")
        if not manifest.complete:
            notes.append(f"{folder} is not complete: run the same `drt data prepare` again")
    print(*aligned(rows), sep="\n")
    print(*notes, sep="\n", end="\n" if notes else "")


def _verify(options: argparse.Namespace) -> None:
    from drt.data.prepared import split_folders, verify_split

    for folder in split_folders(options.path):
        manifest = verify_split(folder)
        documents, tokens = manifest.total("documents"), manifest.total("tokens")
        print(f"{folder}: all {tokens:,} tokens of {documents:,} documents are intact")


def _tokenizer(options: argparse.Namespace) -> None:
    from drt.data.bpe import check_new_folder, check_vocab_size, train_bpe
    from drt.data.prepared import find_sources
    from drt.data.reading import left_out

    # What is quick to fail comes before what is downloaded.
    check_new_folder(options.out)
    check_vocab_size(options.vocab_size)
    sources = find_sources(_config(options), options.paths)
    if note := left_out(options.paths):
        print(note)
    split = next(iter(sources)) if len(sources) == 1 else "train"
    if split not in sources:
        raise ValueError(f"there are the splits {sorted(sources)} and none to train on: give one")
    texts = (piece.text for piece in sources[split].read())
    tokenizer = train_bpe(texts, options.vocab_size)
    tokenizer.save_pretrained(str(options.out))
    print(f"{options.out}: {len(tokenizer):,} entries")
