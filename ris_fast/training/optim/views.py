"""Flat memory and views into it: how tensors of any shape, stride or dtype lie in one buffer of real numbers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from ctypes import CDLL, c_size_t, c_void_p
from operator import is_
from typing import Any

import torch
from torch import Tensor

Addresses = tuple[list[int], list[torch.Size], list[tuple[int, ...]]]  # address, shape and strides of tensors
PAGE, HUGE, MADV_HUGEPAGE = 4096, 1 << 22, 14  # bytes, bytes, <sys/mman.h>


def flat_zeros(elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on Linux CPUs in 2 MB pages if the kernel grants them, since five long buffers overrun the page-table
    caches."""
    flat = torch.empty(elements, dtype=dtype, device=device)
    if device.type == "cpu" and sys.platform == "linux" and flat.nbytes >= HUGE:
        begin, end = -(-flat.data_ptr() // PAGE) * PAGE, (flat.data_ptr() + flat.nbytes) // PAGE * PAGE
        CDLL(None).madvise(c_void_p(begin), c_size_t(end - begin), MADV_HUGEPAGE)  # advice: refusal does no harm
    return flat.zero_()


def real_dtype(tensor: Tensor) -> torch.dtype:
    """dtype of the real numbers in a real or complex tensor."""
    return tensor.dtype.to_real() if tensor.is_complex() else tensor.dtype


def real_numel(tensor: Tensor) -> int:
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def view_like(flat: Tensor, start: int, like: Tensor) -> Tensor:
    """View into `flat` from element `start` with the shape and, where dense, the strides of `like`."""
    strides = torch.empty_like(like, device="meta").stride()
    if like.is_complex():
        return flat.view(like.dtype).as_strided(like.shape, strides, start // 2)
    return flat.as_strided(like.shape, strides, start)


def window_like(flat: Tensor, start: int, like: Tensor) -> Tensor:
    """As `view_like`, but with a storage of its own over the same memory.

    Savers (safetensors, Accelerate, transformers) take tensors with a common storage for tied weights and keep one.
    """
    item = flat.element_size()
    storage = flat.untyped_storage()[start * item : (start + real_numel(like)) * item]
    strides = torch.empty_like(like, device="meta").stride()
    dtype = flat.dtype.to_complex() if like.is_complex() else flat.dtype
    return torch.empty(0, dtype=dtype, device=flat.device).set_(storage, 0, like.shape, strides)


def held_elsewhere(tensor: Tensor, among: Sequence[Tensor] = ()) -> bool:
    """Whether tensors besides this one and those of `among` (and, for a window, its buffer) use its storage."""
    storage = tensor.untyped_storage()._cdata
    ours = sum(other.untyped_storage()._cdata == storage for other in among) if among else 1
    return torch._C._storage_Use_Count(storage) - 1 > ours  # the count itself holds it once


def dense(gradient: Tensor, view: Tensor) -> Tensor:
    """A gradient as real numbers one after the other, in the memory order of the parameter's view."""
    lazy = gradient.is_conj() or gradient.is_neg()
    if lazy or gradient.stride() != view.stride() or gradient.dtype not in (view.dtype, torch.bfloat16):
        gradient = torch.empty_strided(view.shape, view.stride(), dtype=view.dtype, device=view.device).copy_(gradient)
    if gradient.is_contiguous() and not gradient.is_complex():
        return gradient
    flat = gradient.as_strided((gradient.numel(),), (1,))
    return torch.view_as_real(flat).view(-1) if flat.is_complex() else flat


def addresses(tensors: Sequence[Tensor]) -> Addresses:
    """Address, shape and strides of each: what `.data =`, swap_tensors, share_memory and moving a model change."""
    return [t.data_ptr() for t in tensors], [t.shape for t in tensors], [t.stride() for t in tensors]


def identical(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether both hold the same objects in the same order."""
    return len(some) == len(others) and all(map(is_, some, others))
