"""What an op must do at least: bytes through device memory, operations, and the time these cannot beat."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Cost:
    """``bytes``: each input read once and each output written once. ``flops``: multiply and add count as two."""

    bytes: int
    flops: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def seconds(self, *, bytes_per_s: float, flops_per_s: float) -> float:
        """Roofline: the larger of the two times, at rates measured on the machine in question."""
        return max(self.bytes / bytes_per_s, self.flops / flops_per_s)
