"""Where allocation meets a training loop."""

from lorank.training.attach import Ranks, attach
from lorank.training.callback import RankCallback
from lorank.training.fsdp import shard_base_
from lorank.training.history import HistoryError, RankHistory, Record, read_history

__all__ = ["HistoryError", "RankCallback", "RankHistory", "Ranks", "Record", "attach", "read_history", "shard_base_"]
