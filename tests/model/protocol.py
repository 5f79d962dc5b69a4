"""The waiting rules in a world of small numbers: every order in which caches can refresh, tried out.

Owns: the world, its moves, and what must never be seen in it. Leaves to others: how long to wait (keyrotation.domain.policy, in test_protocol.py).

In each tick one step of the operator may happen, as early as its rule allows or as late as it likes; then each cache refreshes or grows older,
never beyond its time; then every replica issues a token with the key that it believes current. Gateways fetch from the edges (a shared cache)
where there are any, else from the replicas; each fetch may meet any of them. So a gateway that knew the new key may unlearn it from a stale source.

    alone --publish--> published --promote--> promoted --clean up--> cleaned up
                           |                      +------roll back--> rolled back --clean up--> undone
                           +--promote and disable (emergency)--> disabled --refresh--> refreshed --no gateway knows the old key--> contained

Never seen, in any order:
  I11  a live token refused by a gateway (in an emergency: of the key that is not compromised, once all is over)
  I12  the compromised key in a gateway's cache after *contained*
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement, product
from typing import NamedTuple

OLD, NEW = 1, 2  # keys; a set of them is a sum
NAMES = {0: "no key", OLD: "old", NEW: "new", OLD | NEW: "old+new"}
# What the database says in each phase: the published keys, and the one that signs.
TRUTH = {
    "alone": (OLD, OLD),
    "published": (OLD | NEW, OLD),
    "promoted": (OLD | NEW, NEW),
    "cleaned up": (NEW, NEW),
    "rolled back": (OLD | NEW, OLD),
    "undone": (OLD, OLD),
    "disabled": (NEW, NEW),
    "refreshed": (NEW, NEW),
    "contained": (NEW, NEW),
}
EMERGENCY = ("disabled", "refreshed", "contained")


@dataclass(frozen=True)
class Caches:
    """The longest that each may hold what it read, in ticks, and how many there are. `edge` None: no shared cache."""

    replica: int
    gateway: int
    token: int  # a token's life
    edge: int | None = None
    replicas: int = 2
    edges: int = 2
    gateways: int = 1


@dataclass(frozen=True)
class Rules:
    """How many ticks after the phase began the operator may act; None: never does."""

    promote: int | None = None  # after published
    canary: int | None = None  # after published, where every gateway is seen to know the key
    clean_up: int | None = None  # after promoted, or rolled back
    roll_back: bool = False  # at any time after promoted
    refresh: int | None = None  # after disabled: an emergency


class World(NamedTuple):
    """A state. A cache is (age, keys); a replica is (age, keys, the one that signs)."""

    phase: str
    since: int  # ticks since the phase began
    replicas: tuple[tuple[int, int, int], ...]
    edges: tuple[tuple[int, int], ...]
    gateways: tuple[tuple[int, int], ...]
    alive: tuple[int, int]  # the youngest token of the old, the new key: ticks until it is dead. Its `exp` is still alive

    def __str__(self) -> str:
        parts = [f"replicas {' '.join(f'{NAMES[keys]} (signs {NAMES[signer]})' for _, keys, signer in self.replicas)}"]
        parts += [f"edges {' '.join(NAMES[keys] for _, keys in self.edges)}"] if self.edges else []
        parts += [
            f"gateways {' '.join(NAMES[keys] for _, keys in self.gateways)}",
            f"the youngest tokens are dead in {self.alive[0]} and {self.alive[1]} ticks",
        ]
        return ", ".join(parts)


@dataclass(frozen=True)
class Explored:
    """What was found: the rule that was broken, if any, with a shortest story; and how many states there are."""

    broken: str | None
    story: str
    states: int


def explore(caches: Caches, rules: Rules) -> Explored:
    """Every reachable state, breadth first, until one is broken."""
    start = World(
        "alone",
        0,
        ((0, OLD, OLD),) * caches.replicas,
        ((0, OLD),) * (caches.edges if caches.edge is not None else 0),
        ((0, OLD),) * caches.gateways,
        (caches.token + 1, 0),
    )
    came_from: dict[World, tuple[World, str] | None] = {start: None}
    frontier = [start]
    while frontier:
        reached: list[World] = []
        for world in frontier:
            for deed, following in _ticks(world, caches, rules):
                if following in came_from:
                    continue
                came_from[following] = (world, deed)
                if wrong := _wrong(following):
                    return Explored(wrong, _story(came_from, following, wrong), len(came_from))
                reached.append(following)
        frontier = reached
    return Explored(None, "", len(came_from))


def _wrong(world: World) -> str | None:
    if world.phase == "contained" and any(keys & OLD for _, keys in world.gateways):
        return "the compromised key came back after contained (I12)"
    for key, life in zip((OLD, NEW), world.alive, strict=True):
        excused = world.phase in EMERGENCY and (key == OLD or world.phase != "contained")
        if life and not excused and not all(keys & key for _, keys in world.gateways):
            return f"a live token of the {NAMES[key]} key is rejected (I11)"
    return None


def _deeds(world: World, rules: Rules) -> Iterator[tuple[str, str]]:
    """What the operator may do now, and the phase that it leads to."""

    def due(after: int | None) -> bool:
        return after is not None and world.since + 1 >= after  # the ticks that will have passed when the deed is done

    match world.phase:
        case "alone":
            yield "publish", "published"
        case "published" if rules.refresh is not None:
            yield "promote and disable", "disabled"
        case "published" if due(rules.promote) or (due(rules.canary) and all(keys & NEW for _, keys in world.gateways)):
            yield "promote", "promoted"
        case "promoted":
            if due(rules.clean_up):
                yield "clean up", "cleaned up"
            if rules.roll_back:
                yield "roll back", "rolled back"
        case "rolled back" if due(rules.clean_up):
            yield "clean up", "undone"
        case "disabled" if due(rules.refresh):
            yield "refresh", "refreshed"


def _ticks(world: World, caches: Caches, rules: Rules) -> Iterator[tuple[str, World]]:
    """Every world that may follow, with the operator's deed."""
    horizon = max(limit or 0 for limit in (rules.promote, rules.canary, rules.clean_up, rules.refresh))
    for deed, phase in [("", world.phase), *_deeds(world, rules)]:
        since = 0 if deed else min(world.since + 1, horizon)
        keys, signer = TRUTH[phase]
        flushed = deed == "refresh"
        for replicas in _each([_fetched(age, (held, signing), {(keys, signer)}, caches.replica) for age, held, signing in world.replicas]):
            served = {held for _, held, _ in replicas}
            alive = tuple(
                caches.token + 1 if any(key == signing for _, _, signing in replicas) else max(0, life - 1)
                for key, life in zip((OLD, NEW), world.alive, strict=True)
            )
            for edges in _each([_fetched(age, (held,), {(each,) for each in served}, caches.edge or 0, flushed) for age, held in world.edges]):
                shown = {held for _, held in edges} or served
                for gateways in _each([_fetched(age, (held,), {(each,) for each in shown}, caches.gateway, flushed) for age, held in world.gateways]):
                    proven = phase == "refreshed" and not any(held & OLD for _, held in gateways)
                    yield deed, World("contained" if proven else phase, since, replicas, edges, gateways, alive)  # type: ignore[arg-type]


def _fetched(age: int, held: tuple[int, ...], sources: set[tuple[int, ...]], limit: int, must: bool = False) -> list[tuple[int, ...]]:
    """What a cache may hold next: what it fetched from any source, or what it had, if it is not too old."""
    fresh = [(0, *each) for each in sources]
    return fresh if must or age + 1 > limit else [*fresh, (age + 1, *held)]


def _each(choices: list[list[tuple[int, ...]]]) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Every combination; which of several equals holds what makes no difference."""
    if len(choices) == 2 and choices[0] == choices[1]:
        yield from combinations_with_replacement(sorted(choices[0]), 2)
    else:
        yield from {tuple(sorted(each)) for each in product(*choices)}


def _story(came_from: dict[World, tuple[World, str] | None], world: World, wrong: str) -> str:
    lines: list[str] = [wrong]
    while before := came_from[world]:
        lines.append(f"{before[1] or 'a tick passes'}: {world}")
        world = before[0]
    return "\n  ".join([*reversed(lines[1:]), lines[0]])
