"""Losses over a large vocabulary, from hidden rows and the LM head, a chunk of rows at a time: [N, V] never exists.

    hidden [n, D] -> logits [n, V] -> value [n] and d value / d logits [n, V] -> d value / d hidden [n, D]      n rows of N, then the next

The value of a row depends on its own logits only, so its gradient is known as soon as its logits are; what is kept for the backward pass is
[N, D]. With LLaDA's 126464 tokens a float32 row of logits is 0.5 MB; teacher and student of 1024 rows, their softmaxes and gradients
would be gigabytes. A distillation needs the teacher's hidden rows, not its logits: both share the frozen head.

    cross_entropy   -log p(target)                    gradient  p - [target]
    forward_kl      -sum p_teacher log p                        (p - p_teacher) / T      KL(teacher || student) + teacher's entropy
    reverse_kl       sum p (log p - log p_teacher)              p (log p - log p_teacher - value) / T

Everything in float32 or wider. D2F's code (arXiv 2508.09192) minimises the second, its Eq. 3 prints the third.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

Divergence = Literal["forward_kl", "reverse_kl"]
CHUNK = 256
"""Rows at a time; 256 of them are 130 MB of float32 for a vocabulary of 126464."""


class Rows(NamedTuple):
    """value: the loss of each row, with gradient. Without: guess, the student's most likely token; and of the teacher, if there is one,
    its most likely token and its entropy (nats, at the given temperature), the least that `forward_kl` can be."""

    value: Float[Tensor, "N"]
    guess: Int[Tensor, "N"]
    teacher_guess: Int[Tensor, "N"] | None = None
    entropy: Float[Tensor, "N"] | None = None


def cross_entropy_rows(
    hidden: Float[Tensor, "N D"], head: Float[Tensor, "V D"], target: Int[Tensor, "N"], *, chunk: int = CHUNK, compile: bool = False
) -> Rows:
    """-log p(target) of every row. compile: one graph for the chunks (two, if the last one is shorter)."""
    value, guess, *_ = _ByChunk.apply(hidden, head, target, None, "cross_entropy", 1.0, chunk, compile)  # type: ignore[misc]
    return Rows(value, guess)


def divergence_rows(
    student: Float[Tensor, "N D"],
    teacher: Float[Tensor, "N D"],
    head: Float[Tensor, "V D"],
    divergence: Divergence = "forward_kl",
    temperature: float = 1.0,
    *,
    chunk: int = CHUNK,
    compile: bool = False,
) -> Rows:
    """The divergence of teacher and student at every row; both have the same head. No gradient reaches the teacher."""
    return Rows(*_ByChunk.apply(student, head, None, teacher.detach(), divergence, temperature, chunk, compile))  # type: ignore[misc]


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _rule(
    hidden: Float[Tensor, "n D"],
    head: Float[Tensor, "V D"],
    target: Int[Tensor, "n"] | None,
    teacher: Float[Tensor, "n D"] | None,
    kind: str,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(value [n], guess [n], teacher's guess [n], teacher's entropy [n], d value / d logits [n, V]) of one chunk."""
    logits = hidden @ head.t()
    guess = logits.argmax(-1)
    student = (_wide(logits) / temperature).log_softmax(-1)
    if teacher is None:
        assert target is not None
        value = -student.gather(1, target.unsqueeze(1)).squeeze(1)
        hit = torch.arange(student.shape[1], device=student.device) == target.unsqueeze(1)
        return value, guess, guess, torch.zeros_like(value), (student.exp() - hit.to(student.dtype)).to(logits.dtype)
    other = teacher @ head.t()
    told = (_wide(other) / temperature).log_softmax(-1)
    p, q = student.exp(), told.exp()
    entropy = -(q * told).sum(-1)
    if kind == "forward_kl":
        value = -(q * student).sum(-1)
        gradient = (p - q) / temperature
    else:
        value = (p * (student - told)).sum(-1)
        gradient = p * (student - told - value.unsqueeze(1)) / temperature
    return value, guess, other.argmax(-1), entropy, gradient.to(logits.dtype)


@cache
def _compiled() -> Any:
    return torch.compile(_rule, dynamic=False)


class _ByChunk(torch.autograd.Function):
    """Values and, while the logits of a chunk are there, the gradient of each row; see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        target: Tensor | None,
        teacher: Tensor | None,
        kind: str,
        temperature: float,
        chunk: int,
        compile: bool,
    ) -> tuple[Tensor, ...]:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        narrow, matrix = hidden.to(dtype), head.to(dtype)
        told = None if teacher is None else teacher.to(dtype)
        ctx.settings = (kind, temperature, chunk, compile, dtype)
        with torch.autocast(device, enabled=False):
            parts, slopes = [], []
            for begin in range(0, max(hidden.shape[0], 1), chunk):
                *found, gradient = _part(ctx.settings, begin, narrow, matrix, target, told)
                parts.append(found)
                if ctx.needs_input_grad[0]:
                    slopes.append(gradient @ matrix)
        ctx.save_for_backward(torch.cat(slopes) if slopes else None, hidden, head, target, teacher)
        value, *rest = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.mark_non_differentiable(*rest)
        return value, *rest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        slope, hidden, head, target, teacher = ctx.saved_tensors
        down = None if slope is None else (slope * upstream.unsqueeze(1)).to(hidden.dtype)
        across = _of_head(ctx.settings, upstream, hidden, head, target, teacher) if ctx.needs_input_grad[1] else None
        return down, across, None, None, None, None, None, None


def _part(settings: Any, begin: int, hidden: Tensor, head: Tensor, target: Tensor | None, teacher: Tensor | None) -> Any:
    kind, temperature, chunk, compile, _ = settings
    some = slice(begin, begin + chunk)
    return (_compiled() if compile else _rule)(
        hidden[some], head, None if target is None else target[some], None if teacher is None else teacher[some], kind, temperature
    )


def _of_head(settings: Any, upstream: Tensor, hidden: Tensor, head: Tensor, target: Tensor | None, teacher: Tensor | None) -> Tensor:
    """Gradient of a head that is trained: logits and their gradients are computed again. The teacher's are constants."""
    _, _, chunk, _, dtype = settings
    narrow, matrix = hidden.to(dtype), head.to(dtype)
    told = None if teacher is None else teacher.to(dtype)
    total = torch.zeros_like(head)
    for begin in range(0, hidden.shape[0], chunk):
        gradient = _part(settings, begin, narrow, matrix, target, told)[-1]
        some = slice(begin, begin + chunk)
        total += (gradient * upstream[some].unsqueeze(1).to(dtype)).t() @ narrow[some]
    return total
