"""Tools: how a model is told of them, how its calls are held to their schemas, and how they are read from its text.

`formats` is the table of ways to write a call, `prompt` puts tools and past calls into the conversation, `grammar`
holds calls to the schemas, `parser` reads them as they stream.
"""
