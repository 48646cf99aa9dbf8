"""Change the lists of a policy.yaml, and leave the rest of it as the hospital wrote it, comments included.

YAML tells where a value stands; only those lines are changed. The new text is then read again and must be the very
policy that was meant. Where it is not (a file in one pair of braces, an anchor), the whole file is written anew,
without its comments: whoever approves is shown the difference before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import yaml

from common.errors import SettingsError
from common.settings.load import parse_settings, settings_yaml
from common.settings.site import SitePolicy

LISTS: Final = ("studies", "purposes", "orders", "code_digests", "app_digests")


def policy_text(text: str, before: SitePolicy, after: SitePolicy) -> str:
    """The text of `after`, from `text`, which reads as `before`. Raises ValueError when more than lists differ."""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    if any(old[name] != new[name] for name in old if name not in LISTS):
        raise ValueError("only the lists of a policy are changed here")
    edited = text
    for name in LISTS:
        if old[name] != new[name]:
            edited = _with_list(edited, name, old[name], new[name])
    if _reads_as(edited, after):
        return edited
    whole = settings_yaml(after)
    if not _reads_as(whole, after):
        raise ValueError("the policy cannot be written as YAML")
    return whole


def _reads_as(text: str, policy: SitePolicy) -> bool:
    try:
        return parse_settings(text, SitePolicy, "policy.yaml") == policy
    except SettingsError:
        return False


def _with_list(text: str, name: str, old: Sequence[Any], new: Sequence[Any]) -> str:
    """The text with the list `name` changed from `old` to `new`; in order, what is new comes last."""
    newline = "\r\n" if "\r\n" in text else "\n"
    document = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(document, yaml.MappingNode) or document.flow_style:
        return text
    found = next(((key, value) for key, value in document.value if key.value == name), None)
    if found is None:
        end = "" if not text or text.endswith("\n") else newline
        return text + end + f"{name}:{newline}" + _rendered(new, 0, newline)
    key, value = found
    if isinstance(value, yaml.SequenceNode) and not value.flow_style and len(value.value) == len(old) and new:
        return _with_items(text, value, old, new, newline)
    return _anew(text, key, value, new, newline)


def _with_items(text: str, node: yaml.SequenceNode, old: Sequence[Any], new: Sequence[Any], newline: str) -> str:
    """Take out the lines of items that go, and put those of new ones behind the last."""
    lines = text.splitlines(keepends=True)
    spans = [range(item.start_mark.line, _last_line(item) + 1) for item in node.value]
    gone = {line for item, span in zip(old, spans, strict=True) if item not in new for line in span}
    after = spans[-1].stop
    before = [line for number, line in enumerate(lines[:after]) if number not in gone]
    if before and not before[-1].endswith("\n"):
        before[-1] += newline
    added = _rendered([item for item in new if item not in old], node.start_mark.column, newline)
    return "".join(before) + added + "".join(lines[after:])


def _anew(text: str, key: yaml.Node, value: yaml.Node, new: Sequence[Any], newline: str) -> str:
    """Replace the whole value; what follows on its last line, such as a comment, stays on the key's line."""
    head = text[: key.end_mark.index] + ":"
    last = max(_last_line(value), key.end_mark.line)
    lines = text.splitlines(keepends=True)
    rest_of_line = "" if _is_block(value) else text[value.end_mark.index : sum(map(len, lines[: last + 1]))]
    comment = rest_of_line.strip()
    tail = "".join(lines[last + 1 :])
    end = f"   {comment}{newline}" if comment else newline
    return head + ("" if new else " []") + end + _rendered(new, 0, newline) + tail


def _is_block(node: yaml.Node) -> bool:
    return isinstance(node, yaml.CollectionNode) and not node.flow_style


def _rendered(items: Sequence[Any], column: int, newline: str) -> str:
    """Items of a list as lines that begin in this column."""
    if not items:
        return ""
    plain: str = yaml.safe_dump(list(items), sort_keys=False, allow_unicode=True, width=2**20)
    return "".join(" " * column + line + newline for line in plain.splitlines())


def _last_line(node: yaml.Node) -> int:
    """Number of the last line that belongs to a value. A block's own end is where the next thing begins."""
    return max(_ends(node), default=node.start_mark.line)


def _ends(node: yaml.Node) -> Iterator[int]:
    if _is_block(node):
        for child in node.value:
            for part in child if isinstance(child, tuple) else (child,):
                yield from _ends(part)
    else:
        mark = node.end_mark
        yield mark.line - 1 if mark.column == 0 and mark.line > node.start_mark.line else mark.line
