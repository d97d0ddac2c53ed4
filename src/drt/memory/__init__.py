"""The chunk memory: what has been read, as an object of its own."""

from drt.memory.disk import DiskMemory
from drt.memory.export import export_safetensors, import_safetensors
from drt.memory.files import MemoryFormatError
from drt.memory.interface import ChunkMemory, Chunks
from drt.memory.ram import DeviceMemory, HostMemory
from drt.memory.repair import repair_memory
from drt.memory.training import TrainingMemory

__all__ = [
    "ChunkMemory",
    "Chunks",
    "DeviceMemory",
    "DiskMemory",
    "HostMemory",
    "MemoryFormatError",
    "TrainingMemory",
    "export_safetensors",
    "import_safetensors",
    "repair_memory",
]
