"""What Alembic runs: the revisions, on the connection that `database.open_engine` holds."""

from alembic import context

from dissonance.feedback.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    version_table=context.config.attributes["version_table"],
    target_metadata=metadata,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
