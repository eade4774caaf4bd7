"""Every setting of every job, in one frozen tree that is parsed before torch is imported."""

from dpo_ray.config.buffer import BufferConfig
from dpo_ray.config.evaluate import EndpointConfig, EvaluateConfig, HarnessConfig
from dpo_ray.config.jobs import (
    BetaSweepConfig,
    IterativeDPOConfig,
    JobConfig,
    JudgeQualityConfig,
    OfflineConfig,
    OfflineDPOConfig,
    RewardModelConfig,
    ServeConfig,
    SFTConfig,
    check_judge_reads,
)
from dpo_ray.config.judge import LIVE, BudgetConfig, JudgeConfig, JudgeTerm
from dpo_ray.config.loss import LossConfig, LossTerm
from dpo_ray.config.pairing import PairingConfig
from dpo_ray.config.section import Section
from dpo_ray.config.sections import (
    ClusterConfig,
    EvaluationConfig,
    GateConfig,
    SamplingConfig,
    ServingConfig,
)
from dpo_ray.config.settings import CONFIGS, Settings, exit_with, parse_config
from dpo_ray.config.training import EarlyStoppingConfig, LoraConfig, ReferenceConfig, TrainingConfig
from dpo_ray.config.votes import VotesConfig
from dpo_ray.config.warnings import WarningsConfig

__all__ = [
    "CONFIGS",
    "LIVE",
    "BetaSweepConfig",
    "BudgetConfig",
    "BufferConfig",
    "ClusterConfig",
    "EarlyStoppingConfig",
    "EndpointConfig",
    "EvaluateConfig",
    "EvaluationConfig",
    "GateConfig",
    "HarnessConfig",
    "IterativeDPOConfig",
    "JobConfig",
    "JudgeConfig",
    "JudgeQualityConfig",
    "JudgeTerm",
    "LoraConfig",
    "LossConfig",
    "LossTerm",
    "OfflineConfig",
    "OfflineDPOConfig",
    "PairingConfig",
    "ReferenceConfig",
    "RewardModelConfig",
    "SFTConfig",
    "SamplingConfig",
    "Section",
    "ServeConfig",
    "ServingConfig",
    "Settings",
    "TrainingConfig",
    "VotesConfig",
    "WarningsConfig",
    "check_judge_reads",
    "exit_with",
    "parse_config",
]
