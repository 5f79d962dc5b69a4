"""Owns the story of the demo: its chapters, and what is told of each flow run while it works.

A chapter is a function in `CHAPTERS`. It starts or waits for something, follows it, and leaves the figures in the story.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sandbox import demo_report
from sandbox.demo_eyes import FINAL, Eyes, Key, Run, Step
from sandbox.demo_report import Figures, Share
from sandbox.demo_stage import KID_SHOWN, Counters, Stage
from sandbox.processes import SandboxError, born
from sandbox.settings import parse_duration
from sandbox.traffic import Report, Traffic
from sandbox.world import World

# Hours become seconds, so that a whole life of a key fits. A token lives 20 s; its key is kept for 25 s after it stops to sign.
SETTINGS: Mapping[str, str] = {"gateways.cache_time": "10s", "policy.token_lifetime": "20s", "policy.cleanup_after": "25s"}
RATE = 90  # requests per second, both gateways together

_EVERY = 0.25
_CLEANUP_SEEN_WITHIN = 15.0

# What each step of the product is for, and why it is safe. A step that is not named here is told without.
WHY: Mapping[str, str] = {
    "plan": "Looks whether a rotation is due and the world is fit for one: nothing is changed yet.",
    "open rotation": "The database lets one rotation at a time work on the keys; a second one would wait or leave.",
    "generate": "A new P-256 pair, its private half sealed by Cloud KMS. In the JWKS, but it signs nothing: no gateway meets a token that it cannot check.",
    "wait for gateway cache": "Gateways keep a copy of the JWKS for 10 s. First that time passes, then each shows by a test token that it knows the key.",
    "promote": "One transaction: the new key signs. The old one stays in the JWKS, so that the tokens it has signed are good until they expire.",
    "verify JWKS": "The proof is a token, not a setting. Were it wrong, the old key would be made to sign again.",
    "prove at gateways": "Each gateway is asked with tokens of both keys, through the very caches that the traffic uses.",
    "schedule cleanup": "A run of its own, at an hour when every token of the old key is dead. The hour is in the database, too: a lost run loses nothing.",
    "close rotation": "What came of it is written down, and shown on the run's page.",
    "keep a standby": "Not wanted here. With policy.keep_standby a next key is published ahead, and a rotation need not wait.",
    "announce": "People read it in Slack. Were Slack down, the work would go on all the same.",
    "publish the ledger's head": "The hash of the newest entry is kept outside the database, too: a ledger that was written anew would not match it.",
    "plan the cleanup": "Every old key is looked at: may it go now, and if not, until when is it kept?",
    "clean up": "Disabled: out of the JWKS, its private half erased. Too early, the database itself would refuse it.",
}

# What the world is made of.
PARTS: Mapping[str, str] = {
    "postgres": "PostgreSQL, for the keys and for Prefect",
    "databases": "tables, roles and grants from sql/",
    "kms": "a Cloud KMS, which seals the private keys",
    "slack": "a Slack inbox",
    "identity": "the identity service, which signs tokens and publishes the JWKS",
    "gateway-1": "an Envoy that fetches the JWKS in the background",
    "gateway-2": "an Envoy that fetches the JWKS when a request needs it",
    "prefect-server": "Prefect's server, with its pages",
    "prefect-worker": "Prefect's worker, which runs the flows",
    "bootstrap": "the initial key, made by bootstrap-signing-keys/sandbox",
    "tokens": "issued, and accepted by both gateways",
}


class Story:
    """One demo: its world, its traffic, and what has been told so far."""

    def __init__(self, folder: Path, stage: Stage) -> None:
        self.stage, self._folder = stage, folder
        self._world = World(folder, SETTINGS)
        self._traffic: Traffic | None = None
        self._births: dict[str, tuple[int, str | None]] = {}
        self.runs: dict[str, Run] = {}
        self.shares: list[Share] = []
        self._shown: tuple[Key, ...] = ()
        self._explained: set[str] = set()

    def tell(self, when_stopping: Callable[[], None]) -> Figures:
        """The story from beginning to end; nothing runs when it returns or raises."""
        try:
            self._begin()
            for chapter in CHAPTERS:
                chapter(self)
            figures = self._measure()
        finally:
            when_stopping()
            begun = self.stage.now
            try:
                self.stage.busy("everything is being stopped")
            finally:  # also when nobody is there any more to tell it to
                self._stop()
        self.stage.busy("")
        self.stage.event("everything is stopped", "✓")
        return replace(figures, left=self._left(), shares=[*self.shares, Share("everything stopped", self.stage.now - begun)])

    # ------------------------------------------------------------------------------------------------ its beginning and end

    def _begin(self) -> None:
        self.stage.chapter("A signing key rotation, told while it happens", _INTRODUCTION)
        self.stage.busy("the sandbox starts, 20 to 60 s")
        with self._told_of_parts():
            self._world.up()
        self.shares.append(Share("the sandbox starts", self.stage.now))
        facts = self._world.facts
        self.eyes = Eyes(facts)
        self._name_parts(facts)
        self._traffic = Traffic(
            facts["token_url"],
            facts["client_id"],
            facts["client_secret"],
            [gateway["url"] for gateway in facts["gateways"]],
            home=self._folder / "traffic",  # not the world's own: it would be swept away with it
            rate=RATE,
            every=0.5,
        )
        self._traffic.start()
        self._remember_processes(facts)
        self.first_entry, self.before = self.eyes.last_entry(), self._living_keys()
        self.stage.event(f"the sandbox is up: {len(self._births) - 1} processes, on loopback only", "✓")
        self.stage.why(f"Prefect's pages are at {facts['prefect_ui_url']} until this demo ends.")
        self.stage.event(f"the traffic begins: {RATE} requests/s, half to each gateway", "✓")
        self.stage.why("Clients as in real life: each keeps its token for some time, so tokens of the old and the new key are used side by side.")

    @contextlib.contextmanager
    def _told_of_parts(self) -> Iterator[None]:
        """Tells of the world's parts while they come up, by its log."""
        log, over = self._folder / "handle" / "logs" / "world.log", threading.Event()
        already = log.stat().st_size if log.exists() else 0

        def follow() -> None:
            told, last = 0, False
            while not last:
                last = over.wait(_EVERY)
                ready = parts_ready(log.read_bytes()[already:].decode(errors="replace")) if log.exists() else []
                for part in ready[told:]:
                    self.stage.event(f"{part}: {PARTS[part]}" if part in PARTS else part, "✓")
                told = len(ready)

        teller = threading.Thread(target=follow, daemon=True)
        teller.start()
        try:
            yield
        finally:
            over.set()
            teller.join()

    def _name_parts(self, facts: Mapping[str, Any]) -> None:
        for number, gateway in enumerate(facts["gateways"], 1):
            self.stage.call(gateway["url"], f"gateway {number}")

    def _remember_processes(self, facts: Mapping[str, Any]) -> None:
        assert self._traffic is not None
        self._births = {name: (pid, born(pid)) for name, pid in {**facts["pids"], "traffic": self._traffic.pid}.items()}

    def _stop(self) -> None:
        if self._traffic is not None:
            self._traffic.stop()
        self._world.down()

    def _left(self) -> tuple[str, ...]:
        return tuple(f"{name} (pid {pid})" for name, (pid, birth) in self._births.items() if birth is not None and born(pid) == birth)

    def _measure(self) -> Figures:
        assert self._traffic is not None
        self.stage.busy("the audit of the ledger")
        audit = self.eyes.audit(self._world.environment)
        entries = self.eyes.ledger(self.first_entry)
        report = self._traffic.stop()
        return Figures(
            traffic=report.content,
            runs=self.runs,
            before=self.before,
            after=self._living_keys(),
            jwks=self.eyes.published(),
            signer=self.eyes.signer(),
            entries=len(entries),
            audit=audit,
        )

    # ------------------------------------------------------------------------------------------------ telling

    def follow(self, run_id: str, what: str) -> Run:
        """Tells of a flow run until it is over, each step once."""
        told: dict[str, str] = {}
        while True:
            run = self.eyes.run(run_id)
            for step in run.steps:
                if step.state in FINAL and step.id not in told:
                    self._tell_of(step, told.values())
                    told[step.id] = step.message
            self._tell_what_is_under_way(run, what)
            self.count()
            if run.over:
                break
            time.sleep(_EVERY)
        self.stage.busy("")
        self.show_keys(run.ended_at)
        self.runs[what] = run
        self.shares += demo_report.of_run(f"the {what}", run)
        if run.state != "COMPLETED":
            raise SandboxError(f"the {what} ended {run.state}: {self.stage.short(run.message) or 'without a word'}")
        self.stage.event(f"the {what} is completed, {run.seconds:.1f} s after its start was due", "✓", at=run.ended_at)
        return run

    def count(self) -> None:
        """Shows the traffic's counters as they are now."""
        assert self._traffic is not None
        self.stage.count(counters(self._traffic.read()))

    def show_keys(self, until: float | None = None) -> None:
        """Shows the keys, if they have changed since they were shown last, and not after this instant."""
        keys = self._living_keys()
        if keys == self._shown or (until is not None and max(key.changed_at for key in keys) > until):
            return
        for key in keys:
            if key.kid not in {shown.kid for shown in self._shown}:
                self.stage.why(f"key {key.kid[:KID_SHOWN]} in full: {key.kid}")
                self.stage.call(key.kid, key.kid[:KID_SHOWN])
        self._shown = keys
        self.stage.show(demo_report.keys_table(keys, self.eyes.published(), self.eyes.signer()))

    def _tell_of(self, step: Step, said: Iterable[str]) -> None:
        well = step.state == "COMPLETED"
        news = f": {added}" if (added := news_of(step.message, said)) else ""
        self.stage.event(f"{step.name}, {step.seconds:.1f} s{news}", "✓" if well else "✗", "" if well else "red", at=step.ended_at)
        if well and step.name in WHY and step.name not in self._explained:
            self._explained.add(step.name)
            self.stage.why(WHY[step.name])
        self.show_keys(step.ended_at)

    def _tell_what_is_under_way(self, run: Run, what: str) -> None:
        running = next((step for step in run.steps if step.state == "RUNNING"), None)
        if running is not None and run.bar is not None:
            self.stage.busy(f"{running.name}: {run.bar[1]}", run.bar[0])
        elif running is not None:
            self.stage.busy(running.name, at=running.started_at)
        elif not run.steps and not run.over:
            self.stage.busy(f"the {what} starts: Prefect's worker makes a process for it")

    def _living_keys(self) -> tuple[Key, ...]:
        """The keys of this demo: those that are published, and those that were when it began."""
        known = {key.kid for key in self._shown}
        return tuple(key for key in self.eyes.all_keys() if key.enabled or key.kid in known)


_INTRODUCTION = (
    "An identity service signs tokens; gateways (two real Envoys) check them with a copy of its public keys, the JWKS. "
    "Now the key that signs is replaced, while clients go on working. The one thing that must never happen: "
    "a valid token is rejected. Hours are seconds here: a gateway's copy lives 10 s, a token 20 s, and an old key is kept for 25 s after it stops to sign."
)


# ------------------------------------------------------------------------------------------------ the chapters


def the_first_key(story: Story) -> None:
    story.stage.chapter("The initial key", "Made by the deployment bootstrap-signing-keys/sandbox when the sandbox started.")
    story.show_keys()


def the_rotation(story: Story) -> None:
    story.stage.chapter(
        "The rotation", "The deployment rotate-signing-keys/sandbox, started over Prefect's API, as its schedule or a click on Quick run would."
    )
    story.follow(story.eyes.start("rotate-signing-keys/sandbox", f"demo-{story.stage.since(0)}"), "rotation")


def the_cleanup(story: Story) -> None:
    old = next(key.kid for key in story.before if key.status == "current")
    run_id = _scheduled_cleanup(story, old)
    due_at = story.eyes.run(run_id).due_at or time.time()
    hour = story.stage.hour(due_at)
    story.stage.chapter("The cleanup", f"A flow run of its own, made ahead by the rotation, for {hour}: then no token of {old[:KID_SHOWN]} lives any more.")
    _pass_the_time(story, due_at, f"the old key is kept until {hour}, while its last tokens are used")
    story.shares.append(Share("the old key is kept for its tokens", due_at - (story.runs["rotation"].ended_at or due_at)))
    story.follow(run_id, "cleanup")


def what_people_saw(story: Story) -> None:
    story.stage.chapter("What people saw in Slack", "A rotation is one thread: its beginning, and its end as a reply.")
    for message in story.eyes.messages():
        story.stage.message(message["channel"], message["text"], reply=bool(message["thread_ts"]), at=float(message["ts"]))


def what_the_ledger_says(story: Story) -> None:
    story.stage.chapter("The ledger", "Append-only, each entry with the hash of the one before it: who did what to which key, and when.")
    story.stage.show(demo_report.ledger_table(story.eyes.ledger(story.first_entry), story.stage))


def what_comes_after(story: Story) -> None:
    story.stage.chapter(
        "What comes after", "The gateways drop the old key, too, as they fetch the JWKS anew within their cache time. The traffic goes on meanwhile."
    )
    begun, cleaned_at = time.time(), story.runs["cleanup"].ended_at or time.time()
    _pass_the_time(story, cleaned_at + parse_duration(SETTINGS["gateways.cache_time"]) + 1, "the gateways forget the old key")
    story.shares.append(Share("the traffic goes on", time.time() - begun))


CHAPTERS: tuple[Callable[[Story], None], ...] = (
    the_first_key,
    the_rotation,
    the_cleanup,
    what_people_saw,
    what_the_ledger_says,
    what_comes_after,
)


def _scheduled_cleanup(story: Story, kid: str) -> str:
    deadline = time.monotonic() + _CLEANUP_SEEN_WITHIN
    while (run_id := story.eyes.run_about("cleanup-old-keys/sandbox", kid)) is None:
        if time.monotonic() > deadline:
            raise SandboxError(f"no run of cleanup-old-keys/sandbox is scheduled for key {kid}")
        time.sleep(_EVERY)
    return run_id


def _pass_the_time(story: Story, until: float, doing: str) -> None:
    begun, total = time.time(), max(until - time.time(), _EVERY)
    while (now := time.time()) < until:
        story.stage.busy(doing, (now - begun) / total)
        story.count()
        time.sleep(_EVERY)
    story.stage.busy("")


# ------------------------------------------------------------------------------------------------ pure


def news_of(message: str, said: Iterable[str]) -> str:
    """What a step's sentence adds to those before it: some hand theirs on, and add to it."""
    known = max((earlier for earlier in said if earlier and f"{message}; ".startswith(f"{earlier}; ")), key=len, default="")
    return message.removeprefix(known).removeprefix("; ")


def parts_ready(log: str) -> list[str]:
    """The parts that the log of a starting world says are ready, in their order."""
    return [line.partition("] ")[2].partition(" ready, ")[0] for line in log.splitlines() if " ready, " in line]


def counters(report: Report) -> Counters:
    """The totals, and whose tokens were sent in the last whole second."""
    totals, timeline = report.totals, report.content["timeline"]
    last = timeline[-2]["kids"] if len(timeline) > 1 else {}
    return Counters(totals["sent"], totals["accepted"], report.rejected(), totals["errors"], {kid: counts["sent"] for kid, counts in last.items()})
