"""Operations on tensors without storage, watched: what stays alive, what is computed, what would be sent."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from biokit.kernels import attention as attention_kernel
from biokit.kernels import dropout as dropout_kernel

# what autocast casts: matrix products (torch's documentation of autocast, "Op eligibility")
MATMULS = {
    F.linear,
    F.conv1d,
    torch.matmul,
    torch.bmm,
    torch.baddbmm,
    torch.addmm,
    torch.einsum,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.Tensor.bmm,
}
Message = tuple[str, int]  # kind, bytes


@dataclass
class Cost:
    """What a stretch of work costs.

    Attributes:
        flops: of matrix products, attention included; a multiplication and an addition are two.
        moved: bytes that all other operations read and write.
        num_operations: kernels that are started.
        messages: to the other tensor ranks, (kind, bytes) -> how many.
    """

    flops: float = 0.0
    moved: float = 0.0
    num_operations: int = 0
    messages: Counter[Message] = field(default_factory=Counter)

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.moved + other.moved,
            self.num_operations + other.num_operations,
            self.messages + other.messages,
        )


class Watch(TorchDispatchMode):
    """Counts bytes of live storages and their peak, and the cost of the operations.

    Attributes:
        live: bytes of storages that are alive now, those of guests left out.
        peak: the most there was since `restart`; `retained_peak`: had nothing gone that was there at that time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self.retained_peak, self.cost = 0, 0, 0, Cost()
        self._storages: dict[int, tuple[int, Any]] = {}  # by address, with a reference that ends with the storage
        self._old, self._gone = set[int](), 0  # addresses at the restart, and bytes of those that went since

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = list(_find_tensors([out]))
        if made and not func.is_view:
            flops = flop_registry.get(func._overloadpacket)
            if flops is not None:
                self.cost.flops += flops(*args, **(kwargs or {}), out_val=out)
            else:
                self.cost.moved += sum(tensor.nbytes for tensor in (*_find_tensors(args), *made))
            self.cost.num_operations += 1
        for tensor in made:
            self._add(tensor, counts=True)
        return out

    def welcome(self, guests: Iterable[torch.Tensor]) -> None:
        """Storages that others account for: their bytes do not count here."""
        for tensor in guests:
            address = address_of(tensor)
            if address in self._storages:
                size, reference = self._storages[address]
                self._storages[address], self.live = (0, reference), self.live - size
            self._add(tensor, counts=False)

    def is_alive(self, address: int) -> bool:
        """Whether the storage at that address, which was watched once, is still held."""
        return address in self._storages

    def restart(self) -> Cost:
        """Begin a new stretch of work; returns the cost of the one before."""
        cost, self.cost = self.cost, Cost()
        self.peak = self.retained_peak = self.live
        self._old, self._gone = set(self._storages), 0
        return cost

    def post(self, kind: str, size: int) -> None:
        """Note a message of so many bytes to the other tensor ranks."""
        self.cost.messages[kind, size] += 1

    def _add(self, tensor: torch.Tensor, counts: bool) -> None:
        storage, address = tensor.untyped_storage(), address_of(tensor)
        if address in self._storages:
            return
        size = storage.nbytes() if counts else 0
        self._storages[address] = size, weakref.ref(storage, lambda _: self._drop(address))
        self.live += size
        self.peak = max(self.peak, self.live)
        self.retained_peak = max(self.retained_peak, self.live + self._gone)

    def _drop(self, address: int) -> None:
        size = self._storages.pop(address)[0]
        self.live -= size
        if address in self._old:
            self._old.discard(address)
            self._gone += size


def _find_tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Those among an operation's arguments or results; lists may hold some."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _find_tensors(value)


def address_of(tensor: torch.Tensor) -> int:
    """Of a tensor's storage, as long as it lives."""
    return tensor.untyped_storage()._cdata


class DeviceKernels(TorchFunctionMode):
    """On tensors of torch's `meta` device, what autocast and the kernels of a real device do.

    biokit's kernels take torch's fused attention and dropout for every device but the CPU; here both are given the
    form in which the device's own kernel keeps its intermediate values for the backward pass.

    Args:
        kind: `cuda` or `cpu`.
        dtype: of matrix products.
    """

    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind, self.dtype = kind, dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._drop(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func in MATMULS and self.dtype != torch.float32:
            # from the last one, as torch's compiled autocast does: it decides which gradient is ready first
            args = [self.cast(value) for value in reversed(args)][::-1]
            kwargs = {key: self.cast(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)

    def cast(self, value: Any) -> Any:
        """As autocast does before a matrix product."""
        is_float = isinstance(value, torch.Tensor) and value.dtype == torch.float32
        return value.to(self.dtype) if is_float else value

    def _drop(self, x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        if not training or not p:
            return x
        if dropout_kernel.implementation(self.kind) == "lanes":
            return x * torch.empty_like(x)  # its noise, in the dtype of x
        return torch.native_dropout(x, p, True)[0]

    def _attend(
        self,
        q_BHTK: torch.Tensor,
        k_BHSK: torch.Tensor,
        v_BHSK: torch.Tensor,
        mask: torch.Tensor | None = None,
        p: float = 0.0,
        is_causal: bool = False,
        **_: Any,
    ) -> torch.Tensor:
        if attention_kernel.implementation(self.kind, q_BHTK.dtype, p) == "reference":
            key_mask_BS = None if mask is None else mask[:, 0, 0]
            with self:  # a mode does not see what it calls itself
                return attention_kernel.attention_reference(q_BHTK, k_BHSK, v_BHSK, key_mask_BS, is_causal, p)
        bias = None if mask is None else torch.zeros_like(mask, dtype=q_BHTK.dtype)
        aten: Any = torch.ops.aten
        if self.kind == "cpu":
            fused = aten._scaled_dot_product_flash_attention_for_cpu
            return fused(q_BHTK, k_BHSK, v_BHSK, p, is_causal, attn_mask=bias)[0]
        if bias is None and q_BHTK.dtype != torch.float32:
            return aten._scaled_dot_product_flash_attention(q_BHTK, k_BHSK, v_BHSK, p, is_causal)[0]
        if bias is not None:
            bias = bias.expand(*q_BHTK.shape[:3], k_BHSK.shape[2])
        return aten._scaled_dot_product_efficient_attention(q_BHTK, k_BHSK, v_BHSK, bias, True, p, is_causal)[0]
