# pyright: basic
"""One job's adapter in flat form: every A and B is a view of contiguous fp32 vectors.

Shape suffixes: N parameters of the adapter, R rank, D input features, O output features. The layout is all A, then
all B, then DoRA's magnitudes, then the tensors trained in full. Parameters with the same learning rate are therefore
contiguous. Clip, optimizer, finite check, checkpoint and eviction are each one operation on one vector. Adapters of
different jobs share no memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from lora_core.adapter.adafactor import lay_out_blocks
from lora_core.adapter.initialization import decomposed, initial_a, start_work
from lora_core.adapter.modules_to_save import TensorViews, TrainedTensors
from lora_core.config import LoraConfig, OptimizerKind


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptedModule:
    """A linear layer that an adapter changes. `name` is its module path in the base model."""

    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MagnitudeViews:
    """DoRA state of one linear, all fp32 [O].

    m and its gradient are views of the adapter. The norm ‖W + scale·B A‖ and the factor m / norm are recomputed
    after every step.
    """

    m_O: Tensor
    grad_O: Tensor
    norm_O: Tensor
    factor_O: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteViews:
    """Views of one adapted linear into the adapter: weights in the compute dtype, gradients in fp32.

    If the start is subtracted, the weights have rank 2R: A stacked on the frozen A₀, and B next to -B₀, so that their
    product is B A - B₀ A₀. The gradients still belong to A and B alone, with rank R.
    """

    a_RD: Tensor
    b_OR: Tensor
    grad_a_RD: Tensor
    grad_b_OR: Tensor
    scale: float
    magnitude: MagnitudeViews | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteSpans:
    """Positions of one adapted linear's parameters in each flat vector."""

    rank: int
    a: slice
    b: slice
    magnitude: slice


@dataclass(frozen=True, kw_only=True, slots=True)
class JointViews:
    """The stacked A of several linears [S, D] and its gradient. S is the sum of their ranks.

    `parts` contains for each adapted linear its index in the request, its rows of A, and its views.
    """

    a_SD: Tensor
    grad_a_SD: Tensor
    scale: float
    parts: tuple[tuple[int, slice, SiteViews], ...]


class FlatAdapter:
    """The flat vectors of one job: weights p, gradient g, optimizer state m and v. Each is fp32 [N].

    With Adafactor, m is empty and v has the layout of `blocks`. `compute` holds p in the base model's dtype, which
    forward and backward read. In fp32 it is p itself. If the start is subtracted, they read `paired` for the adapted
    linears instead: for each, A stacked on A₀, and B next to -B₀. The first `num_a` elements belong to all A.
    """

    def __init__(
        self,
        targets: tuple[AdaptedModule, ...],
        lora: LoraConfig,
        *,
        dtype: torch.dtype,
        device: str,
        frozen: Mapping[str, Tensor] | None = None,
        trained: TrainedTensors | None = None,
        optimizer: OptimizerKind = "adamw",
        is_trained: bool = True,
    ) -> None:
        """Allocate the vectors, zeroed. `starting` or a checkpoint fills them.

        `frozen` maps each target to the base model's weight [O, D], which only DoRA, PiSSA and OLoRA read. Without
        `is_trained` only p is allocated (g, m and v alias it), for passes without a backward.
        """
        self.targets = targets
        self.lora = lora
        self.frozen = frozen or {}
        self.spans = lay_out(targets, lora)
        self.num_a = sum(_length(spans.a) for spans in self.spans.values())
        self.num_ab = self.num_a + sum(_length(spans.b) for spans in self.spans.values())
        self.trained = trained or TrainedTensors()
        self.num_lora = self.num_ab + sum(_length(spans.magnitude) for spans in self.spans.values())
        num_numbers = self.num_lora + self.trained.num_numbers
        self.blocks = lay_out_blocks(self._shapes())
        moments = (num_numbers, num_numbers)
        if optimizer == "adafactor":
            moments = (0, self.blocks[-1].memory.stop)
        sizes = [num_numbers, num_numbers, *moments] if is_trained else [num_numbers]
        self.arena = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        self.p, self.g, self.m, self.v = self.arena.split(sizes) if is_trained else (self.arena,) * 4
        self.dtype = dtype
        self.compute = self.p if dtype == torch.float32 else torch.zeros_like(self.p, dtype=dtype)
        self.paired = torch.zeros(2 * self.num_ab if lora.subtracts_start else 0, dtype=dtype, device=device)
        self.sites = {name: self._site(name, spans) for name, spans in self.spans.items()}
        self.tensors = self._tensors()
        self.joints: dict[str, JointViews | None] = {}

    def joint(self, modules: tuple[str, ...]) -> "JointViews | None":
        """Return the A of linears that read the same input as one matrix, or None if they can't be combined.

        The result is cached under the first module, so `modules` must always be the same for one first module.
        """
        if modules[0] not in self.joints:
            self.joints[modules[0]] = _joint([(i, self.sites[m]) for i, m in enumerate(modules) if m in self.sites])
        return self.joints[modules[0]]

    def _shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of all tensors in p, in order."""
        ranks = [self.spans[target.name].rank for target in self.targets]
        pairs = list(zip(self.targets, ranks, strict=True))
        shapes: list[tuple[int, ...]] = [(rank, target.in_features) for target, rank in pairs]
        shapes += [(target.out_features, rank) for target, rank in pairs]
        shapes += [(target.out_features,) for target in self.targets if self.lora.use_dora]
        return shapes + [tensor.shape for tensor in self.trained.tensors]

    def _site(self, name: str, spans: SiteSpans) -> SiteViews:
        is_paired = self.lora.subtracts_start
        weights, times = (self.paired, 2) if is_paired else (self.compute, 1)
        return SiteViews(
            a_RD=weights[_widened(spans.a, times)].view(times * spans.rank, -1),
            b_OR=weights[_widened(spans.b, times)].view(-1, times * spans.rank),
            grad_a_RD=self.g[spans.a].view(spans.rank, -1),
            grad_b_OR=self.g[spans.b].view(-1, spans.rank),
            scale=self.lora.scale_of(name),
            magnitude=self._magnitude(spans.magnitude) if self.lora.use_dora else None,
        )

    def _tensors(self) -> dict[str, TensorViews]:
        """Return views of the tensors trained in full, by PEFT's name."""
        sizes = [torch.Size(tensor.shape).numel() for tensor in self.trained.tensors]
        starts = accumulate(sizes, initial=self.num_lora)
        return {
            tensor.name: TensorViews(
                value=self.compute[start : start + size].view(tensor.shape),
                grad=self.g[start : start + size].view(tensor.shape),
            )
            for tensor, start, size in zip(self.trained.tensors, starts, sizes, strict=False)
        }

    def _magnitude(self, span: slice) -> MagnitudeViews:
        m_O = self.p[span]
        return MagnitudeViews(m_O=m_O, grad_O=self.g[span], norm_O=torch.ones_like(m_O), factor_O=torch.ones_like(m_O))

    @property
    def num_parameters(self) -> int:
        return self.p.numel()

    @property
    def num_bytes(self) -> int:
        compute_bytes = 0 if self.compute is self.p else self.compute.nbytes
        magnitudes = [views.magnitude for views in self.sites.values() if views.magnitude is not None]
        norm_bytes = sum(magnitude.norm_O.nbytes + magnitude.factor_O.nbytes for magnitude in magnitudes)
        return self.arena.nbytes + compute_bytes + self.paired.nbytes + norm_bytes

    def parts(self, lora_plus_ratio: float) -> tuple[tuple[slice, float], ...]:
        """Return (span, factor on the job's learning rate) of each part. Tensors trained in full have the factor 1."""
        if lora_plus_ratio == 1:
            return ((slice(0, self.num_parameters), 1.0),)
        rated = (slice(0, self.num_a), 1.0), (slice(self.num_a, self.num_lora), lora_plus_ratio)
        in_full = slice(self.num_lora, self.num_parameters)
        return (*rated, (in_full, 1.0)) if self.trained.tensors else rated

    def initialize(self, seed: int) -> None:
        """Run `starting` to its end."""
        for _ in self.starting(seed):
            pass

    def starting(self, seed: int) -> Iterator[int]:
        """Initialize the adapter from `seed`, one linear at a time.

        Yields after each linear the approximate number of multiplications that it took: decomposing all weights of a
        large base model takes minutes. The adapter is usable after the last one. A and B follow initialization.py,
        keyed by (seed, name). DoRA's magnitudes start as the norms of the weights. Tensors trained in full start with
        their own `start`.
        """
        self.arena.zero_()
        for target in self.targets:
            name, spans = target.name, self.spans[target.name]
            if self.lora.subtracts_start:
                a_RD, b_OR = decomposed(self.lora, name, self.frozen[name], seed=seed)
                self.p[spans.b] = b_OR.flatten()
            else:
                a_RD = initial_a(self.lora, name, target.in_features, seed=seed, device=self.p.device)
            self.p[spans.a] = a_RD.flatten()
            yield start_work(self.lora, name, (target.out_features, target.in_features), self.p.device)
        self.begin_in_full(seed)
        self.derive_start()
        for views in self.sites.values():
            if views.magnitude is not None:
                views.magnitude.m_O.copy_(views.magnitude.norm_O)

    def derive_start(self) -> None:
        """Compute what follows from the initial p."""
        if self.lora.subtracts_start:
            self.keep_start(self.p[: self.num_ab].to(self.dtype))
        self.refresh_compute()
        for views in self.sites.values():
            if views.magnitude is not None:
                views.magnitude.factor_O.fill_(1)

    def begin_in_full(self, seed: int) -> None:
        """Initialize the tensors trained in full."""
        if self.trained.tensors:
            starts = [tensor.start(seed).flatten().to(self.p) for tensor in self.trained.tensors]
            self.p[self.num_lora :] = torch.cat(starts)

    def refresh_compute(self) -> None:
        """Round p to the compute dtype and recompute DoRA's norms. Call it after every change of p."""
        if self.compute is not self.p:
            self.compute.copy_(self.p)
        self.refresh_derived()

    def refresh_derived(self) -> None:
        """Recompute what follows from `compute`: the pairs with a subtracted start, and DoRA's norms."""
        if self.lora.subtracts_start:
            for name, spans in self.spans.items():
                self._a_halves(name)[0].copy_(self.compute[spans.a].view(spans.rank, -1))
                self._b_halves(name)[0].copy_(self.compute[spans.b].view(-1, spans.rank))
        for name, views in self.sites.items():
            if views.magnitude is not None:
                views.magnitude.norm_O.copy_(weight_norms(self.frozen[name], views))
                torch.div(views.magnitude.m_O, views.magnitude.norm_O, out=views.magnitude.factor_O)

    def bit_sums(self) -> tuple[int, ...]:
        """Return the sum of the bits of p, m, v, and of the copies of p that passes read.

        Equal adapters have equal sums. The cost is small compared to a step.
        """
        read = () if self.compute is self.p else (self.compute,)
        return tuple(map(_bit_sum, (self.p, self.m, self.v, *read, self.paired)))

    def masters(self) -> dict[str, Tensor]:
        """Return the fp32 weights, views of p, by PEFT's names without prefix. Only valid if no start is subtracted."""
        assert not self.lora.subtracts_start
        views: dict[str, Tensor] = {}
        for name, spans in self.spans.items():
            views[f"{name}.lora_A.weight"] = self.p[spans.a].view(spans.rank, -1)
            views[f"{name}.lora_B.weight"] = self.p[spans.b].view(-1, spans.rank)
            if self.lora.use_dora:
                views[f"{name}.lora_magnitude_vector"] = self.p[spans.magnitude]
        start = self.num_lora
        for tensor in self.trained.tensors:
            size = torch.Size(tensor.shape).numel()
            views[tensor.name] = self.p[start : start + size].view(tensor.shape)
            start += size
        return views

    def start(self) -> Tensor:
        """Return all A₀, then all B₀, in the compute dtype, as `keep_start` takes them."""
        a = [self._a_halves(name)[1].flatten() for name in self.spans]
        b = [-self._b_halves(name)[1].flatten() for name in self.spans]
        return torch.cat([*a, *b])

    def keep_start(self, start: Tensor) -> None:
        """Set the start to subtract: all A₀, then all B₀, in the layout of p."""
        for name, spans in self.spans.items():
            self._a_halves(name)[1].copy_(start[spans.a].view(spans.rank, -1))
            self._b_halves(name)[1].copy_(-start[spans.b].view(-1, spans.rank))

    def _a_halves(self, name: str) -> tuple[Tensor, ...]:
        return self.sites[name].a_RD.chunk(2, dim=0)

    def _b_halves(self, name: str) -> tuple[Tensor, ...]:
        return self.sites[name].b_OR.chunk(2, dim=1)


def _bit_sum(vector: Tensor) -> int:
    """Sum the bits, eight bytes at a time modulo 2^64, which is the fastest addition on a CPU."""
    own = vector.view(torch.int32 if vector.itemsize == 4 else torch.int16)
    at_once = 8 // vector.itemsize
    first = -int(vector.storage_offset()) % at_once
    last = first + (vector.numel() - first) // at_once * at_once
    if last <= first:
        return int(own.sum())
    return int(vector[first:last].view(torch.int64).sum() + own[:first].sum() + own[last:].sum())


def _joint(sites: Sequence[tuple[int, SiteViews]]) -> JointViews | None:
    """Return None without sites, with DoRA or a subtracted start, and if the A are not contiguous or scales differ."""
    views = [site for _, site in sites]
    if not views or any(site.magnitude is not None or len(site.a_RD) != len(site.grad_a_RD) for site in views):
        return None
    follow = all(
        _follows(one.a_RD, other.a_RD) and _follows(one.grad_a_RD, other.grad_a_RD) and one.scale == other.scale
        for one, other in pairwise(views)
    )
    if not follow:
        return None
    stops = list(accumulate(len(site.a_RD) for site in views))
    shape = stops[-1], views[0].a_RD.shape[1]
    return JointViews(
        a_SD=views[0].a_RD.as_strided(shape, (shape[1], 1)),
        grad_a_SD=views[0].grad_a_RD.as_strided(shape, (shape[1], 1)),
        scale=views[0].scale,
        parts=tuple(
            (index, slice(stop - len(site.a_RD), stop), site) for (index, site), stop in zip(sites, stops, strict=True)
        ),
    )


def _follows(one: Tensor, other: Tensor) -> bool:
    """Return whether `other` directly follows `one` in memory and has rows of the same length."""
    return one.shape[1] == other.shape[1] and other.data_ptr() == one.data_ptr() + one.nbytes


def weight_norms(weight_OD: Tensor, views: SiteViews) -> Tensor:
    """Return ‖W + scale·B A‖ of each output, fp32 [O]."""
    a_RD, b_OR = views.a_RD.float(), views.b_OR.float()
    scale = min(views.scale, torch.finfo(torch.float32).max)  # torch rejects a larger alpha; the passes overflow then
    return torch.linalg.vector_norm(torch.addmm(weight_OD.float(), b_OR, a_RD, alpha=scale), dim=1)


def lay_out(targets: Sequence[AdaptedModule], lora: LoraConfig) -> dict[str, SiteSpans]:
    """Return the spans of each target by name: all A in the order of targets, then all B, then all magnitudes."""
    ranks = [lora.rank_of(target.name) for target in targets]
    sizes = [rank * target.in_features for rank, target in zip(ranks, targets, strict=True)]
    sizes += [rank * target.out_features for rank, target in zip(ranks, targets, strict=True)]
    sizes += [target.out_features if lora.use_dora else 0 for target in targets]
    spans = [slice(start, stop) for start, stop in pairwise(accumulate(sizes, initial=0))]
    count = len(targets)
    return {
        target.name: SiteSpans(rank=rank, a=a, b=b, magnitude=magnitude)
        for target, rank, a, b, magnitude in zip(
            targets, ranks, spans[:count], spans[count : 2 * count], spans[2 * count :], strict=True
        )
    }


def _widened(span: slice, times: int) -> slice:
    return slice(times * span.start, times * span.stop)


def _length(span: slice) -> int:
    return span.stop - span.start
