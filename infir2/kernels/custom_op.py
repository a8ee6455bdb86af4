"""``custom_op``: a function of tensors that torch.compile keeps whole, at little cost a call.

What ``torch.library.custom_op`` does beside that (its own autograd layer, a check that no output is an input) keeps the
host busy: with the thirty calls of an FP8 layer it can take longer than their kernels run. None of
it is needed here: these functions make new tensors, and are called inside autograd functions or without gradients.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_LIBRARY = torch.library.Library("infir2", "FRAGMENT")
_Function = TypeVar("_Function", bound=Callable[..., Any])


def custom_op(fake: Callable[..., Any]) -> Callable[[_Function], _Function]:
    """Decorator that makes ``torch.ops.infir2.NAME`` of a function with type annotations, and returns that.

    ``fake``, of the same arguments, gives tensors like those that come out, without computing them.
    """

    def register(function: _Function) -> _Function:
        name = function.__name__
        _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"infir2::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.infir2, name).default

    return register
