# What pyright is told about Triton: nothing. In a kernel, types mean something else (an int becomes a tensor,
# a literal a constexpr), so Triton's annotations call correct kernels wrong. Host code is checked as usual.
from typing import Any

def __getattr__(name: str) -> Any: ...
