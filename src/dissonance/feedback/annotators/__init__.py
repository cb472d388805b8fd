"""Models that answer: a judge behind an HTTP endpoint, a gold reward model, a simulated person.

run.py          store, annotator -> labels: leases, threads, resuming     the one loop for all of them
judge.py        any OpenAI-compatible endpoint   judge_prompt.py, judge_reply.py, judge_calls.py, budget.py
rewards.py      the rewards behind the next two
gold.py         a second reward model or a callable
simulated.py    a person made of a gold reward and stated faults
"""
