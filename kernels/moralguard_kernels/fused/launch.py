"""Entry points of the kernels: check, pack, launch. Same arguments and results as ``moralguard_kernels.reference_ops``.

Nothing here waits for the device (but a device's first call) or depends on the values of a tensor, so every call can be captured in a
CUDA graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton

from ..arguments import check_arguments, check_noise_arguments
from .arrivals import MOST_ROWS, arrival_counters
from .bound import bound_kernel
from .dense import gumbel_kernel, log_sums_kernel, rectify_kernel
from .refine import refine_kernel
from .rows import Draw, Result, Work
from .score import score_kernel
from .split_rows import split_rows_kernel
from .split_state import Split
from .terms import Terms

# Two programs of these kernels would fit a multiprocessor at 128 registers, and the compiler spills a few words to get there.
_ROOM = {"maxnreg": 248}
# Contracting a * b + c would change the last bit against the specification.
_OPTIONS = {"enable_fp_fusion": False}
GROUP = 128
STRIP = 256  # groups a program of the second launch looks over at most
BLOCK = 2048  # tokens it reads at a time; half of it with an attenuation, whose sources fill the registers
FEW = 512
CAPACITY = 2048
CHUNK = 1024  # candidates that the scoring launch reads at a time


@dataclass(frozen=True)
class Shape:
    """Launch configuration. It depends on the vocabulary alone, never on the batch: a row's sums are made in one order.

    Attributes:
        tile: tokens a program.
        warps: warps a program.
        capacity: tokens that the second launch can end a row with.
    """

    vocabulary: int
    tile: int
    warps: int
    capacity: int

    @property
    def tiles(self) -> int:
        return triton.cdiv(self.vocabulary, self.tile)

    @property
    def split_tile(self) -> int:
        """Tokens a program of the third launch sweeps at a time; its many stages leave fewer registers for them."""
        return min(self.tile, 2048)

    @property
    def groups(self) -> int:
        return triton.cdiv(self.vocabulary, GROUP)


def shape_of(vocabulary: int) -> Shape:
    tile = 1024 if vocabulary <= 8192 else 2048 if vocabulary <= 65536 else 4096
    return Shape(vocabulary, tile, 8 if tile == 4096 else 4, CAPACITY)


def _checked(given: Mapping[str, Any], times: int = 1) -> tuple[int, int]:
    """Rows and vocabulary of an op's arguments, each row of which takes this many rows of the grid.

    Raises:
        ValueError: ``check_arguments``'; float64 logits, which only the reference takes; more rows than a grid has.
    """
    check_arguments(given)
    logits = given["logits"]
    if logits.dtype == torch.float64:
        raise ValueError("float64 logits; the kernels take float32, float16 and bfloat16. Cast them, or run the op on the CPU")
    rows, vocabulary = logits.shape
    if times * rows > MOST_ROWS:
        also = ", the unguarded token's counted" if times > 1 else ""
        raise ValueError(f"{times * rows} rows in one call{also}; at most {MOST_ROWS}: split the batch")
    return rows, vocabulary


def _matrix(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    return tensor, tensor.stride(0)


def _vector(tensor: torch.Tensor | None, dtype: torch.dtype | None = None) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(dtype or tensor.dtype).contiguous()


def _floats(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """As float32: a parameter in another precision would carry the row's arithmetic there."""
    return _vector(tensor, torch.float32)


def _terms(
    logits: torch.Tensor,
    slots: torch.Tensor | None,
    sources: Sequence[torch.Tensor] | None,
    groups: Sequence[int] | None,
    weights: torch.Tensor | None,
    projection: torch.Tensor | None,
    coefficients: torch.Tensor | None,
    biased: Sequence[torch.Tensor] | None,
    decay_constant: torch.Tensor | None,
    epsilon: torch.Tensor | None,
) -> Terms:
    packed, first = [], 0
    for size in groups or ():
        packed.append(tuple(_matrix(source) for source in (sources or ())[first : first + size]))
        first += size
    return Terms(
        base=_matrix(logits),
        slots=_vector(slots),
        groups=tuple(packed) if packed else None,
        weights=None if weights is None or not packed else _matrix(weights.to(torch.float32)),
        projection=None if projection is None else (projection, projection.stride(0), projection.stride(1)),
        coefficients=None if coefficients is None else _matrix(coefficients),
        biased=tuple(_matrix(source) for source in biased) if biased else None,
        log_sums=None,
        decay_constant=_floats(decay_constant),
        epsilon=_floats(epsilon),
    )


def _with_log_sums(terms: Terms, rows: int, shape: Shape) -> Terms:
    """The terms with the log-sums of base and biased sources, where an attenuation needs them."""
    if terms.biased is None:
        return terms
    logits = terms.base[0]
    width = len(terms.biased) + 1
    partials = torch.empty(rows, shape.tiles, width, 2, dtype=torch.float32, device=logits.device)
    sums = torch.empty(rows, width, dtype=torch.float32, device=logits.device)
    log_sums_kernel[(shape.tiles, rows)](
        terms, partials, sums, arrival_counters(logits.device, rows), shape.vocabulary, shape.tiles,
        TILE=shape.tile, TILES=triton.next_power_of_2(shape.tiles), num_warps=shape.warps, **_OPTIONS,
    )  # fmt: skip
    return terms._replace(log_sums=sums)


def _run_draw(
    terms: Terms, draw: Draw, rows: int, shape: Shape, rank: int, candidates: int, *,
    counterfactual: bool = False, summary: bool = False, threshold: bool = False,
) -> Result:  # fmt: skip
    """The three launches; the third ends at once where no row overflows."""
    device = terms.base[0].device
    virtual = 2 * rows if counterfactual else rows

    def floats(*size: int) -> torch.Tensor:
        return torch.empty(virtual, *size, dtype=torch.float32, device=device)

    def ints(*size: int) -> torch.Tensor:
        return torch.empty(virtual, *size, dtype=torch.int32, device=device)

    tiles, split_tiles = shape.tiles, triton.cdiv(shape.vocabulary, shape.split_tile)
    work = Work(
        group_max=floats(shape.groups),
        group_mass=floats(shape.groups),
        tiles=floats(tiles, 8),
        row=floats(8),
        state=ints(4),
        survivors=ints(shape.capacity),
        arrivals=arrival_counters(device, virtual),
        overflow=torch.empty(1 + virtual, dtype=torch.int32, device=device),
    )
    split = Split(
        counters=ints(4),
        keys=ints(2),
        search=torch.empty(virtual, 4, dtype=torch.int64, device=device),
        sums=floats(8),
        partials=floats(split_tiles, 16),
    )
    result = Result(
        threshold=ints() if threshold else None,
        token=None if threshold else torch.empty(rows, dtype=torch.int64, device=device),
        counterfactual=torch.empty(rows, dtype=torch.int64, device=device) if counterfactual else None,
        log_probability=floats() if summary else None,
        kl=floats() if summary else None,
        flags=ints(),
    )
    bound_kernel[(tiles, virtual)](
        terms, draw, work, result, rows, shape.vocabulary, shape.groups, tiles,
        RANK=rank, TILE=shape.tile, GROUP=GROUP, GROUPS=triton.next_power_of_2(shape.groups), TILES=triton.next_power_of_2(tiles),
        SUMMARY=summary, num_warps=shape.warps, **_OPTIONS,
    )  # fmt: skip
    if not _may_filter(draw):
        return result
    width = _strip_width(_processors(device), shape.groups, virtual)
    strips = triton.cdiv(shape.groups, width)
    refine_kernel[(strips, virtual)](
        terms, draw, work, split, result, rows, shape.vocabulary, shape.groups, width, strips,
        RANK=rank, BLOCK=BLOCK if terms.biased is None else BLOCK // 2, GROUP=GROUP, STRIP=STRIP, FEW=min(FEW, shape.capacity),
        CAPACITY=shape.capacity, SUMMARY=summary, num_warps=8, **_ROOM, **_OPTIONS,
    )  # fmt: skip
    if shape.vocabulary > shape.capacity:
        programs = min(2 * _processors(device), split_tiles * virtual)
        split_rows_kernel[(programs,)](
            terms, draw, work, split, result, rows, shape.vocabulary, split_tiles,
            RANK=rank, TILE=shape.split_tile, TILES=triton.next_power_of_2(split_tiles), CANDIDATES=candidates, SUMMARY=summary,
            num_warps=8, **_ROOM, **_OPTIONS,
        )  # fmt: skip
    return result


def _may_filter(draw: Draw) -> bool:
    """Whether any row can have a filter or candidates; without, the first launch draws."""
    filters = (draw.top_k, draw.top_p, draw.min_p, draw.base_top_k, draw.base_top_p, draw.base_min_p, draw.candidate_ids)
    return any(tensor is not None for tensor in filters)


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 elsewhere."""
    return 1 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


def _strip_width(processors: int, groups: int, virtual: int) -> int:
    """Groups that a program of the second launch looks over.

    It reads them block by block, each time waiting for memory, so a few rows are spread over all multiprocessors; with many rows fewer,
    longer programs have less to begin and to end.
    """
    blocks = triton.cdiv(groups * virtual * GROUP, 2 * processors * BLOCK)
    return min(max(blocks, 1) * (BLOCK // GROUP), STRIP)


def _candidates(
    ids: torch.Tensor | None, bias: torch.Tensor | None, count: torch.Tensor | None, rows: int
) -> tuple[tuple[torch.Tensor, int] | None, tuple[torch.Tensor, int] | None, torch.Tensor | None, int]:
    """Candidates as kernels take them, and their number rounded up to a power of two."""
    if ids is None or bias is None:
        return None, None, None, 0
    if count is None:
        count = torch.full((rows,), ids.shape[1], dtype=torch.int32, device=ids.device)
    return _matrix(ids), _matrix(bias), _vector(count), triton.next_power_of_2(ids.shape[1])


def _base_thresholds(
    terms: Terms, rows: int, shape: Shape, top_k: torch.Tensor | None, top_p: torch.Tensor | None, min_p: torch.Tensor | None
) -> torch.Tensor | None:
    """i32[N] keys of the smallest base logit that the base's filters keep; None without filters."""
    if top_k is None and top_p is None and min_p is None:
        return None
    draw = Draw(*(None,) * 6, _vector(top_k), _floats(top_p), _floats(min_p), None, None, None, shape.vocabulary)
    bare = Terms(terms.base, terms.slots, *(None,) * 8)
    return _run_draw(bare, draw, rows, shape, 1, 0, threshold=True).threshold


def rectify_logits(
    logits: torch.Tensor,
    slots: torch.Tensor | None = None,
    sources: Sequence[torch.Tensor] | None = None,
    groups: Sequence[int] | None = None,
    weights: torch.Tensor | None = None,
    projection: torch.Tensor | None = None,
    coefficients: torch.Tensor | None = None,
    biased: Sequence[torch.Tensor] | None = None,
    decay_constant: torch.Tensor | None = None,
    epsilon: torch.Tensor | None = None,
    candidate_ids: torch.Tensor | None = None,
    candidate_bias: torch.Tensor | None = None,
    candidate_count: torch.Tensor | None = None,
    keep_rest: bool = True,
    base_top_k: torch.Tensor | None = None,
    base_top_p: torch.Tensor | None = None,
    base_min_p: torch.Tensor | None = None,
    *,
    shape: Shape | None = None,
) -> torch.Tensor:
    """One launch; with base filters the launches that find their thresholds before, with an attenuation its log-sums."""
    rows, vocabulary = _checked(locals())
    shape = shape or shape_of(vocabulary)
    terms = _terms(logits, slots, sources, groups, weights, projection, coefficients, biased, decay_constant, epsilon)
    thresholds = _base_thresholds(terms, rows, shape, base_top_k, base_top_p, base_min_p)
    terms = _with_log_sums(terms, rows, shape)
    ids, bias, count, candidates = _candidates(candidate_ids, candidate_bias, candidate_count, rows)
    out = torch.empty(rows, vocabulary, dtype=torch.float32, device=logits.device)
    arrivals = None if ids is None else arrival_counters(logits.device, rows)
    rectify_kernel[(shape.tiles, rows)](
        terms, thresholds, ids, bias, count, out, out.stride(0), arrivals, vocabulary, shape.tiles,
        RANK=_rank(projection), KEEP_REST=keep_rest, CANDIDATES=candidates, TILE=shape.tile, num_warps=shape.warps, **_OPTIONS,
    )  # fmt: skip
    return out


def _rank(projection: torch.Tensor | None) -> int:
    return 1 if projection is None else projection.shape[1]


def sample_logits(
    logits: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
    slots: torch.Tensor | None = None,
    temperature: torch.Tensor | None = None,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    sources: Sequence[torch.Tensor] | None = None,
    groups: Sequence[int] | None = None,
    weights: torch.Tensor | None = None,
    projection: torch.Tensor | None = None,
    coefficients: torch.Tensor | None = None,
    biased: Sequence[torch.Tensor] | None = None,
    decay_constant: torch.Tensor | None = None,
    epsilon: torch.Tensor | None = None,
    candidate_ids: torch.Tensor | None = None,
    candidate_bias: torch.Tensor | None = None,
    candidate_count: torch.Tensor | None = None,
    keep_rest: bool = True,
    base_top_k: torch.Tensor | None = None,
    base_top_p: torch.Tensor | None = None,
    base_min_p: torch.Tensor | None = None,
    counterfactual: bool = False,
    summary: bool = True,
    *,
    shape: Shape | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two launches and a third that ends at once where no row overflows; one where nothing can be filtered."""
    rows, vocabulary = _checked(locals(), 2 if counterfactual else 1)
    shape = shape or shape_of(vocabulary)
    if candidate_ids is not None and (keep_rest or candidate_ids.shape[1] > shape.capacity):
        # A bias on some tokens of the whole law, or more candidates than one program can hold, goes through memory.
        dense = rectify_logits(
            logits, slots, sources, groups, weights, projection, coefficients, biased, decay_constant, epsilon,
            candidate_ids, candidate_bias, candidate_count, keep_rest, base_top_k, base_top_p, base_min_p, shape=shape,
        )  # fmt: skip
        terms = Terms(_matrix(logits), _vector(slots), *(None,) * 8, given=_matrix(dense))
        candidate_ids = base_top_k = base_top_p = base_min_p = None
    else:
        terms = _terms(logits, slots, sources, groups, weights, projection, coefficients, biased, decay_constant, epsilon)
        terms = _with_log_sums(terms, rows, shape)
    ids, bias, count, candidates = _candidates(candidate_ids, candidate_bias, candidate_count, rows)
    draw = Draw(
        _vector(seed), _vector(position), _floats(temperature), _vector(top_k), _floats(top_p), _floats(min_p),
        _vector(base_top_k), _floats(base_top_p), _floats(base_min_p), ids, bias, count, vocabulary,
    )  # fmt: skip
    result = _run_draw(terms, draw, rows, shape, _rank(projection), candidates, counterfactual=counterfactual, summary=summary)
    return _outputs(result, rows, counterfactual, summary)


def _outputs(
    result: Result, rows: int, counterfactual: bool, summary: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    nothing = torch.empty(0, dtype=torch.float32, device=result.token.device)
    return (
        result.token,
        result.log_probability[:rows] if summary else nothing,
        result.kl[:rows] if summary else nothing.clone(),
        result.flags[:rows],
        result.counterfactual if counterfactual else result.token.new_empty(0),
    )


def score_tokens(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    slots: torch.Tensor | None = None,
    sources: Sequence[torch.Tensor] | None = None,
    groups: Sequence[int] | None = None,
    weights: torch.Tensor | None = None,
    projection: torch.Tensor | None = None,
    coefficients: torch.Tensor | None = None,
    biased: Sequence[torch.Tensor] | None = None,
    decay_constant: torch.Tensor | None = None,
    epsilon: torch.Tensor | None = None,
    candidate_ids: torch.Tensor | None = None,
    candidate_bias: torch.Tensor | None = None,
    candidate_count: torch.Tensor | None = None,
    keep_rest: bool = True,
    base_top_k: torch.Tensor | None = None,
    base_top_p: torch.Tensor | None = None,
    base_min_p: torch.Tensor | None = None,
    *,
    shape: Shape | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One launch; with base filters the launches that find their thresholds before, with an attenuation its log-sums."""
    rows, vocabulary = _checked(locals())
    shape = shape or shape_of(vocabulary)
    device = logits.device
    terms = _terms(logits, slots, sources, groups, weights, projection, coefficients, biased, decay_constant, epsilon)
    thresholds = _base_thresholds(terms, rows, shape, base_top_k, base_top_p, base_min_p)
    terms = _with_log_sums(terms, rows, shape)
    ids, bias, count, candidates = _candidates(candidate_ids, candidate_bias, candidate_count, rows)
    log_probability, log_odds, kl = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(3))
    partials = torch.empty(rows, shape.tiles, 5, dtype=torch.float32, device=device)
    score_kernel[(shape.tiles, rows)](
        terms, thresholds, ids, bias, count, _vector(tokens), log_probability, log_odds, kl, partials,
        arrival_counters(device, rows), vocabulary, shape.tiles,
        RANK=_rank(projection), KEEP_REST=keep_rest, CANDIDATES=candidates, CHUNK=min(candidates, CHUNK), TILE=shape.tile,
        TILES=triton.next_power_of_2(shape.tiles), num_warps=shape.warps, **_OPTIONS,
    )  # fmt: skip
    return log_probability, log_odds, kl


def gumbel_noise(seed: torch.Tensor, position: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    check_noise_arguments(seed, position, token_ids)
    token_ids = token_ids.contiguous()
    rows, columns = token_ids.shape
    out = torch.empty(rows, columns, dtype=torch.float32, device=token_ids.device)
    block = min(1024, triton.next_power_of_2(max(columns, 1)))
    gumbel_kernel[(triton.cdiv(columns, block), rows)](
        _vector(seed), _vector(position), token_ids, out, columns, BLOCK=block, num_warps=4, **_OPTIONS
    )
    return out
