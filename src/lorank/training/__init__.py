"""Rank allocation inside a training loop: a user's own loop, the transformers Trainer or TRL."""

from lorank.training.attach import attach
from lorank.training.checkpoint.integrity import last_checkpoint
from lorank.training.event_loop import Ranks
from lorank.training.history import HistoryError, RankHistory, Record, read_history
from lorank.training.parallel.fsdp import shard_base_
from lorank.training.trainer_callback import RankCallback

__all__ = [
    "HistoryError",
    "RankCallback",
    "RankHistory",
    "Ranks",
    "Record",
    "attach",
    "last_checkpoint",
    "read_history",
    "shard_base_",
]
