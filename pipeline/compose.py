"""From composed YAML to a Pipeline: the only place that turns configuration into objects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, dataclass, field, fields
from functools import cache
from math import isfinite
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.arguments import expanded
from pipeline.ground.dtypes import FloatDtype
from pipeline.ground.errors import Refused
from pipeline.ground.leaderboard import Sweep
from pipeline.ground.names import nearest, unreadable
from pipeline.ground.ranks import parse_pattern, parse_rank
from pipeline.ground.units import parse_bytes
from pipeline.publishing import publishable
from pipeline.settings import SET_AS, key_of, with_fields
from pipeline.stage import CHOICES, SLOTS, STAGES, Chosen, Pipeline, Save, Stage, load_stages
from pipeline.weight import Tied


@dataclass
class Root:
    """The keys a recipe may set; anything else is refused as Hydra composes."""

    extract: Any = MISSING
    load: Any = MISSING
    dequantize: Any = MISSING
    merge: Any = MISSING
    save: Any = MISSING
    verify: Any = MISSING

    base_model: str | None = None
    """folder, GGUF file, or hub id org/name[@revision]"""
    adapter: Any = None
    """folder or hub id of a PEFT adapter; or a list of them, each a path or {path, weight}"""
    output: str | None = None
    """folder to create"""
    finetune: str | None = None
    """the fine-tuned checkpoint to extract an adapter from: folder, GGUF file, or hub id"""
    targeted_modules: Any = None
    """modules the adapter may change: a list, or {filter: "a, b"}; names, globs or re:patterns"""
    saved_modules: Any = None
    """modules kept whole in an extracted adapter, in the same forms"""
    rank: Any = None
    """rank the adapter must have, or gets: a number, auto, {energy: .95}, {parameters: 40M}, {size: 80MB}"""
    max_rank: int | None = None
    """largest rank of a module in an extracted adapter"""
    multiple_of: int = 1
    """ranks of an extracted adapter are a multiple of this"""
    rank_pattern: Any = None
    """ranks of some modules of an extracted adapter, {name: rank}"""
    alpha: float | None = None
    """alpha the adapter must have, or gets; of an extracted one by default its rank"""
    alpha_pattern: Any = None
    """alphas of some modules of an extracted adapter, {name: alpha}"""
    merge_dtype: FloatDtype = FloatDtype.float32
    """dtype in which W + delta is computed"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps or xpu: where decoding and merging compute"""
    names: Any = None
    """renames {from: to} from adapter modules to checkpoint names"""
    tied: Tied = Tied.auto
    """when an adapter changes embeddings that lm_head shares: auto, untie, shared or refuse"""
    seed: int = 0
    """for everything random: the same one gives the same bytes"""
    memory_limit: Any = None
    """memory for tiles and models beyond the libraries, as 4GB; default: what is free"""
    sweep: Sweep = field(default_factory=Sweep)
    """keep: which outputs stay, all, best or none; over: keys and values; under: a KL ratio to reach"""
    report: str | None = None
    """file for the report as JSON, the page beside it as .html, or the page alone; default: in the output"""
    dry_run: bool = False
    """print the plan and stop"""
    debug: bool = False
    """show tracebacks"""


ROOT_KEYS = tuple(f.name for f in fields(Root) if f.name not in SLOTS)


@cache
def offered(slot: str) -> dict[str, type]:
    """What `slot=` takes: for each name a dataclass of the settings that stand under the slot.

    A stage's fields that are named like a root key are not among them: they get the root's value. `auto`
    has the settings of every stage of the slot.
    """
    nodes = {name: _node(slot, name, [cls]) for name, cls in STAGES[slot].items()}
    return {**({"auto": _node(slot, "auto", STAGES[slot].values())} if slot in CHOICES else {}), **nodes}


def __getattr__(name: str) -> type:
    """The settings of a stage as `merge/exact`: by that name a process finds what another has sent it."""
    slot, _, chosen = name.partition("/")
    if slot in SLOTS:
        load_stages()
        if chosen in offered(slot):
            return offered(slot)[chosen]
    raise AttributeError(f"module {__name__} has no attribute {name}")


def _node(slot: str, name: str, stages: Iterable[type]) -> type:
    settings: dict[str, tuple[str, Any, Any]] = {}
    for cls in stages:
        hints = get_type_hints(cls)
        for f in own_fields(cls):
            settings.setdefault(key_of(f), (key_of(f), hints[f.name], _default(f)))
    node = with_fields(name, settings.values())
    node.__module__, node.__qualname__ = __name__, f"{slot}/{name}"
    return node


def own_fields(cls: type) -> list[Field[Any]]:
    """The fields of a stage that stand under its slot."""
    return [f for f in fields(cls) if f.name not in ROOT_KEYS and SET_AS not in f.metadata]


def _default(f: Field[Any]) -> Any:
    if f.default_factory is not NO_DEFAULT:
        return field(default_factory=f.default_factory)
    return field(default=MISSING if f.default is NO_DEFAULT else f.default)


def register() -> None:
    """Offers the root and every registered stage to Hydra."""
    store = ConfigStore.instance()
    store.store(name="root", node=Root)
    for slot in SLOTS:
        for name, node in offered(slot).items():
            store.store(group=slot, name=name, node=node, provider="pipeline")


def build(cfg: DictConfig) -> Pipeline:
    """The pipeline of a composed config; Refused, with all reasons, where a value is missing or unfit."""
    stages: dict[str, type[Stage]] = {}
    known = {f.name for f in fields(Root)}
    wrong = [f"{key}: no such key{nearest(key, known)}" for key in map(str, cfg) if key not in known]
    for slot in SLOTS:
        try:
            stages[slot] = _chosen(slot, cfg)
        except Refused as refusal:
            wrong += refusal.sentences
    if wrong:
        raise Refused(*wrong)
    shared = _root_values(cfg, stages["save"], stages["extract"])
    built: dict[str, Any] = {}
    own: dict[str, dict[str, Any]] = {}
    for slot, cls in sorted(stages.items(), key=lambda one: _is_told(one[1])):
        try:
            own[slot] = _own_values(slot, cls, cfg)
            taken = {f.name: shared[f.name] for f in fields(cls) if f.name in ROOT_KEYS}
            told = {f.name: f.metadata[SET_AS] for f in fields(cls) if SET_AS in f.metadata}
            taken |= {name: own[s][key] for name, (s, key) in told.items() if key in own.get(s, {})}
            built[slot] = cls(**own[slot], **taken)
        except Refused as refusal:
            wrong += refusal.sentences
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            wrong.append(f"{slot}: {str(error).splitlines()[0]}")
    if wrong:
        raise Refused(*wrong)
    return Pipeline(**built)


def _is_told(cls: type) -> bool:
    """Whether it has settings that stand in another slot."""
    return any(SET_AS in f.metadata for f in fields(cls))


def _chosen(slot: str, cfg: DictConfig) -> type[Stage]:
    """The stage that fills the slot; `auto` asks the slot's choice."""
    kind = OmegaConf.get_type(cfg, slot)
    name = next((name for name, node in offered(slot).items() if node is kind), None)
    if name == "auto" and slot in CHOICES:
        name = CHOICES[slot]({key: cfg[key] for key in ROOT_KEYS})
    if name is None:
        raise Refused(f"{slot}: choose one of {', '.join(sorted(offered(slot)))}")
    return STAGES[slot][name]


def _own_values(slot: str, cls: type[Stage], cfg: DictConfig) -> dict[str, Any]:
    """The settings under the slot; under `auto` those that were changed, which the stage must all have."""
    names = {key_of(f): f.name for f in own_fields(cls)}
    known = [f.name for f in fields(OmegaConf.get_type(cfg, slot))]  # type: ignore[arg-type]
    if foreign := [key for key in cfg[slot] if key not in known]:
        raise Refused(f"{slot}.{foreign[0]}: no such key{nearest(foreign[0], known)}")
    values = vars(OmegaConf.to_object(cfg[slot]))
    if OmegaConf.get_type(cfg, slot) is not offered(slot).get("auto") or "auto" in STAGES[slot]:
        return {names[key]: value for key, value in values.items()}
    plain = vars(OmegaConf.to_object(OmegaConf.structured(offered(slot)["auto"])))
    for name, value in values.items():
        if name not in names and value != plain[name]:
            stage = next(name for name, known in STAGES[slot].items() if known is cls)
            raise Refused(f"{slot}.{name}: {slot}={stage}, which this request means, has no such setting")
    return {names[key]: value for key, value in values.items() if key in names}


def _root_values(cfg: DictConfig, save: type[Stage], extract: type[Stage]) -> dict[str, Any]:
    """The root keys as the stages take them, every way of writing a value brought to one."""
    assert issubclass(save, Save)
    wanted = {
        "base_model": "a folder, a GGUF file or a hub id",
        **_source(cfg, extract),
    }
    if save.needs_output:
        wanted["output"] = "the folder to create" if save.writes else "the merged model's folder"
    missing = [
        f"{key}: is not set; give {what}, as {key}=..." for key, what in wanted.items() if not cfg[key]
    ]
    if missing:
        raise Refused(*missing)
    _check_finetune(cfg, extract)
    values = {key: cfg[key] for key in ROOT_KEYS}
    values["adapter"] = _adapters(cfg.adapter) if cfg.adapter else ()
    values["names"] = _renames(cfg.names)
    values["output"] = expanded("output", cfg.output or ".")
    for key in ("targeted_modules", "saved_modules"):
        values[key] = _module_list(key, cfg[key])
    values["rank"] = parse_rank(_plain(cfg.rank))
    for key in ("rank_pattern", "alpha_pattern"):
        values[key] = parse_pattern(key, _plain(cfg[key]), whole=key == "rank_pattern")
    for key in ("max_rank", "multiple_of"):
        if cfg[key] is not None and cfg[key] < 1:
            raise Refused(f"{key}: {cfg[key]} is not a whole number of at least 1")
    if cfg.memory_limit is not None:
        values["memory_limit"] = parse_bytes("memory_limit", cfg.memory_limit)
    return values


def _source(cfg: DictConfig, extract: type[Stage]) -> dict[str, str]:
    """What must be set for there to be an adapter."""
    if "finetune" in {f.name for f in fields(extract)} and not cfg.adapter:
        return {"finetune": "the fine-tuned checkpoint (other adapters go to adapter=...)"}
    return {} if cfg.finetune else {"adapter": "the folder or hub id of an adapter"}


def _adapters(value: Any) -> tuple[Chosen, ...]:
    value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return tuple(_adapter(item) for item in (value if isinstance(value, list) else [value]))


def _adapter(item: Any) -> Chosen:
    if isinstance(item, str) and item:
        return Chosen(item)
    if isinstance(item, dict) and set(item) <= {"path", "weight"} and isinstance(item.get("path"), str):
        weight = item.get("weight", 1.0)
        if isinstance(weight, int | float) and not isinstance(weight, bool) and isfinite(weight) and weight:
            return Chosen(item["path"], float(weight))
        raise Refused(f"adapter: weight {weight!r} of {item['path']} is not a finite number other than 0")
    raise Refused(f"adapter: {item!r} is neither a path nor {{path: ..., weight: ...}}")


def _check_finetune(cfg: DictConfig, extract: type[Stage]) -> None:
    if cfg.finetune and cfg.adapter:
        raise Refused("finetune: an adapter is given too; give one of them")
    if cfg.finetune and "finetune" not in {f.name for f in fields(extract)}:
        name = next(name for name, cls in STAGES["extract"].items() if cls is extract)
        raise Refused(f"finetune: extract={name} reads an adapter; extract=svd makes one of a fine-tune")


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _renames(value: Any) -> dict[str, str]:
    table = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value or {}
    if isinstance(table, dict) and all(isinstance(v, str) for part in table.items() for v in part):
        return {str(old): str(new) for old, new in table.items()}
    raise Refused(f"names: {table!r} is not a table of names; write {{from: to}}")


def _module_list(key: str, value: Any) -> tuple[str, ...] | None:
    value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    if isinstance(value, Mapping) and set(value) == {"filter"}:
        value = value["filter"]
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    if value is None:
        return None
    if isinstance(value, list) and value and all(isinstance(v, str) and v for v in value):
        if reasons := list(filter(None, map(unreadable, value))):
            raise Refused(f"{key}: {reasons[0]}")
        return tuple(value)
    raise Refused(
        f"{key}: {value!r} is not a list of module names; write [q_proj, v_proj] or {{filter: 'a, b'}}"
    )


def settings(cfg: DictConfig) -> dict[str, Any]:
    """The request as it may be published."""
    table = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    assert isinstance(table, dict)
    return publishable({str(key): value for key, value in table.items()})
