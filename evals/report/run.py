"""What `llmlite report` does."""
from __future__ import annotations
from dataclasses import dataclass
@dataclass(frozen=True)
class ReportSettings:
    pass
