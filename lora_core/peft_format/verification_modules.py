# pyright: basic
"""Compares modules trained in full row by row: a head's score of each token, and each trained embedding.

The logits at a few positions reveal a wrong row of a head, or of a rare token, only if its error exceeds their rounding
errors. A single row is determined up to its own rounding. Shape suffixes: N inputs, D features, V vocabulary,
K trained tokens.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_core.adapter.flat_adapter import FlatAdapter
from lora_core.base_model.model import BaseModel
from lora_core.layers.lm_heads import head_of
from lora_core.peft_format.verification_linears import ROUNDING_FACTOR, inputs

PREFIX = "in_full."
"""Prefix of tensor names in probe.safetensors."""
HEAD, TIED_ROWS, EMBEDDINGS, TOKENS = "head", "tied_rows", "embeddings", "token_ids"


@torch.no_grad()
def evidence(base: BaseModel, adapter: FlatAdapter) -> dict[str, Tensor]:
    """Return the evidence for a causal language model.

    If the job trains the head: z = W x for each token, [N, V]. If it trains embeddings: e·x of each, [K, N], and
    z [N, K] if they are tied to the head. A sequence head needs none, since the logits show each of its rows.
    """
    trained, found = adapter.trained, {}
    if base.task != "causal-lm" or not trained.tensors:
        return {}
    x_ND = _inputs(base.head().weight_VD)
    scores_NV = head_of(replace(base.head(), exact=None), adapter).product(x_ND)  # the same matmul as in PEFT
    if trained.modules:
        found[HEAD] = scores_NV
    if trained.token_ids:
        ids_K = torch.tensor(trained.token_ids, device=x_ND.device)
        table: Any = base.model.get_input_embeddings()
        rows_KD = adapter.tensors[trained.tokens_name].value
        scale = torch.as_tensor(getattr(table, "embed_scale", 1.0)).to(rows_KD)
        found |= {TOKENS: ids_K, EMBEDDINGS: _projected(rows_KD * scale)}
        if trained.is_tied:
            found[TIED_ROWS] = scores_NV[:, ids_K]
    return {f"{PREFIX}{name}": tensor.cpu().contiguous() for name, tensor in found.items()}


@torch.no_grad()
def errors(model: nn.Module, recorded: dict[str, Tensor], *, dtype: torch.dtype) -> dict[str, float]:
    """Return the largest error of a row by part of the model, divided by what rounding explains.

    `model` has PEFT's adapter attached. `recorded` is the evidence without its prefix.
    """
    found: dict[str, float] = {}
    output, table = model.get_output_embeddings(), model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    ids_K = recorded[TOKENS].to(_weight(output).device) if TOKENS in recorded else None
    if HEAD in recorded or TIED_ROWS in recorded:
        x_ND = _inputs(_weight(output)).to(dtype)
        scores_NV = output(x_ND).float()
        lengths_V = torch.linalg.vector_norm(_weight(output).float(), dim=1)
        if HEAD in recorded:
            found["the output head"] = _share(scores_NV.T, recorded[HEAD].float().T, lengths_V, dtype=dtype)
        if TIED_ROWS in recorded and ids_K is not None:
            rows_KD = table(ids_K[None])[0].float()
            lengths_K = torch.linalg.vector_norm(rows_KD, dim=1)
            of_ids_KN = scores_NV[:, ids_K].T
            found["a trained row of the head"] = _share(
                of_ids_KN, recorded[TIED_ROWS].float().T, lengths_K, dtype=dtype
            )
    if EMBEDDINGS in recorded and ids_K is not None:
        rows_KD = table(ids_K[None])[0]
        lengths_K = torch.linalg.vector_norm(rows_KD.float(), dim=1)
        found["a trained embedding"] = _share(_projected(rows_KD), recorded[EMBEDDINGS], lengths_K, dtype=dtype)
    return found


def _weight(output: Any) -> Tensor:
    """Return the weight of the output head, also if PEFT has replaced the head."""
    return output.weight


def _inputs(weight_VD: Tensor) -> Tensor:
    return inputs("in_full", weight_VD.shape[1]).to(weight_VD.device, weight_VD.dtype)


def _projected(rows_KD: Tensor) -> Tensor:
    """Return two signed sums of each row, fp32 [K, N]."""
    return (rows_KD.double() @ inputs("in_full", rows_KD.shape[1]).to(rows_KD.device).double().T).float()


def _share(found_KN: Tensor, recorded_KN: Tensor, lengths_K: Tensor, *, dtype: torch.dtype) -> float:
    """Return the worst row's difference divided by three of its rounding errors.

    A rounding error is one unit in the last place of the row's norm, which is the typical size of a signed sum of its
    elements, plus one of the sum itself.
    """
    recorded_KN = recorded_KN.to(found_KN.device)
    if found_KN.shape != recorded_KN.shape:
        return math.inf
    size_K = lengths_K + found_KN.abs().amax(1)
    tolerance_K = ROUNDING_FACTOR * torch.finfo(dtype).eps * size_K + torch.finfo(torch.float32).tiny
    share = float(((found_KN - recorded_KN).abs().amax(1) / tolerance_K).max())
    return math.inf if math.isnan(share) else share
