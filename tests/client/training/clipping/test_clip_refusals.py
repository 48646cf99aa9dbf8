"""Critics in which a patient's share cannot be told apart are refused by the layer's name, and left as they were."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization

from client.training.clipping.engine import PatientClipper
from client.training.clipping.part import Part
from common.adversary.losses import real_loss
from common.errors import SettingsError
from common.settings.study import Loss

VIEWS = torch.randn(3, 1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
PART = Part(views=VIEWS, loss=partial(real_loss, Loss.HINGE), clip_norm=1.0)


def critic_with(layer: nn.Module, channels: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(2, channels, 1), nn.Sequential(layer), nn.Flatten(), nn.Linear(channels * 64, 1))


class Scaled(nn.Module):
    """A parameter of its own, used by a plain multiplication."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Twice(nn.Module):
    """One layer, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(torch.tanh(self.layer(x)))
        return y


class BesidesItsLayer(nn.Module):
    """A layer whose weight is also used outside of it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) * self.layer.weight.abs().mean()
        return y


class MinibatchDeviation(nn.Module):
    """Statistics over rows, without a parameter or buffer that would give it away."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.std(dim=0, keepdim=True)


class Counter(nn.Module):
    """State that scoring changes."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.detach().mean()
        return x


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def doubled() -> nn.Module:
    layer = nn.Conv3d(4, 4, 1)
    register_parametrization(layer, "weight", Doubled())
    return layer


BUILD: list[tuple[str, Callable[[], nn.Module], str]] = [
    ("batch norm", lambda: nn.BatchNorm3d(4), "GroupNorm"),
    ("batch norm without parameters", lambda: nn.BatchNorm3d(4, affine=False), "GroupNorm"),
    ("batch norm in evaluation", lambda: nn.BatchNorm3d(4).eval(), "GroupNorm"),
    ("synchronised batch norm", lambda: nn.SyncBatchNorm(4), "GroupNorm"),
    ("instance norm with memory", lambda: nn.InstanceNorm3d(4, track_running_stats=True), "track_running_stats=False"),
    ("spectral norm", lambda: parametrizations.spectral_norm(nn.Conv3d(4, 4, 1)), "lipschitz: projection"),
    ("old spectral norm", lambda: nn.utils.spectral_norm(nn.Conv3d(4, 4, 1)), "lipschitz: projection"),
    ("another parametrisation", doubled, "weight_norm of torch.nn.utils.parametrizations"),
    ("dropout", lambda: nn.Dropout3d(0.1), "leave it out"),
    ("random leak", nn.RReLU, "leave it out"),
    ("recurrence", lambda: nn.GRU(4, 4), "convolutions"),
    ("attention", lambda: nn.MultiheadAttention(4, 1), "convolutions"),
    ("embedding", lambda: nn.Embedding(4, 4), "Linear"),
    ("bilinear", lambda: nn.Bilinear(4, 4, 4), "convolution"),
    ("own parameter", Scaled, "scale"),
]


@pytest.mark.parametrize(("layer", "replacement"), [b[1:] for b in BUILD], ids=[b[0] for b in BUILD])
def test_a_layer_is_refused_when_the_clipper_is_built(layer: Callable[[], nn.Module], replacement: str) -> None:
    critic = critic_with(layer())
    with pytest.raises(SettingsError, match="nothing was trained") as refused:
        PatientClipper(critic)
    assert "\n1.0" in str(refused.value), "the layer's dotted name"
    assert replacement in str(refused.value)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_old_weight_norm_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"parametrizations\.weight_norm"):
        PatientClipper(critic_with(nn.utils.weight_norm(nn.Conv3d(4, 4, 1))))


def test_a_frozen_parameter_is_refused() -> None:
    critic = critic_with(nn.Conv3d(4, 4, 1))
    critic[1][0].bias.requires_grad_(False)
    with pytest.raises(SettingsError, match=r"1\.0\.bias: is frozen"):
        PatientClipper(critic)


def test_a_shared_parameter_is_refused() -> None:
    first, second = nn.Conv3d(4, 4, 1), nn.Conv3d(4, 4, 1)
    second.weight = first.weight
    with pytest.raises(SettingsError, match=r"1\.0\.0\.weight and 1\.0\.1\.weight: are one shared parameter"):
        PatientClipper(critic_with(nn.Sequential(first, second)))


def test_short_parameters_are_refused() -> None:
    with pytest.raises(SettingsError, match="autocast"):
        PatientClipper(critic_with(nn.Conv3d(4, 4, 1)).bfloat16())


def test_every_problem_is_told_at_once() -> None:
    with pytest.raises(SettingsError) as refused:
        PatientClipper(critic_with(nn.Sequential(nn.BatchNorm3d(4), nn.Dropout(), Scaled())))
    assert [f"1.0.{n} " in str(refused.value) for n in range(3)] == [True] * 3


RUN: list[tuple[str, Callable[[], nn.Module], str]] = [
    ("one layer twice", Twice, r"1\.0\.layer\.weight: used twice"),
    ("weight outside its layer", lambda: BesidesItsLayer(nn.Conv3d(4, 4, 1)), r"1\.0\.layer\.weight: used where"),
    (
        "normed weight outside its layer",
        lambda: BesidesItsLayer(parametrizations.weight_norm(nn.Conv3d(4, 4, 1))),
        "nothing was trained",
    ),
    ("statistics over rows", MinibatchDeviation, "depends on other rows"),
    ("state", Counter, r"1\.0\.seen: scoring changes this state"),
]


@pytest.mark.parametrize(("layer", "text"), [r[1:] for r in RUN], ids=[r[0] for r in RUN])
def test_what_only_shows_in_use_is_refused_in_the_first_pass(layer: Callable[[], nn.Module], text: str) -> None:
    clipper = PatientClipper(critic_with(layer()))
    with pytest.raises(SettingsError, match=text):
        clipper.clipped_sum([PART])


def test_more_than_one_score_a_row_is_refused() -> None:
    with pytest.raises(SettingsError, match="one score a row"):
        PatientClipper(nn.Conv3d(2, 1, 1)).clipped_sum([PART])


def test_the_critic_comes_out_without_a_trace() -> None:
    critic = critic_with(parametrizations.weight_norm(nn.Conv3d(4, 4, 3, padding=1)))
    before = {name: p.detach().clone() for name, p in critic.named_parameters()}
    modules = list(critic.modules())
    clipper = PatientClipper(critic)
    clipper.clipped_sum([PART])
    assert list(critic.modules()) == modules
    assert all(torch.equal(p, before[name]) for name, p in critic.named_parameters())
    assert all(p.grad is None and p.requires_grad for p in critic.parameters())
    hooks = [m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in critic.modules()]
    assert not any(hooks)
    scores = critic(VIEWS.flatten(0, 1)).sum()
    plain = torch.autograd.grad(scores, list(critic.parameters()))
    assert all(g is not None for g in plain), "outside of the clipper autograd sees every parameter"
    assert "forward" not in vars(critic)


def test_an_error_inside_the_critic_leaves_no_recorder_behind() -> None:
    critic = critic_with(nn.Conv3d(4, 4, 1))
    with pytest.raises(RuntimeError):
        PatientClipper(critic).clipped_sum([Part(views=VIEWS[:, :, :1], loss=PART.loss, clip_norm=1.0)])
    torch.autograd.grad(critic(VIEWS.flatten(0, 1)).sum(), list(critic.parameters()))


def test_parameters_loaded_later_are_the_ones_used() -> None:
    critic, other = critic_with(nn.Conv3d(4, 4, 1)), critic_with(nn.Conv3d(4, 4, 1))
    clipper = PatientClipper(critic)
    clipper.clipped_sum([PART])
    critic.load_state_dict(other.state_dict())
    assert torch.equal(clipper.clipped_sum([PART]), PatientClipper(other).clipped_sum([PART]))
