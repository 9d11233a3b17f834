"""Watches what goes through the ranks of a parameter of experts, in the forward pass of whatever model uses it.

PEFT adds the update to the parameter, so z = A_e x of a token is computed nowhere. What the model does with the
parameter is seen by a ``TorchFunctionMode``: an expert's matrix is picked by its index, perhaps transposed, and
multiplied with the tokens that the router has sent there. These products give x, the experts of its rows and, by a hook
on the result y, ∂loss/∂y. With the contraction over the axis of A:

    z = A_e x        ẑ = s · g ⊙ B_eᵀ ∂loss/∂y

Some families store a parameter so that the tokens meet B first. Then z = B_eᵀ x and ẑ = s · g ⊙ A_e ∂loss/∂y, and the
two change places in a change of basis.

Products of these forms are known: one expert at a time, one matrix per token, all experts with sorted tokens
(``grouped_mm``), and every expert with tokens of its own. Any other use of the parameter raises an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lorank.errors import AdapterError
from lorank.lora.gramian_sums import LayerGramians
from lorank.lora.layer import AdapterLayer

_SAME = {"to", "type", "float", "double", "half", "bfloat16", "contiguous", "clone", "type_as"}
"""Operations after which a tensor has the same values, up to rounding."""
_SWAPPED = {"transpose", "swapaxes", "swapdims", "t", "mT", "T", "adjoint"}
_MATMUL = {"matmul", "__matmul__", "mm", "bmm"}


@dataclass(frozen=True)
class _View:
    """A tensor that holds weights of experts.

    Args:
        tensor: the tensor. It is kept, so that its ``id`` stays its own.
        expert: None: all experts, on the first axis; an index of one expert; or (n,), the expert of every entry of the
            first axis.
        transposed: whether its last two axes are those of the parameter in the other order.
    """

    tensor: Tensor
    expert: Tensor | int | None
    transposed: bool = False


class ExpertWatch:
    """Watches the module that uses a parameter, and adds what it sees to ``own``.

    Args:
        layer: the LoRA of the parameter.
        own: the sums, of every expert (:class:`lorank.lora.gramian_sums.LayerGramians`).
    """

    def __init__(self, layer: AdapterLayer, own: LayerGramians) -> None:
        self._layer, self._own = layer, own
        self._tried = False
        self._open: list[_Seeing] = []
        base = layer.module.get_base_layer()
        self._handles = [
            base.register_forward_pre_hook(self._enter),
            base.register_forward_hook(self._leave, always_call=True),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _enter(self, base: nn.Module, _: tuple[Any, ...]) -> None:
        seeing: _Seeing | None = None
        name = self._layer.module.parameter_name
        # The first pass is looked at in any case, so that a use that is not known shows at the start of a run.
        if (self._own.wants(self._layer.module) or not self._tried) and name in getattr(base, "parametrizations", {}):
            self._tried = True
            seeing = _Seeing(self._layer, getattr(base, name), self._add)
            seeing.__enter__()  # type: ignore[no-untyped-call]  # untyped in torch
        self._open.append(seeing)  # type: ignore[arg-type]  # None: this pass is not watched

    def _leave(self, base: nn.Module, _: tuple[Any, ...], __: Any) -> None:
        if self._open and (seeing := self._open.pop()) is not None:
            seeing.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # untyped in torch

    def _add(self, x: Tensor, y: Tensor, expert: Tensor, contracts_last: bool, is_column: bool) -> None:
        """Adds a product when the backward pass reaches it.

        Args:
            x: (n, ·).
            y: of n rows, or of n columns on its last axis.
            expert: (n,).
        """
        layer, own = self._layer, self._own
        if not (own.wants(layer.module) and y.requires_grad and layer.rank):
            return
        x = x.detach()

        def add(dy: Tensor) -> None:
            layout, gate = layer.layout, layer.gate
            A = layout.by_expert(layer.A.detach(), 0)  # (E, r, d)
            B = layout.by_expert(layer.B.detach(), 1).mT  # (E, r, d')
            # The last axis of the update has A's inputs, or B's in families whose axes PEFT does not swap.
            meets_A = contracts_last == _has_A_last(layer)
            first, second = (A, B) if meets_A else (B, A)
            z = _products(x, first, expert)  # (r, n)
            rows = (dy.mT if is_column else dy).reshape(len(x), -1)
            dz = _products(rows, second, expert) * layer.scaling
            if gate is not None:
                dz = dz * gate.detach().to(dz)[:, None]
            own.add_experts(z, dz, expert, layout.experts, swapped=not meets_A)

        y.register_hook(add)  # type: ignore[no-untyped-call]  # untyped in torch


def _has_A_last(layer: AdapterLayer) -> bool:
    return bool(layer.module._did_swap_in_out_features) or layer.module.get_param().dim() == 2


def _products(rows: Tensor, factors: Tensor, expert: Tensor) -> Tensor:
    """The ranks' products of rows (n, d) with the factors (E, r, d) of their experts: (r, n) in float32 at least."""
    dtype = torch.promote_types(factors.dtype, torch.float32)
    found = torch.zeros(factors.shape[1], len(rows), dtype=dtype, device=rows.device)
    for index in range(len(factors)):
        own = expert == index
        found[:, own] = factors[index].to(dtype) @ rows[own].to(dtype).T
    return found


class _Seeing(TorchFunctionMode):
    """Sees the products with a parameter inside one forward pass.

    Args:
        layer: its LoRA.
        weight: the parameter with the update, as the forward pass gets it: (E, ·, ·), or (·, ·).
        add: called with x (n, ·), the result, the expert of each row (n,), whether the product runs over the
            parameter's last axis, and whether the rows are columns of the result.
    """

    def __init__(
        self, layer: AdapterLayer, weight: Tensor, add: Callable[[Tensor, Tensor, Tensor, bool, bool], None]
    ) -> None:
        super().__init__()
        self._layer, self._add = layer, add
        self._views: dict[int, _View] = {}
        self._track(_View(weight, 0 if weight.dim() == 2 else None))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return out  # sizes, dtypes, indices
        given = [*args, *(kwargs or {}).values()]
        if not any(id(one) in self._views for one in _flat(given)) or id(out) in self._views:
            return out
        # properties of tensors are functions named __get__ of a descriptor
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        if not self._see(name, given, out):
            raise AdapterError(
                f"{self._layer.name}: the model uses the experts' weights in an operation ({name}) that lorank does "
                "not know, so it cannot see what goes through their ranks, which BalancedLoRA and balanced scores "
                'need. Use another computation of the experts (model.set_experts_implementation("eager")), leave them '
                "out of target_parameters, or use a method that needs no such view: ALoRA, SoRA, AdaLoRA, ARDLoRA"
            )
        return out

    def _track(self, view: _View) -> bool:
        self._views[id(view.tensor)] = view
        return True

    def _see(self, name: str, given: list[Any], out: Tensor) -> bool:
        """Whether the operation is known. What it makes or multiplies is tracked."""
        first = self._views.get(id(given[0]))
        if first is not None and name == "__getitem__" and first.expert is None:
            index = given[1]
            known = isinstance(index, int) or (
                isinstance(index, Tensor) and index.dim() <= 1 and index.dtype in (torch.int64, torch.int32)
            )
            one = int(index) if known and (isinstance(index, int) or not index.dim()) else index
            return known and self._track(_View(out, one, first.transposed))
        if first is not None and name in _SAME and out.shape == first.tensor.shape:
            return self._track(_View(out, first.expert, first.transposed))
        if first is not None and name in _SWAPPED and out.shape == first.tensor.mT.shape:
            axes = {axis % out.dim() for axis in given[1:3] if isinstance(axis, int)}
            return axes in (set(), {out.dim() - 2, out.dim() - 1}) and self._track(
                _View(out, first.expert, not first.transposed)
            )
        second = self._views.get(id(given[1])) if len(given) > 1 else None
        if first is None and second is not None:
            if name == "linear":
                return self._product(given[0], second, out, contracts_last=True)
            if name in _MATMUL:
                return self._product(given[0], second, out, contracts_last=False)
            if "grouped_mm" in name:
                offsets = next((one for one in given[2:] if isinstance(one, Tensor) and one.dim() == 1), None)
                return offsets is not None and self._grouped(given[0], second, out, offsets)
        if first is not None and second is None and name in _MATMUL and given[1].dim() == 3:
            return self._product(given[1].mT, first, out, contracts_last=True, is_column=True)
        return False

    def _product(self, x: Tensor, view: _View, out: Tensor, *, contracts_last: bool, is_column: bool = False) -> bool:
        """x (…, ·) with one expert; (n, m, ·) with one matrix per entry of the first axis; (E, m, ·) with all."""
        rows = x.reshape(-1, x.shape[-1])
        if isinstance(view.expert, int):
            expert = torch.full((len(rows),), view.expert, device=x.device)
        elif x.dim() == 3:
            of_entry = torch.arange(len(x), device=x.device) if view.expert is None else view.expert
            expert = of_entry.to(x.device).repeat_interleave(x.shape[1])
        else:
            return False
        self._add(rows, out, expert, contracts_last != view.transposed, is_column)
        return True

    def _grouped(self, x: Tensor, view: _View, out: Tensor, offsets: Tensor) -> bool:
        """x (n, ·), sorted by experts; ``offsets`` (E,) are the ends of their rows."""
        if view.expert is not None or x.dim() != 2:
            return False
        places = torch.arange(len(x), device=x.device)
        expert = torch.searchsorted(offsets.to(places), places, right=True)  # (n,); E: a row of no expert
        self._add(x, out, expert, view.transposed, False)
        return True


def _flat(given: list[Any]) -> Iterator[Any]:
    for one in given:
        yield from one if isinstance(one, (list, tuple)) else (one,)
