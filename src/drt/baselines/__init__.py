"""What DRT is compared with; importing this registers the models with the Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM

from drt.baselines.ablations import AblationConfig, AblationForCausalLM
from drt.baselines.base import BaselineOutput, BaselineState
from drt.baselines.block_recurrent import BlockRecurrentConfig, BlockRecurrentForCausalLM
from drt.baselines.landmark_attention import LandmarkAttentionConfig, LandmarkAttentionForCausalLM

for _config, _model in (
    (AblationConfig, AblationForCausalLM),
    (BlockRecurrentConfig, BlockRecurrentForCausalLM),
    (LandmarkAttentionConfig, LandmarkAttentionForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)

__all__ = [
    "AblationConfig",
    "AblationForCausalLM",
    "BaselineOutput",
    "BaselineState",
    "BlockRecurrentConfig",
    "BlockRecurrentForCausalLM",
    "LandmarkAttentionConfig",
    "LandmarkAttentionForCausalLM",
]
