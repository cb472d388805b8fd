"""The tables of the label store; `migrations/` makes them, and a test holds the two against each other.

    queries 1-n leases        who was shown what, in which order, and until when it is theirs
            1-n labels        append-only; a correction is a row that supersedes another
            1-1 gold_answers  questions whose answer is known
            1-n judge_calls   what a judge model was sent and said, paid for once
    annotators 1-n tokens 1-n sessions   access, hashed at rest
    events                    the audit trail

Triggers, which the first revision makes, refuse to change or delete a row of labels or events, whoever asks. Times are
seconds since 1970, UTC.
"""

from sqlalchemy import (
    JSON,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    and_,
)
from sqlalchemy import text as sql

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

about = Table(
    "about",
    metadata,
    Column("key", String(64), primary_key=True),
    Column("value", Text, nullable=False),
    comment="Which run this store belongs to.",
)

# The texts stand last: SQLite reads a row from its start, and what is asked of every query stands before them.
queries = Table(
    "queries",
    metadata,
    Column("query_id", String(200), primary_key=True),
    Column("round", Integer, nullable=False),
    Column("position", Integer, nullable=False, comment="The order of asking."),
    Column("kind", String(16), nullable=False),
    Column("overlap", Integer, nullable=False, comment="Annotators wanted."),
    Column("answers", Integer, nullable=False, server_default=sql("0"), comment="Annotators who answered; not skips."),
    Column("is_gold", Boolean, nullable=False, server_default=sql("false"), comment="Its answer is in gold_answers."),
    Column("people_only", Boolean, nullable=False, server_default=sql("false"), comment="Models are not asked."),
    Column("added_at", Float, nullable=False),
    Column("closed_at", Float, comment="Since when no more answers are wanted; never, for a gold question."),
    Column("retired_at", Float, comment="Since when it is asked no more."),
    Column("prompt_id", Text, nullable=False),
    Column("category", Text),
    Column("completion_ids", JSON, nullable=False),
    Column("messages", JSON, nullable=False),
    Column("completions", JSON, nullable=False),
    CheckConstraint("kind IN ('pairwise', 'rating', 'ranking')", name="kind"),
    CheckConstraint("overlap >= 1", name="overlap"),
)
# Where the next question is looked for, in the order of asking.
_asked = and_(queries.c.closed_at.is_(None), queries.c.retired_at.is_(None))
Index(
    "ix_queries_next",
    queries.c.is_gold,
    queries.c.round,
    queries.c.position,
    queries.c.query_id,
    sqlite_where=_asked,
    postgresql_where=_asked,
)

gold_answers = Table(
    "gold_answers",
    metadata,
    Column("query_id", ForeignKey(queries.c.query_id), primary_key=True),
    Column("answer", JSON, nullable=False),
    Column("why", Text, nullable=False, server_default=sql("''")),
)

annotators = Table(
    "annotators",
    metadata,
    Column("annotator_id", Integer, primary_key=True),
    Column("name", String(200), nullable=False, unique=True),
    Column("kind", String(16), nullable=False),
    Column("role", String(16), nullable=False),
    Column("added_at", Float, nullable=False),
    CheckConstraint("kind IN ('person', 'judge', 'gold', 'simulated', 'import')", name="kind"),
    CheckConstraint("role IN ('annotator', 'lead')", name="role"),
)

leases = Table(
    "leases",
    metadata,
    Column("lease_id", String(64), primary_key=True),
    Column("query_id", ForeignKey(queries.c.query_id), nullable=False),
    Column("annotator_id", ForeignKey(annotators.c.annotator_id), nullable=False),
    Column("shown", JSON, nullable=False, comment="completion_ids in the order shown."),
    Column("given_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("closed_at", Float),
)
Index(
    "uq_leases_open",
    leases.c.query_id,
    leases.c.annotator_id,
    unique=True,
    sqlite_where=leases.c.closed_at.is_(None),
    postgresql_where=leases.c.closed_at.is_(None),
)
Index(None, leases.c.annotator_id, leases.c.closed_at)

labels = Table(
    "labels",
    metadata,
    Column("label_id", Integer, primary_key=True),
    Column("key", String(64), nullable=False, comment="Idempotency key: the same answer is stored once."),
    Column("query_id", ForeignKey(queries.c.query_id), nullable=False),
    Column("annotator_id", ForeignKey(annotators.c.annotator_id), nullable=False),
    Column("answer", JSON, nullable=False),
    Column("skipped", Boolean, nullable=False, comment="Passed on: counts for nothing."),
    Column("shown", JSON, nullable=False),
    Column("seconds", Float),
    Column("note", Text, nullable=False, server_default=sql("''")),
    Column("flagged", Boolean, nullable=False, server_default=sql("false")),
    Column("adjudicated", Boolean, nullable=False, server_default=sql("false")),
    Column("created_at", Float, nullable=False),
    Column("supersedes", ForeignKey("labels.label_id"), comment="The label that this corrects."),
    # Each annotator has keys of their own: nobody can take another's.
    UniqueConstraint("annotator_id", "key"),
)
# One first label for each person and query; corrections hang on it in a chain. What a lead settles is a chain of its
# own, so that their own answer stays beside it.
Index(
    "uq_labels_first",
    labels.c.annotator_id,
    labels.c.query_id,
    labels.c.adjudicated,
    unique=True,
    sqlite_where=labels.c.supersedes.is_(None),
    postgresql_where=labels.c.supersedes.is_(None),
)
# Of what is corrected only: SQLite would look up the first labels by it.
Index(
    "uq_labels_supersedes",
    labels.c.supersedes,
    unique=True,
    sqlite_where=labels.c.supersedes.is_not(None),
    postgresql_where=labels.c.supersedes.is_not(None),
)
Index(None, labels.c.query_id, labels.c.annotator_id, labels.c.label_id)
Index(None, labels.c.annotator_id, labels.c.label_id)

judge_calls = Table(
    "judge_calls",
    metadata,
    Column("call_id", Integer, primary_key=True),
    Column("query_id", ForeignKey(queries.c.query_id), nullable=False),
    Column("annotator_id", ForeignKey(annotators.c.annotator_id), nullable=False),
    Column("variant", Integer, nullable=False, comment="The order shown: 0 as in the query, 1 reversed."),
    Column("attempt", Integer, nullable=False),
    Column("sent_at", Float, nullable=False),
    Column("received_at", Float),
    Column("reply", Text),
    Column("prompt_tokens", Integer),
    Column("completion_tokens", Integer),
    Column("cost", Float, comment="In the currency of the prices that were given."),
    UniqueConstraint("query_id", "annotator_id", "variant", "attempt"),
)

tokens = Table(
    "tokens",
    metadata,
    Column("token_id", Integer, primary_key=True),
    Column("annotator_id", ForeignKey(annotators.c.annotator_id), nullable=False),
    Column("hash", String(64), nullable=False, unique=True, comment="SHA-256 of 256 random bits."),
    Column("issued_at", Float, nullable=False),
    Column("expires_at", Float),
    Column("revoked_at", Float),
)

sessions = Table(
    "sessions",
    metadata,
    Column("hash", String(64), primary_key=True),
    Column("token_id", ForeignKey(tokens.c.token_id), nullable=False),
    Column("started_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
    Column("ended_at", Float),
)

events = Table(
    "events",
    metadata,
    Column("event_id", Integer, primary_key=True),
    Column("at", Float, nullable=False),
    Column("annotator_id", ForeignKey(annotators.c.annotator_id)),
    Column("action", String(32), nullable=False),
    Column("details", JSON, nullable=False),
)
