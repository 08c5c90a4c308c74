"""A language model run through TransformerLens's bridge: capture and splice at hook points.

Shapes: B sequences, C context (positions), D width of a hook point, V vocabulary.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.common.device import open_device
from penstock.common.errors import ModelError, nearest
from penstock.common.model.files import ModelFiles, ModelSettings


class LanguageModel:
    """A loaded model. `name_of_attention` tells which attention kernel computes its bits."""

    def __init__(self, files: ModelFiles, settings: ModelSettings) -> None:
        self.files = files
        self.device = open_device(settings.device, "model.device")
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        if self.device.type == "cpu" and settings.threads:
            torch.set_num_threads(settings.threads)
        _check_fits(files, self.device, self.dtype)
        self._bridge = _boot(files, self.device, self.dtype)
        config = self._bridge.original_model.config
        self.name_of_attention = str(getattr(config, "_attn_implementation", "unknown"))
        self.context = int(self._bridge.cfg.n_ctx)
        self.vocabulary = int(self._bridge.cfg.d_vocab)

    def hook_names(self) -> list[str]:
        """Every hook point of the model."""
        return list(self._bridge.hook_dict)

    def widths(self, hook_names: Sequence[str]) -> dict[str, int]:
        """D of each hook point, found by a tiny forward pass.

        Raises:
            ModelError: the model lacks a hook point, or it is not one vector per position.
        """
        known = self.hook_names()
        for name in hook_names:
            if name not in known:
                hint = nearest(name, known) or " `penstock inspect --model NAME` lists them."
                raise ModelError(f"dataset.hooks: {self.files.name} has no hook {name!r}.{hint}")
        seen: dict[str, tuple[int, ...]] = {}

        def note(name: str) -> Callable[[Tensor, Any], None]:
            return lambda acts, hook: seen.update({name: tuple(acts.shape)})

        # two sequences of three: shapes that no number of heads imitates at both places
        tokens = torch.zeros((2, 3), dtype=torch.long, device=self.device)
        self._run(tokens, [(name, note(name)) for name in hook_names], None)
        for name in hook_names:
            if seen.get(name, ())[:2] != (2, 3) or len(seen[name]) < 3:
                raise ModelError(f"dataset.hooks: {name} does not hold one vector per position")
        return {name: int(torch.Size(seen[name][2:]).numel()) for name in hook_names}

    def capture(self, tokens: Tensor, hook_names: Sequence[str]) -> dict[str, Tensor]:
        """Activations of several hook points from one forward pass that stops after the last one.

        Args:
            tokens: [B, C] token ids.

        Returns:
            Per hook [B, C, D] bfloat16 on the model's device, rounded to nearest even.
        """
        captured: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[Tensor, Any], None]:
            def hook(acts: Tensor, hook: Any) -> None:
                # a copy: later layers may work in place
                captured[name] = acts.detach().flatten(2).to(torch.bfloat16, copy=True)

            return hook

        hooks = [(name, keep(name)) for name in hook_names]
        self._run(tokens.to(self.device), hooks, _stop_after(hook_names))
        return captured

    def logits(
        self,
        tokens: Tensor,
        splice: dict[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> Tensor:
        """Logits, with activations replaced at hook points.

        Args:
            tokens: [B, C] token ids.
            splice: per hook, a function from its activations [B, C, D] to what replaces them.

        Returns:
            [B, C, V].
        """

        def replace(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Any], Tensor]:
            def hook(acts: Tensor, hook: Any) -> Tensor:
                return function(acts.flatten(2)).to(acts.dtype).view_as(acts)

            return hook

        hooks = [(name, replace(function)) for name, function in (splice or {}).items()]
        output = self._run(tokens.to(self.device), hooks, None, return_type="logits")
        if not isinstance(output, Tensor):
            raise ModelError(f"{self.files.name} gives no logits")
        return output

    def _run(
        self,
        tokens: Tensor,
        hooks: Sequence[tuple[str, Callable[..., Any]]],
        stop_at_layer: int | None,
        return_type: str | None = None,
    ) -> Any:
        with torch.inference_mode():
            return self._bridge.run_with_hooks(
                tokens,
                fwd_hooks=list(hooks),
                return_type=return_type,
                stop_at_layer=stop_at_layer,
            )


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
    free = _free_bytes(device)
    if needed > free:
        raise ModelError(
            f"model.name: {files.name} needs {needed / 1e9:.1f} GB for its weights and {device} has "
            f"{free / 1e9:.1f} GB free; use a larger device or a smaller model.dtype"
        )


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if device.type == "cpu" and meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 1 << 62


def _boot(files: ModelFiles, device: torch.device, dtype: torch.dtype) -> Any:
    # the files are here; without this a missing optional file means retries against the hub
    os.environ["HF_HUB_OFFLINE"] = "1"
    import logging

    import transformers
    from transformer_lens.model_bridge import TransformerBridge

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger().setLevel(logging.ERROR)
    try:
        bridge = TransformerBridge.boot_transformers(
            str(files.directory.absolute()), device=device, dtype=dtype
        )
    except torch.cuda.OutOfMemoryError as error:
        raise ModelError(f"model.name: {files.name} does not fit on {device}") from error
    except (OSError, ValueError, KeyError, NotImplementedError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"model.name: {files.name} cannot be loaded: {first}") from error
    bridge.eval()
    return bridge
