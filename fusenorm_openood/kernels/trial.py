"""A kernel is compared with torch on small maps before its first use in a process."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SETTINGS = [(0.1, 0.25, 0.0, 1e-8), (0.29, 0.29, 0.5, 1e-4)]  # 29 of 100 pixels, by float32
RTOL = 1e-4  # a wrong k changes a norm of these maps by more, rounding by far less


def compare(
    kernel: Callable[..., Tensor],
    by_torch: Callable[..., Tensor],
    shapes: Sequence[tuple[int, int]],
    device: torch.device,
) -> None:
    """Raise ArithmeticError unless a kernel agrees with torch on maps ``[2, C, N]`` of each shape.

    In every precision that kernels support, contiguous and channels_last.
    """
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for C, N in shapes:
            maps = trial_maps(C, N).to(dtype)
            expected = by_torch(maps, SETTINGS)
            for layout, x in (("contiguous", maps), ("channels_last", maps.mT.contiguous().mT)):
                # Samples one by one keep to one thread, which is fast on a busy machine, too.
                samples = torch.split(x.to(device), 1)
                found = torch.cat([kernel(sample, SETTINGS) for sample in samples], dim=1).cpu()
                if not torch.allclose(found, expected, rtol=RTOL, atol=0):
                    worst = ((found - expected) / expected).abs().max().item()
                    raise ArithmeticError(
                        f"differs from torch by {worst:.1e} on {layout} {dtype} maps {[2, C, N]}"
                    )


def trial_maps(C: int, N: int) -> Tensor:
    """Two maps ``[C, N]`` of no pattern: one of both signs, one without a sign.

    The last channel is dead and the first all but constant, where C has room for them.
    """
    x = torch.arange(2 * C * N, dtype=torch.float64, device="cpu").square().sin().view(2, C, N)
    if C > 2:
        x[:, 0] = 0.7 + 1e-3 * x[:, 0]
        x[:, -1] = 0
    x[1] = x[1].relu()
    return x.float()
