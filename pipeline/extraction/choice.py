"""What becomes of each changed parameter: low rank, saved whole, or a reason to stop."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from pipeline.extraction.differences import Change
from pipeline.extraction.pairs import Pair
from pipeline.extraction.parameters import Parameter
from pipeline.ground.base_modules import prefixes
from pipeline.ground.deltas.lora_family import DECLARED
from pipeline.ground.errors import Refused
from pipeline.ground.model_modules import Kind, Model
from pipeline.ground.names import matches, nearest
from pipeline.ground.report import Finding


class Rest(Enum):
    """What to do with a changed weight that is neither targeted nor saved."""

    refuse = "refuse"
    skip = "skip"
    save = "save"


@dataclass(frozen=True)
class Chosen:
    """What an adapter will hold."""

    lora: tuple[Parameter, ...]
    saved: tuple[Parameter, ...]  # all parameters of modules that are saved whole
    biases: tuple[Parameter, ...]  # of modules with LoRA
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class Asked:
    """What a recipe says of it."""

    targeted: Sequence[str] | None
    saved: Sequence[str] | None
    rest: Rest
    exceeds: Callable[[Parameter], bool]
    """whether the rank for all modules is more than a parameter's matrix has"""

    def takes_lora(self, p: Parameter) -> bool:
        """Whether it is to be of low rank; a table or a router that is too small for the rank need not be."""
        if self.targeted is not None:
            return p.is_meant(self.targeted)
        return p.takes_lora and not (p.place.kind in (Kind.parameter, Kind.embedding) and self.exceeds(p))


def choose(
    parameters: Sequence[Parameter],
    changes: Mapping[str, Change] | None,
    asked: Asked,
    model: Model | None = None,
) -> Chosen:
    """Sorts the changed ones; Refused, with every reason. Without `changes` all count as changed."""
    targeted, saved, rest = asked.targeted, asked.saved, asked.rest
    last = {parameter.module.rpartition(".")[2] for parameter in parameters}
    wrong = [
        f"{key}: '{pattern}' matches no module{nearest(pattern, last)}"
        for key, patterns in (("targeted_modules", targeted), ("saved_modules", saved))
        for pattern in patterns or ()
        if not any(parameter.is_meant([pattern]) for parameter in parameters)
    ]
    modules: defaultdict[str, list[Parameter]] = defaultdict(list)
    for parameter in parameters:
        modules[parameter.module].append(parameter)
    lora: list[Parameter] = []
    whole: list[Parameter] = []
    biases: list[Parameter] = []
    left: list[Parameter] = []
    doubly: list[str] = []
    unable: list[str] = []
    findings: list[Finding] = []
    for module, held in modules.items():
        changed = [p for p in held if changes is None or p.change(changes).changed]
        if not changed:
            continue
        to_save = [p for p in changed if p.is_meant(saved or ())]
        to_target = [p for p in changed if asked.takes_lora(p)]
        if targeted is not None and any(p in to_save for p in to_target):
            doubly.append(module)
            continue
        matrices = [p for p in to_target if p.takes_lora and p not in to_save]
        vectors = [p for p in changed if p not in matrices]
        bias_only = bool(matrices) and all(p.place.parameter == "bias" for p in vectors)
        bare = bool(matrices) and all(p.place.kind is Kind.parameter for p in matrices)
        reason = _no_lora(module, matrices, vectors if bare or not bias_only else [], modules, changes)
        if to_save or (to_target and not matrices) or (targeted is None and not matrices and _grew(changed)):
            whole += held
        elif matrices and not reason:
            lora += matrices
            biases += [p for p in held if p.place.parameter == "bias" and not bare]
        elif matrices and targeted is not None and rest is not Rest.save:
            unable.append(f"{reason}; add {module} to saved_modules")
        elif rest is Rest.save:
            whole += held
        else:
            left += changed
    whole, told = _with_what_is_within(whole, parameters, model, changes)
    kept = {p.name for p in whole}
    lora, biases, left = ([p for p in some if p.name not in kept] for some in (lora, biases, left))
    findings += told
    wrong += [*_meant_twice(doubly), *_unable(unable), *_shared_by_many(whole, model, changes)]
    if left and rest is Rest.refuse:
        wrong.append(_unmeant(left, changes))
    elif left:
        findings.append(Finding(f"{_unmeant(left, changes, ends=False)}; left out by extract.rest=skip"))
    if wrong:
        raise Refused(*wrong)
    if not any(p.change(changes).changed for p in biases) if changes is not None else True:
        biases = []
    if not lora and not whole:
        raise Refused("targeted_modules: none of what is meant changed; there is nothing to extract")
    grown = [p for p in whole if any(pair.resized for pair in p.pairs)]
    if grown:
        pair = grown[0].pairs[0]
        rows = f"{pair.tuned.shape[0]} rows, the base's {pair.base.shape[0]}"
        findings.append(Finding(f"{grown[0].name} has {rows}: it is saved whole"))
    findings += _merged_twice(lora, parameters)
    return Chosen(tuple(lora), tuple(whole), tuple(biases), tuple(findings))


def check_patterns(parameters: Sequence[Parameter], tables: Mapping[str, Mapping[str, float]]) -> None:
    """Refused for patterns of rank_pattern and alpha_pattern that mean nothing that LoRA can be put on."""
    able = [p for p in parameters if p.place.kind is not Kind.other]
    last = {p.module.rpartition(".")[2] for p in able}
    wrong = [
        f"{key}: '{pattern}' matches no module with a matrix{nearest(pattern, last)}"
        for key, table in tables.items()
        for pattern in table
        if not any(matches(name, pattern) for p in able for name in (p.rank_name, p.module))
    ]
    if wrong:
        raise Refused(*wrong)


def _no_lora(
    module: str,
    matrices: Sequence[Parameter],
    vectors: Sequence[Parameter],
    modules: Mapping[str, Sequence[Parameter]],
    changes: Mapping[str, Change] | None,
) -> str:
    """Why PEFT cannot keep these matrices of a module as LoRA, or nothing."""
    if vectors:
        return f"{vectors[0].name} changed beside a matrix of {module}, which no LoRA holds"
    bare = [p for p in matrices if p.place.kind is Kind.parameter]
    if len(bare) > 1 and not {p.place.parameter for p in bare} <= set(DECLARED):
        return f"{bare[0].name} and {bare[1].name} changed, bare parameters whose order no adapter tells"
    beneath = (p for name, held in modules.items() if bare and name.startswith(f"{module}.") for p in held)
    if below := next((p for p in beneath if changes is None or p.change(changes).changed), None):
        return f"{below.name} changed beneath the bare parameter {bare[0].name}, and PEFT would rename it"
    return ""


def _with_what_is_within(
    whole: Sequence[Parameter],
    parameters: Sequence[Parameter],
    model: Model | None,
    changes: Mapping[str, Change] | None,
) -> tuple[list[Parameter], list[Finding]]:
    """All parameters of the modules that are saved whole: PEFT saves the modules in them along."""
    tops = {p.module for p in whole}
    tops = {name for name in tops if not any(above in tops for above in list(prefixes(name))[:-1])}
    found = list(whole)
    kept = {p.name for p in whole}
    findings = []
    within = [p for p in parameters if p.name not in kept and tops.intersection(prefixes(p.module))]
    found += within
    if taken := [p for p in within if p.takes_lora and (changes is None or p.change(changes).changed)]:
        top = next(iter(tops.intersection(prefixes(taken[0].module))))
        findings.append(
            Finding(f"{taken[0].name} is saved whole, as part of {top} ({len(taken)} matrices so)")
        )
    return found, findings


def _meant_twice(modules: Sequence[str]) -> Iterator[str]:
    if modules:
        more = f" ({len(modules)} such modules)" if len(modules) > 1 else ""
        yield f"saved_modules: {modules[0]} is meant by targeted_modules too{more}; leave it in one"


def _unable(reasons: Sequence[str]) -> Iterator[str]:
    if reasons:
        yield f"finetune: {reasons[0]}" + (f" ({len(reasons)} such modules)" if len(reasons) > 1 else "")


def _merged_twice(lora: Sequence[Parameter], parameters: Sequence[Parameter]) -> Iterator[Finding]:
    """What users of PEFT have to know of embeddings that a head shares, where it has no weight of its own."""
    names = {p.name for p in parameters}
    for p in lora:
        if p.num_copies > 1 and not names.intersection(p.place.shared):
            yield Finding(
                f"{p.name} is shared with {p.place.shared[0]}: PEFT 0.21 runs such LoRA rightly, but its "
                f"merge_and_unload adds it twice; merge it here, or name {p.module} in saved_modules"
            )


def _shared_by_many(
    whole: Sequence[Parameter], model: Model | None, changes: Mapping[str, Change] | None
) -> list[str]:
    """Sentences about tensors that several modules share, of which PEFT would save a copy for one alone."""
    wrong = []
    ways_out = "no adapter that PEFT loads changes all of them; extract.rest=skip leaves it out"
    for p in whole:
        if p.place.is_one_of_many and (changes is None or p.change(changes).changed):
            wrong.append(f"finetune: {p.name} changed, which is also {_listed(p.place.shared)}; {ways_out}")
    names, tops = {p.name for p in whole}, {p.module for p in whole}
    for place in model.places.values() if model and not wrong else ():
        if place.shared and place.name not in names and tops.intersection(prefixes(place.module)):
            owner = next(iter(tops.intersection(prefixes(place.module))))
            told = f"finetune: {owner} can only be saved whole, but its {place.name} is also"
            wrong.append(f"{told} {_listed(place.shared)}; {ways_out}")
    return wrong


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " and " * (len(names) > 1) + names[-1]


def _grew(changed: Iterable[Parameter]) -> bool:
    return any(pair.resized for parameter in changed for pair in parameter.pairs)


def _unmeant(left: Sequence[Parameter], changes: Mapping[str, Change] | None, ends: bool = True) -> str:
    first = left[0]
    much = ""
    if changes is not None:
        first = max(left, key=lambda p: min(p.change(changes).relative, 1e9))
        much = f" by {first.change(changes).relative:.2g} of its norm"
    told = f"finetune: {first.name} changed{much}, but neither targeted_modules nor saved_modules means it"
    told += f" ({len(left)} such weights)" if len(left) > 1 else ""
    return told + ("; name it in one of them, or set extract.rest=save or skip" if ends else "")


def without_place(homeless: Sequence[Pair], changes: Mapping[str, Change], rest: Rest) -> list[Finding]:
    """Weights that changed though no model in memory has them: PEFT cannot hold them."""
    changed = [pair.name for pair in homeless if changes[pair.name].changed]
    told = f"{changed[0]} changed, but transformers' model has no such weight" if changed else ""
    if changed and rest is Rest.refuse:
        raise Refused(f"finetune: {told} ({len(changed)} weights); extract.rest=save or skip leaves them out")
    return [Finding(f"{told} ({len(changed)} left out)")] if changed else []
