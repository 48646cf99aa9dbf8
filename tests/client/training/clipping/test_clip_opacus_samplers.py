"""Our kernels inside stock Opacus give Opacus' numbers, and the right ones where Opacus' are wrong."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from naive_clipping import patient_gradient
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.grad_sample.conv import compute_conv_grad_sample
from torch import Tensor, nn

from client.training.clipping.opacus_samplers import register_with_opacus

AT_IMPORT = GradSampleModule.GRAD_SAMPLERS[nn.Conv3d]  # after the import of our samplers
ROWS = torch.randn(4, 2, 8, 8, 8, generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Registration is global: put Opacus back as it was."""
    samplers, norms = dict(GradSampleModule.GRAD_SAMPLERS), dict(GradSampleModuleFastGradientClipping.NORM_SAMPLERS)
    register_with_opacus()
    yield
    for registry, before in (
        (GradSampleModule.GRAD_SAMPLERS, samplers),
        (GradSampleModuleFastGradientClipping.NORM_SAMPLERS, norms),
    ):
        registry.clear()
        registry.update(before)


def critic(**options: object) -> nn.Sequential:
    torch.manual_seed(0)
    convolution = nn.Conv3d(2, 4, 3, **{"padding": 1, **options})  # type: ignore[arg-type]
    return nn.Sequential(convolution, nn.Tanh(), nn.Conv3d(4, 8, 4, 2, 1), nn.Flatten(), nn.LazyLinear(1))


def expected(network: nn.Module) -> Tensor:
    return torch.stack([patient_gradient(network, row[None], lambda s: s.sum()) for row in ROWS])


@pytest.mark.parametrize(
    "options", [{}, {"padding_mode": "circular"}, {"padding": "same", "dilation": 2}, {"groups": 2}]
)
def test_hooks_see_each_rows_gradient(options: dict[str, object]) -> None:
    network = critic(**options)
    network(ROWS)
    rows = expected(network)
    hooked = GradSampleModule(network, loss_reduction="sum")
    hooked(ROWS).sum().backward()
    found = torch.cat([p.grad_sample.flatten(1) for p in hooked.parameters()], dim=1)
    assert torch.allclose(found.double(), rows, rtol=1e-4, atol=1e-5)


def test_ghost_mode_sees_each_rows_norm() -> None:
    network = critic()
    network(ROWS)
    rows = expected(network)
    ghost = GradSampleModuleFastGradientClipping(
        network, loss_reduction="sum", max_grad_norm=1.0, use_ghost_clipping=True
    )
    ghost(ROWS).sum().backward()
    assert torch.allclose(ghost.get_norm_sample().double(), rows.norm(dim=1), rtol=1e-5)


def test_importing_our_module_registers_nothing() -> None:
    assert AT_IMPORT is compute_conv_grad_sample
