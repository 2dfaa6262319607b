"""Clocks for tests: time passes when told to, and every host shows it in its own way."""

from dataclasses import dataclass, field


@dataclass
class Time:
    """The true time in seconds."""

    seconds: float = 1_000_000.0

    def pass_by(self, seconds: float) -> None:
        self.seconds += seconds


@dataclass
class Host:
    """A host whose wall clock is `ahead` of the true time by so many seconds; its monotonic clock began at `booted`."""

    time: Time = field(default_factory=Time)
    ahead: float = 0
    booted: float = 0

    def now(self) -> float:
        return self.time.seconds + self.ahead

    def monotonic(self) -> float:
        return self.time.seconds - self.booted

    @property
    def clocks(self) -> dict:
        """As `Queue` and `Leases` take them."""
        return {"now": self.now, "monotonic": self.monotonic}
