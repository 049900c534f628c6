"""From a workflow as the ComfyUI canvas saves it to the prompt its API runs. Standard library only.

The canvas does this in JavaScript; here it is done for graphs without subgraphs and without widgets that only
a script of the page knows, which is all that this pack's workflows use.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

_WIDGET_TYPES = frozenset(("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"))
_PAGE_WIDGETS = frozenset(("IMAGECOMPARE",))  # of the page alone: they show something, and hold no value in a file
_NOTES = frozenset(("Note", "MarkdownNote"))
_CONTROL_VALUES = frozenset(("fixed", "increment", "decrement", "randomize"))
SHOWN_ONLY = frozenset(("ImageCompare",))
"""Nodes that make nothing, and that ComfyUI has only from some version on (0.9.0)."""
_UPLOADS = ("image_upload", "animated_image_upload", "video_upload", "audio_upload", "upload")
_MUTED, _BYPASSED = 2, 4


class WorkflowError(ValueError):
    """A workflow that cannot be turned into a prompt; the message names the node and what to do."""


def ui_to_api(workflow: Mapping[str, Any], object_info: Mapping[str, Any]) -> dict[str, Any]:
    """Converts a UI-format workflow to the API prompt format.

    Muted nodes and notes are left out, bypassed nodes and reroutes are replaced by what feeds them, and
    primitives by their value, as the canvas does. Of `SHOWN_ONLY` what the server does not have is left out.

    Args:
        workflow: the parsed .json file, with ``nodes`` and ``links``.
        object_info: node descriptions by type, as ``/object_info`` gives them.

    Returns:
        ``{node id: {"class_type", "inputs", "_meta"}}``, ready for ``POST /prompt``.

    Raises:
        WorkflowError: no UI-format workflow, an unknown node type, widget values that do not fit the node, a
            link that leads nowhere, a subgraph.
    """
    if "nodes" not in workflow or "links" not in workflow:
        raise WorkflowError(
            "not a UI-format workflow: it has no 'nodes' and 'links'. Save it from the canvas"
            " with Workflow > Save, not with Export (API)."
        )
    if (workflow.get("definitions") or {}).get("subgraphs"):
        raise WorkflowError("the workflow has subgraphs, which cannot be converted: unpack them on the canvas.")
    nodes = {node["id"]: node for node in workflow["nodes"]}
    links = dict(_link(link) for link in workflow["links"])

    prompt = {}
    for node in sorted(nodes.values(), key=lambda node: node.get("order", 0)):
        if node["type"] in _NOTES or node["type"] in ("Reroute", "PrimitiveNode"):
            continue
        if node.get("mode") in (_MUTED, _BYPASSED) or (node["type"] in SHOWN_ONLY and node["type"] not in object_info):
            continue
        if node["type"] not in object_info:
            raise WorkflowError(
                f"{_name(node)}: the server has no node of this type. Is the pack that brings"
                " it installed, and did it load (see the server's log)?"
            )
        inputs = _widget_inputs(node, object_info[node["type"]]) | _page_inputs(object_info[node["type"]])
        for slot in node.get("inputs") or ():
            if slot.get("link") is not None:
                value = _source(slot["link"], nodes, links, node)
                if value is not None:
                    inputs[slot["name"]] = value
        title = node.get("title") or object_info[node["type"]].get("display_name") or node["type"]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs, "_meta": {"title": title}}
    return prompt


def _link(link: Any) -> tuple[int, tuple[int, int]]:
    """(link id, (source node id, source slot)) of either form in which links are saved."""
    if isinstance(link, Mapping):
        return link["id"], (link["origin_id"], link["origin_slot"])
    return link[0], (link[1], link[2])


def _name(node: Mapping[str, Any]) -> str:
    return f"node {node['id']} ({node['type']})"


def _source(
    link_id: int, nodes: Mapping[int, Any], links: Mapping[int, tuple[int, int]], target: Mapping[str, Any]
) -> Any:
    """What a linked input gets: [node id, slot], a primitive's value, or None behind a muted node."""
    seen: set[int] = set()
    while True:
        if link_id not in links or links[link_id][0] not in nodes:
            raise WorkflowError(f"{_name(target)}: link {link_id} comes from nowhere; connect that input again.")
        if link_id in seen:
            raise WorkflowError(f"{_name(target)}: link {link_id} goes round in a circle of bypassed nodes.")
        seen.add(link_id)
        node_id, slot = links[link_id]
        node = nodes[node_id]
        if node.get("mode") == _MUTED:
            return None
        if node["type"] == "PrimitiveNode":
            values = node.get("widgets_values") or [None]
            return _literal(values[0])
        if node["type"] != "Reroute" and node.get("mode") != _BYPASSED:
            return [str(node_id), slot]
        passed = _passed_through(node, slot)
        if passed is None:
            return None
        link_id = passed


def _passed_through(node: Mapping[str, Any], slot: int) -> int | None:
    """Link that a bypassed node or a reroute hands on to output ``slot``: same type, same position first."""
    inputs = node.get("inputs") or []
    if node["type"] == "Reroute":
        return inputs[0].get("link") if inputs else None
    kind = node["outputs"][slot]["type"]
    for candidate in [*inputs[slot : slot + 1], *inputs]:
        if candidate.get("type") == kind and candidate.get("link") is not None:
            return candidate["link"]
    return None


def _widget_inputs(node: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a node's widgets by input name; the file holds them as one list, in the inputs' order."""
    widgets = _widgets(node, info)
    values = node.get("widgets_values")
    if isinstance(values, Mapping):
        missing = [name for name, _, _ in widgets if name not in values]
        if missing:
            raise WorkflowError(f"{_name(node)}: no value for {', '.join(missing)}.")
        return {name: _literal(values[name]) for name, _, _ in widgets}
    left: list[Any] = list(values or ())
    result = {}
    optional = (info.get("input") or {}).get("optional") or {}
    for name, kind, options in widgets:
        if not left and name in optional:
            break  # saved before the node had this widget: the page shows its default, the node takes its own
        if not left:
            raise WorkflowError(
                f"{_name(node)}: {len(values or ())} widget values, too few: none is left for '{name}'. The"
                f" widgets are {', '.join(widget[0] for widget in widgets)}. Open the workflow in ComfyUI and"
                " save it again."
            )
        result[name] = _literal(left.pop(0))
        if _has_control(name, kind, options):
            if not left or left[0] not in _CONTROL_VALUES:
                raise WorkflowError(
                    f"{_name(node)}: the value of '{name}' must be followed by its control_after_generate"
                    f" value, one of {', '.join(sorted(_CONTROL_VALUES))};"
                    f" came {repr(left[0]) if left else 'nothing'}."
                )
            left.pop(0)
            if kind == "COMBO" and left and left[0] in ("", None):
                left.pop(0)  # the filter box of a combo that steps
        if left and left[0] == "image" and any(options.get(flag) for flag in _UPLOADS):
            left.pop(0)  # the upload button
    if widgets and left:
        raise WorkflowError(
            f"{_name(node)}: {len(values)} widget values, {len(left)} too many for the widgets"
            f" {', '.join(widget[0] for widget in widgets)}. Open the workflow in ComfyUI and save it again."
        )
    return result


def _page_inputs(info: Mapping[str, Any]) -> dict[str, Any]:
    """What widgets that hold no value send: they are asked for like any other."""
    required = (info.get("input") or {}).get("required") or {}
    return {name: {} for name, spec in required.items() if _spec(spec)[0] in _PAGE_WIDGETS}


def _widgets(node: Mapping[str, Any], info: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(name, type, options) of the inputs that the canvas shows as widgets, in its order."""
    found = []
    for group in ("required", "optional"):
        inputs = (info.get("input") or {}).get(group) or {}
        for name in (info.get("input_order") or {}).get(group) or inputs:
            kind, options = _spec(inputs[name])
            if kind.startswith("COMFY_"):
                raise WorkflowError(
                    f"{_name(node)}: input '{name}' of type {kind} changes the node's shape, which cannot be converted."
                )
            if kind in _WIDGET_TYPES and not options.get("forceInput"):
                found.append((name, kind, options))
    return found


def _spec(spec: Sequence[Any]) -> tuple[str, Mapping[str, Any]]:
    """Type and options of an input; a list of choices in place of the type is the older form of COMBO."""
    options = spec[1] if len(spec) > 1 and isinstance(spec[1], Mapping) else {}
    return ("COMBO" if isinstance(spec[0], (list, tuple)) else str(spec[0])), options


def _has_control(name: str, kind: str, options: Mapping[str, Any]) -> bool:
    if kind not in ("INT", "COMBO"):
        return False
    default = kind == "INT" and name in ("seed", "noise_seed")
    return bool(options.get("control_after_generate", default))


def _literal(value: Any) -> Any:
    """A widget's value as the prompt holds it; a bare list would be taken for a link."""
    return {"__value__": value} if isinstance(value, list) else value


# What the page reads beside the graph --------------------------------------------------------------------------------

DOWNLOADS = {
    "v1-5-pruned-emaonly-fp16.safetensors": {
        "url": "https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/"
        "v1-5-pruned-emaonly-fp16.safetensors?download=true",
        "directory": "checkpoints",
    },
}
"""Files that workflows choose and ComfyUI's page can fetch: it takes them from Hugging Face and Civitai alone, where
neither OpenAI's priors nor its CLIP lie under their own names."""


def stamp(workflow: dict[str, Any], own: Collection[str], version: str, comfyui: str) -> None:
    """Writes into every node which pack it is of and in which version, by which the page installs what a shared
    picture needs, and into loaders where their file is to be had.

    own: types of this pack's nodes; all others are ComfyUI's. version: this pack's. comfyui: the version that the
    workflows are made with.
    """
    for node in workflow["nodes"]:
        properties = node["properties"]
        ours = node["type"] in own
        properties["cnr_id"], properties["ver"] = ("blendswap", version) if ours else ("comfy-core", comfyui)
        chosen = [value for value in node.get("widgets_values") or () if isinstance(value, str) and value in DOWNLOADS]
        properties.pop("models", None)
        if chosen:
            properties["models"] = [{"name": name, **DOWNLOADS[name]} for name in chosen]


def stamp_all(folder: Path, own: Collection[str], version: str, comfyui: str) -> None:
    """`stamp` for every workflow file in `folder`."""
    for path in sorted(folder.glob("*.json")):
        workflow = json.loads(path.read_text(encoding="utf-8"))
        stamp(workflow, own, version, comfyui)
        path.write_text(json.dumps(workflow, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
