"""Alembic's revisions of the label store."""
