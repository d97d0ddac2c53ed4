"""What benchmarks/length.py compares: the model with each memory, and transformers' own models."""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer

from drt import DRTConfig, DRTForCausalLM
from drt.memory import DeviceMemory, DiskMemory, HostMemory
from drt.memory.base import InferenceMemory
from drt.run_config import load_config
from drt.shipped import find_config

# A bare DynamicCache of a float32 model warns of nothing that matters here.
transformers.logging.set_verbosity_error()

Tier = Literal["device", "host", "disk"]
TIERS: tuple[Tier, ...] = get_args(Tier)

SEGMENT_SIZE = 16384
"""Tokens of one forward of ours while a text is read."""

FULL_SEGMENT_SIZE = 1024
"""The same for Llama: of 128 to 4096 the fastest at 8K tokens, by 10 to 30 %."""

CHECKED_LENGTH = 4096

CONFIGURATIONS = {"demo": ("demo", 258), "128m": ("paper-128m", 50257)}
"""By name: the run configuration, and the size of its tokenizer's vocabulary."""

Step = Callable[[Tensor], Tensor]
"""From a (1, n) continuation to the logits (1, 1, vocab_size) after it."""


class Contestant(Protocol):
    """A model and what it keeps of one text."""

    name: str

    @property
    def model(self) -> PreTrainedModel:
        """What computes."""
        ...

    @property
    def is_bounded(self) -> bool:
        """Whether what it keeps stops growing."""
        ...

    def read(self, ids: Tensor, *, budget: float) -> int:
        """Read on, (1, n) tokens, or as many as fit in the seconds; return how many."""
        ...

    def branch(self) -> Step:
        """A way to go on from here again and again without changing what was read."""
        ...

    def num_bytes(self) -> dict[Tier, int]:
        """Bytes of what is kept of the text, by where they are."""
        ...

    def full_logits(self, ids: Tensor) -> Tensor:
        """Logits (1, 1, vocab_size) after the (1, n) tokens, in one forward without a cache."""
        ...


class Ours:
    """A DRT with a memory."""

    name = "DRT"
    is_bounded = False

    def __init__(self, model: DRTForCausalLM, memory: InferenceMemory) -> None:
        self.model = model
        self.memory = memory
        self.state = model.new_state(memory=memory)
        self._rate: float | None = None

    def read(self, ids: Tensor, *, budget: float) -> int:
        """In one call of `read`; how much fits is judged by the pace of the call before."""
        count = ids.shape[1]
        if self._rate is not None:
            fits = int(budget * self._rate) // SEGMENT_SIZE * SEGMENT_SIZE
            count = min(count, max(fits, SEGMENT_SIZE))
        start = time.perf_counter()
        self.model.read(ids[:, :count], self.state, segment_size=SEGMENT_SIZE)
        self._rate = count / (time.perf_counter() - start)
        return count

    def branch(self) -> Step:
        """A fork of the state."""
        state = self.state.fork()
        return lambda ids: self.model(ids, past_key_values=state, logits_to_keep=1).logits

    def num_bytes(self) -> dict[Tier, int]:
        """Of the memory."""
        return self.memory.bytes_by_tier()

    def full_logits(self, ids: Tensor) -> Tensor:
        """Without a state."""
        return self.model(ids, logits_to_keep=1).logits


class Baseline:
    """A model of transformers with its DynamicCache.

    Args:
        name: for the table.
        model: the model.
        segment_size: tokens of one forward.
    """

    def __init__(self, name: str, model: PreTrainedModel, *, segment_size: int) -> None:
        self.name = name
        self.model = model
        self.segment_size = segment_size
        self.cache = DynamicCache(config=model.config)

    @property
    def is_bounded(self) -> bool:
        """Whether its cache stops growing."""
        return getattr(self.model.config, "sliding_window", None) is not None

    def read(self, ids: Tensor, *, budget: float) -> int:
        """Segment by segment, with an eye on the clock."""
        start, done = time.perf_counter(), 0
        for part in ids.split(self.segment_size, dim=1):
            self._forward(part, self.cache)
            done += part.shape[1]
            if time.perf_counter() - start > budget:
                break
        return done

    def branch(self) -> Step:
        """The cache's tensors are replaced, not written to, so that copies can share them."""
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        return lambda ids: self._forward(ids, cache)

    def num_bytes(self) -> dict[Tier, int]:
        """Of the cached keys and values."""
        layers = [layer for layer in self.cache.layers if isinstance(layer, DynamicLayer)]
        assert len(layers) == len(self.cache.layers)
        tensors = [x for layer in layers for x in (layer.keys, layer.values)]
        kept = sum(x.nbytes for x in tensors if x is not None)
        return {"device": 0, "host": kept, "disk": 0}

    def full_logits(self, ids: Tensor) -> Tensor:
        """Without a cache."""
        return self._forward(ids, None)

    def _forward(self, ids: Tensor, cache: DynamicCache | None) -> Tensor:
        use_cache = cache is not None
        out = self.model(ids, past_key_values=cache, use_cache=use_cache, logits_to_keep=1)
        return out.logits


def load_model(name: str, checkpoint: str | None) -> DRTForCausalLM:
    """A model of `CONFIGURATIONS` with random weights of a fixed seed, or a trained one."""
    if checkpoint is not None:
        return DRTForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    configuration, vocab_size = CONFIGURATIONS[name]
    fields = load_config(find_config(configuration)).model
    torch.manual_seed(0)
    return DRTForCausalLM(DRTConfig(**{"vocab_size": vocab_size, **fields})).eval()


def new_memory(
    tier: Tier, *, model: DRTForCausalLM, dtype: torch.dtype, folder: Path
) -> InferenceMemory:
    """An empty memory; one on disk writes to a new folder there."""
    if tier == "disk":
        marks = {"model": model.fingerprint()}
        return DiskMemory.create(folder, fingerprint=marks, dtype=dtype)
    return (DeviceMemory if tier == "device" else HostMemory)(dtype=dtype)


def sliding_window(ours: DRTForCausalLM) -> Baseline:
    """Mistral of our size and window. Its masks are dense, so short segments suit it best."""
    window = ours.config.sliding_window
    theirs = MistralConfig(**_sizes(ours), sliding_window=window)
    return Baseline("Mistral", MistralForCausalLM(theirs).eval(), segment_size=2 * window)


def full_attention(ours: DRTForCausalLM, *, segment_size: int = FULL_SEGMENT_SIZE) -> Baseline:
    """Llama of our size, and where ours is."""
    with ours.device:
        model = LlamaForCausalLM(LlamaConfig(**_sizes(ours))).eval()
    return Baseline("Llama", model, segment_size=segment_size)


def _sizes(ours: DRTForCausalLM) -> dict[str, Any]:
    """As many parameters as ours: more layers in place of what retrieves, and then wider ones."""
    config = ours.config
    assert config.num_key_value_heads is not None
    assert config.head_dim is not None
    width, heads = config.hidden_size, config.num_attention_heads + config.num_key_value_heads
    embeddings = width * (1 + config.vocab_size * (1 if config.tie_word_embeddings else 2))
    layer = 2 * width * heads * config.head_dim + 3 * width * config.intermediate_size + 2 * width
    total = num_parameters(ours) - embeddings
    num_layers = total // layer
    extra = round((total - num_layers * layer) / (3 * width * num_layers) / 8) * 8
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": width,
        "intermediate_size": config.intermediate_size + extra,
        "num_hidden_layers": num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": 1 << 25,
    }


def num_parameters(model: nn.Module) -> int:
    """Each counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def random_bytes(count: int, *, seed: int) -> Tensor:
    """(1, count) int64 ids 0 to 255."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, count), generator=generator)


def check(contestant: Contestant) -> float:
    """Read a text and go on with one token; assert that this is what one forward says.

    Args:
        contestant: one that has read nothing, in float32, its memory too.

    Returns:
        The largest deviation of a logit.
    """
    ids = random_bytes(CHECKED_LENGTH + 1, seed=1).to(contestant.model.device)
    assert contestant.read(ids[:, :-1], budget=float("inf")) == CHECKED_LENGTH
    found, wanted = contestant.branch()(ids[:, -1:]), contestant.full_logits(ids)
    # Sums of some hundred terms of size one in another order, through all layers.
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
    return float((found - wanted).abs().max())
