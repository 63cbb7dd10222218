"""A future discriminator as two thin matrices on a model's own hidden state and unembedding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moralguard.backends.arrays import is_tensor, namespace_for
from moralguard.backends.tensor_files import load_arrays, load_tensors
from moralguard.errors import PolicyError

if TYPE_CHECKING:  # or NumPy arrays, on a model without torch
    import torch

    from moralguard.backends.head import Head


@dataclass(frozen=True, eq=False)
class ProjectedHead:
    """A factored head on one model: logit of candidate w = (query h_t) . keys[w] + offset[w] + state . h_t.

    Attributes:
        query: f32[k, d]. keys: f32[V, k]. offset: f32[V]. state: f32[d] or None.
    """

    query: torch.Tensor
    keys: torch.Tensor
    offset: torch.Tensor
    state: torch.Tensor | None

    def scores(self, hidden: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Logits f32[R, C] of candidates i64[R, C] after last hidden states f32[R, d]; a row's bits don't depend on the others."""
        arrays = namespace_for(self.keys)
        queries = arrays.ops.row_products(self.query, hidden)
        scores: torch.Tensor = arrays.stack([self.keys[ids] @ query for ids, query in zip(candidates, queries, strict=True)])
        scores = scores + self.offset[candidates]
        return scores if self.state is None else scores + arrays.ops.row_sums(hidden * self.state)[:, None]


@dataclass(frozen=True, eq=False)
class FactoredHead:
    """A future discriminator in factored form: logit P(v | y_<=t, w) = (query h_t) . (key e_w) + linear . e_w + state . h_t + bias.

    One small product scores every next token; h_t is the base's last hidden state, e_w the unembedding of candidate w. The arrays are
    torch tensors or NumPy arrays, and fit models of either kind.

    Attributes:
        query: f[k, d].
        key: f[k, d].
        linear: f[d] or None: the part that depends on the candidate alone.
        bias: scalar.
        state: f[d] or None: the part that depends on the prefix alone.
    """

    query: torch.Tensor
    key: torch.Tensor
    linear: torch.Tensor | None = None
    bias: float = 0.0
    state: torch.Tensor | None = None

    @classmethod
    def load(cls, path: str | Path, kind: str = "torch") -> FactoredHead:
        """From a safetensors file (or a folder with head.safetensors) holding query, key and optionally linear, state and bias.

        Args:
            kind: "torch" for tensors, "numpy" for NumPy arrays.

        Raises:
            PolicyError: it isn't there or holds something else. ModelError: it can't be read.
        """
        file = Path(path) / "head.safetensors" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise PolicyError(
                f"fudge discriminator {str(path)!r} isn't there; expected a safetensors file or a folder with head.safetensors"
            )
        tensors: dict[str, Any] = load_arrays(file) if kind == "numpy" else load_tensors(file)
        missing = {"query", "key"} - tensors.keys()
        if missing:
            raise PolicyError(f"{file} lacks {', '.join(sorted(missing))}; a factored head holds query [k, d] and key [k, d]")
        bias = float(tensors["bias"].reshape(-1)[0]) if "bias" in tensors else 0.0
        return cls(tensors["query"], tensors["key"], tensors.get("linear"), bias, tensors.get("state"))

    def project(self, unembedding: Head, device: Any = None) -> ProjectedHead:
        """The head with its keys multiplied out over a model's vocabulary, in float32 and as the model's kind of arrays.

        Args:
            unembedding: the model's head. device: where torch tensors go; the head's own, without one.
        """
        arrays = namespace_for(unembedding.weight)
        keys = unembedding.project(arrays.float_array(self.key).T)
        offset = arrays.full((len(keys),), self.bias, arrays.float32, keys)
        if self.linear is not None:
            offset = offset + unembedding.project(arrays.float_array(self.linear)[:, None])[:, 0]
        parts: list[Any] = [None if part is None else arrays.float_array(part) for part in (self.query, self.state)]
        if is_tensor(keys):
            parts = [None if part is None else part.to(keys.device if device is None else device) for part in parts]
        return ProjectedHead(parts[0], keys, offset, parts[1])

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, or ``head.safetensors`` into a folder, that ``load`` reads."""
        import torch
        from safetensors.torch import save_file

        file = Path(path) if Path(path).suffix == ".safetensors" else Path(path) / "head.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {"query": torch.as_tensor(self.query), "key": torch.as_tensor(self.key), "bias": torch.tensor([self.bias])}
        if self.linear is not None:
            tensors["linear"] = torch.as_tensor(self.linear)
        if self.state is not None:
            tensors["state"] = torch.as_tensor(self.state)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)
