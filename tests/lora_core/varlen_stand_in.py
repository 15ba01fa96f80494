"""A replacement for the GPU's attention kernel, which computes all sequences of a tick at once."""

from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn


class StandIn:
    """varlen_attn as documented, in fp32 and differentiable. Records its calls."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, q_THE, k_TKE, v_TKE, bounds_q, bounds_k, longest_q, longest_k, **options: Any) -> Tensor:
        signature(varlen_attn).bind(q_THE, k_TKE, v_TKE, bounds_q, bounds_k, longest_q, longest_k, **options)
        call = {"bounds": bounds_q.tolist(), "dtype": bounds_q.dtype, "longest": longest_q, **options}
        self.calls.append(call)
        assert torch.equal(bounds_q, bounds_k)
        assert longest_q == longest_k
        assert all(part.stride(-1) == 1 for part in (q_THE, k_TKE, v_TKE)), "the kernel requires contiguous heads"
        assert options.get("enable_gqa", True) or q_THE.shape[1] == k_TKE.shape[1]
        before, after = options["window_size"]
        outputs = []
        for start, stop in zip(call["bounds"], call["bounds"][1:], strict=False):
            q, k, v = (part[start:stop].float().transpose(0, 1) for part in (q_THE, k_TKE, v_TKE))
            k, v = (part.repeat_interleave(len(q) // len(k), dim=0) for part in (k, v))
            place = torch.arange(stop - start, device=q.device)
            distance = place[:, None] - place
            seen = (before < 0) | (distance <= before)
            seen &= (after < 0) | (-distance <= after)
            scores = (q @ k.transpose(1, 2) * options["scale"]).masked_fill(~seen, float("-inf"))
            outputs.append((torch.softmax(scores, -1) @ v).transpose(0, 1))
        return torch.cat(outputs).to(q_THE.dtype)
