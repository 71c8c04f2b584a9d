"""Something in a run that its owner should change."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing that does not fit, or that is wasteful."""

    field: str
    value: str
    why: str
    remedy: str
    """What to write."""
    fatal: bool = True
    """Whether the run cannot work as it is."""

    def __str__(self) -> str:
        return f"{self.field}: {self.value}: {self.why}: {self.remedy}"
