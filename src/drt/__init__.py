"""DRT: Grouped Cross-Attention and the Differentiable Retrieval-based Transformer."""

from transformers import AutoConfig, AutoModelForCausalLM

import drt.baselines  # noqa: F401  (registers them with the Auto classes too)
from drt.configuration import DRTConfig
from drt.decoding_graph import DecodingGraph
from drt.memory import (
    ChunkMemory,
    DeviceMemory,
    DiskMemory,
    HostMemory,
    MemoryFormatError,
    export_safetensors,
    import_safetensors,
)
from drt.modeling import DRTCausalLMOutput, DRTForCausalLM
from drt.ops.gca import grouped_cross_attention
from drt.ops.window import sliding_window_attention
from drt.retrieval import Retrieval
from drt.state import DRTState
from drt.version import __version__

AutoConfig.register("drt", DRTConfig, exist_ok=True)
AutoModelForCausalLM.register(DRTConfig, DRTForCausalLM, exist_ok=True)

__all__ = [
    "ChunkMemory",
    "DRTCausalLMOutput",
    "DRTConfig",
    "DRTForCausalLM",
    "DRTState",
    "DecodingGraph",
    "DeviceMemory",
    "DiskMemory",
    "HostMemory",
    "MemoryFormatError",
    "Retrieval",
    "__version__",
    "export_safetensors",
    "grouped_cross_attention",
    "import_safetensors",
    "sliding_window_attention",
]
