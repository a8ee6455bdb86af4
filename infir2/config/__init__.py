"""Recipes: a TOML file plus dotted overrides becomes one typed, frozen configuration.

``load(CptConfig, path, ["--optim.lr", "5e-5"])`` reads the file, writes the overrides over it and checks the result.
Mistakes raise ConfigError: for each a line with the file, the key and the nearest valid key. The resolved
configuration is written beside the run with ``to_toml``. Nothing here imports torch: a recipe can be read where no
accelerator library is.
"""

from infir2.config.keys import describe
from infir2.config.recipe_file import changed, load, parse, to_toml
from infir2.config.rl import (
    PolicySection,
    RewardSection,
    RlConfig,
    RlDataSection,
    RlEvalSection,
    RlTrainSection,
    RolloutSection,
)
from infir2.config.section import Count, Fraction, Section
from infir2.config.training import (
    ChatDataSection,
    CptConfig,
    DataSection,
    EpochTrainSection,
    Fp8Section,
    InitSection,
    LogSection,
    LoopSection,
    ModelSection,
    OptimSection,
    ParallelSection,
    SftConfig,
    SftInitSection,
    TrainingConfig,
    TrainSection,
    check_ramps,
)

__all__ = [
    "ChatDataSection",
    "Count",
    "CptConfig",
    "DataSection",
    "EpochTrainSection",
    "Fp8Section",
    "Fraction",
    "InitSection",
    "LogSection",
    "LoopSection",
    "ModelSection",
    "OptimSection",
    "ParallelSection",
    "PolicySection",
    "RewardSection",
    "RlConfig",
    "RlDataSection",
    "RlEvalSection",
    "RlTrainSection",
    "RolloutSection",
    "Section",
    "SftConfig",
    "SftInitSection",
    "TrainSection",
    "TrainingConfig",
    "changed",
    "check_ramps",
    "describe",
    "load",
    "parse",
    "to_toml",
]
