"""Capture at the modules of a Hugging Face model, without a bridge in between.

Many hook points are exactly the input or the output of one module: `blocks.3.hook_resid_post` is what the
fourth block returns. There a plain torch hook sees the same tensor, and the model runs at its own speed.

Shapes: B sequences, C context (positions), D width of a hook point.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

See = Callable[[str, Tensor], None]
"""Called with a hook point's name and its activations [B, C, …], which are the model's own: to be copied
before it returns, and not to be changed."""


@dataclass(frozen=True)
class Tap:
    """Where a hook point lies: a side of a module."""

    module: nn.Module
    side: Literal["input", "output"]


class _Done(Exception):
    """Everything asked for was seen: the rest of the forward pass is not needed."""


class TappedModel:
    """The model that a bridge was built into, as it was before, around the same weights.

    Args:
        attention: attention kernel, by its name in transformers.

    Attributes:
        taps: the hook points that are an input or output of one of its modules.
    """

    def __init__(self, bridge: Any, attention: str) -> None:
        self._twins: dict[int, nn.Module] = {}
        self._config = copy.deepcopy(bridge.original_model.config)
        self._config._attn_implementation = attention
        model = self._unbridged(bridge.original_model)
        # without its head: nobody asks for logits here
        self._body: nn.Module = getattr(model, "base_model", model)
        self.taps = self._find_taps(bridge)
        self._placed: tuple[str, ...] = ()
        self._handles: list[Any] = []
        self._left: set[str] = set()
        self._see: See = _nowhere

    def run(self, tokens: Tensor, hook_names: Sequence[str], see: See) -> None:
        """One forward pass that ends as soon as all hook points, each in `taps`, were seen.

        Args:
            tokens: [B, C] token ids.
        """
        self._place(tuple(hook_names))
        self._left, self._see = set(hook_names), see
        try:
            self._body(tokens, use_cache=False)
        except _Done:
            pass
        finally:
            self._see = _nowhere

    def _unbridged(self, module: nn.Module) -> nn.Module:
        if hasattr(module, "original_component"):
            wrapped: Any = module.original_component
            module = wrapped
        if id(module) not in self._twins:
            twin = copy.copy(module)
            self._twins[id(module)] = twin
            # its own places for children and hooks; parameters and buffers stay shared
            twin._modules = OrderedDict()
            for name in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs"):
                setattr(twin, name, OrderedDict())
            twin._forward_pre_hooks_with_kwargs = OrderedDict()
            if hasattr(twin, "config"):
                twin.config = self._config
            for name, child in module._modules.items():
                twin._modules[name] = None if child is None else self._unbridged(child)
        return self._twins[id(module)]

    def _find_taps(self, bridge: Any) -> dict[str, Tap]:
        places: dict[int, Tap] = {}
        for component in bridge.modules():
            twin = self._twins.get(id(getattr(component, "original_component", None)))
            if twin is not None:
                places.setdefault(id(component.hook_in), Tap(twin, "input"))
                places.setdefault(id(component.hook_out), Tap(twin, "output"))
        found = ((name, places.get(id(point))) for name, point in bridge.hook_dict.items())
        return {name: tap for name, tap in found if tap is not None}

    def _place(self, names: tuple[str, ...]) -> None:
        """Put hooks where they are wanted; they stay for the next pass."""
        if names == self._placed:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = [_attach(self.taps[name], self._seer(name)) for name in names]
        self._placed = names

    def _seer(self, name: str) -> Callable[[Tensor], None]:
        def seen(acts: Tensor) -> None:
            self._see(name, acts)
            self._left.discard(name)
            if not self._left:
                raise _Done

        return seen


def _nowhere(name: str, acts: Tensor) -> None:
    pass


def _attach(tap: Tap, seen: Callable[[Tensor], None]) -> Any:
    if tap.side == "output":

        def after(module: nn.Module, args: Any, output: Any) -> None:
            seen(output[0] if isinstance(output, tuple) else output)

        return tap.module.register_forward_hook(after)

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen(args[0] if args else kwargs["hidden_states"])

    return tap.module.register_forward_pre_hook(before, with_kwargs=True)
