"""The text of `impasto inspect`: what was found, in lines for people. A file's own words are made safe first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from impasto.cli.console import size
from impasto.cli.drawings import bars, columns, safe, short, table

#: metadata that people ask for first
FIRST = ("modelspec.title", "ss_output_name", "modelspec.trigger_phrase", "ss_base_model_version", "ss_sd_model_name",
         "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_steps", "ss_learning_rate", "impasto.version",
         "impasto.step")


def lines(found: Mapping[str, Any]) -> list[str]:
    """All lines about one file or folder."""
    kinds = {"adapter": _adapter, "embedding": _embedding, "hypernetwork": _hypernetwork, "picture": _picture,
             "pickle": _pickle, "run": _run}
    kind = _other if "unread" in found else kinds.get(found["kind"], _checkpoint)
    heading = safe(found["file"]) + (f" ({size(found['bytes'])})" if "bytes" in found else "")
    told = [heading, *kind(found)]
    if "sha256" in found:
        told += ["", f"sha256 {found['sha256']}"]
    return told


def _adapter(found: Mapping[str, Any]) -> list[str]:
    family = found["family"] or "an unknown family"
    kinds = ", ".join(found["deltas"])
    told = [f"adapter for {safe(family)}: {kinds}, in {found['format']} format"]
    told += _pairs({
        "layers": f"{found['layers']} ({_counts(found['components'])})",
        "rank": _counts(found["ranks"], "in"),
        "alpha": _counts(found["alphas"], "in") + _taken(found.get("without_alpha", 0), found["layers"]),
        "parameters": f"{found['parameters']:,} ({_types(found['dtypes'])})" if "parameters" in found else "",
        "made on": ", ".join(f"{name} {print_[:12]}" for name, print_ in found["base"].items()),
    })
    told += ["", "size of the change by block (Frobenius norm)", *_indent(bars(found["norms"]))]
    told += ["", "new tokens", *_tokens(found["tokens"])] if found["tokens"] else []
    if "programs" in found:
        told += ["", "loaded by", *_indent([line for verdict in found["programs"] for line in _verdict(verdict)])]
    return told + _metadata(found["metadata"])


def _taken(missing: int, layers: int) -> str:
    """What is said of alphas that are not in the file."""
    if not missing:
        return ""
    some = f" for {missing} layer{'s' if missing > 1 else ''}" if missing < layers else ""
    return f" (not in the file{some}: taken to be the rank)"


def _hypernetwork(found: Mapping[str, Any]) -> list[str]:
    after = ", after the last layer too" if found["activate_output"] else ""
    told = [f"hypernetwork for {safe(found['family'] or 'an unknown family')}"]
    told += _pairs({
        "widths": ", ".join(map(str, found["widths"])),
        "structure": "-".join(f"{multiple:g}" for multiple in found["structure"]),
        "activation": found["activation"] + ("" if found["activation"] == "linear" else after),
        "layer norm": "yes" if found["layer_norm"] else "no",
        "dropout": ", ".join(f"{p:g}" for p in found["dropout"]) if any(found["dropout"]) else "none",
        "parameters": f"{found['parameters']:,} ({_types(found['dtypes'])})",
        "made on": ", ".join(f"{name} {print_[:12]}" for name, print_ in found["base"].items()),
        "caution": "".join(f"{program} does not know this activation" for program in found["unread_by"]),
    })
    told += ["", "size of the weights by width (Frobenius norm)", *_indent(bars(found["norms"]))]
    return told + _imports(found) + _metadata(found["metadata"])


def _embedding(found: Mapping[str, Any]) -> list[str]:
    family = f" for {safe(found['family'])}" if found["family"] else ""
    several = "s" if len(found["tokens"]) > 1 else ""
    return [f"embedding{several}{family}, in {found['format']} format", *_tokens(found["tokens"]), *_pairs({
        "made on": ", ".join(f"{name} {print_[:12]}" for name, print_ in found["base"].items())}),
        *_imports(found), *_metadata(found["metadata"]),
        *(["", *(f"in a {line}" if not at else line for at, line in enumerate(_picture(found["picture"])))]
          if "picture" in found else [])]


def _tokens(tokens: Mapping[str, Any]) -> list[str]:
    """A line for each token and text encoder; norms tell how far vectors are from those of words."""
    rows = [["token", "text encoder", "vectors", "width", "norms"]]
    for token, own in tokens.items():
        for encoder, part in own.items():
            norms = " ".join(f"{norm:.3g}" for norm in part["norms"][:8]) + (" ..." if part["vectors"] > 8 else "")
            rows.append([safe(token), safe(encoder), str(part["vectors"]), str(part["width"]), norms])
    return _indent(table(rows))


def _verdict(verdict: Mapping[str, Any]) -> list[str]:
    """What one program makes of an adapter's file."""
    ignored = verdict["ignored"]
    whole = "all" if verdict["loaded"] == verdict["total"] else str(verdict["loaded"])
    line = f"{verdict['program']:<10} {whole} of {verdict['total']} layers"
    if ignored:
        line += f", ignores {len(ignored)} keys: {short(ignored[0], 60)}" + (" ..." if len(ignored) > 1 else "")
    return [line, f"{'':<10} caution: {verdict['caution']}"] if verdict["caution"] else [line]


def _checkpoint(found: Mapping[str, Any]) -> list[str]:
    layout = {"ldm": "in one file", "diffusers": "as a diffusers folder"}.get(found["layout"], found["layout"])
    rows = [["component", "tensors", "parameters", "types"]]
    for name, part in found["components"].items():
        rows.append([name, str(part["tensors"]), f"{part['parameters']:,}", _types(part["dtypes"])])
    family = f" of {found['family']}" if found["family"] else ""
    told = [f"{found['variant']} {found['kind']}{family}, {layout}".strip(), "", *_indent(table(rows))]
    if prediction := found["scheduler"].get("prediction_type"):
        told += ["", f"  predicts {safe(str(prediction))}"]
    if surplus := found["surplus"]:
        told += ["", f"{len(surplus)} keys that no component takes, such as {short(surplus[0], 60)}"]
    return told + _imports(found) + _metadata(found["metadata"])


def _other(found: Mapping[str, Any]) -> list[str]:
    """A file that Impasto itself does not read."""
    told = [found["title"], f"  not read by Impasto: {safe(found['unread'])}"]
    if "tensors" in found:
        told += _pairs({"tensors": f"{found['tensors']:,}, such as {short(', '.join(found['first']), 60)}",
                        "parameters": f"{found['parameters']:,} ({_types(found['dtypes'])})"})
    return told + _imports(found) + _metadata(found.get("metadata", {}))


def _pickle(found: Mapping[str, Any]) -> list[str]:
    told = [f"a pickle, which {safe(found['refused'])}", *([f"  {safe(found['fix'])}"] if found["fix"] else [])]
    return told + _imports(found)


def _imports(found: Mapping[str, Any]) -> list[str]:
    """What a pickle names, if it is one."""
    names = found.get("imports", [])
    return ["", "it is a pickle and names", *_indent([safe(name) for name in names])] if names else []


def _picture(found: Mapping[str, Any]) -> list[str]:
    told = [f"picture of {found['size'][0]}x{found['size'][1]} pixels"]
    for name, text in found["texts"].items():
        if name != "impasto":
            told += ["", safe(name), *_indent([safe(line) for line in text.splitlines()])]
    if "command" in found:
        told += ["", "drawn by", *_indent([safe(found["command"])])]
    return told


def _run(found: Mapping[str, Any]) -> list[str]:
    loss = "" if found["loss"] is None else f", loss {found['loss']:.4f}"
    return [f"run: {', '.join(found['methods'])} on {safe(found['base'])}", *_pairs({
        "step": f"{found['step']}{loss}",
        "checkpoints": ", ".join(found["checkpoints"]) or "none",
        "artifacts": ", ".join(map(safe, found["artifacts"])) or "none yet",
    })]


def _metadata(metadata: Mapping[str, str]) -> list[str]:
    """The keys that matter first, one line each, cut to the terminal's width."""
    order = sorted(metadata, key=lambda key: (FIRST.index(key) if key in FIRST else len(FIRST), key))
    if not order:
        return []
    room = max(columns() - 4 - max(len(short(key, 40)) for key in order), 20)
    return ["", "metadata", *_pairs({short(key, 40): short(metadata[key], room) for key in order})]


def _pairs(pairs: Mapping[str, str]) -> list[str]:
    """Names and values, aligned; those without a value are left out."""
    width = max(map(len, pairs))
    return [f"  {name:<{width}}  {value}" for name, value in pairs.items() if value]


def _counts(counts: Mapping[str, int], word: str = "") -> str:
    """`unet 128, text_encoder 72`, or `16 in 192, 8 in 8`; at most six, a single value by itself."""
    if word and len(counts) == 1:
        return next(iter(counts))
    shown = [f"{safe(name)} {word} {count}".replace("  ", " ") for name, count in list(counts.items())[:6]]
    return ", ".join([*shown, "..."] if len(counts) > 6 else shown)


def _types(dtypes: Mapping[str, int]) -> str:
    return ", ".join(dtypes)


def _indent(texts: list[str]) -> list[str]:
    return [f"  {text}" for text in texts]
