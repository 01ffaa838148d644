"""What operators are told: the kinds of events (`kinds`), the one way to tell them (`emitter`) and to whom (`sinks`).

Import from the modules: `kinds` is pure and needed by pure modules; `emitter` and `sinks` do I/O.
"""
