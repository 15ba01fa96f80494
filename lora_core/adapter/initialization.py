# pyright: basic
"""Draws the initial values of A and B (`init_lora_weights` in PEFT) from seed, module name and base weight.

PiSSA (arXiv 2404.02948): scale·B A = U_r S_r V_rᵀ, from the r largest singular values of W. OLoRA (arXiv 2406.01775):
the first r columns of Q and rows of R, with W = Q R. Both start with a nonzero update, which is subtracted from the
base model: flat_adapter.py stores it with the adapter. Shape suffixes as in flat_adapter.py.
"""

import numpy as np
import torch
from torch import Tensor

from lora_core.config import LoraConfig
from lora_core.kernels.drawing import draws, uniform_rows
from lora_core.runtime.counter_rng import normal

OVERSAMPLED = 8
"""Directions beyond the rank that the randomized SVD computes, which reduces the error of the last singular values."""
DRAWING_WORK = 500
"""Multiplications that take as long as drawing one number on one core, about 15 ns."""


def initial_a(lora: LoraConfig, module: str, num_inputs: int, *, seed: int, device: torch.device) -> Tensor:
    """Return the initial A: fp32 [R, D], where D is `num_inputs`. A gaussian one is on the CPU, others on the device.

    "gaussian" is N(0, 1/R²). Otherwise Kaiming-uniform with a = √5, which is U(-1/√D, 1/√D).
    """
    rank = lora.rank_of(module)
    if lora.init_lora_weights != "gaussian":
        return uniform_rows(np.full(rank, num_inputs**-0.5), num_inputs, "lora_A", seed, module, device=device)
    numbers = normal("lora_A", seed, module, count=rank * num_inputs) / rank
    return torch.from_numpy(numbers.astype(np.float32)).view(rank, num_inputs)


def start_work(lora: LoraConfig, module: str, shape: tuple[int, int], device: torch.device) -> int:
    """Estimate the multiplications that initializing an [O, D] weight takes."""
    rank, num_weights = lora.rank_of(module), shape[0] * shape[1]
    if not lora.subtracts_start:
        is_fast = lora.init_lora_weights != "gaussian" and draws(device)
        return rank * shape[1] * (1 if is_fast else DRAWING_WORK)
    if lora.init_lora_weights == "olora" or lora.pissa_iterations is None:
        return num_weights * min(shape)
    return num_weights * (rank + OVERSAMPLED) * 2 * (lora.pissa_iterations + 1)


def decomposed(lora: LoraConfig, module: str, weight_OD: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    """Return (A [R, D], B [O, R]) of PiSSA or OLoRA, in fp32 on the weight's device."""
    rank, scale = lora.rank_of(module), lora.scale_of(module)
    weight_OD = weight_OD.float()
    if lora.init_lora_weights == "olora":
        q_OK, r_KD = torch.linalg.qr(weight_OD)
        return r_KD[:rank], q_OK[:, :rank]
    num_iterations = lora.pissa_iterations
    if num_iterations is None and weight_OD.device.type == "cpu":
        u_OK, s_K, v_KD = torch.linalg.svd(weight_OD, full_matrices=False)
    elif num_iterations is None:
        u_OK, s_K, v_KD = largest_by_gram(weight_OD, rank)
    else:
        u_OK, s_K, v_KD = _randomized_svd(weight_OD, module, rank=rank, num_iterations=num_iterations, seed=seed)
    root_R = (s_K[:rank] / scale).sqrt()
    return root_R[:, None] * v_KD[:rank], u_OK[:, :rank] * root_R


def largest_by_gram(weight_OD: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U [O, R], S [R] and Vᵀ [R, D] of the largest singular values, from the eigenvectors of the smaller of W Wᵀ
    and Wᵀ W in fp64.

    On a GPU, torch's SVD uses Jacobi's method, which takes many times as long for the matrices of a large model.
    """
    is_wide = weight_OD.shape[0] <= weight_OD.shape[1]
    wide_SL = (weight_OD if is_wide else weight_OD.T).double()
    squares_S, vectors_SS = torch.linalg.eigh(wide_SL @ wide_SL.T)  # ascending
    s_R = squares_S[-rank:].flip(0).clamp(min=0).sqrt()
    short_SR = vectors_SS[:, -rank:].flip(1)
    long_RL = (short_SR.T @ wide_SL) / s_R.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    u_OR, v_RD = (short_SR, long_RL) if is_wide else (long_RL.T, short_SR.T)
    return u_OR.float(), s_R.float(), v_RD.float()


def _randomized_svd(
    weight_OD: Tensor, module: str, *, rank: int, num_iterations: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S and Vᵀ of the largest singular values (Halko et al., SIAM Review 2011, algorithms 4.4 and 5.1)."""
    num_columns = min(rank + OVERSAMPLED, *weight_OD.shape)
    numbers = normal("pissa", seed, module, count=weight_OD.shape[1] * num_columns)
    start_DK = torch.from_numpy(numbers.astype(np.float32)).view(-1, num_columns).to(weight_OD.device)
    q_OK = torch.linalg.qr(weight_OD @ start_DK)[0]
    for _ in range(num_iterations):
        q_DK = torch.linalg.qr(weight_OD.T @ q_OK)[0]
        q_OK = torch.linalg.qr(weight_OD @ q_DK)[0]
    u_KK, s_K, v_KD = torch.linalg.svd(q_OK.T @ weight_OD, full_matrices=False)
    return q_OK @ u_KK, s_K, v_KD
