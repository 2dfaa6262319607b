"""Ray: the one place that starts it, fans work out over it and follows what the workers do.

Images never go through Ray's object store: a worker reads and writes the farm's store itself.
"""

from farm.cluster.connect import connected
from farm.cluster.editing import edit_concepts
from farm.cluster.metrics import Metrics
from farm.cluster.tasks import PausedError, train_adapters
from farm.cluster.training import pretrain_base, search_ranks
from farm.cluster.watch import Failure

__all__ = [
    "Failure",
    "Metrics",
    "PausedError",
    "connected",
    "edit_concepts",
    "pretrain_base",
    "search_ranks",
    "train_adapters",
]
