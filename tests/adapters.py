"""Random adapters of tiny models, made and saved by peft itself."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_adapter(base: Path, directory: Path, seed: int = 5, size: float = 0.1, **settings) -> Path:
    """An adapter of ``base`` whose every tensor is random: settings of peft's LoraConfig over rank 4, all layers."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": EVERY, "task_type": "CAUSAL_LM"} | settings)
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.randn_like(parameter)
        elif "lora_" in name:
            parameter.data = torch.randn_like(parameter) * size
    model.save_pretrained(directory)
    return directory


def adapted(base: Path, directory: Path) -> torch.nn.Module:
    """The base with the adapter on it, as peft computes them."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    return PeftModel.from_pretrained(model, directory).eval()
