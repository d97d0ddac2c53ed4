"""What DRT is compared with; importing this registers the models with the Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM

from drt.baselines.base import BaselineOutput, BaselineState
from drt.baselines.block_recurrent import BlockRecurrentConfig, BlockRecurrentForCausalLM
from drt.baselines.landmark_attention import LandmarkAttentionConfig, LandmarkAttentionForCausalLM

AutoConfig.register("block_recurrent", BlockRecurrentConfig, exist_ok=True)
AutoModelForCausalLM.register(BlockRecurrentConfig, BlockRecurrentForCausalLM, exist_ok=True)
AutoConfig.register("landmark_attention", LandmarkAttentionConfig, exist_ok=True)
AutoModelForCausalLM.register(LandmarkAttentionConfig, LandmarkAttentionForCausalLM, exist_ok=True)

__all__ = [
    "BaselineOutput",
    "BaselineState",
    "BlockRecurrentConfig",
    "BlockRecurrentForCausalLM",
    "LandmarkAttentionConfig",
    "LandmarkAttentionForCausalLM",
]
