"""The tables of the label store, and triggers that keep labels and the audit trail append-only."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Apply this revision."""
    _about()
    _queries()
    _annotators()
    _leases()
    _labels()
    _judge_calls()
    _access()
    _events()
    for table in ("labels", "events"):
        _append_only(table)


def _about() -> None:
    op.create_table(
        "about",
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_about"),
        comment="Which run this store belongs to.",
    )


def _queries() -> None:
    op.create_table(
        "queries",
        sa.Column("query_id", sa.String(200), nullable=False),
        sa.Column("round", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False, comment="The order of asking."),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("overlap", sa.Integer(), nullable=False, comment="Annotators wanted."),
        sa.Column(
            "answers",
            sa.Integer(),
            nullable=False,
            server_default=sa.text("0"),
            comment="Annotators who answered; not skips.",
        ),
        sa.Column(
            "is_gold",
            sa.Boolean(),
            nullable=False,
            server_default=sa.text("false"),
            comment="Its answer is in gold_answers.",
        ),
        sa.Column(
            "people_only",
            sa.Boolean(),
            nullable=False,
            server_default=sa.text("false"),
            comment="Models are not asked.",
        ),
        sa.Column("added_at", sa.Float(), nullable=False),
        sa.Column(
            "closed_at", sa.Float(), comment="Since when no more answers are wanted; never, for a gold question."
        ),
        sa.Column("retired_at", sa.Float(), comment="Since when it is asked no more."),
        sa.Column("prompt_id", sa.Text(), nullable=False),
        sa.Column("category", sa.Text()),
        sa.Column("completion_ids", sa.JSON(), nullable=False),
        sa.Column("messages", sa.JSON(), nullable=False),
        sa.Column("completions", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("query_id", name="pk_queries"),
        sa.CheckConstraint("kind IN ('pairwise', 'rating', 'ranking')", name=op.f("ck_queries_kind")),
        sa.CheckConstraint("overlap >= 1", name=op.f("ck_queries_overlap")),
    )
    asked = sa.text("closed_at IS NULL AND retired_at IS NULL")
    columns = ["is_gold", "round", "position", "query_id"]
    op.create_index("ix_queries_next", "queries", columns, sqlite_where=asked, postgresql_where=asked)
    op.create_table(
        "gold_answers",
        sa.Column("query_id", sa.String(200), nullable=False),
        sa.Column("answer", sa.JSON(), nullable=False),
        sa.Column("why", sa.Text(), nullable=False, server_default=sa.text("''")),
        sa.PrimaryKeyConstraint("query_id", name="pk_gold_answers"),
        sa.ForeignKeyConstraint(["query_id"], ["queries.query_id"], name="fk_gold_answers_query_id_queries"),
    )


def _annotators() -> None:
    op.create_table(
        "annotators",
        sa.Column("annotator_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("added_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("annotator_id", name="pk_annotators"),
        sa.UniqueConstraint("name", name="uq_annotators_name"),
        sa.CheckConstraint(
            "kind IN ('person', 'judge', 'gold', 'simulated', 'import')", name=op.f("ck_annotators_kind")
        ),
        sa.CheckConstraint("role IN ('annotator', 'lead')", name=op.f("ck_annotators_role")),
    )


def _leases() -> None:
    op.create_table(
        "leases",
        sa.Column("lease_id", sa.String(64), nullable=False),
        sa.Column("query_id", sa.String(200), nullable=False),
        sa.Column("annotator_id", sa.Integer(), nullable=False),
        sa.Column("shown", sa.JSON(), nullable=False, comment="completion_ids in the order shown."),
        sa.Column("given_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.Column("closed_at", sa.Float()),
        sa.PrimaryKeyConstraint("lease_id", name="pk_leases"),
        *_whose("leases"),
    )
    still_open = sa.text("closed_at IS NULL")
    op.create_index(
        "uq_leases_open",
        "leases",
        ["query_id", "annotator_id"],
        unique=True,
        sqlite_where=still_open,
        postgresql_where=still_open,
    )
    op.create_index("ix_leases_annotator_id_closed_at", "leases", ["annotator_id", "closed_at"])


def _labels() -> None:
    op.create_table(
        "labels",
        sa.Column("label_id", sa.Integer(), nullable=False),
        sa.Column("key", sa.String(64), nullable=False, comment="Idempotency key: the same answer is stored once."),
        sa.Column("query_id", sa.String(200), nullable=False),
        sa.Column("annotator_id", sa.Integer(), nullable=False),
        sa.Column("answer", sa.JSON(), nullable=False),
        sa.Column("skipped", sa.Boolean(), nullable=False, comment="Passed on: counts for nothing."),
        sa.Column("shown", sa.JSON(), nullable=False),
        sa.Column("seconds", sa.Float()),
        sa.Column("note", sa.Text(), nullable=False, server_default=sa.text("''")),
        sa.Column("flagged", sa.Boolean(), nullable=False, server_default=sa.text("false")),
        sa.Column("adjudicated", sa.Boolean(), nullable=False, server_default=sa.text("false")),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("supersedes", sa.Integer(), comment="The label that this corrects."),
        sa.PrimaryKeyConstraint("label_id", name="pk_labels"),
        sa.UniqueConstraint("annotator_id", "key", name="uq_labels_annotator_id_key"),
        sa.ForeignKeyConstraint(["supersedes"], ["labels.label_id"], name="fk_labels_supersedes_labels"),
        *_whose("labels"),
    )
    first = sa.text("supersedes IS NULL")
    op.create_index(
        "uq_labels_first",
        "labels",
        ["annotator_id", "query_id", "adjudicated"],
        unique=True,
        sqlite_where=first,
        postgresql_where=first,
    )
    correcting = sa.text("supersedes IS NOT NULL")
    op.create_index(
        "uq_labels_supersedes",
        "labels",
        ["supersedes"],
        unique=True,
        sqlite_where=correcting,
        postgresql_where=correcting,
    )
    whose = ["query_id", "annotator_id", "label_id"]
    op.create_index("ix_labels_query_id_annotator_id_label_id", "labels", whose)
    op.create_index("ix_labels_annotator_id_label_id", "labels", ["annotator_id", "label_id"])


def _judge_calls() -> None:
    op.create_table(
        "judge_calls",
        sa.Column("call_id", sa.Integer(), nullable=False),
        sa.Column("query_id", sa.String(200), nullable=False),
        sa.Column("annotator_id", sa.Integer(), nullable=False),
        sa.Column("variant", sa.Integer(), nullable=False, comment="The order shown: 0 as in the query, 1 reversed."),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("sent_at", sa.Float(), nullable=False),
        sa.Column("received_at", sa.Float()),
        sa.Column("reply", sa.Text()),
        sa.Column("prompt_tokens", sa.Integer()),
        sa.Column("completion_tokens", sa.Integer()),
        sa.Column("cost", sa.Float(), comment="In the currency of the prices that were given."),
        sa.PrimaryKeyConstraint("call_id", name="pk_judge_calls"),
        sa.UniqueConstraint(
            "query_id",
            "annotator_id",
            "variant",
            "attempt",
            name="uq_judge_calls_query_id_annotator_id_variant_attempt",
        ),
        *_whose("judge_calls"),
    )


def _access() -> None:
    op.create_table(
        "tokens",
        sa.Column("token_id", sa.Integer(), nullable=False),
        sa.Column("annotator_id", sa.Integer(), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False, comment="SHA-256 of 256 random bits."),
        sa.Column("issued_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float()),
        sa.Column("revoked_at", sa.Float()),
        sa.PrimaryKeyConstraint("token_id", name="pk_tokens"),
        sa.UniqueConstraint("hash", name="uq_tokens_hash"),
        _annotator("tokens"),
    )
    op.create_table(
        "sessions",
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("token_id", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.Float(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.Column("ended_at", sa.Float()),
        sa.PrimaryKeyConstraint("hash", name="pk_sessions"),
        sa.ForeignKeyConstraint(["token_id"], ["tokens.token_id"], name="fk_sessions_token_id_tokens"),
    )


def _events() -> None:
    op.create_table(
        "events",
        sa.Column("event_id", sa.Integer(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("annotator_id", sa.Integer()),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("event_id", name="pk_events"),
        _annotator("events"),
    )


def _annotator(table: str) -> sa.ForeignKeyConstraint:
    name = f"fk_{table}_annotator_id_annotators"
    return sa.ForeignKeyConstraint(["annotator_id"], ["annotators.annotator_id"], name=name)


def _whose(table: str) -> tuple[sa.ForeignKeyConstraint, sa.ForeignKeyConstraint]:
    query = sa.ForeignKeyConstraint(["query_id"], ["queries.query_id"], name=f"fk_{table}_query_id_queries")
    return query, _annotator(table)


def _append_only(table: str) -> None:
    """Refuse changes whoever asks for them: this package's own code, or somebody at a database prompt."""
    message = f"{table} are never changed or deleted"
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{message}'); END"
            )
        return
    op.execute(
        f"CREATE FUNCTION refuse_{table}() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{message}'; END $$"
    )
    op.execute(
        f"CREATE TRIGGER {table}_no_change BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
        f"FOR EACH STATEMENT EXECUTE FUNCTION refuse_{table}()"
    )
