"""Answers that follow a grammar: JSON schemas, regular expressions, choices, GBNF and Lark, by llguidance.

`grammar` turns a request's words into a grammar, `schema` checks JSON schemas, `compiler` compiles off the event loop
and keeps what it compiled, `matcher` is the state of one sequence, `vocabulary` the engine's tokens as bytes.
"""
