"""Training rows that are tokenised as they come, without a pass over all of them before."""

from lightning_dpo.data.streaming.loader import StreamLoader
from lightning_dpo.data.streaming.rows import RowStream
from lightning_dpo.data.streaming.source import is_stream, open_stream
from lightning_dpo.data.streaming.train import StreamSource

__all__ = ["RowStream", "StreamLoader", "StreamSource", "is_stream", "open_stream"]
