"""Which implementation an op's tensors take, and what is said where the kernels can't be used."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator

import pytest
import torch

from moralguard_kernels import library

OPS = ("rectify_logits", "sample_logits", "score_tokens", "gumbel_noise")


@pytest.fixture(autouse=True)
def _chosen_anew() -> Iterator[None]:
    library._launch.cache_clear()
    yield
    library._launch.cache_clear()


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("device", ["CPU", "CUDA", "MPS", "XPU", "PrivateUse1"])
def test_every_device_has_an_implementation(name: str, device: str) -> None:
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"moralguard::{name}", device)


def test_only_cuda_has_one_of_its_own() -> None:
    kernels = [
        torch._C._dispatch_has_kernel_for_dispatch_key("moralguard::sample_logits", device) for device in ("CPU", "CUDA", "MPS", "XPU")
    ]
    assert kernels == [True, True, False, False]


def test_the_kernels_are_the_default() -> None:
    pytest.importorskip("triton", reason="no Triton on this platform")
    from moralguard_kernels.fused import launch

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library._launch() is launch


def test_without_triton_the_reference_runs_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("moralguard_kernels.fused")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr("moralguard_kernels.fused", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.warns(RuntimeWarning, match="triton isn't installed, so .* in plain PyTorch on this GPU, several times slower"):
        found = library._launch()
    assert found is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library._launch() is None


def test_amd_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.warns(RuntimeWarning, match="the kernels are for NVIDIA's GPUs"):
        found = library._launch()
    assert found is None


def test_the_reference_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORALGUARD_KERNELS", "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library._launch() is None
    z = torch.randn(2, 50)
    keys, positions = torch.tensor([3, 4]), torch.tensor([0, 1])
    found = library._fused("sample_logits")(z, keys, positions)
    assert torch.equal(found[0], torch.ops.moralguard.sample_logits(z, keys, positions)[0])


def test_another_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MORALGUARD_KERNELS", "cuda")
    with pytest.raises(ValueError, match="MORALGUARD_KERNELS is 'cuda'; expected 'triton' or 'reference'"):
        library._launch()
