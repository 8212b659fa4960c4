"""The teacher: the policy run over saved tokens, for the features an engine would have captured.

It computes what is asked for when it is asked for, so features stream into training and never lie
on disk unless somebody wants them there. Here by transformers, with any causal LM whose logits are
its ``lm_head`` times its last hidden state, which is tried on a few tokens before anything else
happens; ``integrations/vllm`` has a teacher that runs the policy in an engine.

Memory is bounded by `chunk` tokens: neighbours of similar length are padded to one batch, and a
rollout longer than the chunk goes through in pieces that share a key-value cache, as in chunked
prefill.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, DynamicCache

from drafttrain.drafters.policy import PolicyShape, read_policy_head
from drafttrain.errors import CheckpointError, ConfigError
from drafttrain.rollouts.record import FeatureLayout, PolicyHead, Rollout
from drafttrain.rollouts.sources.samples import SavedRollout

# How far lm_head times the last hidden state may be from the model's own logits, relative to them.
_HEAD_TOLERANCE = 0.02
# Share of the tokens that go through the policy together that may be padding.
_PADDING = 0.25
# What transformers takes for a device map besides the name of a device.
_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")


class Teacher(Protocol):
    """A policy, frozen, whose hidden states a drafter learns from."""

    layout: FeatureLayout
    """Of the features it gives."""

    head: PolicyHead
    """The policy's embedding and lm_head."""

    @property
    def bytes_per_token(self) -> int:
        """Of the features of one token."""

    @property
    def weight_bytes(self) -> int:
        """Of the policy in this process's memory."""

    def features(self, saved: Sequence[SavedRollout]) -> list[Rollout]:
        """Run the policy over some rollouts; cheapest when similar lengths stand together."""


class TransformersTeacher:
    """See :class:`Teacher`: any causal LM of transformers."""

    def __init__(
        self,
        folder: Path,
        layer_ids: Sequence[int],
        *,
        dtype: str = "auto",
        device_map: str | None = None,
        chunk: int = 8192,
        normed: bool = True,
    ) -> None:
        """Load a policy folder (safetensors only).

        Args:
            folder: as transformers writes it.
            layer_ids: aux layers to give; id k is the state after k layers.
            dtype: of weights and features; "auto" is the checkpoint's own.
            device_map: as transformers takes it; "auto" spreads the policy over all devices.
            chunk: padded tokens that go through the policy at once.
            normed: give the last hidden state after the policy's final norm; False gives it before,
                for drafters whose engine hands it over so (MiMo's MTP).

        Raises:
            CheckpointError: it cannot be loaded, lacks a layer, or has another kind of head.
            ConfigError: there is no such device.
        """
        shape = PolicyShape.from_folder(folder)
        if max(layer_ids, default=0) > shape.num_layers:
            problem = f"{max(layer_ids)}; the policy has {shape.num_layers} layers"
            raise CheckpointError(folder, "layer_ids", problem)
        self._model = _load(folder, dtype, device_map)
        self._trunk = _trunk(self._model)
        self._layers = _decoder_layers(self._model, shape.num_layers, folder)
        self._device = self._model.get_input_embeddings().weight.device
        self._chunk = chunk
        weight = self._model.get_output_embeddings().weight
        self.layout = FeatureLayout(
            layer_ids=tuple(sorted(layer_ids)),
            hidden_size=shape.hidden_size,
            last_hidden_normed=normed,
            dtype=str(weight.dtype).removeprefix("torch."),
        )
        self.head = PolicyHead(
            policy_version=0,
            embed_tokens=self._model.get_input_embeddings().weight.detach(),
            lm_head=weight.detach(),
            final_norm=None if normed else read_policy_head(folder, shape).final_norm,
            norm_eps=0.0 if normed else float(shape.config.rms_norm_eps),
        )
        self._check_head(folder)

    @property
    def bytes_per_token(self) -> int:
        """Of the features of one token."""
        states = len(self.layout.layer_ids) + 1
        return states * self.layout.hidden_size * self.head.lm_head.element_size()

    @property
    def weight_bytes(self) -> int:
        """Of the policy in memory."""
        parameters = self._model.parameters()
        return sum(parameter.nbytes for parameter in parameters)

    @torch.no_grad()
    def features(self, saved: Sequence[SavedRollout]) -> list[Rollout]:
        """Run the policy over some rollouts; cheapest when similar lengths stand together.

        The same rollouts in the same order give the same bits; others beside them may change the
        last ones.
        """
        parts = _padded_together(saved, self._chunk)
        return [rollout for part in parts for rollout in self._features_of(part)]

    def _features_of(self, part: Sequence[SavedRollout]) -> Iterator[Rollout]:
        tokens = pad_sequence([rollout.tokens.long() for rollout in part], batch_first=True)
        last_hidden, aux_hidden = self._forward(tokens.to(self._device))
        for row, rollout in enumerate(part):
            within = row, slice(rollout.length)
            aux = aux_hidden[within] if self.layout.layer_ids else None
            yield rollout.with_features(last_hidden[within], aux)

    def _forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T] to the last hidden states [B, T, H] and aux states [B, T, A, H].

        Padding stands on the right of a causal model, so no mask is needed.
        """
        piece = max(self._chunk // len(tokens), 1)
        cache = DynamicCache() if tokens.shape[1] > piece else None
        lasts, auxes = [], []
        for part in tokens.split(piece, dim=1):
            with self._captured() as states:
                output = self._trunk(
                    input_ids=part, past_key_values=cache, use_cache=cache is not None
                )
            last = output.last_hidden_state
            normed = self.layout.last_hidden_normed
            lasts.append(last if normed else states[len(self._layers)].to(last.device))
            aux = [states[layer].to(last.device) for layer in self.layout.layer_ids]
            empty = last.new_empty(*last.shape[:2], 0, last.shape[-1])
            auxes.append(torch.stack(aux, dim=2) if aux else empty)
        return torch.cat(lasts, dim=1), torch.cat(auxes, dim=1)

    @contextmanager
    def _captured(self) -> Iterator[dict[int, Tensor]]:
        """Aux states by layer id, once the model has run; only those asked for are kept."""
        states: dict[int, Tensor] = {}
        with ExitStack() as hooks:
            # What the last layer leaves is the last hidden state before the norm.
            last = () if self.layout.last_hidden_normed else (len(self._layers),)
            for layer_id in {*self.layout.layer_ids, *last}:
                if layer_id == 0:
                    handle = self._layers[0].register_forward_pre_hook(_keep_input(states))
                else:
                    module = self._layers[layer_id - 1]
                    handle = module.register_forward_hook(_keep_output(states, layer_id))
                hooks.callback(handle.remove)
            yield states

    @torch.no_grad()
    def _check_head(self, folder: Path) -> None:
        tokens = torch.arange(min(8, len(self.head.embed_tokens)), device=self._device)[None]
        logits = self._model(input_ids=tokens).logits.float()
        last = self._trunk(input_ids=tokens).last_hidden_state
        ours = (last.float() @ self.head.lm_head.to(last.device).float().T).to(logits.device)
        if not bool((ours - logits).abs().max() <= _HEAD_TOLERANCE * logits.abs().max()):
            problem = "logits are not lm_head times the last hidden state; not supported"
            raise CheckpointError(folder, "lm_head", problem)


def _padded_together(saved: Sequence[SavedRollout], chunk: int) -> Iterator[list[SavedRollout]]:
    """Neighbours that, padded to the longest, stay within `chunk` tokens and are little padding."""
    part: list[SavedRollout] = []
    for rollout in saved:
        together = [*part, rollout]
        padded = len(together) * max(each.length for each in together)
        tokens = sum(each.length for each in together)
        if part and (padded > chunk or tokens < (1 - _PADDING) * padded):
            yield part
            together = [rollout]
        part = together
    if part:
        yield part


def _load(folder: Path, dtype: str, device_map: str | None) -> Any:
    if device_map not in (None, *_SPREAD):
        _check_device(str(device_map))
    options = {"device_map": device_map} if device_map else {}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            str(folder),
            output_loading_info=True,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            **options,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(folder, "weights", f"cannot be loaded: {error}") from error
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(folder, missing[0], "missing")
    if device_map is None and torch.cuda.is_available():
        model.to("cuda")
    return model.eval().requires_grad_(False)


def _check_device(name: str) -> None:
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:  # the latter where torch has no CUDA at all
        problem = (
            f"{name}: {str(error).splitlines()[0]}; expected a device of this machine, or auto"
        )
        raise ConfigError("policy", "device_map", problem) from error


def _trunk(model: Any) -> Any:
    """What gives the last hidden states."""
    # Llama4 and Mllama give their trunk another name than they say, and so take themselves for it.
    return model.model if model.base_model is model else model.base_model


def _decoder_layers(model: Any, count: int, folder: Path) -> nn.ModuleList:
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise CheckpointError(folder, "layers", f"no list of {count} decoder layers in the model")


def _keep_input(states: dict[int, Tensor]) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        states[0] = inputs[0]

    return hook


def _keep_output(states: dict[int, Tensor], layer_id: int) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        states[layer_id] = output[0] if isinstance(output, tuple) else output

    return hook
