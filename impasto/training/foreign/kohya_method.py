"""What kohya's keys say together of the method: kind, size and layers, optimizer and rates."""

from __future__ import annotations

from impasto.methods import METHODS
from impasto.training.foreign.engine import Work, accepts
from impasto.training.foreign.kohya import (
    ALGORITHMS,
    CONVOLUTIONS,
    MODULES,
    OPTIMIZERS,
    PRESETS,
    RATE_FREE,
    TRANSFORMERS,
)
from impasto.training.foreign.kohya_pictures import put
from impasto.training.foreign.optimizer_options import OWN_DEFAULTS, pass_on
from impasto.training.foreign.table import nothing, number, several, whole

UNET, TEXT = "unet", "text-encoder"


def lora(work: Work) -> set[str]:
    """A LoRA's size and layers; returns which of "unet" and "text-encoder" train."""
    module = str(work.get("network_module", "networks.lora"))
    _method(work, module)
    _merged(work)
    rank, alpha = work.read("network_dim", whole, 4), work.read("network_alpha", number, 1.0)
    put(work, "method.rank", rank, "network_dim")
    put(work, "method.alpha", alpha, "network_alpha")
    trains = {UNET, TEXT}
    if work.on("network_train_unet_only") or _zero(work, "text_encoder_lr"):
        trains = {UNET}
    elif work.on("network_train_text_encoder_only") or _zero(work, "unet_lr"):
        trains = {TEXT}
    lycoris = module.startswith("lycoris")  # its convolutions have the linear layers' rank and alpha, if none is given
    conv_rank = work.read("network_args.conv_dim", whole, rank if lycoris else 0)
    conv_alpha = work.read("network_args.conv_alpha", number, alpha if lycoris else 1.0)
    in_unet = _targets(work, lycoris, bool(conv_rank)) if UNET in trains else []
    put(work, "method.targets", in_unet + [TEXT] * (TEXT in trains), "network_train_unet_only",
        "network_train_text_encoder_only", "network_args.preset", why="the layers that it trains in kohya")
    if in_unet == ["all"] and conv_rank != rank:
        put(work, "method.ranks", {CONVOLUTIONS: conv_rank}, "network_args.conv_dim")
    if in_unet == ["all"] and conv_alpha != alpha:
        put(work, "method.alphas", {CONVOLUTIONS: conv_alpha}, "network_args.conv_alpha")
    work.spare("network_args.conv_dim", "network_args.conv_alpha", why="it is that of the other layers"
               if in_unet == ["all"] else "no convolution is trained")
    _lora_plus(work, trains)
    return trains


def _merged(work: Work) -> None:
    """LoRAs that are merged into the base before training, each with its multiplier, 1 where there are too few."""
    files = work.get("base_weights", [])
    files = [str(each) for each in files] if isinstance(files, list) else [str(files)]
    keys = ("base_weights", "base_weights_multiplier")
    factors = work.read(keys[1], several, [])
    if files:
        factors += [1.0] * (len(files) - len(factors))
        put(work, "base.adapters", [file if factor == 1 else f"{file}:{factor:g}"
                                    for file, factor in zip(files, factors, strict=False)], *keys)
    work.spare(keys[1], why="no weights are merged into the base")


def _lora_plus(work: Work, trains: set[str]) -> None:
    """LoRA+: a ratio for all, or one for each part, which counts first; a part without any has plain rates."""
    unet_key, text_key, both = (f"network_args.loraplus_{part}lr_ratio" for part in ("unet_", "text_encoder_", ""))
    ratios = {key: work.read(key, number, 0.0) for key in (unet_key, text_key, both)}
    if not any(ratios.values()):
        return
    unet, text = (ratios[key] or ratios[both] or 1.0 for key in (unet_key, text_key))
    put(work, "method.loraplus_ratio", unet if UNET in trains else text,
        (unet_key if ratios[unet_key] else both) if UNET in trains else (text_key if ratios[text_key] else both))
    if trains == {UNET, TEXT} and text != unet:
        put(work, "method.text_encoder_loraplus_ratio", text, *([text_key] if ratios[text_key] else []))
    work.spare(*ratios, why="each part that is trained has a ratio of its own, or this one")


def _method(work: Work, module: str) -> None:
    """The kind of method. What this version lacks becomes a LoRA of that size, and is told of."""
    algorithm = str(work.get("network_args.algo", MODULES.get(module) or "lora")).lower()
    kind = ALGORITHMS.get(algorithm, "")
    keys = ("network_module", "network_args.algo")
    if module in MODULES and kind in METHODS:
        return put(work, "method.kind", kind, *keys)
    work.put("method.kind", "lora", why="in place of what was asked for")
    for key in keys:
        if work.get(key):
            work.lose(key, f"of methods this version has {', '.join(METHODS)}; the recipe trains a LoRA of that rank",
                      "method.kind")


def _targets(work: Work, lycoris: bool, convolutions: bool) -> list[str]:
    """The UNet's layers: kohya's, or those of LyCORIS' preset."""
    preset = str(work.get("network_args.preset", "full"))
    if lycoris and preset in PRESETS:
        return PRESETS[preset]
    if "network_args.preset" in work.waiting:
        work.lose("network_args.preset", f"is none of {', '.join(PRESETS)}" if lycoris else "it is LyCORIS'",
                  "method.targets")
        del work.settings["network_args.preset"]
    return ["all"] if convolutions else TRANSFORMERS


def whole_network(work: Work, kind: str) -> set[str]:
    """Full fine-tuning; returns which of "unet" and "text-encoder" train."""
    work.put("method.kind", "full", why="what the script trains")
    until = work.read("stop_text_encoder_training", whole, 0)
    if kind == "dreambooth":
        with_text = until >= 0
        if with_text and until:
            work.lose("stop_text_encoder_training", "a text encoder trains to the end", "method.parts")
    else:
        with_text = work.on("train_text_encoder")
    keys = [key for key in ("train_text_encoder", "stop_text_encoder_training") if key in work.waiting]
    work.put("method.parts", [UNET] + [TEXT] * with_text, *keys, why="what the script trains")
    return {UNET, TEXT} if with_text else {UNET}


def optimizer(work: Work) -> str:
    """The optimizer; returns why a learning rate cannot be carried over, or ""."""
    key = next((each for each in ("optimizer_type", "use_8bit_adam", "use_lion_optimizer") if work.get(each)), "")
    asked = {"use_8bit_adam": "AdamW8bit", "use_lion_optimizer": "Lion"}.get(key) or str(work.get(key, ""))
    short = asked.lower().rpartition(".")[2]
    if not asked:
        pass_on(work, "adamw", "optimizer_args.")
        return ""
    relative = short == "adafactor" and str(work.get("optimizer_args.relative_step", True)).lower() != "false"
    name = next((each for each in OPTIMIZERS.get(short, ()) if accepts("train.optimizer", each)), "")
    if name:
        paged = short.startswith("paged") and not name.startswith("paged")
        work.put("train.optimizer", name, key, why="without paging" if paged else "")
        pass_on(work, name, "optimizer_args.", OWN_DEFAULTS)
        return "kohya's Adafactor finds the rate by itself, unless relative_step=False" if relative else ""
    work.lose(key, f"this version has no {asked}", "train.optimizer")
    for each in [each for each in work.waiting if each.startswith("optimizer_args.")]:
        work.lose(each, f"it is {asked}'s", "train.optimizer")
    return f"{asked} finds the rate by itself; the optimizer in its place does not" if relative or \
        short.startswith(RATE_FREE) else ""


def rates(work: Work, kind: str, trains: set[str], rate_free: str) -> None:
    """The UNet's rate is the run's, the text encoder's the method's."""
    of_text = ("text_encoder_lr",) if kind == "lora" else \
        ("learning_rate_te", "learning_rate_te1", "learning_rate_te2", "learning_rate_te3")
    texts = [key for key in of_text if work.get(key) is not None]
    there = [key for key in ("learning_rate", "unet_lr", *texts) if work.get(key) is not None]
    if rate_free:
        for key in there:
            work.lose(key, rate_free, "train.learning_rate")
        return
    rate = work.read("learning_rate", number, 2e-6)
    unet = work.read("unet_lr", number, rate) if kind == "lora" else rate
    found = [each for key in texts for each in work.read(key, several, [])]
    text_rate = found[0] if found else rate
    if len(set(found)) > 1:
        work.told.notes.append(f"text encoders have one rate here, {text_rate:g}; kohya's are "
                               f"{', '.join(f'{each:g}' for each in found)}")
    unet_key = "unet_lr" if kind == "lora" and work.get("unet_lr") is not None else "learning_rate"
    text_key = texts[0] if found else "learning_rate"
    if UNET in trains:
        put(work, "train.learning_rate", unet, unet_key)
    else:
        put(work, "train.learning_rate", text_rate, text_key)
    if trains == {UNET, TEXT} and text_rate != unet:
        put(work, "method.text_encoder_learning_rate", text_rate, text_key)
    work.spare(*there, why="each part that is trained has a rate of its own, or this one")


def _zero(work: Work, key: str) -> bool:
    """Whether a rate is given, and is nought: that part is not trained."""
    value = work.get(key)
    return value is not None and nothing(value[0] if isinstance(value, list) else value, (0,))
