"""What DRT is compared with; importing it registers the models with the Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM

from drt.baselines.ablations import AblationConfig, AblationForCausalLM

AutoConfig.register("drt_ablation", AblationConfig, exist_ok=True)
AutoModelForCausalLM.register(AblationConfig, AblationForCausalLM, exist_ok=True)

__all__ = ["AblationConfig", "AblationForCausalLM"]
