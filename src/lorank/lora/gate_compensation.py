"""Keeps the outputs of a trained adapter when a method gives it new gates.

A method may start with gates other than one (ARD-LoRA's soft masks). On an adapter that has been trained, by a run that
was interrupted for example, these gates would silently change the model. B diag(1/g) under the gate g is the B of
before.
"""

from __future__ import annotations

import torch

from lorank.lora.layer import AdapterLayers


@torch.no_grad()
def compensate_gates_(layers: AdapterLayers) -> None:
    """Divides B by the gates, B ← B diag(1/g), in layers whose update is not zero.

    A column of B whose gate is zero or one does not change.
    """
    for layer in layers.values():
        gate = layer.gate
        if gate is None or not (layer.A.any() and layer.B.any()):
            continue
        divisor = gate.detach().to(layer.B.device)  # (r,)
        if bool((divisor == 1).all()):
            continue
        divisor = torch.where(divisor == 0, torch.ones_like(divisor), divisor)
        # (d_out, r); the quotient has the precision of the gate, if that is higher
        layer.B.copy_(layer.B / layer.layout.repeated(divisor, layer.B))
