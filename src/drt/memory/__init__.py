"""The chunk memory: what has been read, as an object of its own."""

from drt.memory.interface import ChunkMemory
from drt.memory.slabs import SlabMemory
from drt.memory.training import TrainingMemory

__all__ = ["ChunkMemory", "SlabMemory", "TrainingMemory"]
