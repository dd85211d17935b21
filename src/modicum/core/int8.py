"""Linear layers with int8 weights on a CPU, and activations that lose nothing to speak of.

oneDNN's integer product reads a byte per weight, half of bfloat16, and is quick for one row and for several. It wants
bytes on both sides, so each activation is written as two: x = top / 32639 * (256 a + b) with a, b in -128 ... 127 and top
the largest magnitude of its row. Both halves are rows of one product, whose sums are exact integers. So a row's result
does not depend on how many others there are, and the error is that of the weights: half a step of their channel.

`int8-dynamic` leaves the low half out. Products of several rows take half the time, and activations are rounded to a 127th
of their row's largest, which is as much again as the weights lose where they are spread evenly, and more where one stands
out.
"""

from functools import lru_cache

import torch
from torch import Tensor

from modicum.errors import UsageError

# Bytes per activation, by the name of the form.
FORMS = {"int8": 2, "int8-dynamic": 1}
FULL = 32639  # 256 * 127 + 127
OFFSET = 256 * 128 + 128  # both bytes are unsigned with 128 for zero
ZERO = 128


class Int8Linear:
    """A weight of [out, in] as int8 with one scale per output channel, symmetric: the largest magnitude becomes 127.

    Raises:
        UsageError: the weight is not on a CPU, or this CPU's integer products are not exact.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, form: str = "int8") -> None:
        self.form = form
        if weight.device.type != "cpu":
            raise UsageError(
                f"int8 weights are for a CPU and this model is on {weight.device.type}: leave `weights` out"
            )
        if not exact_products():
            raise UsageError("this CPU has no exact integer products (VNNI) for int8 weights: leave `weights` out")
        values, self.scale = quantise(weight)
        self.zeros = torch.zeros(len(values), dtype=torch.int64)
        self.weight = torch.ops.onednn.qlinear_prepack(values, None)
        self.bias = None if bias is None else bias.detach().float()

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x.new_zeros(*x.shape[:-1], len(self.scale))
        rows_MI = x.reshape(-1, x.shape[-1]).float()
        top_M1 = rows_MI.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        # Shifted to above 0, cutting the fraction off rounds to the nearest. What is not a number has no bytes, but
        # multiplied by its row's largest magnitude it is none again.
        if FORMS[self.form] == 1:
            bytes_MI = (rows_MI * (127 / top_M1)).add_(ZERO + 0.5).to(torch.uint8)
            y_MO = self._product(bytes_MI).mul_(top_M1 / 127)
        else:
            whole_MI = (rows_MI * (FULL / top_M1)).add_(OFFSET + 0.5).to(torch.int32)
            bytes_MI4 = whole_MI.view(torch.uint8).unflatten(-1, (-1, 4))
            halves_2MI = bytes_MI4[..., :2].permute(2, 0, 1).reshape(2 * len(rows_MI), -1)
            low_MO, high_MO = self._product(halves_2MI).chunk(2)
            y_MO = torch.add(low_MO, high_MO, alpha=256).mul_(top_M1 / FULL)
        if self.bias is not None:
            y_MO += self.bias
        return y_MO.to(x.dtype).view(*x.shape[:-1], -1)

    def _product(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.scale, self.zeros)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> int8 [out, in] in -127 ... 127, and the step of each output channel, float32 [out]."""
    weight = weight.detach().float()
    step_O = weight.abs().amax(1).clamp(min=1e-30) / 127
    return (weight / step_O[:, None]).round_().clamp_(-127, 127).to(torch.int8), step_O


def product(x: Tensor, packed: Tensor, scale_O: Tensor, zeros_O: Tensor) -> Tensor:
    """(x - 128) @ weight.T * scale: uint8 [M, in] -> float32 [M, out]."""
    return torch.ops.onednn.qlinear_pointwise(
        x, 1.0, ZERO, packed, scale_O, zeros_O, None, 1.0, 0, torch.float32, "none", [], ""
    )


@lru_cache(maxsize=1)
def exact_products() -> bool:
    """Whether integer products come out exact here: without VNNI, sums of two are cut off at 16 bits."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_prepack")):
        return False
    weight = torch.tensor([[127, 127], [-127, 127], [127, -1]], dtype=torch.int8).repeat(1, 32)
    x = torch.tensor([[255, 255], [0, 255]], dtype=torch.uint8).repeat(1, 32)
    try:
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        got = product(x, packed, torch.ones(3), torch.zeros(3, dtype=torch.int64))
    except RuntimeError:
        return False
    return torch.equal(got, (x.double() - ZERO).matmul(weight.double().t()).float())
