"""Where distclip meets other programs: the only folder that may import a framework, and nothing imports it."""
