from __future__ import annotations

# Lightning's log handler keeps the stderr of the moment it is imported: not that of one test.
import lightning.pytorch  # noqa: F401
