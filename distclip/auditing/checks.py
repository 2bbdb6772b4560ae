"""Check the memory, names and optimizers of each rank, and the sums over all ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from fractions import Fraction

from ..comm.consensus import axes_contradiction
from ..comm.ranks import Ranks
from .facts import Facts
from .instances import Instance
from .problem import Findings, Problem
from .words import attribute_code, describe_count, describe_names, on_ranks, parameter_code, placement_code

__all__ = ["check_arguments", "check_counts", "check_memory", "check_names", "check_optimizers"]


def check_arguments(by_rank: Mapping[int, Facts], component_of: Mapping[int, Ranks], findings: Findings) -> None:
    """Report errors of the ranks, and a `split_over=` that differs between them."""
    by_error: dict[tuple[str, str], list[int]] = {}
    for rank, facts in by_rank.items():
        if facts.error is not None:
            by_error.setdefault(facts.error, []).append(rank)
    for (kind, message), failed in by_error.items():
        known = kind in ("LayoutError", "ArgumentError", "DisagreementError")
        fix = "" if known else "Read the traceback of that rank."
        text = message if known else f"{kind}: {message}"
        findings.add(Problem("unknown layout", text, fix, (), tuple(failed)))
    for ranks in sorted(set(component_of.values())):
        contradiction = axes_contradiction({rank: by_rank[rank].axes for rank in ranks})
        if contradiction is not None:
            what, _, fix = str(contradiction).partition(". ")
            findings.add(Problem("ranks disagree", f"{what}.", fix, (), ranks))


def check_names(by_rank: Mapping[int, Facts], findings: Findings) -> None:
    """Report parameters of one rank that share a name."""
    names: dict[str, list[int]] = {}
    for rank, facts in by_rank.items():
        for name, count in Counter(holding.name for holding in facts.holdings).items():
            if count > 1:
                names.setdefault(name, []).append(rank)
    for name, ranks in names.items():
        findings.add(
            Problem(
                "one name for two parameters",
                f"{name} is the name of several parameters on {on_ranks(ranks)}, so that policies per tensor and "
                "checkpoints mix them up.",
                "Pass (name, parameter) pairs with a name for each.",
                (name,),
                tuple(ranks),
            )
        )


def check_memory(by_rank: Mapping[int, Facts], findings: Findings) -> None:
    """Report parameters of one rank that share memory."""
    twins: dict[tuple[str, str], list[int]] = {}
    for rank, facts in by_rank.items():
        for holding in facts.holdings:
            if holding.twin is not None and holding.trainable:
                twins.setdefault((holding.twin, holding.name), []).append(rank)
    for (one, two), ranks in twins.items():
        findings.add(
            Problem(
                "tied by memory",
                f"{one} and {two} are two parameters in one memory on {on_ranks(ranks)}. Each has its own gradient, "
                "so that neither is the gradient of the tied weight, and both steps write to the same elements.",
                f"Tie the parameter and not its data: {attribute_code(two)} = {attribute_code(one)}",
                (one, two),
                tuple(ranks),
            )
        )


def check_optimizers(by_rank: Mapping[int, Facts], findings: Findings) -> None:
    """Report parameters that are never stepped or stepped twice, and stepped tensors of another model."""
    if not any(facts.has_optimizer for facts in by_rank.values()):
        if any(holding.trainable for facts in by_rank.values() for holding in facts.holdings):
            findings.note("No optimizer was passed, so that nothing shows whether every parameter is stepped.")
        return
    missing: dict[str, list[int]] = {}
    twice: dict[str, list[int]] = {}
    frozen: list[str] = []
    foreign: dict[str, list[int]] = {}
    num_stepped = 0
    for rank, facts in by_rank.items():
        if facts.error is not None:
            continue  # Not all of its parameters are known.
        if not facts.has_optimizer and any(holding.trainable for holding in facts.holdings):
            findings.note(f"Rank {rank} passed no optimizer, and other ranks did.")
        for holding in facts.holdings if facts.has_optimizer else ():
            if not holding.trainable:
                frozen += [holding.name] if holding.num_steps else []
                continue
            num_stepped += bool(holding.num_steps)
            if holding.num_steps == 0:
                missing.setdefault(holding.name, []).append(rank)
            elif holding.num_steps is not None and holding.num_steps > 1:
                twice.setdefault(holding.name, []).append(rank)
        for tensor in facts.foreign:
            foreign.setdefault(tensor, []).append(rank)
    if missing and foreign and not num_stepped:
        findings.add(
            Problem(
                "optimizer of another model",
                f"The optimizer steps none of the model's parameters, but {sum(map(len, foreign.values()))} other "
                "tensors. It was built before the model was sharded, wrapped, copied or loaded with assign=True.",
                "Build it last: optimizer = torch.optim.AdamW(model.parameters())",
                tuple(missing),
                _all_ranks(missing.values()),
            )
        )
        return
    if missing:
        names = tuple(missing)
        findings.add(
            Problem(
                "optimizer lacks a parameter",
                f"{describe_names(names)} {'is' if len(names) == 1 else 'are'} trained by no optimizer on "
                f"{on_ranks(_all_ranks(missing.values()))}. The gradient counts in the norm, and the parameter never "
                "changes.",
                f'Use optimizer.add_param_group({{"params": [{parameter_code(names[0])}]}}), or freeze it: '
                f"{parameter_code(names[0])}.requires_grad_(False)",
                names,
                _all_ranks(missing.values()),
            )
        )
    if foreign:
        findings.add(
            Problem(
                "optimizer has another parameter",
                f"The optimizer steps tensors that are not the model's: {describe_names(tuple(foreign))}, on "
                f"{on_ranks(_all_ranks(foreign.values()))}. Their gradients are not measured and not clipped.",
                "Pass the module that holds them to audit and to the clipper, for example "
                "torch.nn.ModuleList([model, head]), or leave them out of the optimizer.",
                (),
                _all_ranks(foreign.values()),
            )
        )
    if twice:
        findings.add(
            Problem(
                "stepped twice",
                f"{describe_names(tuple(twice))} is in several optimizers or parameter groups on "
                f"{on_ranks(_all_ranks(twice.values()))}, so that each step changes it several times.",
                "Remove it from all of them but one.",
                tuple(twice),
                _all_ranks(twice.values()),
            )
        )
    if frozen:
        findings.note(f"An optimizer has frozen parameters, which it skips: {describe_names(frozen)}.")


def check_counts(instances: Iterable[Instance], by_rank: Mapping[int, Facts], findings: Findings) -> None:
    """Report parameters whose elements do not count exactly once, from the probe's sums over all ranks."""
    instances = list(instances)
    counted = {member.value for one in instances for member in one.members if member.weight}
    for instance in instances:
        if not instance.trainable or instance.name in findings.explained:
            continue
        if all(member.weight == 0 for member in instance.members):
            # With Megatron's `shared`, another stage has the replica that counts.
            if instance.is_informative and not any(member.value in counted for member in instance.members):
                findings.add(_uncounted(instance))
            continue
        absent = _absent_ranks(instance, by_rank)
        idle = [rank for rank in absent if not by_rank[rank].holdings] if absent else []
        if absent and len(idle) == len(absent):
            findings.note(
                f"{on_ranks(idle).capitalize()} passed no parameters. The parts of {instance.name} that its mesh puts "
                "there do not count."
            )
            continue
        if absent:
            findings.add(_half_described(instance, absent, by_rank))
            continue
        weights = {sum((m.weight for m in members), Fraction()) for members in instance.pieces.values()}
        is_right = weights == {Fraction(instance.num_components)}
        sums_agree = instance.counted_codes == instance.expected_codes * instance.num_components
        if not (is_right and sums_agree):
            findings.add(_miscounted(instance, max(weights, key=lambda weight: abs(weight - 1))))


def _absent_ranks(instance: Instance, by_rank: Mapping[int, Facts]) -> list[int]:
    """Return the audited ranks that should hold the parameter by its layout, but do not."""
    named = {rank for member in instance.members for rank in member.holding.layout.members}
    return sorted((named - set(instance.ranks)) & by_rank.keys())


def _half_described(instance: Instance, absent: list[int], by_rank: Mapping[int, Facts]) -> Problem:
    first = instance.members[0]
    total = sum((m.weight for m in next(iter(instance.pieces.values()))), Fraction())
    if "annotate_" not in first.holding.source:
        return Problem(
            "not passed on some ranks",
            f"{instance.name} is on a mesh with {on_ranks(absent)}, which did not pass it.",
            "Pass the same parameters on every rank of their mesh.",
            (instance.name,),
            tuple(absent),
        )
    code = placement_code(first)
    twins = [
        holding.name
        for rank in absent
        for holding in by_rank[rank].holdings
        if holding.shape == first.holding.shape
        and (holding.name == instance.name or holding.values.checksum == first.holding.values.checksum)
    ]
    name = twins[0] if twins else instance.name
    return Problem(
        "missing annotation",
        f"{instance.name} is annotated on {on_ranks(instance.ranks)} as shared with {on_ranks(absent)}, where no "
        f"parameter has that annotation. It counts {describe_count(total)} there"
        f"{f', and {name} counts on {on_ranks(absent)} as well' if twins else ''}.",
        f"Call on {on_ranks(absent)} too: distclip.annotate_({parameter_code(name)}, group, [{code}])",
        tuple(dict.fromkeys((instance.name, *twins))),
        tuple(absent),
    )


def _miscounted(instance: Instance, count: Fraction) -> Problem:
    first = instance.members[0]
    numbers = (
        f"The probe sums to {float(instance.counted_codes):.12g} in place of "
        f"{instance.expected_codes * instance.num_components}."
    )
    if "annotate_" in first.holding.source and "placements" in first.holding.source:
        return Problem(
            "annotated twice",
            f"{instance.name} is a DTensor, and is annotated over an axis that its own mesh has already. Its elements "
            f"count {describe_count(count)}. {numbers}",
            f"Remove the call of annotate_ for it, or annotate it over the other axis: distclip.annotate_("
            f"{parameter_code(instance.name)}, mesh[...], [{placement_code(first)}])",
            (instance.name,),
            instance.ranks,
        )
    missing = sorted(set(first.component) - set(instance.ranks))
    where = f" It is on {on_ranks(instance.ranks)} and not on {on_ranks(missing)}." if missing else ""
    return Problem(
        "not counted once",
        f"Elements of {instance.name} count {describe_count(count)}.{where} {numbers}",
        "Declare the ranks that hold different parameters, split_over=, or this one's shards and replicas: "
        f"distclip.annotate_({parameter_code(instance.name)}, mesh[...], [Shard(dim)])",
        (instance.name,),
        instance.ranks,
    )


def _uncounted(instance: Instance) -> Problem:
    return Problem(
        "never counted",
        f"{instance.name} is tagged `shared` on {on_ranks(instance.ranks)}, and no other rank has a replica of it that "
        "counts.",
        f"Remove the attribute: del {parameter_code(instance.name)}.shared, or add up the gradients of its replicas "
        "and tag all of them but one.",
        (instance.name,),
        instance.ranks,
    )


def _all_ranks(lists: Iterable[list[int]]) -> tuple[int, ...]:
    """Return the ranks of several lists, ascending."""
    return tuple(sorted({rank for ranks in lists for rank in ranks}))
