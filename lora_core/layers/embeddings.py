# pyright: basic
"""The input embedding of a pack in which jobs train embeddings of tokens or add NEFTune noise.

Shape suffixes: T tokens of the pack, K trained tokens of a job, P their occurrences, D features.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_core.adapter.modules_to_save import TensorViews
from lora_core.packing.packed_batch import PackedBatch, current_pack, with_noise
from lora_core.runtime.transfers import upload


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenPiece:
    """Occurrences of one job's trained tokens in the pack: positions, and rows of the trained embeddings [K, D].

    As in torch.nn.Embedding, the padding token gets no gradient: `is_trained_P` is False there.
    """

    places_P: Tensor
    rows_P: Tensor
    is_trained_P: Tensor
    views: TensorViews


def forward_embedding(embedding: nn.Embedding, name: str, leaf: Tensor, input_ids: Tensor, *args: Any) -> Tensor:
    """Map ids [1, T] to [1, T, D], with the trained embeddings and the noise of each job in its segment."""
    y_1TD = type(embedding).forward(embedding, input_ids, *args)
    pack = current_pack()
    if pack is None:
        return y_1TD
    pieces = token_pieces(pack, name, padding=embedding.padding_idx)
    if pieces:
        y_1TD = TrainedRows.apply(y_1TD[0], leaf, _scale_of(embedding, y_1TD), pieces)[None]
    noisy = [(slice(part.start, part.stop), part.noise) for part in pack.segments if part.noise is not None]
    return with_noise(y_1TD, noisy)


def _scale_of(embedding: nn.Embedding, like: Tensor) -> Tensor:
    """Return the number by which some families scale inside the embedding, [], with the dtype and device of `like`."""
    scale: Any = getattr(embedding, "embed_scale", 1.0)
    if not isinstance(scale, Tensor):
        scale = like.new_full((), scale, dtype=torch.float32)  # a copy of a number from the host would wait
    return scale.to(like)


def forward_embedding_watched(
    embedding: nn.Embedding, name: str, leaf: Tensor, input_ids: Tensor, *args: Any
) -> Tensor:
    """Like `forward_embedding`, but require a gradient, so that every rank's backward passes through all blocks.

    Sharded blocks need it: their backward contains collectives, whichever blocks a rank's slices adapt.
    """
    y_1TD = forward_embedding(embedding, name, leaf, input_ids, *args)
    is_watched = torch.is_grad_enabled() and not y_1TD.requires_grad
    return y_1TD.requires_grad_() if is_watched else y_1TD


def token_pieces(pack: PackedBatch, name: str, *, padding: int | None) -> tuple[TokenPiece, ...]:
    """Return the trained tokens of each segment that trains rows of the table `name`. They are found on the host."""
    pieces: list[TokenPiece] = []
    for segment in pack.segments:
        trained = segment.adapter.trained
        if not trained.token_ids or trained.embedding != name:
            continue
        known_K = np.array(trained.token_ids)
        places_P, rows_P = np.nonzero(pack.host_ids_T[segment.start : segment.stop, None] == known_K)
        is_trained_P = known_K[rows_P] != (-1 if padding is None else padding)
        arrays = places_P + segment.start, rows_P.copy(), is_trained_P
        places, rows, is_trained = upload(arrays, pack.input_ids.device)
        views = segment.adapter.tensors[trained.tokens_name]
        pieces.append(TokenPiece(places_P=places, rows_P=rows, is_trained_P=is_trained, views=views))
    return tuple(pieces)


class TrainedRows(torch.autograd.Function):
    """Replaces the embeddings of trained tokens. Gradients are written directly to the adapter."""

    @staticmethod
    def forward(ctx, y_TD: Tensor, leaf: Tensor, scale: Tensor, pieces: tuple[TokenPiece, ...]):
        ctx.scale, ctx.pieces = scale, pieces
        out_TD = y_TD.clone()
        for piece in pieces:
            out_TD[piece.places_P] = piece.views.value[piece.rows_P] * scale
        return out_TD

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        dy_TD = grad_outputs[0]
        for piece in ctx.pieces:
            dy_PD = dy_TD[piece.places_P] * ctx.scale * piece.is_trained_P[:, None]
            piece.views.grad.index_add_(0, piece.rows_P, dy_PD.float())
        return None, None, None, None
