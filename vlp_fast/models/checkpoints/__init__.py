"""Published weights: tables of names for the checkpoints of other code bases, both ways. A model file knows none of them."""

from vlp_fast.models.checkpoints._files import read_metadata, read_state, write_state
from vlp_fast.models.checkpoints._format import Format
from vlp_fast.models.checkpoints._rules import CheckpointError

__all__ = ["CheckpointError", "Format", "read_metadata", "read_state", "write_state"]
