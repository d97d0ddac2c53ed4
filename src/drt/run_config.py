"""Typed run configurations: a YAML file, overrides, and errors that name the key."""

from __future__ import annotations

import math
import types
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from drt.configuration import DRTConfig
from drt.data import MULTI_TASK, NeedleTask
from drt.data.babi import BabiStories
from drt.data.prepared.rows import Documents, LastPiece
from drt.data.summaries import SummaryData
from drt.memory.files import write_whole
from drt.precision import Precision
from drt.shipped import shipped_file
from drt.unknown_keys import did_you_mean

CONFIG_FILE = "run.yaml"
"""What a run's configuration is called in its folder, and beside its model."""

FINAL_FOLDER = "model"
"""What the folder of the final model is called in a run's."""


@dataclass(frozen=True)
class TaskMix:
    """One task of a stage and how often it is drawn."""

    task: NeedleTask | BabiStories
    """What is hidden and asked: needles, or stories of bAbI where `facts` names a file of them."""
    weight: float = 1.0
    """Relative share of the rows, above 0."""


@dataclass(frozen=True)
class Stage:
    """A stretch of training on rows of one length."""

    length: int
    """Content tokens of a row; a multiple of the chunk size."""
    tasks: list[TaskMix]
    """The tasks of the rows."""
    advance_below: float = 0.0
    """Answer loss (nats a token, smoothed over 20 steps) under which the next stage begins; above 0
    in every stage but the last, which has no next one."""


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how fast to train."""

    num_steps: int
    """Optimizer steps."""
    tokens_per_step: int = 4096
    """Content tokens of a step; rows per step = tokens_per_step / row length."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon on matrices with AdamW on the rest."""
    num_micro_batches: int = 1
    """Forwards and backwards of each process for one optimizer step (gradient accumulation)."""
    sharding: Literal["none", "fsdp"] = "none"
    """How several processes share a model: each has all of it (DDP), or a part (FSDP2, GPUs)."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    final_learning_rate: float = 3e-4
    """Rate at the end of the cosine."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    weight_decay: float = 0.01
    """Decay of matrices; norms and vectors are not decayed."""
    adam_beta2: float = 0.95
    """Decay of AdamW's second moment."""
    max_grad_norm: float = 1.0
    """Gradient norm is clipped to this; 0 = never."""
    text_loss_weight: float = 0.1
    """Weight of the mean loss on haystack tokens beside that on answer tokens."""
    first_token_weight: float = 0.0
    """Weight of the mean loss on the first token of each answer, beside that on all of them."""
    gradient_checkpointing: bool = False
    """Whether to recompute layers in backward instead of keeping their activations."""
    compile_layers: bool = False
    """Whether to compile the layers in the first steps, which needs a C++ compiler on CPU."""
    log_every: int = 25
    """Steps between lines of metrics.jsonl; there is a line at each checkpoint too."""
    save_every: int = 500
    """Steps between checkpoints; the last two are kept. 0 = one after the last step alone."""
    evaluate_every: int = 500
    """Steps between needle evaluations at the longest row length, or between measurements of the
    validation loss; 0 = none."""
    tensorboard: bool = False
    """Whether metrics also go to TensorBoard files in the run's folder (needs `tensorboard`)."""
    peak_tflops: float | None = None
    """Peak rate of a device in the run's precision, 10^12 operations a second, of which MFU is the
    share that is reached; None = as published for the GPU, and no MFU where that is not known."""

    def __post_init__(self) -> None:
        _check_at_least(
            1, self, "training.", ("num_steps", "tokens_per_step", "num_micro_batches", "log_every")
        )
        losses = ("text_loss_weight", "first_token_weight")
        others = ("final_learning_rate", "warmup_steps", "weight_decay", "max_grad_norm")
        _check_at_least(0, self, "training.", (*losses, *others, "save_every", "evaluate_every"))
        _check_above_zero("training.learning_rate", self.learning_rate)
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"training.final_learning_rate {self.final_learning_rate} is above the peak, "
                f"training.learning_rate {self.learning_rate}"
            )
        if self.peak_tflops is not None:
            _check_above_zero("training.peak_tflops", self.peak_tflops)
        if not 0 <= self.adam_beta2 < 1:
            raise ValueError(
                f"training.adam_beta2 must be at least 0 and below 1, got {self.adam_beta2}"
            )

    def rows_per_step(self, length: int) -> int:
        """Rows of so many tokens that a step has."""
        return self.tokens_per_step // length


@dataclass(frozen=True)
class TextData:
    """Rows of text from a prepared corpus."""

    corpus: str
    """Folder that `drt data prepare` has written."""
    length: int = 4096
    """Content tokens of a row."""
    documents: Documents = "packed"
    """How documents share rows: "packed", "crossing" or "apart", as `TokenRows` has it; only DRT
    models keep packed documents from seeing each other."""
    last_piece: LastPiece = "drop"
    """Of documents "apart": whether the end of one that fills no row, or all of one that is shorter
    than a row, is dropped ("drop"), or padded on the right ("pad")."""
    split: str = "train"
    """The split to train on."""
    validation_split: str = "validation"
    """The split of the validation loss."""
    validation_rows: int = 16
    """Rows of the validation loss, the same at each measurement; 0 = no validation loss."""

    def __post_init__(self) -> None:
        _check_at_least(2, self, "text.", ("length",))
        _check_at_least(0, self, "text.", ("validation_rows",))


@dataclass(frozen=True)
class EvaluationConfig:
    """At which lengths to ask, and how often."""

    lengths: list[int] = field(default_factory=lambda: [1024])
    """Content tokens of context and question."""
    single: NeedleTask = field(default_factory=NeedleTask)
    """The task with one needle."""
    multi: NeedleTask = MULTI_TASK
    """The task with several named needles; its questions share a context."""
    questions: int = 64
    """Questions per length and task."""
    questions_longest: int = 8
    """Questions on a single needle at lengths above `long_from`."""
    long_from: int = 262144
    """Lengths above this many tokens count as longest."""
    multi_up_to: int = 1048576
    """Longest context, in tokens, in which several needles are asked for."""
    memory: Literal["host", "disk"] = "host"
    """Where chunks are kept while a context is read and asked: in RAM, or in a temporary folder."""
    memory_dtype: Literal["computed", "float32", "bfloat16", "int8"] = "computed"
    """How keys and values are stored; computed = in the precision of the run."""
    seed: int = 1
    """Seed of the evaluation examples."""
    segment_size: int = 4096
    """Tokens of one forward while a context is read."""

    def __post_init__(self) -> None:
        if not self.lengths:
            raise ValueError("evaluation.lengths is empty: at least one is needed")
        if min(self.lengths) < 1:
            raise ValueError(f"evaluation.lengths must be at least 1, got {min(self.lengths)}")
        counts = ("questions", "questions_longest", "segment_size")
        _check_at_least(1, self, "evaluation.", counts)
        _check_at_least(0, self, "evaluation.", ("long_from", "multi_up_to", "seed"))


@dataclass(frozen=True)
class RunConfig:
    """One model, one corpus, one budget."""

    output_dir: str
    """Folder of checkpoints, metrics.jsonl and the final model."""
    model: dict[str, Any]
    """Fields of the model's configuration. `model_type` chooses it: drt (the default), one of our
    baselines, or any causal language model of transformers. vocab_size is the tokenizer's when it
    is left out."""
    training: TrainingConfig
    """Budget and optimizer."""
    stages: list[Stage] = field(default_factory=list)
    """Training on needle rows: the curriculum, short rows first."""
    text: TextData | None = None
    """Training on text."""
    summaries: SummaryData | None = None
    """Training on documents and their summaries."""
    initial: str | None = None
    """A run or saved model to begin with, of which `model` changes fields; None = random weights
    from the seed."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What `drt eval` asks unless told otherwise."""
    tokenizer: str | None = None
    """"bytes", or a Hugging Face tokenizer's name or path; None = that of the prepared corpus or
    of the initial model, or else bytes."""
    corpus: str | None = None
    """Haystack of needle rows; None = the prose and code of the Python installation."""
    chunk_size: int | None = None
    """Questions of needle rows end at multiples of this many tokens; None = chunk_size of the
    model, 64 for a model without chunks."""
    seed: int = 0
    """Seed of initialization, data and noise."""
    precision: Precision = "float32"
    """Of matrix products in training and evaluation; auto = bfloat16 where it is native."""

    def __post_init__(self) -> None:
        kinds = {"stages": self.stages, "text": self.text, "summaries": self.summaries}
        given = [name for name, value in kinds.items() if value]
        if len(given) != 1:
            raise ValueError(
                "a run trains on exactly one of stages (needles), text and summaries, "
                f"got {' and '.join(given) or 'none'}"
            )
        _check_at_least(0, self, "", ("seed",))
        self._check_stages()
        self._check_unread()
        self._check_chunk_size()
        for length in self.row_lengths:
            if self.training.tokens_per_step % length:
                raise ValueError(
                    f"row length {length} must divide tokens_per_step "
                    f"{self.training.tokens_per_step}"
                )

    def _check_stages(self) -> None:
        """Refuse stages without rows, and one that never ends before others."""
        for number, stage in enumerate(self.stages):
            where = f"stages.{number}."
            _check_at_least(1, stage, where, ("length",))
            if not stage.tasks:
                raise ValueError(f"{where}tasks is empty: at least one is needed")
            for each, mix in enumerate(stage.tasks):
                _check_above_zero(f"{where}tasks.{each}.weight", mix.weight)
            if number < len(self.stages) - 1 and not stage.advance_below > 0:
                raise ValueError(
                    f"{where}advance_below must be above 0, got {stage.advance_below}: "
                    f"the stage would never end and stages.{number + 1} never begin"
                )

    def _check_unread(self) -> None:
        """Refuse what is given for needle rows to a run that has none."""
        if self.stages:
            return
        for name, value, default in (
            ("chunk_size", self.chunk_size, RunConfig.chunk_size),
            *(
                (f"training.{key}", getattr(self.training, key), getattr(TrainingConfig, key))
                for key in ("text_loss_weight", "first_token_weight")
            ),
        ):
            if value != default:
                raise ValueError(f"{name} {value} is of needle rows: there are none")

    def _check_chunk_size(self) -> None:
        """Refuse rows that are no multiple of it, as far as the model it may follow from is known.

        Only in needle rows does anything stand at the borders of chunks.
        """
        if not self.stages:
            return
        default = DRTConfig.chunk_size if self.initial is None else 1
        of_model = self.model.get("chunk_size", default)
        if self.chunk_size is None:
            chosen = _convert_plain(int, (), of_model, "model.chunk_size")
        else:
            chosen = self.chunk_size
        check_row_lengths(self.row_lengths, chosen)

    @property
    def row_lengths(self) -> list[int]:
        """Tokens of the rows of each stage."""
        if self.text is not None:
            return [self.text.length]
        if self.summaries is not None:
            return [self.summaries.length]
        return [stage.length for stage in self.stages]

    @property
    def train_length(self) -> int:
        """Tokens of the longest training row."""
        return max(self.row_lengths)


def _check_at_least(low: int, settings: Any, where: str, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(settings, name)
        # Written so that NaN fails too.
        if not value >= low:
            raise ValueError(f"{where}{name} must be at least {low}, got {value}")


def _check_above_zero(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be above 0, got {value}")


def check_row_lengths(lengths: list[int], chunk_size: int) -> None:
    """Refuse needle rows whose last question could not end with them.

    Raises:
        ValueError: a length is no multiple of `chunk_size`, or that is not positive.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    for length in lengths:
        if length % chunk_size:
            raise ValueError(f"row length {length} must be a multiple of chunk_size {chunk_size}")


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a run configuration.

    Args:
        path: a YAML file; its `extends` key may name another, as `read_mapping` finds it, to change
            parts of, or several, of which later ones change parts of earlier ones.
        overrides: "dotted.key=value" strings, the value in YAML; list items by number.

    Raises:
        ValueError: no such file, not YAML, files that extend each other, an unknown key, or a value
            of the wrong type or out of range.
    """
    data = read_mapping(Path(path))
    for override in overrides or []:
        apply_override(data, override)
    try:
        return build(RunConfig, data)
    except ValueError as error:
        if overrides:
            raise
        raise ValueError(f"{path}: {error}") from error


def read_mapping(path: Path, *, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A YAML mapping, laid over the one, or the list of them, that its `extends` key names.

    These are files where the mapping's own folder is, or else shipped runs or studies.

    Args:
        path: the file.
        above: the files whose `extends` led to it, the first one first.

    Raises:
        ValueError: no such file, no YAML mapping in it, or `extends` is no name or leads back to a
            file that it came from.
    """
    chain = (*above, path)
    if path.resolve() in (each.resolve() for each in above):
        raise ValueError(f"extends leads back to where it was: {' -> '.join(map(str, chain))}")
    if not path.is_file():
        raise ValueError(f"no configuration file at {path}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a mapping, got {type(data).__name__}")
    names = data.pop("extends", None) or []
    below: dict[str, Any] = {}
    for name in names if isinstance(names, list) else [names]:
        if not isinstance(name, str):
            raise ValueError(f"{path}: extends must name files, got {name!r}")
        below = overlay(below, read_mapping(_find_extended(name, path), above=chain))
    return overlay(below, data)


def _find_extended(name: str, path: Path) -> Path:
    """What a file extends under a name."""
    beside = [path.parent / name]
    if path.name != f"{name}.yaml":
        # It may extend the shipped one of its own name.
        beside.append(path.parent / f"{name}.yaml")
    shipped = [shipped_file(name), shipped_file(name, folder="studies")]
    found = next((place for place in (*beside, *shipped) if place.is_file()), None)
    if found is None:
        known = [each.stem for place in shipped for each in place.parent.glob("*.yaml")]
        raise ValueError(
            f"{path} extends {name!r}, which is no file in {path.parent} and no shipped "
            f"configuration{did_you_mean(name, known)}"
        )
    return found


def overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Mappings are merged; anything else above replaces what is below.

    Under a `model_type` that is another than the one below, those fields below are left out that
    its configuration does not have.
    """
    merged = _fields_of_both(below, above)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = overlay(merged[key], value) if both else value
    return merged


def _fields_of_both(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    kind = above.get("model_type")
    if kind is None or kind == below.get("model_type", DRTConfig.model_type):
        return dict(below)
    # Here and not above: it imports every kind of model.
    from drt.architectures import known_fields

    known = known_fields(kind)
    return {key: value for key, value in below.items() if key in known}


def save_config(config: RunConfig, path: Path) -> None:
    """Write a run configuration that `load_config` reads back equal."""
    write_whole(path, yaml.safe_dump(asdict(config), sort_keys=False))


def build(cls: type, data: dict[str, Any], where: str = "") -> Any:
    """Make a dataclass from a mapping, checking names and types on the way down."""
    hints = get_type_hints(cls)
    known = {item.name: item for item in fields(cls)}
    for key in data:
        if key not in known:
            hint = did_you_mean(str(key), known, before=where)
            raise ValueError(f"unknown key {where}{key}{hint}")
    for name, item in known.items():
        if name not in data and item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"missing key {where}{name}")
    return cls(**{key: _convert(hints[key], value, f"{where}{key}") for key, value in data.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a mapping, got {value!r}")
        return build(hint, value, f"{where}.")
    if origin is list:
        if not isinstance(value, list):
            raise ValueError(f"{where} must be a list, got {value!r}")
        return [_convert(args[0], item, f"{where}.{n}") for n, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a mapping, got {value!r}")
        wrong = next((key for key in value if not isinstance(key, args[0])), None)
        if wrong is not None:
            # YAML reads 1 and no as something else.
            raise ValueError(f"{where} has the key {wrong!r}, which is not text: quote it")
        return {key: _convert(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        kinds = [arg for arg in args if arg is not type(None)]
        if isinstance(value, dict) and all(is_dataclass(kind) for kind in kinds):
            # The one that has the most of the keys, or the first one.
            known = {kind: {item.name for item in fields(kind)} for kind in kinds}
            kinds = [max(kinds, key=lambda kind: len(known[kind] & value.keys()))]
        return _convert(kinds[0], value, where)
    return _convert_plain(hint, args, value, where)


def _convert_plain(hint: Any, args: tuple[Any, ...], value: Any, where: str) -> Any:
    if args:
        if value not in args:
            raise ValueError(f"{where} must be one of {list(args)}, got {value!r}")
        return value
    if hint is float:
        return _convert_float(value, where)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where} must be {hint.__name__}, got {value!r}")
    return value


def _convert_float(value: Any, where: str) -> float:
    try:
        # YAML reads 3e-3 as text.
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where} must be a finite number, got {value!r}")
    return number


def apply_override(data: dict[str, Any], override: str, *, noun: str = "override") -> None:
    """Set one "dotted.key=value" in nested mappings and lists, the value in YAML.

    Args:
        data: what is changed; mappings on the way to the key are made.
        override: the key and its value.
        noun: what messages call it.

    Raises:
        ValueError: no key=value, no YAML, or a key that leads nowhere.
    """
    key, equals, text = override.partition("=")
    if not equals:
        article = "an" if noun[0] in "aeiou" else "a"
        raise ValueError(f"{article} {noun} reads key=value, got {override!r}")
    where = f"{noun} {override!r}"
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {error}") from error
    _set(data, key.split("."), value, where)


def _set(node: Any, names: list[str], value: Any, where: str) -> None:
    """Set what the names lead to from a mapping or list on; mappings on the way are made."""
    name, *rest = names
    key = _key(node, name, where)
    if not rest:
        node[key] = value
        return
    inner = node[key] if isinstance(node, list) else node.setdefault(key, {})
    if not isinstance(inner, (dict, list)):
        raise ValueError(f"{where}: {name} is a plain value, there is no {rest[0]} in it")
    _set(inner, rest, value, where)


def _key(node: Any, name: str, where: str) -> Any:
    """The key of a mapping, or the number of an item of a list."""
    if not isinstance(node, list):
        return name
    if not name.isdigit() or int(name) >= len(node):
        raise ValueError(f"{where}: {name} is no item of a list of {len(node)}")
    return int(name)
