"""Every outside system of an environment, checked: what is well, and the next thing to do where it is not. Changes nothing.

A check is a function that returns one sentence or raises one (KeyRotationError). It may stand on others: where one of those failed, it is not
made, so that one broken part does not show as ten. To add a check, add a line to `checks`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from keyrotation.adapters import schema
from keyrotation.adapters.prefect_api import PrefectApi
from keyrotation.connections.database import Database
from keyrotation.connections.http import place
from keyrotation.domain.decision import Facts
from keyrotation.domain.errors import BadAnswer, Denied, KeyRotationError, Refused, WorldError
from keyrotation.domain.policy import ZERO, Policy, show
from keyrotation.domain.propagation import Answer, Observation, judge
from keyrotation.ports import Environment, Token
from keyrotation.secrets import SecretRef
from keyrotation.settings import Settings, require_named
from keyrotation.steps.gateways import canary_alarm
from keyrotation.steps.plan import clock_differences

# A deployment of each is expected for every environment; a test holds this list against flows/.
FLOWS = ("rotate-signing-keys", "cleanup-old-keys", "bootstrap-signing-keys")
NO_PREFECT = "there is no [prefect] api_url: Prefect is not looked at"
MOST_FLAWS = 4  # told in one sentence; the rest is counted


class World:
    """An environment with what several checks look at, asked for once."""

    def __init__(self, settings: Settings, env: Environment) -> None:
        self.settings, self.env = settings, env
        self.prefect = PrefectApi(settings.prefect.api_url) if settings.prefect else None
        self.databases = {
            "rotator": Database(settings.database.url, "rotator"),
            "cleaner": Database(settings.database.cleaner_url, "cleaner"),
            "auditor": Database(settings.database.auditor_url or settings.database.url, "auditor"),
        }

    @cached_property
    def facts(self) -> Facts:
        """The database at one instant."""
        return self.env.keys.look()

    @cached_property
    def token(self) -> Token:
        """A token that was issued for this look."""
        return self.env.identity.fresh_token()


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the doctor's report. `after`: checks without which this one says nothing."""

    name: str
    look: Callable[[World], str]
    after: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of a check. `made` is false where another one stood in its way."""

    name: str
    ok: bool
    message: str
    made: bool = True


def checks(settings: Settings) -> Sequence[Check]:
    """All checks of an environment, in the order in which their parts build on each other."""
    return (
        Check("settings", sums),
        *(Check(f"secret {name}", partial(secret, ref)) for name, ref in secrets_of(settings)),
        Check("database as rotator", partial(role, "rotator"), ("secret database.url",)),
        Check("database as cleaner", partial(role, "cleaner"), ("secret database.cleaner_url",)),
        Check("database as auditor", partial(role, "auditor"), ("secret database.auditor_url",)),
        Check("database schema", whole_schema, ("database as rotator",)),
        Check("current key", current_key, ("database as rotator",)),
        Check("sealer", sealer, ("secret sealer.token",)),
        Check("sealed keys", sealed_keys, ("database as rotator",)),
        Check("JWKS", jwks),
        Check("JWKS and database", jwks_and_database, ("JWKS", "database as rotator")),
        Check("token endpoint", token, ("JWKS", "secret identity.client_secret")),
        Check("token and database", token_and_database, ("token endpoint", "current key")),
        Check("clocks", clocks, ("JWKS", "database as rotator")),
        Check("gateways", gateways, ("token endpoint",)),
        Check("probe routes", probe_routes, ("gateways",)),
        Check("canaries", canaries, ("gateways", "current key")),
        Check("Slack", slack, ("secret slack.token", "secret slack.webhook")),
        Check("Prefect API", prefect_api),
        Check("Prefect deployments", deployments, ("Prefect API",)),
        Check("Prefect workers", workers, ("Prefect API", "Prefect deployments")),
        Check("files outside", files_outside),
    )


def examine(world: World, tell: Callable[[str], None] = lambda name: None) -> Iterator[Finding]:
    """Every check's finding, one after the other; `tell` hears the name of each before it is made."""
    failed: set[str] = set()
    for check in checks(world.settings):
        tell(check.name)
        finding = _made(check, world, failed)
        if not finding.ok:
            failed.add(check.name)
        yield finding


def _made(check: Check, world: World, failed: set[str]) -> Finding:
    blocker = next((name for name in check.after if name in failed), None)
    if blocker is not None:
        return Finding(check.name, False, f"not looked at: mend '{blocker}' first", made=False)
    try:
        return Finding(check.name, True, check.look(world))
    except KeyRotationError as error:
        return Finding(check.name, False, str(error))
    except Exception as error:  # noqa: BLE001  the other checks are still wanted; the text is a stranger's and may quote a secret
        return Finding(check.name, False, f"this check itself failed with {error.__class__.__name__}: a mistake of this software")


# ---- the file


def sums(world: World) -> str:
    """The waits that follow from the settings, and what was not taken as written."""
    policy = world.env.policy
    ahead = policy.may_promote(datetime.now(UTC)).terms  # of any instant: only the terms are shown
    warnings = "".join(f" WARNING: {warning}." for warning in world.settings.warnings())
    return (
        f"a key rotates every {show(policy.rotate_every)} and is an alarm at {show(policy.max_key_age)}; a new one signs {_sum(ahead)} after it was published; "
        f"an old one is kept {_kept(policy)}.{warnings}"
    )


def _kept(policy: Policy) -> str:
    needed = policy.retention()
    if policy.cleanup_after >= sum((term for _, term in needed), ZERO):
        return f"{show(policy.cleanup_after)} (cleanup_after; its tokens need {_sum(needed)}, cleanup is {policy.cleanup})"
    return f"{_sum(needed)} (more than cleanup_after; cleanup is {policy.cleanup})"


def _sum(terms: Sequence[tuple[str, timedelta]]) -> str:
    named = [f"{name} {show(term)}" for name, term in terms if term]
    total = show(sum((term for _, term in terms), ZERO))
    return f"{total} = {' + '.join(named)}" if len(named) > 1 else total


def secrets_of(section: BaseModel, path: str = "") -> Iterator[tuple[str, SecretRef]]:
    """Every secret reference of the file by its setting's name."""
    for field in type(section).model_fields:
        value = getattr(section, field)
        for item, name in [(value, f"{path}{field}")] if not isinstance(value, tuple) else [(each, f"{path}{field}[{n}]") for n, each in enumerate(value)]:
            if isinstance(item, SecretRef):
                yield name, item
            elif isinstance(item, BaseModel):
                yield from secrets_of(item, f"{name}.")


def secret(ref: SecretRef, world: World) -> str:
    """That the reference leads somewhere; not where to."""
    ref.reveal()
    return f"{ref} leads to something"


# ---- the database


def role(name: str, world: World) -> str:
    """Connects; the database is this environment's; the login may do what the role must, and no more."""
    if name == "auditor" and world.settings.database.auditor_url is None:
        return "there is no database.auditor_url: the rotator's login reads the records"
    database = world.databases[name]
    login, version, is_replica = schema.server(database)
    require_named(world.settings, schema.environment_name(database))
    flaws = schema.flaws_of_rights(database, name)
    if flaws:
        raise Denied(
            f"the login {login} is not fit to be the {name}: {_listed(flaws)}. Run sql/roles.sql and sql/grants.sql, and give it that role and no other"
        )
    if is_replica and name != "auditor":
        raise WorldError(f"{database.place()} is a replica, which takes no changes: let the {name}'s URL lead to the primary")
    return f"{login} at {database.place()} (PostgreSQL {version}) has the grants of the {name} and no others"


def whole_schema(world: World) -> str:
    """Every column, trigger, unique index, constraint and function of sql/schema.sql is there and in force (F65)."""
    flaws = schema.flaws_of_schema(world.databases["rotator"])
    if flaws:
        raise Refused(
            f"the database is not what sql/schema.sql makes: {_listed(flaws)}. Run sql/schema.sql and sql/grants.sql as its administrator before any rotation"
        )
    return f"all {len(schema.expected())} columns, triggers, unique indexes, constraints and functions of sql/schema.sql are there and in force"


def current_key(world: World) -> str:
    """A key signs, and is not too old."""
    key, policy = world.facts.ring.require_current(), world.env.policy
    age = world.facts.now - (key.promoted_at or key.created_at)
    if age > policy.max_key_age:
        raise Refused(
            f"key {key.kid} signs since {show(age)}, longer than policy.max_key_age {show(policy.max_key_age)}: run rotate-signing-keys/{world.env.name} now, "
            "then find out why its schedule did not"
        )
    return f"key {key.kid} signs since {show(age)}, of {show(policy.max_key_age)} at the most"


def sealed_keys(world: World) -> str:
    """The sealing key's versions that must be kept (I24)."""
    versions = schema.sealed_by(world.databases["rotator"])
    if not versions:
        return "no private half is kept here"
    return "keep these versions of the sealing key, rows need them: " + ", ".join(f"{name} ({count} key{'s' * (count != 1)})" for name, count in versions)


def sealer(world: World) -> str:
    """It encrypts for us."""
    if world.env.sealer is None:
        return 'there is no [sealer]: authority = "api", the identity service seals its keys itself'
    return world.env.sealer.check()


# ---- the identity service


def jwks(world: World) -> str:
    """The public JWKS can be read and holds only what it should."""
    published = world.env.identity.published()
    shared = f"; it may be cached for {show(published.max_age)}" if published.max_age else ""
    if world.env.policy.shared_cache and published.max_age is not None and published.max_age > world.env.policy.max_age_limit:
        raise Refused(
            f"the JWKS may be cached for {show(published.max_age)}, longer than identity.max_age_limit {show(world.env.policy.max_age_limit)}: "
            "lower the one or raise the other"
        )
    return f"{place(world.settings.identity.jwks_url)} holds {len(published.jwks.kids)} ES256 keys and nothing else{shared}"


def jwks_and_database(world: World) -> str:
    """It holds next, current and previous, and nothing else (I4)."""
    facts, served = world.env.keys.look(), world.env.identity.published().jwks
    wrong = served.differences(facts.ring.published, facts.ring.compromised)
    if wrong:
        lag = f", unless keys changed within the last {show(world.env.policy.key_cache)} (identity.key_cache)" if world.env.policy.key_cache else ""
        raise Refused(f"{_listed(wrong)}: check that the identity service reads this database{lag}")
    return f"both publish the same {len(served.kids)} keys"


def token(world: World) -> str:
    """A fresh token verifies, and lives no longer than the settings say."""
    fresh, policy = world.token, world.env.policy
    world.env.identity.verify(fresh, world.env.identity.published().jwks)
    if fresh.lifetime > policy.token_lifetime:
        raise Refused(
            f"a fresh token lives {show(fresh.lifetime)}, longer than policy.token_lifetime {show(policy.token_lifetime)}: "
            "set that to the longest life of any token"
        )
    return f"a fresh token of key {fresh.kid} verifies and lives {show(fresh.lifetime)}, of {show(policy.token_lifetime)} at the most"


def token_and_database(world: World) -> str:
    """It is signed by the key that the database calls current."""
    current, policy = world.env.keys.look().ring.require_current(), world.env.policy
    if world.token.kid != current.kid and world.facts.now > (current.promoted_at or current.created_at) + policy.key_cache + policy.clock_skew:
        raise Refused(
            f"a fresh token is signed by key {world.token.kid}, the database's current key is {current.kid}: "
            "check that the identity service reads this database, and that identity.key_cache is as long as its cache"
        )
    return f"key {world.token.kid} signs, as the database says"


def clocks(world: World) -> str:
    """All within the tolerance of the database's (F80)."""
    seen = clock_differences(world.env)
    wrong = [f"the clock of {name} is {apart:+.1f} s off, {tolerated:.1f} s are tolerated" for name, apart, tolerated in seen if abs(apart) > tolerated]
    if wrong:
        raise Refused(f"against the database's clock: {_listed(wrong)}. Set the wrong one right (all of them wrong: the database's)")
    return "against the database's clock: " + ", ".join(f"{name} {apart:+.1f} s" for name, apart, _ in seen)


# ---- the gateways


def gateways(world: World) -> str:
    """Each answers, and accepts a fresh token."""
    if not world.env.gateways.names:
        return "gateways.urls names none: the waiting time alone decides, and no gateway is ever shown to know a key"
    verdict = judge(world.env.gateways.call(world.token.raw))
    if not verdict.everywhere:
        raise BadAnswer(f"a fresh token is not accepted everywhere: {verdict.explain()}. See to that gateway, its JWKS URL, issuer and audience")
    return f"a fresh token is {verdict.explain()}"


def probe_routes(world: World) -> str:
    """Each takes canaries only: an API token is refused for its audience."""
    if not world.env.gateways.can_probe:
        return "there is no gateways.probe_path: the waiting time alone decides"
    odd = [_odd(seen) for seen in world.env.gateways.probe((world.token.raw,)) if not seen.said.startswith("HTTP 403")]
    if odd:
        raise BadAnswer(
            f"{_listed(odd)}. Let {world.settings.gateways.probe_path} take tokens for {world.settings.gateways.canary_audience!r} only, "
            "by the JWKS provider of the API's routes"
        )
    return f"{world.settings.gateways.probe_path} refuses an API token with 403 everywhere"


def _odd(seen: Observation) -> str:
    if seen.answer is Answer.ACCEPTED:
        return f"the probe route of {seen.gateway} accepts an API token"
    return f"the probe route of {seen.gateway} answers an API token with {seen.said}, not with 403"


def canaries(world: World) -> str:
    """A canary opens no API (where one that was shown before is there to try)."""
    key = world.facts.ring.require_current()
    if not world.env.gateways.can_probe:
        return "there is no gateways.probe_path, and no canary is needed"
    alarm = canary_alarm(world.env, key.kid)
    if alarm:
        raise Refused(alarm)
    if world.env.keys.spent_canary(key.kid) is None:
        return f"no gateway has been shown a canary of key {key.kid} yet: nothing to try; {key.canaries_left} are left"
    return f"the API refuses a canary of key {key.kid} everywhere; {key.canaries_left} are left for proofs"


# ---- people and Prefect


def slack(world: World) -> str:
    """The credential is good."""
    if world.env.announcer is None:
        return "there is no [slack]: nobody is told of anything"
    return world.env.announcer.check()


def prefect_api(world: World) -> str:
    """It answers, and lets us in."""
    return world.prefect.check() if world.prefect else NO_PREFECT


def deployments(world: World) -> str:
    """One of each flow for this environment, none paused."""
    if world.prefect is None:
        return NO_PREFECT
    found = {f"{flow}/{world.env.name}": world.prefect.deployment(flow, world.env.name) for flow in FLOWS}
    missing = [name for name, deployment in found.items() if deployment is None]
    if missing:
        raise WorldError(f"Prefect has no deployment {', '.join(missing)}: run prefect deploy --all (prefect.yaml)")
    paused = [name for name, deployment in found.items() if deployment and deployment.get("paused")]
    if paused:
        raise WorldError(f"{', '.join(paused)} is paused in Prefect: resume it there. To keep keys as they are: keyrotation hold {world.env.name}")
    return f"{len(found)} deployments */{world.env.name} are there, {_scheduled(found[f'{FLOWS[0]}/{world.env.name}'])}"


def _scheduled(rotate: Mapping[str, Any] | None) -> str:
    active = [schedule for schedule in (rotate or {}).get("schedules") or () if schedule.get("active")]
    return f"{len(active)} schedule{'s' * (len(active) != 1)} rotate" if active else "no schedule rotates: a key is rotated only when somebody runs it"


def workers(world: World) -> str:
    """Somebody is there to carry out what Prefect schedules."""
    if world.prefect is None:
        return NO_PREFECT
    found = [world.prefect.deployment(flow, world.env.name) for flow in FLOWS]
    pools = sorted({str(deployment["work_pool_name"]) for deployment in found if deployment and deployment.get("work_pool_name")})
    for name in pools:
        pool = world.prefect.work_pool(name)
        if pool is None or pool.get("is_paused") or pool.get("status") != "READY":
            state = "does not exist" if pool is None else "is paused" if pool.get("is_paused") else "has no worker that polls it"
            raise WorldError(f"Prefect's work pool {name} {state}: no run of {world.env.name} would start. Start one: prefect worker start --pool {name}")
    return f"work pool {', '.join(pools)} has a worker" if pools else "the deployments name no work pool: whoever serves them runs them"


# ---- what is kept outside the database


def files_outside(world: World) -> str:
    """The ledger's head and the compromised kids can be written down."""
    audit, tombstones = world.settings.audit, world.settings.tombstones
    named = {"audit.head_file": audit.head_file if audit else None, "tombstones.path": tombstones.path if tombstones else None}
    kept = {name: path for name, path in named.items() if path is not None}
    shut = [f"{name} {path}" for name, path in kept.items() if not _writable(path)]
    if shut:
        raise WorldError(f"cannot be written by this user: {', '.join(shut)}. Make the folder, and let the rotator's user write there")
    unset = [name for name in named if name not in kept]
    return "; ".join([*(f"{name} {path} can be written" for name, path in kept.items()), *(f"{name} is not set: nothing is kept there" for name in unset)])


def _writable(path: Path) -> bool:
    return os.access(path if path.exists() else path.parent, os.W_OK)


def _listed(flaws: Sequence[str]) -> str:
    more = f" (and {len(flaws) - MOST_FLAWS} more)" if len(flaws) > MOST_FLAWS else ""
    return "; ".join(flaws[:MOST_FLAWS]) + more
