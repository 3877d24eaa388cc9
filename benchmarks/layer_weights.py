"""What a server runs between two layers' attention: the products with a layer's weights."""

from __future__ import annotations

from collections.abc import Callable

import torch

# Qwen3-8B's layer: (outputs, inputs) of the products from one attention to the next
SHAPES = {
    "o": (4096, 4096),
    "gate_up": (24576, 4096),
    "down": (4096, 12288),
    "qkv": (6144, 4096),
}


class LayerWeights:
    """The weights of one layer, 386 MB in bfloat16: several times an L2 cache.

    A step's attention behind them finds neither its inputs nor its own machine code in L2, and in
    the instruction caches what their kernels left. One copy serves all layers: nothing of it is in
    L2 when it comes again.
    """

    def __init__(self, device: str = "cuda"):
        self._weights = {
            name: torch.randn(shape, dtype=torch.bfloat16, device=device) * 0.02
            for name, shape in SHAPES.items()
        }

    def products(self, batch: int) -> Callable[[], None]:
        """A function that multiplies batch rows with all weights in turn; it allocates nothing."""
        device = self._weights["o"].device
        pairs = []
        for weight in self._weights.values():
            outputs, inputs = weight.shape
            rows = torch.randn(batch, inputs, dtype=weight.dtype, device=device)
            out = torch.empty(batch, outputs, dtype=weight.dtype, device=device)
            pairs.append((rows, weight.t(), out))

        def run() -> None:
            for rows, weight, out in pairs:
                torch.mm(rows, weight, out=out)

        return run
