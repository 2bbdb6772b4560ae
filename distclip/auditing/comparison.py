"""Compare the values of parameters over ranks: replicas must be equal, and different parameters should differ.

Values show what the arguments do not. Replicas with different values are stages, experts or shards that no argument
declares. Different parameters with equal values can be replicas that count several times. They can also be different
parameters that started from one seed, which the values alone cannot distinguish.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..comm.ranks import EXPERTS, STAGES, TENSORS, Ranks, is_data_axis, is_model_axis, is_stage_axis
from .facts import Facts, Holding
from .instances import Instance, Member
from .lines import AxisLines, axis_lines, find_axis
from .problem import Findings, Problem
from .words import describe_names, describe_ranks, on_ranks, parameter_code, placement_code

__all__ = ["compare_values"]

_EXPERT_NAME = re.compile(r"expert|moe", flags=re.IGNORECASE)


def compare_values(
    instances: Sequence[Instance], by_rank: Mapping[int, Facts], component_of: Mapping[int, Ranks], findings: Findings
) -> None:
    """Report replicas that differ, and parameters that count several times.

    Args:
        instances: parameters, as the engine counts them.
        by_rank: facts of every rank.
        component_of: ranks whose norm each rank takes part in.
        findings: what was found so far.
    """
    comparison = _Comparison(instances, by_rank, component_of, findings)
    comparison.check_trainable()
    comparison.check_declared_replicas()
    comparison.check_assumed_replicas()
    comparison.check_axes()
    comparison.check_ties()
    comparison.note_assumptions()


@dataclass(frozen=True)
class _Conflict:
    """A parameter of which ranks must hold replicas, but do not.

    Args:
        name: name of the parameter.
        held: the member of each rank, None where a rank does not have the parameter.
        is_between: whether the ranks compute separate norms, so that only ranks at one position of `split_over=` are
            compared.
    """

    name: str
    held: dict[int, Member | None]
    is_between: bool = False

    def differs(self, one: int, two: int) -> bool | None:
        """Return whether two ranks hold different tensors.

        None if they hold different pieces, or if one of them is not among the ranks.
        """
        if one not in self.held or two not in self.held:
            return None
        a, b = self.held[one], self.held[two]
        if a is None or b is None:
            return None if a is b else True
        if a.piece != b.piece or (self.is_between and a.coordinates != b.coordinates):
            return None
        return not a.equals(b)


class _Comparison:
    def __init__(
        self,
        instances: Sequence[Instance],
        by_rank: Mapping[int, Facts],
        component_of: Mapping[int, Ranks],
        findings: Findings,
    ) -> None:
        self.all_instances = instances
        self.instances = [instance for instance in instances if instance.trainable]
        self.by_rank, self.component_of, self.findings = by_rank, component_of, findings
        self.axes = axis_lines(by_rank)
        self.given = sorted({axis.name or "" for facts in by_rank.values() for axis in facts.axes})
        self.has_axes = any(facts.axes for facts in by_rank.values())
        # Pieces that an annotation or an attribute declares count as different tensors too. Pieces of a DTensor do not.
        self.identity = {
            (m.rank, m.position): (i, m.holding.cuts) for i, one in enumerate(self.instances) for m in one.members
        }

    # ---- Replicas ----

    def check_trainable(self) -> None:
        """Report parameters that are frozen on some of their ranks."""
        # Ranks that compute separate norms can hold replicas too.
        groups: dict[Any, list[Member]] = {}
        for i, instance in enumerate(self.all_instances):
            first = instance.members[0]
            own = i if instance.num_components == 1 and len(first.component) > 1 else first.coordinates
            groups.setdefault((first.name, own), []).extend(instance.members)
        for (name, _), members in groups.items():
            frozen = sorted({member.rank for member in members if not member.holding.trainable})
            trained = sorted({member.rank for member in members if member.holding.trainable})
            if frozen and trained:
                self.findings.add(
                    Problem(
                        "frozen on some ranks",
                        f"{name} requires a gradient on {on_ranks(trained)}, and is frozen on {on_ranks(frozen)}.",
                        f"Call {parameter_code(name)}.requires_grad_() with one value on all ranks.",
                        (name,),
                        tuple(frozen),
                    )
                )

    def check_declared_replicas(self) -> None:
        """Report replicas that a layout declares, but whose values differ."""
        for instance in self.instances:
            pair = next((pair for pair in _unequal_pairs(instance) if pair[0].declares(pair[1].rank)), None)
            if pair is None or instance.name in self.findings.explained:
                continue
            one, two = pair
            found = f"{instance.name} is declared as replicated over {on_ranks((one.rank, two.rank))} by " + (
                f"{one.holding.source}, and {_difference(one, two)}."
            )
            if "annotate_" in one.holding.source:
                axis = self._axis_of_shards(instance, equal=True)
                self.findings.add(
                    Problem(
                        "wrong mesh",
                        found + (f" Values are equal along {axis}." if axis else ""),
                        f"Annotate it over the ranks that hold replicas: distclip.annotate_("
                        f"{parameter_code(instance.name)}, {axis.code('tp') if axis else 'mesh[...]'}, [Replicate()]), "
                        "or use Shard(dim) if these ranks hold shards.",
                        (instance.name,),
                        instance.ranks,
                    )
                )
            else:
                # Where both apply, the engine counts by the placement.
                given = next((axis for axis in self.by_rank[one.rank].axes if two.rank in axis.ranks), None)
                contradiction = f" split_over= declares {given} as different, and the placement wins." if given else ""
                plain = ", or plain tensors if they hold different parameters" if given else ""
                self.findings.add(
                    Problem(
                        "replicas differ",
                        found + contradiction,
                        f"Send the values of one rank to the others before training: torch.distributed.broadcast("
                        f"{parameter_code(instance.name)}, src={one.rank}), or initialize all ranks from one seed. If "
                        f"the ranks hold different parts, use Shard(dim) in place of Replicate(){plain}.",
                        (instance.name,),
                        instance.ranks,
                    )
                )

    def check_assumed_replicas(self) -> None:
        """Report tensors that count as replicas for lack of a declaration, but differ."""
        conflicts = [*self._conflicts_within(), *self._conflicts_between()]
        conflicts = [conflict for conflict in conflicts if conflict.name not in self.findings.explained]
        if not conflicts:
            return
        annotated = [conflict for conflict in conflicts if self._is_annotated(conflict)]
        for conflict in annotated:
            self._report_wrong_mesh(conflict)
        conflicts = [conflict for conflict in conflicts if conflict not in annotated]
        if conflicts:
            self._report_missing(conflicts)

    def _conflicts_within(self) -> list[_Conflict]:
        """Return conflicts between ranks that add up to one norm."""
        found = []
        for instance in self.instances:
            if any(not one.declares(two.rank) for one, two in _unequal_pairs(instance)):
                found.append(_Conflict(instance.name, {member.rank: member for member in instance.members}))
                continue
            # Other ranks that no axis separates must hold the parameter too, unless it counts once without them.
            should_hold = self._ranks_that_should_hold(instance) if self._is_short(instance) else set()
            if missing := should_hold.difference(instance.ranks):
                held: dict[int, Member | None] = {member.rank: member for member in instance.members}
                found.append(_Conflict(instance.name, held | dict.fromkeys(missing)))
        return found

    def _is_short(self, instance: Instance) -> bool:
        return any(0 < sum(m.weight for m in members) < 1 for members in instance.pieces.values())

    def _ranks_that_should_hold(self, instance: Instance) -> set[int]:
        first = instance.members[0]
        layout, own = first.holding.layout, self.by_rank[first.rank].axes
        ranks = set()
        for rank in first.component:
            axes = self.by_rank[rank].axes
            if self.by_rank[rank].holdings and len(axes) == len(own):
                places = zip(own, axes, layout.split, layout.cut, strict=True)
                if all(
                    not split or cut or mine.ranks.index(first.rank) == theirs.ranks.index(rank)
                    for mine, theirs, split, cut in places
                ):
                    ranks.add(rank)
        return ranks

    def _conflicts_between(self) -> list[_Conflict]:
        """Return conflicts between ranks that compute separate norms."""
        components = {self.component_of[rank] for rank in self.by_rank}
        held: dict[str, dict[int, Member | None]] = {}
        for instance in self.instances:
            for member in instance.members:
                held.setdefault(member.name, {})[member.rank] = member
        with_parameters = [c for c in components if any(self.by_rank[rank].holdings for rank in c)]
        if len(with_parameters) < 2:
            return []
        conflicts = []
        for name, members in held.items():
            present = [component for component in with_parameters if any(rank in members for rank in component)]
            if len(present) < len(with_parameters):
                absent = [rank for component in with_parameters if component not in present for rank in component]
                conflicts.append(_Conflict(name, members | dict.fromkeys(absent), is_between=True))
                continue
            conflict = _Conflict(name, members, is_between=True)
            by_piece: dict[Any, list[Member]] = {}
            for holder in members.values():
                if holder is not None:
                    by_piece.setdefault((holder.piece, holder.coordinates), []).append(holder)
            pieces_fit = all(len({m.component for m in same}) == len(with_parameters) for same in by_piece.values())
            is_equal = all(not conflict.differs(same[0].rank, m.rank) for same in by_piece.values() for m in same)
            if not (pieces_fit and is_equal):
                conflicts.append(conflict)
        return conflicts

    def _is_annotated(self, conflict: _Conflict) -> bool:
        return any(member is not None and "annotate_" in member.holding.source for member in conflict.held.values())

    def _report_wrong_mesh(self, conflict: _Conflict) -> None:
        members = [member for member in conflict.held.values() if member is not None]
        first = next(member for member in members if "annotate_" in member.holding.source)
        unannotated = [m.rank for m in members if "annotate_" not in m.holding.source]
        axis = self._axis_of_conflicts([conflict], (TENSORS,))
        where = axis.code("tp") if axis else "mesh[...]"
        if unannotated:
            kind, what = (
                "missing annotation",
                f"annotated on {on_ranks([first.rank])} and not on {on_ranks(unannotated)}",
            )
        else:
            spread = first.holding.spreads[-1]
            kind, what = "wrong mesh", f"annotated over {on_ranks(spread.ranks)}"
        self.findings.add(
            Problem(
                kind,
                f"{conflict.name} is {what}, and {self._describe_difference(conflict)}, which count as replicas."
                + (f" Values differ along {axis}." if axis else ""),
                f"Annotate it over the ranks that hold its shards, on all of them: distclip.annotate_("
                f"{parameter_code(conflict.name)}, {where}, [{placement_code(first)}])",
                (conflict.name,),
                tuple(sorted(conflict.held)),
            )
        )

    def _report_missing(self, conflicts: list[_Conflict]) -> None:
        """Report different parameters, or shards, that nothing declares as such."""
        names = tuple(dict.fromkeys(conflict.name for conflict in conflicts))
        ranks = tuple(sorted({rank for conflict in conflicts for rank in conflict.held}))
        is_absent = any(member is None for conflict in conflicts for member in conflict.held.values())
        shapes_differ = any(
            len({m.holding.whole for m in conflict.held.values() if m is not None}) > 1 for conflict in conflicts
        )
        are_experts = all(_EXPERT_NAME.search(name) for name in names)
        equal = self._equal_plain_names(names)
        preferred: tuple[str, ...] = (STAGES, EXPERTS, TENSORS)
        if are_experts or (equal and not is_absent):
            preferred = (EXPERTS, TENSORS, STAGES) if are_experts else (TENSORS, EXPERTS, STAGES)
        axis = self._axis_of_conflicts(conflicts, preferred)
        placeholder = "pp" if is_absent or not (are_experts or equal) else "ep" if are_experts else "tp"
        code = axis.code(placeholder) if axis else f'mesh["{placeholder}"]'
        along = f" They differ along {axis}." if axis else f" {code} stands for the mesh axis or group of these ranks."
        text = f"{self._describe_difference(conflicts[0])}"
        more = f" So do {len(names) - 1} more: {describe_names(names[1:])}." if len(names) > 1 else ""
        example = f"{names[0]}: {text}.{more}{along}"
        wrong = self._wrong_axis()
        if wrong is not None:
            self.findings.add(
                Problem(
                    "wrong axis",
                    f"split_over= contains {wrong}, along which nothing differs. {example} They count as replicas.",
                    f"Use split_over={code}, here and in the clipper.",
                    names,
                    ranks,
                )
            )
            return
        given = [f'mesh["{name}"]' for name in self.given if name]
        argument = f"split_over=[{', '.join([*given, code])}]" if given else f"split_over={code}"
        tags = any("attributes" in one.members[0].holding.source for one in self.instances)
        partly = bool(equal) and not is_absent and not shapes_differ and not are_experts
        if partly or tags:
            shard = f"distclip.annotate_({parameter_code(names[0])}, {code}, [Shard(dim)])"
            tag = f" or set {parameter_code(names[0])}.tensor_model_parallel = True" if tags else ""
            self.findings.add(
                Problem(
                    "missing annotation",
                    f"Plain tensors without an annotation count as replicas, and these differ. {example} Equal on "
                    f"these ranks: {describe_names(equal) or 'none'}.",
                    f"If they are shards, use {shard}{tag}. If they are different parameters (experts, stages), use "
                    f"{argument}, here and in the clipper.",
                    names,
                    ranks,
                )
            )
            return
        other = ""
        if not is_absent and not shapes_differ:
            other = (
                f" If they are shards of one parameter, use distclip.annotate_({parameter_code(names[0])}, {code}, "
                "[Shard(dim)]). If they must be replicas, broadcast them from one rank before training."
            )
        self.findings.add(
            Problem(
                "missing split_over",
                f"Ranks hold different parameters, and nothing declares it, so that they count as replicas. {example}",
                f"Use {argument}, here and in the clipper.{other}"
                + ("" if self._is_one_component() else " For separate models, pass comm= of each to audit."),
                names,
                ranks,
            )
        )

    def _equal_plain_names(self, others: Collection[str]) -> list[str]:
        """Return the plain parameters that are equal on several ranks."""
        holders: dict[str, set[int]] = {}
        for instance in self.instances:
            if instance.name not in others and not instance.members[0].holding.layout.groups:
                holders.setdefault(instance.name, set()).update(instance.ranks)
        return [name for name, ranks in holders.items() if len(ranks) > 1]

    def _is_one_component(self) -> bool:
        return len({self.component_of[rank] for rank in self.by_rank}) == 1

    def _wrong_axis(self) -> str | None:
        """Return an axis of `split_over=` along which all values are equal, or that separates nothing."""
        for i, axis in enumerate(self._given_axes()):
            pairs = list(self._pairs_along(i))
            informative = [pair for pair in pairs if pair[0].holding.is_informative]
            if (informative and all(one.equals(two) for one, two in pairs)) or (not pairs and self._is_inside(i)):
                return axis
        return None

    def _given_axes(self) -> list[str]:
        axes = next((facts.axes for facts in self.by_rank.values() if facts.axes), ())
        return [f'mesh["{axis.name}"]' if axis.name else f"the group of {on_ranks(axis.ranks)}" for axis in axes]

    def _is_inside(self, i: int) -> bool:
        """Return whether an axis of `split_over=` is part of the meshes of all parameters."""
        return all(
            set(self.by_rank[m.rank].axes[i].ranks) <= m.holding.layout.members
            for one in self.instances
            for m in one.members
            if i < len(self.by_rank[m.rank].axes)
        )

    def _pairs_along(self, i: int) -> list[tuple[Member, Member]]:
        """Return members of different parameters under one name, on two ranks along an axis of `split_over=`."""
        held = {(m.rank, m.name): m for one in self.instances for m in one.members}
        pairs = []
        for (rank, name), member in held.items():
            axes = self.by_rank[rank].axes
            for other in axes[i].ranks if i < len(axes) else ():
                partner = held.get((other, name))
                if other > rank and partner is not None and self._are_apart(member, partner):
                    pairs.append((member, partner))
        return pairs

    def _are_apart(self, one: Member, two: Member) -> bool:
        """Return whether two tensors count as different ones."""
        return self.identity[one.rank, one.position] != self.identity[two.rank, two.position]

    def _axis_of_conflicts(self, conflicts: Sequence[_Conflict], preferred: Collection[str]) -> AxisLines | None:
        ranks = sorted({rank for conflict in conflicts for rank in conflict.held})

        def differs(one: int, two: int) -> bool:
            return any(conflict.differs(one, two) for conflict in conflicts)

        return find_axis(self.axes, ranks, differs, lambda one, two: not differs(one, two), preferred)

    def _axis_of_shards(self, instance: Instance, *, equal: bool) -> AxisLines | None:
        """Return the axis along which the values of a parameter are equal, or different."""
        held: dict[int, Member | None] = {}
        for one in self.instances:
            held |= {member.rank: member for member in one.members if member.name == instance.name}

        def is_so(one: int, two: int) -> bool:
            a, b = held.get(one), held.get(two)
            return a is not None and b is not None and a.equals(b) is equal

        return find_axis(self.axes, sorted(held), is_so, lambda one, two: not is_so(one, two), (TENSORS,))

    def _describe_difference(self, conflict: _Conflict) -> str:
        ranks = sorted(conflict.held)
        for one, two in itertools.combinations(ranks, 2):
            if conflict.differs(one, two):
                a, b = conflict.held[one], conflict.held[two]
                if a is None or b is None:
                    has, lacks = (two, one) if a is None else (one, two)
                    return f"it is on rank {has} and not on rank {lacks}"
                return _difference(a, b)
        return f"it is cut in another way on some of {on_ranks(ranks)}"

    # ---- Different parameters with equal values ----

    def check_axes(self) -> None:
        """Report an axis of `split_over=` along which ranks hold replicas."""
        for i, words in enumerate(self._given_axes()):
            pairs = [pair for pair in self._pairs_along(i) if pair[0].name not in self.findings.explained]
            informative = [pair for pair in pairs if pair[0].holding.is_informative]
            if not informative or not all(one.equals(two) for one, two in pairs):
                continue
            axes = next(facts.axes for facts in self.by_rank.values() if facts.axes)
            name = axes[i].name or ""
            names = tuple(dict.fromkeys(one.name for one, _ in informative))
            others_differ = any(
                not one.equals(two)
                for j in range(len(axes))
                if j != i
                for one, two in self._pairs_along(j)
                if one.holding.is_informative and one.value[:2] == two.value[:2]
            )
            if is_model_axis(name) or not (is_data_axis(name) or others_differ):
                self.findings.note(
                    f"Assumed: {describe_names(names)} and all other values are equal along {words}, which split_over= "
                    "declares as different. Ranks that started from one seed look so too. If they are replicas, each "
                    f"counts {len(axes[i].ranks)} times: remove the axis from split_over=."
                )
                self.findings.explained.update(names)
                continue
            rest = [text for j, text in enumerate(self._given_axes()) if j != i]
            fix = (
                f"Use split_over={rest[0] if len(rest) == 1 else '[' + ', '.join(rest) + ']'}"
                if rest
                else ("Remove split_over=")
            )
            self.findings.add(
                Problem(
                    "wrong axis",
                    f"split_over= contains {words}, whose ranks hold replicas: {describe_names(names)} and all other "
                    f"values are equal on them. Each element counts {len(axes[i].ranks)} times.",
                    f"{fix}, here and in the clipper.",
                    names,
                    tuple(sorted({rank for facts in self.by_rank.values() for rank in facts.axes[i].ranks})),
                )
            )

    def check_ties(self) -> None:
        """Report a parameter that several stages share and that counts on each of them."""
        by_value: dict[Any, list[Member]] = {}
        for instance in self.instances:
            for member in instance.members:
                if member.holding.is_informative and member.weight and member.name not in self.findings.explained:
                    by_value.setdefault(member.value, []).append(member)
        reported: set[str] = set()
        for members in by_value.values():
            first = members[0]
            other = next(
                (
                    m
                    for m in members
                    if m.rank != first.rank and self._are_apart(first, m) and m.component == first.component
                ),
                None,
            )
            if other is None or first.name in reported:
                continue
            if any(m.holding.layout.members >= {first.rank, other.rank} for m in (first, other)):
                own = self.identity[first.rank, first.position][0]
                if own != self.identity[other.rank, other.position][0]:
                    continue  # The annotation is on one of them only, which the counts show.
            reported |= {first.name, other.name}
            self._report_tie(first, other, [m.rank for m in members])

    def _report_tie(self, one: Member, two: Member, ranks: list[int]) -> None:
        a, b = self.by_rank[one.rank].holdings, self.by_rank[two.rank].holdings
        names = one.name if one.name == two.name else f"{one.name} and {two.name}"
        # The annotation needs a group of exactly the ranks that hold the parameter.
        holders = frozenset(ranks)
        axes = [AxisLines(axis.name, tuple(filter(holders.issuperset, axis.lines))) for axis in self.axes]
        along = [axis.name or "" for axis in self.by_rank[one.rank].axes if two.rank in axis.ranks]
        patterns = (*(rf"^{re.escape(name)}$" for name in along if name), STAGES)
        axis = find_axis(
            [axis for axis in axes if axis.lines],
            {one.rank, two.rank},
            lambda *pair: True,
            lambda *pair: True,
            patterns,
        )
        # The program may have other meshes, whose axes have nothing to do with stages.
        is_known = axis is not None and any(re.search(pattern, axis.name) for pattern in patterns if axis.name)
        group = axis.code("pp") if axis and is_known else f"torch.distributed.new_group({sorted(holders)})"
        line = f"distclip.annotate_({parameter_code(one.name)}, {group}, [Replicate()])"
        same = f"{names} {_be([one.name] if one.name == two.name else [one.name, two.name])} equal on {on_ranks(ranks)}"
        if same_seed_explains(a, b) or (_are_clones(one.name, two.name) and not _started_apart(a, b)):
            self.findings.note(
                f"Assumed: {same}, and counts on each of them, because split_over= declares them as different. Ranks "
                f"that started from one seed look so too. If it is tied, add up its gradients and use {line}."
            )
            return
        annotated = next((m for m in (one, two) if "annotate_" in m.holding.source), None)
        is_stage = not any(is_model_axis(name) and not is_stage_axis(name) for name in along)
        kind = "wrong mesh" if annotated else "tied without annotation" if is_stage else "missing annotation"
        spread = ""
        if annotated is not None:
            covered = annotated.holding.layout.members
            left_out = holders - covered
            spread = (
                f" Its annotation covers {on_ranks(covered)}{f' and not {on_ranks(left_out)}' if left_out else ''}."
            )
        tag = "" if is_stage else ", or set Megatron's attributes (tensor_model_parallel=False) on all parameters"
        self.findings.add(
            Problem(
                kind,
                f"{same} bit by bit, while other parameters of these ranks differ. So it is one "
                f"{'tied' if is_stage else 'replicated'} parameter, and it counts on each of them.{spread}",
                f"Use {line} on each of these ranks{', and add up its gradients' if is_stage else ''}{tag}.",
                tuple(dict.fromkeys((one.name, two.name))),
                tuple(sorted(holders)),
            )
        )

    # ---- What numbers cannot prove ----

    def note_assumptions(self) -> None:
        """Note replicas that no layout declares."""
        names: dict[bool, list[str]] = {True: [], False: []}
        held: dict[str, list[Member]] = {}
        for instance in self.instances:
            held.setdefault(instance.name, []).extend(instance.members)
        for name, members in held.items():
            merged = Instance(members)
            if merged.is_assumed and name not in self.findings.explained and not self._is_split(members):
                names[merged.is_informative].append(name)
        if names[True]:
            self.findings.note(
                f"Assumed, because no layout describes them: replicas of {describe_names(names[True])}. Their values "
                "are equal on all their ranks."
            )
        if names[False]:
            self.findings.note(
                f"Assumed, because no layout describes them: replicas of {describe_names(names[False])}. Their values "
                "are constant, so that numbers cannot tell replicas from different parameters. Repeat the audit after "
                "a step, or declare them."
            )

    def _is_split(self, members: Sequence[Member]) -> bool:
        by_component: dict[Ranks, set[int]] = {}
        for m in members:
            by_component.setdefault(m.component, set()).add(self.identity[m.rank, m.position][0])
        return any(len(found) > 1 for found in by_component.values())


def same_seed_explains(one: Sequence[Holding], two: Sequence[Holding]) -> bool:
    """Return whether equal values of two ranks can be due to one seed.

    Ranks that start from one seed and create different parameters in order have equal values up to the first parameter
    whose size differs, and no equal values after it.

    Args:
        one, two: parameters of the two ranks.
    """
    a, b = ([h for h in holdings if h.is_informative] for holdings in (one, two))
    equal = 0
    while equal < min(len(a), len(b)) and _same(a[equal], b[equal]):
        equal += 1
    if not equal or (equal < min(len(a), len(b)) and a[equal].num_elements == b[equal].num_elements):
        return False
    later = {h.values.checksum for h in a[equal:]} & {h.values.checksum for h in b[equal:]}
    return not later


def _same(one: Holding, two: Holding) -> bool:
    return one.shape == two.shape and one.values.checksum == two.values.checksum


def _are_clones(one: str, two: str) -> bool:
    """Return whether two names belong to repeated layers, which can be copies of one layer."""
    return re.sub(r"\d+", "#", one) == re.sub(r"\d+", "#", two) and any(part.isdigit() for part in one.split("."))


def _started_apart(one: Sequence[Holding], two: Sequence[Holding]) -> bool:
    """Return whether two ranks have parameters of one kind and shape, none of which are equal."""
    kinds: list[dict[Any, set[int | None]]] = []
    for holdings in (one, two):
        kinds.append({})
        for h in holdings:
            if h.is_informative:
                kinds[-1].setdefault((re.sub(r"\d+", "#", h.name), h.shape), set()).add(h.values.checksum)
    return any(kind in kinds[1] and not values & kinds[1][kind] for kind, values in kinds[0].items())


def _unequal_pairs(instance: Instance) -> list[tuple[Member, Member]]:
    """Return pairs of members of one norm that hold the same piece with different values.

    For any two values, the result has one pair that the layout declares as replicas and one that it does not, if such
    pairs exist.
    """
    pairs = []
    for members in instance.pieces.values():
        by_value: dict[Any, list[Member]] = {}
        for member in members:
            by_value.setdefault((member.component, *member.value), []).append(member)
        # Usually there is one value. If there are many, a few of them are enough.
        for some, others in itertools.combinations(list(by_value.values())[:8], 2):
            if some[0].component == others[0].component and not some[0].equals(others[0]):
                both = list(itertools.product(some, others))
                for is_declared in (True, False):
                    pairs += [pair for pair in both if pair[0].declares(pair[1].rank) is is_declared][:1]
    return pairs


def _difference(one: Member, two: Member) -> str:
    if one.holding.shape != two.holding.shape:
        shapes = list(one.holding.shape), list(two.holding.shape)
        return f"its shape is {shapes[0]} on rank {one.rank} and {shapes[1]} on rank {two.rank}"
    if one.holding.dtype != two.holding.dtype:
        return f"its dtype is {one.holding.dtype} on rank {one.rank} and {two.holding.dtype} on rank {two.rank}"
    return f"its values differ on ranks {describe_ranks((one.rank, two.rank))}"


def _be(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"
