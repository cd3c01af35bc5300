"""Which errors are whose: the user's, the machine's, or a failure of the run that has a name."""

from __future__ import annotations

from envs.manifest import QuarantineError
from envs.pipeline.http import WrongKeyError
from envs.pipeline.ledger import BudgetError
from rewards.rubric import RewardBudgetError
from rlrestore.checkpoint import CheckpointError
from rlrestore.config.files import ConfigError
from rlrestore.crew import WorkerLostError
from rlrestore.engine.base import NonFiniteError
from rlrestore.learning.learner import StaleRolloutError
from rlrestore.learning.weights import SyncError
from rlrestore.placement import PlacementError


class InputError(ValueError):
    """A file or folder given on the command line cannot be used; the message says what to do."""


class ClusterError(RuntimeError):
    """Ray cannot be reached, or the cluster lacks what the placement asks for."""


USER_ERRORS = (ConfigError, InputError, CheckpointError, PlacementError)
UNAVAILABLE_ERRORS = (ClusterError,)


def known_failures() -> tuple[type[Exception], ...]:
    """Failures of a run that explain themselves in one line."""
    return (
        RewardBudgetError,
        BudgetError,
        NonFiniteError,
        QuarantineError,
        StaleRolloutError,
        SyncError,
        WorkerLostError,
        WrongKeyError,
        FloatingPointError,
    )
