"""The one module that knows the networks of diffusers and transformers: it builds them and fills them.

A network is built on the meta device, where weights take no memory, then takes the checkpoint's tensors one at a
time: at no moment is there a second copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from impasto.core.errors import UserError, nearest
from impasto.core.rng import seed_for
from impasto.families.lean import lean
from impasto.families.quantised import quantised_layers
from impasto.families.tokens import looked_up

Config = Mapping[str, Any]


class ClipText(nn.Module):
    """transformers' CLIPTextModel under the name that files give it: `text_model.encoder.layers.0…`.

    transformers 5.6 took `text_model.` out of the module's paths; files, and other programs, have it. With a
    `projection` it is CLIPTextModelWithProjection.
    """

    def __init__(self, model: CLIPTextModel, projection: nn.Linear | None = None) -> None:
        super().__init__()
        self.text_model = model
        if projection is not None:
            self.text_projection = projection
        self.gradient_checkpointing = False

    @property
    def length(self) -> int:
        """Tokens in one chunk, beginning and end included (77)."""
        return self.text_model.config.max_position_embeddings

    def forward(self, ids: Tensor, skip: int = 0, rows: Tensor | None = None, normed: bool = True) -> Tensor:
        """States (B, length, C) of token ids (B, length), `skip` last layers left out, after the final norm, or before.

        Ids from the end of the vocabulary on are new tokens': their vectors are `rows` (m, C).

        The layers that are skipped are not computed. The norm after an earlier layer is everybody's practice
        (A1111, kohya, diffusers); SDXL is told the states before it.
        """
        layers = self.text_model.encoder.layers
        hidden = self._through(layers[:len(layers) - skip], self._embedded(ids, rows))
        return self.text_model.final_layer_norm(hidden) if normed else hidden

    def with_pooled(self, ids: Tensor, ends: Tensor, skip: int = 0, rows: Tensor | None = None
                    ) -> tuple[Tensor, Tensor]:
        """As `forward`, the states before the norm; and what the whole network says at the places `ends` (B,) of the
        texts' ends, projected (B, projection)."""
        layers = self.text_model.encoder.layers
        states = self._through(layers[:len(layers) - skip], self._embedded(ids, rows))
        last = self.text_model.final_layer_norm(self._through(layers[len(layers) - skip:], states))
        return states, self.text_projection(last[torch.arange(len(ids), device=ids.device), ends])

    def _embedded(self, ids: Tensor, rows: Tensor | None) -> Tensor:
        embeddings = self.text_model.embeddings
        if rows is None:
            return embeddings(ids)
        return embeddings(inputs_embeds=looked_up(embeddings.token_embedding, ids, rows))

    def _through(self, layers: Iterable[nn.Module], hidden: Tensor) -> Tensor:
        for layer in layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = cast(Tensor, checkpoint(layer, hidden, None, is_causal=True, use_reentrant=False))
            else:
                hidden = layer(hidden, None, is_causal=True)
        return hidden

    def enable_gradient_checkpointing(self) -> None:
        """Compute each layer again in the backward instead of keeping what it made."""
        self.gradient_checkpointing = True


class T5Text(nn.Module):
    """transformers' T5EncoderModel, with its table of words in one place: `shared`, `encoder.block.0…`."""

    def __init__(self, model: T5EncoderModel) -> None:
        super().__init__()
        self.config, self.shared, self.encoder = model.config, model.shared, cast(Any, model.encoder)
        self.encoder.embed_tokens = None  # tied to the other, which no longer holds where a weight is replaced
        self.gradient_checkpointing = False

    def forward(self, ids: Tensor, rows: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """States (B, L, C) of token ids (B, L); those that the mask (B, L) has as False are not read.

        Ids from the end of the vocabulary on are new tokens': their vectors are `rows` (m, C).
        """
        hidden = self.shared(ids) if rows is None else looked_up(self.shared, ids, rows)
        bias = self.encoder.block[0].layer[0].SelfAttention.compute_bias(ids.shape[1], ids.shape[1], device=ids.device)
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None], torch.finfo(bias.dtype).min)
        for block in self.encoder.block:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = cast(Any, checkpoint(block, hidden, None, bias, use_reentrant=False))[0]
            else:
                hidden = block(hidden, None, bias)[0]
        return self.encoder.final_layer_norm(hidden)

    def enable_gradient_checkpointing(self) -> None:
        """Compute each layer again in the backward instead of keeping what it made."""
        self.gradient_checkpointing = True


def _unet(config: Config) -> nn.Module:
    network = UNet2DConditionModel.from_config(_plain(config))
    assert isinstance(network, nn.Module)
    lean(network)
    return network


def _vae(config: Config) -> nn.Module:
    network = AutoencoderKL.from_config(_plain(config))
    assert isinstance(network, nn.Module)
    return network


def _clip(config: Config) -> nn.Module:
    """Attention by torch's own kernel, told that it is causal: no mask in memory, and fit for fake tensors."""
    known = CLIPTextConfig.from_dict(_plain(config))
    return ClipText(CLIPTextModel._from_config(known, attn_implementation="sdpa"))


def _projected_clip(config: Config) -> nn.Module:
    known = CLIPTextConfig.from_dict(_plain(config))
    model = CLIPTextModelWithProjection._from_config(known, attn_implementation="sdpa")
    return ClipText(model.text_model, model.text_projection)


def _mmdit(config: Config) -> nn.Module:
    network = SD3Transformer2DModel.from_config(_plain(config))
    assert isinstance(network, nn.Module)
    return network


def _t5(config: Config) -> nn.Module:
    return T5Text(T5EncoderModel._from_config(T5Config.from_dict(_plain(config))))


def _plain(config: Config) -> dict[str, Any]:
    """Without what tells the program that wrote it (`_class_name`, `_diffusers_version`, `torch_dtype` …)."""
    return {key: value for key, value in config.items()
            if not key.startswith("_") and key not in ("architectures", "dtype", "torch_dtype", "transformers_version")}


def kind_of(network: nn.Module) -> str:
    """The name of a network's class in its library."""
    if isinstance(network, ClipText):
        return "CLIPTextModelWithProjection" if hasattr(network, "text_projection") else "CLIPTextModel"
    if isinstance(network, T5Text):
        return "T5EncoderModel"
    return type(network).__name__


def config_of(network: nn.Module) -> dict[str, Any]:
    """A network's configuration as its library writes it to config.json."""
    if isinstance(network, ClipText | T5Text):
        told = (network.config if isinstance(network, T5Text) else network.text_model.config).to_dict()
        return {key: value for key, value in told.items() if value is not None and not key.startswith("_")} | {
            "architectures": [kind_of(network)]}
    inner: Any = network
    return _plain(inner.config) | {"_class_name": kind_of(network)}


#: builders by the class's name in its library
BUILDERS: dict[str, Callable[[Config], nn.Module]] = {
    "UNet2DConditionModel": _unet, "AutoencoderKL": _vae, "CLIPTextModel": _clip,
    "CLIPTextModelWithProjection": _projected_clip, "SD3Transformer2DModel": _mmdit, "T5EncoderModel": _t5,
}


def build(kind: str, config: Config) -> nn.Module:
    """A network of the class `kind` on the meta device, in eval mode, frozen. Raises `UserError` for a bad config."""
    with torch.device("meta"):
        return _built(kind, config)


def random_init(component: str, kind: str, config: Config, seed: int = 0, *, device: torch.device | str = "cpu",
                dtype: torch.dtype = torch.float32) -> nn.Module:
    """The network with the weights that its library begins training with, a function of `seed` and the component's
    name. On the CPU, then moved, so that they are the same on each device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(seed, "init", component))
        network = _built(kind, config)
    for name, (held, leaf) in places(network).items():  # not by `Module.to`, which cannot move fake tensors
        held[leaf] = like(held[leaf], held[leaf].to(device, _width(network, name, dtype)))
    for module in network.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[leaf] = buffer.to(device)
    return network


def places(network: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Where each tensor belongs that files have: weights, and such constants as SD 3's positions."""
    found: dict[str, tuple[dict[str, Any], str]] = {}
    for path, module in network.named_modules():
        passing = _passing(module)
        for held in (module._parameters, module._buffers):
            found |= {f"{path}.{leaf}".lstrip("."): (held, leaf) for leaf, tensor in held.items()
                      if tensor is not None and leaf not in passing}
    return found


def _passing(module: nn.Module) -> set[str]:
    """A module's buffers that no file need have."""
    return {*module._non_persistent_buffers_set, "position_ids"}


def like(old: Tensor, new: Tensor) -> Tensor:
    """The new tensor, as a frozen weight where the old one is a weight."""
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


def _width(network: nn.Module, name: str, dtype: torch.dtype | None) -> torch.dtype | None:
    """The type in which a weight is held where all are to be in `dtype`.

    What T5's feed-forward adds up overflows in fp16: its last matrix stays in fp32, and so does the sum (transformers'
    `_keep_in_fp32_modules`).
    """
    overflows = dtype == torch.float16 and isinstance(network, T5Text) and name.endswith(".wo.weight")
    return torch.float32 if overflows else dtype


def _built(kind: str, config: Config) -> nn.Module:
    try:
        network = BUILDERS[kind](config)
    except (TypeError, ValueError, KeyError, IndexError, ZeroDivisionError, StrictDataclassError) as error:
        raise UserError(f"its config describes no network ({str(error).splitlines()[0]})", where=kind,
                        fix="the config.json of this component is damaged or of another kind") from error
    return network.eval().requires_grad_(False)


def fill(network: nn.Module, tensors: Iterable[tuple[str, Tensor]], *, where: object = "",
         device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> list[str]:
    """Give a network on the meta device its weights, one at a time; returns the names that it has no place for.

    `dtype` of the weights, or the file's own. Raises `UserError` for a tensor of another shape, one that is
    missing, or one that is not of floating point.
    """
    known, packed, surplus = places(network), quantised_layers(network), []
    missing = [*packed, *(name for name, (held, leaf) in known.items() if held[leaf].is_meta)]
    left = set(missing)
    for name, tensor in tensors:
        if name not in known and name not in packed:
            if not name.endswith("position_ids"):  # a buffer of constants that old files carry
                surplus.append(name)
            continue
        wanted = packed[name].shape if name in packed else known[name][0][known[name][1]].shape
        if tensor.shape != wanted:
            raise UserError(f"tensor {name!r} is {_shape(tensor.shape)}, the network wants {_shape(wanted)}",
                            where=where, fix="the file is damaged, or its config is another one's")
        if not tensor.is_floating_point():
            raise UserError(f"tensor {name!r} is of {tensor.dtype}, not of floating point", where=where)
        width = _width(network, name, dtype) or tensor.dtype
        if name in packed:
            packed[name].take(tensor.to(device), width)
        else:
            held, leaf = known[name]
            held[leaf] = like(held[leaf], tensor.to(device=device, dtype=width))
        left.discard(name)
    if missing := [name for name in missing if name in left]:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"tensor {missing[0]!r}{others} is missing" if not others else
                        f"tensors are missing: {missing[0]!r}{others}", where=where,
                        fix=nearest(missing[0], surplus) or "the file is incomplete")
    _fill_buffers(network, device)
    return surplus


def _fill_buffers(network: nn.Module, device: torch.device | str) -> None:
    """Numbers of positions are the only buffer of these networks that no file need have; others may be meant to be
    on the meta device."""
    for module in network.modules():
        passing = _passing(module)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta and name in passing:
                assert name == "position_ids", name
                module._buffers[name] = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "a number"
