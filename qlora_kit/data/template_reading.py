"""Reads a chat template's own code: whether it does anything with the text of a turn but to put it where it belongs."""

from __future__ import annotations

from collections.abc import Iterator

import jinja2
from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qlora_kit.data.template_file import GenerationBlocks

CONTENT = "content"
# Tests whose answer is the same for every text that is not empty.
_TYPE_TESTS = {"defined", "undefined", "string", "none", "mapping", "iterable", "sequence", "number", "boolean"}
_LOGIC = (nodes.And, nodes.Or, nodes.Not)
_JOINED = (nodes.Concat, nodes.Add)


def only_joins_contents(template: str) -> bool:
    """Whether the template does nothing with a turn's ``content`` but join it with other text and print it.

    Whether there is one, and of what type it is, may be asked. A filter, a comparison, a call, an assignment or a slice
    may treat some texts otherwise than others.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, loopcontrols]
    )
    try:
        tree = environment.parse(template)
    except jinja2.TemplateSyntaxError:
        return False
    constants = sum(node.value == CONTENT for node in tree.find_all(nodes.Const))
    accesses = [path for path in _paths(tree, ()) if _is_content(path[-1])]
    read_by_item = sum(isinstance(path[-1], nodes.Getitem) for path in accesses)
    return constants == read_by_item and all(_is_joined(path) for path in accesses)


def _paths(node: nodes.Node, above: tuple[nodes.Node, ...]) -> Iterator[tuple[nodes.Node, ...]]:
    """Each node of the tree, behind those that it stands in."""
    path = (*above, node)
    yield path
    for child in node.iter_child_nodes():
        yield from _paths(child, path)


def _is_content(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Getattr):
        return node.attr == CONTENT
    return isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == CONTENT


def _is_joined(path: tuple[nodes.Node, ...]) -> bool:
    """Whether a content that stands at the end of ``path`` is only joined, printed, or asked whether it is there."""
    child = path[-1]
    for parent in reversed(path[:-1]):
        if isinstance(parent, nodes.Output):
            return True
        if isinstance(parent, nodes.Test):
            return parent.name in _TYPE_TESTS
        if isinstance(parent, nodes.If | nodes.CondExpr) and parent.test is child:
            return True
        joined = isinstance(parent, _JOINED) or (isinstance(parent, nodes.CondExpr) and parent.test is not child)
        asked = isinstance(parent, _LOGIC)
        if not (joined or asked):
            return False
        child = parent
    return False
