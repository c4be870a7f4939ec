"""Costs add, and the roofline is the slower of memory and arithmetic."""

from unsloth_core.cost import Cost


def test_costs_add_and_take_the_longer_of_two_times():
    total = Cost(bytes=100, flops=30) + Cost(bytes=20, flops=4)
    assert total == Cost(bytes=120, flops=34)
    assert total.seconds(bytes_per_s=10, flops_per_s=1) == 34  # bound by arithmetic
    assert total.seconds(bytes_per_s=1, flops_per_s=10) == 120  # bound by memory
    assert Cost(0, 0).seconds(bytes_per_s=1, flops_per_s=1) == 0
