"""A language model with TransformerLens's hook points: capture and splice.

Two ways lead to the same bits: through TransformerLens's bridge, which knows every hook point, and through
the model as transformers runs it (`taps.py`), which is faster and knows those at the edges of its modules.
Which one serves is settled by comparing them; the bridge normalises as transformers does.

Shapes: B sequences, C context (positions), D width of a hook point, V vocabulary, N rows.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from penstock.common.device import open_device
from penstock.common.errors import ModelError, nearest
from penstock.common.memory import free_bytes
from penstock.common.model.files import ModelFiles, ModelSettings
from penstock.common.model.offline import quiet_transformers
from penstock.common.model.random_weights import random_model
from penstock.common.model.taps import See, TappedModel
from penstock.common.model.unembedding import direct_logits

CaptureWay = Literal["modules", "bridge"]

KERNELS_AGREE = 1e-2
"""Relative difference below which two attention kernels are taken to compute the same thing."""


class LanguageModel:
    """A loaded model. `attention` names the kernel that computes what is captured."""

    def __init__(self, files: ModelFiles, settings: ModelSettings) -> None:
        self.files = files
        self.device = open_device(settings.device, "model.device")
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        if self.device.type == "cpu" and settings.threads:
            torch.set_num_threads(settings.threads)
        _check_fits(files, self.device, self.dtype)
        self._bridge = _boot(files, self.device, self.dtype)
        self.attention = settings.attention
        self._tapped = TappedModel(self._bridge, self.attention)
        self._ways: dict[frozenset[str], CaptureWay] = {}
        self.context = int(self._bridge.cfg.n_ctx)
        self.vocabulary = int(self._bridge.cfg.d_vocab)

    def hook_names(self) -> list[str]:
        """Every hook point of the model."""
        return list(self._bridge.hook_dict)

    def resolve(self, patterns: Sequence[str]) -> list[str]:
        """The hook points that names and patterns stand for, each once, in the model's order per pattern.

        In a pattern `*` stands for one part of a name or some of it, `[0-3]` for one character:
        `blocks.*.hook_resid_post`.

        Raises:
            ModelError: nothing matches, or two of them name the same hook point.
        """
        known = self.hook_names()
        found: list[str] = []
        for pattern in patterns:
            expression = re.compile(_expression(pattern))
            matches = [name for name in known if expression.fullmatch(name)]
            if not matches:
                hint = nearest(pattern, known) or " `penstock inspect --model NAME` lists them."
                raise ModelError(f"dataset.hooks: {self.files.name} has no hook {pattern!r}.{hint}")
            twice = set(matches) & set(found)
            if twice:
                raise ModelError(f"dataset.hooks: {min(twice)} is listed twice")
            found += matches
        return found

    def widths(self, hook_names: Sequence[str]) -> dict[str, int]:
        """D of each hook point, found by a tiny forward pass.

        Raises:
            ModelError: a hook point is not one vector per position, or never comes about.
        """
        # two sequences of three: shapes that no number of heads imitates at both places
        tokens = torch.zeros((2, 3), dtype=torch.long, device=self.device)
        seen = {name: tuple(acts.shape) for name, acts in self._by_bridge(tokens, hook_names).items()}
        for name in hook_names:
            if seen.get(name, ())[:2] != (2, 3) or len(seen[name]) < 3:
                raise ModelError(f"dataset.hooks: {name} does not hold one vector per position")
        return {name: int(torch.Size(seen[name][2:]).numel()) for name in hook_names}

    def way(self, hook_names: Sequence[str]) -> CaptureWay:
        """How hook points are captured: at the model's modules if that gives the bridge's bits.

        Raises:
            ModelError: the configured attention serves modules only, and a hook point is not at one.
        """
        wanted = frozenset(hook_names)
        if wanted not in self._ways:
            self._ways[wanted] = self._find_way(sorted(wanted))
        return self._ways[wanted]

    def capture(self, tokens: Tensor, hook_names: Sequence[str], see: See) -> None:
        """Show the activations of several hook points, from one forward pass that stops after the last one.

        Args:
            tokens: [B, C] token ids.
            see: called with the name and activations [B, C, …] of each hook point, in the model's order.
        """
        tokens = tokens.to(self.device)
        if self.way(hook_names) == "modules":
            with torch.inference_mode():
                self._tapped.run(tokens, hook_names, see)
        else:
            self._run(tokens, [(name, _seer(name, see)) for name in hook_names], _stop_after(hook_names))

    def activations(self, tokens: Tensor, hook_names: Sequence[str]) -> dict[str, Tensor]:
        """Per hook point [B, C, D] bfloat16 on the model's device, rounded to nearest even."""
        found: dict[str, Tensor] = {}

        def keep(name: str, acts: Tensor) -> None:
            found[name] = acts.flatten(2).to(torch.bfloat16, copy=True)

        self.capture(tokens, hook_names, keep)
        return found

    def logits(
        self,
        tokens: Tensor,
        splice: dict[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> Tensor:
        """Logits, with activations replaced at hook points.

        Args:
            tokens: [B, C] token ids.
            splice: per hook, a function from its activations [B, C, D] to what replaces them; it may give
                them back as they are, and must not write into them.

        Returns:
            [B, C, V].
        """

        def replace(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Any], Tensor | None]:
            def hook(acts: Tensor, hook: Any) -> Tensor | None:
                flat = acts.flatten(2)
                result = function(flat)
                # None leaves everything as it is: the bridge recognises a change by the object
                return None if result is flat else result.to(acts.dtype).view_as(acts)

            return hook

        hooks = [(name, replace(function)) for name, function in (splice or {}).items()]
        output = self._run(tokens.to(self.device), hooks, None, return_type="logits")
        if not isinstance(output, Tensor):
            raise ModelError(f"{self.files.name} gives no logits")
        return output

    def direct_logits(self, directions: Tensor, hook_name: str) -> Tensor | None:
        """What directions [n, D] at a hook point do to logits directly, [n, V]; see `unembedding.py`.

        Returns:
            None where there is no such path.
        """
        return direct_logits(self._bridge, directions.to(self.device), hook_name)

    def _run(
        self,
        tokens: Tensor,
        hooks: Sequence[tuple[str, Callable[..., Any]]],
        stop_at_layer: int | None,
        return_type: str | None = None,
    ) -> Any:
        with torch.inference_mode():
            try:
                return self._bridge.run_with_hooks(
                    tokens,
                    fwd_hooks=list(hooks),
                    return_type=return_type,
                    stop_at_layer=stop_at_layer,
                )
            except ValueError as error:
                # some hook points exist only in a mode of the bridge that changes what is computed
                raise ModelError(f"dataset.hooks: {self.files.name}: {_first_line(error)}") from error

    def _by_bridge(self, tokens: Tensor, hook_names: Sequence[str]) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}

        def keep(name: str, acts: Tensor) -> None:
            seen[name] = acts.clone()

        self._run(tokens, [(name, _seer(name, keep)) for name in hook_names], _stop_after(hook_names))
        return seen

    def _find_way(self, hook_names: list[str]) -> CaptureWay:
        elsewhere = [name for name in hook_names if name not in self._tapped.taps]
        differs = elsewhere or self._differing(hook_names)
        if not differs:
            return "modules"
        if self.attention != "eager":
            raise ModelError(
                f"model.attention: {differs[0]} cannot be captured with {self.attention}; set it to eager"
            )
        return "bridge"

    def _differing(self, hook_names: list[str]) -> list[str]:
        """The hook points at which the modules do not give what the bridge gives, on some tokens."""
        shape = (2, self.context)
        tokens = (torch.arange(2 * self.context, device=self.device) % self.vocabulary).view(shape)
        by_modules: dict[str, Tensor] = {}

        def keep(name: str, acts: Tensor) -> None:
            by_modules[name] = acts.clone()

        with torch.inference_mode():
            self._tapped.run(tokens, hook_names, keep)
        by_bridge = self._by_bridge(tokens, hook_names)
        return [n for n in hook_names if not self._agree(by_modules.get(n), by_bridge.get(n))]

    def _agree(self, ours: Tensor | None, bridged: Tensor | None) -> bool:
        if ours is None or bridged is None or ours.dim() < 3 or ours.shape[:2] != bridged.shape[:2]:
            return False
        ours, bridged = ours.flatten(2), bridged.flatten(2)
        if self.attention == "eager":
            return torch.equal(ours, bridged)
        # another kernel sums in another order
        difference = (ours.float() - bridged.float()).norm() / bridged.float().norm()
        return ours.shape == bridged.shape and float(difference) < KERNELS_AGREE


def _expression(pattern: str) -> str:
    """A pattern as a regular expression: `*` and `?` do not reach over a dot."""
    parts = re.split(r"(\*|\?|\[[^\]]+\])", pattern)
    wild = {"*": r"[^.]*", "?": r"[^.]"}
    return "".join(wild.get(part, part if part.startswith("[") else re.escape(part)) for part in parts)


def _seer(name: str, see: See) -> Callable[[Tensor, Any], None]:
    """A hook for the bridge that shows what it is given."""
    return lambda acts, hook: see(name, acts.detach())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _stop_after(hook_names: Sequence[str]) -> int | None:
    """The first layer not needed, or None if a hook point lies behind the blocks."""
    layers = []
    for name in hook_names:
        parts = name.split(".")
        if parts[0] == "blocks" and parts[1].isdigit():
            layers.append(int(parts[1]))
        elif name not in ("hook_embed", "hook_pos_embed", "embed.hook_out", "pos_embed.hook_out"):
            return None
    return max(layers, default=-1) + 1


def _check_fits(files: ModelFiles, device: torch.device, dtype: torch.dtype) -> None:
    from safetensors import safe_open

    elements = 0
    for file in files.weight_files():
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a mapping)
                elements += int(torch.Size(weights.get_slice(name).get_shape()).numel())
    needed = elements * dtype.itemsize
    free = free_bytes(device)
    if needed > free:
        raise ModelError(
            f"model.name: {files.name} needs {needed / 1e9:.1f} GB for its weights and {device} has "
            f"{free / 1e9:.1f} GB free; use a larger device or a smaller model.dtype"
        )


def _boot(files: ModelFiles, device: torch.device, dtype: torch.dtype) -> Any:
    quiet_transformers()
    from transformer_lens.model_bridge import TransformerBridge

    given = {}
    if files.weights != "trained":
        model = random_model(files)
        for parameter in model.parameters():
            # buffers keep their type, as they do when weights are loaded
            parameter.data = parameter.data.to(dtype)
        given["hf_model"] = model.to(device)
    try:
        bridge = TransformerBridge.boot_transformers(
            str(files.directory.absolute()), device=device, dtype=dtype, **given
        )
    except torch.cuda.OutOfMemoryError as error:
        raise ModelError(f"model.name: {files.name} does not fit on {device}") from error
    except (OSError, ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        raise ModelError(f"model.name: {files.name} cannot be loaded: {_first_line(error)}") from error
    bridge.eval()
    for module in bridge.original_model.modules():
        if hasattr(module, "use_native_layernorm_autograd"):
            # the model's own normalisation: faster, and the bits that transformers gives
            module.use_native_layernorm_autograd = True
    return bridge
