"""Steps of one critic: plain, ours, Opacus' modes, vmap and one row at a time. All clip to the same bound.

Every method starts from its own copy of the same critic and ends in the same Adam. `clipped` gives the sum of clipped
gradients without noise, (P,) in the order of the parameters, None where there is none.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from opacus.grad_sample.utils import wrap_model
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from client.randomness import SecureStream
from client.training.clipping.engine import PatientClipper
from client.training.clipping.part import Part
from client.training.noise import noisy
from common.adversary.critic import Critic

SIGMA = 1.0
PLAIN = "plain Adam"
OPACUS = ("hooks", "functorch", "ew", "ghost")
VMAP_ROWS = 16  # rows whose gradients vmap makes together


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A critic and its batch. width 0: the 1-3 M critic of the notes, else the study's own. views: of each patient."""

    size: int
    patients: int
    kernel: int = 4
    width: int = 0
    views: int = 1

    @property
    def case(self) -> str:
        """Data, size and setting in words."""
        critic = f"study critic width {self.width}" if self.width else f"2-32-64-128-256 critic k={self.kernel}"
        views = f" x {self.views} patches" if self.views > 1 else ""
        return f"{self.size}^3, {self.patients} patients{views} + as many fakes, {critic}"

    def critic(self) -> nn.Module:
        """From seed 0."""
        torch.manual_seed(0)
        return Critic(shape=(self.size,) * 3, labels=1, width=self.width) if self.width else _large_critic(self)

    def batch(self) -> tuple[Tensor, Tensor]:
        """(B, V, 2, D, H, W) standard normal, real and generated: time does not depend on the values."""
        source = torch.Generator().manual_seed(1)
        shape = (self.patients, self.views, 2, self.size, self.size, self.size)
        return torch.randn(shape, generator=source), torch.randn(shape, generator=source)


@dataclass(frozen=True, kw_only=True)
class Method:
    """step: one whole step. clipped: the sum alone."""

    step: Callable[[], None]
    clipped: Callable[[], Tensor] | None = None


def names(setting: Setting, *, peers: bool) -> list[str]:
    """Every method of a setting; plain ones first."""
    plain = [f"{PLAIN}, {layout}{chunk}" for layout in ("contiguous", "channels last") for chunk in ("", ", 4 chunks")]
    ours = ["consilium", "consilium, fakes clipped too"]
    if setting.views > 1 or not peers:  # Opacus has no patients
        return [*plain, *ours]
    return [*plain, *ours, *(f"opacus {mode}" for mode in OPACUS), "vmap(grad)", "one row at a time"]


def build(name: str, setting: Setting, clip_norm: float, device: torch.device) -> Method:
    """The method on its own copy of the critic."""
    critic = setting.critic().to(device)
    real, fake = (t.to(device) for t in setting.batch())
    if name.startswith(PLAIN):
        return Method(step=_plain(critic, real, fake, last="channels" in name, chunks=4 if "chunks" in name else 1))
    if name.startswith("consilium"):
        return _ours(critic, real, fake, clip_norm, fakes_clipped="fakes" in name)
    if name.startswith("opacus"):
        return _opacus(critic, real, fake, clip_norm, name.removeprefix("opacus "))
    clipped = _vmapped if name.startswith("vmap") else _one_by_one
    return _method(critic, partial(clipped, critic, real, fake, clip_norm), clip_norm, noise=torch.randn_like)


def patient_loss(sign: float, scores: Tensor) -> Tensor:
    """Wasserstein: minus the score of real rows, plus that of generated ones."""
    return sign * scores.mean()


def reference(setting: Setting, clip_norm: float | None, device: torch.device, *, fakes: bool) -> tuple[Tensor, float]:
    """((P,) float64, median norm): one backward pass a patient, norms in float64. Without a bound: no clipping."""
    critic = setting.critic().to(device)
    total, norms = torch.zeros(sum(p.numel() for p in critic.parameters()), dtype=torch.float64, device=device), []
    for views, sign in zip(setting.batch(), (-1.0, 1.0), strict=True):
        for patient in views.to(device):
            gradient = _flat(torch.autograd.grad(patient_loss(sign, critic(patient).reshape(-1)), critic.parameters()))
            norms.append(float(gradient.double().norm()))
            bounded = clip_norm is not None and (sign < 0 or fakes)
            total += gradient.double() * (min(1.0, clip_norm / norms[-1]) if bounded and clip_norm else 1.0)
    return total, sorted(norms)[len(norms) // 2]


def _large_critic(setting: Setting) -> nn.Module:
    layers: list[nn.Module] = []
    channels = [2, 32, 64, 128, 256]
    for stage, (a, b) in enumerate(itertools.pairwise(channels)):
        layers.append(nn.Conv3d(a, b, setting.kernel, 2, 1))
        layers += [nn.GroupNorm(8, b)] if stage else []
        layers.append(nn.LeakyReLU(0.2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * (setting.size // 16) ** 3, 1))


def _adam(critic: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(critic.parameters(), lr=1e-4, betas=(0.0, 0.9))


def _plain(critic: nn.Module, real: Tensor, fake: Tensor, *, last: bool, chunks: int) -> Callable[[], None]:
    layout = torch.channels_last_3d if last else torch.contiguous_format
    critic = critic.to(memory_format=layout)
    optimiser = _adam(critic)
    rows = [t.flatten(0, 1) for t in (real, fake)]

    def step() -> None:
        optimiser.zero_grad()
        for own_real, own_fake in zip(*(r.chunk(chunks) for r in rows), strict=True):
            both = torch.cat([own_real, own_fake]).contiguous(memory_format=layout)
            scores = critic(both).reshape(-1)
            loss = scores[len(own_real) :].sum() - scores[: len(own_real)].sum()
            (loss / len(rows[0])).backward()
        optimiser.step()

    return step


def _ours(critic: nn.Module, real: Tensor, fake: Tensor, clip_norm: float, *, fakes_clipped: bool) -> Method:
    clipper = PatientClipper(critic, channels_last=True)
    parts = [
        Part(views=real, loss=partial(patient_loss, -1.0), clip_norm=clip_norm),
        Part(views=fake, loss=partial(patient_loss, 1.0), clip_norm=clip_norm if fakes_clipped else None),
    ]
    stream = SecureStream.from_seed(0)
    return _method(critic, partial(clipper.clipped_sum, parts), clip_norm, stream=stream)


def _method(
    critic: nn.Module,
    clipped: Callable[[], Tensor],
    clip_norm: float,
    *,
    stream: SecureStream | None = None,
    noise: Callable[[Tensor], Tensor] | None = None,
) -> Method:
    optimiser, divisor = _adam(critic), 32.0
    sizes = [p.numel() for p in critic.parameters()]

    def step() -> None:
        optimiser.zero_grad()
        total = clipped()
        if stream is not None:
            total = noisy(total, scale=SIGMA * clip_norm, stream=stream)
        elif noise is not None:
            total = total.add_(noise(total), alpha=SIGMA * clip_norm)
        total /= divisor
        for parameter, own in zip(critic.parameters(), total.split(sizes), strict=True):
            parameter.grad = own.view_as(parameter)
        optimiser.step()

    return Method(step=step, clipped=clipped)


def _opacus(critic: nn.Module, real: Tensor, fake: Tensor, clip_norm: float, mode: str) -> Method:
    """All rows clipped, each on its own: real and generated in one forward, as Opacus can."""
    warnings.simplefilter("ignore")  # of hooks and of expanded weights; they change nothing
    ghost = mode == "ghost"
    options = {"max_grad_norm": clip_norm, "use_ghost_clipping": True} if ghost else {}
    wrapped = wrap_model(critic, mode, batch_first=True, loss_reduction="sum", **options)
    optimiser = (DPOptimizerFastGradientClipping if ghost else DPOptimizer)(
        _adam(critic), noise_multiplier=SIGMA, max_grad_norm=clip_norm, expected_batch_size=None, loss_reduction="sum"
    )
    rows = torch.cat([real.flatten(0, 1), fake.flatten(0, 1)])
    signs = torch.ones(len(rows), device=rows.device)
    signs[: len(rows) // 2] = -1.0
    criterion = DPLossFastGradientClipping(wrapped, optimiser, _Signed(), "sum") if ghost else _Signed()

    def backward() -> None:
        optimiser.zero_grad()
        criterion(wrapped(rows).reshape(-1), signs).backward()

    def step() -> None:
        backward()
        optimiser.step()

    def clipped() -> Tensor:
        backward()
        optimiser.clip_and_accumulate() if not ghost else optimiser.accumulate()
        return _flat([p.summed_grad for p in critic.parameters()])

    return Method(step=step, clipped=clipped)


class _Signed(nn.Module):
    reduction = "sum"

    def forward(self, scores: Tensor, signs: Tensor) -> Tensor:
        signed = scores * signs
        return signed if self.reduction == "none" else signed.sum()


def _vmapped(critic: nn.Module, real: Tensor, fake: Tensor, clip_norm: float) -> Tensor:
    parameters = {name: p.detach() for name, p in critic.named_parameters()}
    total = torch.zeros(sum(p.numel() for p in parameters.values()), device=real.device)
    for views, sign in ((real, -1.0), (fake, 1.0)):

        def loss(own: dict[str, Tensor], patient: Tensor, sign: float = sign) -> Tensor:
            return patient_loss(sign, functional_call(critic, own, (patient,)).reshape(-1))

        for chunk in views.split(VMAP_ROWS):
            found = vmap(grad(loss), in_dims=(None, 0))(parameters, chunk)
            rows = torch.cat([found[name].flatten(1) for name in parameters], dim=1)
            total += (clip_norm / rows.double().norm(dim=1)).clamp(max=1.0).float() @ rows
    return total


def _one_by_one(critic: nn.Module, real: Tensor, fake: Tensor, clip_norm: float) -> Tensor:
    parameters = list(critic.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for views, sign in ((real, -1.0), (fake, 1.0)):
        for patient in views:
            gradients = torch.autograd.grad(patient_loss(sign, critic(patient).reshape(-1)), parameters)
            norm = torch.stack([g.norm().double() for g in gradients]).norm()
            torch._foreach_add_(total, gradients, alpha=min(1.0, clip_norm / float(norm)))
    return _flat(total)


def _flat(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])
