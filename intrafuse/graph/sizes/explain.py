"""Draw conclusions from trials of a model's code: attributes that follow, scales, and locks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch.fx import Node

from intrafuse.graph.axes import Tree, leaves, tree_size
from intrafuse.graph.rules import (
    START,
    Literal,
    Scope,
    arguments,
    line_of,
    modules_of,
    operator_name,
)
from intrafuse.graph.rules.scale import follow_size
from intrafuse.graph.sizes.compare import Difference, numbers
from intrafuse.graph.sizes.couple import couple, divide
from intrafuse.graph.sizes.trials import Number, Trials, value_at
from intrafuse.graph.typed import is_several
from intrafuse.support.modules import held_sizes

__all__ = ["follow_names", "give_up", "learn", "reconsider"]

# Usual names of attributes that hold a size of attention, even if the code does not read them.
NAMES = {
    "heads": ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads"),
    "key heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads"),
    "width": ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "dim_head"),
    "all": ("all_head_size", "inner_dim"),
}


def follow_names(trials: Trials) -> None:
    """Let attributes with the usual names follow heads and widths of attention."""
    scope = trials.scope
    for node, what, tree in scope.heads:
        size = scope.table.measure(tree)
        for path in modules_of(node)[:1]:
            owner = scope.model.get_submodule(path)
            for name in NAMES.get(what, ()):
                value = vars(owner).get(name)
                if type(value) is int and value == size and size > 1:
                    trials.attributes.setdefault((path, name), tree)


def learn(trials: Trials, difference: Difference, atoms: list[int]) -> bool:
    """Draw a conclusion from a trial: another attribute, a scale that follows, or a lock.

    Returns:
        Whether there was a conclusion.
    """
    place = trials.places[difference.node]
    here = [item for item in trials.at_stake(atoms) if trials.places[item.node] == place]
    if here:
        _explain(trials, difference, here, trials.sizes(atoms))
        return True
    if _scales(trials, difference, atoms):
        return True
    if not difference.explained or difference.start is not None:  # another number may be the cause
        return False
    around = [node for node in trials.nodes if trials.places[node] == place]
    return any([_lock_around(trials.scope, node, set(atoms)) for node in around])


def reconsider(trials: Trials, difference: Difference | None) -> bool:
    """Try another attribute if the last one made things worse.

    An attribute may have the size of an axis by chance, such as the size of an image. Changing it
    makes the code fail, or makes an earlier operator differ.

    Args:
        trials: the results of the trials so far.
        difference: the present difference; None if the code fails outside any operator.

    Returns:
        Whether things became worse. In that case another attribute is tried, or the numbers are
        locked.
    """
    if trials.attempt is None:
        return False
    (number, items), trials.attempt = trials.attempt, None
    order = trials.order
    if difference is not None and order[difference.node] >= min(order[item.node] for item in items):
        return False
    if not _try_next(trials, number, items):
        trials.forget(number)
        for item in items:
            _lock(trials.scope, item)
    return True


def give_up(trials: Trials, lines: list[tuple[str, str]], atoms: list[int]) -> bool:
    """Lock numbers in code that failed outside any operator; return whether there are any."""
    at_stake = trials.at_stake(atoms)
    files = {file for file, _ in lines}
    near = [item for item in at_stake if (line_of(item.node) or ("", ""))[0] in files]
    for item in near or at_stake:
        _lock(trials.scope, item)
    return bool(at_stake)


def _lock(scope: Scope, item: Literal) -> None:
    where = scope.where(item.node)
    scope.table.lock(item.axis, f"{operator_name(item.node)} takes its size as a number{where}")


def _lock_around(scope: Scope, node: Node, atoms: set[int]) -> bool:
    """Lock operands and result of an operator; return whether any of them holds the atoms."""
    where = scope.where(node)
    reason = f"operator {operator_name(node)}{where} works with the size that was traced"
    trees = [tree for n in (node, *node.all_input_nodes) for tree in scope.trees(n)]
    trees += [scope.contracted[n] for n in node.all_input_nodes if n in scope.contracted]
    held = [t for t in trees if not atoms.isdisjoint(leaves(scope.table.resolve(t)))]
    for tree in held:
        scope.table.lock(tree, reason)
    return bool(held)


def _explain(
    trials: Trials, difference: Difference, here: list[Literal], sizes: Mapping[int, int]
) -> None:
    """Try the next attribute that may be the source of a number; lock if there is none.

    Only wrong numbers are tried, one after the other. `here` holds the numbers of every layer that
    runs the same code.
    """
    wrong = _wrong(trials.scope, difference, sizes)
    if wrong and _share(trials, difference.node, wrong, {item.at for item in here}, sizes):
        return
    for at in dict.fromkeys(item.at for item in here):
        if wrong is None or at in wrong:
            items = [item for item in here if item.at == at]
            number = (trials.places[difference.node], at)
            if wrong and (
                divide(trials, items, wrong[at], sizes)
                or couple(trials, items, difference.node, wrong[at], sizes)
            ):
                trials.forget(number)
                return
            if _try_next(trials, number, items):
                return
    guilty = [item for item in here if wrong is None or item.at in wrong] or here
    # A number that did not change is a literal of the code; others may be computed from it.
    measure = trials.scope.table.measure
    same = [i for i in guilty if wrong and wrong.get(i.at) == measure(i.part)]
    for item in same or guilty:
        _lock(trials.scope, item)


def _share(
    trials: Trials,
    node: Node,
    wrong: Mapping[tuple[int, ...], int],
    open_: set[tuple[int, ...]],
    sizes: Mapping[int, int],
) -> bool:
    """Couple the axis that an attribute follows with another axis of the same source.

    Returns:
        Whether there is such an attribute.
    """
    scope, resolve = trials.scope, trials.scope.table.resolve
    for at in sorted(at for at in set(wrong) - open_ if at[-1] != START):
        size = scope.table.measure(resolve(value_at(scope.values[node], at)))
        for depth, path in enumerate(modules_of(node)):
            for module, name in [key for key in trials.attributes if key[0] == path]:
                tree = resolve(trials.attributes[module, name])
                if scope.table.measure(tree) != size or tree_size(tree, sizes) != wrong[at]:
                    continue
                for peer in [n for n in trials.nodes if trials.places[n] == trials.places[node]]:
                    followed = trials.attributes.get((modules_of(peer)[depth], name))
                    if followed is not None:
                        scope.table.unify(followed, value_at(scope.values[peer], at))
                return True
    return False


def _wrong(
    scope: Scope, difference: Difference, sizes: Mapping[int, int]
) -> dict[tuple[int, ...], int] | None:
    """Map the places where a result has a wrong size to that size; None if unknown.

    For a slice with a wrong start, the wrong size is the number of positions before it.
    """
    if difference.start is not None:
        dim = arguments(difference.node)["dim"] % len(scope.values[difference.node])
        return {(dim, START): difference.start}
    if difference.failed is not None:
        resolve, values = scope.table.resolve, scope.values[difference.node]
        given = _given(difference.failed)
        wanted = {at: tree_size(resolve(value_at(values, at)), sizes) for at in given}
        return {at: n for at, n in given.items() if wanted[at] != n} or None
    if difference.expected is None or not is_several(difference.value):
        return None
    wanted, given = dict(_indexed(difference.expected)), dict(_indexed(difference.value))
    return {at: given.get(at, -1) for at, size in wanted.items() if given.get(at) != size}


def _given(node: Node) -> dict[tuple[int, ...], int]:
    """Map places in the result of an operator to the numbers that the operator received."""
    args = arguments(node)
    dim = args.get("dim", 0) % max(node.all_input_nodes[0].meta["val"].dim(), 1)
    if "split_sizes" in args:
        return {(i, dim): n for i, n in enumerate(args["split_sizes"])}
    first = dim if "sizes" in args else 0
    numbers = next((args[key] for key in ("size", "shape", "sizes") if key in args), ())
    return {(first + i,): n for i, n in enumerate(numbers) if type(n) is int and n != -1}


def _indexed(
    shape: Sequence[int | list[int]], *before: int
) -> Iterator[tuple[tuple[int, ...], int]]:
    for i, n in enumerate(shape):
        if isinstance(n, list):
            yield from _indexed(n, *before, i)
        else:
            yield (*before, i), n


def _try_next(trials: Trials, number: Number, items: list[Literal]) -> bool:
    """Let another attribute follow the axis of a number; return whether there is one."""
    tried = trials.tried.setdefault(number, [])
    options = [_candidates(trials, item) for item in items]
    name = next((n for n in options[0] if n not in tried and all(n in o for o in options)), None)
    if name is None:
        return False
    trials.forget(number)  # the last attribute did not help
    tried.append(name)
    trials.added[number], trials.attempt = [], (number, items)
    for item, keys in zip(items, options, strict=True):
        key = keys[name]
        if key not in trials.attributes:
            trials.attributes[key] = item.part
            trials.added[number].append(key)
        trials.scope.table.unify(trials.attributes[key], item.part)  # one number: stay equal
    return True


def _candidates(trials: Trials, item: Literal) -> dict[str, tuple[str, str]]:
    """Map names of attributes that equal a number to their (module, name).

    Attributes of the innermost module come first, those that already follow another axis come last.
    Attributes that already follow this axis are left out: they do not explain the number.
    """
    scope, resolve = trials.scope, trials.scope.table.resolve
    size = scope.table.measure(item.part)
    known: dict[str, tuple[str, str]] = {}
    unused: dict[str, tuple[str, str]] = {}
    for path in modules_of(item.node):
        module = scope.model.get_submodule(path)
        for name, value, holder in held_sizes(module):
            if value != size:
                continue
            key = (path, name) if holder is module else trials.shared(path, name, holder)
            tree = trials.attributes.get(key)
            if tree is None:
                unused.setdefault(name, key)
            elif resolve(tree) != resolve(item.part):
                known.setdefault(name, key)
    return unused | known


def _scales(trials: Trials, difference: Difference, atoms: list[int]) -> bool:
    """Record a number that follows a power of a size, and rescale the layers before it."""
    scope, node = trials.scope, difference.node
    old, new = numbers(node), difference.numbers
    if new is None or len(old) != 1 or len(new) != 1 or operator_name(node) not in ("mul", "div"):
        return False
    sizes = trials.sizes(atoms)
    for tree, _ in _summed_before(scope, node):
        ratio = tree_size(tree, sizes) / scope.table.measure(tree)
        for power in (0.5, -0.5, 1.0, -1.0):
            if ratio != 1 and abs(new[0] / old[0] / ratio**power - 1) < 1e-9:
                _follow(trials, node, power)
                return True
    return False


def _follow(trials: Trials, node: Node, power: float) -> None:
    """Rescale the layers before a scale with its size, at every place that runs the code."""
    for other in (n for n in trials.nodes if trials.places[n] == trials.places[node]):
        for tree, source in _summed_before(trials.scope, other)[:1]:
            trials.scope.scales[other] = (tree, power)
            sign = 1 if operator_name(other) == "div" else -1
            follow_size(trials.scope, other, source, tree, sign * power)


def _summed_before(scope: Scope, node: Node) -> list[tuple[Tree, Node]]:
    """List the sizes that a scale may follow, with the tensor that it multiplies.

    Candidates are the summed axis of the product before it and the last dimension of the tensor.
    """
    source = node.all_input_nodes[0]
    trees = [scope.contracted.get(source), *scope.values.get(source, [])[-1:]]
    return [(scope.table.resolve(tree), source) for tree in trees if tree is not None]
