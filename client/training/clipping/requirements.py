"""Which critics a patient's gradient can be told apart in. Everything else is refused by name before any training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm

from common.errors import SettingsError

KNOWN_LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
    nn.GroupNorm,
    nn.LayerNorm,
    _InstanceNorm,
    nn.PReLU,
)
# First match counts. A kind of layer, and what is wrong with it and stands in for it.
REFUSED: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], str], ...] = (
    (_BatchNorm, "mixes patients through batch statistics; use GroupNorm"),
    ((_DropoutNd, nn.RReLU), "draws from torch's own generator, which is not the site's stream; leave it out"),
    (
        parametrizations._SpectralNorm,
        "keeps power-iteration state; use singular-value projection (lipschitz: projection)",
    ),
    ((nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention), "uses its weights at many places at once; use convolutions"),
    ((nn.Embedding, nn.EmbeddingBag), "has no clipping here; use Linear on one-hot rows"),
    (torch.jit.ScriptModule, "is compiled, so its layers cannot be seen; use the module it was made from"),
)


def require_separable(critic: nn.Module) -> None:
    """Raise SettingsError that lists every layer a patient's gradient cannot be told apart in, with its replacement."""
    problems = [
        f"{name or 'the critic itself'} ({type(module).__name__}): {problem}"
        for name, module in critic.named_modules()
        for problem in _module_problems(module)
    ]
    problems += _parameter_problems(critic)
    if problems:
        raise SettingsError(
            "this critic cannot be trained with patient-level privacy; nothing was trained:\n" + "\n".join(problems)
        )


def require_rows_apart(critic: nn.Module, rows: Tensor) -> None:
    """Raise SettingsError when the critic's score of one row depends on another, or when scoring changes its buffers.

    Looks at public rows made here, of the shape and kind of `rows`. It finds what no list of layers can:
    statistics over rows, computed by a module without parameters.
    """
    count = 3 * rows[0].numel()
    probe = torch.arange(count, dtype=rows.dtype, device=rows.device).mul_(0.7).sin_().view(3, *rows.shape[1:])
    before = {name: buffer.clone() for name, buffer in critic.named_buffers()}
    with torch.enable_grad():
        probe.requires_grad_()
        scores = critic(probe)
        if scores.numel() != len(probe):
            raise SettingsError(
                f"the critic gave scores of shape {tuple(scores.shape)} for {len(probe)} rows; nothing was trained. "
                "A critic gives one score a row."
            )
        (slope,) = torch.autograd.grad(scores.reshape(-1)[0], probe, allow_unused=True, materialize_grads=True)
    changed = [name for name, buffer in critic.named_buffers() if not torch.equal(buffer, before[name])]
    with torch.no_grad():
        for name, buffer in critic.named_buffers():
            buffer.copy_(before[name])
    if changed:
        raise SettingsError(
            f"{', '.join(changed)}: scoring changes this state, which would carry patients into later steps; "
            "nothing was trained. Use layers without running state."
        )
    if slope[1:].any():
        raise SettingsError(
            "the critic's score of one row depends on other rows (minibatch statistics?), so no patient's share can be "
            "bounded; nothing was trained. Leave such layers out."
        )


def _module_problems(module: nn.Module) -> Iterator[str]:
    refused = [text for kind, text in REFUSED if isinstance(module, kind)]
    own = [name for name, _ in module.named_parameters(recurse=False)]
    if refused:
        yield refused[0]
    elif isinstance(module, _InstanceNorm) and module.track_running_stats:
        yield "keeps statistics over patients; use InstanceNorm with track_running_stats=False"
    elif isinstance(module, ParametrizationList):
        if len(module) != 1 or not isinstance(
            module[0], (parametrizations._WeightNorm, parametrizations._SpectralNorm)
        ):
            yield "is an unknown parametrisation; use weight_norm of torch.nn.utils.parametrizations, or none"
    elif any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values()):
        yield "spectral_norm keeps power-iteration state; use singular-value projection (lipschitz: projection)"
    elif {"weight_g", "weight_v"} <= set(own):
        yield "is the old weight_norm; use torch.nn.utils.parametrizations.weight_norm"
    elif own and not isinstance(module, KNOWN_LAYERS):
        yield (
            f"has parameters of its own ({', '.join(own)}) that no clipping is known for; "
            "use convolution, linear, group norm, layer norm, instance norm or PReLU layers"
        )


def _parameter_problems(critic: nn.Module) -> Iterator[str]:
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in critic.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
        if not parameter.requires_grad:
            yield f"{name}: is frozen (requires_grad=False); make it a buffer, or train it"
        if parameter.dtype not in {torch.float32, torch.float64}:
            yield f"{name}: is {parameter.dtype}; keep parameters in float32 and use autocast for speed"
    if not names:
        yield "the critic itself: has no parameters; there is nothing to train"
    for shared in names.values():
        if len(shared) > 1:
            yield f"{' and '.join(shared)}: are one shared parameter; give each layer its own"
