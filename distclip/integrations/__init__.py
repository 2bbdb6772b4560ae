"""Where distclip meets training frameworks: the only folder that may import one, and nothing imports it.

`deepspeed`: `attach` to an engine, from ZeRO stage 0 to 3.
"""
