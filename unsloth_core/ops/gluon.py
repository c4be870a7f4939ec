"""Gluon, Triton's language for one architecture at a time, under one set of names: what kernels for Hopper import.

In Gluon a kernel says itself what Triton's compiler otherwise decides: where a tile lies in shared memory, which warps
do what, when a copy or a product begins and when it is waited for. The language is experimental and moves: this file
is the only one that knows how Triton 3.6 to 3.9 differ.

    3.6                                  3.9                    here
    tma.async_copy_global_to_shared      tma.async_load         ``load(desc, [row, column], barrier, tile)``
    tma.async_copy_shared_to_global      tma.async_store        ``store(desc, [row, column], tile)``
    triton.language.core._aggregate      gluon.aggregate        ``aggregate``: a class whose objects kernels pass around
    gl.thread_barrier                    gl.barrier             ``barrier()``
    in the compiler, without a name      tma.async_atomic_add   ``reduce_add(desc, [row, column], tile)``
    tile._reinterpret                    tile.reinterpret       ``reinterpret(tile, dtype, shape, layout)``

Not interpretable: Gluon kernels are compiled, also under TRITON_INTERPRET=1, and run on Hopper alone."""

from typing import Any

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language import core

mbarrier = hopper.mbarrier
fence_async_shared = hopper.fence_async_shared
warpgroup_mma = hopper.warpgroup_mma
warpgroup_mma_wait = hopper.warpgroup_mma_wait
tma = hopper.tma
aggregate = core._aggregate
jit = gluon.jit
constexpr_function = gluon.constexpr_function
make_tensor_descriptor = tma.make_tensor_descriptor
store_wait = tma.store_wait
load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@builtin
def _reduce_add(tensor_desc: Any, coord: Any, src: Any, _semantic: Any = None) -> None:
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)


reduce_add = getattr(tma, "async_atomic_add", None) or _reduce_add


@builtin
def reinterpret(tile: Any, dtype: Any, shape: Any, layout: Any, _semantic: Any = None) -> Any:
    """The same bytes of shared memory as another shape."""
    method = getattr(tile, "reinterpret", None) or tile._reinterpret
    return method(dtype, shape, layout, _semantic=_semantic)


__all__ = [
    "TensorDescriptor",
    "aggregate",
    "barrier",
    "constexpr_function",
    "fence_async_shared",
    "gl",
    "jit",
    "load",
    "make_tensor_descriptor",
    "mbarrier",
    "reduce_add",
    "reinterpret",
    "store",
    "store_wait",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]
