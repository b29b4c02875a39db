"""The Control protocol: a thin line between ranks that works when the exchanges do not."""

from typing import Protocol


class Control(Protocol):
    """Short texts between the ranks of a group. Neither method waits for another rank."""

    rank: int
    size: int

    def post(self, notice: str) -> None:
        """Leave a notice for every other rank."""

    def poll(self) -> list[tuple[int, str]]:
        """(sender, notice) of what came since the last call."""
