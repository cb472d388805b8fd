"""Queries -> labels: what people and models say of the answers they are asked about, kept for good.

store.py       one run's questions and answers: `Store`, which everything else goes through
  queries.py     what is to be asked: rounds, gold questions, checks, progress
  asking.py      who is asked what next: leases
  gold_places.py   where gold questions come among them
  answers.py     labels: recorded once, corrected in chains
  people.py      annotators
  rows.py        rows <-> records, answers <-> JSON
  snapshot.py    a copy to read from, where a store cannot be written
  database.py    SQLite or PostgreSQL, opened and migrated; every failure one StoreError
  schema.py      the tables; migrations/ makes them
questions.py   the tables of a round -> questions
access.py      tokens and sessions
annotators/    models that answer
web/           the page where people answer
votes.py       answers as numbers
quality.py     how far the labels can be trusted
reliability.py what each annotator's answers are worth
preference_graph.py  cycles among preferences, and rewards without them
aggregate.py   labels -> weighted preference pairs; pairs.py: what those are
overview.py    what a lead sees
wording.py     answers in a few words; blind.py: the order in which completions are called A, B, ...
gold_questions.py    a file of questions whose answer is known
exchange/      labels to and from other tools
"""
