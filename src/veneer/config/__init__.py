"""LoraConfig: flat data and its rules."""

from veneer.config.lora_config import LoraConfig, config_in, rank_and_alpha
from veneer.config.patterns import all_matches, ends_of, first_match, matches, matches_end, whole_match
from veneer.config.rules import ALL_LINEAR, PeftType, TaskType
from veneer.config.sub_configs import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig, LoraRuntimeConfig

PeftConfig = LoraConfig

__all__ = [
    "ALL_LINEAR",
    "CordaConfig",
    "EvaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraRuntimeConfig",
    "PeftConfig",
    "PeftType",
    "TaskType",
    "all_matches",
    "config_in",
    "ends_of",
    "first_match",
    "matches",
    "matches_end",
    "rank_and_alpha",
    "whole_match",
]
