"""Optimizers that know which parameter is a factor A and which a factor B: LoRA+ and LoRA-FA."""

from veneer.optimizers.lorafa import create_lorafa_optimizer
from veneer.optimizers.loraplus import create_loraplus_optimizer

__all__ = ["create_lorafa_optimizer", "create_loraplus_optimizer"]
