"""Adam's arithmetic and its walk over shards on the drive."""

from optim.gradients import ShardGradient, Waiting
from optim.kernels import AdamWScalars
from optim.layout import DEFAULT_CHUNK_ELEMENTS, ParameterSlot, ShardLayout
from optim.norm import clip_coefficient, global_norm
from optim.offloaded_adamw import OffloadedAdamW
from optim.states import ParameterState
from optim.steps import NonFiniteUpdateError, StepResult
from optim.updater import Recorder, ShardUpdater, UpdateInputs, UpdateJob

__all__ = [
    "DEFAULT_CHUNK_ELEMENTS",
    "AdamWScalars",
    "NonFiniteUpdateError",
    "OffloadedAdamW",
    "ParameterSlot",
    "ParameterState",
    "Recorder",
    "ShardGradient",
    "ShardLayout",
    "ShardUpdater",
    "StepResult",
    "UpdateInputs",
    "UpdateJob",
    "Waiting",
    "clip_coefficient",
    "global_norm",
]
