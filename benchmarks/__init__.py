"""One script, or one package, a question: `python -m benchmarks.NAME` from the repository's root. README.md lists them.

What they share: ranks (processes of a job), slow_network (hosts), steps (training steps timed by phase), timing, memory
and report (tables, hardware, what --out writes).
"""
