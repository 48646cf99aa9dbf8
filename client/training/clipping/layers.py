"""The layers whose per-patient gradients are known, run so that their backward writes into the book.

While a `Recorder` is active, calls of torch's own layer functions with the critic's parameters run through autograd
functions whose backward gives the input gradient only, and hands the rest to a `Book`. No hook is set and no module is
replaced, so outside of it the critic is what it always was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from client.training.clipping.geometry import Convolution, Matrix
from client.training.clipping.watch import Use, Watch

Layer = Callable[..., Tensor | None]  # None: not one of the critic's parameters, run it as it is
Size = int | Sequence[int]


class Recorder(TorchFunctionMode):
    """Active during the critic's forward."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the recorded layer in place of `func`, or `func`."""
        layer = LAYERS.get(func)
        recorded = None if layer is None else layer(self._watch, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if recorded is None else recorded


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, _: Tensor, watch: Watch, use: Use, layer: Convolution) -> Tensor:
        weight = _as(x, use.weight).contiguous(memory_format=_format(x))  # once, not once a kernel
        ctx.save_for_backward(x, weight)
        ctx.watch, ctx.use, ctx.layer = watch, use, layer
        return layer.forward(x, weight, None if use.bias is None else _as(x, use.bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if ctx.use.bias_number is not None:
            ctx.watch.book.vector(ctx.use.bias_number, _over_places(g))
        ctx.watch.book.weight(ctx.use.target, ctx.layer, x, g)
        return (ctx.layer.input_gradient(g, x, weight) if ctx.needs_input_grad[0] else None, *[None] * 4)


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, _: Tensor, watch: Watch, use: Use) -> Tensor:
        weight = _as(x, use.weight)
        ctx.save_for_backward(x, weight)
        ctx.watch, ctx.use = watch, use
        return F.linear(x, weight, None if use.bias is None else _as(x, use.bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if ctx.use.bias_number is not None:
            ctx.watch.book.vector(ctx.use.bias_number, _over_places(g.movedim(-1, 1)))
        ctx.watch.book.weight(ctx.use.target, Matrix(shape=tuple(weight.shape)), x, g)
        return (g @ weight if ctx.needs_input_grad[0] else None, *[None] * 3)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - torch calls it
        ctx: Any, x: Tensor, _: Tensor, watch: Watch, use: Use, groups: int, eps: float
    ) -> Tensor:
        sizes = (len(x), x.shape[1], math.prod(x.shape[2:]), groups)
        x = x.contiguous(memory_format=_format(x))
        y, mean, scale = torch.native_group_norm(x, use.weight, use.bias, *sizes, eps)
        ctx.save_for_backward(x, mean, scale)
        ctx.watch, ctx.use, ctx.sizes = watch, use, sizes
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, scale = ctx.saved_tensors
        channels = x.shape[1] // ctx.sizes[3]
        mean_c, scale_c = (t.repeat_interleave(channels, dim=1) for t in (mean, scale))  # (N, C)
        g = g.contiguous(memory_format=_format(x))
        summed = _over_places(g)
        _norm_vectors(ctx.watch, ctx.use, (_over_places(g * x) - summed * mean_c) * scale_c, summed)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.aten.native_group_norm_backward(
                g, x, mean, scale, ctx.use.weight, *ctx.sizes, [True, False, False]
            )[0]
        return (dx, *[None] * 5)


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, _: Tensor, watch: Watch, use: Use) -> Tensor:
        ctx.save_for_backward(x)
        ctx.watch, ctx.use = watch, use
        y = x * _by_channel(use.weight, x)
        return y if use.bias is None else y.add_(_by_channel(use.bias, x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        _norm_vectors(ctx.watch, ctx.use, _over_places(g * x), _over_places(g))
        return (g * _by_channel(ctx.use.weight, g) if ctx.needs_input_grad[0] else None, *[None] * 3)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - torch calls it
        ctx: Any, x: Tensor, _: Tensor, watch: Watch, use: Use, shape: list[int], eps: float
    ) -> Tensor:
        y, mean, scale = torch.native_layer_norm(x, shape, use.weight, use.bias, eps)
        ctx.save_for_backward(x, mean, scale)
        ctx.watch, ctx.use, ctx.shape = watch, use, shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, scale = ctx.saved_tensors
        n = math.prod(ctx.shape)

        def by_row(t: Tensor) -> Tensor:
            return t.reshape(len(t), -1, n).sum(dim=1)

        _norm_vectors(ctx.watch, ctx.use, by_row(g * ((x - mean) * scale)), by_row(g))
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.ops.aten.native_layer_norm_backward(
                g, x, ctx.shape, mean, scale, ctx.use.weight, ctx.use.bias, [True, False, False]
            )[0]
        return (dx, *[None] * 5)


class _PReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, _: Tensor, watch: Watch, use: Use) -> Tensor:
        slope = _as(x, use.weight)
        ctx.save_for_backward(x, slope)
        ctx.watch, ctx.use = watch, use
        return torch.prelu(x, slope)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, slope = ctx.saved_tensors
        per_channel = _by_channel(slope, x) if x.ndim > 1 else slope
        slopes = _over_places(g * x.clamp(max=0.0))  # (N, C)
        (number,) = ctx.use.target.numbers
        ctx.watch.book.vector(number, slopes if slope.numel() > 1 else slopes.sum(dim=1, keepdim=True))
        return (torch.where(x > 0, g, g * per_channel) if ctx.needs_input_grad[0] else None, *[None] * 3)


def _convolution(dimensions: int) -> Layer:
    def layer(  # noqa: PLR0917 - torch's signature
        watch: Watch,
        input: Tensor,  # noqa: A002 - torch's names, for calls by keyword
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
    ) -> Tensor | None:
        use = watch.use(weight, bias)
        if use is None:
            return None
        dilations = _each(dilation, dimensions)
        if isinstance(padding, str):
            input, padding = _padded_by_name(input, padding, weight.shape[2:], dilations)  # noqa: A001
        geometry = Convolution(
            shape=tuple(weight.shape),
            stride=_each(stride, dimensions),
            padding=_each(padding, dimensions),
            dilation=dilations,
            groups=groups,
        )
        return _run(_Convolve, watch, _cast(input), use, geometry)

    return layer


def _transposed_convolution(dimensions: int) -> Layer:
    def layer(  # noqa: PLR0917 - torch's signature
        watch: Watch,
        input: Tensor,  # noqa: A002
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        dilation: Size = 1,
    ) -> Tensor | None:
        use = watch.use(weight, bias)
        if use is None:
            return None
        geometry = Convolution(
            shape=tuple(weight.shape),
            stride=_each(stride, dimensions),
            padding=_each(padding, dimensions),
            dilation=_each(dilation, dimensions),
            groups=groups,
            transposed=True,
            output_padding=_each(output_padding, dimensions),
        )
        return _run(_Convolve, watch, _cast(input), use, geometry)

    return layer


def _linear(watch: Watch, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:  # noqa: A002
    use = watch.use(weight, bias)
    return None if use is None else _run(_Multiply, watch, _cast(input), use)


def _group_norm(  # noqa: PLR0917 - torch's signature
    watch: Watch,
    input: Tensor,  # noqa: A002
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    use = watch.use(weight, bias)
    return None if use is None else _run(_GroupNorm, watch, input.to(use.weight.dtype), use, num_groups, eps)


def _instance_norm(  # noqa: PLR0917 - torch's signature
    watch: Watch,
    input: Tensor,  # noqa: A002
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,  # noqa: ARG001 - of running statistics, which are refused
    eps: float = 1e-5,
) -> Tensor | None:
    """The norm by torch's own kernel, which no group norm matches to the last digits, then the recorded affine."""
    use = watch.use(weight, bias)
    if use is None or running_mean is not None or running_var is not None or not use_input_stats:
        return None
    return _run(_Affine, watch, F.instance_norm(input.to(use.weight.dtype), eps=eps), use)


def _layer_norm(  # noqa: PLR0917 - torch's signature
    watch: Watch,
    input: Tensor,  # noqa: A002
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    use = watch.use(weight, bias)
    return (
        None if use is None else _run(_LayerNorm, watch, input.to(use.weight.dtype), use, list(normalized_shape), eps)
    )


def _prelu(watch: Watch, input: Tensor, weight: Tensor) -> Tensor | None:  # noqa: A002
    use = watch.use(weight, None)
    return None if use is None else _run(_PReLU, watch, input, use)


LAYERS: dict[Callable[..., Any], Layer] = {
    F.conv1d: _convolution(1),
    F.conv2d: _convolution(2),
    F.conv3d: _convolution(3),
    F.conv_transpose1d: _transposed_convolution(1),
    F.conv_transpose2d: _transposed_convolution(2),
    F.conv_transpose3d: _transposed_convolution(3),
    F.linear: _linear,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.layer_norm: _layer_norm,
    F.prelu: _prelu,
    torch._weight_norm: Watch.normed,
}


def _run(function: type[torch.autograd.Function], watch: Watch, x: Tensor, *arguments: Any) -> Tensor:
    result: Tensor = function.apply(x, watch.anchor, watch, *arguments)  # type: ignore[no-untyped-call]
    return result


def _norm_vectors(watch: Watch, use: Use, weight_rows: Tensor, bias_rows: Tensor) -> None:
    (number,) = use.target.numbers
    watch.book.vector(number, weight_rows)
    if use.bias_number is not None:
        watch.book.vector(use.bias_number, bias_rows)


def _over_places(t: Tensor) -> Tensor:
    """(N, C, ...) -> (N, C), at least float32."""
    dtype = torch.promote_types(t.dtype, torch.float32)
    return t.sum(dim=tuple(range(2, t.ndim)), dtype=dtype) if t.ndim > 2 else t.to(dtype)


def _cast(x: Tensor) -> Tensor:
    """To autocast's type where autocast is on: the layers that it would run in a shorter type."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) and x.is_floating_point() else x


def _as(x: Tensor, parameter: Tensor) -> Tensor:
    return parameter.to(x.dtype)


def _each(size: Size, dimensions: int) -> tuple[int, ...]:
    """One number for every dimension."""
    if isinstance(size, int):
        return (size,) * dimensions
    return tuple(size) * (dimensions if len(size) == 1 else 1)


def _padded_by_name(x: Tensor, name: str, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[Tensor, Size]:
    """'same' or 'valid' as numbers; what is more on one side is padded here."""
    if name == "valid":
        return x, 0
    whole = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    if any(n % 2 for n in whole):
        x = F.pad(x, [p for n in reversed(whole) for p in (0, n % 2)])
    return x, [n // 2 for n in whole]


def _by_channel(vector: Tensor, x: Tensor) -> Tensor:
    """(C,) -> (C, 1, ...), to go with (N, C, ...)."""
    return vector.view(-1, *[1] * (x.ndim - 2))


def _format(x: Tensor) -> torch.memory_format:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    return last if last is not None and x.is_contiguous(memory_format=last) else torch.contiguous_format
