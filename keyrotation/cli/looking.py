"""The commands that look and change nothing: plan, status, history, doctor."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from keyrotation import wiring
from keyrotation.cli.report import Report, Table, busy, instant, since
from keyrotation.domain.decision import Action, Facts, Request, Rotation
from keyrotation.domain.keys import Key, Status
from keyrotation.domain.policy import Policy, Sum, show, show_instant
from keyrotation.ports import Environment
from keyrotation.settings import load, require_named
from keyrotation.steps import plan as planning

NOTHING_WAS_CHANGED = "Nothing was changed."
SINCE_LAST = 20  # rotations among which the last one that promoted is looked for
INSTANTS = ("created_at", "published_at", "accepted_at", "promoted_at", "demoted_at", "retain_until", "disabled_at")


def for_reading(name: str) -> Environment:
    """The environment as the auditor's role sees it: the rotator's credentials are not needed."""
    settings = load(name)
    env = wiring.wire(settings)
    require_named(settings, env.records.environment_name())
    return env


# ---- plan


def plan(arguments: argparse.Namespace) -> Report:
    """What a rotation would do now, and until when it would wait."""
    env = wiring.connect(arguments.environment)
    made = planning.plan(env, Request(actor="shell", only_if_due=arguments.only_if_due))
    decision, follow = made.decision, steps_of(made, env.policy)
    refused = decision.action is Action.ON_HOLD and not arguments.only_if_due
    data = {
        "environment": env.name,
        "action": decision.action,
        "reason": decision.reason,
        "message": decision.message,
        "acts": made.acts,
        "current_kid": made.current_kid,
        "next_kid": made.next_kid,
        "earliest_promotion": _sum(made.promotion),
        "earliest_cleanup": _sum(made.cleanup),
        "alarm": made.alarm,
        "steps": [{"step": step, "when": when} for step, when in follow],
        "changed": False,
    }
    parts: list[Table | str] = [Table(made.lines(), f"Plan for {env.name}")]
    if follow:
        parts.append(Table(follow, "Steps"))
    return Report(data, [*parts, "", NOTHING_WAS_CHANGED], well=not (refused or made.alarm or decision.reason == "emergency"))


def steps_of(made: planning.Plan, policy: Policy) -> list[tuple[str, str]]:
    """The steps that would follow, each with its instant."""
    match made.decision.action:
        case Action.RESUME:
            return [("take over", "now: what the dead run has done is found done, the rest follows in the order of a rotation")]
        case Action.WAIT:
            return [("wait for its end", "now; that rotation's outcome is this run's")]
        case Action.ROTATE:
            return _steps_of_a_rotation(made, policy)
        case _:
            return []


def _steps_of_a_rotation(made: planning.Plan, policy: Policy) -> list[tuple[str, str]]:
    promotion = made.promotion.instant if made.promotion else None
    cleanup = made.cleanup.instant if made.cleanup else None
    verified = promotion + policy.key_cache if promotion else None
    by = "by a run of its own" if policy.cleanup == "automatic" else 'by a person (policy.cleanup = "manual")'
    steps = [
        ("generate", f"not needed: key {made.next_kid} is published already" if made.next_kid else "now: a new key is published, and signs nothing yet"),
        ("wait for gateway cache", f"until {instant(promotion)}, and until every gateway is shown to know the key"),
        ("promote", f"from {instant(promotion)} on"),
        ("verify JWKS", f"right after it, fresh tokens from {instant(verified)} on"),
        ("prove at gateways", "after that: fresh tokens and one of the old key at every gateway"),
        ("clean up", f"from {instant(cleanup)} on, {by}"),
    ]
    return [*steps, ("keep a standby", "at the end: the next key is published ahead")] if policy.keep_standby else steps


def _sum(deadline: Sum | None) -> dict[str, Any] | None:
    return {"at": deadline.instant, "explained": deadline.explain()} if deadline else None


# ---- status


def status(arguments: argparse.Namespace) -> Report:
    """The environment now."""
    env = for_reading(arguments.environment)
    facts = env.records.look()
    last = next((each for each in env.records.rotations(SINCE_LAST) if each.ended_at is not None and each.kind != "standby"), None)
    troubles, waiting = troubles_of(facts, last, env.policy), waiting_for_a_person(facts, env)
    data = {
        "environment": env.name,
        "now": facts.now,
        "well": not troubles,
        "troubles": troubles,
        "waiting_for_a_person": waiting,
        "hold": asdict(facts.hold) if facts.hold else None,
        "open_rotation": asdict(facts.open_rotation) if facts.open_rotation else None,
        "current": _key_data(facts.ring.current),
        "next": _key_data(facts.ring.next),
        "previous": [_key_data(key) for key in facts.ring.previous],
        "due_at": _due_at(facts, env.policy),
        "rotate_every": env.policy.rotate_every,
        "max_key_age": env.policy.max_key_age,
        "last_rotation": asdict(last) if last else None,
    }
    rows = [("now", show_instant(facts.now)), *_state_rows(facts, env.policy), *_key_rows(facts, env.policy), ("last", _last(last))]
    rows += [("waits for you", each) for each in waiting] + [("warning", each) for each in troubles]
    return Report(data, [Table(rows, env.name)], well=not troubles)


def _state_rows(facts: Facts, policy: Policy) -> list[tuple[str, str]]:
    hold, work, due_at = facts.hold, facts.open_rotation, _due_at(facts, policy)
    lease = "" if work is None else f"believed alive until {show_instant(work.lease_until)}" if work.lease_until > facts.now else "nobody works on it any more"
    return [
        ("hold", f"since {since(hold.since, facts.now)}, by {hold.by}: {hold.reason}" if hold else "none"),
        ("under way", f"{work.kind} {work.id}, opened {since(work.opened_at, facts.now)}, by {work.actor}; {lease}" if work else "nothing"),
        ("due", f"{since(due_at, facts.now)}: from then on a scheduled run rotates" if due_at else "no key is current"),
    ]


def _key_rows(facts: Facts, policy: Policy) -> list[tuple[str, str]]:
    current, ahead = facts.ring.current, facts.ring.next
    age = show(facts.now - (current.promoted_at or current.created_at)) if current else ""
    rows = [("current", f"{current.kid} for {age}; rotated every {show(policy.rotate_every)}, an alarm at {show(policy.max_key_age)}" if current else "none")]
    rows.append(("next", f"{ahead.kid} published {since(ahead.published_at, facts.now)}" if ahead else "none"))
    rows += [("previous", f"{key.kid} kept until {since(key.retain_until, facts.now) or 'an instant not yet known'}") for key in facts.ring.previous]
    return rows


def _last(last: Rotation | None) -> str:
    return f"{last.kind} {last.id}, {show_instant(last.ended_at)}: {last.outcome}: {last.message}" if last and last.ended_at else "no rotation has ended yet"


def _due_at(facts: Facts, policy: Policy) -> datetime | None:
    current = facts.ring.current
    return policy.due_at(current.promoted_at or current.created_at) if current else None


def troubles_of(facts: Facts, last: Rotation | None, policy: Policy) -> list[str]:
    """What is not as it should be."""
    current, work = facts.ring.current, facts.open_rotation
    age = facts.now - (current.promoted_at or current.created_at) if current else None
    said = ["no key is current: run the bootstrap-signing-keys deployment"] if age is None else []
    if age is not None and age > policy.max_key_age:
        said.append(f"the current key is {show(age)} old, more than max_key_age {show(policy.max_key_age)}: rotate now, then find out why no schedule did")
    if work is not None and work.kind == "emergency":
        said.append(f"an emergency is open: {work.reason}")
    elif work is not None and work.lease_until <= facts.now:
        said.append(f"{work.kind} {work.id} was left by a run that is gone: the next run of rotate-signing-keys finishes it")
    if last is not None and last.outcome not in ("done", "superseded"):
        said.append(f"the last {last.kind} ended {last.outcome}: look into it, then rotate again")
    return said + [f"the cleanup of key {key.kid} is on hold: {key.cleanup_hold}" for key in facts.ring.previous if key.cleanup_hold]


def waiting_for_a_person(facts: Facts, env: Environment) -> list[str]:
    """What nothing but a person moves."""
    said = (
        [f"keyrotation release {env.name}, once the reason of the hold is gone"] if facts.hold or any(key.cleanup_hold for key in facts.ring.previous) else []
    )
    ripe = [key for key in facts.ring.previous if key.retain_until is not None and key.retain_until <= facts.now and not key.cleanup_hold]
    return said + [
        f'the cleanup of key {key.kid} (policy.cleanup = "manual"): run cleanup-old-keys/{env.name} with kid = {key.kid}'
        for key in ripe
        if env.policy.cleanup == "manual"
    ]


def _key_data(key: Key | None) -> dict[str, Any] | None:
    if key is None:
        return None
    wanted = ("kid", "status", *INSTANTS, "disabled_reason", "compromised", "never_promote", "cleanup_hold", "rotation_id")
    return {name: getattr(key, name) for name in wanted}


# ---- history


def history(arguments: argparse.Namespace) -> Report:
    """The rotations, newest first; or all keys."""
    env = for_reading(arguments.environment)
    facts = env.records.look()
    if arguments.keys:
        keys = sorted(facts.ring.keys, key=lambda key: key.created_at, reverse=True)
        return Report({"environment": env.name, "keys": [_key_data(key) for key in keys]}, [_key_table(key) for key in keys] or ["no key was ever made here"])
    rotations = env.records.rotations(arguments.limit)
    data = [{**asdict(each), "duration": each.ended_at - each.opened_at if each.ended_at else None} for each in rotations]
    return Report(
        {"environment": env.name, "rotations": data}, [_rotation_table(each, facts.now) for each in rotations] or ["no rotation was ever opened here"]
    )


def _rotation_table(rotation: Rotation, now: datetime) -> Table:
    took = f"took {show(rotation.ended_at - rotation.opened_at)}" if rotation.ended_at else f"under way for {show(now - rotation.opened_at)}"
    rows = [("who", rotation.actor), ("why", rotation.reason)]
    rows += [(name, kid) for name, kid in (("old key", rotation.old_kid), ("new key" if rotation.kind != "republish" else "key", rotation.new_kid)) if kid]
    if rotation.ended_at:
        rows.append((rotation.outcome or "", rotation.message or ""))
    return Table(rows, f"{rotation.kind} {rotation.id}, {show_instant(rotation.opened_at)}, {took}")


def _key_table(key: Key) -> Table:
    rows = [
        (name.removesuffix("_at").replace("retain_until", "kept until"), show_instant(value)) for name in INSTANTS if (value := getattr(key, name)) is not None
    ]
    notes = [key.disabled_reason or "", key.cleanup_hold or "", "never signs again" if key.never_promote and key.status is not Status.DISABLED else ""]
    return Table([*rows, *(("note", note) for note in notes if note)], f"{key.kid}  {'compromised' if key.compromised else key.status}")


# ---- doctor


def doctor(arguments: argparse.Namespace) -> Report:
    """Every check, also after one has failed."""
    from keyrotation import doctor as doctors  # noqa: PLC0415  the other commands do without

    settings = load(arguments.environment)
    world = doctors.World(settings, wiring.wire(settings))
    with busy() as tell:
        findings: Sequence[doctors.Finding] = list(doctors.examine(world, tell))
    failed = sum(not finding.ok for finding in findings)
    data = {"environment": settings.name, "well": not failed, "checks": [asdict(finding) for finding in findings]}
    rows = [("ok" if finding.ok else "not ok", finding.name, finding.message) for finding in findings]
    verdict = f"All {len(findings)} checks are well." if not failed else f"{failed} of {len(findings)} checks are not well."
    return Report(data, [Table(rows, f"Doctor for {settings.name}"), "", verdict], well=not failed)
